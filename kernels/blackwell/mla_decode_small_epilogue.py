"""The end of a segment in `mla_decode_small`: O leaves TMEM, is transposed in shared memory, and
goes to global memory as rows, 16 neighbouring columns of one row a thread."""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_small_plan import COLUMNS
from cute_fmha.kernels.blackwell.mla_decode_small_work import EXCHANGE, Group, Segment
from cute_fmha.kernels.blackwell.softmax import LOG2_E, packed, with_sink

LN2 = math.log(2.0)

RUN = 16
"""Neighbouring columns of a row that one thread stores."""


def own_rows(group: Group) -> list[Int32]:
    """The rows of which the thread stores a run."""
    thread = group.warp * 32 + group.lane
    step = 128 * RUN // COLUMNS
    return [thread * RUN // COLUMNS + first for first in range(0, group.plan.rows, step)]


def swizzled(column: Int32) -> Int32:
    """Where a column lies in its row of `Shared.sO`: pieces of four columns are exchanged inside of
    a run, so that eight runs can be read at once without bank conflicts."""
    return column ^ column // (2 * RUN) % 4 * 4


@cute.jit
def finish(group: Group, out_dtype, segment: Segment, minus, total, count: Int32):
    """Normalise and store O and LSE of a segment that had tiles, ``count`` so far in all."""
    plan, shared = group.plan, group.shared
    rows = group.rows()
    totals = []
    for i in cutlass.range_constexpr(len(rows)):
        sum_of_warp = total[i]
        for distance in (4, 8, 16):
            sum_of_warp += cute.arch.shuffle_sync_bfly(sum_of_warp, distance)
        totals.append(sum_of_warp)
    cute.arch.sync_warp()
    if group.lane < 4:
        for i in cutlass.range_constexpr(len(rows)):
            shared.sFade[rows[i], group.warp] = totals[i]
            if group.warp == 0:
                shared.sMinus[rows[i]] = minus[i]
    cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
    scales = []
    for row in own_rows(group):
        of_warps = [shared.sFade[row, warp] for warp in range(4)]
        row_total = (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3])
        scales.append(outcome(group, segment, row, shared.sMinus[row], row_total))
    group.wait_product(count - 1)
    thread = group.warp * 32 + group.lane
    for part in cutlass.range(plan.parts, unroll=1):
        tO = group.tmem + plan.tmem["O0"].start + part * plan.rows
        column = ptx.tcgen05_wait_load(ptx.tcgen05_load(tO, plan.rows))
        if part > 0:
            cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
        for row in cutlass.range_constexpr(plan.rows):
            shared.sO[swizzled(thread), row] = column[row]
        cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
        for j in cutlass.range_constexpr(len(scales)):
            row = own_rows(group)[j]
            first = thread * RUN % COLUMNS
            values = []
            for piece in cutlass.range_constexpr(0, RUN, 4):
                at = shared.sO.iterator.toint() + (row * COLUMNS + swizzled(first + piece)) * 4
                values += [x * scales[j] for x in ptx.load_shared(at, Float32)]
            store_run(group, out_dtype, segment, row, part * COLUMNS + first, values)
    # The next segment's P V overwrites O.
    ptx.tcgen05_fence_before()


@cute.jit
def nothing(group: Group, out_dtype, segment: Segment):
    """Store what a segment without tiles gives: zeros."""
    empty = -Float32(-1.0e30) * group.scalars.scale_log2
    first = (group.warp * 32 + group.lane) * RUN % COLUMNS
    for row in own_rows(group):
        outcome(group, segment, row, empty, Float32(0.0))
        for part in cutlass.range(group.plan.parts, unroll=1):
            zeros = [Float32(0.0)] * RUN
            store_run(group, out_dtype, segment, row, part * COLUMNS + first, zeros)


@cute.jit
def outcome(group: Group, segment: Segment, row: Int32, minus: Float32, total: Float32):
    """The factor that normalises a row of O; its LSE is stored."""
    work, mem, features = group.work, group.mem, group.plan.features
    position = row // work.heads
    head = row - position * work.heads
    maximum_log2, left = -minus, Float32(1.0)
    if cutlass.const_expr(features.sink):
        maximum_log2, total, left = with_sink(maximum_log2, total, mem.mSink[head] * LOG2_E)
    scale, lse = left * cute.arch.rcp_approx(total), -Float32.inf
    if total == 0.0:
        scale = Float32(0.0)
    else:
        lse = LN2 * (maximum_log2 + cute.math.log2(total, fastmath=True))
    if cutlass.const_expr(features.lse):  # noqa: SIM102  (compile and run time)
        if row < work.rows and group.lane % (COLUMNS // RUN) == 0:
            mem.mLSE[segment.batch, head, position] = lse
    return scale


def store_run(
    group: Group, out_dtype, segment: Segment, row: Int32, column: Int32, values: list[Float32]
) -> None:
    """Cast and store neighbouring columns of a row, if it exists."""
    work, mO = group.work, group.mem.mO
    position = row // work.heads
    at = (segment.batch, position, row - position * work.heads, column)
    target = (mO.iterator + cute.crd2idx(at, mO.layout)).toint()
    words = values if out_dtype is Float32 else packed(values, out_dtype)
    for piece in range(0, len(words), 4):
        ptx.store_global(target + piece * 4, words[piece : piece + 4], row < work.rows)
