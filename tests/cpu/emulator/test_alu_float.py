"""The floating-point instructions, one by one, against exact rational arithmetic rounded once."""

from __future__ import annotations

import numpy as np
import pytest
from alu_harness import EXECUTED_EVERYWHERE, LENGTH, Case, check, module
from float_cases import CASES

from cute_fmha.emulator.machine import run_ptx


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_instruction(case: Case):
    check(case)


@pytest.mark.parametrize(
    ("body", "counter", "count"),
    [
        ("fma.rn.f32 %d, %a, %a, %a;", "fma_ops", 1),
        ("add.rn.f16x2 %d, %a, %a;", "fma_ops", 2),
        ("mov.b64 %t8, {%a, %a}; fma.rn.f32x2 %t8, %t8, %t8, %t8;", "fma_ops", 2),
        ("ex2.approx.ftz.f32 %d, %a;", "mufu_ops", 1),
        ("ex2.approx.f16x2 %d, %a;", "mufu_ops", 2),
        ("div.rn.f32 %d, %a, %a;", "fma_ops", 0),
    ],
)
def test_operations_are_counted_by_lane(body: str, counter: str, count: int):
    case = Case("k", body, ("b32",), ("b32",), lambda a: a)
    a, d = np.ones(LENGTH, dtype=np.uint32), np.zeros(LENGTH, dtype=np.uint32)
    for mask in (EXECUTED_EVERYWHERE, 0x8001):
        result = run_ptx(module([case]), a, d, mask, block=(64, 1, 1))
        assert getattr(result.counters, counter) == 2 * count * mask.bit_count()


def test_exp2_is_nearly_always_correctly_rounded():
    """The series stands for the exact function: against double precision, over the whole range."""
    generator = np.random.default_rng()
    x = generator.uniform(-150, 130, 1 << 14).astype(np.float32)
    d = np.zeros_like(x)
    case = Case("k", "ex2.approx.f32 %d, %a;", ("b32",), ("b32",), lambda a: a)
    run_ptx(
        module([case]), x, d, EXECUTED_EVERYWHERE, grid=(len(x) // 128, 1, 1), block=(128, 1, 1)
    )
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    steps = np.abs(d.view(np.int32).astype(np.int64) - exact.view(np.int32))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3
