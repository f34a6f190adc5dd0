"""The softmax warpgroups of `prefill`: one per Q tile, one row per thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mask import mask_row
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.prefill_operands import (
    DTYPES,
    SKIPPED,
    Global,
    Scalars,
    Shared,
    tmem_row,
)
from cute_fmha.kernels.blackwell.prefill_work import Work, WorkTile
from cute_fmha.kernels.blackwell.softmax import (
    ABSENT,
    EMPTY,
    capped,
    exponentials,
    keeps_tile,
    log2_threshold,
    new_maximum,
    packed,
    row_maximum,
    row_sum,
)


class Group(NamedTuple):
    """What a thread of a softmax warpgroup works with."""

    work: Work
    shared: Shared
    scalars: Scalars
    tmem: cute.Pointer
    barriers: Barriers
    t: Int32  # Q tile
    thread: Int32  # its row


@dataclass(frozen=True)
class RowState(Carried):
    """A row's softmax: the maximum that P is relative to, Σ P, and the maximum of the kept tiles,
    which decides what is skipped."""

    maximum: Float32
    total: Float32
    running: Float32


@dataclass(frozen=True)
class SoftmaxPhases(Carried):
    """Parities of s_full and scale_full, and the number of decisions made."""

    s: Int32
    scale: Int32
    decisions: Int32

    def after_scale(self) -> SoftmaxPhases:
        return replace(self, scale=self.scale ^ 1)


@dataclass(frozen=True)
class Counts(Carried):
    """KV tiles of this warpgroup so far."""

    skipped: Int32
    visited: Int32


@cute.jit
def softmax(
    plan: Plan, work: Work, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
    barriers: Barriers,
):  # fmt: skip
    """One warpgroup per Q tile, one row per thread.

    Reads: S. Writes: P over S, sScale, sMax.
    Waits: s_full, scale_empty. Signals: p_ready, p_last, scale_full. Registers: 192."""
    t = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
    thread = cute.arch.thread_idx()[0] % 128
    phases = SoftmaxPhases(Int32(0), Int32(0), Int32(0))
    counts = Counts(Int32(0), Int32(0))
    if cutlass.const_expr(plan.features.skip):
        skip = scalars.skip
        if cutlass.const_expr(plan.features.skip_tensor):
            skip = mem.mSkip[0]
        if cutlass.const_expr(plan.features.skip_relative):
            skip = skip / Float32(mem.mK.shape[0])
        scalars = scalars._replace(skip=log2_threshold(skip))
    group = Group(work, shared, scalars, tmem, barriers, t, thread)
    first_work, works, step = work.indices()
    for index in cutlass.range(first_work, works, step, unroll=1):
        tile = work.tile(index)
        keys = work.keys_of(tile, t)
        row = work.first_row(tile, t) + thread
        running = cutlass.select_(row < tile.seqlen_q, Float32(EMPTY), Float32(ABSENT))
        state = RowState(Float32(EMPTY), Float32(0.0), running)
        n = keys.begin
        if cutlass.const_expr(plan.features.window_left):
            while n < keys.full_begin:
                state, phases, counts = softmax_step(
                    group, tile, row, n, n > keys.begin, state, phases, counts, True
                )
                n = tile.after(n)
        while n < keys.full_end:
            state, phases, counts = softmax_step(
                group, tile, row, n, n > keys.begin, state, phases, counts, False
            )
            n = tile.after(n)
        while n < keys.end:
            state, phases, counts = softmax_step(
                group, tile, row, n, n > keys.begin, state, phases, counts, True
            )
            n = tile.after(n)
        if keys.any:
            barriers.wait("scale_empty", phases.scale ^ 1, t)
            phases = phases.after_scale()
            shared.sScale[thread, t] = state.total
            shared.sMax[thread, t] = state.maximum
            barriers.arrive("scale_full", t)
    if cutlass.const_expr(plan.features.count):  # noqa: SIM102  (compile and run time)
        if thread == 0:
            cute.arch.atomic_add(mem.mStats.iterator, Int64(counts.skipped))
            cute.arch.atomic_add(mem.mStats.iterator + 1, Int64(counts.visited))


@cute.jit
def softmax_step(
    group, tile: WorkTile, row: Int32, n: Int32, later: Boolean, state, phases, counts,
    masked: cutlass.Constexpr,
):  # fmt: skip
    """One KV tile of one row, ``later`` than its first: the row's next state, the phases and the
    counts."""
    work, shared, scalars, tmem, barriers, t, thread = group
    plan = work.plan
    s0 = plan.tmem["S0"].start
    tS = tmem_row(tmem, thread) + s0 + t * plan.tile_n
    tP = tS + (plan.tmem["P0"].start - s0)
    width = 32
    barriers.wait_tmem("s_full", phases.s, t)
    scores = []
    for c in cutlass.range_constexpr(0, plan.tile_n, width):
        scores += ptx.tcgen05_load(tS + c, width)
    scores = ptx.tcgen05_wait_load(scores)
    if cutlass.const_expr(plan.features.softcap):
        scores = capped(scores, scalars.cap_inner)
    if cutlass.const_expr(masked):
        lengths = tile.seqlen_q, tile.seqlen_k
        scores = mask_row(scores, row, n * plan.tile_n, lengths, work.window())
    if cutlass.const_expr(plan.features.skip):
        tile_max = row_maximum(scores, Float32(-Float32.inf))
        vote = keeps_tile(tile_max, state.running, scalars.scale_log2, scalars.skip)
        ptx.tcgen05_fence_before()  # the reads of S of all four warps, for whom the leader speaks
        keep = ptx.barrier_any(t + 1, plan.tile_m, vote)
        slot = phases.decisions & 1
        if thread < 32:
            with cute.arch.elect_one():
                shared.sKeep[slot, t] = Int32(keep)
            cute.arch.sync_warp()
            barriers.arrive_leader("decided", 2 * t + slot)
        counts = Counts(counts.skipped + Int32(not keep), counts.visited + 1)
        if keep:
            state = probabilities(group, scores, tP, tile_max, state, phases, Boolean(True))
        else:
            barriers.wait("scale_empty", phases.scale ^ 1, t)
            shared.sScale[thread, t] = Float32(SKIPPED)
            barriers.arrive("scale_full", t)
        phases = SoftmaxPhases(phases.s ^ 1, phases.scale ^ 1, phases.decisions + 1)
    else:
        tile_max = row_maximum(scores, state.maximum)
        state = probabilities(group, scores, tP, tile_max, state, phases, later)
        scale_phase = phases.scale ^ Int32(later)
        phases = SoftmaxPhases(phases.s ^ 1, scale_phase, phases.decisions)
        counts = Counts(counts.skipped, counts.visited + 1)
    return state, phases, counts


@cute.jit
def probabilities(group, scores, tP: Int32, tile_max: Float32, state, phases, tell: Boolean):
    """P of a kept tile, handed to the MMA; with ``tell`` the correction learns what is left
    of O."""
    work, shared, scalars, _, barriers, t, thread = group
    plan = work.plan
    running = cute.arch.fmax(state.running, tile_max)
    tile_max = cute.arch.fmax(state.maximum, tile_max)
    maximum, fade = new_maximum(state.maximum, tile_max, scalars.scale_log2, plan.rescale_threshold)
    if tell:
        barriers.wait("scale_empty", phases.scale ^ 1, t)
        shared.sScale[thread, t] = fade
        barriers.arrive("scale_full", t)
    minus_max = -maximum * scalars.scale_log2
    quarter = plan.tile_n // 4
    p = []
    for q in cutlass.range_constexpr(4):
        part = exponentials(scores[q * quarter : (q + 1) * quarter], scalars.scale_log2, minus_max)
        ptx.tcgen05_store(tP + q * quarter // 2, packed(part, DTYPES[plan.dtype]))
        p += part
        if cutlass.const_expr(q == 2):
            ptx.tcgen05_wait_store()
            barriers.arrive_tmem("p_ready", t)
    ptx.tcgen05_wait_store()
    barriers.arrive_tmem("p_last", t)
    return RowState(maximum, row_sum(p, state.total * fade), running)
