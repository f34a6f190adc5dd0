"""Cases of the integer, bit, comparison and move instructions; floats are in float_cases.py."""

from __future__ import annotations

from collections.abc import Callable

from alu_harness import Case
from alu_numbers import elementwise

CASES: list[Case] = []
TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


def name_of(instruction: str) -> str:
    return "".join(ch if ch.isalnum() else "_" for ch in instruction)


def case(
    instruction: str,
    operands: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    reference: Callable[..., int | tuple[int, ...]],
    *,
    sm: int = 80,
    suffix: str = "",
) -> None:
    body = f"{instruction} {operands};"
    CASES.append(Case(name_of(instruction) + suffix, body, inputs, outputs, reference, sm=sm))


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def typed(kind: str, function: Callable[..., int]) -> Callable[..., int]:
    """A function of the numbers that bit patterns of a type mean, back to a bit pattern."""
    bits = int(kind[1:])

    def of_bits(*values: int) -> int:
        numbers = [signed(v, bits) if kind[0] == "s" else v & ((1 << bits) - 1) for v in values]
        return function(*numbers) & ((1 << bits) - 1)

    return of_bits


def clamp(value: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, value))


def truncated_quotient(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


# ---------------------------------------------------------------- arithmetic


def arithmetic(kind: str) -> None:
    bits = int(kind[1:])
    b = f"b{bits}"
    two: dict[str, Callable[[int, int], int]] = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y,
        "min": min, "max": max, "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: (x * y) >> bits,
    }  # fmt: skip
    for name, function in two.items():
        case(f"{name}.{kind}", "%d, %a, %b", (b, b), (b,), typed(kind, function))
    for name, function in {
        "div": truncated_quotient,
        "rem": lambda x, y: x - y * truncated_quotient(x, y),
    }.items():
        case(f"{name}.{kind}", "%d, %a, %b", (b, f"nonzero{bits}"), (b,), typed(kind, function))
    case(f"mad.lo.{kind}", "%d, %a, %b, %c", (b,) * 3, (b,), typed(kind, lambda x, y, z: x * y + z))
    case(
        f"mad.hi.{kind}", "%d, %a, %b, %c", (b,) * 3, (b,),
        typed(kind, lambda x, y, z: ((x * y) >> bits) + z),
    )  # fmt: skip
    case(
        f"sad.{kind}", "%d, %a, %b, %c", (b,) * 3, (b,), typed(kind, lambda x, y, z: z + abs(x - y))
    )
    if kind[0] == "s":
        case(f"neg.{kind}", "%d, %a", (b,), (b,), typed(kind, lambda x: -x))
        case(f"abs.{kind}", "%d, %a", (b,), (b,), typed(kind, abs))
    if bits < 64:
        wide, mask = f"b{2 * bits}", (1 << 2 * bits) - 1

        def factors(*values: int) -> list[int]:
            return [signed(v, bits) if kind[0] == "s" else v for v in values]

        def product(x: int, y: int) -> int:
            p, q = factors(x, y)
            return p * q & mask

        case(f"mul.wide.{kind}", "%d, %a, %b", (b, b), (wide,), product)
        case(
            f"mad.wide.{kind}", "%d, %a, %b, %c", (b, b, wide), (wide,),
            lambda x, y, z: (product(x, y) + z) & mask,
        )  # fmt: skip


for kind in TYPES:
    arithmetic(kind)

S32: dict[str, Callable[..., int]] = {
    "add.sat.s32": lambda x, y: clamp(x + y, 32),
    "sub.sat.s32": lambda x, y: clamp(x - y, 32),
    "min.relu.s32": lambda x, y: max(min(x, y), 0),
    "max.relu.s32": lambda x, y: max(x, y, 0),
}
for name, function in S32.items():
    sm = 90 if "relu" in name else 80
    case(name, "%d, %a, %b", ("b32", "b32"), ("b32",), typed("s32", function), sm=sm)
case(
    "mad.hi.sat.s32", "%d, %a, %b, %c", ("b32",) * 3, ("b32",),
    typed("s32", lambda x, y, z: clamp(((x * y) >> 32) + z, 32)),
)  # fmt: skip


def factor24(value: int, kind: str) -> int:
    return signed(value, 24) if kind == "s32" else value & 0xFFFFFF


for kind in ("u32", "s32"):
    for part, shift in (("lo", 0), ("hi", 16)):

        def mul24(x: int, y: int, kind: str = kind, shift: int = shift) -> int:
            return (factor24(x, kind) * factor24(y, kind)) >> shift & 0xFFFFFFFF

        case(f"mul24.{part}.{kind}", "%d, %a, %b", ("b32",) * 2, ("b32",), mul24)
        case(
            f"mad24.{part}.{kind}", "%d, %a, %b, %c", ("b32",) * 3, ("b32",),
            lambda x, y, z, f=mul24: (f(x, y) + z) & 0xFFFFFFFF,
        )  # fmt: skip

PAIRS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add.u16x2": ("u16", lambda x, y: x + y), "add.s16x2": ("s16", lambda x, y: x + y),
    "min.u16x2": ("u16", min), "max.u16x2": ("u16", max), "min.s16x2": ("s16", min),
    "max.s16x2": ("s16", max), "min.relu.s16x2": ("s16", lambda x, y: max(min(x, y), 0)),
    "max.relu.s16x2": ("s16", lambda x, y: max(x, y, 0)),
}  # fmt: skip
for name, (kind, function) in PAIRS.items():
    pairwise = elementwise(16, 2, typed(kind, function))
    case(name, "%d, %a, %b", ("b32", "b32"), ("b32",), pairwise, sm=90)

for a_kind in "us":
    for b_kind in "us":

        def dot(x: int, y: int, z: int, signs: str = a_kind + b_kind, half: int = -1) -> int:
            size = 8 if half < 0 else 16
            total = z
            for n in range(32 // size):
                p = x >> size * n & ((1 << size) - 1)
                q = y >> 8 * (n + 2 * max(half, 0)) & 0xFF
                p = signed(p, size) if signs[0] == "s" else p
                total += p * (signed(q, 8) if signs[1] == "s" else q)
            return total & 0xFFFFFFFF

        types = f"{a_kind}32.{b_kind}32"
        case(f"dp4a.{types}", "%d, %a, %b, %c", ("b32",) * 3, ("b32",), dot)
        for half, part in enumerate(("lo", "hi")):
            case(
                f"dp2a.{part}.{types}", "%d, %a, %b, %c", ("b32",) * 3, ("b32",),
                lambda x, y, z, f=dot, h=half, s=a_kind + b_kind: f(x, y, z, s, h),
            )  # fmt: skip

# ---------------------------------------------------------------- carry
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
CARRY = "add.cc.{t} %d, %a, %c; addc.cc.{t} %g, %b, %e; addc.{t} %h, %f, 0;"
BORROW = "sub.cc.{t} %d, %a, %c; subc.cc.{t} %g, %b, %e; subc.{t} %h, %f, 0;"
for kind in ("u32", "s32", "u64", "s64"):
    bits = int(kind[1:])
    mask = (1 << bits) - 1

    def words(total: int, bits: int = bits, mask: int = mask) -> tuple[int, ...]:
        return tuple(total >> bits * i & mask for i in range(3))

    def sum_of(a: int, b: int, c: int, e: int, f: int, bits: int = bits, words=words) -> tuple:
        return words((a | b << bits | f << 2 * bits) + (c | e << bits))

    def difference_of(
        a: int, b: int, c: int, e: int, f: int, bits: int = bits, words=words
    ) -> tuple:
        return words((a | b << bits | f << 2 * bits) - (c | e << bits))

    for name, text, words_of in (("carry", CARRY, sum_of), ("borrow", BORROW, difference_of)):
        CASES.append(
            Case(
                f"{name}_{kind}",
                text.format(t=kind),
                (f"b{bits}",) * 5,
                (f"b{bits}",) * 3,
                words_of,
            )
        )


def long_product(a: int, b: int, c: int, e: int) -> tuple[int, int]:
    total = a * b + (c | e << 32)
    return total & M32, total >> 32 & M32


CASES.append(
    Case(
        "mad_carry_u32",
        "mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %g, %a, %b, %e;",
        ("b32",) * 4,
        ("b32",) * 2,
        long_product,
    )
)
CASES.append(
    Case(
        "mad_carry_u64",
        "mad.lo.cc.u64 %d, %a, %b, %c; madc.hi.u64 %g, %a, %b, 0;",
        ("b64",) * 3,
        ("b64",) * 2,
        lambda a, b, c: ((a * b + c) & M64, (a * b + c) >> 64 & M64),
    )
)

# ---------------------------------------------------------------- bits
for bits in (16, 32, 64):
    mask, b = (1 << bits) - 1, f"b{bits}"
    for name, function in {
        "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
    }.items():  # fmt: skip
        case(f"{name}.{b}", "%d, %a, %b", (b, b), (b,), function)
    case(f"not.{b}", "%d, %a", (b,), (b,), lambda x, m=mask: ~x & m)
    case(f"cnot.{b}", "%d, %a", (b,), (b,), lambda x: int(x == 0))
    for amount in ("small32", "b32"):
        tail = "_any" if amount == "b32" else ""
        case(
            f"shl.{b}", "%d, %a, %b", (b, amount), (b,),
            lambda x, n, m=mask, k=bits: x << n & m if n < k else 0, suffix=tail,
        )  # fmt: skip
        case(
            f"shr.u{bits}", "%d, %a, %b", (b, amount), (b,),
            lambda x, n, k=bits: x >> n if n < k else 0, suffix=tail,
        )  # fmt: skip
        case(
            f"shr.s{bits}", "%d, %a, %b", (b, amount), (b,),
            lambda x, n, m=mask, k=bits: signed(x, k) >> min(n, k - 1) & m, suffix=tail,
        )  # fmt: skip

for direction in "lr":
    for mode in ("wrap", "clamp"):

        def funnel(x: int, y: int, n: int, left: bool = direction == "l", mode: str = mode) -> int:
            n = n % 32 if mode == "wrap" else min(n, 32)
            pair = y << 32 | x
            return (pair << n) >> 32 & M32 if left else pair >> n & M32

        case(
            f"shf.{direction}.{mode}.b32",
            "%d, %a, %b, %c",
            ("b32", "b32", "small32"),
            ("b32",),
            funnel,
        )


def lop3(table: int) -> Callable[[int, int, int], int]:
    def bitwise(x: int, y: int, z: int) -> int:
        result = 0
        for i in range(32):
            index = (x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)
            result |= (table >> index & 1) << i
        return result

    return bitwise


for table in (0x00, 0x96, 0xE8, 0xEA, 0x3C, 0xF8, 0x1B, 0xFF, 0x80):
    operands = f"%d, %a, %b, %c, {hex(table)}"
    case("lop3.b32", operands, ("b32",) * 3, ("b32",), lop3(table), suffix=f"_{table:02x}")
for name, function in {"or": lambda p, q: p or q, "and": lambda p, q: p and q}.items():
    CASES.append(
        Case(
            f"lop3_{name}",
            f"setp.ne.u32 %q, %e, 0; lop3.{name}.b32 %d|%p, %a, %b, %c, 0x80, %q; "
            "selp.b32 %g, 1, 0, %p;",
            ("b32", "b32", "b32", "small32"),
            ("b32", "b32"),
            lambda x, y, z, e, f=function: (x & y & z, int(f(x & y & z != 0, e != 0))),
            sm=70,
        )
    )


def prmt(mode: str | None) -> Callable[[int, int, int], int]:
    def permuted(x: int, y: int, control: int) -> int:
        source = (y << 32 | x).to_bytes(8, "little")
        n = control & 3
        if mode is None:
            picks = [control >> 4 * i & 15 for i in range(4)]
        elif mode == "f4e":
            picks = [n + i for i in range(4)]
        elif mode == "b4e":
            picks = [(n - i) % 8 for i in range(4)]
        elif mode == "rc8":
            picks = [n] * 4
        elif mode == "ecl":
            picks = [max(i, n) for i in range(4)]
        elif mode == "ecr":
            picks = [min(i, n) for i in range(4)]
        else:
            picks = [2 * (n & 1) + (i & 1) for i in range(4)]
        values = [source[p & 7] if p < 8 else (255 if source[p & 7] & 128 else 0) for p in picks]
        return int.from_bytes(bytes(values), "little")

    return permuted


for selection in (None, "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
    instruction = "prmt.b32" + (f".{selection}" if selection else "")
    case(instruction, "%d, %a, %b, %c", ("b32",) * 3, ("b32",), prmt(selection))


def bfe(bits: int, is_signed: bool) -> Callable[[int, int, int], int]:
    def extracted(x: int, b: int, c: int) -> int:
        # Beyond 255, which the ISA does not allow, as on an H200.
        position, length = (b & 255, c & 255) if bits == 32 else (min(b, 255), min(c, 255))
        sign = x >> min(position + length - 1, bits - 1) & 1 if is_signed and length else 0
        result = 0
        for i in range(bits):
            inside = i < length and position + i < bits
            result |= (x >> (position + i) & 1 if inside else sign) << i
        return result

    return extracted


def bfi(bits: int) -> Callable[[int, int, int, int], int]:
    def inserted(x: int, y: int, c: int, d: int) -> int:
        position, length = c & 255, d & 255
        for i in range(length):
            if position + i < bits:
                y = y & ~(1 << (position + i)) | (x >> i & 1) << (position + i)
        return y

    return inserted


def highest(value: int, kind: str, amount: bool) -> int:
    bits = int(kind[1:])
    number = signed(value, bits) if kind[0] == "s" else value
    number = ~number if number < 0 else number
    if not number:
        return M32
    return bits - number.bit_length() if amount else number.bit_length() - 1


for bits in (32, 64):
    b = f"b{bits}"
    for sign in "us":
        kind = f"{sign}{bits}"
        for amount in ("small32", "b32"):
            case(
                f"bfe.{kind}", "%d, %a, %b, %c", (b, amount, amount), (b,), bfe(bits, sign == "s"),
                suffix=f"_{amount}",
            )  # fmt: skip
        for tail in ("", ".shiftamt"):
            case(
                f"bfind{tail}.{kind}", "%d, %a", (b,), ("b32",),
                lambda x, k=kind, t=bool(tail): highest(x, k, t),
            )  # fmt: skip
    case(f"bfi.{b}", "%d, %a, %b, %c, %e", (b, b, "small32", "small32"), (b,), bfi(bits))
    case(f"brev.{b}", "%d, %a", (b,), (b,), lambda x, k=bits: int(f"{x:0{k}b}"[::-1], 2))
    case(f"popc.{b}", "%d, %a", (b,), ("b32",), lambda x: x.bit_count())
    case(f"clz.{b}", "%d, %a", (b,), ("b32",), lambda x, k=bits: k - x.bit_length())


def nth_set(value: int, base: int, offset: int) -> int:
    base, offset = base % 32, signed(offset, 32)
    if offset == 0:
        return base if value >> base & 1 else M32
    order = range(base, 32) if offset > 0 else range(base, -1, -1)
    found = [p for p in order if value >> p & 1]
    return found[abs(offset) - 1] if abs(offset) <= len(found) else M32


CASES.append(
    Case(
        "fns_b32",
        "and.b32 %t0, %b, 31; and.b32 %t1, %c, 15; sub.s32 %t1, %t1, 8; fns.b32 %d, %a, %t0, %t1;",
        ("b32", "b32", "b32"),
        ("b32",),
        lambda x, b, c: nth_set(x, b & 31, (c & 15) - 8),
    )
)


def szext(x: int, n: int, kind: str, mode: str) -> int:
    if mode == "clamp" and n >= 32:
        return x
    n %= 32
    if n == 0:
        return 0
    low = x & ((1 << n) - 1)
    return signed(low, n) & M32 if kind == "s32" else low


def bmsk(a: int, b: int, mode: str) -> int:
    if mode == "clamp":
        if a >= 32:
            return 0
        return ((1 << min(b, 32)) - 1) << a & M32
    return ((1 << b % 32) - 1) << a % 32 & M32


for mode in ("clamp", "wrap"):
    for kind in ("u32", "s32"):
        case(
            f"szext.{mode}.{kind}", "%d, %a, %b", ("b32", "small32"), ("b32",),
            lambda x, n, k=kind, m=mode: szext(x, n, k, m),
        )  # fmt: skip
    case(
        f"bmsk.{mode}.b32", "%d, %a, %b", ("small32", "small32"), ("b32",),
        lambda x, n, m=mode: bmsk(x, n, m),
    )  # fmt: skip

# ---------------------------------------------------------------- comparisons and predicates
ORDER: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda p, q: p and q, "or": lambda p, q: p or q, "xor": lambda p, q: p != q,
}  # fmt: skip
for kind in (*TYPES, "b16", "b32", "b64"):
    bits = int(kind[1:])
    operators = dict(ORDER)
    if kind[0] == "b":
        operators = {name: ORDER[name] for name in ("eq", "ne")}
    elif kind[0] == "u":
        operators |= {name: ORDER[of] for name, of in UNSIGNED.items()}
    for name, function in operators.items():

        def compared(x: int, y: int, f=function, k=kind, n=bits) -> bool:
            return f(signed(x, n), signed(y, n)) if k[0] == "s" else f(x, y)

        CASES.append(
            Case(
                f"setp_{name}_{kind}",
                f"setp.{name}.{kind} %p, %a, %b; selp.b32 %d, 7, 9, %p;",
                (f"b{bits}",) * 2,
                ("b32",),
                lambda x, y, f=compared: 7 if f(x, y) else 9,
            )
        )
        if kind in ("s32", "u32"):
            CASES.append(
                Case(
                    f"set_{name}_u32_{kind}",
                    f"set.{name}.u32.{kind} %d, %a, %b;",
                    ("b32",) * 2,
                    ("b32",),
                    lambda x, y, f=compared: M32 if f(x, y) else 0,
                )
            )

for combine, joined in COMBINE.items():
    for negation in ("", "!"):

        def dual(x: int, y: int, z: int, join=joined, negate=bool(negation)) -> tuple[int, int]:
            c = (z < 20) != negate
            less = signed(x, 32) < signed(y, 32)
            return int(join(less, c)), int(join(not less, c))

        CASES.append(
            Case(
                f"setp_lt_{combine}_{'not' if negation else 'plain'}",
                f"setp.lt.u32 %r, %c, 20; setp.lt.{combine}.s32 %p|%q, %a, %b, {negation}%r; "
                "selp.b32 %d, 1, 0, %p; selp.b32 %g, 1, 0, %q;",
                ("b32", "b32", "small32"),
                ("b32", "b32"),
                dual,
            )
        )

for name, join in COMBINE.items():
    CASES.append(
        Case(
            f"{name}_pred",
            f"setp.lt.u32 %p, %a, 20; setp.lt.u32 %q, %b, 20; {name}.pred %r, %p, %q; "
            "selp.b32 %d, 1, 0, %r; not.pred %r, %r; selp.b32 %g, 1, 0, !%r; mov.pred %q, %r; "
            "selp.b32 %h, 1, 0, %q;",
            ("small32", "small32"),
            ("b32",) * 3,
            lambda x, y, f=join: (int(f(x < 20, y < 20)),) * 2 + (int(not f(x < 20, y < 20)),),
        )
    )

for bits in (16, 32, 64):
    b = f"b{bits}"
    for sign in "bus":
        CASES.append(
            Case(
                f"selp_{sign}{bits}",
                f"setp.lt.u32 %p, %c, 20; selp.{sign}{bits} %d, %a, %b, %p;",
                (b, b, "small32"),
                (b,),
                lambda x, y, z: x if z < 20 else y,
            )
        )
    case(
        f"slct.{b}.s32", "%d, %a, %b, %c", (b, b, "b32"), (b,),
        lambda x, y, z: x if signed(z, 32) >= 0 else y,
    )  # fmt: skip

# ---------------------------------------------------------------- moves
Move = tuple[str, str, tuple[str, ...], tuple[str, ...], Callable[..., int | tuple[int, ...]]]
MOVES: list[Move] = [
    ("mov_pack_b32", "mov.b32 %d, {%a, %b};", ("b16", "b16"), ("b32",), lambda x, y: x | y << 16),
    ("mov_unpack_b32", "mov.b32 {%d, %g}, %a;", ("b32",), ("b16", "b16"),
     lambda x: (x & 0xFFFF, x >> 16)),
    ("mov_pack_b64", "mov.b64 %d, {%a, %b};", ("b32", "b32"), ("b64",), lambda x, y: x | y << 32),
    ("mov_unpack_b64", "mov.b64 {%d, %g}, %a;", ("b64",), ("b32", "b32"),
     lambda x: (x & M32, x >> 32)),
    ("mov_high_b64", "mov.b64 {_, %d}, %a;", ("b64",), ("b32",), lambda x: x >> 32),
    ("mov_low_b64", "mov.b64 {%d, _}, %a;", ("b64",), ("b32",), lambda x: x & M32),
    ("mov_imm_b64", "mov.b64 %d, {%a, 0x40004040};", ("b32",), ("b64",),
     lambda x: x | 0x40004040 << 32),
    ("mov_self_b64", "mov.b64 %d, {%a, %a};", ("b32",), ("b64",), lambda x: x | x << 32),
    (
        "mov_pack4_b64", "mov.b64 %d, {%a, %b, %c, %e};", ("b16",) * 4, ("b64",),
        lambda x, y, z, w: x | y << 16 | z << 32 | w << 48,
    ),
    (
        "mov_unpack4_b64",
        "mov.b64 {%d, %h0, %g, %h1}, %a; xor.b16 %d, %d, %h0; xor.b16 %g, %g, %h1;",
        ("b64",), ("b16", "b16"), lambda x: ((x ^ x >> 16) & 0xFFFF, (x >> 32 ^ x >> 48) & 0xFFFF),
    ),
    (
        "mov_b128",
        "{ .reg .b128 q, r; mov.b128 q, {%a, %b}; mov.b128 r, q; mov.b128 {%d, %g}, r; }",
        ("b64", "b64"), ("b64", "b64"), lambda x, y: (x, y),
    ),
    ("mov_b16", "mov.b16 %d, %a;", ("b16",), ("b16",), lambda x: x),
    ("mov_b32", "mov.b32 %d, %a;", ("b32",), ("b32",), lambda x: x),
    ("mov_f32", "mov.f32 %d, %a;", ("b32",), ("b32",), lambda x: x),
    ("mov_b64", "mov.b64 %d, %a;", ("b64",), ("b64",), lambda x: x),
    ("mov_imm_f32", "mov.f32 %d, 0fBF800000;", ("b32",), ("b32",), lambda x: 0xBF800000),
    ("mov_imm_s16", "mov.u16 %d, -3;", ("b16",), ("b16",), lambda x: 0xFFFD),
    ("add_imm_s16", "add.s16 %d, %a, -3;", ("b16",), ("b16",), lambda x: (x - 3) & 0xFFFF),
    ("add_imm_s64", "add.s64 %d, %a, -3;", ("b64",), ("b64",), lambda x: (x - 3) & M64),
    ("add_same_s32", "mov.b32 %d, %a; add.s32 %d, %d, %d;", ("b32",), ("b32",),
     lambda x: 2 * x & M32),
    ("mov_bytes", "mov.b32 %d, %a; { .reg .b8 x, y, z, w; mov.b32 {x, y, z, w}, %a; "
     "mov.b32 %d, {w, z, y, x}; }", ("b32",), ("b32",),
     lambda x: int.from_bytes(x.to_bytes(4, "little"), "big")),
]  # fmt: skip
for name, body, sources, results, reference in MOVES:
    sm = 90 if "128" in name else 80
    CASES.append(Case(name, body, sources, results, reference, sm=sm))
