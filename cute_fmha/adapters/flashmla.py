"""FlashMLA's dense decoding interface: change the import, keep the calls.

    from cute_fmha.adapters.flashmla import flash_mla_with_kvcache, get_mla_metadata

Differences a caller can notice: the scheduling metadata is an empty placeholder (the kernel
schedules itself, so any cache lengths may follow one another), pages may have other sizes than 64,
`num_heads_k` is 1, and sparse or FP8 calls raise `NotImplementedError`. One small kernel follows
the attention kernel: FlashMLA gives rows without a visible key an LSE of +inf,
`cute_fmha.mla_decode` gives them −inf. A caller who does not need that saves a launch by calling
`cute_fmha.mla_decode` with ``return_lse=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cute_fmha.api import mla_decode


@dataclass(frozen=True)
class FlashMLASchedMeta:
    """Placeholder for FlashMLA's scheduling metadata: nothing is scheduled on the host."""


_METADATA = FlashMLASchedMeta()


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """``(tile_scheduler_metadata, num_splits)`` to hand to `flash_mla_with_kvcache`.

    Takes and ignores the arguments of every FlashMLA version; touches no device.
    """
    return _METADATA, None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense absorbed-MLA decoding over a paged latent cache.

    Args:
        q: ``[B, Sq, Hq, 576]`` (or 512), bf16 or fp16.
        k_cache: ``[num_blocks, page_block_size, 1, 576]`` (or 512), the dtype of q.
        block_table: int32 ``[B, max_num_blocks_per_seq]``.
        cache_seqlens: int32 ``[B]``.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: whatever `get_mla_metadata` (ours or FlashMLA's)
            returned; ignored.
        softmax_scale: None is 1/√(q width).
        causal: order the Sq queries (bottom-right aligned).
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length,
            extra_topk_length: FlashMLA's sparse mode and FP8 cache, not supported.
        backend: ours, as for `cute_fmha.mla_decode`.

    Returns:
        ``out`` ``[B, Sq, Hq, head_dim_v]`` in the dtype of q and FP32 ``lse`` ``[B, Hq, Sq]``
        (natural log); a row without a visible key gives 0 and +inf, as FlashMLA does.

    Raises:
        NotImplementedError: sparse attention or an FP8 cache was asked for.
        ValueError: ``block_table`` or ``cache_seqlens`` is missing, or a shape, dtype or device
            that `cute_fmha.mla_decode` refuses.
    """
    sparse = {
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    given = [name for name, value in sparse.items() if value is not None]
    if given:
        raise NotImplementedError(
            f"{', '.join(given)}: sparse decoding is not supported; this adapter covers FlashMLA's "
            "dense mode, where they are None"
        )
    if is_fp8_kvcache:
        raise NotImplementedError(
            "is_fp8_kvcache=True: FP8 caches are not supported; the cache has the dtype of q"
        )
    if block_table is None or cache_seqlens is None:
        missing = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{missing}: got None; dense decoding needs an int32 tensor")
    result = mla_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        scale=softmax_scale,
        causal=causal,
        return_lse=True,
        backend=backend,
    )
    assert isinstance(result, tuple)
    out, lse = result
    infinity = float("inf")
    return out, torch.nan_to_num_(lse, nan=float("nan"), posinf=infinity, neginf=infinity)
