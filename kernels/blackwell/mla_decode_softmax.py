"""The softmax warpgroup of `mla_decode`: Q on its way in, then S → P, the skip decision, and O
rescaled where a maximum has moved.

Thread t has lane t of TMEM: half t // 64 of the keys of row t % 64. Threads t and t ± 64 exchange
the maxima of their halves; each keeps the sum of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.mask import mask_row
from cute_fmha.kernels.blackwell.mla_decode_operands import (
    Global,
    Shared,
    Work,
    lane_address,
)
from cute_fmha.kernels.blackwell.mla_decode_plan import ROWS, UNIT, UNIT_BYTES, MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried
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
    scaled,
)
from cute_fmha.kernels.blackwell.worklist import Piece

PAIR = 1
"""First of two named barriers: of warps 0 and 2, and of warps 1 and 3."""

VOTE = 3
"""Named barrier of the warpgroup."""


@dataclass(frozen=True)
class RowState(Carried):
    """Half a row's softmax: the row's maximum that P is relative to, Σ P of this half, and the
    row's maximum over the kept tiles, which decides what is skipped. That is the row's maximum over
    all tiles: with λ <= 1 no row of a skipped tile reaches it."""

    maximum: Float32
    total: Float32
    running: Float32


@dataclass(frozen=True)
class Progress(Carried):
    """The turn of the next S and its parity, the place of the next P, tiles skipped, and whether
    this work tile has kept one."""

    turn: Int32
    phase: Int32
    p_index: Int32
    p_phase: Int32
    skipped: Int32
    kept: Int32


class Group(NamedTuple):
    """What a thread of the warpgroup works with."""

    work: Work
    shared: Shared
    scalars: Scalars
    tmem: Any
    barriers: Barriers
    thread: Int32
    sOther: Any  # (2,): of sMax, where the row's other half lies, by turns


@cute.jit
def softmax(
    plan: MlaPlan, work: Work, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
    barriers: Barriers,
):  # fmt: skip
    """Reads: Q in global memory, S, O. Writes: Q, sQ, sP, O, sTotal, sRowMax, sLargest.
    Waits: s_full, pv_done, stats_empty. Signals: q_full, s_empty, p_ready, stats_full.
    Registers: 232."""
    thread = cute.arch.thread_idx()[0] % 128
    progress = Progress(Int32(0), Int32(0), Int32(0), Int32(0), Int32(0), Int32(0))
    stats_phase, seen = Int32(0), Int32(0)
    # An address of its own, which would otherwise be made anew for every tile.
    other = ptx.opaque(shared.sMax[thread ^ ROWS, None].iterator.toint())
    other = cute.make_ptr(Float32, other, cute.AddressSpace.smem, assumed_align=4)
    sOther = cute.make_tensor(other, cute.make_layout(2, stride=2 * ROWS))
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        position, head, exists = work.position(piece, thread % ROWS)
        if piece.end > piece.begin:
            values = scalars
            if cutlass.const_expr(plan.features.skip):
                skip = raw_threshold(work.skip_value(piece), scalars.scale_log2)
                values = scalars._replace(skip=skip)
            group = Group(work, shared, values, tmem, barriers, thread, sOther)
            fetch_query(group, mem.mQ[piece.batch, position, head, None], exists)
            running = cutlass.select_(exists, Float32(EMPTY), Float32(ABSENT))
            state = RowState(Float32(EMPTY), Float32(0.0), running)
            state, progress = row(group, piece, position, state, progress)
            seen += piece.end - piece.begin
            barriers.wait("stats_empty", stats_phase ^ 1)
            stats_phase = stats_phase ^ 1
            shared.sTotal[thread] = state.total
            if thread < ROWS:
                shared.sRowMax[thread] = state.maximum
                if cutlass.const_expr(plan.features.max_logits):
                    shared.sLargest[thread] = state.running
            if thread == 0:
                shared.sKept[0] = progress.kept
            barriers.arrive("stats_full")
        place = work.pieces.next(place, piece)
    if cutlass.const_expr(plan.features.count):  # noqa: SIM102  (compile and run time)
        if thread == 0 and work.rank == 0:
            cute.arch.atomic_add(mem.mStats.iterator, Int64(progress.skipped))
            cute.arch.atomic_add(mem.mStats.iterator + 1, Int64(seen))


def fetch_query(group: Group, gQ: cute.Tensor, exists: Boolean) -> None:
    """The thread's row of Q, zero where it does not exist: to both halves of the lanes in TMEM, and
    what has no place there to shared memory. Signals: q_full."""
    work, shared, _, tmem, barriers, thread, _ = group
    plan = work.plan
    start = gQ.iterator.toint()
    tQ = lane_address(tmem, thread) + plan.tmem["Q"].start
    for unit in range(plan.q_tmem_units):
        words = []
        for piece in range(8):
            words += ptx.load_global(start + unit * 128 + piece * 16, exists)
        ptx.tcgen05_store(tQ + unit * UNIT // 2, words)
    # Both threads of a row write half of the pieces of 16 bytes.
    row, half = thread % ROWS, thread // ROWS
    for unit in range(plan.q_shared_units):
        source = start + (plan.q_tmem_units + unit) * 128
        target = shared.sQ.iterator.toint() + unit * UNIT_BYTES + row * 128
        for i in range(4):
            piece = half * 4 + i
            words = ptx.load_global(source + piece * 16, exists)
            ptx.store_shared(target + (piece ^ row % 8) * 16, words)
    ptx.tcgen05_wait_store()
    cute.arch.fence_proxy("async.shared", space="cta")
    barriers.arrive_tmem("q_full")


@cute.jit
def row(group: Group, piece: Piece, position: Int32, state, progress):
    """All KV tiles of a piece: (state, progress)."""
    plan = group.work.plan
    progress = replace(progress, kept=Int32(0))
    if cutlass.const_expr(plan.features.window_left):
        for n in cutlass.range(piece.begin, piece.full_begin, unroll=1):
            state, progress = step(group, piece, position, n, state, progress, True)
    for n in cutlass.range(piece.full_begin, piece.full_end, unroll=1):
        state, progress = step(group, piece, position, n, state, progress, False)
    for n in cutlass.range(piece.full_end, piece.end, unroll=1):
        state, progress = step(group, piece, position, n, state, progress, True)
    return state, progress


@cute.jit
def step(
    group: Group, piece: Piece, position: Int32, n: Int32, state, progress,
    masked: cutlass.Constexpr,
):  # fmt: skip
    """One KV tile of half a row: (state, progress)."""
    work, shared, scalars, tmem, barriers, thread, sOther = group
    plan = work.plan
    columns = plan.s_columns
    tS = lane_address(tmem, thread) + plan.tmem["S"].start
    turn = progress.turn
    barriers.wait_tmem("s_full", progress.phase, turn)
    scores = []
    for c in cutlass.range_constexpr(0, columns, 32):
        scores += ptx.tcgen05_load(tS + c, 32)
    scores = ptx.tcgen05_wait_load(scores)
    barriers.arrive_tmem("s_empty")
    if cutlass.const_expr(plan.features.softcap):
        scores = capped(scores, scalars.cap_inner)
    if cutlass.const_expr(masked):
        first_key = n * plan.tile_n + thread // ROWS * columns
        lengths = work.mem.mQ.shape[1], piece.length
        scores = mask_row(scores, position, first_key, lengths, work.window())
    own = row_maximum(scores, Float32(-Float32.inf))
    shared.sMax[thread, turn] = own
    keep = Boolean(True)
    if cutlass.const_expr(plan.features.skip):
        vote = own >= state.running + scalars.skip
        vote = ptx.barrier_any(Int32(VOTE), 128, vote)
        keep = decide(group, vote, progress)
    else:
        ptx.barrier_sync(PAIR + thread // 32 % 2, 64)
    if keep:
        state = probabilities(group, scores, (own, sOther[turn]), state, progress)
        wraps = progress.p_index == plan.p_stages - 1
        progress = replace(
            progress,
            p_index=0 if wraps else progress.p_index + 1,
            p_phase=progress.p_phase ^ Int32(wraps),
            kept=Int32(1),
        )
    else:
        progress = replace(progress, skipped=progress.skipped + 1)
    progress = replace(progress, turn=turn ^ 1, phase=progress.phase ^ turn)
    barriers.arrive_tmem("p_ready", turn)
    return state, progress


@cute.jit
def decide(group: Group, vote: Boolean, progress):
    """Whether the tile is kept, by the votes of all rows; of a pair, those of both CTAs."""
    work, shared, _, _, barriers, thread, _ = group
    turn = progress.turn
    keep = vote
    if cutlass.const_expr(work.plan.pair):
        if thread < 32:
            with cute.arch.elect_one():
                own = shared.sKeep.iterator.toint() + (turn * 2 + work.rank) * 4
                for rank in range(2):
                    ptx.store_cluster(ptx.map_shared(own, rank), [Int32(vote)])
            cute.arch.sync_warp()
            barriers.arrive_leader("voted", turn)
        barriers.wait("voted", progress.phase, turn)
        keep = shared.keeps(turn)
    elif thread == 0:
        shared.sKeep[turn, 0] = Int32(vote)
    return keep


@cute.jit
def probabilities(group: Group, scores, halves: tuple[Float32, Float32], state, progress):
    """P of a kept tile to shared memory, O rescaled before it where a maximum of the warp moved:
    the next state. ``halves``: the maxima of the row's."""
    work, shared, scalars, tmem, barriers, thread, _ = group
    plan = work.plan
    running = ptx.max3(state.running, *halves)
    highest = ptx.max3(state.maximum, *halves)
    maximum, fade = new_maximum(state.maximum, highest, scalars.scale_log2, plan.rescale_threshold)
    p = exponentials(scores, scalars.scale_log2, maximum * -scalars.scale_log2)
    total = row_sum(p, state.total * fade)
    words = packed(p, DTYPES[plan.dtype])
    moved = cute.arch.vote_any_sync(fade < 1.0)
    if moved and progress.kept != 0:
        # P V of the last kept tile, in the buffer before this one, is complete.
        before = plan.p_stages - 1 if progress.p_index == 0 else progress.p_index - 1
        barriers.wait_tmem("pv_done", progress.p_phase ^ Int32(progress.p_index == 0), before)
        rescale(plan, lane_address(tmem, thread) + plan.tmem["O"].start, fade)
    if cutlass.const_expr(plan.p_stages == 1):
        # Of two buffers this one is free: S of this tile was made after P V from it.
        barriers.wait("pv_done", progress.p_phase ^ 1, progress.p_index)
    # (ROW, KEY, UNIT): the thread's keys are part of a row of 128 bytes, or all of it
    row, half = thread % ROWS, thread // ROWS
    byte = half * plan.s_columns * 2
    target = shared.sP.iterator.toint() + progress.p_index * plan.p_units * UNIT_BYTES
    target = target + byte // 128 * UNIT_BYTES + row * 128
    for piece in cutlass.range_constexpr(len(words) // 4):
        at = (byte % 128 // 16 + piece) ^ row % 8
        ptx.store_shared(target + at * 16, words[piece * 4 : piece * 4 + 4])
    cute.arch.fence_proxy("async.shared", space="cta")
    return RowState(maximum, total, running)


def rescale(plan: MlaPlan, tO: Int32, fade: Float32) -> None:
    """O = fade · O, 32 columns at a time."""
    width = 32
    for c in range(0, plan.head_dim_v // 2, width):
        part = ptx.tcgen05_wait_load(ptx.tcgen05_load(tO + c, width))
        ptx.tcgen05_store(tO + c, scaled(part, fade))
    ptx.tcgen05_wait_store()
