"""Skip-softmax in the Blackwell prefill kernel: the oracle's decisions, counted and unread."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fmha.problem import SkipSoftmax
from cute_fmha.problem_text import parse
from cute_fmha.testing import Heads, Options, Source, Tiles, check, dense_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

from cute_fmha.bench import skipping

TILES = Tiles(128, 128, False)
GQA = Heads(4, 2, 128, 128)
SKIP = {"skip": True, "count": True}

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def skip_case(seqlen_q, seqlen_k, heads=GQA, options=None, seed=0):
    source = Source(torch.float16, gap=12.0, gap_block=128, seed=seed)
    return dense_case(1, seqlen_q, seqlen_k, heads, options or Options(), source)


@policies
@pytest.mark.parametrize("options", [Options(), Options(causal=True), Options(window=(300, 40))])
def test_decisions_of_the_oracle(policy, options):
    case = skip_case(390, 900, options=options)
    skip = SkipSoftmax(math.exp(-6.0))
    expected = case.oracle(TILES, skip)
    assert expected.margin > 1.0
    assert 0 < expected.skipped < expected.total
    stats = torch.tensor([7, 100])
    out, lse, _ = harness.run(case, policy, skip=skip.value, stats=stats, features=SKIP)
    check(case, out, lse, TILES, skip)
    assert stats.tolist() == [7 + expected.skipped, 100 + expected.total]


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_decisions_at_other_head_dims(dims):
    case = skip_case(390, 900, Heads(2, 1, *dims), Options(causal=True))
    skip = SkipSoftmax(math.exp(-6.0))
    expected = case.oracle(TILES, skip)
    assert expected.margin > 1.0
    assert 0 < expected.skipped < expected.total
    for policy in harness.POLICIES:
        stats = torch.zeros(2, dtype=torch.int64)
        out, lse, _ = harness.run(case, policy, skip=skip.value, stats=stats, features=SKIP)
        check(case, out, lse, TILES, skip)
        assert stats.tolist() == [expected.skipped, expected.total]


@policies
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["spread", "apart"])
def test_tiles_kept_between_skipped_ones(policy, dim, kind):
    """Of one Q tile alone, whose neighbour's next S is made before its P V, or of both."""
    low = skipping.pattern(kind, 3, 9, 0.6)
    assert int((low[0] ^ low[1]).sum()) == (0 if kind == "spread" else 6)
    case = skipping.skip_case(parse(f"sq300,sk1100,hq2,hkv1,d{dim},fp16"), TILES, low)
    skip = SkipSoftmax(math.exp(-6.0))
    stats = torch.zeros(2, dtype=torch.int64)
    out, lse, _ = harness.run(case, policy, skip=skip.value, stats=stats, features=SKIP)
    check(case, out, lse, TILES, skip)
    assert stats.tolist() == [2 * int(low.sum()), 2 * low.numel()]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_threshold_in_every_form(tensor, relative):
    """Also changed between launches of one kernel, as between replays of a CUDA graph."""
    case = skip_case(390, 900)
    features = {**SKIP, "skip_tensor": tensor, "skip_relative": relative}
    device = torch.zeros(1)
    for value in (math.exp(-6.0), 0.0):
        given = value * 900 if relative else value
        skip = SkipSoftmax(threshold_scale_factor=given) if relative else SkipSoftmax(given)
        expected = case.oracle(TILES, skip)
        stats = torch.zeros(2, dtype=torch.int64)
        device.fill_(given)
        out, lse, _ = harness.run(
            case,
            harness.POLICIES[2],
            skip=device if tensor else given,
            stats=stats,
            features=features,
        )
        check(case, out, lse, TILES, skip)
        assert stats.tolist() == [expected.skipped, expected.total]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_off(value):
    case = skip_case(200, 500)
    stats = torch.zeros(2, dtype=torch.int64)
    out, lse, _ = harness.run(case, harness.POLICIES[2], skip=value, stats=stats, features=SKIP)
    check(case, out, lse)
    assert stats[0] == 0


def test_value_of_skipped_tiles_is_not_read():
    """V of every tile that all rows skip is NaN."""
    skip = SkipSoftmax(math.exp(-6.0))
    for seed in range(20):
        case = skip_case(128, 900, Heads(1, 1, 128, 128), seed=seed)
        expected = case.oracle(TILES, skip)
        if expected.skipped > 2:
            break
    kept = torch.zeros(8, dtype=torch.bool)
    running = torch.full((128,), -math.inf)
    scores = (case.q[0, :, 0].double() @ case.k[0, :, 0].double().T) / math.sqrt(128)
    for n in range(8):
        tile = scores[:, n * 128 : (n + 1) * 128].amax(-1).float()
        kept[n] = bool((tile - running >= -6.0).any())
        if kept[n]:
            running = torch.maximum(running, tile)
    assert int((~kept).sum()) == expected.skipped > 0
    for n in range(8):
        if not kept[n]:
            case.v[0, n * 128 : (n + 1) * 128] = math.nan
    stats = torch.zeros(2, dtype=torch.int64)
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy, skip=skip.value, stats=stats, features=SKIP)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), expected.out, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse.double(), expected.lse, atol=1e-5, rtol=1e-6)
