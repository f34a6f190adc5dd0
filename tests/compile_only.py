"""Compile the Triton kernels for a GPU that is not there, and read what ptxas made of them.

Each variant goes through the public call, so the compiled kernel is the one a launch would use: a
stand-in for Triton's driver names the target, and every launch stops after compilation. Prints one
line of JSON per variant. Runs as a program, in a process of its own, because a process either
compiles kernels or interprets them::

    python compile_only.py 80 90 100                 # the short list
    python compile_only.py --matrix 90               # everything (about an hour)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from launches import recorded
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cute_fmha import BlockMask, SkipSoftmax, SkipStats, attention, make_workspace, mla_decode
from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Gate, Identity, Scale
from cute_fmha.problem import HEAD_DIMS, Target

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
SMS = {80: 108, 90: 132, 100: 148}
PAIRS = (*((dim, dim) for dim in HEAD_DIMS), (192, 128))


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: what distinguishes it from its neighbours."""

    arch: int
    shape: str
    dim: int
    dim_v: int
    heads: int = 16
    dtype: str = "bfloat16"
    causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    sink: bool = False
    skip: bool = False
    stats: bool = False
    block_mask: bool = False
    num_splits: int | None = None
    page_size: int = 0
    packed: bool = False
    portable: bool = False
    epilogue: str = "identity"


@dataclass(frozen=True)
class Usage:
    """What the compiled kernel needs. ``stack`` bytes are local memory: spilled registers."""

    kernel: str
    registers: int
    stack: int
    local: int
    spills: int
    shared: int


class CompileOnlyDriver:
    """What Triton's runtime asks of a driver before it would load a kernel."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # A kernel keeps one compiler per device: a number of its own for each architecture.
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def launcher_cls(self, *args: Any, **kwargs: Any) -> None:
        return None


def compiled_kernels() -> list[Any]:
    """A list that every kernel is appended to from now on, instead of being launched."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    JITFunction.run = compile_only
    return kernels


def set_target(arch: int) -> None:
    """Plan and compile for ``arch`` from now on, although all tensors are on the CPU."""
    target = Target("cuda", arch, SMS[arch])
    driver.set_active(CompileOnlyDriver(arch))
    for name, module in list(sys.modules.items()):
        if name.startswith("cute_fmha.") and hasattr(module, "target_of"):
            setattr(module, "target_of", lambda device: target)  # noqa: B010


def _gate(variant: Variant) -> Gate:
    rows = 512 if variant.shape == "prefill" else 1
    return Gate(torch.empty(4, rows, variant.heads, variant.dim_v, dtype=torch.bfloat16))


EPILOGUES: dict[str, Callable[[Variant], EpilogueOp]] = {
    "identity": lambda variant: Identity(),
    "scale": lambda variant: Scale(torch.empty(variant.heads)),
    "fp8": lambda variant: FP8(torch.empty(variant.heads)),
    "nvfp4": lambda variant: NVFP4(torch.empty(1)),
    "gate": _gate,
}


def call(variant: Variant) -> str:
    """Make the public call that a variant stands for; returns the kernel that was planned."""
    with recorded(portable=variant.portable) as launches:
        _call(variant)
    ((_, plan),) = launches
    return plan.kernel


def _call(variant: Variant) -> None:
    dtype = getattr(torch, variant.dtype)
    options: dict[str, Any] = {
        "causal": variant.causal,
        "window": variant.window,
        "softcap": variant.softcap,
        "num_splits": variant.num_splits,
        "sink": torch.zeros(variant.heads) if variant.sink else None,
        "skip": SkipSoftmax(0.1) if variant.skip else None,
        "stats": SkipStats("cpu") if variant.stats else None,
        "epilogue": EPILOGUES[variant.epilogue](variant),
        "return_lse": True,
        "workspace": make_workspace("cpu", 1 << 30),
        "backend": "triton",
    }
    table = torch.zeros(4, 64, dtype=torch.int32)
    used = torch.zeros(4, dtype=torch.int32)
    if variant.shape == "mla":
        q = torch.empty(4, 1, variant.heads, variant.dim, dtype=dtype)
        cache = torch.empty(64, variant.page_size, 1, variant.dim, dtype=dtype)
        mla_decode(q, cache, table, used, return_max_logits=variant.stats, **options)
        return
    rows = 512 if variant.shape == "prefill" else 1
    q = torch.empty(4, rows, variant.heads, variant.dim, dtype=dtype)
    k = torch.empty(4, 1024, 2, variant.dim, dtype=dtype)
    v = torch.empty(4, 1024, 2, variant.dim_v, dtype=dtype)
    if variant.page_size:
        k, v = (x.unflatten(1, (-1, variant.page_size)).flatten(0, 1) for x in (k, v))
        options |= {"block_table": table, "seqused_k": used}
    elif variant.packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options |= {"cu_seqlens_q": used.new_zeros(5), "max_seqlen_q": rows}
        options |= {"cu_seqlens_k": used.new_zeros(5), "max_seqlen_k": 1024}
    elif variant.block_mask:
        mask = torch.zeros(1, 1, rows // 128, 1024 // 128, dtype=torch.bool)
        options["block_mask"] = BlockMask(mask, 128, 128)
    attention(q, k, v, **options)


def usage(kernel: Any) -> Usage:
    """Resources of a compiled kernel, and how often its machine code touches local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = {}
        for name, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")):
            tool = subprocess.run(
                [TOOLS / name, option, file.name], capture_output=True, text=True, check=True
            )
            tools[name] = tool.stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tools["cuobjdump"])
    assert found is not None, tools["cuobjdump"]
    registers, stack, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", tools["nvdisasm"]))
    return Usage(kernel.name, registers, stack, local, spills, kernel.metadata.shared)


EVERYTHING: dict[str, Any] = {
    "window": (100, -1), "softcap": 3.0, "sink": True, "skip": True, "stats": True
}  # fmt: skip


def short_list(arch: int) -> Iterator[Variant]:
    """Every kernel that the architecture has, mostly with everything in it."""
    yield Variant(arch, "prefill", 128, 128, packed=arch == 90, **EVERYTHING)
    if arch == 90:
        yield Variant(arch, "mla", 576, 512, 128, num_splits=4, page_size=64, **EVERYTHING)
        yield Variant(arch, "mla", 576, 512, page_size=16)
    else:
        yield Variant(arch, "decode", 128, 128, 128, num_splits=1, **EVERYTHING)
    yield Variant(arch, "decode", 128, 128, 128, num_splits=4, epilogue="fp8")


def crowded(arch: int) -> Iterator[Variant]:
    """What has spilled, and what has few registers left."""
    yield Variant(arch, "prefill", 256, 256, portable=True)
    yield Variant(arch, "prefill", 256, 256, epilogue="nvfp4")
    yield Variant(arch, "mla", 576, 512, 128, num_splits=4, page_size=64, portable=True)
    yield Variant(arch, "decode", 64, 64, num_splits=4, window=(100, -1))
    yield Variant(arch, "decode", 512, 512, num_splits=1, softcap=3.0, sink=True)
    yield Variant(arch, "mla", 576, 512, num_splits=4, page_size=64, epilogue="nvfp4")
    for options in ({"skip": True, "sink": True}, EVERYTHING):
        yield Variant(arch, "decode", 512, 512, num_splits=1, epilogue="nvfp4", **options)


def epilogues(arch: int) -> Iterator[Variant]:
    """Every op in every portable kernel, plain or with everything in it."""
    for options, name in itertools.product(({}, EVERYTHING), ("nvfp4", "fp8", "gate", "scale")):
        for dim, dim_v in PAIRS:
            yield Variant(arch, "prefill", dim, dim_v, epilogue=name, **options)
            for splits in (1, 4):
                yield Variant(
                    arch, "decode", dim, dim_v, 128, num_splits=splits, epilogue=name, **options
                )
        for splits, heads in itertools.product((1, 4), (16, 128)):
            yield Variant(
                arch, "mla", 576, 512, heads, num_splits=splits, page_size=64, epilogue=name,
                **options,
            )  # fmt: skip


def matrix(arch: int) -> list[Variant]:
    """Crowded ones, then head dims × skip × stats × windows × sink × splits, shuffled: a run cut
    short has seen some of every option on every kernel, and always the same ones first."""
    variants = list(_matrix(arch))
    random.Random(0).shuffle(variants)
    return [*crowded(arch), *variants]


def _matrix(arch: int) -> Iterator[Variant]:
    for extra, left, (skip, stats) in itertools.product(
        (False, True), (-1, 100), ((False, False), (True, True), (True, False))
    ):
        options: dict[str, Any] = {"skip": skip, "stats": stats, "sink": extra}
        if extra:
            options["softcap"] = 3.0
        if left >= 0:
            options["window"] = (left, -1)
        for dim, dim_v in PAIRS:
            yield Variant(arch, "prefill", dim, dim_v, portable=True, **options)
            if arch == 90 and dim <= 256:
                yield Variant(arch, "prefill", dim, dim_v, **options)
                yield Variant(arch, "prefill", dim, dim_v, packed=True, **options)
            yield Variant(arch, "prefill", dim, dim_v, page_size=16, **options)
            yield Variant(arch, "prefill", dim, dim_v, block_mask=True, **options)
            for splits in (1, 4):
                yield Variant(arch, "decode", dim, dim_v, num_splits=splits, **options)
        for splits, heads, width in itertools.product((1, 4), (16, 128), (576, 512)):
            mla = Variant(
                arch, "mla", width, 512, heads, num_splits=splits, page_size=64, **options
            )
            yield mla
            if arch == 90:
                yield replace(mla, page_size=16)
                yield replace(mla, portable=True)
    yield from epilogues(arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", type=int, nargs="+", choices=sorted(SMS))
    parser.add_argument("--matrix", action="store_true", help="every variant, not the short list")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--count", type=int, help="stop after so many of each architecture")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: an interpreted kernel has nothing to compile")
    end = time.monotonic() + arguments.seconds
    kernels = compiled_kernels()
    choose = matrix if arguments.matrix else short_list
    # Interleaved, so that a run cut short has looked at every architecture.
    chosen = (itertools.islice(choose(arch), arguments.count) for arch in arguments.arch)
    for group in itertools.zip_longest(*chosen):
        for variant in filter(None, group):
            if time.monotonic() > end:
                return
            set_target(variant.arch)
            kernels.clear()
            planned = call(variant)
            for kernel in kernels:
                line = {"plan": planned, **asdict(variant), **asdict(usage(kernel))}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
