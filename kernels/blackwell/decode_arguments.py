"""What a call hands to a decode kernel, in the order that its callers pass it."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32


class Tensors(NamedTuple):
    """Tensors of a call; None for what a plan has not compiled in."""

    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD, D)
    mKV: cute.Tensor  # (PAGE, PAGE_ROW, 1, D); keys alone (PAGE, PAGE_ROW, HEAD_KV, D)
    mTable: Any  # (BATCH, MAX_PAGES); None: page b is sequence b
    mLens: Any  # (BATCH,); None: all keys of a sequence are in use
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD, DV)
    mLSE: cute.Tensor | None  # (BATCH, HEAD, SEQ_Q)
    mMaxLogits: cute.Tensor | None  # (BATCH, HEAD, SEQ_Q)
    mSink: cute.Tensor | None  # (HEAD,)
    mSkip: cute.Tensor | None  # (1,): in place of the scalar
    mStats: cute.Tensor | None  # (2,): KV tiles skipped, and all
    mCounters: cute.Tensor | None  # (COUNTERS,), see `splitkv`
    mPartial: cute.Tensor | None  # (FLOATS,)


class Scalars(NamedTuple):
    """Run-time values; what a plan has not compiled in is not read."""

    scale_log2: Float32  # scale · log2 e; with a softcap cap · log2 e
    cap_inner: Float32  # scale / cap
    window_left: Int32
    window_right: Int32
    skip: Float32  # λ, or the factor that λ is over the KV length
    num_splits: Int32  # pieces of every sequence; 0: as many as fill the GPU evenly
