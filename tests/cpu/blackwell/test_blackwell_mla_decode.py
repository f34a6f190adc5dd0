"""The Blackwell MLA decode kernel of 64 rows a CTA, alone and in pairs, number by number."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fmha.problem import Problem, SkipSoftmax, Target

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import mla_harness as harness
import triton

from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
from cute_fmha.kernels.blackwell.mla_decode_plan import (
    can_implement,
    make_plan,
    topology,
)
from cute_fmha.kernels.blackwell.plan import Features

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [0, 1, 63, 64, 65, 1000]
SKIP = SkipSoftmax(threshold=math.exp(-20.0))

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def kernel_of(case: Any, features: dict[str, Any] | None = None, **changes: Any) -> MlaDecode:
    plan = make_plan(
        case.q.shape[-1], case.q.dtype, case.q.dtype,
        harness.features_of(case, **(features or {})), case.kv_cache.shape[1],
        case.q.shape[1] * case.q.shape[2],
    )  # fmt: skip
    return MlaDecode(replace(plan, **changes))


@policies
@pytest.mark.parametrize("heads", [64, 127])
def test_lengths(policy, heads):
    """Several sequences on a CTA or pair: phases carry over from one work tile to the next."""
    case = harness.case_of(heads, 1, LENGTHS)
    harness.verify(kernel_of(case), case, policy, ctas=4)


@policies
@pytest.mark.parametrize("heads", [21, 40])
def test_new_tokens_in_small_pages(policy, heads):
    """Causal order among three new tokens: CTAs begin inside of a token."""
    options: dict[str, Any] = {"window": (100, 0), "softcap": 5.0, "sink": True}
    case = harness.case_of(heads, 3, [2, 70, 300], page_size=16, dtype=FP16, **options)
    harness.verify(kernel_of(case), case, policy, ctas=2)


@pytest.mark.parametrize(("heads", "page_size"), [(64, 1), (128, 1), (20, 1001)])
def test_gathered_rows_and_one_page_a_sequence(heads, page_size):
    case = harness.case_of(heads, 1, [1, 300], page_size=page_size)
    for policy in harness.POLICIES[1:3]:
        harness.verify(kernel_of(case), case, policy)


@policies
@pytest.mark.parametrize("heads", [64, 128])
def test_skip(policy, heads):
    """In a pair a tile is skipped when no row of either CTA needs it."""
    case = harness.case_of(heads, 1, [65, 640, 1500], gap=40.0)
    kernel = kernel_of(case, {"skip": True, "count": True})
    result = harness.verify(kernel, case, policy, skip=SKIP, ctas=2)
    assert result.stats[0] > 3


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads", [17, 64, 65, 128])
@pytest.mark.parametrize("seqlen_q", [1, 2, 4])
def test_pages(page_size, heads, seqlen_q):
    case = harness.case_of(heads, seqlen_q, LENGTHS, page_size=page_size)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options",
    [
        {"sink": True},
        {"softcap": 5.0},
        {"window": (70, 0)},
        {"window": (0, 0), "sink": True},
        {"causal": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [576, 512])
@pytest.mark.parametrize("heads", [30, 48])
def test_options(options, width, heads):
    case = harness.case_of(heads, 2, LENGTHS, width=width, dtype=FP16, **options)
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case), case, policy)


@pytest.mark.sweep
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_threshold(relative, on_device):
    """λ, or the factor that λ is over the length, as a number and from device memory."""
    case = harness.case_of(64, 2, [640, 640], gap=40.0, seed=1)
    value: Any = 640 * math.exp(-20.0) if relative else math.exp(-20.0)
    if on_device:
        value = torch.tensor([value])
    name = "threshold_scale_factor" if relative else "threshold"
    features = {"skip": True, "count": True, "skip_relative": relative, "skip_tensor": on_device}
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case, features), case, policy, skip=SkipSoftmax(**{name: value}))


@pytest.mark.sweep
@pytest.mark.parametrize("threshold", [0.0, 8.0])
def test_growing_scores(threshold):
    """The maximum rises by more than the rescale threshold, over and over."""
    case = harness.case_of(64, 1, [700], std=1.0)
    pages = case.block_table[0, :11].tolist()
    for n, page in enumerate(pages):
        case.kv_cache[page] *= 0.1 + 0.2 * n
    for policy in harness.POLICIES:
        harness.verify(kernel_of(case, rescale_threshold=threshold), case, policy)


def test_plan():
    plan = make_plan(576, BF16, BF16, Features(), 64, 64)
    assert (plan.q_tmem_units, plan.q_shared_units) == (7, 2)
    assert [(r.name, r.start, r.end) for r in plan.tmem.regions] == [
        ("O", 0, 256), ("S", 256, 288), ("Q", 288, 512),
    ]  # fmt: skip
    pair = make_plan(576, BF16, BF16, Features(), 64, 65)
    assert (pair.rows, pair.tile_n, pair.q_tmem_units) == (128, 128, 6)
    assert max(plan.shared_bytes, pair.shared_bytes) <= 227 << 10
    with pytest.raises(ValueError, match="shared memory"):
        replace(plan, stages=6)
    with pytest.raises(ValueError, match="4 halves at least"):
        replace(plan, stages=3)


def test_arrivals():
    """In a pair both CTAs' softmax and swap warps count at the first CTA's barriers."""
    counts = []
    for rows in (64, 128):
        made = topology(make_plan(576, BF16, BF16, Features(skip=True), 64, rows))
        counts.append({b.name: made.arrivals(b.name) for b in made.barriers})
    assert counts[0]["p_ready"] == counts[0]["s_empty"] == counts[0]["o_empty"] == 4
    assert counts[1]["p_ready"] == counts[1]["s_empty"] == counts[1]["o_empty"] == 8
    assert (counts[1]["given"], counts[1]["swapped"], counts[1]["voted"]) == (2, 4, 2)
    assert counts[0]["k_empty"] == counts[1]["k_empty"] == counts[1]["k_full"] == 1


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="no nvdisasm beside Triton")
@pytest.mark.parametrize("rows", [64, 128])
def test_machine_code(rows, tmp_path):
    """Tensor-core instructions, of two CTAs in a pair; no stack, no spills."""
    features = Features(window_right=True, window_left=True, sink=True, skip=True, count=True)
    plan = make_plan(576, BF16, BF16, features, 64, rows)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(harness.build(MlaDecode(plan), options="--keep-cubin").__cubin__)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    code = tool("nvdisasm", "-c", str(path))
    # 36 K steps of 16 columns, and two halves of O over the keys.
    assert code.count("UTCHMMA") == 36 + 2 * plan.tile_n // 16
    assert code.count("UTCHMMA.2CTA") == (code.count("UTCHMMA") if plan.pair else 0)
    for instruction in ("LDTM", "STTM", "UTMALDG", "UTMASTG", "UTCBAR", "FFMA2", "FMNMX3"):
        assert instruction in code, instruction
    assert not re.search(r"\b(STL|LDL)\b", code)


def test_what_can_be_implemented():
    plain = Problem("mla_decode", "paged", False, BF16, BF16, 2, 1, 512, 64, 1, 576, 512, 64)
    b200 = Target("cuda", 100, 148)
    assert can_implement(plain, b200) is None
    assert can_implement(replace(plain, head_dim=512, page_size=16, sink=True), b200) is None
    assert can_implement(replace(plain, page_size=500, seqlen_k=500), b200) is None
    refused: dict[str, dict[str, Any]] = {
        "got attention|no attention": {"op": "attention"},
        "torch.float32": {"dtype": torch.float32},
        r"got \(256, 256\)": {"head_dim": 256, "head_dim_v": 256},
        "got 48": {"page_size": 48},
        "store .*float64": {"out_dtype": torch.float64},
    }
    for reason, changes in refused.items():
        assert re.search(reason, can_implement(replace(plain, **changes), b200) or "")
    assert "10.0 or 10.3" in (can_implement(plain, Target("cuda", 90, 132)) or "")
