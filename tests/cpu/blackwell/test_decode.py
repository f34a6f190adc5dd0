"""Decode of ordinary heads on the Blackwell kernel, executed number by number: output, LSE, skipped
tiles, races, hazards; one launch a call, which leaves its workspace as it found it."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from fragments import on_reference, same_bits

from cute_fmha import SkipStats, attention, machine_code, make_workspace
from cute_fmha.emulator import Policy, backend, emulated_calls
from cute_fmha.emulator.device import Device
from cute_fmha.emulator.mutate import STRICT_POLICIES, run_mutants
from cute_fmha.epilogues import FP8, NVFP4, Gate, Identity, Scale
from cute_fmha.kernels.blackwell import decode_host, launch, prefill_host
from cute_fmha.kernels.blackwell.decode_plan import can_implement, plan_of
from cute_fmha.kernels.blackwell.mla_plan import automatic_cuts
from cute_fmha.problem import Problem, SkipSoftmax, Target
from cute_fmha.testing import (
    AttentionCase,
    Heads,
    Options,
    Source,
    Tiles,
    check,
    dense_case,
    paged_case,
)

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

BF16, FP16 = torch.bfloat16, torch.float16
B200 = Target("cuda", 100, 148)
LENGTHS = [0, 1, 63, 64, 65, 129, 1000]
LAMBDA = SkipSoftmax(math.exp(-7.0))
GAP = {"gap": 14.0, "gap_block": 128, "std": 0.3}

POLICIES = [
    Policy(mode, seed=seed, strict_tmem_load=True, strict_tcgen05_fence=True)
    for mode, seed in (("eager", 0), ("lazy", 0), ("random", 1), ("random", 2))
]


def case_of(
    heads: tuple[int, int], width: int, lengths: list[int], seqlen_q: int = 1, page_size: int = 0,
    dtype: torch.dtype = BF16, source: dict[str, Any] | None = None, seed: int = 0, **options: Any,
) -> AttentionCase:  # fmt: skip
    """Keys of some sequences; causal unless told. What must not be read is NaN."""
    options.setdefault("causal", True)
    shape = Heads(*heads, width, width)
    drawn = Source(dtype, seed=seed, **{"std": 0.5, **(source or {})})
    if page_size:
        return paged_case(seqlen_q, lengths, page_size, shape, Options(**options), drawn)
    return dense_case(
        len(lengths), seqlen_q, max(lengths), shape, Options(**options), drawn, lengths
    )


def emulated(case: AttentionCase, policy: Policy, sms: int = 8, **call: Any) -> Any:
    """(out, lse) of one launch of the decode kernel on a GPU of ``sms`` SMs."""
    with emulated_calls(policy, Device(sms=sms)) as reports:
        result = case.run(backend="emulator", **call)
    assert [one.kernel for one in reports[0].launches] == ["fmha_decode_0"]
    return result


def skips(case: AttentionCase, policy: Policy, num_splits: int | None, rows: int = 16) -> Any:
    """Output, LSE and counters of a launch that skips; the counters, after they are compared."""
    stats, tiles = SkipStats("cpu"), Tiles(rows, 128, True, num_splits or 1)
    sms = 8 if num_splits else 1  # One worker cuts nothing.
    result = emulated(case, policy, sms, num_splits=num_splits, skip=LAMBDA, stats=stats)
    expected = case.oracle(tiles, LAMBDA)
    assert expected.margin > 1.0, f"a decision is within {expected.margin} of λ"
    check(case, result[0], result[1], tiles, LAMBDA)
    assert stats.read() == (expected.skipped, expected.total)
    return stats.read()


@pytest.mark.parametrize(
    ("width", "splits"),
    [
        (64, None), (128, None), (128, 1), (128, 3), (512, None),
        pytest.param(256, 3, marks=pytest.mark.sweep),
    ],
)  # fmt: skip
def test_widths(width, splits):
    """Several sequences, of which one is empty."""
    case = case_of((8, 2), width, LENGTHS, seqlen_q=2)
    for policy in POLICIES[:: 1 if width == 128 else 2]:
        check(case, *emulated(case, policy, num_splits=splits))


@pytest.mark.parametrize(
    ("heads", "seqlen_q"), [((3, 1), 4), ((4, 4), 1), ((40, 2), 2), ((64, 1), 1)], ids=str
)
def test_rows(heads, seqlen_q):
    """Groups of any size; up to 16 rows, up to 32, and several blocks of rows of a KV head."""
    case = case_of(heads, 128, [300, 0, 129], seqlen_q, dtype=FP16)
    for policy in POLICIES[1:3]:
        check(case, *emulated(case, policy))


@pytest.mark.parametrize(("page_size", "splits"), [(64, None), (8, 2)])
def test_pages(page_size, splits):
    """Shuffled; what lies behind a sequence, in its last page and in the table, is poison."""
    case = case_of((12, 4), 128, LENGTHS, 2, page_size)
    for policy in POLICIES[1:3]:
        check(case, *emulated(case, policy, num_splits=splits))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"window": (70, 30), "causal": False}, marks=pytest.mark.sweep),
        {"softcap": 30.0, "sink": True, "window": (130, 0)},
    ],
    ids=["both-sides", "all"],
)
def test_options(options):
    case = case_of((8, 2), 128, LENGTHS, 2, dtype=FP16, **options)
    for policy in POLICIES[1:3]:
        check(case, *emulated(case, policy))


def test_every_key_in_use():
    """Neither lengths nor a table."""
    case = dense_case(2, 1, 333, Heads(6, 2, 128, 128), source=Source(BF16, std=0.5))
    check(case, *emulated(case, POLICIES[2]))


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.sweep)])
def test_growing_scores(width):
    """Maxima rise by more than the rescale threshold, over and over: O is rescaled."""
    case = case_of((8, 2), width, [900, 300], dtype=FP16, source={"std": 1.0})
    for first in range(0, 900, 128):
        case.k[:, first : first + 128] *= 0.3 + first / 256
    expected, expected_lse = case.reference()
    for policy in POLICIES:
        out, lse = emulated(case, policy, num_splits=1)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=2**-7)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.mode}{p.seed or ''}")
def test_skipped_tiles(policy):
    """The oracle's decisions, counted; in parts, too, where running maxima begin anew."""
    case = case_of((8, 2), 128, [900, 1400, 0, 64], 2, dtype=FP16, source=GAP)
    for splits in (None, 3):
        skipped, total = skips(case, policy, splits)
        assert 0 < skipped < total


def test_skips_of_shares():
    """Of one KV head the cuts are those that the host works out likewise."""
    lengths = [900, 1400, 0, 64]
    case = case_of((8, 1), 128, lengths, 2, dtype=FP16, source=GAP)
    problem = replace(
        PROBLEM, dtype=FP16, out_dtype=FP16, seqlen_q=2, heads_q=8, heads_kv=1, seqused=True,
        skip=True, stats=True, lse=True,
    )  # fmt: skip
    cuts = automatic_cuts(plan_of(problem), (2, 8), (-1, 0), lengths, 7)
    assert max(map(len, cuts)) > 0
    tiles, stats = Tiles(16, 128, True, 1, cuts), SkipStats("cpu")
    out, lse = emulated(case, POLICIES[2], 7, skip=LAMBDA, stats=stats)
    expected = case.oracle(tiles, LAMBDA)
    assert expected.margin > 1.0
    check(case, out, lse, tiles, LAMBDA)
    assert stats.read() == (expected.skipped, expected.total)


def test_values_of_skipped_tiles_are_not_fetched():
    """Fewer bytes by TMA, and what these values are has no say."""
    case = case_of((8, 1), 128, [1408], dtype=FP16, source=GAP)
    emulated_bytes = []
    for skip in (None, LAMBDA):
        with emulated_calls(POLICIES[1], Device(sms=1)) as reports:
            case.run(backend="emulator", skip=skip, num_splits=1)
        emulated_bytes.append(reports[0].results[0].counters.tma_load_bytes)
    skipped = case.oracle(Tiles(16, 128, True), LAMBDA).skipped
    assert skipped > 0
    assert emulated_bytes[0] - emulated_bytes[1] == skipped * 128 * 128 * 2


def test_threshold_of_the_device_over_the_length():
    """The same decisions as by the host's λ."""
    case = case_of((8, 1), 128, [1000], dtype=FP16, source=GAP)
    lam, device = LAMBDA.value, torch.zeros(1)
    counts = set()
    device.fill_(lam * 1000)
    for given in ({"threshold": lam}, {"threshold_scale_factor": device}):
        stats, skip = SkipStats("cpu"), SkipSoftmax(**given)
        emulated(case, POLICIES[2], 1, num_splits=1, skip=skip, stats=stats)
        counts.add(stats.read())
    assert len(counts) == 1
    assert counts.pop()[0] > 0


def test_fixed_splits_are_independent_of_the_batch():
    """Bit by bit, whatever else is in the batch and however many SMs there are."""
    case = case_of((8, 2), 128, [700, 300, 64])
    out, lse = emulated(case, POLICIES[2], 12, num_splits=3)
    for index in range(3):
        alone = replace(
            case,
            **{name: getattr(case, name)[index : index + 1].clone() for name in "qkv"},
            common=case.common | {"seqused_k": case.common["seqused_k"][index : index + 1].clone()},
        )
        one, one_lse = emulated(alone, POLICIES[3], 2, num_splits=3)
        assert torch.equal(one[0], out[index])
        assert torch.equal(one_lse[0], lse[index])


def test_workspace_of_the_caller():
    """As large as it says, used by two launches in a row, left with counters of zero."""
    case = case_of((8, 2), 128, [600, 129])
    problem = replace(
        PROBLEM, batch=2, seqlen_k=600, heads_q=8, heads_kv=2, num_splits=3, seqused=True
    )
    needed = decode_host.workspace_bytes(problem, B200)
    workspace = make_workspace("cpu", needed)
    for policy in POLICIES[2:]:
        check(case, *emulated(case, policy, 148, num_splits=3, workspace=workspace))
        assert not workspace[: 64 << 10].any()
        assert workspace[64 << 10 :].any()
    with pytest.raises(ValueError, match=f"3 splits of this problem need {needed}"):
        case.run(backend="emulator", num_splits=3, workspace=workspace[1:])


OPS = {
    "scale": lambda heads, width: Scale(torch.linspace(0.1, 3.0, heads), torch.float16),
    "fp8": lambda heads, width: FP8(torch.tensor(0.3)),
    "nvfp4": lambda heads, width: NVFP4(torch.tensor([0.7])),
    "gate": lambda heads, width: Gate(torch.randn(3, 2, heads, width, dtype=BF16)),
}


def outputs(case: AttentionCase, op: Any, num_splits: int) -> Any:
    with emulated_calls(POLICIES[2], Device(sms=8)) as reports:
        result = attention(
            case.q, case.k, case.v, **case.common, epilogue=op, num_splits=num_splits,
            backend="emulator",
        )  # fmt: skip
    assert [one.kernel for one in reports[0].launches] == ["fmha_decode_0"]
    return result


def epilogue(name: str, width: int, num_splits: int) -> None:
    """The specification's bits, of the FP32 output that the same kernel leaves without an op."""
    case = case_of((8, 2), width, [300, 0, 129], 2)
    x = outputs(case, Identity(torch.float32), num_splits)
    op = OPS[name](8, width)
    found, expected = outputs(case, op, num_splits), on_reference(op, x)
    if name == "gate":  # its sigmoid is approximate
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-6)
    else:
        assert same_bits(found, expected)


@pytest.mark.parametrize(("name", "width", "splits"), [("nvfp4", 64, 2)])
def test_ops_have_the_specifications_bits(name, width, splits):
    epilogue(name, width, splits)


PROBLEM = Problem(
    "attention", "dense", False, BF16, BF16, 128, 1, 8192, 32, 8, 128, 128, window_right=0
)


def chosen(**changes: Any) -> str:
    return launch.choose(replace(PROBLEM, **changes), B200).NAME


def test_which_kernel():
    """Few rows of a KV head, unless they are so many, of heads so wide, that tiles of 128 rows are
    faster where nothing has to be split; and what prefill has no plan for."""
    for width in (64, 128, 256, 512):
        for heads_q, heads_kv in ((8, 1), (32, 8), (64, 8)):
            sizes: dict[str, Any] = {"heads_q": heads_q, "heads_kv": heads_kv, "head_dim": width}
            for batch, seqlen_q in itertools.product((1, 128), (1, 4)):
                both = {"head_dim_v": width, "batch": batch, "seqlen_q": seqlen_q}
                assert chosen(**sizes, **both) == "decode"
    assert chosen(seqlen_q=64) == "prefill"
    wide = {"head_dim": 256, "head_dim_v": 256, "seqlen_q": 16}
    assert chosen(**wide) == "prefill"
    assert chosen(**wide, batch=1) == "decode"
    assert chosen(block_mask=(64, 64)) == "prefill"
    assert chosen(seqlen_q=512, num_splits=4, batch=1) == "decode"
    assert chosen(seqlen_q=512, layout="paged", page_size=64) == "decode"


def test_what_auto_leaves_to_others():
    """Many rows where keys would be fetched for every 32 of them, few rows in tiles of 128."""
    paged = replace(PROBLEM, layout="paged", page_size=64)
    assert launch.declines(paged, B200) is None
    assert launch.declines(PROBLEM, B200) is None
    assert "many query rows" in (launch.declines(replace(paged, seqlen_q=512), B200) or "")
    few = replace(PROBLEM, block_mask=(64, 64))
    assert "few query rows" in (launch.declines(few, B200) or "")
    assert launch.declines(replace(PROBLEM, seqlen_q=512), B200) is None
    assert prefill_host.cycles(PROBLEM, B200) > decode_host.cycles(PROBLEM, B200)


def test_what_can_be_implemented():
    assert can_implement(PROBLEM, B200) is None
    refused: dict[str, dict[str, Any]] = {
        "no mla_decode": {"op": "mla_decode"},
        "got packed ones": {"layout": "packed", "packed_q": True},
        "no block mask": {"block_mask": (64, 64)},
        "got torch.float32": {"dtype": torch.float32},
        r"got \(192, 128\)": {"head_dim": 192},
        "at least one sequence, query and key": {"seqlen_k": 0},
        "multiple of 8 tokens.*got 20": {"layout": "paged", "page_size": 20},
        "takes 20482 counters for 2560": {"batch": 2560, "num_splits": 2},
        "got torch.float64": {"out_dtype": torch.float64},
    }
    for reason, changes in refused.items():
        assert re.search(reason, can_implement(replace(PROBLEM, **changes), B200) or "")


def test_plans():
    """Keys and values share what shared memory has left; skips are decided four tiles ahead."""
    stages = {}
    for width in (64, 128, 256, 512):
        for group, skip in ((16, False), (32, True)):
            sizes: dict[str, Any] = {
                "head_dim": width,
                "head_dim_v": width,
                "heads_kv": 1,
                "heads_q": group,
            }
            plan = plan_of(replace(PROBLEM, skip=skip, **sizes))
            assert plan.shared_bytes <= 227 << 10 < plan.shared_bytes + plan.part_bytes
            assert plan.depth == (4 if skip else 2)
            stages[width, group] = (plan.k_stages, plan.v_stages)
    assert stages == {
        (64, 16): (7, 6), (128, 16): (3, 3), (256, 16): (3, 3), (512, 16): (3, 3),
        (64, 32): (6, 5), (128, 32): (3, 2), (256, 32): (3, 2), (512, 32): (2, 2),
    }  # fmt: skip


def machine_code_of(problem: Problem) -> None:
    """Tensor-core instructions, no stack, no spills."""
    try:
        machine_code.tool("nvdisasm")
    except machine_code.ToolError as error:
        pytest.skip(str(error))
    code = machine_code.read(launch.prepare(problem, B200).binary.cubin)
    assert (code.stack, code.local, code.spills) == (0, 0, 0)
    # S of a part (D ≤ 128: D / 16), P V of a part (8) at two places.
    width = min(problem.head_dim, 128)
    assert code.count("UTCHMMA") == width // 16 + 2 * 8
    for instruction in ("LDTM", "UTMALDG", "UTCBAR", "FFMA2", "FMNMX3", "STSM"):
        assert code.count(instruction) > 0, instruction


def test_every_signal_is_needed():
    """Leave out one arrival, commit, fence or barrier after another: each is noticed."""
    case = case_of((8, 1), 64, [1300, 700, 40], dtype=FP16, source=GAP)
    captured: list[Any] = []
    with backend.calls_go_to(captured.append, Device(sms=1)):
        case.run(backend="emulator", skip=LAMBDA, num_splits=1)
    report = run_mutants(
        captured[0], policies=STRICT_POLICIES, check=lambda *_: True,
        chosen=lambda mutant: mutant.order and mutant.group != "mbarrier wait",
    )  # fmt: skip
    missed = [str(outcome.mutant) for outcome in report.outcomes if outcome.verdict == "missed"]
    assert not missed
    assert sum(outcome.verdict == "caught" for outcome in report.outcomes) > 40


ALL: dict[str, Any] = {
    "window_left": 100,
    "sink": True,
    "softcap": True,
    "skip": True,
    "stats": True,
    "lse": True,
}


def test_machine_code():
    machine_code_of(replace(PROBLEM, heads_kv=1, layout="paged", page_size=16, **ALL))


# ------------------------------------------------------------------------------- the whole of it

CUTS: dict[str, tuple[int | None, ...]] = {"auto": (None,), "1": (1,), "2, 5": (2, 5)}
TURNS: list[dict[str, Any]] = [{}, {"sink": True}, {"window": (70, 0)}, {"softcap": 5.0}]
MATRIX = [
    (width, cut, wide, index)
    for index, (width, cut, wide) in enumerate(
        itertools.product((64, 128, 256, 512), CUTS, (False, True))
    )
]


@pytest.mark.sweep
@pytest.mark.parametrize(("width", "cut", "wide", "index"), MATRIX)
def test_matrix(width, cut, wide, index):
    """A kernel each, of up to 16 rows or 32, with all groups and query lengths; page sizes and
    options by turns."""
    page_size, options = (0, 16, 64, 128, 8)[index % 5], TURNS[index % 7 % 4]
    shapes = itertools.product(((2, 2), (4, 1), (8, 1), (6, 2)), (1, 2, 4))
    if wide:
        page_size = page_size or 16  # so that no other kernel takes up to 128 rows
        shapes = itertools.product(((8, 1), (10, 2), (32, 1)), (3, 4))
    runs = list(itertools.product(shapes, CUTS[cut]))
    for turn, ((heads, seqlen_q), splits) in enumerate(runs):
        if (seqlen_q * heads[0] // heads[1] > 16) == wide:
            case = case_of(heads, width, LENGTHS, seqlen_q, page_size, seed=turn, **options)
            policy = POLICIES[turn % 4]
            check(case, *emulated(case, policy, 8 + turn % 9, num_splits=splits))


@pytest.mark.sweep
@pytest.mark.parametrize(("width", "splits"), [(64, None), (256, 2), (512, None)])
def test_skips_of_every_width(width, splits):
    case = case_of((8, 2), width, [900, 1400, 0, 64], 2, 64, dtype=FP16, source=GAP)
    for policy in POLICIES:
        skips(case, policy, splits)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "width", "splits"),
    [("scale", 64, 1), ("fp8", 128, 3), ("gate", 512, 2), ("nvfp4", 512, 2)],
)
def test_every_op(name, width, splits):
    epilogue(name, width, splits)


@pytest.mark.sweep
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("heads_q", [16, 32])
def test_machine_code_of_every_width(width, heads_q):
    sizes: dict[str, Any] = {"head_dim": width, "head_dim_v": width, "heads_q": heads_q}
    sizes["heads_kv"] = 1
    machine_code_of(replace(PROBLEM, **sizes, **ALL))
