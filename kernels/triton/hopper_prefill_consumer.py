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
    DEAD_MAX,
    LN_2,
    LOG2_E,
    NO_MAX,
    kv_tile_ranges,
    skip_threshold,
    warpgroup_barrier,
)


# ------------------------------------------------------------------------------ softmax
@gluon.jit
def mask_scores(s, row, column, lengths, window, PLAN: gl.constexpr):
    """−inf where a key is past the sequence's end or outside the window (see tiling.py)."""
    length_q, length_k = lengths
    columns = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    rows = row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, s.type.layout))
    diagonal = rows + (length_k - length_q)
    limit = gl.full_like(rows, 0) + (length_k - 1)
    if PLAN.window_right:
        limit = gl.minimum(limit, diagonal + window[1])
    visible = columns[None, :] <= limit[:, None]
    if PLAN.window_left:
        visible = visible & (columns[None, :] >= (diagonal - window[0])[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def finish_scores(s, scores, row, column, lengths, window, MASK: gl.constexpr, PLAN: gl.constexpr):
    """(s, multiplier, row maxima): softcap and mask applied; multiplier · s is in log2 units."""
    multiplier = scores[0]
    if PLAN.softcap:
        e = gl.exp2(s * (2.0 * LOG2_E * scores[1] / scores[2]))
        s = (scores[2] * LOG2_E) * (1.0 - 2.0 / (e + 1.0))
        multiplier = 1.0
    if MASK:
        s = mask_scores(s, row, column, lengths, window, PLAN)
    return s, multiplier, row_maxima(s) * multiplier


@gluon.jit
def row_maxima(s):
    """Row maxima: pairs first (independent instructions), then this thread's, then the quad's."""
    ROWS: gl.constexpr = s.shape[0]
    COLUMNS: gl.constexpr = s.shape[1]
    x = gl.max(s.reshape([ROWS, COLUMNS // 8, 4, 2]), axis=3)
    x = gl.max(gl.max(x, axis=1), axis=1)
    return gl.convert_layout(x, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


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
    """The next work tile: (batch or −1 for none, head, first row, q start, q and k length)."""
    slot = work % 2
    mbarrier.wait(barriers.work_full.index(slot), (work // 2) & 1)
    mail = sWork.index(slot)
    batch = read_field(mail, 0)
    head = read_field(mail, 1)
    first = read_field(mail, 2)
    q_start = read_field(mail, 3)
    length_q = read_field(mail, 4)
    length_k = read_field(mail, 5)
    mbarrier.arrive(barriers.work_empty.index(slot), count=1)
    return batch, head, first, q_start, length_q, length_k


@gluon.jit
def issue_scores(
    q_tiles, buffers, ring, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr
):
    """Start S = Q Kᵀ. With skip-softmax at 256, the descriptors of Q would be hoisted out of loops
    and spilled; ring >> 30 is 0, which the compiler does not know. At 128 it adds spills."""
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
def vote(row_votes, ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """One flag per row, for the producer to reduce: whether the row needs the tile's V.

    No deadlock, no lost phase: a warpgroup votes on tile n + v_stages after reading K of n + 2 or
    later, which the producer loads once it has every vote on n and has read the flags.
    """
    slot = (ring % PLAN.v_stages) * PLAN.consumers + WHO
    buffers.sKeep.index(slot).store(row_votes)
    # The arrival is one thread's; the flags are everyone's.
    warpgroup_barrier()
    mbarrier.arrive(barriers.voted.index(slot), count=1)


@gluon.jit
def vote_all(keep, ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """The same vote for every row, where it does not depend on the scores."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    row_votes = gl.full([PLAN.tile_m], keep, gl.int32, layout)
    vote(row_votes, ring, buffers, barriers, WHO, PLAN)


@gluon.jit
def decide(
    tile_max, row_max, log2_threshold, ring, buffers, barriers, WHO: gl.constexpr,
    PLAN: gl.constexpr,
):  # fmt: skip
    """Vote; returns 0 if no row has tile_max >= row_max + log2 λ, else 1.

    Every warp reduces the 64 flags by itself: a load and one redux behind the vote's barrier.
    gl.max over the warpgroup takes two more barriers and five shuffles.
    """
    row_votes = (tile_max >= row_max + log2_threshold).to(gl.int32)
    vote(row_votes, ring, buffers, barriers, WHO, PLAN)
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
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
        s, multiplier, tile_max = finish_scores(
            s, scores, row, tile * PLAN.tile_n, lengths, window, MASK, PLAN
        )
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
            s, multiplier, tile_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = decide(tile_max, row_max, log2_threshold, ring, buffers, barriers, WHO, PLAN)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        else:
            raw = issue_scores(q_tiles, buffers, ring, WHO, PLAN, LAYOUT)
            pass_turn(barriers, WHO, PLAN)
            raw = warpgroup_mma_wait(0, deps=(raw,))
            mbarrier.arrive(barriers.k_empty.index(slot), count=1)
            s, multiplier, tile_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = decide(tile_max, row_max, log2_threshold, ring, buffers, barriers, WHO, PLAN)
            mbarrier.wait(barriers.v_full.index(last), phase)
        mbarrier.arrive(barriers.v_empty.index(last), count=1)
        if not PLAN.q_in_registers:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=tile == end - 1)
        pending = keep > 0
        if pending:
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
            keep = (rows + i * 16 < valid)[:, None]
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
        rows = row + gl.arange(0, PLAN.tile_m, layout=ROWS)
        row_max = gl.where(rows < lengths[0], NO_MAX, DEAD_MAX)
    row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
    p, _alpha, row_max, row_sum = softmax(
        s, row_maxima(s) * multiplier, multiplier, row_max, row_sum
    )
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
    ring = 0
    loaded = 0
    work = 0
    batch, head, first, q_start, length_q, length_k = receive(work, buffers.sWork, barriers)
    while batch >= 0:
        work += 1
        row = first + WHO * PLAN.tile_m
        all_begin, _f0, _f1, all_end = kv_tile_ranges(
            first, gl.minimum(first + PLAN.tile_m * PLAN.consumers, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        begin, full_begin, full_end, end = kv_tile_ranges(
            row, gl.minimum(row + PLAN.tile_m, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        if first >= length_q:
            all_end = all_begin
        if (row >= length_q) | (begin >= end):
            begin = all_end
            end = all_end
        offset = ring - all_begin
        for tile in range(all_begin, begin):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        if all_begin < all_end:
            mbarrier.wait(barriers.q_full.index(WHO), loaded & 1)
            loaded += 1
        acc = gl.full([PLAN.tile_m, PLAN.dv], 0.0, gl.float32, O_LAYOUT)
        row_max = gl.full([PLAN.tile_m], NO_MAX, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
        skipped = begin * 0
        if begin < end:
            log2_threshold = 0.0
            if PLAN.skip:
                log2_threshold = skip_threshold(skip[0], skip[1], length_k, PLAN.skip_relative)
            acc, row_max, row_sum, skipped = attend(
                begin, (full_begin, full_end), (offset, end, row), buffers, barriers,
                ((length_q, length_k), window, scores, log2_threshold), WHO, PLAN,
                S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
        elif all_begin < all_end:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1)
        for tile in range(end, all_end):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        ring = offset + all_end
        if row < length_q:
            place = (batch, head, row, q_start, length_q)
            store(outputs, acc, row_max, row_sum, place, scores[3], packed, PLAN)
            if stats is not None:
                gl.atomic_add(stats, skipped.to(gl.int64), sem="relaxed")
                gl.atomic_add(stats + 1, (end - begin).to(gl.int64), sem="relaxed")
        batch, head, first, q_start, length_q, length_k = receive(work, buffers.sWork, barriers)


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
def store(outputs, acc, row_max, row_sum, place, sink, packed, PLAN: gl.constexpr):
    """Normalise, round once, store rows below the sequence's length; LSE in natural units."""
    out, out_strides, lse, lse_strides = outputs
    batch, head, row, q_start, length_q = place
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
        out += batch.to(gl.int64) * out_strides[0]
    out += head.to(gl.int64) * out_strides[2]
    pointers = (out + (q_start + rows).to(gl.int64) * out_strides[1])[:, None] + columns[None, :]
    mask = (rows < length_q)[:, None]
    if PLAN.dv_valid < PLAN.dv:
        mask = mask & (columns < PLAN.dv_valid)[None, :]
    gl.store(pointers, value, mask=mask)
    if lse is not None:
        if packed is None:
            lse += batch.to(gl.int64) * lse_strides[0]
        lse += head.to(gl.int64) * lse_strides[1]
        rows = row + gl.arange(0, PLAN.tile_m, layout=row_max.type.layout)
        row_lse = (row_max + gl.log2(row_sum)) * LN_2
        gl.store(lse + q_start + rows, row_lse, mask=rows < length_q)
