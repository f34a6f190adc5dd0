"""Emulates the Blackwell prefill kernel on the cases of `cute_fmha.testing` (not collected)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

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
    batch, seqlen_q, heads_q, head_dim = case.q.shape
    present = dict(features or {})
    return Problem(
        "attention", "dense", False, case.q.dtype, out_dtype, batch, seqlen_q, case.k.shape[1],
        heads_q, case.k.shape[2], head_dim, case.v.shape[-1], window_left=left, window_right=right,
        softcap=case.common.get("softcap", 0.0) > 0, sink=case.common.get("sink") is not None,
        stats=present.pop("count", False), lse=present.pop("lse", True), **present,
    )  # fmt: skip


def run(
    case: AttentionCase, policy: Policy, ctas: int = 148, out: torch.Tensor | None = None,
    skip: float | torch.Tensor = 0.0, stats: torch.Tensor | None = None, features: Any = None,
    **changes: Any,
) -> tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
    """(out, lse, report) of the plan with ``changes``; a finding is an error."""
    q, k, v = case.q, case.k, case.v
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))
    problem = problem_of(case, out.dtype, features)
    plan = replace(prefill_host.plan_of(problem), **changes)
    device, host = (skip, math.nan) if isinstance(skip, torch.Tensor) else (None, skip)
    call = Call(
        problem, q, k, v, out, lse if problem.lse else None, None, None,
        stats if problem.stats else None, None, None, None, None, None, case.common.get("sink"),
        None, device, case.common.get("scale") or 1 / math.sqrt(q.shape[-1]),
        case.common.get("softcap", 0.0), host, problem.skip_relative,
        Identity, (),
    )  # fmt: skip
    arguments = prefill_host.call_arguments(problem, ctas)
    captured = backend.capture(call, build(plan), arguments, Device())
    return out, lse, execute(captured, policy)
