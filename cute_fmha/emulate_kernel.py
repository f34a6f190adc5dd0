"""``python -m cute_fmha.emulate --kernel NAME --problem PROBLEM``: a kernel of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cute_fmha.emulator import backend
from cute_fmha.emulator.device import Device
from cute_fmha.kernels.blackwell import launch
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.mla_plan import automatic_cuts
from cute_fmha.problem_text import ProblemText, parse
from cute_fmha.stats import SkipStats
from cute_fmha.testing import AttentionCase, MlaCase, Tiles, check

KERNELS = tuple(host.NAME for host in launch.KERNELS)


@dataclass(frozen=True)
class Outcome:
    """What one run gave: (got, expected in FP64) by name, and which quality gate was missed.

    ``note``: its skip counters.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    note: str
    failure: str


def kernel_target(kernel: str, text: str, device: Device, seed: int) -> Callable[[], Outcome]:
    """A function that runs ``kernel`` on random inputs of the problem that ``text`` names.

    Raises:
        ProblemError: ``text`` is no problem.
        NotImplementedError: this kernel does not run it.
    """
    problem = parse(text)
    if problem.epilogue:
        raise NotImplementedError(f"--kernel compares floating-point outputs, not {problem.op.key}")
    target = backend.target(device)
    host = launch.choose(problem.problem, target)
    if kernel != host.NAME:
        raise NotImplementedError(f"{text} is run by the kernel {host.NAME!r}, not by {kernel!r}")
    plan = host.plan_of(problem.problem)
    case = problem.case(seed)
    tiles = Tiles(**host.skip_tiles(plan), num_splits=max(1, problem.num_splits))
    if isinstance(case, MlaCase) and plan.cut is Cut.SHARE:
        shape, lengths = (problem.seqlen_q, problem.heads_q), case.cache_seqlens.tolist()
        window = (problem.problem.window_left, problem.problem.window_right)
        cuts = automatic_cuts(plan, shape, window, lengths, target.num_sms)
        tiles = replace(tiles, cuts=cuts)
    elif problem.skip is not None and getattr(plan, "cut", None) is Cut.SHARE:
        raise NotImplementedError(
            f"{text}: automatic splits cut, and so skip, in other places for every KV head; "
            "name their number, as in splits1"
        )
    return lambda: _run(problem, case, tiles)


def _run(problem: ProblemText, case: AttentionCase | MlaCase, tiles: Tiles) -> Outcome:
    skip = problem.skip_softmax
    stats = SkipStats("cpu") if problem.stats else None
    options = {"return_max_logits": True} if problem.logits else {}
    more: list[torch.Tensor]
    out, lse, *more = case.run(
        skip=skip, stats=stats, epilogue=problem.op, num_splits=problem.num_splits or None,
        backend="emulator", **options,
    )  # fmt: skip
    expected = case.oracle(tiles, skip)
    pairs = {"output": (out, expected.out), "LSE": (lse, expected.lse)}
    if problem.logits:
        pairs["largest logits"] = (more[0], expected.max_logits)
    note = failure = ""
    if stats is not None:
        counts, wanted = stats.read(), (expected.skipped, expected.total)
        note = f"KV tiles (skipped, all): {counts}, expected {wanted}"
        if counts != wanted:
            failure = "the skip counters are wrong"
    try:
        check(case, out, lse, tiles, skip)
    except AssertionError as error:
        failure = f"a quality gate is missed: {error}"
    return Outcome(pairs, note, failure)
