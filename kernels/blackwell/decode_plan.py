"""The plan of `decode`: a `TransposedPlan` whose keys and values are tensors of their own."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_transposed_plan import (
    GATHERED,
    MOST_ROWS,
    TransposedPlan,
    box_of,
)
from cute_fmha.kernels.blackwell.epilogue import Op, op_of, unsuited
from cute_fmha.kernels.blackwell.kernel_plan import unsuited_inputs
from cute_fmha.kernels.blackwell.mla_plan import crowded, cut_of
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import Problem, Target
from cute_fmha.tiling import ceil_div

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (512, 512))
"""(D, Dv) that the decode kernel has plans for."""

TILE_N = 128
"""Keys of a tile: S has a token in every lane."""


@functools.cache
def make_decode_plan(
    width: int, dtype: torch.dtype, out_dtype: torch.dtype, features: Features, rows: int,
    box: int = TILE_N, paged: bool = False, cut: Cut = Cut.WHOLE, op: Op | None = None,
) -> TransposedPlan:  # fmt: skip
    """As many stages as shared memory takes, of keys and of values alike.

    With skip-softmax four tiles may be decided on before the first one's values are there: that
    they are asked for only after the decision costs nothing as long as keys keep coming.
    """
    plan = TransposedPlan(
        width, width, dtype, out_dtype, features, 16 if rows <= 16 else MOST_ROWS, box,
        v_stages=1, r_stages=0, k_stages=1, tile_n=TILE_N, depth=4 if features.skip else 2,
        paged=paged, cut=cut, op=op or Op(),
    )  # fmt: skip
    while True:
        more = plan.v_stages == plan.k_stages
        try:
            plan = replace(plan, k_stages=plan.k_stages + more, v_stages=plan.v_stages + (not more))
        except ValueError:
            return plan


def plan_of(problem: Problem) -> TransposedPlan:
    return make_decode_plan(
        problem.head_dim, problem.dtype, problem.out_dtype, Features.of(problem),
        problem.seqlen_q * problem.group, box(problem), problem.layout == "paged",
        cut_of(problem.num_splits), op_of(problem),
    )  # fmt: skip


def box(problem: Problem) -> int:
    """Keys of a TMA box; see `box_of`."""
    one_page = problem.layout != "paged" or problem.page_size == problem.seqlen_k
    return box_of(problem.page_size, one_page, TILE_N)


def cycles(problem: Problem, target: Target) -> float:
    """Modelled, of a launch: where device memory does not, shared memory binds; in it 128 keys take
    8.6 cycles for every column (K and V are written and read once); at 64 columns and 32 rows the
    softmax takes 500. Keys are split over all SMs, unless told otherwise."""
    tiles = ceil_div(problem.seqlen_k, TILE_N)
    blocks = ceil_div(problem.seqlen_q * problem.group, MOST_ROWS)
    work = blocks * problem.heads_kv * problem.batch
    pieces = {0: tiles, 1: 1}.get(problem.num_splits, min(problem.num_splits, tiles))
    turns = ceil_div(work * pieces, target.num_sms) * ceil_div(tiles, pieces)
    combine = 0 if problem.num_splits == 1 else 2000
    return turns * max(500.0, 8.6 * problem.head_dim) + combine


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why the kernel cannot run ``problem`` on ``target``; None when it can."""
    reason = unsuited_inputs(problem, target, "the decode kernel", "attention", HEAD_DIMS)
    if reason is not None:
        return reason
    if problem.packed_q or problem.layout == "packed":
        return "the decode kernel takes dense and paged keys and dense queries; got packed ones"
    if problem.block_mask is not None:
        return "the decode kernel takes no block mask"
    if 0 in (problem.seqlen_q, problem.seqlen_k, problem.batch):
        return "the decode kernel needs at least one sequence, query and key"
    if box(problem) in (0, GATHERED):
        return (
            "the decode kernel takes pages of a multiple of 8 tokens, or one page a sequence; got "
            f"{problem.page_size}"
        )
    if problem.num_splits > 1:
        whose = f"{problem.batch} sequences of {problem.heads_kv} KV heads"
        if (reason := crowded(problem, plan_of(problem), whose)) is not None:
            return reason
    return unsuited(problem)
