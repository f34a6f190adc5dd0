"""The load warps of `prefill`, one for Q and K and one for V, and how a decision reaches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Cursor
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Mmas, Shared
from cute_fmha.kernels.blackwell.prefill_work import Work


@dataclass(frozen=True)
class Counts(Carried):
    """KV tiles of this CTA so far, each for every Q tile."""

    skipped: Int32
    visited: Int32


def decision(shared: Shared, barriers: Barriers, group: Any, phase: Int32) -> Boolean:
    """Wait for a softmax warpgroup's next decision, of parity ``phase``: whether the KV tile is
    kept."""
    barriers.wait_tmem("decided", phase, group)
    return shared.keeps(group)


def partition(tma: Any, shared: Any, tile: Any) -> Any:
    """(shared buffers, global tiles) of a TMA load without multicast: (TMA, STAGE | TILE)."""
    return cpasync.tma_partition(
        tma, 0, cute.make_layout(1), cute.group_modes(shared, 0, 3), cute.group_modes(tile, 0, 3)
    )


def fetch(
    name: str, tma: cute.CopyAtom, tiles: Any, n: Int32, buffers: Any, size: int, cursor: Cursor,
    barriers: Barriers,
) -> Cursor:  # fmt: skip
    """Load KV tile ``n`` of K or V as soon as the next buffer of its ring is free."""
    barriers.wait(f"{name}_empty", cursor.empty_phase, cursor.index)
    bar = barriers.expect(f"{name}_full", size, cursor.index)
    cute.copy(tma, tiles[None, n], buffers[None, cursor.index], tma_bar_ptr=bar)
    return cursor.next()


@cute.jit
def load(plan: Plan, work: Work, mmas: Mmas, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: Q, K in global memory. Writes: sQ, sK by TMA.
    Waits: q_empty, k_empty. Signals: q_full, k_full. Registers: 48."""
    element = plan.dtype.itemsize
    qk = mmas.qk.get_slice(work.rank)
    q_bytes = plan.mma_rows * plan.head_dim * element
    k_bytes = plan.tile_n * plan.head_dim * element
    q_phase = Int32(0)
    k = Cursor(plan.k_stages)
    tile = work.first(barriers)
    while tile.exists:
        # (ROW, D, ROW_TILE), (KEY, D, KEY_TILE)
        gQ = cute.local_tile(work.queries(tile, mem.mQ), (plan.mma_rows, plan.head_dim), (None, 0))
        gK = cute.local_tile(work.key_rows(tile, mem.mK), (plan.tile_n, plan.head_dim), (None, 0))
        # (TMA, STAGE) and (TMA, TILE) each
        tQsQ, tQgQ = partition(mem.tma_q, shared.sQ, qk.partition_A(gQ))
        tKsK, tKgK = partition(mem.tma_k, shared.sK, qk.partition_B(gK))
        first, end, _ = work.keys(tile)
        if end > first:
            k = fetch("k", mem.tma_k, tKgK, first, tKsK, k_bytes, k, barriers)
            for t in cutlass.range_constexpr(plan.q_tiles):
                barriers.wait("q_empty", q_phase ^ 1, t)
                bar = barriers.expect("q_full", q_bytes, t)
                row_tile = tile.block * plan.q_tiles + t
                cute.copy(mem.tma_q, tQgQ[None, row_tile], tQsQ[None, t], tma_bar_ptr=bar)
            q_phase = q_phase ^ 1
            n = work.after(tile, first, end)
            while n < end:
                k = fetch("k", mem.tma_k, tKgK, n, tKsK, k_bytes, k, barriers)
                n = work.after(tile, n, end)
        tile = work.next(tile, barriers)


@cute.jit
def load_values(
    plan: Plan, work: Work, mmas: Mmas, mem: Global, shared: Shared, barriers: Barriers
):  # fmt: skip
    """V by a warp of its own: only it waits for decisions, K is always ahead of them. As it hears
    of all of them, it also counts them.

    Reads: V in global memory. Writes: sV by TMA, the counters.
    Waits: decided, v_empty, stored. Signals: decision_read, v_full, stored_read. Registers: 48."""
    pv = mmas.pv.get_slice(work.rank)
    v_bytes = plan.tile_n * plan.head_dim_v * plan.dtype.itemsize
    decisions = [Int32(0) for _ in range(plan.q_tiles)]
    turn = Cursor(2)  # in a pair, whose warpgroups decide by turns
    v = Cursor(plan.v_stages)
    stored = Int32(0)
    counts = Counts(Int32(0), Int32(0))
    tile = work.first(barriers)
    while tile.exists:
        if cutlass.const_expr(plan.o_over_v):
            # The output of the work tile before lies where V comes to.
            barriers.wait("stored", stored ^ 1)
            barriers.arrive("stored_read")
            stored = stored ^ 1
        # (DV, KEY, KEY_TILE)
        gV = cute.local_tile(
            work.value_rows(tile, mem.mV), (plan.head_dim_v, plan.tile_n), (0, None)
        )
        # (TMA, STAGE) and (TMA, TILE)
        tVsV, tVgV = partition(mem.tma_v, shared.sV, pv.partition_B(gV))
        n, end, q_tiles = work.keys(tile)
        while n < end:
            if cutlass.const_expr(plan.features.skip):
                # The first Q tile that keeps it fetches it, whatever a later one decides.
                fetched = Boolean(False)
                for t in cutlass.range_constexpr(plan.q_tiles):
                    if work.has(tile, q_tiles, t, n):
                        if cutlass.const_expr(plan.pair):
                            keep = decision(shared, barriers, turn.index, turn.phase)
                            barriers.arrive("decision_read", turn.index)
                            turn = turn.next()
                        else:
                            keep = decision(shared, barriers, t, decisions[t])
                            barriers.arrive("decision_read", t)
                            decisions[t] = decisions[t] ^ 1
                        counts = Counts(counts.skipped + Int32(not keep), counts.visited + 1)
                        if keep and not fetched:
                            v = fetch("v", mem.tma_v, tVgV, n, tVsV, v_bytes, v, barriers)
                            fetched = Boolean(True)
            else:
                v = fetch("v", mem.tma_v, tVgV, n, tVsV, v_bytes, v, barriers)
                if cutlass.const_expr(plan.features.count):
                    for t in cutlass.range_constexpr(plan.q_tiles):
                        if work.has(tile, q_tiles, t, n):
                            counts = Counts(counts.skipped, counts.visited + 1)
            n = work.after(tile, n, end)
        tile = work.next(tile, barriers)
    if cutlass.const_expr(plan.features.count):  # noqa: SIM102  (compile and run time)
        if work.rank == 0:
            with cute.arch.elect_one():
                cute.arch.atomic_add(mem.mStats.iterator, Int64(counts.skipped))
                cute.arch.atomic_add(mem.mStats.iterator + 1, Int64(counts.visited))
    # The release of the last V is the last signal of the tensor core: stay until it is in.
    for _stage in cutlass.range_constexpr(plan.v_stages):
        barriers.wait("v_empty", v.empty_phase, v.index)
        v = v.next()
