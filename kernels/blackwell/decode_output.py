"""From rows of O to the output, for all decode kernels: the largest logit is stored, the sink
joins, the LSE is stored, rows are normalised and leave; also what partial results are reduced to.

Where largest logits are asked for, a row's maximum no longer lags behind its scores here
(`caught_up`), and neither do those of partial results: the largest of their maxima is the largest
logit.
"""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.decode_work import DecodeWork
from cute_fmha.kernels.blackwell.softmax import (
    LN2,
    LOG2_E,
    log_sum_exp,
    normaliser,
    scaled,
    with_sink,
)
from cute_fmha.kernels.blackwell.worklist import Piece


def caught_up(
    maximum_log2: Float32, total: Float32, largest_log2: Float32
) -> tuple[Float32, Float32, Float32]:
    """(maximum, Σ P, what is left of O) relative to the largest score of a row."""
    fade = ptx.exp2(maximum_log2 - largest_log2)
    return largest_log2, total * fade, fade


@cute.jit
def outcome(
    work: DecodeWork, piece: Piece, row: Int32, maximum_log2: Float32, total: Float32, tell: Boolean
):
    """The factor that normalises a row of O; its largest logit and its LSE are stored where
    ``tell``."""
    mem, features = work.mem, work.plan.features
    position, head, exists = work.position(piece, row)
    if cutlass.const_expr(features.max_logits):
        largest = -Float32.inf
        if total != 0.0:
            largest = LN2 * maximum_log2
        if exists & tell:
            mem.mMaxLogits[piece.batch, head, position] = largest
    left = Float32(1.0)
    if cutlass.const_expr(features.sink):
        maximum_log2, total, left = with_sink(maximum_log2, total, mem.mSink[head] * LOG2_E)
    if cutlass.const_expr(features.lse):
        lse = log_sum_exp(maximum_log2, total)
        if exists & tell:
            mem.mLSE[piece.batch, head, position] = lse
    return normaliser(total, left)


def write(
    work: DecodeWork, store: Store, piece: Piece, row: Int32, column: Int32, values: list[Float32]
) -> None:
    """Store what becomes of neighbouring columns of a row, if it exists."""
    mO = work.mem.mO
    position, head, exists = work.position(piece, row)
    start = (mO.iterator + cute.crd2idx((piece.batch, position, head, 0), mO.layout)).toint()
    apply = store.apply(work.output_row(piece, row), work.mem.op)
    store.write(values, column, apply, start, exists)


@cute.jit
def combine(work: DecodeWork, store: Store, warp: Int32, warps: int, barrier: int):
    """Reduce partial results and store what comes of them: ``warps`` warps, which meet at named
    barrier ``barrier``."""
    work.splitkv.combine(
        work.workspace, work.pieces, warp, warps, barrier,
        functools.partial(reduced, work, store),
    )  # fmt: skip


@cute.jit
def reduced(
    work: DecodeWork, store: Store, piece: Piece, row: Int32, column: Int32, values,
    maximum_log2: Float32, total: Float32,
):  # fmt: skip
    """Normalise and store neighbouring columns of a row."""
    scale = outcome(work, piece, row, maximum_log2, total, column == 0)
    write(work, store, piece, row, column, scaled(values, scale))
