"""Which Triton kernel runs a problem and with what tiles: frozen, resolved before the launch."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cute_fmha.epilogues.base import resolve
from cute_fmha.epilogues.cast import IDENTITY
from cute_fmha.epilogues.nvfp4 import NVFP4
from cute_fmha.problem import Problem, Target
from cute_fmha.tiling import ceil_div
from cute_fmha.workspace import COUNTER_BYTES

COMBINE_ELEMENTS = 16
"""(row, split) pairs a combine program holds at once; with Dv columns each in registers."""


@dataclass(frozen=True)
class Plan:
    """Tiles and schedule of one launch. A work tile is ``tile_m`` rows; with ``pack_heads`` rows
    pack query positions and the heads of a group (position-major). ``gather``: the Hopper MLA
    kernel fetches single rows, because a page is smaller than its block or pages leave gaps.
    ``max_registers``: of a thread; None leaves the choice to ptxas."""

    kernel: Literal["prefill", "hopper_prefill", "decode", "hopper_mla_decode"]
    tile_m: int
    tile_n: int
    pack_heads: bool
    num_warps: int
    num_stages: int
    num_splits: int = 1
    combine_rows: int = 1
    split_block: int = 1
    gather: bool = False
    max_registers: int | None = None

    def tiles_m(self, problem: Problem) -> int:
        rows = problem.seqlen_q * (problem.group if self.pack_heads else 1)
        return ceil_div(rows, self.tile_m)

    def work_tiles(self, problem: Problem) -> int:
        heads = problem.heads_kv if self.pack_heads else problem.heads_q
        return self.tiles_m(problem) * heads * problem.batch

    def workspace_bytes(self, problem: Problem) -> int:
        """Bytes of workspace the launch needs: counters, then FP32 m, l and O of every split."""
        if self.num_splits == 1:
            return 0
        row_bytes = 4 * (2 + problem.head_dim_v)
        return COUNTER_BYTES + (
            self.work_tiles(problem) * self.num_splits * self.tile_m * row_bytes
        )


def head_dim_parts(head_dim: int) -> tuple[int, int]:
    """``head_dim`` as a power of two plus a power-of-two remainder (0 for none)."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, head_dim - main


def next_power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def interpreting() -> bool:
    """True under Triton's interpreter, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why no Triton kernel here can run ``problem`` on ``target``; None when one can."""
    if target.device_type == "cpu":
        if not interpreting():
            return "the Triton kernels need a CUDA device (or TRITON_INTERPRET=1 on CPU tensors)"
        if problem.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly; use fp16 or fp32"
    elif target.device_type != "cuda":
        return f"the Triton kernels need a CUDA device; got {target.device_type}"
    elif target.arch < 80:
        return f"the Triton kernels need compute capability 8.0 or later; got {target.arch / 10}"
    elif problem.dtype == torch.float32:
        return "the Triton kernels take bfloat16 and float16 (float32 only in the interpreter)"
    if problem.epilogue != IDENTITY.key and resolve(problem.epilogue).triton is None:
        return f"epilogue {problem.epilogue!r} has no Triton function"
    if problem.block_mask is not None:
        if problem.num_splits > 1:
            return "a block mask and num_splits > 1 exclude each other"
        for name, block in zip(("block_m", "block_n"), problem.block_mask, strict=True):
            if block % 16:
                return f"block mask {name} must be a multiple of 16; got {block}"
    return None


def _largest_divisor(limit: int, block: int) -> int:
    """The largest power of two <= limit that divides ``block``."""
    return min(limit, block & -block)


def choose_splits(work_tiles: int, tiles_n: int, slots: int, limit: int) -> int:
    """Splits that fill ``slots`` concurrent programs best: the fewest within 10 % of the best wave
    efficiency, since each further split costs partial-result traffic."""
    limit = max(1, min(limit, tiles_n, slots))
    if work_tiles >= slots * 4 or limit == 1:
        return 1
    efficiency = []
    for splits in range(1, limit + 1):
        waves = work_tiles * splits / slots
        # Whole tiles per split: a split count that leaves one of them longer gains nothing.
        balance = tiles_n / (splits * ceil_div(tiles_n, splits))
        efficiency.append(waves / -(-work_tiles * splits // slots) * balance)
    best = max(efficiency)
    return next(i + 1 for i, e in enumerate(efficiency) if e >= 0.9 * best)


def _crowded(problem: Problem) -> bool:
    """Whether full-width tiles spill registers: skipping and block masks keep O in registers across
    a branch, softcap needs temporaries as large as the scores, and two of these are too much."""
    return problem.skip + (problem.block_mask is not None) + problem.softcap > 1


def _prefill_plan(problem: Problem, target: Target) -> Plan:
    wide = max(problem.head_dim, problem.head_dim_v)
    large = target.arch in (90, 100, 103)
    branches = problem.skip or problem.block_mask is not None
    # An op other than a cast works on O while it is in registers: the widest tiles leave no room.
    fused = problem.epilogue != IDENTITY.key
    if target.device_type == "cpu":
        tile_m, tile_n, warps, stages = 32, 32, 4, 1
    elif wide <= 128:
        # 99 KiB of shared memory is what sm_86, sm_89 and sm_120 have.
        tile_m, tile_n, warps, stages = 128, 64, 8, 3 if large else 2
    elif wide <= 192 or (wide <= 256 and large and not (branches or fused)):
        # O has 128 registers of a thread at 256: on sm_100, 64 keys beside it spill.
        tile_m, tile_n, warps, stages = 128, 64 if wide <= 192 or target.arch == 90 else 32, 8, 2
        if branches and not large:
            tile_n = 32  # a block mask or a skip at 192 spills beside 64 keys
    elif wide <= 256:
        tile_m, tile_n, warps, stages = 64, 32, 8, 2
    else:
        tile_m, tile_n, warps, stages = 32, 32, 8, 2
    if _crowded(problem):
        tile_n = min(tile_n, 32)
    if problem.block_mask is not None:
        tile_m = _largest_divisor(tile_m, problem.block_mask[0])
        tile_n = _largest_divisor(tile_n, problem.block_mask[1])
    return Plan("prefill", tile_m, tile_n, False, warps, stages)


def _auto_splits(problem: Problem, work_tiles: int, tile_n: int, slots: int) -> int:
    tiles_n = ceil_div(problem.seqlen_k, tile_n)
    if problem.window_left >= 0:
        span = problem.window_left + problem.seqlen_q + max(problem.window_right, 0)
        tiles_n = min(tiles_n, ceil_div(span, tile_n) + 1)
    return choose_splits(work_tiles, tiles_n, slots, 128)


def _decode_plan(problem: Problem, target: Target, aligned: bool, even_pages: bool) -> Plan:
    rows = max(problem.seqlen_q * problem.group, 1)
    wide = max(problem.head_dim, problem.head_dim_v)
    kernel: Literal["decode", "hopper_mla_decode"] = "decode"
    large = target.arch in (90, 100, 103)
    tile_m = min(max(next_power_of_two(rows), 16), 64)
    occupancy = 1
    max_registers = None
    if target.device_type == "cpu":
        tile_n, warps, stages = 32, 4, 1
    elif aligned and hopper_mla_reason(problem, target) is None:
        kernel, tile_m, tile_n, warps, stages = "hopper_mla_decode", 64, 64, 4, 1
    elif wide > 256:
        tile_m = min(tile_m, 32)
        # Four warps hold 16 rows of O; except on sm_90, a tile's addresses do not fit beside it.
        four = tile_m <= 16 and target.arch == 90
        tile_n, warps, stages, occupancy = (32, 4, 2, 2) if four else (32, 8, 2, 1)
        if tile_m > 16 and _crowded(problem):
            tile_n = 16
        if problem.epilogue == NVFP4.key and tile_m <= 16:
            # Its blocks need O in another layout beside the one it is in. What does not spill:
            tile_n, warps = (32, 8) if large else (16, 4)
    elif large:
        # Three stages of 128 keys fill the shared memory of one SM, and one CTA its bandwidth:
        # 4.4 TB/s, against 3.9 with two CTAs of 64 keys.
        tile_n, warps, stages = 128 if wide <= 128 else 64, 8 if tile_m == 64 else 4, 3
        if tile_m == 64 and _crowded(problem):
            tile_n = 64 if wide <= 192 else 32
    else:
        tile_n, stages, occupancy = 64 if wide <= 128 else 32, 2, 2
        warps = 8 if tile_m == 64 else 4
    if kernel == "decode" and target.device_type == "cuda":
        # Without a limit ptxas takes 72 to 128 for the sake of occupancy, and spills a few.
        max_registers = 255
    # O and the scores of a tile are kept across its decision; softcap needs temporaries.
    heavy = (problem.skip and wide > (64 if large else 128)) or (problem.softcap and wide > 256)
    if problem.op == "attention" and heavy:
        warps = 8  # too much for four
    gather = kernel == "hopper_mla_decode" and not (even_pages and problem.page_size % 64 == 0)
    plan = Plan(
        kernel, tile_m, tile_n, True, warps, stages, gather=gather, max_registers=max_registers
    )
    work_tiles = plan.work_tiles(problem)
    splits = problem.num_splits
    if splits == 0:
        splits = _auto_splits(problem, work_tiles, tile_n, target.num_sms * occupancy)
    if work_tiles + 2 > COUNTER_BYTES // 4:
        splits = 1
    if splits == 1:
        return plan
    # At most one wave of combine programs, each with whole rows of one work tile.
    combine = 1
    while combine < tile_m and work_tiles * (tile_m // combine) > target.num_sms:
        combine *= 2
    # It orders the sum over the splits, so it must not depend on the batch (batch invariance).
    split_block = min(next_power_of_two(splits), COMBINE_ELEMENTS)
    return replace(plan, num_splits=splits, combine_rows=combine, split_block=split_block)


def hopper_mla_reason(problem: Problem, target: Target) -> str | None:
    """Why the Hopper MLA kernel cannot run ``problem``; None when it can."""
    if problem.op != "mla_decode" or target.arch != 90:
        return "it is an MLA decode kernel for compute capability 9.0"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {problem.dtype}"
    if problem.epilogue != IDENTITY.key:
        return f"it has no epilogue {problem.epilogue!r}"
    return None


@functools.lru_cache(maxsize=4096)
def make_plan(
    problem: Problem, target: Target, aligned: bool = True, even_pages: bool = True
) -> Plan:
    """The launch of ``problem``: decode where packing heads fills a tile better than positions.

    aligned: every row of q, k and v starts on 16 bytes; the Hopper kernels need that.
    even_pages: the rows of consecutive pages are evenly spaced, so that one TMA descriptor can
        address a paged cache as a list of rows.
    """
    few_rows = problem.seqlen_q * problem.group <= 64 or problem.seqlen_q <= 8
    decode = problem.op == "mla_decode" or problem.num_splits > 1
    if decode or (problem.block_mask is None and few_rows):
        return _decode_plan(problem, target, aligned, even_pages)
    if target.arch == 90 and aligned:
        # Gluon is part of Triton but experimental: only a Hopper GPU needs it to import.
        from cute_fmha.kernels.triton import hopper_prefill

        if hopper_prefill.can_implement(problem, target) is None:
            plan = hopper_prefill.plan(problem, target)
            return Plan(
                "hopper_prefill", plan.tile_m, plan.tile_n, False, 4 * plan.consumers, plan.k_stages
            )
    return _prefill_plan(problem, target)
