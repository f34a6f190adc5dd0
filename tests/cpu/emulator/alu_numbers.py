"""Number formats and exact rounding in rational arithmetic, to hold the emulator to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Real = Fraction | float  # floats only for NaN, infinities and zeros with their sign


@dataclass(frozen=True)
class Format:
    """A floating-point format: `nan` is the canonical NaN, or what a NaN converts to."""

    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    def decode(self, code: int) -> Real:
        magnitude, negative = code & (self.sign - 1), bool(code & self.sign)
        if magnitude > self.largest:
            if magnitude != self.infinity:
                return math.nan
            return -math.inf if negative else math.inf
        if not magnitude:
            return -0.0 if negative else 0.0
        field, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        if field:
            fraction |= 1 << self.mantissa
        exponent = max(field, 1) - self.bias - self.mantissa
        value = Fraction(fraction) * Fraction(2) ** exponent
        return -value if negative else value

    def encode(self, value: Real, mode: str = "rn", satfinite: bool = False) -> int:
        """The code of `value` rounded by rn, rz, rm, rp or rna (ties away from zero)."""
        if not isinstance(value, Fraction):
            if math.isnan(value):
                return self.nan
            sign = self.sign if math.copysign(1.0, value) < 0 else 0
            if math.isinf(value):
                finite = satfinite or self.infinity is None
                return sign | (self.largest if finite else self.infinity or 0)
            if value == 0.0:
                return sign
            value = Fraction(value)
        negative, magnitude = value < 0, abs(value)
        sign = self.sign if negative else 0
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
        quantum = max(exponent, 1 - self.bias) - self.mantissa
        scaled = magnitude / Fraction(2) ** quantum
        count = math.floor(scaled)
        rest = scaled - count
        outwards = {"rm": negative, "rp": not negative}.get(mode, False)
        half = Fraction(1, 2)
        if mode == "rn":
            count += rest > half or (rest == half and count % 2 == 1)
        elif mode == "rna":
            count += rest >= half
        elif outwards:
            count += rest > 0
        if count >= 2 << self.mantissa:
            count, quantum = count // 2, quantum + 1
        code = count
        if count >= 1 << self.mantissa:
            field = quantum + self.mantissa + self.bias
            code = (field << self.mantissa) | (count - (1 << self.mantissa))
        if code > self.largest:
            to_infinity = mode in ("rn", "rna") or outwards
            infinite = to_infinity and not satfinite and self.infinity is not None
            code = (self.infinity or 0) if infinite else self.largest
        return sign | code

    def flush(self, code: int) -> int:
        """Subnormals become zeros of their sign."""
        exponent = (self.sign - 1) >> self.mantissa << self.mantissa
        return code if code & exponent else code & self.sign


F16 = Format(16, 10, 15, 0x7BFF, 0x7C00, 0x7FFF)
BF16 = Format(16, 7, 127, 0x7F7F, 0x7F80, 0x7FFF)
F32 = Format(32, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF)
F64 = Format(64, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF8000000000000)
TF32 = Format(19, 10, 127, 0x3FBFF, 0x3FC00, 0x3FFFF)
E4M3 = Format(8, 3, 7, 0x7E, None, 0x7F)
E5M2 = Format(8, 2, 15, 0x7B, 0x7C, 0x7F)
E2M3 = Format(6, 3, 1, 0x1F, None, 0x1F)
E3M2 = Format(6, 2, 3, 0x1F, None, 0x1F)
E2M1 = Format(4, 1, 1, 0x7, None, 0x7)
FORMATS = {
    "f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "tf32": TF32,
    "e4m3": E4M3, "e5m2": E5M2, "e2m3": E2M3, "e3m2": E3M2, "e2m1": E2M1,
}  # fmt: skip


def special(*values: Real) -> bool:
    """Any NaN or infinity."""
    return any(not isinstance(v, Fraction) and not math.isfinite(v) for v in values)


def sign_of(value: Real) -> float:
    return math.copysign(1.0, value)


def exact_add(a: Real, b: Real, mode: str = "rn") -> Real:
    if special(a, b):
        return (
            float(a) + float(b)
            if not (isinstance(a, Fraction) or isinstance(b, Fraction))
            else (b if isinstance(a, Fraction) else a)
        )
    total = Fraction(a) + Fraction(b)
    if total:
        return total
    if a == 0 and b == 0 and sign_of(a) == sign_of(b):
        return math.copysign(0.0, a)
    return -0.0 if mode == "rm" else 0.0


def exact_mul(a: Real, b: Real) -> Real:
    if math.isnan(a) or math.isnan(b):
        return math.nan
    sign = sign_of(a) * sign_of(b)
    if special(a, b):
        return math.nan if a == 0 or b == 0 else math.copysign(math.inf, sign)
    product = Fraction(a) * Fraction(b)
    return product if product else math.copysign(0.0, sign)


def exact_fma(a: Real, b: Real, c: Real, mode: str = "rn") -> Real:
    return exact_add(exact_mul(a, b), c, mode)


def exact_div(a: Real, b: Real) -> Real:
    if math.isnan(a) or math.isnan(b):
        return math.nan
    sign = sign_of(a) * sign_of(b)
    infinite = [not isinstance(v, Fraction) and math.isinf(v) for v in (a, b)]
    if all(infinite) or (a == 0 and b == 0):
        return math.nan
    if infinite[0] or b == 0:
        return math.copysign(math.inf, sign)
    if infinite[1] or a == 0:
        return math.copysign(0.0, sign)
    return Fraction(a) / Fraction(b)


def rounded_sqrt(fmt: Format, a: Real, mode: str) -> int:
    """sqrt needs care: rounded from many bits, with a mark of what is left."""
    if not isinstance(a, Fraction):
        return fmt.encode(a if a == 0 or a > 0 else math.nan, mode)
    if a < 0:
        return fmt.nan
    scale = 4**700
    scaled = a * scale
    root = math.isqrt(math.floor(scaled))
    value = Fraction(root, 2**700)
    if value * value != a:
        value += Fraction(1, 2**710)
    return fmt.encode(value, mode)


def of_float(value: float) -> Real:
    return Fraction(value) if math.isfinite(value) and value else value


def ordered(code: int, fmt: Format) -> int:
    """Codes as integers in the order of their values: distances are units in the last place."""
    return -(code & (fmt.sign - 1)) if code & fmt.sign else code


def is_nan(code: int, fmt: Format) -> bool:
    value = fmt.decode(code)
    return not isinstance(value, Fraction) and math.isnan(value)


def split(value: int, bits: int, count: int) -> list[int]:
    """Elements of a packed value, the low one first."""
    return [value >> bits * i & ((1 << bits) - 1) for i in range(count)]


def pack(elements: list[int], bits: int) -> int:
    return sum(element << bits * i for i, element in enumerate(elements))


def elementwise(bits: int, count: int, one: Callable[..., int]) -> Callable[..., int]:
    """A function of packed values from one of elements."""

    def whole(*values: int) -> int:
        columns = zip(*(split(value, bits, count) for value in values), strict=True)
        return pack([one(*column) for column in columns], bits)

    return whole
