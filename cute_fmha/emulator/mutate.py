"""Mutation tests: does the machine notice when one synchronisation or number is wrong?

A mutant is a captured kernel with one instruction altered: an arrival, commit, fence, barrier or
wait left out; a byte count, arrival count, parity, descriptor field, coordinate, address, offset or
loop step changed. A mutant runs under several policies, until one of them notices::

    report = run_mutants(captured)
    print(report)

Mutants are made in the decoded program, so the kernel is parsed and assembled once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .binding import engine_functions
from .machine import Machine, Policy, Program, Region, Result, load, pack_arguments
from .mutants import WATCH, Mutant, Patch, mutants
from .ptx import Instruction

if TYPE_CHECKING:
    from .capture import Capture

__all__ = ["POLICIES", "Mutant", "MutationReport", "Outcome", "mutants", "run_mutants"]

POLICIES: dict[str, Policy] = {
    "eager": Policy("eager"),
    "lazy": Policy("lazy"),
    "random 1": Policy("random", seed=1, slice=64),
    "random 2": Policy("random", seed=2, slice=16),
    "random 3": Policy("random", seed=3, slice=256),
    "strict": Policy("lazy", strict_tmem_load=True),
}
# For kernels that have all fences of tcgen05.
STRICT_POLICIES: dict[str, Policy] = {
    name: dataclasses.replace(policy, strict_tmem_load=True, strict_tcgen05_fence=True)
    for name, policy in POLICIES.items()
    if name != "strict"
}


# ---------------------------------------------------------------- an altered program


def _orders(instruction: Instruction) -> bool:
    """Whether it may tell its warp something, so that it can be watched for telling nothing."""
    parts = instruction.name.split(".")
    if parts[0] == "mbarrier":
        return parts[1] in ("try_wait", "test_wait")
    if parts[0] in ("bar", "barrier"):
        return "warp" not in parts and ("sync" in parts or "wait" in parts or "red" in parts)
    if parts[0] == "tcgen05":
        return parts[1].startswith(("wait::", "fence::"))
    return "wait_group" in instruction.name


class _Patched:
    """A program with one instruction altered, while the block runs."""

    def __init__(self, program: Program, pc: int, patch: Patch) -> None:
        self.program, self.pc, self.patch = program, pc, patch
        self.executions = self.blocked = self.idle = 0

    def __enter__(self) -> _Patched:
        patch, why = self.patch, ctypes.create_string_buffer(256)
        path = (ctypes.c_int * 3)(*patch.operand)
        self._handle = engine_functions().patch_new(
            self.program._handle,
            self.pc,
            patch.kind,
            ctypes.addressof(path),
            len(patch.operand),
            patch.value if patch.value < 1 << 63 else patch.value - (1 << 64),
            patch.name.encode(),
            ctypes.cast(why, ctypes.c_char_p),
            len(why),
        )
        if not self._handle:
            raise ValueError(why.value.decode(errors="replace") or "the patch was refused")
        return self

    def __exit__(self, *_: object) -> None:
        counts = (ctypes.c_uint64 * 3)()
        engine = engine_functions()
        engine.patch_counts(self._handle, ctypes.addressof(counts))
        self.executions, self.blocked, self.idle = counts
        engine.patch_free(self.program._handle, self._handle)


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Wait:
    """A wait or tcgen05.fence of the unaltered kernel, over all policies.

    `idle`: executions after which the warp's vector clock said nothing new about any other agent:
    all that the wait waits for was known to have happened already, from other synchronisation. Of
    a fence: there was nothing that it ordered.
    """

    executions: int
    blocked: int
    idle: int

    @property
    def redundant(self) -> bool:
        return self.executions > 0 and self.idle == self.executions and not self.blocked


@dataclass(frozen=True)
class Outcome:
    """`verdict`: caught, missed, redundant (a missed wait that never told anything), not executed,
    refused (the altered instruction does not decode). `how`: numbers, deadlock, endless loop, or
    the kind of the first finding; `policy`: the one that noticed."""

    mutant: Mutant
    verdict: str
    how: str = ""
    policy: str = ""
    text: str = ""
    executions: int = 0
    numbers: bool | None = None  # whether results were wrong under any policy, if that was tried


@dataclass
class _Runs:
    """Launches of one capture, again and again on the same memory."""

    captured: Capture
    kernel: str
    program: Program = field(init=False)

    def __post_init__(self) -> None:
        self.programs = {
            launch.kernel: load(self.captured.ptx, launch.kernel)
            for launch in self.captured.launches
        }
        if self.kernel not in self.programs:
            raise ValueError(f"{self.kernel!r} is not among {', '.join(self.programs)}")
        self.program = self.programs[self.kernel]
        self.regions = [Region(m.address, m.bytes, m.name) for m in self.captured.memory]
        self.initial = self.original = self.contents()

    def poison_outputs(self) -> None:
        """Fill what the kernels overwrite, so that a store that is not made shows in the results.

        A region is overwritten where its contents come out the same from other initial contents.
        """
        policy = Policy("eager", races=False)
        steps = sum(result.counters.steps for result in self.run(policy))
        right = self.contents()
        bounded = dataclasses.replace(policy, max_steps=4 * steps + 200_000)
        original = self.initial
        outputs = list(original)
        for i, region in enumerate(self.regions):
            self.initial = list(original)
            self.initial[i] = b"\xff" * region.bytes
            results = self.run(bounded)
            found = self.contents()
            if any(result.findings for result in results):
                continue
            if any(found[k] != right[k] for k in range(len(right)) if k != i):
                continue
            same = np.frombuffer(found[i], np.uint8) == np.frombuffer(right[i], np.uint8)
            bytes_before = np.frombuffer(original[i], np.uint8)
            outputs[i] = np.where(same, np.uint8(0xFF), bytes_before).tobytes()
        self.initial, self.original = outputs, original

    def put_back(self) -> None:
        self.initial = self.original
        self.restore()

    def contents(self) -> list[bytes]:
        return [ctypes.string_at(region.address, region.bytes) for region in self.regions]

    def restore(self) -> None:
        for region, data in zip(self.regions, self.initial, strict=True):
            ctypes.memmove(region.address, data, region.bytes)

    def run(self, policy: Policy) -> list[Result]:
        self.restore()
        machine = Machine(self.regions, policy)
        for program in self.programs.values():
            program.reset_globals()
        results = []
        for launch in self.captured.launches:
            program = self.programs[launch.kernel]
            params, _ = pack_arguments(program, launch.parameters)
            result = machine.launch(
                program, params, launch.grid, launch.block, launch.cluster, launch.dynamic_shared
            )
            results.append(result)
            if any(finding.fatal for finding in result.findings):
                break
            if policy.stop_at_finding and result.findings:
                break
        return results


@dataclass
class _Baseline:
    policy: Policy
    known: frozenset[tuple[str, str, int | None]]
    memory: list[bytes]
    executed: Any


_Key = tuple[str, str, int | None]


def _keys(results: Sequence[Result]) -> list[tuple[_Key, str]]:
    keys = []
    for result in results:
        for finding in result.findings:
            how = finding.kind
            if how == "other" and finding.text.startswith("stopped after"):
                how = "endless loop"
            keys.append(((result.program.name, how, finding.pc), str(finding)))
    return keys


def _measure(runs: _Runs, policy: Policy) -> _Baseline:
    results = runs.run(policy)
    findings = _keys(results)
    fatal = [f for result in results for f in result.findings if f.fatal]
    if fatal:
        raise ValueError(f"the unaltered kernel does not run: {fatal[0]}")
    steps = max(result.counters.steps for result in results)
    own = next(result for result in results if result.program is runs.program)
    bounded = dataclasses.replace(
        policy, max_steps=4 * steps + 200_000, stop_at_finding=not findings
    )
    return _Baseline(
        bounded,
        frozenset(key for key, _ in findings),
        runs.contents(),
        own.executed.sum(axis=0),
    )


def _watch_waits(runs: _Runs, baselines: Mapping[str, _Baseline]) -> dict[int, Wait]:
    """Every wait of the unaltered kernel under every policy."""
    patches = [
        _Patched(runs.program, pc, Patch(WATCH))
        for pc, instruction in enumerate(runs.program.kernel.instructions)
        if _orders(instruction)
    ]
    entered: list[_Patched] = []
    try:
        for patch in patches:
            entered.append(patch.__enter__())
        for baseline in baselines.values():
            runs.run(dataclasses.replace(baseline.policy, races=True, stop_at_finding=False))
    finally:
        for patch in reversed(entered):
            patch.__exit__()
    return {patch.pc: Wait(patch.executions, patch.blocked, patch.idle) for patch in entered}


Check = Callable[[], bool]


def _notice(
    runs: _Runs, baseline: _Baseline, check: Check | None, numbers_only: bool = False
) -> tuple[str, str] | None:
    """How one run of an altered program differs from the baseline."""
    if not numbers_only:
        for key, text in _keys(runs.run(baseline.policy)):
            if key not in baseline.known:
                return key[1], text
    else:
        runs.run(dataclasses.replace(baseline.policy, stop_at_finding=False))
    right = check() if check else runs.contents() == baseline.memory
    return None if right else ("numbers", "the results are wrong")


def _try(
    runs: _Runs,
    mutant: Mutant,
    baselines: Mapping[str, _Baseline],
    waits: Mapping[int, Wait],
    check: Check | None,
    numbers: bool,
) -> Outcome:
    if not any(baseline.executed[mutant.pc] for baseline in baselines.values()):
        return Outcome(mutant, "not executed")
    outcome = Outcome(mutant, "missed")
    try:
        with _Patched(runs.program, mutant.pc, mutant.patch) as patched:
            for name, baseline in baselines.items():
                noticed = _notice(runs, baseline, check)
                if noticed:
                    how, text = noticed
                    outcome = Outcome(mutant, "caught", how, name, text)
                    break
            wrong = None
            if numbers:
                tried = (_notice(runs, baseline, check, True) for baseline in baselines.values())
                wrong = any(tried)
    except ValueError as error:
        return Outcome(mutant, "refused", text=str(error))
    outcome = dataclasses.replace(outcome, executions=patched.executions, numbers=wrong)
    if outcome.verdict == "missed":
        if not patched.executions:
            return dataclasses.replace(outcome, verdict="not executed")
        wait = waits.get(mutant.pc)
        if mutant.order and wait and wait.redundant:
            return dataclasses.replace(outcome, verdict="redundant")
    return outcome


def run_mutants(
    captured: Capture,
    kernel: str | None = None,
    policies: Mapping[str, Policy] | None = None,
    check: Check | None = None,
    chosen: Collection[Mutant] | Callable[[Mutant], bool] | None = None,
    numbers: bool = False,
    progress: Callable[[int, int, Outcome], Any] | None = None,
) -> MutationReport:
    """Run mutants of one kernel of a capture; the others of its launches run unaltered.

    `check` looks at the results in memory and says whether they are right; without it they must
    equal those of the unaltered kernel, byte by byte. What the unaltered kernel is reported for is
    no catch. `numbers`: find out, of every mutant, whether results were wrong, too (slower).
    """
    start = time.perf_counter()
    names = list(dict.fromkeys(launch.kernel for launch in captured.launches))
    if kernel is None:
        if len(names) != 1:
            raise ValueError(f"the capture has the kernels {', '.join(names)}: name one")
        kernel = names[0]
    runs = _Runs(captured, kernel)
    try:
        runs.poison_outputs()
        baselines = {n: _measure(runs, p) for n, p in (policies or POLICIES).items()}
        memories = [baseline.memory for baseline in baselines.values()]
        if check is None and any(memory != memories[0] for memory in memories):
            raise ValueError("the results depend on timing: give a check")
        waits = _watch_waits(runs, baselines)
        every = mutants(runs.program)
        if callable(chosen):
            every = [mutant for mutant in every if chosen(mutant)]
        elif chosen is not None:
            every = [mutant for mutant in every if mutant in chosen]
        outcomes = []
        for i, mutant in enumerate(every):
            outcomes.append(_try(runs, mutant, baselines, waits, check, numbers))
            if progress:
                progress(i + 1, len(every), outcomes[-1])
    finally:
        runs.put_back()
    known = {name: len(baseline.known) for name, baseline in baselines.items()}
    return MutationReport(kernel, outcomes, waits, known, time.perf_counter() - start)


# ---------------------------------------------------------------- reports


@dataclass
class MutationReport:
    """What became of the mutants of one kernel."""

    kernel: str
    outcomes: list[Outcome]
    waits: dict[int, Wait]
    known: dict[str, int]  # findings of the unaltered kernel by policy
    seconds: float

    def of(self, verdict: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict == verdict]

    @property
    def missed_order(self) -> list[Outcome]:
        """Ordering that was taken away, was executed, and nobody noticed; not redundant waits."""
        return [outcome for outcome in self.of("missed") if outcome.mutant.order]

    def table(self) -> str:
        """A line for every class of mutants."""
        rows: list[tuple[str, ...]] = [
            ("class", "all", "caught", "redundant", "missed", "not run", "refused", "caught by")
        ]
        groups = list(dict.fromkeys(outcome.mutant.group for outcome in self.outcomes))
        groups.sort(
            key=lambda g: not any(o.mutant.order for o in self.outcomes if o.mutant.group == g)
        )
        for group in [*groups, ""]:
            some = [o for o in self.outcomes if not group or o.mutant.group == group]
            verdicts = Counter(outcome.verdict for outcome in some)
            hows = Counter(outcome.how for outcome in some if outcome.how)
            rows.append(
                (
                    group or "all",
                    str(len(some)),
                    *(
                        str(verdicts[verdict] or "")
                        for verdict in ("caught", "redundant", "missed", "not executed", "refused")
                    ),
                    ", ".join(f"{how} {n}" for how, n in hows.most_common()),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for i, row in enumerate(rows):
            cells = [
                cell.rjust(width) if 0 < k < len(row) - 1 else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("| " + " | ".join(cells) + " |")
            if not i:
                rule = ("-" * (w - 1) + ":" if 0 < k < 7 else "-" * w for k, w in enumerate(widths))
                lines.append("| " + " | ".join(rule) + " |")
        return "\n".join(lines)

    def _line(self, outcome: Outcome) -> str:
        line = f"- {outcome.mutant.group} {outcome.mutant}"
        wait = self.waits.get(outcome.mutant.pc)
        if wait and outcome.mutant.order:
            line += (
                f"\n  unaltered: {wait.executions} executions, told nothing new in {wait.idle}, "
                f"blocked {wait.blocked} times"
            )
        return line

    def __str__(self) -> str:
        steps = [f"kernel {self.kernel}: {len(self.outcomes)} mutants in {self.seconds:.1f} s"]
        known = {name: count for name, count in self.known.items() if count}
        if known:
            steps.append(f"findings of the unaltered kernel, not counted: {known}")
        steps += ["", self.table()]
        for title, some in (
            ("Missed ordering", self.missed_order),
            ("Redundant waits and fences", self.of("redundant")),
            ("Missed numbers", [o for o in self.of("missed") if not o.mutant.order]),
        ):
            if some:
                steps += ["", f"{title}:"] + [self._line(outcome) for outcome in some]
        return "\n".join(steps)

    def json(self) -> str:
        """Everything, for other programs."""
        outcomes = []
        for outcome in self.outcomes:
            mutant, wait = outcome.mutant, self.waits.get(outcome.mutant.pc)
            entry = {
                "group": mutant.group, "change": mutant.change, "pc": mutant.pc,
                "line": mutant.line, "ptx": mutant.text, "source": list(mutant.source),
                "order": mutant.order, "verdict": outcome.verdict, "how": outcome.how,
                "policy": outcome.policy, "text": outcome.text,
                "executions": outcome.executions, "numbers": outcome.numbers,
            }  # fmt: skip
            if wait:
                entry["wait"] = dataclasses.asdict(wait)
            outcomes.append(entry)
        return json.dumps(
            {
                "kernel": self.kernel,
                "seconds": self.seconds,
                "known": self.known,
                "outcomes": outcomes,
            },
            indent=1,
        )
