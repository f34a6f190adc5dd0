"""The warps of `mla_decode_small` that bring latents and queries."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_small_plan import BLOCK, PART_BLOCKS, SmallPlan
from cute_fmha.kernels.blackwell.mla_decode_small_work import Global, Segment, Shared, Work
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.ragged import cut


@cute.jit
def lookup(plan: SmallPlan, mem: Global, segment: Segment, n: Int32):
    """Where box ``lane`` of tile ``n`` lies: (page, row of the page). Of a box past the sequence no
    row is fetched, and its entry of the table is not read."""
    page_rows = mem.mL.shape[0]
    token = n * plan.tile_n + cute.arch.lane_idx() * plan.box
    slot = token // page_rows
    page = Int32(0)
    if token < segment.length and cute.arch.lane_idx() * plan.box < plan.tile_n:
        page = mem.mTable[segment.batch, slot]
    return page, token - slot * page_rows


def boxes_of(
    plan: SmallPlan, mem: Global, segment: Segment, n: Int32, page: Int32, row: Int32
) -> list[cute.Tensor]:
    """The boxes of tile ``n``, from what `lookup` gave every lane: (PAGE_ROW, D) from the first row
    on, cut where the sequence ends."""
    boxes = []
    for i in range(plan.boxes):
        source = mem.mL[None, None, cute.arch.shuffle_sync(page, i), None]
        left = segment.length - n * plan.tile_n - i * plan.box
        rows = cutlass.max(cutlass.min(left, plan.box), 0)
        boxes.append(cut(source, 0, cute.arch.shuffle_sync(row, i), rows))
    return boxes


def fetch(
    plan: SmallPlan, mem: Global, boxes: list[cute.Tensor], block: int, target: cute.Tensor,
    barrier: Any,
) -> None:  # fmt: skip
    """One block of a tile to ``target`` (BOX, 64, BOX_OF_TILE)."""
    for i, source in enumerate(boxes):
        gBox = cute.local_tile(source, (plan.box, BLOCK), (0, block))
        tLsL, tLgL = cpasync.tma_partition(
            mem.tma, 0, cute.make_layout(1), cute.group_modes(target[None, None, i], 0, 2),
            cute.group_modes(gBox, 0, 2),
        )  # fmt: skip
        cute.copy(mem.tma, tLgL, tLsL, tma_bar_ptr=barrier)


@cute.jit
def load(plan: SmallPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the block table, latents in global memory. Writes: sV, sR by TMA.
    Waits: v_empty, r_empty. Signals: v_full, r_full.

    Rows past the sequence are outside of the tensor map (`ragged`) and arrive as zeros, whatever
    memory holds there."""
    v, r = Cursor(plan.v_stages), Cursor(plan.r_stages)
    first_index, last_index, stride = work.indices()
    for index in cutlass.range(first_index, last_index, stride, unroll=1):
        segment = work.segment(index)
        page, row = lookup(plan, mem, segment, segment.begin)
        for n in cutlass.range(segment.begin, segment.end, unroll=1):
            boxes = boxes_of(plan, mem, segment, n, page, row)
            # The table is asked for the next tile while the rings are full.
            page, row = lookup(plan, mem, segment, n + 1)
            for part in cutlass.range_constexpr(plan.parts):
                barriers.wait("v_empty", v.empty_phase, v.index)
                bar = barriers.expect("v_full", plan.part_bytes, v.index)
                for b in cutlass.range_constexpr(PART_BLOCKS):
                    target = shared.sV[None, None, None, b, v.index]
                    fetch(plan, mem, boxes, part * PART_BLOCKS + b, target, bar)
                v = v.next()
            if cutlass.const_expr(plan.rope_blocks > 0):
                barriers.wait("r_empty", r.empty_phase, r.index)
                bar = barriers.expect("r_full", plan.block_bytes, r.index)
                target = shared.sR[None, None, None, 0, r.index]
                fetch(plan, mem, boxes, plan.parts * PART_BLOCKS, target, bar)
                r = r.next()
    # The releases of the last parts are signals of the tensor core: stay until they are in.
    for _stage in cutlass.range_constexpr(plan.v_stages):
        barriers.wait("v_empty", v.empty_phase, v.index)
        v = v.next()
    if cutlass.const_expr(plan.rope_blocks > 0):
        for _stage in cutlass.range_constexpr(plan.r_stages):
            barriers.wait("r_empty", r.empty_phase, r.index)
            r = r.next()


@cute.jit
def query(plan: SmallPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """Two warps, 16 bytes a lane at a time; rows that do not exist become 0.

    Reads: Q in global memory. Writes: sQ. Waits: q_empty. Signals: q_full.
    """
    thread = cute.arch.thread_idx()[0] - 32 * plan.role("query").warps[0]
    threads = 32 * len(plan.role("query").warps)
    chunks = plan.head_dim // 8
    batch_chunks = plan.head_dim // BLOCK
    block_bytes = plan.rows * BLOCK * plan.dtype.itemsize
    phase = Int32(0)
    first_index, last_index, stride = work.indices()
    for index in cutlass.range(first_index, last_index, stride, unroll=1):
        segment = work.segment(index)
        if segment.any:
            barriers.wait("q_empty", phase ^ 1)
            for first in cutlass.range(
                thread, plan.rows * chunks, threads * batch_chunks, unroll=1
            ):
                pieces = []
                for j in cutlass.range_constexpr(batch_chunks):
                    row = (first + j * threads) // chunks
                    chunk = (first + j * threads) % chunks
                    position = row // work.heads
                    at = (segment.batch, position, row - position * work.heads, chunk * 8)
                    source = mem.mQ.iterator + cute.crd2idx(at, mem.mQ.layout)
                    words = ptx.load_global(source.toint(), row < work.rows)
                    swizzled = (chunk % 8 ^ row % 8) * 16
                    target = chunk // 8 * block_bytes + row * 128 + swizzled
                    pieces.append((target, words))
                for target, words in pieces:
                    ptx.store_shared(shared.sQ + target, words)
            cute.arch.fence_proxy("async.shared", space="cta")
            barriers.arrive("q_full")
            phase = phase ^ 1
    barriers.wait("q_empty", phase ^ 1)
