"""Emulates the Blackwell prefill kernel on the cases of `cute_fmha.testing` (not collected)."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from cutlass import Float32, Int32

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.emulator.machine import Policy
from cute_fmha.kernels.blackwell.plan import Features, Plan, make_plan
from cute_fmha.kernels.blackwell.prefill import Prefill, Scalars
from cute_fmha.testing import AttentionCase

POLICIES = [
    Policy("eager", strict_tmem_load=True),
    Policy("lazy", strict_tmem_load=True),
    Policy("random", seed=1, strict_tmem_load=True),
    Policy("random", seed=2, strict_tmem_load=True),
]


def window_of(case: AttentionCase) -> tuple[int, int]:
    left, right = case.common.get("window") or (-1, -1)
    return left, 0 if case.common.get("causal") else right


def plan_of(
    case: AttentionCase, out_dtype: torch.dtype, features: Any = None, **changes: Any
) -> Plan:
    left, right = window_of(case)
    present = Features(
        window_left=left >= 0,
        window_right=right >= 0,
        sink=case.common.get("sink") is not None,
        softcap=case.common.get("softcap", 0.0) > 0,
        **(features or {}),
    )
    plan = make_plan(case.q.shape[-1], case.v.shape[-1], case.q.dtype, out_dtype, present)
    return replace(plan, **changes)


def tensor(x: torch.Tensor) -> Any:
    return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)


@functools.cache
def compiled(plan: Plan) -> Any:
    return build(plan)


def build(plan: Plan, **options: Any) -> Any:
    """The kernel of ``plan``; every extent and stride is dynamic."""
    q = torch.zeros(1, 1, 1, plan.head_dim, dtype=plan.dtype)
    v = torch.zeros(1, 1, 1, plan.head_dim_v, dtype=plan.dtype)
    out = torch.zeros(1, 1, 1, plan.head_dim_v, dtype=plan.out_dtype)
    scalars = Scalars(Float32(1.0), Float32(1.0), Int32(-1), Int32(-1), Float32(0.0))
    lse, row, stats = torch.zeros(1, 1, 1), torch.zeros(1), torch.zeros(2, dtype=torch.int64)
    tensors = map(tensor, (q, q.clone(), v, out, lse, row, row.clone(), stats))
    return compile_kernel(Prefill(plan), *tensors, scalars, Int32(1), **options)


def run(
    case: AttentionCase, policy: Policy, ctas: int = 148, out: torch.Tensor | None = None,
    skip: float | torch.Tensor = 0.0, stats: torch.Tensor | None = None, **changes: Any,
) -> tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
    """(out, lse, report) of the plan with ``changes``; a finding is an error."""
    q, k, v = case.q, case.k, case.v
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))
    scale = case.common.get("scale") or 1 / math.sqrt(q.shape[-1])
    cap = case.common.get("softcap", 0.0)
    left, right = map(Int32, window_of(case))
    scalars = Scalars(
        Float32((cap or scale) * math.log2(math.e)),
        Float32(scale / cap if cap else 0.0),
        left,
        right,
        Float32(math.nan if isinstance(skip, torch.Tensor) else skip),
    )
    sink = case.common.get("sink")
    if sink is None:
        sink = torch.zeros(q.shape[2])
    if stats is None:
        stats = torch.zeros(2, dtype=torch.int64)
    skip_tensor = skip if isinstance(skip, torch.Tensor) else torch.full((1,), math.nan)
    kernel = compiled(plan_of(case, out.dtype, **changes))
    tensors = map(tensor, (q, k, v, out, lse, sink, skip_tensor, stats))
    report = emulate(kernel, *tensors, scalars, Int32(ctas), policy=policy)
    return out, lse, report
