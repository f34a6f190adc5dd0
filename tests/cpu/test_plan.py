"""Plans of the Triton kernels: schedule, constraints, and what ptxas makes of the kernels."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_fmha import dispatch
from cute_fmha.dispatch import select
from cute_fmha.epilogues import EpilogueOp
from cute_fmha.kernels.blackwell import launch
from cute_fmha.kernels.triton import hopper_prefill
from cute_fmha.kernels.triton import plan as planning
from cute_fmha.kernels.triton.plan import (
    COMBINE_ELEMENTS,
    Plan,
    can_implement,
    choose_splits,
    head_dim_parts,
    hopper_mla_reason,
    make_plan,
    next_power_of_two,
)
from cute_fmha.problem import HEAD_DIMS, Problem, Target
from cute_fmha.tiling import ceil_div, split_tile_range
from cute_fmha.workspace import COUNTER_BYTES

A100 = Target("cuda", 80, 108)
H200 = Target("cuda", 90, 132)
B200 = Target("cuda", 100, 148)
CPU = Target("cpu", 0, 1)
TARGETS = [A100, H200, B200, CPU]

MLA = Problem(
    op="mla_decode",
    layout="paged",
    packed_q=False,
    dtype=torch.bfloat16,
    out_dtype=torch.bfloat16,
    batch=128,
    seqlen_q=1,
    seqlen_k=4096,
    heads_q=128,
    heads_kv=1,
    head_dim=576,
    head_dim_v=512,
    page_size=64,
    window_right=0,
)
DENSE = replace(
    MLA,
    op="attention",
    layout="dense",
    batch=2,
    seqlen_q=4096,
    heads_q=16,
    heads_kv=4,
    head_dim=128,
    head_dim_v=128,
    page_size=0,
)
DECODE = replace(DENSE, seqlen_q=1)


def attention_problems() -> st.SearchStrategy[Problem]:
    pairs = [(dim, dim) for dim in HEAD_DIMS] + [(192, 128)]

    def build(pair, kv, group, blocks, splits, **sizes):
        return replace(
            DENSE,
            head_dim=pair[0],
            head_dim_v=pair[1],
            heads_kv=kv,
            heads_q=kv * group,
            block_mask=blocks,
            num_splits=0 if blocks else splits,
            **sizes,
        )

    return st.builds(
        build,
        pair=st.sampled_from(pairs),
        kv=st.integers(1, 16),
        group=st.integers(1, 16),
        blocks=st.none() | st.sampled_from([(16, 16), (64, 128), (128, 48)]),
        splits=st.integers(0, 256),
        batch=st.integers(1, 3000),
        seqlen_q=st.integers(0, 8) | st.integers(0, 20000),
        seqlen_k=st.integers(0, 200000),
        window_left=st.sampled_from([-1, 0, 1000]),
        skip=st.booleans(),
    )


mla_problems = st.builds(
    replace,
    st.just(MLA),
    batch=st.integers(1, 20000),
    seqlen_q=st.integers(1, 4),
    seqlen_k=st.integers(0, 200000),
    heads_q=st.integers(1, 128),
    head_dim=st.sampled_from([576, 512]),
    page_size=st.sampled_from([1, 16, 32, 64, 128]),
    num_splits=st.integers(0, 256),
    window_left=st.sampled_from([-1, 0, 1000]),
)
problems = attention_problems() | mla_problems


@settings(max_examples=300)
@given(problems, st.sampled_from(TARGETS), st.booleans(), st.booleans())
def test_invariants(problem, target, aligned, even):
    """What every kernel takes for granted about its plan."""
    plan = make_plan(problem, target, aligned, even)
    for tile in (plan.tile_m, plan.tile_n, plan.combine_rows, plan.split_block):
        assert tile == next_power_of_two(tile)
    assert plan.tile_m >= 16
    assert plan.tile_n >= 16
    assert plan.num_warps in (4, 8, 12)
    assert plan.tile_m % plan.combine_rows == 0
    assert plan.split_block <= COMBINE_ELEMENTS
    assert COMBINE_ELEMENTS % plan.split_block == 0
    # Every row of every head has a work tile.
    heads = problem.heads_kv if plan.pack_heads else problem.heads_q
    rows = problem.seqlen_q * (problem.group if plan.pack_heads else 1)
    assert plan.tiles_m(problem) * plan.tile_m >= rows
    assert plan.work_tiles(problem) == plan.tiles_m(problem) * heads * problem.batch
    # Every split of every sequence has tiles of its own, and together they are all tiles.
    for tiles in (0, 1, 7, ceil_div(problem.seqlen_k, plan.tile_n)):
        parts = [split_tile_range(0, tiles, s, plan.num_splits) for s in range(plan.num_splits)]
        assert [tile for lo, hi in parts for tile in range(lo, hi)] == list(range(tiles))
    if plan.num_splits == 1:
        assert plan.workspace_bytes(problem) == 0
        # Else equal kernels would be compiled once per batch size.
        assert (plan.combine_rows, plan.split_block) == (1, 1)
    else:
        assert plan.pack_heads, "only the decode kernels split"
        partials = plan.work_tiles(problem) * plan.num_splits * plan.tile_m
        size = COUNTER_BYTES + 4 * partials * (problem.head_dim_v + 2)
        assert plan.workspace_bytes(problem) == size
        # Tickets, finished programs, arrivals.
        assert 4 * (2 + plan.work_tiles(problem)) <= COUNTER_BYTES
    if problem.block_mask is not None:
        assert problem.block_mask[0] % plan.tile_m == 0
        assert problem.block_mask[1] % plan.tile_n == 0


@given(problems, st.sampled_from(TARGETS))
def test_fixed_splits_do_not_depend_on_the_batch(problem, target):
    """Same tiles and, where counters suffice, the same splits at any batch size and length."""
    problem = replace(problem, num_splits=max(2, problem.num_splits), block_mask=None, batch=1)
    plan = make_plan(problem, target)
    other = make_plan(replace(problem, batch=7, seqlen_k=problem.seqlen_k * 2 + 1000), target)
    if other.work_tiles(replace(problem, batch=7)) + 2 > COUNTER_BYTES // 4:
        assert other.num_splits == 1
        return
    assert plan.num_splits == other.num_splits == problem.num_splits
    # How many rows a combine program takes orders no sum; how many splits it takes at once does.
    assert replace(plan, combine_rows=1) == replace(other, combine_rows=1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", [DENSE, DECODE, MLA])
def test_plans_are_frozen(problem, target):
    plan = make_plan(problem, target)
    for field in fields(Plan):
        with pytest.raises(FrozenInstanceError):
            setattr(plan, field.name, getattr(plan, field.name))
    assert hash(plan) == hash(replace(plan))
    assert make_plan(problem, target) is plan


@given(
    work_tiles=st.integers(1, 2000),
    tiles_n=st.integers(0, 4096),
    slots=st.integers(1, 300),
    limit=st.integers(1, 256),
)
def test_choose_splits_stays_in_bounds(work_tiles, tiles_n, slots, limit):
    splits = choose_splits(work_tiles, tiles_n, slots, limit)
    assert 1 <= splits <= max(1, min(limit, tiles_n, slots))


def busy(problem: Problem, target: Target) -> float:
    """Share of the GPU's slots times waves that hold a program of the plan."""
    plan = make_plan(problem, target)
    programs = plan.work_tiles(problem) * plan.num_splits
    return programs / (ceil_div(programs, target.num_sms) * target.num_sms)


@pytest.mark.parametrize("target", [H200, B200])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize(("batch", "length"), [(1, 131072), (1, 8192), (16, 8192), (128, 4096)])
def test_mla_fills_the_gpu(batch, length, heads, target):
    problem = replace(MLA, batch=batch, seqlen_k=length, heads_q=heads)
    assert busy(problem, target) > 0.75


@pytest.mark.parametrize("target", [A100, H200, B200])
@pytest.mark.parametrize(("batch", "length"), [(1, 131072), (1, 16384), (16, 8192), (128, 4096)])
def test_decode_fills_the_gpu(batch, length, target):
    problem = replace(DECODE, batch=batch, seqlen_k=length, heads_q=32, heads_kv=8)
    assert busy(problem, target) > 0.75


def test_a_full_gpu_is_not_split():
    """Splitting costs partial results: none where the work tiles alone fill several waves."""
    assert choose_splits(132 * 4, 64, 132, 128) == 1
    assert choose_splits(132, 64, 132, 128) == 1
    assert make_plan(replace(MLA, batch=1000), H200).num_splits == 1


def test_short_sequences_are_not_split():
    """No split without a tile: a windowed or a short sequence has few."""
    assert choose_splits(1, 0, 132, 128) == 1
    assert choose_splits(1, 3, 132, 128) <= 3
    plan = make_plan(replace(MLA, batch=1, seqlen_k=100), H200)
    assert plan.num_splits <= 2
    windowed = make_plan(replace(MLA, batch=1, seqlen_k=131072, window_left=127), H200)
    assert windowed.num_splits <= 4


def test_counters_limit_the_splits():
    """More work tiles than the workspace has counters: one split."""
    many = replace(MLA, batch=COUNTER_BYTES // 8, num_splits=4)
    assert make_plan(many, H200).num_splits == 1
    few = replace(MLA, batch=COUNTER_BYTES // 8 - 1, num_splits=4)
    assert make_plan(few, H200).num_splits == 4


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(64, (64, 0)), (96, (64, 32)), (128, (128, 0)), (192, (128, 64)), (576, (512, 64))],
)
def test_head_dim_parts(dim, parts):
    assert head_dim_parts(dim) == parts
    assert sum(parts) == dim


class NoTriton(EpilogueOp):
    key = "test:no-triton"


REFUSALS = [
    (DENSE, Target("mps", 0, 1), "need a CUDA device; got mps"),
    (DENSE, Target("cuda", 75, 40), r"compute capability 8.0 or later; got 7.5"),
    (replace(DENSE, dtype=torch.float32), H200, "float32 only in the interpreter"),
    (replace(DENSE, epilogue="test:no-triton"), H200, "'test:no-triton' has no Triton function"),
    (replace(DENSE, block_mask=(64, 64), num_splits=2), H200, "exclude each other"),
    (replace(DENSE, block_mask=(72, 64)), H200, "block_m must be a multiple of 16; got 72"),
    (replace(DENSE, block_mask=(64, 8)), H200, "block_n must be a multiple of 16; got 8"),
]


@pytest.mark.parametrize(("problem", "target", "reason"), REFUSALS)
def test_refusals(problem, target, reason):
    """`can_implement` gives the reason, a named backend raises it, `auto` goes on."""
    with pytest.raises(NotImplementedError, match=reason):
        select(problem, target, "triton")
    assert select(problem, target, "auto").__name__ == "cute_fmha.reference"


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_cpu_needs_the_interpreter(interpret, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    reason = can_implement(replace(DENSE, dtype=torch.float32), CPU)
    bf16_reason = can_implement(DENSE, CPU)
    assert bf16_reason is not None
    if interpret == "1":
        assert reason is None
        assert "bfloat16 products wrongly" in bf16_reason
    else:
        assert reason is not None
        assert "TRITON_INTERPRET=1" in reason


@given(problems, st.sampled_from([A100, H200, B200]))
def test_every_validated_problem_runs_on_a_gpu(problem, target):
    """Head dims, heads, lengths and page sizes are no constraint of the portable kernels."""
    assert can_implement(replace(problem, stats=True, sink=True, softcap=True), target) is None
    chosen = "cute_fmha.kernels.triton"
    able = dispatch.can_implement(problem, target, "blackwell") is None
    if able and launch.declines(problem, target) is None:
        chosen = "cute_fmha.kernels.blackwell.launch"
    assert select(problem, target, "auto").__name__ == chosen


def test_decode_packs_heads_where_queries_are_few():
    assert make_plan(DENSE, H200).pack_heads is False
    assert make_plan(DECODE, H200).kernel == "decode"
    assert make_plan(DECODE, H200).pack_heads is True
    assert make_plan(replace(DENSE, num_splits=2), H200).pack_heads is True
    assert make_plan(replace(DECODE, block_mask=(64, 64)), H200).pack_heads is False
    # A query tile no taller than the rows there are, 16 at least.
    assert make_plan(replace(DECODE, heads_q=4), H200).tile_m == 16
    assert make_plan(replace(DECODE, seqlen_q=3), H200).tile_m == 16
    assert make_plan(replace(DECODE, seqlen_q=8), H200).tile_m == 32


@pytest.mark.parametrize(
    ("problem", "target", "reason"),
    [
        (MLA, H200, None),
        (replace(MLA, head_dim=512, dtype=torch.float16), H200, None),
        (MLA, A100, "compute capability 9.0"),
        (MLA, B200, "compute capability 9.0"),
        (DECODE, H200, "an MLA decode kernel"),
        (replace(MLA, dtype=torch.float32), H200, "takes bfloat16 and float16; got torch.float32"),
        (replace(MLA, epilogue="fp8"), H200, "no epilogue 'fp8'"),
    ],
)
def test_hopper_mla_is_chosen_or_declined(problem, target, reason):
    found = hopper_mla_reason(problem, target)
    if reason is None:
        assert found is None
        assert make_plan(problem, target).kernel == "hopper_mla_decode"
    else:
        assert found is not None
        assert reason in found
        assert make_plan(problem, target).kernel == "decode"


def test_hopper_mla_follows_the_tensors():
    """Unaligned rows rule the kernel out; small or uneven pages turn TMA into gathering."""
    assert make_plan(MLA, H200, False, True).kernel == "decode"
    assert make_plan(MLA, H200, True, True).gather is False
    assert make_plan(replace(MLA, page_size=128), H200, True, True).gather is False
    for problem, even in ((MLA, False), (replace(MLA, page_size=16), True)):
        plan = make_plan(problem, H200, True, even)
        assert (plan.kernel, plan.gather) == ("hopper_mla_decode", True)


PREFILL_CHOICES = [
    (DENSE, H200, None),
    (replace(DENSE, layout="packed", packed_q=True), H200, None),
    (replace(DENSE, head_dim=192, dtype=torch.float16, out_dtype=torch.float32), H200, None),
    (replace(DENSE, layout="paged", page_size=64), H200, "takes dense or packed attention"),
    (replace(DENSE, head_dim=512, head_dim_v=512), H200, "head dims"),
    (replace(DENSE, block_mask=(128, 128)), H200, "no block mask"),
    (replace(DENSE, epilogue="nvfp4", out_dtype=torch.uint8), H200, "no epilogue 'nvfp4'"),
    (DENSE, A100, "it needs sm_90"),
    (DENSE, B200, "it needs sm_90"),
    (DENSE, CPU, "it needs sm_90"),
]


@pytest.mark.parametrize(("problem", "target", "reason"), PREFILL_CHOICES)
def test_hopper_prefill_is_chosen_or_declined(problem, target, reason):
    found = hopper_prefill.can_implement(problem, target)
    if reason is None:
        assert found is None
        assert make_plan(problem, target, True, True).kernel == "hopper_prefill"
    else:
        assert found is not None
        assert reason in found
        assert make_plan(problem, target, True, True).kernel == "prefill"
    assert make_plan(problem, target, False, False).kernel == "prefill"


@functools.cache
def compile_only(*arguments: str) -> list[dict]:
    """Run tests/compile_only.py, which cannot share a process with the interpreter."""
    script = Path(__file__).parents[1] / "compile_only.py"
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def spills(variant: dict) -> bool:
    return bool(variant["stack"] or variant["local"] or variant["spills"])


def assert_no_spills(variants: list[dict]) -> None:
    assert variants
    spilling = [v for v in variants if spills(v)]
    assert not spilling, "these variants spill registers:\n" + "\n".join(map(json.dumps, spilling))
    limit = {80: 163, 90: 227, 100: 227}
    for variant in variants:
        assert variant["shared"] <= limit[variant["arch"]] << 10, variant


def test_kernels_do_not_spill():
    """Each kernel on each architecture."""
    variants = compile_only("80", "90", "100")
    assert_no_spills(variants)
    plans = {(v["arch"], v["plan"]) for v in variants}
    hopper = {(90, "hopper_prefill"), (90, "hopper_mla_decode"), (90, "decode")}
    assert plans == hopper | {(arch, plan) for arch in (80, 100) for plan in ("prefill", "decode")}


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ["90", "80", "100"])
def test_sweep_kernels_do_not_spill(arch):
    """What is crowded, and some of all else: which, must not depend on the machine's speed."""
    assert_no_spills(compile_only("--matrix", "--count", "60", arch))


def test_plan_module_states_all_constraints():
    """No kernel module and no launch raises a constraint of its own: `can_implement` has them."""
    folder = Path(planning.__file__).parent
    for file in folder.glob("*.py"):
        if file.name != "plan.py":
            assert "NotImplementedError" not in file.read_text(), file.name
