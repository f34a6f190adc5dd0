"""Split-KV in the MLA decode kernels: pieces, partial results and their combine, in one launch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.problem import SkipSoftmax

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")
harness = pytest.importorskip("mla_harness")

from cute_fmha.kernels.blackwell.mla_decode import MlaDecode  # noqa: E402  (needs CuTe DSL)
from cute_fmha.kernels.blackwell.mla_decode_plan import make_plan  # noqa: E402

LENGTHS = [0, 1, 63, 64, 65, 1000]
SKIP = SkipSoftmax(threshold=math.exp(-20.0))

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)
splits = pytest.mark.parametrize("num_splits", [0, 2, 5], ids=["auto", "2", "5"])


def kernel_of(case: Any, num_splits: int, **features: Any) -> Any:
    """The kernel that takes the case's rows, cut as ``num_splits`` asks."""
    cut = {0: Cut.SHARE, 1: Cut.WHOLE}.get(num_splits, Cut.FIXED)
    present = harness.features_of(case, **features)
    dtype, page, rows = case.q.dtype, case.kv_cache.shape[1], case.q.shape[1] * case.q.shape[2]
    return MlaDecode(make_plan(case.q.shape[-1], dtype, dtype, present, page, rows, cut))


@policies
@splits
@pytest.mark.parametrize("heads", [48, 128])
def test_lengths(policy, num_splits, heads):
    """More pieces than CTAs, and the other way round."""
    case = harness.case_of(heads, 1, LENGTHS, sink=True)
    kernel = kernel_of(case, num_splits)
    for ctas in (6, 30):
        harness.verify(kernel, case, policy, ctas=ctas, num_splits=num_splits)


@policies
def test_skip_and_counters(policy):
    case = harness.case_of(64, 1, [65, 640, 1000], gap=40.0)
    kernel = kernel_of(case, 2, skip=True, count=True)
    result = harness.verify(kernel, case, policy, skip=SKIP, ctas=7, num_splits=2)
    assert result.stats[0] > 5


@splits
def test_replays(num_splits):
    """One workspace; lengths and pages change between launches, as in a CUDA graph."""
    case = harness.case_of(64, 1, [640, 700, 130])
    kernel = kernel_of(case, num_splits)
    workspace = harness.workspace_of(kernel.plan, case, 9, num_splits)
    for turn, lengths in enumerate(([640, 700, 130], [10, 0, 129], [1, 700, 64])):
        case.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for policy in harness.POLICIES:
            harness.verify(kernel, case, policy, ctas=9, num_splits=num_splits, workspace=workspace)
        if turn == 1:
            pages = case.block_table[:, :2].clone()
            case.block_table[0, :2], case.block_table[1, :2] = pages[1], pages[0]


def test_bits_of_a_fixed_split():
    """Neither timing nor the number of CTAs nor the rest of the batch has a say."""
    case = harness.case_of(64, 1, [640, 0, 300])
    kernel = kernel_of(case, 5)
    results = [
        harness.run(kernel, case, policy, ctas=ctas, num_splits=5)
        for policy, ctas in zip(harness.POLICIES, (3, 20, 7, 7), strict=True)
    ]
    table, lengths = case.block_table[2:].clone(), case.cache_seqlens[2:].clone()
    alone = harness.MlaCase(case.q[2:], case.kv_cache, table, lengths, case.std, case.common)
    single = harness.run(kernel, alone, harness.POLICIES[0], ctas=4, num_splits=5)
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)
    assert torch.equal(single.out[0], results[0].out[2])
