"""The one way out: TMEM → registers → epilogue op → shared memory → global memory by TMA.

The output tile of ``rows`` rows leaves in chunks of 128 (or 64) bytes a row, through a ring of
chunk buffers. A warpgroup of 128 threads, one row each, makes the chunks; one warp stores them.
Nothing comes back, and nothing here knows which kernel it serves.

    warpgroup   ld O(c) · scale · op · cast ──> chunk_full[b] ──> TMA store    one warp
                                            <── chunk_empty[b] ──  (once read)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor, Fixed
from cute_fmha.kernels.blackwell.softmax import packed, scaled


class Rows(NamedTuple):
    """The rows of an output tile that exist, the first ``count``; ``address(row)`` is the global
    address of a row's first byte, on 16 bytes. Rows need not be evenly spaced."""

    count: Int32
    address: Callable[[Int32], Int64]


class Store(Fixed):
    """Moves ``chunks`` chunks of ``chunk`` columns of one output tile."""

    def __init__(self, rows: int, chunk: int, chunks: int, dtype: Any) -> None:
        self.rows = rows
        self.chunk = chunk
        self.chunks = chunks
        self.dtype = dtype

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
    ) -> Cursor:
        """Make every chunk of a tile; rows are multiplied by ``scale``, or all 0 with ``zero``.

        Reads: O at TMEM address ``tO`` (unless ``zero``). Writes: the chunk buffers.
        Waits: chunk_empty. Signals: chunk_full.
        """
        if zero:
            for _c in cutlass.range_constexpr(self.chunks):
                cursor = self.hand_over(
                    lambda first, count: [Float32(0.0)] * count, sO, thread, barriers, cursor
                )
        else:
            for c in cutlass.range_constexpr(self.chunks):
                cursor = self.hand_over(
                    lambda first, count, c=c: scaled(  # type: ignore[misc]
                        ptx.tcgen05_wait_load(
                            ptx.tcgen05_load(tO + c * self.chunk + first, count)
                        ),
                        scale,
                    ),
                    sO, thread, barriers, cursor,
                )  # fmt: skip
        return cursor

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a chunk."""
        return self.chunk * int(self.dtype.width) // 8

    def address(self, buffer: Int32, row: Int32, byte: Any) -> Int32:
        """Where the 16 bytes from ``byte`` on of a row of a chunk lie in its ``buffer``.

        Swizzled as the TMA reads it: in 128-byte rows the number of a piece of 16 bytes by bits 7–9
        of the address, in 64-byte rows by bits 7–8, in 32-byte rows by bit 7.
        """
        swizzle = row * self.row_bytes // 128 % (self.row_bytes // 16) * 16
        return buffer + row * self.row_bytes + (Int32(byte) ^ swizzle)

    def hand_over(
        self, values: Callable[[int, int], list[Float32]], sO: cute.Tensor, thread: Int32,
        barriers: Barriers, cursor: Cursor,
    ) -> Cursor:  # fmt: skip
        """Write one chunk of the thread's row, its 16-byte pieces swizzled by row.

        ``values(first, count)`` gives columns of the chunk; they are taken 32 at a time, so that
        the warpgroup gets along with few registers.
        """
        barriers.wait("chunk_empty", cursor.empty_phase, cursor.index)
        buffer = sO.iterator.toint() + cursor.index * self.rows * self.row_bytes
        width = min(32, self.chunk)
        for first in range(0, self.chunk, width):
            part = values(first, width)
            words = part if self.dtype is Float32 else packed(part, self.dtype)
            start = first * self.row_bytes // self.chunk
            for piece in range(len(words) // 4):
                address = self.address(buffer, thread, start + piece * 16)
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
        rows: Rows | None = None,
    ) -> Cursor:
        """Store every chunk of a tile. Waits: chunk_full. Signals: chunk_empty.

        A TMA box ends where its tensor does, so that rows past the end of a dense sequence need
        nothing. Where the memory after the rows that exist belongs to somebody else (the next
        sequence of a packed batch), the caller gives ``rows``: a tile in which all exist leaves by
        TMA still, of any other only those that exist are written.
        """
        tOsO, tOgO = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2)
        )
        for c in cutlass.range_constexpr(self.chunks):
            barriers.wait("chunk_full", cursor.phase, cursor.index)
            if cutlass.const_expr(rows is None):  # noqa: SIM114  (compile and run time)
                self.write_box(tma, tOsO[None, cursor.index], tOgO[None, c])
            elif rows.count >= self.rows:
                self.write_box(tma, tOsO[None, cursor.index], tOgO[None, c])
            else:
                self.write_rows(sO, cursor, rows, c)
            barriers.arrive("chunk_empty", cursor.index)
            cursor = cursor.next()
        return cursor

    def write_box(self, tma: cute.CopyAtom, chunk: cute.Tensor, target: cute.Tensor) -> None:
        """Store a chunk by TMA; it may be overwritten afterwards."""
        cute.copy(tma, chunk, target)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def write_rows(self, sO: cute.Tensor, cursor: Cursor, rows: Rows, c: int):
        """One warp writes the existing rows of chunk ``c`` of a tile, 16 bytes per lane at a time:
        neighbouring lanes have neighbouring pieces of a row."""
        pieces = self.row_bytes // 16
        buffer = sO.iterator.toint() + cursor.index * self.rows * self.row_bytes
        count, address = rows
        for first in cutlass.range(cute.arch.lane_idx(), count * pieces, 32, unroll=4):
            row, byte = first // pieces, first % pieces * 16
            words = ptx.load_shared(self.address(buffer, row, byte))
            ptx.store_global(address(row) + (c * self.row_bytes + byte), words)
