"""The producer warps of hopper_mla_decode.py: latent blocks by TMA, or gathered row by row."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from cute_fmha.kernels.triton.hopper_splitkv import HALF

BLOCK = gl.constexpr(64)
ROPE = gl.constexpr(64)

COPY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def load(
    latent, rope, k, k_rope, full, empty, block_range, table, page_size, HAS_ROPE: gl.constexpr
):
    """Writes K0, K1 in halves. Waits: each half's `empty`. Signals: each half's `full`."""
    lo, hi = block_range
    half_bytes: gl.constexpr = BLOCK * HALF * 2
    rope_bytes: gl.constexpr = BLOCK * ROPE * 2 if HAS_ROPE else 0
    pairs = (hi - lo + 1) // 2
    last = hi - 1
    # An empty range has no page to look up.
    tokens0 = lo * BLOCK
    tokens1 = gl.maximum(gl.minimum(lo + 1, last), lo) * BLOCK
    page0 = gl.load(table + tokens0 // page_size, mask=lo < hi, other=0)
    page1 = gl.load(table + tokens1 // page_size, mask=lo < hi, other=0)
    for pair in range(pairs):
        phase = (pair & 1) ^ 1
        row0 = page0 * page_size + tokens0 % page_size
        row1 = page1 * page_size + tokens1 % page_size
        odd = lo + 2 * pair + 1 < hi
        # The next pair's pages, so that their latency hides behind this pair's waits.
        tokens0 = gl.minimum(lo + 2 * pair + 2, last) * BLOCK
        tokens1 = gl.minimum(lo + 2 * pair + 3, last) * BLOCK
        page0 = gl.load(table + tokens0 // page_size)
        page1 = gl.load(table + tokens1 // page_size)

        mbarrier.wait(empty[0], phase)
        mbarrier.expect(full[0], half_bytes)
        tma.async_copy_global_to_shared(latent, [row0, 0], full[0], k.index(0))

        mbarrier.wait(empty[1], phase)
        mbarrier.expect(full[1], half_bytes + rope_bytes)
        tma.async_copy_global_to_shared(latent, [row0, HALF], full[1], k.index(1))
        if HAS_ROPE:
            tma.async_copy_global_to_shared(rope, [row0, 2 * HALF], full[1], k_rope.index(0))

        mbarrier.wait(empty[2], phase, pred=odd)
        mbarrier.expect(full[2], half_bytes, pred=odd)
        tma.async_copy_global_to_shared(latent, [row1, 0], full[2], k.index(2), pred=odd)

        mbarrier.wait(empty[3], phase, pred=odd)
        mbarrier.expect(full[3], half_bytes + rope_bytes, pred=odd)
        tma.async_copy_global_to_shared(latent, [row1, HALF], full[3], k.index(3), pred=odd)
        if HAS_ROPE:
            tma.async_copy_global_to_shared(
                rope, [row1, 2 * HALF], full[3], k_rope.index(1), pred=odd
            )


@gluon.jit
def _token_rows(block, block_end, cache, cache_strides, table, page_size, length_k):
    """Pointers to the 64 latent rows of a block through the page table, and which of them exist."""
    tokens = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, COPY_LAYOUT))
    exists = (tokens < length_k) & (block < block_end)
    page = gl.load(table + tokens // page_size, mask=exists, other=0)
    # Strides come in units of 8 elements: the factor tells the compiler of 16-byte alignment.
    units = page.to(gl.int64) * cache_strides[0] + (tokens % page_size) * cache_strides[1]
    return cache + units * 8, exists


@gluon.jit
def _gather_columns(rows, exists, FIRST: gl.constexpr, WIDTH: gl.constexpr, destination):
    """cp.async of columns [FIRST, FIRST + WIDTH) of the rows into one half-block, or rope block."""
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY_LAYOUT))
    for part in gl.static_range(WIDTH // 64):
        pointers = rows[:, None] + (FIRST + part * 64 + columns)[None, :]
        target = destination.slice(part * 64, 64, dim=1)
        async_copy.async_copy_global_to_shared(target, pointers, mask=exists[:, None])


@gluon.jit
def gather(
    cache, cache_strides, k, k_rope, full, empty, block_range, table, page_size, length_k,
    HAS_ROPE: gl.constexpr,
):  # fmt: skip
    """For pages smaller than a block: as `load` with cp.async, row by row.

    Every thread's copies arrive on `full` (128 arrivals). Consumers fence the proxies.
    """
    lo, hi = block_range
    for pair in range((hi - lo + 1) // 2):
        phase = (pair & 1) ^ 1
        block = lo + 2 * pair
        rows0, exists0 = _token_rows(block, hi, cache, cache_strides, table, page_size, length_k)
        rows1, exists1 = _token_rows(
            block + 1, hi, cache, cache_strides, table, page_size, length_k
        )
        mbarrier.wait(empty[0], phase)
        _gather_columns(rows0, exists0, 0, HALF, k.index(0))
        async_copy.mbarrier_arrive(full[0], increment_count=False)
        mbarrier.wait(empty[1], phase)
        _gather_columns(rows0, exists0, HALF, HALF, k.index(1))
        if HAS_ROPE:
            _gather_columns(rows0, exists0, 2 * HALF, ROPE, k_rope.index(0))
        async_copy.mbarrier_arrive(full[1], increment_count=False)
        if block + 1 < hi:
            mbarrier.wait(empty[2], phase)
            _gather_columns(rows1, exists1, 0, HALF, k.index(2))
            async_copy.mbarrier_arrive(full[2], increment_count=False)
            mbarrier.wait(empty[3], phase)
            _gather_columns(rows1, exists1, HALF, HALF, k.index(3))
            if HAS_ROPE:
                _gather_columns(rows1, exists1, 2 * HALF, ROPE, k_rope.index(1))
            async_copy.mbarrier_arrive(full[3], increment_count=False)
