"""The Blackwell prefill kernel on packed sequences: ragged ends, empty ones, poison past all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import (
    AttentionCase,
    Heads,
    Options,
    Source,
    Tiles,
    check,
    dense_case,
    packed_case,
)

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

BF16, FP16 = torch.bfloat16, torch.float16
GQA = Heads(4, 2, 128, 128)
DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
DEFAULT = Source()
LENGTHS = [(1, 1), (300, 300), (0, 70), (130, 257), (40, 0), (128, 40), (257, 128)]
"""(queries, keys): empty ones of either kind, ends inside and at the end of tiles."""


def case_of(
    lengths: list[tuple[int, int]], heads: Heads, options: Options, source: Source = DEFAULT
) -> AttentionCase:
    lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in (0, 1))
    return packed_case(lengths_q, lengths_k, heads, options, source)


def poisoned(case: AttentionCase, rows: int = 70) -> AttentionCase:
    """``case`` in tensors that go on, with NaN."""

    def longer(x):
        return torch.cat([x, x.new_full((rows, *x.shape[1:]), math.nan)])

    return replace(case, q=longer(case.q), k=longer(case.k), v=longer(case.v))


def run_and_check(case, policy, **arguments):
    """Also: nothing is written past the last sequence."""
    longer = poisoned(case)
    out, lse, report = harness.run(longer, policy, **arguments)
    total = len(case.q)
    check(case, out[:total], lse[:, :total])
    assert out[total:].isnan().all()
    assert lse[:, total:].isnan().all()
    assert len(report.launches) == 1


@pytest.mark.parametrize(
    "options", [Options(), Options(causal=True), Options(window=(100, 30), sink=True)],
    ids=["full", "causal", "window-sink"],
)  # fmt: skip
def test_sequences(options):
    case = case_of(LENGTHS, GQA, options, Source(FP16, std=0.5))
    for policy in harness.POLICIES:
        run_and_check(case, policy, ctas=3)


def test_lengths_change_between_launches():
    """One kernel, one grid: as a CUDA graph is replayed."""
    for lengths in (LENGTHS, LENGTHS[::-1], [(0, 0), (256, 512)]):
        case = case_of(lengths, GQA, Options(causal=True), Source(BF16))
        case.launch.update(max_seqlen_q=512, max_seqlen_k=512)
        run_and_check(case, harness.POLICIES[2])


def test_more_sequences_than_lanes():
    lengths = [(0, 3), (1, 40), (3, 3), (0, 0), (200, 130)] * 9
    case = case_of(lengths, Heads(2, 1, 64, 64), Options(causal=True))
    run_and_check(case, harness.POLICIES[3])


def cut_short(case: AttentionCase, used: list[int]) -> AttentionCase:
    """``case`` with ``seqused_k``; what is not used is NaN."""
    starts = case.common.get("cu_seqlens_k")
    first = [0] * len(used) if starts is None else starts.tolist()
    for index, length in enumerate(used):
        for x in (case.k, case.v):
            rows = x[index] if starts is None else x[: first[index + 1]]
            rows[first[index] + length :] = math.nan
    common = {**case.common, "seqused_k": torch.tensor(used, dtype=torch.int32)}
    return replace(case, common=common)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_in_use(causal):
    options = Options(causal=causal)
    case = packed_case((130, 7, 50), (300, 128, 90), GQA, options, Source(FP16))
    case = cut_short(case, [190, 0, 90])
    for policy in harness.POLICIES:
        run_and_check(case, policy)
    case = dense_case(3, 140, 300, GQA, options, Source(BF16), seqused_k=[300, 0, 131])
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize("relative", [False, True])
def test_skip(relative):
    """The factor is over every sequence's own length."""
    source = Source(FP16, gap=12.0, gap_block=128)
    case = packed_case((390, 200, 0), (900, 513, 40), GQA, Options(causal=True), source)
    value = math.exp(-6.0) * (700 if relative else 1)
    skip = SkipSoftmax(threshold_scale_factor=value) if relative else SkipSoftmax(value)
    tiles = Tiles(128, 128, False)
    expected = case.oracle(tiles, skip)
    assert expected.margin > 1.0
    assert 0 < expected.skipped < expected.total
    for policy in harness.POLICIES:
        stats = torch.zeros(2, dtype=torch.int64)
        out, lse, _ = harness.run(
            case, policy, skip=value, stats=stats,
            features={"skip": True, "count": True, "skip_relative": relative},
        )  # fmt: skip
        check(case, out, lse, tiles, skip)
        assert stats.tolist() == [expected.skipped, expected.total]


@pytest.mark.sweep
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(
    "options",
    [Options(), Options(causal=True), Options(window=(100, 30), sink=True, softcap=20.0)],
    ids=["full", "causal", "all"],
)
def test_matrix(dims, dtype, group, options):
    heads = Heads(group, 1, *dims)
    case = case_of(LENGTHS, heads, options, Source(dtype, std=0.5))
    for policy in harness.POLICIES:
        run_and_check(case, policy)
