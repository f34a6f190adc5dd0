"""The load warp of `mla_decode`: latent tiles by TMA, through the block table."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.ragged import cut
from cute_fmha.kernels.blackwell.worklist import Piece

ABSENT = -1
"""A page that no cache has: its row arrives as zeros."""


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
            boxes = kind(work, shared, piece, n, found)
            # The block table is read a tile ahead of its use.
            found = lookup(work, piece, n + 1)
            if cutlass.const_expr(plan.rope):
                barriers.wait("rope_empty", rope.empty_phase, rope.index)
                bar = announce(work, barriers, "rope_full", UNIT_BYTES, rope.index)
                boxes.fetch(2 * plan.half_units, shared.sRope[None, None, None, rope.index], bar)
                rope = rope.next()
            for half in cutlass.range_constexpr(2):
                barriers.wait("k_empty", k.empty_phase, k.index)
                bar = announce(work, barriers, "k_full", plan.half_bytes, k.index)
                target = shared.sLatent[None, None, None, k.index]
                boxes.fetch(half * plan.half_units, target, bar)
                k = k.next()
        place = work.pieces.next(place, piece)
    # The last releases come from the tensor core: stay until they are in.
    for _stage in cutlass.range_constexpr(plan.stages):
        barriers.wait("k_empty", k.empty_phase, k.index)
        k = k.next()
    if cutlass.const_expr(plan.rope):
        for _stage in cutlass.range_constexpr(plan.rope_stages):
            barriers.wait("rope_empty", rope.empty_phase, rope.index)
            rope = rope.next()


@cute.jit
def announce(work: Work, barriers: Barriers, name: cutlass.Constexpr, size: int, index: Int32):
    """Have ``size`` bytes from every CTA expected by the first one, at whose barrier they all
    arrive; returns the mbarrier for the copies."""
    if work.rank == 0:
        barriers.expect(name, size * work.plan.ctas, index)
    return barriers.at(name, index)


@cute.jit
def lookup(work: Work, piece: Piece, n: Int32):
    """What a lane looks up in the block table for tile ``n``: (page, first row there) of box
    ``lane``; where rows are gathered, those of keys ``lane`` and ``lane`` + 32.

    Of boxes past the sequence nothing is fetched, and their entries are not read."""
    plan, mem = work.plan, work.mem
    lane, first = cute.arch.lane_idx(), work.first_key(n)
    if cutlass.const_expr(plan.gather):
        found = [Int32(ABSENT), Int32(ABSENT)]
        for half in cutlass.range_constexpr(2):
            key = first + half * 32 + lane
            if key < piece.length:
                found[half] = mem.mTable[piece.batch, key]
    else:
        page_rows = plan.page_size or mem.mKV.shape[0]
        key = first + cutlass.min(lane, plan.boxes - 1) * plan.box_rows
        number = key // page_rows
        found = [Int32(0), key - number * page_rows]
        if key < piece.length:
            found[0] = mem.mTable[piece.batch, number]
    return found


class Boxes:
    """The boxes of a tile, cut where the sequence ends, from what `lookup` gave the lanes."""

    def __init__(self, work: Work, shared: Shared, piece: Piece, n: Int32, found: Any) -> None:
        self.plan, self.mem = work.plan, work.mem
        page, first_row = found
        # (PAGE_ROW, UNIT_COLUMN, UNIT) each, from the box's first row on
        self.sources = []
        for box in range(self.plan.boxes):
            left = piece.length - work.first_key(n) - box * self.plan.box_rows
            rows = cutlass.max(cutlass.min(left, self.plan.box_rows), 0)
            source = self.mem.mKV[None, None, None, cute.arch.shuffle_sync(page, box), None]
            self.sources.append(cut(source, 0, cute.arch.shuffle_sync(first_row, box), rows))

    def fetch(self, first: int, target: cute.Tensor, barrier: Any) -> None:
        """Units from ``first`` on to ``target`` (ROW, UNIT_COLUMN, UNIT)."""
        units = cute.size(target, mode=[2])
        tma = self.mem.tma_rope if units == 1 else self.mem.tma_latent
        step = 1 if units == 1 else self.plan.box_units
        shape = (self.plan.box_rows, UNIT, step)
        for box, source in enumerate(self.sources):
            for unit in range(0, units, step):
                # (ROW, UNIT_COLUMN, UNIT)
                gBox = cute.domain_offset((0, 0, first + unit), source)
                gBox = cute.local_tile(gBox, shape, (0, 0, 0))
                sBox = cute.local_tile(target, shape, (box, 0, unit // step))
                tBsB, tBgB = cpasync.tma_partition(
                    tma, 0, cute.make_layout(1),
                    cute.group_modes(sBox, 0, 3), cute.group_modes(gBox, 0, 3),
                )  # fmt: skip
                cute.copy(tma, tBgB, tBsB, tma_bar_ptr=barrier)


class Gathers:
    """The rows of a tile, four at a time, from what `lookup` gave the lanes."""

    def __init__(self, work: Work, shared: Shared, piece: Piece, n: Int32, found: Any) -> None:
        self.plan = work.plan
        self.tensor_map = ptx.tensor_map(work.mem.tma_latent)
        self.tokens = shared.sTokens.iterator.toint()
        cute.arch.sync_warp()
        for half in range(2):
            shared.sTokens[half * 32 + cute.arch.lane_idx()] = found[half]
        cute.arch.sync_warp()

    @cute.jit
    def fetch(self, first: int, target: cute.Tensor, barrier: Any):
        """Units from ``first`` on to ``target`` (ROW, UNIT_COLUMN, UNIT)."""
        rows = self.plan.box_rows
        for four in cutlass.range(self.plan.boxes, unroll=1):
            pages = ptx.load_shared(self.tokens + four * rows * 4)
            for unit in cutlass.range_constexpr(cute.size(target, mode=[2])):
                place = target.iterator.toint() + four * rows * 128
                with cute.arch.elect_one():
                    ptx.tma_load(
                        place, unit * UNIT_BYTES, self.tensor_map,
                        [(first + unit) * UNIT, *pages], barrier.toint(), True, self.plan.pair,
                    )  # fmt: skip
