"""The decode kernel of ordinary heads as the host sees it; see `prefill_host` for what `launch`
asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cute_fmha.kernels.blackwell.decode_plan import can_implement, cycles, plan_of
from cute_fmha.kernels.blackwell.decode_transposed_plan import TransposedPlan
from cute_fmha.kernels.blackwell.epilogue import op_arguments
from cute_fmha.kernels.blackwell.mla_host import (
    scalars_of,
    skip_tiles,
    split_bytes,
    stand_ins,
    tensors_of,
)
from cute_fmha.problem import Problem, Target

if TYPE_CHECKING:
    from cute_fmha.ops import Call

__all__ = [
    "NAME", "OP", "call_arguments", "can_implement", "compile_arguments", "cycles", "plan_of",
    "skip_tiles", "workspace_bytes",
]  # fmt: skip

NAME = "decode"
OP = "attention"


def compile_arguments(plan: TransposedPlan) -> tuple[Any, tuple[Any, ...]]:
    """(kernel, placeholders). Every extent and stride is dynamic but the head dims."""
    from cute_fmha.kernels.blackwell.decode import Decode

    lengths = plan.paged or plan.features.used
    return Decode(plan), stand_ins(plan, apart=True, table=plan.paged, lengths=lengths)


def workspace_bytes(problem: Problem, target: Target) -> int:
    """Bytes of workspace that a call of ``problem`` needs."""
    return split_bytes(problem, target, plan_of(problem))


def call_arguments(problem: Problem, target: Target) -> Callable[[Call], tuple[Any, ...]]:
    """What turns a call of ``problem`` into arguments; as many CTAs as ``target`` has SMs.

    The stream is not among them: TVM-FFI takes PyTorch's current one.
    """
    needed, ctas = workspace_bytes(problem, target), target.num_sms

    def arguments(call: Call) -> tuple[Any, ...]:
        if call.k.shape[0] == 0:
            raise NotImplementedError("the decode kernel needs a cache of at least one page")
        return tensors_of(call, needed), call.v, scalars_of(call), ctas, op_arguments(call)

    return arguments
