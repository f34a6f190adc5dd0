"""What `cute_fmha.api` refuses: an argument's name, what was given and what is allowed."""

from __future__ import annotations

import math

import torch

from cute_fmha.problem import HEAD_DIMS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SPLITS = 256

ENDLESS = 1 << 30
"""A window side that reaches as far is unbounded: no sequence is that long, and kernels compute
with sides in 32 bits."""


def require(condition: bool, argument: str, got: object, allowed: object, *values: object) -> None:
    """Refuse with what was ``got`` and what is ``allowed``, a template for ``values`` if any.

    Formatting waits for the failure: done eagerly it would cost host time on every call, and a
    symbolic size that is made a string specialises a compiled graph to one batch size.
    """
    if not condition:
        text = str(allowed).format(*values) if values else allowed
        raise ValueError(f"{argument}: got {got}; allowed: {text}")


def require_value(condition: bool, argument: str, value: object, allowed: str) -> None:
    """`require` that shows ``repr(value)``, taken only on failure: Dynamo cannot trace it."""
    if not condition:
        require(False, argument, repr(value), allowed)


def check_tensor(
    name: str,
    tensor: torch.Tensor | None,
    like: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    meaning: str,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor whose device, dtype, shape (None: any) or last stride is not as stated."""
    if tensor is None:
        return
    require(
        isinstance(tensor, torch.Tensor), name, type(tensor).__name__, "a torch.Tensor {}", meaning
    )
    require(tensor.device == like.device, f"{name} device", tensor.device, like.device)
    require(tensor.dtype == dtype, f"{name} dtype", tensor.dtype, dtype)
    matches = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        known = any(want is not None for want in shape)
        allowed = "{} = [{}]" if known else "{}"
        require(False, f"{name} shape", tuple(tensor.shape), allowed, meaning, sizes)
    if contiguous and tensor.dim() > 0 and tensor.numel() > 0:
        require(
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
            f"{name} strides", tuple(tensor.stride()), "a contiguous last dimension",
        )  # fmt: skip


def refuse_gradients(**tensors: torch.Tensor | None) -> None:
    """There is no backward pass: say so rather than return a tensor without one."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise NotImplementedError(
                f"{name}.requires_grad is True, and cute_fmha has no backward pass: call it under "
                "torch.no_grad() or torch.inference_mode(), or train with "
                "torch.nn.functional.scaled_dot_product_attention"
            )


def resolve_scale(scale: float | None, width: int) -> float:
    """None is 1/√width."""
    if scale is None:
        return 1.0 / math.sqrt(width)
    require_value(
        isinstance(scale, (int, float)) and 0 < scale < math.inf,
        "scale", scale, "None or a finite number > 0",
    )  # fmt: skip
    return float(scale)


def resolve_window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """(left, right), causal folded in; -1 is unbounded."""
    left, right = -1, -1
    if window is not None:
        pair = isinstance(window, (tuple, list)) and len(window) == 2
        valid = pair and all(isinstance(w, int) and w >= -1 for w in window)
        require(valid, "window", window, "None or (left, right), integers >= -1 (-1: unbounded)")
        left, right = (side if side < ENDLESS else -1 for side in window)
    return left, (0 if causal else right)


def resolve_softcap(softcap: float) -> float:
    require_value(
        isinstance(softcap, (int, float)) and 0 <= softcap < math.inf,
        "softcap", softcap, "0 (off) or a finite number > 0",
    )  # fmt: skip
    return float(softcap)


def resolve_splits(num_splits: int | None) -> int:
    """0 leaves the choice to the backend."""
    if num_splits is None:
        return 0
    require_value(
        isinstance(num_splits, int) and 1 <= num_splits <= MAX_SPLITS,
        "num_splits", num_splits, f"None (automatic) or an integer in [1, {MAX_SPLITS}]",
    )  # fmt: skip
    return num_splits


def check_query(q: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """q first and alone: every other tensor is compared with it."""
    require(isinstance(q, torch.Tensor), "q", type(q).__name__, f"a torch.Tensor {meaning}")
    require(q.dtype in DTYPES, "q dtype", q.dtype, ", ".join(map(str, DTYPES)))
    check_tensor("q", q, q, q.dtype, shape, meaning)


_KEY_SHAPES = {
    "dense": ("[B, Sk, Hkv, D]", "[B, Sk, Hkv, Dv]"),
    "packed": ("[total_k, Hkv, D]", "[total_k, Hkv, Dv]"),
    "paged": ("[pages, page_size, Hkv, D]", "[pages, page_size, Hkv, Dv]"),
}
"""Of k and v, by layout."""


def check_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed_q: bool, layout: str
) -> None:
    """``layout``: of k and v, dense, packed or paged."""
    if packed_q:
        check_query(q, (None,) * 3, "[total_q, Hq, D]")
    else:
        check_query(q, (None,) * 4, "[B, Sq, Hq, D]")
    sizes = (None,) * (3 if layout == "packed" else 4)
    for name, tensor, meaning in zip(("k", "v"), (k, v), _KEY_SHAPES[layout], strict=True):
        require(isinstance(tensor, torch.Tensor), name, type(tensor).__name__, "a torch.Tensor")
        check_tensor(name, tensor, q, q.dtype, sizes, meaning)
    require(
        k.shape[:-1] == v.shape[:-1],
        "v shape",
        tuple(v.shape),
        "that of k, {}, but Dv",
        k.shape,
    )
    pair = (q.shape[-1], v.shape[-1])
    require(
        pair == (192, 128) or (pair[0] == pair[1] and pair[0] in HEAD_DIMS),
        "head dims (D, Dv)", pair, "equal pairs of {}, and (192, 128)", HEAD_DIMS,
    )  # fmt: skip
    require(k.shape[-1] == q.shape[-1], "k head dim", k.shape[-1], "that of q, {}", q.shape[-1])
    require(
        k.shape[-2] > 0 and q.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0,
        "heads (Hq, Hkv)", (q.shape[-2], k.shape[-2]), "Hq a positive multiple of Hkv",
    )  # fmt: skip


def resolve_max_seqlen(name: str, value: int | None, packed: bool, dense: int) -> int:
    """``dense``: the length where the input is not packed."""
    if not packed:
        return dense
    cu_seqlens = f"cu_seqlens_{name[-1]}"
    require_value(
        isinstance(value, (int, torch.SymInt)) and value >= 0,
        name, value, f"an integer >= 0 with packed input ({cu_seqlens} is on the device)",
    )  # fmt: skip
    assert value is not None
    return value
