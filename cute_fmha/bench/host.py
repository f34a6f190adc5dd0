"""``python -m cute_fmha.bench.host``: host time of a call up to its launch; no GPU is needed.

Everything that a call does on the host happens as with ``backend="blackwell"`` on a GPU, but for
two things: the CUDA runtime is the emulator's shim, which records the launch and returns, and
tensors are the CPU's, of which TVM-FFI is told that they are CUDA's. What is missing is hence the
driver's own time for a launch, the same for every library.

Rows: the public call; the same into a given tensor, and what of it the backend's `run` and the
compiled host function take; the PyTorch operator; for prefill also a kernel called as CuTe DSL does
without TVM-FFI, and FlashAttention-4's public call, if it is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cute_fmha
from cute_fmha import dispatch, repeat
from cute_fmha.emulator import capture as cap
from cute_fmha.emulator.build import build_library
from cute_fmha.emulator.device import Device, emulated_device, patched
from cute_fmha.kernels.blackwell import build, launch
from cute_fmha.ops import Call
from cute_fmha.problem import Problem, Target
from cute_fmha.problem_text import SYNTAX, parse
from cute_fmha.testing import AttentionCase, MlaCase

TARGET = Target("cuda", 100, 148)
BATCH = 50
"""Calls between two looks at the clock; the shim forgets its records in between."""


def tensors_on_cuda() -> None:
    """From now on TVM-FFI takes CPU tensors for CUDA tensors, in this process."""
    source = Path(cap.__file__).with_name("exchange.c")
    library = ctypes.CDLL(str(build_library("exchange", [source])))
    library.exchange_on_cuda.restype = ctypes.c_void_p
    library.exchange_on_cuda.argtypes = [ctypes.c_void_p]
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = b"dlpack_exchange_api"
    theirs = api.PyCapsule_GetPointer(torch.Tensor.__dlpack_c_exchange_api__, name)
    _kept.append(name)  # the capsule refers to it
    torch.Tensor.__dlpack_c_exchange_api__ = api.PyCapsule_New(
        library.exchange_on_cuda(theirs), name, None
    )


_kept: list[bytes] = []


class Shim:
    """Host functions linked with the shim, and what they launched."""

    def __init__(self) -> None:
        self.library, _ = cap._shim()
        self.kernels: dict[str, cap.Entry] = {}

    def link(self, compiled: Any) -> Callable[..., Any]:
        self.kernels |= cap.entries(cap._ptx_of(compiled))
        function: Callable[..., Any] = cap._rebuilt(compiled)
        self.reset()
        return function

    def reset(self) -> None:
        cap.declare(self.library, Device(), self.kernels)

    @property
    def launches(self) -> int:
        return int(self.library.shim_launches())


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    microseconds: float
    launches: int


def measure(name: str, call: Callable[[], Any], shim: Shim, seconds: float) -> Row:
    """The best of many batches: what the processor needs when nothing disturbs it."""
    call()  # compiles what there is to compile
    shim.reset()
    call()
    launches = shim.launches
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shim.reset()
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        best = min(best, (time.perf_counter() - start) / BATCH)
    return Row(name, best * 1e6, launches)


def ours(case: AttentionCase | MlaCase, shim: Shim, seconds: float) -> list[Row]:
    """The blackwell backend, part by part."""
    options = {**case.common, "backend": "blackwell"}
    inputs: tuple[torch.Tensor, ...]
    if isinstance(case, MlaCase):
        operation, width, text = "mla_decode", 512, "mla_decode(q, cache, table, lengths"
        inputs = (case.q, case.kv_cache, case.block_table, case.cache_seqlens)
        options["workspace"] = cute_fmha.make_workspace("cpu", 64 << 20)
    else:
        operation, width, text = "attention", case.v.shape[-1], "attention(q, k, v"
        inputs = (case.q, case.k, case.v)
    public = getattr(cute_fmha, operation)
    out = torch.empty((*case.q.shape[:-1], width), dtype=case.q.dtype)

    def call() -> Any:
        return public(*inputs, **options)

    def call_into() -> Any:
        return public(*inputs, out=out, **options)

    given: list[Any] = []
    operator = getattr(torch.ops.cute_fmha, operation)
    with patched(
        (dispatch, "target_of", lambda device: TARGET),
        (launch, "target_of", lambda device: TARGET),
        (build, "link", shim.link),
    ):
        with patched((launch, "run", given.append)):
            call_into()
        inner: Call = given.pop()
        with patched(
            (repeat, "is_eager", lambda: False),
            (torch.ops.cute_fmha, operation, lambda *a: given.append(a)),
        ):
            call_into()
        values = given.pop()
        function, arguments = launch._launcher(inner.problem, TARGET)
        made = arguments(inner)
        parts: dict[str, Callable[[], Any]] = {
            f"{text})": call,
            f"{text}, out=out)": call_into,
            "  of this the backend, run(call)": lambda: launch.run(inner),
            "  of this the host function: tensor maps, launch": lambda: function(*made),
            f"torch.ops.cute_fmha.{operation}, as compiled graphs call it": lambda: operator(
                *values
            ),
        }
        return [measure(name, part, shim, seconds) for name, part in parts.items()]


def plain(case: AttentionCase, problem: Problem, shim: Shim, seconds: float) -> list[Row]:
    """The same kernel compiled without TVM-FFI and called as CuTe DSL does."""
    from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]

    from cute_fmha.kernels.blackwell import prefill_host

    def tensor(x: torch.Tensor) -> Any:
        return cap.device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)

    kernel, placeholders = prefill_host.compile_arguments(prefill_host.plan_of(problem))
    bundle, op, lengths, scalars, _ = placeholders
    out = torch.empty((*case.q.shape[:-1], case.v.shape[-1]), dtype=case.q.dtype)
    tensors = (case.q, case.k, case.v, out)
    absent = [None] * (len(bundle) - len(tensors))

    def arguments(*views: Any) -> tuple[Any, ...]:
        return (type(bundle)(*views, *absent), op, lengths, scalars, CUstream(0))

    made = arguments(*map(tensor, tensors))
    function = shim.link(cap.compile_kernel(kernel, *made))
    return [
        measure(
            "CuTe DSL without TVM-FFI", lambda: function(*arguments(*map(tensor, tensors))), shim,
            seconds,
        ),
        measure("  with tensors converted before", lambda: function(*made), shim, seconds),
    ]  # fmt: skip


class _Cute:
    """`cutlass.cute` whose compile() gives functions that are linked with the shim."""

    def __init__(self, original: Any, shim: Shim) -> None:
        self._original, self._shim = original, shim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        return self._shim.link(cap.compile_kernel(*args, **kwargs))


def peer(case: AttentionCase, shim: Shim, seconds: float) -> list[Row]:
    """FlashAttention-4's public call, its interface as it is; [] without the package."""
    settings = {"FLASH_ATTENTION_ARCH": "sm_100", "FLASH_ATTENTION_NUM_SMS": "148"}
    with (
        mock.patch.dict(os.environ, settings),
        warnings.catch_warnings(),
        emulated_device(),
        mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
    ):
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("flash_attn.cute.interface")
        except ImportError:
            return []

        def to_cute_tensor(
            t: Any, assumed_align: int = 16, leading_dim: int = -1, **options: Any
        ) -> Any:
            if t is None:
                return None
            view = cap.device_tensor(t, assumed_align, enable_tvm_ffi=True)
            return view.mark_layout_dynamic(leading_dim=leading_dim % t.dim())

        with patched(
            (module, "to_cute_tensor", to_cute_tensor),
            (module, "cute", _Cute(module.cute, shim)),
        ):
            q, k, v = case.q, case.k, case.v
            causal = case.common["causal"]
            name = "flash_attn.cute.flash_attn_func(q, k, v)"
            row = measure(
                name, lambda: module.flash_attn_func(q, k, v, causal=causal), shim, seconds
            )
        return [row]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.bench.host",
        description=__doc__,
        epilog=SYNTAX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problem", default="b2,sq512,sk512,hq8,hkv2,d128,causal,bf16")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row (default: 3)")
    options = parser.parse_args(arguments)
    text = parse(options.problem)
    case = text.case(0)
    tensors_on_cuda()
    shim = Shim()
    with torch.no_grad():
        rows = ours(case, shim, options.seconds)
        if isinstance(case, AttentionCase):
            rows += plain(case, text.problem, shim, options.seconds)
            rows += peer(case, shim, options.seconds)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, {options.problem}"
    )
    for row in rows:
        print(f"{row.microseconds:8.2f} µs  {row.launches} launch  {row.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
