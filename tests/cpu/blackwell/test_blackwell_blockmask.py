"""Block masks in the Blackwell prefill kernel: any block sizes, tiles that nobody sees left out."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fmha.problem import BlockMask, SkipSoftmax
from cute_fmha.testing import Heads, Options, Source, Tiles, check, dense_case, packed_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness

BF16, FP16 = torch.bfloat16, torch.float16
GQA = Heads(4, 2, 128, 128)
BLOCKS = [(128, 128, 0.4), (64, 32, 0.3), (100, 48, 0.3), (256, 512, 0.5)]
"""Block sizes and the share of blocks that are seen: of tiles, inside them, across, around them."""


def run_and_check(case, policy, pack, skip=None, **arguments):
    """Against the replay, with its counters."""
    dim = case.q.shape[-1]
    tiles = Tiles(256 if dim == 256 else 128, 64 if dim == 192 else 128, pack > 1)
    expected = case.oracle(tiles, skip)
    stats = torch.zeros(2, dtype=torch.int64)
    features = {"count": True, "skip": skip is not None}
    value = 0.0 if skip is None else skip.value
    out, lse, report = harness.run(
        case, policy, pack=pack, skip=value, stats=stats, features=features, **arguments
    )
    check(case, out, lse, tiles, skip)
    assert stats.tolist() == [expected.skipped, expected.total]
    assert len(report.launches) == 1
    return expected


@pytest.mark.parametrize("blocks", BLOCKS)
def test_dense(blocks):
    """Causal but where blocks lie across tiles."""
    options = Options(causal=blocks[0] != 100, blocks=blocks)
    case = dense_case(1, 300, 700, GQA, options, Source(FP16))
    for policy in harness.POLICIES:
        run_and_check(case, policy, pack=1)


def test_hidden_tiles_are_not_loaded():
    """Of what no row sees K and V are NaN."""
    case = dense_case(1, 256, 1500, Heads(1, 1, 128, 128), Options(), Source(BF16))
    mask = torch.rand(1, 1, 1, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    case.common["block_mask"] = BlockMask(mask, 256, 128)
    expected = case.reference()
    for n in range(12):
        if not mask[0, 0, 0, n]:
            case.k[0, n * 128 : (n + 1) * 128] = math.nan
            case.v[0, n * 128 : (n + 1) * 128] = math.nan
    for policy in harness.POLICIES:
        out, lse, _ = harness.run(case, policy)
        torch.testing.assert_close(out.double(), expected[0], atol=2e-3, rtol=2e-2)
        torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-6)


def test_everything_is_hidden_from_some():
    """A Q tile, a head, a sequence; sinks are then all that is left."""
    case = dense_case(2, 300, 300, GQA, Options(sink=True), Source(BF16))
    mask = torch.ones(2, 4, 5, 5, dtype=torch.bool)
    mask[0, 1, :3] = False
    mask[0, 2] = False
    mask[1, :, 4] = False
    case.common["block_mask"] = BlockMask(mask, 64, 64)
    for policy in harness.POLICIES:
        run_and_check(case, policy, pack=1)


def test_one_mask_for_all():
    """Broadcast over heads and sequences."""
    case = dense_case(2, 200, 300, GQA, Options(), Source(BF16))
    mask = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    case.common["block_mask"] = BlockMask(mask, 50, 64)
    for policy in harness.POLICIES:
        run_and_check(case, policy, pack=2)


@pytest.mark.parametrize("pack", [1, 2])
def test_sequences(pack):
    options = Options(causal=True, blocks=(64, 64, 0.4), sink=True)
    case = packed_case((200, 0, 70, 1), (300, 40, 0, 513), GQA, options, Source(FP16))
    for policy in harness.POLICIES:
        run_and_check(case, policy, pack)


def test_with_skip():
    source = Source(FP16, gap=12.0, gap_block=128)
    options = Options(causal=True, blocks=(128, 64, 0.5))
    case = dense_case(1, 390, 900, GQA, options, source)
    for policy in harness.POLICIES:
        expected = run_and_check(case, policy, pack=1, skip=SkipSoftmax(math.exp(-6.0)))
        assert expected.margin > 1.0
        assert 0 < expected.skipped < expected.total


@pytest.mark.sweep
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("window", [None, (200, 20)])
@pytest.mark.parametrize("pack", [1, 4])
def test_matrix(dims, blocks, window, pack):
    options = Options(window=window, blocks=blocks, sink=True, softcap=20.0)
    case = dense_case(1, 300, 450, Heads(4, 1, *dims), options, Source(BF16, std=0.5))
    for policy in harness.POLICIES:
        run_and_check(case, policy, pack)
