"""Split-KV in one launch: partial results, who may wait for them, and their reduction.

Mathematics. Piece s of a work tile (`worklist`) leaves for each row its maximum m_s (base 2,
scaled), l_s = Σ 2^(score − m_s) and the unnormalised O_s. Then

    m = max m_s,   l = Σ 2^(m_s − m) l_s,   O = Σ 2^(m_s − m) O_s,

and what follows (sink, O / l, LSE, epilogue op, store) is what a whole work tile goes through.

Who reduces. A last arriver alone would read all of a long sequence's partial results on one SM
(148 × 128 KiB at some 100 GB/s). Here all CTAs that computed a piece of a work tile share its
reduction, without an assumption on which CTAs run at a time:

    start    every CTA counts itself as started
    arrive   after a piece, one atomic on the work tile's word: + 1 arrival and, if by then every
             CTA of the launch has started, + 1 stayer: all others are running or done and none
             waits before its own pieces are done, so that waiting is safe. Otherwise the CTA will
             not wait. The last arriver needs no waiting and always stays; it sets the word's sign.
    reduce   when all its pieces are done, a CTA waits for the sign of the words where it stays, and
             takes its part of each work tile's units, of as many as there are stayers
    leave    the last CTA to leave zeroes all counters for the next launch

             word    31      30 ─ 16     15 ─ 0
                     closed  stayers     arrivals

If all CTAs run at a time, as they do on an otherwise idle GPU, everybody stays. Which CTA reduces
what varies from run to run; the order in which a row's pieces are added depends on their number
only, and so do the result's bits.

A unit is 16 columns of a row. A warp takes 32 / C neighbouring units at a time, its lanes in C
classes: class q adds pieces q, q + C, q + 2 C, …, up to four in flight, then the classes are added
by butterflies. C is 1, 2, 4 or 8 for up to 4, 8, 16 or more pieces.

Workspace. int32 counters: started, left, a word for each work tile. FP32: for each slot of the work
list and each CTA of a cluster O, m, l and a word, see `cutting.Slots`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.cutting import COLUMNS, LEFT, STARTED, WORDS, Cut, Slots
from cute_fmha.kernels.blackwell.pipelines import Carried
from cute_fmha.kernels.blackwell.softmax import scaled
from cute_fmha.kernels.blackwell.worklist import Parts, Piece, Place, WorkList

_NONE = -3.0e38
"""Maximum of no piece: below that of a row that has seen no key."""

_DECLINED = -1
"""In place of a stayer's number."""


class Workspace(NamedTuple):
    """Where partial results meet. ``rank`` of ``ranks``: the CTA in its cluster."""

    mCounters: cute.Tensor  # (COUNTERS,): int32, zero between launches; see `cutting`
    mPartial: cute.Tensor  # (FLOATS,)
    rank: Int32


@dataclass(frozen=True)
class Sum(Carried):
    """A running sum over pieces of one unit."""

    maximum: Float32
    total: Float32


class SplitKV(Slots):
    """Partial results and their combine."""

    # ------------------------------------------------------------------ writing a partial result

    def start(self, workspace: Workspace) -> None:
        """Count this CTA as started. One thread of it, first of all."""
        cute.arch.atomic_add(
            workspace.mCounters.iterator + STARTED, Int32(1), sem="relaxed", scope="gpu"
        )

    def address(self, workspace: Workspace, slot: Int32) -> Int64:
        """Of what this CTA, or its like of another cluster, has in ``slot``."""
        number = Int64(slot) * self.ranks + Int64(workspace.rank)
        return workspace.mPartial.iterator.toint() + number * (4 * self.slot_floats)

    def own_address(self, workspace: Workspace, works: WorkList, place: Place, piece: Piece) -> Any:
        """`address` of the piece at ``place``."""
        parts = works.parts(place, piece)
        return self.address(workspace, works.slot(parts, works.index(place, parts)))

    def element(self, row: Any, column: Any) -> Any:
        """Byte of an element of O in a slot."""
        if self.row_minor:
            return (column // 4 * self.rows + row) * 16 + column % 4 * 4
        return (row * self.head_dim_v + column) * 4

    def write(self, slot: Int64, row: Int32, column: Any, values: list[Float32]) -> None:
        """Unnormalised O of columns from ``column`` on, a multiple of 4 of them, of one row."""
        for first in range(0, len(values), 4):
            ptx.store_global(
                slot + Int64(self.element(row, column + first)), values[first : first + 4]
            )

    def write_row(self, slot: Int64, row: Int32, maximum_log2: Float32, total: Float32) -> None:
        """m and l of a row. Where l is 0, O must still have been written as zeros."""
        statistics = slot + 4 * self.rows * self.head_dim_v + Int64(row) * 4
        ptx.store_global(statistics, [maximum_log2])
        ptx.store_global(statistics + 4 * self.rows, [total])

    @cute.jit
    def arrive(self, workspace: Workspace, works: WorkList, place: Place, piece: Piece):
        """Announce the piece at ``place``. One thread, ordered by a barrier after all that wrote;
        CTAs of a cluster announce theirs apart."""
        parts = works.parts(place, piece)
        counters = workspace.mCounters.iterator
        started = cute.arch.load(counters + STARTED, Int32, sem="relaxed", scope="gpu")
        stays = Int32(started == works.sizes.workers * self.ranks)
        word = counters + (WORDS + parts.word * self.ranks + workspace.rank)
        before = cute.arch.atomic_add(word, 1 + (stays << 16), sem="acq_rel", scope="gpu")
        stayer = cutlass.select_(stays == 1, before >> 16, Int32(_DECLINED))
        if (before & 0xFFFF) == parts.count - 1:
            stayer = before >> 16
            closed = Int32(-(1 << 31)) + ((1 - stays) << 16)
            cute.arch.atomic_add(word, closed, sem="acq_rel", scope="gpu")
        slot = self.address(workspace, works.slot(parts, works.index(place, parts)))
        ptx.store_global(self.stayer_address(slot), [stayer])

    def stayer_address(self, slot: Int64) -> Int64:
        return slot + 4 * self.rows * (self.head_dim_v + 2)

    # ------------------------------------------------------------------ reducing

    @cute.jit
    def combine(
        self, workspace: Workspace, works: WorkList, warp: Int32, warps: int, barrier: int,
        output: cutlass.Constexpr[Callable[..., None]],
    ):  # fmt: skip
        """Reduce this CTA's part of all work tiles it stays for, and leave.

        ``warps`` warps, of which ``warp`` is one, call it when their pieces are done; one of them
        has called `arrive`. They meet at named barrier ``barrier``. ``output(piece, row, column,
        values, maximum_log2, total)`` takes `COLUMNS` reduced columns of a row of the CTA; each
        lane has its own, one lane of each row has column 0, and rows may not exist.
        """
        cute.arch.barrier(barrier_id=barrier, number_of_threads=32 * warps)
        place = works.start
        while works.more(place):
            piece = works.piece(place)
            if piece.exists != 0 and piece.whole == 0:
                parts = works.parts(place, piece)
                slot = self.address(workspace, works.slot(parts, works.index(place, parts)))
                stayer = cute.arch.load(
                    cute.make_ptr(Int32, self.stayer_address(slot), cute.AddressSpace.gmem), Int32
                )
                if stayer != _DECLINED:
                    word = workspace.mCounters.iterator + (
                        WORDS + parts.word * self.ranks + workspace.rank
                    )
                    state = cute.arch.load(word, Int32, sem="acquire", scope="gpu")
                    while state >= 0:
                        ptx.nanosleep(32)
                        state = cute.arch.load(word, Int32, sem="acquire", scope="gpu")
                    stayers = state >> 16 & 0x7FFF
                    self.reduce(
                        workspace, works, parts, piece, stayer * warps + warp, stayers * warps,
                        output,
                    )  # fmt: skip
            place = works.next(place, piece)
        cute.arch.barrier(barrier_id=barrier, number_of_threads=32 * warps)
        if warp == 0:
            self.leave(workspace, works)

    @cute.jit
    def reduce(
        self, workspace: Workspace, works: WorkList, parts: Parts, piece: Piece, first: Int32,
        step: Int32, output: cutlass.Constexpr[Callable[..., None]],
    ):  # fmt: skip
        """One warp's part of a work tile: every ``step``-th group of units from ``first`` on."""
        lane = cute.arch.lane_idx()
        count = parts.count
        # log2 of C, and units of a group.
        fold = Int32(count > 4) + Int32(count > 8) + Int32(count > 16)
        width = 32 >> fold
        own = lane >> (5 - fold)
        groups = (self.rows * self.head_dim_v // COLUMNS) >> (5 - fold)
        for group in cutlass.range(first, groups, step, unroll=1):
            unit = group * width + (lane & (width - 1))
            per_row = self.head_dim_v // COLUMNS
            row, column = unit // per_row, unit % per_row * COLUMNS
            if cutlass.const_expr(self.row_minor):
                row, column = unit % self.rows, unit // self.rows * COLUMNS
            state = Sum(Float32(_NONE), Float32(0.0))
            values = [Float32(0.0) for _ in range(COLUMNS)]
            for piece_index in cutlass.range(own, count, self.at_a_time << fold, unroll=1):
                state, values = self.add(
                    workspace, works, parts, row, column, piece_index, fold, state, values
                )
            for bit in cutlass.range_constexpr(3):
                if bit < fold:
                    state, values = self.butterfly(state, values, width << bit)
            output(piece, row, column, values, state.maximum, state.total)

    @cute.jit
    def add(
        self, workspace: Workspace, works: WorkList, parts: Parts, row: Int32, column: Int32,
        index: Int32, fold: Int32, state: Sum, values,
    ):  # fmt: skip
        """The sum with the next pieces of a class, the first of them ``index``."""
        maxima, totals, loaded = [], [], []
        for k in cutlass.range_constexpr(self.at_a_time):
            turn = index + (k << fold)
            slot = self.address(workspace, works.slot(parts, cutlass.min(turn, parts.count - 1)))
            statistics = slot + 4 * self.rows * self.head_dim_v + Int64(row) * 4
            m = self.load(statistics)
            maxima.append(cutlass.select_(turn < parts.count, m, Float32(_NONE)))
            totals.append(self.load(statistics + 4 * self.rows))
            columns = []
            for c in cutlass.range_constexpr(0, COLUMNS, 4):
                columns += ptx.load_floats(slot + Int64(self.element(row, column + c)))
            loaded.append(columns)
        maximum = state.maximum
        for k in cutlass.range_constexpr(self.at_a_time):
            maximum = cute.arch.fmax(maximum, maxima[k])
        fade = ptx.exp2(state.maximum - maximum)
        total = state.total * fade
        values = scaled(values, fade)
        for k in cutlass.range_constexpr(self.at_a_time):
            weight = ptx.exp2(maxima[k] - maximum)
            total = total + weight * totals[k]
            values = plus(values, loaded[k], weight)
        return Sum(maximum, total), values

    def load(self, address: Int64) -> Float32:
        pointer = cute.make_ptr(Float32, address, cute.AddressSpace.gmem)
        return cute.arch.load(pointer, Float32)

    @cute.jit
    def butterfly(self, state: Sum, values, distance: Int32):
        """The sum of two lanes' sums; both get it."""
        other = cute.arch.shuffle_sync_bfly(state.maximum, distance)
        maximum = cute.arch.fmax(state.maximum, other)
        fade = ptx.exp2(state.maximum - maximum)
        total = state.total * fade
        total = total + cute.arch.shuffle_sync_bfly(total, distance)
        faded = scaled(values, fade)
        sums = []
        for value in faded:
            sums.append(value + cute.arch.shuffle_sync_bfly(value, distance))
        return Sum(maximum, total), sums

    @cute.jit
    def leave(self, workspace: Workspace, works: WorkList):
        """One warp: count this CTA as having left; the last one zeroes the counters."""
        counters = workspace.mCounters.iterator
        ctas = works.sizes.workers * self.ranks
        before = Int32(0)
        if cute.arch.lane_idx() == 0:
            before = cute.arch.atomic_add(counters + LEFT, Int32(1), sem="acq_rel", scope="gpu")
        before = cute.arch.shuffle_sync(before, 0)
        if before == ctas - 1:
            words = works.work_tiles
            if cutlass.const_expr(works.cutting.cut is Cut.SHARE):
                words = works.sizes.workers
            for index in cutlass.range(
                cute.arch.lane_idx(), WORDS + words * self.ranks, 32, unroll=1
            ):
                workspace.mCounters[index] = 0


def plus(sums: list[Float32], values: list[Float32], weight: Float32) -> list[Float32]:
    """sums + weight · values."""
    result: list[Float32] = []
    for j in range(0, len(sums), 2):
        result += cute.arch.fma_packed_f32x2(
            (values[j], values[j + 1]), (weight, weight), (sums[j], sums[j + 1])
        )
    return result
