"""Calls like one that was checked before go straight to their backend.

Checking the arguments of a call, and PyTorch's dispatcher, take longer than everything else on the
host. Both depend only on shapes, strides, dtypes, devices and options. So a call that went through
leaves what was found out under a key of all those, and an equal one only makes its outputs and its
`Call`. Calls that somebody traces or watches (`torch.compile`, dispatch modes, functorch, the
profiler) go through the dispatcher; calls with an epilogue op are checked every time.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

from cute_fmha import dispatch
from cute_fmha.epilogues.base import EpilogueOp
from cute_fmha.ops import Call
from cute_fmha.problem import Problem

LIMIT = 4096
"""Keys that are kept; then all are forgotten."""

Key = tuple[Any, ...]


class Known(NamedTuple):
    """What a call found out that holds for every call of its key."""

    problem: Problem
    epilogue: type[EpilogueOp]
    scale: float
    softcap: float
    skip_value: float
    skip_relative: bool
    out_shape: torch.Size
    out_dtype: torch.dtype
    rows_shape: Any  # of the FP32 results per row, None without any
    like_query: bool  # an output allocated like q is right


_known: dict[Key, Known] = {}


def is_eager() -> bool:
    """Whether nobody traces, watches or transforms what runs now."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._autograd._profiler_enabled()
    )


def key_of(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Key | None:
    """The key of a call with these tensors (or None, or tuples of tensors) and these options.

    None if the call has to go through the dispatcher.
    """
    if not is_eager():
        return None
    looks: list[Any] = []
    for x in tensors:
        if x is None:
            looks.append(None)
        elif type(x) is torch.Tensor:
            looks.append((x.shape, x.stride(), x.dtype, x.device))
        elif type(x) is tuple:
            looks.append(key_of(x, ()))
            if looks[-1] is None:
                return None
        else:
            return None
    return (*looks, *options)


def find(key: Key | None) -> Known | None:
    """What is known of ``key``, if anything."""
    try:
        return None if key is None else _known.get(key)
    except TypeError:  # an option that cannot be hashed is a wrong one, or a window as a list
        return None


def remember(key: Key, call: Call) -> None:
    """``call`` went through; it is what ``key`` stands for."""
    if len(_known) >= LIMIT:
        _known.clear()
    rows = call.lse if call.lse is not None else call.max_logits
    q, out = call.q, call.out
    known = Known(
        call.problem, call.epilogue, call.scale, call.softcap, call.skip_value, call.skip_relative,
        out.shape, out.dtype, None if rows is None else rows.shape,
        (q.shape, q.dtype) == (out.shape, out.dtype) and q.is_contiguous(),
    )  # fmt: skip
    with contextlib.suppress(TypeError):
        _known[key] = known


def outputs(
    known: Known, q: torch.Tensor, out: Any, rows: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(out, ``rows`` FP32 results per row): those given, and new ones for the others."""
    if type(out) is tuple:
        return out[0], list(out[1:])
    if out is None and known.like_query:
        out = torch.empty_like(q)
    elif out is None:
        out = q.new_empty(known.out_shape, dtype=known.out_dtype)
    return out, [q.new_empty(known.rows_shape, dtype=torch.float32) for _ in range(rows)]


def run(
    known: Known, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *tail: Any,
    sink: Any, block_mask: Any, skip_tensor: Any, backend: str,
) -> None:  # fmt: skip
    """Run the call; ``tail`` are the fields of `Call` from ``lse`` to ``seqused_k``."""
    fields = (
        known.problem, q, k, v, out, *tail, sink, block_mask, skip_tensor, known.scale,
        known.softcap, known.skip_value, known.skip_relative, known.epilogue, (),
    )  # fmt: skip
    dispatch.run(Call._make(fields), backend)
