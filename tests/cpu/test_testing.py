"""The error budgets let the honest computation through and stop each kind of wrong one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fmha.testing import (
    BAD_PAGE,
    AttentionCase,
    Heads,
    MlaCase,
    Options,
    Source,
    assert_close,
    check,
    dense_case,
    error_report,
    mla_case,
    packed_case,
    paged_case,
    random_case,
    rounded_baseline,
    skip_friendly,
)
from cute_fmha.tiling import ceil_div

HEADS = Heads(4, 2, 64, 64)
HALF = [torch.float16, torch.bfloat16]


def case_of(dtype: torch.dtype, std: float = 0.1) -> AttentionCase:
    return dense_case(2, 70, 200, HEADS, Options(causal=True, sink=True), Source(dtype, std=std))


def honest(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    _, lse = case.reference(dtype=torch.float32)
    return rounded_baseline(case, case.q.dtype), lse


@pytest.mark.parametrize("std", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_honest_results_pass(dtype, std):
    case = case_of(dtype, std)
    report = check(case, *honest(case))
    assert report.count == 2 * 70 * 4 * 64
    assert report.cosine < 1


def spoil_one_element(case, out, lse):
    out[1, 3, 2, 5] += 0.01


def scale_output(case, out, lse):
    out *= 1.01


def leave_nan(case, out, lse):
    out[1, 3, 2, 5] = math.nan


def leave_infinity(case, out, lse):
    out[1, 3, 2, 5] = math.inf


def swap_two_heads(case, out, lse):
    out[:, :, [0, 1]] = out[:, :, [1, 0]]


def forget_the_sink(case, out, lse):
    plain = replace(case, common={"causal": True})
    out.copy_(plain.reference()[0])


def forget_the_last_key(case, out, lse):
    short = replace(case, k=case.k[:, 1:], v=case.v[:, 1:])
    out.copy_(short.reference()[0])


def round_twice(case, out, lse):
    coarse = case.reference(round_p=torch.float8_e4m3fn)[0]
    out.copy_(coarse)


def lse_in_log2(case, out, lse):
    lse *= math.log2(math.e)


def lse_slightly_off(case, out, lse):
    lse[1, 2, 3] += 2e-5 * max(1.0, abs(float(lse[1, 2, 3])))


def lse_infinite(case, out, lse):
    lse[0, 0, 0] = -math.inf


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_one_element, "error"),
        (scale_output, "cosine"),
        (leave_nan, r"NaN/inf disagree at 1 positions, first \(1, 3, 2, 5\)"),
        (leave_infinity, "NaN/inf disagree at 1 positions"),
        (swap_two_heads, "cosine"),
        (forget_the_sink, "cosine"),
        (forget_the_last_key, "cosine"),
        (round_twice, "out"),
        (lse_in_log2, "lse: worst error"),
        (lse_slightly_off, r"lse: worst error .* at \(1, 2, 3\)"),
        (lse_infinite, "lse: NaN/inf disagree at 1 positions"),
    ],
)
def test_wrong_results_fail(dtype, spoil, message):
    case = case_of(dtype)
    out, lse = honest(case)
    spoil(case, out, lse)
    with pytest.raises(AssertionError, match=message):
        check(case, out, lse)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_the_scores_misses_the_rms_gate(dtype):
    """What a kernel that keeps S in half precision loses is within every gate but this one."""
    case = dense_case(1, 100, 100, Heads(1, 1, 64, 64), Options(), Source(dtype, std=1.0))
    q, k, v = (x[0, :, 0].float() for x in (case.q, case.k, case.v))
    s = (q @ k.T / 8).to(dtype).float()
    p = torch.exp(s - s.amax(1, keepdim=True))
    out = (p.to(dtype).float() @ v / p.sum(1, keepdim=True)).to(dtype)
    with pytest.raises(AssertionError, match=r"cosine|RMS"):
        check(case, out[None, :, None], None)


def test_small_samples_have_room_to_scatter_and_large_ones_have_none():
    """A result with 1.3 times the baseline's error passes for 64 elements, not for 65536."""

    def compare(count: int) -> None:
        expected = torch.ones(count, dtype=torch.float64)
        sign = 1.0 - 2.0 * (torch.arange(count) % 2)
        assert_close(
            expected + 1.3e-4 * sign, None, expected, expected, dtype=torch.bfloat16,
            baseline_out=expected + 1e-4 * sign,
        )  # fmt: skip

    compare(64)
    with pytest.raises(AssertionError, match="RMS"):
        compare(65536)


def test_a_single_element_is_held_to_the_absolute_budget():
    """One bad element of 2^20 moves neither the cosine nor the RMS: 8e-4 + x / 64 stops it."""
    expected = torch.full((1 << 20,), 0.02, dtype=torch.float64)
    baseline = expected + 2e-5
    for error, passes in ((8e-4 + 0.02 / 64 - 1e-6, True), (8e-4 + 0.02 / 64 + 1e-6, False)):
        actual = expected.clone()
        actual[77] += error
        call: dict[str, Any] = {"dtype": torch.bfloat16, "baseline_out": baseline}
        if passes:
            assert_close(actual, None, expected, expected, **call)
            continue
        with pytest.raises(AssertionError, match=r"exceeds 8\.0e-04 .* at \(77,\)"):
            assert_close(actual, None, expected, expected, **call)
        assert_close(actual, None, expected, expected, std=0.2, **call)


def test_error_report():
    expected = torch.tensor([[1.0, 2.0], [math.inf, math.nan]], dtype=torch.float64)
    actual = torch.tensor([[1.0, 2.5], [math.inf, math.nan]])
    report = error_report(actual, expected)
    assert report.cosine == pytest.approx(2 * (1 + 5) / (1 + 6.25 + 1 + 4))
    assert report.rms == pytest.approx(math.sqrt(0.25 / 2))
    assert (report.max_abs, report.worst_index) == (0.5, (0, 1))
    assert (report.mismatched, report.count) == (0, 2)
    actual[1] = torch.tensor([-math.inf, 0.0])
    report = error_report(actual, expected)
    assert (report.mismatched, report.first_mismatch) == (2, (1, 0))
    with pytest.raises(AssertionError, match="shape"):
        error_report(actual, expected[0])


def test_empty_tensors_compare():
    empty = torch.empty(0, 3)
    report = error_report(empty, empty)
    assert (report.count, report.cosine, report.rms) == (0, 1.0, 0.0)
    assert_close(empty, empty, empty, empty, dtype=torch.float32, baseline_out=empty)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_are_shuffled_and_poisoned(page_size):
    lengths = [5, 0, 33]
    attention = paged_case(2, lengths, page_size, HEADS)
    latent = mla_case(2, lengths, page_size, 3)
    caches = [
        (attention.k, attention.common["block_table"]),
        (attention.v, attention.common["block_table"]),
        (latent.kv_cache, latent.block_table),
    ]
    for cache, table in caches:
        assert int(cache.isfinite().all(-1).all(-1).sum()) == sum(lengths)
        assert int(cache.isnan().all(-1).all(-1).sum()) == cache[..., 0, 0].numel() - sum(lengths)
        used = [row[: ceil_div(n, page_size)] for row, n in zip(table, lengths, strict=True)]
        owned = torch.cat(used).tolist()
        assert len(set(owned)) == len(owned)
        assert owned != sorted(owned)
        assert max(owned) < cache.shape[0] > len(owned)
        for row, n in zip(table, lengths, strict=True):
            rest = row[ceil_div(n, page_size) :]
            assert len(rest) > 0
            assert (rest == BAD_PAGE).all()


def test_dense_tails_are_poisoned():
    case = dense_case(2, 3, 7, HEADS, seqused_k=[4, 0])
    assert case.k[0, :4].isfinite().all()
    assert case.k[0, 4:].isnan().all()
    assert case.v[1].isnan().all()


def test_cases_follow_their_seed():
    def draw(seed: int) -> torch.Tensor:
        return packed_case([3, 0], [2, 9], HEADS, Options(), Source(seed=seed)).q

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    source = Source(torch.float32, std=0.1)
    q = dense_case(1, 4000, 1, HEADS, Options(), source).q
    assert float(q.std()) == pytest.approx(0.1, rel=0.01)
    assert float(q.abs().max()) <= 1


def test_random_cases_cover_every_kind():
    cases = [random_case(Source(seed=seed), max_length=40) for seed in range(60)]
    layouts = {
        "mla" if isinstance(c, MlaCase) else tuple(sorted(set(c.common) & set(LAYOUT_KEYS)))
        for c in cases
    }
    assert layouts == {
        "mla", (), ("seqused_k",), ("cu_seqlens_k", "cu_seqlens_q"), ("block_table", "seqused_k"),
        ("block_table", "cu_seqlens_q", "seqused_k"),
    }  # fmt: skip
    used = {name for c in cases for name, value in c.common.items() if value is not False}
    assert {"scale", "causal", "window", "softcap", "sink", "block_mask"} <= used


LAYOUT_KEYS = ("cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k")


def test_skip_friendly_scores_have_two_levels():
    source, skip = skip_friendly(Source(torch.float32, gap_block=8), gap=10.0)
    case = dense_case(1, 512, 512, Heads(1, 1, 64, 64), Options(scale=0.3), source)
    s = 0.3 * case.q[0, :, 0] @ case.k[0, :, 0].T
    low = s < -5
    assert 0.5 < low.float().mean() < 0.95
    assert (s[low] + 10).abs().max() < 2.5
    assert s[~low].abs().max() < 2.5
    assert skip.value == pytest.approx(math.exp(-5))
    patterns = low.view(64, 8, 64, 8)
    assert (patterns == patterns[:, :1, :, :1]).all(), "a block of keys and of positions is uniform"
    assert len(low.unique(dim=0)) == 2
