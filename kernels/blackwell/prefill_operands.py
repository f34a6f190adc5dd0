"""What the roles of `prefill` work on: bundles of tensors, layouts and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32


def tmem_row(tmem: Any, thread: Int32) -> Int32:
    """TMEM address of the row that ``thread`` of a warpgroup may access: lanes are bits 16–31."""
    return tmem.toint() + (thread // 32 << 21)


class Tensors(NamedTuple):
    """Tensors of a call, in the order that its callers pass them; None for what a plan has not
    compiled in. Packed sequences have TOKEN in place of BATCH and SEQ."""

    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, D)
    mK: cute.Tensor  # (BATCH, SEQ_K, HEAD_KV, D)
    mV: cute.Tensor  # (BATCH, SEQ_K, HEAD_KV, DV)
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, DV)
    mLSE: cute.Tensor | None  # (BATCH, HEAD_Q, SEQ_Q)
    mSink: cute.Tensor | None  # (HEAD_Q,)
    mSkip: cute.Tensor | None  # (1,): in place of the scalar
    mStats: cute.Tensor | None  # (2,): KV tiles skipped, and all
    mMask: cute.Tensor | None  # (BATCH or 1, HEAD or 1, BLOCK_M, BLOCK_N): block mask


class Mmas(NamedTuple):
    """S = Q Kᵀ and O = P V."""

    qk: cute.TiledMma
    pv: cute.TiledMma


class Global(NamedTuple):
    """Global tensors as the TMA sees them, their copy atoms, and what is addressed directly."""

    tma_q: cute.CopyAtom
    mQ: cute.Tensor  # (SEQ_Q, D, HEAD_Q, BATCH)
    tma_k: cute.CopyAtom
    mK: cute.Tensor  # (SEQ_K, D, HEAD_KV, BATCH)
    tma_v: cute.CopyAtom
    mV: cute.Tensor  # (DV, SEQ_K, HEAD_KV, BATCH)
    tma_o: cute.CopyAtom
    mO: cute.Tensor  # (SEQ_Q, DV, HEAD_Q, BATCH)
    mLSE: cute.Tensor  # (BATCH, HEAD_Q, SEQ_Q)
    mSink: cute.Tensor  # (HEAD_Q,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): KV tiles skipped, and all
    op: tuple[Any, ...] | None  # what the epilogue op reads, and its second output
    mStartQ: Any  # (BATCH + 1,): where packed sequences begin, and the last one ends
    mStartK: Any
    mUsed: Any  # (BATCH,): keys in use; None where a call has no such tensor
    mMask: Any  # (BATCH or 1, HEAD or 1, BLOCK_M, BLOCK_N): block mask


class Layouts(NamedTuple):
    """Layouts of the shared buffers."""

    sQ: cute.ComposedLayout
    sK: cute.ComposedLayout
    sV: cute.ComposedLayout
    sO: cute.ComposedLayout


class Scalars(NamedTuple):
    """Run-time values."""

    scale_log2: Float32  # scale · log2 e; with a softcap cap · log2 e
    cap_inner: Float32  # scale / cap
    window_left: Int32
    window_right: Int32
    skip: Float32  # λ, or the factor that λ is over the KV length


class Lengths(NamedTuple):
    """Lengths on the device; None where sequences are not packed, or all keys are in use."""

    cu_seqlens_q: cute.Tensor | None  # (BATCH + 1,)
    cu_seqlens_k: cute.Tensor | None
    seqused_k: cute.Tensor | None  # (BATCH,)
    max_seqlen_q: Int32


class Shared(NamedTuple):
    """Shared memory of a CTA."""

    sQ: Any  # (MMA, MMA_M, MMA_K, TILE)
    sK: Any  # (MMA, MMA_N, MMA_K, STAGE)
    sV: Any  # (MMA, MMA_N, MMA_K, STAGE)
    sO: Any  # (ROWS, CHUNK, STAGE)
    sScale: Any  # (ROWS, GROUP): fade of a KV tile, at the end the row sum
    sMax: Any  # (ROWS, GROUP): at the end the row maximum; in a pair that of every KV tile
    sVotes: Any  # (WARP, GROUP) bytes: whether a warp's rows keep a KV tile
    sKeep: Any  # (CTA, GROUP): the same bytes as a word, 0 if nobody keeps it
    sWork: Any  # (WORD, STAGE): records of work tiles
    sClaim: Any  # (4,): answer of cluster launch control
    sMask: Any  # (VISIBLE and MIXED of each TILE, WORD, STAGE): bits of a block mask

    def keeps(self, group: Any) -> Boolean:
        """Whether a row of ``group`` has voted to keep the KV tile that is decided on."""
        votes = self.sKeep[0, group]
        if cute.size(self.sKeep, mode=[0]) == 2:
            votes = votes | self.sKeep[1, group]
        return votes != 0
