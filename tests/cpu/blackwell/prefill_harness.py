"""Emulates the Blackwell prefill kernel on the cases of `cute_fmha.testing` (not collected)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch

from cute_fmha.cache import Binary
from cute_fmha.emulator import backend
from cute_fmha.emulator.capture import Device, execute
from cute_fmha.emulator.machine import Policy
from cute_fmha.epilogues import Identity
from cute_fmha.kernels.blackwell import launch, prefill_host
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.ops import Call
from cute_fmha.problem import Problem
from cute_fmha.testing import AttentionCase

POLICIES = [
    Policy("eager", strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("lazy", strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("random", seed=1, strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("random", seed=2, strict_tmem_load=True, strict_tcgen05_fence=True),
]


def window_of(case: AttentionCase) -> tuple[int, int]:
    left, right = case.common.get("window") or (-1, -1)
    return left, 0 if case.common.get("causal") else right


def build(plan: Plan, arch: str = "sm_100a") -> Binary:
    """The kernel of ``plan`` as calls get it, from the cache or compiled."""
    return launch.binary_of(prefill_host, plan, arch)


def problem_of(case: AttentionCase, out_dtype: torch.dtype, features: Any = None) -> Problem:
    left, right = window_of(case)
    *_, heads_q, head_dim = case.q.shape
    starts, mask = case.common.get("cu_seqlens_q"), case.common.get("block_mask")
    layout: Literal["dense", "packed"] = "dense" if starts is None else "packed"
    batch, seqlen_q, seqlen_k = case.q.shape[0], case.q.shape[1], case.k.shape[1]
    if starts is not None:
        batch = len(starts) - 1
        seqlen_q, seqlen_k = case.launch["max_seqlen_q"], case.launch["max_seqlen_k"]
    present = dict(features or {})
    return Problem(
        "attention", layout, starts is not None, case.q.dtype, out_dtype, batch, seqlen_q,
        seqlen_k, heads_q, case.k.shape[-2], head_dim, case.v.shape[-1], window_left=left,
        window_right=right, block_mask=None if mask is None else (mask.block_m, mask.block_n),
        seqused=case.common.get("seqused_k") is not None,
        softcap=case.common.get("softcap", 0.0) > 0, sink=case.common.get("sink") is not None,
        stats=present.pop("count", False), lse=present.pop("lse", True), **present,
    )  # fmt: skip


def capture(
    case: AttentionCase, out: torch.Tensor | None = None,
    skip: float | torch.Tensor = 0.0, stats: torch.Tensor | None = None, features: Any = None,
    **changes: Any,
) -> tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
    """(out, lse, launch) of the plan with ``changes``, not yet executed."""
    q, k, v = case.q, case.k, case.v
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    lse = torch.full(shape, float("nan"))
    problem = problem_of(case, out.dtype, features)
    plan = replace(prefill_host.plan_of(problem), **changes)
    device, host = (skip, math.nan) if isinstance(skip, torch.Tensor) else (None, skip)
    mask = case.common.get("block_mask")
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "sink")
    call = Call(
        problem=problem,
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse if problem.lse else None,
        max_logits=None,
        workspace=None,
        stats=stats if problem.stats else None,
        extra=None,
        **{name: case.common.get(name) for name in names},
        block_table=None,
        block_mask=None if mask is None else mask.mask,
        skip_tensor=device,
        scale=case.common.get("scale") or 1 / math.sqrt(q.shape[-1]),
        softcap=case.common.get("softcap", 0.0),
        skip_value=host,
        skip_relative=problem.skip_relative,
        epilogue=Identity,
        parameters=(),
    )
    arguments = prefill_host.call_arguments(problem, backend.target(Device()))
    return out, lse, backend.capture(call, build(plan), arguments, Device())


def run(
    case: AttentionCase, policy: Policy, ctas: int = 4, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(out, lse, report) of `capture` with ``options``; a finding is an error."""
    out, lse, captured = capture(case, **options)
    return out, lse, execute(captured, replace(policy, resident=ctas))
