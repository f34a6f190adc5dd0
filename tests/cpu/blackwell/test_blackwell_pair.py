"""The prefill kernel of a pair of CTAs (head dims 256, 256), number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fragments import on_reference, same_bits

from cute_fmha.epilogues import FP8, NVFP4, Identity
from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import Heads, Options, Source, Tiles, check, dense_case, packed_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

BF16, FP16 = torch.bfloat16, torch.float16
ONE = Heads(1, 1, 256, 256)
GQA = Heads(4, 2, 256, 256)
LENGTHS = [(1, 1), (300, 300), (0, 70), (130, 257), (40, 0), (257, 128)]
"""(queries, keys): empty ones of either kind, a second CTA without rows, an odd number of tiles."""
SKIP = SkipSoftmax(math.exp(-6.0))
SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(256, 512), (300, 330), (1, 1), (130, 77), (520, 257)]
)
def test_full(seqlen_q, seqlen_k):
    case = dense_case(1, seqlen_q, seqlen_k, ONE, source=Source(BF16, std=1.0))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize("ctas", [2, 4])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 330), (400, 150)])
def test_causal(seqlen_q, seqlen_k, ctas):
    """Several work tiles on a pair, with queries that precede every key."""
    case = dense_case(2, seqlen_q, seqlen_k, GQA, Options(causal=True), Source(FP16))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy, ctas=ctas, pack=1)
        check(case, out, lse)


@pytest.mark.parametrize("pack", [pytest.param(1, marks=SWEEP), 2])
def test_window_sink_softcap(pack):
    options = Options(window=(100, 30), sink=True, softcap=50.0)
    case = dense_case(1, 390, 450, GQA, options, Source(BF16))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy, pack=pack)
        check(case, out, lse)


def growing_case(dtype, heads=ONE, keys=640):
    """The maximum rises over and over: O is rescaled while P V of the tile before may be at it."""
    case = dense_case(1, 300, keys, heads, source=Source(dtype, std=1.0))
    ramp = torch.linspace(0.2, 4.0, keys).to(dtype)[None, :, None, None]
    return replace(case, k=case.k * ramp)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_growing_scores(dtype):
    case = growing_case(dtype)
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize(
    "options",
    [Options(), Options(causal=True), pytest.param(Options(window=(300, 40)), marks=SWEEP)],
)
@pytest.mark.parametrize("ctas", [2, 4])
def test_decisions_of_the_oracle(options, ctas):
    """Both CTAs decide together, for 256 rows."""
    source = Source(FP16, gap=12.0, gap_block=128)
    case = dense_case(1, 390, 900, Heads(2, 1, 256, 256), options, source)
    tiles = Tiles(256, 128, False)
    expected = case.oracle(tiles, SKIP)
    assert expected.margin > 1.0
    assert 0 < expected.skipped < expected.total
    for policy in harness.POLICIES:
        stats = torch.tensor([7, 100])
        out, lse, _ = harness.run(
            case, policy, ctas=ctas, skip=SKIP.value, stats=stats,
            features={"skip": True, "count": True},
        )  # fmt: skip
        check(case, out, lse, tiles, SKIP)
        assert stats.tolist() == [7 + expected.skipped, 100 + expected.total]


@pytest.mark.parametrize("options", [Options(), Options(causal=True, sink=True)])
def test_sequences(options):
    """Nothing is read or written past the last sequence."""
    lengths_q, lengths_k = ([pair[side] for pair in LENGTHS] for side in (0, 1))
    case = packed_case(lengths_q, lengths_k, GQA, options, Source(FP16, std=0.5))
    total = len(case.q)

    def longer(x):
        return torch.cat([x, x.new_full((70, *x.shape[1:]), math.nan)])

    wide = replace(case, q=longer(case.q), k=longer(case.k), v=longer(case.v))
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(wide, policy, ctas=2)
        check(case, out[:total], lse[:, :total])
        assert out[total:].isnan().all()
        assert lse[:, total:].isnan().all()


def test_bits_do_not_depend_on_other_work():
    """Three KV tiles a work tile: which of them are whose changes with the work before."""
    case = growing_case(BF16, Heads(3, 3, 256, 256), 330)
    results = [harness.run(case, harness.POLICIES[0], ctas=ctas)[:2] for ctas in (2, 4)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_keys_in_use():
    options = Options(causal=True)
    case = dense_case(3, 140, 300, GQA, options, Source(BF16), seqused_k=[300, 0, 131])
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        check(case, out, lse)


@pytest.mark.parametrize(
    ("pack", "window", "skip"),
    [
        (1, None, None),
        (2, (200, 20), SKIP),
        pytest.param(1, None, SKIP, marks=SWEEP),
        pytest.param(2, (200, 20), None, marks=SWEEP),
    ],
)
def test_block_mask(skip, pack, window):
    """With an odd number of visible tiles here and there, and none."""
    options = Options(window=window, blocks=(64, 48, 0.3), sink=True)
    source = Source(FP16, std=0.5) if skip is None else Source(FP16, gap=12.0, gap_block=128)
    case = dense_case(1, 300, 900, GQA, options, source)
    tiles = Tiles(256, 128, pack > 1)
    expected = case.oracle(tiles, skip)
    for policy in harness.POLICIES:
        stats = torch.zeros(2, dtype=torch.int64)
        out, lse, _ = harness.run(
            case, policy, pack=pack, skip=0.0 if skip is None else skip.value, stats=stats,
            features={"count": True, "skip": skip is not None},
        )  # fmt: skip
        check(case, out, lse, tiles, skip)
        assert stats.tolist() == [expected.skipped, expected.total]


@pytest.mark.parametrize("op", [FP8(torch.tensor(0.3)), NVFP4(torch.tensor([0.7]))])
def test_epilogue_ops(op):
    """The bits that the op makes of the output in FP32, rows of a second CTA with them."""
    case = dense_case(1, 200, 200, ONE, source=Source(BF16))
    out, lse = case.run(backend="emulator", epilogue=Identity(torch.float32))
    check(case, out, lse)
    made, _ = case.run(backend="emulator", epilogue=op)
    assert same_bits(made, on_reference(op, out))
