"""What the roles of `mla_decode` work on: bundles of tensors and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32

from cute_fmha import tiling
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.mla_arguments import Scalars
from cute_fmha.kernels.blackwell.mla_decode_plan import KEYS, ROWS, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Carried, Fixed

DTYPES = {
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.float32: cutlass.Float32,
}

kv_tile_ranges = device_function(tiling.kv_tile_ranges)


class Global(NamedTuple):
    """Global tensors as the TMA sees them, their copy atoms, and what is addressed directly."""

    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD, D)
    tma_latent: cute.CopyAtom
    tma_rope: cute.CopyAtom
    mKV: cute.Tensor  # (PAGE_ROW, UNIT_COLUMN, UNIT, PAGE, END), see `ragged`; gathered (PAGE, D)
    mTable: cute.Tensor  # (BATCH, MAX_PAGES)
    mLens: cute.Tensor  # (BATCH,)
    tma_o: cute.CopyAtom
    mO: cute.Tensor  # (ROW, CHUNK_COLUMN, HALF, CHUNKS, BATCH)
    mLSE: cute.Tensor  # (BATCH, HEAD, SEQ_Q)
    mSink: cute.Tensor  # (HEAD,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): KV tiles skipped, and all


class Shared(NamedTuple):
    """Shared memory of a CTA. A unit is 64 rows of 128 bytes, swizzled."""

    sLatent: Any  # (ROW, UNIT_COLUMN, UNIT, STAGE)
    sRope: Any  # (ROW, UNIT_COLUMN, 1, STAGE)
    sP: Any  # (ROW, KEY, UNIT, STAGE)
    sQ: Any  # (ROW, UNIT_COLUMN, UNIT): what has no place in TMEM
    sTokens: Any  # (KEY,): pages of the tile that is gathered next
    sO: Any  # ((ROW, CHUNK_COLUMN), HALF, STAGE)
    sMax: Any  # (LANE, 2): maximum of a row's half of a tile, by turns
    sTotal: Any  # (LANE,): at the end Σ P of half a row
    sRowMax: Any  # (ROW,): at the end the maximum
    sKeep: Any  # (2, CTA): votes to keep a tile, by turns
    sKept: Any  # (1,): at the end whether any tile was kept

    def keeps(self, turn: Int32) -> Boolean:
        """Whether a CTA has voted to keep the tile of that turn."""
        votes = self.sKeep[turn, 0]
        if cute.size(self.sKeep, mode=[1]) == 2:
            votes = votes | self.sKeep[turn, 1]
        return votes != 0


@dataclass(frozen=True)
class Keys(Carried):
    """KV tiles ``begin … end − 1``; those outside of ``full_begin … full_end − 1`` need a mask."""

    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32


@dataclass(frozen=True)
class WorkTile(Carried):
    """Rows ``first_row … `` of the (position, head) rows of one sequence, and its length."""

    first_row: Int32
    batch: Int32
    seqlen_k: Int32


def lane_address(tmem: Any, thread: Int32) -> Int32:
    """TMEM address of the lane of ``thread`` of a warpgroup: lanes are bits 16–31."""
    return tmem.toint() + (thread // 32 << 21)


class Work(Fixed):
    """The work of one CTA, the ``rank``-th of its cluster."""

    def __init__(self, plan: MlaPlan, mem: Global, scalars: Scalars, rank: Int32) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars
        self.rank = rank

    @property
    def heads(self) -> Int32:
        return self.mem.mQ.shape[2]

    @property
    def rows(self) -> Int32:
        """Rows of a sequence, position-major: row = position · heads + head."""
        return self.mem.mQ.shape[1] * self.heads

    def indices(self) -> tuple[Int32, Int32, Int32]:
        """The work tiles of this cluster, as a range (first, end, step)."""
        total = cute.ceil_div(self.rows, self.plan.rows) * self.mem.mQ.shape[0]
        ctas = self.plan.ctas
        return cute.arch.block_idx()[0] // ctas, total, cute.arch.grid_dim()[0] // ctas

    def tile(self, index: Int32) -> WorkTile:
        """Work tile ``index``: row blocks of a sequence follow each other and share it in L2."""
        blocks = cute.ceil_div(self.rows, self.plan.rows)
        batch = index // blocks
        first_row = (index - batch * blocks) * self.plan.rows
        return WorkTile(first_row, batch, self.mem.mLens[batch])

    def window(self) -> tuple[Any, Any]:
        """Window sides; the Python integer −1 for a side that is not compiled in."""
        features = self.plan.features
        return (
            self.scalars.window_left if features.window_left else -1,
            self.scalars.window_right if features.window_right else -1,
        )

    @cute.jit
    def keys(self, tile: WorkTile):
        """The KV tiles that any row of the tile needs; all 0 when there are none."""
        seqlen_q, heads = self.mem.mQ.shape[1], self.heads
        left, right = self.window()
        last_row = cutlass.min(tile.first_row + self.plan.rows, self.rows) - 1
        begin, full_begin, full_end, end = kv_tile_ranges(
            tile.first_row // heads, last_row // heads + 1, seqlen_q, tile.seqlen_k, left, right,
            self.plan.tile_n,
        )  # fmt: skip
        if end <= begin:
            begin, full_begin, full_end, end = Int32(0), Int32(0), Int32(0), Int32(0)
        return Keys(begin, full_begin, full_end, end)

    def first_key(self, n: Int32) -> Int32:
        """The first of the 64 keys of tile ``n`` that the CTA fetches."""
        return n * self.plan.tile_n + self.rank * KEYS

    def position(self, tile: WorkTile, row: Int32) -> tuple[Int32, Int32, Boolean]:
        """(query position, head, whether it exists) of row ``row`` of the CTA in a work tile."""
        row = tile.first_row + self.rank * ROWS + row
        exists = row < self.rows
        row = cutlass.min(row, self.rows - 1)
        position = row // self.heads
        return position, row - position * self.heads, exists
