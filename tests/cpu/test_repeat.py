"""Calls like one that was checked before: nothing is checked again, nothing is mixed up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cute_fmha import SkipSoftmax, SkipStats, api, attention, repeat, skip_softmax
from cute_fmha.epilogues import Scale
from cute_fmha.problem import BlockMask
from cute_fmha.testing import (
    AttentionCase,
    Case,
    Heads,
    Options,
    Source,
    dense_case,
    mla_case,
    packed_case,
    paged_case,
)

HEADS = Heads(4, 2, 64, 64)
ALL = Options(causal=True, sink=True, softcap=3.0, blocks=(16, 16, 0.5))
WINDOW = Options(window=(5, 2))


def source(seed: int) -> Source:
    return Source(torch.float32, seed=seed, std=1.0)


CASES: dict[str, Callable[[int], Case]] = {
    "dense": lambda seed: dense_case(2, 9, 20, HEADS, ALL, source(seed)),
    "packed": lambda seed: packed_case(
        [3, 7], [20, 1], HEADS, Options(window=(5, 2)), source(seed)
    ),
    "paged": lambda seed: paged_case(2, [5, 17], 16, HEADS, Options(scale=0.3), source(seed)),
    "mla": lambda seed: mla_case(2, [5, 17], 16, 3, source=source(seed)),
}


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    """How often a call was checked, as a list that grows."""
    repeat._known.clear()
    seen: list[str] = []
    for name in ("check_query", "check_qkv", "resolve_window"):
        original = getattr(api, name)

        def noting(*arguments, original=original, name=name):
            seen.append(name)
            return original(*arguments)

        monkeypatch.setattr(api, name, noting)
    yield seen
    repeat._known.clear()


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_other_numbers_of_the_same_call(make, checks):
    first, second = make(0), make(1)
    expected = [[x.clone() for x in case.run(backend="reference")] for case in (first, second)]
    repeat._known.clear()
    checks.clear()
    for case, want in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        got = case.run(backend="reference")
        assert all(map(torch.equal, got, want))
    assert len(checks) == 2  # both in the first call
    assert len(repeat._known) == 1


def test_outputs_that_are_given(checks):
    case = dense_case(2, 9, 20, HEADS, ALL, source(0))
    want = case.run(backend="reference")
    for _ in range(2):
        out, lse = torch.full_like(want[0], math.nan), torch.full_like(want[1], math.nan)
        got = case.run(backend="reference", out=(out, lse))
        assert got[0] is out
        assert got[1] is lse
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])
    alone = attention(case.q, case.k, case.v, out=out, **case.common, backend="reference")
    again = attention(case.q, case.k, case.v, out=out, **case.common, backend="reference")
    assert alone is out
    assert again is out


def test_new_outputs_are_contiguous():
    """Also for a query that is not."""
    case = dense_case(2, 9, 9, HEADS, source=source(0))
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    for query in (case.q, q, case.q, q):
        out = attention(query, case.k, case.v, backend="reference")
        assert out.is_contiguous()
        assert out.shape == query.shape


def changed(case: AttentionCase) -> dict[str, dict[str, Any]]:
    """Arguments that are wrong, each in one way."""
    q, k, v = case.q, case.k, case.v
    return {
        "q strides": {"q": torch.zeros(*q.shape, 2)[..., 0]},
        "k head dim": {"k": k[..., :32]},
        "v batch": {"v": v[:1]},
        "k dtype": {"k": k.half()},
        "out dtype": {"out": torch.empty_like(q, dtype=torch.half)},
        "out shape": {"out": torch.empty_like(q)[:1]},
        "backend": {"backend": "nobody"},
        "window": {"window": (-2, 0)},
        "scale": {"scale": -1.0},
        "softcap": {"softcap": math.nan},
        "num_splits": {"num_splits": 0},
        "sink": {"sink": torch.zeros(3)},
        "skip": {"skip": 0.5},
        "stats": {"stats": torch.zeros(2, dtype=torch.int64)},
        "workspace": {"workspace": torch.zeros(5)},
        "seqused_k": {"seqused_k": torch.zeros(2)},
        "block_mask": {"block_mask": BlockMask(torch.ones(1, 1, 9, 9, dtype=torch.bool), 5, 5)},
        "scale, unhashable": {"scale": []},
    }


def test_what_is_wrong_stays_wrong():
    case = dense_case(2, 9, 20, HEADS, source=source(0))
    right: dict[str, Any] = {"q": case.q, "k": case.k, "v": case.v, "backend": "reference"}
    for name, wrong in changed(case).items():
        attention(**right)
        attention(**right)
        for _ in range(2):
            with pytest.raises(ValueError, match=name.split()[0].strip(",")):
                attention(**(right | wrong))


def test_gradients_are_refused_every_time():
    case = dense_case(2, 9, 20, HEADS, source=source(0))
    case.run(backend="reference")
    case.q.requires_grad_()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="no backward pass"):
            case.run(backend="reference")
    with torch.no_grad():
        case.run(backend="reference")


def test_lists_and_other_spellings_go_through():
    case = dense_case(1, 9, 20, HEADS, source=source(0))
    want = attention(case.q, case.k, case.v, window=(3, 2), backend="reference")
    for _ in range(2):
        got = attention(case.q, case.k, case.v, window=[3, 2], backend="reference")  # type: ignore[arg-type]
        assert torch.equal(got, want)


def test_skips_and_counters():
    """Host and device thresholds, the ambient policy, and counters are those of each call."""
    skippy = replace(source(0), gap=14.0, gap_block=128)
    case = dense_case(1, 40, 900, HEADS, source=skippy)
    device = torch.tensor([0.0])
    counts = {}
    for name, policy in {
        "none": None,
        "host": SkipSoftmax(math.exp(-7.0)),
        "small": SkipSoftmax(1e-30),
        "factor": SkipSoftmax(threshold_scale_factor=900 * math.exp(-7.0)),
        "device": SkipSoftmax(device),
    }.items():
        for ambient in (False, True):
            for repeated in range(2):
                device.fill_(math.exp(-7.0) if repeated else 0.0)
                stats = SkipStats("cpu")
                with skip_softmax(policy if ambient else None):
                    given = None if ambient else policy
                    case.run(skip=given, stats=stats, backend="reference")
                counts[name, ambient, repeated] = stats.read()[0]
    skipped = counts["host", False, 0]
    assert skipped > 0
    for (name, _, repeated), count in counts.items():
        expected = {"none": 0, "small": 0, "device": skipped * repeated}.get(name, skipped)
        assert count == expected, name


def test_whoever_watches_sees_the_operator():
    case = dense_case(1, 9, 20, HEADS, source=source(0))
    case.run(backend="reference")

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        case.run(backend="reference")
    assert "cute_fmha.attention.default" in watch.seen
    with torch.profiler.profile() as profile:
        case.run(backend="reference")
    assert any("cute_fmha::attention" in event.name for event in profile.events())


def test_an_op_with_parameters_is_checked_every_time(checks):
    case = dense_case(1, 9, 20, HEADS, source=source(0))
    plain, _ = case.run(backend="reference")
    for factor in (2.0, 3.0):
        out, _ = case.run(backend="reference", epilogue=Scale(factor))
        torch.testing.assert_close(out, factor * plain)
    with pytest.raises(ValueError, match="scale"):
        case.run(backend="reference", epilogue=Scale(torch.ones(3)))


def test_forgets_when_full(monkeypatch):
    monkeypatch.setattr(repeat, "LIMIT", 3)
    for length in range(1, 8):
        dense_case(1, length, 5, HEADS, source=source(0)).run(backend="reference")
        assert len(repeat._known) <= 3
