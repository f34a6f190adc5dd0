"""What the roles of `mla_decode_small` share: bundles of tensors, and the work of a CTA.

All roles ask `Work` and nothing else, so that they agree on every tile without telling each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha import tiling
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.mla_arguments import Scalars
from cute_fmha.kernels.blackwell.mla_decode_small_plan import SmallPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Fixed
from cute_fmha.kernels.blackwell.softmax import log2_threshold

kv_tile_ranges = device_function(tiling.kv_tile_ranges)

VOTE, EXCHANGE = 1, 2
"""Named barriers of the softmax warpgroup."""


class Global(NamedTuple):
    """Global tensors; the latents as the TMA sees them, and their copy atom."""

    tma: cute.CopyAtom
    mL: cute.Tensor  # (PAGE_ROW, D, PAGE, END), see `ragged`; gathered (PAGE, D)
    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, D)
    mTable: cute.Tensor  # (BATCH, MAX_PAGES)
    mLens: cute.Tensor  # (BATCH,)
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, DV)
    mLSE: cute.Tensor  # (BATCH, HEAD_Q, SEQ_Q)
    mSink: cute.Tensor  # (HEAD_Q,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): tiles skipped, and all


class Shared(NamedTuple):
    """Shared memory of a CTA."""

    sQ: Any  # address: (ROW, 64, BLOCK), rows of 128 bytes, swizzled
    sV: Any  # (TOKEN, 64, BOX, BLOCK, STAGE), rows of 128 bytes, swizzled
    sR: Any  # (TOKEN, 64, BOX, 1, STAGE), the same for the rope columns
    sP: Any  # address: (ROW, TOKEN, BUFFER), tokens of 2 · ROWS bytes, swizzled
    sO: Any  # (COLUMN, ROW): a part of O on its way out
    sMax: Any  # (ROW, WARP): maxima of a tile
    sFade: Any  # (ROW, WARP): what is left of O, the same for every warp; at the end row sums
    sMinus: Any  # (ROW,): at the end, − maximum in base 2
    sVote: Any  # address: (WARP, BUFFER), what the warps say of a tile
    sKeep: Any  # (BUFFER,): whether a tile is kept
    sTokens: Any  # (TOKEN,): pages of the tokens that are gathered next


@dataclass(frozen=True)
class Segment(Carried):
    """The tiles ``begin … end − 1`` of one sequence, of which those from ``full_begin`` to
    ``full_end − 1`` need no mask."""

    batch: Int32
    length: Int32
    begin: Int32
    full_begin: Int32
    full_end: Int32
    end: Int32
    threshold: Float32  # log2 λ

    @property
    def any(self) -> Boolean:
        return self.end > self.begin


class Work(Fixed):
    """The work of one CTA."""

    def __init__(self, plan: SmallPlan, mem: Global, scalars: Scalars) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars

    @property
    def seqlen_q(self) -> Int32:
        return self.mem.mQ.shape[1]

    @property
    def heads(self) -> Int32:
        return self.mem.mQ.shape[2]

    @property
    def rows(self) -> Int32:
        """Rows that exist: (position, head), position-major."""
        return self.seqlen_q * self.heads

    def indices(self) -> tuple[Int32, Int32, Int32]:
        """The segments of this CTA, as a range (first, end, step)."""
        return cute.arch.block_idx()[0], self.mem.mQ.shape[0], cute.arch.grid_dim()[0]

    def window(self) -> tuple[Any, Any]:
        """Window sides; the Python integer −1 for a side that is not compiled in."""
        features = self.plan.features
        return (
            self.scalars.window_left if features.window_left else -1,
            self.scalars.window_right if features.window_right else -1,
        )

    @cute.jit
    def segment(self, index: Int32) -> Segment:
        """Segment ``index``: a whole sequence."""
        length = self.mem.mLens[index]
        left, right = self.window()
        begin, full_begin, full_end, end = kv_tile_ranges(
            0, self.seqlen_q, self.seqlen_q, length, left, right, self.plan.tile_n
        )
        threshold = Float32(0.0)
        if cutlass.const_expr(self.plan.features.skip):
            threshold = self.threshold(length)
        return Segment(
            index, length, begin, full_begin, full_end, cutlass.max(begin, end), threshold
        )

    def threshold(self, length: Int32) -> Float32:
        """log2 λ of a sequence of that length."""
        features = self.plan.features
        value = self.mem.mSkip[0] if features.skip_tensor else self.scalars.skip
        return log2_threshold(value / Float32(length) if features.skip_relative else value)


@dataclass(frozen=True)
class Group:
    """What a thread of the softmax warpgroup works with."""

    plan: SmallPlan
    dtype: Any
    work: Work
    mem: Global
    shared: Shared
    scalars: Scalars
    tmem: Int32  # address of the warp's lanes
    barriers: Barriers
    warp: Int32
    lane: Int32

    def rows(self) -> list[Int32]:
        """The rows that the thread's registers are of: eight rows have two of them."""
        first = 2 * (self.lane % 4)
        return [first + 8 * (i // 2) + i % 2 for i in range(self.plan.rows // 4)]

    def token(self, half: int) -> Int32:
        """The thread's token in a tile, first and second."""
        return self.warp * 16 + self.lane // 4 + 8 * half

    def wait_product(self, number: Int32) -> None:
        """Wait until P V of tile ``number`` is complete; S of the tile after it must be."""
        self.barriers.wait_tmem("o_full", number >> 1 & 1, number & 1)
