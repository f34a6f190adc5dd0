"""The way out of `mla_decode`: O / l from the epilogue warpgroup, in chunks, to the store warp."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.decode_output import caught_up, outcome
from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work, lane_address
from cute_fmha.kernels.blackwell.mla_decode_plan import ROWS, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.softmax import EMPTY, scaled
from cute_fmha.kernels.blackwell.worklist import Piece, Place

COMBINE_WARPS = 8
"""Warps that reduce partial results when their pieces are done: softmax and epilogue."""

PARTIAL, COMBINE = 4, 5
"""Named barriers: of the epilogue warpgroup, and of the warps that reduce."""


@cute.jit
def epilogue(
    plan: MlaPlan, work: Work, store: Store, mem: Global, shared: Shared, scalars: Scalars,
    tmem: cute.Pointer, barriers: Barriers,
):  # fmt: skip
    """Reads: O, sTotal, sRowMax, sLargest. Writes: the chunk buffers, LSE, largest logits; of a
    part of a work tile its partial result.
    Waits: stats_full, o_full, chunk_empty. Signals: stats_empty, o_empty, chunk_full.
    Registers: 152, in a pair 160."""
    thread = cute.arch.thread_idx()[0] % 128
    tO = lane_address(tmem, thread) + plan.tmem["O"].start
    phase = Int32(0)
    chunk = Cursor(plan.o_stages)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        empty = Boolean(True)
        total, row_max = Float32(0.0), Float32(EMPTY)
        largest = row_max
        if piece.end > piece.begin:
            barriers.wait("stats_full", phase)
            total = shared.sTotal[thread] + shared.sTotal[thread ^ ROWS]
            row_max = shared.sRowMax[thread % ROWS]
            if cutlass.const_expr(plan.features.max_logits):
                largest = shared.sLargest[thread % ROWS]
            empty = shared.sKept[0] == 0
            barriers.arrive("stats_empty")
            barriers.wait_tmem("o_full", phase)
            phase = phase ^ 1
        maximum_log2, fade = row_max * scalars.scale_log2, Float32(1.0)
        if cutlass.const_expr(plan.features.max_logits):
            maximum_log2, total, fade = caught_up(maximum_log2, total, largest * scalars.scale_log2)
        if piece.exists != 0:
            if piece.whole != 0:
                # Or the addresses of a row's pieces would be made before the loop, and spilled.
                lane = ptx.opaque(thread)
                scale = outcome(work, piece, lane % ROWS, maximum_log2, total, lane < ROWS)
                if cutlass.const_expr(plan.features.max_logits):
                    scale = scale * fade
                apply = store.apply(work.output_row(piece, lane % ROWS), mem.op)
                for run in cutlass.range_constexpr(plan.runs):
                    first = run * plan.leaving.columns
                    column = plan.value_column(first, lane // ROWS)
                    chunk = store.produce(
                        tO + first, shared.sO, lane, scale, empty, barriers, chunk, apply,
                        lambda c, column=column: column + c * plan.leaving.chunk_columns,
                    )  # fmt: skip
            elif cutlass.const_expr(plan.cut is not Cut.WHOLE):
                partial(work, place, piece, tO, thread, empty, maximum_log2, total, fade)
        if piece.end > piece.begin:
            barriers.arrive_tmem("o_empty")
        place = work.pieces.next(place, piece)


@cute.jit
def partial(
    work: Work, place: Place, piece: Piece, tO: Int32, thread: Int32, empty: Boolean,
    maximum_log2: Float32, total: Float32, fade: Float32,
):  # fmt: skip
    """The partial result of a piece, and its announcement."""
    plan, splitkv = work.plan, work.splitkv
    row, half = thread % ROWS, thread // ROWS
    slot = splitkv.own_address(work.workspace, work.pieces, place, piece)
    width = 32
    for c in cutlass.range_constexpr(0, plan.head_dim_v // 2, width):
        values = [Float32(0.0)] * width
        if not empty:
            values = ptx.tcgen05_wait_load(ptx.tcgen05_load(tO + c, width))
            if cutlass.const_expr(plan.features.max_logits):
                values = scaled(values, fade)
        splitkv.write(slot, row, plan.value_column(c, half), values)
    if thread < ROWS:
        splitkv.write_row(slot, row, maximum_log2, total)
    ptx.barrier_sync(Int32(PARTIAL), 128)
    if thread == 0:
        splitkv.arrive(work.workspace, work.pieces, place, piece)


@cute.jit
def write(plan: MlaPlan, work: Work, store: Store, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the chunk buffers. Writes: O in global memory by TMA.
    Waits: chunk_full. Signals: chunk_empty. Registers: 120."""
    chunk = Cursor(plan.o_stages)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        if piece.exists != 0 and piece.whole != 0:
            # (ROW, CHUNK_COLUMN, HALF, CHUNKS)
            gO = cute.local_tile(
                mem.gO[None, None, None, None, piece.batch], (ROWS, plan.leaving.chunk, 2),
                (piece.block * plan.ctas + work.rank, 0, 0, None),
            )  # fmt: skip
            gO = cute.group_modes(gO, 0, 2)
            for run in cutlass.range_constexpr(plan.runs):
                gRun = gO[None, None, (None, run)]
                chunk = store.consume(mem.tma_o, gRun, shared.sO, barriers, chunk)
        place = work.pieces.next(place, piece)
