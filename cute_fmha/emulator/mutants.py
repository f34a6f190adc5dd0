"""The mutants of a program: one instruction altered at a time (see mutate.py, which runs them)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .machine import Program
from .ptx import Address, Constant, Instruction, Kernel, Name, Operand, Scope, Vector

__all__ = ["Mutant", "Patch", "mutants"]

COLUMN_BLOCK = 32  # of tensor memory
SKIP, ASSIGN, ADD, XOR, RENAME, WATCH = range(6)  # PatchKind of patch.c


# ---------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Patch:
    """What patch.c does to an instruction; `operand` is a path: an index, then indices of parts."""

    kind: int
    operand: tuple[int, ...] = ()
    value: int = 0
    name: str = ""


@dataclass(frozen=True)
class Mutant:
    """One altered instruction. `order`: the change takes away ordering, not a number."""

    group: str
    change: str
    pc: int
    line: int
    text: str
    source: tuple[str, int]
    patch: Patch
    order: bool

    def __str__(self) -> str:
        file, line = self.source
        python = f" ({file.rpartition('/')[2]}:{line})" if line else ""
        return f"{self.change} at PTX line {self.line}{python}: {self.text}"


_Change = tuple[str, str, Patch, bool]  # group, change, patch, order


def _order(group: str, change: str, patch: Patch) -> _Change:
    return group, change, patch, True


def _number(group: str, change: str, kind: int, path: tuple[int, ...], value: int) -> _Change:
    return group, change, Patch(kind, path, value), False


def _deleted(group: str) -> _Change:
    return _order(group, "deleted", Patch(SKIP))


def _mbarrier(parts: list[str], operands: tuple[Operand, ...]) -> Iterator[_Change]:
    what = parts[1]
    if what in ("arrive", "arrive_drop"):
        bytes_too = "expect_tx" in parts
        group = "mbarrier.arrive.expect_tx" if bytes_too else "mbarrier.arrive"
        yield _order(group, "deleted", Patch(ASSIGN))
        if bytes_too:
            yield _number("expect_tx bytes", "16 bytes more", ADD, (2,), 16)
            yield _number("expect_tx bytes", "16 bytes fewer", ADD, (2,), -16)
    elif what == "expect_tx":
        yield _deleted("mbarrier.expect_tx")
        yield _number("expect_tx bytes", "16 bytes more", ADD, (1,), 16)
        yield _number("expect_tx bytes", "16 bytes fewer", ADD, (1,), -16)
    elif what in ("try_wait", "test_wait"):
        yield _order("mbarrier wait", "succeeds at once", Patch(ASSIGN, value=1))
        if "parity" in parts:
            yield _number("mbarrier wait parity", "flipped", XOR, (2,), 1)
    elif what == "init":
        yield "mbarrier.init", "deleted", Patch(SKIP), False
        yield _number("mbarrier.init count", "1 more", ADD, (1,), 1)
        yield _number("mbarrier.init count", "1 fewer", ADD, (1,), -1)


def _barrier(name: str, parts: list[str], operands: tuple[Operand, ...]) -> Iterator[_Change]:
    if parts[1] == "cluster" and len(parts) > 2 and parts[2] in ("arrive", "wait"):
        yield _deleted(f"barrier.cluster.{parts[2]}")
    elif parts[1] == "warp":
        yield "bar.warp.sync", "deleted", Patch(SKIP), False  # order within a warp: not modelled
    elif "arrive" in parts:
        yield _deleted("bar.arrive")
        yield _number("barrier threads", "32 more", ADD, (1,), 32)
    elif "sync" in parts:
        yield _deleted("bar.sync")
        if len(operands) == 2:
            arrive = name.replace("sync", "arrive")
            yield _order("bar.sync", "does not wait", Patch(RENAME, name=arrive))
            yield _number("barrier threads", "32 more", ADD, (1,), 32)


def _copy_operands(parts: list[str], operands: tuple[Operand, ...]) -> Iterator[_Change]:
    if any(part.startswith(("wait_group", "wait_all")) for part in parts):
        group = ".".join(part for part in parts[:5])
        yield _deleted(group)
        if operands:
            yield _order(group, "leaves one group more", Patch(ADD, (0,), 1))
    elif "commit_group" in parts:
        yield _deleted(".".join(parts))
    elif parts[:3] == ["cp", "async", "mbarrier"]:
        yield _deleted("cp.async.mbarrier.arrive")
    elif "tensor" in parts and "prefetch" not in parts:
        for i, operand in enumerate(operands):
            if isinstance(operand, Vector) and len(operand.parts) == 2:
                coordinates = operand.parts[1]
                if isinstance(coordinates, Vector):
                    for k in range(len(coordinates.parts)):
                        yield _number("TMA coordinate", f"{k}: 1 more", ADD, (i, 1, k), 1)
        shared = 0 if isinstance(operands[0], Address) else 1
        yield _number("TMA shared address", "128 bytes more", ADD, (shared,), 128)


_SHARED_FIELDS = (
    ("start address", 1 << 3),
    ("LBO", 1 << 16),
    ("SBO", 1 << 32),
    ("swizzle", 6 << 61),
)
_INSTRUCTION_FIELDS = (
    ("A format", 1 << 7),
    ("A negated", 1 << 13),
    ("A transposed", 1 << 15),
    ("B transposed", 1 << 16),
    ("M", 12 << 24),
)
_SIXTEEN_COLUMNS = 2 << 17  # of N in an instruction descriptor


def _mma(operands: tuple[Operand, ...]) -> Iterator[_Change]:
    for i, operand in enumerate(operands):
        if isinstance(operand, Address):
            yield _number("TMEM address", f"{COLUMN_BLOCK} columns more", ADD, (i,), COLUMN_BLOCK)
        elif i in (1, 2):
            for name, value in _SHARED_FIELDS:
                group = f"shared descriptor {name}"
                yield _number(group, f"of {'AB'[i - 1]} changed", XOR, (i,), value)
        elif i == 3:
            for name, value in _INSTRUCTION_FIELDS:
                yield _number("instruction descriptor", f"{name} changed", XOR, (i,), value)
            group, fewer = "instruction descriptor", "N is 16 less"
            yield _number(group, fewer, ADD, (i,), -_SIXTEEN_COLUMNS)
        elif i == 4 or isinstance(operand, Name):
            yield _number("MMA accumulates", "flipped", XOR, (i,), 1)


def _tensor(parts: list[str], operands: tuple[Operand, ...]) -> Iterator[_Change]:
    what = parts[1]
    if what == "commit":
        yield _deleted("tcgen05.commit")
    elif what.startswith("wait::"):
        yield _deleted(f"tcgen05.{what}")
    elif what.startswith("fence::"):
        yield _deleted("tcgen05.fence")
    elif what == "mma":
        yield from _mma(operands)
    elif what in ("ld", "st", "cp"):
        at = 1 if what == "ld" else 0
        yield _number("TMEM address", f"{COLUMN_BLOCK} columns more", ADD, (at,), COLUMN_BLOCK)


_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def _access_bytes(parts: list[str]) -> int:
    size = next((_BYTES[part[1:]] for part in parts if part[1:] in _BYTES), 4)
    return size * next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)


def _changes(name: str, operands: tuple[Operand, ...]) -> Iterator[_Change]:
    parts = name.split(".")
    base = parts[0]
    if base == "mbarrier":
        yield from _mbarrier(parts, operands)
    elif base in ("bar", "barrier"):
        yield from _barrier(name, parts, operands)
    elif base in ("fence", "membar"):
        yield _deleted(".".join(parts[:3]) if "proxy" in parts else ".".join(parts[:2]))
    elif base == "cp" and len(parts) > 2:
        yield from _copy_operands(parts, operands)
    elif base == "tcgen05":
        yield from _tensor(parts, operands)
    elif base in ("ld", "st") and len(parts) > 1 and parts[1].startswith("shared"):
        size = _access_bytes(parts)
        at = 1 if base == "ld" else 0
        yield _number(f"{base}.shared offset", f"{size} bytes more", ADD, (at,), size)
    elif base == "griddepcontrol":
        yield _deleted(name)


# ---------------------------------------------------------------- loops


def _own(instruction: Instruction, operand: Operand) -> tuple[int, str] | None:
    """A register as a key: the scope that declares it, and its name."""
    if not isinstance(operand, Name) or operand.negate:
        return None
    scope: Scope | None = instruction.scope
    register = scope.register(operand.text) if scope else None
    return None if register is None else (id(register), operand.text)


def _in_loops(kernel: Kernel) -> list[bool]:
    """Which instructions lie between a label and a branch back to it."""
    inside = [0] * (len(kernel.instructions) + 1)
    for pc, instruction in enumerate(kernel.instructions):
        if not instruction.name.startswith("bra"):
            continue
        for operand in instruction.operands:
            target = instruction.scope.label(operand.text) if isinstance(operand, Name) else None
            if target is not None and target <= pc:
                inside[target] += 1
                inside[pc + 1] -= 1
    depth, result = 0, []
    for change in inside[:-1]:
        depth += change
        result.append(depth > 0)
    return result


def _loop_steps(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """Additions of a constant to a register that carries the sum to the next turn of a loop."""
    copies: dict[tuple[int, str], list[tuple[int, str]]] = {}
    additions = []
    inside = _in_loops(kernel)
    for pc, instruction in enumerate(kernel.instructions):
        operands = instruction.operands
        to = _own(instruction, operands[0]) if operands else None
        if to is None:
            continue
        base = instruction.name.partition(".")[0]
        if base in ("mov", "selp"):
            for operand in operands[1:3]:
                source = _own(instruction, operand)
                if source is not None:
                    copies.setdefault(source, []).append(to)
        elif base in ("add", "sub") and len(operands) == 3 and inside[pc]:
            source = _own(instruction, operands[1])
            if source is not None and isinstance(operands[2], Constant):
                additions.append((pc, to, source, int(operands[2].value)))
    for pc, to, source, step in additions:
        seen, left = {to}, [to]
        while left and source not in seen:
            for further in copies.get(left.pop(), ()):
                if further not in seen:
                    seen.add(further)
                    left.append(further)
        if source in seen and step:
            yield pc, step


# ---------------------------------------------------------------- all of a program


def mutants(program: Program) -> list[Mutant]:
    """Every mutant of a program, in the order of its instructions."""
    kernel = program.kernel
    found: list[Mutant] = []

    def add(pc: int, change: _Change) -> None:
        group, what, patch, order = change
        line = program.assembled.lines[pc]
        text = program.module.line(line)
        source = program.assembled.sources[pc]
        found.append(Mutant(group, what, pc, line, text, source, patch, order))

    steps = dict(_loop_steps(kernel))
    for pc, instruction in enumerate(kernel.instructions):
        for change in _changes(instruction.name, instruction.operands):
            add(pc, change)
        if pc in steps:
            add(pc, _number("loop step", "doubled", ADD, (2,), steps[pc]))
    return found
