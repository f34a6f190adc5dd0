"""The load warp of `mla_decode`: latent tiles by TMA, through the block table."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.block_table import ROW_BYTES, box_place, lane_pages
from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.worklist import Piece


@cute.jit
def load(plan: MlaPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the latent cache and the block table. Writes: sLatent, sRope by TMA, sTokens.
    Waits: k_empty, rope_empty. Signals: k_full, rope_full. Registers: 120.

    Rows past the sequence's length are outside of the tensor map (`ragged`), as is page −1, and
    arrive as zeros, whatever memory holds there."""
    kind = Gathers if plan.gather else Boxes
    k, rope = Cursor(plan.stages), Cursor(plan.rope_stages)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        found = lookup(work, piece, piece.begin)
        for n in cutlass.range(piece.begin, piece.end, unroll=1):
            boxes = kind(work, shared, found)
            # The block table is read a tile ahead of its use.
            found = lookup(work, piece, n + 1)
            if cutlass.const_expr(plan.rope):
                barriers.wait("rope_empty", rope.empty_phase, rope.index)
                bar = barriers.expect("rope_full", UNIT_BYTES * plan.ctas, rope.index)
                boxes.fetch(2 * plan.half_units, shared.sRope[None, None, None, rope.index], bar)
                rope = rope.next()
            for half in cutlass.range_constexpr(2):
                barriers.wait("k_empty", k.empty_phase, k.index)
                bar = barriers.expect("k_full", plan.half_bytes * plan.ctas, k.index)
                target = shared.sLatent[None, None, None, k.index]
                boxes.fetch(half * plan.half_units, target, bar)
                k = k.next()
        place = work.pieces.next(place, piece)
    # The last releases come from the tensor core: stay until they are in. o_full is committed after
    # them, but nothing promises that commits arrive in their order.
    for _stage in cutlass.range_constexpr(plan.stages):
        barriers.wait("k_empty", k.empty_phase, k.index)
        k = k.next()
    if cutlass.const_expr(plan.rope):
        for _stage in cutlass.range_constexpr(plan.rope_stages):
            barriers.wait("rope_empty", rope.empty_phase, rope.index)
            rope = rope.next()


@cute.jit
def lookup(work: Work, piece: Piece, n: Int32):
    """What a lane looks up in the block table for tile ``n``: where box ``lane`` lies, as
    (PAGE_ROW, PAGE, END) of a `ragged` map; gathered, the rows of keys ``lane``, ``lane`` + 32."""
    plan, mem = work.plan, work.mem
    lane, first = cute.arch.lane_idx(), work.first_key(n)
    if cutlass.const_expr(plan.gather):
        found = lane_pages(mem.mTable, piece, first, lane)
    else:
        extent = mem.mKV.shape[0]
        key = first + cutlass.min(lane, plan.boxes - 1) * plan.box_rows
        page_rows = plan.page_size or extent
        found = box_place(mem.mTable, piece, key, plan.box_rows, page_rows, extent)
    return found


class Boxes:
    """The boxes of a tile, cut where the sequence ends, from what `lookup` gave the lanes."""

    def __init__(self, work: Work, shared: Shared, found: Any) -> None:
        self.plan = work.plan
        self.maps = [ptx.tensor_map(tma) for tma in (work.mem.tma_latent, work.mem.tma_rope)]
        self.places = [
            [cute.arch.shuffle_sync(number, box) for number in found]
            for box in range(self.plan.boxes)
        ]

    def fetch(self, first: int, target: cute.Tensor, barrier: Any) -> None:
        """Units from ``first`` on to ``target`` (ROW, UNIT_COLUMN, UNIT)."""
        units = cute.size(target, mode=[2])
        step = 1 if units == 1 else self.plan.box_units
        box_bytes = self.plan.box_rows * ROW_BYTES
        with cute.arch.elect_one():
            for box, (row, page, end) in enumerate(self.places):
                for unit in range(0, units, step):
                    ptx.tma_load(
                        target.iterator.toint(), unit * UNIT_BYTES + box * box_bytes,
                        self.maps[units == 1], [0, row, first + unit, page, end], barrier.toint(),
                        pair=self.plan.pair,
                    )  # fmt: skip


class Gathers:
    """The rows of a tile, four at a time, from what `lookup` gave the lanes."""

    def __init__(self, work: Work, shared: Shared, found: Any) -> None:
        self.plan = work.plan
        self.tensor_map = ptx.tensor_map(work.mem.tma_latent)
        self.tokens = shared.sTokens.iterator.toint()
        cute.arch.sync_warp()
        for half in range(2):
            shared.sTokens[half * 32 + cute.arch.lane_idx()] = found[half]
        cute.arch.sync_warp()

    def fetch(self, first: int, target: cute.Tensor, barrier: Any) -> None:
        """Units from ``first`` on to ``target`` (ROW, UNIT_COLUMN, UNIT)."""
        four_bytes = self.plan.box_rows * ROW_BYTES
        with cute.arch.elect_one():
            for four in range(self.plan.boxes):
                pages = ptx.load_shared(self.tokens, offset=four * 16)
                for unit in range(cute.size(target, mode=[2])):
                    ptx.tma_load(
                        target.iterator.toint(), unit * UNIT_BYTES + four * four_bytes,
                        self.tensor_map, [(first + unit) * UNIT, *pages], barrier.toint(), True,
                        self.plan.pair,
                    )  # fmt: skip
