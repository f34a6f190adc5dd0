"""The consumer warpgroups of hopper_prefill.py: scores, softmax, skip votes, O, epilogue."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cute_fmha.kernels.triton.hopper_splitkv import (
    kv_tile_ranges,
    skip_threshold,
    warpgroup_barrier,
)
from cute_fmha.kernels.triton.primitives import DEAD_MAX, LN_2, LOG2_E, NO_MAX


# ------------------------------------------------------------------------------ softmax
@gluon.jit
def mask_scores(s, row, column, lengths, window, PLAN: gl.constexpr):
    """−inf where a key is past the sequence's end or outside the window (see tiling.py).

    Column = 8 · group + 2 · lane + pair: group and pair are constants of a thread's register, lane
    goes to the row's side, so that a thread compares with constants and keeps no column numbers.
    column >> 30 is 0, which the compiler does not know: row numbers stay where they are needed.
    """
    length_q, length_k = lengths
    GROUPS: gl.constexpr = s.shape[1] // 8
    parts = s.reshape([s.shape[0], GROUPS, 4, 2])
    ROW_LANE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parts.type.layout))
    GROUP_PAIR: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, parts.type.layout))
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, GROUP_PAIR))
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, GROUP_PAIR))
    columns = (8 * group)[:, None] + pair[None, :]
    columns = gl.expand_dims(gl.expand_dims(columns, 0), 2)
    start = column + 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, ROW_LANE))
    rows = row + (gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, ROW_LANE)) ^ (column >> 30))
    diagonal = rows + (length_k - length_q)
    limit = gl.full_like(rows, 0) + (length_k - 1)
    if PLAN.window_right:
        limit = gl.minimum(limit, diagonal + window[1])
    limit = limit[:, None] - start[None, :]
    visible = columns <= gl.expand_dims(gl.expand_dims(limit, 1), 3)
    if PLAN.window_left:
        # At least 0, or the difference could wrap around for a window near 2³¹.
        left = gl.maximum(diagonal - window[0], 0)[:, None] - start[None, :]
        visible = visible & (columns >= gl.expand_dims(gl.expand_dims(left, 1), 3))
    parts = gl.where(visible, parts, float("-inf"))
    return gl.convert_layout(parts.reshape(s.shape), s.type.layout, assert_trivial=True)


@gluon.jit
def finish_scores(s, scores, row, column, lengths, window, MASK: gl.constexpr, PLAN: gl.constexpr):
    """(s, multiplier, lane maxima): softcap and mask applied; multiplier · s is in log2 units, and
    the maxima are."""
    multiplier = scores[0]
    if PLAN.softcap:
        e = gl.exp2(s * scores[1])
        s = scores[2] * (1.0 - 2.0 / (e + 1.0))
        multiplier = 1.0
    if MASK:
        s = mask_scores(s, row, column, lengths, window, PLAN)
    return s, multiplier, lane_maxima(s) * multiplier


@gluon.jit
def lane_maxima(s):
    """[rows, 4]: the maximum of what each thread of a row's quad holds (no shuffle). Pairs first:
    independent instructions."""
    ROWS: gl.constexpr = s.shape[0]
    COLUMNS: gl.constexpr = s.shape[1]
    return gl.max(gl.max(s.reshape([ROWS, COLUMNS // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def row_maxima(lane_max, LAYOUT: gl.constexpr):
    x = gl.max(lane_max, axis=1)
    return gl.convert_layout(x, gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@gluon.jit
def lane_sums(p):
    """[rows, 4]: the sum of what each thread of a row's quad holds (no shuffle)."""
    ROWS: gl.constexpr = p.shape[0]
    COLUMNS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([ROWS, COLUMNS // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def softmax(s, tile_max, multiplier, row_max, row_sum):
    """(P, α, new row max, new lane sums)."""
    new_max = gl.maximum(row_max, tile_max)
    p = gl.exp2(s * multiplier - new_max[:, None])
    alpha = gl.exp2(row_max - new_max)
    scale = gl.convert_layout(alpha, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True)
    return p, alpha, new_max, row_sum * scale[:, None] + lane_sums(p)


@gluon.jit
def rescale(acc, alpha):
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


# ------------------------------------------------------------------------------ consumer
@gluon.jit
def read_field(mail, i: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(mail.slice(i, 1).load(layout), axis=0)


@gluon.jit
def receive(work, sWork, barriers):
    """The next work tile: (batch or −1 for none, first row, q and k length, ring position less
    number of its KV tiles, how many work tiles had a Q before).

    `reread` hands the message back, and until then what only the epilogue needs stays there.
    """
    slot = work % 2
    mbarrier.wait(barriers.work_full.index(slot), (work // 2) & 1)
    mail = sWork.index(slot)
    batch = read_field(mail, 0)
    first = read_field(mail, 2)
    length_q = read_field(mail, 4)
    length_k = read_field(mail, 5)
    offset = read_field(mail, 6)
    loaded = read_field(mail, 7)
    return batch, first, length_q, length_k, offset, loaded


@gluon.jit
def reread(work, sWork, barriers):
    """The same work tile once more: (batch, head, first row, q start, q length)."""
    slot = work % 2
    mail = sWork.index(slot)
    batch = read_field(mail, 0)
    head = read_field(mail, 1)
    first = read_field(mail, 2)
    q_start = read_field(mail, 3)
    length_q = read_field(mail, 4)
    mbarrier.arrive(barriers.work_empty.index(slot), count=1)
    return batch, head, first, q_start, length_q


@gluon.jit
def issue_scores(
    q_tiles, buffers, ring, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr
):
    """Start S = Q Kᵀ. With skip-softmax at 256, the descriptors of Q would be hoisted out of loops
    and spilled; ring >> 30 is 0, which the compiler does not know."""
    slot = ring % PLAN.k_stages
    if PLAN.skip and PLAN.d0 > 128:
        who = WHO + (ring >> 30)
        q_tiles = (buffers.sQ0.index(who), buffers.sQ1.index(who))
    zero = gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, LAYOUT)
    k0 = buffers.sK0.index(slot)
    s = warpgroup_mma(q_tiles[0], k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if PLAN.d1 > 0:
        k1 = buffers.sK1.index(slot)
        s = warpgroup_mma(q_tiles[1], k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def pass_turn(barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    mbarrier.arrive(barriers.order.index((WHO + 1) % PLAN.consumers), count=1)


@gluon.jit
def vote(warp_votes, ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """One flag per warp, for the producer to read: whether a row needs the tile's V.

    No deadlock, no lost phase: a warpgroup votes on tile n + v_stages after reading K of n + 2 or
    later, which the producer loads once it has every vote on n and has read the flags.
    """
    slot = (ring % PLAN.v_stages) * PLAN.consumers + WHO
    buffers.sKeep.index(slot).store(warp_votes)
    # The arrival is one thread's; the flags are everyone's.
    warpgroup_barrier()
    mbarrier.arrive(barriers.voted.index(slot), count=1)


@gluon.jit
def vote_all(keep, ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """The same vote for every warp, where it does not depend on the scores."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    vote(gl.full([4], keep, gl.int32, layout), ring, buffers, barriers, WHO, PLAN)


@gluon.jit
def decide(
    lane_max, row_max, log2_threshold, ring, buffers, barriers, WHO: gl.constexpr,
    PLAN: gl.constexpr,
):  # fmt: skip
    """Vote; returns 0 if no row has tile max >= row_max + log2 λ, else 1.

    A row has it if one of its lanes has (the multiplier is positive, so rounding keeps the order):
    no need for the row's maximum. A warp's 16 rows × 4 lanes are one redux; behind the vote's
    barrier every thread reads the four flags, from an address that does not depend on the lane.
    """
    bound = gl.convert_layout(
        row_max + log2_threshold, gl.SliceLayout(1, lane_max.type.layout), assert_trivial=True
    )
    votes = (lane_max >= bound[:, None]).to(gl.int32)
    vote(gl.max(votes.reshape([4, PLAN.tile_m]), axis=1), ring, buffers, barriers, WHO, PLAN)
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    slot = (ring % PLAN.v_stages) * PLAN.consumers + WHO
    return gl.max(buffers.sKeep.index(slot).load(layout), axis=0)


@gluon.jit
def release(ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """A tile that only other warpgroups need: wait for it (or one phase of an empty barrier could
    count this warpgroup twice), then hand it back."""
    mbarrier.wait(barriers.order.index(WHO), ring & 1)
    pass_turn(barriers, WHO, PLAN)
    slot = ring % PLAN.k_stages
    mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
    mbarrier.arrive(barriers.k_empty.index(slot), count=1)
    if PLAN.skip:
        vote_all(0, ring, buffers, barriers, WHO, PLAN)
    slot = ring % PLAN.v_stages
    mbarrier.wait(barriers.v_full.index(slot), (ring // PLAN.v_stages) & 1)
    mbarrier.arrive(barriers.v_empty.index(slot), count=1)


@gluon.jit
def kv_loop(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles [lo, hi): S(n) and PV(n−1) on the tensor core, then the softmax of tile n.

    State: O, P(n−1), row max, lane sums, whether P(n−1) awaits its product, tiles skipped.
    """
    acc, p, row_max, row_sum, pending, skipped = state
    offset, end, row = spot
    lengths, window, scores, _log2_threshold = values
    for tile in range(lo, hi):
        ring = tile + offset
        slot = ring % PLAN.k_stages
        last = (ring - 1) % PLAN.v_stages
        phase = ((ring - 1) // PLAN.v_stages) & 1
        mbarrier.wait(barriers.order.index(WHO), ring & 1)
        mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
        s = issue_scores(q_tiles, buffers, ring, WHO, PLAN, LAYOUT)
        mbarrier.wait(barriers.v_full.index(last), phase)
        acc = warpgroup_mma(p, buffers.sV.index(last), acc, is_async=True)
        pass_turn(barriers, WHO, PLAN)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(barriers.k_empty.index(slot), count=1)
        if not PLAN.q_in_registers:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=tile == end - 1)
        s, multiplier, lane_max = finish_scores(
            s, scores, row, tile * PLAN.tile_n, lengths, window, MASK, PLAN
        )
        tile_max = row_maxima(lane_max, LAYOUT)
        new_p, alpha, row_max, row_sum = softmax(s, tile_max, multiplier, row_max, row_sum)
        if PLAN.overlap_pv:
            # ptxas hoists the wgmma wait over the softmax unless a branch lies between them; this
            # wait has already been satisfied and is there for its branch.
            next_p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
            mbarrier.wait(barriers.v_full.index(last), phase)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        else:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            next_p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
        mbarrier.arrive(barriers.v_empty.index(last), count=1)
        acc = rescale(acc, alpha)
        p = next_p
    return acc, p, row_max, row_sum, pending, skipped


@gluon.jit
def kv_loop_skip(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`kv_loop` with a vote per tile, which runs while PV(n−1) does. No wgmma is in flight where
    control flow divides: ptxas may serialise wgmma across branches (not tried)."""
    acc, p, row_max, row_sum, pending, skipped = state
    offset, end, row = spot
    lengths, window, scores, log2_threshold = values
    for tile in range(lo, hi):
        ring = tile + offset
        slot = ring % PLAN.k_stages
        last = (ring - 1) % PLAN.v_stages
        phase = ((ring - 1) // PLAN.v_stages) & 1
        column = tile * PLAN.tile_n
        mbarrier.wait(barriers.order.index(WHO), ring & 1)
        mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
        if pending:
            raw = issue_scores(q_tiles, buffers, ring, WHO, PLAN, LAYOUT)
            mbarrier.wait(barriers.v_full.index(last), phase)
            acc = warpgroup_mma(p, buffers.sV.index(last), acc, is_async=True)
            pass_turn(barriers, WHO, PLAN)
            raw = warpgroup_mma_wait(1, deps=(raw,))
            mbarrier.arrive(barriers.k_empty.index(slot), count=1)
            s, multiplier, lane_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = decide(lane_max, row_max, log2_threshold, ring, buffers, barriers, WHO, PLAN)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        else:
            raw = issue_scores(q_tiles, buffers, ring, WHO, PLAN, LAYOUT)
            pass_turn(barriers, WHO, PLAN)
            raw = warpgroup_mma_wait(0, deps=(raw,))
            mbarrier.arrive(barriers.k_empty.index(slot), count=1)
            s, multiplier, lane_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = decide(lane_max, row_max, log2_threshold, ring, buffers, barriers, WHO, PLAN)
            mbarrier.wait(barriers.v_full.index(last), phase)
        mbarrier.arrive(barriers.v_empty.index(last), count=1)
        if not PLAN.q_in_registers:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=tile == end - 1)
        pending = keep > 0
        if pending:
            tile_max = row_maxima(lane_max, LAYOUT)
            new_p, alpha, row_max, row_sum = softmax(s, tile_max, multiplier, row_max, row_sum)
            acc = rescale(acc, alpha)
            p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
        else:
            # Not needed again, and better dead than carried: 32 registers.
            p = gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, p.dtype, p.type.layout)
            skipped += 1
    return acc, p, row_max, row_sum, pending, skipped


@gluon.jit
def kv_phase(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    if PLAN.skip:
        state = kv_loop_skip(
            state, lo, hi, spot, q_tiles, buffers, barriers, values, MASK, WHO, PLAN, LAYOUT
        )
    else:
        state = kv_loop(
            state, lo, hi, spot, q_tiles, buffers, barriers, values, MASK, WHO, PLAN, LAYOUT
        )
    return state


@gluon.jit
def zero_rows(stage, valid, PLAN: gl.constexpr):
    """Zero rows [valid, tile_n) of a V stage. Every warpgroup does so before it reads them; they
    write the same zeros."""
    CHUNKS: gl.constexpr = PLAN.tile_n // 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    for i in gl.static_range(CHUNKS):
        if valid < (i + 1) * 16:
            part = stage.slice(i * 16, 16)
            value = part.load(layout)
            keep = (rows < valid - i * 16)[:, None]
            part.store(gl.where(keep, value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def first_tile(begin, full, spot, q_tiles, buffers, barriers, values, WHO: gl.constexpr,
               PLAN: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):  # fmt: skip
    """Tile ``begin``: (P, row max, lane sums). It always holds a visible key, so it is kept."""
    offset, end, row = spot
    lengths, window, scores, _log2_threshold = values
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ring = begin + offset
    slot = ring % PLAN.k_stages
    mbarrier.wait(barriers.order.index(WHO), ring & 1)
    mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
    s = issue_scores(q_tiles, buffers, ring, WHO, PLAN, S_LAYOUT)
    pass_turn(barriers, WHO, PLAN)
    if PLAN.skip:
        vote_all(1, ring, buffers, barriers, WHO, PLAN)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(barriers.k_empty.index(slot), count=1)
    if not PLAN.q_in_registers:
        mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=begin == end - 1)
    s, multiplier, _maxima = finish_scores(
        s, scores, row, begin * PLAN.tile_n, lengths, window, False, PLAN
    )
    if (begin < full[0]) | (begin >= full[1]):
        s = mask_scores(s, row, begin * PLAN.tile_n, lengths, window, PLAN)
    row_max = gl.full([PLAN.tile_m], NO_MAX, gl.float32, ROWS)
    if PLAN.skip:
        # Rows past the sequence's end never vote.
        rows = row + (gl.arange(0, PLAN.tile_m, layout=ROWS) ^ (begin >> 30))
        row_max = gl.where(rows < lengths[0], NO_MAX, DEAD_MAX)
    row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
    tile_max = row_maxima(lane_maxima(s) * multiplier, S_LAYOUT)
    p, _alpha, row_max, row_sum = softmax(s, tile_max, multiplier, row_max, row_sum)
    return gl.convert_layout(p.to(buffers.sV.dtype), P_LAYOUT), row_max, row_sum


@gluon.jit
def attend(
    begin, full, spot, buffers, barriers, values, WHO: gl.constexpr, PLAN: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """This warpgroup's rows against tiles [begin, end), at least one: (O, row max, lane sums,
    tiles skipped)."""
    offset, end, _row = spot
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    q_tiles = (buffers.sQ0.index(WHO), buffers.sQ1.index(WHO))
    if PLAN.q_in_registers:
        A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
        q_tiles = (q_tiles[0].load(A_LAYOUT), q_tiles[1].load(A_LAYOUT))
        fence_async_shared()
        mbarrier.arrive(barriers.q_empty.index(WHO), count=1)
    p, row_max, row_sum = first_tile(
        begin, full, spot, q_tiles, buffers, barriers, values, WHO, PLAN, S_LAYOUT, P_LAYOUT
    )
    acc = gl.full([PLAN.tile_m, PLAN.dv], 0.0, gl.float32, O_LAYOUT)
    state = (acc, p, row_max, row_sum, begin < end, begin * 0)
    lo = begin + 1
    if PLAN.window_left:
        state = kv_phase(
            state, lo, full[0], spot, q_tiles, buffers, barriers, values, True, WHO, PLAN, S_LAYOUT
        )
    lo = gl.maximum(lo, full[0])
    state = kv_phase(
        state, lo, full[1], spot, q_tiles, buffers, barriers, values, False, WHO, PLAN, S_LAYOUT
    )
    lo = gl.maximum(lo, full[1])
    state = kv_phase(
        state, lo, end, spot, q_tiles, buffers, barriers, values, True, WHO, PLAN, S_LAYOUT
    )
    acc, p, row_max, row_sum, pending, skipped = state
    last = end - 1 + offset
    slot = last % PLAN.v_stages
    mbarrier.wait(barriers.v_full.index(slot), (last // PLAN.v_stages) & 1)
    if pending:
        if PLAN.poison:
            valid = values[0][1] - (end - 1) * PLAN.tile_n
            if valid < PLAN.tile_n:
                zero_rows(buffers.sV.index(slot), valid, PLAN)
        acc = warpgroup_mma(p, buffers.sV.index(slot), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(barriers.v_empty.index(slot), count=1)
    return acc, row_max, row_sum, skipped


@gluon.jit
def consume(arguments, WHO: gl.constexpr, PLAN: gl.constexpr):
    """Reads: sQ, sK, sV, sWork. Writes: out, LSE, votes, counters. Waits: *_full, order.
    Signals: *_empty, order, voted. Registers: PLAN.registers[0]."""
    outputs, buffers, barriers, packed, window, scores, skip, stats = arguments
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.tile_n, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.dv, 16])
    work = 0
    batch, first, length_q, length_k, offset, loaded = receive(work, buffers.sWork, barriers)
    while batch >= 0:
        # What is computed from kernel parameters alone would be hoisted out of everything, into
        # the registers of the producer too, and spilled there. The compiler does not know that
        # this is 0 (but that it is a multiple of 16). Unlike a sum, ^ is not reassociated.
        zero = (work >> 30) * 16
        visible = (zero ^ window[0], zero ^ window[1])
        row = first + WHO * PLAN.tile_m
        all_begin, _f0, _f1, all_end = kv_tile_ranges(
            first, gl.minimum(first + PLAN.tile_m * PLAN.consumers, length_q), length_q, length_k,
            visible[0], visible[1], PLAN.tile_n,
        )  # fmt: skip
        begin, full_begin, full_end, end = kv_tile_ranges(
            row, gl.minimum(row + PLAN.tile_m, length_q), length_q, length_k,
            visible[0], visible[1], PLAN.tile_n,
        )  # fmt: skip
        if first >= length_q:
            all_end = all_begin
        if (row >= length_q) | (begin >= end):
            begin = all_end
            end = all_end
        for tile in range(all_begin, begin):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        if all_begin < all_end:
            mbarrier.wait(barriers.q_full.index(WHO), loaded & 1)
        acc = gl.full([PLAN.tile_m, PLAN.dv], 0.0, gl.float32, O_LAYOUT)
        row_max = gl.full([PLAN.tile_m], NO_MAX, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
        skipped = begin * 0
        if begin < end:
            log2_threshold = 0.0
            if PLAN.skip:
                log2_threshold = skip_threshold(
                    skip[0], skip[1] + zero, length_k, PLAN.skip_relative
                )
            acc, row_max, row_sum, skipped = attend(
                begin, (full_begin, full_end), (offset, end, row), buffers, barriers,
                ((length_q, length_k), visible, scores, log2_threshold), WHO, PLAN,
                S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
        elif all_begin < all_end:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1)
        for tile in range(end, all_end):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        place = reread(work, buffers.sWork, barriers)
        if place[2] + WHO * PLAN.tile_m < place[4]:
            store(outputs, acc, row_max, row_sum, place, zero, scores[3], packed, WHO, PLAN)
            if stats is not None:
                gl.atomic_add(stats + zero, skipped.to(gl.int64), sem="relaxed")
                gl.atomic_add(stats + (zero ^ 1), (end - begin).to(gl.int64), sem="relaxed")
        work += 1
        batch, first, length_q, length_k, offset, loaded = receive(work, buffers.sWork, barriers)


# ------------------------------------------------------------------------------ epilogue
@gluon.constexpr_function
def row_layout(columns):
    """Eight adjacent columns per thread: 16-byte stores, 64 bytes of a row per quad."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    while 32 << (len(registers) - 4) < columns:
        registers.append([0, 32 << (len(registers) - 4)])
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store(
    outputs, acc, row_max, row_sum, place, zero, sink, packed, WHO: gl.constexpr,
    PLAN: gl.constexpr,
):  # fmt: skip
    """Normalise, round once, store rows below the sequence's length; LSE in natural units.
    ``zero`` keeps strides, extended to 64 bits, from being hoisted (see `consume`)."""
    out, out_strides, lse, lse_strides = outputs
    batch, head, first, q_start, length_q = place
    row = first + WHO * PLAN.tile_m
    row_sum = gl.convert_layout(gl.sum(row_sum, axis=1), row_max.type.layout, assert_trivial=True)
    if sink is not None:
        sink_log2 = gl.load(sink + head) * LOG2_E
        joint = gl.maximum(row_max, sink_log2)
        alpha = gl.exp2(row_max - joint)
        row_sum = row_sum * alpha + gl.exp2(sink_log2 - joint)
        row_max = joint
        acc = rescale(acc, alpha)
    value = rescale(acc, 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)).to(out.dtype.element_ty)
    if out.dtype.element_ty.primitive_bitwidth == 16:
        value = gl.convert_layout(value, row_layout(PLAN.dv))
    rows = row + gl.arange(0, PLAN.tile_m, layout=gl.SliceLayout(1, value.type.layout))
    columns = gl.arange(0, PLAN.dv, layout=gl.SliceLayout(0, value.type.layout))
    if packed is None:
        out += batch.to(gl.int64) * (out_strides[0] + zero)
    out += head.to(gl.int64) * (out_strides[2] + zero)
    out_rows = out + (q_start + rows).to(gl.int64) * (out_strides[1] + zero)
    pointers = out_rows[:, None] + columns[None, :]
    mask = (rows < length_q)[:, None]
    if PLAN.dv_valid < PLAN.dv:
        mask = mask & (columns < PLAN.dv_valid)[None, :]
    gl.store(pointers, value, mask=mask)
    if lse is not None:
        if packed is None:
            lse += batch.to(gl.int64) * (lse_strides[0] + zero)
        lse += head.to(gl.int64) * (lse_strides[1] + zero)
        rows = row + gl.arange(0, PLAN.tile_m, layout=row_max.type.layout)
        row_lse = (row_max + gl.log2(row_sum)) * LN_2
        gl.store(lse + q_start + rows, row_lse, mask=rows < length_q)
