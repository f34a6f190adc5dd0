"""Parses PTX modules: kernels, their variables, and instructions with scoped names."""

from __future__ import annotations

import ast
import bisect
import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(ValueError):
    """PTX that cannot be parsed or assembled."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"PTX line {line}: {text}" if line else text)
        self.line = line


# ---------------------------------------------------------------- operands


@dataclass(frozen=True, slots=True)
class Name:
    """A register, special register, variable or label; `addend` of `symbol+4`."""

    text: str
    negate: bool = False
    addend: int = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """A number. `form`: "int", "f32" and "f64" (bit patterns), "decimal" (typed by its use)."""

    value: int | float
    form: str = "int"


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset]"""

    base: Name | Constant
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b}, a|b, and the two parts of [a, {b, c}]"""

    parts: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: a destination nobody reads."""


Operand = Name | Constant | Address | Vector | Sink

_NAME = re.compile(r"(!?)\s*([%$_A-Za-z][\w$%.]*)\s*(?:([+-][+\-\s]*)(\w+))?$")
_INTEGER = re.compile(r"[+-]?\s*(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_BITS = re.compile(r"(-?)0([fFdD])([0-9a-fA-F]{8}(?:[0-9a-fA-F]{8})?)$")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?$")
_PIECE = re.compile(r"\{[^{}]*\}|\[(?:[^\[\]{}]|\{[^{}]*\})*\]|[^,\[\]{}\s](?:[^,\[\]{}]*)|,")
_SIGN_BITS = {"f": (32, "f32"), "d": (64, "f64")}


def _integer(text: str) -> int:
    text = text.replace(" ", "").rstrip("U")
    digits = text.lstrip("+-")
    base = 10
    if digits[:2] in ("0x", "0X"):
        base = 16
    elif digits[:2] in ("0b", "0B"):
        base = 2
    elif len(digits) > 1 and digits[0] == "0":
        base = 8
    value = int(digits, base)
    return -value if text.startswith("-") else value


_FOLD = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
}


def _expression(text: str) -> int:
    """A constant expression of integers."""

    def fold(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _FOLD:
            return int(_FOLD[type(node.op)](fold(node.left), fold(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -fold(node.operand)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~fold(node.operand)
        raise ValueError(text)

    try:
        return fold(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the operand {text!r}") from error


def _split(text: str) -> list[str]:
    """Cut at the commas outside of brackets and braces."""
    if "[" not in text and "{" not in text:
        return [part.strip() for part in text.split(",")]
    parts, current = [], ""
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece == ",":
            parts.append(current.strip())
            current = ""
        else:
            current += piece
    parts.append(current.strip())
    return parts


@functools.lru_cache(maxsize=200_000)
def parse_operand(text: str) -> Operand:
    """The operand written as `text`."""
    first = text[0] if text else ""
    if first == "{":
        if not text.endswith("}"):
            raise ValueError(f"cannot read the operand {text!r}")
        inside = text[1:-1].strip()
        return Vector(tuple(parse_operand(part) for part in _split(inside)) if inside else ())
    if first == "[":
        if not text.endswith("]"):
            raise ValueError(f"cannot read the operand {text!r}")
        return _address(text[1:-1].strip())
    if text == "_":
        return Sink()
    match = _NAME.match(text)
    if match:
        negate, name, sign, addend = match.groups()
        offset = _integer(addend) * (-1 if sign.count("-") % 2 else 1) if sign else 0
        return Constant(32) if name == "WARP_SZ" else Name(name, bool(negate), offset)
    if _INTEGER.match(text):
        return Constant(_integer(text))
    match = _BITS.match(text)
    if match:
        size, form = _SIGN_BITS[match.group(2).lower()]
        if len(match.group(3)) != size // 4:
            raise ValueError(f"cannot read the number {text!r}")
        return Constant(int(match.group(3), 16) ^ (bool(match.group(1)) << (size - 1)), form)
    if _DECIMAL.match(text):
        return Constant(float(text), "decimal")
    parts = [part.strip() for part in text.split("|")]
    if len(parts) == 2 and all(part == "_" or _NAME.match(part) for part in parts):
        return Vector(tuple(parse_operand(part) for part in parts))
    return Constant(_expression(text))


def _address(text: str) -> Operand:
    parts = _split(text)
    if len(parts) > 1:
        rest = (parse_operand(part) for part in parts[1:])
        return Vector((_address(parts[0]), *rest))
    base = parse_operand(text)
    if isinstance(base, Name) and not base.negate:
        return Address(Name(base.text), base.addend)
    if isinstance(base, Constant) and base.form == "int":
        return Address(base)
    raise ValueError(f"cannot read the address [{text}]")


# ---------------------------------------------------------------- modules

TYPE_BYTES = {
    "pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8,
    "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip


@dataclass(slots=True)
class Parameter:
    name: str
    type: str
    align: int
    bytes: int
    array: bool


@dataclass(slots=True)
class Variable:
    """A .shared, .global, .const or .local variable. `size`: in bytes, 0 for an extern array."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes = b""


@dataclass(slots=True)
class Register:
    name: str
    width: int
    index: int = -1


class Scope:
    """The names between two braces."""

    __slots__ = ("labels", "parent", "ranges", "registers", "tables", "variables")

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, tuple[int, int]] = {}  # prefix: count, width
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.variables: dict[str, Variable] = {}

    def _own(self, name: str) -> Register | None:
        register = self.registers.get(name)
        if register is None and self.ranges and name[-1:].isdigit():
            for length in range(len(name) - 1, 0, -1):  # the prefix may end with digits itself
                if not name[length:].isdigit():
                    break
                known = self.ranges.get(name[:length])
                if known and int(name[length:]) < known[0]:
                    if str(int(name[length:])) != name[length:]:
                        continue
                    register = self.registers[name] = Register(name, known[1])
                    break
        return register

    def register(self, name: str) -> Register | None:
        scope: Scope | None = self
        while scope is not None:
            register = scope._own(name)
            if register is not None:
                return register
            scope = scope.parent
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None

    def table(self, name: str) -> tuple[tuple[str, ...], Scope] | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.tables:
                return scope.tables[name], scope
            scope = scope.parent
        return None

    def variable(self, name: str) -> Variable | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope.parent
        return None


@dataclass(slots=True)
class Instruction:
    name: str
    operands: tuple[Operand, ...]
    guard: str
    negate: bool
    line: int
    source: tuple[int, int]  # file number and line of .loc; (0, 0): unknown
    scope: Scope
    used: int = 0  # of a load that was widened: a mask of the bytes that count; 0: all


@dataclass(slots=True)
class Kernel:
    name: str
    parameters: list[Parameter]
    directives: dict[str, tuple[int, ...]]
    instructions: list[Instruction]
    scope: Scope
    variables: list[Variable]
    line: int


@dataclass(slots=True)
class Module:
    text: str
    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    _lines: list[str] = field(default_factory=list, repr=False)

    def line(self, number: int) -> str:
        """The text of a line, counted from 1."""
        if not self._lines:
            self._lines = self.text.split("\n")
        return self._lines[number - 1].strip() if 0 < number <= len(self._lines) else ""


_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"', re.DOTALL)
_TOP = re.compile(
    r"""\s*(?:
      \.version\s+(?P<version>[\d.]+)
    | \.target\s+(?P<target>[^\n]+)
    | \.address_size\s+(?P<bits>\d+)
    | \.file\s+(?P<number>\d+)\s+"(?P<file>(?:[^"\\]|\\.)*)"[^\n]*
    | (?P<section>\.section\b[^{]*\{[^}]*\})
    | (?:\.(?:visible|weak|extern)\s+)*\.entry\s+(?P<entry>[\w$%]+)\s*
    | (?:\.(?:visible|weak|extern)\s+)*\.func\b(?P<function>[^;{]*)(?P<open>[;{])
    | (?P<variable>(?:\.(?:visible|weak|extern|common)\s+)*\.(?:shared|global|const)\b[^;]*);
    | (?P<pragma>\.(?:pragma|alias)\b[^;]*);
    )""",
    re.VERBOSE,
)
_BODY = re.compile(
    r"""\s*(?:
      (?P<label>[$_A-Za-z%][\w$]*)\s*:(?!:)
    | (?:@\s*(?P<not>!?)\s*(?P<guard>[%$_\w]+)\s+)?(?P<name>[a-z][\w.:]*)(?P<operands>[^;]*);
    | (?P<brace>[{}])
    | (?P<empty>;)
    | \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n;]*;?
    | \.reg\s+(?P<reg>[^;]*);
    | \.branchtargets\s+(?P<targets>[^;]*);
    | (?P<variable>\.(?:shared|local|global|const)\b[^;]*);
    | (?P<pragma>\.pragma\b[^;]*);
    | (?P<other>\.[a-z_]+)
    )""",
    re.VERBOSE,
)
_PARAMETER = re.compile(
    r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s*"
    r"(?:\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?\s*)?"
    r"([\w$%]+)\s*(?:\[\s*(\d*)\s*\])?\s*$"
)
_VARIABLE = re.compile(
    r"\s*((?:\.(?:visible|weak|extern|common)\s+)*)\.(shared|global|const|local)\b\s*(?:\.align\s+(\d+)\s*)?"
    r"((?:\.v[24]\s*)?)\.(\w+)\s+([\w$%]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_DIRECTIVE = re.compile(r"\s*\.(\w+)((?:\s+\d+)?(?:\s*,\s*\d+)*)\s*")
_USED = re.compile(r'\s*\.pragma\s+"used_bytes_mask\s+(\w+)"')
_RANGE = re.compile(r"([%$_A-Za-z][\w$]*)\s*(?:<\s*(\d+)\s*>)?$")


def _without_comments(text: str) -> str:
    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found[0] == '"' else "\n" * found.count("\n") or " "

    return _COMMENT.sub(blank, text)


class _Lines:
    def __init__(self, text: str) -> None:
        self.starts = [match.end() for match in re.finditer("\n", text)]

    def at(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position) + 1


def _skip_block(text: str, position: int) -> int:
    depth = 1
    while depth:
        opening, closing = text.find("{", position), text.find("}", position)
        if closing < 0:
            raise ValueError("a brace is not closed")
        if 0 <= opening < closing:
            depth, position = depth + 1, opening + 1
        else:
            depth, position = depth - 1, closing + 1
    return position


def _numbers(text: str) -> Iterator[int | float]:
    for part in re.split(r"[{},\s]+", text):
        if not part:
            continue
        constant = parse_operand(part)
        if not isinstance(constant, Constant):
            raise ValueError(f"initialiser {part!r} is not a number")
        yield constant.value


def _variable(text: str) -> Variable:
    match = _VARIABLE.match(text)
    if not match:
        raise ValueError(f"cannot read the variable {text.strip()!r}")
    prefix, space, align, vector, kind, name, dimensions, initial = match.groups()
    if kind not in TYPE_BYTES or kind == "pred":
        raise ValueError(f"variables of type .{kind} are not modelled")
    element = TYPE_BYTES[kind]
    each = element * (int(vector.strip()[2:]) if vector else 1)
    size = each
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        size *= int(dimension or 0)
    data = b""
    if initial:
        values = list(_numbers(initial))
        if kind in ("f32", "f64") and any(isinstance(value, float) for value in values):
            data = struct.pack(f"<{len(values)}{'f' if element == 4 else 'd'}", *values)
        else:
            data = b"".join(
                (int(value) & ((1 << 8 * element) - 1)).to_bytes(element, "little")
                for value in values
            )
    if not size and "extern" not in prefix and len(data):
        size = len(data)
    return Variable(name, space, int(align or each), size, data.ljust(size, b"\0") if data else b"")


def _parameters(text: str) -> list[Parameter]:
    parameters = []
    for part in text.split(",") if text.strip() else []:
        match = _PARAMETER.match(part)
        if not match or match.group(2) not in TYPE_BYTES:
            raise ValueError(f"cannot read the parameter {part.strip()!r}")
        align, kind, name, count = match.groups()
        size = TYPE_BYTES[kind]
        total = size * int(count or 1)
        parameters.append(Parameter(name, kind, int(align or size), total, count is not None))
    return parameters


def _declare_registers(scope: Scope, text: str) -> None:
    head, _, names = text.strip().partition(" ")
    kind = head.strip().lstrip(".")
    if not names:
        head, _, names = re.sub(r"\s+", " ", text.strip()).partition(" ")
        kind = head.lstrip(".")
    if kind not in TYPE_BYTES:
        raise ValueError(f"registers of type .{kind} are not modelled")
    for item in names.split(","):
        match = _RANGE.match(item.strip())
        if not match:
            raise ValueError(f"cannot read the register {item.strip()!r}")
        if match.group(2):
            scope.ranges[match.group(1)] = (int(match.group(2)), TYPE_BYTES[kind])
        else:
            scope.registers[match.group(1)] = Register(match.group(1), TYPE_BYTES[kind])


def _parse_body(text: str, position: int, kernel: Kernel, lines: _Lines) -> int:
    """Reads instructions up to the brace that closes the kernel; returns the position after it."""
    scope = kernel.scope
    instructions = kernel.instructions
    source = (0, 0)
    used = 0
    match_at = _BODY.match
    while True:
        match = match_at(text, position)
        if not match:
            raise ValueError(f"cannot read {text[position : position + 60].strip()!r}")
        kind = match.lastgroup
        if kind == "operands":
            written = match["operands"].strip()
            start = match.start("name")
            if match["name"].partition(".")[0] == "call":
                raise PtxError(lines.at(start), "calls of functions are not modelled")
            try:
                operands = (
                    tuple([parse_operand(part) for part in _split(written)]) if written else ()
                )
            except ValueError as error:
                raise PtxError(lines.at(start), str(error)) from error
            instructions.append(
                Instruction(
                    match["name"],
                    operands,
                    match["guard"] or "",
                    match["not"] == "!",
                    lines.at(start),
                    source,
                    scope,
                    used,
                )
            )
            used = 0
        elif kind == "label":
            scope.labels[match["label"]] = len(instructions)
            following = match_at(text, match.end())
            if following and following["targets"] is not None:
                names = tuple(name.strip() for name in following["targets"].split(","))
                scope.tables[match["label"]] = names
                match = following
        elif kind == "brace":
            if match["brace"] == "{":
                scope = Scope(scope)
            elif scope is kernel.scope:
                return match.end()
            else:
                assert scope.parent is not None
                scope = scope.parent
        elif kind == "line":
            source = (int(match["file"]), int(match["line"]))
        elif kind == "pragma":
            used = int(mask[1], 0) if (mask := _USED.match(match["pragma"])) else used
        elif kind == "reg":
            _declare_registers(scope, match["reg"])
        elif kind == "variable":
            variable = _variable(match["variable"])
            scope.variables[variable.name] = variable
            kernel.variables.append(variable)
        elif kind == "targets":
            raise ValueError(".branchtargets without a label")
        elif kind == "other":
            where = " (a call of a function)" if match["other"] == ".param" else ""
            raise ValueError(f"{match['other']}{where} is not modelled")
        position = match.end()


def _parse_entry(text: str, match: re.Match[str], module: Module, lines: _Lines) -> int:
    position = match.end()
    parameters: list[Parameter] = []
    if text[position : position + 1] == "(":
        close = text.index(")", position)
        parameters = _parameters(text[position + 1 : close])
        position = close + 1
    directives: dict[str, tuple[int, ...]] = {}
    while True:
        directive = _DIRECTIVE.match(text, position)
        if not directive:
            break
        numbers = tuple(int(number) for number in re.findall(r"\d+", directive.group(2)))
        directives[directive.group(1)] = numbers
        position = directive.end()
    opening = re.compile(r"\s*\{").match(text, position)
    if not opening:
        raise ValueError(f"kernel {match['entry']} has no body")
    kernel = Kernel(
        match["entry"], parameters, directives, [], Scope(None), [], lines.at(match.start("entry"))
    )
    try:
        position = _parse_body(text, opening.end(), kernel, lines)
    except PtxError:
        raise
    except ValueError as error:
        line = kernel.instructions[-1].line if kernel.instructions else kernel.line
        raise PtxError(line, f"{error} (after this line)") from error
    module.kernels[kernel.name] = kernel
    return position


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """The module of a PTX text. The result is shared: treat it as constant."""
    module = Module(text)
    clean = _without_comments(text).rstrip()
    lines = _Lines(clean)
    position = 0
    while position < len(clean):
        match = _TOP.match(clean, position)
        if not match:
            rest = clean[position:].lstrip()
            line = lines.at(len(clean) - len(rest))
            raise PtxError(line, f"cannot read {rest[:60]!r}")
        position = match.end()
        try:
            if match["entry"]:
                position = _parse_entry(clean, match, module, lines)
            elif match["variable"]:
                variable = _variable(match["variable"])
                module.variables[variable.name] = variable
            elif match["function"] is not None:
                module.functions.append(match["function"].strip())
                if match["open"] == "{":
                    position = _skip_block(clean, position)
            elif match["file"] is not None:
                module.files[int(match["number"])] = match["file"]
            elif match["version"]:
                module.version = match["version"]
            elif match["target"]:
                module.target = match["target"].strip()
            elif match["bits"] and match["bits"] != "64":
                raise ValueError(f"addresses of {match['bits']} bits are not modelled")
        except PtxError:
            raise
        except ValueError as error:
            raise PtxError(lines.at(match.start()), str(error)) from error
    return module
