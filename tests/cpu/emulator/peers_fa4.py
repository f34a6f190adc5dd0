"""FlashAttention-4's sm_100 kernels on the emulator (helper of tests, not collected).

The PyPI package flash-attn-4 contains kernels that nobody in this project wrote. Its Python
interface is used as it is; three things are replaced while it runs: `cute.compile` (the kernel is
compiled by the emulator instead), the conversion of tensors (CPU tensors play device memory), and
what it asks about the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from cute_fmha.emulator import capture as cap

available = all(importlib.util.find_spec(name) is not None for name in ("cutlass", "flash_attn"))


Run = Callable[..., Any]
_current: list[Run] = []  # who gets the kernels; the interface caches what it compiled


@dataclasses.dataclass
class Launcher:
    """Stands for a compiled kernel: compiles at the first call, and then runs on the emulator."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compiled: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.compiled is None:
            self.compiled = cap.compile_kernel(*self.args, **self.kwargs)
        _current[-1](self.compiled, *args, **kwargs)


def _to_cute_tensor(
    t: torch.Tensor | None,
    assumed_align: int = 16,
    leading_dim: int = -1,
    fully_dynamic: bool = False,
    enable_tvm_ffi: bool = True,
) -> Any:
    if t is None:
        return None
    tensor = cap.device_tensor(t, assumed_align, enable_tvm_ffi=enable_tvm_ffi)
    if fully_dynamic:
        return tensor.mark_layout_dynamic()
    return tensor.mark_layout_dynamic(leading_dim=t.ndim - 1 if leading_dim == -1 else leading_dim)


@contextlib.contextmanager
def interface(run: Run, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """FlashAttention-4's interface module, whose kernels are given to `run(compiled, *args)`."""
    settings = {"FLASH_ATTENTION_ARCH": "sm_100", "FLASH_ATTENTION_NUM_SMS": "148"}
    with (
        mock.patch.dict(os.environ, {**settings, **(environment or {})}),
        warnings.catch_warnings(),
        cap.emulated_device(),
    ):
        warnings.simplefilter("ignore")
        import flash_attn.cute.interface as module

        class Compiler:
            """`cutlass.cute` with another compile()."""

            def __getattr__(self, name: str) -> Any:
                return getattr(original, name)

            def compile(self, *args: Any, **kwargs: Any) -> Launcher:
                return Launcher(args, kwargs)

        original = module.cute
        with (
            mock.patch.object(module, "cute", Compiler()),
            mock.patch.object(module, "to_cute_tensor", _to_cute_tensor),
            mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        ):
            _current.append(run)
            try:
                yield module
            finally:
                _current.pop()


# ------------------------------------------------------------------------------------ cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the interface; lengths as lists make a variable-length batch."""

    name: str
    d: int = 128
    dv: int | None = None
    heads: int = 2
    kv_heads: int = 2
    q: int | tuple[int, ...] = 512
    k: int | tuple[int, ...] = 512
    batch: int = 1
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    mla: bool = False
    page: int | None = None
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16
    environment: tuple[tuple[str, str], ...] = ()
    known: tuple[tuple[str, str], ...] = ()  # findings: kind, and part of the text


# What the machine finds in these kernels, rightly by the letter of the ISA: threads arrive twice at
# the cluster barrier before they wait. With Policy(strict_cp_async=True) also: cp.async writes
# shared memory (generic proxy) that the tensor core reads (async proxy) with an mbarrier, but no
# proxy fence, in between.
_TWICE = ("barrier", "arrives at the cluster barrier again before it waited")
_ONE_CTA = (("FLASH_ATTENTION_MLA_1CTA", "1"),)
CASES = {
    case.name: case
    for case in (
        Case("d128"),
        Case("d128_causal", causal=True),
        Case("d64", d=64),
        Case("d64_causal", d=64, causal=True),
        Case("d192_128", d=192, dv=128),
        Case("d192_128_causal", d=192, dv=128, causal=True),
        Case("gqa", heads=8, kv_heads=2, q=256, causal=True, dtype=torch.float16),
        Case("window", window=(100, 0)),
        Case("ragged", q=200, k=333, causal=True, batch=2, heads=2, kv_heads=1),
        Case("varlen", q=(130, 1, 257), k=(200, 77, 257), causal=True),
        Case("short", q=128, k=512),
        Case("split", q=128, k=1024, splits=2),
        Case("d256", d=256, q=256, k=256),
        Case("mla_2cta", mla=True, heads=128, kv_heads=1, q=2, k=300, known=(_TWICE,)),
        Case(
            "mla_2cta_causal",
            mla=True,
            heads=128,
            kv_heads=1,
            q=3,
            k=300,
            causal=True,
            known=(_TWICE,),
        ),
        Case(
            "mla_2cta_paged128",
            mla=True,
            heads=128,
            kv_heads=1,
            q=2,
            k=(300, 129),
            page=128,
            known=(_TWICE,),
        ),
        Case(
            "mla_2cta_paged64",
            mla=True,
            heads=128,
            kv_heads=1,
            q=1,
            k=(300, 129),
            page=64,
            known=(_TWICE,),
        ),
        Case("mla_1cta", mla=True, heads=64, kv_heads=1, q=1, k=300, environment=_ONE_CTA),
        Case(
            "mla_1cta_h128",
            mla=True,
            heads=128,
            kv_heads=1,
            q=2,
            k=300,
            environment=_ONE_CTA,
        ),
        Case(
            "mla_1cta_paged64",
            mla=True,
            heads=64,
            kv_heads=1,
            q=1,
            k=(300, 129),
            page=64,
            environment=_ONE_CTA,
        ),
    )
}


@dataclasses.dataclass
class Outcome:
    case: Case
    out: torch.Tensor  # of all sequences, one after the other: [tokens, heads, dv]
    lse: torch.Tensor  # [tokens, heads]
    expected: torch.Tensor
    expected_lse: torch.Tensor

    @property
    def error(self) -> float:
        return float((self.out.double() - self.expected).abs().max())

    @property
    def lse_error(self) -> float:
        return float((self.lse.double() - self.expected_lse).abs().max())

    @property
    def cosine(self) -> float:
        x, y = self.out.double().flatten(), self.expected.flatten()
        return float(x @ y / (x.norm() * y.norm()))


def attention64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence in float64: q [tokens, heads, d], k and v [keys, kv_heads, ...]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    row = torch.arange(len(q))[:, None] + len(k) - len(q)
    column = torch.arange(len(k))[None]
    left, right = case.window
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if case.causal:
        hidden |= column > row
    if left is not None:
        hidden |= column < row - left
    if right is not None:
        hidden |= column > row + right
    scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None].clamp(min=-1e300)).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T


def _tensors(case: Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    dv = case.dv or case.d
    lengths_q = case.q if isinstance(case.q, tuple) else (case.q,) * case.batch
    lengths_k = case.k if isinstance(case.k, tuple) else (case.k,) * case.batch
    if case.mla:
        lengths_q = lengths_q * (len(lengths_k) // len(lengths_q))
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    tensors: dict[str, Any] = {"lengths_q": lengths_q, "lengths_k": lengths_k}
    if case.mla:
        tensors["qv"] = normal(total_q, case.heads, 512)
        d, dv = 64, 512
    else:
        d = case.d
    tensors["q"] = normal(total_q, case.heads, d)
    tensors["k"] = normal(total_k, case.kv_heads, d)
    tensors["v"] = normal(total_k, case.kv_heads, dv)
    return tensors


def _paged(x: torch.Tensor, lengths: tuple[int, ...], page: int, table: torch.Tensor) -> Any:
    pool = torch.zeros(int(table.max()) + 2, page, *x.shape[1:], dtype=x.dtype)
    for i, part in enumerate(x.split(list(lengths))):
        for j, piece in enumerate(part.split(page)):
            pool[table[i, j], : len(piece)] = piece
    return pool


def run_case(case: Case, run: Run, seed: int = 0) -> Outcome:
    """Call the interface for `case`; `run(compiled, *args)` executes each kernel function."""
    t = _tensors(case, seed)
    lengths_q, lengths_k = t["lengths_q"], t["lengths_k"]
    batch = len(lengths_q)
    options: dict[str, Any] = {"causal": case.causal, "return_lse": True}
    if case.window != (None, None):
        options["window_size"] = case.window
    q, k, v, qv = t["q"], t["k"], t["v"], t.get("qv")
    with interface(run, dict(case.environment)) as module:
        if case.page is not None:
            pages = -(-max(lengths_k) // case.page)
            order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(seed))
            table = order.view(batch, pages).int()
            k, v = (_paged(x, lengths_k, case.page, table) for x in (k, v))
            q, qv = (None if x is None else x.view(batch, -1, *x.shape[1:]) for x in (q, qv))
            options["page_table"] = table
            options["seqused_k"] = torch.tensor(lengths_k, dtype=torch.int32)
            options["max_seqlen_k"] = pages * case.page
            call = module.flash_attn_varlen_func
        elif isinstance(case.q, tuple):
            for name, lengths in (("q", lengths_q), ("k", lengths_k)):
                starts = torch.tensor([0, *lengths]).cumsum(0).int()
                options[f"cu_seqlens_{name}"] = starts
                options[f"max_seqlen_{name}"] = max(lengths)
            call = module.flash_attn_varlen_func
        else:
            q, k, v, qv = (
                None if x is None else x.view(batch, -1, *x.shape[1:]) for x in (q, k, v, qv)
            )
            options["num_splits"] = case.splits
            call = module.flash_attn_func
        with torch.no_grad():
            out, lse = call(q, k, v, qv=qv, **options)[:2]
    if not case.mla:  # to [..., tokens, heads]; MLA has it so already
        lse = lse.transpose(-1, -2)
    dv = out.shape[-1]
    scale = (64 + 512 if case.mla else case.d) ** -0.5
    query = torch.cat([t["q"], t["qv"]], -1) if case.mla else t["q"]
    key = torch.cat([t["k"], t["v"]], -1) if case.mla else t["k"]
    parts = zip(
        query.split(list(lengths_q)),
        key.split(list(lengths_k)),
        t["v"].split(list(lengths_k)),
        strict=True,
    )
    expected = [attention64(*part, scale, case) for part in parts]
    return Outcome(
        case,
        out.reshape(-1, case.heads, dv),
        lse.reshape(-1, case.heads),
        torch.cat([x for x, _ in expected]),
        torch.cat([x for _, x in expected]),
    )
