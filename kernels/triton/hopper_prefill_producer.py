"""The producer warp of hopper_prefill.py: takes work tiles, issues all TMA loads."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from cute_fmha.kernels.triton.hopper_splitkv import kv_tile_ranges


# ------------------------------------------------------------------------------ work tiles
@gluon.jit
def locate(ticket, sizes, sequences, PLAN: gl.constexpr):
    """Ticket -> (batch, head, first query row, q start, q length, k start, k length)."""
    length_q, length_k, heads_q, _group, batch_heads, section, tiles_m = sizes
    first = ticket // (section * tiles_m) * section
    ticket -= first * tiles_m
    width = gl.minimum(section, batch_heads - first)
    tile = ticket // width
    head = first + ticket % width
    if PLAN.window_right:
        tile = tiles_m - 1 - tile
    batch = head // heads_q
    head = head % heads_q
    cu_q, cu_k, seqused = sequences
    q_start = 0
    k_start = 0
    if cu_q is not None:
        q_start = gl.load(cu_q + batch)
        length_q = gl.load(cu_q + batch + 1) - q_start
        k_start = gl.load(cu_k + batch)
        length_k = gl.load(cu_k + batch + 1) - k_start
    if seqused is not None:
        length_k = gl.load(seqused + batch)
    return batch, head, tile * PLAN.tile_m * PLAN.consumers, q_start, length_q, k_start, length_k


@gluon.jit
def post(work, fields, sWork, barriers):
    """Hand a work tile to the consumers, who then neither divide nor read global memory."""
    slot = work % 2
    mbarrier.wait(barriers.work_empty.index(slot), ((work // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mail = sWork.index(slot)
    for i in gl.static_range(8):
        mail.slice(i, 1).store(gl.full([1], fields[i], gl.int32, layout))
    mbarrier.arrive(barriers.work_full.index(slot), count=1)


# ------------------------------------------------------------------------------ producer
@gluon.jit
def load_k(descs, buffers, barriers, place, row, ring, PLAN: gl.constexpr):
    batch, head = place
    slot = ring % PLAN.k_stages
    full = barriers.k_full.index(slot)
    mbarrier.wait(barriers.k_empty.index(slot), ((ring // PLAN.k_stages) & 1) ^ 1)
    mbarrier.expect(full, PLAN.tile_n * (PLAN.d0 + PLAN.d1) * 2)
    tma.async_copy_global_to_shared(descs[2], [batch, row, head, 0], full, buffers.sK0.index(slot))
    if PLAN.d1 > 0:
        tma.async_copy_global_to_shared(
            descs[3], [batch, row, head, PLAN.d0], full, buffers.sK1.index(slot)
        )


@gluon.jit
def load_v(desc, buffers, barriers, place, row, ring, PLAN: gl.constexpr):
    """V of one tile; with skip-softmax only once a warpgroup has voted to keep the tile.

    The barrier of a tile that nobody needs is completed without data, so that ring positions
    stay those of the KV tiles.
    """
    CONSUMERS: gl.constexpr = PLAN.consumers
    batch, head = place
    slot = ring % PLAN.v_stages
    phase = (ring // PLAN.v_stages) & 1
    full = barriers.v_full.index(slot)
    wanted = ring < 0
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    for c in gl.static_range(CONSUMERS if PLAN.skip else 1):
        fetch = not wanted
        if PLAN.skip:
            vote = slot * CONSUMERS + c
            mbarrier.wait(barriers.voted.index(vote), phase)
            fetch = fetch & (gl.max(buffers.sKeep.index(vote).load(layout), axis=0) > 0)
        if fetch:
            mbarrier.wait(barriers.v_empty.index(slot), phase ^ 1)
            mbarrier.expect(full, PLAN.tile_n * PLAN.dv * 2)
            stage = buffers.sV.index(slot)
            tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full, stage)
        wanted = wanted | fetch
    if PLAN.skip and not wanted:
        mbarrier.wait(barriers.v_empty.index(slot), phase ^ 1)
        mbarrier.arrive(full, count=1)


@gluon.jit
def load(arguments, PLAN: gl.constexpr):
    """Reads: q, k, v, sequence bounds, votes. Writes: sQ, sK, sV, sWork. Waits: *_empty, voted.
    Signals: *_full. Registers: PLAN.registers[1]."""
    descs, buffers, barriers, sizes, sequences, window, total, counters = arguments
    CONSUMERS: gl.constexpr = PLAN.consumers
    ring = 0
    loaded = 0
    work = 0
    ticket = gl.program_id(0)
    # The grid has no more programs than there are tickets, so the first condition changes nothing;
    # it tells the compiler that the loop runs, which spares it a register across all partitions.
    while (work == 0) | (ticket < total):
        batch, head, row, q_start, length_q, k_start, length_k = locate(
            ticket, sizes, sequences, PLAN
        )
        begin, _f0, _f1, end = kv_tile_ranges(
            row, gl.minimum(row + PLAN.tile_m * CONSUMERS, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        if row >= length_q:
            end = begin
        fields = (batch, head, row, q_start, length_q, length_k, ring - begin, loaded)
        post(work, fields, buffers.sWork, barriers)
        work += 1
        if sequences[0] is not None:
            batch = 0
        place = (batch, head // sizes[3])
        if begin < end:
            for c in gl.static_range(CONSUMERS):
                full = barriers.q_full.index(c)
                q_row = q_start + row + c * PLAN.tile_m
                mbarrier.wait(barriers.q_empty.index(c), (loaded & 1) ^ 1)
                mbarrier.expect(full, PLAN.tile_m * (PLAN.d0 + PLAN.d1) * 2)
                tma.async_copy_global_to_shared(
                    descs[0], [batch, q_row, head, 0], full, buffers.sQ0.index(c)
                )
                if PLAN.d1 > 0:
                    tma.async_copy_global_to_shared(
                        descs[1], [batch, q_row, head, PLAN.d0], full, buffers.sQ1.index(c)
                    )
            loaded += 1
            k_row = k_start + begin * PLAN.tile_n
            load_k(descs, buffers, barriers, place, k_row, ring, PLAN)
        for tile in range(begin, end):
            k_row = k_start + tile * PLAN.tile_n
            if tile + 1 < end:
                load_k(descs, buffers, barriers, place, k_row + PLAN.tile_n, ring + 1, PLAN)
            load_v(descs[4], buffers, barriers, place, k_row, ring, PLAN)
            ring += 1
        ticket = gl.num_programs(0) + gl.atomic_add(counters, 1, sem="relaxed")
    post(work, (-1, 0, 0, 0, 0, 0, 0, 0), buffers.sWork, barriers)
    # The last CTA to stop leaves both counters at zero for the next launch.
    if gl.atomic_add(counters + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)
