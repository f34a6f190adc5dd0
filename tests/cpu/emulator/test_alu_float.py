"""The floating-point instructions, one by one, against exact rational arithmetic rounded once."""

from __future__ import annotations

import numpy as np
import pytest
from alu_harness import (
    EXECUTED_EVERYWHERE,
    LENGTH,
    Case,
    check,
    differences,
    expected,
    module,
)
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


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["div", "mul"])
def test_results_next_to_the_smallest_normal_number_are_flushed_by_their_unrounded_exponent(
    op: str, mode: str
):
    """Quotients and products a few steps around 2^-126."""
    generator = np.random.default_rng()
    near = generator.integers(0, 4, LENGTH) * (generator.integers(0, 2, LENGTH) * 2 - 1)
    mantissa = generator.integers(0, 1 << 23, LENGTH)
    mantissa[::2] = generator.integers(-8, 8, len(mantissa[::2])) & 0x7FFFFF
    exponent = generator.integers(2, 120, LENGTH)
    a = (exponent << 23) + mantissa
    b = ((exponent + 126) << 23) + mantissa + near
    if op == "mul":  # b = 2^-126 / a, nearly
        values = a.astype(np.uint32).view(np.float32).astype(np.float64)
        b = (2.0**-126 / values).astype(np.float32).view(np.uint32).astype(np.int64) + near
    signs = generator.integers(0, 2, (2, LENGTH)) << 31
    arrays = [(x | sign).astype(np.uint32) for x, sign in zip((a, b), signs, strict=True)]
    (case,) = (case for case in CASES if case.name == f"{op}_{mode}_ftz_f32")
    d = np.zeros(LENGTH, dtype=np.uint32)
    run_ptx(
        module([case]), *arrays, d, EXECUTED_EVERYWHERE, grid=(LENGTH // 128, 1, 1),
        block=(128, 1, 1),
    )  # fmt: skip
    assert not differences(case, arrays, [d], expected(case, arrays))


@pytest.mark.parametrize(
    ("mode", "a", "b", "quotient"),
    [
        ("rm", 0xB57FFFFF, 0x74800000, 0x80000000),
        ("rm", 0x1BFFFFFF, 0xDB000000, 0x80000000),
        ("rp", 0x07FFFFFF, 0x47000000, 0x00000000),
        ("rp", 0xB07FFFFF, 0xEF800000, 0x00000000),
    ],
)
def test_quotients_of_an_h200(mode: str, a: int, b: int, quotient: int):
    """Exactly one step below 2^-126 with an exponent without bounds: rounding leaves it there."""
    (case,) = (case for case in CASES if case.name == f"div_{mode}_ftz_f32")
    sources = [np.full(LENGTH, value, dtype=np.uint32) for value in (a, b)]
    d = np.ones(LENGTH, dtype=np.uint32)
    run_ptx(module([case]), *sources, d, EXECUTED_EVERYWHERE, block=(LENGTH, 1, 1))
    assert set(d.tolist()) == {quotient}
    assert case.reference(a, b) == quotient
