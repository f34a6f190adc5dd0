"""What a launch passes for its epilogue op."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cute_fmha.epilogues.base import resolve
from cute_fmha.kernels.triton.primitives import device_function
from cute_fmha.ops import Call


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
