"""The prefill kernel as the host sees it: its plan, its placeholders, a call's arguments.

`launch.py` asks every kernel for these: `NAME`, the `OP` it is for and `can_implement`; `plan_of` a
problem and its `skip_tiles`; `compile_arguments`, the kernel object and placeholders for its
``__call__``, the last of which is the stream; `call_arguments`, which turns a `Call` into what the
compiled ``__call__`` takes. Only `compile_arguments` needs CuTe DSL. What a call does not have is
None in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cute_fmha.kernels.blackwell.epilogue import device_view, op_arguments, op_of, placeholders
from cute_fmha.kernels.blackwell.plan import Features, Plan, can_implement, make_plan, packed_heads
from cute_fmha.kernels.blackwell.scores import multipliers
from cute_fmha.problem import Problem, Target
from cute_fmha.tiling import ceil_div

if TYPE_CHECKING:
    from cute_fmha.ops import Call

__all__ = [
    "NAME", "OP", "call_arguments", "can_implement", "compile_arguments", "cycles", "plan_of",
    "skip_tiles",
]  # fmt: skip

NAME = "prefill"
OP = "attention"


def plan_of(problem: Problem) -> Plan:
    plan = make_plan(
        problem.head_dim,
        problem.head_dim_v,
        problem.dtype,
        problem.out_dtype,
        Features.of(problem),
        op_of(problem),
    )
    return replace(plan, pack=packed_heads(problem, plan.work_rows))


def cycles(problem: Problem, target: Target) -> float:
    """Modelled, of a launch: every work tile goes through all of its keys on one SM, or on two. Per
    128 keys the emulator's timelines give 1700 cycles and 5 for a column, and for a pair of SMs the
    2048 of the tensor core; see notes/measurements.md.
    """
    plan = plan_of(problem)
    blocks = ceil_div(problem.seqlen_q * plan.pack, plan.work_rows)
    work_tiles = blocks * problem.heads_q // plan.pack * problem.batch
    tiles = ceil_div(problem.seqlen_k, 128)
    waves: int = ceil_div(work_tiles, target.num_sms // plan.ctas)
    return waves * tiles * (2048 if plan.pair else 1700 + 5 * problem.head_dim)


def skip_tiles(plan: Plan) -> dict[str, Any]:
    """The tiles whose skips are decided, as `cute_fmha.reference.tile_oracle` takes them."""
    return {"tile_m": plan.mma_rows, "tile_n": plan.tile_n, "pack_heads": plan.pack > 1}


def compile_arguments(plan: Plan) -> tuple[Any, tuple[Any, ...]]:
    """(kernel, placeholders). Every extent and stride is dynamic but the head dims."""
    from cutlass import Float32, Int32, Int64, Uint8
    from cutlass.cute.runtime import make_fake_stream

    from cute_fmha.kernels.blackwell.build import placeholder
    from cute_fmha.kernels.blackwell.device import DTYPES
    from cute_fmha.kernels.blackwell.prefill import Prefill
    from cute_fmha.kernels.blackwell.prefill_operands import Lengths, Scalars, Tensors

    features = plan.features
    dtype, out_dtype = DTYPES[plan.dtype], DTYPES[plan.out_dtype]
    rows = (None, None) if features.packed else (None, None, None)
    starts = placeholder(Int32, None) if features.packed else None
    used = placeholder(Int32, None) if features.used else None
    tensors = Tensors(
        placeholder(dtype, *rows, plan.head_dim, align=16),
        placeholder(dtype, *rows, plan.head_dim, align=16),
        placeholder(dtype, *rows, plan.head_dim_v, align=16),
        placeholder(out_dtype, *rows, plan.leaving.elements, align=16),
        placeholder(Float32, *rows) if features.lse else None,
        placeholder(Float32, None) if features.sink else None,
        placeholder(Float32, 1) if features.skip_tensor else None,
        placeholder(Int64, 2) if features.count else None,
        placeholder(Uint8, *[None] * 4, any_stride=True) if features.block_mask else None,
    )
    arguments = (
        tensors,
        placeholders(plan.op),
        Lengths(starts, starts, used, Int32(0)),
        Scalars(Float32(0), Float32(0), Int32(0), Int32(0), Float32(0)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return Prefill(plan), arguments


def call_arguments(problem: Problem, target: Target) -> Callable[[Call], tuple[Any, ...]]:
    """What turns a call of ``problem`` into arguments.

    The stream is not among them: TVM-FFI takes PyTorch's current one.
    """
    window = (problem.window_left, problem.window_right)

    def arguments(call: Call) -> tuple[Any, ...]:
        scalars = (*multipliers(call), *window, call.skip_value)
        tensors = (
            call.q, call.k, call.v, device_view(call.out), call.lse, call.sink, call.skip_tensor,
            call.stats, None if call.block_mask is None else device_view(call.block_mask),
        )  # fmt: skip
        lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k, problem.seqlen_q)
        return tensors, op_arguments(call), lengths, scalars

    return arguments
