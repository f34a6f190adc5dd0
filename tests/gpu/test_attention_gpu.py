"""`attention` on a GPU against FP64: head dims × layouts × masks × dtypes, both kernel families.

Options are spread over the layouts so that a new compilation tests several things at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from launches import tiles_of
from strides import empty_results, gaps_untouched, spread_case

from cute_fmha import SkipStats, attention, make_workspace
from cute_fmha.epilogues import Identity
from cute_fmha.kernels.triton.plan import COUNTER_BYTES
from cute_fmha.testing import (
    AttentionCase,
    Heads,
    Options,
    Source,
    check,
    dense_case,
    packed_case,
    paged_case,
)

pytestmark = pytest.mark.gpu

BF16 = Source(torch.bfloat16, "cuda")
FP16 = Source(torch.float16, "cuda")
CAUSAL = Options(causal=True)
GQA = Heads(8, 2, 128, 128)
EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 1000]


def gqa(pair: tuple[int, int]) -> Heads:
    return Heads(8, 2, *pair)


def run_and_check(case: AttentionCase, **call: Any) -> None:
    check(case, *case.run(backend="triton", **call))


DENSE = [
    ("planned", (64, 64)),
    ("planned", (96, 96)),
    ("planned", (128, 128)),
    ("planned", (192, 128)),
    ("planned", (256, 256)),
    ("planned", (512, 512)),
    ("portable", (96, 96)),
    ("portable", (128, 128)),
    ("portable", (256, 256)),
]


@pytest.mark.parametrize(("kernels", "pair"), DENSE, indirect=["kernels"])
def test_dense(kernels, pair):
    run_and_check(dense_case(2, 300, 333, gqa(pair), CAUSAL, BF16))


@pytest.mark.parametrize("pair", [(64, 64), (192, 128)])
def test_packed(kernels, pair):
    """Every edge length against another one, a window on both sides, a sink, in fp16."""
    options = Options(window=(100, 20), sink=True)
    run_and_check(packed_case(EDGES, EDGES[::-1], gqa(pair), options, FP16))


def test_lengths(kernels):
    """Every pair of edge lengths under a causal mask: rows that see nothing, tiles cut short."""
    lengths_q, lengths_k = zip(*itertools.product(EDGES[1:], EDGES), strict=True)
    run_and_check(packed_case(lengths_q, lengths_k, GQA, CAUSAL, BF16))


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_paged_prefill(page_size):
    """Ragged packed queries."""
    case = paged_case([1, 200, 129, 0], [300, 200, 1030, 5], page_size, GQA, CAUSAL, BF16)
    run_and_check(case)


def test_multi_query_softcap_sink(kernels):
    options = Options(scale=0.5, softcap=2.0, sink=True)
    run_and_check(dense_case(2, 300, 333, Heads(5, 1, 128, 128), options, BF16))


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_window_without_causal_order(kernels):
    """Only the left side bounded: the last keys stay visible to all."""
    run_and_check(dense_case(2, 333, 300, GQA, Options(window=(70, -1)), BF16))


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_keys_cut_by_seqused(kernels):
    """Dense keys past ``seqused_k`` are NaN."""
    case = dense_case(5, 130, 333, GQA, CAUSAL, BF16, seqused_k=[333, 0, 1, 128, 257])
    run_and_check(case)


@pytest.mark.parametrize("blocks", [(128, 128, 0.5), (16, 48, 0.5)], ids=str)
def test_block_mask(blocks):
    run_and_check(dense_case(2, 300, 333, GQA, Options(causal=True, blocks=blocks), BF16))


@pytest.mark.parametrize("pair", [(64, 64), (192, 128), (512, 512)])
def test_decode(pair):
    """One query per sequence, automatic splits, ragged lengths in pages of 64."""
    run_and_check(paged_case(1, [*EDGES, 5125], 64, gqa(pair), CAUSAL, BF16))


@pytest.mark.parametrize("num_splits", [1, 5])
def test_decode_splits(num_splits):
    """Several queries, small pages, a window and a sink, in fp16."""
    options = Options(causal=True, window=(500, -1), sink=True)
    case = paged_case(3, [*EDGES, 5125], 16, GQA, options, FP16)
    run_and_check(case, num_splits=num_splits)


def test_decode_packed():
    lengths = [1, 0, 2, 1]
    run_and_check(packed_case(lengths, [1000, 5, 64, 0], GQA, CAUSAL, BF16), num_splits=3)


@pytest.mark.parametrize("gap", [16, 3], ids=["aligned", "unaligned"])
def test_strides(gap):
    """Tensors in another order in memory: through TMA where rows stay aligned, else without."""
    dense = dense_case(2, 300, 333, GQA, CAUSAL, BF16)
    decode = paged_case(1, [*EDGES, 5125], 64, gqa((64, 64)), CAUSAL, BF16)
    for contiguous in (dense, decode):
        case = spread_case(contiguous, gap)
        results = empty_results(case, gap)
        out, lse = case.run(backend="triton", out=results)
        check(case, out, lse)
        assert out is results[0]
        assert gaps_untouched(out, gap)


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_output_dtype(kernels):
    case = dense_case(2, 300, 333, GQA, CAUSAL, BF16)
    out, lse = case.run(backend="triton", epilogue=Identity(torch.float32))
    assert out.dtype == torch.float32
    check(case, out, lse)
    rounded, _ = case.run(backend="triton")
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_without_lse(kernels):
    case = dense_case(2, 300, 333, GQA, CAUSAL, BF16)
    out, _ = case.run(backend="triton")
    assert torch.equal(out, attention(case.q, case.k, case.v, causal=True, backend="triton"))


def test_total_tiles(kernels):
    """Without skipping, the counters give the tiles that exact skipping leaves."""
    case = dense_case(2, 300, 333, GQA, CAUSAL, BF16)
    stats = SkipStats()
    plain = case.run(backend="triton")
    counted = case.run(backend="triton", stats=stats)
    tiles = tiles_of(kernels[-1][1])
    oracle = case.oracle(tiles)
    assert stats.read() == (0, oracle.total)
    assert oracle.total < replace(case, common={}).oracle(tiles).total
    assert torch.equal(plain[0], counted[0])
    assert torch.equal(plain[1], counted[1])


def test_nan_and_infinity_stay_where_they_are(kernels):
    """A NaN query row and NaN or infinite values reach what the specification says, no more."""
    case = dense_case(2, 300, 333, GQA, Options(), BF16)
    q, v = case.q.clone(), case.v.clone()
    q[0, 1, 2] = math.nan
    v[0, 5, 1, 3] = math.inf
    v[0, 200, 0, 7] = math.nan
    case = replace(case, q=q, v=v)
    run_and_check(case)


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_empty_tensors(kernels):
    for batch, seqlen_q, seqlen_k in ((0, 5, 9), (2, 0, 9), (2, 300, 0)):
        q = torch.zeros(batch, seqlen_q, 8, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.zeros(batch, seqlen_k, 2, 128, device="cuda", dtype=torch.bfloat16)
        out, lse = attention(q, k, k, return_lse=True, backend="triton")
        assert (out == 0).all()
        assert (lse == -math.inf).all()


def far_apart(batch: int, length: int, heads: int, dim: int) -> torch.Tensor:
    """Random ``[batch, length, heads, dim]`` whose batch entries are 2^30 elements apart."""
    stride = 1 << 30
    size = (batch - 1) * stride + length * heads * dim
    base = torch.empty(size, device="cuda", dtype=torch.bfloat16)
    view = base.as_strided((batch, length, heads, dim), (stride, heads * dim, dim, 1))
    generator = torch.Generator().manual_seed(length)
    view.copy_(torch.randn(view.shape, generator=generator) * 0.1)
    return view


@pytest.mark.parametrize("seqlen_q", [300, 1], ids=["prefill", "decode"])
def test_offsets_beyond_31_bits(kernels, seqlen_q):
    """The last batch entries of q, k, v and out begin at element 2^31 and beyond."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    q, k, v = (far_apart(3, n, h, 128) for n, h in ((seqlen_q, 8), (333, 2), (333, 2)))
    out = far_apart(3, seqlen_q, 8, 128)
    lse = torch.full((3, 8, seqlen_q), math.nan, device="cuda")
    case = AttentionCase(q, k, v, 0.1, {"causal": True})
    case.run(backend="triton", out=(out, lse))
    check(case, out, lse)


def test_memcheck_prefill(kernels):
    """Small and representative, for compute-sanitizer: ragged ends in every direction."""
    options = Options(window=(100, 20), sink=True)
    run_and_check(packed_case([1, 70, 300], [70, 1, 300], gqa((64, 64)), options, FP16))
    run_and_check(dense_case(2, 270, 131, GQA, CAUSAL, BF16))


def test_memcheck_paged_prefill():
    run_and_check(paged_case([70, 1], [130, 3], 16, GQA, CAUSAL, BF16))


def test_memcheck_decode():
    workspace = make_workspace(nbytes=4 << 20)
    options = Options(causal=True, window=(500, -1), sink=True)
    case = paged_case(3, [130, 0, 64], 16, GQA, options, FP16)
    run_and_check(case, num_splits=5, workspace=workspace)
    assert not workspace[:COUNTER_BYTES].any()
