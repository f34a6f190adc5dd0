"""Whole programs on the emulator: unmodified CuTe DSL code that believes it has a Blackwell GPU.

Inside `emulating()` tensors "on CUDA" are CPU tensors, the DSL compiles for the emulated GPU, and
every compiled host function that is called is captured and executed on the machine::

    with emulating(policy=Policy("lazy")) as reports:
        runpy.run_path("fmha.py", run_name="__main__")

Everything is put back afterwards; functions compiled inside keep working outside as they would.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import backend
from . import capture as cap
from .device import Device, DeviceTensor, Memory, emulated_device, patched, require_cutlass
from .machine import Policy

__all__ = ["CudaOnCpu", "emulating"]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class CudaOnCpu(TorchFunctionMode):
    """Tensors asked for on CUDA are made on the CPU; moves between the two are copies."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.cuda, torch.Tensor.cpu):
            return args[0].clone()
        moves = function is torch.Tensor.to and any(
            isinstance(x, str | torch.device) and torch.device(x).type in ("cuda", "cpu")
            for x in (*args[1:], *kwargs.values())
        )
        args = tuple(_on_cpu(x) for x in args)
        kwargs = {name: _on_cpu(x) for name, x in kwargs.items()}
        result = function(*args, **kwargs)
        return result.clone() if moves and result is args[0] else result


class _Tracker:
    """The memory that a program has shown to the DSL; kept alive, so addresses stay its own."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[int, int], Memory] = {}

    def add(self, tensor: torch.Tensor) -> None:
        piece = Memory.of(f"tensor {len(self.pieces)} {tuple(tensor.shape)}", tensor)
        self.pieces.setdefault((piece.address, piece.bytes), piece)

    def memory(self) -> list[Memory]:
        return list(self.pieces.values())


def _run_packed(twin: Any, packed: Any, run: Callable[[Any, Any], Any]) -> Any:
    return run(twin, packed)


@contextlib.contextmanager
def emulating(
    policy: Policy | None = None,
    check: bool = True,
    device: Device | None = None,
    on_capture: Callable[[cap.Capture], Any] | None = None,
    **machine: Any,
) -> Iterator[list[cap.Report]]:
    """Calls of compiled CuTe DSL functions in this block run on the emulator.

    Yields the list that each call's report is added to. `on_capture` gets every capture instead
    of the machine, if it is given.
    """
    cutlass = require_cutlass()
    runtime: Any = importlib.import_module("cutlass.cute.runtime")
    cutlass_torch: Any = importlib.import_module("cutlass.torch")
    executor: Any = importlib.import_module("cutlass.cutlass_dsl.cuda_jit_executor")
    function_class = executor.CudaDialectJitCompiledFunction
    device = device or Device()
    tracker = _Tracker()
    reports: list[cap.Report] = []
    original = runtime.from_dlpack

    def from_dlpack(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            tracker.add(tensor)
            tensor = DeviceTensor(tensor)
        return original(tensor, *args, **kwargs)

    def use(captured: cap.Capture) -> None:
        if on_capture is not None:
            on_capture(captured)
        else:
            reports.append(cap.execute(captured, policy=policy, check=check, **machine))

    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cap.is_redirected(self):
            return original_call(self, *args, **kwargs)
        packed, keep = self.execution_args.generate_execution_args(args, kwargs)
        run_program(self, packed)
        del keep
        return 0

    def run_program(self: Any, packed: Any) -> Any:
        if cap.is_redirected(self):
            return original_program(self, packed)
        call = functools.partial(_run_packed, packed=packed, run=original_program)
        use(cap.collect(self, call, tracker.memory(), device))
        return 0

    def call_tvm_ffi(self: Any, *args: Any, **kwargs: Any) -> None:
        use(cap.capture(self, *args, device=device, memory=tracker.memory(), **kwargs))

    original_call = function_class.__call__
    original_program = function_class.run_compiled_program
    dsl = cutlass.cutlass_dsl.CuTeDSL._get_dsl()
    folder = tempfile.mkdtemp(prefix="cute-fmha-ptx-")
    replacements: list[tuple[Any, str, Any]] = [
        (runtime, "from_dlpack", from_dlpack),
        (cutlass_torch, "from_dlpack", from_dlpack),
        (function_class, "__call__", call_function),
        (function_class, "run_compiled_program", run_program),
        (dsl.envar, "arch", device.arch),
        (dsl.envar, "keep_ptx", True),
        (dsl.envar, "dump_dir", folder),
        (dsl.envar, "lineinfo", True),
    ]
    with contextlib.suppress(ImportError):
        provider: Any = importlib.import_module("cutlass.cutlass_dsl.tvm_ffi_provider")
        for name in ("TVMFFIJitCompiledFunction", "TVMFFIJitCompiledFunctionWithKwargs"):
            replacements.append((getattr(provider, name), "__call__", call_tvm_ffi))
    try:
        with (
            patched(*replacements),
            emulated_device(device),
            backend.calls_go_to(use, device),
            CudaOnCpu(),
        ):
            yield reports
    finally:
        shutil.rmtree(folder, ignore_errors=True)
