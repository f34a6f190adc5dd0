"""Exact tile ranges and the split-KV partition: one source for every backend and every test.

The functions are plain integer arithmetic on non-negative operands, so the same definitions are
called from Python (specification, planning, tests) and compiled into device code
(``triton.jit(kv_tile_ranges)``). They therefore import nothing and divide only what is >= 0,
where C-like and Python division agree.

Query row ``i`` of ``seqlen_q`` may attend to key ``j`` of ``seqlen_k`` when

    i + shift - window_left <= j <= i + shift + window_right,   shift = seqlen_k - seqlen_q

(the diagonal is aligned to the bottom right; a negative window side is unbounded; causal is
``window_right = 0``).
"""


def ceil_div(a, b):
    """The quotient a / b rounded up, for a >= 0 and b > 0."""
    return (a + b - 1) // b


def kv_tile_ranges(row_begin, row_end, seqlen_q, seqlen_k, window_left, window_right, tile_n):
    """KV tiles that query rows ``[row_begin, row_end)`` of one sequence need.

    Returns ``(begin, full_begin, full_end, end)`` in tiles of ``tile_n`` keys with
    ``begin <= full_begin <= full_end <= end``. Tiles outside ``[begin, end)`` are wholly masked
    for every row; tiles in ``[full_begin, full_end)`` are wholly unmasked for every row; only the
    rest need mask instructions.
    """
    shift = seqlen_k - seqlen_q
    col_begin = 0
    full_col_begin = 0
    col_end = seqlen_k
    full_col_end = seqlen_k
    if window_right >= 0:
        col_end = min(seqlen_k, row_end + shift + window_right)
        full_col_end = min(seqlen_k, row_begin + shift + window_right + 1)
    if window_left >= 0:
        col_begin = max(0, row_begin + shift - window_left)
        full_col_begin = max(0, row_end - 1 + shift - window_left)
    begin = col_begin // tile_n
    end = (max(col_end, 0) + tile_n - 1) // tile_n
    if col_end <= col_begin:
        end = begin
    full_begin = min(max((full_col_begin + tile_n - 1) // tile_n, begin), end)
    full_end = min(max(max(full_col_end, 0) // tile_n, full_begin), end)
    return begin, full_begin, full_end, end


def split_tile_range(begin, end, split, num_splits):
    """Tiles ``[lo, hi)`` of split ``split``: contiguous, balanced to one tile, possibly empty.

    The partition of a sequence depends only on its own tile count and ``num_splits``, never on
    the rest of the batch: that is what makes a fixed ``num_splits`` batch-invariant.
    """
    count = end - begin
    lo = begin + count * split // num_splits
    hi = begin + count * (split + 1) // num_splits
    return lo, hi


def tiles_before_cut(position, count, overhead, least):
    """Tiles of a work tile with ``count`` of them that lie before a cut at cost ``position`` of it.

    A work tile costs ``overhead`` (in tiles) to begin, then one for each tile. A cut that would
    leave a piece of fewer than ``least`` tiles moves to the near end. The result grows with
    ``position`` from 0 to ``count`` and depends on nothing else, so that both sides of a cut agree.
    """
    tiles = 0
    if position > 0:
        if position - overhead >= least:
            tiles = position - overhead
        if tiles + least > count:
            tiles = count
    return tiles


def equal_share(total, workers, overhead, least):
    """Cost that each of ``workers`` takes of ``total``: all the same, and two neighbouring cuts are
    far enough apart for a piece of ``least`` tiles between them."""
    return max((total + workers - 1) // workers, overhead + least)
