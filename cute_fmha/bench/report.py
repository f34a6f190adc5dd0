"""From measurements to a table, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cute_fmha.bench.measure import Ceilings, Failure, Settings, Summary
from cute_fmha.bench.peers import OURS
from cute_fmha.bench.problems import Command, Shape

SCHEMA = 1
"""Version of the JSON layout that `to_json` writes."""


@dataclass(frozen=True)
class Row:
    """All implementations on one shape."""

    shape: Shape
    results: dict[str, Summary | Failure]

    def ratio(self, name: str) -> float | None:
        """Time of ``name`` over that of ours: above 1, ours is faster."""
        ours, theirs = self.results.get(OURS), self.results.get(name)
        if not isinstance(ours, Summary) or not isinstance(theirs, Summary):
            return None
        return theirs.median_us / ours.median_us


@dataclass
class Report:
    """Everything one run measured and where."""

    command: Command
    device: torch.device
    settings: Settings
    argv: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)


def tflops(shape: Shape, time: Summary) -> float:
    return shape.flops / time.median_us / 1e6


def gbps(shape: Shape, time: Summary) -> float:
    return shape.bytes_moved / time.median_us / 1e3


# The table.

_HEADER = ("median µs", "p10–p90", "TFLOP/s", "GB/s", "time/ours")
_WIDTHS = (11, 18, 9, 8, 10)
_NAME_WIDTH = 24


def _number(value: float) -> str:
    """About four significant digits."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _line(row: Row, name: str) -> str:
    result = row.results[name]
    first = f"  {name}".ljust(_NAME_WIDTH)
    if isinstance(result, Failure):
        return f"{first}  – {result.reason}"
    ratio = row.ratio(name)
    cells = (
        _number(result.median_us),
        f"{_number(result.p10_us)}–{_number(result.p90_us)}",
        _number(tflops(row.shape, result)),
        _number(gbps(row.shape, result)),
        "" if ratio is None or name == OURS else f"{ratio:.2f}",
    )
    return (first + _columns(cells)).rstrip()


def _columns(cells: Iterable[str]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def table_rows(rows: Iterable[Row]) -> str:
    """One block per shape, one line per implementation, in fixed-width columns."""
    lines = []
    for row in rows:
        lines += [row.shape.label, " " * _NAME_WIDTH + _columns(_HEADER)]
        lines += [*(_line(row, name) for name in row.results), ""]
    return "\n".join(lines)


def preamble(report: Report) -> str:
    """What is measured, where and how, and which peers are absent."""
    machine = describe_machine(report.device)
    how = "CUDA-graph replay" if report.settings.mode == "graph" else "event-timed calls"
    if report.device.type != "cuda":
        how = "wall clock"
    lines = [f"{report.command} on {machine['device']}: {how}, contestants interleaved"]
    if report.device.type != "cuda":
        lines.append(
            "There is no CUDA device: small shapes on the CPU, where only the eager specification "
            "runs.\nThese times show that the harness works; they say nothing about the kernels."
        )
    versions = (f"{name} {version or '?'}" for name, version in report.versions.items())
    lines.append("measured: " + ", ".join(versions))
    lines += [f"absent: {name}: {reason}" for name, reason in report.absent.items()]
    if report.ceilings is not None:
        c = report.ceilings
        lines.append(f"ceilings: copy {c.copy_gbps:.0f} GB/s, bf16 {c.matmul_tflops:.0f} TFLOP/s")
    return "\n".join(lines)


# The machine.


def _driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and software that a time depends on. No host name, no path."""
    machine: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    if find_spec("triton") is not None:
        machine["triton"] = import_module("triton").__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return machine


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return found.stdout.strip()


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout that runs and whether its code differs from it; None outside one.

    A copied package is looked up in the current folder, if that holds the package's source.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        folder = Path.cwd()
    if not (folder / "cute_fmha" / "bench" / "report.py").exists():
        return None
    try:
        changes = _git(folder, "status", "--porcelain", "--", "cute_fmha", "kernels", "epilogues")
        return {"commit": _git(folder, "rev-parse", "HEAD"), "modified": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


# JSON.


def _result_json(row: Row, name: str) -> dict[str, Any]:
    result = row.results[name]
    if isinstance(result, Failure):
        return {"error": result.reason}
    return {
        **dataclasses.asdict(result),
        "tflops": tflops(row.shape, result),
        "gbps": gbps(row.shape, result),
        "time_over_ours": row.ratio(name),
    }


def to_json(report: Report) -> dict[str, Any]:
    """The whole report; `SCHEMA` names the layout."""
    return {
        "schema": SCHEMA,
        "benchmark": report.command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": list(report.argv),
        "revision": git_revision(),
        "machine": describe_machine(report.device),
        "settings": dataclasses.asdict(report.settings),
        "versions": report.versions,
        "absent": report.absent,
        "ceilings": None if report.ceilings is None else dataclasses.asdict(report.ceilings),
        "results": [
            {
                "label": row.shape.label,
                "shape": row.shape.to_json(),
                "flops": row.shape.flops,
                "bytes": row.shape.bytes_moved,
                "implementations": {name: _result_json(row, name) for name in row.results},
            }
            for row in report.rows
        ],
    }


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n")


# The plot.


@dataclass(frozen=True)
class _Panel:
    """Bars of one rate, a group per row."""

    title: str
    unit: str
    rows: tuple[Row, ...]
    ceiling: float | None

    def rate(self, row: Row, time: Summary) -> float:
        return tflops(row.shape, time) if self.unit == "TFLOP/s" else gbps(row.shape, time)


def _panels(report: Report) -> list[_Panel]:
    """Prefill: one panel per mask, in TFLOP/s. Decode: both rates."""
    rows, ceilings = tuple(report.rows), report.ceilings
    copy, product = (None, None)
    if ceilings is not None:
        copy, product = ceilings.copy_gbps, ceilings.matmul_tflops
    if report.command != "prefill":
        return [_Panel("", "TFLOP/s", rows, product), _Panel("", "GB/s", rows, copy)]
    masks = dict.fromkeys(row.shape.mask for row in rows)
    return [
        _Panel(mask, "TFLOP/s", tuple(row for row in rows if row.shape.mask == mask), product)
        for mask in masks
    ]


def _measured_names(rows: Iterable[Row]) -> list[str]:
    """Implementations with at least one time, in order of appearance."""
    found = (name for row in rows for name, r in row.results.items() if isinstance(r, Summary))
    return list(dict.fromkeys(found))


def _draw(axis: Any, panel: _Panel, names: Sequence[str]) -> None:
    """One bar per implementation; the whiskers are the 10th and 90th percentile."""
    height = 0.84 / len(names)
    for index, name in enumerate(names):
        places, values, errors = [], [], []
        for place, row in enumerate(panel.rows):
            result = row.results.get(name)
            if not isinstance(result, Summary):
                continue
            value = panel.rate(row, result)
            places.append(place + (index - (len(names) - 1) / 2) * height)
            values.append(value)
            slowest = value * result.median_us / result.p90_us
            fastest = value * result.median_us / result.p10_us
            errors.append((value - slowest, fastest - value))
        whiskers = list(zip(*errors, strict=True)) if errors else None
        axis.barh(
            places, values, height, xerr=whiskers, label=name, color=f"C{index}",
            edgecolor="white", linewidth=0.5, error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    if panel.ceiling is not None:
        axis.axvline(panel.ceiling, color="0.4", linestyle="--", linewidth=1, label="ceiling here")
    axis.set_yticks(range(len(panel.rows)), [row.shape.sizes for row in panel.rows])
    axis.set_ylim(len(panel.rows) - 0.5, -0.5)
    axis.set_xlabel(panel.unit)
    axis.set_title(panel.title, fontsize="medium")
    axis.grid(axis="x", alpha=0.3)


def write_plot(report: Report, path: Path) -> str | None:
    """Draw the rates to ``path``; the reason when there is no plot."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install cute-fmha[bench])"
    names = _measured_names(report.rows)
    if not names:
        return "nothing was measured"
    figure_module: Any = import_module("matplotlib.figure")
    panels = _panels(report)
    groups = max(len(panel.rows) for panel in panels)
    size = (3 + 5 * len(panels), 1.6 + groups * (0.2 + 0.17 * len(names)))
    figure = figure_module.Figure(figsize=size, layout="constrained")
    # Same rows in every panel: the labels stand once, on the left.
    sizes = [[row.shape.sizes for row in panel.rows] for panel in panels]
    same = all(labels == sizes[0] for labels in sizes)
    axes = figure.subplots(1, len(panels), sharey=same, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, names)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    machine = describe_machine(report.device)
    figure.suptitle(f"{report.command}, {machine['device']}, {report.settings.mode} timing")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return None
