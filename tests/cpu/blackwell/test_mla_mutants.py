"""Mutants of the MLA decode kernel for many heads: one synchronisation altered is noticed.

`pytest -s -m sweep tests/cpu/blackwell/test_mla_mutants.py` prints what became of every one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import mla_harness as harness
from cutlass import Int32

from cute_fmha.emulator import mutate
from cute_fmha.emulator.capture import capture
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
from cute_fmha.kernels.blackwell.mla_decode_plan import make_plan
from cute_fmha.tiling import ceil_div

BF16 = torch.bfloat16
POLICIES = mutate.STRICT_POLICIES

# Lengths, cut, splits, workers. Work tiles follow each other on every worker. "narrow": no rope.
PROBLEMS: dict[str, tuple[list[int], Cut, int, int]] = {
    "whole": ([900, 0, 300, 700], Cut.WHOLE, 1, 1),
    "narrow": ([900, 300, 700], Cut.WHOLE, 1, 1),
    "skip": ([1100, 300, 900], Cut.WHOLE, 1, 1),
    "split": ([900, 60, 50], Cut.FIXED, 2, 2),
    "share": ([1100, 60, 300], Cut.SHARE, 0, 2),
}


def launch_of(name: str, heads: int) -> tuple[Any, Any, int]:
    """(a captured launch, whether its results are right, or None: all of memory tells, stages of
    the latents). Maxima grow from page to page, but in "skip", where most tiles are skipped."""
    lengths, cut, splits, workers = PROBLEMS[name]
    skips = name == "skip"
    width = 512 if name == "narrow" else 576
    options: dict[str, Any] = {"gap": 40.0} if skips else {"std": 1.0}
    case = harness.case_of(heads, 1, lengths, width=width, **options)
    if not skips:
        for row, length in zip(case.block_table, lengths, strict=True):
            for n, page in enumerate(row[: ceil_div(length, 64)].tolist()):
                case.kv_cache[page] *= 0.1 + 0.2 * n
    features = harness.features_of(case, skip=skips, count=skips)
    kernel = MlaDecode(make_plan(width, BF16, BF16, features, 64, heads, cut))
    ctas = workers * kernel.plan.ctas
    threshold = math.exp(-20.0) if skips else 0.0
    expected = harness.run(
        kernel, case, POLICIES["eager"], ctas=ctas, num_splits=splits, skip=threshold
    )
    assert not skips or 0 < expected.stats[0] < expected.stats[1]
    out, lse = torch.full_like(expected.out, math.nan), torch.full_like(expected.lse, math.nan)
    workspace = harness.workspace_of(kernel.plan, case, ctas, splits)

    def right() -> bool:
        same = torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
        return same and not workspace.counters.any()

    tensors = harness.arguments(case, out, workspace, lse=lse)
    scalars = harness.scalars_of(case, threshold, splits)
    captured = capture(
        harness.compiled(kernel), tensors, scalars, Int32(ctas), None, harness.CUstream(0)
    )
    # Of a work tile that is cut, who leaves what in the workspace is a matter of timing.
    return captured, None if cut is Cut.WHOLE else right, kernel.plan.stages


@pytest.mark.sweep
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("name", PROBLEMS)
def test_order(name, heads):
    captured, right, stages = launch_of(name, heads)
    report = mutate.run_mutants(
        captured, policies=POLICIES, check=right, chosen=lambda mutant: mutant.order
    )
    print(f"\n{name}, {heads} heads\n{report}")
    # Before the S that follows a work tile's last comes q_full, with a fence of its own. And in a
    # pair both stages of a tile are released at once; with rope columns that wait is redundant. At
    # the end the load warp waits for every stage, though here commits arrive in their order.
    waits = stages + (name == "narrow" and heads == 128)
    expected = ["tcgen05.fence"] + ["mbarrier wait"] * waits
    assert [outcome.mutant.group for outcome in report.missed_order] == expected, str(report)
