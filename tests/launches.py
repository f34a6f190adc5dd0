"""Which plan a Triton launch used, and how a test changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cute_fmha.kernels.triton import launch
from cute_fmha.kernels.triton.plan import Plan
from cute_fmha.problem import Problem, Target
from cute_fmha.testing import Tiles

Launches = list[tuple[Problem, Plan]]


@contextmanager
def recorded(portable: bool = False, **changes: Any) -> Iterator[Launches]:
    """The (problem, plan) of every launch inside.

    ``portable`` plans as if no tensor could be addressed by TMA or 16-byte copies, which leaves the
    kernels that any GPU runs; ``changes`` replace fields of the plan.
    """
    original = launch.make_plan
    seen: Launches = []

    def make_plan(problem: Problem, target: Target, *addressable: bool) -> Plan:
        if portable:
            addressable = tuple(False for _ in addressable)
        plan = replace(original(problem, target, *addressable), **changes)
        seen.append((problem, plan))
        return plan

    launch.make_plan = make_plan  # type: ignore[assignment]
    try:
        yield seen
    finally:
        launch.make_plan = original


def tiles_of(plan: Plan) -> Tiles:
    """The tiles whose decisions a launch of ``plan`` takes."""
    return Tiles(plan.tile_m, plan.tile_n, plan.pack_heads, plan.num_splits)
