"""The demo passes, says what it should, and fails when something in it is broken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from cute_fmha import demo
from cute_fmha.adapters import hf

SMALL = ["--device", "cpu", "--backend", "reference", "--prefill", "160", "--decode", "16"]


def _altered(function: Callable[..., Any], **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function`` with some keyword arguments changed."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs | {n: f(kwargs[n]) for n, f in changes.items()})

    return wrapper


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_passes(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*SMALL, "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    assert "backend: prefill reference, decode reference, mla_decode reference" in text
    assert "decode step: 3 op calls, 1 per layer" in text
    assert "mla_decode (3 sequences of 160, 123, 65 tokens" in text
    assert text.endswith("passed\n")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_scale_fails(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hf, "attention", _altered(hf.attention, scale=lambda x: 192**-0.5))
    assert demo.main([*SMALL, "--dtype", dtype]) == 1
    assert "FAILED: prefill logits, decode logits" in capsys.readouterr().out


def test_missing_causality_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hf, "attention", _altered(hf.attention, causal=lambda x: False))
    assert demo.main(SMALL) == 1
    assert "FAILED: prefill logits" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_latent_scale_fails(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """YaRN's factor belongs to the scale: leaving it out must not pass."""
    monkeypatch.setattr(demo, "mla_decode", _altered(demo.mla_decode, scale=lambda x: 192**-0.5))
    assert demo.main([*SMALL, "--dtype", dtype]) == 1
    assert capsys.readouterr().out.endswith("FAILED: mla_decode\n")


def test_unavailable_backend_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*SMALL, "--backend", "blackwell"]) == 2
    assert "backend='blackwell' cannot run this attention" in capsys.readouterr().out


def test_bundled_text_is_long_enough() -> None:
    text = demo.bundled_text()
    assert text.shape[1] >= 12_000
    assert bytes(text[0, :13].tolist()) == b"Lewis Carroll"
    assert int(text.max()) < 128
    assert text.dtype == torch.int64
