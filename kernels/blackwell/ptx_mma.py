"""tcgen05.mma of all K steps in one piece of PTX; see `mma`."""

from __future__ import annotations

from typing import Any

from cutlass import Int32
from cutlass.cutlass_dsl import dsl_user_op

from cute_fmha.kernels.blackwell.ptx import commit_line, inline, wait_lines


def _group(pair: bool) -> str:
    return "cta_group::2" if pair else "cta_group::1"


def _mma(
    steps: tuple[tuple[int, int], ...], a_shared: bool, first_enable: str, form: str,
    gates: dict[int, list[str]] | None = None, last: str = "",
) -> str:  # fmt: skip
    """The MMAs of all K steps, by the elected lane: D $0, descriptor $1, words of B's descriptor
    $2 $3, A's words $4 $5 or TMEM address $4; operands advance by the (a, b) of ``steps``. With
    ``first_enable`` p the operand after A says whether the first MMA adds to D. ``gates``: lines
    to come before steps; ``last``: a line at the end."""
    lines = [
        ".reg .pred e, p, q;", ".reg .b32 la, lb;", ".reg .b64 da, db;",
        "elect.sync _|e, 0xffffffff;",
    ]  # fmt: skip
    if first_enable == "p":
        lines.append(f"setp.ne.b32 p, {'$6' if a_shared else '$5'}, 0;")

    def descriptor(name: str, low: str, high: str, step: int) -> list[str]:
        if step == 0:
            return [f"mov.b64 d{name}, {{{low}, {high}}};"]
        return [f"add.s32 l{name}, {low}, {step};", f"mov.b64 d{name}, {{l{name}, {high}}};"]

    for index, (step_a, step_b) in enumerate(steps):
        lines += (gates or {}).get(index, [])
        lines += descriptor("b", "$2", "$3", step_b)
        if a_shared:
            lines += descriptor("a", "$4", "$5", step_a)
        a = "da" if a_shared else f"[$4 + {step_a}]"
        enable = "1" if index else first_enable
        lines.append(f"@e tcgen05.mma.{form}.kind::f16 [$0], {a}, db, $1, {enable};")
    lines.append(last)
    return "{\n\t" + "\n\t".join(lines) + "\n\t}"


@dsl_user_op
def tcgen05_mma_shared(
    accumulator: Int32, a: tuple[Int32, Int32], b: tuple[Int32, Int32], descriptor: int,
    steps: tuple[tuple[int, int], ...], done: tuple[Int32, int], pair: bool = False,
    *, loc=None, ip=None,
) -> None:  # fmt: skip
    """tcgen05.mma kind::f16 for every K step, from descriptors given as (low, high) words;
    overwrites the accumulator. Commits to ``done``, an mbarrier's address and an offset."""
    values = (Int32(accumulator), Int32(descriptor), *b, *a, Int32(done[0]))
    last = commit_line(f"$6 + {done[1]}", pair)
    inline(
        _mma(steps, True, "0", _group(pair), last=last), [],
        [value.ir_value(loc=loc, ip=ip) for value in values], "r,r,r,r,r,r,r", effects=True,
        loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_mma_tmem(
    accumulator: Int32, a: Int32, b: tuple[Int32, Int32], descriptor: int,
    steps: tuple[tuple[int, int], ...], accumulate: Int32, gates: dict[int, int],
    barrier: tuple[Int32, Int32], pair: bool = False, *, loc=None, ip=None,
) -> None:  # fmt: skip
    """tcgen05.mma kind::f16 with A in TMEM, for every K step; the first adds to the accumulator
    where ``accumulate`` is not 0. ``gates``: the steps before which to wait for what comes of A by
    then, and the offset of its mbarrier from the address in ``barrier``, which has the phase."""
    values = (Int32(x) for x in (accumulator, descriptor, *b, a, accumulate, *barrier))
    waits = {
        step: ["{", *wait_lines(f"$6 + {offset}", "$7"), "}", "tcgen05.fence::after_thread_sync;"]
        for step, offset in gates.items()
    }
    inline(
        _mma(steps, False, "p", _group(pair), waits), [],
        [value.ir_value(loc=loc, ip=ip) for value in values], "r,r,r,r,r,r,r,r",
        effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_mma(
    form: str, accumulator: Int32, a: Int32 | tuple[Int32, Int32], b: tuple[Int32, Int32],
    descriptor: int, steps: tuple[tuple[int, int], ...], accumulate: Any, *, loc=None, ip=None,
) -> None:  # fmt: skip
    """tcgen05.mma kind::f16 of ``form`` ("ws.cta_group::1", "cta_group::2") for every K step; A is
    a descriptor's (low, high) words or a TMEM address. The first step adds to the accumulator
    where ``accumulate`` holds."""
    shared = isinstance(a, tuple)
    words = a if isinstance(a, tuple) else (Int32(a),)
    values: tuple[Any, ...] = (Int32(accumulator), Int32(descriptor), *b, *words)
    enable = str(int(accumulate)) if isinstance(accumulate, bool) else "p"
    if enable == "p":
        values = (*values, Int32(accumulate))
    inline(
        _mma(steps, shared, enable, form), [], [value.ir_value(loc=loc, ip=ip) for value in values],
        ",".join(["r"] * len(values)), effects=True, loc=loc, ip=ip,
    )  # fmt: skip
