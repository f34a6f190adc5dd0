"""The one way out: TMEM → registers → epilogue op → shared memory → global memory by TMA.

The output tile of ``rows`` rows leaves in chunks of 128 (or 64, 32, 16) bytes a row, through a ring
of chunk buffers. A warpgroup of 128 threads, one row each, makes the chunks; one warp stores them.
Nothing comes back, and nothing here knows which kernel it serves.

    warpgroup   ld O(c) · scale · op · cast ──> chunk_full[b] ──> TMA store    one warp
                                            <── chunk_empty[b] ──  (once read)

Where rows are in registers in pieces (after the combine of split-KV), `Store.write` stores them
directly. Either way `Store.words` is where the op is applied, and the only such place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from cute_fmha.epilogues.base import Kind, Row
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.epilogue import Leaving
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor, Fixed
from cute_fmha.kernels.blackwell.softmax import packed, scaled

Apply = Callable[[list[Float32], Any], list[Any]] | None
"""What an op makes of columns of one row; None for a plain cast. See `EpilogueOp.blackwell`."""

PART = 32
"""Columns that a thread works on at a time: few, so that it gets along with few registers."""


def columns(row: cute.Tensor, first: Any, count: int) -> list[Float32]:
    """``count`` elements of ``row`` (COLUMNS) from ``first`` on, a multiple of ``count``; in vector
    loads where its elements are neighbours on 16 bytes."""
    first = first if isinstance(first, int) else cute.assume(first, divby=count)
    layout = cute.make_layout(count, stride=row.layout.stride[0])
    part = cute.make_tensor(cute.domain_offset((first,), row).iterator, layout)
    values = part.load().to(Float32)
    return [values[j] for j in range(count)]


class Store(Fixed):
    """Moves output tiles of ``rows`` rows, as ``leaving`` says, as elements of ``dtype``."""

    def __init__(self, rows: int, leaving: Leaving, dtype: Any) -> None:
        self.rows = rows
        self.dtype = dtype
        self.op = leaving.op
        self.chunks = leaving.chunks
        self.row_bytes = leaving.chunk_bytes
        self.columns = leaving.chunk_columns

    def apply(self, row: Row, arguments: tuple[Any, ...] | None) -> Apply:
        """What the op makes of the row; ``arguments`` are its parameters and the second output, as
        `cute_fmha.kernels.blackwell.epilogue` passes them."""
        function = self.op.function
        if function is None:
            return None
        kinds = self.op.parameters
        values = (arguments or ())[: len(kinds)]
        parameters = [_parameter(kind, value) for kind, value in zip(kinds, values, strict=True)]
        extra = None if arguments is None or self.op.extra is None else arguments[-1]
        apply: Apply = function(row, parameters, extra)
        return apply

    def words(self, x: list[Float32], column: Any, apply: Apply) -> list[Any]:
        """What is stored of the columns ``x`` of a row from ``column`` on, in 32-bit words."""
        made = x if apply is None else apply(x, column)
        if self.dtype is Float32 or isinstance(made[0], Int32):
            return made
        return packed(made, self.dtype)

    def write(self, x: list[Float32], column: Any, apply: Apply, address: Int64, live: Any) -> None:
        """Store the columns ``x`` of a row from ``column`` on, where ``live``, without a detour;
        ``address`` is that of the row's first byte."""
        words = self.words(x, column, apply)
        first = address + column * self.row_bytes // self.columns
        for j in range(0, len(words), 4):
            ptx.store_global(first + 4 * j, words[j : j + 4], live)

    @cute.jit
    def produce(
        self,
        tO: Int32,
        sO: cute.Tensor,  # (ROWS, CHUNK, STAGE)
        thread: Int32,
        scale: Float32,
        zero: cutlass.Boolean,
        barriers: Barriers,
        cursor: Cursor,
        apply: Apply = None,
        columns: Callable[[int], Any] | None = None,
    ) -> Cursor:
        """Make every chunk of a tile; rows are multiplied by ``scale``, or all 0 with ``zero``.

        ``apply``: of the thread's row. ``columns(c)``: the first column of the output in chunk
        ``c``, where chunks do not simply follow each other.
        Reads: O at TMEM address ``tO`` (unless ``zero``). Writes: the chunk buffers.
        Waits: chunk_empty. Signals: chunk_full.
        """
        if cutlass.const_expr(apply is not None):
            # What an op makes of zeros is made where it makes all else: it is long, and has
            # registers of its own in a second place.
            for c in cutlass.range_constexpr(self.chunks):
                cursor = self.hand_over(
                    lambda first, count, c=c: self.part(  # type: ignore[misc]
                        tO + c * self.columns + first, count, scale, zero
                    ),
                    sO, thread, barriers, cursor, apply, self.first_column(c, columns),
                )  # fmt: skip
        elif zero:
            for c in cutlass.range_constexpr(self.chunks):
                cursor = self.hand_over(
                    lambda first, count: [Float32(0.0)] * count, sO, thread, barriers, cursor,
                    apply, self.first_column(c, columns),
                )  # fmt: skip
        else:
            for c in cutlass.range_constexpr(self.chunks):
                cursor = self.hand_over(
                    lambda first, count, c=c: self.loaded(  # type: ignore[misc]
                        tO + c * self.columns + first, count, scale
                    ),
                    sO, thread, barriers, cursor, apply, self.first_column(c, columns),
                )  # fmt: skip
        return cursor

    def loaded(self, tO: Int32, count: int, scale: Float32) -> list[Float32]:
        """``count`` columns from TMEM, times ``scale``."""
        return scaled(ptx.tcgen05_wait_load(ptx.tcgen05_load(tO, count)), scale)

    @cute.jit
    def part(self, tO: Int32, count: cutlass.Constexpr, scale: Float32, zero: cutlass.Boolean):
        """`loaded`, or zeros."""
        values = [Float32(0.0) for _ in range(count)]
        if not zero:
            values = self.loaded(tO, count, scale)
        return values

    def first_column(self, c: int, columns: Callable[[int], Any] | None) -> Any:
        return c * self.columns if columns is None else columns(c)

    def address(self, buffer: Int32, row: Int32, byte: Any) -> Int32:
        """Where the 16 bytes from ``byte`` on of a row of a chunk lie in its ``buffer``.

        Swizzled as the TMA reads it: in 128-byte rows the number of a piece of 16 bytes by bits 7–9
        of the address, in 64-byte rows by bits 7–8, in 32-byte rows by bit 7.
        """
        swizzle = row * self.row_bytes // 128 % (self.row_bytes // 16) * 16
        return buffer + row * self.row_bytes + (Int32(byte) ^ swizzle)

    def hand_over(
        self, values: Callable[[int, int], list[Float32]], sO: cute.Tensor, row: Int32,
        barriers: Barriers, cursor: Cursor, apply: Apply = None, column: Any = 0,
    ) -> Cursor:  # fmt: skip
        """Make one chunk of a row: ``values(first, count)`` gives its columns, from ``column`` of
        the output on, a few at a time."""
        barriers.wait("chunk_empty", cursor.empty_phase, cursor.index)
        buffer = sO.iterator.toint() + cursor.index * self.rows * self.row_bytes
        width = min(PART, self.columns)
        for first in range(0, self.columns, width):
            words = self.words(values(first, width), column + first, apply)
            start = first * self.row_bytes // self.columns
            for piece in range(len(words) // 4):
                address = self.address(buffer, row, start + piece * 16)
                ptx.store_shared(address, words[piece * 4 : piece * 4 + 4])
        cute.arch.fence_proxy("async.shared", space="cta")
        barriers.arrive("chunk_full", cursor.index)
        return cursor.next()

    @cute.jit
    def consume(
        self,
        tma: cute.CopyAtom,
        gO: cute.Tensor,  # (ROWS, CHUNK, CHUNKS)
        sO: cute.Tensor,  # (ROWS, CHUNK, STAGE)
        barriers: Barriers,
        cursor: Cursor,
    ) -> Cursor:
        """Store every chunk of a tile. Waits: chunk_full. Signals: chunk_empty.

        A TMA box ends where its tensor does: rows past the end of a sequence need nothing, also
        inside of a packed tensor, if its map was made by `cute_fmha.kernels.blackwell.ragged`.
        """
        tOsO, tOgO = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2)
        )
        for c in cutlass.range_constexpr(self.chunks):
            barriers.wait("chunk_full", cursor.phase, cursor.index)
            cute.copy(tma, tOsO[None, cursor.index], tOgO[None, c])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            barriers.arrive("chunk_empty", cursor.index)
            cursor = cursor.next()
        return cursor


def _parameter(kind: Kind, value: Any) -> Any:
    """A parameter as an op gets it: numbers read, what is known of a tensor's rows said."""
    if kind.dtype is None:
        return value
    if kind.dims == 0:
        return Float32(value[0])
    if not kind.rows:
        return value
    per_row = 16 // kind.dtype.itemsize
    strides = [cute.assume(stride, divby=per_row) for stride in value.layout.stride[:-1]]
    layout = cute.make_layout(value.layout.shape, stride=(*strides, 1))
    return cute.make_tensor(value.iterator.align(16), layout)
