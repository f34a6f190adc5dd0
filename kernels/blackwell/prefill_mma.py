"""The MMA warp of `prefill`."""

from __future__ import annotations

import itertools
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.mma import (
    Operand,
    instruction_descriptor,
    multiply_shared,
    multiply_tmem,
)
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.prefill_load import decision
from cute_fmha.kernels.blackwell.prefill_operands import Mmas, Shared
from cute_fmha.kernels.blackwell.prefill_work import Work


def operands(plan: Plan, mmas: Mmas, shared: Shared) -> tuple[Operand, Operand, Operand, int, int]:
    """Q, K and V as the tensor core reads them, the kinds of Q Kᵀ and of P V."""
    dtype = DTYPES[plan.dtype]
    qk, pv = mmas.qk.get_slice(0), mmas.pv.get_slice(0)
    return (
        # (MMA, MMA_M, MMA_K, TILE), (MMA, MMA_N, MMA_K, STAGE) twice
        Operand.of(qk.make_fragment_A(shared.sQ)),
        Operand.of(qk.make_fragment_B(shared.sK)),
        Operand.of(pv.make_fragment_B(shared.sV)),
        instruction_descriptor(dtype, plan.mma_rows, plan.tile_n, False),
        instruction_descriptor(dtype, plan.mma_rows, plan.head_dim_v, True),
    )


def gates(
    plan: Plan, barriers: Barriers, group: Any, phase: Int32
) -> tuple[dict[int, int], tuple[Int32, Int32]]:
    """What steps over P of a group wait for, as `multiply_tmem` has it."""
    offsets = {}
    for (part, _), (_, name) in itertools.pairwise(plan.p_handed):
        address, offsets[part * plan.tile_n // 128] = barriers.place(name, group)
    return offsets, (address, phase)


@cute.jit
def mma(
    plan: Plan, work: Work, mmas: Mmas, shared: Shared, tmem: cute.Pointer, barriers: Barriers
):  # fmt: skip
    """Reads: sQ, sK, sV, P. Writes: S, O in TMEM.
    Waits: q_full, k_full, v_full, p_ready, p_more, p_last, decided.
    Signals: q_empty, k_empty, v_empty, s_full, o_full. Registers: 48."""
    q, k_tiles, v_tiles, qk_kind, pv_kind = operands(plan, mmas, shared)
    columns = tmem.toint()
    tS, tP, tO = (
        [columns + plan.tmem[f"{name}{t}"].start for t in range(plan.q_tiles)]
        for name in ("S", "P", "O")
    )
    q_phase = Int32(0)
    p_phase = [Int32(0) for _ in range(plan.q_tiles)]
    decisions = [Int32(0) for _ in range(plan.q_tiles)]
    k, v = Cursor(plan.k_stages), Cursor(plan.v_stages)
    tile = work.first(barriers)
    while tile.exists:
        first, end, q_tiles = work.keys(tile)
        if end > first:
            for t in cutlass.range_constexpr(plan.q_tiles):
                barriers.wait("q_full", q_phase, t)
            q_phase = q_phase ^ 1
            accumulate = [Int32(0) for _ in range(plan.q_tiles)]
            # P V of tile n and Q Kᵀ of the tile that is coming; the first time only the latter, of
            # which the compiler must not know, or it makes a copy of the loop for it. What a branch
            # sets is hidden from it, too: else it computes that again, from the branch's condition.
            n = ptx.opaque(first - 1)
            second = Int32(1)  # whether the second Q tile keeps KV tile n; −1: not known yet
            while n < end:
                coming = work.after(tile, n, end)
                k_tile = ptx.opaque(k_tiles.tile(k.index))
                v_tile = ptx.opaque(v_tiles.tile(v.index))
                v_used = Int32(0)
                before, second, made = second, Int32(-1), Int32(0)
                for t in cutlass.range_constexpr(plan.q_tiles):
                    if work.has(tile, q_tiles, t, n):
                        keep = Boolean(True)
                        if cutlass.const_expr(plan.features.skip and t == 0):
                            keep = decision(shared, barriers, 0, decisions[0])
                            decisions[0] = decisions[0] ^ 1
                        elif cutlass.const_expr(plan.features.skip):
                            if second < 0:
                                second = ptx.opaque(
                                    Int32(decision(shared, barriers, 1, decisions[1]))
                                )
                            keep = second != 0
                            decisions[1] = decisions[1] ^ 1
                        if keep:
                            if cutlass.const_expr(plan.features.skip and t == 0):  # noqa: SIM102
                                # P is in the making. The second Q tile, if it skipped the tile
                                # before, decides meanwhile, and its next S may have nothing to
                                # wait for; else it is P of this one that comes first.
                                if (before == 0) & work.has(tile, q_tiles, 1, n):
                                    second = ptx.opaque(
                                        Int32(decision(shared, barriers, 1, decisions[1]))
                                    )
                                    if (second == 0) & work.has(tile, q_tiles, 1, coming):
                                        barriers.wait("k_full", k.phase, k.index)
                                        multiply_shared(
                                            tS[1], q, q.tile(1), k_tiles, k_tile, qk_kind,
                                            barriers.committing("s_full", 1),
                                        )  # fmt: skip
                                        made = ptx.opaque(Int32(1))
                            if v_used == 0:
                                barriers.wait("v_full", v.phase, v.index)
                            v_used = ptx.opaque(Int32(1))
                            barriers.wait_tmem("p_ready", p_phase[t], t)
                            multiply_tmem(
                                tO[t], tP[t], v_tiles, v_tile, pv_kind, accumulate[t],
                                *gates(plan, barriers, t, p_phase[t]),
                            )  # fmt: skip
                            accumulate[t] = ptx.opaque(Int32(1))
                            p_phase[t] = p_phase[t] ^ 1
                    if cutlass.const_expr(t == plan.q_tiles - 1):  # noqa: SIM102  (as below)
                        if v_used != 0:
                            # Before the last Q Kᵀ, whose end it would have to wait for.
                            barriers.commit("v_empty", v.index)
                            v = v.next()
                    if cutlass.const_expr(t == 0):  # noqa: SIM102  (compile and run time)
                        if coming < end:
                            barriers.wait("k_full", k.phase, k.index)
                    if work.has(tile, q_tiles, t, coming):
                        if cutlass.const_expr(t == 0) or made == 0:
                            multiply_shared(
                                tS[t], q, q.tile(t), k_tiles, k_tile, qk_kind,
                                barriers.committing("s_full", t),
                            )  # fmt: skip
                    elif n == q_tiles[t].end - 1 and work.has(tile, q_tiles, t, n):
                        barriers.commit("o_full", t)
                if coming < end:
                    barriers.commit("k_empty", k.index)
                    k = k.next()
                    if coming == end - 1:
                        for t in cutlass.range_constexpr(plan.q_tiles):
                            barriers.commit("q_empty", t)
                n = coming
        tile = work.next(tile, barriers)


@cute.jit
def mma_pair(
    plan: Plan, work: Work, mmas: Mmas, shared: Shared, tmem: cute.Pointer, barriers: Barriers
):  # fmt: skip
    """`mma` of a pair: the first CTA's for both. Q Kᵀ of the tile that is coming goes to the other
    S, before P V of tile n, whose P is still in the making.

    Reads, writes, waits and signals as `mma`."""
    q, k_tiles, v_tiles, qk_kind, pv_kind = operands(plan, mmas, shared)
    columns = tmem.toint()
    tS, tP, tO = (columns + plan.tmem[name].start for name in ("S0", "P0", "O0"))
    q_phase = Int32(0)
    # S that is next to be made, and to be decided on: KV tiles by turns. P of some is skipped.
    s, turn = Cursor(2), Cursor(2)
    p_phases = Int32(0)
    k, v = Cursor(plan.k_stages), Cursor(plan.v_stages)
    leads = work.rank == 0
    tile = work.first(barriers)
    while tile.exists:
        first, end, _ = work.keys(tile)
        if leads & (end > first):
            barriers.wait("q_full", q_phase)
            q_phase = q_phase ^ 1
            accumulate = Int32(0)
            n = ptx.opaque(first - 1)
            while n < end:
                coming = work.after(tile, n, end)
                if coming < end:
                    barriers.wait("k_full", k.phase, k.index)
                    multiply_shared(
                        tS + s.index * plan.tile_n, q, q.tile(0), k_tiles, k_tiles.tile(k.index),
                        qk_kind, barriers.committing("s_full", s.index), True,
                    )  # fmt: skip
                    barriers.commit("k_empty", k.index)
                    k, s = k.next(), s.next()
                    if coming == end - 1:
                        barriers.commit("q_empty")
                if n >= first:
                    g, p_phase = turn.index, turn.phase
                    keep = Boolean(True)
                    if cutlass.const_expr(plan.features.skip):
                        keep = decision(shared, barriers, g, turn.phase)
                        p_phase = p_phases >> g & 1
                    if keep:
                        barriers.wait("v_full", v.phase, v.index)
                        barriers.wait_tmem("p_ready", p_phase, g)
                        multiply_tmem(
                            tO, tP + g * plan.tile_n, v_tiles, v_tiles.tile(v.index), pv_kind,
                            accumulate, *gates(plan, barriers, g, p_phase), True,
                        )  # fmt: skip
                        accumulate = ptx.opaque(Int32(1))
                        barriers.commit("v_empty", v.index)
                        v = v.next()
                        p_phases = p_phases ^ (Int32(1) << g)
                    turn = turn.next()
                    if n == end - 1:
                        barriers.commit("o_full")
                n = coming
        tile = work.next(tile, barriers)
