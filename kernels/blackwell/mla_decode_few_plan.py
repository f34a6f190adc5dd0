"""The plan of `mla_decode_few`: a `TransposedPlan` whose values are columns of its keys."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_transposed_plan import (
    COLUMNS,
    MOST_ROWS,
    TransposedPlan,
    box_of,
)
from cute_fmha.kernels.blackwell.epilogue import Op, unsuited
from cute_fmha.kernels.blackwell.kernel_plan import unsuited_inputs
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import MLA_HEAD_DIMS, Problem, Target


@functools.cache
def make_few_plan(
    head_dim: int, head_dim_v: int, dtype: torch.dtype, out_dtype: torch.dtype,
    features: Features, rows: int, box: int = 64, cut: Cut = Cut.WHOLE, op: Op | None = None,
) -> TransposedPlan:  # fmt: skip
    """As many stages as shared memory takes."""
    plan = TransposedPlan(
        head_dim, head_dim_v, dtype, out_dtype, features, 16 if rows <= 16 else MOST_ROWS, box,
        v_stages=2 * head_dim_v // COLUMNS, cut=cut, op=op or Op(),
    )  # fmt: skip
    while True:
        try:
            plan = replace(plan, v_stages=plan.v_stages + 1)
        except ValueError:
            return plan


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why the kernel cannot run ``problem`` on ``target``; None when it can."""
    rows = problem.seqlen_q * problem.heads_q
    kernel = "the MLA decode kernel of few rows"
    reason = unsuited_inputs(problem, target, kernel, "mla_decode", MLA_HEAD_DIMS)
    if reason is not None:
        return reason
    if problem.batch == 0 or not 0 < rows <= MOST_ROWS:
        return (
            f"{kernel} takes 1 to {MOST_ROWS} rows (queries × heads) of at least one sequence; "
            f"got {rows} of {problem.batch}"
        )
    if not box_of(problem.page_size, problem.page_size == problem.seqlen_k):
        return (
            f"{kernel} takes pages of 1 or a multiple of 8 tokens, or one page a sequence; got "
            f"{problem.page_size}"
        )
    return unsuited(problem)
