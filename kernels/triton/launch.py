"""From a `Call` to one Triton launch: strides, tuples of arguments, workspace."""

from __future__ import annotations

import torch

from cute_fmha.kernels.triton.decode import decode_kernel
from cute_fmha.kernels.triton.epilogue import epilogue_arguments, kernel_view
from cute_fmha.kernels.triton.plan import (
    Plan,
    head_dim_parts,
    make_plan,
    next_power_of_two,
)
from cute_fmha.kernels.triton.prefill import prefill_kernel
from cute_fmha.ops import Call
from cute_fmha.problem import target_of
from cute_fmha.tiling import ceil_div
from cute_fmha.workspace import COUNTER_BYTES, workspace_of


def _workspace_parts(
    call: Call, plan: Plan
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(counters, row stats, partial outputs) in the workspace; None with one split."""
    needed = plan.workspace_bytes(call.problem)
    if not needed:
        return None, None, None
    workspace = workspace_of(call.workspace, call.q.device, needed, plan.num_splits)
    slots = plan.work_tiles(call.problem) * plan.num_splits
    partial_begin = COUNTER_BYTES + slots * plan.tile_m * 8
    return (
        workspace[:COUNTER_BYTES].view(torch.int32),
        workspace[COUNTER_BYTES:partial_begin].view(torch.float32),
        workspace[partial_begin:needed].view(torch.float32),
    )


def _row_strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(batch or page, token, head) strides; packed tensors have no batch stride."""
    if tensor.dim() == 4:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return 0, tensor.stride(0), tensor.stride(1)


def _alignment(call: Call) -> tuple[bool, bool]:
    """(every row that TMA would read starts on 16 bytes, pages of the cache are evenly spaced)."""
    k = call.k
    if call.problem.op == "mla_decode":
        return _rows_aligned(k) and k.numel() > 0, k.stride(0) == k.shape[1] * k.stride(1)
    return _rows_aligned(call.q) and _rows_aligned(k) and _rows_aligned(call.v), True


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of a 16-bit tensor starts on 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(
        stride % 8 == 0
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if size > 1
    )


def run(call: Call) -> None:
    """Launch the planned kernel once; writes ``call.out``, ``call.lse`` and ``call.stats``."""
    problem = call.problem
    if call.out.numel() == 0:
        return
    plan = make_plan(problem, target_of(call.q.device), *_alignment(call))
    if plan.kernel == "hopper_prefill":
        # Gluon is part of Triton but experimental: only a Hopper GPU needs it to import.
        from cute_fmha.kernels.triton import hopper_prefill

        hopper_prefill.run(call)
        return
    main, rest = head_dim_parts(problem.head_dim)
    # LSE and max_logits are contiguous and of one shape.
    lse_strides: tuple[int, ...] = (0, 0)
    per_row = call.lse if call.lse is not None else call.max_logits
    if per_row is not None:
        lse_strides = (0, per_row.stride(0)) if per_row.dim() == 2 else per_row.stride()[:2]
    sequences = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k)
    paging: tuple[torch.Tensor | None, int, int] = (None, 0, 0)
    if call.block_table is not None:
        paging = (call.block_table, call.block_table.stride(0), problem.page_size)
    softcap = call.softcap if problem.softcap else None
    function, epilogue = epilogue_arguments(call)
    tensors = call.q, call.k, call.v, kernel_view(call.out), call.lse
    places = (
        _row_strides(call.q), _row_strides(call.k), _row_strides(call.v), _row_strides(call.out),
        lse_strides, sequences, paging,
    )  # fmt: skip
    options = {
        "window": (problem.window_left, problem.window_right),
        "scores": (call.scale, softcap, call.sink),
        "skip": (call.skip_tensor, call.skip_value),
        "stats": call.stats,
        "epilogue": epilogue,
        "TILES": (plan.tile_m, plan.tile_n),
        "DIMS": (main, rest, problem.head_dim, next_power_of_two(problem.head_dim_v),
                 problem.head_dim_v),
        "WINDOWED": (problem.window_left >= 0, problem.window_right >= 0),
        "SKIP": problem.skip,
        "SKIP_RELATIVE": call.skip_relative,
        "EPILOGUE": function,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }  # fmt: skip
    if plan.kernel == "prefill":
        mask: torch.Tensor | None = None
        mask_blocks: tuple[tuple[int, ...], int, int] = ((0, 0, 0, 0), 1, 1)
        if call.block_mask is not None and problem.block_mask is not None:
            expanded = call.block_mask.view(torch.uint8).expand(
                problem.batch, problem.heads_q, -1, -1
            )
            mask, mask_blocks = expanded, (expanded.stride(), *problem.block_mask)
        sizes = (problem.seqlen_q, problem.seqlen_k, problem.heads_q, problem.group)
        grid = (plan.tiles_m(problem) * problem.heads_q, problem.batch)
        prefill_kernel[grid](
            *tensors, *places, mask=mask, mask_blocks=mask_blocks, sizes=sizes, **options
        )
        return
    if plan.kernel == "hopper_mla_decode":
        _run_hopper_mla_decode(call, plan, paging, lse_strides)
        return
    work_tiles = plan.work_tiles(problem)
    programs = work_tiles
    if plan.num_splits > 1:
        programs = work_tiles * plan.num_splits + work_tiles * ceil_div(
            plan.tile_m, plan.combine_rows
        )
    decode_kernel[(programs,)](
        *tensors,
        call.max_logits,
        *places,
        sizes=(
            problem.seqlen_q, problem.seqlen_k, problem.heads_kv, problem.group, problem.batch
        ),
        workspace=_workspace_parts(call, plan),
        LATENT=problem.op == "mla_decode",
        NUM_SPLITS=plan.num_splits,
        COMBINE_ROWS=plan.combine_rows,
        SPLIT_BLOCK=plan.split_block,
        maxnreg=plan.max_registers,
        **options,
    )  # fmt: skip


def _run_hopper_mla_decode(
    call: Call, plan: Plan, paging: tuple[object, ...], lse_strides: tuple[int, ...]
) -> None:
    """Launch hopper_mla_decode.py."""
    # Gluon is part of Triton but experimental: only a Hopper GPU needs it to import.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from cute_fmha.kernels.triton.hopper_mla_decode import hopper_mla_decode_kernel

    problem = call.problem
    latent = rope = None
    if not plan.gather:
        layout = gl.NVMMASharedLayout(128, 16, rank=2)
        shape = [call.k.shape[0] * call.k.shape[1], problem.head_dim]
        strides = [call.k.stride(1), 1]
        latent = TensorDescriptor(call.k, shape, strides, [64, 256], layout)
        rope = TensorDescriptor(call.k, shape, strides, [64, 64], layout)
    work_tiles = plan.work_tiles(problem)
    programs = work_tiles
    if plan.num_splits > 1:
        programs = work_tiles * (plan.num_splits + 64 // plan.combine_rows)
    workspace = _workspace_parts(call, plan)
    if plan.num_splits == 1:
        # Never touched with one split, but a Gluon tuple cannot hold None.
        workspace = (call.seqused_k,) * 3
    hopper_mla_decode_kernel[(programs,)](
        call.q, call.k, latent, rope, call.out, (call.lse, call.max_logits), _row_strides(call.q),
        tuple(stride // 8 for stride in _row_strides(call.k)), _row_strides(call.out), lse_strides,
        *paging, call.seqused_k,
        (problem.window_left, problem.window_right),
        (call.scale, call.softcap if problem.softcap else None, call.sink),
        (call.skip_tensor, call.skip_value), call.stats,
        (problem.seqlen_q, problem.heads_q, problem.batch), workspace,
        WINDOWED=(problem.window_left >= 0, problem.window_right >= 0),
        HAS_ROPE=problem.head_dim == 576, SKIP=problem.skip, SKIP_RELATIVE=call.skip_relative,
        NUM_SPLITS=plan.num_splits, COMBINE_ROWS=plan.combine_rows,
        SPLIT_BLOCK=plan.split_block, GATHER=plan.gather, num_warps=4,
    )  # fmt: skip
