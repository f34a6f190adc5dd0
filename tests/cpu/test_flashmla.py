"""The FlashMLA adapter against a direct FP64 computation that shares no code with the package."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from cute_fmha.adapters.flashmla import flash_mla_with_kvcache, get_mla_metadata

LENGTHS = (150, 1, 0, 64)
PAGE = 64


def _case(seqlen_q: int, heads: int = 3, width: int = 576) -> tuple[torch.Tensor, ...]:
    """q, cache, block table, lengths: shuffled pages, NaN wherever no sequence reaches."""
    generator = torch.Generator().manual_seed(0)
    pages_per_sequence = 3
    pages = len(LENGTHS) * pages_per_sequence
    q = torch.randn(len(LENGTHS), seqlen_q, heads, width, generator=generator)
    cache = torch.randn(pages, PAGE, 1, width, generator=generator)
    table = torch.randperm(pages, generator=generator).view(len(LENGTHS), -1).to(torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for row, length in zip(table.tolist(), LENGTHS, strict=True):
        for index, page in enumerate(row):
            cache[page, max(0, min(PAGE, length - index * PAGE)) :] = math.nan
    return q, cache, table, lengths


def _expected(
    q: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    out = torch.zeros(batch, seqlen_q, heads, 512, dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), math.inf, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        keys = cache[table[b].long()].reshape(-1, cache.shape[-1])[:length].double()
        for i in range(seqlen_q):
            visible = keys[: max(0, length - seqlen_q + 1 + i)] if causal else keys
            if len(visible):
                scores = q[b, i].double() @ visible.T * scale
                out[b, i] = scores.softmax(-1) @ visible[:, :512]
                lse[b, :, i] = scores.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_matches_fp64(seqlen_q: int, causal: bool) -> None:
    q, cache, table, lengths = _case(seqlen_q)
    metadata, num_splits = get_mla_metadata(lengths, seqlen_q * q.shape[2], 1)
    out, lse = flash_mla_with_kvcache(
        q, cache, table, lengths, 512, metadata, num_splits, causal=causal, backend="reference"
    )
    want_out, want_lse = _expected(q, cache, table, lengths, 576**-0.5, causal)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want_out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


def test_scale_and_width_512() -> None:
    q, cache, table, lengths = _case(1, width=512)
    out, lse = flash_mla_with_kvcache(
        q, cache, table, lengths, 512, *get_mla_metadata(), 0.02, backend="reference"
    )
    want_out, want_lse = _expected(q, cache, table, lengths, 0.02, causal=False)
    torch.testing.assert_close(out.double(), want_out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)


def test_call_accepts_flashmla_positional_order() -> None:
    """The parameters FlashMLA users pass by position, in FlashMLA's order."""
    names = list(inspect.signature(flash_mla_with_kvcache).parameters)
    assert names[:9] == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata",
        "num_splits", "softmax_scale", "causal",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
        "extra_topk_length",
    ],
)  # fmt: skip
def test_sparse_is_refused(name: str) -> None:
    q, cache, table, lengths = _case(1)
    given: dict[str, Any] = {name: torch.zeros(1)}
    with pytest.raises(NotImplementedError, match=f"{name}: sparse"):
        flash_mla_with_kvcache(q, cache, table, lengths, 512, *get_mla_metadata(), **given)


def test_fp8_and_missing_tables_are_refused() -> None:
    q, cache, table, lengths = _case(1)
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache"):
        flash_mla_with_kvcache(
            q, cache, table, lengths, 512, *get_mla_metadata(), is_fp8_kvcache=True
        )
    with pytest.raises(ValueError, match="block_table: got None"):
        flash_mla_with_kvcache(q, cache, None, lengths, 512, *get_mla_metadata())
    with pytest.raises(ValueError, match="cache_seqlens: got None"):
        flash_mla_with_kvcache(q, cache, table, None, 512, *get_mla_metadata())
    two_heads = cache.expand(-1, -1, 2, -1)
    with pytest.raises(ValueError, match="kv_cache shape"):
        flash_mla_with_kvcache(q, two_heads, table, lengths, 512, *get_mla_metadata())
