"""`Store` alone: FP32 fragments through the chunk ring, one tile per CTA (not collected)."""

from __future__ import annotations

import functools
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.emulator.machine import Policy
from cute_fmha.epilogues.store import Rows, Store
from cute_fmha.kernels.blackwell.pipelines import Barrier, Barriers, Cursor, Topology
from cute_fmha.kernels.blackwell.plan import Role
from cute_fmha.kernels.blackwell.prefill import DTYPES

ROWS, STAGES = 128, 2


class FragmentKernel:
    """Packed sequences of ``x`` [TOKENS, HEADS, DV], a tile of 128 rows per CTA (tile, sequence,
    head). Warps 0–3 hand over one row each, warp 4 stores."""

    def __init__(self, dv: int, dtype: torch.dtype, ragged: bool) -> None:
        self.ragged = ragged
        self.dtype = DTYPES[dtype]
        chunk_bytes = 128 if dv * dtype.itemsize % 128 == 0 else 64
        self.chunk = chunk_bytes // dtype.itemsize
        self.store = Store(ROWS, self.chunk, dv // self.chunk, self.dtype)
        roles = (Role("make", (0, 1, 2, 3), 128), Role("store", (4,), 128))
        self.topology = Topology(
            roles,
            (
                Barrier("chunk_full", STAGES, (("make", "warp"),)),
                Barrier("chunk_empty", STAGES, (("store", "warp"),)),
            ),
        )

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, starts: cute.Tensor, tiles: Int32):
        layout = cutlass.utils.blackwell_helpers.make_smem_layout_epi(
            self.dtype, cutlass.utils.LayoutEnum.ROW_MAJOR, (ROWS, self.chunk), STAGES
        )
        # (TOKENS, DV, HEADS)
        mO = cute.make_tensor(out.iterator, cute.select(out.layout, mode=[0, 2, 1]))
        tma, gO = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), mO, cute.select(layout, mode=[0, 1]),
            (ROWS, self.chunk),
        )  # fmt: skip
        self.kernel(x, mO, tma, gO, starts, layout).launch(
            grid=(tiles, starts.shape[0] - 1, x.shape[1]), block=(160, 1, 1)
        )

    @cute.kernel
    def kernel(
        self, x: cute.Tensor, out: cute.Tensor, tma: cute.CopyAtom, mO: cute.Tensor,
        starts: cute.Tensor, layout: cute.ComposedLayout,
    ):  # fmt: skip
        @cute.struct
        class Storage:
            sO: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout)], 1024]
            barriers: cute.struct.MemRange[Int64, self.topology.size]

        tile, sequence, head = cute.arch.block_idx()
        first, end = starts[sequence] + tile * ROWS, starts[sequence + 1]
        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        sO = storage.sO.get_tensor(layout.outer, swizzle=layout.inner)
        barriers = Barriers(self.topology, storage.barriers.data_ptr())
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread = cute.arch.thread_idx()[0]
        if thread == 0:
            barriers.initialise()
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if first < end:
            if warp < 4:
                self.make(
                    x, sO, barriers.of("make"), thread, cutlass.min(first + thread, end - 1), head
                )
            else:
                rows = None
                if cutlass.const_expr(self.ragged):
                    rows = Rows(
                        end - first,
                        lambda row: cute.domain_offset(
                            (first + row, 0, head), out
                        ).iterator.toint(),
                    )
                mine = cute.domain_offset((first, 0, head), mO)
                gO = cute.local_tile(mine[None, None, 0], (ROWS, self.chunk), (0, None))
                self.store.consume(tma, gO, sO, barriers.of("store"), Cursor(STAGES), rows)
                cute.arch.cp_async_bulk_wait_group(0)

    def make(self, x, sO, barriers, thread, token, head):
        cursor = Cursor(STAGES)
        for c in range(self.store.chunks):
            cursor = self.store.hand_over(
                lambda first, count, c=c: [
                    x[token, head, c * self.chunk + first + j] for j in range(count)
                ],
                sO,
                thread,
                barriers,
                cursor,
            )


def tensor(x: torch.Tensor) -> Any:
    return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)


@functools.cache
def compiled(dv: int, dtype: torch.dtype, ragged: bool) -> Any:
    x, out = torch.zeros(1, 1, dv), torch.zeros(1, 1, dv, dtype=dtype)
    starts = torch.zeros(2, dtype=torch.int32)
    return compile_kernel(
        FragmentKernel(dv, dtype, ragged), *map(tensor, (x, out, starts)), Int32(1)
    )


def run(x: torch.Tensor, out: torch.Tensor, lengths: list[int], policy: Policy, ragged=True) -> Any:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    kernel = compiled(x.shape[-1], out.dtype, ragged)
    tiles = -(-max(lengths) // ROWS)
    return emulate(kernel, *map(tensor, (x, out, starts)), Int32(tiles), policy=policy)
