"""Run-time values of the MLA decode kernels, in the order their callers pass them."""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Float32, Int32


class Scalars(NamedTuple):
    """Run-time values; what a plan has not compiled in is not read."""

    scale_log2: Float32  # scale · log2 e; with a softcap cap · log2 e
    cap_inner: Float32  # scale / cap
    window_left: Int32
    window_right: Int32
    skip: Float32  # λ, or the factor that λ is over the KV length
    num_splits: Int32  # pieces of every sequence; 0: as many as fill the GPU evenly
