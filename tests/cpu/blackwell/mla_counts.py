"""What the MLA decode kernels do for 128 keys in steady state, ours and FlashAttention-4's.

python tests/cpu/blackwell/mla_counts.py: one sequence of 2048 keys less one of 1024, over 8, each
executed by the emulator. Cycles come from its model and are no measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "emulator")]
import mla_harness
import peers_fa4

from cute_fmha.emulator.capture import emulate
from cute_fmha.emulator.machine import Counters, Policy
from cute_fmha.emulator.model import B200
from cute_fmha.kernels.blackwell.decode_transposed_plan import box_of
from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
from cute_fmha.kernels.blackwell.mla_decode_few import MlaDecodeFew
from cute_fmha.kernels.blackwell.mla_decode_few_plan import make_few_plan
from cute_fmha.kernels.blackwell.mla_decode_plan import make_plan

POLICY = Policy("random", seed=1)
LENGTHS = (1024, 2048)


def ours(heads: int, length: int, page_size: int = 64) -> Counters:
    case = mla_harness.case_of(heads, 1, [length], page_size)
    dtype, features = torch.bfloat16, mla_harness.features_of(case)
    kernel = MlaDecode(make_plan(576, dtype, dtype, features, page_size, heads))
    return mla_harness.run(kernel, case, POLICY).report.results[0].counters


def few_rows(rows: int, length: int, page_size: int = 64) -> Counters:
    case = mla_harness.case_of(rows, 1, [length], page_size)
    dtype, features = torch.bfloat16, mla_harness.features_of(case)
    plan = make_few_plan(576, 512, dtype, dtype, features, rows, box_of(page_size))
    return mla_harness.run(MlaDecodeFew(plan), case, POLICY).report.results[0].counters


def theirs(heads: int, length: int, one_cta: bool, page_size: int | None = None) -> Counters:
    """Without a page size the latents are one tensor, which costs as much as its pages of 64."""
    setting = (("FLASH_ATTENTION_MLA_1CTA", "01"[one_cta]),)
    case = peers_fa4.Case(
        "counts", mla=True, heads=heads, kv_heads=1, q=1,
        k=length if page_size is None else (length,), page=page_size, environment=setting,
    )  # fmt: skip
    reports: list[Any] = []

    def run(compiled: Any, *args: Any, **kwargs: Any) -> None:
        reports.append(emulate(compiled, *args, policy=POLICY, check=False, **kwargs))

    peers_fa4.run_case(case, run)
    return reports[0].results[0].counters


def show(name: str, ctas: int, count: Callable[[int], Counters]) -> None:
    """One line: all CTAs together, but cycles of one."""
    short, long = map(count, LENGTHS)
    tiles = (LENGTHS[1] - LENGTHS[0]) / 128

    def per_tile(field: str) -> float:
        return (getattr(long, field) - getattr(short, field)) / tiles

    shared = sum(map(per_tile, ("shared_read_bytes", "shared_write_bytes", "mma_shared_bytes")))
    moves = (long.by_class["move"] - short.by_class["move"]) / tiles
    print(
        f"| {name} | {per_tile('steps'):.0f} | {per_tile('steps') - moves:.0f} "
        f"| {per_tile('tma_load_bytes'):.0f} | {per_tile('tensor_cycles') / ctas:.0f} "
        f"| {shared / ctas / B200.shared_bytes:.0f} | {per_tile('cycles'):.0f} |"
    )
    by_warp = (long.by_warp - short.by_warp).sum(1) / tiles
    print("  by warp:", " ".join(f"{count:.0f}" for count in by_warp[:16]))


if __name__ == "__main__":
    print("| kernel | instructions | without moves | bytes by TMA | MMA | shared memory | cycles |")
    show("FA4, 2 CTAs, 128 heads", 2, lambda length: theirs(128, length, False))
    show("FA4, 1 CTA × 2, 128 heads", 2, lambda length: theirs(128, length, True))
    show("a pair, 128 heads", 2, lambda length: ours(128, length))
    show("FA4, 1 CTA, 64 heads", 1, lambda length: theirs(64, length, True))
    show("one CTA, 64 heads", 1, lambda length: ours(64, length))
    show("FA4, 1 CTA, 16 heads", 1, lambda length: theirs(16, length, True))
    show("16 rows", 1, lambda length: few_rows(16, length))
    show("32 rows", 1, lambda length: few_rows(32, length))
    for size in (16, 1):
        big, few = partial(ours, page_size=size), partial(few_rows, page_size=size)
        peer, name = partial(theirs, one_cta=True, page_size=size), f"pages of {size}"
        show(f"FA4, {name}, 128 heads", 2, partial(peer, 128))
        show(f"a pair, {name}", 2, partial(big, 128))
        show(f"FA4, {name}, 64 heads", 1, partial(peer, 64))
        show(f"one CTA, {name}", 1, partial(big, 64))
        show(f"FA4, {name}, 16 heads", 1, partial(peer, 16))
        show(f"16 rows, {name}", 1, partial(few, 16))
        show(f"32 rows, {name}", 1, partial(few, 32))
