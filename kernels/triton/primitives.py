"""Device functions that every Triton kernel here is built from.

Score space: kernels hold scores in log2 units, ``s · scale · log2 e``, so that exp2 and one fused
multiply-add evaluate the softmax. Two sentinels keep −inf − −inf out of the arithmetic:

* a row's running max starts at ``NO_MAX`` (finite): the first visible key always exceeds it, a
  tile of masked scores (−inf) never does;
* a row that does not exist starts at ``DEAD_MAX``: its probabilities are 0 and it never votes to
  keep a tile.
"""

import types

import triton
import triton.language as tl
from triton.runtime import KernelInterface

from cute_fmha import tiling


def device_function(function, jit=triton.jit, language=tl):
    """``jit`` of a plain function in Triton's language from a module that does not import Triton,
    and of the plain functions beside it that it calls; what it calls ``tl`` is ``language``.

    Plain arithmetic gets ``tl``, too: the interpreter looks for it among a function's globals.
    """
    if isinstance(function, KernelInterface):
        return function
    names = {**function.__globals__, "tl": language}
    for name in function.__code__.co_names:
        callee = names.get(name)
        if isinstance(callee, types.FunctionType):
            names[name] = device_function(callee, jit, language)
    twin = types.FunctionType(function.__code__, names, function.__name__)
    twin.__annotations__ = function.__annotations__
    twin.__module__ = function.__module__
    return jit(twin)


kv_tile_ranges = device_function(tiling.kv_tile_ranges)
split_tile_range = device_function(tiling.split_tile_range)

NO_MAX = tl.constexpr(-1.0e30)
DEAD_MAX = tl.constexpr(1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_bounds(index, cu_seqlens, seqused, length):
    """(first row in the tensor, rows) of sequence ``index``; unpacked sequences start at 0."""
    start = 0
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + index)
        length = tl.load(cu_seqlens + index + 1) - start
    if seqused is not None:
        length = tl.load(seqused + index)
    return start, length


@triton.jit
def sequence_base(base, strides, batch, start, head, table, PACKED: tl.constexpr):
    """``base`` moved to one head of one sequence, or of all pages where there is a page table."""
    base += head.to(tl.int64) * strides[2]
    if table is None:
        if PACKED:
            base += start.to(tl.int64) * strides[1]
        else:
            base += batch.to(tl.int64) * strides[0]
    return base


@triton.jit
def query_rows(base, strides, batch, rows, head, PACKED: tl.constexpr):
    """Pointers to ``rows`` (int64, within the batch entry or the packed tensor) of q or out."""
    pointers = base + head.to(tl.int64) * strides[2]
    if not PACKED:
        pointers += batch.to(tl.int64) * strides[0]
    return pointers + rows * strides[1]


@triton.jit
def key_rows(base, columns, length, strides, table, page_size, BOUNDED: tl.constexpr):
    """Pointers to the rows of keys ``columns``: contiguous in a sequence, or through a page table.

    ``strides`` are (page, token). ``BOUNDED`` keeps table reads inside ``length``.
    """
    if table is None:
        rows = base + columns.to(tl.int64) * strides[1]
    else:
        if BOUNDED:
            page = tl.load(table + columns // page_size, mask=columns < length, other=0)
        else:
            page = tl.load(table + columns // page_size)
        rows = base + page.to(tl.int64) * strides[0] + (columns % page_size) * strides[1]
    return rows


@triton.jit
def load_rows(
    rows, valid, BEGIN: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, BOUNDED: tl.constexpr
):
    """``[len(rows), WIDTH]`` elements from column BEGIN; zero beyond END and in invalid rows."""
    columns = BEGIN + tl.arange(0, WIDTH)
    pointers = rows[:, None] + columns[None, :]
    if BOUNDED and BEGIN + WIDTH > END:
        tile = tl.load(pointers, mask=valid[:, None] & (columns < END)[None, :], other=0.0)
    elif BOUNDED:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    elif BEGIN + WIDTH > END:
        tile = tl.load(pointers, mask=(columns < END)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_query(rows, live, DIMS: tl.constexpr):
    """The query tile as its parts of DIMS[0] and DIMS[1] columns; with no second part, the first
    stands for it."""
    q0 = load_rows(rows, live, 0, DIMS[0], DIMS[2], True)
    q1 = q0
    if DIMS[1] > 0:
        q1 = load_rows(rows, live, DIMS[0], DIMS[1], DIMS[2], True)
    return q0, q1


@triton.jit
def cap_scores(s, softcap, PRECISE: tl.constexpr):
    """``c · tanh(s / c)`` for natural-unit ``s``, in log2 units.

    PRECISE: the exponential form is off by c · 2⁻²⁴ whatever s is, which float32 inputs would show
    up to tanh 0.5; there a series to the 19th power takes its place, and beyond it the form is
    used with a positive argument, where its fraction is below 1.
    """
    if PRECISE:
        x = s / softcap
        z = x * x
        series = 6404582.0 / 10854718875.0 + z * (-443861162.0 / 1856156927625.0)
        series = 21844.0 / 6081075.0 + z * (-929569.0 / 638512875.0 + z * series)
        series = 62.0 / 2835.0 + z * (-1382.0 / 155925.0 + z * series)
        series = 1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * series)))
        far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
        tanh = tl.where(z < 0.36, x * series, tl.where(x < 0.0, -far, far))
    else:
        tanh = 1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E / softcap)) + 1.0)
    return (softcap * LOG2_E) * tanh


@triton.jit
def mask_scores(s, positions, columns, length_q, length_k, window, WINDOWED: tl.constexpr):
    """−inf where a key is past the sequence's end or outside the window (see tiling.py)."""
    diagonal = positions + (length_k - length_q)
    visible = (columns < length_k)[None, :]
    if WINDOWED[1]:
        visible = visible & (columns[None, :] <= (diagonal + window[1])[:, None])
    if WINDOWED[0]:
        visible = visible & (columns[None, :] >= (diagonal - window[0])[:, None])
    return tl.where(visible, s, float("-inf"))


@triton.jit
def tile_scores(q0, q1, k_rows, valid, scale, softcap, DIMS: tl.constexpr, BOUNDED: tl.constexpr):
    """(q Kᵀ of one tile, the K tile's first DIMS[0] columns); capped scores are in log2 units,
    others still lack the factor scale · log2 e."""
    k0 = load_rows(k_rows, valid, 0, DIMS[0], DIMS[2], BOUNDED)
    s = tl.dot(q0, k0.T, input_precision="ieee")
    if DIMS[1] > 0:
        k1 = load_rows(k_rows, valid, DIMS[0], DIMS[1], DIMS[2], BOUNDED)
        s = tl.dot(q1, k1.T, s, input_precision="ieee")
    if softcap is not None:
        s = cap_scores(s * scale, softcap, q0.dtype == tl.float32)
    return s, k0


@triton.jit
def skip_threshold(skip_tensor, skip_value, length_k, RELATIVE: tl.constexpr):
    """log2 λ, once per work tile; −inf (never skip) where λ is off. NaN and λ <= 0 are off."""
    value = skip_value
    if skip_tensor is not None:
        value = tl.load(skip_tensor)
    if RELATIVE:
        value = value / tl.maximum(length_k, 1).to(tl.float32)
    log2_value = tl.log2(tl.minimum(tl.where(value > 0.0, value, 1.0), 1.0))
    return tl.where(value > 0.0, log2_value, float("-inf"))


@triton.jit
def tile_matters(tile_max, running_max, log2_threshold):
    """True unless for every row ``tile_max − running_max < log2 λ`` (BLASST, arXiv 2512.12087)."""
    # Reduced from two dimensions: on sm_100, reducing one dimension of anything that follows from a
    # product asks for a layout that does not exist, and Triton (3.6, 3.7) aborts.
    votes = (tile_max >= running_max + log2_threshold).to(tl.int32)
    return tl.max(votes[:, None], axis=0).item() > 0


@triton.jit
def online_softmax(acc, row_max, row_sum, s, multiplier, tile_max):
    """One tile's weights P, and the running state made ready for it: (P, acc, max, sum), where
    only P V is not in it yet."""
    new_max = tl.maximum(row_max, tile_max)
    p = tl.exp2(s * multiplier - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    return p, acc * alpha[:, None], new_max, row_sum * alpha + tl.sum(p, axis=1)


@triton.jit
def _kv_loop(
    state, q0, q1, positions, tile_begin, tile_end, keys, table, lengths, window, scores, mask_row,
    mask_block_n, log2_threshold,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, LATENT: tl.constexpr,
    SKIP: tl.constexpr, BOUNDARY: tl.constexpr,
):  # fmt: skip
    """KV tiles [tile_begin, tile_end); state as `attend` returns it."""
    acc, row_max, row_sum, skipped, total = state
    k_base, v_base, k_strides, v_strides, page_size = keys
    length_q, length_k = lengths
    TILE_N: tl.constexpr = TILES[1]
    multiplier = scores[0] * LOG2_E
    if scores[1] is not None:
        multiplier = 1.0
    for tile in tl.range(tile_begin, tile_end):
        visible = True
        if mask_row is not None:
            visible = tl.load(mask_row + (tile * TILE_N) // mask_block_n) != 0
        if visible:
            columns = tile * TILE_N + tl.arange(0, TILE_N)
            valid = columns < length_k
            k_rows = key_rows(k_base, columns, length_k, k_strides, table, page_size, BOUNDARY)
            s, k0 = tile_scores(q0, q1, k_rows, valid, scores[0], scores[1], DIMS, BOUNDARY)
            if BOUNDARY:
                s = mask_scores(s, positions, columns, length_q, length_k, window, WINDOWED)
            tile_max = tl.max(s, axis=1) * multiplier
            total += 1
            keep = True
            if SKIP:
                keep = tile_matters(tile_max, row_max, log2_threshold)
            if keep:
                p, acc, row_max, row_sum = online_softmax(
                    acc, row_max, row_sum, s, multiplier, tile_max
                )
                if LATENT:
                    v = k0
                else:
                    v_rows = key_rows(
                        v_base, columns, length_k, v_strides, table, page_size, BOUNDARY
                    )
                    v = load_rows(v_rows, valid, 0, DIMS[3], DIMS[4], BOUNDARY)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
            else:
                skipped += 1
    return acc, row_max, row_sum, skipped, total


@triton.jit
def attend(
    q0, q1, positions, live, begin, full_begin, full_end, end, keys, table, lengths, window,
    scores, mask_row, mask_block_n, skip,
    TILES: tl.constexpr, DIMS: tl.constexpr, WINDOWED: tl.constexpr, LATENT: tl.constexpr,
    SKIP: tl.constexpr, SKIP_RELATIVE: tl.constexpr,
):  # fmt: skip
    """KV tiles [begin, end): masked before full_begin and from full_end on, in between without any
    mask instruction. Returns (acc, row max, row sum, skipped tiles, total tiles).

    keys: (K base, V base, K strides, V strides, page size) of one sequence and KV head. ``LATENT``:
    V is the first part of the K tile. The middle loop is branch-free and software pipelined unless
    tiles can be left out; with skip-softmax the V load and P V sit behind the tile's decision.
    """
    TILE_M: tl.constexpr = TILES[0]
    DV_PAD: tl.constexpr = DIMS[3]
    log2_threshold = float("-inf")
    if SKIP:
        log2_threshold = skip_threshold(skip[0], skip[1], lengths[1], SKIP_RELATIVE)
    state = (
        tl.zeros([TILE_M, DV_PAD], tl.float32),
        tl.where(live, NO_MAX, DEAD_MAX),
        tl.zeros([TILE_M], tl.float32),
        tl.full((), 0, tl.int32),
        tl.full((), 0, tl.int32),
    )
    # Without a left window no tile comes before full_begin: that loop is not even compiled.
    if WINDOWED[0]:
        state = _kv_loop(
            state, q0, q1, positions, begin, full_begin, keys, table, lengths, window, scores,
            mask_row, mask_block_n, log2_threshold, TILES, DIMS, WINDOWED, LATENT, SKIP, True,
        )  # fmt: skip
    state = _kv_loop(
        state, q0, q1, positions, full_begin, full_end, keys, table, lengths, window, scores,
        mask_row, mask_block_n, log2_threshold, TILES, DIMS, WINDOWED, LATENT, SKIP, False,
    )  # fmt: skip
    return _kv_loop(
        state, q0, q1, positions, full_end, end, keys, table, lengths, window, scores,
        mask_row, mask_block_n, log2_threshold, TILES, DIMS, WINDOWED, LATENT, SKIP, True,
    )  # fmt: skip


@triton.jit
def add_sink(acc, row_max, row_sum, sink):
    """Let the natural-unit logit ``sink`` join the denominator; rescales ``acc`` to the new max."""
    sink_log2 = sink * LOG2_E
    joint_max = tl.maximum(row_max, sink_log2)
    alpha = tl.exp2(row_max - joint_max)
    row_sum = row_sum * alpha + tl.exp2(sink_log2 - joint_max)
    return acc * alpha[:, None], joint_max, row_sum


@triton.jit
def normalise(acc, row_max, row_sum):
    """(output, natural LSE); a row without a visible key gives 0 and −inf."""
    lse = (row_max + tl.log2(row_sum)) * LN_2
    return acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None], lse


@triton.jit
def largest_logit(row_max, row_sum):
    """The natural-unit maximum of the rows' scores; −inf without a visible key. Sinks join later:
    they are not among the logits."""
    return tl.where(row_sum == 0.0, float("-inf"), row_max * LN_2)


@triton.jit
def store_per_row(values, rows, live, batch, head, target, strides, PACKED: tl.constexpr):
    """FP32 ``values`` of ``rows`` to ``target`` (None: nowhere), ``[B, Hq, Sq]`` or packed."""
    if target is not None:
        target_rows = target + head.to(tl.int64) * strides[1]
        if not PACKED:
            target_rows += batch.to(tl.int64) * strides[0]
        tl.store(target_rows + rows, values, mask=live)


@triton.jit
def store_rows(
    result, row_lse, rows, live, batch, head, out, out_strides, lse, lse_strides, epilogue,
    PACKED: tl.constexpr, DV: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Output and LSE of ``rows`` (as in `query_rows`) where ``live``; EPILOGUE (None: only a cast)
    and its arguments as epilogue.py makes them."""
    WIDTH: tl.constexpr = result.shape[1]
    if EPILOGUE is not None:
        token = rows
        if not PACKED:
            token += batch.to(tl.int64) * epilogue[2]
        heads = head + tl.zeros_like(live).to(tl.int32)
        result = EPILOGUE(result, token, heads, live, epilogue[0], epilogue[1], DV)
    columns = tl.arange(0, result.shape[1])
    out_rows = query_rows(out, out_strides, batch, rows, head, PACKED)
    mask = live[:, None] & (columns < DV * result.shape[1] // WIDTH)[None, :]
    tl.store(out_rows[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=mask)
    store_per_row(row_lse, rows, live, batch, head, lse, lse_strides, PACKED)


@triton.jit
def count_tiles(stats, skipped, total):
    """Add this work tile's (skipped, total) KV tiles to the device counters."""
    tl.atomic_add(stats, skipped.to(tl.int64), sem="relaxed")
    tl.atomic_add(stats + 1, total.to(tl.int64), sem="relaxed")
