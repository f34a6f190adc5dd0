"""The benchmark harness without a GPU: shapes, statistics, table, JSON, plot, absent peers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cute_fmha.bench import __main__ as cli
from cute_fmha.bench import profile
from cute_fmha.bench.measure import (
    Contestant,
    Failure,
    Settings,
    Summary,
    calls_per_sample,
    describe,
    measure,
    percentile,
    rounds_for,
    summarise,
)
from cute_fmha.bench.peers import DEFAULT_PEERS, CuteFmha, all_peers, choose_peers
from cute_fmha.bench.problems import (
    COMMANDS,
    LOW_BLOCK,
    PRESETS,
    Command,
    Inputs,
    Shape,
    input_sets,
    make_inputs,
    make_shape,
    make_shapes,
    parse_numbers,
)
from cute_fmha.bench.report import Report, Row, gbps, table_rows, tflops, to_json, write_plot

CPU = torch.device("cpu")
FAST = Settings("plain", seconds=0.0, sample_us=0.0, min_rounds=3, max_rounds=3)


def prefill(causal: bool = True, dtype: torch.dtype = torch.float32) -> Shape:
    return make_shape("prefill", (1, 4, 2, 32, 64, 64), causal, dtype, 0)


def mla(page_size: int = 64) -> Shape:
    return make_shape("mla-decode", (2, 1, 4, 300), True, torch.float32, page_size)


def summary(microseconds: float) -> Summary:
    return Summary(microseconds, 0.9 * microseconds, 1.2 * microseconds, samples=9, calls=4)


# Shapes.


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,x", "1,2,3,4,5", "1,0,3,4", "1,-2,3,4"])
def test_bad_shapes_are_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="B,Sq,Hq,KV"):
        parse_numbers("mla-decode", text)


def test_shape_items_name_their_numbers() -> None:
    shape = make_shape("decode", parse_numbers("decode", "3, 32,8,128,1000"), True, torch.half, 0)
    assert shape.label == "B=3 Hq=32 Hkv=8 D=128 KV=1000 causal"
    assert (shape.seqlen_q, shape.seqlen_k, shape.head_dim_v) == (1, 1000, 128)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse(preset: str, command: Command) -> None:
    texts = PRESETS[preset][command]
    shapes = make_shapes(command, texts, (True, False), torch.bfloat16, 64)
    assert len({shape.label for shape in shapes}) == 2 * len(texts)


def test_rates_count_as_the_recorded_anchors_do() -> None:
    """B=128 Sq=1 Hq=128 KV=4096 in 249.7 µs was recorded as 585 TFLOP/s and 2562 GB/s."""
    shape = make_shape("mla-decode", (128, 1, 128, 4096), True, torch.bfloat16, 64)
    assert tflops(shape, summary(249.7)) == pytest.approx(585, abs=0.5)
    assert gbps(shape, summary(249.7)) == pytest.approx(2562, abs=0.5)


def test_causal_prefill_counts_half_the_operations() -> None:
    assert 2 * prefill(causal=True).flops == prefill(causal=False).flops
    assert prefill(causal=False).flops == 2 * 4 * 32 * 32 * (64 + 64)
    assert prefill().bytes_moved == 4 * (32 * 4 * (64 + 64) + 32 * 2 * (64 + 64))


# Inputs.


def tokens_of(inputs: Inputs, cache: torch.Tensor) -> torch.Tensor:
    assert inputs.block_table is not None
    gathered = cache[inputs.block_table.long()]
    return gathered.flatten(1, 2)


def test_pages_are_a_permutation_and_values_are_the_leading_columns() -> None:
    inputs = make_inputs(mla(), CPU, seed=1)
    assert inputs.block_table is not None
    assert inputs.cache_seqlens is not None
    assert sorted(inputs.block_table.flatten().tolist()) == list(range(inputs.k.shape[0]))
    assert inputs.k.shape == (10, 64, 1, 576)
    assert inputs.cache_seqlens.tolist() == [300, 300]
    assert inputs.v.data_ptr() == inputs.k.data_ptr()
    assert inputs.nbytes == 4 * (inputs.q.numel() + inputs.k.numel())
    again = make_inputs(mla(), CPU, seed=1)
    assert torch.equal(inputs.k, again.k)


LONGER = make_shape("prefill", (2, 2, 1, 700, 64, 64), True, torch.float32, 0)


@pytest.mark.parametrize("shape", [mla(), LONGER], ids=["paged", "dense"])
def test_low_share_lowers_whole_blocks_of_scores(shape: Shape) -> None:
    inputs = make_inputs(shape, CPU, seed=0, low_share=0.6)
    keys = tokens_of(inputs, inputs.k) if shape.page_size else inputs.k
    scores = torch.einsum("bqd,bkd->bqk", inputs.q[:, :, 0], keys[:, :, 0])
    means = (scores / math.sqrt(shape.head_dim)).mean(dim=1)
    kinds = set()
    for row in means:
        for block in row[: shape.seqlen_k].split(LOW_BLOCK):
            low = block.mean() < -10
            kinds.add(bool(low))
            assert bool(((block < -10) == low).all())
    assert kinds == {True, False}


def test_small_inputs_rotate_and_large_ones_do_not() -> None:
    cache = 50 << 20
    assert input_sets(prefill(), cache) == 32
    large = make_shape("prefill", (1, 16, 16, 16384, 128, 128), True, torch.bfloat16, 0)
    assert input_sets(large, cache) == 1
    middle = make_shape("prefill", (1, 16, 16, 2048, 128, 128), True, torch.bfloat16, 0)
    assert input_sets(middle, cache) * middle.bytes_moved >= 4 * cache


# Statistics and timing.


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_percentile_is_the_usual_one(share: float, count: int) -> None:
    samples = np.random.default_rng(count).uniform(1, 9, count).tolist()
    assert percentile(samples, share) == pytest.approx(float(np.quantile(samples, share)))


def test_summary_is_per_call() -> None:
    result = summarise([40.0, 20.0, 30.0], calls=10)
    assert result.median_us == 3.0
    assert result.p10_us == pytest.approx(2.2)
    assert result.p90_us == pytest.approx(3.8)
    assert result.spread == pytest.approx(1.6 / 3.0)
    assert (result.samples, result.calls) == (3, 10)


@pytest.mark.parametrize(
    ("call_us", "sets", "calls"), [(10.0, 1, 200), (10.0, 3, 201), (1e4, 7, 7), (0.1, 1, 512)]
)
def test_calls_fill_a_sample_in_whole_turns(call_us: float, sets: int, calls: int) -> None:
    assert calls_per_sample(Settings(), call_us, sets) == calls


def test_rounds_stay_within_their_bounds() -> None:
    settings = Settings(seconds=0.3, min_rounds=15, max_rounds=200)
    assert rounds_for(settings, [3000.0, 1000.0]) == 150
    assert rounds_for(settings, [1e9]) == 15
    assert rounds_for(settings, [1.0]) == 200


def test_contestants_are_interleaved_and_a_failing_one_is_reported() -> None:
    order: list[str] = []

    def broken() -> None:
        raise RuntimeError("no kernel for this\nand a long explanation")

    contestants = [
        Contestant("a", (lambda: order.append("a0"), lambda: order.append("a1"))),
        Contestant("broken", (broken,)),
        Contestant("b", (lambda: order.append("b"),)),
    ]
    results = measure(contestants, CPU, FAST)
    assert list(results) == ["a", "broken", "b"]
    assert results["broken"] == Failure("RuntimeError: no kernel for this")
    assert isinstance(results["a"], Summary)
    assert (results["a"].samples, results["a"].calls) == (3, 2)
    # After one warm-up of every callable and one trial call of each contestant.
    assert order[5:] == ["a0", "a1", "b", "b", "a0", "a1", "a0", "a1", "b"]


def test_describe_has_a_line_for_an_empty_message() -> None:
    assert describe(KeyError()) == "KeyError: no message"


# Peers.


def test_peer_names_are_unique_and_the_defaults_exist() -> None:
    assert [peer.name for peer in choose_peers(all_peers())] == list(all_peers())
    for names in DEFAULT_PEERS.values():
        choose_peers(names)
    with pytest.raises(ValueError, match=r"'nonsense'; allowed: sdpa, cudnn, fa4, flashmla"):
        choose_peers(["sdpa", "nonsense"])


@pytest.mark.parametrize("name", ["cudnn", "fa4", "flashmla", "flashmla_planned", "flashinfer"])
def test_a_peer_that_cannot_run_here_says_why(name: str) -> None:
    assert "needs a CUDA device" in (all_peers()[name].available(CPU) or "")


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_mla", None)
    reason = all_peers()["flashmla"].available(torch.device("cuda"))
    assert reason is not None
    assert "flash_mla" in reason


def test_peers_refuse_shapes_outside_their_range() -> None:
    peers = all_peers()
    assert "paged" in (peers["sdpa"].supports(mla()) or "")
    wide = make_shape("prefill", (1, 2, 2, 32, 192, 128), True, torch.bfloat16, 0)
    assert "D = Dv" in (peers["sdpa"].supports(wide) or "")
    assert peers["cudnn"].supports(wide) is None
    assert "page size 64" in (peers["flashmla"].supports(mla(page_size=16)) or "")
    assert peers["flashmla"].supports(mla()) is None


@pytest.mark.parametrize("causal", [True, False])
def test_ours_and_sdpa_are_given_the_same_problem(causal: bool) -> None:
    shape = prefill(causal, torch.bfloat16)
    inputs = make_inputs(shape, CPU, seed=3)
    ours = CuteFmha("reference").prepare(shape, inputs)()
    theirs = all_peers()["sdpa"].prepare(shape, inputs)()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=2e-2, rtol=2e-2)


# Reports.


def report_of(results: dict[str, Summary | Failure], shape: Shape | None = None) -> Report:
    report = Report("prefill", CPU, Settings(), ("prefill",), absent={"fa4": "not importable"})
    report.rows.append(Row(shape or prefill(), results))
    return report


def test_table_has_ratios_and_reasons() -> None:
    row = Row(prefill(), {"cute_fmha": summary(50), "fa4": summary(60), "sdpa": Failure("no")})
    lines = table_rows([row]).splitlines()
    assert lines[0] == "B=1 Hq=4 Hkv=2 S=32 D=64 Dv=64 causal"
    assert lines[1].split() == ["median", "µs", "p10–p90", "TFLOP/s", "GB/s", "time/ours"]
    assert lines[2].split()[:3] == ["cute_fmha", "50.0", "45.0–60.0"]
    assert lines[3].split()[-1] == "1.20"
    assert lines[4].split() == ["sdpa", "–", "no"]
    assert len({len(line) for line in (lines[1], lines[3])}) == 1


def test_no_ratio_without_our_time() -> None:
    row = Row(prefill(), {"cute_fmha": Failure("no"), "fa4": summary(60)})
    assert row.ratio("fa4") is None
    assert len(table_rows([row]).splitlines()[3].split()) == 5  # name, time, spread, two rates


def test_json_layout() -> None:
    report = report_of({"cute_fmha": summary(50), "fa4": summary(60), "sdpa": Failure("no")})
    record = json.loads(json.dumps(to_json(report)))
    assert record["schema"] == 1
    assert record["benchmark"] == "prefill"
    assert record["absent"] == {"fa4": "not importable"}
    assert {"device", "driver", "python", "torch", "triton"} <= record["machine"].keys()
    (result,) = record["results"]
    assert result["shape"]["dtype"] == "float32"
    assert result["flops"] == prefill().flops
    fa4 = result["implementations"]["fa4"]
    assert fa4["time_over_ours"] == pytest.approx(1.2)
    assert fa4["tflops"] == pytest.approx(prefill().flops / 60 / 1e6)
    assert result["implementations"]["sdpa"] == {"error": "no"}


def test_plot_is_written_unless_nothing_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "new" / "plot.png"
    report = report_of({"cute_fmha": summary(50), "fa4": Failure("no")})
    report.rows.append(Row(prefill(causal=False), {"cute_fmha": summary(70), "fa4": summary(60)}))
    assert write_plot(report, target) is None
    assert target.read_bytes().startswith(b"\x89PNG")
    assert write_plot(report_of({"fa4": Failure("no")}), target) == "nothing was measured"


# The command line.


@pytest.mark.parametrize(
    ("command", "shape"),
    [("prefill", "1,2,1,16,64,64"), ("decode", "2,2,1,64,40"), ("mla-decode", "2,2,4,70")],
)
def test_the_command_runs_without_a_gpu(
    command: str, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = [command, "--device", "cpu", "--shapes", shape, "--seconds", "1e-6"]
    arguments += ["--skip", "0.1", "--peers", "sdpa,fa4", "--out", str(tmp_path), "--name", "x"]
    assert cli.main([*arguments, "--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "There is no CUDA device" in printed
    assert "absent: fa4: needs a CUDA device" in printed
    assert "cute_fmha λ=0.1" in printed
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["argv"][0] == command
    assert record["settings"]["mode"] == "plain"
    assert len(record["results"]) == (2 if command == "prefill" else 1)
    for result in record["results"]:
        for name in ("cute_fmha", "cute_fmha λ=0.1"):
            assert result["implementations"][name]["median_us"] > 0
        assert ("error" in result["implementations"]["sdpa"]) == (command == "mla-decode")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prefill", "--peers", "nonsense"],
        ["prefill", "--shapes", "1,2,3"],
        ["prefill", "--causal", "--full"],
        ["prefill", "--low-share", "1.5"],
        ["prefill", "--seconds", "0"],
        ["mla-decode", "--page-size", "0"],
        ["nothing"],
    ],
)
def test_bad_arguments_exit_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--device", "cpu"])
    assert exit_.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_named_cuda_device_does_not_fall_back() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        cli.choose_device("cuda")


# Counting.


def test_tally_sorts_calls_by_kind() -> None:
    api = ["cudaLaunchKernel", "cudaStreamSynchronize", "cuMemAlloc_v2", "cudaEventQuery"]
    counts = profile.tally(api, ["kernel_a", "Memset (Device)"], allocator_calls=2)
    assert counts.launches == 2
    assert counts.kernel_names == ("kernel_a", "Memset (Device)")
    assert (counts.synchronisations, counts.allocations) == (1, 3)
    assert not counts.ideal
    assert profile.tally(["cuLaunchKernelEx"], ["k"], 0).ideal


def test_profile_cases_are_named_and_checked() -> None:
    assert profile.choose_cases("mla-h128-b1")[0].shape.heads_q == 128
    assert profile.choose_cases(None) == profile.CASES
    with pytest.raises(ValueError, match=r"got nonsense; allowed: prefill-d128-causal"):
        profile.choose_cases("nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_profile_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
