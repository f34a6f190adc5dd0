"""Pictures of one CTA: who did what when, in modelled cycles (never a measurement, see model.py).

Lanes are the CTA's warps, with their roles, and below them what runs by itself: TMA loads and
stores, the tensor core. Blocks are runs of instructions, waits (with the barrier's name) and
asynchronous operations. The same blocks make a Chrome / Perfetto trace and a PNG::

    result = run_ptx(source, ..., policy=Policy("lazy", trace_cta=0))
    found = blocks(result, barriers={1024: "Q full"})
    write_trace("cta0.json", found)
    plot("cta0.png", found)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cute_fmha.emulator.binding import CLASSES
from cute_fmha.emulator.machine import Program, Result

UNITS = {-1: "TMA load", -2: "TMA store", -3: "tensor core", -4: "other async"}
KINDS = ("instructions", "wait", "asynchronous")
MOST_BLOCKS = 20_000
_COLOURS = {"instructions": "#4c78a8", "wait": "#dcdcdc"}
_UNIT_COLOURS = {-1: "#54a24b", -2: "#9ecb6d", -3: "#e45756", -4: "#b79a20"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of one lane. `slot`: operations of a unit that overlap have different ones."""

    lane: int  # a warp, or a unit (negative)
    lane_name: str
    kind: str
    name: str
    start: float
    finish: float
    where: str  # of its first instruction
    count: int = 1  # how many blocks were merged into it
    slot: int = 0

    @property
    def duration(self) -> float:
        return self.finish - self.start


# ---------------------------------------------------------------- names


def guess_roles(result: Result) -> dict[int, str]:
    """Roles of the warps, by what they executed: MMA, load, store, exp, TMEM."""
    program, roles = result.program, {}
    counts = result.counters.by_warp
    column = {name: i for i, name in enumerate(CLASSES)}
    for warp in range(len(counts)):
        row = counts[warp]
        if not row.sum():
            continue
        if row[column["mma"]]:
            roles[warp] = "MMA"
        elif row[column["tma"]]:
            tma = (program.classes == column["tma"]) & (result.executed[warp] > 0)
            names = [mnemonic(program, int(pc)) for pc in tma.nonzero()[0]]
            stores = all(".global.shared" in name for name in names)
            roles[warp] = "store" if stores else "load"
        elif row[column["mufu"]] * 50 > row.sum():
            roles[warp] = "exp"
        elif row[column["tmem load"]]:
            roles[warp] = "TMEM"
    return roles


def mnemonic(program: Program, pc: int) -> str:
    """The name of an instruction in PTX, with all its modifiers."""
    if not 0 <= pc < len(program.assembled.lines):
        return ""
    words = program.module.line(program.assembled.lines[pc]).split()
    words = [word for word in words if word not in ("{", "}") and not word.startswith("@")]
    return words[0].rstrip(";") if words else ""


def _place(program: Program, pc: int) -> str:
    """Python file and line, or the PTX line."""
    if not 0 <= pc < len(program.assembled.lines):
        return ""
    file, line = program.assembled.sources[pc]
    return f"{os.path.basename(file)}:{line}" if line else f"PTX {program.assembled.lines[pc]}"


def _wait_name(program: Program, pc: int, offset: int, barriers: Mapping[int, str]) -> str:
    if offset:
        return barriers.get(offset, f"mbarrier {offset:#x}")
    name = mnemonic(program, pc)
    if name.startswith("bar"):
        operands = program.module.line(program.assembled.lines[pc]).split(name, 1)[-1]
        operands = operands.strip().rstrip(";")
        short = name.removesuffix(".aligned")
        return short if "%" in operands else f"{short} {operands}".strip()
    if name.startswith("mbarrier"):  # a wait that found its phase over, in the machine's order
        return "mbarrier"
    return name or "wait"


# ---------------------------------------------------------------- blocks


def blocks(
    result: Result,
    *,
    roles: Mapping[int, str] | None = None,
    barriers: Mapping[int, str] | None = None,
    most: int = MOST_BLOCKS,
) -> list[Block]:
    """The traced CTA's events, at most about `most`: short neighbours are merged until they fit.

    roles: warp -> name (guessed if None); barriers: offset of an mbarrier in shared memory -> its
    name. Empty unless the launch ran with `Policy(trace_cta=...)` and had that CTA.
    """
    names = guess_roles(result) if roles is None else roles
    program, found = result.program, []
    for event in result.events:
        pc, lane, kind = int(event["pc"]), int(event["lane"]), KINDS[int(event["kind"])]
        place = _place(program, pc)
        if kind == "wait":
            name = _wait_name(program, pc, int(event["barrier"]), barriers or {})
        elif kind == "asynchronous":
            name = ".".join(mnemonic(program, pc).split(".")[:4])
        else:
            name = place
        start = float(event["start"])
        finish = max(start, float(event["finish"]))
        lane_name = UNITS[lane] if lane < 0 else f"{lane} {names.get(lane, '')}".rstrip()
        found.append(Block(lane, lane_name, kind, name, start, finish, place))
    if all(block.name.startswith("tcgen05.st") for block in found if block.lane == -4):
        found = [
            dataclasses.replace(block, lane_name="TMEM store") if block.lane == -4 else block
            for block in found
        ]
    shortest = 0.5  # not even a cycle: markers that take no time, waits that were over at once
    kept = merge(found, shortest)
    while len(kept) > most:
        shortest *= 2
        kept = merge(found, shortest)
    return _with_slots(kept)


def merge(found: Iterable[Block], shortest: float) -> list[Block]:
    """Without blocks below `shortest` cycles, which go into a neighbour of their lane and kind.

    Blocks of one kind that follow each other within `shortest` become one where either is short.
    """
    lanes: dict[int, list[Block]] = {}
    for block in sorted(found, key=lambda b: (b.start, b.finish)):
        lane = lanes.setdefault(block.lane, [])
        last = lane[-1] if lane else None
        adjacent = last is not None and last.kind == block.kind
        if last is not None and adjacent and block.start - last.finish <= shortest:
            small = min(last.duration, block.duration) < shortest
            if last.kind == "instructions" or small:
                finish = max(last.finish, block.finish)
                count = last.count + block.count
                lane[-1] = dataclasses.replace(last, finish=finish, count=count)
                continue
        if block.duration >= shortest:
            lane.append(block)
    return [block for lane in _order(lanes) for block in lanes[lane]]


def _order(lanes: Iterable[int]) -> list[int]:
    return sorted(lanes, key=lambda lane: (lane < 0, abs(lane)))


def _with_slots(found: Sequence[Block]) -> list[Block]:
    """Overlapping blocks of a lane get different slots, as few as will do."""
    ends: dict[int, list[float]] = {}
    out = []
    for block in found:  # by lane and start
        free = ends.setdefault(block.lane, [])
        slot = next((i for i, end in enumerate(free) if end <= block.start), len(free))
        free[slot : slot + 1] = [block.finish]
        out.append(dataclasses.replace(block, slot=slot))
    return out


# ---------------------------------------------------------------- files


def write_trace(path: str | os.PathLike[str], found: Sequence[Block], title: str = "") -> Path:
    """`found` for ui.perfetto.dev or chrome://tracing, where 1 µs is a modelled cycle."""
    rows: dict[tuple[int, int], int] = {}
    for lane in _order({block.lane for block in found}):
        for slot in sorted({block.slot for block in found if block.lane == lane}):
            rows[lane, slot] = len(rows)
    names = {block.lane: block.lane_name for block in found}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name"}]
    events[0]["args"] = {"name": title or "modelled cycles of one CTA"}
    for (lane, slot), row in rows.items():
        name = names[lane] if lane < 0 else f"warp {names[lane]}"
        label = {"name": f"{name} ({slot + 1})" if slot else name}
        events.append({"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": label})
        events.append(
            {
                "ph": "M",
                "pid": 0,
                "tid": row,
                "name": "thread_sort_index",
                "args": {"sort_index": row},
            }
        )
    for block in found:
        event: dict[str, Any] = {
            "ph": "X",
            "pid": 0,
            "tid": rows[block.lane, block.slot],
            "name": block.name,
            "cat": block.kind,
            "ts": round(block.start, 3),
            "dur": round(block.duration, 3),
        }
        if block.where != block.name:
            event["args"] = {"at": block.where}
        events.append(event)
    path = Path(path)
    note = "modelled cycles, not a measurement"
    trace = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"time": note}}
    path.write_text(json.dumps(trace, separators=(",", ":")))
    return path


def plot(
    path: str | os.PathLike[str],
    found: Sequence[Block],
    *,
    title: str = "",
    span: tuple[float, float] | None = None,
) -> Path:
    """`found` as a PNG. span: the modelled cycles to show (all by default). Needs matplotlib."""
    if not found:
        raise ValueError("no events: run with Policy(trace_cta=...) and a CTA that the launch has")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'cute-fmha[bench]'") from error

    low, high = span or (min(b.start for b in found), max(b.finish for b in found))
    shown = [block for block in found if block.finish > low and block.start < high]
    lanes = _order({block.lane for block in shown})
    names = {block.lane: block.lane_name for block in shown}
    slots = {lane: 1 + max(b.slot for b in shown if b.lane == lane) for lane in lanes}
    figure = Figure(figsize=(18, 1.4 + 0.36 * len(lanes)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, lane in enumerate(lanes):
        height = 0.84 / slots[lane]
        for kind in KINDS:
            of_kind = [block for block in shown if block.lane == lane and block.kind == kind]
            colour = _COLOURS.get(kind) or _UNIT_COLOURS.get(lane, "grey")
            for slot in range(slots[lane]):
                spans = [(b.start, b.duration) for b in of_kind if b.slot == slot]
                place = (row - 0.42 + slot * height, height)
                edge = "white" if kind != "instructions" else "none"
                axes.broken_barh(spans, place, facecolors=colour, edgecolors=edge, linewidth=0.3)
    characters = 250 / (high - low)  # of the small font, in a cycle's width
    for block in shown:
        width = min(block.finish, high) - max(block.start, low)
        if block.kind != "wait" or width * characters < 5:
            continue
        label = block.name.removeprefix("mbarrier ")[: int(width * characters)]
        middle = (max(block.start, low) + min(block.finish, high)) / 2
        axes.text(
            middle,
            lanes.index(block.lane),
            label,
            ha="center",
            va="center",
            fontsize=6,
            clip_on=True,
        )
    labels = [names[lane] if lane < 0 else f"warp {names[lane]}" for lane in lanes]
    axes.set_yticks(range(len(lanes)), labels, fontsize=8)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(low, high)
    axes.set_xlabel("modelled cycles (not a measurement)")
    axes.set_title(title or "timeline of one CTA", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    legend += [Patch(color=_UNIT_COLOURS[lane], label=names[lane]) for lane in lanes if lane < 0]
    figure.legend(handles=legend, loc="lower right", ncols=len(legend), fontsize=7, frameon=False)
    figure.tight_layout()
    path = Path(path)
    figure.savefig(path)
    return path
