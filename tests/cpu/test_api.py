"""What the calls refuse, and what the refusals say; contexts; backends that never fall back."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cute_fmha
from cute_fmha import BlockMask, SkipSoftmax, SkipStats, api, dispatch, skip_softmax
from cute_fmha.epilogues import FP8, Identity
from cute_fmha.problem import Problem, Target, target_of
from cute_fmha.testing import (
    Heads,
    Options,
    Source,
    Tiles,
    check,
    dense_case,
    skip_friendly,
)

BF16 = torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor of ``shape`` whose last dimension is not contiguous."""
    return tensor(*shape, 2, dtype=dtype)[..., 0]


def dense() -> dict[str, Any]:
    k = tensor(2, 8, 2, 64)
    return {"q": tensor(2, 4, 4, 64), "k": k, "v": k.clone(), "backend": "reference"}


def packed() -> dict[str, Any]:
    k = tensor(9, 2, 64)
    return {
        "q": tensor(5, 4, 64), "k": k, "v": k.clone(), "backend": "reference",
        "cu_seqlens_q": int32(0, 2, 5), "cu_seqlens_k": int32(0, 4, 9), "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }  # fmt: skip


def paged() -> dict[str, Any]:
    k = tensor(6, 16, 2, 64)
    return {
        "q": tensor(2, 4, 4, 64), "k": k, "v": k.clone(), "backend": "reference",
        "block_table": int32(0, 1, 2, 3).view(2, 2), "seqused_k": int32(20, 4),
    }  # fmt: skip


def latent() -> dict[str, Any]:
    return {
        "q": tensor(2, 1, 3, 576), "kv_cache": tensor(6, 16, 1, 576), "backend": "reference",
        "block_table": int32(0, 1, 2, 3).view(2, 2), "cache_seqlens": int32(20, 4),
    }  # fmt: skip


def call(arguments: dict[str, Any]) -> Any:
    return (cute_fmha.mla_decode if "kv_cache" in arguments else cute_fmha.attention)(**arguments)


@pytest.mark.parametrize("base", [dense, packed, paged, latent])
def test_base_arguments_are_accepted(base):
    """Else every refusal below could be for another reason."""
    assert call(base()).isfinite().all()
    out, lse = call(base() | {"return_lse": True})
    assert out.shape[:-1] == base()["q"].shape[:-1]
    assert lse.dtype == torch.float32


@dataclass(frozen=True)
class Refusal:
    """Arguments over a base, and what the message must say: who, what it was, what is allowed."""

    base: Any
    change: dict[str, Any]
    who: str
    got: str
    allowed: str


D, P, G, M = dense, packed, paged, latent
MASK = torch.ones(2, 4, 1, 1, dtype=torch.bool)
REFUSALS = [
    # dtypes
    Refusal(D, {"q": tensor(2, 4, 4, 64, dtype=torch.float64)}, "q dtype", "float64", "bfloat16"),
    Refusal(D, {"k": tensor(2, 8, 2, 64, dtype=torch.half)}, "k dtype", "float16", "bfloat16"),
    Refusal(D, {"v": tensor(2, 8, 2, 64, dtype=torch.half)}, "v dtype", "float16", "bfloat16"),
    Refusal(D, {"sink": tensor(4)}, "sink dtype", "bfloat16", "float32"),
    Refusal(D, {"seqused_k": torch.tensor([1, 2])}, "seqused_k dtype", "int64", "int32"),
    Refusal(P, {"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q dtype", "int64", "int32"),
    Refusal(P, {"cu_seqlens_k": torch.tensor([0, 4, 9])}, "cu_seqlens_k dtype", "int64", "int32"),
    Refusal(G, {"block_table": torch.zeros(2, 2)}, "block_table dtype", "float32", "int32"),
    Refusal(M, {"q": tensor(2, 1, 3, 576, dtype=torch.int8)}, "q dtype", "int8", "bfloat16"),
    Refusal(M, {"kv_cache": tensor(6, 16, 1, 576, dtype=torch.half)}, "kv_cache", "16", "bfloat16"),
    Refusal(M, {"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens dtype", "int64", "int32"),
    Refusal(D, {"workspace": tensor(9)}, "workspace dtype", "bfloat16", "uint8"),
    Refusal(D, {"out": tensor(2, 4, 4, 64, dtype=torch.half)}, "out dtype", "float16", "bfloat16"),
    Refusal(
        D, {"out": tensor(2, 4, 4, 64), "epilogue": Identity(torch.float32)},
        "out dtype", "bfloat16", "float32",
    ),
    # shapes
    Refusal(D, {"q": tensor(4, 4, 64)}, "q shape", "(4, 4, 64)", "[B, Sq, Hq, D]"),
    Refusal(P, {"q": tensor(1, 5, 4, 64)}, "q shape", "(1, 5, 4, 64)", "[total_q, Hq, D]"),
    Refusal(P, {"k": tensor(1, 9, 2, 64)}, "k shape", "(1, 9, 2, 64)", "[total_k, Hkv, D]"),
    Refusal(G, {"v": tensor(9, 2, 64)}, "v shape", "(9, 2, 64)", "[pages, page_size, Hkv, Dv]"),
    Refusal(D, {"k": tensor(3, 8, 2, 64), "v": tensor(3, 8, 2, 64)}, "k batch", "3", "of q, 2"),
    Refusal(D, {"v": tensor(2, 7, 2, 64)}, "v shape", "(2, 7, 2, 64)", "2, 8, 2, 64"),
    Refusal(D, {"v": tensor(2, 8, 4, 64)}, "v shape", "(2, 8, 4, 64)", "2, 8, 2, 64"),
    Refusal(D, {"q": tensor(2, 4, 5, 64)}, "heads", "(5, 2)", "multiple of Hkv"),
    Refusal(D, {"q": tensor(2, 4, 0, 64)}, "heads", "(0, 2)", "positive multiple"),
    Refusal(D, {"q": tensor(2, 4, 4, 80)}, "head dims (D, Dv)", "(80, 64)", "(192, 128)"),
    Refusal(D, {"v": tensor(2, 8, 2, 128)}, "head dims (D, Dv)", "(64, 128)", "(64, 96, 128"),
    Refusal(D, {"k": tensor(2, 8, 2, 96)}, "k head dim", "96", "that of q, 64"),
    Refusal(D, {"sink": torch.zeros(2)}, "sink shape", "(2,)", "[Hq] = [4]"),
    Refusal(D, {"seqused_k": int32(1, 2, 3)}, "seqused_k shape", "(3,)", "[B] = [2]"),
    Refusal(P, {"cu_seqlens_k": int32(0, 9)}, "cu_seqlens_k shape", "(2,)", "[B + 1] = [3]"),
    Refusal(G, {"block_table": int32(0, 1)}, "block_table shape", "(2,)", "[B, max_pages] = [2"),
    Refusal(D, {"out": tensor(2, 4, 4, 96)}, "out shape", "(2, 4, 4, 96)", "[2, 4, 4, 64]"),
    Refusal(
        D, {"out": (tensor(2, 4, 4, 64), torch.zeros(2, 4, 5)), "return_lse": True},
        "lse", "(2, 4, 5)", "[2, 4, 4]",
    ),
    Refusal(
        D, {"out": (tensor(2, 4, 4, 64), torch.zeros(2, 4, 4).transpose(1, 2)), "return_lse": True},
        "lse", "(16, 1, 4)", "contiguous",
    ),
    Refusal(D, {"out": (tensor(2, 4, 4, 64), torch.zeros(2, 4, 4))}, "out", "tuple", "return_lse"),
    Refusal(D, {"workspace": torch.zeros(2, 2, dtype=torch.uint8)}, "workspace", "(2, 2)", "1-dim"),
    Refusal(D, {"block_mask": BlockMask(MASK, 2, 8)}, "block_mask", "(2, 4, 1, 1)", "2, 1]"),
    Refusal(D, {"block_mask": BlockMask(MASK[:, :3], 4, 8)}, "block_mask", "(2, 3, 1, 1)", "or 4"),
    Refusal(M, {"q": tensor(2, 3, 576)}, "q shape", "(2, 3, 576)", "[B, Sq, Hq, 576 or 512]"),
    Refusal(M, {"q": tensor(2, 1, 0, 576)}, "q heads", "0", "at least 1"),
    Refusal(M, {"q": tensor(2, 1, 3, 512)}, "kv_cache shape", "(6, 16, 1, 576)", "1, 512]"),
    Refusal(M, {"kv_cache": tensor(6, 16, 2, 576)}, "kv_cache", "(6, 16, 2, 576)", "1, 576]"),
    Refusal(M, {"head_dim_v": 256}, "head_dim_v", "(576, 256)", "(576, 512), (512, 512)"),
    Refusal(M, {"cache_seqlens": int32(1)}, "cache_seqlens shape", "(1,)", "[B] = [2]"),
    Refusal(M, {"block_table": int32(1)}, "block_table shape", "(1,)", "= [2, any]"),
    # devices
    Refusal(D, {"k": tensor(2, 8, 2, 64, device="meta")}, "k device", "meta", "cpu"),
    Refusal(D, {"sink": torch.zeros(4, device="meta")}, "sink device", "meta", "cpu"),
    Refusal(M, {"block_table": int32(0, 1).view(2, 1).to("meta")}, "block_table", "meta", "cpu"),
    Refusal(D, {"stats": SkipStats("meta")}, "stats counters device", "meta", "cpu"),
    Refusal(
        D, {"skip": SkipSoftmax(torch.zeros(1, device="meta"))}, "skip tensor device", "meta", "cpu"
    ),
    # strides
    Refusal(D, {"q": strided(2, 4, 4, 64)}, "q strides", "2)", "contiguous last dimension"),
    Refusal(D, {"v": strided(2, 8, 2, 64)}, "v strides", "2)", "contiguous last dimension"),
    Refusal(D, {"out": strided(2, 4, 4, 64)}, "out strides", "2)", "contiguous last dimension"),
    Refusal(M, {"kv_cache": strided(6, 16, 1, 576)}, "kv_cache strides", "2)", "contiguous last"),
    # ranges
    Refusal(D, {"scale": 0.0}, "scale", "0.0", "finite number > 0"),
    Refusal(D, {"scale": math.nan}, "scale", "nan", "finite number > 0"),
    Refusal(D, {"scale": "1"}, "scale", "'1'", "finite number > 0"),
    Refusal(D, {"softcap": -1.0}, "softcap", "-1.0", "0 (off) or a finite number > 0"),
    Refusal(D, {"softcap": math.inf}, "softcap", "inf", "finite number > 0"),
    Refusal(D, {"window": (-2, 0)}, "window", "(-2, 0)", ">= -1"),
    Refusal(D, {"window": (1, 2, 3)}, "window", "(1, 2, 3)", "(left, right)"),
    Refusal(D, {"window": (1.5, 0)}, "window", "(1.5, 0)", "integers"),
    Refusal(D, {"window": 4}, "window", "4", "(left, right)"),
    Refusal(D, {"num_splits": 0}, "num_splits", "0", "[1, 256]"),
    Refusal(D, {"num_splits": 257}, "num_splits", "257", "[1, 256]"),
    Refusal(M, {"num_splits": 2.0}, "num_splits", "2.0", "[1, 256]"),
    Refusal(P, {"max_seqlen_q": None}, "max_seqlen_q", "None", "integer >= 0"),
    Refusal(P, {"max_seqlen_k": -1}, "max_seqlen_k", "-1", "integer >= 0"),
    Refusal(P, {"cu_seqlens_q": int32()}, "cu_seqlens_q shape", "(0,)", "[B + 1]"),
    Refusal(P, {"cu_seqlens_q": torch.tensor(3).int()}, "cu_seqlens_q shape", "()", "[B + 1]"),
    # kinds and combinations
    Refusal(D, {"q": [1.0]}, "q", "list", "torch.Tensor"),
    Refusal(D, {"k": None}, "k", "NoneType", "torch.Tensor"),
    Refusal(M, {"q": None}, "q", "NoneType", "torch.Tensor"),
    Refusal(M, {"kv_cache": 1}, "kv_cache", "int", "torch.Tensor"),
    Refusal(M, {"kv_cache": None}, "kv_cache", "None", "[pages, page_size, 1, width of q]"),
    Refusal(M, {"block_table": None}, "block_table", "None", "int32"),
    Refusal(M, {"cache_seqlens": None}, "cache_seqlens", "None", "int32"),
    Refusal(P, {"cu_seqlens_q": [0, 2, 5]}, "cu_seqlens_q", "list", "torch.Tensor"),
    Refusal(P, {"cu_seqlens_k": [0, 4, 9]}, "cu_seqlens_k", "list", "torch.Tensor"),
    Refusal(G, {"block_table": [[0, 1]]}, "block_table", "list", "torch.Tensor"),
    Refusal(D, {"sink": 0.5}, "sink", "float", "torch.Tensor"),
    Refusal(D, {"out": 1}, "out", "int", "torch.Tensor"),
    Refusal(D, {"block_mask": MASK}, "block_mask", "Tensor", "BlockMask"),
    Refusal(D, {"skip": 0.1}, "skip", "float", "SkipSoftmax"),
    Refusal(D, {"stats": [0, 0]}, "stats", "list", "SkipStats"),
    Refusal(D, {"epilogue": torch.float16}, "epilogue", "dtype", "EpilogueOp"),
    Refusal(D, {"epilogue": FP8}, "epilogue", "type", "an instance of EpilogueOp"),
    Refusal(D, {"backend": "cuda"}, "backend", "'cuda'", "auto, blackwell, triton"),
    Refusal(M, {"backend": None}, "backend", "None", "auto, blackwell, triton"),
    Refusal(P, {"cu_seqlens_k": None}, "cu_seqlens_q, cu_seqlens_k", "only one", "both"),
    Refusal(P, {"cu_seqlens_q": None}, "cu_seqlens_q, cu_seqlens_k", "only one", "both"),
    Refusal(G, {"seqused_k": None}, "seqused_k", "None", "int32 [2] with block_table"),
    Refusal(
        P, {"block_table": int32(0, 1).view(2, 1)}, "block_table", "with cu_seqlens_k", "packed"
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", REFUSALS, ids=lambda c: f"{c.base.__name__}-{'-'.join(c.change)}-{c.got}"
)
def test_refusals_name_the_argument_what_it_was_and_what_is_allowed(case):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the message is checked below)
        call(case.base() | case.change)
    who, separator, rest = str(raised.value).partition(": got ")
    assert separator, raised.value
    got, separator, allowed = rest.partition("; allowed: ")
    assert separator, raised.value
    assert case.who in who
    assert case.got in got
    assert case.allowed in allowed


BAD_RATES = [math.nan, math.inf, -math.inf, -0.1, -1, True, "0.1", 1 + 1j]


@pytest.mark.parametrize("value", [*BAD_RATES, 1.0000001, 2])
def test_threshold_range(value):
    with pytest.raises(
        ValueError, match=r"threshold must be a finite number in \[0, 1\]"
    ) as raised:
        SkipSoftmax(value)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("value", BAD_RATES)
def test_threshold_scale_factor_range(value):
    pattern = r"threshold_scale_factor must be a finite number in \[0, inf\)"
    with pytest.raises(ValueError, match=pattern) as raised:
        SkipSoftmax(threshold_scale_factor=value)
    assert repr(value) in str(raised.value)


def test_legal_policies():
    for off in (SkipSoftmax(), SkipSoftmax(None), SkipSoftmax(0), SkipSoftmax(0.0)):
        assert not off.enabled
    assert SkipSoftmax(1).enabled
    assert SkipSoftmax(1e-9).value == 1e-9
    assert SkipSoftmax(threshold_scale_factor=5000).relative
    # A device value is not read on the host, so any is accepted.
    assert SkipSoftmax(torch.tensor([math.nan])).enabled


def test_illegal_policies():
    with pytest.raises(ValueError, match=r"not both; got threshold=0\.1, threshold_scale_factor=2"):
        SkipSoftmax(0.1, 2)
    for bad in (torch.zeros(2), torch.zeros(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"one float32 element; got shape .*dtype"):
            SkipSoftmax(bad)


def test_illegal_block_masks():
    with pytest.raises(
        ValueError, match=r"4-dimensional bool tensor .* got torch.float32 \(2, 2\)"
    ):
        BlockMask(torch.ones(2, 2), 64, 64)
    with pytest.raises(ValueError, match=">= 1; got 0 x 64"):
        BlockMask(MASK, 0, 64)


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "sink", "kv_cache"])
def test_gradients_are_refused(name):
    arguments = (latent() if name == "kv_cache" else dense()) | {"sink": None}
    heads = arguments["q"].shape[2]
    arguments["sink"] = torch.zeros(heads)
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{name}\.requires_grad is True.*no_grad"):
        call(arguments)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert not call(arguments).requires_grad


# -- skip contexts --------------------------------------------------------------------------------


def decisions(**arguments: Any) -> int:
    """Tiles that a call with ``arguments`` skips, of 8 where λ is 1e-3."""
    source, _ = skip_friendly(Source(torch.float32, gap_block=128, seed=5))
    case = dense_case(1, 128, 1536, Heads(1, 1, 64, 64), Options(), source)
    stats = SkipStats("cpu")
    case.run(backend="reference", stats=stats, **arguments)
    return stats.read()[0]


def test_contexts_nest_and_restore():
    on, other = SkipSoftmax(1e-3), SkipSoftmax(1e-12)
    many = decisions(skip=on)
    assert many > 0
    assert decisions() == 0
    with skip_softmax(on):
        assert decisions() == many
        assert decisions(skip=other) == 0, "the argument wins over the context"
        assert decisions(skip=SkipSoftmax(0)) == 0
        with skip_softmax(other):
            assert decisions() == 0
            with skip_softmax(on):
                assert decisions() == many
            assert decisions() == 0
        assert decisions() == many
        with skip_softmax(None):
            assert decisions() == 0
        assert decisions() == many
    assert decisions() == 0


def test_contexts_restore_after_an_error():
    def fail(policy: SkipSoftmax) -> None:
        with skip_softmax(policy):
            raise KeyError("inside")

    outer = SkipSoftmax(1e-3)
    with skip_softmax(outer):
        with pytest.raises(KeyError, match="inside"):
            fail(SkipSoftmax(1e-12))
        assert api._ambient.skip is outer
    assert api._ambient.skip is None


def test_contexts_belong_to_their_thread():
    seen = []
    with skip_softmax(SkipSoftmax(0.5)):
        thread = threading.Thread(target=lambda: seen.append(api._ambient.skip))
        thread.start()
        thread.join()
    assert seen == [None]


# -- results --------------------------------------------------------------------------------------


def test_out_and_lse_are_written_in_place():
    case = dense_case(1, 3, 5, Heads(2, 1, 64, 64), Options(causal=True), Source(torch.half))
    out, lse = torch.empty(1, 3, 2, 64, dtype=torch.half), torch.empty(1, 2, 3)
    arguments = {**vars(case)["common"], "backend": "reference"}
    result = cute_fmha.attention(
        case.q, case.k, case.v, out=(out, lse), return_lse=True, **arguments
    )
    assert result[0] is out
    assert result[1] is lse
    check(case, out, lse)
    alone = torch.empty_like(out)
    assert cute_fmha.attention(case.q, case.k, case.v, out=alone, **arguments) is alone
    assert torch.equal(alone, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_identity_casts(dtype):
    case = dense_case(1, 3, 5, Heads(2, 1, 64, 64))
    out, lse = case.run(epilogue=Identity(dtype), backend="reference")
    assert out.dtype == dtype
    check(case, out, lse)


def test_causal_overrides_the_right_window():
    case = dense_case(1, 8, 8, Heads(1, 1, 64, 64))
    arguments: dict[str, Any] = {"q": case.q, "k": case.k, "v": case.v, "backend": "reference"}
    plain = cute_fmha.attention(**arguments, causal=True, window=(3, 5))
    assert torch.equal(plain, cute_fmha.attention(**arguments, window=(3, 0)))
    assert not torch.equal(plain, cute_fmha.attention(**arguments, window=(3, 5)))


@pytest.mark.parametrize("side", [1 << 30, (1 << 31) - 1, 1 << 40])
def test_windows_that_no_sequence_reaches(side, monkeypatch):
    """In the 32 bits of a kernel a position plus such a side would be negative: nothing is seen."""
    problems = []
    monkeypatch.setattr(dispatch, "run", lambda call, backend: problems.append(call.problem))
    for window in ((side, 3), (3, side), (side, side)):
        call(dense() | {"window": window})
        call(latent() | {"window": window, "causal": False})
    sides = [(problem.window_left, problem.window_right) for problem in problems]
    assert sides == [(-1, 3)] * 2 + [(3, -1)] * 2 + [(-1, -1)] * 2
    call(dense() | {"window": (side, side), "causal": True})
    assert (problems[-1].window_left, problems[-1].window_right) == (-1, 0)


def test_workspace():
    workspace = cute_fmha.make_workspace("cpu", 64)
    assert (workspace.dtype, workspace.shape, int(workspace.sum())) == (torch.uint8, (64,), 0)
    assert call(dense() | {"workspace": workspace}).isfinite().all()


# -- backends -------------------------------------------------------------------------------------

PROBLEM = Problem(
    "attention", "dense", False, BF16, BF16, 1, 1, 1, 1, 1, 64, 64, num_splits=77
)  # fmt: skip
CPU = target_of(torch.device("cpu"))
HOPPER = Target("cuda", 90, 132)


def test_a_backend_that_cannot_says_why():
    for base, name in ((dense, "attention"), (latent, "mla_decode")):
        pattern = f"backend='blackwell' cannot run this {name}: .* need compute capability 10.0"
        with pytest.raises(NotImplementedError, match=pattern) as raised:
            call(base() | {"backend": "blackwell"})
        assert ("MLA" in str(raised.value)) <= (name == "mla_decode"), "kernels of another op"


@dataclass
class FakeBackend:
    """A backend that records what it is asked; ``misfit``: it refuses the tensors of a call."""

    reason: str | None
    ran: int = 0
    misfit: str = ""

    def declines(self, problem: Problem, target: Target) -> str | None:
        return None

    def can_implement(self, problem: Problem, target: Target) -> str | None:
        return self.reason

    def run(self, call: object) -> None:
        if self.misfit:
            raise NotImplementedError(self.misfit)
        self.ran += 1


@pytest.fixture
def fakes(monkeypatch):
    """A Hopper, and every backend a fake: blackwell refuses, the others would run."""
    found = {name: FakeBackend(None) for name in dispatch.BACKENDS[1:]}
    found["blackwell"].reason = "needs sm_100"
    monkeypatch.setattr(dispatch, "_module", found.__getitem__)
    monkeypatch.setattr(dispatch, "ModuleType", FakeBackend)
    monkeypatch.setattr(dispatch, "target_of", lambda device: HOPPER)
    caches = (dispatch.can_implement, dispatch.select, dispatch._log_choice)
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def test_auto_takes_the_first_that_can(fakes, caplog):
    with caplog.at_level("INFO", logger="cute_fmha"):
        for _ in range(3):
            call(dense() | {"backend": "auto"})
            call(dense() | {"backend": "auto", "q": tensor(2, 3, 4, 64)})
    assert {name: fake.ran for name, fake in fakes.items()} == {
        "blackwell": 0, "triton": 6, "reference": 0, "emulator": 0
    }  # fmt: skip
    (record,) = caplog.records
    assert "backend triton; not blackwell: needs sm_100" in record.getMessage()


def test_a_named_backend_never_falls_back(fakes):
    with pytest.raises(NotImplementedError, match=r"backend='blackwell' .*: needs sm_100"):
        call(dense() | {"backend": "blackwell"})
    assert sum(fake.ran for fake in fakes.values()) == 0
    call(dense() | {"backend": "emulator"})
    assert fakes["emulator"].ran == 1


def test_refused_tensors_go_to_the_next_backend(fakes, caplog):
    """What a backend finds only when it runs, as with unaligned rows."""
    fakes["triton"].misfit = "rows are not aligned"
    with caplog.at_level("INFO", logger="cute_fmha"):
        call(dense() | {"backend": "auto"})
    assert (fakes["triton"].ran, fakes["reference"].ran) == (0, 1)
    assert "backend reference; not triton: rows are not aligned" in caplog.records[-1].getMessage()
    with pytest.raises(NotImplementedError, match=r"backend='triton' .*: rows are not aligned"):
        call(dense() | {"backend": "triton"})
    fakes["reference"].misfit = "nor here"
    with pytest.raises(NotImplementedError, match="nor here"):
        call(dense() | {"backend": "auto"})


def test_auto_passes_by_what_a_backend_declines(fakes):
    fakes["blackwell"].reason = None
    fakes["blackwell"].declines = lambda problem, _: "few" if problem.seqlen_q < 64 else None
    names = {1: "triton", 63: "triton", 64: "blackwell"}
    for seqlen_q, name in names.items():
        problem = replace(PROBLEM, seqlen_q=seqlen_q)
        assert dispatch.select(problem, HOPPER, "auto") is fakes[name]
        assert dispatch.select(problem, HOPPER, "blackwell") is fakes["blackwell"]


@pytest.mark.parametrize("index", [0, 1])
def test_runs_on_the_device_of_the_tensors(index, fakes, monkeypatch):
    """As PyTorch's own operators do, also where another device is the current one."""
    devices: list[int] = [0]
    seen: list[int] = []

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        devices.append(device.index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(fakes["triton"], "run", lambda call: seen.append(devices[-1]))
    fake_call: Any = SimpleNamespace(
        q=SimpleNamespace(device=torch.device("cuda", index)), problem=PROBLEM
    )
    dispatch.run(fake_call, "triton")
    assert (seen, devices) == ([index], [0])


def test_auto_never_takes_the_emulator(fakes):
    for name in ("triton", "reference"):
        fakes[name].reason = f"{name} is out"
    expected = "blackwell: needs sm_100; triton: triton is out; reference: reference is out"
    with pytest.raises(NotImplementedError, match=f"no backend can run this attention: {expected}"):
        dispatch.select(PROBLEM, HOPPER, "auto")
    assert fakes["emulator"].ran == 0


def test_auto_keeps_the_interpreter_out_of_the_way(fakes):
    """Without a GPU Triton only interprets, for tests that name it."""
    assert dispatch.select(PROBLEM, CPU, "auto") is fakes["reference"]
    assert dispatch.select(PROBLEM, CPU, "triton") is fakes["triton"]


def test_auto_runs_everywhere():
    case = dense_case(1, 5, 9, Heads(2, 1, 64, 64), Options(causal=True))
    check(case, *case.run(), Tiles(128, 128, False))
