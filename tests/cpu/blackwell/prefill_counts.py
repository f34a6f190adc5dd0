"""What the prefill kernel does for 128 keys and 128 query rows, beside FlashAttention-4.

python tests/cpu/blackwell/prefill_counts.py: both kernels on the same problems, bf16, executed by
the emulator; counts are the differences between two lengths over the tiles between them, all warps
of all CTAs together. Full: 256 rows on 1024 and 2048 keys. Causal: square, with the prologues and
epilogues of the work tiles that come on top. "Without moves" is what the machine is left with of
PTX. Cycles come from the emulator's model and are no measurements.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "emulator")]
import peers_fa4
import prefill_harness

from cute_fmha.emulator import model
from cute_fmha.emulator.binding import CLASSES
from cute_fmha.emulator.capture import emulate
from cute_fmha.emulator.machine import Counters, Policy
from cute_fmha.kernels.blackwell.plan import HEAD_DIMS, Features, Plan, make_plan
from cute_fmha.testing import Heads, Options, Source, dense_case

POLICY = Policy("eager", races=False)
LENGTHS = (1024, 2048)
ROLES = ("softmax", "correction", "mma", "load", "other")
FA4_ROLES = {"softmax": range(8), "correction": range(8, 12), "mma": [12], "load": [14]}


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem of either kernel: ``rows`` queries on ``keys`` keys, one head."""

    dims: tuple[int, int]
    causal: bool
    keys: int

    @property
    def rows(self) -> int:
        return self.keys if self.causal else 256

    @property
    def tiles(self) -> int:
        """Tiles of 128 × 128 that are not wholly masked."""
        blocks = self.keys // 128
        return blocks * (blocks + 1) // 2 if self.causal else 2 * blocks


def plan_of(size: Size) -> Plan:
    bf16 = torch.bfloat16
    return make_plan(*size.dims, bf16, bf16, Features(window_right=size.causal))


def our_roles(plan: Plan) -> dict[str, Any]:
    roles = {name: plan.role(name).warps for name in ("softmax", "correction", "mma")}
    return {**roles, "load": plan.role("load").warps + plan.role("load_values").warps}


def ours(size: Size) -> Counters:
    case = dense_case(
        1, size.rows, size.keys, Heads(1, 1, *size.dims), Options(causal=size.causal),
        Source(torch.bfloat16, std=1.0),
    )  # fmt: skip
    return prefill_harness.run(case, POLICY)[2].results[0].counters


def theirs(size: Size) -> Counters:
    case = peers_fa4.Case(
        "counts", d=size.dims[0], dv=size.dims[1], heads=1, kv_heads=1, q=size.rows, k=size.keys,
        causal=size.causal,
    )  # fmt: skip
    reports: list[Any] = []

    def run(compiled: Any, *args: Any, **kwargs: Any) -> None:
        reports.append(emulate(compiled, *args, policy=POLICY, check=False, **kwargs))

    peers_fa4.run_case(case, run)
    return reports[0].results[0].counters


def line(
    name: str, sizes: tuple[Size, Size], count: Callable[[Size], Counters], roles: dict[str, Any]
) -> str:
    short, long = map(count, sizes)
    tiles = sizes[1].tiles - sizes[0].tiles
    kept = [i for i, kind in enumerate(CLASSES) if kind != "move"]
    by_warp = (np.asarray(long.by_warp)[:16, kept] - np.asarray(short.by_warp)[:16, kept]).sum(1)
    known = {role: sum(by_warp[warp] for warp in warps) for role, warps in roles.items()}
    known["other"] = by_warp.sum() - sum(known.values())

    def per_tile(field: str) -> float:
        return (getattr(long, field) - getattr(short, field)) / tiles

    units = model.estimate(long, 1).cycles, model.estimate(short, 1).cycles
    modelled = model.Estimate(
        {unit: (units[0][unit] - units[1][unit]) / tiles for unit in units[0]}
    )
    cells = [
        name,
        f"{per_tile('steps'):.0f}",
        *(f"{known[role] / tiles:.0f}" for role in ROLES),
        f"{per_tile('mufu_ops') / 32:.0f}",
        f"{per_tile('fma_ops') / 32:.0f}",
        f"{per_tile('tmem_read_bytes') / 1024:.0f} + {per_tile('tmem_write_bytes') / 1024:.0f}",
        f"{per_tile('mma_shared_bytes') / 1024:.0f}",
        f"{per_tile('tma_load_bytes') / 1024:.0f}",
        f"{modelled.bound:.0f} ({modelled.bottleneck})",
        f"{modelled.cycles['special functions']:.0f}, {modelled.cycles['issue']:.0f}",
        "–" if sizes[0].causal else f"{per_tile('cycles'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(
        "| kernel | PTX | softmax | correction | mma | load | other | MUFU | FMA "
        "| TMEM KiB read + written | shared KiB read by MMA | TMA KiB | bound, cycles "
        "| MUFU, issue cycles | timeline |"
    )
    print(f"| --- |{' --- |' * 14}")
    for dims in HEAD_DIMS:
        for causal in (False, True):
            sizes = Size(dims, causal, LENGTHS[0]), Size(dims, causal, LENGTHS[1])
            name = f"{dims[0]}/{dims[1]} {'causal' if causal else 'full'}"
            if peers_fa4.available:
                print(line(f"FA4 {name}", sizes, theirs, FA4_ROLES), flush=True)
            print(line(f"ours {name}", sizes, ours, our_roles(plan_of(sizes[0]))), flush=True)


if __name__ == "__main__":
    main()
