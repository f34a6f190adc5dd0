"""Count what a call costs besides arithmetic: launches, synchronisations, allocations.

``python -m cute_fmha.bench.profile`` runs each case once under torch.profiler and prints the
counts; the exit status is 1 when a case is not 1 launch, 0 synchronisations, 0 allocations::

    python -m cute_fmha.bench.profile
    python -m cute_fmha.bench.profile --cases mla-h128-b128,decode-gqa-b1 --verbose

Each case runs in an NVTX range of its name inside the range ``cute_fmha``, after warm-up calls in
the range ``warmup``. A profiler from outside owns the device's counters, so under one pass
``--nvtx-only``: the calls run in their ranges and nothing is counted in-process. Nsight Systems,
then its launch, API and NVTX summaries; Nsight Compute on the kernels of one case::

    nsys profile --trace=cuda,nvtx -o cute_fmha \\
        python -m cute_fmha.bench.profile --nvtx-only --calls 20
    nsys stats --report cuda_gpu_kern_sum,cuda_api_sum,nvtx_kern_sum cute_fmha.nsys-rep

    ncu --nvtx --nvtx-include "cute_fmha/mla-h128-b128/" --set full --clock-control none \\
        -o mla python -m cute_fmha.bench.profile --nvtx-only --cases mla-h128-b128

What is counted, by `count`, on the thread that makes the call:

* launches: kernels on the device, plus memory copies and fills (each is a launch of its own);
* synchronisations: CUDA runtime and driver calls that wait for the device;
* allocations: tensors taken from PyTorch's caching allocator, plus cudaMalloc and its kin.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from cute_fmha.bench.peers import CuteFmha
from cute_fmha.bench.problems import Command, Shape, make_inputs, make_shape
from cute_fmha.dispatch import BACKENDS

WAITING_CALLS = frozenset(
    (
        "cudaDeviceSynchronize",
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cudaMemcpy2D",
        "cudaMemcpyToSymbol",
        "cudaMemcpyFromSymbol",
        "cudaMemset",
        "cuCtxSynchronize",
        "cuStreamSynchronize",
        "cuEventSynchronize",
        "cuMemcpyDtoH",
        "cuMemcpyHtoD",
    )
)
"""Runtime and driver calls that block the host until the device has finished something."""

ALLOCATING_CALLS = frozenset(
    ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cudaMallocHost", "cudaMallocManaged",
     "cuMemAlloc", "cuMemAllocAsync", "cuMemCreate", "cuMemHostAlloc")
)  # fmt: skip

_MARKER = "cute_fmha.count"


@dataclass(frozen=True)
class Counts:
    """What one call cost."""

    launches: int
    kernel_names: tuple[str, ...]
    synchronisations: int
    allocations: int

    @property
    def ideal(self) -> bool:
        return (self.launches, self.synchronisations, self.allocations) == (1, 0, 0)


def _api_name(name: str) -> str:
    """The call's name without its version suffix: ``cuMemAlloc_v2``, ``cudaMalloc_v3020``."""
    return name.split("_")[0]


def tally(
    runtime_calls: Iterable[str], device_events: Iterable[str], allocator_calls: int
) -> Counts:
    """Counts from the names of the API calls and device activities of one call."""
    names = [_api_name(name) for name in runtime_calls]
    kernels = tuple(device_events)
    return Counts(
        launches=len(kernels),
        kernel_names=kernels,
        synchronisations=sum(name in WAITING_CALLS for name in names),
        allocations=allocator_calls + sum(name in ALLOCATING_CALLS for name in names),
    )


def _allocator_calls() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def _traced(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """(API calls made within ``call``, device activities it caused), by name."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as trace:
        with record_function(_MARKER):
            call()
        torch.cuda.synchronize()
    events: list[Any] = list(trace.events())
    host = [e for e in events if e.device_type == DeviceType.CPU]
    span = next(e.time_range for e in host if e.name == _MARKER)
    within = [
        e.name for e in host
        if e.name.startswith("cu") and span.start <= e.time_range.start <= span.end
    ]  # fmt: skip
    # The marker appears on the device's timeline too, as an annotation.
    device = [e.name for e in events if e.device_type == DeviceType.CUDA and e.name != _MARKER]
    return within, device


_profiler_ready = False


def _start_profiler_once() -> None:
    """The first trace of a process can miss events: spend it on a fill."""
    global _profiler_ready
    if not _profiler_ready:
        _traced(lambda: torch.zeros(1, device="cuda"))
        _profiler_ready = True


def count(call: Callable[[], object], warmups: int = 3) -> Counts:
    """Count launches, synchronisations and allocations of one ``call`` on the current device.

    Args:
        call: makes the CUDA work; its return value is dropped.
        warmups: calls made before, so that compilation and caches are not counted.
    """
    for _ in range(warmups):
        call()
    torch.cuda.synchronize()
    before = _allocator_calls()
    call()
    allocated = _allocator_calls() - before
    torch.cuda.synchronize()
    _start_profiler_once()
    api, device = _traced(call)
    return tally(api, device, allocated)


# Cases.


@dataclass(frozen=True)
class Case:
    """A named problem to run under a profiler."""

    name: str
    shape: Shape


def _case(
    name: str, command: Command, numbers: tuple[int, ...], causal: bool = True, page_size: int = 0
) -> Case:
    return Case(name, make_shape(command, numbers, causal, torch.bfloat16, page_size))


CASES = (
    _case("prefill-d128-causal", "prefill", (1, 16, 16, 8192, 128, 128)),
    _case("prefill-d128-full", "prefill", (1, 16, 16, 8192, 128, 128), causal=False),
    _case("prefill-d192-causal", "prefill", (1, 32, 32, 8192, 192, 128)),
    _case("prefill-gqa", "prefill", (1, 64, 8, 8192, 128, 128)),
    _case("decode-gqa-b1", "decode", (1, 32, 8, 128, 8192)),
    _case("decode-gqa-b64", "decode", (64, 64, 8, 128, 8192)),
    _case("decode-paged-b16", "decode", (16, 64, 8, 128, 8192), page_size=64),
    _case("mla-h128-b128", "mla-decode", (128, 1, 128, 4096), page_size=64),
    _case("mla-h128-b1", "mla-decode", (1, 1, 128, 8192), page_size=64),
    _case("mla-h16-b64", "mla-decode", (64, 1, 16, 8192), page_size=64),
    _case("mla-mtp2-b32", "mla-decode", (32, 2, 128, 8192), page_size=64),
)


def choose_cases(names: str | None) -> tuple[Case, ...]:
    """The cases of these comma-separated names; all for None.

    Raises:
        ValueError: a name that is no case.
    """
    if names is None:
        return CASES
    known = {case.name: case for case in CASES}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"--cases: got {', '.join(unknown)}; allowed: {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))


@contextlib.contextmanager
def nvtx(name: str) -> Iterator[None]:
    """A range on the NVTX timeline of this thread."""
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def prepare(case: Case, backend: str) -> Callable[[], object]:
    """The call of a case, with ``out=`` and ``workspace=`` given."""
    inputs = make_inputs(case.shape, torch.device("cuda", torch.cuda.current_device()), seed=0)
    return CuteFmha(backend).prepare(case.shape, inputs)


def _run_in_ranges(case: Case, call: Callable[[], object], calls: int) -> None:
    with nvtx("warmup"):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    with nvtx("cute_fmha"), nvtx(case.name):
        for _ in range(calls):
            call()
        torch.cuda.synchronize()


def _report(case: Case, counts: Counts, verbose: bool) -> None:
    verdict = "ok" if counts.ideal else "NOT 1, 0, 0"
    print(
        f"{case.name:22} {counts.launches:9} {counts.synchronisations:17} "
        f"{counts.allocations:12}  {verdict}",
        flush=True,
    )
    if verbose or not counts.ideal:
        for name in counts.kernel_names:
            print(f"    {name}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status (2: no CUDA device)."""
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--nvtx-only", action="store_true", help="run in ranges, count nothing")
    parser.add_argument("--calls", type=int, default=1, help="calls per range (default 1)")
    parser.add_argument("--verbose", action="store_true", help="name the kernels")
    options = parser.parse_args(argv)
    try:
        cases = choose_cases(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing to count")
        return 2
    ideal = True
    if not options.nvtx_only:
        print(f"{'case':22} {'launches':>9} {'synchronisations':>17} {'allocations':>12}")
    for case in cases:
        call = prepare(case, options.backend)
        _run_in_ranges(case, call, options.calls)
        if not options.nvtx_only:
            counts = count(call, warmups=0)
            ideal = ideal and counts.ideal
            _report(case, counts, options.verbose)
    return 0 if ideal else 1


if __name__ == "__main__":
    raise SystemExit(main())
