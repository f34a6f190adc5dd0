"""How hopper_mla_decode.py gets its result out: the store of O halves and the combine of splits.

Tickets, counters and workspace are those of decode.py, with two arrivals a split (one for each
half of O). Also what the Gluon kernels share with the others, compiled by Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from cute_fmha import tiling
from cute_fmha.kernels.triton import primitives
from cute_fmha.kernels.triton.primitives import LN_2, LOG2_E, NO_MAX, device_function

ROWS = gl.constexpr(64)
HALF = gl.constexpr(256)

_O_MMA = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
O_LAYOUT = gl.constexpr(_O_MMA)
O_ROWS = gl.constexpr(gl.SliceLayout(1, _O_MMA))
O_COLUMNS = gl.constexpr(gl.SliceLayout(0, _O_MMA))

# Triton 3.6 calls it thread_barrier, 3.7 barrier.
warpgroup_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


kv_tile_ranges = device_function(tiling.kv_tile_ranges, gluon.jit, gl)
split_tile_range = device_function(tiling.split_tile_range, gluon.jit, gl)
skip_threshold = device_function(primitives.skip_threshold.fn, gluon.jit, gl)


@gluon.jit
def store_rows(
    acc, row_max, row_sum, rows, columns, target, sink, per_row, STORE_PER_ROW: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Sink, normalise, and store rows (any layout) of the output and what is asked of ``per_row``:
    (LSE, largest logit before the sink)."""
    lse, max_logits = per_row
    batch, live_rows, group, out, out_strides, lse_strides = target
    live = rows < live_rows
    position = (rows // group).to(gl.int64)
    head = rows % group
    index = batch.to(gl.int64) * lse_strides[0] + head.to(gl.int64) * lse_strides[1] + position
    if max_logits is not None and STORE_PER_ROW:
        largest = gl.where(row_sum == 0.0, float("-inf"), row_max * LN_2)
        gl.store(max_logits + index, largest, mask=live)
    if sink is not None:
        sink_log2 = gl.load(sink + head) * LOG2_E
        joint_max = gl.maximum(row_max, sink_log2)
        alpha = gl.exp2(row_max - joint_max)
        row_sum = row_sum * alpha + gl.exp2(sink_log2 - joint_max)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, LAYOUT))[:, None]
        row_max = joint_max
    divisor = gl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, LAYOUT))[:, None]
    out_row = out + batch.to(gl.int64) * out_strides[0] + position * out_strides[1]
    out_row = gl.convert_layout(out_row + head * out_strides[2], gl.SliceLayout(1, LAYOUT))
    mask = gl.convert_layout(live, gl.SliceLayout(1, LAYOUT))[:, None]
    gl.store(out_row[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None and STORE_PER_ROW:
        gl.store(lse + index, (row_max + gl.log2(row_sum)) * LN_2, mask=live)


@gluon.jit
def store_half(
    acc, row_max, row_sum, skipped, total, place, target, sink, per_row, stats,
    FIRST_COLUMN: gl.constexpr, NUM_SPLITS: gl.constexpr,
):  # fmt: skip
    """One half of O: to the output (one split), or with m and l to the workspace (several)."""
    row_begin, slot, arrivals, row_stats, partials = place
    lane = gl.arange(0, ROWS, layout=O_ROWS)
    columns = FIRST_COLUMN + gl.arange(0, HALF, layout=O_COLUMNS)
    row_max = gl.convert_layout(row_max, O_ROWS)
    row_sum = gl.convert_layout(row_sum, O_ROWS)
    if stats is not None:
        gl.atomic_add(stats, skipped.to(gl.int64), sem="relaxed")
        if FIRST_COLUMN == 0:
            gl.atomic_add(stats + 1, total.to(gl.int64), sem="relaxed")
    if NUM_SPLITS == 1:
        store_rows(
            acc, row_max, row_sum, row_begin + lane, columns, target, sink, per_row,
            FIRST_COLUMN == 0, O_LAYOUT,
        )  # fmt: skip
    else:
        base = slot.to(gl.int64) * ROWS
        pointers = (partials + (base + lane) * (2 * HALF))[:, None] + columns[None, :]
        gl.store(pointers, acc, mask=(row_begin + lane < target[1])[:, None])
        if FIRST_COLUMN == 0:
            gl.store(row_stats + 2 * base + lane, row_max)
            gl.store(row_stats + 2 * base + ROWS + lane, row_sum)
        # Every thread's partial stores come before the release that announces them.
        warpgroup_barrier()
        gl.atomic_add(arrivals, 1, sem="release")


@gluon.jit
def combine(
    work_tile, first, place, target, sink, per_row,
    NUM_SPLITS: gl.constexpr, COMBINE_ROWS: gl.constexpr, SPLIT_BLOCK: gl.constexpr,
):  # fmt: skip
    """Reduce COMBINE_ROWS rows of one work tile, once both halves of every split arrived."""
    # (row, split, column): a thread owns four columns of everything, so only columns move.
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, 4], [2, 1, 0])
    stats_layout: gl.constexpr = gl.SliceLayout(2, layout)
    out_layout: gl.constexpr = gl.SliceLayout(1, layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, stats_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, out_layout)
    ROW_BLOCK: gl.constexpr = min(COMBINE_ROWS, 16 // SPLIT_BLOCK)
    row_begin, _slot, arrivals, row_stats, partials = place
    while gl.atomic_add(arrivals, 0, sem="acquire") < 2 * NUM_SPLITS:
        pass
    columns = gl.arange(0, 2 * HALF, layout=column_layout)
    for offset in range(first, first + COMBINE_ROWS, ROW_BLOCK):
        lane = offset + gl.arange(0, ROW_BLOCK, layout=row_layout)
        row_max = gl.full([ROW_BLOCK], NO_MAX, gl.float32, row_layout)
        row_sum = gl.zeros([ROW_BLOCK], gl.float32, row_layout)
        acc = gl.zeros([ROW_BLOCK, 2 * HALF], gl.float32, out_layout)
        for split_begin in range(0, NUM_SPLITS, SPLIT_BLOCK):
            split = split_begin + gl.arange(0, SPLIT_BLOCK, layout=gl.SliceLayout(0, stats_layout))
            slots = (work_tile.to(gl.int64) * NUM_SPLITS + split)[None, :] * ROWS
            present = ((split < NUM_SPLITS)[None, :]) & (row_begin + lane < target[1])[:, None]
            m_pointers = row_stats + 2 * slots + lane[:, None]
            m = gl.load(m_pointers, mask=present, other=NO_MAX, cache_modifier=".cg")
            sums = gl.load(m_pointers + ROWS, mask=present, other=0.0, cache_modifier=".cg")
            o_pointers = (partials + (slots + lane[:, None]) * (2 * HALF))[:, :, None]
            o = gl.load(
                o_pointers + gl.expand_dims(columns[None, :], 1), mask=present[:, :, None],
                other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            new_max = gl.maximum(row_max, gl.max(m, axis=1))
            weight = gl.exp2(m - new_max[:, None])
            alpha = gl.exp2(row_max - new_max)
            row_sum = row_sum * alpha + gl.sum(sums * weight, axis=1)
            alpha = gl.convert_layout(alpha, gl.SliceLayout(1, out_layout))
            acc = acc * alpha[:, None] + gl.sum(o * weight[:, :, None], axis=1)
            row_max = new_max
        store_rows(
            acc, row_max, row_sum, row_begin + lane, columns, target, sink, per_row, True,
            out_layout,
        )  # fmt: skip
