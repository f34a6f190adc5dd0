"""Implementations to compare: ours, and one small class per peer library.

A peer that is not installed is named with the reason; a peer that cannot run a shape likewise.
Nothing of a peer is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cute_fmha import SkipSoftmax, __version__, attention, make_workspace, mla_decode
from cute_fmha.bench.measure import Thunk, describe
from cute_fmha.bench.problems import Inputs, Shape

OURS = "cute_fmha"


class Implementation(Protocol):
    """What the benchmark asks of ours and of every peer."""

    @property
    def name(self) -> str: ...

    def available(self, device: torch.device) -> str | None:
        """Why it cannot run here at all; None when it can."""

    def supports(self, shape: Shape) -> str | None:
        """Why it cannot run ``shape``; None when it may (it can still refuse when called)."""

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        """A callable that runs one whole call on ``inputs``."""

    def version(self) -> str | None:
        """Version of the library behind it; None when it has none."""


def _import(module: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything at import
        return f"not importable ({describe(error)})"


def _missing(module: str) -> str | None:
    found = _import(module)
    return found if isinstance(found, str) else None


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a CUDA device; this is {device.type}"


@dataclass(frozen=True)
class CuteFmha:
    """This package, with ``out=`` and ``workspace=`` given as a serving engine would."""

    backend: str = "auto"
    skip: float | None = None

    @property
    def name(self) -> str:
        return OURS if self.skip is None else f"{OURS} λ={self.skip:g}"

    def available(self, device: torch.device) -> str | None:
        return None

    def supports(self, shape: Shape) -> str | None:
        return None

    def version(self) -> str | None:
        return __version__

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        q, k, v = inputs.q, inputs.k, inputs.v
        out = q.new_empty(*q.shape[:-1], shape.head_dim_v)
        options: dict[str, Any] = {
            "causal": shape.causal,
            "skip": None if self.skip is None else SkipSoftmax(self.skip),
            "backend": self.backend,
            "out": out,
            "workspace": _workspace(q.device),
        }
        if shape.command == "mla-decode":
            table, lengths = inputs.block_table, inputs.cache_seqlens
            assert table is not None
            assert lengths is not None
            return lambda: mla_decode(q, k, table, lengths, **options)
        if shape.page_size:
            options |= {"block_table": inputs.block_table, "seqused_k": inputs.cache_seqlens}
        return lambda: attention(q, k, v, **options)


_workspaces: dict[torch.device, torch.Tensor] = {}


def _workspace(device: torch.device) -> torch.Tensor:
    if device not in _workspaces:
        _workspaces[device] = make_workspace(device)
    return _workspaces[device]


@dataclass(frozen=True)
class TorchSdpa:
    """``torch.nn.functional.scaled_dot_product_attention`` with one backend."""

    name: str
    backend: SDPBackend

    def available(self, device: torch.device) -> str | None:
        if self.backend is SDPBackend.CUDNN_ATTENTION:
            return _needs_cuda(device)
        return None

    def supports(self, shape: Shape) -> str | None:
        if shape.command == "mla-decode" or shape.page_size:
            return "torch SDPA has no paged keys"
        if shape.causal and shape.seqlen_q not in (1, shape.seqlen_k):
            return "torch SDPA's is_causal is aligned top-left"
        if self.backend is SDPBackend.FLASH_ATTENTION and shape.head_dim != shape.head_dim_v:
            return "torch's flash backend needs D = Dv"
        return None

    def version(self) -> str | None:
        if self.backend is SDPBackend.CUDNN_ATTENTION:
            return str(torch.backends.cudnn.version())
        return torch.__version__

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
        causal = shape.causal and shape.seqlen_q > 1
        grouped = shape.heads_q != shape.heads_kv

        def call() -> torch.Tensor:
            with sdpa_kernel(self.backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=grouped
                )

        return call


@dataclass(frozen=True)
class FlashAttention4:
    """FlashAttention's CuTe DSL kernels (``flash_attn.cute``, distribution ``flash-attn-4``)."""

    name: str = "fa4"

    def available(self, device: torch.device) -> str | None:
        return _needs_cuda(device) or _missing("flash_attn.cute")

    def supports(self, shape: Shape) -> str | None:
        if shape.command == "mla-decode":
            return "its absorbed MLA is for compute capability 10 only"
        if shape.head_dim > 256:
            return "takes head dims up to 256"
        return None

    def version(self) -> str | None:
        return _version("flash-attn-4")

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        module: Any = importlib.import_module("flash_attn.cute")
        q, k, v = inputs.q, inputs.k, inputs.v
        if not shape.page_size:
            return lambda: module.flash_attn_func(q, k, v, causal=shape.causal)
        table, lengths = inputs.block_table, inputs.cache_seqlens
        return lambda: module.flash_attn_varlen_func(
            q, k, v, page_table=table, seqused_k=lengths, causal=shape.causal
        )


@dataclass(frozen=True)
class FlashMla:
    """FlashMLA's dense decode. ``planned`` leaves the schedule out of the timed call: an engine
    can reuse one schedule for all layers of a step."""

    planned: bool = False

    @property
    def name(self) -> str:
        return "flashmla_planned" if self.planned else "flashmla"

    def available(self, device: torch.device) -> str | None:
        return _needs_cuda(device) or _missing("flash_mla")

    def supports(self, shape: Shape) -> str | None:
        if shape.command != "mla-decode":
            return "MLA decode only"
        return None if shape.page_size == 64 else "page size 64 only"

    def version(self) -> str | None:
        module = _import("flash_mla")
        return None if isinstance(module, str) else getattr(module, "__version__", None)

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        module: Any = importlib.import_module("flash_mla")
        heads = shape.seqlen_q * shape.heads_q
        plan = partial(module.get_mla_metadata, inputs.cache_seqlens, heads, 1)
        kept = plan() if self.planned else None

        def call() -> object:
            # A fresh plan makes the call run its schedule kernel too.
            return module.flash_mla_with_kvcache(
                inputs.q, inputs.k, inputs.block_table, inputs.cache_seqlens, shape.head_dim_v,
                *(kept or plan()), causal=shape.causal,
            )  # fmt: skip

        return call


@dataclass(frozen=True)
class FlashInfer:
    """FlashInfer's batch wrappers; ``plan`` runs once, outside the timed call."""

    name: str = "flashinfer"

    def available(self, device: torch.device) -> str | None:
        return _needs_cuda(device) or _missing("flashinfer")

    def supports(self, shape: Shape) -> str | None:
        if shape.command == "decode" and not shape.page_size:
            return "its batch decode takes paged keys (--page-size)"
        return None

    def version(self) -> str | None:
        return _version("flashinfer-python", "flashinfer")

    def prepare(self, shape: Shape, inputs: Inputs) -> Thunk:
        module: Any = importlib.import_module("flashinfer")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=inputs.q.device)
        if shape.command == "prefill":
            return self._prefill(module, workspace, shape, inputs)
        if shape.command == "decode":
            return self._decode(module, workspace, shape, inputs)
        return self._mla(module, workspace, shape, inputs)

    def _prefill(self, module: Any, workspace: torch.Tensor, shape: Shape, inputs: Inputs) -> Thunk:
        q, k, v = (t.flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v))
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            _prefix_sums(shape.batch, shape.seqlen_q, q),
            _prefix_sums(shape.batch, shape.seqlen_k, q),
            shape.heads_q, shape.heads_kv, shape.head_dim, head_dim_vo=shape.head_dim_v,
            causal=shape.causal, q_data_type=shape.dtype, kv_data_type=shape.dtype,
        )  # fmt: skip
        return lambda: wrapper.run(q, k, v)

    def _decode(self, module: Any, workspace: torch.Tensor, shape: Shape, inputs: Inputs) -> Thunk:
        indptr, indices, last = _page_lists(shape, inputs)
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=shape.heads_q // shape.heads_kv >= 4
        )
        wrapper.plan(
            indptr, indices, last, shape.heads_q, shape.heads_kv, shape.head_dim, shape.page_size,
            q_data_type=shape.dtype, kv_data_type=shape.dtype,
        )  # fmt: skip
        q = inputs.q.flatten(0, 1)
        return lambda: wrapper.run(q, (inputs.k, inputs.v))

    def _mla(self, module: Any, workspace: torch.Tensor, shape: Shape, inputs: Inputs) -> Thunk:
        indptr, indices, _ = _page_lists(shape, inputs)
        q, latent = inputs.q.flatten(0, 1), inputs.k.squeeze(2)
        width = shape.head_dim_v
        wrapper = module.mla.BatchMLAPagedAttentionWrapper(workspace)
        wrapper.plan(
            _prefix_sums(shape.batch, shape.seqlen_q, q), indptr, indices, inputs.cache_seqlens,
            shape.heads_q, width, shape.head_dim - width, shape.page_size, shape.causal,
            shape.head_dim**-0.5, shape.dtype, shape.dtype,
        )  # fmt: skip
        parts = (q[..., :width], q[..., width:], latent[..., :width], latent[..., width:])
        return lambda: wrapper.run(*parts)


def _prefix_sums(batch: int, length: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=like.device) * length


def _page_lists(shape: Shape, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page prefix sums, page numbers, tokens in each sequence's last page."""
    assert inputs.block_table is not None
    table = inputs.block_table
    last = torch.full_like(table[:, 0], (shape.seqlen_k - 1) % shape.page_size + 1)
    return _prefix_sums(shape.batch, table.shape[1], table), table.flatten(), last


def all_peers() -> dict[str, Implementation]:
    """Every peer by the name that ``--peers`` takes."""
    peers: tuple[Implementation, ...] = (
        TorchSdpa("sdpa", SDPBackend.FLASH_ATTENTION),
        TorchSdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
        FlashAttention4(),
        FlashMla(),
        FlashMla(planned=True),
        FlashInfer(),
    )
    return {peer.name: peer for peer in peers}


DEFAULT_PEERS = {
    "prefill": ("fa4", "cudnn", "sdpa", "flashinfer"),
    "decode": ("fa4", "cudnn", "sdpa", "flashinfer"),
    "mla-decode": ("flashmla", "flashmla_planned", "flashinfer"),
}


def choose_peers(names: Iterable[str]) -> list[Implementation]:
    """The peers of these names, in this order.

    Raises:
        ValueError: a name that is no peer; the message lists those that are.
    """
    known = all_peers()
    chosen = []
    for name in names:
        if name not in known:
            raise ValueError(f"--peers: got {name!r}; allowed: {', '.join(known)}")
        chosen.append(known[name])
    return chosen
