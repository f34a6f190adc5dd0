"""The epilogue contract, and how an op travels through a torch.library schema.

An op has two sides. Its *object* lives on the host, for the length of one call: it names the output
and carries the call's tensors and numbers. Its *class* is what backends see, found again under
``key``; it holds no tensor, so nothing of a call outlives it, and a CUDA graph or a compiled graph
follows the tensors' contents. Whatever distinguishes two results of one class is therefore a
parameter (a number, or a tensor read on the device), or another class.

A user's own op is a subclass with ``key`` and `reference`, a ``triton`` and a ``blackwell``
function where it shall run on a GPU, and whatever else differs from the defaults;
`cute_fmha.epilogues.gate` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

Parameters = Sequence[torch.Tensor | float]
"""An op's ``tensors``, then its ``values``, as a call brings them to a backend."""

_REGISTRY: dict[str, type[EpilogueOp]] = {}


class Extra(NamedTuple):
    """The second output of an op. ``zeroed``: it has elements that no kernel writes, and that the
    caller who brings it must have set to zero."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool


class Kind(NamedTuple):
    """What a Blackwell kernel has compiled in of a parameter: of a number (``dtype`` None) that it
    is one, of a tensor its ``dims`` and whether its last dimension is contiguous with all ``rows``
    on 16 bytes (never said of fewer than two dimensions)."""

    dtype: torch.dtype | None
    dims: int
    rows: bool


def kind_of(parameter: torch.Tensor | float) -> Kind:
    """The kind of a call's parameter."""
    if not isinstance(parameter, torch.Tensor):
        return Kind(None, 0, False)
    rows = parameter.dim() > 1 and parameter.stride(-1) == 1 and parameter.data_ptr() % 16 == 0
    size = parameter.element_size()
    rows = rows and all(stride * size % 16 == 0 for stride in parameter.stride()[:-1])
    return Kind(parameter.dtype, parameter.dim(), rows)


class Row(NamedTuple):
    """The output row that a thread of a Blackwell kernel works on.

    token: its number over the whole batch. head: the query head. live: whether the row exists; of
    one that does not, ``token`` and ``head`` are in range. width: Dv.
    """

    token: Any
    head: Any
    live: Any
    width: int


class EpilogueOp:
    """Acts on the normalised FP32 output; data flows one way, from registers to the output.

    With split-KV the op runs once, after the combine.
    """

    key: ClassVar[str]
    """Names the class in the op schema and in the caches of compiled kernels."""

    triton: ClassVar[Callable[..., Any] | None] = None
    """The op in Triton's language, or None: the Triton kernels then refuse it.

    ``triton(x, token, head, live, parameters, extra, DV)`` returns the tile that the kernel then
    casts and stores in ``out``, or a narrower one (NVFP4's bytes): of FP32 ``x`` ``[ROWS, WIDTH]``
    the columns from DV on are padding. ``token`` (int64, over the whole batch), ``head`` and
    ``live`` are ``[ROWS]``; rows that are not live are stored by nobody, their numbers are in
    range. A parameter is ``(pointer, strides)``, or ``(number, None)``; ``extra`` is
    ``(pointer, strides)`` of the second output, which the function stores itself, or None. FP8
    tensors are uint8 here. Multiplications that feed an addition may be fused on a GPU.

    A plain function, from which the backend makes a device function (then ``import triton.language
    as tl`` under TYPE_CHECKING keeps Triton out of the import), or one with ``@triton.jit``.
    """

    blackwell: ClassVar[Callable[..., Any] | None] = None
    """The op for the Blackwell kernels, or None: they then refuse it (but for a plain cast).

    ``blackwell(row, parameters, extra)`` is called once for a `Row`, while the kernel is traced,
    and returns the function that is then called for all parts of the row: ``apply(x, column)`` gets
    consecutive FP32 columns from ``column`` on, a Python list of 16 or 32 registers, beginning at a
    multiple of their number. It returns as many FP32 values, which the store rounds to the output's
    dtype, or the 32-bit words that are stored as they are (8 values of NVFP4 in each).

    A parameter is a number, as which tensors without dimensions arrive, too, or a CuTe tensor with
    the dimensions that ``tensors`` gave it; ``extra`` is the second output, bytes, which the
    function stores itself, where ``row.live``, or None. FP8 tensors are uint8 here.

    A plain function of Python: its loops and branches run while the kernel is traced. What it needs
    of CuTe DSL it imports inside, since ops are imported without.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "key" not in vars(cls):
            return
        known = _REGISTRY.get(cls.key, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"epilogue key {cls.key!r} belongs to {known.__qualname__}")
        _REGISTRY[cls.key] = cls

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Device tensors that this call's op reads."""
        return ()

    @property
    def values(self) -> tuple[float, ...]:
        """Numbers that this call's op uses."""
        return ()

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the output for inputs of ``input_dtype``."""
        return input_dtype

    @staticmethod
    def out_columns(head_dim_v: int) -> int:
        """The length of the output's last dimension."""
        return head_dim_v

    def extra(self, tokens: int, heads: int, head_dim_v: int) -> Extra | None:
        """The second output, contiguous, for so many tokens (batch × positions); None: none."""
        return None

    def result(self, out: torch.Tensor, extra: torch.Tensor | None) -> Any:
        """What the call returns in place of ``out``; with an extra output a pair of both."""
        return out if extra is None else (out, extra)

    def validate(self, q: torch.Tensor, head_dim_v: int) -> None:
        """Raise a ValueError where ``tensors`` (on the device of ``q``) do not fit the call."""

    @staticmethod
    def reference(
        x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What the op makes of FP32 ``x`` ``[..., heads, Dv]``, eagerly: out, or (out, extra)."""
        raise NotImplementedError


def resolve(key: str) -> type[EpilogueOp]:
    """The op class of that key.

    Raises:
        KeyError: no class of that key was defined in this process.
    """
    return _REGISTRY[key]
