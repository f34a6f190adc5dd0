"""From a CuTe DSL function to executed kernels: compile, run the host function, collect, execute.

The host function that CuTe DSL compiles is ordinary code for this processor: it builds tensor
maps, chooses grids and launches kernels through a few CUDA runtime symbols. Here it runs against
`shim.c`, which records the launches; the machine then executes the kernels' PTX in stream order::

    from cute_fmha.emulator.capture import emulate

    report = emulate(host_function, q, k, v, out, policy=Policy("random", seed=1))

Tensors are CPU tensors; they are handed over as device memory, at their own addresses. Functions
that were compiled before work too, with and without TVM-FFI, if their PTX was kept (`--keep-ptx`).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib
import inspect
import io
import shutil
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cute_fmha.cache import Binary

from .build import build_library
from .device import (
    CaptureError,
    Device,
    DeviceTensor,
    Memory,
    device_tensor,
    emulated_device,
    find_memory,
    map_leaves,
    merged,
    patched,
    require_cutlass,
)
from .launches import Entry, Launch, Record, entries, launch_of
from .machine import Finding, Machine, Policy, Region, Result, Tick, load, pack_arguments
from .relink import RUNTIME, check_shim, host_function, shim_name

__all__ = [
    "Capture",
    "CaptureError",
    "Device",
    "DeviceTensor",
    "Launch",
    "Memory",
    "Report",
    "capture",
    "compile_kernel",
    "device_tensor",
    "emulate",
    "emulated_device",
    "entries",
    "execute",
]


# ------------------------------------------------------------------------------------ the shim


@functools.cache
def _shim() -> tuple[ctypes.CDLL, Path]:
    path = build_library("shim", [Path(__file__).with_name("shim.c")])
    library = ctypes.CDLL(str(path))
    library.shim_launch.restype = ctypes.POINTER(Record)
    library.shim_launches.restype = ctypes.c_uint32
    library.shim_error.restype = ctypes.c_char_p
    return library, path


_lock = threading.RLock()  # the shim records for one host function at a time


@dataclasses.dataclass
class Capture:
    """What a host function launched, and on which memory."""

    ptx: str
    launches: list[Launch]
    memory: list[Memory]
    function: str = ""

    def __str__(self) -> str:
        lines = [f"{self.function or 'function'}: {len(self.launches)} launches"]
        lines += [f"  {launch}" for launch in self.launches]
        lines += [f"  {m.name}: {m.bytes} bytes at {m.address:#x}" for m in self.memory]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ the compiler


def compile_kernel(
    function: Any,
    *args: Any,
    arch: str = "sm_100a",
    options: str = "",
    tvm_ffi: bool = False,
    **kwargs: Any,
) -> Any:
    """`cute.compile` for `arch` with the PTX and its line information kept; no GPU is needed.

    CPU tensors among the arguments are taken as device memory.
    """
    cutlass = require_cutlass()
    dsl = cutlass.cutlass_dsl.CuTeDSL._get_dsl()
    folder = tempfile.mkdtemp(prefix="cute-fmha-ptx-")
    every = f"--gpu-arch {arch} --keep-ptx --dump-dir {folder} --generate-line-info {options}"
    if tvm_ffi and "--enable-tvm-ffi" not in every:
        every += " --enable-tvm-ffi"
    convert = functools.partial(_compile_argument, tvm_ffi="--enable-tvm-ffi" in every)
    try:
        with patched((dsl.envar, "arch", arch)):
            return cutlass.cute.compile(
                function,
                *(map_leaves(arg, convert) for arg in args),
                **{name: map_leaves(arg, convert) for name, arg in kwargs.items()},
                options=every,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile_argument(value: Any, tvm_ffi: bool) -> Any:
    if isinstance(value, torch.Tensor | DeviceTensor):
        tensor = value.tensor if isinstance(value, DeviceTensor) else value
        options = {"enable_tvm_ffi": True} if tvm_ffi else {}
        return device_tensor(tensor, assumed_align=None, **options).mark_layout_dynamic()
    return value


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "ir_module") and hasattr(function, "execution_args")


def _ptx_of(compiled: Any) -> str:
    ptx = compiled.ptx if isinstance(compiled, Binary) else compiled.__ptx__
    if isinstance(ptx, bytes):
        ptx = ptx.decode()
    if not ptx or ".entry" not in ptx:
        raise CaptureError(
            f"{compiled.function_name} was compiled without keeping its PTX; compile it with "
            "cute_fmha.emulator.capture.compile_kernel, or with options='--keep-ptx'"
        )
    return ptx


def _redirected(compiled: Any) -> Any:
    """A copy of the lowered host module whose CUDA runtime calls go to the shim."""
    ir: Any = importlib.import_module("cutlass._mlir.ir")

    if compiled.ir_module is None:
        raise CaptureError(f"{compiled.function_name} has no host code (loaded from a binary?)")
    code = io.BytesIO()
    compiled.ir_module.operation.write_bytecode(code)
    library = _shim()[0]
    with ir.Context() as context, ir.Location.unknown():
        context.enable_multithreading(False)
        module = ir.Module.parse(code.getvalue())
        renamed: dict[str, str] = {}

        def declare(op: Any) -> Any:
            name = op.attributes["sym_name"].value if op.name == "llvm.func" else ""
            if RUNTIME.fullmatch(name) and not len(op.regions[0].blocks):
                renamed[name] = shim_name(name)
                op.attributes["sym_name"] = ir.StringAttr.get(renamed[name])
            return ir.WalkResult.ADVANCE

        used: set[str] = set()

        def refer(op: Any) -> Any:
            for attribute in ("callee", "global_name"):
                if attribute in op.attributes and op.name.startswith("llvm."):
                    name = getattr(op.attributes[attribute], "value", None)
                    if name in renamed:
                        op.attributes[attribute] = ir.FlatSymbolRefAttr.get(renamed[name])
                        used.add(name)
            return ir.WalkResult.ADVANCE

        module.operation.walk(declare)
        module.operation.walk(refer)
    check_shim(library, compiled.function_name, (renamed[name] for name in used))
    return module


def _rebuilt(compiled: Any) -> Any:
    """The host function of `compiled`, linked against the shim instead of the CUDA runtime.

    The compiled object itself keeps its own engine, so ordinary use of it is not affected.
    """
    cutlass = require_cutlass()
    dsl = cutlass.cutlass_dsl.CuTeDSL._get_dsl()
    if isinstance(compiled, Binary):
        return host_function(compiled, *_shim())
    module, shim = _redirected(compiled), str(_shim()[1])
    if hasattr(compiled, "_create_tvm_ffi_function"):
        return _rebuilt_tvm_ffi(compiled, module, [shim, *dsl.get_shared_libs()])
    engine = dsl.compiler_provider.jit(module, shared_libs=[shim, *dsl.get_shared_libs()])
    twin = copy.copy(compiled)
    twin.ir_module, twin.engine = module, engine
    twin.capi_func = dsl._lookup_jit_entry(engine, compiled.function_name)
    twin.capi_func.restype = ctypes.c_int32
    twin.jit_module = twin._default_executor = None
    twin._executor_lock = threading.RLock()
    twin.__dict__["num_devices"] = 1
    twin._redirected = True
    return twin


def is_redirected(function: Any) -> bool:
    """Whether a compiled function is a copy that calls the shim."""
    return getattr(function, "_redirected", False)


def _rebuilt_tvm_ffi(compiled: Any, module: Any, libraries: list[str]) -> Callable[..., Any]:
    import tvm_ffi

    native = "cutlass._mlir._mlir_libs._cutlass_ir"
    aot: Any = importlib.import_module(f"{native}._aot_support")
    engines: Any = importlib.import_module(f"{native}._execution_engine")
    code = aot.export_module_to_bytes(module, format="o", opt_level=3, enable_pic=True)
    engine = engines.BinaryExecutionEngine(code, libraries, True)
    pointer = engine.lookup("__tvm_ffi_" + compiled.function_name)
    function = tvm_ffi.Function.__from_extern_c__(pointer, keep_alive_object=engine)
    wrapper = getattr(compiled, "_kwargs_wrapper", None)
    if wrapper is None:
        return function
    # The wrapper knows keywords and defaults; give a copy of it the rebuilt function to call.
    own = getattr(compiled, "_tvm_ffi_function", None)
    names = {
        name: (function if value is own else value) for name, value in wrapper.__globals__.items()
    }
    twin = types.FunctionType(
        wrapper.__code__, names, wrapper.__name__, wrapper.__defaults__, wrapper.__closure__
    )
    twin.__kwdefaults__ = wrapper.__kwdefaults__
    return twin


def _runtime_arguments(
    compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a compile, without those that the compiler made constants."""
    full, left = compiled.execution_args.original_signature, compiled.execution_args.signature
    names = list(full.parameters)
    if names and names[0] == "self" and len(args) < len(names):
        args = (None, *args)
    bound = full.bind_partial(*args, **kwargs)
    positional, named = [], {}
    for name, value in bound.arguments.items():
        if name not in left.parameters:
            continue
        kind = left.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional += value
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            positional.append(value)
    return tuple(positional), named


def _call_argument(value: Any, tvm_ffi: bool) -> Any:
    if not isinstance(value, torch.Tensor | DeviceTensor):
        return value
    tensor = value.tensor if isinstance(value, DeviceTensor) else value
    if tvm_ffi:
        import tvm_ffi as ffi

        return ffi.from_dlpack(DeviceTensor(tensor))
    return device_tensor(tensor, assumed_align=None).mark_layout_dynamic()


def capture(
    function: Any,
    *args: Any,
    device: Device | None = None,
    arch: str = "sm_100a",
    options: str = "",
    tvm_ffi: bool = False,
    memory: Sequence[torch.Tensor | Memory] = (),
    ptx: str | None = None,
    **kwargs: Any,
) -> Capture:
    """Run a host function and return what it launched; nothing is executed on the machine.

    `function` is a `cute.jit` function (compiled here for `arch`, with `options` added to the
    compiler's) or the result of `cute.compile`. CPU tensors among the arguments, also inside
    tuples and dataclasses, are the device's memory; `memory` names more of it, for kernels that
    get raw pointers. A function compiled from tensors with partly static layouts and without
    TVM-FFI needs the same kind of tensors again: make them with `device_tensor`.
    """
    device = device or Device(arch=arch)
    given = _arguments_with_names(function, args, kwargs)
    if not _is_compiled(function):
        with emulated_device(device):
            compiled = compile_kernel(
                function, *args, arch=arch, options=options, tvm_ffi=tvm_ffi, **kwargs
            )
        args, kwargs = _runtime_arguments(compiled, args, kwargs)
    else:
        compiled = function
    convert = functools.partial(
        _call_argument, tvm_ffi=hasattr(compiled, "_create_tvm_ffi_function")
    )
    call = [map_leaves(arg, convert) for arg in args]
    named = {name: map_leaves(arg, convert) for name, arg in kwargs.items()}
    pieces: list[Memory] = []
    for name, value in given:
        find_memory(name, value, pieces)
    for i, extra in enumerate(memory):
        pieces.append(extra if isinstance(extra, Memory) else Memory.of(f"memory[{i}]", extra))
    return collect(compiled, lambda run: run(*call, **named), pieces, device, ptx)


def declare(library: ctypes.CDLL, device: Device, kernels: dict[str, Entry]) -> None:
    """Let the shim forget its launches and know the device and the kernels that may be launched."""
    library.shim_begin()
    for key, value in device.attributes().items():
        library.shim_device_attribute(key, value)
    for entry in kernels.values():
        sizes = (ctypes.c_uint32 * (len(entry.sizes) + 1))(*entry.sizes)
        name, n = entry.name.encode(), len(entry.sizes)
        shared, local = entry.static_shared, entry.local_bytes
        library.shim_declare(name, n, sizes, shared, local, entry.max_threads)


def collect(
    compiled: Any,
    call: Callable[[Any], Any],
    memory: Sequence[Memory],
    device: Device | None = None,
    ptx: str | None = None,
) -> Capture:
    """What `call(host function)` launches: the host function of `compiled`, on the shim.

    `compiled` is the result of `cute.compile` or a `Binary` of the kernel cache.
    """
    text = ptx if ptx is not None else _ptx_of(compiled)
    kernels = entries(text)
    with _lock:
        run = _cached_rebuild(compiled)
        library, _ = _shim()
        declare(library, device or Device(), kernels)
        try:
            code = call(run)
        except RuntimeError as error:
            text = library.shim_error().decode()
            if text:
                raise CaptureError(f"{compiled.function_name}: {text}") from error
            raise
        if isinstance(code, int) and code:
            text = library.shim_error().decode()
            raise CaptureError(f"{compiled.function_name} returned CUDA error {code}: {text}")
        records = [library.shim_launch(i).contents for i in range(library.shim_launches())]
        launches = [launch_of(record, kernels[record.kernel.decode()]) for record in records]
    return Capture(text, launches, merged(memory), compiled.function_name)


def _cached_rebuild(compiled: Any) -> Any:
    run = getattr(compiled, "_emulated_host_function", None)
    if run is None:
        run = _rebuilt(compiled)
        with contextlib.suppress(AttributeError):
            compiled._emulated_host_function = run
    return run


def _arguments_with_names(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any]]:
    names: list[str] = []
    try:
        if _is_compiled(function):
            signature = function.execution_args.signature
        else:
            signature = inspect.signature(function)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, p in signature.parameters.items() if p.kind in kinds]
    except (TypeError, ValueError):
        pass
    if names and names[0] == "self" and len(args) < len(names):
        names = names[1:]
    named = [(names[i] if i < len(names) else f"argument {i}", arg) for i, arg in enumerate(args)]
    return named + list(kwargs.items())


# ------------------------------------------------------------------------------------ execution


@dataclasses.dataclass
class Report:
    """What happened: one result of the machine for every launch, in the order of the stream."""

    capture: Capture
    results: list[Result]
    seconds: float = 0.0  # of the machine

    @property
    def launches(self) -> list[Launch]:
        return self.capture.launches

    @property
    def findings(self) -> list[Finding]:
        return [finding for result in self.results for finding in result.findings]

    @property
    def steps(self) -> int:
        """Warp instructions."""
        return sum(result.counters.steps for result in self.results)

    @property
    def ok(self) -> bool:
        return not self.findings

    def check(self) -> Report:
        """Raise EmulationError if anything was found."""
        for result in self.results:
            result.check()
        return self

    def __str__(self) -> str:
        speed = self.steps / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.capture.function or 'function'}: {len(self.results)} launches, {self.steps} "
            f"warp instructions in {self.seconds:.2f} s ({speed / 1e3:.0f} thousand a second), "
            f"{len(self.findings)} findings"
        ]
        for launch, result in zip(self.launches, self.results, strict=False):
            lines.append(f"  {launch}")
            if result.findings:
                lines += [f"  {line}" for line in result.report().splitlines()[1:]]
        return "\n".join(lines)


def execute(
    captured: Capture,
    policy: Policy | None = None,
    check: bool = True,
    tick: Tick | None = None,
) -> Report:
    """Execute captured launches on the machine, one after the other as the stream orders them.

    With `check`, a finding is an EmulationError, and launches after it do not run. Kernels with
    programmatic dependent launch start when the kernel before has finished, the latest moment.
    """
    regions = [Region(m.address, m.bytes, m.name) for m in captured.memory]
    machine = Machine(regions, policy or Policy(), tick)
    programs = {launch.kernel: load(captured.ptx, launch.kernel) for launch in captured.launches}
    for program in programs.values():
        program.reset_globals()
    report = Report(captured, [])
    for launch in captured.launches:
        program = programs[launch.kernel]
        params, _ = pack_arguments(program, launch.parameters)
        start = time.perf_counter()
        result = machine.launch(
            program, params, launch.grid, launch.block, launch.cluster, launch.dynamic_shared
        )
        report.seconds += time.perf_counter() - start
        report.results.append(result)
        if check:
            result.check()
    return report


def emulate(
    function: Any,
    *args: Any,
    policy: Policy | None = None,
    arch: str = "sm_100a",
    check: bool = True,
    tick: Tick | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `function` if needed, run it, and execute its kernels on the machine.

    Keywords of `capture` (device, options, tvm_ffi, memory, ptx) go there, all others to the
    function. `policy` is the machine's timing policy; with `check`, a finding is an error.
    """
    captured = capture(function, *args, arch=arch, **kwargs)
    return execute(captured, policy, check, tick)
