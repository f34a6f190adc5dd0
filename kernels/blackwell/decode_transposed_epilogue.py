"""The end of a piece in `decode_transposed`: O leaves TMEM, is transposed in shared memory, and
goes to global memory as rows, 16 neighbouring columns of one row a thread."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_output import caught_up, outcome, write
from cute_fmha.kernels.blackwell.decode_transposed_work import EXCHANGE, Group
from cute_fmha.kernels.blackwell.softmax import EMPTY, scaled
from cute_fmha.kernels.blackwell.worklist import Piece, Place

RUN = 16
"""Neighbouring columns of a row that one thread stores."""


def own_rows(group: Group) -> list[Int32]:
    """The rows of which the thread stores a run; `has_rows` says whether it does."""
    rows, runs = group.plan.rows, group.plan.columns // RUN
    thread = group.warp * 32 + group.lane
    return [(thread // runs + first) % rows for first in range(0, rows, 128 // runs)]


def has_rows(group: Group) -> Boolean | bool:
    """Whether there is a run for the thread."""
    runs = group.plan.rows * group.plan.columns // RUN
    return True if runs >= 128 else group.warp * 32 + group.lane < runs


def swizzled(group: Group, row: Int32, column: Int32) -> Int32:
    """Where a column lies in its row of `Shared.sO`: pieces of four columns are exchanged inside of
    a run, so that eight runs can be read at once without bank conflicts. Of 64 columns that is two
    rows."""
    turned = column // (2 * RUN)
    if group.plan.columns < 128:
        turned = turned + row % 2 * 2
    return column ^ turned % 4 * 4


@cute.jit
def finish(group: Group, store: Store, place: Place, piece: Piece, state, count: Int32):
    """Of a piece that has tiles, ``count`` so far in all, store O and LSE, or its partial result if
    it is not a whole work tile. ``state``: `Rows` of `decode_transposed_softmax`."""
    shared, rows = group.shared, group.rows()
    totals, tops = [], list(state.largest)
    for i in cutlass.range_constexpr(len(rows)):
        sum_of_warp = state.total[i]
        for distance in (4, 8, 16):
            sum_of_warp += cute.arch.shuffle_sync_bfly(sum_of_warp, distance)
        totals.append(sum_of_warp)
    for i in cutlass.range_constexpr(len(tops)):
        for distance in (4, 8, 16):
            tops[i] = cute.arch.fmax(tops[i], cute.arch.shuffle_sync_bfly(tops[i], distance))
    cute.arch.sync_warp()
    if group.lane < 4:
        for i in cutlass.range_constexpr(len(rows)):
            shared.sFade[rows[i], group.warp] = totals[i]
            if group.warp == 0:
                shared.sMinus[rows[i]] = state.minus[i]
        for i in cutlass.range_constexpr(len(tops)):
            shared.sLargest[rows[i], group.warp] = tops[i]
    cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
    group.wait_product(count - 1)
    if piece.whole != 0:
        scales = []
        for row in own_rows(group):
            maximum_log2, total, fade = statistics(group, row)
            scale = outcome(group.work, piece, row, maximum_log2, total, lead(group))
            scales.append(scale if fade is None else scale * fade)
        transposed(
            group, lambda j, row, column, values: write(
                group.work, store, piece, row, column, scaled(values, scales[j])
            ),
        )  # fmt: skip
    elif cutlass.const_expr(group.plan.cut is not Cut.WHOLE):
        work = group.work
        slot = work.splitkv.own_address(work.workspace, work.pieces, place, piece)
        if lead(group):
            for row in own_rows(group):
                work.splitkv.write_row(slot, row, *statistics(group, row)[:2])
        fades = [statistics(group, row)[2] for row in own_rows(group)]
        transposed(
            group,
            lambda j, row, column, values: work.splitkv.write(
                slot, row, column, values if fades[j] is None else scaled(values, fades[j])
            ),
        )
        cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
        if group.warp * 32 + group.lane == 0:
            work.splitkv.arrive(work.workspace, work.pieces, place, piece)


def lead(group: Group) -> Boolean:
    """Whether the thread has the first columns of its rows."""
    return (group.lane % (group.plan.columns // RUN) == 0) & has_rows(group)


def statistics(group: Group, row: Int32) -> tuple[Float32, Float32, Float32 | None]:
    """(maximum in base 2, Σ P, what O is to be multiplied with, None: nothing) of a row, when
    `finish` has collected them."""
    shared = group.shared
    a, b, c, d = (shared.sFade[row, warp] for warp in range(4))
    maximum_log2, total = -shared.sMinus[row], (a + b) + (c + d)
    if not group.plan.features.max_logits:
        return maximum_log2, total, None
    a, b, c, d = (shared.sLargest[row, warp] for warp in range(4))
    largest = cute.arch.fmax(cute.arch.fmax(a, b), cute.arch.fmax(c, d))
    return caught_up(maximum_log2, total, largest * group.scalars.scale_log2)


@cute.jit
def transposed(group: Group, output: cutlass.Constexpr):
    """Call ``output(j, row, column, values)`` for every part of O with what the thread has of its
    ``j``-th row: a run of columns."""
    plan, sO = group.plan, group.shared.sO
    thread = group.warp * 32 + group.lane
    first = thread * RUN % plan.columns
    for part in cutlass.range(plan.parts, unroll=1):
        tO = group.tmem + plan.tmem["O0"].start + part * plan.rows
        held = group.load_part(tO)
        if part > 0:
            cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
        for j in cutlass.range_constexpr(len(held)):
            column, row = group.held()[j]
            sO[swizzled(group, row, column), row] = held[j]
        cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
        if has_rows(group):
            for j in cutlass.range_constexpr(len(own_rows(group))):
                row = own_rows(group)[j]
                values = []
                for piece in cutlass.range_constexpr(0, RUN, 4):
                    at = row * plan.columns + swizzled(group, row, first + piece)
                    values += ptx.load_shared(sO.iterator.toint() + at * 4, Float32)
                output(j, row, part * plan.columns + first, values)


@cute.jit
def nothing(group: Group, store: Store, piece: Piece):
    """Store what a work tile without tiles gives: zeros."""
    empty = EMPTY * group.scalars.scale_log2
    first = (group.warp * 32 + group.lane) * RUN % group.plan.columns
    for row in own_rows(group):
        outcome(group.work, piece, row, empty, Float32(0.0), lead(group))
        if has_rows(group):
            for part in cutlass.range(group.plan.parts, unroll=1):
                zeros = [Float32(0.0)] * RUN
                column = part * group.plan.columns + first
                write(group.work, store, piece, row, column, zeros)
