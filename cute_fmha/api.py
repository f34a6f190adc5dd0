"""`attention` and `mla_decode`: validate on the host, allocate what was not given, call the op."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from cute_fmha import dispatch, ops, repeat
from cute_fmha.checks import (
    check_qkv,
    check_query,
    check_tensor,
    refuse_gradients,
    require,
    require_value,
    resolve_max_seqlen,
    resolve_scale,
    resolve_softcap,
    resolve_splits,
    resolve_window,
)
from cute_fmha.dispatch import BACKENDS
from cute_fmha.epilogues.base import EpilogueOp
from cute_fmha.epilogues.cast import IDENTITY
from cute_fmha.problem import MLA_HEAD_DIMS, BlockMask, SkipSoftmax
from cute_fmha.stats import SkipStats

DEFAULT_WORKSPACE_BYTES = 128 << 20


class _Ambient(threading.local):
    """This thread's `skip_softmax` policy.

    A ContextVar would follow asyncio tasks too, but Dynamo refuses to trace one (PyTorch 2.13). The
    value is set in ``__init__`` because Dynamo does not guard on a class attribute that an instance
    attribute hides later.
    """

    def __init__(self) -> None:
        self.skip: SkipSoftmax | None = None


_ambient = _Ambient()


@contextlib.contextmanager
def skip_softmax(policy: SkipSoftmax | None) -> Iterator[None]:
    """Calls inside use ``policy`` where they pass ``skip=None``; the previous one returns on exit.

    ``skip_softmax(None)`` switches skipping off inside an outer context.
    """
    previous = _ambient.skip
    _ambient.skip = policy
    try:
        yield
    finally:
        _ambient.skip = previous


def make_workspace(
    device: torch.device | str = "cuda", nbytes: int = DEFAULT_WORKSPACE_BYTES
) -> torch.Tensor:
    """Scratch memory for split-KV: zeroed uint8 ``[nbytes]``, reusable by any later call.

    Calls that share a workspace must be ordered (same stream, or synchronised): it holds the
    partial results and the semaphores, which every launch leaves at zero. Do not write to it.
    """
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _resolve_skip(
    skip: SkipSoftmax | None, like: torch.Tensor
) -> tuple[bool, torch.Tensor | None, float, bool]:
    """(enabled, device λ or factor, host λ or factor, relative to the KV length?)."""
    if skip is None:
        skip = _ambient.skip
    if skip is None:
        return False, None, 0.0, False
    require(
        isinstance(skip, SkipSoftmax),
        "skip",
        type(skip).__name__,
        "a cute_fmha.SkipSoftmax or None",
    )
    value = skip.value
    if isinstance(value, torch.Tensor):
        require(value.device == like.device, "skip tensor device", value.device, like.device)
        return True, value, 0.0, skip.relative
    return skip.enabled, None, float(value), skip.relative


def _repeat_key(
    tensors: tuple[Any, ...], options: tuple[Any, ...], skip: Any, stats: Any, epilogue: Any,
    block_mask: Any = None,
) -> tuple[repeat.Key | None, tuple[Any, ...]]:  # fmt: skip
    """(the call's key, (device λ, counters, mask)), see `repeat`; wrong types are left to the
    checks."""
    if skip is None:
        skip = _ambient.skip
    types = ((skip, SkipSoftmax), (stats, SkipStats), (block_mask, BlockMask))
    for value, expected in types:
        if value is not None and type(value) is not expected:
            return None, ()
    given = None if skip is None else skip.value
    device = given if isinstance(given, torch.Tensor) else None
    mask = None if block_mask is None else block_mask.mask
    special = (device, None if stats is None else stats.counters, mask)
    options = (
        *options,
        None if device is not None else given,
        skip is not None and skip.relative,
        None if block_mask is None else (block_mask.block_m, block_mask.block_n),
    )
    if epilogue is not None:
        if not isinstance(epilogue, EpilogueOp):
            return None, ()
        special_tensors = (*special, *epilogue.tensors)
        return repeat.key_of((*tensors, *special_tensors), (*options, type(epilogue))), special
    return repeat.key_of((*tensors, *special), options), special


def _resolve_common(
    q: torch.Tensor,
    sink: torch.Tensor | None,
    stats: SkipStats | None,
    workspace: torch.Tensor | None,
    backend: str,
) -> torch.Tensor | None:
    """Checks that both calls share; returns the counters of ``stats``."""
    check_tensor("sink", sink, q, torch.float32, (q.shape[-2],), "[Hq]")
    require_value(backend in BACKENDS, "backend", backend, ", ".join(BACKENDS))
    check_tensor(
        "workspace", workspace, q, torch.uint8, (None,), "1-dimensional, from make_workspace()"
    )
    if stats is None:
        return None
    require(isinstance(stats, SkipStats), "stats", type(stats).__name__, "a cute_fmha.SkipStats")
    check_tensor("stats counters", stats.counters, q, torch.int64, (2,), "[2] on the device of q")
    return stats.counters


def _resolve_epilogue(
    epilogue: EpilogueOp | None, q: torch.Tensor, head_dim_v: int
) -> tuple[EpilogueOp, tuple[torch.Tensor, ...]]:
    """The op, its tensors checked."""
    op = IDENTITY if epilogue is None else epilogue
    require(
        isinstance(op, EpilogueOp),
        "epilogue",
        type(op).__name__,
        "an instance of EpilogueOp, or None",
    )
    tensors = op.tensors
    for tensor in tensors:
        require(tensor.device == q.device, "epilogue tensor device", tensor.device, q.device)
        refuse_gradients(epilogue=tensor)
    op.validate(q, head_dim_v)
    return op, tensors


def _outputs(
    q: torch.Tensor,
    out: Any,
    op: EpilogueOp,
    head_dim_v: int,
    per_row_shape: tuple[int, ...],
    **per_row: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """(out, second output of the op, the FP32 results per row that are wanted, by name): those
    given, checked, and new ones for the others."""
    shape = (*q.shape[:-1], op.out_columns(head_dim_v))
    out_dtype = op.out_dtype(q.dtype)
    tokens = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[1]
    spec = op.extra(tokens, q.shape[-2], head_dim_v)
    names = [name for name, wanted in per_row.items() if wanted]
    extra: torch.Tensor | None = None
    # With two outputs `out` alone is a pair of tensors already.
    if isinstance(out, tuple) and (spec is None or (out and isinstance(out[0], tuple))):
        require(
            len(names) > 0 and len(out) == 1 + len(names), "out", f"a tuple of {len(out)}",
            "as the call returns it: (out, lse) together with return_lse",
        )  # fmt: skip
        out, *given = out
        results = dict(zip(names, given, strict=True))
        for index, (name, tensor) in enumerate(results.items(), start=1):
            place = f"out[{index}] ({name})"
            check_tensor(place, tensor, q, torch.float32, per_row_shape, name, False)
            require(tensor.is_contiguous(), f"{place} strides", tensor.stride(), "contiguous")
    else:
        results = {name: q.new_empty(per_row_shape, dtype=torch.float32) for name in names}
    if spec is not None:
        if out is None:
            allocate = q.new_zeros if spec.zeroed else q.new_empty
            extra = allocate(spec.shape, dtype=spec.dtype)
        else:
            pair = isinstance(out, tuple) and len(out) == 2
            require(pair, "out", type(out).__name__, "a pair, as epilogue {} returns", op.key)
            out, extra = out
            meaning = "the epilogue's second output"
            check_tensor("out (second)", extra, q, spec.dtype, spec.shape, meaning, False)
            require(extra.is_contiguous(), "out (second) strides", extra.stride(), "contiguous")
    if out is None:
        out = q.new_empty(shape, dtype=out_dtype)
    else:
        check_tensor("out", out, q, out_dtype, shape, "[..., Hq, columns]")
    return out, extra, results


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    block_mask: BlockMask | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    skip: SkipSoftmax | None = None,
    stats: SkipStats | None = None,
    epilogue: EpilogueOp | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    out: torch.Tensor | tuple[Any, torch.Tensor] | None = None,
    workspace: torch.Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """Exact or skip-softmax attention, ``softmax(mask(cap(scale · q kᵀ))) v``, in one launch.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q``; bf16, fp16 (or
            fp32 where a backend takes it). The last dimension is contiguous, here and below.
        k, v: ``[B, Sk, Hkv, D]``, ``[B, Sk, Hkv, Dv]``; packed ``[total_k, Hkv, D or Dv]`` with
            ``cu_seqlens_k``; or paged ``[pages, page_size, Hkv, D or Dv]`` with ``block_table``
            and ``seqused_k``. (D, Dv): 64, 96, 128, 256, 512 alike, or (192, 128). Hq is a
            multiple of Hkv.
        scale: multiplies q·k; None is 1/√D.
        causal: query i sees keys up to ``i + Sk − Sq`` (bottom-right aligned).
        window: ``(left, right)`` keys on each side of that diagonal, −1 unbounded; with
            ``causal`` the right side is 0.
        sink: FP32 ``[Hq]`` logits that join the softmax denominator only.
        softcap: c > 0 replaces a score s by ``c · tanh(s / c)``.
        block_mask: a `BlockMask`.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]`` prefix sums on the device.
        max_seqlen_q, max_seqlen_k: host upper bounds of the packed lengths.
        block_table: int32 ``[B, max_pages]``; entries past a sequence's length are never read.
        seqused_k: int32 ``[B]`` keys in use per sequence (required with ``block_table``).
        skip: a `SkipSoftmax`; None takes the policy of the enclosing `skip_softmax` context.
        stats: a `SkipStats` whose counters are increased on the device.
        epilogue: an op of `cute_fmha.epilogues` or your own: `Identity`, `Scale`, `FP8`, `NVFP4`,
            `Gate`; None stores in the dtype of q. With `NVFP4` ``out`` is an `NVFP4Output`
            (packed, scales), see `cute_fmha.epilogues.nvfp4`.
        return_lse: also return the natural-log log-sum-exp (sink included).
        num_splits: KV splits of the decode kernels; None chooses, a fixed number gives
            batch-invariant, run-to-run identical results.
        out: where the result goes, as it is returned: ``out``, or ``(out, lse)`` with
            ``return_lse``; the padding of NVFP4's scales must be zero.
        workspace: from `make_workspace`; None uses one that the library keeps per stream.
        backend: ``auto``, ``blackwell``, ``triton``, ``reference`` or ``emulator``; a named one
            never falls back.

    Returns:
        ``out`` ``[..., Hq, Dv]`` shaped like q (or what the epilogue makes of it), or
        ``(out, lse)`` with FP32 ``lse`` ``[B, Hq, Sq]`` (packed q: ``[Hq, total_q]``). A row with
        nothing to attend to gives 0 and −inf (an LSE with a sink is the sink).

    Raises:
        ValueError: an argument is out of range; the message names it and what is allowed.
        NotImplementedError: the backend cannot run this problem, or gradients were asked for.
    """
    refuse_gradients(q=q, k=k, v=v, sink=sink)
    key, special = _repeat_key(
        (q, k, v, out, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k, sink, workspace),
        (scale, causal, window, softcap, max_seqlen_q, max_seqlen_k, return_lse, num_splits,
         backend),
        skip, stats, epilogue, block_mask,
    )  # fmt: skip
    known = repeat.find(key)
    if known is not None:
        skip_tensor, counters, mask = special
        result, rows = repeat.outputs(known, q, out, int(return_lse))
        repeat.run(
            known, q, k, v, result, rows[0] if rows else None, None, workspace, counters, None,
            cu_seqlens_q, cu_seqlens_k, block_table, seqused_k, sink=sink, block_mask=mask,
            skip_tensor=skip_tensor, backend=backend,
        )  # fmt: skip
        return (result, *rows) if rows else result
    packed_q, packed_k, paged = (
        cu_seqlens_q is not None, cu_seqlens_k is not None, block_table is not None
    )  # fmt: skip
    require(
        packed_q == packed_k or (packed_q and paged),
        "cu_seqlens_q, cu_seqlens_k", "only one of them",
        "both (packed q, k and v), none, or cu_seqlens_q with block_table",
    )  # fmt: skip
    require(
        not (packed_k and paged), "block_table", "given with cu_seqlens_k", "paged or packed keys"
    )
    check_qkv(q, k, v, packed_q, "paged" if paged else "packed" if packed_k else "dense")
    counters = _resolve_common(q, sink, stats, workspace, backend)
    batch = q.shape[0]
    if cu_seqlens_q is not None:
        check_tensor("cu_seqlens_q", cu_seqlens_q, q, torch.int32, (None,), "[B + 1]")
        batch = cu_seqlens_q.shape[0] - 1
        require(batch >= 0, "cu_seqlens_q shape", (0,), "[B + 1]")
    check_tensor("cu_seqlens_k", cu_seqlens_k, q, torch.int32, (batch + 1,), "[B + 1]")
    check_tensor("block_table", block_table, q, torch.int32, (batch, None), "[B, max_pages]")
    check_tensor("seqused_k", seqused_k, q, torch.int32, (batch,), "[B]")
    if block_table is not None:
        require(seqused_k is not None, "seqused_k", None, "int32 [{}] with block_table", batch)
        max_k = block_table.shape[1] * k.shape[1]
    else:
        require(packed_k or k.shape[0] == batch, "k batch", k.shape[0], "that of q, {}", batch)
        max_k = resolve_max_seqlen("max_seqlen_k", max_seqlen_k, packed_k, k.shape[1])
    max_q = resolve_max_seqlen("max_seqlen_q", max_seqlen_q, packed_q, q.shape[1])
    mask, mask_m, mask_n = None, 0, 0
    if block_mask is not None:
        require(
            isinstance(block_mask, BlockMask), "block_mask", type(block_mask).__name__,
            "a cute_fmha.BlockMask or None",
        )  # fmt: skip
        mask, mask_m, mask_n = block_mask.mask, block_mask.block_m, block_mask.block_n
        blocks = (-(-max_q // mask_m), -(-max_k // mask_n))
        meaning = "[1 or B, 1 or Hq, blocks of Sq, blocks of Sk]"
        check_tensor("block_mask", mask, q, torch.bool, (None, None, *blocks), meaning)
        require(
            mask.shape[0] in (1, batch) and mask.shape[1] in (1, q.shape[-2]),
            "block_mask shape", tuple(mask.shape), "[1 or {}, 1 or {}, {}, {}]", batch,
            q.shape[-2], *blocks,
        )  # fmt: skip
    left, right = resolve_window(window, causal)
    skip_on, skip_tensor, skip_value, skip_relative = _resolve_skip(skip, q)
    lse_shape = (q.shape[1], q.shape[0]) if packed_q else (batch, q.shape[2], q.shape[1])
    op, tensors = _resolve_epilogue(epilogue, q, v.shape[-1])
    result, extra, per_row = _outputs(q, out, op, v.shape[-1], lse_shape, lse=return_lse)
    lse = per_row.get("lse")
    arguments = (
        q, k, v, result, lse, workspace, counters, extra, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
        block_table, seqused_k, mask, mask_m, mask_n, sink, skip_tensor,
        resolve_scale(scale, q.shape[-1]), left, right, resolve_softcap(softcap), skip_on,
        skip_value, skip_relative, resolve_splits(num_splits), op.key, tensors, op.values,
    )  # fmt: skip
    if key is None:
        torch.ops.cute_fmha.attention(*arguments, backend)
    else:
        _run(key, ops.attention_call(*arguments), epilogue, backend)
    result = op.result(result, extra)
    return result if lse is None else (result, lse)


def _run(key: repeat.Key, call: ops.Call, epilogue: EpilogueOp | None, backend: str) -> None:
    """Run a checked call; one like it need not be checked, if it has no op of its own."""
    dispatch.run(call, backend)
    if epilogue is None:
        repeat.remember(key, call)


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    head_dim_v: int = 512,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    skip: SkipSoftmax | None = None,
    stats: SkipStats | None = None,
    epilogue: EpilogueOp | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    num_splits: int | None = None,
    out: torch.Tensor | tuple[Any, ...] | None = None,
    workspace: torch.Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """Absorbed multi-head latent attention over a paged latent cache, in one launch.

    Every head shares one key row per token, the latent (512 values, then 64 of rope for 576); the
    value row is its first ``head_dim_v`` columns, so the cache is read once.

    Args:
        q: ``[B, Sq, Hq, 576]`` (or 512): the absorbed queries of the last Sq tokens.
        kv_cache: ``[pages, page_size, 1, 576]`` (or 512), the dtype of q.
        block_table: int32 ``[B, max_pages]``; entries past a sequence's length are never read.
        cache_seqlens: int32 ``[B]`` tokens in the cache, the Sq new ones included. Read on the
            device only: a CUDA graph follows changes.
        head_dim_v: width of the value, 512.
        scale: None is 1/√(q width); a DeepSeek model passes its own, 1/√192 times its YaRN factor.
        causal: order the Sq new tokens (bottom-right aligned).
        return_max_logits: also return every row's largest logit: the maximum over its keys of
            ``cap(scale · q k)``, sinks left out.
        window, sink, softcap, skip, stats, epilogue, return_lse, num_splits, out, workspace,
            backend: as for `attention`.

    Returns:
        ``out`` ``[B, Sq, Hq, head_dim_v]``, or a tuple of ``out`` and what was asked for of ``lse``
        and ``max_logits``, in this order, FP32 ``[B, Hq, Sq]``. Both are −inf where a row has
        nothing to attend to (an LSE with a sink is the sink).

    Raises:
        ValueError: an argument is out of range; the message names it and what is allowed.
        NotImplementedError: the backend cannot run this problem, or gradients were asked for.
    """
    refuse_gradients(q=q, kv_cache=kv_cache, sink=sink)
    key, special = _repeat_key(
        (q, kv_cache, out, block_table, cache_seqlens, sink, workspace),
        ("mla_decode", head_dim_v, scale, causal, window, softcap, return_lse, return_max_logits,
         num_splits, backend),
        skip, stats, epilogue,
    )  # fmt: skip
    known = repeat.find(key)
    if known is not None:
        skip_tensor, counters, _ = special
        result, rows = repeat.outputs(known, q, out, return_lse + return_max_logits)
        repeat.run(
            known, q, kv_cache, kv_cache[..., :head_dim_v], result,
            rows[0] if return_lse else None, rows[-1] if return_max_logits else None, workspace,
            counters, None, None, None, block_table, cache_seqlens, sink=sink, block_mask=None,
            skip_tensor=skip_tensor, backend=backend,
        )  # fmt: skip
        return (result, *rows) if rows else result
    check_query(q, (None,) * 4, "[B, Sq, Hq, 576 or 512]")
    width = q.shape[3]
    require(
        (width, head_dim_v) in MLA_HEAD_DIMS, "(q width, head_dim_v)", (width, head_dim_v),
        ", ".join(map(str, MLA_HEAD_DIMS)),
    )  # fmt: skip
    require(q.shape[2] > 0, "q heads", q.shape[2], "at least 1")
    meaning = "[pages, page_size, 1, width of q]"
    require(kv_cache is not None, "kv_cache", None, "a torch.Tensor {}", meaning)
    check_tensor("kv_cache", kv_cache, q, q.dtype, (None, None, 1, width), meaning)
    counters = _resolve_common(q, sink, stats, workspace, backend)
    batch = q.shape[0]
    require(block_table is not None, "block_table", None, "int32 [{}, max_pages]", batch)
    require(cache_seqlens is not None, "cache_seqlens", None, "int32 [{}]", batch)
    check_tensor("block_table", block_table, q, torch.int32, (batch, None), "[B, max_pages]")
    check_tensor("cache_seqlens", cache_seqlens, q, torch.int32, (batch,), "[B]")
    left, right = resolve_window(window, causal)
    skip_on, skip_tensor, skip_value, skip_relative = _resolve_skip(skip, q)
    op, tensors = _resolve_epilogue(epilogue, q, head_dim_v)
    result, extra, per_row = _outputs(
        q, out, op, head_dim_v, (batch, q.shape[2], q.shape[1]), lse=return_lse,
        max_logits=return_max_logits,
    )  # fmt: skip
    arguments = (
        q, kv_cache, result, per_row.get("lse"), per_row.get("max_logits"), workspace, counters,
        extra, block_table, cache_seqlens, head_dim_v, sink, skip_tensor,
        resolve_scale(scale, width), left, right, resolve_softcap(softcap), skip_on, skip_value,
        skip_relative, resolve_splits(num_splits), op.key, tensors, op.values,
    )  # fmt: skip
    if key is None:
        torch.ops.cute_fmha.mla_decode(*arguments, backend)
    else:
        _run(key, ops.mla_decode_call(*arguments), epilogue, backend)
    result = op.result(result, extra)
    return (result, *per_row.values()) if per_row else result
