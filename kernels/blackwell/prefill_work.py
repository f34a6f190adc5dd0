"""Which work `prefill` has: the work tiles of a CTA, where they lie, and the KV tiles they need.

All roles ask here and nowhere else, so that they agree on every work tile and every KV tile without
telling each other:

    for index in cutlass.range(*work.indices(), unroll=1):
        tile = work.tile(index)
        first, end, q_tiles = work.keys(tile)      # KV tiles of the work tile, and of each Q tile
        n = first
        while n < end:
            if q_tiles[t].has(n): …                # Q tile t needs KV tile n
            n = tile.after(n)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha import tiling
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.pipelines import Carried, Fixed
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Scalars

kv_tile_ranges = device_function(tiling.kv_tile_ranges)


@dataclass(frozen=True)
class WorkTile(Carried):
    """Consecutive query rows of one head of one sequence."""

    block: Int32  # which of the sequence's work tiles
    head: Int32
    head_kv: Int32
    batch: Int32
    seqlen_q: Int32
    seqlen_k: Int32

    def after(self, n: Int32) -> Int32:
        """The KV tile that comes after ``n``; hidden from the compiler, which would unroll every
        loop over KV tiles whose length it can compute."""
        return ptx.opaque(n + 1)

    def queries(self, mX: cute.Tensor) -> cute.Tensor:
        """(SEQ_Q, D) of Q or O, (SEQ, D, HEAD_Q, BATCH)."""
        return mX[None, None, self.head, self.batch]

    def keys(self, mX: cute.Tensor) -> cute.Tensor:
        """(SEQ_K, D) of K or (DV, SEQ_K) of V, both (…, …, HEAD_KV, BATCH)."""
        return mX[None, None, self.head_kv, self.batch]


@dataclass(frozen=True)
class KeyTiles(Carried):
    """The KV tiles of one Q tile: ``begin … end − 1``, of which those from ``full_begin`` to
    ``full_end − 1`` need no mask. All 0 when there are none."""

    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32

    def has(self, n: Int32) -> Boolean:
        return (self.begin <= n) & (n < self.end)

    @property
    def any(self) -> Boolean:
        return self.end > self.begin


class Work(Fixed):
    """The work of one CTA."""

    def __init__(self, plan: Plan, mem: Global, scalars: Scalars) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars

    def indices(self) -> tuple[Int32, Int32, Int32]:
        """The work tiles of this CTA, as a range (first, end, step)."""
        total = cute.ceil_div(self.mem.mQ.shape[0], self.plan.work_rows) * self.mem.mQ.shape[2]
        return cute.arch.block_idx()[0], total * self.mem.mQ.shape[3], cute.arch.grid_dim()[0]

    def tile(self, index: Int32) -> WorkTile:
        """Work tile ``index``: blocks of rows come last, so that heads share K and V in L2."""
        mQ, mK = self.mem.mQ, self.mem.mK
        heads, batches = mQ.shape[2], mQ.shape[3]
        block = index // (heads * batches)
        rest = index - block * (heads * batches)
        batch = rest // heads
        head = rest - batch * heads
        head_kv = head // (heads // mK.shape[2])
        return WorkTile(block, head, head_kv, batch, mQ.shape[0], mK.shape[0])

    def first_row(self, tile: WorkTile, t: Any) -> Int32:
        """The first query row of Q tile ``t`` in its sequence."""
        return tile.block * self.plan.work_rows + t * self.plan.tile_m

    def window(self) -> tuple[Any, Any]:
        """Window sides; the Python integer −1 for a side that is not compiled in."""
        features = self.plan.features
        return (
            self.scalars.window_left if features.window_left else -1,
            self.scalars.window_right if features.window_right else -1,
        )

    @cute.jit
    def keys_of(self, tile: WorkTile, t: Any) -> KeyTiles:
        """The KV tiles of Q tile ``t``, a number of Python or of the run."""
        row = self.first_row(tile, t)
        left, right = self.window()
        row_end = cutlass.min(row + self.plan.tile_m, tile.seqlen_q)
        begin, full_begin, full_end, end = kv_tile_ranges(
            row, row_end, tile.seqlen_q, tile.seqlen_k, left, right, self.plan.tile_n
        )
        if row >= tile.seqlen_q or end <= begin:
            begin, full_begin, full_end, end = Int32(0), Int32(0), Int32(0), Int32(0)
        return KeyTiles(begin, full_begin, full_end, end)

    @cute.jit
    def keys(self, tile: WorkTile):
        """(first, end) of the KV tiles that any Q tile needs, and [those of every Q tile]."""
        tiles = []
        for t in cutlass.range_constexpr(self.plan.q_tiles):
            tiles.append(self.keys_of(tile, t))
        first, end = tiles[0].begin, tiles[0].end
        if cutlass.const_expr(self.plan.q_tiles == 2):
            # A later tile begins and ends no earlier, unless one of them is empty.
            first = tiles[1].begin if not tiles[0].any else tiles[0].begin
            end = cutlass.max(tiles[0].end, tiles[1].end)
        return first, end, tiles
