"""Single instructions: the emulator's own case lists, with inputs that do not change."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import alu_harness
import numpy as np
from alu_cases import CASES as INTEGER
from convert_cases import CASES as CONVERSIONS
from float_cases import CASES as FLOAT

from silicon.model import Argument, Buffer, Case, generator

HOPPER = 90
LENGTH = alu_harness.LENGTH
MASKS = (alu_harness.EXECUTED_EVERYWHERE, 0x9E3779B9)


@dataclass(frozen=True)
class Fixed(alu_harness.Case):
    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


def _case(instruction: alu_harness.Case, group: str) -> Case:
    fixed = Fixed(**instruction.__dict__)
    arrays = alu_harness.inputs(fixed, LENGTH)
    if len(arrays) > 1 and arrays[0].dtype == arrays[1].dtype and "nonzero" not in fixed.inputs[1]:
        arrays[1][5::16] = arrays[0][5::16]  # equal operands are rare otherwise
    outputs = [
        Buffer(
            np.zeros(LENGTH, f"u{alu_harness.width(kind) // 8}"),
            output=True,
            kind=kind,
            ulp=instruction.ulp,
            absolute=instruction.absolute,
            any_nan=instruction.any_nan,
        )
        for kind in instruction.outputs
    ]
    # A quarter of the cases runs with some lanes alone.
    mask = MASKS[fixed.seed % 4 == 0]
    return Case(
        instruction.name,
        instruction.name,
        alu_harness.kernel(instruction),
        (*(Buffer(array) for array in arrays), *outputs, mask),
        grid=(LENGTH // 128, 1, 1),
        block=(128, 1, 1),
        group=group,
    )


# ---------------------------------------------------------------- edges
def _nans(bits: int, mantissa: int, name: str) -> np.ndarray:
    """Quiet and signalling NaNs of both signs, with any payload."""
    rng = generator(name)
    exponent = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    payload = rng.integers(0, 1 << mantissa, LENGTH, dtype=np.uint64)
    shifts = rng.integers(0, mantissa, LENGTH).astype(np.uint64)
    payload = np.where(np.arange(LENGTH) % 2, payload >> shifts, payload)
    payload = np.maximum(payload, 1)
    sign = rng.integers(0, 2, LENGTH).astype(np.uint64) << np.uint64(bits - 1)
    return (payload | np.uint64(exponent) | sign).astype(f"u{bits // 8}")


def _barely_subnormal(dtype: str, packed: str) -> list[np.ndarray]:
    """Factors of products just below the smallest normal number, on both sides of every way to
    round them, and addends that hardly move them."""
    rng, info = generator("barely subnormal " + dtype), np.finfo(dtype)
    count = LENGTH * (2 if packed else 1)
    a = (1 + rng.integers(0, 1 << info.nmant, count) * np.ldexp(1.0, -info.nmant)).astype(dtype)
    b = (float(info.tiny) * 16 / a.astype(np.float64)).astype(dtype)
    a = a / a.dtype.type(16)
    a[::5] = -a[::5]
    c = np.zeros(count, dtype)
    c[1::4] = -c[1::4]
    c[2::4] = info.tiny
    c[3::4] = -info.tiny
    words = [x.view(f"u{info.bits // 8}") for x in (a, b, c)]
    return [x.view(np.uint32) if packed else x for x in words]


def _edge(name: str, body: str, kinds: tuple[str, ...], to: str, arrays: list[np.ndarray]) -> Case:
    instruction = alu_harness.Case(name, body, kinds, (to,), lambda: 0)
    out = Buffer(np.zeros(LENGTH, f"u{alu_harness.width(to) // 8}"), output=True, kind=to)
    sources = [Buffer(array) for array in arrays]
    arguments: tuple[Argument, ...] = (*sources, out, alu_harness.EXECUTED_EVERYWHERE)
    return Case(
        name, name, alu_harness.kernel(instruction), arguments,
        grid=(LENGTH // 128, 1, 1), block=(128, 1, 1), group="edges",
    )  # fmt: skip


NAN_CONVERSIONS = [f"{mode}.{to}.f64" for mode in ("rn", "rz") for to in ("f32", "f16", "bf16")]
NAN_CONVERSIONS += ["rn.f16.f32", "rn.bf16.f32", "rz.f16.f32", "rn.ftz.f16.f32"]
NAN_CONVERSIONS += [f"{m}.tf32.f32" for m in ("rn", "rz", "rna", "rna.satfinite", "rn.relu")]
FORMATS = {"f64": (64, 52), "f32": (32, 23)}
FLUSHED = {
    "f32": [f"{op}.{mode}.ftz{sat}" for op in ("mul", "fma") for mode in ("rn", "rz", "rm", "rp")
            for sat in ("", ".sat")],
    "f16": ["mul.rn.ftz", "mul.rn.ftz.sat", "fma.rn.ftz", "fma.rn.ftz.sat", "fma.rn.ftz.relu"],
}  # fmt: skip


def edges() -> list[Case]:
    """Payloads of NaNs, and numbers that are subnormal before they are rounded only."""
    found = []
    for form in NAN_CONVERSIONS:
        *_, to, source = form.split(".")
        name = "nans_cvt_" + form.replace(".", "_")
        kind = "f32" if to == "tf32" else to
        arrays = [_nans(*FORMATS[source], name)]
        found.append(_edge(name, f"cvt.{form} %d, %a;", (source,), kind, arrays))
    for base, operations in FLUSHED.items():
        for packed in ("", "x2") if base == "f16" else ("",):
            arrays = _barely_subnormal("float16" if base == "f16" else "float32", packed)
            for operation in operations:
                three = operation.startswith("fma")
                kinds = (base + packed,) * (2 + three)
                name = f"flushed_{operation}_{base}{packed}".replace(".", "_")
                body = f"{operation}.{base}{packed} %d, %a, %b{', %c' if three else ''};"
                found.append(_edge(name, body, kinds, base + packed, arrays[: 2 + three]))
    return found


def cases() -> list[Case]:
    lists = {"integer": INTEGER, "float": FLOAT, "convert": CONVERSIONS}
    found = [_case(one, group) for group, many in lists.items() for one in many if one.sm <= HOPPER]
    return found + edges()
