"""``python -m cute_fmha.compile``: compile Blackwell kernels ahead of time, with no GPU.

The kernels go to the cache that calls read (``$CUTE_FMHA_CACHE``, default ~/.cache/cute_fmha): with
the same package versions and on the same kind of processor, a call that needs one of them finds it
there. Head dims, dtypes and options make a kernel, the batch and long lengths do not; how heads are
packed into tiles depends on h and on short sq.

Examples:

    python -m cute_fmha.compile --problem s4096,h32,d128,causal
    python -m cute_fmha.compile --arch all --problem s4096,hq32,hkv8,d128,causal,fp16 \\
        --problem s4096,h128,d192,causal,lse

"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from cute_fmha import cache, machine_code
from cute_fmha.kernels.blackwell import launch
from cute_fmha.kernels.blackwell.kernel_plan import SHARED_BYTES
from cute_fmha.problem import Target
from cute_fmha.problem_text import SYNTAX, ProblemError, ProblemText, parse

SHOWN = {
    "tensor core": ("UTCHMMA", "UTCBAR"),
    "tensor memory": ("LDTM", "STTM"),
    "TMA": ("UTMALDG", "UTMASTG", "UTMAREDG"),
    "barriers": ("SYNCS", "BAR"),
    "exponentials": ("MUFU.EX2",),
    "packed arithmetic": ("FFMA2", "FADD2", "FMUL2"),
    "maxima": ("FMNMX",),
    "spills": ("STL", "LDL"),
}
"""Kinds of SASS instructions that are counted, by the beginnings of their names."""

SMS = 148


def capability_of(arch: str) -> int:
    return {name: capability for capability, name in launch.ARCHITECTURES.items()}[arch]


def compiled(problem: ProblemText, arch: str) -> dict[str, Any]:
    """Compile one kernel, or find it, and say what it is."""
    prepared = launch.prepare(problem.problem, Target("cuda", capability_of(arch), SMS))
    plan, binary = prepared.plan, prepared.binary
    code = machine_code.read(binary.cubin)
    return {
        "problem": problem.text,
        "arch": arch,
        "kernel": binary.key.kernel,
        "plan": _plan(plan),
        "threads": plan.threads,
        "registers": {"entry": code.registers} | {r.name: r.registers for r in plan.roles},
        "stack": code.stack,
        "local": code.local,
        "shared": {"bytes": plan.shared_bytes, "of": SHARED_BYTES, "parts": plan.shared_parts},
        "tmem_columns": plan.tmem.columns,
        "tmem": {region.name: [region.start, region.end] for region in plan.tmem.regions},
        "instructions": sum(code.instructions.values()),
        "counts": {
            kind: {name: code.count(name) for name in names} for kind, names in SHOWN.items()
        },
        "path": str(cache.path_of(binary.key)),
    }


def _plan(plan: Any) -> dict[str, Any]:
    """Its numbers and what is compiled in; head dims and dtypes are the problem's."""
    numbers: dict[str, Any] = {
        field.name: value
        for field in dataclasses.fields(plan)
        if isinstance(value := getattr(plan, field.name), int | float)
    }
    features = plan.features
    present = [f.name for f in dataclasses.fields(features) if getattr(features, f.name)]
    return numbers | {"features": present}


def text_of(found: dict[str, Any], seconds: float) -> str:
    shared = found["shared"]
    parts = ", ".join(f"{name} {size}" for name, size in shared["parts"].items())
    regions = ", ".join(f"{name} {a}–{b - 1}" for name, (a, b) in found["tmem"].items())
    plan = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in found["plan"].items()
    )
    registers = ", ".join(f"{n} {r}" for n, r in found["registers"].items() if n != "entry")
    lines = [
        f"{found['problem']}: {found['kernel']} for {found['arch']}, {seconds:.1f} s",
        f"  kept in          {found['path']}",
        f"  plan             {plan}",
        f"  registers        {found['registers']['entry']} per thread at entry, {found['threads']} "
        f"threads; then {registers}",
        f"  stack, local     {found['stack']}, {found['local']} bytes",
        f"  shared memory    {shared['bytes']} bytes of {shared['of']}: {parts}",
        f"  TMEM columns     {found['tmem_columns']}: {regions}",
        f"  SASS             {found['instructions']} instructions, of which",
    ]
    for kind, counts in found["counts"].items():
        numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"    {kind:<18} {numbers}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.compile",
        description=__doc__,
        epilog=SYNTAX,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    architectures = (*launch.ARCHITECTURES.values(), "all")
    add = parser.add_argument
    add("--problem", action="append", required=True, metavar="PROBLEM", help="may be repeated")
    add(
        "--arch",
        action="append",
        choices=architectures,
        help="what to compile for; may be repeated (default: sm_100a)",
    )
    add("--json", action="store_true", help="print one JSON document instead of text")
    add("--quiet", action="store_true", help="do not say what is going on")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    chosen = options.arch or ["sm_100a"]
    archs = list(launch.ARCHITECTURES.values()) if "all" in chosen else list(dict.fromkeys(chosen))
    if not options.quiet:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("cute_fmha").setLevel(logging.INFO)
    records = []
    try:
        problems = [parse(text) for text in options.problem]
        for problem in problems:
            for arch in archs:
                start = time.monotonic()
                records.append(compiled(problem, arch))
                if not options.json:
                    print(text_of(records[-1], time.monotonic() - start) + "\n", flush=True)
    except (ProblemError, NotImplementedError, machine_code.ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
