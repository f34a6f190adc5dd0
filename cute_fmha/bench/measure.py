"""Timers: CUDA-graph replay, event-timed calls, and a host clock where there is no GPU.

A *contestant* is an implementation with its inputs bound, one callable per input set. All
contestants of a shape are timed in turn within each round, so that a drift of the clocks hits all
of them alike, and the first one of the round changes every round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch

Mode = Literal["graph", "plain"]
Thunk = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """Microseconds per call: median and 10th and 90th percentile over ``samples`` samples of
    ``calls`` calls each."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.p90_us - self.p10_us) / self.median_us


@dataclass(frozen=True)
class Failure:
    """Why a contestant has no time."""

    reason: str


@dataclass(frozen=True)
class Contestant:
    """An implementation ready to be timed: ``calls`` holds one callable per input set."""

    name: str
    calls: tuple[Thunk, ...]


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure.

    seconds: measuring time that each contestant gets per shape (at least ``min_rounds`` samples).
    sample_us: least length of one timed sample; shorter calls are repeated within it.
    """

    mode: Mode = "graph"
    seconds: float = 0.3
    sample_us: float = 2000.0
    min_rounds: int = 15
    max_rounds: int = 200
    max_calls: int = 512
    warmup_seconds: float = 0.1


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; ``share`` in [0, 1]."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples_us: Sequence[float], calls: int) -> Summary:
    """Samples of ``calls`` calls each, in microseconds per sample, as microseconds per call."""
    per_call = [sample / calls for sample in samples_us]
    return Summary(
        percentile(per_call, 0.5), percentile(per_call, 0.1), percentile(per_call, 0.9),
        len(per_call), calls,
    )  # fmt: skip


class Prepared(Protocol):
    """A contestant compiled, warmed up and ready for rounds."""

    calls: int
    sample_us: float

    def round(self) -> None:
        """Take one sample; may return before the device has finished."""

    def samples(self) -> list[float]:
        """Microseconds of every sample so far; synchronises."""


def _repeat(thunks: Sequence[Thunk], calls: int) -> None:
    for index in range(calls):
        thunks[index % len(thunks)]()


def calls_per_sample(settings: Settings, call_us: float, sets: int) -> int:
    """A multiple of ``sets`` calls that lasts at least ``settings.sample_us``, within its cap."""
    wanted = min(math.ceil(settings.sample_us / max(call_us, 1e-3)), settings.max_calls)
    return sets * max(1, math.ceil(wanted / sets))


@dataclass
class HostTimer:
    """Wall-clock samples, for CPU tensors."""

    thunks: tuple[Thunk, ...]
    calls: int
    sample_us: float
    _samples: list[float] = field(default_factory=list)

    def round(self) -> None:
        start = time.perf_counter_ns()
        _repeat(self.thunks, self.calls)
        self._samples.append((time.perf_counter_ns() - start) / 1e3)

    def samples(self) -> list[float]:
        return self._samples


@dataclass
class DeviceTimer:
    """Event-timed samples of ``launch``: a graph replay, or plain calls."""

    launch: Thunk
    calls: int
    sample_us: float
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def round(self) -> None:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        self.launch()
        end.record()
        self._events.append((start, end))

    def samples(self) -> list[float]:
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in self._events]


def _event_microseconds(launch: Thunk) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    launch()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _capture(thunks: Sequence[Thunk], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _repeat(thunks, calls)
    return graph


def _prepare_host(thunks: tuple[Thunk, ...], settings: Settings) -> HostTimer:
    for thunk in thunks:
        thunk()
    start = time.perf_counter()
    thunks[0]()
    call_us = 1e6 * (time.perf_counter() - start)
    calls = calls_per_sample(settings, call_us, len(thunks))
    return HostTimer(thunks, calls, call_us * calls)


def _prepare_device(thunks: tuple[Thunk, ...], settings: Settings) -> DeviceTimer:
    # Warm up on the stream kind that capture uses, so that lazy initialisation is behind us.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for thunk in (*thunks, thunks[0]):
            thunk()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    call_us = min(_event_microseconds(thunks[0]) for _ in range(3))
    calls = calls_per_sample(settings, call_us, len(thunks))
    launch: Thunk = partial(_repeat, thunks, calls)
    if settings.mode == "graph":
        # A host-bound call is much shorter in a graph: time a trial graph before sizing the real.
        trial = _capture(thunks, len(thunks))
        trial.replay()
        call_us = _event_microseconds(trial.replay) / len(thunks)
        calls = calls_per_sample(settings, call_us, len(thunks))
        launch = _capture(thunks, calls).replay
    launch()
    return DeviceTimer(launch, calls, _event_microseconds(launch))


def prepare(contestant: Contestant, device: torch.device, settings: Settings) -> Prepared:
    """Compile, warm up and size the samples of one contestant."""
    if device.type == "cuda":
        return _prepare_device(contestant.calls, settings)
    return _prepare_host(contestant.calls, settings)


def rounds_for(settings: Settings, sample_us: Sequence[float]) -> int:
    """Rounds that give each contestant ``settings.seconds`` on average."""
    mean = sum(sample_us) / len(sample_us)
    wanted = math.ceil(1e6 * settings.seconds / max(mean, 1e-3))
    return max(settings.min_rounds, min(settings.max_rounds, wanted))


def describe(error: BaseException) -> str:
    """One line for a table: the kind of error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _warm(prepared: Sequence[Prepared], device: torch.device, settings: Settings) -> None:
    """Keep the device busy for a moment: it needs that to reach its clocks."""
    if device.type != "cuda":
        return
    end = time.perf_counter() + settings.warmup_seconds
    while time.perf_counter() < end:
        for timer in prepared:
            assert isinstance(timer, DeviceTimer)
            timer.launch()
        torch.cuda.synchronize()


def measure(
    contestants: Sequence[Contestant], device: torch.device, settings: Settings
) -> dict[str, Summary | Failure]:
    """Time all contestants of one shape, interleaved. One that fails is reported, not raised."""
    results: dict[str, Summary | Failure] = {}
    prepared: dict[str, Prepared] = {}
    # A collection inside a timed round, or inside a capture, would disturb it.
    gc.collect()
    gc.disable()
    try:
        for contestant in contestants:
            try:
                prepared[contestant.name] = prepare(contestant, device, settings)
            except Exception as error:  # whatever a peer raises is its result
                results[contestant.name] = Failure(describe(error))
        timers = list(prepared.values())
        if timers:
            _warm(timers, device, settings)
        for turn in range(rounds_for(settings, [t.sample_us for t in timers]) if timers else 0):
            first = turn % len(timers)
            for timer in timers[first:] + timers[:first]:
                timer.round()
        for name, timer in prepared.items():
            results[name] = summarise(timer.samples(), timer.calls)
    finally:
        gc.enable()
    return {c.name: results[c.name] for c in contestants}


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: copy bandwidth (read + write) and a bf16 product."""

    copy_gbps: float
    matmul_tflops: float


def _median_us(call: Thunk, settings: Settings) -> float:
    device = torch.device("cuda", torch.cuda.current_device())
    result = measure([Contestant("ceiling", (call,))], device, settings)["ceiling"]
    if isinstance(result, Failure):
        raise RuntimeError(f"a ceiling could not be measured: {result.reason}")
    return result.median_us


def _copy_gbps(settings: Settings) -> float:
    source = torch.randn(1 << 31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    # An elementwise kernel: a captured copy_ becomes a memcpy node, which is a third slower.
    return 2 * source.nbytes / _median_us(lambda: torch.neg(source, out=target), settings) / 1e3


def _matmul_tflops(settings: Settings) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / _median_us(lambda: torch.mm(a, b, out=out), settings) / 1e6


def measure_ceilings(settings: Settings) -> Ceilings:
    """A 4 GiB device copy and an 8192³ bf16 product, both on random data."""
    return Ceilings(_copy_gbps(settings), _matmul_tflops(settings))
