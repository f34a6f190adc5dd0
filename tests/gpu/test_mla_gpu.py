"""`mla_decode` on a GPU against FP64: heads × rows × page sizes × splits, both kernel families."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from launches import recorded, tiles_of
from strides import empty_results, gaps_untouched, spread_case, widen

from cute_fmha import SkipStats, make_workspace, mla_decode
from cute_fmha.kernels.triton.plan import COUNTER_BYTES
from cute_fmha.testing import MlaCase, Options, Source, check, mla_case

pytestmark = pytest.mark.gpu

BF16 = Source(torch.bfloat16, "cuda")
FP16 = Source(torch.float16, "cuda")
CAUSAL = Options(causal=True)
LENGTHS = [0, 1, 63, 64, 65, 1000, 5000, 5125]
EVERYTHING = Options(scale=0.1, causal=True, window=(300, -1), softcap=3.0, sink=True)

# heads, rows, page size, splits, options. The cases of one paragraph share a compiled kernel.
MATRIX = [
    (128, 1, 64, 1, CAUSAL),
    (64, 1, 128, 1, CAUSAL),
    (48, 1, 64, 1, CAUSAL),
    (16, 1, 128, 1, CAUSAL),

    (128, 2, 64, 1, CAUSAL),
    (64, 4, 128, 1, CAUSAL),
    (48, 2, 64, 1, CAUSAL),
    (16, 4, 128, 1, CAUSAL),

    (8, 2, 64, 1, CAUSAL),
    (8, 4, 128, 1, CAUSAL),

    (1, 2, 128, 1, CAUSAL),
    (1, 4, 64, 1, CAUSAL),

    (128, 1, 16, 1, CAUSAL),
    (48, 1, 32, 1, CAUSAL),
    (16, 1, 16, 1, CAUSAL),

    (64, 2, 1, 1, CAUSAL),
    (16, 4, 1, 1, CAUSAL),

    (64, 1, 64, 2, CAUSAL),
    (48, 1, 128, 2, CAUSAL),
    (16, 1, 64, 2, CAUSAL),

    (16, 2, 16, 5, EVERYTHING),
    (16, 4, 32, 5, EVERYTHING),

    (128, 4, 128, 5, EVERYTHING),

    (1, 1, 1, 2, CAUSAL),

    (16, 1, 64, None, CAUSAL),

    (128, 4, 16, None, CAUSAL),

    (64, 2, 64, 1, Options(window=(100, 1), sink=True)),
    (16, 4, 64, 1, Options(window=(100, 1), sink=True)),
]  # fmt: skip
PORTABLE = [
    (128, 1, 64, 1, CAUSAL),
    (48, 1, 16, 1, CAUSAL),
    (64, 1, 128, 1, CAUSAL),

    (16, 1, 64, 2, CAUSAL),
    (16, 1, 32, 2, CAUSAL),

    (8, 4, 16, 5, EVERYTHING),

    (1, 2, 1, 2, CAUSAL),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "rows", "page_size", "num_splits", "options"), MATRIX)
def test_matrix(heads, rows, page_size, num_splits, options):
    case = mla_case(rows, LENGTHS, page_size, heads, 576, options, BF16)
    check(case, *case.run(backend="triton", num_splits=num_splits))


@pytest.mark.parametrize(("heads", "rows", "page_size", "num_splits", "options"), PORTABLE)
def test_portable_matrix(heads, rows, page_size, num_splits, options):
    """By the kernel that any GPU runs."""
    case = mla_case(rows, LENGTHS, page_size, heads, 576, options, BF16)
    with recorded(portable=True) as launches:
        check(case, *case.run(backend="triton", num_splits=num_splits))
    assert launches[0][1].kernel == "decode"


@pytest.mark.parametrize(("page_size", "num_splits"), [(64, 2), (16, 1)])
def test_width_512(page_size, num_splits):
    """A latent without rope columns, in fp16."""
    case = mla_case(2, LENGTHS, page_size, 40, 512, CAUSAL, FP16)
    check(case, *case.run(backend="triton", num_splits=num_splits))


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_many_sequences(kernels):
    """More work tiles than the GPU has multiprocessors."""
    lengths = [1 + 37 * i % 500 for i in range(150)]
    case = mla_case(1, lengths, 64, 128, 576, CAUSAL, BF16)
    check(case, *case.run(backend="triton", num_splits=2))


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_long_sequence(kernels):
    """One long sequence, cut into as many splits as the GPU takes."""
    case = mla_case(1, [40000], 64, 16, 576, CAUSAL, BF16)
    check(case, *case.run(backend="triton"))
    assert kernels[-1][1].num_splits > 32


@pytest.mark.parametrize("gap", [16, 3], ids=["aligned", "unaligned"])
def test_strides(gap):
    """Another order in memory: row by row where rows stay aligned, else by the portable kernel."""
    contiguous = mla_case(1, LENGTHS, 64, 16, 576, CAUSAL, BF16)
    case = spread_case(contiguous, gap)
    results = empty_results(case, gap)
    out, lse = case.run(backend="triton", out=results, num_splits=2)
    check(case, out, lse)
    assert out is results[0]
    assert gaps_untouched(out, gap)


def test_rows_with_gaps():
    """Rows 592 apart: still one TMA descriptor, and the NaNs between them stay out."""
    case = mla_case(1, LENGTHS, 64, 16, 576, CAUSAL, BF16)
    wide = replace(case, kv_cache=widen(case.kv_cache, 16))
    expected = case.run(backend="triton", num_splits=2)
    out, lse = wide.run(backend="triton", num_splits=2)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("heads", [16, 128])
def test_max_logits(kernels, heads, num_splits):
    case = mla_case(2, LENGTHS, 64, heads, 576, Options(causal=True, sink=True), BF16)
    out, lse, largest = mla_decode(
        case.q, case.kv_cache, case.block_table, case.cache_seqlens, **case.common,
        return_lse=True, return_max_logits=True, num_splits=num_splits, backend="triton",
    )  # fmt: skip
    check(case, out, lse)
    expected = case.oracle(tiles_of(kernels[-1][1])).max_logits
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=1e-5)


def test_total_tiles(kernels):
    """Without skipping, the counters give the tiles that exact skipping leaves; same bits."""
    case = mla_case(1, LENGTHS, 64, 16, 576, CAUSAL, BF16)
    stats = SkipStats()
    plain = case.run(backend="triton", num_splits=2)
    counted = case.run(backend="triton", num_splits=2, stats=stats)
    assert stats.read() == (0, case.oracle(tiles_of(kernels[-1][1])).total)
    assert torch.equal(plain[0], counted[0])
    assert torch.equal(plain[1], counted[1])


def test_poisoned_workspace(kernels):
    """Whatever an earlier launch left in the workspace, NaN too, stays out of the result."""
    workspace = make_workspace()
    workspace[COUNTER_BYTES:] = 0xFF
    case = mla_case(1, LENGTHS, 64, 16, 576, CAUSAL, BF16)
    for _ in range(2):
        check(case, *case.run(backend="triton", num_splits=2, workspace=workspace))
        assert not workspace[:COUNTER_BYTES].any(), "the launch left its counters dirty"


def test_nan_queries_stay_in_their_rows(kernels):
    case = mla_case(1, LENGTHS, 64, 16, 576, CAUSAL, BF16)
    q = case.q.clone()
    q[5, 0, 3] = math.nan
    case = replace(case, q=q)
    check(case, *case.run(backend="triton", num_splits=2))


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
def test_table_without_pages(kernels):
    q = torch.ones(2, 1, 16, 576, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(2, 0, device="cuda", dtype=torch.int32)
    used = torch.zeros(2, device="cuda", dtype=torch.int32)
    for pages in (0, 3):
        cache = torch.zeros(pages, 64, 1, 576, device="cuda", dtype=torch.bfloat16)
        out, lse = mla_decode(q, cache, table, used, return_lse=True, backend="triton")
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@pytest.mark.parametrize("page_size", [64, 16])
def test_cache_beyond_31_bits(kernels, page_size):
    """A cache of 5 GiB, pages from all over it, the very last among them."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    width, lengths = 576, [3000, 65]
    pages = (5 << 30) // (page_size * width * 2)
    cache = torch.full((pages, page_size, 1, width), math.nan, device="cuda", dtype=torch.bfloat16)
    assert cache.numel() > 1 << 31
    generator = torch.Generator("cuda").manual_seed(0)
    own = torch.randperm(pages, generator=generator, device="cuda")[: 2 * 200]
    own[0] = pages - 1
    used = -(-lengths[0] // page_size)
    table = own.view(2, 200)[:, :used].int()
    for row, length in zip(table, lengths, strict=True):
        tokens = torch.randn(used * page_size, width, generator=generator, device="cuda") * 0.1
        tokens[length:] = math.nan
        cache[row.long()] = tokens.view(used, page_size, 1, width).bfloat16()
    q = torch.randn(2, 1, 16, width, generator=generator, device="cuda").bfloat16()
    cache_seqlens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    case = MlaCase(q, cache, table, cache_seqlens, 0.1, {"causal": True})
    check(case, *case.run(backend="triton", num_splits=2))


def test_memcheck_mla(kernels):
    """Small and representative, for compute-sanitizer: TMA and gathered pages, splits."""
    workspace = make_workspace(nbytes=8 << 20)
    lengths = [0, 1, 65, 200, 64, 63, 128, 129]
    for rows, page_size, splits, options in (
        (1, 64, 2, CAUSAL),
        (4, 16, 5, EVERYTHING),
        (2, 1, 1, CAUSAL),
    ):
        case = mla_case(rows, lengths, page_size, 16, 576, options, BF16)
        check(case, *case.run(backend="triton", num_splits=splits, workspace=workspace))
        assert not workspace[:COUNTER_BYTES].any()
