"""Where the keys of a tile lie in a paged cache: what a lane of a load warp looks up.

Of keys past the sequence nothing is looked up, and nothing is fetched: pages that nobody has and
rows outside of a `ragged` map arrive as zeros.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fmha.kernels.blackwell.ragged import corner
from cute_fmha.kernels.blackwell.worklist import Piece

ABSENT = -1
"""A page that no cache has."""

ROW_BYTES = 128
"""A row of a box, dense in shared memory."""


@cute.jit
def lane_pages(mTable: cute.Tensor, piece: Piece, first: Int32, lane: Int32):
    """Pages of one row: those of keys ``lane`` and ``lane`` + 32 of the tile from ``first`` on."""
    pages = [Int32(ABSENT), Int32(ABSENT)]
    for half in cutlass.range_constexpr(2):
        key = first + half * 32 + lane
        if key < piece.length:
            pages[half] = mTable[piece.batch, key]
    return pages


@cute.jit
def box_place(mTable: Any, piece: Piece, key: Int32, box: int, page_rows: Any, extent: Int32):
    """[PAGE_ROW, PAGE, END] in a `ragged` map, whose pages have ``extent`` rows, of the ``box``
    rows from ``key`` on. Without a table page b is sequence b."""
    row, page = key, piece.batch
    if cutlass.const_expr(mTable is not None):
        number, page = key // page_rows, Int32(0)
        row = key - number * page_rows
        if key < piece.length:
            page = mTable[piece.batch, number]
    rows = cutlass.max(cutlass.min(piece.length - key, box), 0)
    row, end = corner(extent, row, rows)
    return [row, page, end]
