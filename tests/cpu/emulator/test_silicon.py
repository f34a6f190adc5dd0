"""The emulator against what an H200 computed: recorded results of tests/silicon, replayed."""

from __future__ import annotations

import numpy as np
import pytest
from silicon import archive, record, replay
from silicon.cases import cases, encodings, failing
from silicon.compare import differences
from silicon.model import Case, Map, Outcome

from cute_fmha.emulator.machine import Policy
from cute_fmha.emulator.tensormap import describe

CASES = cases()
RECORD = archive.read() if archive.FILE.exists() else archive.Record()
INSTRUCTIONS = ("integer", "float", "convert", "edges")
POLICIES = {"eager": Policy("eager"), "lazy": Policy("lazy"), "random": Policy("random", seed=7)}


def _outcome(case: Case) -> Outcome:
    outcome = RECORD.of(case)
    changed = "changed since it was recorded" if case.name in RECORD.digests else "not recorded"
    assert outcome is not None, f"{changed}: record again"
    return outcome


def _check(case: Case, policy: Policy) -> None:
    want = _outcome(case)
    got = replay.run(case, want.maps, policy)
    assert not got.error, got.error
    wrong = differences(case, got.outputs, want.outputs)
    assert not wrong, f"{len(wrong)} differences\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.group in INSTRUCTIONS], ids=lambda c: c.name
)
def test_instruction(case: Case) -> None:
    _check(case, Policy(races=False))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.group not in INSTRUCTIONS], ids=lambda c: c.name
)
def test_kernel(case: Case) -> None:
    for policy in POLICIES.values():
        _check(case, policy)


def test_tensor_maps() -> None:
    """The driver's 128 bytes are the emulator's, apart from the address."""
    pairs: list[tuple[Map, bytes]] = []
    for m in encodings():
        if m.text() in RECORD.encodings:
            pairs.append((m, RECORD.encodings[m.text()]))
    for case in CASES:
        outcome = RECORD.of(case)
        if outcome is not None:
            pairs += zip(case.maps, outcome.maps, strict=True)
    assert len(pairs) > 200
    wrong = []
    for m, want in pairs:
        got = replay.as_driver(m, replay.encode(m, m.buffer.data))
        got = want[: replay.ADDRESS] + got[replay.ADDRESS :]
        if got != want:
            at = [i for i in range(128) if got[i] != want[i]]
            bytes_ = ", ".join(f"[{i}] {got[i]:#x} for {want[i]:#x}" for i in at)
            wrong.append(f"{m.text()}: {bytes_}: {describe(got)} for {describe(want)}")
    assert not wrong, f"{len(wrong)} of {len(pairs)}\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("case", failing(), ids=lambda c: c.name)
def test_failing_kernel(case: Case) -> None:
    """What ends with an error on the GPU is a finding."""
    digest, error = RECORD.errors[case.name]
    assert digest == case.digest(), "changed since it was recorded: record again"
    assert "ILLEGAL_INSTRUCTION" in error
    for policy in POLICIES.values():
        error = replay.run(case, policy=policy).error
        assert "not a multiple of 16" in error or "a store to coordinate -" in error


def test_the_record_is_of_these_cases() -> None:
    assert {c.name for c in CASES} == set(RECORD.digests), "record again"
    assert "H200" in RECORD.about["device"]


def test_differences_are_noticed() -> None:
    exact = next(c for c in CASES if c.name == "add_s32")
    near = next(c for c in CASES if c.name == "ex2_approx_f32")
    for case, step, noticed in ((exact, 1, True), (near, 1, False), (near, 9, True)):
        got = replay.run(case).outputs
        changed = [array.copy() for array in got]
        number = int(np.flatnonzero((got[0] > 0x3F000000) & (got[0] < 0x60000000))[0])
        changed[0][number] += step
        assert bool(differences(case, changed, got)) == noticed
    got = replay.run(exact).outputs
    assert not differences(exact, got, got)


def test_recording(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recording program, with the emulator in the place of the GPU."""
    options = [str(tmp_path), "--emulator", "--workers", "1", "--only", "remote"]
    assert record.main(options) == 0
    read = archive.read(tmp_path / archive.FILE.name)
    chosen = [case for case in CASES if "remote" in case.name]
    assert list(read.outcomes) == [case.name for case in chosen]
    for case in chosen:
        outcome = read.of(case)
        assert outcome is not None
        assert not differences(case, replay.run(case).outputs, outcome.outputs)
    assert read.encodings
    assert "0 failures" in capsys.readouterr().out
