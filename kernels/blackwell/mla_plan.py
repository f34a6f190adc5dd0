"""Which MLA decode kernel runs a problem, and with which plan. The model: notes/design.md."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cute_fmha.kernels.blackwell import mla_decode_few_plan, mla_decode_plan
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_transposed_plan import MOST_ROWS, TransposedPlan, box_of
from cute_fmha.kernels.blackwell.epilogue import op_of
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import Problem, Target
from cute_fmha.tiling import ceil_div, equal_share, kv_tile_ranges, tiles_before_cut
from cute_fmha.workspace import COUNTER_BYTES

MlaPlans = MlaPlan | TransposedPlan


def cut_of(num_splits: int) -> Cut:
    """0 leaves the cuts to the launch; a number fixes them."""
    return {0: Cut.SHARE, 1: Cut.WHOLE}.get(num_splits, Cut.FIXED)


def automatic_cuts(
    plan: MlaPlans, shape: tuple[int, int], window: tuple[int, int], lengths: Sequence[int],
    ctas: int,
) -> list[list[int]]:  # fmt: skip
    """Where a launch of at most ``ctas`` CTAs cuts each work tile, in KV tiles from its first.
    ``shape``: queries and heads of a sequence.

    What `worklist` finds on the device, from the same functions, for those who ask what an
    automatically split launch with skip-softmax has decided: every piece does so for itself.
    """
    seqlen_q, heads = shape
    overhead, least = plan.cutting.overhead, plan.cutting.least
    total_rows = seqlen_q * heads
    counts = []
    for length in lengths:
        for first in range(0, total_rows, plan.rows):
            last = min(first + plan.rows, total_rows) - 1
            begin, _, _, end = kv_tile_ranges(
                first // heads, last // heads + 1, seqlen_q, length, *window, plan.tile_n
            )
            counts.append(end - begin)
    workers = max(ctas // plan.slots.ranks, 1)
    starts = [0, *itertools.accumulate(count + overhead for count in counts)]
    share = equal_share(starts[-1], workers, overhead, least)
    cuts = []
    for at, count in zip(starts, counts, strict=False):
        places = {
            tiles_before_cut(worker * share - at, count, overhead, least)
            for worker in range(workers)
        }
        cuts.append(sorted(places - {0, count}))
    return cuts


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why no MLA decode kernel can run ``problem`` on ``target``; None when one can."""
    if problem.op != "mla_decode":
        return f"the MLA decode kernels have no {problem.op}"
    rows = problem.seqlen_q * problem.heads_q
    kernel = mla_decode_few_plan if rows <= MOST_ROWS else mla_decode_plan
    reason: str | None = kernel.can_implement(problem, target)
    if reason is None and problem.seqlen_k == 0:
        return "the MLA decode kernels need a block table of at least one page"
    if reason is None and problem.num_splits > 1:
        return crowded(problem, plan_of(problem), f"{problem.batch} sequences")
    return reason


def work_tiles(problem: Problem, plan: MlaPlans) -> int:
    """Blocks of rows of every KV head; latents count as one."""
    blocks: int = ceil_div(problem.seqlen_q * problem.group, plan.rows)
    return blocks * problem.heads_kv * problem.batch


def crowded(problem: Problem, plan: MlaPlans, whose: str) -> str | None:
    """Why a fixed number of splits has more work tiles than a workspace counts; None if not."""
    counters = plan.slots.counters(plan.cut, 0, work_tiles(problem, plan))
    if 4 * counters <= COUNTER_BYTES:
        return None
    return (
        f"a fixed number of splits takes {counters} counters for {whose}; a workspace has "
        f"{COUNTER_BYTES // 4}"
    )


def plan_of(problem: Problem) -> MlaPlans:
    """Few rows: operands swapped. Up to 64: one CTA. More: pairs of CTAs, 128 rows each."""
    features = Features.of(problem)
    rows = problem.seqlen_q * problem.heads_q
    cut = cut_of(problem.num_splits)
    if rows <= MOST_ROWS:
        one_page = problem.page_size == problem.seqlen_k
        box = box_of(problem.page_size, one_page)
        return mla_decode_few_plan.make_few_plan(
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
