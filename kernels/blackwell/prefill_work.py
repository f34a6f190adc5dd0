"""Which work `prefill` has: its work tiles, where they lie, and the KV tiles they need.

One warp decides and writes a record (`prefill_schedule`); all roles read it here and nowhere else,
so that they agree on every work tile and every KV tile:

    tile = work.first(barriers)
    while tile.exists:
        first, end, q_tiles = work.keys(tile)      # KV tiles of the work tile, and of each Q tile
        n = first
        while n < end:
            if work.has(tile, q_tiles, t, n): …    # Q tile t needs KV tile n
            n = work.after(tile, n, end)
        tile = work.next(tile, barriers)           # the record is given back

Rows are those of the Q tiles. With packed heads (`Plan.pack`) a row is one of a position's heads,
row = position · pack + head in the group; otherwise rows are positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_fmha.epilogues.base import Row
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.blockmask import MIXED, VISIBLE, TileBits
from cute_fmha.kernels.blackwell.mask import window_sides
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Fixed
from cute_fmha.kernels.blackwell.plan import HEADER, RANGE, SEQLENS, Plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Scalars, Shared
from cute_fmha.kernels.blackwell.ragged import cut


@dataclass(frozen=True)
class WorkTile(Carried):
    """Consecutive query rows of one head of one sequence, and the place of its record."""

    block: Int32  # which of the sequence's work tiles; −1: no work is left
    head: Int32  # of Q; with packed heads that of K and V
    head_kv: Int32
    batch: Int32
    start_q: Int32  # of the sequence, in packed tensors
    start_k: Int32
    seqlen_q: Int32
    seqlen_k: Int32
    slot: Int32
    phase: Int32

    @property
    def exists(self) -> Boolean:
        return self.block >= 0


@dataclass(frozen=True)
class KeyTiles(Carried):
    """The KV tiles of one Q tile: ``begin … end − 1``, of which those from ``full_begin`` to
    ``full_end − 1`` need no mask, but that of a block mask. All 0 when there are none."""

    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32

    @property
    def any(self) -> Boolean:
        return self.end > self.begin


class Work(Fixed):
    """The work of one CTA."""

    def __init__(self, plan: Plan, mem: Global, scalars: Scalars, shared: Shared) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars
        self.sWork = shared.sWork
        self.bits = TileBits(plan, mem.mMask, shared.sMask)

    @property
    def rank(self) -> Any:
        """This CTA's in its pair; read where it is asked for."""
        return ptx.cluster_rank() if self.plan.pair else 0

    # ------------------------------------------------------------------ work tiles

    def first(self, barriers: Barriers) -> WorkTile:
        """Wait for the first record."""
        return self._record(Int32(0), Int32(0), barriers)

    def next(self, tile: WorkTile, barriers: Barriers) -> WorkTile:
        """Give the record of ``tile`` back, wait for the one after it."""
        barriers.arrive_each("work_empty", tile.slot)
        return self.following(tile, barriers)

    def following(self, tile: WorkTile, barriers: Barriers) -> WorkTile:
        """Wait for the record after that of ``tile``."""
        return self._record(tile.slot ^ 1, tile.phase ^ tile.slot, barriers)

    def _record(self, slot: Int32, phase: Int32, barriers: Barriers) -> WorkTile:
        barriers.wait("work_full", phase, slot)
        return self._header(slot, phase)

    def _header(self, slot: Int32, phase: Int32) -> WorkTile:
        header = (cute.arch.make_warp_uniform(self.sWork[word, slot]) for word in range(HEADER))
        return WorkTile(*(*header, slot, phase))

    def again(self, tile: WorkTile, keys: Any) -> tuple[WorkTile, Any]:
        """``tile`` and the KV tiles of every Q tile; with a block mask read again, so that they
        need no registers up to here: loops over visible KV tiles have theirs for themselves."""
        if self.plan.features.block_mask is None:
            return tile, keys
        keys = [self.keys_of(tile, t) for t in range(self.plan.q_tiles)]
        return self._header(tile.slot, tile.phase), keys

    def first_row(self, tile: WorkTile, t: Any) -> Int32:
        """The first row of Q tile ``t`` in its sequence."""
        return self.row_tile(tile, t) * self.plan.tile_m

    def row_tile(self, tile: WorkTile, t: Any) -> Int32:
        """Which of its sequence's Q tiles Q tile ``t`` of this CTA is."""
        if self.plan.pair:
            return tile.block * 2 + self.rank
        return tile.block * self.plan.q_tiles + t

    def leaves(self, tile: WorkTile, t: Any) -> Boolean:
        """Whether rows of Q tile ``t`` are stored. In a pair both CTAs go the same way: of rows
        that do not exist the TMA stores nothing."""
        return Boolean(self.plan.pair) | (self.first_row(tile, t) < self.rows(tile))

    def rows(self, tile: WorkTile) -> Int32:
        """All rows of the sequence."""
        return tile.seqlen_q * self.plan.pack

    def lengths(self, tile: WorkTile) -> tuple[Int32, Int32]:
        """Queries and keys of the sequence, read again: where few KV tiles ask for them no register
        has to keep them."""
        return self.sWork[SEQLENS, tile.slot], self.sWork[SEQLENS + 1, tile.slot]

    def position(self, row: Int32) -> Int32:
        """The query position of ``row`` in its sequence."""
        return row if self.plan.pack == 1 else row // self.plan.pack

    def head_of(self, tile: WorkTile, row: Int32) -> Int32:
        """The head of Q that ``row`` is of."""
        pack = self.plan.pack
        return tile.head if pack == 1 else tile.head * pack + row % pack

    def output_row(self, tile: WorkTile, row: Int32) -> Row:
        """``row`` as the epilogue op sees it."""
        live = row < self.rows(tile)
        row = cutlass.min(row, self.rows(tile) - 1)
        start = tile.start_q if self.plan.features.packed else tile.batch * tile.seqlen_q
        token, head = start + self.position(row), self.head_of(tile, row)
        return Row(token, head, live, self.plan.head_dim_v)

    def lse_place(self, tile: WorkTile, row: Int32) -> tuple[Int32, ...]:
        """Coordinates of the LSE of ``row``."""
        head, position = self.head_of(tile, row), self.position(row)
        if self.plan.features.packed:
            return head, tile.start_q + position
        return tile.batch, head, position

    # ------------------------------------------------------------------ KV tiles

    def keys_of(self, tile: WorkTile, t: Any) -> KeyTiles:
        """The KV tiles of Q tile ``t``, a number of Python or of the run."""
        words = (self.sWork[HEADER + RANGE * t + word, tile.slot] for word in range(RANGE))
        return KeyTiles(*(cute.arch.make_warp_uniform(word) for word in words))

    @cute.jit
    def has(self, tile: WorkTile, keys: Any, t: Any, n: Int32):
        """Whether Q tile ``t`` needs KV tile ``n``; ``keys`` are those of all Q tiles."""
        if cutlass.const_expr(self.together):
            inside = Uint32(n) < Uint32(keys[t].end)
        else:
            inside = (keys[t].begin <= n) & (n < keys[t].end)
        if cutlass.const_expr(self.plan.features.block_mask is not None):  # noqa: SIM102
            if inside:
                inside = self.bits.bit(VISIBLE, t, n, tile.slot) != 0
        return inside

    def spans(self, keys: Any, first: Int32, end: Int32, without: int) -> Any:
        """[(begin, end, Q tiles that need the KV tiles from begin on)], for the ``without`` first
        KV tiles of each Q tile left out; with a block mask `has` says which of them needs one."""
        everyone = tuple(range(self.plan.q_tiles))
        if self.plan.features.block_mask is not None:
            return [(first, end, everyone)]
        begin_0, end_0 = keys[0].begin + without, keys[0].end
        if self.plan.q_tiles == 1:
            return [(begin_0, end_0, everyone)]
        # The second has none, or begins and ends no earlier.
        begin_1 = cutlass.select_(keys[1].any, keys[1].begin + without, end_0)
        end_1 = cutlass.select_(keys[1].any, keys[1].end, end_0)
        both, apart = cutlass.max(begin_0, begin_1), cutlass.min(end_0, end_1)
        return [
            (begin_0, cutlass.min(both, end_0), (0,)),
            (both, apart, everyone),
            (cutlass.max(apart, begin_1), end_1, (1,)),
        ]

    @property
    def together(self) -> bool:
        """KV tile 0 is the first of every Q tile that has any."""
        return not (self.plan.features.window_left or self.plan.features.block_mask)

    def after(self, tile: WorkTile, n: Int32, end: Int32, t: Any = None) -> Int32:
        """The KV tile before ``end`` that comes after ``n``, for Q tile ``t`` or any; without a
        block mask hidden from the compiler, which would unroll what loops it can."""
        if self.plan.features.block_mask is None:
            return ptx.opaque(n + 1)
        return self.bits.after(n, end, t, tile.slot)

    def is_mixed(self, tile: WorkTile, t: Any, n: Int32) -> Boolean:
        """Whether the block mask hides keys of KV tile ``n`` from rows of Q tile ``t``."""
        return self.bits.bit(MIXED, t, n, tile.slot) != 0

    def seen_keys(self, tile: WorkTile, row: Int32, n: Int32) -> list[Int32]:
        """The keys of KV tile ``n`` that the block mask shows ``row``, 32 to a word."""
        seqlen_q, seqlen_k = self.lengths(tile)
        # Rows past the sequence have no block of their own.
        position = cutlass.min(self.position(row), seqlen_q - 1)
        head = self.head_of(tile, row)
        return self.bits.row_words(tile.batch, head, position, n, seqlen_k)

    @cute.jit
    def keys(self, tile: WorkTile):
        """(first, end) of the KV tiles that any Q tile needs, and [those of every Q tile]."""
        tiles = []
        for t in cutlass.range_constexpr(self.plan.q_tiles):
            tiles.append(self.keys_of(tile, t))
        first, end = tiles[0].begin, tiles[0].end
        if cutlass.const_expr(self.plan.q_tiles == 2):
            # Without a block mask a later tile begins no earlier, unless one of them is empty.
            first = tiles[1].begin if not tiles[0].any else tiles[0].begin
            if cutlass.const_expr(self.plan.features.block_mask is not None):  # noqa: SIM102
                if tiles[1].any:
                    first = cutlass.min(first, tiles[1].begin)
            end = cutlass.max(tiles[0].end, tiles[1].end)
        return first, end, tiles

    def window(self) -> tuple[Any, Any]:
        return window_sides(self.plan.features, self.scalars)

    # ------------------------------------------------------------------ tensors of a sequence

    def queries(self, tile: WorkTile, mQ: cute.Tensor) -> cute.Tensor:
        """(ROWS, D) of Q."""
        if not self.plan.features.packed:
            return mQ[None, None, tile.head, tile.batch]
        return cute.domain_offset((self._position(tile.start_q), 0), mQ[None, None, tile.head])

    def key_rows(self, tile: WorkTile, mK: cute.Tensor) -> cute.Tensor:
        """(SEQ_K, D) of K. Rows past the end are there: their scores are masked."""
        if not self.plan.features.packed:
            return mK[None, None, tile.head_kv, tile.batch]
        return cute.domain_offset((tile.start_k, 0), mK[None, None, tile.head_kv])

    def value_rows(self, tile: WorkTile, mV: cute.Tensor) -> cute.Tensor:
        """(DV, SEQ_K) of V. Rows past the end are read as 0."""
        if self.plan.ragged_keys:
            mV = cut(mV, 1, tile.start_k, tile.seqlen_k)
        if not self.plan.features.packed:
            return mV[None, None, tile.head_kv, tile.batch]
        return mV[None, None, tile.head_kv]

    def outputs(self, tile: WorkTile, mO: cute.Tensor) -> cute.Tensor:
        """(ROWS, DV) of O. Rows past the end are not written."""
        if not self.plan.features.packed:
            return mO[None, None, tile.head, tile.batch]
        return cut(mO, 0, tile.start_q, tile.seqlen_q)[None, None, tile.head]

    def _position(self, start: Int32) -> Any:
        return start if self.plan.pack == 1 else (0, start)
