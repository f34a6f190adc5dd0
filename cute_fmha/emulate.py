"""``python -m cute_fmha.emulate``: run CuTe DSL code for Blackwell on this processor, and check it.

TARGET is one of

- ``MODULE:FUNCTION``: a Python function without arguments that runs CuTe DSL code, with CPU
  tensors or tensors "on CUDA" (which are CPU tensors here): it calls compiled kernels or
  ``cute.jit`` functions. If it returns a pair ``(got, expected)`` of tensors, a list of such
  pairs, or a dict ``name -> (got, expected)``, the errors are printed; compute `expected` in FP64.
- ``FILE.py:FUNCTION``: the same, from a file.
- ``FILE.py``: a whole program, run as ``python FILE.py``. What it gets as arguments follows ``--``.

Examples::

    python -m cute_fmha.emulate double.py:check --policy all
    python -m cute_fmha.emulate my_kernels.attention:check --policy random --seed 7 --slice 16
    python -m cute_fmha.emulate fmha.py --trace 0 --out results -- --q_shape 1,256,1,64
    python -m cute_fmha.emulate --kernel prefill --problem b2,sq300,sk512,hq8,hkv2,d128,causal,bf16

The last runs a kernel of this package on random inputs, as ``backend="emulator"`` does, and holds
it against the specification in FP64 at the quality gates. PROBLEM: see the end of this help.

Every kernel that is launched runs on a functional model of an sm_100a GPU. For each launch there
are its shape, the findings (data races, missing fences, uninitialised reads, accesses outside of
tensors, deadlocks ...) with their lines in PTX and Python, counters of what it executed, and a
resource model's cycles and bottleneck, which are a model and never a measurement. What is modelled
and how far it can be trusted: notes/emulator.md.

The exit code is 1 when something was found or the code failed, 2 when it cannot be run at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import math
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cute_fmha.emulate_kernel import KERNELS, Outcome, kernel_target
from cute_fmha.emulator import timeline
from cute_fmha.emulator.build import BuildError
from cute_fmha.emulator.capture import Capture, Launch, Report, execute
from cute_fmha.emulator.device import CaptureError, Device, patched
from cute_fmha.emulator.machine import EmulationError, Policy, Result, UnmodelledError
from cute_fmha.emulator.programs import emulating
from cute_fmha.emulator.report import launch_record, launch_text, short_name
from cute_fmha.problem_text import SYNTAX, ProblemError

POLICIES = ("eager", "lazy", "random")


class CommandError(Exception):
    """The target cannot be run; the text is for the user."""


# ---------------------------------------------------------------- the target


def load_target(target: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """A function that runs the target once."""
    name, _, function = target.rpartition(":")
    if target.endswith(".py") or not name:
        if not target.endswith(".py"):
            raise CommandError(f"{target}: give MODULE:FUNCTION, FILE.py:FUNCTION or FILE.py")
        path = Path(target)
        if not path.is_file():
            raise CommandError(f"{target}: there is no such file")
        return lambda: _run_file(path, arguments)
    if name.endswith(".py"):
        loaded = _import_file(Path(name))
    else:
        sys.path.insert(0, os.getcwd())
        try:
            loaded = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            raise CommandError(f"{target}: there is no module {error.name!r}") from error
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(os.getcwd())
    chosen = getattr(loaded, function, None)
    if not callable(chosen):
        raise CommandError(f"{target}: {name} has no function {function!r}")
    return lambda: _with_arguments(name, arguments, chosen)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file")
    name = f"emulated_{path.stem}"  # not to hide a module of the same name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    with _on_path(path.parent):
        spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _with_arguments(name: str, arguments: Sequence[str], run: Callable[[], Any]) -> Any:
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        return run()
    finally:
        sys.argv = before


def _run_file(path: Path, arguments: Sequence[str]) -> None:
    def run() -> None:
        with _on_path(path.parent):
            runpy.run_path(str(path), run_name="__main__")

    _with_arguments(str(path), arguments, run)


# ---------------------------------------------------------------- comparisons


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A tensor against what was expected of it, computed in FP64."""

    name: str
    cosine: float
    max_abs: float
    rms: float
    expected_rms: float
    finite: bool  # or not finite exactly where expected

    def __str__(self) -> str:
        where = "" if self.finite else "; NOT FINITE, or infinite elsewhere than expected"
        return (
            f"{self.name}: cosine {self.cosine:.9f}, max abs error {self.max_abs:.3g}, RMS error "
            f"{self.rms:.3g} (RMS of expected {self.expected_rms:.3g}){where}"
        )


def compare(name: str, got: torch.Tensor, expected: torch.Tensor) -> Comparison:
    """Errors of `got`; where both are the same infinity or both NaN there is none."""
    if got.shape != expected.shape:
        raise CommandError(
            f"{name}: got has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        )
    x, y = (t.detach().to("cpu", torch.float64).flatten() for t in (got, expected))
    equal = (x == y) | (x.isnan() & y.isnan())
    both = x.isfinite() & y.isfinite()
    finite = bool((equal | both).all())
    x, y = x[both], y[both]
    norms = float(x.norm() * y.norm())
    cosine = float(x @ y) / norms if norms else 1.0 if torch.equal(x, y) else 0.0
    error = (x - y).abs()
    count = max(1, len(error))
    return Comparison(
        name=name,
        cosine=cosine,
        max_abs=float(error.max()) if len(error) else 0.0,
        rms=float(error.norm()) / math.sqrt(count),
        expected_rms=float(y.norm()) / math.sqrt(count),
        finite=finite,
    )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(x, torch.Tensor) for x in value)
    )


def comparisons(returned: Any) -> list[Comparison]:
    """Of what the target returned; other values than pairs of tensors are left alone."""
    if _is_pair(returned):
        returned = {"result": returned}
    elif isinstance(returned, tuple | list) and returned and all(map(_is_pair, returned)):
        returned = {f"result {i}": pair for i, pair in enumerate(returned)}
    if not isinstance(returned, dict):
        return []
    return [compare(str(name), *pair) for name, pair in returned.items() if _is_pair(pair)]


# ---------------------------------------------------------------- progress


class Progress:
    """How far the current launch is, on a terminal's standard error."""

    def __init__(self, show: bool) -> None:
        self.show = show and sys.stderr.isatty()
        self._bar: Any = None
        self._start = 0.0

    def launch(self, captured: Capture) -> None:
        self.close()
        self._start = time.monotonic()
        if not self.show:
            return
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # type: ignore[import-untyped]

            name = captured.function or "kernels"
            self._bar = tqdm(desc=name[:40], unit="CTA", leave=False, file=sys.stderr)

    def tick(self, steps: int, done: int, total: int) -> bool:
        """For the machine: every million warp instructions."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.n = done
            self._bar.set_postfix_str(f"{steps / 1e6:.0f}M warp instructions")
        elif self.show:
            seconds = time.monotonic() - self._start
            text = f"{done} of {total} CTAs, {steps / 1e6:.0f}M warp instructions, {seconds:.0f} s"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
        return False

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self.show and self._start:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- one run


@dataclasses.dataclass
class Run:
    """The target under one policy."""

    policy: Policy
    reports: list[Report]
    errors: list[Comparison]
    note: str = ""  # on the result
    failure: str = ""  # what the target itself raised
    files: list[Path] = dataclasses.field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether there is anything wrong."""
        findings = any(report.findings for report in self.reports)
        return findings or bool(self.failure) or not all(error.finite for error in self.errors)

    def launches(self) -> Iterator[tuple[Report, Launch, Result]]:
        for report in self.reports:
            for launch, result in zip(report.launches, report.results, strict=False):
                yield report, launch, result


class Session:
    """Everything between here and the end of the `with` block believes in the emulated GPU.

    One session serves all policies: code under test is imported once, in it, and keeps what it
    imported from CuTe DSL.
    """

    def __init__(self, device: Device, progress: Progress) -> None:
        self.device, self.progress = device, progress
        self.run = Run(Policy(), [], [])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Cache is disabled as user wants to generate PTX")
            stack.enter_context(emulating(device=self.device, on_capture=self._execute))
            stack.enter_context(patched(*_host_replacements()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _execute(self, captured: Capture) -> None:
        self.progress.launch(captured)
        try:
            policy, tick = self.run.policy, self.progress.tick
            self.run.reports.append(execute(captured, policy, check=False, tick=tick))
        finally:
            self.progress.close()


def _host_replacements() -> list[tuple[Any, str, Any]]:
    """What programs for a GPU do besides launching kernels: time them, and look for a GPU."""

    def benchmark(*args: Any, **kwargs: Any) -> float:
        print("cutlass.testing.benchmark is skipped: nothing is timed here", file=sys.stderr)
        return math.nan

    replacements: list[tuple[Any, str, Any]] = []
    for name in ("cutlass.testing", "cutlass.cute.testing"):
        with contextlib.suppress(ImportError):
            replacements.append((importlib.import_module(name), "benchmark", benchmark))
    with contextlib.suppress(ImportError):
        driver: Any = importlib.import_module("cuda.bindings.driver")
        success = driver.CUresult.CUDA_SUCCESS
        replacements.append((driver, "cuInit", lambda flags: (success,)))
        replacements.append((driver, "cuDeviceGetCount", lambda: (success, 1)))
    return replacements


def run_target(target: Callable[[], Any], policy: Policy, session: Session) -> Run:
    """Run the target with `policy`; what its launches do is in the reports."""
    run = session.run = Run(policy, [], [])
    try:
        returned = target()
        if isinstance(returned, Outcome):
            run.failure, run.note, returned = returned.failure, returned.note, returned.pairs
        run.errors = comparisons(returned)
    except (CommandError, CaptureError, UnmodelledError, BuildError):
        raise
    except SystemExit as error:
        if error.code not in (None, 0):
            run.failure = f"the program exited with {error.code}"
    except Exception as error:
        run.failure = "".join(traceback.format_exception(error)).rstrip()
    return run


def write_timelines(run: Run, folder: Path) -> list[Path]:
    """JSON and PNG of every launch that has the traced CTA."""
    written: list[Path] = []
    for i, (_, launch, result) in enumerate(run.launches()):
        found = timeline.blocks(result)
        if not found:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{i}-{short_name(launch.kernel)}-{run.policy.mode}"
        title = f"{short_name(launch.kernel)}, CTA {run.policy.trace_cta}, {run.policy.mode}"
        written.append(timeline.write_trace(folder / f"{stem}.json", found, title))
        try:
            written.append(timeline.plot(folder / f"{stem}.png", found, title=title))
        except ImportError as error:
            print(error, file=sys.stderr)
    return written


# ---------------------------------------------------------------- reports


def run_text(run: Run, tiles: float | None) -> str:
    policy = run.policy
    seed = f", seed {policy.seed}" if policy.mode == "random" else ""
    launches = list(run.launches())
    steps = sum(result.counters.steps for _, _, result in launches)
    seconds = sum(report.seconds for report in run.reports)
    speed = f", {steps / seconds / 1e6:.1f} million a second" if seconds else ""
    lines = [
        f"policy {policy.mode}{seed}, slice {policy.slice}: {len(launches)} launches, {steps:,} "
        f"warp instructions in {seconds:.2f} s{speed}"
    ]
    for report, launch, result in launches:
        lines += launch_text(report, launch, result, tiles)
    lines += [f"error against expected: {error}" for error in run.errors]
    lines += [run.note] if run.note else []
    lines += [f"written: {path}" for path in run.files]
    if run.failure:
        lines += ["the code itself failed:", run.failure]
    return "\n".join(lines)


def run_record(run: Run, tiles: float | None) -> dict[str, Any]:
    return {
        "policy": dataclasses.asdict(run.policy),
        "found": run.found,
        "launches": [launch_record(*launch, tiles) for launch in run.launches()],
        "errors": [dataclasses.asdict(error) for error in run.errors],
        "note": run.note,
        "failure": run.failure,
        "files": [str(path) for path in run.files],
    }


# ---------------------------------------------------------------- command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: an integer >= 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.emulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=SYNTAX,
    )
    add = parser.add_argument
    add("target", metavar="TARGET", nargs="?", help="MODULE:FUNCTION, FILE.py:FUNCTION or FILE.py")
    add("--kernel", choices=KERNELS, help="a kernel of this package, in place of TARGET")
    add("--problem", metavar="PROBLEM", help="what --kernel runs, as below")
    add(
        "--policy",
        action="append",
        choices=(*POLICIES, "all"),
        help="when asynchronous operations complete; may be repeated (default: eager)",
    )
    add("--seed", type=int, default=0, help="of the random policy, and of --kernel's inputs")
    add(
        "--slice",
        type=_positive,
        default=256,
        help="warp instructions before another warp gets a turn (default: %(default)s)",
    )
    add("--resident", type=_positive, default=4, help="CTAs on the GPU at a time (default: 4)")
    add("--arch", default="sm_100a", help="what to compile for (default: %(default)s)")
    add("--sms", type=_positive, default=148, help="of the emulated GPU (default: %(default)s)")
    add(
        "--strict-tmem-load",
        action="store_true",
        help="what tcgen05.ld loads is undefined before tcgen05.wait::ld, as the ISA has it "
        "(always with --kernel)",
    )
    add(
        "--strict-cp-async",
        action="store_true",
        help="the tensor core may read what cp.async wrote only after a proxy fence, likewise",
    )
    add(
        "--benign-races",
        action="store_true",
        help="unordered writes of equal bytes are findings, not notes",
    )
    add("--no-races", action="store_true", help="no race detection: faster, finds less")
    add("--tiles", type=float, help="KV tiles of a CTA: the model also gives cycles per tile")
    add("--trace", type=int, metavar="CTA", help="write this CTA's timeline")
    add("--out", type=Path, default=Path("results"), help="folder of timelines (default: results)")
    add("--json", action="store_true", help="print one JSON document instead of text")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _policies(options: argparse.Namespace) -> list[Policy]:
    chosen = options.policy or ["eager"]
    modes = POLICIES if "all" in chosen else tuple(dict.fromkeys(chosen))
    return [
        Policy(
            mode,
            seed=options.seed,
            slice=options.slice,
            resident=options.resident,
            strict_tmem_load=options.strict_tmem_load or options.kernel is not None,
            strict_cp_async=options.strict_cp_async,
            benign_races=options.benign_races,
            races=not options.no_races,
            trace_cta=options.trace,
        )
        for mode in modes
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = given, []
    if "--" in given:
        own, rest = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = make_parser()
    options = parser.parse_args(own)
    if (options.target is None) == (options.kernel is None):
        parser.error("give TARGET or --kernel")
    if (options.problem is None) != (options.kernel is None):
        parser.error("--kernel and --problem go together")
    quiet = options.json or options.quiet
    if not quiet:  # a kernel that has to be compiled first says so
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("cute_fmha").setLevel(logging.INFO)
    progress, device = Progress(not quiet), Device(arch=options.arch, sms=options.sms)
    runs = []
    try:
        with Session(device, progress) as session:
            if options.kernel is not None:
                target = kernel_target(options.kernel, options.problem, device, options.seed)
            else:
                target = load_target(options.target, rest)
            for policy in _policies(options):
                run = run_target(target, policy, session)
                if options.trace is not None:
                    run.files = write_timelines(run, options.out)
                if not run.reports and not run.failure:
                    raise CommandError(f"{options.target} ran and launched no CuTe DSL kernel")
                runs.append(run)
                if not options.json:
                    print(run_text(run, options.tiles) + "\n", flush=True)
    except (
        CommandError, ProblemError, NotImplementedError, CaptureError, EmulationError, BuildError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = any(run.found for run in runs)
    if options.json:
        record = {"found": found, "runs": [run_record(run, options.tiles) for run in runs]}
        print(json.dumps(record, indent=1, default=str))
    else:
        print("something was found" if found else "nothing was found")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
