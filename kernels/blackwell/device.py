"""What the host has, as CuTe DSL kernels see it: dtypes, and plain Python functions."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
import torch

DTYPES = {
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.float32: cutlass.Float32,
    torch.float8_e4m3fn: cutlass.Uint8,
    torch.uint8: cutlass.Uint8,
}


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as `cute.jit` would make it, from the same definition.

    `cute.jit` rewrites only what its own decorator stands above in the source. A function that host
    code, Triton and the specification share has none, so that its source is compiled a second time
    with the decorator in front, under a file name that says where it came from.
    """
    source = "@cute.jit\n" + inspect.getsource(function)
    name = f"<{inspect.getsourcefile(function)}: {function.__name__} for the device>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"cute": cute, "__name__": function.__module__}
    exec(compile(source, name, "exec"), scope)
    compiled: Callable[..., Any] = scope[function.__name__]
    return compiled
