"""What the roles of `decode_transposed` share: bundles of tensors, and the work of a CTA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.decode_transposed_plan import TransposedPlan
from cute_fmha.kernels.blackwell.decode_work import DecodeWork
from cute_fmha.kernels.blackwell.pipelines import Barriers
from cute_fmha.kernels.blackwell.softmax import log2_threshold
from cute_fmha.kernels.blackwell.worklist import Piece, Sizes

VOTE, EXCHANGE, COMBINE = 1, 2, 3
"""Named barriers: two of the softmax warpgroup, and one of all warps."""


class Global(NamedTuple):
    """Global tensors; the latents as the TMA sees them, and their copy atom."""

    tma: cute.CopyAtom
    mL: cute.Tensor  # (PAGE_ROW, D, PAGE, END), see `ragged`; gathered (PAGE, D)
    # Where keys and values are tensors of their own, these are the keys, and have KV heads:
    # (PAGE_ROW, D, HEAD_KV, PAGE, END)
    mQ: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, D)
    mTable: Any  # (BATCH, MAX_PAGES); without it page b is sequence b
    mLens: Any  # (BATCH,); without it pages are full
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD_Q, DV)
    mLSE: cute.Tensor  # (BATCH, HEAD_Q, SEQ_Q)
    mMaxLogits: cute.Tensor  # (BATCH, HEAD_Q, SEQ_Q)
    mSink: cute.Tensor  # (HEAD_Q,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): tiles skipped, and all
    mCounters: cute.Tensor  # (COUNTERS,), see `splitkv`
    mPartial: cute.Tensor  # (FLOATS,)
    op: tuple[Any, ...] | None  # what the epilogue op reads, and its second output
    tma_v: cute.CopyAtom | None = None
    mV: cute.Tensor | None = None  # (PAGE_ROW, DV, HEAD_KV, PAGE, END)


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
    sLargest: Any  # (ROW, WARP): at the end, the largest scores; None where nobody asks for them
    sVote: Any  # address: (WARP, BUFFER), what the warps say of a tile
    sKeep: Any  # (BUFFER,): whether a tile is kept
    sFound: Any  # (FOUND,), see `worklist.find`
    sBoxes: Any  # (NUMBER, LOADER): where the boxes of the next tile lie, 4 each
    sK: Any = None  # (TOKEN, 64, BOX, BLOCK, STAGE), as sV: keys that are a tensor of their own


class Work(DecodeWork):
    """The work of a CTA: a cluster is one."""

    def __init__(
        self, plan: TransposedPlan, mem: Global, scalars: Scalars, found: Any = None
    ) -> None:
        kv_heads = 1 if plan.latent else mem.mL.shape[2]
        heads = mem.mQ.shape[2] if plan.latent else mem.mQ.shape[2] // kv_heads
        sizes = Sizes(
            mem.mLens, mem.mQ.shape[1], heads, scalars.window_left, scalars.window_right,
            scalars.num_splits, cute.arch.grid_dim()[0], cute.arch.block_idx()[0],
            kv_heads, mem.mQ.shape[0], mem.mL.shape[0],
        )  # fmt: skip
        super().__init__(plan, mem, scalars, sizes, Int32(0), found)

    def threshold(self, piece: Piece) -> Float32:
        """log2 λ for a sequence, where tiles may be skipped."""
        if not self.plan.features.skip:
            return Float32(0.0)
        return log2_threshold(self.skip_value(piece))


def turn(plan: TransposedPlan, number: Int32) -> tuple[Int32, Int32]:
    """(buffer, parity of its phase) of a CTA's tile ``number``."""
    return number & (plan.depth - 1), number >> (plan.depth.bit_length() - 1) & 1


@dataclass(frozen=True)
class Group:
    """What a thread of the softmax warpgroup works with."""

    plan: TransposedPlan
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

    def token(self, index: int) -> Int32:
        """The thread's ``index``-th token in a tile: of every 16 two."""
        return self.warp * (self.plan.tile_n // 4) + self.lane // 4 + 8 * index

    def places(self, i: int) -> list[int]:
        """The registers of a tile's scores that are of the thread's ``i``-th row, by token."""
        of_16 = range(0, self.plan.tile_n * self.plan.rows // 128, self.plan.rows // 2)
        return [first + 4 * (i // 2) + 2 * half + i % 2 for first in of_16 for half in range(2)]

    def held(self) -> list[tuple[Int32, Any]]:
        """(column of the part, row) of each of the thread's registers of a part of O; pairs of them
        are of neighbouring rows of a column. Products of 64 columns have 16 in the first lanes of
        every warp, and are read as fragments, as S."""
        plan, rows = self.plan, self.rows()
        if plan.columns == 128:
            return [(self.warp * 32 + self.lane, row) for row in range(plan.rows)]
        column = self.warp * 16 + self.lane // 4
        eights = range(0, len(rows), 2)
        return [
            (column + 8 * half, rows[i + j]) for i in eights for half in range(2) for j in range(2)
        ]

    def load_part(self, tO: Int32) -> list[Float32]:
        """A part of O; `held` says what of it."""
        if self.plan.columns == 128:
            return ptx.tcgen05_wait_load(ptx.tcgen05_load(tO, self.plan.rows))
        return ptx.tcgen05_wait_load(ptx.tcgen05_load_fragment(tO, self.plan.rows // 8))

    def store_part(self, tO: Int32, values: list[Float32]) -> None:
        """What `load_part` has given, changed; it is there after `ptx.tcgen05_wait_store`."""
        if self.plan.columns == 128:
            ptx.tcgen05_store(tO, values)
        else:
            ptx.tcgen05_store_fragment(tO, values)

    def wait_product(self, number: Int32) -> None:
        """Wait until P V of tile ``number`` is complete; S of the tile after it must be."""
        buffer, phase = turn(self.plan, number)
        self.barriers.wait_tmem("o_full", phase, buffer)
