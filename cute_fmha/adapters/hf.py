"""Hugging Face Transformers: ``attn_implementation="cute_fmha"`` after one call of `register`.

    import cute_fmha.adapters.hf as hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="cute_fmha")

Transformers calls two functions. `mask_plan` runs once per forward pass, sees how the batch is
padded or packed and how much of the cache is in use, and returns a *plan* where other backends
return a mask; `attention_forward` runs in every layer and follows it. A plan is a small
4-dimensional integer tensor, because Transformers hands 4-dimensional masks through untouched (to
other devices too) and the models treat them as opaque:

    plan      dtype  shape                        content
    None                                          every key is visible, up to causal and window
    lengths   int32  [B, 1, 1, 1]                 keys in use per sequence (static cache)
    packed    int32  [1, 1, longest, n + 1]       cu_seqlens of n packed sequences; the third
                                                  dimension is broadcast and only says how long
                                                  the longest is, so that no layer has to ask
    gather    int64  [B, 1, 1, 1 + Sk (+ 2 Sq)]   padded batch: valid keys, then the key order
                                                  (valid first), then the query order (valid
                                                  last) and its inverse where queries are padded

A gathered sequence has its valid keys at the front and its valid queries at the end, which is the
bottom-right alignment that `cute_fmha.attention` has with ``seqused_k``. The gather copies K and V
in every layer (as much traffic as the concatenation a `DynamicCache` makes per step); a batch
without padding pays nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from cute_fmha.api import attention

NAME = "cute_fmha"

_COMBINERS = ("and_masks", "remap_positions_for_packed_sequence")
_PATTERNS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
)

_REFUSED = {
    "output_attentions": "the attention weights are never stored",
    "position_bias": "no additive bias on the scores",
    "alibi": "no additive bias on the scores",
    "head_mask": "no mask on heads",
    "cache": "continuous batching brings its own paged cache; call cute_fmha.attention on it",
    "block_table": "continuous batching brings its own paged cache; call cute_fmha.attention on it",
    "k_cache": "continuous batching brings its own paged cache; call cute_fmha.attention on it",
    "indices": "no sparse attention by index",
    "topk_indices": "no sparse attention by index",
}
"""Keyword arguments that some models pass and that would change the result."""

_EAGER = 'use attn_implementation="eager" for this model'


def register(name: str = NAME, *, backend: str = "auto") -> None:
    """Make ``attn_implementation=name`` work in Transformers.

    Supported: MHA, GQA and MQA with head dims 64, 96, 128, 256, 512 and DeepSeek's (192, 128),
    never padded; prefill and decode with `DynamicCache` and `StaticCache`; left- and right-padded
    batches (2-dimensional ``attention_mask``); packed batches, as ``position_ids`` that restart
    (without cache and mask, as for every backend of Transformers) or as ``cu_seq_lens_q``,
    ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``; sliding windows; softcap; attention
    sinks (``s_aux``); bidirectional encoders and cross-attention. Inference only.

    Host synchronisation: none per layer; once per forward pass where a 2-dimensional
    ``attention_mask`` or packed ``position_ids`` must be read to find out whether there is any
    padding. Under ``torch.compile`` and CUDA-graph capture nothing is read: a given
    ``attention_mask`` then always takes the gather path (leave it out where nothing is padded), and
    packing by ``position_ids`` fails an assertion on the device (pass ``cu_seq_lens_q`` instead).

    In padded batches a sliding window counts tokens, not slots: padding *between* the tokens of a
    sequence shortens no window. Positions that are padding themselves come out as other numbers
    than eager attention gives them; both are meaningless.

    Args:
        name: the name to register.
        backend: as for `cute_fmha.attention`; registering again replaces it.
    """
    AttentionInterface.register(name, functools.partial(attention_forward, backend=backend))
    AttentionMaskInterface.register(name, mask_plan)


def _reads_host() -> bool:
    """False where a tensor's value cannot be read: while tracing or capturing a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _patterns(function: Callable[..., Any]) -> Iterator[str]:
    """Names of the elementary patterns that a Transformers mask function combines."""
    name = getattr(function, "__qualname__", repr(function)).split(".")[0]
    if name not in _COMBINERS:
        yield name
        return
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        for part in content if isinstance(content, tuple) else (content,):
            if callable(part) and not isinstance(part, torch.Tensor):
                yield from _patterns(part)


def _check_pattern(
    mask_function: Callable[..., Any], use_vmap: bool, chunk: int | None, kv_end: int
) -> bool:
    """Refuse every mask that causal, window, padding and packing do not describe.

    Returns whether sequences are packed, or may be where that cannot be told.
    """
    if torch.compiler.is_compiling():
        # Dynamo cannot look into closures. It sees the name of the outermost function: "and" of
        # patterns is a window, packing or chunks (`chunk` tells), "or" of them is none of ours.
        name = mask_function.__name__
        names = [] if name == "and_mask" else [name]
        if chunk is not None:
            names.append("chunked_overlay")
    else:
        names = list(_patterns(mask_function))
    within_one_chunk = chunk is not None and kv_end <= chunk
    unknown = [
        name
        for name in names
        if name not in _PATTERNS and not (name == "chunked_overlay" and within_one_chunk)
    ]
    if use_vmap or unknown:
        raise NotImplementedError(
            f"the mask pattern {unknown or 'of a custom mask function'} is neither causal, "
            f"bidirectional, sliding window, padding nor packing; {_EAGER}"
        )
    return not names or "packed_sequence_mask_function" in names


def _sequence_starts(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: torch.device | str
) -> torch.Tensor:
    """bool ``[B, S]``: true where a token does not see the one before it."""
    batch = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, length, device=device)[None, :]
    head = torch.zeros((), dtype=torch.int64, device=device)
    starts = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~mask_function(batch, head, token, token - 1)
    return starts


def _packed_plan(starts: torch.Tensor) -> torch.Tensor:
    """The packed plan for bool ``[B, S]`` sequence starts; reads them on the host."""
    first = starts.flatten().nonzero().flatten()
    total = first.new_full((1,), starts.numel())
    cu_seqlens = torch.cat((first, total))
    longest = int(cu_seqlens.diff().max())
    return cu_seqlens.to(torch.int32).expand(1, 1, longest, -1)


def _stable_order(key: torch.Tensor) -> torch.Tensor:
    return torch.argsort(key.to(torch.uint8), dim=-1, stable=True)


def _gather_plan(valid: torch.Tensor, valid_q: torch.Tensor | None) -> torch.Tensor:
    """The gather plan for bool ``[B, Sk]`` valid keys and ``[B, Sq]`` valid queries."""
    parts = [valid.sum(-1, keepdim=True), _stable_order(~valid)]
    if valid_q is not None:
        order = _stable_order(valid_q)
        parts += [order, torch.argsort(order, dim=-1)]
    return torch.cat(parts, dim=-1)[:, None, None, :]


def mask_plan(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Transformers' mask interface: the plan (module docstring) for one forward pass.

    Args:
        batch_size, q_length, kv_length: sizes that the attention call will have.
        q_offset, kv_offset: positions of the first query and key; a static cache gives the former
            as a tensor.
        mask_function: Transformers' description of the mask pattern.
        attention_mask: 2-dimensional padding mask ``[B, tokens so far]``, true where valid.
        use_vmap: true when the model or its user added a mask function of their own.
        local_size: window or chunk size, where the pattern has one.
        config: the model's configuration.
        device: where to make the plan.
        kwargs: ``allow_is_bidirectional_skip`` marks a mask as bidirectional; the rest does not
            matter here.

    Raises:
        NotImplementedError: a mask that is not causal, bidirectional, sliding window, padding or
            packing.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and local_size != chunk:
        chunk = None
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    packed = _check_pattern(mask_function, use_vmap, chunk, kv_length + kv_offset)
    # Keys in use, counted from the first key of the call. A static cache passes its whole buffer.
    used = kv_length if bidirectional else q_offset + q_length - kv_offset
    if isinstance(used, int) and used > kv_length:
        raise NotImplementedError(
            f"the last query is at position {used - 1} after the first key, past the {kv_length} "
            f"keys of the call; {_EAGER}"
        )
    if attention_mask is None:
        if packed and kv_length == q_length > 1:
            starts = _sequence_starts(mask_function, batch_size, q_length, device)
            if _reads_host():
                return _packed_plan(starts)
            torch._assert_async(
                ~starts[:, 1:].any(),
                "cute_fmha: packed position_ids under torch.compile; pass cu_seq_lens_q",
            )
        if isinstance(used, int) and used == kv_length:
            return None
        return _lengths_plan(used, batch_size, device)
    # Where queries are ordered, by causality or a window, they must line up with the keys.
    ordered = q_length > 1 and (not bidirectional or (local_size and q_length == kv_length))
    padding = attention_mask.expand(batch_size, -1)
    return _padded_plan(padding, q_length if ordered else 0, kv_length, kv_offset, used)


def _lengths_plan(
    used: int | torch.Tensor, batch_size: int, device: torch.device | str
) -> torch.Tensor:
    if isinstance(used, int):
        return torch.full((batch_size, 1, 1, 1), used, dtype=torch.int32, device=device)
    # A copy per sequence: `attention` wants a contiguous [B].
    return used.to(torch.int32).reshape(1, 1, 1, 1).repeat(batch_size, 1, 1, 1)


def _padded_plan(
    padding: torch.Tensor,
    queries: int,
    kv_length: int,
    kv_offset: int,
    used: int | torch.Tensor,
) -> torch.Tensor | None:
    """The plan for a padding mask ``[B, positions]``; None or lengths if nothing is padded.

    ``queries``: how many of the last used keys are queries to be put in order; 0 for none.
    """
    valid = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # Positions that a static cache has room for but that no token has reached yet.
    valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]), value=False)
    slots = torch.arange(kv_length, device=padding.device)
    valid = valid & (slots < used)
    valid_q = valid[:, slots[:queries] + (used - queries)] if queries else None
    if _reads_host():
        padded = (valid.sum(-1) != used).any()
        # Left padding leaves the queries where they must be: at the end.
        moved = padded if valid_q is None else (valid_q[:, :-1] & ~valid_q[:, 1:]).any()
        is_padded, is_moved = torch.stack((padded, moved)).tolist()
        if not is_padded:
            if isinstance(used, int) and used == kv_length:
                return None
            return _lengths_plan(used, padding.shape[0], padding.device)
        if not is_moved:
            valid_q = None
    return _gather_plan(valid, valid_q)


def _window_size(module: torch.nn.Module, kwargs: dict[str, Any], keys: int) -> int | None:
    """The sliding window of this layer, None for none.

    Some models (qwen2_moe) leave it to the mask alone and pass no ``sliding_window``; then their
    configuration decides, as it does for the mask.
    """
    if "sliding_window" in kwargs:
        size = kwargs["sliding_window"]
    else:
        config = getattr(module, "config", None)
        size = getattr(config, "sliding_window", None)
        layer, types = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
        if size is not None and layer is not None and types:
            size = size if types[layer] == "sliding_attention" else None
        elif size is not None and keys > size:
            raise NotImplementedError(
                f"{type(module).__name__} has a sliding window of {size} in its configuration, "
                f"passes none to its attention, and {keys} keys exceed it; {_EAGER}"
            )
    return size if size is not None and size < keys else None


def _refuse(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            f"dropout: got {dropout}; cute_fmha has no attention dropout, call model.eval() or set "
            "attention_dropout to 0"
        )
    for name, reason in _REFUSED.items():
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name}, which cute_fmha cannot do: {reason}; "
                f"{_EAGER}"
            )


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, D]`` with the rows of each sequence in ``order`` ``[B, S']``."""
    return torch.take_along_dim(tensor, order[:, :, None, None], dim=1)


def _unknown_mask(mask: Any, queries: int, keys: int) -> NotImplementedError:
    given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask)
    return NotImplementedError(
        f"attention_mask: got {given} for {queries} queries and {keys} keys; cute_fmha takes no "
        "arbitrary masks, only a 2-dimensional padding mask [B, tokens] passed to the model, or "
        f"packed sequences; {_EAGER}"
    )


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: one layer.

    Args:
        module: the attention module; ``is_causal`` is read from it where not passed.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, Dv]``, not repeated for GQA.
        attention_mask: the plan from `mask_plan`.
        dropout: must be 0.
        scaling: multiplies the scores; None is 1/√D.
        is_causal, softcap: as the model passes them; ``softcap`` None is off.
        s_aux: ``[Hq]`` attention sinks, any float dtype.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as for
            flash-attention; the batch dimension is flattened. Lengths given as tensors are read on
            the host, in every layer.
        backend: as for `cute_fmha.attention`.
        kwargs: ``sliding_window`` w, which is w − 1 keys to the left (and, not causal, to the
            right) of the diagonal; what would change the result is refused, the rest ignored.

    Returns:
        ``[B, Sq, Hq, Dv]`` and None for the attention weights.

    Raises:
        NotImplementedError: dropout, attention weights, arbitrary masks, biases, paged caches,
            gradients; or what the backend cannot run.
        ValueError: head dims, dtypes or shapes that `cute_fmha.attention` does not take.
    """
    _refuse(module, dropout, kwargs)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    size = _window_size(module, kwargs, keys)
    if size is not None:
        window = (size - 1, -1 if causal else size - 1)
    call: Callable[..., Any] = functools.partial(
        attention,
        scale=scaling,
        causal=bool(causal),
        window=window,
        softcap=0.0 if softcap is None else float(softcap),
        sink=None if s_aux is None else s_aux.float(),
        backend=backend,
    )
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        return _packed(
            call, q, k, v, attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        ), None
    if attention_mask is None:
        return call(q, k, v), None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        raise _unknown_mask(attention_mask, queries, keys)
    plan, last = attention_mask, attention_mask.shape[-1]
    if plan.dtype == torch.int32 and plan.shape == (batch, 1, 1, 1):
        return call(q, k, v, seqused_k=plan.reshape(batch)), None
    longest, tokens = plan.shape[2], batch * queries
    # The second condition is what several sequences satisfy and a mask of [.., Sq, Sk] does not.
    if plan.dtype == torch.int32 and longest < tokens <= longest * (last - 1):
        cu_seqlens = plan[0, 0, 0]
        return _packed(call, q, k, v, None, cu_seqlens, cu_seqlens, longest, longest), None
    if plan.dtype != torch.int64 or last not in (1 + keys, 1 + keys + 2 * queries):
        raise _unknown_mask(attention_mask, queries, keys)
    plan = plan[:, 0, 0]
    order = plan[:, 1 : 1 + keys]
    lengths = plan[:, 0].to(torch.int32)
    if last == 1 + keys:
        return call(q, _take(k, order), _take(v, order), seqused_k=lengths), None
    order_q, inverse = plan[:, 1 + keys : 1 + keys + queries], plan[:, 1 + keys + queries :]
    out = call(_take(q, order_q), _take(k, order), _take(v, order), seqused_k=lengths)
    return _take(out, inverse), None


def _packed(
    call: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | torch.Tensor | None,
    max_seqlen_k: int | torch.Tensor | None,
) -> torch.Tensor:
    """``[B, S, H, Dv]`` for ``[B, S, H, D]`` inputs that hold sequences end to end."""
    if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        raise ValueError(
            "packed sequences need cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k"
        )
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise ValueError("cu_seq_lens_q: got with a padded attention_mask; pass one of the two")
    out = call(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=cu_seqlens_q.to(torch.int32),
        cu_seqlens_k=cu_seqlens_k.to(torch.int32),
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
    )
    return out.unflatten(0, q.shape[:2])
