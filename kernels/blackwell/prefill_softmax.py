"""The softmax warpgroups of `prefill`: one per Q tile, one row per thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int8, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.mask import mask_row
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.prefill_operands import (
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
    new_maximum,
    packed,
    raw_threshold,
    row_maximum,
    row_sum,
)

SKIPPED = 2.0
"""Told in place of a fade: the KV tile is skipped."""


class Group(NamedTuple):
    """What a thread of a softmax warpgroup works with."""

    work: Work
    shared: Shared
    scalars: Scalars
    tmem: cute.Pointer
    barriers: Barriers
    warp: Int32  # of all softmax warps
    t: Int32  # Q tile; in a pair, which has one, the warpgroup
    thread: Int32  # its row


@dataclass(frozen=True)
class RowState(Carried):
    """A row's softmax: the maximum that P is relative to, Σ P, and the score that a tile needs for
    the row to keep it: the maximum of the kept tiles + log2 λ / c."""

    maximum: Float32
    total: Float32
    needed: Float32


@dataclass(frozen=True)
class SoftmaxPhases(Carried):
    """Parities of s_full, which are those of the decisions, and of stats_empty; in a pair the
    warpgroup whose turn the next KV tile is."""

    s: Int32
    stats: Int32
    turn: Int32


@cute.jit
def softmax(
    plan: Plan, work: Work, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
    barriers: Barriers,
):  # fmt: skip
    """One warpgroup per Q tile, in a pair one for every other KV tile; one row per thread.

    Reads: S. Writes: P over S, sScale, sMax, sVotes.
    Waits: s_full, decided, decision_read, stats_empty; in a pair maxima.
    Signals: decided, fade, p_ready, p_more, p_last, stats_full; in a pair maxima.
    Registers: 192."""
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    t = warp // 4
    thread = cute.arch.thread_idx()[0] % 128
    phases = SoftmaxPhases(Int32(0), Int32(0), Int32(0))
    skip = mem.mSkip[0] if plan.features.skip_tensor else scalars.skip
    threshold = raw_threshold(skip, scalars.scale_log2)
    tile = work.first(barriers)
    while tile.exists:
        of = 0 if plan.pair else t
        keys = work.keys_of(tile, of)
        row = work.first_row(tile, of) + thread
        needed = cutlass.select_(row < work.rows(tile), Float32(EMPTY), Float32(ABSENT))
        if cutlass.const_expr(plan.features.skip_relative):
            # A division has a call in it, across which no uniform register lives.
            relative = skip * cute.arch.rcp_approx(Float32(cutlass.max(tile.seqlen_k, 1)))
            threshold = raw_threshold(relative, scalars.scale_log2)
        group = Group(
            work, shared, scalars._replace(skip=threshold), tmem, barriers, warp, t, thread
        )
        state = RowState(Float32(EMPTY), Float32(0.0), needed)
        if cutlass.const_expr(plan.features.skip):  # noqa: SIM102  (compile and run time)
            if keys.any:
                barriers.wait("stats_empty", phases.stats ^ 1, t)
        n = keys.begin
        if cutlass.const_expr(plan.features.block_mask is not None):
            while n < keys.end:
                # Read again: no register has to keep them.
                keys = work.keys_of(tile, of)
                full = (keys.full_begin <= n) & (n < keys.full_end)
                if full & (not work.is_mixed(tile, of, n)):
                    state, phases = softmax_step(
                        group, tile, row, n, n > keys.begin, state, phases, False
                    )
                else:
                    state, phases = softmax_step(
                        group, tile, row, n, n > keys.begin, state, phases, True
                    )
                n = work.after(tile, n, keys.end, of)
        else:
            if cutlass.const_expr(plan.features.window_left):
                while n < keys.full_begin:
                    state, phases = softmax_step(
                        group, tile, row, n, n > keys.begin, state, phases, True
                    )
                    n = work.after(tile, n, keys.end)
            while n < keys.full_end:
                state, phases = softmax_step(
                    group, tile, row, n, n > keys.begin, state, phases, False
                )
                n = work.after(tile, n, keys.end)
            while n < keys.end:
                state, phases = softmax_step(
                    group, tile, row, n, n > keys.begin, state, phases, True
                )
                n = work.after(tile, n, keys.end)
        if keys.any:
            if cutlass.const_expr(plan.pair and plan.features.skip):
                # The other warpgroup's next tile begins with what the total takes the place of.
                if phases.turn == t:
                    wait_maxima(group, phases)
            elif cutlass.const_expr(plan.features.skip):
                barriers.wait("decision_read", phases.s ^ 1, t)
            else:
                # In a pair what was here before is read, otherwise all fades of this work tile are.
                barriers.wait("stats_empty", phases.stats ^ int(plan.pair), t)
            shared.sScale[thread, t] = state.total
            if cutlass.const_expr(not plan.pair):
                shared.sMax[thread, t] = state.maximum
            barriers.arrive("stats_full", t)
            phases = replace(phases, stats=phases.stats ^ 1)
        tile = work.next(tile, barriers)


@cute.jit
def softmax_step(
    group, tile: WorkTile, row: Int32, n: Int32, later: Boolean, state, phases,
    masked: cutlass.Constexpr,
):  # fmt: skip
    """`kv_tile`, in a pair if it is this warpgroup's turn: the row's next state and the phases."""
    if cutlass.const_expr(group.work.plan.pair):
        if phases.turn == group.t:
            state, phases = kv_tile(group, tile, row, n, later, state, phases, masked)
        phases = replace(phases, turn=phases.turn ^ 1)
    else:
        state, phases = kv_tile(group, tile, row, n, later, state, phases, masked)
    return state, phases


@cute.jit
def kv_tile(
    group, tile: WorkTile, row: Int32, n: Int32, later: Boolean, state, phases,
    masked: cutlass.Constexpr,
):  # fmt: skip
    """One KV tile of one row, ``later`` than its first: the row's next state and the phases.

    With skip-softmax a warp tells what its rows vote and goes on as if the tile were kept, until it
    has the first exponentials: by then the other warps' votes are in, and nobody has waited."""
    work, shared, scalars, tmem, barriers, _, t, thread = group
    plan = work.plan
    s0 = plan.tmem["S0"].start
    tS = tmem_row(tmem, thread) + s0 + t * plan.tile_n
    tP = tS + (plan.tmem["P0"].start - s0)
    seen = None
    if cutlass.const_expr(masked and plan.features.block_mask is not None):
        seen = work.seen_keys(tile, row, n)
    if cutlass.const_expr(plan.features.skip):
        barriers.wait("decision_read", phases.s ^ 1, t)
    barriers.wait_tmem("s_full", phases.s, t)
    scores = score_row(plan, tS, scalars)
    if cutlass.const_expr(masked):
        lengths = work.lengths(tile)
        position = work.position(row)
        scores = mask_row(scores, position, n * plan.tile_n, lengths, work.window(), seen)
    running, needed = state.maximum, state.needed
    if cutlass.const_expr(plan.features.skip or plan.pair):
        tile_max = row_maximum(scores, Float32(-Float32.inf))
        if cutlass.const_expr(plan.pair):
            running, needed = told(group, later, row, tile, phases)
        if cutlass.const_expr(plan.features.skip):
            ptx.tcgen05_fence_before()  # of every lane's reads of S, before one lane arrives
            vote(group, cute.arch.vote_any_sync(tile_max >= needed))
        reached = cute.arch.fmax(running, tile_max)
    else:
        reached = row_maximum(scores, running)
    maximum, fade = new_maximum(running, reached, scalars.scale_log2, plan.rescale_threshold)
    if cutlass.const_expr(plan.features.skip):
        minus_max = -maximum * scalars.scale_log2
        ahead = exponentials(
            scores[: plan.ahead], scalars.scale_log2, minus_max, plan.by_polynomial
        )
        barriers.wait("decided", phases.s, t)
        keep = shared.keeps(t)
        kept_needed = cute.arch.fmax(needed, tile_max + scalars.skip)
        if cutlass.const_expr(plan.pair):
            maximum = cutlass.select_(keep, maximum, running)
            needed = cutlass.select_(keep, kept_needed, needed)
            state = tell_maximum(group, RowState(maximum, state.total, needed), state)
            if keep:
                total = probabilities(group, ahead, scores, tP, minus_max, state.total)
                state = RowState(maximum, total, needed)
        else:
            tell_fade(group, cutlass.select_(keep, fade, Float32(SKIPPED)))
            if keep:
                total = probabilities(group, ahead, scores, tP, minus_max, state.total * fade)
                state = RowState(maximum, total, kept_needed)
    else:
        if cutlass.const_expr(plan.pair):
            state = tell_maximum(group, RowState(maximum, state.total, needed), state)
            total = state.total
        else:
            if later:
                tell_fade(group, fade)
            total = state.total * fade
        minus_max = -maximum * scalars.scale_log2
        total = probabilities(group, [], scores, tP, minus_max, total)
        state = RowState(maximum, total, state.needed)
    phases = replace(phases, s=phases.s ^ 1)
    return state, phases


def wait_maxima(group: Group, phases: SoftmaxPhases) -> None:
    """Wait for what the other warpgroup of a pair's CTA tells of its KV tile before this one's."""
    group.barriers.wait("maxima", phases.s ^ Int32(group.t == 0), group.t ^ 1)


@cute.jit
def told(group: Group, later: Boolean, row: Int32, tile: WorkTile, phases):
    """(maximum, needed) of a row of a pair before this KV tile, from the other warpgroup."""
    work, shared, _, _, _, _, t, thread = group
    wait_maxima(group, phases)
    running = Float32(EMPTY)
    needed = cutlass.select_(row < work.rows(tile), Float32(EMPTY), Float32(ABSENT))
    if later:
        running = shared.sMax[thread, t ^ 1]
        if cutlass.const_expr(work.plan.features.skip):
            needed = shared.sScale[thread, t ^ 1]
    return running, needed


def tell_maximum(group: Group, new: RowState, old: RowState) -> RowState:
    """Tell the other warpgroup of a pair's CTA and the correction of a KV tile; ``new``, with the
    total of ``old`` faded.

    The places are free: S of this tile was made after P V two tiles before or the decision that
    there is none, for which the correction had read them, and the other warpgroup's tile between
    them had, too."""
    work, shared, scalars, _, barriers, warp, t, thread = group
    shared.sMax[thread, t] = new.maximum
    if work.plan.features.skip:
        shared.sScale[thread, t] = new.needed
    barriers.arrive("maxima", t)
    barriers.tell("fade", warp)
    fade = ptx.exp2((old.maximum - new.maximum) * scalars.scale_log2)
    return replace(new, total=old.total * fade)


def vote(group: Group, keep: Boolean) -> None:
    """Say whether this warp's rows keep the KV tile; in a pair to both CTAs.

    Everybody has read what the group decided before: decision_read says so of the correction's
    warps, which hear of a tile from softmax warps that know, and of load_values."""
    work, shared, _, _, barriers, _, t, thread = group
    if not work.plan.pair:
        # All lanes say the same: nobody needs to be elected.
        shared.sVotes[thread // 32, t] = Int32(keep).to(Int8)
        barriers.arrive("decided", t)
        return
    with cute.arch.elect_one():
        own = cute.domain_offset((work.rank * 4 + thread // 32, t), shared.sVotes).iterator.toint()
        for rank in range(2):
            ptx.store_cluster(ptx.map_shared(own, rank), [Int32(keep)], bits=8)
        barriers.arrive_elected("decided", t)


def score_row(plan: Plan, tS: Int32, scalars: Scalars) -> list[Float32]:
    """A row of S from TMEM, with a softcap capped.

    That takes several registers an element: there the next columns are on their way while those
    before are capped, and not all are there at the same time."""
    width = 32
    pieces = [tS + c for c in range(0, plan.tile_n, width)]
    if not plan.features.softcap:
        loaded = [score for piece in pieces for score in ptx.tcgen05_load(piece, width)]
        return ptx.tcgen05_wait_load(loaded)
    scores: list[Float32] = []
    piece = ptx.tcgen05_wait_load(ptx.tcgen05_load(pieces[0], width))
    for following in pieces[1:]:
        coming = ptx.tcgen05_load(following, width)
        scores += capped(piece, scalars.cap_inner)
        piece = ptx.tcgen05_wait_load(coming)
    return scores + capped(piece, scalars.cap_inner)


def tell_fade(group: Group, fade: Float32) -> None:
    """Tell the correction what is left of O; it has read what it was told before."""
    group.shared.sScale[group.thread, group.t] = fade
    group.barriers.tell("fade", group.warp)


def probabilities(
    group: Group, ahead: list[Float32], scores: list[Float32], tP: Int32, minus_max: Float32,
    total: Float32,
) -> Float32:  # fmt: skip
    """P of a kept tile, whose first values are ``ahead``, handed to the MMA; ``total`` + Σ P."""
    work, _, scalars, _, barriers, _, t, _ = group
    plan = work.plan
    eighth = plan.tile_n // 8
    p = list(ahead)
    begin = 0
    for part, name in plan.p_handed:
        while begin < part:
            end = min(begin + 2, part)
            rest = scores[len(p) : end * eighth]
            p += exponentials(rest, scalars.scale_log2, minus_max, plan.by_polynomial)
            stored = p[begin * eighth : end * eighth]
            ptx.tcgen05_store(tP + begin * eighth // 2, packed(stored, DTYPES[plan.dtype]))
            begin = end
        ptx.tcgen05_wait_store()
        barriers.arrive_tmem(name, t)
    return row_sum(p, total)
