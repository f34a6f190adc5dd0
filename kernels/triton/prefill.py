"""Portable prefill: one program per (query tile, query head, sequence), KV looped inside.

Mathematics: online softmax over KV tiles in ascending order. With running max m, sum l and
accumulator O, each tile S = q Kᵀ · scale · log2 e gives

    m' = max(m, rowmax S),  P = exp2(S − m'),  l = l · exp2(m − m') + rowsum P,
    O = O · exp2(m − m') + P V,

and the output O / l leaves once (Milakov & Gimelshein 2018; Dao 2022).

Shapes: q tile ``[TILE_M, D]``, K and V tiles ``[TILE_N, D]``, ``[TILE_N, Dv]``; D is taken as
D0 + D1 (192 = 128 + 64, 96 = 64 + 32) because Triton's tiles are powers of two.

Loop: ``[begin, full_begin)`` masked, ``[full_begin, full_end)`` without any mask instruction,
``[full_end, end)`` masked (tiling.py). Without skipping the middle loop is branch-free and software
pipelined. With skip-softmax the V load and P V sit behind the tile's decision.

Constraints: any sm_80+ GPU and the interpreter; tiles of a block mask are whole kernel tiles.
"""

import triton
import triton.language as tl

from cute_fmha.kernels.triton.primitives import (
    DEAD_MAX,
    LOG2_E,
    NO_MAX,
    add_sink,
    cap_scores,
    count_tiles,
    key_rows,
    kv_tile_ranges,
    load_rows,
    mask_scores,
    normalise,
    sequence_bounds,
    skip_threshold,
    tile_matters,
)


@triton.jit
def _kv_loop(
    state, q0, q1, positions, tile_begin, tile_end, keys, table, lengths, window_left, window_right,
    scores, softcap, mask_row, mask_block_n, log2_threshold,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, SKIP: tl.constexpr,
    BOUNDARY: tl.constexpr,
):  # fmt: skip
    """KV tiles [tile_begin, tile_end); state is (acc, row max, row sum, skipped tiles, kept)."""
    acc, row_max, row_sum, skipped, total = state
    k_base, v_base, k_strides, v_strides, page_size = keys
    length_q, length_k = lengths
    scale_log2, scale = scores
    TILE_N: tl.constexpr = TILES[1]
    D0: tl.constexpr = DIMS[0]
    D1: tl.constexpr = DIMS[1]
    D: tl.constexpr = DIMS[2]
    DV_PAD: tl.constexpr = DIMS[3]
    DV: tl.constexpr = DIMS[4]
    for tile in tl.range(tile_begin, tile_end):
        visible = True
        if mask_row is not None:
            visible = tl.load(mask_row + (tile * TILE_N) // mask_block_n) != 0
        if visible:
            columns = tile * TILE_N + tl.arange(0, TILE_N)
            valid = columns < length_k
            k_rows = key_rows(k_base, columns, length_k, k_strides, table, page_size, BOUNDARY)
            k0 = load_rows(k_rows, valid, 0, D0, D, BOUNDARY)
            s = tl.dot(q0, k0.T, input_precision="ieee")
            if D1 > 0:
                k1 = load_rows(k_rows, valid, D0, D1, D, BOUNDARY)
                s = tl.dot(q1, k1.T, s, input_precision="ieee")
            multiplier = scale_log2
            if softcap is not None:
                s = cap_scores(s * scale, softcap, q0.dtype == tl.float32)
                multiplier = 1.0
            if BOUNDARY:
                s = mask_scores(
                    s, positions, columns, length_q, length_k, window_left, window_right, WINDOWED
                )
            tile_max = tl.max(s, axis=1) * multiplier
            total += 1
            keep = True
            if SKIP:
                keep = tile_matters(tile_max, row_max, log2_threshold)
            if keep:
                new_max = tl.maximum(row_max, tile_max)
                p = tl.exp2(s * multiplier - new_max[:, None])
                alpha = tl.exp2(row_max - new_max)
                row_sum = row_sum * alpha + tl.sum(p, axis=1)
                acc = acc * alpha[:, None]
                v_rows = key_rows(v_base, columns, length_k, v_strides, table, page_size, BOUNDARY)
                v = load_rows(v_rows, valid, 0, DV_PAD, DV, BOUNDARY)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
                row_max = new_max
            else:
                skipped += 1
    return acc, row_max, row_sum, skipped, total


@triton.jit
def prefill_kernel(
    q, k, v, out, lse,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    sequences, paging, mask, mask_blocks, window, scores, skip, stats, sizes,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, SKIP: tl.constexpr,
    SKIP_RELATIVE: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Tuples: sequences (cu_q, cu_k, seqused), paging (table, table
    stride, page size), mask_blocks (strides, block_m, block_n), window (left, right), scores
    (scale, softcap, sink), skip (tensor, value), sizes (Sq, Sk, heads q, group)."""
    TILE_M: tl.constexpr = TILES[0]
    DV_PAD: tl.constexpr = DIMS[3]
    length_q, length_k, heads_q, group = sizes
    tiles_m = tl.cdiv(length_q, TILE_M)
    # Heads of one group are neighbours (they share K and V in L2); the longest causal tiles first.
    head = tl.program_id(0) % heads_q
    tile_m = tiles_m - 1 - tl.program_id(0) // heads_q
    batch = tl.program_id(1)
    q_start, length_q = sequence_bounds(batch, sequences[0], None, length_q)
    k_start, length_k = sequence_bounds(batch, sequences[1], sequences[2], length_k)
    window_left = window[0] if WINDOWED[0] else -1
    window_right = window[1] if WINDOWED[1] else -1
    row_begin = tile_m * TILE_M
    if row_begin >= length_q:
        return
    kv_head = head // group
    positions = row_begin + tl.arange(0, TILE_M)
    live = positions < length_q
    q_row0 = q + head * q_strides[2]
    out_row0 = out + head * out_strides[2]
    if sequences[0] is None:
        q_row0 += batch.to(tl.int64) * q_strides[0]
        out_row0 += batch.to(tl.int64) * out_strides[0]
    rows = (q_start + positions).to(tl.int64)
    q_rows = q_row0 + rows * q_strides[1]
    q0 = load_rows(q_rows, live, 0, DIMS[0], DIMS[2], True)
    q1 = q0
    if DIMS[1] > 0:
        q1 = load_rows(q_rows, live, DIMS[0], DIMS[1], DIMS[2], True)
    k_base = k + kv_head.to(tl.int64) * k_strides[2]
    v_base = v + kv_head.to(tl.int64) * v_strides[2]
    table = paging[0]
    if table is not None:
        table += batch.to(tl.int64) * paging[1]
    elif sequences[1] is None:
        k_base += batch.to(tl.int64) * k_strides[0]
        v_base += batch.to(tl.int64) * v_strides[0]
    else:
        k_base += k_start.to(tl.int64) * k_strides[1]
        v_base += k_start.to(tl.int64) * v_strides[1]
    mask_row = mask
    if mask is not None:
        mask_strides = mask_blocks[0]
        mask_row += batch * mask_strides[0] + head * mask_strides[1]
        mask_row += (row_begin // mask_blocks[1]) * mask_strides[2]
    log2_threshold = float("-inf")
    if SKIP:
        log2_threshold = skip_threshold(skip[0], skip[1], length_k, SKIP_RELATIVE)
    begin, full_begin, full_end, end = kv_tile_ranges(
        row_begin, tl.minimum(row_begin + TILE_M, length_q), length_q, length_k,
        window_left, window_right, TILES[1],
    )  # fmt: skip
    state = (
        tl.zeros([TILE_M, DV_PAD], tl.float32),
        tl.where(live, NO_MAX, DEAD_MAX),
        tl.zeros([TILE_M], tl.float32),
        tl.full((), 0, tl.int32),
        tl.full((), 0, tl.int32),
    )
    keys = (k_base, v_base, k_strides, v_strides, paging[2])
    lengths = (length_q, length_k)
    scale = (scores[0] * LOG2_E, scores[0])
    if WINDOWED[0]:
        state = _kv_loop(
            state, q0, q1, positions, begin, full_begin, keys, table, lengths, window_left,
            window_right, scale, scores[1], mask_row, mask_blocks[2], log2_threshold, TILES,
            DIMS, WINDOWED, SKIP, True,
        )  # fmt: skip
    state = _kv_loop(
        state, q0, q1, positions, full_begin, full_end, keys, table, lengths, window_left,
        window_right, scale, scores[1], mask_row, mask_blocks[2], log2_threshold, TILES,
        DIMS, WINDOWED, SKIP, False,
    )  # fmt: skip
    state = _kv_loop(
        state, q0, q1, positions, full_end, end, keys, table, lengths, window_left,
        window_right, scale, scores[1], mask_row, mask_blocks[2], log2_threshold, TILES,
        DIMS, WINDOWED, SKIP, True,
    )  # fmt: skip
    acc, row_max, row_sum, skipped, total = state
    if scores[2] is not None:
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, tl.load(scores[2] + head))
    result, row_lse = normalise(acc, row_max, row_sum)
    columns = tl.arange(0, DIMS[3])
    out_pointers = (out_row0 + rows * out_strides[1])[:, None] + columns[None, :]
    tl.store(
        out_pointers, result.to(out.dtype.element_ty),
        mask=live[:, None] & (columns < DIMS[4])[None, :],
    )  # fmt: skip
    if lse is not None:
        lse_row = lse + head.to(tl.int64) * lse_strides[1]
        if sequences[0] is None:
            lse_row += batch.to(tl.int64) * lse_strides[0]
        tl.store(lse_row + rows, row_lse, mask=live)
    if stats is not None:
        count_tiles(stats, skipped, total)
