"""The integer, bit, comparison and move instructions, and what must be refused or reported."""

from __future__ import annotations

import numpy as np
import pytest
from alu_cases import CASES
from alu_harness import EXECUTED_EVERYWHERE, LENGTH, Case, check, inputs, kernel, module

from cute_fmha.emulator.machine import EmulationError, run_ptx


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_instruction(case: Case):
    check(case)


def _run(body: str, value: int = 0, check: bool = True):
    case = Case("k", body, ("b32", "b32"), ("b32",), lambda a, b: a)
    a, d = np.full(LENGTH, 5, dtype=np.uint32), np.zeros(LENGTH, dtype=np.uint32)
    b = np.full(LENGTH, value, dtype=np.uint32)
    return run_ptx(module([case]), a, b, d, EXECUTED_EVERYWHERE, check=check), d


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("add.wrong.s32 %d, %a, %b;", "wrong"),
        ("add.rn.f32.s32 %d, %a, %b;", "add"),
        ("add.s64 %d, %a, %b;", "operand"),
        ("mul.s32 %d, %a, %b;", "mul"),
        ("setp.ltu.s32 %p, %a, %b;", "setp"),
        ("fma.f32 %d, %a, %b, %a;", "round"),
        ("max.xorsign.f32 %d, %a, %b;", "xorsign"),
        ("add.sat.f32x2 %t8, %t8, %t8;", "sat"),
        ("tanh.approx.ftz.f32 %d, %a;", "tanh"),
        ("shf.l.b32 %d, %a, %b, %a;", "shf"),
    ],
)
def test_refused(body: str, reason: str):
    with pytest.raises(EmulationError, match=reason):
        _run(body)


def test_division_by_zero_is_reported():
    result, _ = _run("div.u32 %d, %a, %b;", 0, check=False)
    assert any("division by zero" in finding.text for finding in result.findings)
    result, d = _run("div.u32 %d, %a, %b;", 2)
    assert result.ok
    assert (d[:32] == 2).all()


def test_undefined_sources_are_reported():
    result, _ = _run("add.s32 %d, %a, %t1;", check=False)
    assert any(finding.kind == "uninitialised" for finding in result.findings)


def test_comparison_of_results_finds_differences():
    """The harness itself: a wrong reference must be noticed."""
    for case in (CASES[0], CASES[-1]):
        wrong = Case(**{**case.__dict__, "reference": lambda *values: 1 << 20})
        with pytest.raises(AssertionError, match="wrong"):
            check(wrong)


def test_a_module_of_all_cases_is_one_source():
    source = module(CASES[:5])
    assert source.count(".visible .entry") == 5
    assert kernel(CASES[4]) in source
    assert len(inputs(CASES[0])) == 2
