"""Runs PTX kernels in the engine: memory regions, launches, findings and counters."""

from __future__ import annotations

import bisect
import ctypes
import functools
import re
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_fmha.emulator import ptx
from cute_fmha.emulator.assemble import Assembled, assemble, global_layout
from cute_fmha.emulator.binding import (
    CLASSES,
    COUNTS,
    EVENT,
    FINDING_KINDS,
    TICK,
    Config,
    Launch,
    RawFinding,
    address_of,
    engine_functions,
)

MAX_WARPS = 32
MAX_DYNAMIC_SHARED = 227 << 10
_NOWHERE = 0xFFFFFFFF


class EmulationError(RuntimeError):
    """The kernel is wrong, or uses what is not modelled; `result` has the findings, if it ran."""

    def __init__(self, text: str, result: Result | None = None) -> None:
        super().__init__(text)
        self.result = result


class UnmodelledError(EmulationError):
    """An instruction or directive that the engine does not model."""


# ---------------------------------------------------------------- policy


@dataclass(frozen=True)
class Policy:
    """When things happen, and what is checked.

    `mode`: asynchronous operations complete "eager", "lazy" (only when nothing else can go on) or
    "random" (by `seed`). `slice`: warp instructions before another warp gets a turn; under random
    order it is the most. `random_order` follows the mode unless given. `resident`: CTAs on the
    modelled GPU at a time (at least one cluster). `strict_tmem_load`: what tcgen05.ld loaded is
    undefined before wait::ld. `races`: keep vector clocks and shadow memory (slower).
    `strict_cp_async`: the tensor core may read, and the async proxy may overwrite, what cp.async
    (generic proxy) wrote only after a fence.proxy.async, as the ISA has it; kernels of CUTLASS and
    FlashAttention-4 do without, so this is off by default. `strict_tcgen05_fence`: accesses to
    tensor memory that other threads' synchronisation orders need tcgen05.fence::before_thread_sync
    (or a commit) before and ::after_thread_sync behind it; no kernel of the peers has them.
    `strict_scopes`: an mbarrier operation without a scope has .cta, as the ISA says, so that an
    arrival from another CTA orders nothing; all peers' clusters do that. `benign_races`: unordered
    plain stores of equal bytes are findings; by default they are notes, though formally they are
    races.
    """

    mode: str = "eager"
    seed: int = 0
    slice: int = 256
    random_order: bool | None = None
    resident: int = 4
    strict_tmem_load: bool = False
    races: bool = True
    trace_cta: int | None = None
    stop_at_finding: bool = False
    max_steps: int = 4_000_000_000
    strict_cp_async: bool = False
    strict_tcgen05_fence: bool = False
    strict_scopes: bool = False
    benign_races: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("eager", "lazy", "random"):
            raise ValueError(f"mode {self.mode!r} is not eager, lazy or random")
        if self.slice < 1 or self.resident < 1:
            raise ValueError("slice and resident have to be positive")

    def _config(self) -> Config:
        order = self.mode == "random" if self.random_order is None else self.random_order
        return Config(
            policy=("eager", "lazy", "random").index(self.mode),
            seed=self.seed & ((1 << 64) - 1),
            slice=self.slice,
            random_order=order,
            resident=self.resident,
            strict_tmem_load=self.strict_tmem_load,
            races=self.races,
            trace_cta=_NOWHERE if self.trace_cta is None else self.trace_cta,
            stop_at_finding=self.stop_at_finding,
            max_steps=self.max_steps,
            strict_cp_async=self.strict_cp_async,
            strict_tcgen05_fence=self.strict_tcgen05_fence,
            strict_scopes=self.strict_scopes,
        )


# ---------------------------------------------------------------- programs


@functools.lru_cache(maxsize=16)
def _module(source: str) -> tuple[ptx.Module, np.ndarray]:
    """A parsed module and the memory of its variables, which its kernels share."""
    module = ptx.parse(source)
    _, size = global_layout(module)
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 128
    return module, memory[start : start + size]


class Program:
    """A kernel, assembled and decoded. Kernels of one module share its variables."""

    def __init__(self, source: str, kernel: str | None = None) -> None:
        module, self.globals = _module(source)
        if kernel is None:
            if len(module.kernels) != 1:
                names = ", ".join(module.kernels) or "none"
                raise ValueError(f"the module has {len(module.kernels)} kernels ({names}): name it")
            kernel = next(iter(module.kernels))
        if kernel not in module.kernels:
            raise ValueError(f"no kernel {kernel!r} among {', '.join(module.kernels)}")
        self.module = module
        self.kernel = module.kernels[kernel]
        self.name = kernel
        self.assembled: Assembled = assemble(module, self.kernel, self.globals.ctypes.data)
        self._build()
        self.reset_globals()

    def _build(self) -> None:
        engine, assembled = engine_functions(), self.assembled
        handle = engine.program_build(
            self.name.encode(),
            address_of(assembled.sizes),
            assembled.strings,
            address_of(assembled.names),
            address_of(assembled.symbols),
            address_of(assembled.records),
            address_of(assembled.immediates),
        )
        self._handle = handle
        self._finalizer = weakref.finalize(self, engine.program_free, handle)
        error = engine.program_error(handle)
        if error:
            raise UnmodelledError(f"kernel {self.name}: {error.decode()}")
        text = ctypes.create_string_buffer(1 << 16)
        refused = engine.program_decode(handle, text, len(text))
        if refused:
            lines = [line.split("\t") for line in text.value.decode().splitlines()]
            distinct: dict[str, tuple[str, str]] = {}
            for line, name, why in lines:
                distinct.setdefault(f"{name}: {why}", (line, self.module.line(int(line))))
            shown = [
                f"  PTX line {line}: {text}\n    {what}"
                for what, (line, text) in list(distinct.items())[:20]
            ]
            raise UnmodelledError(
                f"kernel {self.name}: {refused} instructions are not modelled\n" + "\n".join(shown)
            )
        classes = np.zeros(len(assembled.lines), np.uint8)
        engine.program_classes(handle, classes.ctypes.data)
        self.classes = classes

    def reset_globals(self) -> None:
        """Give the variables of the module their initial values, as loading it does."""
        for variable, offset in self.assembled.globals:
            place = self.globals[offset : offset + variable.size]
            place[:] = np.frombuffer(variable.initial, np.uint8) if variable.initial else 0

    @property
    def parameter_bytes(self) -> int:
        return self.assembled.parameter_bytes

    def where(self, pc: int) -> str:
        """The PTX line of an instruction, its text, and the Python line if it is known."""
        if not 0 <= pc < len(self.assembled.lines):
            return ""
        line = self.assembled.lines[pc]
        file, python = self.assembled.sources[pc]
        source = f" ({file}:{python})" if python else ""
        text = self.module.line(line)
        return f"PTX line {line}{source}: {text if len(text) < 160 else text[:157] + '...'}"

    def with_sources(self, text: str) -> str:
        """Text with the Python line after every `PTX line N` whose source is known."""

        def place(match: re.Match[str]) -> str:
            pc = bisect.bisect_left(self.assembled.lines, int(match[1]))
            known = pc < len(self.assembled.lines) and self.assembled.lines[pc] == int(match[1])
            file, python = self.assembled.sources[pc] if known else ("", 0)
            return f"{match[0]} ({file}:{python})" if python else match[0]

        return re.sub(r"PTX line (\d+)", place, text)


_programs: OrderedDict[tuple[int, str, str | None], Program] = OrderedDict()
_MOST_PROGRAMS = 64


def load(source: str, kernel: str | None = None) -> Program:
    """The program of a kernel, assembled once per process."""
    key = (hash(source), source, kernel)
    program = _programs.get(key)
    if program is None:
        program = _programs[key] = Program(source, kernel)
        while len(_programs) > _MOST_PROGRAMS:
            _programs.popitem(last=False)
    else:
        _programs.move_to_end(key)
    return program


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Finding:
    """A fault of the kernel: `count` times at one instruction (`pc` None: at none)."""

    kind: str
    text: str
    pc: int | None
    line: int | None  # in the PTX
    python: tuple[str, int] | None  # file and line
    cta: int
    warp: int
    count: int
    fatal: bool
    where: str
    other: str = ""  # the other instruction of a race
    kernel: str = ""

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        who = f"CTA {self.cta} warp {self.warp}: " if self.warp >= 0 else ""
        other = f"\n    other: {self.other}" if self.other else ""
        name = self.kernel if len(self.kernel) <= 60 else f"{self.kernel[:57]}..."
        kernel = f" in kernel {name}" if self.kind == "bounds" and name else ""
        place = f"\n    {self.where}" if self.where else ""
        return f"{self.kind}{kernel}: {who}{self.text}{times}{place}{other}"


@dataclass(frozen=True)
class Counters:
    """What a launch executed. `cycles` and `tensor_cycles` come from a model, not a measurement."""

    steps: int
    by_class: dict[str, int]
    by_warp: np.ndarray  # [warp in the CTA, class]: warp instructions over all CTAs
    cycles: float
    tensor_cycles: float
    mma_flops: int = 0
    tma_load_bytes: int = 0
    tma_store_bytes: int = 0
    tma_multicast_bytes: int = 0
    global_read_bytes: int = 0
    global_write_bytes: int = 0
    shared_read_bytes: int = 0
    shared_write_bytes: int = 0
    tmem_read_bytes: int = 0
    tmem_write_bytes: int = 0
    mma_shared_bytes: int = 0
    mufu_ops: int = 0
    fma_ops: int = 0
    wait_failures: int = 0
    async_operations: int = 0


@dataclass
class Result:
    """Of one launch. `executed[w, pc]`: how often warp w of any CTA executed an instruction.

    `notes`: what was noticed, but is no fault by the policy (see Policy.benign_races).
    """

    program: Program
    findings: list[Finding]
    counters: Counters
    executed: np.ndarray
    events: np.ndarray
    deadlock: str = ""
    notes: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def report(self) -> str:
        """All findings as text."""
        lines = [f"kernel {self.program.name}: {len(self.findings)} findings"]
        lines += [str(finding) for finding in self.findings[:40]]
        if self.deadlock:
            lines.append(self.deadlock.rstrip())
        lines += [f"note, {note}" for note in self.notes]
        return "\n".join(lines)

    def check(self) -> Result:
        """Raise EmulationError if anything was found."""
        if self.findings:
            raise EmulationError(self.report(), self)
        return self


@dataclass(frozen=True)
class Region:
    """Global memory a kernel may use."""

    address: int
    bytes: int
    name: str
    writable: bool = True


def merge_regions(regions: Iterable[Region]) -> list[Region]:
    """Sorted by address; overlapping ones become one."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.address, -r.bytes)):
        if not region.bytes:
            continue
        last = merged[-1] if merged else None
        if last is not None and region.address < last.address + last.bytes:
            end = max(last.address + last.bytes, region.address + region.bytes)
            names = last.name if region.name in last.name.split(" / ") else ""
            merged[-1] = Region(
                last.address,
                end - last.address,
                names or f"{last.name} / {region.name}",
                last.writable or region.writable,
            )
        else:
            merged.append(region)
    return merged


# ---------------------------------------------------------------- machine

Tick = Callable[[int, int, int], object]


@dataclass
class Machine:
    """Launches programs on the same memory. `tick(steps, done, CTAs)`: progress; true stops."""

    regions: Sequence[Region]
    policy: Policy = field(default_factory=Policy)
    tick: Tick | None = None

    def launch(
        self,
        program: Program,
        params: bytes,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        cluster: Sequence[int] = (1, 1, 1),
        dynamic_shared: int = 0,
    ) -> Result:
        """Run one kernel to its end."""
        if len(params) != program.parameter_bytes:
            raise ValueError(
                f"{len(params)} bytes of parameters; {program.name} takes {program.parameter_bytes}"
            )
        shape = _launch(program, grid, block, cluster, dynamic_shared)
        engine = engine_functions()
        machine = engine.machine_new(ctypes.byref(self.policy._config()))
        stopped: list[BaseException] = []

        def on_tick(steps: int, done: int, total: int) -> bool:
            try:
                return bool(self.tick and self.tick(steps, done, total))
            except BaseException as error:
                stopped.append(error)
                return True

        callback = TICK(on_tick)
        try:
            for region in merge_regions(self.regions):
                name = region.name.encode()
                engine.machine_region(machine, region.address, region.bytes, name, region.writable)
            if len(program.globals):
                address, size = program.globals.ctypes.data, len(program.globals)
                engine.machine_region(machine, address, size, b"the module's variables", 1)
            engine.machine_tick(machine, callback)
            engine.machine_launch(machine, program._handle, ctypes.byref(shape), params)
            if stopped:
                raise stopped[0]
            return _result(engine, machine, program, self.policy)
        finally:
            engine.machine_free(machine)


def _three(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(int(size) for size in value)
    sizes += (1,) * (3 - len(sizes))
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{name} {value} is not three positive sizes")
    return sizes[0], sizes[1], sizes[2]


def _launch(
    program: Program,
    grid: Sequence[int],
    block: Sequence[int],
    cluster: Sequence[int],
    dynamic_shared: int,
) -> Launch:
    """The launch, after the checks the CUDA driver makes."""
    grid, block, cluster = _three(grid, "grid"), _three(block, "block"), _three(cluster, "cluster")
    directives = program.kernel.directives
    required = directives.get("reqnctapercluster")
    if required and cluster == (1, 1, 1):
        cluster = _three(required, "cluster")
    elif required and cluster != _three(required, "cluster"):
        raise ValueError(f"cluster {cluster}: {program.name} requires {required}")
    if any(size % part for size, part in zip(grid, cluster, strict=True)):
        raise ValueError(f"grid {grid} is not a multiple of the cluster {cluster}")
    if cluster[0] * cluster[1] * cluster[2] > 16:
        raise ValueError(f"a cluster of {cluster} CTAs: at most 16")
    threads = block[0] * block[1] * block[2]
    if threads > 1024:
        raise ValueError(f"{threads} threads in a block: at most 1024")
    needed = directives.get("reqntid")
    if needed and block != _three(needed, "reqntid"):
        raise ValueError(f"block {block}: {program.name} requires {needed}")
    most = directives.get("maxntid")
    if most and threads > int(np.prod(most)):
        raise ValueError(f"block {block}: {program.name} allows at most {most}")
    static = program.assembled.sizes[2] - 1024
    if dynamic_shared + static > MAX_DYNAMIC_SHARED:
        raise ValueError(f"{dynamic_shared + static} bytes of shared memory: more than 227 KiB")
    triple = ctypes.c_uint32 * 3
    return Launch(triple(*grid), triple(*block), triple(*cluster), dynamic_shared)


def _copy(address: int | None, count: int, dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    if not count or not address:
        return np.zeros(0, dtype)
    data = ctypes.string_at(address, count * dtype.itemsize)
    return np.frombuffer(data, dtype).copy()


def _result(engine: ctypes.CDLL, machine: int, program: Program, policy: Policy) -> Result:
    n = ctypes.c_int()
    found = engine.machine_findings(machine, ctypes.byref(n))
    findings = [_finding(program, found[i]) for i in range(n.value)]
    weak = () if policy.benign_races else ("benign race",)
    notes = [finding for finding in findings if finding.kind in weak]
    findings = [finding for finding in findings if finding.kind not in weak]
    instructions = len(program.assembled.lines)
    executed = _copy(engine.machine_executed(machine), MAX_WARPS * instructions, np.uint64)
    executed = executed.reshape(MAX_WARPS, instructions)
    events = _copy(engine.machine_events(machine, ctypes.byref(n)), n.value, EVENT)
    raw = engine.machine_counters(machine).contents
    by_warp = np.zeros((MAX_WARPS, len(CLASSES)), np.int64)
    for warp in np.flatnonzero(executed.any(axis=1)):
        row = np.bincount(program.classes, executed[warp].astype(np.float64), len(CLASSES))
        by_warp[warp] = row.astype(np.int64)
    counters = Counters(
        steps=raw.steps,
        by_class=dict(zip(CLASSES, (int(c) for c in raw.executed_by_class), strict=True)),
        by_warp=by_warp,
        cycles=raw.cycles,
        tensor_cycles=raw.tensor_cycles,
        **{name: int(getattr(raw, name)) for name in COUNTS},
    )
    deadlock = program.with_sources(engine.machine_deadlock(machine).decode(errors="replace"))
    return Result(program, findings, counters, executed, events, deadlock, notes)


def _finding(program: Program, raw: RawFinding) -> Finding:
    placed = raw.pc < len(program.assembled.lines)
    source = program.assembled.sources[raw.pc] if placed else ("", 0)
    return Finding(
        kind=FINDING_KINDS[raw.kind],
        text=program.with_sources(raw.text.decode(errors="replace")),
        pc=raw.pc if placed else None,
        line=program.assembled.lines[raw.pc] if placed else None,
        python=source if source[1] else None,
        cta=raw.cta,
        warp=raw.warp,
        count=raw.count,
        fatal=raw.fatal,
        where=program.where(raw.pc),
        other=program.where(raw.other_pc) if raw.other_pc != _NOWHERE else "",
        kernel=program.name,
    )


# ---------------------------------------------------------------- arguments


def memory_of(value: Any, name: str) -> Region | None:
    """The memory of a numpy array or CPU tensor; None for other things."""
    if isinstance(value, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(value) if value.size else (0, 0)
        return Region(low, high - low, name, bool(value.flags.writeable))
    if hasattr(value, "data_ptr") and hasattr(value, "element_size"):
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; the emulator takes CPU tensors")
        if not value.numel():
            return Region(0, 0, name)
        spans = zip(value.shape, value.stride(), strict=True)
        extent = sum((size - 1) * stride for size, stride in spans) + 1
        return Region(value.data_ptr(), extent * value.element_size(), name)
    return None


def _pointer(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    return int(value.data_ptr())


def _pack(parameter: ptx.Parameter, value: Any) -> bytes:
    size = parameter.bytes
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if len(data) != size:
            raise ValueError(f"{parameter.name}: {len(data)} bytes given, {size} wanted")
        return data
    if parameter.array:
        raise ValueError(f"{parameter.name} is an array of {size} bytes: give bytes")
    if value is None:
        value = 0
    if isinstance(value, (float, np.floating)) or parameter.type in ("f32", "f64"):
        formats = {2: "<e", 4: "<f", 8: "<d"}
        return struct.pack(formats[size], float(value))
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def pack_arguments(program: Program, arguments: Sequence[Any]) -> tuple[bytes, list[Region]]:
    """The parameter bytes of a launch and the memory that its arguments name."""
    layout = program.assembled.parameters
    if len(arguments) != len(layout):
        raise ValueError(f"{len(arguments)} arguments; {program.name} takes {len(layout)}")
    params = bytearray(program.parameter_bytes)
    regions = []
    for i, ((parameter, offset), value) in enumerate(zip(layout, arguments, strict=True)):
        region = memory_of(value, f"argument {i}")
        if region is not None:
            regions.append(region)
            value = _pointer(value)
        params[offset : offset + parameter.bytes] = _pack(parameter, value)
    return bytes(params), regions


def run_ptx(
    source: str,
    *arguments: Any,
    kernel: str | None = None,
    grid: Sequence[int] = (1, 1, 1),
    block: Sequence[int] = (32, 1, 1),
    cluster: Sequence[int] = (1, 1, 1),
    dynamic_shared: int = 0,
    policy: Policy | None = None,
    check: bool = True,
    memory: Iterable[Any] = (),
    tick: Tick | None = None,
) -> Result:
    """Run one kernel of a PTX module once.

    Arrays and CPU tensors are passed as pointers to memory with bounds; `memory` names more of it
    (for pointers inside of tensor maps). Ints and floats are packed by the parameter's type, bytes
    are taken as they are. `check`: raise EmulationError if there is any finding.
    """
    program = load(source, kernel)
    program.reset_globals()
    params, regions = pack_arguments(program, arguments)
    for i, value in enumerate(memory):
        region = value if isinstance(value, Region) else memory_of(value, f"memory {i}")
        if region is None:
            raise ValueError(f"memory {i} is not an array, a tensor or a Region")
        regions.append(region)
    machine = Machine(regions, policy or Policy(), tick)
    result = machine.launch(program, params, grid, block, cluster, dynamic_shared)
    return result.check() if check else result


def decode_errors(source: str, kernel: str | None = None) -> str:
    """Why a kernel cannot be emulated, or the empty string."""
    try:
        load(source, kernel)
    except UnmodelledError as error:
        return str(error)
    return ""
