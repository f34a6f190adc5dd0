"""The Blackwell MLA decode kernel of few rows, executed number by number: output, LSE, skipped
tiles, races, hazards."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import error_report

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")
harness = pytest.importorskip("mla_harness")
small = pytest.importorskip("cute_fmha.kernels.blackwell.mla_decode_small")
plans = pytest.importorskip("cute_fmha.kernels.blackwell.mla_decode_small_plan")

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [0, 1, 63, 64, 65, 300]
SKIP = {"skip": True, "count": True}
LAMBDA = SkipSoftmax(math.exp(-7.0))

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def kernel_of(case: Any, box: int = 64, out_dtype: Any = None, features: Any = None, **changes):
    _, seqlen_q, heads, width = case.q.shape
    plan = plans.make_small_plan(
        width, 512, case.q.dtype, out_dtype or case.q.dtype,
        harness.features_of(case, **(features or {})), seqlen_q * heads, box,
    )  # fmt: skip
    return small.MlaDecodeSmall(replace(plan, **changes))


@policies
def test_lengths(policy):
    """Also none, several CTAs for several sequences, and several sequences of a CTA."""
    case = harness.case_of(16, 1, [1000, 0, *LENGTHS])
    for ctas in (148, 3):
        harness.verify(kernel_of(case), case, policy, ctas=ctas)


@policies
@pytest.mark.parametrize(
    ("heads", "seqlen_q"), [(1, 1), (8, 2), (4, 4), (5, 3), (16, 2), (7, 4)], ids=str
)
def test_rows(policy, heads, seqlen_q):
    """Any number of heads and new tokens up to 32 rows; positions are in causal order."""
    case = harness.case_of(heads, seqlen_q, LENGTHS, seed=heads)
    harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize(("page_size", "box"), [(16, 16), (32, 32), (128, 64), (8, 8), (1, 4)])
def test_pages(page_size, box):
    case = harness.case_of(16, 1, LENGTHS, page_size=page_size)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case, box), case, policy)


def test_unpaged():
    """A page per sequence, of a size that is no multiple of anything."""
    case = harness.case_of(8, 1, [77, 99, 0], page_size=99)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (100, 0)},
        {"window": (70, 30), "causal": False},
        {"causal": False},
        {"sink": True},
        {"softcap": 2.0, "scale": 0.2},
        {"softcap": 30.0, "sink": True, "window": (130, 0)},
    ],
    ids=["window", "both-sides", "full", "sink", "softcap", "all"],
)
def test_options(options):
    case = harness.case_of(8, 2, LENGTHS, dtype=FP16, **options)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_512(out_dtype):
    """Latents without rope columns."""
    case = harness.case_of(16, 1, LENGTHS, width=512)
    harness.verify(kernel_of(case, out_dtype=out_dtype), case, harness.POLICIES[2])


@pytest.mark.parametrize("threshold", [0.0, 8.0])
def test_growing_scores(threshold):
    """Maxima rise by more than the rescale threshold, over and over.

    With a threshold the largest P of a row is not exactly 1 and takes a rounding error of its own,
    so that only the cosine is gated.
    """
    case = harness.case_of(16, 1, [900, 200], dtype=FP16, std=1.0)
    for sequence, length in enumerate((900, 200)):
        for page in range(length // 64 + 1):
            number = int(case.block_table[sequence, page])
            case.kv_cache[number] *= 0.2 + page / 4
    expected, expected_lse = case.reference()
    for policy in harness.POLICIES:
        kernel = kernel_of(case, rescale_threshold=threshold)
        if threshold == 0.0:
            harness.verify(kernel, case, policy)
        result = harness.run(kernel, case, policy)
        assert error_report(result.out, expected).cosine >= 0.999998
        torch.testing.assert_close(result.lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@policies
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("options", [{}, {"window": (500, 0)}], ids=["full", "window"])
def test_skipped_tiles(policy, heads, options):
    """The oracle's decisions, counted."""
    lengths = [700, 1000, 0, 64]
    case = harness.case_of(heads // 2, 2, lengths, gap=14.0, dtype=FP16, **options)
    result = harness.verify(kernel_of(case, features=SKIP), case, policy, skip=LAMBDA)
    assert 0 < result.stats[0] < result.stats[1]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_threshold_in_every_form(tensor, relative):
    """Also changed between launches of one kernel, as between replays of a CUDA graph."""
    case = harness.case_of(16, 1, [900, 900], gap=14.0, dtype=FP16)
    features = {**SKIP, "skip_tensor": tensor, "skip_relative": relative}
    kernel = kernel_of(case, features=features)
    tiles = harness.Tiles(16, 64, True)
    device = torch.zeros(1)
    for value in (LAMBDA.value, 0.0):
        given = value * 900 if relative else value
        device.fill_(given)
        result = harness.run(kernel, case, harness.POLICIES[2], skip=device if tensor else given)
        expected = case.oracle(tiles, SkipSoftmax(value) if value else None)
        assert result.stats.tolist() == [expected.skipped, expected.total]
        harness.check(case, result.out, result.lse, tiles, SkipSoftmax(value) if value else None)


def test_values_of_skipped_tiles_are_not_used():
    """Value columns of tokens that only skipped tiles have may be anything finite: with rope scores
    alone deciding, they are large where every row skips."""
    case = harness.case_of(16, 1, [640], gap=0.0, dtype=FP16)
    case.q[..., :512] = 0
    case.q[..., 512:] = 1.0
    low = [page for page in range(10) if page % 3]
    for page in range(10):
        number = int(case.block_table[0, page])
        case.kv_cache[number, :, :, 512:] = 0.0 if page % 3 == 0 else -8.0
    clean = harness.run(
        kernel_of(case, features=SKIP), case, harness.POLICIES[1], skip=LAMBDA.value
    )
    for page in low:
        case.kv_cache[int(case.block_table[0, page]), :, :, :512] = 6e4
    for policy in harness.POLICIES:
        result = harness.run(kernel_of(case, features=SKIP), case, policy, skip=LAMBDA.value)
        assert result.stats.tolist() == [len(low), 10]
        assert torch.equal(result.out, clean.out)


def test_plans():
    """The rings take what shared memory has left; arrive counts follow from the roles."""
    features = harness.features_of(harness.case_of(1, 1, [1]))
    stages = {}
    for width in (576, 512):
        for rows in (16, 32):
            plan = plans.make_small_plan(width, 512, BF16, BF16, features, rows)
            stages[width, rows] = plan.v_stages
            assert plan.shared_bytes <= 227 << 10 < plan.shared_bytes + plan.part_bytes
    assert stages == {(576, 16): 11, (576, 32): 9, (512, 16): 12, (512, 32): 10}
    with pytest.raises(ValueError, match="rows must be 16 or 32"):
        plans.SmallPlan(576, 512, BF16, BF16, features, rows=64)
    with pytest.raises(ValueError, match=r"shared memory: .*'V': 212992"):
        plans.SmallPlan(576, 512, BF16, BF16, features, v_stages=13)
    counts = plans.topology(plans.SmallPlan(576, 512, BF16, BF16, features))
    assert [counts.arrivals(name) for name in ("q_full", "v_full", "p_full")] == [2, 1, 4]
