"""Which registers may share a place: those that are never live at the same time.

Kernels name thousands of registers and keep a few hundred alive; shared places keep the register
file of a warp in the cache. Lanes of a warp may be at different instructions, but a lane only sees
its own values, and along its path two registers in one place are never live together.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

# Instructions that write their first operand whenever they execute, and read only the others.
# Anything else counts as reading all it names, which keeps registers alive for longer.
_WRITES_FIRST = {
    "mov", "add", "addc", "sub", "subc", "mul", "mad", "madc", "fma", "and", "or", "xor", "not",
    "cnot", "neg", "abs", "min", "max", "shl", "shr", "shf", "cvt", "selp", "slct", "setp",
    "set", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div", "rem", "lop3",
    "prmt", "bfe", "bfi", "bfind", "brev", "popc", "clz", "fns", "dp4a", "dp2a", "sad", "testp",
    "copysign", "bmsk", "szext", "mul24", "mad24", "ld", "ldu", "ldmatrix", "shfl", "vote",
    "match", "redux", "elect", "activemask", "cvta", "mapa", "getctarank", "isspacep", "atom",
    "read_clock",
}  # fmt: skip
_WRITES_FIRST_PREFIXES = (
    "tcgen05.ld.",
    "mbarrier.try_wait.",
    "mbarrier.test_wait.",
    "mbarrier.arrive.",
    "clusterlaunchcontrol.query_cancel.",
)
_ENDS = frozenset(("bra", "ret", "exit", "trap", "brx"))


@dataclass(slots=True)
class Step:
    """What one instruction does: register indices, and where it may go."""

    reads: list[int]
    writes: list[int]  # in full
    targets: Sequence[int]
    falls_through: bool


def writes_first(name: str, guarded: bool, to_address: bool) -> bool:
    """Whether the first operand is a destination that gets a value in every active lane."""
    if guarded or to_address:
        return False
    return name.partition(".")[0] in _WRITES_FIRST or name.startswith(_WRITES_FIRST_PREFIXES)


def falls_through(name: str, guarded: bool) -> bool:
    """Whether the next instruction may follow."""
    return guarded or name.partition(".")[0] not in _ENDS


@dataclass(slots=True)
class _Block:
    start: int
    end: int  # exclusive
    used: int = 0  # sets of registers as bits
    killed: int = 0
    live_in: int = 0
    live_out: int = 0


def _blocks(steps: Sequence[Step]) -> list[_Block]:
    starts = {0}
    for pc, step in enumerate(steps):
        starts.update(step.targets)
        if step.targets or not step.falls_through:
            starts.add(pc + 1)
    order = sorted(start for start in starts if start < len(steps))
    ends = [*order[1:], len(steps)]
    return [_Block(start, end) for start, end in zip(order, ends, strict=True)]


def _bits(numbers: int) -> list[int]:
    found = []
    base = 0
    while numbers:
        word = numbers & 0xFFFFFFFFFFFFFFFF
        while word:
            low = word & -word
            found.append(base + low.bit_length() - 1)
            word ^= low
        numbers >>= 64
        base += 64
    return found


def intervals(steps: Sequence[Step], count: int) -> tuple[list[int], list[int]]:
    """First and last instruction at which each register is live or named; last < first: never."""
    first, last = [len(steps)] * count, [-1] * count
    blocks = _blocks(steps)
    at = {block.start: i for i, block in enumerate(blocks)}
    for block in blocks:
        used = killed = 0
        for pc in range(block.start, block.end):
            step = steps[pc]
            for register in step.reads:
                if pc < first[register]:
                    first[register] = pc
                if pc > last[register]:
                    last[register] = pc
                bit = 1 << register
                if not killed & bit:
                    used |= bit
            for register in step.writes:
                if pc < first[register]:
                    first[register] = pc
                if pc > last[register]:
                    last[register] = pc
                killed |= 1 << register
        block.used, block.killed = used, killed
    following = []
    for block in blocks:
        step = steps[block.end - 1]
        targets = [at[target] for target in step.targets if target < len(steps)]
        if step.falls_through and block.end < len(steps):
            targets.append(at[block.end])
        following.append(targets)
    changed = True
    while changed:
        changed = False
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            out = 0
            for target in following[i]:
                out |= blocks[target].live_in
            live = block.used | (out & ~block.killed)
            block.live_out = out
            if live != block.live_in:
                block.live_in = live
                changed = True
    for block in blocks:
        for register in _bits(block.live_in):
            first[register] = min(first[register], block.start)
            last[register] = max(last[register], block.start)
        for register in _bits(block.live_out):
            first[register] = min(first[register], block.end - 1)
            last[register] = max(last[register], block.end - 1)
    return first, last


def places(
    first: Sequence[int], last: Sequence[int], sizes: Sequence[int]
) -> tuple[array[int], int]:
    """Byte offsets of registers with these sizes and live intervals, and the bytes of all."""
    offsets = array("q", [0] * len(sizes))
    end = 0
    for size in sorted(set(sizes)):
        end = -(-end // max(size, 128)) * max(size, 128)
        members = [i for i, own in enumerate(sizes) if own == size]
        members.sort(key=lambda i: first[i])
        busy: list[tuple[int, int]] = []  # last instruction, offset
        free: list[int] = []
        for i in members:
            while busy and busy[0][0] < first[i]:
                free.append(heapq.heappop(busy)[1])
            if free:
                place = free.pop()
            else:
                place = end
                end += size
            offsets[i] = place
            heapq.heappush(busy, (max(last[i], first[i]), place))
    return offsets, -(-end // 128) * 128
