"""What a call costs on a device: 1 launch, 0 synchronisations, 0 allocations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fmha import SkipSoftmax, SkipStats, attention, make_workspace, mla_decode
from cute_fmha.bench import __main__ as cli
from cute_fmha.bench.problems import Command, Inputs, make_inputs, make_shape
from cute_fmha.bench.profile import count

pytestmark = pytest.mark.gpu

PROBLEMS: dict[str, tuple[Command, tuple[int, ...], int]] = {
    "prefill": ("prefill", (2, 8, 2, 1024, 128, 128), 0),
    "prefill-192": ("prefill", (1, 8, 8, 1024, 192, 128), 0),
    "decode-split": ("decode", (1, 32, 8, 128, 8192), 0),
    "decode-paged": ("decode", (3, 32, 8, 128, 1000), 64),
    "mla": ("mla-decode", (64, 1, 128, 512), 64),
    "mla-split": ("mla-decode", (1, 1, 128, 8192), 64),
    "mla-mtp": ("mla-decode", (4, 2, 16, 1000), 64),
}

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "skip": lambda: {"skip": SkipSoftmax(0.01)},
    "counted": lambda: {"skip": SkipSoftmax(0.01), "stats": SkipStats()},
}


def call_of(name: str, return_lse: bool, options: dict[str, Any]) -> Callable[[], object]:
    """A call with everything that it needs already allocated."""
    command, numbers, page_size = PROBLEMS[name]
    shape = make_shape(command, numbers, True, torch.bfloat16, page_size)
    inputs: Inputs = make_inputs(shape, torch.device("cuda"), seed=0)
    q = inputs.q
    out: Any = q.new_empty(*q.shape[:-1], shape.head_dim_v)
    if return_lse:
        lse = torch.empty(shape.batch, shape.heads_q, shape.seqlen_q, device="cuda")
        out = (out, lse)
    options = {**options, "out": out, "return_lse": return_lse, "workspace": make_workspace()}
    if command == "mla-decode":
        table, lengths = inputs.block_table, inputs.cache_seqlens
        assert table is not None
        assert lengths is not None
        return lambda: mla_decode(q, inputs.k, table, lengths, **options)
    options |= {"causal": True, "block_table": inputs.block_table}
    return lambda: attention(q, inputs.k, inputs.v, seqused_k=inputs.cache_seqlens, **options)


def test_count_sees_launches_synchronisations_and_allocations() -> None:
    a, b = torch.ones(1000, device="cuda"), torch.ones(1000, device="cuda")
    out = torch.empty_like(a)
    fused = count(lambda: torch.add(a, b, out=out))
    assert (fused.launches, fused.synchronisations, fused.allocations) == (1, 0, 0)
    assert fused.ideal
    twice = count(lambda: (a + b) * b)
    assert (twice.launches, twice.synchronisations, twice.allocations) == (2, 0, 2)
    read = count(lambda: a[0].item())
    assert (read.launches, read.synchronisations) == (1, 1)
    waited = count(torch.cuda.synchronize)
    assert (waited.launches, waited.synchronisations) == (0, 1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_launch_no_synchronisation_no_allocation(
    problem: str, return_lse: bool, options: str
) -> None:
    counts = count(call_of(problem, return_lse, OPTIONS[options]()))
    assert counts.ideal, counts


@pytest.mark.parametrize("mode", ["graph", "plain"])
@pytest.mark.parametrize(
    ("command", "shape"), [("prefill", "1,4,4,512,128,128"), ("mla-decode", "2,1,16,1000")]
)
def test_the_benchmark_runs(
    command: str, shape: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--shapes", shape, "--mode", mode, "--seconds", "0.01"]
    arguments += ["--peers", "sdpa", "--skip", "0.1", "--low-share", "0.5"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "B=" in capsys.readouterr().out
    record = json.loads((tmp_path / f"{command}.json").read_text())
    for result in record["results"]:
        for name in ("cute_fmha", "cute_fmha λ=0.1"):
            assert result["implementations"][name]["median_us"] > 0
