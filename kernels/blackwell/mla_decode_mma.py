"""The MMA warp of `mla_decode`."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.mla_decode_operands import Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.mma import Operand, instruction_descriptor, multiply
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor, Fixed

STEPS = range(0, 128, 32)
"""The K steps of a unit, 16 values each, in bytes."""


def tile_of(sTile: Any) -> Int32:
    """The shared address of a buffer."""
    return sTile.iterator.toint()


class Products(Fixed):
    """S = Q Kᵀ by units of 64 columns, and O += P V.

    Both MMAs have 64 rows a CTA on all 128 lanes. Of one CTA (`.ws`) the upper half of N lies in
    lanes 64–127; of a pair the half of N whose B is the second CTA's. So S has the keys folded, O
    the value columns, and the descriptors are the same for both.
    """

    def __init__(self, plan: MlaPlan, shared: Shared, tmem: Any) -> None:
        self.plan = plan
        dtype = DTYPES[plan.dtype]
        self.form = "cta_group::2" if plan.pair else "ws.cta_group::1"
        self.qk = instruction_descriptor(dtype, plan.rows, plan.tile_n, False)
        self.pv = instruction_descriptor(dtype, plan.rows, plan.head_dim_v // 2, True)
        columns = tmem.toint()
        self.tS, self.tO, self.tQ = (columns + plan.tmem[name].start for name in ("S", "O", "Q"))
        latent, group = tile_of(shared.sLatent), 8 * 128
        # K-major: rows are keys, or rows of Q and of P.
        self.keys = Operand.swizzled(latent, 0, group, tuple(STEPS), plan.half_bytes)
        if plan.rope:
            self.rope = Operand.swizzled(tile_of(shared.sRope), 0, group, tuple(STEPS), UNIT_BYTES)
        self.q = Operand.swizzled(tile_of(shared.sQ), 0, group, tuple(STEPS), UNIT_BYTES)
        self.p = Operand.swizzled(tile_of(shared.sP), 0, group, tuple(STEPS), UNIT_BYTES)
        # The same bytes MN-major: 64 columns of a unit are its rows, K steps are 16 keys.
        self.values = Operand.swizzled(
            latent, UNIT_BYTES, group, tuple(range(0, UNIT_BYTES, 16 * 128)), plan.half_bytes
        )

    def scores(self, half: int, stage: Int32) -> None:
        """S (+)= Q Kᵀ over the latent columns of a half."""
        units = self.plan.half_units
        self.multiply_units(
            range(half * units, (half + 1) * units), self.keys, self.keys.tile(stage),
            half > 0 or self.plan.rope,
        )  # fmt: skip

    def scores_rope(self, stage: Int32) -> None:
        """S = Q Kᵀ over the rope columns."""
        last = self.plan.units - 1
        self.multiply_units(range(last, last + 1), self.rope, self.rope.tile(stage), False)

    def multiply_units(self, units: range, b: Operand, b_tile: Int32, accumulate: bool) -> None:
        """S (+)= Q Kᵀ over ``units`` of Q, which lie in TMEM and then in shared memory, and as many
        of B, from ``b_tile`` on."""
        border = min(max(self.plan.q_tmem_units, units.start), units.stop)
        in_tmem, in_shared = range(units.start, border), range(border, units.stop)
        if in_tmem:
            tQ = self.tQ + units.start * UNIT // 2
            multiply(self.form, self.tS, tQ, b.units(len(in_tmem)), b_tile, self.qk, accumulate)
        if in_shared:
            q_tile = (border - self.plan.q_tmem_units) * self.q.stage
            b_tile = b_tile + len(in_tmem) * (UNIT_BYTES >> 4)
            multiply(
                self.form, self.tS, self.q.units(len(in_shared)), b.units(len(in_shared)), b_tile,
                self.qk, accumulate or bool(in_tmem), q_tile,
            )  # fmt: skip

    def output(
        self, quarters: int, keys: int, stage: Int32, p_stage: Int32, accumulate: Any
    ) -> None:
        """128 columns of O (from 128 ``quarters`` on) (+)= P V over the keys of one unit of P."""
        tO = self.tO + quarters * self.plan.head_dim_v // 4
        p_tile = (p_stage * self.plan.p_units + keys) * self.p.stage
        v_tile = self.values.tile(stage)
        if self.plan.pair:
            v_tile = v_tile + quarters * self.plan.half_bytes // 2 // 16
        multiply(self.form, tO, self.p, self.values, v_tile, self.pv, accumulate, p_tile)


@cute.jit
def mma(plan: MlaPlan, work: Work, shared: Shared, tmem: cute.Pointer, barriers: Barriers):
    """Reads: Q, sQ, sLatent, sRope, sP. Writes: S, O.
    Waits: q_full, k_full, rope_full, s_empty, p_ready, swapped, o_empty.
    Signals: k_empty, rope_empty, s_full, pv_done, o_full. Registers: 120.

    Products of Q come behind the fence of s_empty, too, those of P behind that of p_ready."""
    products = Products(plan, shared, tmem)
    k, v = Cursor(plan.stages), Cursor(plan.stages)
    rope, p = Cursor(plan.rope_stages), Cursor(plan.p_stages)
    ready = Cursor(2)
    s = Cursor(2)
    q_phase, s_phase, o_phase = Int32(0), Int32(0), Int32(0)
    place = work.pieces.start
    while work.rank == 0 and work.pieces.more(place):
        keys = work.pieces.piece(place)
        fresh = Boolean(True)
        if keys.end > keys.begin:
            barriers.wait("q_full", q_phase)
            q_phase = q_phase ^ 1
        for n in cutlass.range(keys.begin, keys.end + Int32(keys.end > keys.begin), unroll=1):
            if n < keys.end:
                barriers.wait_tmem("s_empty", s_phase ^ 1)
                s_phase = s_phase ^ 1
                # Rope columns first: those of the next tile are fetched as soon as they are done,
                # and the last half of this one has longer to arrive.
                if cutlass.const_expr(plan.rope):
                    barriers.wait("rope_full", rope.phase, rope.index)
                    products.scores_rope(rope.index)
                    barriers.commit("rope_empty", rope.index)
                    rope = rope.next()
                for half in cutlass.range_constexpr(2):
                    barriers.wait("k_full", k.phase, k.index)
                    products.scores(half, k.index)
                    k = k.next()
                barriers.commit("s_full", s.index)
                s = s.next()
            if n == keys.begin + 1:
                barriers.wait("o_empty", o_phase ^ 1)
                o_phase = o_phase ^ 1
            if n > keys.begin:
                barriers.wait_tmem("p_ready", ready.phase, ready.index)
                keep = Boolean(True)
                if cutlass.const_expr(plan.features.skip):
                    keep = shared.keeps(ready.index)
                if cutlass.const_expr(plan.pair):
                    barriers.wait("swapped", ready.phase, ready.index)
                ready = ready.next()
                following = v.next()
                if keep:
                    if cutlass.const_expr(plan.pair):
                        # A stage has the value columns of this CTA, of half of the keys.
                        for quarters in cutlass.range_constexpr(2):
                            products.output(quarters, 0, v.index, p.index, not fresh)
                            products.output(quarters, 1, following.index, p.index, True)
                    else:
                        products.output(0, 0, v.index, p.index, not fresh)
                        barriers.commit("k_empty", v.index)
                        products.output(1, 0, following.index, p.index, not fresh)
                    barriers.commit("pv_done", p.index)
                    p = p.next()
                    fresh = Boolean(False)
                if cutlass.const_expr(plan.pair) or not keep:
                    barriers.commit("k_empty", v.index)
                barriers.commit("k_empty", following.index)
                v = following.next()
        if keys.end > keys.begin:
            barriers.commit("o_full")
        place = work.pieces.next(place, keys)
