"""torch.library registrations: schemas, fakes, and the bridge from an op to a backend.

Each op writes into tensors its caller allocated and returns nothing, so one schema serves eager
calls, ``out=`` calls, ``torch.compile`` (functionalised by PyTorch) and CUDA-graph capture, and the
hot path allocates nothing. `cute_fmha.api` is the validated front door to both.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from cute_fmha import dispatch
from cute_fmha.epilogues.base import EpilogueOp, Parameters, kind_of, resolve
from cute_fmha.problem import Problem


class Call(NamedTuple):
    """One attention call: the static problem, its tensors and its run-time values.

    For ``mla_decode`` ``k`` is the latent cache and ``v`` a view of its leading columns.
    ``lse``, ``max_logits`` (``mla_decode`` only), ``workspace``, ``stats`` and the metadata tensors
    are None where not asked for.
    ``skip_value`` is λ (or the factor when ``skip_relative``), superseded by ``skip_tensor``.
    ``extra`` is the second output of an epilogue that has one, ``parameters`` its tensors and
    numbers.
    """

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    max_logits: torch.Tensor | None
    workspace: torch.Tensor | None
    stats: torch.Tensor | None
    extra: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    block_table: torch.Tensor | None
    seqused_k: torch.Tensor | None
    sink: torch.Tensor | None
    block_mask: torch.Tensor | None
    skip_tensor: torch.Tensor | None
    scale: float
    softcap: float
    skip_value: float
    skip_relative: bool
    epilogue: type[EpilogueOp]
    parameters: Parameters


_lib = torch.library.Library("cute_fmha", "DEF")

_TAIL = (
    "Tensor? sink, Tensor? skip_tensor, float scale, int window_left, int window_right, "
    "float softcap, bool skip, float skip_value, bool skip_relative, int num_splits, "
    "str epilogue, Tensor[] epilogue_tensors, float[] epilogue_values, str backend) -> ()"
)
_lib.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor(c!)? workspace, Tensor(d!)? stats, Tensor(e!)? extra, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table, "
    "Tensor? seqused_k, Tensor? block_mask, int block_mask_m, int block_mask_n, " + _TAIL,
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "mla_decode(Tensor q, Tensor kv_cache, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor(c!)? max_logits, Tensor(d!)? workspace, Tensor(e!)? stats, Tensor(f!)? extra, "
    "Tensor block_table, "
    "Tensor cache_seqlens, int head_dim_v, " + _TAIL,
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention_call(
    q, k, v, out, lse, workspace, stats, extra, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, block_table, seqused_k, block_mask, block_mask_m, block_mask_n, sink,
    skip_tensor, scale, window_left, window_right, softcap, skip, skip_value, skip_relative,
    num_splits, epilogue, epilogue_tensors, epilogue_values,
) -> Call:  # fmt: skip
    """The call that the operator's arguments, all but ``backend``, describe."""
    packed_q = cu_seqlens_q is not None
    layout: Literal["dense", "packed", "paged"] = "dense"
    batch = q.shape[0]
    if block_table is not None:
        layout, batch = "paged", block_table.shape[0]
    elif cu_seqlens_k is not None:
        layout, batch = "packed", cu_seqlens_k.shape[0] - 1
    problem = Problem(
        op="attention",
        layout=layout,
        packed_q=packed_q,
        dtype=q.dtype,
        out_dtype=out.dtype,
        batch=batch,
        seqlen_q=max_seqlen_q,
        seqlen_k=max_seqlen_k,
        heads_q=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        page_size=k.shape[1] if layout == "paged" else 0,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap > 0,
        sink=sink is not None,
        block_mask=None if block_mask is None else (block_mask_m, block_mask_n),
        skip=skip,
        stats=stats is not None,
        epilogue=epilogue,
        parameters=tuple(map(kind_of, (*epilogue_tensors, *epilogue_values))),
        extra=None if extra is None else kind_of(extra),
        num_splits=num_splits,
        lse=lse is not None,
        seqused=seqused_k is not None and layout != "paged",
        skip_tensor=skip_tensor is not None,
        skip_relative=skip and skip_relative,
    )
    return Call(
        problem, q, k, v, out, lse, None, workspace, stats, extra, cu_seqlens_q, cu_seqlens_k,
        block_table, seqused_k, sink, block_mask, skip_tensor, scale, softcap, skip_value,
        skip_relative, resolve(epilogue), (*epilogue_tensors, *epilogue_values),
    )  # fmt: skip


def mla_decode_call(
    q, kv_cache, out, lse, max_logits, workspace, stats, extra, block_table, cache_seqlens,
    head_dim_v, sink, skip_tensor, scale, window_left, window_right, softcap, skip, skip_value,
    skip_relative, num_splits, epilogue, epilogue_tensors, epilogue_values,
) -> Call:  # fmt: skip
    """As `attention_call`."""
    problem = Problem(
        op="mla_decode",
        layout="paged",
        packed_q=False,
        dtype=q.dtype,
        out_dtype=out.dtype,
        batch=q.shape[0],
        seqlen_q=q.shape[1],
        seqlen_k=block_table.shape[1] * kv_cache.shape[1],
        heads_q=q.shape[2],
        heads_kv=1,
        head_dim=q.shape[3],
        head_dim_v=head_dim_v,
        page_size=kv_cache.shape[1],
        window_left=window_left,
        window_right=window_right,
        softcap=softcap > 0,
        sink=sink is not None,
        skip=skip,
        stats=stats is not None,
        epilogue=epilogue,
        parameters=tuple(map(kind_of, (*epilogue_tensors, *epilogue_values))),
        extra=None if extra is None else kind_of(extra),
        num_splits=num_splits,
        lse=lse is not None,
        max_logits=max_logits is not None,
        skip_tensor=skip_tensor is not None,
        skip_relative=skip and skip_relative,
    )
    return Call(
        problem, q, kv_cache, kv_cache[..., :head_dim_v], out, lse, max_logits, workspace,
        stats, extra, None, None, block_table, cache_seqlens, sink, None, skip_tensor, scale,
        softcap, skip_value, skip_relative, resolve(epilogue),
        (*epilogue_tensors, *epilogue_values),
    )  # fmt: skip


def _fake(*args: Any, **kwargs: Any) -> None:
    """Both ops only write tensors that exist already: a fake run has nothing to infer."""


def _attention(*args: Any) -> None:
    dispatch.run(attention_call(*args[:-1]), args[-1])


def _mla_decode(*args: Any) -> None:
    dispatch.run(mla_decode_call(*args[:-1]), args[-1])


for _name, _implementation in (("attention", _attention), ("mla_decode", _mla_decode)):
    _lib.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cute_fmha::{_name}", _fake, lib=_lib)
