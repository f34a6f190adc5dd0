"""Which MLA decode kernel runs a problem, and with which plan. The model: notes/design.md."""

from __future__ import annotations

from cute_fmha.kernels.blackwell import mla_decode_plan, mla_decode_small_plan
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.epilogue import op_of
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan
from cute_fmha.kernels.blackwell.mla_decode_small_plan import MOST_ROWS, SmallPlan
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import Problem, Target
from cute_fmha.tiling import ceil_div
from cute_fmha.workspace import COUNTER_BYTES

MlaPlans = MlaPlan | SmallPlan


def cut_of(num_splits: int) -> Cut:
    """0 leaves the cuts to the launch; a number fixes them."""
    return {0: Cut.SHARE, 1: Cut.WHOLE}.get(num_splits, Cut.FIXED)


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why no MLA decode kernel can run ``problem`` on ``target``; None when one can."""
    if problem.op != "mla_decode":
        return f"the MLA decode kernels have no {problem.op}"
    rows = problem.seqlen_q * problem.heads_q
    kernel = mla_decode_small_plan if rows <= MOST_ROWS else mla_decode_plan
    reason: str | None = kernel.can_implement(problem, target)
    if reason is None and problem.seqlen_k == 0:
        return "the MLA decode kernels need a block table of at least one page"
    if reason is None and problem.num_splits > 1:
        plan = plan_of(problem)
        work_tiles = ceil_div(rows, plan.rows) * problem.batch
        counters = plan.slots.counters(plan.cut, 0, work_tiles)
        if 4 * counters > COUNTER_BYTES:
            return (
                f"a fixed number of splits takes {counters} counters for {problem.batch} "
                f"sequences; a workspace has {COUNTER_BYTES // 4}"
            )
    return reason


def plan_of(problem: Problem) -> MlaPlans:
    """Few rows: operands swapped. Up to 64: one CTA. More: pairs of CTAs, 128 rows each."""
    features = Features.of(problem)
    rows = problem.seqlen_q * problem.heads_q
    cut = cut_of(problem.num_splits)
    if rows <= MOST_ROWS:
        one_page = problem.page_size == problem.seqlen_k
        box = mla_decode_small_plan.box_of(problem.page_size, one_page)
        return mla_decode_small_plan.make_small_plan(
            problem.head_dim, problem.head_dim_v, problem.dtype, problem.out_dtype, features, rows,
            box, cut, op_of(problem),
        )  # fmt: skip
    return mla_decode_plan.make_plan(
        problem.head_dim,
        problem.dtype,
        problem.out_dtype,
        features,
        problem.page_size,
        rows,
        cut,
        op_of(problem),
    )
