"""What skip-softmax costs and gains in the Blackwell kernels, by the emulator's model.

``python -m cute_fmha.bench.skipping`` runs one problem per head dim (or those named) without
skip-softmax, with it where every KV tile counts, and where a chosen share of them does not, and
prints modelled cycles, which are a model and never a measurement::

    python -m cute_fmha.bench.skipping
    python -m cute_fmha.bench.skipping sq256,sk3072,d128 --skipped 0.5 --pattern spread apart

The inputs are made so: of every block of query rows that decides together, a pattern says which KV
tiles it can do without. ``last``: the last ones. ``spread``: evenly between those that it needs.
``apart``: likewise, but every other block needs other tiles, as far from its neighbour's as can be.
The first tile is always needed, and every decision has a wide margin; the skip counters are held
against the specification's replay, and a difference ends the command with exit status 1.

Columns: *cycles* of the slowest CTA's timeline, in which shared memory does not compete, and how
many more, or the gain; *tensor core*, how much of these cycles it works; *bound*, the unit that
needs the most cycles, how many, and the most that can be gained for it (a launch takes its timeline
or its bound, whichever is longer); then warp instructions of each role per pair of query block and
KV tile, without register moves. *By products* is the gain at which Q Kᵀ, which no decision saves,
leaves the tensor core: (D + Dv) / (D + (1 − share) Dv). Below are the cycles of every unit at the
very share that was asked for, and the most that can be gained then: a KV tile costs what one does
on average of the launch where none is skipped, a skipped one what is left of the first pattern's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cute_fmha.emulator import Policy, model
from cute_fmha.emulator.backend import emulated_calls, target
from cute_fmha.emulator.binding import CLASSES
from cute_fmha.emulator.device import Device
from cute_fmha.emulator.machine import Counters
from cute_fmha.kernels.blackwell import launch, prefill_host
from cute_fmha.kernels.blackwell.plan import HEAD_DIMS, Plan
from cute_fmha.problem import SkipSoftmax
from cute_fmha.problem_text import ProblemError, ProblemText, parse
from cute_fmha.stats import SkipStats
from cute_fmha.testing import AttentionCase, Heads, Source, Tiles, dense_case
from cute_fmha.tiling import ceil_div

PATTERNS = ("last", "spread", "apart")
PROBLEMS = tuple(f"sq256,sk3072,d{dims[0]}" for dims in HEAD_DIMS)
ROLES = ("softmax", "correction", "mma", "load", "load_values")
GAP = 12.0
"""Scores of a tile that can be left out are lower by so much; λ lies in the middle."""


def pattern(kind: str, blocks: int, tiles: int, skipped: float) -> torch.Tensor:
    """bool [blocks, tiles]: which KV tiles each block of query rows can do without, of all about
    the share ``skipped``; never the first."""
    kept = min(tiles, max(1, tiles - round(skipped * tiles)))
    low = torch.ones(blocks, tiles, dtype=torch.bool)
    for block in range(blocks):
        places = [i if kind == "last" else i * tiles // kept for i in range(kept)]
        if kind == "apart" and block % 2:
            places[1:] = [min(tiles - 1, place + tiles // kept // 2) for place in places[1:]]
        low[block, places] = False
    return low


def skip_case(
    problem: ProblemText, tiles: Tiles, low: torch.Tensor, seed: int = 0
) -> AttentionCase:
    """Inputs in which every block of ``tiles.tile_m`` rows can do without the KV tiles ``low``.

    A block has a direction in head space of its own; along it keys of such a tile score −GAP."""
    heads = Heads(problem.heads_q, problem.heads_kv, problem.head_dim, problem.head_dim_v)
    source = Source(problem.dtype, seed=seed, std=0.5)
    case = dense_case(problem.batch, problem.seqlen_q, problem.seqlen_k, heads, source=source)
    rows = torch.arange(problem.seqlen_q) // tiles.tile_m
    keys = torch.arange(problem.seqlen_k) // tiles.tile_n
    q, k = case.q.float(), case.k.float()
    q[:, torch.arange(problem.seqlen_q), :, rows] += math.sqrt(problem.head_dim)
    k[..., : len(low)] -= GAP * low.T[keys].float()[None, :, None, :]
    return replace(case, q=q.to(problem.dtype), k=k.to(problem.dtype))


@dataclass(frozen=True)
class Run:
    """One launch: what was executed, and the skip counters beside the specification's."""

    counters: Counters
    ctas: int
    counts: tuple[int, int]
    expected: tuple[int, int]


def run(problem: ProblemText, case: AttentionCase, skip: SkipSoftmax | None) -> Run:
    """``case`` in the emulator, with counters."""
    _, tiles = planned(problem, skip is not None)
    stats = SkipStats("cpu")
    with emulated_calls(Policy("eager", races=False)) as reports:
        case.run(backend="emulator", skip=skip, stats=stats)
    expected = case.oracle(tiles, skip)
    (launched,), (result,) = reports[0].launches, reports[0].results
    return Run(
        result.counters, math.prod(launched.grid), stats.read(), (expected.skipped, expected.total)
    )


def planned(problem: ProblemText, skip: bool) -> tuple[Plan, Tiles]:
    """The prefill plan, and the tiles that it counts or decides on.

    Raises:
        NotImplementedError: the prefill kernel does not run it, or patterns do not fit into it.
    """
    chosen = replace(problem, skip=0.0 if skip else None, stats=True).problem
    if launch.choose(chosen, target(Device())).NAME != prefill_host.NAME:
        raise NotImplementedError(f"{problem.text} is not run by the prefill kernel")
    plan = prefill_host.plan_of(chosen)
    features = plan.features
    if features.window_left or features.window_right or features.block_mask or features.packed:
        raise NotImplementedError(f"{problem.text}: patterns are of dense problems without a mask")
    if skip and plan.pack > 1:
        raise NotImplementedError(f"{problem.text}: patterns are of rows that are positions")
    tiles = Tiles(**prefill_host.skip_tiles(plan))
    if ceil_div(problem.seqlen_q, tiles.tile_m) > problem.head_dim // 2:
        raise NotImplementedError(f"{problem.text}: too many query rows for a pattern")
    return plan, tiles


def row(name: str, run: Run, without: Run, plan: Plan) -> str:
    """A line of the table."""
    pairs = run.counts[1]
    cycles = run.counters.cycles
    bound, before = (model.estimate(r.counters, r.ctas) for r in (run, without))
    most = max(without.counters.cycles, before.bound) / bound.bound
    classes = [i for i, kind in enumerate(CLASSES) if kind != "move"]
    by_warp = run.counters.by_warp[:, classes].sum(1)
    gain = without.counters.cycles / cycles
    change = f"{100 / gain - 100:+.2f} %" if run.counts[0] == 0 else f"{gain:.2f}×"
    cells = [
        name, f"{run.counts[0]} of {run.counts[1]}", f"{cycles:,.0f}", change,
        f"{100 * bound.cycles['tensor core'] / cycles:.0f} %",
        f"{bound.bottleneck}, {bound.bound:,.0f}, {most:.2f}×",
        *(f"{sum(by_warp[warp] for warp in plan.role(role).warps) / pairs:.0f}" for role in ROLES),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def limits(share: float, without: Run, none: Run, some: Run) -> str:
    """Cycles of every unit where ``share`` of the KV tiles are skipped; ``none`` and ``some``: of
    the same problem. The longest is the most that can be gained."""
    before, all_kept, left = (
        model.estimate(done.counters, done.ctas) for done in (without, none, some)
    )
    weight = share * some.counts[1] / some.counts[0]
    cycles = {
        unit: kept + weight * (left.cycles[unit] - kept) for unit, kept in all_kept.cycles.items()
    }
    most = max(without.counters.cycles, before.bound) / max(cycles.values())
    parts = ", ".join(
        f"{unit} {cycles[unit]:,.0f}" for unit in sorted(cycles, key=lambda unit: -cycles[unit])
    )
    return f"At a share of {share:.2f}: {parts}; at most {most:.2f}×"


def show(problem: ProblemText, kinds: Sequence[str], skipped: float) -> bool:
    """Print the table of ``problem``; whether all counters are the specification's."""
    plan, tiles = planned(problem, True)
    blocks = ceil_div(problem.seqlen_q, tiles.tile_m)
    count = ceil_div(problem.seqlen_k, tiles.tile_n)
    wide, wide_v = problem.head_dim, problem.head_dim_v
    print(f"\n{problem.text}: {blocks} blocks of {tiles.tile_m} query rows, {count} KV tiles\n")
    print("| | skipped | cycles | | tensor core | bound |", " | ".join(ROLES), "|")
    print(f"| --- |{' --- |' * (5 + len(ROLES))}", flush=True)
    dense = skip_case(problem, tiles, pattern("last", blocks, count, 0.0))
    without = run(problem, dense, None)
    runs = [("without", without), ("nothing skipped", run(problem, dense, SkipSoftmax(1e-30)))]
    for kind in kinds:
        low = pattern(kind, blocks, count, skipped)
        most = (wide + wide_v) / (wide + (1 - float(low.double().mean())) * wide_v)
        case = skip_case(problem, tiles, low)
        done = run(problem, case, SkipSoftmax(math.exp(-GAP / 2)))
        runs.append((f"{kind} (by products {most:.2f}×)", done))
    for name, done in runs:
        print(row(name, done, without, plan), flush=True)
    if runs[2][1].counts[0]:
        print("\n" + limits(skipped, without, runs[1][1], runs[2][1]))
    wrong = [done for _, done in runs if done.counts != done.expected]
    for done in wrong:
        print(f"counters {done.counts}, the specification has {done.expected}")
    return not wrong


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number in [0, 1)")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.bench.skipping",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("problems", metavar="PROBLEM", nargs="*", default=PROBLEMS,
        help="as in `python -m cute_fmha.emulate --help` (default: 256 queries, 3072 keys, every "
        "head dim)")  # fmt: skip
    add("--skipped", type=_share, default=0.71, help="share of KV tiles (default: %(default)s)")
    add("--pattern", choices=PATTERNS, nargs="+", default=("last", "spread"),
        help="which tiles (default: last spread)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        problems = [parse(text) for text in options.problems]
        right = [show(problem, options.pattern, options.skipped) for problem in problems]
    except (ProblemError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
