"""Tile ranges and the split partition against element masks, exhaustively for small sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_fmha.kernels.triton import primitives
from cute_fmha.tiling import ceil_div, kv_tile_ranges, split_tile_range

device_ranges = primitives.kv_tile_ranges
device_split = primitives.split_tile_range


@triton.jit
def ranges_kernel(
    result, row_begin, row_end, length_q, length_k, left, right, tile_n, split, splits
):
    begin, full_begin, full_end, end = device_ranges(
        row_begin, row_end, length_q, length_k, left, right, tile_n
    )
    lo, hi = device_split(begin, end, split, splits)
    tl.store(result, begin)
    tl.store(result + 1, full_begin)
    tl.store(result + 2, full_end)
    tl.store(result + 3, end)
    tl.store(result + 4, lo)
    tl.store(result + 5, hi)


class CInt(int):
    """An integer that divides as C does, towards zero; every result stays a `CInt`."""

    def __floordiv__(self, other):
        quotient = abs(int(self)) // abs(int(other))
        return CInt(quotient if (self < 0) == (other < 0) else -quotient)

    def __add__(self, other):
        return CInt(int(self) + int(other))

    def __sub__(self, other):
        return CInt(int(self) - int(other))

    def __mul__(self, other):
        return CInt(int(self) * int(other))

    __radd__ = __add__


def visible(i, j, length_q, length_k, left, right):
    diagonal = i + length_k - length_q
    return (left < 0 or j >= diagonal - left) and (right < 0 or j <= diagonal + right)


def check_ranges(row_begin, row_end, length_q, length_k, left, right, tile_n):
    """Exactly the tiles with a visible element are in range, exactly the full ones are full."""
    arguments = (row_begin, row_end, length_q, length_k, left, right, tile_n)
    begin, full_begin, full_end, end = kv_tile_ranges(*arguments)
    assert 0 <= begin <= full_begin <= full_end <= end, arguments
    assert end <= ceil_div(length_k, tile_n), arguments
    for tile in range(ceil_div(length_k, tile_n) + 1):
        elements = [
            j < length_k and visible(i, j, length_q, length_k, left, right)
            for i in range(row_begin, row_end)
            for j in range(tile * tile_n, (tile + 1) * tile_n)
        ]
        assert (begin <= tile < end) == any(elements), (arguments, tile)
        assert (full_begin <= tile < full_end) == all(elements), (arguments, tile)
    assert kv_tile_ranges(*map(CInt, arguments)) == (begin, full_begin, full_end, end), (
        f"{arguments}: relies on floor division"
    )


@pytest.mark.parametrize("tile_n", [1, 2, 3])
def test_ranges_exhaustively(tile_n):
    windows = [(left, right) for left in (-1, 0, 1, 3) for right in (-1, 0, 2)]
    for length_q, length_k in itertools.product(range(1, 6), range(8)):
        for row_begin, row_end in itertools.combinations(range(length_q + 1), 2):
            for left, right in windows:
                check_ranges(row_begin, row_end, length_q, length_k, left, right, tile_n)


LENGTH = st.integers(0, 200)
SIDE = st.one_of(st.just(-1), st.integers(0, 250))


@st.composite
def range_arguments(draw):
    length_q = draw(st.integers(1, 200))
    row_begin = draw(st.integers(0, length_q - 1))
    row_end = draw(st.integers(row_begin + 1, min(length_q, row_begin + 40)))
    return row_begin, row_end, length_q, draw(LENGTH), draw(SIDE), draw(SIDE)


@given(range_arguments(), st.integers(1, 70))
@settings(max_examples=150)
def test_ranges_on_random_sizes(arguments, tile_n):
    check_ranges(*(*arguments, tile_n))


@pytest.mark.sweep
@given(range_arguments(), st.integers(1, 70))
@settings(max_examples=5000, derandomize=False)
def test_ranges_sweep(arguments, tile_n):
    check_ranges(*(*arguments, tile_n))


def test_splits_partition_every_range():
    """Contiguous, in order, complete, balanced to one tile, whatever the counts."""
    for begin, count, num_splits in itertools.product((0, 3), range(40), range(1, 50)):
        end = begin + count
        parts = [split_tile_range(begin, end, split, num_splits) for split in range(num_splits)]
        assert parts[0][0] == begin
        assert parts[-1][1] == end
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
        sizes = {hi - lo for lo, hi in parts}
        assert min(sizes) >= 0
        assert max(sizes) - min(sizes) <= 1


def test_splits_of_many_tiles_are_exact():
    """The product tiles · splits of the longest context fits 32 bits: device code is int32."""
    tiles = (1 << 20) // 16
    assert tiles * 256 < 1 << 31
    assert split_tile_range(0, tiles, 255, 256) == (tiles - 256, tiles)


def test_ceil_div():
    for a, b in itertools.product(range(30), range(1, 12)):
        quotient = ceil_div(a, b)
        assert (quotient - 1) * b < a <= quotient * b or (a == 0 and quotient == 0)


def test_device_code_agrees():
    """As the Triton kernels call them (interpreted without a GPU), they give what Python gives."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = torch.empty(6, dtype=torch.int32, device=device)
    for arguments in itertools.product(
        (0, 5), (9, 16), (16, 40), (0, 7, 333), (-1, 20), (-1, 0, 9), (4, 64)
    ):
        ranges_kernel[(1,)](result, *arguments, 2, 3)
        ranges = kv_tile_ranges(*arguments)
        assert result[:4].tolist() == list(ranges), arguments
        assert result[4:].tolist() == list(split_tile_range(ranges[0], ranges[3], 2, 3)), arguments
