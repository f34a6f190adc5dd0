"""Counters accumulate on the device; the logger turns their growth into steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cute_fmha import SkipStats
from cute_fmha.stats import SkipStatsLogger
from cute_fmha.testing import Heads, Options, Source, dense_case


def steps_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["steps"]


def count(stats: SkipStats, skipped: int, total: int) -> None:
    stats.counters += torch.tensor([skipped, total])


def test_counters_accumulate_reset_and_can_be_a_view():
    table = torch.zeros(3, 2, dtype=torch.int64)
    stats = SkipStats(counters=table[1])
    count(stats, 2, 5)
    count(stats, 1, 1)
    assert stats.read() == (3, 6)
    assert table.tolist() == [[0, 0], [3, 6], [0, 0]]
    stats.reset()
    assert table.sum() == 0
    assert SkipStats("cpu").read() == (0, 0)


@pytest.mark.parametrize(
    "counters", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).long()]
)
def test_wrong_counters_are_refused(counters):
    with pytest.raises(ValueError, match=r"SkipStats counters must be int64 \[2\]; got torch\."):
        SkipStats(counters=counters)


def test_steps_are_differences(tmp_path):
    path = tmp_path / "skips.json"
    with SkipStatsLogger(path, 2, "cpu") as logger:
        assert logger.layer(1) is logger.layer(1)
        count(logger.layer(0), 1, 10)
        count(logger.layer(1), 4, 8)
        logger.end_step(prefill_sequences=2, prefill_tokens=300)
        count(logger.layer(0), 2, 3)
        count(logger.layer(0), 0, 4)
        logger.flush()
        assert len(steps_of(path)) == 1, "a step that has not ended is not written"
        logger.end_step(decode_tokens=7)
        logger.end_step(decode_tokens=1)
        count(logger.layer(1), 9, 9)
    assert json.loads(path.read_text()) == {
        "num_layers": 2,
        "steps": [
            {
                "step": 0, "prefill_sequences": 2, "prefill_tokens": 300, "decode_tokens": 0,
                "layers": {"0": {"skipped": 1, "total": 10}, "1": {"skipped": 4, "total": 8}},
            },
            {
                "step": 1, "prefill_sequences": 0, "prefill_tokens": 0, "decode_tokens": 7,
                "layers": {"0": {"skipped": 2, "total": 7}, "1": {"skipped": 0, "total": 0}},
            },
            {
                "step": 2, "prefill_sequences": 0, "prefill_tokens": 0, "decode_tokens": 1,
                "layers": {"0": {"skipped": 0, "total": 0}, "1": {"skipped": 0, "total": 0}},
            },
        ],
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_layers_share_one_tensor_that_attention_counts_into(tmp_path):
    case = dense_case(1, 200, 300, Heads(2, 1, 64, 64), Options(), Source(torch.float32))
    with SkipStatsLogger(tmp_path / "skips.json", 3, "cpu") as logger:
        storage = {logger.layer(i).counters.untyped_storage().data_ptr() for i in range(3)}
        assert len(storage) == 1
        for layer in (0, 2, 2):
            case.run(backend="reference", stats=logger.layer(layer))
        logger.end_step(prefill_tokens=200)
    (step,) = steps_of(logger.path)
    assert [step["layers"][str(i)]["total"] for i in range(3)] == [12, 0, 24]


def test_ending_a_step_reads_nothing(tmp_path):
    """On the meta device every read of a value raises: only a flush may read."""
    logger = SkipStatsLogger(tmp_path / "skips.json", 2, "meta")
    try:
        logger.end_step(decode_tokens=1)
        with pytest.raises(NotImplementedError):
            logger.flush()
    finally:
        logger._pending.clear()
        logger.close()


def test_closing_twice_writes_once_and_ends_the_log(tmp_path):
    path = tmp_path / "skips.json"
    logger = SkipStatsLogger(path, 1, "cpu")
    logger.end_step()
    logger.close()
    path.unlink()
    logger.close()
    assert not path.exists()
    with pytest.raises(RuntimeError, match=r"SkipStatsLogger of .*skips\.json is closed"):
        logger.end_step()


def test_an_error_inside_the_context_still_writes(tmp_path):
    path = tmp_path / "skips.json"

    def fail_after_a_step() -> None:
        with SkipStatsLogger(path, 1, "cpu") as logger:
            logger.end_step(decode_tokens=1)
            raise KeyError("model")

    with pytest.raises(KeyError, match="model"):
        fail_after_a_step()
    assert len(steps_of(path)) == 1


def test_a_failed_write_can_be_repeated(tmp_path):
    logger = SkipStatsLogger(tmp_path / "absent" / "skips.json", 1, "cpu")
    logger.end_step(decode_tokens=3)
    with pytest.raises(FileNotFoundError):
        logger.close()
    logger.path.parent.mkdir()
    logger.close()
    assert [step["decode_tokens"] for step in steps_of(logger.path)] == [3]


def test_exit_of_the_interpreter_writes(tmp_path):
    path = tmp_path / "skips.json"
    program = (
        "import sys; from cute_fmha.stats import SkipStatsLogger\n"
        "log = SkipStatsLogger(sys.argv[1], 1, 'cpu')\n"
        "log.layer(0).counters[1] = 5\n"
        "log.end_step(decode_tokens=2)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    (step,) = steps_of(path)
    assert (step["decode_tokens"], step["layers"]["0"]["total"]) == (2, 5)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_layers must be >= 1; got 0"):
        SkipStatsLogger(tmp_path / "skips.json", 0, "cpu")
    with SkipStatsLogger(tmp_path / "skips.json", 2, "cpu") as logger:
        for index in (-1, 2):
            with pytest.raises(IndexError, match=f"layer: got {index}; allowed: 0 to 1"):
                logger.layer(index)
