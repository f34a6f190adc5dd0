"""Portable prefill: one program per (query tile, query head, sequence), KV looped inside.

Mathematics: online softmax over KV tiles in ascending order. With running max m, sum l and
accumulator O, each tile S = q Kᵀ · scale · log2 e gives

    m' = max(m, rowmax S),  P = exp2(S − m'),  l = l · exp2(m − m') + rowsum P,
    O = O · exp2(m − m') + P V,

and the output O / l leaves once (Milakov & Gimelshein 2018; Dao 2022).

Shapes: q tile ``[TILE_M, D]``, K and V tiles ``[TILE_N, D]``, ``[TILE_N, Dv]``; D is taken as
D0 + D1 (192 = 128 + 64, 96 = 64 + 32) because Triton's tiles are powers of two.

The loop itself is `primitives.attend`, which decode.py shares.

Constraints: any sm_80+ GPU and the interpreter; tiles of a block mask are whole kernel tiles.
"""

import triton
import triton.language as tl

from cute_fmha.kernels.triton.primitives import (
    add_sink,
    attend,
    count_tiles,
    kv_tile_ranges,
    load_query,
    normalise,
    query_rows,
    sequence_base,
    sequence_bounds,
    store_rows,
)


@triton.jit
def prefill_kernel(
    q, k, v, out, lse,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    sequences, paging, mask, mask_blocks, window, scores, skip, stats, sizes, epilogue,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, SKIP: tl.constexpr,
    SKIP_RELATIVE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Tuples: sequences (cu_q, cu_k, seqused), paging (table, table
    stride, page size), mask_blocks (strides, block_m, block_n), window (left, right), scores
    (scale, softcap, sink), skip (tensor, value), sizes (Sq, Sk, heads q, group), epilogue as in
    epilogue.py."""
    TILE_M: tl.constexpr = TILES[0]
    PACKED: tl.constexpr = sequences[0] is not None
    PACKED_KEYS: tl.constexpr = sequences[1] is not None
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
    rows = (q_start + positions).to(tl.int64)
    q0, q1 = load_query(query_rows(q, q_strides, batch, rows, head, PACKED), live, DIMS)
    table = paging[0]
    k_base = sequence_base(k, k_strides, batch, k_start, kv_head, table, PACKED_KEYS)
    v_base = sequence_base(v, v_strides, batch, k_start, kv_head, table, PACKED_KEYS)
    if table is not None:
        table += batch.to(tl.int64) * paging[1]
    mask_row = mask
    if mask is not None:
        mask_strides = mask_blocks[0]
        mask_row += batch.to(tl.int64) * mask_strides[0] + head.to(tl.int64) * mask_strides[1]
        mask_row += (row_begin // mask_blocks[1]) * mask_strides[2]
    begin, full_begin, full_end, end = kv_tile_ranges(
        row_begin, tl.minimum(row_begin + TILE_M, length_q), length_q, length_k,
        window_left, window_right, TILES[1],
    )  # fmt: skip
    acc, row_max, row_sum, skipped, total = attend(
        q0, q1, positions, live, begin, full_begin, full_end, end,
        (k_base, v_base, k_strides, v_strides, paging[2]), table, (length_q, length_k), window,
        scores, mask_row, mask_blocks[2], skip, TILES, DIMS, WINDOWED, False, SKIP, SKIP_RELATIVE,
    )  # fmt: skip
    if scores[2] is not None:
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, tl.load(scores[2] + head))
    result, row_lse = normalise(acc, row_max, row_sum)
    store_rows(
        result, row_lse, rows, live, batch, head, out, out_strides, lse, lse_strides, epilogue,
        PACKED, DIMS[4], EPILOGUE,
    )  # fmt: skip
    if stats is not None:
        count_tiles(stats, skipped, total)
