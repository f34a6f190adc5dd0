"""The correction warpgroup and the epilogue warp of `prefill`: the way of O after the MMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Cursor
from cute_fmha.kernels.blackwell.plan import GROUPS, WORK_STAGES, Plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Scalars, Shared, tmem_row
from cute_fmha.kernels.blackwell.prefill_schedule import Schedule
from cute_fmha.kernels.blackwell.prefill_work import Work
from cute_fmha.kernels.blackwell.softmax import (
    EMPTY,
    LOG2_E,
    log_sum_exp,
    normaliser,
    scaled,
    with_sink,
)


class PairRow(NamedTuple):
    """What a thread of a pair works with."""

    plan: Plan
    shared: Shared
    scalars: Scalars
    barriers: Barriers
    tO: Int32
    told: cute.Tensor  # (GROUP): this row of sMax
    warp: Int32


@dataclass(frozen=True)
class LastMaxima(Carried):
    """Running maxima of a row of a pair: with the last KV tile and with the one before, which the
    other softmax warpgroup had. To them Σ P of either is relative."""

    last: Float32
    before: Float32


@cute.jit
def correction(
    plan: Plan, work: Work, store: Store, mem: Global, shared: Shared, scalars: Scalars,
    tmem: cute.Pointer, barriers: Barriers,
):  # fmt: skip
    """Keeps O consistent with the running maximum; at the end normalises it.

    Reads: sScale, sMax, O. Writes: O, the chunk buffers, LSE.
    Waits: fade, stats_full, o_full, chunk_empty.
    Signals: p_ready, decision_read, stats_empty, chunk_full.
    Registers: 80."""
    thread = cute.arch.thread_idx()[0] % 128
    warp = ptx.opaque(cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4)
    phase = [Int32(0) for _ in range(plan.q_tiles)]  # of stats_full and o_full
    # In a pair: the softmax warpgroup that tells of the next KV tile, and the V of the last P V.
    turn, value = Cursor(2), Cursor(plan.v_stages, Int32(plan.v_stages - 1), Int32(1))
    told = row_of(shared.sMax, thread) if plan.pair else None
    chunk = Cursor(plan.o_stages)
    # Whether every KV tile is told of, the first one, too.
    every = plan.features.skip or plan.pair
    tile = work.first(barriers)
    while tile.exists:
        first, end, q_tiles = work.keys(tile)
        maxima = LastMaxima(Float32(EMPTY), Float32(EMPTY))
        fresh = [Boolean(True) for _ in range(plan.q_tiles)]
        for t in cutlass.range_constexpr(plan.q_tiles):
            # O is free: the first P V overwrites it. Which tile that is, a skip decides.
            if cutlass.const_expr(not every):  # noqa: SIM102
                if q_tiles[t].any:
                    barriers.arrive("p_ready", t)
                    fresh[t] = Boolean(False)
        without = 0 if every else 1
        spans = work.spans(q_tiles, first, end, without)
        for i in cutlass.range_constexpr(len(spans)):
            n, last, sharers = spans[i]
            while n < last:
                for t in sharers:
                    needed = Boolean(True)
                    if cutlass.const_expr(plan.features.block_mask is not None):
                        again = n >= q_tiles[t].begin + without
                        needed = work.has(tile, q_tiles, t, n) & again
                    if cutlass.const_expr(plan.pair):
                        tO = tmem_row(tmem, thread) + plan.tmem["O0"].start
                        mine = PairRow(plan, shared, scalars, barriers, tO, told, warp)
                        maxima, kept, value = correct_pair(mine, turn, value, maxima)
                        turn = turn.next()
                        fresh[t] = fresh[t] & (not kept)
                    elif needed:
                        fresh[t] = correct(plan, shared, barriers, tmem, t, thread, warp, fresh[t])
                n = work.after(tile, n, last)
        if cutlass.const_expr(not every):
            for t in cutlass.range_constexpr(plan.q_tiles):
                if q_tiles[t].any:
                    barriers.arrive("stats_empty", t)
        if cutlass.const_expr(plan.o_over_v):
            # Chunks lie where V was: all products are to be complete before the first is written.
            for t in cutlass.range_constexpr(plan.q_tiles):
                if q_tiles[t].any:
                    barriers.wait_tmem("o_full", phase[t], t)
        for t in cutlass.range_constexpr(plan.q_tiles):
            tile, q_tiles = work.again(tile, q_tiles)
            first_row = work.first_row(tile, t)
            if work.leaves(tile, t):
                row = first_row + thread
                empty = fresh[t]
                apply = store.apply(work.output_row(tile, row), mem.op)
                total, row_max = Float32(0.0), Float32(EMPTY)
                if q_tiles[t].any:
                    if cutlass.const_expr(plan.pair):
                        # In this order, whichever of the two had the last KV tile: that depends on
                        # how many there were in other work tiles, and no bit of a result shall.
                        row_max = maxima.last
                        fade = ptx.exp2((maxima.before - row_max) * scalars.scale_log2)
                        for g in range(GROUPS):
                            barriers.wait("stats_full", phase[t], g)
                        before, last = turn.index, turn.index ^ 1
                        total = shared.sScale[thread, before] * fade + shared.sScale[thread, last]
                        for g in range(GROUPS):
                            barriers.arrive("stats_empty", g)
                    else:
                        barriers.wait("stats_full", phase[t], t)
                        total = shared.sScale[thread, t]
                        row_max = shared.sMax[thread, t]
                        if cutlass.const_expr(plan.features.skip):
                            barriers.arrive("stats_empty", t)
                    if cutlass.const_expr(not plan.o_over_v):
                        barriers.wait_tmem("o_full", phase[t], t)
                    phase[t] = phase[t] ^ 1
                maximum_log2 = row_max * scalars.scale_log2
                left = Float32(1.0)
                if cutlass.const_expr(plan.features.sink):
                    maximum_log2, total, left = with_sink(
                        maximum_log2, total, mem.mSink[work.head_of(tile, row)] * LOG2_E
                    )
                scale = normaliser(total, left)
                if cutlass.const_expr(plan.features.lse):
                    lse = log_sum_exp(maximum_log2, total)
                    if row < work.rows(tile):
                        mem.mLSE[work.lse_place(tile, row)] = lse
                tO = tmem_row(tmem, thread) + plan.tmem[f"O{t}"].start
                chunk = store.produce(tO, shared.sO, thread, scale, empty, barriers, chunk, apply)
        ptx.tcgen05_fence_before()  # O is read; the next p_ready says so.
        tile = work.next(tile, barriers)


def row_of(sX: cute.Tensor, thread: Int32) -> cute.Tensor:
    """(GROUP) of ``sX``, for a row whose address is hidden: it is not made again at every use."""
    address = ptx.opaque(sX[thread, None].iterator.toint())
    pointer = cute.make_ptr(Float32, address, cute.AddressSpace.smem, assumed_align=4)
    return cute.make_tensor(pointer, sX[thread, None].layout)


@cute.jit
def correct(plan, shared: Shared, barriers, tmem, t: cutlass.Constexpr, thread, warp, fresh):
    """O of Q tile ``t`` for the next KV tile; whether it is still ``fresh``."""
    tO = tmem_row(tmem, thread) + plan.tmem[f"O{t}"].start
    barriers.hear("fade", 4 * t + warp)
    fade = shared.sScale[thread, t]
    if cutlass.const_expr(plan.features.skip):
        barriers.arrive("decision_read", t)
        if cute.arch.vote_any_sync(fade <= 1.0):
            if not fresh and not cute.arch.vote_all_sync(fade >= 1.0):
                rescale(plan, tO, fade)
            fresh = Boolean(False)
            barriers.arrive("p_ready", t)
    else:
        if not cute.arch.vote_all_sync(fade >= 1.0):
            rescale(plan, tO, fade)
        barriers.arrive("p_ready", t)
    return fresh


@cute.jit
def correct_pair(mine, turn: Cursor, value: Cursor, maxima):
    """O of a pair for the next KV tile, which is one of warpgroup ``turn``: the maxima with that
    tile's, whether it is kept, and the place of the last V then. O is left alone where it is not
    there yet, or 0.

    S of the tile was made before P V of the last: that is complete when its V is given back."""
    plan, shared, scalars, barriers, tO, told, warp = mine
    group = turn.index
    barriers.hear("fade", 4 * group + warp)
    maximum = told[group]
    kept = Boolean(True)
    if cutlass.const_expr(plan.features.skip):
        kept = shared.keeps(group)
        barriers.arrive("decision_read", group)
    fade = ptx.exp2((maxima.last - maximum) * scalars.scale_log2)
    fade = cutlass.select_(maxima.last > EMPTY, fade, Float32(1.0))
    if kept:
        if not cute.arch.vote_all_sync(fade >= 1.0):
            barriers.wait("v_empty", value.phase, value.index)
            rescale(plan, tO, fade)
        barriers.arrive("p_ready", group)
        value = value.next()
    return LastMaxima(maximum, maxima.last), kept, value


def rescale(plan: Plan, tO: Int32, fade: Float32) -> None:
    """O = fade · O, 16 columns at a time. P V of the last KV tile is complete: that of a Q tile
    with its only S, which was complete when the fade was written, came before S."""
    width = 16
    ptx.tcgen05_fence_after()
    for c in range(0, plan.head_dim_v, width):
        part = ptx.tcgen05_wait_load(ptx.tcgen05_load(tO + c, width))
        ptx.tcgen05_store(tO + c, scaled(part, fade))
    ptx.tcgen05_wait_store()
    ptx.tcgen05_fence_before()


@cute.jit
def epilogue(
    plan: Plan, work: Work, schedule: Schedule, store: Store, mem: Global, shared: Shared,
    barriers: Barriers,
):  # fmt: skip
    """Also gives out the work: the record after next takes the place of the one that is stored.

    Reads: the chunk buffers. Writes: O in global memory by TMA, sWork.
    Waits: chunk_full, work_empty, stored_read.
    Signals: chunk_empty, work_full, stored. Registers: 48."""
    chunk = Cursor(plan.o_stages)
    stored = Int32(0)
    turn = schedule.start()
    for slot in cutlass.range_constexpr(WORK_STAGES):
        turn = schedule.hand_out(turn, Int32(slot), Int32(1), shared, barriers)
    tile = work.first(barriers)
    while tile.exists:
        # (ROWS, CHUNK, ROW_TILE, CHUNKS)
        mO = work.outputs(tile, mem.mO)
        gO = cute.local_tile(mO, (plan.tile_m, plan.leaving.chunk), (None, None))
        for t in cutlass.range_constexpr(plan.q_tiles):
            if work.leaves(tile, t):
                row_tile = work.row_tile(tile, t)
                chunk = store.consume(
                    mem.tma_o, gO[None, None, row_tile, None], shared.sO, barriers, chunk
                )
        if cutlass.const_expr(plan.o_over_v):
            barriers.wait("stored_read", stored)
            barriers.arrive("stored")
            stored = stored ^ 1
        turn = schedule.hand_out(turn, tile.slot, tile.phase, shared, barriers)
        tile = work.following(tile, barriers)
