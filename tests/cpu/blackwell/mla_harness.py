"""Emulates the Blackwell MLA decode kernels on the cases of `cute_fmha.testing` (not collected).

A kernel object has the ``plan`` it was made from, of which this file uses

    head_dim, head_dim_v, dtype, out_dtype, features   as in `cute_fmha.kernels.blackwell.plan`
    rows       rows (query position × head, position-major) of a work tile; a skip is decided by it
    tile_n     keys of a KV tile
    cut, slots how work tiles are cut, and what partial results take (`kernels.blackwell.cutting`)

and is called as ``kernel(tensors, scalars, ctas, op, stream)``; see `arguments`. Every extent and
stride is dynamic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Float32, Int32

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.emulator.machine import Policy
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_arguments import Scalars, Tensors
from cute_fmha.kernels.blackwell.mla_plan import automatic_cuts
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import MlaCase, Options, Source, Tiles, check, mla_case
from cute_fmha.tiling import ceil_div

POLICIES = [
    Policy("eager", strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("lazy", strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("random", seed=1, strict_tmem_load=True, strict_tcgen05_fence=True),
    Policy("random", seed=2, strict_tmem_load=True, strict_tcgen05_fence=True),
]

COUNTERS = 1 << 14
"""int32 counters of a workspace: its first 64 KiB."""


@dataclass
class Result:
    """What one launch left behind."""

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    stats: torch.Tensor
    report: Any


@dataclass(frozen=True)
class Workspace:
    """Counters, zero between launches, and FP32 partial results, NaN before the first."""

    counters: torch.Tensor
    partial: torch.Tensor

    @staticmethod
    def make(floats: int = 1) -> Workspace:
        partial = torch.full((max(floats, 1),), math.nan)
        return Workspace(torch.zeros(COUNTERS, dtype=torch.int32), partial)


def workspace_of(plan: Any, case: MlaCase, ctas: int, num_splits: int) -> Workspace:
    """What a launch with at most ``ctas`` CTAs needs."""
    batch, seqlen_q, heads, _ = case.q.shape
    work_tiles = batch * ceil_div(seqlen_q * heads, plan.rows)
    workers = ctas // plan.slots.ranks
    return Workspace.make(plan.slots.floats(plan.cut, workers, work_tiles, num_splits))


def case_of(
    heads: int, seqlen_q: int, lengths: list[int], page_size: int = 64, width: int = 576,
    dtype: torch.dtype = torch.bfloat16, std: float = 0.3, gap: float = 0.0, seed: int = 0,
    **options: Any,
) -> MlaCase:  # fmt: skip
    """Latents in shuffled pages; page tails, spare pages and table tails are poison.

    options: of `cute_fmha.testing.Options`; causal unless told. gap: skip-friendly scores.
    """
    source = Source(dtype, seed=seed, std=std, gap=gap, gap_block=64)
    options.setdefault("causal", True)
    return mla_case(seqlen_q, lengths, page_size, heads, width, Options(**options), source)


def window_of(case: MlaCase) -> tuple[int, int]:
    left, right = case.common.get("window") or (-1, -1)
    return left, 0 if case.common.get("causal") else right


def features_of(case: MlaCase, **features: Any) -> Features:
    """What the case needs compiled in, and ``features`` (skip, count, lse, …)."""
    left, right = window_of(case)
    return Features(
        window_left=left >= 0,
        window_right=right >= 0,
        sink=case.common.get("sink") is not None,
        softcap=case.common.get("softcap", 0.0) > 0,
        **features,
    )


def tensor(x: torch.Tensor) -> Any:
    return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)


def scalars_of(case: MlaCase, skip: float | torch.Tensor = 0.0, num_splits: int = 1) -> Scalars:
    scale = case.common.get("scale") or 1 / math.sqrt(case.q.shape[-1])
    cap = case.common.get("softcap", 0.0)
    left, right = window_of(case)
    return Scalars(
        scale_log2=Float32((cap or scale) * math.log2(math.e)),
        cap_inner=Float32(scale / cap if cap else 0.0),
        window_left=Int32(left),
        window_right=Int32(right),
        skip=Float32(math.nan if isinstance(skip, torch.Tensor) else skip),
        num_splits=Int32(num_splits),
    )


def build(kernel: Any, **options: Any) -> Any:
    """``kernel`` compiled; keywords go to the compiler."""
    plan = kernel.plan
    q = torch.zeros(1, 1, 1, plan.head_dim, dtype=plan.dtype)
    out = torch.zeros(1, 1, 1, plan.head_dim_v, dtype=plan.out_dtype)
    ints, floats = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    case = MlaCase(q, q.clone(), ints[None].clone(), ints.clone(), 1.0)
    tensors = arguments(case, out, Workspace(ints, floats))
    return compile_kernel(kernel, tensors, scalars_of(case), Int32(1), None, CUstream(0), **options)


_compiled: dict[tuple[type, Any], Any] = {}


def compiled(kernel: Any) -> Any:
    """`build`, once per class and plan."""
    key = (type(kernel), kernel.plan)
    if key not in _compiled:
        _compiled[key] = build(kernel)
    return _compiled[key]


def arguments(
    case: MlaCase, out: torch.Tensor, workspace: Workspace, **given: torch.Tensor
) -> Tensors:
    """All that a kernel may have compiled in; NaN what is not ``given``: lse, max_logits, skip,
    stats."""
    batch, seqlen_q, heads, _ = case.q.shape
    sink = case.common.get("sink")
    others = {
        "lse": torch.full((batch, heads, seqlen_q), math.nan),
        "max_logits": torch.full((batch, heads, seqlen_q), math.nan),
        "sink": torch.full((heads,), math.nan) if sink is None else sink,
        "skip": torch.full((1,), math.nan),
        "stats": torch.zeros(2, dtype=torch.int64),
        **given,
    }
    tensors = (
        case.q, case.kv_cache, case.block_table, case.cache_seqlens, out, *others.values(),
        workspace.counters, workspace.partial,
    )  # fmt: skip
    return Tensors(*map(tensor, tensors))


def run(
    kernel: Any, case: MlaCase, policy: Policy, *, ctas: int = 148, num_splits: int = 1,
    skip: float | torch.Tensor = 0.0, workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> Result:  # fmt: skip
    """One launch; a finding is an error, and so is a counter that is not zero again.

    skip: λ, or the factor where the plan has ``skip_relative``; a tensor where it reads one.
    """
    batch, seqlen_q, heads, _ = case.q.shape
    plan = kernel.plan
    if out is None:
        shape = (batch, seqlen_q, heads, plan.head_dim_v)
        out = torch.full(shape, math.nan, dtype=plan.out_dtype)
    given = {
        "lse": torch.full((batch, heads, seqlen_q), math.nan),
        "max_logits": torch.full((batch, heads, seqlen_q), math.nan),
        "stats": torch.zeros(2, dtype=torch.int64),
    }
    on_device = {"skip": skip} if isinstance(skip, torch.Tensor) else {}
    workspace = workspace or workspace_of(plan, case, ctas, num_splits)
    tensors = arguments(case, out, workspace, **given, **on_device)
    scalars = scalars_of(case, skip, num_splits)
    launch = (tensors, scalars, Int32(ctas), None, CUstream(0))
    report = emulate(compiled(kernel), *launch, policy=policy)
    assert not workspace.counters.any(), "the launch left counters that are not zero"
    return Result(out, **given, report=report)


def tiles_of(plan: Any, case: MlaCase, ctas: int, num_splits: int) -> Tiles:
    """The tiles that a launch decides on, and the pieces in which each has its own maximum."""
    cuts = None
    if plan.cut is Cut.SHARE:
        cuts = automatic_cuts(
            plan, (case.q.shape[1], case.q.shape[2]), window_of(case), case.cache_seqlens.tolist(),
            ctas,
        )  # fmt: skip
    return Tiles(plan.rows, plan.tile_n, True, max(num_splits, 1), cuts)


def verify(
    kernel: Any, case: MlaCase, policy: Policy, *, skip: SkipSoftmax | None = None,
    ctas: int = 148, num_splits: int = 1, **launch: Any,
) -> Result:  # fmt: skip
    """`run`; output, LSE, largest logits and counters must be those of the FP64 specification.

    With a plan that counts, the case must decide by a margin of 1 or more.
    """
    plan = kernel.plan
    value = 0.0 if skip is None else skip.value
    result = run(kernel, case, policy, skip=value, ctas=ctas, num_splits=num_splits, **launch)
    lse = result.lse if plan.features.lse else None
    tiles = tiles_of(plan, case, ctas, num_splits)
    if plan.features.max_logits:
        # Whatever is skipped: a skipped tile does not have it.
        largest = case.oracle(tiles).max_logits
        torch.testing.assert_close(result.max_logits.double(), largest, rtol=1e-6, atol=1e-5)
    else:
        assert result.max_logits.isnan().all()
    if skip is None and not plan.features.count:
        check(case, result.out, lse)
        return result
    expected = case.oracle(tiles, skip)
    assert expected.margin > 1.0, f"a decision is within {expected.margin} of λ"
    check(case, result.out, lse, tiles, skip)
    if plan.features.count:
        assert result.stats.tolist() == [expected.skipped, expected.total]
    return result
