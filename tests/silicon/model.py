"""What a case is: a kernel for sm_90a, its arguments, and how its results are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VERSION, TARGET = "8.8", "sm_90a"
PREAMBLE = f".version {VERSION}\n.target {TARGET}\n.address_size 64\n"
ALIGNMENT = 128


@dataclass(frozen=True, eq=False)
class Buffer:
    """Global memory. An output is compared: exactly, or as numbers of `kind` within `ulp` units in
    the last place or `absolute`; with `any_nan`, all NaNs are equal. `unordered`: sorted before."""

    data: np.ndarray
    output: bool = False
    kind: str = ""
    ulp: float = 0.0
    absolute: float = 0.0
    any_nan: bool = False
    unordered: bool = False


@dataclass(frozen=True, eq=False)
class Map:
    """A tiled tensor map of a part of a buffer; shape, box, strides (bytes) and steps have the
    contiguous dimension last."""

    buffer: Buffer
    dtype: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    strides: tuple[int, ...] = ()
    swizzle: int = 0
    fill: str = "zero"
    steps: tuple[int, ...] = ()
    offset: int = 0

    @property
    def all_strides(self) -> tuple[int, ...]:
        if self.strides:
            return self.strides
        size = ITEM_BYTES[self.dtype]
        strides = [size]
        for extent in self.shape[:0:-1]:
            strides.append(strides[-1] * extent)
        return tuple(strides[::-1])

    def text(self) -> str:
        return repr(
            (
                *(self.dtype, self.shape, self.box, self.all_strides),
                *(self.swizzle, self.fill, self.steps, self.offset),
            )
        )


ITEM_BYTES = {
    "uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
#: NumPy types for the names above.
PLAIN = {name: name if name != "bfloat16" else "uint16" for name in ITEM_BYTES}

Argument = Buffer | Map | int | bytes


@dataclass(frozen=True)
class Case:
    """`text`: module-level declarations and the entry, without the preamble. Cases may share it.
    An int is passed as 32 bits, bytes as they are."""

    name: str
    entry: str
    text: str
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (32, 1, 1)
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared: int = 0
    group: str = ""

    @property
    def source(self) -> str:
        return PREAMBLE + self.text

    @property
    def buffers(self) -> list[Buffer]:
        """All buffers, those only tensor maps name last."""
        found = [a for a in self.arguments if isinstance(a, Buffer)]
        for m in self.maps:
            if not any(m.buffer is b for b in found):
                found.append(m.buffer)
        return found

    @property
    def outputs(self) -> list[Buffer]:
        return [b for b in self.buffers if b.output]

    @property
    def maps(self) -> list[Map]:
        return [a for a in self.arguments if isinstance(a, Map)]

    def digest(self) -> str:
        """Of all that decides the results: a record of another case is not used."""
        h = hashlib.sha256(self.source.encode())
        h.update(repr((self.entry, self.grid, self.block, self.cluster, self.shared)).encode())
        for b in self.buffers:
            h.update(np.ascontiguousarray(b.data).tobytes())
        for a in self.arguments:
            if isinstance(a, Map):
                h.update(a.text().encode())
            elif isinstance(a, int | bytes):
                h.update(repr(a).encode())
        return h.hexdigest()[:16]


@dataclass
class Outcome:
    """Of one case: the output buffers, and the tensor maps with the addresses in them."""

    outputs: list[np.ndarray] = field(default_factory=list)
    maps: list[bytes] = field(default_factory=list)
    error: str = ""


def canonical(buffer: Buffer, data: np.ndarray) -> np.ndarray:
    """As it is recorded and compared."""
    return np.sort(data, axis=None) if buffer.unordered else data


def batches(cases: Iterable[Case], most: int = 160) -> list[list[Case]]:
    """Cases of a group together, by which modules are compiled and processes started."""
    by_group: dict[str, list[Case]] = {}
    for case in cases:
        by_group.setdefault(case.group, []).append(case)
    return [
        members[i : i + most] for members in by_group.values() for i in range(0, len(members), most)
    ]


def module(cases: Sequence[Case]) -> str:
    """One module of the distinct entries of all these cases."""
    return PREAMBLE + "\n".join(dict.fromkeys(case.text for case in cases))


def pack(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else (value & 0xFFFFFFFF).to_bytes(4, "little")


# ---------------------------------------------------------------- writing kernels


def entry(
    name: str,
    body: str,
    pointers: int,
    *,
    maps: int = 0,
    words: int = 0,
    room: int = 0,
    declarations: str = "",
    before: str = "",
) -> str:
    """A kernel. %t: thread; %p0: thread 0; %room, %bar: `room` bytes and 8 mbarriers of shared
    memory; %a0, %a1, ...: pointers; %m0, ...: tensor maps; %w0, ...: words (bytes of the last
    parameter)."""
    parameters = [f".param .u64 {name}_p{i}" for i in range(pointers)]
    parameters += [f".param .align 64 .b8 {name}_m{i}[128]" for i in range(maps)]
    loads = [f"ld.param.u64 %a{i}, [{name}_p{i}];" for i in range(pointers)]
    loads += [f"mov.u64 %m{i}, {name}_m{i}; cvta.param.u64 %m{i}, %m{i};" for i in range(maps)]
    if words:
        parameters.append(f".param .align 4 .b8 {name}_w[{4 * words}]")
        loads += [f"ld.param.b32 %w{i}, [{name}_w+{4 * i}];" for i in range(words)]
    shared = ""
    if room:
        shared = (
            f".shared .align 1024 .b8 {name}_room[{room}]; .shared .align 8 .b64 {name}_bar[8];"
        )
        loads += [f"mov.u32 %room, {name}_room;", f"mov.u32 %bar, {name}_bar;"]
    listed = ",\n    ".join(parameters)
    return f"""{before}
.visible .entry {name}(
    {listed})
{{
    .reg .b16 %h<40>; .reg .b32 %r<100>; .reg .b64 %d<60>; .reg .b128 %q<8>; .reg .pred %p<20>;
    .reg .f32 %f<40>; .reg .f64 %e<20>; .reg .b32 %t, %room, %bar, %w<8>; .reg .b64 %a<8>, %m<8>;
    {shared}
    {declarations}
    mov.u32 %t, %tid.x;
    setp.eq.u32 %p0, %t, 0;
    {" ".join(loads)}
    {body}
    ret;
}}
"""


def wait(label: str, parity: str | int = 0, bar: str = "%bar") -> str:
    return f"""
    {label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p19, [{bar}], {parity};
    @!%p19 bra {label};
    """


CLUSTER_SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def generator(name: str) -> np.random.Generator:
    """The same numbers on every run and machine."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def random_bytes(name: str, count: int) -> np.ndarray:
    return generator(name).integers(0, 256, count, dtype=np.uint8)


def source(data: Any) -> Buffer:
    return Buffer(np.ascontiguousarray(data))


def output(shape: int | tuple[int, ...], dtype: Any = np.uint32, **how: Any) -> Buffer:
    return Buffer(np.zeros(shape, dtype), output=True, **how)
