"""Split-KV decode for ordinary heads and for absorbed MLA, combined in the same launch.

Mathematics: as in prefill.py, on rows that pack query positions and the query heads of one KV head
(row m is position m // group, head m % group), so that a decode step fills a tensor-core tile. The
KV tiles of a work tile are cut into ``num_splits`` contiguous, balanced ranges (tiling.py). Split s
leaves (O_s, m_s, l_s) in FP32; then M = max m_s, O = Σ exp2(m_s − M) O_s / Σ exp2(m_s − M) l_s.

MLA (``LATENT``): the value row is the first Dv columns of the key row, so one load of the latent
tile feeds q Kᵀ and P V; the cache crosses the memory bus once.

One launch, no waiting on a program that may not have started: the grid is ``main`` programs (work
tile × split) followed by ``combine`` programs (a few output rows each). Every program draws a
ticket from an atomic counter when it starts and takes the role of that ticket; a combine program
therefore exists only once all main programs are running or done, and may wait for the arrivals of
its work tile. All combine programs reduce in parallel: a single last arriver would read
``num_splits`` tiles alone (66 × 128 KiB for one 128k sequence, tens of microseconds on one SM).
The last combine program zeroes the counters for the next launch. With one split there is no
ticket, no workspace and no combine.

Workspace (see plan.py): counters int32 ``[2 + work tiles]`` (tickets, finished, arrivals of each
work tile), then per (work tile, split) FP32 m ``[TILE_M]``, l ``[TILE_M]``, O ``[TILE_M, Dv]``.

Constraints: any sm_80+ GPU and the interpreter; no block mask (prefill.py takes those).
"""

import triton
import triton.language as tl

from cute_fmha.kernels.triton import plan
from cute_fmha.kernels.triton.primitives import (
    NO_MAX,
    add_sink,
    attend,
    count_tiles,
    kv_tile_ranges,
    largest_logit,
    load_query,
    normalise,
    query_rows,
    sequence_base,
    sequence_bounds,
    split_tile_range,
    store_per_row,
    store_rows,
)

COMBINE_ELEMENTS = tl.constexpr(plan.COMBINE_ELEMENTS)


@triton.jit
def _combine(
    program, q_start, length_q, batch, kv_head, row_begin, out, lse, max_logits, out_strides,
    lse_strides, sink, group, counters, row_stats, partials, epilogue,
    NUM_SPLITS: tl.constexpr, TILES: tl.constexpr, DIMS: tl.constexpr, PACKED: tl.constexpr,
    COMBINE_ROWS: tl.constexpr, SPLIT_BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Reduce the splits of COMBINE_ROWS rows of one work tile, once all of them arrived."""
    TILE_M: tl.constexpr = TILES[0]
    DV: tl.constexpr = DIMS[4]
    DV_PAD: tl.constexpr = DIMS[3]
    ROW_BLOCK: tl.constexpr = (
        COMBINE_ROWS
        if COMBINE_ROWS * SPLIT_BLOCK <= COMBINE_ELEMENTS
        else COMBINE_ELEMENTS // SPLIT_BLOCK
    )
    work_tile = program // (TILE_M // COMBINE_ROWS)
    while tl.atomic_add(counters + 2 + work_tile, 0, sem="acquire") < NUM_SPLITS:
        pass
    columns = tl.arange(0, DIMS[3])
    first = (program % (TILE_M // COMBINE_ROWS)) * COMBINE_ROWS
    for offset in range(first, first + COMBINE_ROWS, ROW_BLOCK):
        lane = offset + tl.arange(0, ROW_BLOCK)
        rows = row_begin + lane
        live = rows < length_q * group
        head = kv_head * group + rows % group
        row_max = tl.full([ROW_BLOCK], NO_MAX, tl.float32)
        row_sum = tl.zeros([ROW_BLOCK], tl.float32)
        acc = tl.zeros([ROW_BLOCK, DV_PAD], tl.float32)
        for split_begin in range(0, NUM_SPLITS, SPLIT_BLOCK):
            split = split_begin + tl.arange(0, SPLIT_BLOCK)
            slots = (work_tile.to(tl.int64) * NUM_SPLITS + split)[None, :] * TILE_M
            present = (split < NUM_SPLITS)[None, :] & live[:, None]
            m_pointers = row_stats + 2 * slots + lane[:, None]
            m = tl.load(m_pointers, mask=present, other=NO_MAX, cache_modifier=".cg")
            sums = tl.load(m_pointers + TILE_M, mask=present, other=0.0, cache_modifier=".cg")
            # A split that saw no key left its O unwritten: whatever is there must not enter. Its
            # sum tells, for the max of a row of NaN scores has not moved either.
            present = sums != 0.0
            o_pointers = (partials + (slots + lane[:, None]) * DV)[:, :, None]
            o = tl.load(
                o_pointers + columns[None, None, :],
                mask=present[:, :, None] & (columns < DV)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_max = tl.maximum(row_max, tl.max(m, axis=1))
            weight = tl.exp2(m - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)
            row_sum = row_sum * alpha + tl.sum(sums * weight, axis=1)
            acc = acc * alpha[:, None] + tl.sum(o * weight[:, :, None], axis=1)
            row_max = new_max
        positions = (q_start + rows // group).to(tl.int64)
        store_per_row(
            largest_logit(row_max, row_sum), positions, live, batch, head, max_logits, lse_strides,
            PACKED,
        )  # fmt: skip
        if sink is not None:
            acc, row_max, row_sum = add_sink(acc, row_max, row_sum, tl.load(sink + head))
        result, row_lse = normalise(acc, row_max, row_sum)
        store_rows(
            result, row_lse, positions, live, batch, head, out,
            out_strides, lse, lse_strides, epilogue, PACKED, DV, EPILOGUE,
        )  # fmt: skip


@triton.jit
def decode_kernel(
    q, k, v, out, lse, max_logits,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    sequences, paging, window, scores, skip, stats, sizes, workspace, epilogue,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, LATENT: tl.constexpr,
    SKIP: tl.constexpr, SKIP_RELATIVE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    COMBINE_ROWS: tl.constexpr, SPLIT_BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Tuples: sequences (cu_q, cu_k, seqused), paging (table, table
    stride, page size), window (left, right), scores (scale, softcap, sink), skip (tensor, value),
    sizes (Sq, Sk, kv heads, group, batch), workspace (counters, row stats, partial outputs),
    epilogue as in epilogue.py."""
    TILE_M: tl.constexpr = TILES[0]
    PACKED: tl.constexpr = sequences[0] is not None
    PACKED_KEYS: tl.constexpr = sequences[1] is not None
    length_q, length_k, kv_heads, group, batches = sizes
    counters, row_stats, partials = workspace
    tiles_m = tl.cdiv(length_q * group, TILE_M)
    work_tiles = tiles_m * kv_heads * batches
    program = tl.program_id(0)
    if NUM_SPLITS > 1:
        program = tl.atomic_add(counters, 1, sem="relaxed")
    is_main = program < work_tiles * NUM_SPLITS
    if is_main:
        # Neighbours share keys: the query tiles of one (sequence, kv head, split) run together.
        tile_m = program % tiles_m
        split = (program // tiles_m) % NUM_SPLITS
        pair = program // (tiles_m * NUM_SPLITS)
    else:
        program -= work_tiles * NUM_SPLITS
        chunk = program // (TILE_M // COMBINE_ROWS)
        tile_m = chunk % tiles_m
        split = 0
        pair = chunk // tiles_m
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    work_tile = pair * tiles_m + tile_m
    q_start, length_q = sequence_bounds(batch, sequences[0], None, length_q)
    k_start, length_k = sequence_bounds(batch, sequences[1], sequences[2], length_k)
    row_begin = tile_m * TILE_M
    if is_main:
        packed_rows = row_begin + tl.arange(0, TILE_M)
        live = packed_rows < length_q * group
        positions = packed_rows // group
        head = kv_head * group + packed_rows % group
        rows = (q_start + positions).to(tl.int64)
        q0, q1 = load_query(query_rows(q, q_strides, batch, rows, head, PACKED), live, DIMS)
        table = paging[0]
        k_base = sequence_base(k, k_strides, batch, k_start, kv_head, table, PACKED_KEYS)
        v_base = sequence_base(v, v_strides, batch, k_start, kv_head, table, PACKED_KEYS)
        if table is not None:
            table += batch.to(tl.int64) * paging[1]
        window_left = window[0] if WINDOWED[0] else -1
        window_right = window[1] if WINDOWED[1] else -1
        last_position = tl.minimum((row_begin + TILE_M - 1) // group + 1, length_q)
        begin, full_begin, full_end, end = kv_tile_ranges(
            row_begin // group, last_position, length_q, length_k, window_left, window_right,
            TILES[1],
        )  # fmt: skip
        if row_begin >= length_q * group:
            end = begin
        lo, hi = split_tile_range(begin, end, split, NUM_SPLITS)
        full_begin = tl.minimum(tl.maximum(full_begin, lo), hi)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), hi)
        acc, row_max, row_sum, skipped, total = attend(
            q0, q1, positions, live, lo, full_begin, full_end, hi,
            (k_base, v_base, k_strides, v_strides, paging[2]), table, (length_q, length_k), window,
            scores, None, 1, skip, TILES, DIMS, WINDOWED, LATENT, SKIP, SKIP_RELATIVE,
        )  # fmt: skip
        if stats is not None:
            count_tiles(stats, skipped, total)
        if NUM_SPLITS == 1:
            store_per_row(
                largest_logit(row_max, row_sum), rows, live, batch, head, max_logits, lse_strides,
                PACKED,
            )  # fmt: skip
            if scores[2] is not None:
                acc, row_max, row_sum = add_sink(acc, row_max, row_sum, tl.load(scores[2] + head))
            result, row_lse = normalise(acc, row_max, row_sum)
            store_rows(
                result, row_lse, rows, live, batch, head, out, out_strides, lse, lse_strides,
                epilogue, PACKED, DIMS[4], EPILOGUE,
            )  # fmt: skip
        else:
            slot = work_tile.to(tl.int64) * NUM_SPLITS + split
            lane = tl.arange(0, TILE_M)
            tl.store(row_stats + slot * (2 * TILE_M) + lane, row_max)
            tl.store(row_stats + slot * (2 * TILE_M) + TILE_M + lane, row_sum)
            if lo < hi:
                columns = tl.arange(0, DIMS[3])
                tl.store(
                    (partials + (slot * TILE_M + lane) * DIMS[4])[:, None] + columns[None, :],
                    acc,
                    mask=live[:, None] & (columns < DIMS[4])[None, :],
                )
            # Every thread's partial stores come before the release that announces them.
            tl.debug_barrier()
            tl.atomic_add(counters + 2 + work_tile, 1, sem="release")
    else:
        if NUM_SPLITS > 1:
            _combine(
                program, q_start, length_q, batch, kv_head, row_begin, out, lse,
                max_logits, out_strides, lse_strides, scores[2], group, counters, row_stats,
                partials, epilogue, NUM_SPLITS, TILES, DIMS, PACKED, COMBINE_ROWS, SPLIT_BLOCK,
                EPILOGUE,
            )  # fmt: skip
            combine_programs = work_tiles * (TILE_M // COMBINE_ROWS)
            if tl.atomic_add(counters + 1, 1, sem="acq_rel") == combine_programs - 1:
                for begin_index in range(0, work_tiles + 2, 1024):
                    index = begin_index + tl.arange(0, 1024)
                    tl.store(counters + index, 0, mask=index < work_tiles + 2)
