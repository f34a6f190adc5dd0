"""Who computes which KV tiles: the work of a decode launch, cut into pieces, found on the device.

A work tile is a block of rows (query position × head, position-major) of one sequence and, where
there are several, one KV head, whose query heads these are; it needs the KV tiles that
`tiling.kv_tile_ranges` says. Work tiles are ordered by sequence, KV head, block. A worker, one CTA
or one cluster, computes *pieces* of work tiles: contiguous ranges of their KV tiles. All sizes come
from the lengths in device memory, so a CUDA graph follows them. `Cut` says where they are cut:

    WHOLE   nowhere; piece p is work tile p.
    FIXED   into ``num_splits`` equal parts by `tiling.split_tile_range`, fewer where there are
            fewer KV tiles. Where a sequence is cut depends on that sequence alone.
    SHARE   where the workers' shares end. All work tiles in a row, sequence by sequence, make one
            line of cost: of each the cost to begin it, then 1 for every KV tile. Worker c takes the
            pieces between c · share and (c + 1) · share: a 128 times longer sequence gets 128 times
            the workers, and many sequences of any lengths end at the same time.

Pieces of WHOLE and FIXED go round the workers. With SHARE at most two pieces of a worker are not
whole work tiles: its first and its last.

        sequence 0              1    2        3 (begins │, KV tile ─)
        │─────────────────────│──│──────│───────────────
        ├── worker 0 ──┼── worker 1 ──┼── worker 2 ──┤
        piece of 0      rest of 0, 1   2, piece of 3

Every warp of a worker walks the list on its own, two integers a place: with WHOLE and FIXED a
place's number is its piece; with SHARE a place is a work tile and where on the line it begins. One
warp finds a worker's first place (`find`: two passes over the lengths, 32 at a time).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha import tiling
from cute_fmha.kernels.blackwell.cutting import Cut, Cutting
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.pipelines import Carried, Fixed

ceil_div = device_function(tiling.ceil_div)
equal_share = device_function(tiling.equal_share)
kv_tile_ranges = device_function(tiling.kv_tile_ranges)
split_tile_range = device_function(tiling.split_tile_range)
tiles_before_cut = device_function(tiling.tiles_before_cut)

FOUND = 4
"""int32 words of shared memory, on 16 bytes, that `find` writes."""


class Sizes(NamedTuple):
    """What is known when a kernel runs."""

    mLens: cute.Tensor | None  # (BATCH,): keys of each sequence
    seqlen_q: Int32
    heads: Int32  # of a KV head
    window_left: Int32
    window_right: Int32
    num_splits: Int32  # of FIXED
    workers: Int32
    worker: Int32
    kv_heads: Any = 1
    batch: Any = None  # without mLens: how many sequences, and the keys of every one
    seqlen_k: Any = None


@dataclass(frozen=True)
class Place(Carried):
    """A place in a worker's list: with SHARE work tile ``number`` and the position ``at`` on the
    line where it begins; else piece ``number``, and ``at`` is its work tile."""

    number: Int32
    at: Int32


@dataclass(frozen=True)
class Piece(Carried):
    """KV tiles ``begin … end − 1`` of row block ``block`` of a KV ``head`` of sequence ``batch``,
    which has ``length`` keys; those from ``full_begin`` to ``full_end − 1`` need no mask.

    ``tiles`` are the KV tiles of the whole work tile. A piece that does not exist has no KV tiles
    and is passed over: a cut has moved, or there are fewer KV tiles than splits. A work tile
    without KV tiles is one whole piece.
    """

    batch: Int32
    block: Int32
    length: Int32
    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32
    tiles: Int32
    exists: Int32
    whole: Int32
    head: Int32


@dataclass(frozen=True)
class Parts(Carried):
    """How a work tile is cut: into ``count`` pieces, the first one's slot is ``first`` (`slot` has
    the others'), and their arrivals are counted in word ``word``."""

    count: Int32
    first: Int32
    word: Int32


class WorkList(Fixed):
    """The pieces of one worker. ``found``: what `find` wrote, once it is visible to this thread;
    without it, work that is cut by SHARE has no places yet."""

    def __init__(self, cutting: Cutting, sizes: Sizes, found: cute.Tensor | None = None) -> None:
        self.cutting = cutting
        self.sizes = sizes
        self.share = self.limit = Int32(0)
        self.start = Place(sizes.worker, Int32(0))
        if cutting.cut is Cut.SHARE:
            if found is not None:
                self.start = Place(found[0], found[1])
                self.share, self.limit = found[2], found[3]
        elif cutting.cut is Cut.FIXED:
            self.limit = self.work_tiles * sizes.num_splits
            self.start = Place(sizes.worker, sizes.worker // sizes.num_splits)
        else:
            self.limit = self.work_tiles
            self.start = Place(sizes.worker, sizes.worker)

    @property
    def total_rows(self) -> Int32:
        """Rows of a sequence and a KV head."""
        return self.sizes.seqlen_q * self.sizes.heads

    @property
    def row_blocks(self) -> Int32:
        return ceil_div(self.total_rows, self.cutting.rows)

    @property
    def blocks(self) -> Int32:
        """Work tiles of a sequence."""
        if self.cutting.kv_heads:
            return self.row_blocks * self.sizes.kv_heads
        return self.row_blocks

    @property
    def batches(self) -> Int32:
        """Sequences."""
        return self.sizes.batch if self.sizes.mLens is None else self.sizes.mLens.shape[0]

    @property
    def work_tiles(self) -> Int32:
        return self.blocks * self.batches

    def length(self, batch: Int32) -> Int32:
        """Keys of a sequence."""
        return self.sizes.seqlen_k if self.sizes.mLens is None else self.sizes.mLens[batch]

    # ------------------------------------------------------------------ the walk

    def more(self, place: Place) -> Boolean:
        """Whether there is a piece at ``place``."""
        if self.cutting.cut is Cut.SHARE:
            return place.at < self.limit
        return place.number < self.limit

    @cute.jit
    def piece(self, place: Place):
        """The piece at ``place``."""
        work = place.at
        if cutlass.const_expr(self.cutting.cut is Cut.SHARE):
            work = place.number
        batch = work // self.blocks
        block, head = work - batch * self.blocks, Int32(0)
        if cutlass.const_expr(self.cutting.kv_heads):
            head = block // self.row_blocks
            block = block - head * self.row_blocks
        length = self.length(batch)
        begin, full_begin, full_end, end = self.ranges(block, length)
        tiles = end - begin
        low, high = Int32(0), tiles
        exists, whole = Int32(1), Int32(1)
        if cutlass.const_expr(self.cutting.cut is Cut.SHARE):
            overhead, least = self.cutting.overhead, self.cutting.least
            first = self.sizes.worker * self.share - place.at
            low = tiles_before_cut(first, tiles, overhead, least)
            high = tiles_before_cut(first + self.share, tiles, overhead, least)
            # An empty work tile belongs to the worker in whose share it begins.
            exists = Int32(low < high) | (Int32(tiles == 0) & Int32(first <= 0))
            whole = Int32(high - low == tiles)
        elif cutlass.const_expr(self.cutting.cut is Cut.FIXED):
            split = place.number - work * self.sizes.num_splits
            count = self.split_count(tiles)
            low, high = split_tile_range(0, tiles, cutlass.min(split, count), count)
            high = cutlass.min(high, tiles)  # of a split too many nothing is left
            exists = Int32(split < count)
            whole = Int32(count == 1)
        high, low = begin + high, begin + low
        full_begin = cutlass.min(cutlass.max(full_begin, low), high)
        full_end = cutlass.min(cutlass.max(full_end, full_begin), high)
        return Piece(
            batch, block, length, low, full_begin, full_end, high, tiles, exists, whole, head
        )

    @cute.jit
    def next(self, place: Place, piece: Piece):
        """The place after ``place``, where ``piece`` is."""
        number, at = place.number + self.sizes.workers, Int32(0)
        if cutlass.const_expr(self.cutting.cut is Cut.SHARE):
            number, at = place.number + 1, place.at + piece.tiles + self.cutting.overhead
        elif cutlass.const_expr(self.cutting.cut is Cut.FIXED):
            at = number // self.sizes.num_splits
        else:
            at = number
        return Place(number, at)

    @cute.jit
    def ranges(self, block: Int32, length: Int32):
        """KV tiles (begin, full_begin, full_end, end) that a block of rows needs."""
        rows, heads = self.cutting.rows, self.sizes.heads
        last_row = cutlass.min((block + 1) * rows, self.total_rows) - 1
        left = self.sizes.window_left if cutlass.const_expr(self.cutting.window_left) else -1
        right = self.sizes.window_right if cutlass.const_expr(self.cutting.window_right) else -1
        begin, full_begin, full_end, end = kv_tile_ranges(
            block * rows // heads, last_row // heads + 1, self.sizes.seqlen_q, length, left, right,
            self.cutting.tile_n,
        )  # fmt: skip
        return begin, full_begin, full_end, end

    def split_count(self, tiles: Int32) -> Int32:
        """Pieces of a work tile under FIXED."""
        return cutlass.max(cutlass.min(self.sizes.num_splits, tiles), 1)

    # ------------------------------------------------------------------ pieces of one work tile

    @cute.jit
    def parts(self, place: Place, piece: Piece):
        """How the work tile at ``place`` is cut."""
        count, first, word = Int32(1), place.number, place.at
        if cutlass.const_expr(self.cutting.cut is Cut.SHARE):
            overhead, least = self.cutting.overhead, self.cutting.least
            tiles = piece.tiles
            opens = place.at // self.share
            closes = (place.at + tiles + overhead - 1) // self.share
            # The first and the last share may have lost their piece to their neighbour.
            cut = (opens + 1) * self.share - place.at
            if tiles_before_cut(cut, tiles, overhead, least) == 0:
                opens = opens + 1
            cut = closes * self.share - place.at
            if tiles_before_cut(cut, tiles, overhead, least) == tiles:
                closes = closes - 1
            count, first, word = closes - opens + 1, 2 * opens + 1, opens
        elif cutlass.const_expr(self.cutting.cut is Cut.FIXED):
            count, first = self.split_count(piece.tiles), place.at * self.sizes.num_splits
        return Parts(count, first, word)

    def slot(self, parts: Parts, index: Any) -> Int32:
        """Where piece ``index`` of a work tile leaves its partial result.

        With SHARE a worker has two slots: an even one for a work tile that began before its share,
        an odd one for a work tile that it begins.
        """
        if self.cutting.cut is Cut.SHARE:
            return parts.first + 2 * index - Int32(index > 0)
        return parts.first + index

    def index(self, place: Place, parts: Parts) -> Int32:
        """Which piece of its work tile the one at ``place`` is."""
        if self.cutting.cut is Cut.SHARE:
            return self.sizes.worker - parts.word
        return place.number - parts.first

    # ------------------------------------------------------------------ the first place

    @cute.jit
    def cost(self, batch: Int32):
        """What all work tiles of a sequence cost; 0 past the last sequence."""
        cost = Int32(0)
        if batch < self.batches:
            length = self.length(batch)
            for block in cutlass.range(self.row_blocks, unroll=1):
                begin, _, _, end = self.ranges(block, length)
                cost += end - begin + self.cutting.overhead
        if cutlass.const_expr(self.cutting.kv_heads):
            cost = cost * self.sizes.kv_heads
        return cost


@cute.jit
def most_workers(
    cutting: Cutting, total_rows: Int32, batch: Int32, longest: Int32, num_splits: Int32
):
    """Workers that can have work when no sequence has more than ``longest`` keys. Host code."""
    work_tiles = ceil_div(total_rows, cutting.rows) * batch
    if cutlass.const_expr(cutting.cut is Cut.FIXED):
        work_tiles = work_tiles * num_splits
    elif cutlass.const_expr(cutting.cut is Cut.SHARE):
        cost = work_tiles * (ceil_div(longest, cutting.tile_n) + cutting.overhead)
        work_tiles = ceil_div(cost, cutting.overhead + cutting.least)
    return work_tiles


@cute.jit
def find(cutting: Cutting, sizes: Sizes, found: cute.Tensor):
    """Write the worker's first place, the share and where it ends to ``found``. One warp; nothing
    is to do unless work is cut by SHARE."""
    works = WorkList(cutting, sizes)
    lane = cute.arch.lane_idx()
    batches = works.batches
    total = Int32(0)
    for first in cutlass.range(0, batches, 32, unroll=1):
        total += works.cost(first + lane)
    total = cute.arch.warp_reduction_sum(total)
    share = equal_share(total, sizes.workers, cutting.overhead, cutting.least)
    target = sizes.worker * share
    if lane == 0:
        found[0] = Int32(0)
        found[1] = total
        found[2] = share
        found[3] = cutlass.min(target + share, total)
    cute.arch.sync_warp()
    before = Int32(0)
    for first in cutlass.range(0, batches, 32, unroll=1):
        batch = first + lane
        cost = works.cost(batch)
        end = cost
        for distance in (1, 2, 4, 8, 16):
            lower = cute.arch.shuffle_sync_up(end, distance)
            end += cutlass.select_(lane >= distance, lower, Int32(0))
        at = before + end - cost
        if at <= target and target < at + cost:
            length = works.length(batch)
            first_block, block, searching = Int32(0), Int32(0), Boolean(True)
            if cutlass.const_expr(cutting.kv_heads):
                of_head = cost // sizes.kv_heads
                head = (target - at) // of_head
                at, first_block = at + head * of_head, head * works.row_blocks
            for following in cutlass.range(works.row_blocks, unroll=1):
                begin, _, _, stop = works.ranges(following, length)
                after = at + (stop - begin) + cutting.overhead
                searching = searching & (target >= after)
                if searching:
                    at, block = after, following + 1
            found[0] = batch * works.blocks + first_block + block
            found[1] = at
        before += cute.arch.shuffle_sync(end, 31)
    cute.arch.sync_warp()
