"""The work of a CTA of a decode kernel: which rows, which tiles, where partial results go.

All roles ask it and nothing else, so that they agree on every tile without telling each other.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.base import Row
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.mask import window_sides
from cute_fmha.kernels.blackwell.pipelines import Fixed
from cute_fmha.kernels.blackwell.splitkv import SplitKV, Workspace
from cute_fmha.kernels.blackwell.worklist import Piece, Sizes, WorkList, find


class DecodeWork(Fixed):
    """The ``pieces`` of work tiles of one CTA, the ``rank``-th of its cluster. ``mem``: the global
    tensors of its kernel; ``found``: see `WorkList`."""

    def __init__(
        self, plan: Any, mem: Any, scalars: Scalars, sizes: Sizes, rank: Int32, found: Any
    ) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars
        self.sizes = sizes
        self.rank = rank
        self.pieces = WorkList(plan.cutting, sizes, found)
        self.splitkv = SplitKV(**vars(plan.slots))
        self.workspace = Workspace(mem.mCounters, mem.mPartial, rank)

    @cute.jit
    def begin(self, found: Any):
        """What one warp does before the roles start: see `worklist.find`, `SplitKV.start`."""
        if cutlass.const_expr(self.plan.cut is Cut.SHARE):
            find(self.plan.cutting, self.sizes, found)
        if cutlass.const_expr(self.plan.cut is not Cut.WHOLE):
            with cute.arch.elect_one():
                self.splitkv.start(self.workspace)

    def window(self) -> tuple[Any, Any]:
        """See `window_sides`."""
        return window_sides(self.plan.features, self.scalars)

    def skip_value(self, piece: Piece) -> Float32:
        """λ for a sequence."""
        features = self.plan.features
        value = self.mem.mSkip[0] if features.skip_tensor else self.scalars.skip
        return value / Float32(piece.length) if features.skip_relative else value

    def position(self, piece: Piece, row: Int32) -> tuple[Int32, Int32, Boolean]:
        """(query position, head, whether it exists) of row ``row`` of the CTA in a work tile."""
        row = piece.block * self.plan.rows + self.rank * self.splitkv.rows + row
        rows = self.pieces.total_rows
        exists = row < rows
        row = cutlass.min(row, rows - 1)
        position = row // self.sizes.heads
        head = row - position * self.sizes.heads
        if self.plan.cutting.kv_heads:
            head = head + piece.head * self.sizes.heads
        return position, head, exists

    def output_row(self, piece: Piece, row: Int32) -> Row:
        """Row ``row`` of the CTA as the epilogue op sees it."""
        position, head, exists = self.position(piece, row)
        token = piece.batch * self.sizes.seqlen_q + position
        return Row(token, head, exists, self.plan.head_dim_v)
