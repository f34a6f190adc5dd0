"""What a launch passes for its epilogue op, and how an op's function becomes a device function."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import KernelInterface

from cute_fmha.epilogues.base import resolve
from cute_fmha.ops import Call


def device_function(function: Any) -> Any:
    """`triton.jit` of a plain function in Triton's language from a module that does not import
    Triton, and of the plain functions beside it that it calls."""
    if isinstance(function, KernelInterface):
        return function
    names = {**function.__globals__, "tl": tl}
    for name in function.__code__.co_names:
        callee = names.get(name)
        if isinstance(callee, types.FunctionType):
            names[name] = device_function(callee)
    twin = types.FunctionType(function.__code__, names, function.__name__)
    twin.__annotations__ = function.__annotations__
    twin.__module__ = function.__module__
    return triton.jit(twin)


@functools.cache
def _compiled(function: Any) -> Any:
    return device_function(function)


def kernel_view(out: torch.Tensor) -> torch.Tensor:
    """``out`` for a kernel: the bytes of an FP8 tensor, a type that Triton lacks before sm_89."""
    return out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out


def epilogue_arguments(call: Call) -> tuple[Any, Any]:
    """(the op's device function, (parameters, second output, positions of a dense sequence)), both
    None for a plain cast; see `cute_fmha.epilogues.base.EpilogueOp.triton`."""
    function = resolve(call.problem.epilogue).triton
    if function is None:
        return None, None
    parameters = tuple(
        (kernel_view(p), p.stride()) if isinstance(p, torch.Tensor) else (p, None)
        for p in call.parameters
    )
    extra = None
    if call.extra is not None:
        extra = (kernel_view(call.extra), call.extra.stride())
    return _compiled(function), (parameters or None, extra, call.problem.seqlen_q)
