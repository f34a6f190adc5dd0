"""Random programs: structured control flow, many registers, lanes that disagree."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from cute_fmha.emulator.machine import Policy, load, run_ptx

MASK = 0xFFFFFFFF
VARIABLES = 12  # live across blocks; the first is the lane's input
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "max.u32": max,
}


@dataclass
class Program:
    """Random PTX and, as closures, what each lane should do."""

    random: np.random.Generator
    lines: list[str] = field(default_factory=list)
    far: list[str] = field(default_factory=list)  # blocks laid out behind the end
    names: itertools.count = field(default_factory=itertools.count)
    temporaries: int = 0

    def number(self, n: int) -> int:
        return int(self.random.integers(n))

    def assign(self, lines: list[str]) -> list:
        """target = a op b through two temporaries, sometimes under a guard."""
        target, a, b = self.number(VARIABLES), self.number(VARIABLES), self.number(VARIABLES)
        name = list(OPERATIONS)[self.number(len(OPERATIONS))]
        constant = self.number(1 << 16)
        first, second = self.temporaries, self.temporaries + 1
        self.temporaries += 2
        lines.append(f"{name} %t{first}, %v{a}, %v{b};")
        lines.append(f"xor.b32 %t{second}, %t{first}, {constant};")
        guard = self.number(4) == 0
        if guard:
            lines.append(f"and.b32 %t{first}, %v{a}, 4; setp.ne.u32 %q, %t{first}, 0;")
        lines.append(f"{'@%q ' if guard else ''}mov.b32 %v{target}, %t{second};")
        return ["assign", target, a, b, name, constant, guard]

    def block(self, depth: int, lines: list[str]) -> list[list]:
        kinds = ["assign", "assign", "if", "loop"] if depth else ["assign"]
        return [self.statement(kinds[self.number(len(kinds))], depth, lines) for _ in range(3)]

    def statement(self, kind: str, depth: int, lines: list[str]) -> list:
        if kind == "assign":
            return self.assign(lines)
        label, which = next(self.names), self.number(VARIABLES)
        bit = 1 << self.number(5)
        test = f"and.b32 %t{self.temporaries}, %v{which}, {bit};"
        test += f" setp.ne.u32 %p{label}, %t{self.temporaries}, 0;"
        self.temporaries += 1
        if kind == "if":
            lines.append(f"{test} @!%p{label} bra ELSE{label};")
            then = self.block(depth - 1, lines)
            lines.append(f"bra END{label};")
            if self.number(3):
                lines.append(f"ELSE{label}:")
                otherwise = self.block(depth - 1, lines)
            else:  # out of line: the lanes jump far ahead and come back
                block = [f"ELSE{label}:"]
                otherwise = self.block(depth - 1, block)
                self.far += [*block, f"bra END{label};"]
            lines.append(f"END{label}:")
            return ["if", which, bit, then, otherwise]
        counter = self.number(3) + 1  # this many times, less where the lane leaves early
        lines.append(f"mov.b32 %c{label}, 0;\nLOOP{label}:")
        body = self.block(depth - 1, lines)
        lines.append(f"{test} @%p{label} bra OUT{label};")
        lines.append(f"add.u32 %c{label}, %c{label}, 1;")
        lines.append(f"setp.lt.u32 %p{label}, %c{label}, {counter}; @%p{label} bra LOOP{label};")
        lines.append(f"OUT{label}:")
        return ["loop", which, bit, counter, body]


def run_lane(block: list[list], v: list[int]) -> None:
    """The reference: one lane, statement by statement."""
    for statement in block:
        kind, *rest = statement
        if kind == "assign":
            target, a, b, name, constant, guard = rest
            value = (OPERATIONS[name](v[a], v[b]) & MASK) ^ constant
            if not guard or v[a] & 4:
                v[target] = value
        elif kind == "if":
            which, bit, then, otherwise = rest
            run_lane(then if v[which] & bit else otherwise, v)
        else:
            which, bit, counter, body = rest
            for _ in range(counter):
                run_lane(body, v)
                if v[which] & bit:
                    break


def generate(seed: int) -> tuple[str, list[list]]:
    program = Program(np.random.default_rng(seed))
    block = program.block(3, program.lines) + program.block(2, program.lines)
    labels = next(program.names)
    lines = "\n".join(program.lines)
    stores = "\n".join(f"st.global.u32 [%d3+{4 * i}], %v{i};" for i in range(VARIABLES))
    starts = "\n".join(f"add.u32 %v{i}, %v0, {i * 77};" for i in range(1, VARIABLES))
    source = f"""
    .version 8.8
    .target sm_100a
    .address_size 64
    .visible .entry k(.param .u64 out)
    {{
    .reg .pred %q; .reg .pred %p<{labels}>; .reg .b32 %c<{labels}>; .reg .b32 %v<{VARIABLES}>;
    .reg .b32 %t<{program.temporaries}>; .reg .b64 %d<9>; .reg .b32 %x<9>;
    ld.param.u64 %d1, [out]; mov.u32 %x1, %tid.x; mul.wide.u32 %d2, %x1, {4 * VARIABLES};
    add.s64 %d3, %d1, %d2; ld.global.u32 %v0, [%d3];
    {starts}
    {lines}
    bar.warp.sync -1;
    {stores}
    ret;
    {" ".join(program.far)}
    }}
    """
    return source, block


@pytest.mark.parametrize(
    "policy", [Policy(), Policy("random", 1, slice=3)], ids=["eager", "random"]
)
def test_random_programs(policy: Policy) -> None:
    first = int(time.time_ns() % 10**8)
    print(f"seeds from {first}")
    for seed in range(first, first + 20):
        source, block = generate(seed)
        random = np.random.default_rng(seed)
        out = np.zeros((64, VARIABLES), np.uint32)
        out[:, 0] = random.integers(0, 2**32, 64, dtype=np.uint32)
        expected = []
        for value in out[:, 0].tolist():
            v = [value, *((value + i * 77) & MASK for i in range(1, VARIABLES))]
            run_lane(block, v)
            expected.append(v)
        result = run_ptx(source, out, block=(64, 1, 1), policy=policy)
        assert out.tolist() == expected, f"seed {seed}"
        stores = [i for i, line in enumerate(result.program.kernel.instructions)
                  if line.name.startswith("st.global")]  # fmt: skip
        assert np.all(result.executed[:2, stores] == 1), f"seed {seed}: the lanes did not meet"


def test_registers_share_places() -> None:
    """Thousands of temporaries take little more room than those alive together."""
    source, _ = generate(5)
    assembled = load(source).assembled
    registers, size = assembled.sizes[1], assembled.sizes[0]
    assert size < registers * 128 / 4
