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

from cute_fmha import tiling


def _device(function):
    """`triton.jit` of plain integer arithmetic from a module that knows nothing of Triton: the
    interpreter looks for ``tl`` among a function's globals."""
    names = {**function.__globals__, "tl": tl}
    return triton.jit(types.FunctionType(function.__code__, names, function.__name__))


kv_tile_ranges = _device(tiling.kv_tile_ranges)
split_tile_range = _device(tiling.split_tile_range)

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
def cap_scores(s, softcap, PRECISE: tl.constexpr):
    """``c · tanh(s / c)`` for natural-unit ``s``, in log2 units.

    PRECISE: near 0 the exponential form is off by c · 2⁻²⁴, which float32 inputs would show; a
    series to the 11th power takes its place there.
    """
    e = tl.exp2(s * (2.0 * LOG2_E / softcap))
    tanh = 1.0 - 2.0 / (e + 1.0)
    if PRECISE:
        x = s / softcap
        z = x * x
        series = 62.0 / 2835.0 + z * (-1382.0 / 155925.0)
        series = 1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * series)))
        tanh = tl.where(z < 0.09, x * series, tanh)
    return (softcap * LOG2_E) * tanh


@triton.jit
def mask_scores(
    s, positions, columns, length_q, length_k, window_left, window_right, WINDOWED: tl.constexpr
):
    """−inf where a key is past the sequence's end or outside the window (see tiling.py)."""
    diagonal = positions + (length_k - length_q)
    visible = (columns < length_k)[None, :]
    if WINDOWED[1]:
        visible = visible & (columns[None, :] <= (diagonal + window_right)[:, None])
    if WINDOWED[0]:
        visible = visible & (columns[None, :] >= (diagonal - window_left)[:, None])
    return tl.where(visible, s, float("-inf"))


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
    return tl.max((tile_max >= running_max + log2_threshold).to(tl.int32), axis=0) > 0


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
def count_tiles(stats, skipped, total):
    """Add this work tile's (skipped, total) KV tiles to the device counters."""
    tl.atomic_add(stats, skipped.to(tl.int64), sem="relaxed")
    tl.atomic_add(stats + 1, total.to(tl.int64), sem="relaxed")
