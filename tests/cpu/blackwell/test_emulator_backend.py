"""The public calls on the Blackwell kernels, by `backend="emulator"`: results and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_fmha import SkipStats, attention, dispatch, epilogues
from cute_fmha.emulator import Policy, backend, emulated_calls, emulating
from cute_fmha.emulator.build import BuildError
from cute_fmha.kernels.blackwell import build
from cute_fmha.problem import SkipSoftmax
from cute_fmha.testing import (
    Heads,
    Options,
    Source,
    Tiles,
    check,
    dense_case,
    packed_case,
    skip_friendly,
)

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

BF16, FP16 = torch.bfloat16, torch.float16
GQA = Heads(4, 2, 128, 128)
TILES = Tiles(128, 128, False)


@pytest.fixture
def fresh():
    """Dispatch asks its backends again, before and after."""
    caches = (dispatch.can_implement, dispatch.select)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("heads", "options", "dtype"),
    [
        (GQA, Options(), BF16),
        (GQA, Options(causal=True), FP16),
        (GQA, Options(window=(100, 30)), BF16),
        (GQA, Options(sink=True, softcap=20.0, scale=0.2), FP16),
        (Heads(2, 2, 64, 64), Options(causal=True), BF16),
        (Heads(2, 1, 192, 128), Options(causal=True), BF16),
    ],
    ids=["full", "causal", "window", "sink-softcap", "64", "192"],
)
def test_conformance(heads, options, dtype):
    case = dense_case(2, 150, 290, heads, options, Source(dtype, std=0.5))
    with emulated_calls(Policy("random", seed=5, strict_tmem_load=True)) as reports:
        out, lse = case.run(backend="emulator")
    check(case, out, lse)
    (report,) = reports
    assert len(report.launches) == 1
    assert report.launches[0].kernel.startswith("fmha_prefill")


def test_the_stream_is_the_callers():
    """PyTorch's current stream reaches the launch through TVM-FFI, without being an argument."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    case = dense_case(1, 70, 90, GQA, source=Source(BF16))
    with (
        emulated_calls() as reports,
        tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), 0x1234),
    ):
        case.run(backend="emulator")
    assert [launch.stream for launch in reports[0].launches] == [0x1234]


def test_without_lse_into_the_callers_tensor():
    case = dense_case(1, 140, 200, GQA, source=Source(BF16))
    out = torch.full(case.q.shape, math.nan, dtype=BF16)
    returned = attention(case.q, case.k, case.v, out=out, backend="emulator")
    assert returned is out
    check(case, out, None)


def test_skip_counters_accumulate():
    source, skip = skip_friendly(Source(FP16, gap_block=128))
    case = dense_case(1, 300, 900, GQA, source=source)
    expected = case.oracle(TILES, skip)
    assert 0 < expected.skipped < expected.total
    stats = SkipStats("cpu")
    for calls in (1, 2):
        out, lse = case.run(skip=skip, stats=stats, backend="emulator")
        check(case, out, lse, TILES, skip)
        assert stats.read() == (calls * expected.skipped, calls * expected.total)


def test_threshold_on_the_device():
    """λ as a tensor, changed between two calls of one kernel; relative to the KV length."""
    source, skip = skip_friendly(Source(FP16, gap_block=128))
    case = dense_case(1, 130, 600, GQA, source=source)
    device = torch.zeros(1)
    for value in (0.0, skip.value * 600):
        given = SkipSoftmax(threshold_scale_factor=value)
        stats = SkipStats("cpu")
        device.fill_(value)
        out, lse = case.run(
            skip=SkipSoftmax(threshold_scale_factor=device), stats=stats, backend="emulator"
        )
        check(case, out, lse, TILES, given)
        expected = case.oracle(TILES, given)
        assert stats.read() == (expected.skipped, expected.total)


def test_output_dtype_is_the_epilogues():
    case = dense_case(1, 130, 200, GQA, source=Source(BF16))
    out, lse = case.run(backend="emulator", epilogue=epilogues.Identity(torch.float32))
    assert out.dtype == torch.float32
    check(case, out, lse)


def test_work_is_taken_over():
    """One CTA works through all tiles."""
    case = dense_case(2, 300, 200, GQA, Options(causal=True), Source(FP16))
    with emulated_calls(Policy("lazy", resident=1)) as reports:
        out, lse = case.run(backend="emulator")
    check(case, out, lse)
    assert reports[0].launches[0].grid[0] > 4


def test_packed_sequences():
    case = packed_case((130, 0, 7, 50), (40, 3, 300, 0), GQA, Options(causal=True), Source(BF16))
    with emulated_calls(Policy("random", seed=3, strict_tmem_load=True)) as reports:
        out, lse = case.run(backend="emulator")
    check(case, out, lse)
    assert len(reports[0].launches) == 1


def test_inside_emulating_calls_belong_to_the_program():
    case = dense_case(1, 130, 140, GQA, source=Source(BF16))
    with emulating(policy=Policy("lazy")) as reports:
        out, lse = case.run(backend="emulator")
    check(case, out, lse)
    assert len(reports) == 1


def test_the_environment_names_a_policy(monkeypatch):
    policies = []
    monkeypatch.setattr(backend.cap, "execute", lambda captured, policy: policies.append(policy))
    case = dense_case(1, 130, 140, GQA, source=Source(BF16))
    for text in ("", "lazy", "random:7"):
        monkeypatch.setenv(backend.POLICY_VARIABLE, text)
        case.run(backend="emulator")
    assert [(policy.mode, policy.seed) for policy in policies] == [
        ("eager", 0), ("lazy", 0), ("random", 7),
    ]  # fmt: skip
    for text in ("fast", "eager:1", "random:x"):
        monkeypatch.setenv(backend.POLICY_VARIABLE, text)
        with pytest.raises(ValueError, match=f"got '{text}'; allowed: eager, lazy, random"):
            case.run(backend="emulator")


def test_what_it_cannot_run_says_why():
    options = Options(blocks=(64, 64, 0.5))
    case = dense_case(1, 30, 40, Heads(2, 1, 512, 512), options, Source(BF16))
    pattern = (
        r"backend='emulator' cannot run this attention: the prefill kernel .*512.*; "
        "the decode kernel takes no block mask"
    )
    with pytest.raises(NotImplementedError, match=pattern):
        case.run(backend="emulator")


def test_unaligned_rows_are_refused_before_the_launch():
    case = dense_case(1, 70, 90, GQA, source=Source(BF16))
    wide = torch.zeros(1, 90, 2, 132, dtype=BF16)
    wide[..., :128] = case.k
    shifted = torch.zeros(case.q.numel() + 1, dtype=BF16)[1:].view(case.q.shape)
    moved = {"k": replace(case, k=wide[..., :128]), "q": replace(case, q=shifted)}
    for name, unaligned in moved.items():
        with (
            emulated_calls() as reports,
            pytest.raises(NotImplementedError, match=f"rows on 16 bytes; got {name} at 0x"),
        ):
            unaligned.run(backend="emulator")
        assert reports == []


def test_a_missing_compiler_or_dsl_is_a_reason(monkeypatch, fresh):
    case = dense_case(1, 70, 90, GQA, source=Source(BF16))

    def no_compiler():
        raise BuildError("the emulator needs a C compiler and found none")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "compiler", no_compiler)
        with pytest.raises(NotImplementedError, match="needs a C compiler and found none"):
            case.run(backend="emulator")
    dispatch.can_implement.cache_clear()
    monkeypatch.setattr(build, "missing", lambda: "nvidia-cutlass-dsl is not installed")
    with pytest.raises(NotImplementedError, match="nvidia-cutlass-dsl is not installed"):
        case.run(backend="emulator")


def test_no_dsl_is_needed_to_ask():
    """Dispatch on a machine without CuTe DSL imports the backends and hears a reason."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['cutlass'] = sys.modules['tvm_ffi'] = None\n"
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name == 'nvidia-cutlass-dsl': raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "import torch\n"
        "from cute_fmha import attention\n"
        "x = torch.zeros(1, 9, 1, 64, dtype=torch.bfloat16)\n"
        "try: attention(x, x, x, backend='emulator')\n"
        "except NotImplementedError as error: print(error)\n"
        "print(attention(x, x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nvidia-cutlass-dsl is not installed (pip install 'cute-fmha[cu13]')" in done.stdout
    assert "torch.Size([1, 9, 1, 64])" in done.stdout
