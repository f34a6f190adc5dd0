"""Runs all cases on a Hopper GPU and writes what came out: python tests/silicon/record.py FOLDER

Needs NumPy and the CUDA driver. Writes silicon_h200.npz, which belongs beside this file, and
silicon_failures.txt. --emulator: in the emulator instead, to try the program itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cpu/emulator"), str(ROOT)]

from silicon import archive  # noqa: E402
from silicon.cases import cases as all_cases  # noqa: E402
from silicon.cases import encodings  # noqa: E402
from silicon.cases import failing as all_failing  # noqa: E402
from silicon.model import Case, Map, Outcome, batches  # noqa: E402

PATIENCE = 150.0  # seconds without any news from a process
STARTS = 60  # of processes for one batch
FAILING = "failing"  # the group of kernels whose error is the result


class EmulatorRunner:
    """In the place of driver.Runner."""

    def about(self) -> dict[str, Any]:
        return {"device": "emulator", "driver": 0, "capability": ""}

    def prepare(self, batch: Sequence[Case]) -> str:
        return ""

    def run(self, case: Case) -> Outcome:
        from silicon import replay

        return replay.run(case)

    def encode(self, maps: Sequence[Map]) -> list[tuple[bytes, str]]:
        from silicon import replay

        return [(replay.encode(m, m.buffer.data), "") for m in maps]


def new_runner(emulator: bool) -> Any:
    if emulator:
        return EmulatorRunner()
    from silicon import driver

    return driver.Runner()


def work(batch: Sequence[Case], send: Connection, emulator: bool) -> None:
    """A process: tells the number of the case that it begins, then the outcome."""
    try:
        runner = new_runner(emulator)
        complaint = runner.prepare(batch)
        if complaint:
            send.send(("note", f"compiled one by one: {complaint}"))
    except BaseException as error:
        send.send(("note", f"no start: {error!r}"))
        os._exit(4)
    for i, case in enumerate(batch):
        send.send(("begin", i))
        try:
            outcome = runner.run(case)
        except BaseException as error:
            outcome = Outcome(error=f"{type(error).__name__}: {error}")
            send.send(("end", i, outcome))
            if getattr(error, "sticky", True):
                os._exit(3)  # the context is lost: the rest runs in a new process
            continue
        send.send(("end", i, outcome))
    send.send(("finished",))
    send.close()
    os._exit(0)


def describe(runner: Any, send: Connection, maps: Sequence[Map]) -> None:
    send.send((runner.about(), runner.encode(maps)))


def _encode(send: Connection, emulator: bool, maps: Sequence[Map]) -> None:
    try:
        describe(new_runner(emulator), send, maps)
    except BaseException as error:
        send.send(({"error": repr(error)}, []))
    send.close()
    os._exit(0)


@dataclass
class Job:
    """A batch and the process that runs what is left of it."""

    batch: list[Case]
    process: Any = None
    receive: Connection | None = None
    current: int | None = None
    heard: float = 0.0
    starts: int = 0
    done: bool = False
    last: bool = False  # one case, alone on the GPU: its error counts


@dataclass
class Recorder:
    emulator: bool
    workers: int
    until: float = float("inf")
    record: archive.Record = field(default_factory=archive.Record)
    failures: list[str] = field(default_factory=list)
    again: list[Case] = field(default_factory=list)

    def start(self, job: Job) -> None:
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        job.process = context.Process(target=work, args=(job.batch, send, self.emulator))
        job.process.start()
        send.close()
        job.receive, job.current, job.heard = receive, None, time.monotonic()
        job.starts += 1

    def finish(self, job: Job, case: Case, outcome: Outcome) -> None:
        if not outcome.error:
            self.record.add(case, outcome)
        elif not job.last:
            print("again:", case.name, outcome.error[:300], flush=True)
            self.again.append(case)
        elif case.group == FAILING:
            self.record.errors[case.name] = (case.digest(), outcome.error)
        else:
            self.fail(f"{case.name}: {outcome.error}")

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print("FAILED", text[:500], flush=True)

    def hear(self, job: Job) -> None:
        """One message, or the end of the process."""
        assert job.receive is not None
        job.heard = time.monotonic()
        try:
            what, *values = job.receive.recv()
        except (EOFError, OSError):
            self.restart(job, "the process ended")
            return
        if what == "begin":
            job.current = values[0]
        elif what == "end":
            self.finish(job, job.batch[values[0]], values[1])
            job.current = None
            job.batch[values[0]] = None  # type: ignore[call-overload]
        elif what == "note":
            self.fail(f"batch of {next(c.name for c in job.batch if c)}: {values[0]}")
        else:
            job.done = True
            job.process.join()

    def restart(self, job: Job, why: str) -> None:
        if job.process.is_alive():
            job.process.kill()
        job.process.join()
        if job.current is not None:
            case = job.batch[job.current]
            self.finish(job, case, Outcome(error=f"{why} ({job.process.exitcode})"))
            job.batch[job.current] = None  # type: ignore[call-overload]
        job.batch = [case for case in job.batch if case]
        nothing_ran = job.process.exitcode == 4
        if not job.batch or job.starts > STARTS or (nothing_ran and job.starts > 2):
            for case in job.batch:
                self.finish(job, case, Outcome(error="not run"))
            job.done = True
            return
        self.start(job)

    def run(self, found: Sequence[Case], wrong: Sequence[Case]) -> None:
        """Batches side by side; then what failed there, and what has to fail, one after the other
        with a process and the GPU for itself: a kernel that ends in an error takes others along."""
        self.work_off([Job(list(batch)) for batch in batches(found)], self.workers)
        self.work_off([Job([case], last=True) for case in [*wrong, *self.again]], 1)

    def work_off(self, waiting: list[Job], workers: int) -> None:
        running: list[Job] = []
        while waiting or running:
            if time.monotonic() > self.until:
                for job in [*waiting, *running]:
                    self.give_up(job)
                return
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                self.start(running[-1])
            ready = wait([job.receive for job in running if job.receive], timeout=1.0)
            for job in running:
                if job.receive in ready:
                    self.hear(job)
                elif time.monotonic() - job.heard > PATIENCE:
                    self.restart(job, f"nothing heard for {PATIENCE} s")
            running = [job for job in running if not job.done]

    def give_up(self, job: Job) -> None:
        if job.process is not None and job.process.is_alive():
            job.process.kill()
        for case in job.batch:
            if case:
                self.fail(f"{case.name}: no time left")

    def encode(self, maps: Sequence[Map]) -> None:
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_encode, args=(send, self.emulator, maps))
        process.start()
        send.close()
        try:
            about, results = receive.recv() if receive.poll(PATIENCE) else ({}, [])
        except EOFError:
            about, results = {}, []
        if process.is_alive() and not results:
            process.kill()
        process.join()
        self.record.about.update(about)
        if len(results) != len(maps):
            self.fail(f"tensor maps: {about or 'no answer'}")
        for m, (data, error) in zip(maps, results, strict=False):
            if error:
                self.fail(error)
            else:
                self.record.encodings[m.text()] = data


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--emulator", action="store_true")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=480.0, help="to give up after")
    parser.add_argument("--missing", action="store_true", help="add to the record what it lacks")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    everything = all_cases()
    found = [case for case in everything if options.only in case.name]
    wrong = [case for case in all_failing() if options.only in case.name]
    recorder = Recorder(options.emulator, options.workers, start + options.seconds)
    if options.missing:
        recorder.record = archive.read()
        found = [case for case in found if recorder.record.of(case) is None]
        recorder.record.drop_but(everything)
    before = dict(recorder.record.about)
    recorder.record.about["cases"] = archive.summary(everything)
    print(len(found), "cases", archive.summary(found), flush=True)
    recorder.encode(encodings())
    print(recorder.record.about, flush=True)
    if options.missing and before["device"] != recorder.record.about["device"]:
        raise SystemExit(f"the record is of another machine: {before}")
    recorder.run(found, wrong)
    order = {case.name: i for i, case in enumerate(everything)}
    names = sorted(recorder.record.outcomes, key=order.__getitem__)
    recorder.record.outcomes = {name: recorder.record.outcomes[name] for name in names}
    target = options.folder / archive.FILE.name
    recorder.record.save(target)
    text = "\n\n".join(recorder.failures)
    (options.folder / "silicon_failures.txt").write_text(text + "\n" if text else "")
    size = target.stat().st_size
    print(
        f"{len(names)} of {len(everything)} cases, {len(recorder.record.encodings)} tensor maps, "
        f"{len(recorder.record.errors)} of {len(wrong)} errors, "
        f"{len(recorder.failures)} failures, {size} bytes, {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
