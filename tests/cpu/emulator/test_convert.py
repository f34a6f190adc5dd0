"""Every cvt, one by one, against exact arithmetic; FP8 also against PyTorch's types."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from alu_harness import EXECUTED_EVERYWHERE, LENGTH, Case, check, module
from convert_cases import CASES

from cute_fmha.emulator.build import engine_library
from cute_fmha.emulator.machine import EmulationError, run_ptx


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_conversion(case: Case):
    check(case)


def _run(body: str, *arrays: np.ndarray, check: bool = True):
    kinds = tuple(f"b{8 * array.itemsize}" for array in arrays)
    case = Case("k", body, kinds[:-1], kinds[-1:], lambda *values: 0)
    return run_ptx(
        module([case]), *arrays, EXECUTED_EVERYWHERE, grid=(len(arrays[0]) // 128, 1, 1),
        block=(128, 1, 1), check=check,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)],
)
def test_fp8_agrees_with_torch(name: str, dtype: torch.dtype, largest: float):
    x = (torch.randn(1 << 12) * torch.logspace(-4, 3, 1 << 12)).clamp(-largest, largest)
    d = np.zeros(len(x), dtype=np.uint16)
    _run(f"cvt.rn.satfinite.{name}x2.f32 %d, 0f00000000, %a;", x.numpy().view(np.uint32), d)
    assert (d.astype(np.uint8) == x.to(dtype).view(torch.uint8).numpy()).all()
    codes = np.arange(256, dtype=np.uint16)
    halves = np.zeros(256, dtype=np.uint32)
    _run(f"cvt.rn.f16x2.{name}x2 %d, %a;", codes, halves)
    want = torch.from_numpy(codes.astype(np.uint8)).view(dtype).to(torch.float16).numpy()
    np.testing.assert_array_equal(halves.astype(np.uint16).view(np.float16), want)


def test_exported_number_formats():
    """The functions that other families use, against NumPy and PyTorch."""
    library = ctypes.CDLL(str(engine_library()))
    for name in ("half_to_float", "e4m3_to_float", "e5m2_to_float"):
        function = getattr(library, name)
        function.restype = ctypes.c_float
    for name in ("float_to_half", "float_to_bfloat"):
        getattr(library, name).argtypes = [ctypes.c_float]
        getattr(library, name).restype = ctypes.c_uint16
    codes = np.arange(1 << 16, dtype=np.uint16)
    got = np.array([library.half_to_float(int(c)) for c in codes[::61]], dtype=np.float32)
    np.testing.assert_array_equal(got, codes[::61].view(np.float16).astype(np.float32))
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        bytes_ = torch.arange(256, dtype=torch.uint8)
        got = np.array(
            [getattr(library, f"{name}_to_float")(i) for i in range(256)], dtype=np.float32
        )
        np.testing.assert_array_equal(got, bytes_.view(dtype).float().numpy())
    x = torch.randn(500) * torch.logspace(-9, 6, 500)
    half = np.array([library.float_to_half(float(v)) for v in x], dtype=np.uint16)
    with np.errstate(over="ignore"):
        assert (half == x.numpy().astype(np.float16).view(np.uint16)).all()
    bfloat = np.array([library.float_to_bfloat(float(v)) for v in x], dtype=np.uint16)
    assert (bfloat == x.bfloat16().view(torch.uint16).numpy()).all()


def test_fp4_values():
    library = ctypes.CDLL(str(engine_library()))
    library.e2m1_to_float.restype = ctypes.c_float
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [library.e2m1_to_float(i) for i in range(16)] == [*values, *(-v for v in values)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("cvt.f32.s32 %d, %a;", "rounding"),
        ("cvt.rni.f32.s32 %d, %a;", "rounding"),
        ("cvt.rn.s32.f32 %d, %a;", "rounding"),
        ("cvt.rn.e4m3x2.f32 %h0, %a, %a;", "satfinite"),
        ("cvt.rm.bf16x2.f32 %d, %a, %a;", "rounding"),
        ("cvt.rs.satfinite.e4m3x4.f32 %d, {%a, %a, %a, %a}, %a;", "not modelled"),
    ],
)
def test_refused(body: str, reason: str):
    a, d = np.zeros(LENGTH, dtype=np.uint32), np.zeros(LENGTH, dtype=np.uint32)
    with pytest.raises(EmulationError, match=reason):
        _run(body, a, d)


def test_stochastic_rounding_of_halves():
    """Documented for normal results; a subnormal one gives a finding."""
    generator = np.random.default_rng()
    x = generator.uniform(1, 2, LENGTH).astype(np.float32)
    random = generator.integers(0, 1 << 32, LENGTH, dtype=np.uint32)
    d = np.zeros(LENGTH, dtype=np.uint32)
    _run("cvt.rs.f16x2.f32 %d, %a, %a, %b;", x.view(np.uint32), random, d)
    fraction = x.view(np.uint32) & 0x1FFF
    down = (x.view(np.uint32) - fraction).view(np.float32)
    for shift in (0, 16):
        up = fraction + (random >> shift & 0x1FFF) > 0x1FFF
        want = np.where(up, down + np.float32(2.0**-10), down)
        assert ((d >> shift).astype(np.uint16).view(np.float16) == want).all()
    x[:] = 1e-6
    result = _run("cvt.rs.f16x2.f32 %d, %a, %a, %b;", x.view(np.uint32), random, d, check=False)
    assert any(finding.kind == "unmodelled" for finding in result.findings)
