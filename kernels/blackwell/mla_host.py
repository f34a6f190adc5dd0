"""The MLA decode kernels as the host sees them; see `prefill_host` for what `launch` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.epilogue import (
    Leaving,
    device_view,
    op_arguments,
    placeholders,
)
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan
from cute_fmha.kernels.blackwell.mla_plan import MlaPlans, can_implement, plan_of, work_tiles
from cute_fmha.kernels.blackwell.scores import multipliers
from cute_fmha.problem import Problem, Target
from cute_fmha.workspace import COUNTER_BYTES, workspace_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call

__all__ = [
    "NAME", "OP", "call_arguments", "can_implement", "compile_arguments", "plan_of", "skip_tiles",
    "workspace_bytes",
]  # fmt: skip

NAME = "mla_decode"
OP = "mla_decode"


def skip_tiles(plan: MlaPlans) -> dict[str, Any]:
    """The tiles whose skips are decided, as `cute_fmha.reference.tile_oracle` takes them."""
    return {"tile_m": plan.rows, "tile_n": plan.tile_n, "pack_heads": True}


def compile_arguments(plan: MlaPlans) -> tuple[Any, tuple[Any, ...]]:
    """(kernel, placeholders). Every extent and stride is dynamic but the head dims."""
    from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
    from cute_fmha.kernels.blackwell.mla_decode_few import MlaDecodeFew

    kernel = MlaDecode(plan) if isinstance(plan, MlaPlan) else MlaDecodeFew(plan)
    return kernel, stand_ins(plan)


def stand_ins(
    plan: MlaPlans, apart: bool = False, table: bool = True, lengths: bool = True
) -> tuple[Any, ...]:
    """Placeholders for a decode kernel: with keys and values ``apart``, any number of KV heads."""
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream

    from cute_fmha.kernels.blackwell.build import placeholder
    from cute_fmha.kernels.blackwell.decode_arguments import Scalars, Tensors
    from cute_fmha.kernels.blackwell.device import DTYPES

    features = plan.features
    dtype, out_dtype = DTYPES[plan.dtype], DTYPES[plan.out_dtype]
    split = plan.cut is not Cut.WHOLE
    elements = Leaving(plan.op, plan.out_dtype, plan.head_dim_v).elements
    tensors = Tensors(
        placeholder(dtype, None, None, None, plan.head_dim, align=16),
        placeholder(dtype, None, None, None if apart else 1, plan.head_dim, align=16),
        placeholder(Int32, None, None) if table else None,
        placeholder(Int32, None) if lengths else None,
        placeholder(out_dtype, None, None, None, elements, align=16),
        placeholder(Float32, None, None, None) if features.lse else None,
        placeholder(Float32, None, None, None) if features.max_logits else None,
        placeholder(Float32, None) if features.sink else None,
        placeholder(Float32, 1) if features.skip_tensor else None,
        placeholder(Int64, 2) if features.count else None,
        placeholder(Int32, None) if split else None,
        placeholder(Float32, None, align=16) if split else None,
    )
    values = [placeholder(dtype, None, None, None, plan.head_dim_v, align=16)] if apart else []
    return (
        tensors,
        *values,
        Scalars(Float32(0), Float32(0), Int32(0), Int32(0), Float32(0), Int32(0)),
        Int32(0),
        placeholders(plan.op),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def workspace_bytes(problem: Problem, target: Target) -> int:
    """Bytes of workspace that a call of ``problem`` needs."""
    return split_bytes(problem, target, plan_of(problem))


def split_bytes(problem: Problem, target: Target, plan: MlaPlans) -> int:
    """Bytes of workspace that ``plan`` needs for ``problem``: none where nothing is cut."""
    if plan.cut is Cut.WHOLE:
        return 0
    slots, count = plan.slots, work_tiles(problem, plan)
    workers = max(target.num_sms // slots.ranks, 1)
    return COUNTER_BYTES + 4 * slots.floats(plan.cut, workers, count, problem.num_splits)


def scalars_of(call: Call) -> tuple[float | int, ...]:
    """The call's `decode_arguments.Scalars`."""
    problem = call.problem
    window = (problem.window_left, problem.window_right)
    return (*multipliers(call), *window, call.skip_value, problem.num_splits)


def tensors_of(call: Call, needed: int) -> tuple[torch.Tensor | None, ...]:
    """The call's `decode_arguments.Tensors`, with ``needed`` bytes of workspace."""
    return (
        call.q, call.k, call.block_table, call.seqused_k, device_view(call.out), call.lse,
        call.max_logits, call.sink, call.skip_tensor, call.stats, *split_tensors(call, needed),
    )  # fmt: skip


def split_tensors(call: Call, needed: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(counters, partial results) of ``needed`` bytes of workspace; None where nothing is cut."""
    if not needed:
        return None, None
    splits = call.problem.num_splits
    workspace = workspace_of(call.workspace, call.q.device, needed, splits)
    head, rest = workspace[:COUNTER_BYTES], workspace[COUNTER_BYTES:]
    return head.view(torch.int32), rest.view(torch.float32)


def call_arguments(problem: Problem, target: Target) -> Callable[[Call], tuple[Any, ...]]:
    """What turns a call of ``problem`` into arguments; as many CTAs as ``target`` has SMs.

    The stream is not among them: TVM-FFI takes PyTorch's current one.
    """
    plan = plan_of(problem)
    needed, ctas = workspace_bytes(problem, target), target.num_sms
    even = isinstance(plan, MlaPlan) and problem.seqlen_q > 1

    def arguments(call: Call) -> tuple[Any, ...]:
        if call.k.shape[0] == 0:
            raise NotImplementedError("the MLA decode kernels need a cache of at least one page")
        if even and call.out.stride(1) != problem.heads_q * call.out.stride(2):
            raise NotImplementedError(
                "the MLA decode kernel stores the heads of all positions as rows at one distance: "
                f"with {problem.seqlen_q} positions out.stride(1) must be "
                f"{problem.heads_q} * out.stride(2); got strides {call.out.stride()}"
            )
        return tensors_of(call, needed), scalars_of(call), ctas, op_arguments(call)

    return arguments
