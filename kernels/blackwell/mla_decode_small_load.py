"""The warps of `mla_decode_small` that bring latents and queries."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_small_plan import (
    BLOCK,
    GATHERED,
    PART_BLOCKS,
    SmallPlan,
)
from cute_fmha.kernels.blackwell.mla_decode_small_work import Global, Shared, Work
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.ragged import cut
from cute_fmha.kernels.blackwell.worklist import Piece

ABSENT = -1
"""A page that no cache has: its rows arrive as zeros."""


@cute.jit
def lookup(plan: SmallPlan, mem: Global, piece: Piece, n: Int32):
    """What a lane looks up in the table for tile ``n``: (page, row of the page) of box ``lane``;
    gathered, the pages of tokens ``lane`` and ``lane`` + 32.

    Of boxes and tokens past the sequence nothing is fetched, and their entries are not read."""
    lane, first = cute.arch.lane_idx(), n * plan.tile_n
    if cutlass.const_expr(plan.gather):
        pages = [Int32(ABSENT), Int32(ABSENT)]
        for half in cutlass.range_constexpr(2):
            token = first + half * 32 + lane
            if token < piece.length:
                pages[half] = mem.mTable[piece.batch, token]
        result = pages[0], pages[1]
    else:
        page_rows = mem.mL.shape[0]
        token, page = first + lane * plan.box, Int32(0)
        slot = token // page_rows
        if token < piece.length and lane < plan.boxes:
            page = mem.mTable[piece.batch, slot]
        result = page, token - slot * page_rows
    return result


class Boxes:
    """The boxes of one tile, made from what `lookup` gave every lane."""

    def __init__(
        self, plan: SmallPlan, mem: Global, shared: Shared, piece: Piece, n: Int32, found: Any
    ) -> None:
        page, row = found
        self.tma = mem.tma
        self.plan = plan
        # (PAGE_ROW, D) from the first row on, cut where the sequence ends
        self.sources = []
        for i in range(plan.boxes):
            source = mem.mL[None, None, cute.arch.shuffle_sync(page, i), None]
            left = piece.length - n * plan.tile_n - i * plan.box
            rows = cutlass.max(cutlass.min(left, plan.box), 0)
            self.sources.append(cut(source, 0, cute.arch.shuffle_sync(row, i), rows))

    def fetch(self, first: int, targets: list[cute.Tensor], barrier: Any) -> None:
        """Blocks from ``first`` on, each to its target (BOX, 64, BOX_OF_TILE)."""
        for b, target in enumerate(targets):
            for i, source in enumerate(self.sources):
                gBox = cute.local_tile(source, (self.plan.box, BLOCK), (0, first + b))
                tLsL, tLgL = cpasync.tma_partition(
                    self.tma, 0, cute.make_layout(1),
                    cute.group_modes(target[None, None, i], 0, 2), cute.group_modes(gBox, 0, 2),
                )  # fmt: skip
                cute.copy(self.tma, tLgL, tLsL, tma_bar_ptr=barrier)


class Gathers:
    """The tokens of one tile, four at a time, made from what `lookup` gave every lane."""

    def __init__(
        self, plan: SmallPlan, mem: Global, shared: Shared, piece: Piece, n: Int32, found: Any
    ) -> None:
        self.plan = plan
        self.tensor_map = ptx.tensor_map(mem.tma)
        self.sTokens = shared.sTokens
        cute.arch.sync_warp()
        for half in range(2):
            self.sTokens[half * 32 + cute.arch.lane_idx()] = found[half]
        cute.arch.sync_warp()

    @cute.jit
    def fetch(self, first: int, targets: list[cute.Tensor], barrier: Any):
        """Blocks from ``first`` on, each to its target."""
        for four in cutlass.range(self.plan.boxes, unroll=4):
            tokens = ptx.load_shared(self.sTokens.iterator.toint() + four * 16)
            for b in cutlass.range_constexpr(len(targets)):
                ptx.gather_rows(
                    targets[b].iterator.toint() + four * GATHERED * BLOCK * 2, self.tensor_map,
                    (first + b) * BLOCK, tokens, barrier.toint(),
                )  # fmt: skip


@cute.jit
def load(plan: SmallPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the block table, latents in global memory. Writes: sV, sR by TMA, sTokens.
    Waits: v_empty, r_empty. Signals: v_full, r_full.

    Rows past the sequence are outside of the tensor map (`ragged`), as is page −1, and arrive as
    zeros, whatever memory holds there."""
    kind = Gathers if plan.gather else Boxes
    v, r = Cursor(plan.v_stages), Cursor(plan.r_stages)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        found = lookup(plan, mem, piece, piece.begin)
        for n in cutlass.range(piece.begin, piece.end, unroll=1):
            boxes = kind(plan, mem, shared, piece, n, found)
            # The table is asked for the next tile while the rings are full.
            found = lookup(plan, mem, piece, n + 1)
            for part in cutlass.range_constexpr(plan.parts):
                barriers.wait("v_empty", v.empty_phase, v.index)
                bar = barriers.expect("v_full", plan.part_bytes, v.index)
                targets = [shared.sV[None, None, None, b, v.index] for b in range(PART_BLOCKS)]
                boxes.fetch(part * PART_BLOCKS, targets, bar)
                v = v.next()
            if cutlass.const_expr(plan.rope_blocks > 0):
                barriers.wait("r_empty", r.empty_phase, r.index)
                bar = barriers.expect("r_full", plan.block_bytes, r.index)
                targets = [shared.sR[None, None, None, 0, r.index]]
                boxes.fetch(plan.parts * PART_BLOCKS, targets, bar)
                r = r.next()
        place = work.pieces.next(place, piece)
    # The last releases are the last signals of the tensor core: stay until they are in.
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
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        if piece.end > piece.begin:
            barriers.wait("q_empty", phase ^ 1)
            for first in cutlass.range(
                thread, plan.rows * chunks, threads * batch_chunks, unroll=1
            ):
                pieces = []
                for j in cutlass.range_constexpr(batch_chunks):
                    row = (first + j * threads) // chunks
                    chunk = (first + j * threads) % chunks
                    position, head, exists = work.position(piece, row)
                    at = (piece.batch, position, head, chunk * 8)
                    source = mem.mQ.iterator + cute.crd2idx(at, mem.mQ.layout)
                    words = ptx.load_global(source.toint(), exists)
                    swizzled = (chunk % 8 ^ row % 8) * 16
                    target = chunk // 8 * block_bytes + row * 128 + swizzled
                    pieces.append((target, words))
                for target, words in pieces:
                    ptx.store_shared(shared.sQ + target, words)
            cute.arch.fence_proxy("async.shared", space="cta")
            barriers.arrive("q_full")
            phase = phase ^ 1
        place = work.pieces.next(place, piece)
