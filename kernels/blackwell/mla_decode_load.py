"""The load warp of `mla_decode`: latent tiles by TMA, through the block table."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work, WorkTile
from cute_fmha.kernels.blackwell.mla_decode_plan import UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.ragged import cut


@cute.jit
def load(plan: MlaPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the latent cache and the block table. Writes: sLatent, sRope by TMA.
    Waits: k_empty, rope_empty. Signals: k_full, rope_full. Registers: 120.

    The rows of a box past the sequence's length are outside of the tensor map (`ragged`) and
    arrive as zeros, whatever memory holds there."""
    k, rope = Cursor(plan.stages), Cursor(plan.rope_stages)
    first_work, works, step = work.indices()
    for index in cutlass.range(first_work, works, step, unroll=1):
        tile = work.tile(index)
        keys = work.keys(tile)
        pages = lookup(work, tile, keys.begin, keys.end)
        for n in cutlass.range(keys.begin, keys.end, unroll=1):
            boxes = [place(work, tile, n, box, pages) for box in range(plan.boxes)]
            # The block table is read a tile ahead of its use.
            pages = lookup(work, tile, n + 1, keys.end)
            if cutlass.const_expr(plan.rope):
                barriers.wait("rope_empty", rope.empty_phase, rope.index)
                bar = announce(work, barriers, "rope_full", UNIT_BYTES, rope.index)
                for box in cutlass.range_constexpr(plan.boxes):
                    fetch(
                        mem.tma_rope, boxes[box], plan, 1, plan.units - 1,
                        shared.sRope[None, None, rope.index], box, bar,
                    )  # fmt: skip
                rope = rope.next()
            for half in cutlass.range_constexpr(2):
                barriers.wait("k_empty", k.empty_phase, k.index)
                bar = announce(work, barriers, "k_full", plan.half_bytes, k.index)
                fetch_half(plan, mem, shared, boxes, half, k.index, bar)
                k = k.next()
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
def lookup(work: Work, tile: WorkTile, n: Int32, end: Int32):
    """The page of every box of tile ``n``; page 0 for boxes without a row, of which nothing is
    fetched: entries of the table past the length are not looked at."""
    plan, mem = work.plan, work.mem
    pages = []
    for box in cutlass.range_constexpr(plan.boxes):
        page = Int32(0)
        token = work.first_key(n) + box * plan.box_rows
        if (n < end) & (token < tile.seqlen_k):
            page = mem.mTable[tile.batch, token // plan.page_size]
        pages.append(page)
    return pages


def place(work: Work, tile: WorkTile, n: Int32, box: int, pages: list[Int32]) -> cute.Tensor:
    """The page of a box from its first row on, cut where the sequence ends:
    (PAGE_ROW, UNIT_COLUMN, UNIT)."""
    plan, mem = work.plan, work.mem
    token = work.first_key(n) + box * plan.box_rows
    rows = cutlass.max(cutlass.min(tile.seqlen_k - token, plan.box_rows), 0)
    page = mem.mKV[None, None, None, pages[box], None]
    return cut(page, 0, token % plan.page_size, rows)


def fetch_half(
    plan: MlaPlan, mem: Global, shared: Shared, boxes: list[cute.Tensor], half: int, stage: Int32,
    bar: Any,
) -> None:  # fmt: skip
    """256 columns of a tile into a stage of sLatent."""
    for box in range(plan.boxes):
        for unit in range(0, plan.half_units, plan.box_units):
            first = half * plan.half_units + unit
            # (ROW, UNIT_COLUMN, UNIT)
            target = cute.domain_offset((0, 0, unit), shared.sLatent[None, None, None, stage])
            fetch(mem.tma_latent, boxes[box], plan, plan.box_units, first, target, box, bar)


def fetch(
    tma: cute.CopyAtom, source: cute.Tensor, plan: MlaPlan, units: int, first_unit: int,
    target: cute.Tensor, box: int, bar: Any,
) -> None:  # fmt: skip
    """One box: ``units`` units from ``first_unit`` on, to its rows of ``target``."""
    shape = (plan.box_rows, UNIT, units)
    # (ROW, UNIT_COLUMN, UNIT)
    gBox = cute.local_tile(cute.domain_offset((0, 0, first_unit), source), shape, (0, 0, 0))
    if cute.rank(target) == 2:
        target = cute.append_ones(target, up_to_rank=3)
    sBox = cute.local_tile(target, shape, (box, 0, 0))
    tBsB, tBgB = cpasync.tma_partition(
        tma, 0, cute.make_layout(1), cute.group_modes(sBox, 0, 3), cute.group_modes(gBox, 0, 3)
    )
    cute.copy(tma, tBgB, tBsB, tma_bar_ptr=bar)
