"""Cases of the floating-point instructions: f32, f64, f16, bf16, comparisons, approximations."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from alu_cases import COMBINE, name_of
from alu_harness import Case
from alu_numbers import (
    BF16,
    F16,
    F32,
    F64,
    FORMATS,
    Format,
    Real,
    elementwise,
    exact_add,
    exact_div,
    exact_fma,
    exact_mul,
    is_nan,
    of_float,
    rounded_sqrt,
    sign_of,
)

CASES: list[Case] = []
MODES = ("rn", "rz", "rm", "rp")
Exact = Callable[..., Real]


def negated(value: Real) -> Real:
    return -value


EXACT: dict[str, tuple[int, Exact]] = {
    "add": (2, lambda a, b, mode: exact_add(a, b, mode)),
    "sub": (2, lambda a, b, mode: exact_add(a, negated(b), mode)),
    "mul": (2, lambda a, b, mode: exact_mul(a, b)),
    "fma": (3, lambda a, b, c, mode: exact_fma(a, b, c, mode)),
    "div": (2, lambda a, b, mode: exact_div(a, b)),
    "rcp": (1, lambda a, mode: exact_div(Fraction(1), a)),
}


def clamp_to_one(value: Real) -> Real:
    if not isinstance(value, Fraction) and math.isnan(value):
        return 0.0
    return Fraction(1) if value > 1 else value if value > 0 else 0.0


def rounded(
    fmt: Format,
    exact: Exact,
    mode: str = "rn",
    ftz: bool = False,
    sat: bool = False,
    relu: bool = False,
) -> Callable[..., int]:
    """The operation on bit patterns: flushed sources, one rounding, flushed result.

    Flushed is (as on an H200) what is below the normal numbers when rounded with an exponent
    without bounds."""
    smallest = Fraction(2) ** (1 - fmt.bias)
    raised = 2 ** (fmt.mantissa + 2)  # makes what is just below normal, too

    def of_codes(*codes: int) -> int:
        values = [fmt.decode(fmt.flush(code) if ftz else code) for code in codes]
        value = exact(*values, mode)
        if sat:
            value = clamp_to_one(value)
        if relu and value <= 0:
            value = 0.0
        code = fmt.encode(value, mode)
        if ftz and isinstance(value, Fraction) and abs(value) < smallest:
            unbounded = Fraction(fmt.decode(fmt.encode(value * raised, mode)))
            return code if abs(unbounded) == smallest * raised else code & fmt.sign
        return fmt.flush(code) if ftz else code

    return of_codes


def add(
    instruction: str, kind: str, sources: int, reference: Callable[..., int], *, sm: int = 80,
    ulp: float = 0, any_nan: bool = False, absolute: float = 0.0,
) -> None:  # fmt: skip
    operands = ", ".join(f"%{name}" for name in "abc"[:sources])
    if kind.endswith("x2"):
        fmt = FORMATS[kind[:-2]]
        reference = elementwise(fmt.bits, 2, reference)
    CASES.append(
        Case(
            name_of(instruction),
            f"{instruction} %d, {operands};",
            (kind,) * sources,
            (kind,),
            reference,
            sm=sm,
            ulp=ulp,
            any_nan=any_nan,
            absolute=absolute,
        )
    )


# ---------------------------------------------------------------- f32, f32x2, f64
for mode in MODES:
    for op, (sources, exact) in EXACT.items():
        for ftz in ("", ".ftz"):
            add(f"{op}.{mode}{ftz}.f32", "f32", sources, rounded(F32, exact, mode, bool(ftz)))
            if op in ("add", "sub", "mul", "fma"):
                add(
                    f"{op}.{mode}{ftz}.f32x2",
                    "f32x2",
                    sources,
                    rounded(F32, exact, mode, bool(ftz)),
                    sm=100,
                )
        add(f"{op}.{mode}.f64", "f64", sources, rounded(F64, exact, mode), any_nan=True)
    for ftz in ("", ".ftz"):

        def root(code: int, mode: str = mode, ftz: bool = bool(ftz)) -> int:
            code = F32.flush(code) if ftz else code
            result = rounded_sqrt(F32, F32.decode(code), mode)
            return F32.flush(result) if ftz else result

        add(f"sqrt.{mode}{ftz}.f32", "f32", 1, root)
    add(
        f"sqrt.{mode}.f64",
        "f64",
        1,
        lambda a, m=mode: rounded_sqrt(F64, F64.decode(a), m),
        any_nan=True,
    )
for op in ("add", "sub", "mul", "fma"):
    sources, exact = EXACT[op]
    for mode, ftz in (("rn", ""), ("rn", ".ftz"), ("rp", "")):
        add(
            f"{op}.{mode}{ftz}.sat.f32",
            "f32",
            sources,
            rounded(F32, exact, mode, bool(ftz), sat=True),
        )

for fmt_name, fmt in (("f32", F32), ("f64", F64)):
    tails = ("", ".ftz") if fmt is F32 else ("",)
    for ftz in tails:

        def flushed(code: int, fmt: Format = fmt, ftz: bool = bool(ftz)) -> int:
            return fmt.flush(code) if ftz else code

        add(
            f"neg{ftz}.{fmt_name}",
            fmt_name,
            1,
            lambda a, f=flushed, m=fmt: f(a) ^ m.sign,
            any_nan=True,
        )
        add(
            f"abs{ftz}.{fmt_name}",
            fmt_name,
            1,
            lambda a, f=flushed, m=fmt: f(a) & ~m.sign,
            any_nan=True,
        )
    add(
        f"copysign.{fmt_name}", fmt_name, 2,
        lambda a, b, m=fmt: a & m.sign | b & (m.sign - 1),
    )  # fmt: skip


# ---------------------------------------------------------------- min and max
def extremum(
    fmt: Format, larger: bool, ftz: bool = False, nans: bool = False, xorsign: bool = False,
    magnitudes: bool = False,
) -> Callable[..., int]:  # fmt: skip
    def of_two(a: int, b: int) -> int:
        sign = (a ^ b) & fmt.sign if xorsign else 0
        a, b = (fmt.flush(x) if ftz else x for x in (a, b))
        if xorsign or magnitudes:
            a, b = a & (fmt.sign - 1), b & (fmt.sign - 1)
        a_nan, b_nan = is_nan(a, fmt), is_nan(b, fmt)
        if (a_nan and b_nan) or (nans and (a_nan or b_nan)):
            return fmt.nan
        if a_nan or b_nan:
            return (b if a_nan else a) | sign
        keys = [(fmt.decode(x), sign_of(fmt.decode(x))) for x in (a, b)]
        first = keys[0] > keys[1] if larger else keys[0] < keys[1]
        return (a if first else b) | sign

    def of_all(*codes: int) -> int:
        result = codes[0]
        for code in codes[1:]:
            result = of_two(result, code)
        return result

    return of_all


for op in ("min", "max"):
    for ftz in ("", ".ftz"):
        for nans in ("", ".NaN"):
            for xorsign in ("", ".xorsign.abs"):
                modifiers = f"{op}{ftz}{nans}{xorsign}"
                flags = (op == "max", bool(ftz), bool(nans), bool(xorsign))
                for kind, fmt in (("f32", F32), ("f16", F16), ("bf16", BF16)):
                    if kind == "bf16" and ftz:
                        continue
                    sm = 86 if xorsign else 80
                    add(f"{modifiers}.{kind}", kind, 2, extremum(fmt, *flags), sm=sm)
                    if kind != "f32":
                        add(f"{modifiers}.{kind}x2", f"{kind}x2", 2, extremum(fmt, *flags), sm=sm)
            for magnitudes in ("", ".abs"):
                add(
                    f"{op}{ftz}{nans}{magnitudes}.f32", "f32", 3,
                    extremum(F32, op == "max", bool(ftz), bool(nans), False, bool(magnitudes)),
                    sm=100,
                )  # fmt: skip
                CASES[-1] = Case(**{**CASES[-1].__dict__, "name": CASES[-1].name + "_3"})
    add(f"{op}.f64", "f64", 2, extremum(F64, op == "max"), any_nan=True)

# ---------------------------------------------------------------- f16 and bf16
for base, fmt in (("f16", F16), ("bf16", BF16)):
    for kind in (base, base + "x2"):
        sm = 80 if base == "f16" else 90
        for op in ("add", "sub", "mul", "fma"):
            sources, exact = EXACT[op]
            variants = [("", False, False, False)]
            if base == "f16":
                variants += [(".ftz", True, False, False), (".sat", False, True, False)]
                variants += [(".ftz.sat", True, True, False)]
            if op == "fma":
                variants += [(".relu", False, False, True)]
            for suffix, flush, saturate, clamp in variants:
                add(
                    f"{op}.rn{suffix}.{kind}",
                    kind,
                    sources,
                    rounded(fmt, exact, "rn", flush, saturate, clamp),
                    sm=sm,
                )
        add(f"neg.{kind}", kind, 1, lambda a, m=fmt: a ^ m.sign, any_nan=True, sm=sm)
        add(f"abs.{kind}", kind, 1, lambda a, m=fmt: a & (m.sign - 1), any_nan=True, sm=sm)

for base, fmt in (("f16", F16), ("bf16", BF16)):
    for mode in MODES:
        for op in ("add", "sub", "fma"):
            sources, exact = EXACT[op]
            kinds = (base, base, "f32") if op == "fma" else (base, "f32")

            def mixed(
                *codes: int, fmt: Format = fmt, exact: Exact = exact, mode: str = mode
            ) -> int:
                values = [fmt.decode(code) for code in codes[:-1]] + [F32.decode(codes[-1])]
                return F32.encode(exact(*values, mode), mode)

            operands = "%a, %b, %c" if op == "fma" else "%a, %b"
            instruction = f"{op}.{mode}.f32.{base}"
            CASES.append(
                Case(
                    name_of(instruction),
                    f"{instruction} %d, {operands};",
                    kinds,
                    ("f32",),
                    mixed,
                    sm=100,
                )
            )

# ---------------------------------------------------------------- comparisons
ORDERED: dict[str, Callable[[Real, Real], bool]] = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip


def comparison(fmt: Format, name: str, ftz: bool) -> Callable[[int, int], bool]:
    def compared(a: int, b: int) -> bool:
        a, b = (fmt.flush(x) if ftz else x for x in (a, b))
        unordered = is_nan(a, fmt) or is_nan(b, fmt)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if unordered:
            return name.endswith("u")
        return ORDERED[name[:2]](fmt.decode(a), fmt.decode(b))

    return compared


COMPARISONS = [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]
for kind, fmt, sm in (("f32", F32, 80), ("f64", F64, 80), ("f16", F16, 80), ("bf16", BF16, 90)):
    for name in COMPARISONS:
        for ftz in ("", ".ftz") if kind in ("f32", "f16") else ("",):
            compared = comparison(fmt, name, bool(ftz))
            instruction = f"setp.{name}{ftz}.{kind}"
            CASES.append(
                Case(
                    name_of(instruction),
                    f"{instruction} %p, %a, %b; selp.b32 %d, 1, 0, %p;",
                    (kind, kind),
                    ("b32",),
                    lambda a, b, f=compared: int(f(a, b)),
                    sm=sm,
                )
            )
    for to, truth in (("u32", 0xFFFFFFFF), ("s32", 0xFFFFFFFF), ("f32", 0x3F800000)):
        if kind in ("f16", "bf16") and to == "f32":
            continue
        compared = comparison(fmt, "ltu", False)
        instruction = f"set.ltu.{to}.{kind}"
        CASES.append(
            Case(
                name_of(instruction),
                f"{instruction} %d, %a, %b;",
                (kind, kind),
                ("b32",),
                lambda a, b, f=compared, t=truth: t if f(a, b) else 0,
                sm=sm,
            )
        )
for kind, fmt, sm, one in (("f16x2", F16, 80, 0x3C00), ("bf16x2", BF16, 90, 0x3F80)):
    for name in ("lt", "neu", "nan"):
        compared = comparison(fmt, name, False)

        def halves(a: int, b: int, f=compared) -> tuple[bool, bool]:
            return f(a & 0xFFFF, b & 0xFFFF), f(a >> 16, b >> 16)

        CASES.append(
            Case(
                f"setp_{name}_{kind}",
                f"setp.{name}.{kind} %p|%q, %a, %b; selp.b32 %d, 1, 0, %p; selp.b32 %g, 1, 0, %q;",
                (kind, kind),
                ("b32", "b32"),
                lambda a, b, f=halves: tuple(map(int, f(a, b))),
                sm=sm,
            )
        )
        for combine, join in COMBINE.items():
            CASES.append(
                Case(
                    f"setp_{name}_{combine}_{kind}",
                    f"setp.lt.u32 %r, %c, 20; setp.{name}.{combine}.{kind} %p|%q, %a, %b, %r; "
                    "selp.b32 %d, 1, 0, %p; selp.b32 %g, 1, 0, %q;",
                    (kind, kind, "small32"),
                    ("b32", "b32"),
                    lambda a, b, c, f=halves, j=join: tuple(int(j(x, c < 20)) for x in f(a, b)),
                    sm=sm,
                )
            )
        CASES.append(
            Case(
                f"set_{name}_{kind}",
                f"set.{name}.{kind}.{kind} %d, %a, %b;",
                (kind, kind),
                ("b32",),
                lambda a, b, f=halves, t=one: sum(t << 16 * i for i, x in enumerate(f(a, b)) if x),
                sm=sm,
            )
        )


def property_of(fmt: Format, name: str, code: int) -> bool:
    magnitude = code & (fmt.sign - 1)
    field = magnitude >> fmt.mantissa
    nan = is_nan(code, fmt)
    return {
        "finite": magnitude <= fmt.largest, "infinite": magnitude == fmt.infinity,
        "number": not nan, "notanumber": nan, "subnormal": field == 0 and magnitude != 0,
        "normal": (field != 0 or not magnitude) and magnitude <= fmt.largest,
    }[name]  # fmt: skip


for kind, fmt in (("f32", F32), ("f64", F64)):
    for name in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
        CASES.append(
            Case(
                f"testp_{name}_{kind}",
                f"testp.{name}.{kind} %p, %a; selp.b32 %d, 1, 0, %p;",
                (kind,),
                ("b32",),
                lambda a, f=fmt, n=name: int(property_of(f, n, a)),
            )
        )
for ftz in ("", ".ftz"):
    CASES.append(
        Case(
            f"slct{ftz}_f32".replace(".", "_"),
            f"slct{ftz}.u32.f32 %d, %a, %b, %c;",
            ("b32", "b32", "f32"),
            ("b32",),
            lambda x, y, c, t=bool(ftz): x if F32.decode(F32.flush(c) if t else c) >= 0 else y,
        )
    )

# ---------------------------------------------------------------- approximations
FINITE: dict[str, Callable[[float], float]] = {
    "ex2": lambda x: math.inf if x > 1000 else 2.0**x,
    "lg2": math.log2, "rsqrt": lambda x: 1 / math.sqrt(x), "sqrt": math.sqrt,
    "rcp": lambda x: 1 / x,
    "sin": lambda x: math.sin(angle(x)), "cos": lambda x: math.cos(angle(x)), "tanh": math.tanh,
}  # fmt: skip


INVERSE = Fraction(10680707, 2**26)  # 1 / (2 pi) in f32


def angle(x: float) -> float:
    """What an H200 makes of an argument: revolutions in f32, rounded towards zero, as radians."""
    turns = F32.decode(F32.encode(Fraction(x) * INVERSE, "rz")) if x else x
    return 2 * math.pi * float(Fraction(turns) - round(turns)) if turns else 0.0


#: Results for -inf, -0, +0, +inf, and for negative numbers where the function has none.
AT_SPECIAL: dict[str, tuple[float, float, float, float]] = {
    "ex2": (0.0, 1.0, 1.0, math.inf), "lg2": (math.nan, -math.inf, -math.inf, math.inf),
    "rsqrt": (math.nan, -math.inf, math.inf, 0.0), "sqrt": (math.nan, -0.0, 0.0, math.inf),
    "rcp": (-0.0, -math.inf, math.inf, 0.0), "sin": (math.nan, -0.0, 0.0, math.nan),
    "cos": (math.nan, 1.0, 1.0, math.nan), "tanh": (-1.0, -0.0, 0.0, 1.0),
}  # fmt: skip


def approximate(name: str, value: Real) -> Real:
    if not isinstance(value, Fraction):
        if math.isnan(value):
            return math.nan
        index = (3 if value > 0 else 0) if math.isinf(value) else (1 if sign_of(value) < 0 else 2)
        return of_float(AT_SPECIAL[name][index])
    if value < 0 and name in ("lg2", "rsqrt", "sqrt"):
        return math.nan
    if name == "rcp":
        return 1 / value
    if name == "ex2" and value < -1000:
        return Fraction(1, 2**300)
    return of_float(FINITE[name](float(value)))


def approximation(fmt: Format, name: str, ftz: bool) -> Callable[[int], int]:
    def of_code(code: int) -> int:
        value = approximate(name, fmt.decode(fmt.flush(code) if ftz else code))
        result = fmt.encode(value)
        return fmt.flush(result) if ftz else result

    return of_code


#: What the ISA allows: units in the last place (relative errors as the next one), absolute.
BOUNDS: dict[str, tuple[float, float]] = {
    "ex2": (2, 0.0), "lg2": (4, 2.0**-22), "rsqrt": (2, 0.0), "sqrt": (2, 0.0), "rcp": (1, 0.0),
    "sin": (2, 2.0**-20.5), "cos": (2, 2.0**-20.5), "tanh": (2**13, 0.0),
}  # fmt: skip
for name in FINITE:
    for ftz in ("", ".ftz") if name != "tanh" else ("",):
        ulp, absolute = BOUNDS[name]
        add(
            f"{name}.approx{ftz}.f32", "f32", 1, approximation(F32, name, bool(ftz)),
            ulp=ulp, absolute=absolute,
        )  # fmt: skip
for base, fmt in (("f16", F16), ("bf16", BF16)):
    for kind in (base, base + "x2"):
        ftz = "" if base == "f16" else ".ftz"
        function = approximation(fmt, "ex2", bool(ftz))
        add(f"ex2.approx{ftz}.{kind}", kind, 1, function, ulp=2, sm=75 if base == "f16" else 90)
        function = approximation(fmt, "tanh", False)
        add(f"tanh.approx.{kind}", kind, 1, function, ulp=2, sm=75 if base == "f16" else 90)


def quotient(a: int, b: int, ftz: bool, full: bool) -> int:
    a, b = (F32.flush(x) if ftz else x for x in (a, b))
    x, y = F32.decode(a), F32.decode(b)
    if not full and isinstance(y, Fraction) and abs(y) > 2**126:
        return F32.encode(exact_mul(x, math.copysign(0.0, y)))
    result = F32.encode(exact_div(x, y))
    return F32.flush(result) if ftz else result


for full in (False, True):
    for ftz in ("", ".ftz"):
        add(
            f"div.{'full' if full else 'approx'}{ftz}.f32", "f32", 2,
            lambda a, b, t=bool(ftz), f=full: quotient(a, b, t, f), ulp=2,
        )  # fmt: skip


def upper_word(code: int) -> int:
    """rcp.approx.f64 looks at the upper word alone, and gives one."""
    value = F64.decode(F64.flush(code >> 32 << 32))
    result = F64.flush(F64.encode(exact_div(Fraction(1), value), "rz")) >> 32 << 32
    return result


add("rcp.approx.ftz.f64", "f64", 1, upper_word, ulp=2**33, any_nan=True)
