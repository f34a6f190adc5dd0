"""Split-KV in the MLA decode kernels: pieces, partial results and their combine, in one launch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from cute_fmha import machine_code
from cute_fmha.kernels.blackwell import launch
from cute_fmha.kernels.blackwell.mla_plan import can_implement, plan_of
from cute_fmha.problem import Problem, SkipSoftmax, Target

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import mla_harness as harness

from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
from cute_fmha.kernels.blackwell.mla_decode_few import MlaDecodeFew
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan

LENGTHS = [0, 1, 63, 64, 65, 1000]
SKIP = SkipSoftmax(threshold=math.exp(-20.0))

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def kernel_of(case: Any, num_splits: int, **features: Any) -> Any:
    """The kernel that the case's problem gets, with ``features`` besides what the case needs."""
    batch, seqlen_q, heads, width = case.q.shape
    page_size = case.kv_cache.shape[1]
    left, right = harness.window_of(case)
    problem = Problem(
        "mla_decode", "paged", False, case.q.dtype, case.q.dtype, batch, seqlen_q,
        page_size * case.block_table.shape[1], heads, 1, width, 512, page_size, left, right,
        softcap="softcap" in case.common, sink="sink" in case.common, num_splits=num_splits,
        **{"lse": True, **features},
    )  # fmt: skip
    assert can_implement(problem, Target("cuda", 100, 148)) is None
    plan = plan_of(problem)
    return MlaDecode(plan) if isinstance(plan, MlaPlan) else MlaDecodeFew(plan)


@policies
@pytest.mark.parametrize(
    ("heads", "num_splits"), [(16, 5), (48, 0), (128, 0)], ids=["16-5", "48-auto", "128-auto"]
)
def test_lengths(policy, heads, num_splits):
    """More pieces than CTAs, and the other way round."""
    case = harness.case_of(heads, 1, LENGTHS, sink=True)
    kernel = kernel_of(case, num_splits)
    for ctas in (6, 30):
        harness.verify(kernel, case, policy, ctas=ctas, num_splits=num_splits)


@policies
def test_skip_and_counters(policy):
    """Of the five pieces of a short sequence three do not exist: nobody computes or counts them."""
    case = harness.case_of(64, 1, [65, 640, 1000], gap=40.0)
    kernel = kernel_of(case, 5, skip=True, stats=True)
    result = harness.verify(kernel, case, policy, skip=SKIP, ctas=7, num_splits=5)
    assert result.stats[0] > 3


@pytest.mark.parametrize("num_splits", [0, 5], ids=["auto", "5"])
def test_replays(num_splits):
    """One workspace; lengths and pages change between launches, as in a CUDA graph."""
    case = harness.case_of(64, 1, [640, 700, 130])
    kernel = kernel_of(case, num_splits)
    workspace = harness.workspace_of(kernel.plan, case, 9, num_splits)
    for turn, lengths in enumerate(([640, 700, 130], [10, 0, 129], [1, 700, 64])):
        case.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for policy in harness.POLICIES:
            harness.verify(kernel, case, policy, ctas=9, num_splits=num_splits, workspace=workspace)
        if turn == 1:
            pages = case.block_table[:, :2].clone()
            case.block_table[0, :2], case.block_table[1, :2] = pages[1], pages[0]


@pytest.mark.parametrize(
    ("heads", "num_splits", "skipping"),
    [
        (8, 1, False), (64, 5, False), (128, 0, False),
        *(
            pytest.param(heads, num_splits, skipping, marks=pytest.mark.sweep)
            for heads in (8, 64, 128) for num_splits in (0, 1, 5) for skipping in (False, True)
            if skipping or (heads, num_splits) not in ((8, 1), (64, 5), (128, 0))
        ),
    ],
)  # fmt: skip
def test_max_logits(heads, num_splits, skipping):
    """The largest logit itself, not the maximum that P is relative to, which lags behind it; sinks
    left out, −inf for a row without keys. Replays on one workspace."""
    options: dict[str, Any] = {"sink": True, "window": (300, 0)}
    if not skipping:
        options["softcap"] = 5.0
    seqlen_q = 1 if heads > 32 else 32 // heads
    case = harness.case_of(
        heads, seqlen_q, LENGTHS, std=0.3 if skipping else 1.0, gap=40.0 * skipping, **options
    )
    kernel = kernel_of(case, num_splits, max_logits=True, skip=skipping, lse=not skipping)
    ctas = 9
    workspace = harness.workspace_of(kernel.plan, case, ctas, num_splits)
    for policy in harness.POLICIES:
        result = harness.verify(
            kernel, case, policy, skip=SKIP if skipping else None, ctas=ctas,
            num_splits=num_splits, workspace=workspace,
        )  # fmt: skip
        assert (result.max_logits[0] == -math.inf).all()


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_skip_where_work_is_shared_out(heads):
    """Automatic splits: a piece decides by its own maximum, so that more CTAs skip less."""
    case = harness.case_of(heads, 2 if heads < 64 else 1, [65, 1500, 0, 1000], gap=40.0, sink=True)
    kernel = kernel_of(case, 0, skip=True, stats=True)
    skipped = []
    for workers, policy in zip((1, 2, 3, 7), harness.POLICIES, strict=True):
        ctas = workers * kernel.plan.slots.ranks
        cuts = harness.tiles_of(kernel.plan, case, ctas, 0).cuts
        assert cuts is not None
        assert (max(map(len, cuts)) > 0) == (workers > 1)
        result = harness.verify(kernel, case, policy, skip=SKIP, ctas=ctas, num_splits=0)
        skipped.append(int(result.stats[0]))
    assert 3 < min(skipped) <= skipped[-1] < skipped[0]


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_bits_of_a_fixed_split(heads):
    """Neither timing nor the number of CTAs nor the rest of the batch has a say."""
    case = harness.case_of(heads, 1, [640, 0, 300])
    kernel = kernel_of(case, 5)
    results = [
        harness.run(kernel, case, policy, ctas=ctas, num_splits=5)
        for policy, ctas in zip(harness.POLICIES, (3, 20, 7, 7), strict=True)
    ]
    table, lengths = case.block_table[2:].clone(), case.cache_seqlens[2:].clone()
    alone = harness.MlaCase(case.q[2:], case.kv_cache, table, lengths, case.std, case.common)
    single = harness.run(kernel, alone, harness.POLICIES[0], ctas=4, num_splits=5)
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.lse, results[0].lse)
    assert torch.equal(single.out[0], results[0].out[2])
    assert torch.equal(single.lse[0], results[0].lse[2])


MATRIX = [
    (heads, seqlen_q, num_splits, index)
    for index, (heads, seqlen_q, num_splits) in enumerate(
        itertools.product((1, 8, 16, 48, 64, 128), (1, 2, 4), (0, 1, 2, 5))
    )
]
OPTIONS: list[dict[str, Any]] = [{}, {"sink": True}, {"window": (70, 0)}, {"softcap": 5.0}]


@pytest.mark.sweep
@pytest.mark.parametrize(("heads", "seqlen_q", "num_splits", "index"), MATRIX)
def test_matrix(heads, seqlen_q, num_splits, index):
    """Page sizes and options by turns, each with every kernel and every cut."""
    page_size = (1, 16, 32, 64, 128)[index % 5]
    options = OPTIONS[index % 7 % 4]
    case = harness.case_of(heads, seqlen_q, LENGTHS, page_size=page_size, seed=index, **options)
    kernel = kernel_of(case, num_splits, lse=index % 3 > 0)
    for policy in harness.POLICIES:
        harness.verify(kernel, case, policy, ctas=8 + index % 9, num_splits=num_splits)


@pytest.mark.sweep
@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("num_splits", [0, 1, 2, 5])
def test_skips(heads, num_splits):
    case = harness.case_of(heads, 2 if heads < 64 else 1, [65, 640, 1000], gap=40.0, sink=True)
    kernel = kernel_of(case, num_splits, skip=True, stats=True)
    for policy in harness.POLICIES:
        harness.verify(kernel, case, policy, skip=SKIP, ctas=7, num_splits=num_splits)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_machine_code(heads):
    """Cut by shares, with all that a plan may have: no stack, no spills."""
    try:
        machine_code.tool("nvdisasm")
    except machine_code.ToolError as error:
        pytest.skip(str(error))
    problem = Problem(
        "mla_decode", "paged", False, torch.bfloat16, torch.bfloat16, 4, 1, 4096, heads, 1, 576,
        512, 64, 100, 0, sink=True, skip=True, stats=True, lse=True, max_logits=True,
    )  # fmt: skip
    code = machine_code.read(launch.prepare(problem, Target("cuda", 100, 148)).binary.cubin)
    assert (code.stack, code.local, code.spills) == (0, 0, 0)
    assert code.count("UTCHMMA") > 0
