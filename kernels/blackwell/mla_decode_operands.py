"""What the roles of `mla_decode` work on: bundles of tensors and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.decode_work import DecodeWork
from cute_fmha.kernels.blackwell.mla_decode_plan import KEYS, MlaPlan
from cute_fmha.kernels.blackwell.worklist import Sizes


class Global(NamedTuple):
    """Global tensors as the TMA sees them, their copy atoms, and what is addressed directly."""

    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD, D)
    tma_latent: cute.CopyAtom
    tma_rope: cute.CopyAtom
    mKV: cute.Tensor  # (PAGE_ROW, UNIT_COLUMN, UNIT, PAGE, END), see `ragged`; gathered (PAGE, D)
    mTable: cute.Tensor  # (BATCH, MAX_PAGES)
    mLens: cute.Tensor  # (BATCH,)
    tma_o: cute.CopyAtom
    gO: cute.Tensor  # (ROW, CHUNK_COLUMN, HALF, CHUNKS, BATCH)
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD, DV)
    mLSE: cute.Tensor  # (BATCH, HEAD, SEQ_Q)
    mMaxLogits: cute.Tensor  # (BATCH, HEAD, SEQ_Q)
    mSink: cute.Tensor  # (HEAD,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): KV tiles skipped, and all
    mCounters: cute.Tensor  # (COUNTERS,), see `splitkv`
    mPartial: cute.Tensor  # (FLOATS,)
    op: tuple[Any, ...] | None  # what the epilogue op reads, and its second output


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
    sLargest: Any  # (ROW,): at the end the largest score; None where nobody asks for it
    sKeep: Any  # (2, CTA): votes to keep a tile, by turns
    sKept: Any  # (1,): at the end whether any tile was kept
    sFound: Any  # (FOUND,), see `worklist.find`

    def keeps(self, turn: Int32) -> Boolean:
        """Whether a CTA has voted to keep the tile of that turn."""
        votes = self.sKeep[turn, 0]
        if cute.size(self.sKeep, mode=[1]) == 2:
            votes = votes | self.sKeep[turn, 1]
        return votes != 0


def lane_address(tmem: Any, thread: Int32) -> Int32:
    """TMEM address of the lane of ``thread`` of a warpgroup: lanes are bits 16–31."""
    return tmem.toint() + (thread // 32 << 21)


class Work(DecodeWork):
    """The work of a CTA, of which one or two make a cluster.

    Each role makes its own: what follows from the sizes alone the compiler would otherwise compute
    once at the entry of the kernel, for all roles, and spill.
    """

    def __init__(self, plan: MlaPlan, mem: Global, scalars: Scalars, found: Any = None) -> None:
        rank = ptx.cluster_rank() if plan.pair else Int32(0)
        sizes = Sizes(
            mem.mLens, ptx.opaque(mem.mQ.shape[1]), ptx.opaque(mem.mQ.shape[2]),
            scalars.window_left, scalars.window_right, scalars.num_splits,
            cute.arch.grid_dim()[0] // plan.ctas, ptx.opaque(cute.arch.block_idx()[0]) // plan.ctas,
        )  # fmt: skip
        super().__init__(plan, mem, scalars, sizes, rank, found)

    def first_key(self, n: Int32) -> Int32:
        """The first of the 64 keys of tile ``n`` that the CTA fetches."""
        return n * self.plan.tile_n + self.rank * KEYS
