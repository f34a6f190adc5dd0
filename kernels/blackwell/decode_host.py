"""The decode kernel of ordinary heads as the host sees it; see `prefill_host` for what `launch`
asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_plan import can_implement, cycles, plan_of, work_tiles
from cute_fmha.kernels.blackwell.epilogue import device_view, op_arguments
from cute_fmha.kernels.blackwell.mla_decode_small_plan import SmallPlan
from cute_fmha.kernels.blackwell.mla_host import scalars_of, split_tensors, stand_ins
from cute_fmha.problem import Problem, Target
from cute_fmha.workspace import COUNTER_BYTES

if TYPE_CHECKING:
    from cute_fmha.ops import Call

__all__ = [
    "NAME", "OP", "call_arguments", "can_implement", "compile_arguments", "cycles", "plan_of",
    "skip_tiles", "workspace_bytes",
]  # fmt: skip

NAME = "decode"
OP = "attention"


def skip_tiles(plan: SmallPlan) -> dict[str, Any]:
    """The tiles whose skips are decided, as `cute_fmha.reference.tile_oracle` takes them."""
    return {"tile_m": plan.rows, "tile_n": plan.tile_n, "pack_heads": True}


def compile_arguments(plan: SmallPlan) -> tuple[Any, tuple[Any, ...]]:
    """(kernel, placeholders). Every extent and stride is dynamic but the head dims."""
    from cute_fmha.kernels.blackwell.decode import Decode

    lengths = plan.paged or plan.features.used
    return Decode(plan), stand_ins(plan, apart=True, table=plan.paged, lengths=lengths)


def workspace_bytes(problem: Problem, target: Target) -> int:
    """Bytes of workspace that a call of ``problem`` needs."""
    plan = plan_of(problem)
    if plan.cut is Cut.WHOLE:
        return 0
    count = work_tiles(problem, plan)
    floats = plan.slots.floats(plan.cut, target.num_sms, count, problem.num_splits)
    return COUNTER_BYTES + 4 * floats


def call_arguments(problem: Problem, target: Target) -> Callable[[Call], tuple[Any, ...]]:
    """What turns a call of ``problem`` into arguments; as many CTAs as ``target`` has SMs.

    The stream is not among them: TVM-FFI takes PyTorch's current one.
    """
    needed, ctas = workspace_bytes(problem, target), target.num_sms

    def arguments(call: Call) -> tuple[Any, ...]:
        if call.k.shape[0] == 0:
            raise NotImplementedError("the decode kernel needs a cache of at least one page")
        tensors = (
            call.q, call.k, call.block_table, call.seqused_k, device_view(call.out), call.lse,
            call.max_logits, call.sink, call.skip_tensor, call.stats, *split_tensors(call, needed),
        )  # fmt: skip
        return tensors, call.v, scalars_of(call), ctas, op_arguments(call)

    return arguments
