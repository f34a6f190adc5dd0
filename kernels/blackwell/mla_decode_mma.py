"""The MMA warp of `mla_decode`."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell.mla_decode_operands import DTYPES, Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import ROWS, UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.mma import Operand, instruction_descriptor, multiply
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor, Fixed

FORM = "ws.cta_group::1"
"""M = 64 on all 128 lanes: the upper half of N lies in lanes 64–127."""

STEPS = range(0, 128, 32)
"""The K steps of a unit, 16 values each, in bytes."""


def tile_of(sTile: Any) -> Int32:
    """The shared address of a buffer."""
    return sTile.iterator.toint()


class Products(Fixed):
    """S = Q Kᵀ by units of 64 columns, and O += P V by halves of 256 columns."""

    def __init__(self, plan: MlaPlan, shared: Shared, tmem: Any) -> None:
        self.plan = plan
        dtype = DTYPES[plan.dtype]
        self.qk = instruction_descriptor(dtype, ROWS, plan.tile_n, False)
        self.pv = instruction_descriptor(dtype, ROWS, plan.head_dim_v // 2, True)
        columns = tmem.toint()
        self.tS, self.tO, self.tQ = (columns + plan.tmem[name].start for name in ("S", "O", "Q"))
        latent, group = tile_of(shared.sLatent), 8 * 128
        # K-major: rows are keys, or rows of Q and of P.
        self.keys = Operand.swizzled(latent, 0, group, tuple(STEPS), plan.half_bytes)
        if plan.rope:
            self.rope = Operand.swizzled(tile_of(shared.sRope), 0, group, tuple(STEPS), UNIT_BYTES)
        self.q = Operand.swizzled(tile_of(shared.sQ), 0, group, tuple(STEPS), UNIT_BYTES)
        p_bytes = ROWS * plan.tile_n * 2
        self.p = Operand.swizzled(tile_of(shared.sP), 0, group, tuple(STEPS), p_bytes)
        # The same bytes MN-major: 64 columns of a unit are its rows, K steps are 16 keys.
        self.values = Operand.swizzled(
            latent, UNIT_BYTES, group, tuple(range(0, UNIT_BYTES, 16 * 128)), plan.half_bytes
        )

    def scores(self, half: int, stage: Int32) -> None:
        """S (+)= Q Kᵀ over the latent columns of a half; the first half overwrites S."""
        units = self.plan.half_units
        for unit in range(half * units, (half + 1) * units):
            b_tile = self.keys.tile(stage) + unit % units * (UNIT_BYTES >> 4)
            self.unit(unit, self.keys, b_tile, unit > 0)

    def scores_rope(self, stage: Int32) -> None:
        """S += Q Kᵀ over the rope columns."""
        self.unit(self.plan.units - 1, self.rope, self.rope.tile(stage), True)

    def unit(self, unit: int, b: Operand, b_tile: Int32, accumulate: bool) -> None:
        """S (+)= Q Kᵀ over one unit; its Q is in TMEM or in shared memory."""
        in_shared = unit - self.plan.q_tmem_units
        if in_shared < 0:
            tQ = self.tQ + unit * UNIT // 2
            multiply(FORM, self.tS, tQ, b, b_tile, self.qk, accumulate)
        else:
            q_tile = in_shared * self.q.stage
            multiply(FORM, self.tS, self.q, b, b_tile, self.qk, accumulate, q_tile)

    def output(self, half: int, stage: Int32, p_stage: Int32, accumulate: Boolean) -> None:
        """O (+)= P V over the value columns of a half."""
        tO = self.tO + half * self.plan.head_dim_v // 4
        p_tile, v_tile = p_stage * self.p.stage, self.values.tile(stage)
        multiply(FORM, tO, self.p, self.values, v_tile, self.pv, accumulate, p_tile)


@cute.jit
def mma(plan: MlaPlan, work: Work, shared: Shared, tmem: cute.Pointer, barriers: Barriers):
    """Reads: Q, sQ, sLatent, sRope, sP. Writes: S, O.
    Waits: q_full, k_full, rope_full, s_empty, p_ready, o_empty.
    Signals: k_empty, rope_empty, s_full, pv_done, o_full. Registers: 120."""
    products = Products(plan, shared, tmem)
    k, v = Cursor(plan.stages), Cursor(plan.stages)
    rope, p = Cursor(plan.rope_stages), Cursor(plan.p_stages)
    ready = Cursor(2)
    q_phase, s_phase, o_phase = Int32(0), Int32(0), Int32(0)
    first_work, works, step = work.indices()
    for index in cutlass.range(first_work, works, step, unroll=1):
        keys = work.keys(work.tile(index))
        fresh = Boolean(True)
        if keys.end > keys.begin:
            barriers.wait_tmem("q_full", q_phase)
            q_phase = q_phase ^ 1
        for n in cutlass.range(keys.begin, keys.end + Int32(keys.end > keys.begin), unroll=1):
            if n < keys.end:
                barriers.wait_tmem("s_empty", s_phase ^ 1)
                s_phase = s_phase ^ 1
                for half in cutlass.range_constexpr(2):
                    barriers.wait("k_full", k.phase, k.index)
                    products.scores(half, k.index)
                    k = k.next()
                if cutlass.const_expr(plan.rope):
                    barriers.wait("rope_full", rope.phase, rope.index)
                    products.scores_rope(rope.index)
                    barriers.commit("rope_empty", rope.index)
                    rope = rope.next()
                barriers.commit("s_full")
            if n == keys.begin + 1:
                barriers.wait_tmem("o_empty", o_phase ^ 1)
                o_phase = o_phase ^ 1
            if n > keys.begin:
                barriers.wait_tmem("p_ready", ready.phase, ready.index)
                keep = Boolean(True)
                if cutlass.const_expr(plan.features.skip):
                    keep = shared.sKeep[ready.index] != 0
                ready = ready.next()
                if keep:
                    products.output(0, v.index, p.index, not fresh)
                    barriers.commit("k_empty", v.index)
                    v = v.next()
                    products.output(1, v.index, p.index, not fresh)
                    barriers.commit("k_empty", v.index)
                    v = v.next()
                    barriers.commit("pv_done", p.index)
                    p = p.next()
                    fresh = Boolean(False)
                else:
                    for _half in cutlass.range_constexpr(2):
                        barriers.commit("k_empty", v.index)
                        v = v.next()
        if keys.end > keys.begin:
            barriers.commit("o_full")
