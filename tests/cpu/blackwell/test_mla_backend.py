"""`mla_decode` by `backend="emulator"` on the Blackwell kernels: choice, splits, workspaces."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fmha import make_workspace, mla_decode
from cute_fmha.emulator import Policy, emulated_calls
from cute_fmha.epilogues import FP8
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.mla_host import workspace_bytes
from cute_fmha.kernels.blackwell.mla_plan import can_implement, plan_of
from cute_fmha.problem import Problem, Target
from cute_fmha.testing import Options, Source, Tiles, check, mla_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

BF16 = torch.bfloat16
B200 = Target("cuda", 100, 148)
POLICY = Policy("random", seed=5, strict_tmem_load=True)


def case_of(heads, seqlen_q, lengths, page_size=64):
    options = Options(causal=True, sink=True, scale=0.1)
    return mla_case(seqlen_q, lengths, page_size, heads, 576, options, Source(BF16, std=0.5))


@pytest.mark.parametrize(
    ("heads", "seqlen_q", "page_size"), [(16, 1, 1), (40, 1, 32), (128, 1, 64)]
)
@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_calls(heads, seqlen_q, page_size, num_splits):
    """One launch each, on the library's own workspace, which every call finds as it wants it."""
    case = case_of(heads, seqlen_q, [0, 600, 65], page_size)
    for _ in range(2):
        with emulated_calls(POLICY) as reports:
            out, lse = case.run(backend="emulator", num_splits=num_splits)
        assert [len(report.launches) for report in reports] == [1]
        check(case, out, lse)


def test_output_in_a_wider_tensor():
    """Some of the heads of it: of one position, but not of several."""
    for heads, seqlen_q in ((127, 1), (65, 1), (33, 2)):
        case = case_of(heads, seqlen_q, [70])
        wide = torch.full((1, seqlen_q, 130, 512), math.nan, dtype=BF16)
        out, lse = wide[:, :, 1 : heads + 1], torch.empty(1, heads, seqlen_q)
        options: dict[str, Any] = {
            "return_lse": True, "out": (out, lse), "backend": "emulator",
        }  # fmt: skip
        if seqlen_q > 1:
            reason = r"with 2 positions out.stride\(1\) must be 33 \* out.stride\(2\)"
            with pytest.raises(NotImplementedError, match=reason):
                mla_decode(**case._inputs, **options)
            continue
        with emulated_calls(POLICY):
            mla_decode(**case._inputs, **options)
        check(case, out, lse)
        assert wide[:, :, [0, *range(heads + 1, 130)]].isnan().all()


def test_max_logits():
    """Beside the LSE or without it, into tensors of the caller."""
    case = case_of(40, 1, [0, 600, 65], 32)
    inputs = {**case._inputs, "num_splits": 3, "backend": "emulator"}
    given = torch.empty(3, 1, 40, 512, dtype=BF16), torch.empty(3, 40, 1), torch.empty(3, 40, 1)
    with emulated_calls(POLICY):
        mla_decode(**inputs, return_lse=True, return_max_logits=True, out=given)
        out, largest = mla_decode(**inputs, return_max_logits=True)
    check(case, *given[:2])
    assert torch.equal(out, given[0])
    assert torch.equal(largest, given[2])
    expected = case.oracle(Tiles(64, 64, True)).max_logits
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=1e-5)
    assert (largest[0] == -math.inf).all()


def test_workspace_of_the_caller():
    """As large as it says; it is left with counters of zero."""
    case = case_of(64, 2, [300, 70])
    needed = workspace_bytes(problem(batch=2, seqlen_q=2, heads_q=64, num_splits=3), B200)
    workspace = make_workspace("cpu", needed)
    with emulated_calls(POLICY):
        out, lse = case.run(backend="emulator", num_splits=3, workspace=workspace)
    check(case, out, lse)
    assert not workspace[: 64 << 10].any()
    assert workspace[64 << 10 :].any()
    with pytest.raises(ValueError, match=f"3 splits of this problem need {needed}"):
        case.run(backend="emulator", num_splits=3, workspace=workspace[1:])


def test_epilogue_after_the_combine():
    case = case_of(64, 1, [300, 70])
    op = FP8(0.02)
    with emulated_calls(POLICY):
        got = mla_decode(**case._inputs, num_splits=3, epilogue=op, backend="emulator")
    plain, _ = case.reference()
    expected = plain.float() / 0.02
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.07)


def problem(**changes):
    plain = Problem(
        "mla_decode", "paged", False, BF16, BF16, 4, 1, 4096, 128, 1, 576, 512, 64, window_right=0
    )
    return replace(plain, **changes)


def test_which_kernel():
    """By the rows of a sequence: positions × heads."""
    kinds = {
        (1, 1): ("TransposedPlan", 16), (16, 1): ("TransposedPlan", 16),
        (8, 4): ("TransposedPlan", 32),
        (33, 1): ("MlaPlan", 64), (64, 1): ("MlaPlan", 64), (65, 1): ("MlaPlan", 128),
        (128, 4): ("MlaPlan", 128),
    }  # fmt: skip
    for (heads, seqlen_q), expected in kinds.items():
        plan = plan_of(problem(heads_q=heads, seqlen_q=seqlen_q))
        assert (type(plan).__name__, plan.rows) == expected
    cuts = {0: Cut.SHARE, 1: Cut.WHOLE, 2: Cut.FIXED}
    assert {n: plan_of(problem(num_splits=n)).cut for n in cuts} == cuts


def test_what_can_be_implemented():
    assert can_implement(problem(), B200) is None
    assert can_implement(problem(heads_q=16, num_splits=5, page_size=1), B200) is None
    refused: dict[str, dict[str, Any]] = {
        "no attention": {"op": "attention"},
        "at least one page": {"seqlen_k": 0},
        "takes 20002 counters": {"batch": 10000, "num_splits": 2},
        "got 48": {"page_size": 48, "seqlen_k": 4800},
    }
    for reason, changes in refused.items():
        assert re.search(reason, can_implement(problem(**changes), B200) or "")


def test_workspace_does_not_grow_with_the_batch():
    """With num_splits=None: two slots a CTA, 128 rows of 514 numbers or fewer."""
    sizes = {workspace_bytes(problem(batch=batch), B200) for batch in (1, 128, 4096)}
    assert len(sizes) == 1
    assert sizes.pop() < 40 << 20
    assert workspace_bytes(problem(num_splits=1), B200) == 0
