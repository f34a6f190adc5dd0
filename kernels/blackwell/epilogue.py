"""Epilogue ops as the Blackwell kernels' plans and launches see them; the device's side of it is
`cute_fmha.epilogues.store`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cute_fmha.epilogues.base import EpilogueOp, Kind, resolve
from cute_fmha.problem import Problem

if TYPE_CHECKING:
    from cute_fmha.ops import Call

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8)

PARAMETER_DTYPES = {
    torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32",
    torch.float64: "Float64", torch.float8_e4m3fn: "Uint8", torch.uint8: "Uint8",
    torch.int32: "Int32", torch.int64: "Int64",
}  # fmt: skip
"""What ops may read and write besides the output, and CuTe DSL's name for it."""


@dataclass(frozen=True)
class Op:
    """What is compiled in of an epilogue op: its class, by key, and the kinds of its parameters and
    of its second output, if it has one."""

    key: str = "identity"
    parameters: tuple[Kind, ...] = ()
    extra: Kind | None = None

    @property
    def cls(self) -> type[EpilogueOp]:
        return resolve(self.key)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The op's Blackwell function, None for a plain cast."""
        return self.cls.blackwell


@dataclass(frozen=True)
class Leaving:
    """How rows of ``columns`` FP32 columns leave: in chunks whose rows are as wide as a swizzle
    atom of 128, 64, 32 or 16 bytes."""

    op: Op
    dtype: torch.dtype
    columns: int

    @property
    def row_bytes(self) -> int:
        return self.op.cls.out_columns(self.columns) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return min(128, self.row_bytes & -self.row_bytes)

    @property
    def chunks(self) -> int:
        return self.row_bytes // self.chunk_bytes

    @property
    def elements(self) -> int:
        """Elements of a row."""
        return self.row_bytes // self.dtype.itemsize

    @property
    def chunk(self) -> int:
        """Elements of a chunk's rows."""
        return self.chunk_bytes // self.dtype.itemsize

    @property
    def chunk_columns(self) -> int:
        """FP32 columns that a chunk's rows are made from."""
        return self.columns // self.chunks


def op_of(problem: Problem) -> Op:
    return Op(problem.epilogue, problem.parameters, problem.extra)


def unsuited(problem: Problem) -> str | None:
    """Why the Blackwell kernels cannot store what the problem's op makes; None when they can."""
    op = resolve(problem.epilogue)
    if op.blackwell is None and problem.epilogue != "identity":
        return f"epilogue {problem.epilogue!r} has no Blackwell function"
    if problem.out_dtype not in OUT_DTYPES:
        allowed = ", ".join(map(str, OUT_DTYPES))
        return f"the Blackwell kernels store {allowed}; got {problem.out_dtype}"
    part = op.out_columns(32) * problem.out_dtype.itemsize
    if part == 0 or part % 16:
        return f"the Blackwell kernels store multiples of 16 bytes for 32 columns; got {part}"
    kinds = [*problem.parameters, *(() if problem.extra is None else (problem.extra,))]
    for kind in kinds:
        if kind.dtype is not None and kind.dtype not in PARAMETER_DTYPES:
            return f"the Blackwell kernels' epilogues read and write no {kind.dtype}"
    return None


def placeholders(op: Op) -> tuple[Any, ...] | None:
    """What to compile for in place of `op_arguments`."""
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    from cute_fmha.kernels.blackwell.build import placeholder

    def of(kind: Kind) -> Any:
        if kind.dtype is None:
            return cutlass.Float32(0.0)
        dtype = getattr(cutlass, PARAMETER_DTYPES[kind.dtype])
        if kind.dims == 0:
            return placeholder(dtype, 1)
        if kind.rows:
            return placeholder(dtype, *(None,) * kind.dims, align=16)
        extents = tuple(cute.sym_int() for _ in range(kind.dims))
        strides = tuple(cute.sym_int64() for _ in range(kind.dims))
        return make_fake_tensor(dtype, extents, strides, assumed_align=dtype.width // 8)

    kinds = [*op.parameters, *(() if op.extra is None else (op.extra,))]
    return tuple(map(of, kinds)) or None


def device_view(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a kernel sees it: FP8 and bool as bytes, one element without dimensions as a
    vector."""
    if x.dtype in (torch.float8_e4m3fn, torch.bool):
        x = x.view(torch.uint8)
    return x.reshape(1) if x.dim() == 0 else x


def op_arguments(call: Call) -> tuple[Any, ...] | None:
    """For the kernel's launch: the op's parameters, and its second output; None when there is
    nothing to pass."""
    values = (*call.parameters, *(() if call.extra is None else (call.extra,)))
    return tuple(device_view(v) if isinstance(v, torch.Tensor) else v for v in values) or None
