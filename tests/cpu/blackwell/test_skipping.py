"""`python -m cute_fmha.bench.skipping`: its inputs skip what they are made to, and its table."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from cute_fmha.problem import SkipSoftmax
from cute_fmha.problem_text import parse
from cute_fmha.testing import Tiles

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

from cute_fmha.bench import skipping

PROBLEM = "sq300,sk1100,hq2,hkv1,d128,fp16"


def test_patterns():
    def low(kind, skipped=0.7):
        return ["".join("-" if x else "X" for x in row) for row in skipping.pattern(
            kind, 3, 10, skipped).tolist()]  # fmt: skip

    assert low("last") == ["XXX-------"] * 3
    assert low("spread") == ["X--X--X---"] * 3
    assert low("apart") == ["X--X--X---", "X---X--X--", "X--X--X---"]
    assert low("last", 0.0) == low("spread", 0.0) == low("apart", 0.0) == ["X" * 10] * 3
    assert low("apart", 0.99) == ["X---------"] * 3


@pytest.mark.parametrize("kind", skipping.PATTERNS)
def test_what_is_skipped(kind):
    """As many tiles of every head as the pattern says, in the specification and in the kernel."""
    problem = parse(PROBLEM)
    _, tiles = skipping.planned(problem, True)
    assert tiles == Tiles(128, 128, False)
    low = skipping.pattern(kind, 3, 9, 0.6)
    case = skipping.skip_case(problem, tiles, low)
    skip = SkipSoftmax(math.exp(-skipping.GAP / 2))
    assert case.oracle(tiles, skip).margin > 2.0
    done = skipping.run(problem, case, skip)
    assert done.counts == done.expected == (2 * int(low.sum()), 2 * low.numel())
    # Without decisions both heads of the group share Q tiles.
    assert skipping.run(problem, case, None).counts == (0, 5 * 9)


def test_a_pattern_of_a_pair():
    problem = parse("sq600,sk700,d256,fp16")
    _, tiles = skipping.planned(problem, True)
    assert tiles.tile_m == 256
    low = skipping.pattern("apart", 3, 6, 0.5)
    assert not torch.equal(low[0], low[1])
    skip = SkipSoftmax(math.exp(-skipping.GAP / 2))
    done = skipping.run(problem, skipping.skip_case(problem, tiles, low), skip)
    assert done.counts == done.expected == (int(low.sum()), low.numel())


def test_table(capsys, monkeypatch):
    problem = "sq256,sk1100,d128,fp16"
    arguments = [problem, "--skipped", "0.6", "--pattern", "spread"]
    assert skipping.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{problem}: 2 blocks of 128 query rows, 9 KV tiles" in text
    lines = text.splitlines()[5:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:3]]
    # Of 0.6 instead of the 10 / 18 that were run.
    at_most = r"At a share of 0\.60: [a-z ]+[\d,]+, .*; at most (\d\.\d\d)×"
    match = re.fullmatch(at_most, lines[4])
    assert match is not None
    assert float(match[1]) > float(rows[2][5].split(", ")[-1][:-1])
    assert [row[1] for row in rows] == ["0 of 18", "0 of 18", "10 of 18"]
    cycles = [float(row[2].replace(",", "")) for row in rows]
    assert cycles[2] < cycles[0] < cycles[1]
    assert rows[2][0] == "spread (by products 1.38×)"
    assert rows[2][3] == f"{cycles[0] / cycles[2]:.2f}×"
    assert rows[1][3] == f"{100 * cycles[1] / cycles[0] - 100:+.2f} %"
    right = skipping.run

    def wrong(*given):
        return replace(right(*given), counts=(1, 18))

    monkeypatch.setattr(skipping, "run", wrong)
    assert skipping.main(arguments) == 1
    assert "counters (1, 18), the specification has (10, 18)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("sq256,sk512,d128,causal", "patterns are of dense problems without a mask"),
        ("sq1,sk512,hq4,hkv1,d128", "is not run by the prefill kernel"),
        ("sq9000,sk512,d64", "too many query rows"),
        ("sq256,d128,what", "is not a word of a problem"),
    ],
)
def test_refuses(problem, message, capsys):
    assert skipping.main([problem]) == 2
    assert message in capsys.readouterr().err
