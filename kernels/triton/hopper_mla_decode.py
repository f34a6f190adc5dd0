"""Absorbed MLA decode for Hopper (sm_90a): two consumer warpgroups share each latent tile.

Mathematics: as in decode.py. A work tile is 64 packed rows (position-major, then head) of one
sequence; the latent is visited in blocks of 64 tokens, two at a time: even block b0, odd block b1.
O (64 × 512 FP32) fills the registers of two warpgroups, so each owns 256 value columns:

    left   owns O[:, :256] and the scores of b0      right  owns O[:, 256:] and the scores of b1

Every probability tile is needed by both, so it is made once and handed over in shared memory. The
blocks keep their sequential order (b1's running max builds on b0's), hence the two warpgroups run
half a phase apart and one's softmax hides behind the other's tensor-core work (the schedule of
FlashMLA's Hopper kernel; ideas, not code).

| partition | warps | role |
| --- | --- | --- |
| left (default) | 4 | S0 = Q K0ᵀ, P0, O_L += P0 V0_L + P1 V1_L |
| right | 4 | S1 = Q K1ᵀ, P1, O_R += P1 V1_R + P0 V0_R |
| load | 1 | TMA of K0, K1 in halves, page indices prefetched by one pair |

Shared memory, 226 KiB: Q left and right 2 × 32, K0 and K1 2 × (32 + 32 + 8), P0 and P1 2 × 8; Q's
rope columns start in P0 and P1 and move to registers. A latent tile is fetched once: K-major for
Q Kᵀ, and its first 512 columns MN-major for P V.

One steady-state pair (time runs down; [n] is the barrier that is waited for):

    load            left                                   right
    K0 L -> slot    [K0] S0 = Q K0ᵀ                        [K1] S1 = Q K1ᵀ
    K1 R -> slot    m0 = max(m, rowmax S0), P0   -> max0   [max0] m1 = max(m0, rowmax S1), P1
    K0 R -> slot    O_L = a O_L + P0 V0_L  -> free K0 L    P1 to shared memory     -> p1
    K1 L -> slot    [p1] P0 and O_L to the scale of m1     O_R = a O_R + P1 V1_R   -> free K1 R
                    P0 to shared memory          -> p0     [p0] O_R += P0 V0_R     -> free K0 R
                    O_L += P1 V1_L         -> free K1 L

A half-block's slot is refilled as soon as its last reader is done, which keeps TMA busy although
shared memory holds only the pair in flight.

Split-KV: tickets, arrivals and combine programs exactly as in decode.py (two arrivals a split).

Pages: a page that is a multiple of 64 tokens comes by TMA (`load`, 1 warp). Smaller or unevenly
spaced pages are gathered row by row with cp.async (`gather`, 4 warps).

Constraints: 576/512 or 512/512, rows on 16-byte boundaries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cute_fmha.kernels.triton.hopper_mla_producer import BLOCK, COPY_LAYOUT, ROPE, gather, load
from cute_fmha.kernels.triton.hopper_splitkv import (
    HALF,
    O_LAYOUT,
    O_ROWS,
    ROWS,
    combine,
    kv_tile_ranges,
    skip_threshold,
    split_tile_range,
    store_half,
    warpgroup_barrier,
)
from cute_fmha.kernels.triton.primitives import DEAD_MAX, LOG2_E, NO_MAX

# Scalars of a work tile in shared memory.
ROW_BEGIN, GROUP, LENGTH_Q, LENGTH_K, WINDOW_LEFT, WINDOW_RIGHT, BATCH, LO, HI = map(
    gl.constexpr, range(9)
)
FACTS = gl.constexpr(64)

_S_MMA = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
S_LAYOUT = gl.constexpr(_S_MMA)
S_ROWS = gl.constexpr(gl.SliceLayout(1, _S_MMA))
S_COLUMNS = gl.constexpr(gl.SliceLayout(0, _S_MMA))
Q_ROPE_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, _S_MMA, 2))
FACT_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
VOTES_LAYOUT = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))


@gluon.jit
def _signal(barrier):
    """Announce this warpgroup's shared-memory writes to generic and tensor-core readers."""
    fence_async_shared()
    warpgroup_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _zero_rows(half, valid):
    """Zero token rows >= valid of a [64, 256] half-block: 0 · NaN must not reach O."""
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, COPY_LAYOUT))
    for part in gl.static_range(4):
        chunk = half.slice(part * 64, 64, dim=1)
        values = chunk.load(COPY_LAYOUT)
        chunk.store(gl.where((rows < valid)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _wait_full(barrier, phase, GATHER: gl.constexpr):
    """Wait for a half-block; cp.async wrote it through the generic proxy, wgmma reads past that."""
    mbarrier.wait(barrier, phase)
    if GATHER:
        fence_async_shared()


@gluon.jit
def _scores(
    q, q_rope, k, k_rope, full, phase, zero,
    BLOCK_INDEX: gl.constexpr, HAS_ROPE: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """S = Q Kᵀ of block 0 or 1 of the pair.

    zero: 0, but unknown to the compiler, which would otherwise hoist some forty matrix descriptors
    out of the loop and spill them. (It is block >> 30, and the block comes from shared memory: of a
    computed one the compiler may know the range.)
    """
    k_left = k.index(2 * BLOCK_INDEX + zero).permute((1, 0))
    k_right = k.index(2 * BLOCK_INDEX + 1 + zero).permute((1, 0))
    s = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    _wait_full(full[2 * BLOCK_INDEX], phase, GATHER)
    s = warpgroup_mma(q.index(zero), k_left, s, use_acc=False, is_async=True)
    _wait_full(full[2 * BLOCK_INDEX + 1], phase, GATHER)
    s = warpgroup_mma(q.index(1 + zero), k_right, s, is_async=True)
    if HAS_ROPE:
        rope = k_rope.index(BLOCK_INDEX + zero).permute((1, 0))
        s = warpgroup_mma(q_rope, rope, s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _fact(facts, i: gl.constexpr):
    """A scalar of the work tile, read where it is used: most are not needed in the steady loop."""
    return gl.max(facts.slice(i, 1).load(FACT_LAYOUT), axis=0)


@gluon.jit
def _reload(facts, place, target):
    """``place`` and ``target`` with what shared memory knows: else the addresses of the output are
    computed before the loop and carried, spilled, through it."""
    _row_begin, slot, arrivals, row_stats, partials = place
    _batch, _live_rows, _group, out, out_strides, lse_strides = target
    group = _fact(facts, GROUP)
    place = (_fact(facts, ROW_BEGIN), slot, arrivals, row_stats, partials)
    live_rows = _fact(facts, LENGTH_Q) * group
    target = (_fact(facts, BATCH), live_rows, group, out, out_strides, lse_strides)
    return place, target


@gluon.jit
def _log2_scores(
    s, block, bounds, left_half, right_half, facts, scale, softcap, WINDOWED: gl.constexpr
):
    """Scale to log2 units, cap, and mask where the block is not wholly visible.

    Rows of the latent past the sequence's end are zeroed there as well.
    """
    if softcap is not None:
        e = gl.exp2(s * (scale * 2.0 * LOG2_E / softcap))
        s = (softcap * LOG2_E) * (1.0 - 2.0 / (e + 1.0))
    else:
        s = s * (scale * LOG2_E)
    if (block < bounds[0]) | (block >= bounds[1]):
        length_k = _fact(facts, LENGTH_K)
        if (block + 1) * BLOCK > length_k:
            _zero_rows(left_half, length_k - block * BLOCK)
            _zero_rows(right_half, length_k - block * BLOCK)
        # Of an arange, every thread would keep sixteen induction variables through the loop.
        columns = block * BLOCK + facts.slice(FACTS, BLOCK).load(S_COLUMNS)
        visible = (columns < length_k)[None, :]
        if WINDOWED[0] or WINDOWED[1]:
            rows = _fact(facts, ROW_BEGIN) + gl.arange(0, ROWS, layout=S_ROWS)
            diagonal = rows // _fact(facts, GROUP) + (length_k - _fact(facts, LENGTH_Q))
            if WINDOWED[1]:
                limit = diagonal + _fact(facts, WINDOW_RIGHT)
                visible = visible & (columns[None, :] <= limit[:, None])
            if WINDOWED[0]:
                limit = diagonal - _fact(facts, WINDOW_LEFT)
                visible = visible & (columns[None, :] >= limit[:, None])
        s = gl.where(visible, s, float("-inf"))
    return s


@gluon.jit
def _scaled(acc, factor):
    return acc * gl.convert_layout(factor, O_ROWS)[:, None]


@gluon.jit
def _multiply_add(acc, p, v):
    """acc + P V, complete on return: the slot of V is free."""
    acc = warpgroup_mma(p, v, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _read_vote(votes):
    """1 if any of a block's 64 row flags is set, else 0: a load and one redux in every warp.

    gl.max of the flags where they are made would put two more barriers before P V.
    """
    return gl.max(votes.load(VOTES_LAYOUT), axis=0)


@gluon.jit
def _copy_queries(
    q_base, q_strides, row_begin, live_rows, group, FIRST: gl.constexpr, WIDTH: gl.constexpr, shared
):
    """Columns [FIRST, FIRST + WIDTH) of the work tile's rows to shared memory, any strides."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = row_begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    pointers = q_base + (rows // group).to(gl.int64) * q_strides[1] + (rows % group) * q_strides[2]
    columns = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    mask = (rows < live_rows)[:, None]
    shared.store(gl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0))


@gluon.jit
def _fetch_queries(
    q, probabilities, q_ready, q_base, q_strides, row_begin, live_rows, group,
    HALF_INDEX: gl.constexpr, HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """Each consumer brings its half of Q; returns its own copy of the rope columns in registers.

    The rope columns pass through the consumer's probability tile, which is not in use yet.
    """
    staging = probabilities.index(HALF_INDEX)
    if HAS_ROPE:
        _copy_queries(q_base, q_strides, row_begin, live_rows, group, 2 * HALF, ROPE, staging)
    half = q.index(HALF_INDEX)
    _copy_queries(q_base, q_strides, row_begin, live_rows, group, HALF_INDEX * HALF, HALF, half)
    _signal(q_ready)
    q_rope = staging.load(Q_ROPE_LAYOUT)
    # All of the warpgroup has its rope registers before P is written over them.
    warpgroup_barrier()
    mbarrier.wait(q_ready, 0)
    return q_rope


@gluon.jit
def _begin(
    query, q, probabilities, q_ready, facts, HALF_INDEX: gl.constexpr, HAS_ROPE: gl.constexpr
):
    """A consumer fetches Q. Returns its range of blocks, its rope columns of Q, and its running
    maximum, sum and O before any block."""
    q_base, q_strides = query
    lo = _fact(facts, LO)
    hi = _fact(facts, HI)
    row_begin = _fact(facts, ROW_BEGIN)
    group = _fact(facts, GROUP)
    live_rows = _fact(facts, LENGTH_Q) * group
    q_rope = _fetch_queries(
        q, probabilities, q_ready, q_base, q_strides, row_begin, live_rows, group, HALF_INDEX,
        HAS_ROPE,
    )  # fmt: skip
    rows = row_begin + gl.arange(0, ROWS, layout=S_ROWS)
    row_max = gl.where(rows < live_rows, NO_MAX, DEAD_MAX)
    row_sum = gl.zeros([ROWS], gl.float32, S_ROWS)
    acc = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
    return lo, hi, q_rope, row_max, row_sum, acc


@gluon.jit
def _left_partition(
    arguments, HAS_ROPE: gl.constexpr, WINDOWED: gl.constexpr, SKIP: gl.constexpr,
    NUM_SPLITS: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Left. Reads K0, V0_L, V1_L, P1. Writes P0, max0, O_L.

    Waits: K0 and K1_L `full`, `p1`. Signals: `max0`, `p0`, `empty` of K0_L and K1_L.
    """
    shared, query, bounds, scores, log2_threshold, place, target, per_row, stats = arguments
    q, k, k_rope, probabilities, maxima, votes, full, empty, announced, q_ready, facts = shared
    scale, softcap, sink = scores
    lo, hi, q_rope, row_max, row_sum, acc = _begin(
        query, q, probabilities, q_ready, facts, 0, HAS_ROPE
    )
    skipped = lo * 0
    for block in range(lo, hi, 2):
        phase = ((block - lo) >> 1) & 1
        zero = block >> 30
        odd = block + 1 < hi
        s = _scores(q, q_rope, k, k_rope, full, phase, zero, 0, HAS_ROPE, GATHER)
        s = _log2_scores(
            s, block, bounds, k.index(zero), k.index(1 + zero), facts, scale, softcap, WINDOWED
        )
        tile_max = gl.max(s, axis=1)
        # A tile that is skipped raises no row's max, so max0 does not wait for the decision.
        max0 = gl.maximum(row_max, tile_max)
        p = gl.exp2(s - max0[:, None])
        maxima[0].store(max0)
        probabilities.index(0).store(p.to(probabilities.dtype))
        votes0 = votes.index(2 * phase)
        if SKIP:
            votes0.store((tile_max >= row_max + log2_threshold).to(gl.int32))
        _signal(announced[0])
        keep0 = 1
        if SKIP:
            keep0 = _read_vote(votes0)
            skipped += 1 - keep0
        if keep0 != 0:
            alpha = gl.exp2(row_max - max0)
            row_sum = row_sum * alpha + gl.sum(p, axis=1)
            acc = _multiply_add(_scaled(acc, alpha), probabilities.index(zero), k.index(zero))
        mbarrier.arrive(empty[0], count=1)
        mbarrier.wait(announced[1], phase)
        row_max = maxima[1].load(S_ROWS)
        keep1 = 1
        if SKIP:
            keep1 = _read_vote(votes.index(2 * phase + 1))
        if odd & (keep1 != 0):
            alpha = gl.exp2(max0 - row_max)
            row_sum = row_sum * alpha
            _wait_full(full[2], phase, GATHER)
            acc = _multiply_add(
                _scaled(acc, alpha), probabilities.index(1 + zero), k.index(2 + zero)
            )
        mbarrier.arrive(empty[2], count=1, pred=odd)
    maxima[0].store(row_sum)
    _signal(announced[0])
    mbarrier.wait(announced[1], ((hi - lo + 1) >> 1) & 1)
    row_sum += maxima[1].load(S_ROWS)
    place, target = _reload(facts, place, target)
    store_half(
        acc, row_max, row_sum, skipped, hi - lo, place, target, sink, per_row, stats, 0, NUM_SPLITS
    )


@gluon.jit
def _right_partition(
    arguments, HAS_ROPE: gl.constexpr, WINDOWED: gl.constexpr, SKIP: gl.constexpr,
    NUM_SPLITS: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Right. Reads K1, V1_R, V0_R, P0, max0. Writes P1, max1, O_R.

    Waits: K1 and K0_R `full`, `max0`, `p0`. Signals: `p1` (with max1), `empty` of K1_R and K0_R.
    """
    shared, query, bounds, scores, log2_threshold, place, target, per_row, stats = arguments
    q, k, k_rope, probabilities, maxima, votes, full, empty, announced, q_ready, facts = shared
    scale, softcap, sink = scores
    lo, hi, q_rope, row_max, row_sum, acc = _begin(
        query, q, probabilities, q_ready, facts, 1, HAS_ROPE
    )
    skipped = lo * 0
    for block in range(lo + 1, hi + 1, 2):
        phase = ((block - lo) >> 1) & 1
        zero = block >> 30
        odd = block < hi
        s = gl.full([ROWS, BLOCK], float("-inf"), gl.float32, S_LAYOUT)
        if odd:
            s = _scores(q, q_rope, k, k_rope, full, phase, zero, 1, HAS_ROPE, GATHER)
            s = _log2_scores(
                s, block, bounds, k.index(2 + zero), k.index(3 + zero), facts, scale, softcap,
                WINDOWED,
            )  # fmt: skip
        tile_max = gl.max(s, axis=1)
        mbarrier.wait(announced[0], phase)
        max0 = maxima[0].load(S_ROWS)
        max1 = gl.maximum(max0, tile_max)
        p = gl.exp2(s - max1[:, None])
        maxima[1].store(max1)
        probabilities.index(1).store(p.to(probabilities.dtype))
        votes1 = votes.index(2 * phase + 1)
        if SKIP:
            votes1.store((tile_max >= max0 + log2_threshold).to(gl.int32))
        _signal(announced[1])
        keep0 = 1
        keep1 = 1
        if SKIP:
            keep0 = _read_vote(votes.index(2 * phase))
            keep1 = _read_vote(votes1)
            skipped += gl.where(odd, 1 - keep1, 0)
        if keep0 != 0:
            alpha = gl.exp2(row_max - max0)
            row_sum = row_sum * alpha
            _wait_full(full[1], phase, GATHER)
            acc = _multiply_add(_scaled(acc, alpha), probabilities.index(zero), k.index(1 + zero))
        mbarrier.arrive(empty[1], count=1)
        if odd & (keep1 != 0):
            alpha = gl.exp2(max0 - max1)
            row_sum = row_sum * alpha + gl.sum(p, axis=1)
            p1 = probabilities.index(1 + zero)
            acc = _multiply_add(_scaled(acc, alpha), p1, k.index(3 + zero))
        mbarrier.arrive(empty[3], count=1, pred=odd)
        row_max = max1
    # Left has read the last max1 when it announces its sum.
    mbarrier.wait(announced[0], ((hi - lo + 1) >> 1) & 1)
    left_sum = maxima[0].load(S_ROWS)
    maxima[1].store(row_sum)
    _signal(announced[1])
    row_sum += left_sum
    place, target = _reload(facts, place, target)
    store_half(
        acc, row_max, row_sum, skipped, 0, place, target, sink, per_row, stats, HALF, NUM_SPLITS
    )


@gluon.jit
def hopper_mla_decode_kernel(
    q, cache, latent, rope, out, per_row, q_strides, cache_strides, out_strides, lse_strides,
    table, table_stride, page_size, lengths, window, scores, skip, stats, sizes, workspace,
    WINDOWED: gl.constexpr, HAS_ROPE: gl.constexpr, SKIP: gl.constexpr,
    SKIP_RELATIVE: gl.constexpr, NUM_SPLITS: gl.constexpr, COMBINE_ROWS: gl.constexpr,
    SPLIT_BLOCK: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """See the module docstring. latent, rope: TMA descriptors of the cache as [rows, width] with
    64 x 256 and 64 x 64 boxes. Tuples: window (left, right), scores (scale, softcap, sink), skip
    (tensor, value), sizes (Sq, heads, batch), workspace (counters, row stats, partials)."""
    length_q, group, batches = sizes
    counters, row_stats, partials = workspace
    tiles_m = (length_q * group + ROWS - 1) // ROWS
    work_tiles = tiles_m * batches
    program = gl.program_id(0)
    if NUM_SPLITS > 1:
        program = gl.atomic_add(counters, 1, sem="relaxed")
    if program < work_tiles * NUM_SPLITS:
        # Neighbours share keys: the query tiles of one (sequence, split) run together.
        tile_m = program % tiles_m
        split = (program // tiles_m) % NUM_SPLITS
        batch = program // (tiles_m * NUM_SPLITS)
        work_tile = batch * tiles_m + tile_m
        arrivals = counters
        if NUM_SPLITS > 1:
            arrivals = counters + 2 + work_tile
        row_begin = tile_m * ROWS
        place = (row_begin, work_tile * NUM_SPLITS + split, arrivals, row_stats, partials)
        target = (batch, length_q * group, group, out, out_strides, lse_strides)
        _main(
            q, cache, latent, rope, per_row, q_strides, cache_strides,
            table + batch.to(gl.int64) * table_stride, page_size,
            gl.load(lengths + batch), length_q, split, window, scores, skip, stats, place, target,
            WINDOWED, HAS_ROPE, SKIP, SKIP_RELATIVE, NUM_SPLITS, GATHER,
        )  # fmt: skip
    else:
        if NUM_SPLITS > 1:
            program -= work_tiles * NUM_SPLITS
            work_tile = program // (ROWS // COMBINE_ROWS)
            batch = work_tile // tiles_m
            row_begin = (work_tile % tiles_m) * ROWS
            place = (row_begin, work_tile, counters + 2 + work_tile, row_stats, partials)
            target = (batch, length_q * group, group, out, out_strides, lse_strides)
            first = (program % (ROWS // COMBINE_ROWS)) * COMBINE_ROWS
            combine(
                work_tile, first, place, target, scores[2], per_row, NUM_SPLITS, COMBINE_ROWS,
                SPLIT_BLOCK,
            )  # fmt: skip
            combine_programs = work_tiles * (ROWS // COMBINE_ROWS)
            if gl.atomic_add(counters + 1, 1, sem="acq_rel") == combine_programs - 1:
                layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
                for begin_index in range(0, work_tiles + 2, 1024):
                    index = begin_index + gl.arange(0, 1024, layout=layout)
                    gl.store(counters + index, gl.zeros_like(index), mask=index < work_tiles + 2)


@gluon.jit
def _main(
    q, cache, latent, rope, per_row, q_strides, cache_strides, table, page_size, length_k,
    length_q, split, window, scores, skip, stats, place, target,
    WINDOWED: gl.constexpr, HAS_ROPE: gl.constexpr, SKIP: gl.constexpr,
    SKIP_RELATIVE: gl.constexpr, NUM_SPLITS: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Allocate, fetch Q, initialise the barriers, run the three partitions."""
    batch = target[0]
    row_begin = place[0]
    group = target[2]
    window_left = window[0] if WINDOWED[0] else -1
    window_right = window[1] if WINDOWED[1] else -1
    begin, full_begin, full_end, end = kv_tile_ranges(
        row_begin // group, gl.minimum((row_begin + ROWS - 1) // group + 1, length_q), length_q,
        length_k, window_left, window_right, BLOCK,
    )  # fmt: skip
    lo, hi = split_tile_range(begin, end, split, NUM_SPLITS)
    dtype: gl.constexpr = q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    row_vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_shared = gl.allocate_shared_memory(dtype, [2, ROWS, HALF], wide)
    k = gl.allocate_shared_memory(dtype, [4, BLOCK, HALF], wide)
    probabilities = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK], wide)
    k_rope = probabilities
    if HAS_ROPE:
        k_rope = gl.allocate_shared_memory(dtype, [2, BLOCK, ROPE], wide)
    maxima = (
        gl.allocate_shared_memory(gl.float32, [ROWS], row_vector),
        gl.allocate_shared_memory(gl.float32, [ROWS], row_vector),
    )
    # Row flags of blocks 0 and 1 of a pair, twice: a warp may be a pair ahead of its warpgroup's
    # slowest, but not two, for every pair has a barrier.
    votes = gl.allocate_shared_memory(gl.int32, [4, ROWS], row_vector)
    # Scalars in [0, FACTS), then 0 … 63.
    facts = gl.allocate_shared_memory(gl.int32, [2 * BLOCK], row_vector)
    facts.slice(FACTS, BLOCK).store(gl.arange(0, BLOCK, layout=FACT_LAYOUT))
    values = (row_begin, group, length_q, length_k, window_left, window_right, batch, lo, hi)
    for i in gl.static_range(9):
        facts.slice(i, 1).store(gl.full([1], 0, gl.int32, FACT_LAYOUT) + values[i])
    # full and empty of K0 L, K0 R, K1 L, K1 R; P0 with max0, P1 with max1: one arrival
    # each. Q: one of each consumer.
    barriers = gl.allocate_shared_memory(gl.int64, [11, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(4):
        mbarrier.init(barriers.index(index), count=128 if GATHER else 1)
    for index in gl.static_range(4, 10):
        mbarrier.init(barriers.index(index), count=1)
    q_ready = barriers.index(10)
    mbarrier.init(q_ready, count=2)
    full = (barriers.index(0), barriers.index(1), barriers.index(2), barriers.index(3))
    empty = (barriers.index(4), barriers.index(5), barriers.index(6), barriers.index(7))
    announced = (barriers.index(8), barriers.index(9))

    q_base = q + batch.to(gl.int64) * q_strides[0]
    log2_threshold = float("-inf")
    if SKIP:
        log2_threshold = skip_threshold(skip[0], skip[1], length_k, SKIP_RELATIVE)
    block_range = (lo, hi)
    shared = (
        q_shared, k, k_rope, probabilities, maxima, votes, full, empty, announced, q_ready, facts
    )  # fmt: skip
    query = (q_base, q_strides)
    bounds = (full_begin, full_end)
    consumer = (
        shared, query, bounds, scores, log2_threshold, place, target, per_row, stats
    )  # fmt: skip
    # Registers of (right, load); left gets the rest of 504.
    if GATHER:
        gl.warp_specialize(
            [
                (_left_partition, (consumer, HAS_ROPE, WINDOWED, SKIP, NUM_SPLITS, GATHER)),
                (_right_partition, (consumer, HAS_ROPE, WINDOWED, SKIP, NUM_SPLITS, GATHER)),
                (gather, (cache, cache_strides, k, k_rope, full, empty, block_range,
                    table, page_size, length_k, HAS_ROPE)),
            ],
            [4, 4],
            [224, 48],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_left_partition, (consumer, HAS_ROPE, WINDOWED, SKIP, NUM_SPLITS, GATHER)),
                (_right_partition, (consumer, HAS_ROPE, WINDOWED, SKIP, NUM_SPLITS, GATHER)),
                (load, (latent, rope, k, k_rope, full, empty, block_range, table,
                    page_size, HAS_ROPE)),
            ],
            [4, 1],
            [232, 24],
        )  # fmt: skip
