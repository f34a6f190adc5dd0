"""The Blackwell prefill kernel with the heads of a group packed into Q tiles."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import Heads, Options, Source, Tiles, check, dense_case, packed_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (Heads(8, 2, 128, 128), Options(causal=True)),
        (Heads(8, 1, 128, 128), Options(window=(70, 10), sink=True)),
        (Heads(4, 1, 192, 128), Options(sink=True)),
    ],
    ids=["4-causal", "8-window-sink", "4-192"],
)
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_dense(heads, options, seqlen_q):
    """A decode step's rows fill part of a tile; others end in the middle of a position's group."""
    case = dense_case(2, seqlen_q, 200, heads, options, Source(FP16, std=0.5))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy, pack=heads.q // heads.kv)
        check(case, out, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences(causal):
    heads = Heads(8, 2, 128, 128)
    options = Options(causal=causal, sink=True)
    case = packed_case((70, 0, 1, 33), (300, 5, 0, 140), heads, options, Source(BF16))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy, pack=4)
        check(case, out, lse)


def test_skip():
    """Decided by the rows of all heads of the group together."""
    heads = Heads(4, 2, 128, 128)
    source = Source(FP16, gap=12.0, gap_block=128)
    case = dense_case(1, 390, 900, heads, Options(causal=True), source)
    skip, tiles = SkipSoftmax(math.exp(-6.0)), Tiles(128, 128, True)
    expected = case.oracle(tiles, skip)
    assert expected.margin > 1.0
    assert 0 < expected.skipped < expected.total
    for policy in harness.POLICIES:
        stats = torch.zeros(2, dtype=torch.int64)
        features = {"skip": True, "count": True}
        out, lse, _ = harness.run(
            case, policy, skip=skip.value, stats=stats, features=features, pack=2
        )
        check(case, out, lse, tiles, skip)
        assert stats.tolist() == [expected.skipped, expected.total]
