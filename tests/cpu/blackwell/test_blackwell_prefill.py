"""The Blackwell prefill kernel, executed number by number: output, LSE, races, hazards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fmha.testing import (
    Heads,
    Options,
    Source,
    check,
    dense_case,
)

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

BF16, FP16 = torch.bfloat16, torch.float16
ONE = Heads(1, 1, 128, 128)
GQA = Heads(4, 2, 128, 128)

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


@policies
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(256, 128), (256, 384), (1, 1), (130, 77), (300, 257)]
)
def test_full(policy, seqlen_q, seqlen_k):
    case = dense_case(1, seqlen_q, seqlen_k, ONE, source=Source(BF16, std=1.0))
    out, lse, _ = harness.run(case, policy)
    check(case, out, lse)


@policies
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (100, 330), (400, 150), (257, 384)])
def test_causal(policy, seqlen_q, seqlen_k):
    """Also with queries that precede every key, and Q tiles without a KV tile."""
    case = dense_case(2, seqlen_q, seqlen_k, GQA, Options(causal=True), Source(FP16))
    out, lse, _ = harness.run(case, policy)
    check(case, out, lse)


@policies
@pytest.mark.parametrize("window", [(100, 30), (0, 0), (300, 0)])
def test_window(policy, window):
    case = dense_case(1, 390, 450, GQA, Options(window=window), Source(BF16))
    out, lse, _ = harness.run(case, policy)
    check(case, out, lse)


@policies
@pytest.mark.parametrize("dims", [(128, 128), (192, 128)])
def test_several_work_tiles_on_a_cta(policy, dims):
    """Phases carry over from one work tile to the next; at 192 the output lies over V."""
    case = dense_case(2, 300, 200, Heads(4, 2, *dims), Options(causal=True), Source(FP16))
    out, lse, _ = harness.run(case, policy, ctas=3)
    check(case, out, lse)


def test_strides():
    """Heads before positions, NaN between the rows of every tensor."""
    case = dense_case(2, 140, 150, GQA, source=Source(BF16))

    def wide(x):
        base = x.new_full((x.shape[2], x.shape[0], x.shape[1], x.shape[3] + 8), float("nan"))
        view = base[..., : x.shape[3]].permute(1, 2, 0, 3)
        view.copy_(x)
        return view

    spread = replace(case, q=wide(case.q), k=wide(case.k), v=wide(case.v))
    out = wide(torch.full_like(case.q, float("nan")))
    _, lse, _ = harness.run(spread, harness.POLICIES[0], out=out)
    check(case, out, lse)


def test_output_in_float32():
    case = dense_case(1, 200, 200, ONE, source=Source(BF16))
    out = torch.full(case.q.shape, float("nan"))
    _, lse, _ = harness.run(case, harness.POLICIES[2], out=out)
    check(case, out, lse)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("options", [Options(), Options(causal=True)], ids=["full", "causal"])
def test_head_dims(dims, options):
    case = dense_case(1, 300, 330, Heads(2, 1, *dims), options, Source(BF16))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize(
    "options",
    [
        Options(sink=True),
        Options(sink=True, causal=True),
        Options(softcap=0.5),
        Options(softcap=50.0, sink=True, window=(100, 20)),
    ],
    ids=["sink", "sink-causal", "softcap", "all"],
)
def test_sink_and_softcap(options):
    """With queries that precede every key: the sink is then their only column."""
    case = dense_case(1, 300, 170, GQA, options, Source(FP16, std=1.0))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


def peaked_case(dtype):
    """One key dominates a row, and the maximum rises over and over."""
    case = dense_case(1, 256, 640, ONE, source=Source(dtype, std=1.0))
    ramp = torch.linspace(0.2, 4.0, 640).to(dtype)[None, :, None, None]
    return replace(case, k=case.k * ramp)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_growing_scores(dtype):
    """Where the maximum is allowed to lag, the largest P of a row is not exactly 1 and takes a
    rounding error of its own: the less it may lag, the fewer rows have that."""
    case = peaked_case(dtype)
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize("peaked", [False, True])
def test_every_exponential_by_polynomial(peaked):
    case = peaked_case(FP16) if peaked else dense_case(1, 300, 330, ONE, Options(causal=True))
    out, lse, _ = harness.run(case, harness.POLICIES[2], by_polynomial=16)
    check(case, out, lse)


def test_error_of_the_polynomial():
    """In FP32 with one rounding per multiply-add, over all that |f| <= 1/2 can be."""
    from cute_fmha.kernels.blackwell.softmax import POWER_OF_TWO

    f = torch.linspace(-0.5, 0.5, 1 << 20)
    power = torch.full_like(f, POWER_OF_TWO[-1])
    for coefficient in (*POWER_OF_TWO[-2::-1], 1.0):
        power = (power.double() * f.double() + torch.tensor(coefficient).double()).float()
    error = (power.double() / torch.exp2(f.double()) - 1).abs().max()
    assert 2e-6 < error < 2.9e-6
