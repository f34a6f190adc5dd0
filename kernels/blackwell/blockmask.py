"""Block masks: which KV tiles a Q tile needs at all, and which keys of a tile a row sees.

The mask is bool [BATCH or 1, HEAD or 1, BLOCK_M, BLOCK_N]; blocks count from the beginning of each
sequence and need not be those of the tiles. A work tile's record has two bits for each of its Q
tiles and every KV tile, 32 KV tiles to a word:

    visible    some row sees some key: without it the tile is not loaded, not computed, not counted
    mixed      visible, but not all of it: scores are masked one by one

The warp that gives out the work makes the words, a KV tile per lane; all roles read the same bits.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.pipelines import Fixed
from cute_fmha.kernels.blackwell.plan import HEADER, RANGE, SEQLENS, Plan

VISIBLE, MIXED = 0, 1


def lowest(word: Int32) -> Int32:
    """The lowest bit that is set, of at least one."""
    return cute.arch.popc((word & -word) - 1)


class TileBits(Fixed):
    """The mask of a call, and the bits of the work tiles in shared memory."""

    def __init__(self, plan: Plan, mMask: Any, sMask: Any) -> None:
        self.plan = plan
        self.mMask = mMask  # (BATCH or 1, HEAD or 1, BLOCK_M, BLOCK_N)
        self.sMask = sMask  # (VISIBLE and MIXED of each TILE, WORD, STAGE)

    # ------------------------------------------------------------------ the mask

    @property
    def blocks(self) -> tuple[int, int]:
        """Query rows and keys of a block."""
        assert self.plan.features.block_mask is not None
        return self.plan.features.block_mask

    def _plane(self, batch: Int32, head: Int32) -> tuple[Int32, Int32]:
        """Coordinates of one head of one sequence."""
        batches, heads = self.mMask.shape[0], self.mMask.shape[1]
        zero = Int32(0)
        return cutlass.select_(batches > 1, batch, zero), cutlass.select_(heads > 1, head, zero)

    @cute.jit
    def state(self, batch: Int32, head: Int32, rows: tuple, keys: tuple):
        """(whether ``head``, or one of the heads packed with it, sees a key of ``keys`` from a row
        of ``rows``, whether not all do); both are (first, end) in their sequence."""
        block_m, block_n = self.blocks
        plane, first_head = self._plane(batch, head * self.plan.pack)
        heads = cutlass.select_(self.mMask.shape[1] > 1, Int32(self.plan.pack), Int32(1))
        some, every = Int32(0), Int32(1)
        if keys[0] < keys[1]:
            for m in cutlass.range(rows[0] // block_m, (rows[1] - 1) // block_m + 1, unroll=1):
                for n in cutlass.range(keys[0] // block_n, (keys[1] - 1) // block_n + 1, unroll=1):
                    for h in cutlass.range(first_head, first_head + heads, unroll=1):
                        seen = Int32(self.mMask[plane, h, m, n])
                        some = some | seen
                        every = every & seen
        return some != 0, (some != 0) & (every == 0)

    @cute.jit
    def row_words(self, batch: Int32, head: Int32, position: Int32, n: Int32, seqlen_k: Int32):
        """The keys of KV tile ``n`` that a row sees, 32 to a word."""
        block_m, block_n = self.blocks
        tile_n = self.plan.tile_n
        plane, h = self._plane(batch, head)
        m, first = position // block_m, n * tile_n
        words = [Int32(0) for _ in range(tile_n // 32)]
        if cutlass.const_expr(block_n % tile_n == 0):
            seen = -Int32(self.mMask[plane, h, m, first // block_n])
            words = [seen for _ in words]
        else:
            last = cutlass.min(first + tile_n, seqlen_k) - 1
            for block in cutlass.range(first // block_n, last // block_n + 1, unroll=1):
                seen = -Int32(self.mMask[plane, h, m, block])
                begin = block * block_n - first
                for w in cutlass.range_constexpr(len(words)):
                    low = cutlass.max(begin - 32 * w, 0)
                    high = cutlass.max(begin + block_n - 32 * w, 0)
                    words[w] = words[w] | (ptx.bit_mask(low, high - low) & seen)
        return words

    # ------------------------------------------------------------------ the bits

    @cute.jit
    def write(self, place: Any, t: int, sWork: Any, words: tuple, slot: Int32):
        """Make the bits of Q tile ``t`` of a work tile, whose record is there but for them, in
        ``words``, (first, end); gives (begin, end) of the KV tiles that are visible. One warp."""
        plan, lane = self.plan, cute.arch.lane_idx()
        per_tile = plan.mma_rows // plan.pack
        position = (place.block * plan.q_tiles + t) * per_tile
        first, end = Int32(0), Int32(0)
        for word in cutlass.range(words[0], words[1], unroll=1):
            n = word * 32 + lane
            rows = position, cutlass.min(position + per_tile, sWork[SEQLENS, slot])
            keys = n * plan.tile_n, n * plan.tile_n
            if (sWork[HEADER + RANGE * t, slot] <= n) & (n < sWork[HEADER + RANGE * t + 3, slot]):
                keys = keys[0], cutlass.min(keys[0] + plan.tile_n, sWork[SEQLENS + 1, slot])
            some, mixed = self.state(place.batch, place.head, rows, keys)
            visible = cute.arch.vote_ballot_sync(some)
            mixed = cute.arch.vote_ballot_sync(mixed)
            if lane == 0:
                self.sMask[2 * t + VISIBLE, word, slot] = visible
                self.sMask[2 * t + MIXED, word, slot] = mixed
            if visible != 0:
                first = first if end > 0 else word * 32 + lowest(visible)
                end = word * 32 + 32 - ptx.leading_zeros(visible)
        return first, end

    def bit(self, kind: int, t: Any, n: Int32, slot: Int32) -> Int32:
        """One bit of KV tile ``n`` and Q tile ``t``."""
        return self.sMask[2 * t + kind, n // 32, slot] >> n % 32 & 1

    def _visible(self, word: Int32, t: Any, slot: Int32) -> Int32:
        """The visible bits of a word: of Q tile ``t``, or with None of all."""
        if t is not None:
            return self.sMask[2 * t + VISIBLE, word, slot]
        words = [self.sMask[2 * tile + VISIBLE, word, slot] for tile in range(self.plan.q_tiles)]
        return words[0] | words[-1]

    @cute.jit
    def after(self, n: Int32, end: Int32, t: Any, slot: Int32):
        """The first visible KV tile after ``n``; ``end`` − 1 is visible."""
        n = n + 1
        if n < end:
            word = n // 32
            bits = self._visible(word, t, slot) & (Int32(-1) << n % 32)
            while bits == 0:
                word = word + 1
                bits = self._visible(word, t, slot)
            n = word * 32 + lowest(bits)
        return cute.arch.make_warp_uniform(n)
