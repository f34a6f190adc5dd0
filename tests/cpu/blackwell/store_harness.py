"""`Store` alone: FP32 fragments through an op and out, one tile per CTA (not collected)."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.emulator.machine import Policy
from cute_fmha.epilogues import EpilogueOp
from cute_fmha.epilogues.base import Row, kind_of
from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.epilogue import Leaving, Op, device_view
from cute_fmha.kernels.blackwell.kernel_plan import Role
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor
from cute_fmha.kernels.blackwell.ragged import cut, ragged
from cute_fmha.kernels.blackwell.topology import Barrier, Topology

ROWS, STAGES = 128, 2


class FragmentKernel:
    """Packed sequences of FP32 ``x`` [TOKENS, HEADS, DV], a tile of 128 rows per CTA (tile,
    sequence, head). Warps 0–3 hand over one row each and warp 4 stores them; or, with ``run``,
    each of their threads stores runs of so many columns of any row itself."""

    def __init__(self, leaving: Leaving, run: int = 0) -> None:
        self.leaving, self.run = leaving, run
        self.dtype = DTYPES[leaving.dtype]
        self.store = Store(ROWS, leaving, self.dtype)
        self.topology = Topology(
            (Role("make", (0, 1, 2, 3), 128), Role("store", (4,), 128)),
            (
                Barrier("chunk_full", STAGES, (("make", "warp"),)),
                Barrier("chunk_empty", STAGES, (("store", "warp"),)),
            ),
        )

    @cute.jit
    def __call__(
        self, x: cute.Tensor, out: cute.Tensor, starts: cute.Tensor, tiles: Int32,
        arguments: tuple | None,
    ):  # fmt: skip
        layout = cutlass.utils.blackwell_helpers.make_smem_layout_epi(
            self.dtype, cutlass.utils.LayoutEnum.ROW_MAJOR, (ROWS, self.leaving.chunk), STAGES
        )
        # (TOKENS, COLUMNS, HEADS)
        mO = cute.make_tensor(out.iterator, cute.select(out.layout, mode=[0, 2, 1]))
        tma, gO = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), ragged(mO, 0), cute.select(layout, mode=[0, 1]),
            (ROWS, self.leaving.chunk),
        )  # fmt: skip
        self.kernel(x, mO, tma, gO, starts, layout, arguments).launch(
            grid=(tiles, starts.shape[0] - 1, x.shape[1]), block=(160, 1, 1)
        )

    @cute.kernel
    def kernel(
        self, x: cute.Tensor, out: cute.Tensor, tma: cute.CopyAtom, mO: cute.Tensor,
        starts: cute.Tensor, layout: cute.ComposedLayout, arguments: tuple | None,
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
                if cutlass.const_expr(self.run):
                    self.write(x, out, thread, first, end, head, arguments)
                else:
                    self.make(x, sO, barriers.of("make"), thread, first, end, head, arguments)
            elif cutlass.const_expr(not self.run):
                start = starts[sequence]
                mine = cut(mO, 0, start, end - start)[None, None, head]
                gO = cute.local_tile(mine, (ROWS, self.leaving.chunk), (tile, None))
                self.store.consume(tma, gO, sO, barriers.of("store"), Cursor(STAGES))
                cute.arch.cp_async_bulk_wait_group(0)

    def address(self, out: cute.Tensor, token: Int32, head: Int32) -> Int64:
        return cute.domain_offset((token, 0, head), out).iterator.toint()

    def make(self, x, sO, barriers, thread, first, end, head, arguments):
        token, live = cutlass.min(first + thread, end - 1), first + thread < end
        width = self.leaving.columns
        apply = self.store.apply(Row(token, head, live, width), arguments)
        cursor = Cursor(STAGES)
        for chunk in range(self.leaving.chunks):
            start = chunk * self.leaving.chunk_columns

            def values(first: int, count: int, start: int = start) -> list[Float32]:
                return [
                    cutlass.select_(live, x[token, head, start + first + j], Float32(7.0))
                    for j in range(count)
                ]

            cursor = self.store.hand_over(values, sO, thread, barriers, cursor, apply, start)

    def write(self, x, out, thread, first, end, head, arguments):
        width = self.leaving.columns
        runs = width // self.run
        for turn in range(ROWS * runs // 128):
            index = turn * 128 + thread
            row, column = first + index // runs, index % runs * self.run
            token, live = cutlass.min(row, end - 1), row < end
            apply = self.store.apply(Row(token, head, live, width), arguments)
            values = [x[token, head, column + j] for j in range(self.run)]
            self.store.write(values, column, apply, self.address(out, token, head), live)


def leading(x: torch.Tensor) -> int | None:
    """The dimension of ``x`` whose stride is 1 in the kernel's layout; all others are dynamic."""
    return next((i for i in reversed(range(x.dim())) if x.stride(i) == 1), None)


def tensor(x: torch.Tensor, align: int = 16) -> Any:
    return device_tensor(x, align).mark_layout_dynamic(leading_dim=leading(x))


def argument(x: torch.Tensor | float) -> Any:
    """A parameter of an op as the kernel takes it."""
    if not isinstance(x, torch.Tensor):
        return Float32(x)
    return tensor(device_view(x), 16 if kind_of(x).rows else x.element_size())


_kernels: dict[Any, Any] = {}


def run(
    op: EpilogueOp, x: torch.Tensor, out: torch.Tensor, lengths: list[int], policy: Policy,
    extra: torch.Tensor | None = None, **variant: Any,
) -> Any:  # fmt: skip
    """Store what ``op`` makes of ``x`` [TOKENS, HEADS, DV]; returns the report."""
    parameters: tuple[torch.Tensor | float, ...] = (*op.tensors, *op.values)
    kind = None if extra is None else kind_of(extra)
    compiled_in = Op(op.key, tuple(map(kind_of, parameters)), kind)
    leaving = Leaving(compiled_in, out.dtype, x.shape[-1])
    values = (*parameters, *(() if extra is None else (extra,)))
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    tensors = [tensor(t) for t in (x, device_view(out), starts)]
    arguments = (*tensors, Int32(-(-max(lengths) // ROWS)), tuple(map(argument, values)) or None)
    key = (leaving, *map(leading, op.tensors), *sorted(variant.items()))
    if key not in _kernels:
        _kernels[key] = compile_kernel(FragmentKernel(leaving, **variant), *arguments)
    return emulate(_kernels[key], *arguments, policy=policy)
