"""What a host function asked the runtime for: the shim's records, and what a kernel's PTX says of
launching it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any


class Attribute(ctypes.Structure):
    """A launch attribute, its value as the runtime lays it out."""

    _fields_ = [
        ("id", ctypes.c_uint32),
        ("pad", ctypes.c_uint8 * 4),
        ("value", ctypes.c_uint8 * 64),
    ]


class Record(ctypes.Structure):
    """A launch as `shim.c` keeps it."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("n_attributes", ctypes.c_uint32),
        ("attributes", Attribute * 32),
        ("n_params", ctypes.c_uint32),
        ("param_bytes", ctypes.c_uint32),
        ("params", ctypes.POINTER(ctypes.c_uint8)),
    ]


# ------------------------------------------------------------------------------------ PTX


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the PTX of a kernel says about launching it."""

    name: str
    sizes: tuple[int, ...]
    static_shared: int
    local_bytes: int
    max_threads: int
    cluster: tuple[int, int, int] | None


_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_VARIABLE = re.compile(
    r"\.(?P<space>param|shared|local)\b(?P<mid>[^;(){]*?)\.[busf](?P<width>8|16|32|64|128)\s+"
    r"[\w$%]+\s*(?:\[(?P<count>\d*)\])?"
)


def _variables(text: str, space: str) -> Iterator[int]:
    for match in _VARIABLE.finditer(text):
        if match["space"] == space:
            yield _WIDTHS[match["width"]] * int(match["count"] or 1)


def _numbers(text: str, directive: str) -> list[int] | None:
    match = re.search(rf"\.{directive}\s+([\d,\s]+)", text)
    return [int(x) for x in match[1].replace(" ", "").split(",") if x.strip()] if match else None


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return max(1, x), max(1, y), max(1, z)


def entries(ptx: str) -> dict[str, Entry]:
    """The kernels of a PTX module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    starts = list(re.finditer(r"\.entry\s+([\w$%]+)\s*(?:\((.*?)\))?([^{]*)\{", text, flags=re.S))
    shared_by_module = sum(_variables(text[: starts[0].start()] if starts else "", "shared"))
    found = {}
    for i, match in enumerate(starts):
        body = text[match.end() : starts[i + 1].start() if i + 1 < len(starts) else len(text)]
        name, params, directives = match[1], match[2] or "", match[3]
        threads = _numbers(directives, "reqntid") or _numbers(directives, "maxntid") or [1024]
        product = functools.reduce(lambda a, b: a * b, threads, 1)
        cluster = _numbers(directives, "reqnctapercluster")
        found[name] = Entry(
            name=name,
            sizes=tuple(_variables(params, "param")),
            static_shared=shared_by_module + sum(_variables(body, "shared")),
            local_bytes=sum(_variables(body, "local")),
            max_threads=product,
            cluster=None if cluster is None else _three(cluster),
        )
    return found


# ------------------------------------------------------------------------------------ launches

_CLUSTER, _PROGRAMMATIC = 4, 6
_ATTRIBUTES = {  # cudaLaunchAttributeID
    0: "ignore",
    1: "access_policy_window",
    2: "cooperative",
    3: "synchronization_policy",
    _CLUSTER: "cluster",
    5: "cluster_scheduling_policy",
    _PROGRAMMATIC: "programmatic_stream_serialization",
    7: "programmatic_event",
    8: "priority",
    9: "memory_sync_domain_map",
    10: "memory_sync_domain",
    11: "preferred_cluster",
    12: "launch_completion_event",
    13: "device_updatable_node",
    14: "preferred_shared_memory_carveout",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch, as the runtime received it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_shared: int
    stream: int
    attributes: dict[str, Any]
    parameters: tuple[bytes, ...]

    @property
    def programmatic(self) -> bool:
        """Launched with programmatic dependent launch: may overlap the kernel before it."""
        return bool(self.attributes.get("programmatic_stream_serialization"))

    def __str__(self) -> str:
        text = f"{self.kernel} grid {self.grid} block {self.block}"
        if self.cluster != (1, 1, 1):
            text += f" cluster {self.cluster}"
        text += f" dynamic shared {self.dynamic_shared}"
        if self.programmatic:
            text += " programmatic"
        return f"{text}, {len(self.parameters)} parameters"


def _attribute_value(attribute: Attribute) -> Any:
    raw = bytes(attribute.value)
    words = tuple(int.from_bytes(raw[i : i + 4], "little") for i in range(0, 12, 4))
    return words if attribute.id in (_CLUSTER, 11) else words[0]


def launch_of(record: Record, entry: Entry) -> Launch:
    """The launch that ``record`` is of, of the kernel that ``entry`` describes."""
    attributes = {}
    for attribute in record.attributes[: record.n_attributes]:
        name = _ATTRIBUTES.get(attribute.id, f"attribute_{attribute.id}")
        attributes[name] = _attribute_value(attribute)
    raw, at = ctypes.string_at(record.params, record.param_bytes), 0
    parameters = []
    for size in entry.sizes:
        parameters.append(raw[at : at + size])
        at += size
    cluster = attributes.get("cluster") or entry.cluster or (1, 1, 1)
    return Launch(
        kernel=entry.name,
        grid=_three(record.grid),
        block=_three(record.block),
        cluster=_three(cluster),
        dynamic_shared=record.dynamic_shared,
        stream=record.stream,
        attributes=attributes,
        parameters=tuple(parameters),
    )
