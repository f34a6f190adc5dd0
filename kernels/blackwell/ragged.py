"""TMA tiles of a sequence that ends anywhere inside a larger tensor, at no cost per tile.

A tensor map knows the ends of its tensor, not of the sequences in it: a box that begins in the
last rows of a sequence also reads the rows after it, which belong to the next sequence or to
nobody. What they hold must not take part: NaN · 0 is NaN in P V, and a store would overwrite them.

Here the map itself ends where the sequence does. Let a tensor have N rows of stride s from address
a. Its map is made to begin N rows earlier, and has one more mode, of the same stride:

    address(x, z) = (a − N s) + x s + z s,    0 <= x < N,   0 <= z <= N.

Row i of a sequence of ``length`` rows from row ``start`` on is x = N − length + i, z = start +
length: its address is a + (start + i) s, and i >= length is x >= N, outside of the map. The TMA
fills such rows of a load with zeros and leaves them out of a store. No address before the tensor
is ever touched. Tensor maps stay those that the host made; lengths are read on the device.

The same holds inside each page of a paged cache, (ROW, D, PAGE): the sequence of a page that is in
use up to some row starts at row 0 and is that long.

A map has at most five modes, so that a ragged tensor has at most four.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute


def _extent(tensor: Any, mode: int) -> Any:
    """Rows along ``mode``; of a nested mode, such as (HEAD, SEQ), its last part counts."""
    extent = tensor.shape[mode]
    return extent[-1] if isinstance(extent, tuple) else extent


def _along(mode: int, rank: int, shape: Any, value: Any) -> tuple[Any, ...]:
    """The coordinate that is ``value`` along ``mode`` of ``shape`` and 0 elsewhere."""
    inside = (*(0,) * (len(shape[mode]) - 1), value) if isinstance(shape[mode], tuple) else value
    return tuple(inside if m == mode else cute.repeat_like(0, shape[m]) for m in range(rank))


def ragged(tensor: cute.Tensor, mode: int) -> cute.Tensor:
    """``tensor`` in global memory with a further, last mode, from which a tensor map is made whose
    boxes `cut` can end anywhere along ``mode``."""
    rank = cute.rank(tensor)
    extent, stride = _extent(tensor, mode), tensor.stride[mode]
    if isinstance(stride, tuple):
        stride = stride[-1]
    before = cute.domain_offset(_along(mode, rank, tensor.shape, -extent), tensor).iterator
    # Rows are multiples of 16 bytes, which the dynamic stride does not say.
    start = cute.make_ptr(tensor.element_type, before.toint(), tensor.memspace, assumed_align=16)
    layout = cute.make_layout((*tensor.shape, extent + 1), stride=(*tensor.stride, stride))
    return cute.make_tensor(start, layout)


def corner(extent: Any, start: Any, length: Any) -> tuple[Any, Any]:
    """(x, z) of row 0 of the rows from ``start`` on that end after ``length`` of them."""
    return extent - length, start + length


def cut(tensor: cute.Tensor, mode: int, start: Any, length: Any) -> cute.Tensor:
    """Of a ragged tensor, as its TMA atom made it: without the last mode, rows counted from
    ``start`` on, those from ``length`` on outside."""
    rank = cute.rank(tensor) - 1
    missing, end = corner(_extent(tensor, mode), start, length)
    place = (*(None,) * rank, end)
    return cute.domain_offset(_along(mode, rank, tensor.shape, missing), tensor[place])
