"""Cases of single PTX instructions: kernels around them, inputs, and how results are compared.

A case is a name, a PTX body that reads %a, %b, %c, %e, %f and writes %d, %g, %h, the kinds of its
inputs and outputs, a reference, and a tolerance. The same cases serve on a GPU (see `module`).
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import alu_numbers as numbers
import numpy as np

INPUTS, OUTPUTS = "abcef", "dgh"
LENGTH = 256
EXECUTED_EVERYWHERE = 0xFFFFFFFF
#: Inputs follow from it and the case's name; EMULATOR_SEED repeats a failure.
SEED = int(os.environ.get("EMULATOR_SEED") or random.SystemRandom().getrandbits(31))
MARKER = 0xA5A5A5A5A5A5A5A5


@dataclass(frozen=True)
class Case:
    """`ulp`: allowed distance, 0 for exact bits. `any_nan`: NaNs may have any payload.

    `sm`: the least architecture; 101: forms of sm_100 that assemblers before PTX 9.1 do not know.
    """

    name: str
    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., int | tuple[int, ...]]
    ulp: float = 0
    any_nan: bool = False
    sm: int = 80
    absolute: float = 0.0

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) ^ SEED


WIDTHS = {
    "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "f32x2": 64, "pred": 32,
    "e4m3x2": 16, "e5m2x2": 16, "e2m3x2": 16, "e3m2x2": 16, "e2m1x2": 16, "ue8m0x2": 16,
}  # fmt: skip


def width(kind: str) -> int:
    """Bits of a register of this kind; integers are named b32, s16, small32 (0..63), ..."""
    return WIDTHS.get(kind) or int("".join(ch for ch in kind if ch.isdigit()))


def kernel(case: Case) -> str:
    """An entry: pointers to inputs and outputs, and the lanes that execute the body as a mask."""
    pointers = [*INPUTS[: len(case.inputs)], *OUTPUTS[: len(case.outputs)]]
    params = ",\n".join(f".param .u64 p_{name}" for name in pointers)
    lines = [f".visible .entry {case.name}(\n{params},\n.param .u32 p_mask)", "{"]
    lines += [
        ".reg .pred %p, %q, %r, %inactive;",
        ".reg .b32 %thread, %index, %bit, %t0, %t1;",
        ".reg .b64 %at, %t8;",
    ]
    lines += [".reg .b16 %h0, %h1;"]
    kinds = [*case.inputs, *case.outputs]
    for name, kind in zip(pointers, kinds, strict=True):
        lines.append(f".reg .b{width(kind)} %{name};")
    lines += [
        "mov.u32 %thread, %tid.x;", "mov.u32 %index, %ctaid.x;", "mov.u32 %t0, %ntid.x;",
        "mad.lo.u32 %index, %index, %t0, %thread;",
    ]  # fmt: skip
    for name, kind in zip(INPUTS, case.inputs, strict=False):
        lines += [
            f"ld.param.u64 %at, [p_{name}];",
            f"mul.wide.u32 %t8, %index, {width(kind) // 8};",
        ]
        lines += ["add.u64 %at, %at, %t8;", f"ld.global.b{width(kind)} %{name}, [%at];"]
    for name, kind in zip(OUTPUTS, case.outputs, strict=False):
        bits = width(kind)
        lines.append(f"mov.b{bits} %{name}, {hex(MARKER & ((1 << bits) - 1))};")
    lines += [
        "ld.param.u32 %bit, [p_mask];",
        "and.b32 %t0, %thread, 31;",
        "shr.u32 %bit, %bit, %t0;",
    ]
    lines += [
        "and.b32 %bit, %bit, 1;",
        "setp.eq.u32 %inactive, %bit, 0;",
        f"@%inactive bra SKIP_{case.name};",
    ]
    lines += [case.body, f"SKIP_{case.name}:"]
    for name, kind in zip(OUTPUTS, case.outputs, strict=False):
        lines += [
            f"ld.param.u64 %at, [p_{name}];",
            f"mul.wide.u32 %t8, %index, {width(kind) // 8};",
        ]
        lines += ["add.u64 %at, %at, %t8;", f"st.global.b{width(kind)} [%at], %{name};"]
    return "\n".join([*lines, "ret;", "}"])


def module(cases: Sequence[Case], target: str = "sm_100a") -> str:
    """A PTX module with an entry for every case; launch 128 threads a block for LENGTH elements."""
    header = f".version 8.8\n.target {target}\n.address_size 64\n"
    return header + "\n".join(kernel(case) for case in cases)


# ---------------------------------------------------------------- inputs


def _float_edges(fmt: numbers.Format) -> list[int]:
    one = fmt.bias << fmt.mantissa
    infinity = fmt.infinity if fmt.infinity is not None else fmt.largest
    low = 1 << fmt.mantissa
    positive = [
        0, 1, 2, low - 1, low, low + 1, one - 1, one, one + 1, one + low // 2, one + low,
        one + 3 * low // 2, one - low, fmt.largest - 1, fmt.largest, infinity,
        fmt.nan & (fmt.sign - 1), one + (low >> 1) + 1, min(one + 7 * low, fmt.largest),
        min(one + 11 * low + 3, fmt.largest), max(one - 12 * low, 3),
    ]  # fmt: skip
    return [code | sign for code in positive for sign in (0, fmt.sign)]


def _integer_edges(bits: int) -> list[int]:
    top = 1 << bits
    return [
        0,
        1,
        2,
        3,
        7,
        31,
        32,
        33,
        top // 2 - 1,
        top // 2,
        top // 2 + 1,
        top - 1,
        top - 2,
        0x55,
        0xFF,
        top // 3,
    ]


def _random_floats(fmt: numbers.Format, generator: np.random.Generator, count: int) -> list[int]:
    """Random bits, and magnitudes near 1 (where sums cancel and products stay finite)."""
    bits = [
        int(x) & ((1 << fmt.bits) - 1)
        for x in generator.integers(0, 1 << 63, count, dtype=np.uint64)
    ]
    bits = [
        code ^ int(flip) << (fmt.bits - 1)
        for code, flip in zip(bits, generator.integers(0, 2, count), strict=True)
    ]
    for i in range(0, count, 2):
        span = min(12, fmt.bias)
        field = int(generator.integers(max(fmt.bias - span, 0), fmt.bias + span + 1))
        code = (field << fmt.mantissa) | (bits[i] & ((1 << fmt.mantissa) - 1))
        bits[i] = min(code, fmt.largest) | (bits[i] & fmt.sign)
    return bits


def _elements(kind: str, generator: np.random.Generator, count: int) -> list[int]:
    if kind.startswith("small"):
        return [int(x) for x in generator.integers(0, 70, count)]
    if kind.startswith("nonzero"):
        bits = width(kind)
        return [max(1, v) for v in _elements(f"b{bits}", generator, count)]
    if kind in numbers.FORMATS:
        fmt = numbers.FORMATS[kind]
        edges = _float_edges(fmt)
        values = _random_floats(fmt, generator, count)
    else:
        bits = width(kind)
        edges = _integer_edges(bits)
        # Every other one is shortened: small numbers are otherwise rare.
        shifts = generator.integers(0, bits, count) * (np.arange(count) % 2)
        values = [
            (int.from_bytes(generator.bytes(8), "little") & ((1 << bits) - 1)) >> int(shift)
            for shift in shifts
        ]
    picks = generator.integers(0, len(edges), count)
    use = generator.random(count) < 0.4
    return [edges[int(p)] if u else v for p, u, v in zip(picks, use, values, strict=True)]


def inputs(case: Case, length: int = LENGTH) -> list[np.ndarray]:
    """Inputs of a case: edge values and random bits."""
    generator = np.random.default_rng(case.seed)
    arrays = []
    for kind in case.inputs:
        bits = width(kind)
        if kind.endswith("x2") and kind[:-2] in numbers.FORMATS:
            fmt = numbers.FORMATS[kind[:-2]]
            step = 4 if fmt.bits == 4 else max(8, fmt.bits)
            low, high = (_elements(kind[:-2], generator, length) for _ in range(2))
            values = [a | b << step for a, b in zip(low, high, strict=True)]
        else:
            values = _elements(
                "b" + str(bits) if kind in ("pred", "ue8m0x2") else kind, generator, length
            )
        arrays.append(np.array(values, dtype=np.uint64).astype(f"u{bits // 8}"))
    if len(case.inputs) == 1 and width(case.inputs[0]) == 16:
        # All the edges of a 16-bit format fit.
        arrays[0][: 2**8] = np.arange(2**8, dtype=np.uint16) * 257
    return arrays


def expected(case: Case, arrays: Sequence[np.ndarray]) -> list[list[int]]:
    rows = []
    for values in zip(*(array.tolist() for array in arrays), strict=True):
        result = case.reference(*values)
        rows.append(result if isinstance(result, tuple) else (result,))
    return [list(column) for column in zip(*rows, strict=True)]


def _same(case: Case, kind: str, got: int, want: int) -> bool:
    if got == want:
        return True
    if not (case.any_nan or case.ulp or case.absolute):
        return False
    base = kind.removesuffix("x2")
    fmt = numbers.FORMATS[base]
    count = 2 if kind.endswith("x2") else 1
    for x, y in zip(
        numbers.split(got, fmt.bits, count), numbers.split(want, fmt.bits, count), strict=True
    ):
        if x == y or (numbers.is_nan(x, fmt) and numbers.is_nan(y, fmt)):
            continue
        if numbers.is_nan(x, fmt) or numbers.is_nan(y, fmt):
            return False
        near = abs(numbers.ordered(x, fmt) - numbers.ordered(y, fmt)) <= case.ulp
        if not near and not abs(float(fmt.decode(x)) - float(fmt.decode(y))) <= case.absolute:
            return False
    return True


def differences(
    case: Case,
    arrays: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    want: Sequence[Sequence[int]],
    mask: int = EXECUTED_EVERYWHERE,
) -> list[str]:
    """Lines that say what was computed and what was expected, for elements that differ."""
    lines = []
    for kind, result, column in zip(case.outputs, results, want, strict=True):
        marker = MARKER & ((1 << width(kind)) - 1)
        for i, (got, value) in enumerate(zip(result.tolist(), column, strict=True)):
            active = mask >> (i % 32) & 1
            if (_same(case, kind, got, value)) if active else got == marker:
                continue
            sources = ", ".join(hex(int(array[i])) for array in arrays)
            wanted = hex(value) if active else f"untouched {hex(marker)}"
            lines.append(f"{case.name}[{i}]({sources}) = {hex(got)}, expected {wanted}")
    return lines


def check(case: Case) -> None:
    """All lanes, then the lanes of a random mask, whose neighbours stay as they are."""
    from cute_fmha.emulator.machine import (
        Policy,
        run_ptx,
    )  # the rest runs where it is not installed

    print(f"EMULATOR_SEED={SEED}")
    generator = np.random.default_rng(case.seed + 1)
    arrays = inputs(case)
    want = expected(case, arrays)
    source = module([case])
    for mask in (EXECUTED_EVERYWHERE, int(generator.integers(1, EXECUTED_EVERYWHERE))):
        results = [np.zeros(LENGTH, dtype=f"u{width(kind) // 8}") for kind in case.outputs]
        grid, policy = (LENGTH // 128, 1, 1), Policy(races=False)
        run_ptx(source, *arrays, *results, mask, grid=grid, block=(128, 1, 1), policy=policy)
        wrong = differences(case, arrays, results, want, mask)
        assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:20])
