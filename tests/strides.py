"""Non-contiguous stand-ins for contiguous tensors: the same values, NaN in between."""

from __future__ import annotations

from dataclasses import replace

import torch

from cute_fmha.testing import Case, MlaCase


def spread(x: torch.Tensor, gap: int = 3) -> torch.Tensor:
    """``x`` with its leading dimensions reversed in memory and ``gap`` NaNs after each row.

    With a ``gap`` of 8 rows of 16-bit elements stay on 16-byte boundaries, with 3 they do not.
    """
    leading = range(x.dim() - 1)
    shape = [x.shape[i] for i in reversed(leading)]
    base = x.new_full((*shape, x.shape[-1] + gap), float("nan"))
    view = base[..., : x.shape[-1]].permute(*reversed(leading), x.dim() - 1)
    view.copy_(x)
    return view


def widen(x: torch.Tensor, gap: int = 8) -> torch.Tensor:
    """``x`` with ``gap`` NaNs after each row and its dimensions in their usual order."""
    base = x.new_full((*x.shape[:-1], x.shape[-1] + gap), float("nan"))
    base[..., : x.shape[-1]] = x
    return base[..., : x.shape[-1]]


def spread_case(case: Case, gap: int = 3) -> Case:
    """``case`` on `spread` tensors, the block table a slice of a wider one."""
    if isinstance(case, MlaCase):
        return replace(
            case,
            q=spread(case.q, gap),
            kv_cache=spread(case.kv_cache, gap),
            block_table=_slice_of_wider(case.block_table),
        )
    common = dict(case.common)
    if "block_table" in common:
        common["block_table"] = _slice_of_wider(common["block_table"])
    q, k, v = (spread(tensor, gap) for tensor in (case.q, case.k, case.v))
    return replace(case, common=common, q=q, k=k, v=v)


def _slice_of_wider(table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(table, (2, 5))[:, 2:-5]


def empty_results(case: Case, gap: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) full of NaN for ``case``, out with strides of its own."""
    q = case.q
    width = 512 if isinstance(case, MlaCase) else case.v.shape[-1]
    out = spread(q.new_full((*q.shape[:-1], width), float("nan")), gap)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, torch.full(shape, float("nan"), device=q.device)


def gaps_untouched(out: torch.Tensor, gap: int = 3) -> bool:
    """Whether the NaNs after each row of `empty_results` are still there."""
    begin = out.storage_offset() + out.shape[-1]
    return bool(out.as_strided((*out.shape[:-1], gap), out.stride(), begin).isnan().all())
