"""The Blackwell MLA decode kernel of few rows, executed number by number: output, LSE, skipped
tiles, races, hazards."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fmha.emulator.capture import capture
from cute_fmha.emulator.mutate import STRICT_POLICIES, run_mutants
from cute_fmha.kernels.blackwell import cutting
from cute_fmha.kernels.blackwell.decode_transposed_plan import TransposedPlan, box_of
from cute_fmha.kernels.blackwell.mla_decode_few_plan import can_implement, make_few_plan
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.problem import Problem, SkipSoftmax, Target
from cute_fmha.testing import error_report

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import cutlass
import mla_harness as harness
import triton

from cute_fmha.kernels.blackwell.decode_transposed import topology
from cute_fmha.kernels.blackwell.mla_decode_few import MlaDecodeFew

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [0, 1, 63, 64, 65, 300]
SKIP = {"skip": True, "count": True}
LAMBDA = SkipSoftmax(math.exp(-7.0))

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernel_of(case: Any, box: int = 64, out_dtype: Any = None, features: Any = None, **changes):
    """The kernel of a case's plan with ``changes``."""
    _, seqlen_q, heads, width = case.q.shape
    plan = make_few_plan(
        width, 512, case.q.dtype, out_dtype or case.q.dtype,
        harness.features_of(case, **(features or {})), seqlen_q * heads, box,
    )  # fmt: skip
    return MlaDecodeFew(replace(plan, **changes))


@policies
def test_lengths(policy):
    """Also none, several CTAs for several sequences, and several sequences of a CTA."""
    case = harness.case_of(16, 1, [1000, 0, *LENGTHS])
    for ctas in (148, 3):
        harness.verify(kernel_of(case), case, policy, ctas=ctas)


@pytest.mark.parametrize(
    ("heads", "seqlen_q"), [(1, 1), (8, 2), (4, 4), (5, 3), (16, 2), (7, 4)], ids=str
)
def test_rows(heads, seqlen_q):
    """Any number of heads and new tokens up to 32 rows; positions are in causal order."""
    case = harness.case_of(heads, seqlen_q, LENGTHS, seed=heads)
    for policy in harness.POLICIES[1:3]:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize(("page_size", "box"), [(16, 16), (32, 32), (128, 64), (8, 8), (1, 4)])
def test_pages(page_size, box):
    case = harness.case_of(16, 1, LENGTHS, page_size=page_size)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case, box), case, policy)


def test_unpaged():
    """A page per sequence, of a size that is no multiple of anything."""
    case = harness.case_of(8, 1, [77, 99, 0], page_size=99)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (100, 0)},
        {"window": (70, 30), "causal": False},
        {"causal": False},
        {"sink": True},
        {"softcap": 2.0, "scale": 0.2},
        {"softcap": 30.0, "sink": True, "window": (130, 0)},
    ],
    ids=["window", "both-sides", "full", "sink", "softcap", "all"],
)
def test_options(options):
    case = harness.case_of(8, 2, LENGTHS, dtype=FP16, **options)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float32], ids=str)
def test_512(out_dtype):
    """Latents without rope columns."""
    case = harness.case_of(16, 1, LENGTHS, width=512)
    harness.verify(kernel_of(case, out_dtype=out_dtype), case, harness.POLICIES[2])


@pytest.mark.parametrize("threshold", [0.0, 8.0])
def test_growing_scores(threshold):
    """Maxima rise by more than the rescale threshold, over and over.

    With a threshold the largest P of a row is not exactly 1 and takes a rounding error of its own,
    so that only the cosine is gated.
    """
    case = harness.case_of(16, 1, [900, 200], dtype=FP16, std=1.0)
    for sequence, length in enumerate((900, 200)):
        for page in range(length // 64 + 1):
            number = int(case.block_table[sequence, page])
            case.kv_cache[number] *= 0.2 + page / 4
    expected, expected_lse = case.reference()
    for policy in harness.POLICIES:
        kernel = kernel_of(case, rescale_threshold=threshold)
        if threshold == 0.0:
            harness.verify(kernel, case, policy)
        result = harness.run(kernel, case, policy)
        assert error_report(result.out, expected).cosine >= 0.999998
        torch.testing.assert_close(result.lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


@policies
@pytest.mark.parametrize(
    ("heads", "options"), [(8, {}), (16, {"window": (500, 0)})], ids=["full", "window"]
)
def test_skipped_tiles(policy, heads, options):
    """The oracle's decisions, counted."""
    lengths = [700, 1000, 0, 64]
    case = harness.case_of(heads, 2, lengths, gap=14.0, dtype=FP16, **options)
    result = harness.verify(kernel_of(case, features=SKIP), case, policy, skip=LAMBDA)
    assert 0 < result.stats[0] < result.stats[1]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_threshold_in_every_form(tensor, relative):
    """Also changed between launches of one kernel, as between replays of a CUDA graph."""
    case = harness.case_of(16, 1, [900, 900], gap=14.0, dtype=FP16)
    features = {**SKIP, "skip_tensor": tensor, "skip_relative": relative}
    kernel = kernel_of(case, features=features)
    tiles = harness.Tiles(16, 64, True)
    device = torch.zeros(1)
    for value in (LAMBDA.value, 0.0):
        given = value * 900 if relative else value
        device.fill_(given)
        result = harness.run(kernel, case, harness.POLICIES[2], skip=device if tensor else given)
        expected = case.oracle(tiles, SkipSoftmax(value) if value else None)
        assert result.stats.tolist() == [expected.skipped, expected.total]
        harness.check(case, result.out, result.lse, tiles, SkipSoftmax(value) if value else None)


def test_values_of_skipped_tiles_are_not_used():
    """Value columns of tokens that only skipped tiles have may be anything finite: with rope scores
    alone deciding, they are large where every row skips."""
    case = harness.case_of(16, 1, [640], gap=0.0, dtype=FP16)
    case.q[..., :512] = 0
    case.q[..., 512:] = 1.0
    low = [page for page in range(10) if page % 3]
    for page in range(10):
        number = int(case.block_table[0, page])
        case.kv_cache[number, :, :, 512:] = 0.0 if page % 3 == 0 else -8.0
    clean = harness.run(
        kernel_of(case, features=SKIP), case, harness.POLICIES[1], skip=LAMBDA.value
    )
    for page in low:
        case.kv_cache[int(case.block_table[0, page]), :, :, :512] = 6e4
    for policy in harness.POLICIES:
        result = harness.run(kernel_of(case, features=SKIP), case, policy, skip=LAMBDA.value)
        assert result.stats.tolist() == [len(low), 10]
        assert torch.equal(result.out, clean.out)


@pytest.mark.parametrize(
    ("cut", "num_splits"), [("share", 0), ("fixed", 1), ("fixed", 2), ("fixed", 5)], ids=str
)
def test_splits(cut, num_splits):
    """Two launches in a row on one workspace, of which the second finds what the first left."""
    case = harness.case_of(8, 2, [1000, 0, 1, 130, 400], sink=True)
    kernel = kernel_of(case, cut=cutting.Cut(cut))
    for policy in harness.POLICIES:
        workspace = harness.workspace_of(kernel.plan, case, 9, num_splits)
        for _launch in range(2):
            harness.verify(kernel, case, policy, ctas=9, num_splits=num_splits, workspace=workspace)


def test_more_rows_than_a_tile():
    """40 heads are two work tiles of 32 rows."""
    case = harness.case_of(40, 1, [600, 70])
    kernel = MlaDecodeFew(
        make_few_plan(576, 512, BF16, BF16, harness.features_of(case), 32, cut=cutting.Cut.SHARE)
    )
    for policy in harness.POLICIES:
        harness.verify(kernel, case, policy, ctas=5)


def test_fixed_splits_are_independent_of_the_batch():
    """Bit by bit, whatever else is in the batch and however many CTAs there are."""
    case = harness.case_of(16, 1, [700, 300, 64])
    kernel = kernel_of(case, cut=cutting.Cut.FIXED)
    all_of_it = harness.run(kernel, case, harness.POLICIES[2], ctas=12, num_splits=3)
    for index in range(3):
        alone = replace(
            case,
            q=case.q[index : index + 1].clone(),
            block_table=case.block_table[index : index + 1].clone(),
            cache_seqlens=case.cache_seqlens[index : index + 1].clone(),
        )
        result = harness.run(kernel, alone, harness.POLICIES[3], ctas=2, num_splits=3)
        assert torch.equal(result.out[0], all_of_it.out[index])
        assert torch.equal(result.lse[0], all_of_it.lse[index])


def test_skips_of_splits():
    """Running maxima begin anew in every part."""
    case = harness.case_of(16, 1, [700, 1000, 0, 64], gap=14.0, dtype=FP16)
    kernel = kernel_of(case, features=SKIP, cut=cutting.Cut.FIXED)
    for policy in harness.POLICIES:
        harness.verify(kernel, case, policy, skip=LAMBDA, num_splits=3, ctas=8)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_quarter_of_the_tensor_core_and_half_of_the_instructions(page_size):
    """Per 128 tokens in steady state, next to a plan of 128 rows and to FlashAttention-4's kernel,
    to which 16 heads cost what 64 do; latents are fetched once."""
    counters = []
    for length in (1024, 2048):
        case = harness.case_of(16, 1, [length], page_size)
        result = harness.run(kernel_of(case, box_of(page_size)), case, harness.POLICIES[1])
        counters.append(result.report.results[0].counters)
    tiles = 1024 / 128
    first, last = counters
    assert (last.tensor_cycles - first.tensor_cycles) / tiles <= 4352 / 4
    assert (last.steps - first.steps) / tiles <= 4502 / 2
    assert (last.tma_load_bytes - first.tma_load_bytes) / tiles == 128 * 576 * 2


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="no nvdisasm beside Triton")
@pytest.mark.parametrize(
    ("features", "rows", "box", "cut"),
    [
        ({}, 16, 64, "share"),
        ({"window_left": True, "sink": True, "skip": True, "count": True}, 16, 16, "whole"),
        ({"softcap": True}, 32, 4, "fixed"),
    ],
    ids=["share", "skip", "32-rows"],
)
def test_machine_code(features, rows, box, cut, tmp_path):
    """Tensor-core instructions, no stack, no spills."""
    present = Features(window_right=True, **features)
    plan = make_few_plan(576, 512, BF16, BF16, present, rows, box, cutting.Cut(cut))
    path = tmp_path / "kernel.cubin"
    kernel = harness.build(MlaDecodeFew(plan), options="--keep-cubin")
    path.write_bytes(kernel.__cubin__)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    code = tool("nvdisasm", "-c", str(path))
    # S of a part (8) and of the rope columns (4), P V of a part (4) at two places.
    assert code.count("UTCHMMA") == 20
    for instruction in ("LDTM", "STTM", "UTMALDG", "UTCBAR", "FFMA2", "FMNMX3", "STSM"):
        assert instruction in code, instruction
    assert not re.search(r"\b(STL|LDL)\b", code)


def test_plans():
    """The rings take what shared memory has left; arrive counts follow from the roles."""
    features = harness.features_of(harness.case_of(1, 1, [1]))
    stages = {}
    for width in (576, 512):
        for rows in (16, 32):
            plan = make_few_plan(width, 512, BF16, BF16, features, rows)
            stages[width, rows] = plan.v_stages
            assert plan.shared_bytes <= 227 << 10 < plan.shared_bytes + plan.part_bytes
    assert stages == {(576, 16): 11, (576, 32): 9, (512, 16): 12, (512, 32): 10}
    with pytest.raises(ValueError, match="rows must be 16 or 32"):
        TransposedPlan(576, 512, BF16, BF16, features, rows=64)
    with pytest.raises(ValueError, match=r"shared memory: .*'V': 212992"):
        TransposedPlan(576, 512, BF16, BF16, features, v_stages=13)
    counts = topology(TransposedPlan(576, 512, BF16, BF16, features))
    assert [counts.arrivals(name) for name in ("q_full", "v_full", "p_full")] == [2, 1, 4]


def test_what_can_be_implemented():
    target = Target("cuda", 100, 148)
    plain = Problem(
        "mla_decode", "paged", False, BF16, BF16, 2, 1, 4096, 16, 1, 576, 512, page_size=64
    )
    assert can_implement(plain, target) is None
    accepted: list[dict[str, Any]] = [
        {"seqlen_q": 2}, {"page_size": 1}, {"page_size": 4096}, {"heads_q": 32},
    ]  # fmt: skip
    for changes in accepted:
        assert can_implement(replace(plain, **changes), target) is None
    refused: dict[str, dict[str, Any]] = {
        "has no attention": {"op": "attention"},
        "got torch.float32": {"dtype": torch.float32},
        r"got \(576, 576\)": {"head_dim_v": 576},
        "got 48 of 2": {"heads_q": 24, "seqlen_q": 2},
        "got 0 of 2": {"seqlen_q": 0},
        "multiple of 8 tokens.*got 20": {"page_size": 20},
        "got torch.float64": {"out_dtype": torch.float64},
    }
    for reason, changes in refused.items():
        assert re.search(reason, can_implement(replace(plain, **changes), target) or "")
    assert [box_of(size) for size in (1, 8, 16, 48, 128, 20)] == [4, 8, 16, 16, 64, 0]


def test_every_signal_is_needed():
    """Leave out one arrival, commit, fence or barrier after another: each is noticed."""
    case = harness.case_of(16, 1, [500, 40], gap=14.0, dtype=FP16)
    kernel = kernel_of(case, features=SKIP)
    out = torch.full((2, 1, 16, 512), math.nan, dtype=FP16)
    tensors = harness.arguments(case, out, harness.Workspace.make())
    scalars = harness.scalars_of(case, LAMBDA.value)
    launch = (tensors, scalars, cutlass.Int32(1), None, harness.CUstream(0))
    captured = capture(harness.compiled(kernel), *launch)
    report = run_mutants(
        captured, policies=STRICT_POLICIES, check=lambda *_: True,
        chosen=lambda mutant: mutant.order and mutant.group != "mbarrier wait",
    )  # fmt: skip
    missed = [str(outcome.mutant) for outcome in report.outcomes if outcome.verdict == "missed"]
    assert not missed
    assert sum(outcome.verdict == "caught" for outcome in report.outcomes) > 40
