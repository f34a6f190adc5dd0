"""What the decode kernel of ordinary heads does for 128 keys in steady state, beside prefill's, and
what launches of both would take by the model that chooses between them.

python tests/cpu/blackwell/decode_counts.py: one sequence and KV head of 2048 keys less one of 1024,
over 8, executed by the emulator on one CTA. Cycles come from its model and are no measurements.
"""

from __future__ import annotations

import itertools

import torch

from cute_fmha.emulator import Policy, backend, emulated_calls
from cute_fmha.emulator.device import Device
from cute_fmha.emulator.machine import Counters
from cute_fmha.emulator.model import B200
from cute_fmha.kernels.blackwell import decode_host, launch, prefill_host
from cute_fmha.kernels.blackwell.launch import Host
from cute_fmha.problem import Problem, SkipSoftmax, Target
from cute_fmha.testing import Heads, Source, dense_case

POLICY = Policy("random", seed=1, races=False)
KEYS = (1024, 2048)
TARGET = Target("cuda", 100, 148)
SHAPES = ((8, 1), (32, 8), (64, 8))


def counted(host: Host, width: int, rows: int, keys: int, skip: SkipSoftmax | None) -> Counters:
    """``rows`` heads of one KV head; by ``host`` whichever would be chosen."""
    case = dense_case(
        1, 1, keys, Heads(rows, 1, width, width), source=Source(torch.bfloat16, std=0.3)
    )
    kernels, launch.KERNELS = launch.KERNELS, (host,)
    backend._prepared.cache_clear()
    try:
        with emulated_calls(POLICY, Device(sms=148)) as reports:
            case.run(backend="emulator", num_splits=1, skip=skip)
    finally:
        launch.KERNELS = kernels
    return reports[0].results[0].counters


def show(name: str, host: Host, width: int, rows: int, skip: SkipSoftmax | None = None) -> None:
    short, long = (counted(host, width, rows, keys, skip) for keys in KEYS)
    tiles = (KEYS[1] - KEYS[0]) / 128

    def per_tile(field: str) -> float:
        return (getattr(long, field) - getattr(short, field)) / tiles

    shared = sum(map(per_tile, ("shared_read_bytes", "shared_write_bytes", "mma_shared_bytes")))
    moves = (long.by_class["move"] - short.by_class["move"]) / tiles
    cells = [
        name, f"{per_tile('steps'):.0f}", f"{per_tile('steps') - moves:.0f}",
        f"{per_tile('tma_load_bytes'):.0f}", f"{per_tile('tensor_cycles'):.0f}",
        f"{shared / B200.shared_bytes:.0f}", f"{per_tile('cycles'):.0f}",
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)


def launches(width: int, batch: int, keys: int) -> None:
    """One line: thousands of cycles by decode and by prefill for every shape and 1 or 4 queries."""
    cells = []
    memory = 0.0
    for (heads_q, heads_kv), seqlen_q in itertools.product(SHAPES, (1, 4)):
        problem = Problem(
            "attention", "dense", False, torch.bfloat16, torch.bfloat16, batch, seqlen_q, keys,
            heads_q, heads_kv, width, width, window_right=0,
        )  # fmt: skip
        memory = 4 * width * keys * heads_kv * batch / B200.memory_bytes
        ours = max(memory, decode_host.cycles(problem, TARGET)) / 1000
        other = max(memory, prefill_host.cycles(problem, TARGET)) / 1000
        able = prefill_host.can_implement(problem, TARGET) is None
        cells.append(f"{ours:.0f} / {other:.0f}" if able else f"{ours:.0f} / –")
    print(f"| {width} | {batch} | {keys} | {' | '.join(cells)} |")


def main() -> None:
    print("| kernel | instructions | without moves | TMA bytes | MMA | shared memory | cycles |")
    for width in (64, 128, 256, 512):
        for rows in (16, 32):
            show(f"{width} wide, {rows} rows", decode_host, width, rows)
        if width == 128:
            show("the same with skip-softmax, 16 rows", decode_host, width, 16, SkipSoftmax(1e-6))
        if width < 512:
            show("prefill, up to 128 rows", prefill_host, width, 16)
    shapes = (f"{q}/{kv}, Sq {s}" for (q, kv), s in itertools.product(SHAPES, (1, 4)))
    print(f"\n| D | batch | keys | {' | '.join(shapes)} |")
    sizes = (64, 128, 256, 512), (1, 128), (1024, 8192, 131072)
    for width, batch, keys in itertools.product(*sizes):
        launches(width, batch, keys)


if __name__ == "__main__":
    main()
