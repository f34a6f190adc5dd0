"""What a launch did, for people and as JSON: findings, counters, the model's verdict."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from cute_fmha.emulator import model
from cute_fmha.emulator.capture import Launch, Report
from cute_fmha.emulator.machine import Result

_SHOWN_FINDINGS = 20


def short_name(kernel: str) -> str:
    """A kernel's name without the types that CuTe DSL appends to it."""
    name = kernel.removeprefix("kernel_cutlass_")
    name = re.split(r"_(?:object_at_|tensor|Tensor|TiledMMA|ThrLayout)", name)[0].strip("_")
    return (name or kernel)[:60]


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}"


def instruction_table(result: Result) -> list[str]:
    """Warp instructions by warp (of all CTAs) and class; equal warps share a line."""
    counts = result.counters.by_warp
    classes = [(name, i) for i, name in enumerate(result.counters.by_class) if counts[:, i].any()]
    rows: list[tuple[str, list[str]]] = []
    first = 0
    warps = [warp for warp in range(len(counts)) if counts[warp].any()]
    while first < len(warps):
        last = first
        while last + 1 < len(warps) and (counts[warps[last + 1]] == counts[warps[first]]).all():
            last += 1
        label = f"{warps[first]}" if first == last else f"{warps[first]}-{warps[last]}"
        row = counts[warps[first]]
        rows.append((label, [_count(row[i]) if row[i] else "." for _, i in classes]))
        first = last + 1
    total = counts.sum(axis=0)
    rows.append(("all", [_count(total[i]) for _, i in classes]))
    rows.insert(0, ("warp", [name for name, _ in classes]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(classes))]
    wide = max(len(label) for label, _ in rows)
    return [
        f"{label:<{wide}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        for label, cells in rows
    ]


def distinct_bytes(report: Report, launch: Launch) -> int:
    """The memory that a launch's parameters point to, directly or in tensor maps."""
    words = [
        int.from_bytes(parameter[i : i + 8], "little")
        for parameter in launch.parameters
        for i in range(0, len(parameter) - 7, 8)
    ]
    return sum(
        piece.bytes
        for piece in report.capture.memory
        if any(piece.address <= word < piece.address + piece.bytes for word in words)
    )


def _estimate(report: Report, launch: Launch, result: Result) -> model.Estimate:
    ctas = math.prod(launch.grid)
    return model.estimate(result.counters, ctas, distinct_bytes=distinct_bytes(report, launch))


def launch_text(report: Report, launch: Launch, result: Result, tiles: float | None) -> list[str]:
    c = result.counters
    shape = f"grid {launch.grid}, cluster {launch.cluster}, block {launch.block}"
    lines = [
        f"kernel {short_name(launch.kernel)}",
        f"  {shape}, dynamic shared memory {launch.dynamic_shared}",
        f"  findings: {len(result.findings) or 'none'}",
    ]
    for finding in result.findings[:_SHOWN_FINDINGS]:
        lines += [f"    {line}" for line in str(finding).splitlines()]
    if len(result.findings) > _SHOWN_FINDINGS:
        lines.append(f"    ... and {len(result.findings) - _SHOWN_FINDINGS} more")
    for note in result.notes[:_SHOWN_FINDINGS]:
        lines += [f"    note, {line}" for line in str(note).splitlines()[:1]]
        lines += [f"    {line}" for line in str(note).splitlines()[1:]]
    if result.deadlock:
        lines += [f"    {line}" for line in result.deadlock.rstrip().splitlines()[:60]]
    lines.append(f"  warp instructions: {c.steps:,}")
    lines += [f"    {line}" for line in instruction_table(result)]
    lines += [
        f"  MMA {_count(c.mma_flops)} FLOP; special functions {_count(c.mufu_ops)}, FP32 "
        f"multiply-adds {_count(c.fma_ops)}; failed waits {_count(c.wait_failures)}",
        f"  bytes: TMA load {_count(c.tma_load_bytes)} (multicast copies "
        f"{_count(c.tma_multicast_bytes)}), TMA store {_count(c.tma_store_bytes)}",
        f"    global read {_count(c.global_read_bytes)}, written {_count(c.global_write_bytes)}; "
        f"shared read {_count(c.shared_read_bytes)}, by the tensor core "
        f"{_count(c.mma_shared_bytes)}, written {_count(c.shared_write_bytes)}; tensor memory read "
        f"{_count(c.tmem_read_bytes)}, written {_count(c.tmem_write_bytes)}",
    ]
    modelled = _estimate(report, launch, result)
    lines.append(f"  {modelled}")
    if tiles is not None:
        lines.append(f"  {modelled.per_tile(tiles)}")
    lines.append(f"  modelled cycles of the slowest CTA's timeline: {c.cycles:,.0f}")
    return lines


def launch_record(
    report: Report, launch: Launch, result: Result, tiles: float | None
) -> dict[str, Any]:
    counters = dataclasses.asdict(result.counters)
    counters["by_warp"] = {
        int(warp): dict(zip(result.counters.by_class, map(int, row), strict=True))
        for warp, row in enumerate(result.counters.by_warp)
        if row.any()
    }
    modelled = _estimate(report, launch, result)
    record: dict[str, Any] = {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "cluster": launch.cluster,
        "block": launch.block,
        "dynamic_shared": launch.dynamic_shared,
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
        "notes": [dataclasses.asdict(note) for note in result.notes],
        "deadlock": result.deadlock,
        "counters": counters,
        "model": {"cycles_per_cta": modelled.cycles, "bottleneck": modelled.bottleneck},
    }
    if tiles is not None:
        record["model"]["cycles_per_tile"] = modelled.per_tile(tiles).cycles
    return record
