"""`Scale`: multiply by a constant, or by one number per query head, then cast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cute_fmha.epilogues.base import EpilogueOp, Parameters
from cute_fmha.epilogues.cast import check_cast

if TYPE_CHECKING:
    import triton.language as tl


def head_factor(scale, head):
    """Triton: the scale of each row, FP32 ``[ROWS]``, of a parameter of `HeadScaled`."""
    if scale[1] is None:
        factor = tl.full(head.shape, scale[0], tl.float32)
    elif len(scale[1]) == 0:
        factor = tl.full(head.shape, tl.load(scale[0]), tl.float32)
    else:
        factor = tl.load(scale[0] + head * scale[1][0])
    return factor


def head_number(scale, row):
    """Blackwell: the scale of a row, of a parameter of `HeadScaled`."""
    import cutlass.cute as cute

    return scale[row.head] if isinstance(scale, cute.Tensor) else scale


def head_columns(scale: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """FP32 ``scale`` so that it broadcasts over ``x`` ``[..., heads, Dv]``."""
    if isinstance(scale, torch.Tensor):
        return scale[:, None] if scale.dim() == 1 else scale
    return torch.tensor(scale, dtype=torch.float32, device=x.device)


@dataclass(frozen=True, eq=False)
class HeadScaled(EpilogueOp):
    """What ops with a scale share: a finite number, an FP32 tensor of one element, or FP32 ``[Hq]``
    (on the device of q, read there: it may change between CUDA-graph replays)."""

    scale: float | torch.Tensor

    def __post_init__(self) -> None:
        name, scale = type(self).__name__, self.scale
        if isinstance(scale, torch.Tensor):
            if scale.dtype != torch.float32 or not (scale.dim() == 1 or scale.numel() == 1):
                raise ValueError(
                    f"{name} scale as a tensor must be float32, one element or [Hq]; got "
                    f"{scale.dtype} {tuple(scale.shape)}"
                )
        elif not (isinstance(scale, (int, float)) and -math.inf < scale < math.inf):
            raise ValueError(f"{name} scale must be a finite number or a tensor; got {scale!r}")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        if not isinstance(self.scale, torch.Tensor):
            return ()
        return (self.scale.reshape(()) if self.scale.numel() == 1 else self.scale,)

    @property
    def values(self) -> tuple[float, ...]:
        return () if isinstance(self.scale, torch.Tensor) else (float(self.scale),)

    def validate(self, q: torch.Tensor, head_dim_v: int) -> None:
        if isinstance(self.scale, torch.Tensor) and self.scale.numel() not in (1, q.shape[-2]):
            raise ValueError(
                f"{type(self).__name__} scale: got {tuple(self.scale.shape)}; allowed: one "
                f"element or [Hq] = [{q.shape[-2]}]"
            )


def scale_rows(x, token, head, live, parameters, extra, DV):
    """`Scale` in Triton."""
    return x * head_factor(parameters[0], head)[:, None]


def scale_row(row, parameters, extra):
    """`Scale` on Blackwell."""
    from cute_fmha.kernels.blackwell.softmax import scaled

    factor = head_number(parameters[0], row)
    return lambda x, column: scaled(x, factor)


@dataclass(frozen=True, eq=False)
class Scale(HeadScaled):
    """``x · scale``, rounded once to FP32 and once to ``dtype`` (None: the dtype of q).

    scale: a finite number, an FP32 tensor of one element, or FP32 ``[Hq]``, one per query head.
    """

    dtype: torch.dtype | None = None

    key = "scale"
    triton = staticmethod(scale_rows)
    blackwell = staticmethod(scale_row)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cast("Scale", self.dtype)

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        return self.dtype or input_dtype

    @staticmethod
    def reference(x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype) -> torch.Tensor:
        return (x * head_columns(parameters[0], x)).to(out_dtype)
