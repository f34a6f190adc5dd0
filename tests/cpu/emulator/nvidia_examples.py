"""NVIDIA's CuTe DSL examples on the emulator (run by hand, not collected).

    python tests/cpu/emulator/nvidia_examples.py FOLDER [NAME ...]

FOLDER is examples/python/CuTeDSL of a copy of CUTLASS. Every program runs as it is, with its own
inputs and its own check. Its reference is computed in float64: einsum, softmax and attention get
doubles. Every launch runs under all policies from the same memory, whose contents afterwards are
compared; then once more with strict_tcgen05_fence. Prints a row of a table per program, then the
findings.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import runpy
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from cute_fmha.emulator import capture as cap
from cute_fmha.emulator.machine import Policy, load
from cute_fmha.emulator.programs import emulating

GEMM, ATTENTION = "cute/blackwell/tutorial/tutorial_gemm/", "cute/blackwell/kernel/attention/"
SIZE = ["--mnk", "512,512,256"]
MLA = ["--batch_size", "1", "--seq_len_k", "256", "--page_size", "128", "--iterations", "1"]
FMHA = ["--q_shape", "1,256,2,128", "--k_shape", "1,256,2,128", "--iterations", "1"]
EXAMPLES = {
    **{f"gemm_{n}": [f"{GEMM}fp16_gemm_{n}.py", *SIZE] for n in ("0", "1", "2", "3", "3_1", "4")},
    "gemm_5": [f"{GEMM}fp16_gemm_5.py", *SIZE],
    "fmha": [f"{ATTENTION}fmha/fmha.py", *FMHA],
    "fmha_causal": [f"{ATTENTION}fmha/fmha.py", *FMHA, "--is_causal"],
    "mla_fp16": [f"{ATTENTION}mla/mla_decode_fp16.py", *MLA],
    "mla_fp8": [f"{ATTENTION}mla/mla_decode_fp8.py", *MLA],
}
POLICIES = {
    "eager": Policy("eager"),
    "lazy": Policy("lazy"),
    "random": Policy("random", seed=1, slice=64),
    "fences": Policy("eager", strict_tcgen05_fence=True),
}


class Doubles(TorchFunctionMode):
    """References in float64, and kept so."""

    functions = (
        torch.einsum, torch.softmax, torch.logsumexp, torch.matmul, torch.exp2, torch.log2,
        torch.nn.functional.scaled_dot_product_attention,
    )  # fmt: skip

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        if function in self.functions:
            args = tuple(map(wide, args))
        if function is torch.Tensor.to and args[0].dtype is torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


class Runs:
    """What every launch of a program did under every policy."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(POLICIES, 0.0)
        self.steps = 0
        self.found: dict[str, dict[str, tuple[int, str]]] = {name: {} for name in POLICIES}
        self.differing: set[str] = set()
        self.errors: list[float] = []

    def __call__(self, captured: cap.Capture) -> None:
        pieces = captured.memory
        before = [ctypes.string_at(piece.address, piece.bytes) for piece in pieces]
        after: list[bytes] = []
        for launch in captured.launches:
            load(captured.ptx, launch.kernel)  # so that no policy's time has it
        for name, policy in POLICIES.items():
            for piece, data in zip(pieces, before, strict=True):
                ctypes.memmove(piece.address, data, piece.bytes)
            start = time.perf_counter()
            report = cap.execute(captured, policy=policy, check=False)
            self.seconds[name] += time.perf_counter() - start
            now = [ctypes.string_at(piece.address, piece.bytes) for piece in pieces]
            after = after or now
            if now != after:
                self.differing.add(name)
            for result in report.results:
                self.steps += result.counters.steps if name == "eager" else 0
                for finding in result.findings:
                    line = re.sub(r".*/", "", f"{(finding.python or ('', 0))[0]}")
                    fence = re.search(r"fence::\w+", finding.text)
                    key = f"{finding.kind}{' ' + fence[0] if fence else ''}"
                    count, text = self.found[name].get(key, (0, ""))
                    place = f"{line}:{finding.python[1]}" if finding.python else ""
                    text = text or f"{place} {finding.text[:300]}"
                    self.found[name][key] = count + 1, text

    def compare(self, actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
        self.errors.append(float((actual.double() - expected.double()).abs().max()))
        tolerance = kwargs.get("atol") or 0.0
        assert self.errors[-1] <= tolerance + 0.01 * float(expected.double().abs().max())


def run(folder: str, name: str) -> None:
    driver: Any = importlib.import_module("cuda.bindings.driver")

    success = driver.CUresult.CUDA_SUCCESS
    script, *arguments = EXAMPLES[name]
    script = os.path.join(folder, script)
    sys.path[:0] = [folder, os.path.dirname(script)]
    runs = Runs()
    verdict = "right"
    torch.manual_seed(0)
    with (
        mock.patch.object(driver, "cuInit", return_value=(success,)),
        mock.patch.object(driver, "cuDeviceGetCount", return_value=(success, 1)),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(torch.testing, "assert_close", runs.compare),
        emulating(on_capture=runs),
        Doubles(),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit:
            pass
        except Exception as error:  # the benchmark behind the check needs a driver
            if not runs.errors:
                verdict = f"{type(error).__name__}: {error}"[:200]
    errors = ", ".join(f"{value:.2g}" for value in runs.errors)
    found = {key: sorted(runs.found[key]) for key in ("eager", "lazy", "random")}
    kinds = sorted({kind for some in found.values() for kind in some}) or ["none"]
    seconds = " / ".join(f"{runs.seconds[key]:.1f}" for key in ("eager", "lazy", "random"))
    fences = {k.split("::")[1]: n for k, (n, _) in runs.found["fences"].items() if "fence::" in k}
    equal = "no" if runs.differing else "yes"
    print(
        f"| {name} | {' '.join(arguments)} | {runs.steps / 1e3:.0f} | {verdict} | {errors} "
        f"| {equal} | {', '.join(kinds)} | {seconds} | {fences} |"
    )
    for key, some in runs.found.items():
        for kind, (count, text) in some.items():
            print(f"    {key}: {kind}, {count} instructions; the first: {text}")


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    if len(names) == 1:
        run(os.path.abspath(folder), names[0])
    else:
        print("program | arguments | thousand warp instructions | verdict | errors | same bits")
        for one in names or EXAMPLES:
            command = [sys.executable, __file__, folder, one]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(done.stdout or done.stderr[-2000:], flush=True)
