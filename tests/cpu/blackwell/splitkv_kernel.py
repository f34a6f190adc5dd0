"""A kernel that has nothing but the work list and the split-KV combine (not collected).

Attention with scores and values given, in FP32 on one thread a row: the least that shows whether
every key is taken once, by whatever cut, and whether partial results meet.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.emulator.machine import Policy
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.cutting import COLUMNS, Cut, Cutting
from cute_fmha.kernels.blackwell.softmax import EMPTY
from cute_fmha.kernels.blackwell.splitkv import SplitKV, Workspace
from cute_fmha.kernels.blackwell.worklist import FOUND, Sizes, WorkList, find

LN2 = math.log(2.0)
WARPS = 4
COMBINE = 1
"""Named barrier."""


class Values(NamedTuple):
    """Run-time values."""

    window_left: Int32
    window_right: Int32
    num_splits: Int32


class Tensors(NamedTuple):
    """What the kernel reads and writes."""

    mS: cute.Tensor  # (BATCH, SEQ_Q, HEAD, KEY): scores in base 2
    mV: cute.Tensor  # (BATCH, KEY, DV)
    mLens: cute.Tensor  # (BATCH,)
    mO: cute.Tensor  # (BATCH, SEQ_Q, HEAD, DV)
    mLSE: cute.Tensor  # (BATCH, HEAD, SEQ_Q)
    mPieces: cute.Tensor  # (BATCH, BLOCK): pieces of each work tile
    mCounters: cute.Tensor
    mPartial: cute.Tensor


@dataclass(frozen=True)
class Fake:
    """The kernel of one cutting."""

    cutting: Cutting
    head_dim_v: int = 32
    row_minor: bool = True
    ranks: int = 1

    @property
    def splitkv(self) -> SplitKV:
        rows = self.cutting.rows // self.ranks
        return SplitKV(rows, self.head_dim_v, self.row_minor, self.ranks)

    @cute.jit
    def __call__(
        self, mS: cute.Tensor, mV: cute.Tensor, mLens: cute.Tensor, mO: cute.Tensor,
        mLSE: cute.Tensor, mPieces: cute.Tensor, mCounters: cute.Tensor, mPartial: cute.Tensor,
        values: Values, workers: Int32,
    ):  # fmt: skip
        mem = Tensors(mS, mV, mLens, mO, mLSE, mPieces, mCounters, mPartial)
        self.kernel(mem, values).launch(
            grid=(workers * self.ranks, 1, 1), block=(32 * WARPS, 1, 1),
            cluster=(self.ranks, 1, 1),
        )  # fmt: skip

    @cute.kernel
    def kernel(self, mem: Tensors, values: Values):
        @cute.struct
        class Storage:
            found: cute.struct.Align[cute.struct.MemRange[Int32, FOUND], 16]

        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        found = storage.found.get_tensor(cute.make_layout(FOUND))
        block = cute.arch.block_idx()[0]
        workers = cute.arch.grid_dim()[0] // self.ranks
        sizes = Sizes(
            mem.mLens, mem.mS.shape[1], mem.mS.shape[2], values.window_left, values.window_right,
            values.num_splits, workers, block // self.ranks,
        )  # fmt: skip
        workspace = Workspace(mem.mCounters, mem.mPartial, block % self.ranks)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            if cutlass.const_expr(self.cutting.cut is Cut.SHARE):
                find(self.cutting, sizes, found)
            if cutlass.const_expr(self.cutting.cut is not Cut.WHOLE):
                with cute.arch.elect_one():
                    self.splitkv.start(workspace)
        cute.arch.sync_threads()
        works = WorkList(self.cutting, sizes, found)
        place = works.start
        while works.more(place):
            piece = works.piece(place)
            if piece.exists != 0:
                self.compute(mem, works, workspace, place, piece)
            place = works.next(place, piece)
        if cutlass.const_expr(self.cutting.cut is not Cut.WHOLE):
            self.splitkv.combine(
                workspace, works, warp, WARPS, COMBINE,
                functools.partial(self.output, mem, works, workspace.rank),
            )  # fmt: skip

    @cute.jit
    def compute(self, mem: Tensors, works: WorkList, workspace: Workspace, place, piece):
        """A piece, straight out or to the workspace."""
        thread = cute.arch.thread_idx()[0]
        splitkv, seqlen_q = self.splitkv, works.sizes.seqlen_q
        row = cutlass.min(thread, splitkv.rows - 1)
        position, head, _ = self.row(works, workspace.rank, piece, row)
        diagonal = position + piece.length - seqlen_q
        first, end = diagonal - piece.length, piece.length
        if cutlass.const_expr(self.cutting.window_left):
            first = diagonal - works.sizes.window_left
        if cutlass.const_expr(self.cutting.window_right):
            end = cutlass.min(end, diagonal + works.sizes.window_right + 1)
        maximum, total = Float32(EMPTY), Float32(0.0)
        sums = [Float32(0.0) for _ in range(self.head_dim_v)]
        tile_n = self.cutting.tile_n
        last = cutlass.min(piece.end * tile_n, piece.length)
        for key in cutlass.range(piece.begin * tile_n, last, unroll=1):
            if first <= key and key < end:
                score = mem.mS[piece.batch, position, head, key]
                new = cute.arch.fmax(maximum, score)
                fade, p = ptx.exp2(maximum - new), ptx.exp2(score - new)
                maximum, total = new, total * fade + p
                for c in cutlass.range_constexpr(self.head_dim_v):
                    sums[c] = sums[c] * fade + p * mem.mV[piece.batch, key, c]
        if piece.whole != 0:
            self.whole(mem, works, workspace.rank, piece, thread, sums, maximum, total)
        else:
            slot = splitkv.own_address(workspace, works, place, piece)
            if thread < splitkv.rows:
                splitkv.write(slot, thread, 0, sums)
                splitkv.write_row(slot, thread, maximum, total)
            cute.arch.sync_threads()
            if thread == 0:
                splitkv.arrive(workspace, works, place, piece)
                cute.arch.atomic_add(self.pieces(mem, piece), Int32(1))

    def pieces(self, mem: Tensors, piece) -> Any:
        at = cute.crd2idx((piece.batch, piece.block), mem.mPieces.layout)
        return mem.mPieces.iterator + at

    def row(self, works: WorkList, rank: Int32, piece, row: Int32):
        """(position, head, whether it exists) of a row of the CTA."""
        row = piece.block * self.cutting.rows + rank * self.splitkv.rows + row
        exists = row < works.total_rows
        row = cutlass.min(row, works.total_rows - 1)
        return row // works.sizes.heads, row % works.sizes.heads, exists

    @cute.jit
    def whole(self, mem: Tensors, works, rank, piece, thread, sums, maximum, total):
        if thread < self.splitkv.rows:
            for c in cutlass.range_constexpr(0, self.head_dim_v, COLUMNS):
                self.output(
                    mem, works, rank, piece, thread, Int32(c), sums[c : c + COLUMNS], maximum, total
                )
        if thread == 0:
            cute.arch.atomic_add(self.pieces(mem, piece), Int32(1))

    @cute.jit
    def output(self, mem: Tensors, works, rank, piece, row, column, values, maximum, total):
        position, head, exists = self.row(works, rank, piece, row)
        if exists:
            scale, lse = Float32(0.0), -Float32.inf
            if total != 0.0:
                scale = 1.0 / total
                lse = LN2 * (maximum + cute.math.log2(total, fastmath=True))
            for c in cutlass.range_constexpr(COLUMNS):
                mem.mO[piece.batch, position, head, column + c] = values[c] * scale
            if column == 0:
                mem.mLSE[piece.batch, head, position] = lse


def tensor(x: torch.Tensor) -> Any:
    return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)


@functools.cache
def compiled(kernel: Fake, **options: Any) -> Any:
    ints = torch.zeros(1, dtype=torch.int32)
    floats = torch.zeros(1)
    tensors = (
        torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), ints, torch.zeros(1, 1, 1, 1),
        torch.zeros(1, 1, 1), ints.clone()[None], ints.clone(), floats,
    )  # fmt: skip
    values = Values(Int32(-1), Int32(-1), Int32(1))
    return compile_kernel(kernel, *map(tensor, tensors), values, Int32(1), **options)


@dataclass
class Problem:
    """Scores and values; keys past a sequence's length are NaN."""

    scores: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    @staticmethod
    def make(
        lengths: list[int], seqlen_q: int, heads: int, head_dim_v: int = 32, seed: int = 0
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        longest = max([1, *lengths])
        shape = (len(lengths), seqlen_q, heads, longest)
        scores = torch.randn(shape, generator=generator) * 4
        values = torch.randn(len(lengths), longest, head_dim_v, generator=generator)
        for b, length in enumerate(lengths):
            scores[b, :, :, length:] = math.nan
            values[b, length:] = math.nan
        return Problem(scores, values, torch.tensor(lengths, dtype=torch.int32))

    def reference(self, left: int = -1, right: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """FP64 (out, lse)."""
        batch, seqlen_q, heads, _ = self.scores.shape
        out = torch.zeros(batch, seqlen_q, heads, self.values.shape[2], dtype=torch.float64)
        lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
        for b, length in enumerate(self.lengths.tolist()):
            for i in range(seqlen_q):
                diagonal = i + length - seqlen_q
                first = max(0, diagonal - left) if left >= 0 else 0
                end = min(length, diagonal + right + 1) if right >= 0 else length
                if first < end:
                    s = self.scores[b, i, :, first:end].double() * LN2
                    lse[b, :, i] = s.logsumexp(-1)
                    out[b, i] = s.softmax(-1) @ self.values[b, first:end].double()
        return out, lse


@dataclass
class Outcome:
    out: torch.Tensor
    lse: torch.Tensor
    pieces: torch.Tensor
    counters: torch.Tensor
    partial: torch.Tensor
    report: Any


def run(
    kernel: Fake, problem: Problem, policy: Policy, *, workers: int, num_splits: int = 1,
    window: tuple[int, int] = (-1, -1), before: Outcome | None = None,
) -> Outcome:  # fmt: skip
    """One launch, on the workspace of the launch ``before``."""
    batch, seqlen_q, heads, _ = problem.scores.shape
    cutting, splitkv = kernel.cutting, kernel.splitkv
    blocks = -(-seqlen_q * heads // cutting.rows)
    out = torch.full((batch, seqlen_q, heads, kernel.head_dim_v), math.nan)
    lse = torch.full((batch, heads, seqlen_q), math.nan)
    pieces = torch.zeros(batch, blocks, dtype=torch.int32)
    floats = splitkv.floats(cutting.cut, workers, batch * blocks, num_splits)
    counts = splitkv.counters(cutting.cut, workers, batch * blocks)
    counters = torch.zeros(max(counts, 1), dtype=torch.int32)
    partial = torch.full((max(floats, 4),), math.nan)
    if before is not None:
        counters, partial = before.counters, before.partial
    tensors = (problem.scores, problem.values, problem.lengths, out, lse, pieces, counters, partial)
    values = Values(Int32(window[0]), Int32(window[1]), Int32(num_splits))
    report = emulate(compiled(kernel), *map(tensor, tensors), values, Int32(workers), policy=policy)
    return Outcome(out, lse, pieces, counters, partial, report)
