"""The way out of `mla_decode`: O / l from the epilogue warpgroup, in chunks, to the store warp."""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell.mla_arguments import Scalars
from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work, lane_address
from cute_fmha.kernels.blackwell.mla_decode_plan import ROWS, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.softmax import EMPTY, LOG2_E, with_sink

LN2 = math.log(2.0)


@cute.jit
def epilogue(
    plan: MlaPlan, work: Work, store: Store, mem: Global, shared: Shared, scalars: Scalars,
    tmem: cute.Pointer, barriers: Barriers,
):  # fmt: skip
    """Reads: O, sTotal, sRowMax. Writes: the chunk buffers, LSE.
    Waits: stats_full, o_full, chunk_empty. Signals: stats_empty, o_empty, chunk_full.
    Registers: 152."""
    thread = cute.arch.thread_idx()[0] % 128
    tO = lane_address(tmem, thread) + plan.tmem["O"].start
    phase = Int32(0)
    chunk = Cursor(plan.o_stages)
    first_work, works, step = work.indices()
    for index in cutlass.range(first_work, works, step, unroll=1):
        tile = work.tile(index)
        keys = work.keys(tile)
        position, head, exists = work.position(tile, thread % ROWS)
        empty = Boolean(True)
        total, row_max = Float32(0.0), Float32(EMPTY)
        if keys.end > keys.begin:
            barriers.wait("stats_full", phase)
            total = shared.sTotal[thread] + shared.sTotal[thread ^ ROWS]
            row_max = shared.sRowMax[thread % ROWS]
            empty = shared.sKept[0] == 0
            barriers.arrive("stats_empty")
            barriers.wait_tmem("o_full", phase)
            phase = phase ^ 1
        maximum_log2 = row_max * scalars.scale_log2
        left = Float32(1.0)
        if cutlass.const_expr(plan.features.sink):
            maximum_log2, total, left = with_sink(maximum_log2, total, mem.mSink[head] * LOG2_E)
        nothing = total == 0.0
        scale = 0.0 if nothing else left * cute.arch.rcp_approx(total)
        chunk = store.produce(tO, shared.sO, thread, scale, empty, barriers, chunk)
        if keys.end > keys.begin:
            barriers.arrive_tmem("o_empty")
        if cutlass.const_expr(plan.features.lse):
            lse = -Float32.inf
            if not nothing:
                lse = LN2 * (maximum_log2 + cute.math.log2(total, fastmath=True))
            if exists and thread < ROWS:
                mem.mLSE[tile.batch, head, position] = lse


@cute.jit
def write(plan: MlaPlan, work: Work, store: Store, mem: Global, shared: Shared, barriers: Barriers):
    """Reads: the chunk buffers. Writes: O in global memory by TMA.
    Waits: chunk_full. Signals: chunk_empty. Registers: 120."""
    chunk = Cursor(plan.o_stages)
    first_work, works, step = work.indices()
    for index in cutlass.range(first_work, works, step, unroll=1):
        tile = work.tile(index)
        # (ROW, CHUNK_COLUMN, HALF, CHUNKS)
        gO = cute.local_tile(
            mem.mO[None, None, None, None, tile.batch], (ROWS, plan.chunk, 2),
            (tile.first_row // ROWS + work.rank, 0, 0, None),
        )  # fmt: skip
        chunk = store.consume(mem.tma_o, cute.group_modes(gO, 0, 2), shared.sO, barriers, chunk)
    cute.arch.cp_async_bulk_wait_group(0)
