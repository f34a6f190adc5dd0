"""`FP8`: e4m3 with one scale per tensor or per query head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cute_fmha.epilogues.base import Parameters
from cute_fmha.epilogues.scale import HeadScaled, head_columns, head_factor, head_number

if TYPE_CHECKING:
    import triton.language as tl

E4M3_MAX = 448.0


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """FP32 to float8_e4m3fn: to nearest even, ±448 beyond the range, NaN without its sign.

    That is PTX's ``cvt.rn.satfinite``; what PyTorch's own conversion does beyond the range differs
    between versions and devices, so it is kept inside.
    """
    x = torch.where(x.isnan(), math.nan, x.clamp(-E4M3_MAX, E4M3_MAX))
    return x.to(torch.float8_e4m3fn)


def e4m3_code(x):
    """Triton: `to_e4m3` as an int32 code, in integer arithmetic: sm_80 has no such conversion, and
    the same bits are wanted on every GPU and in the interpreter."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # From 2⁻⁶ on: 3 bits of mantissa stay, ties go to even; the exponent's bias 127 becomes 7.
    capped = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - (120 << 3)
    # Below: adding 2¹⁴, whose last bit is 2⁻⁹, rounds to the spacing of the subnormals.
    small = tl.minimum(magnitude, 0x3C800000).to(tl.float32, bitcast=True) + 16384.0
    subnormal = small.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude >= 0x3C800000, normal, subnormal) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code)


def fp8_rows(x, token, head, live, parameters, extra, DV):
    """`FP8` in Triton."""
    inverse = tl.div_rn(tl.full(head.shape, 1.0, tl.float32), head_factor(parameters[0], head))
    return e4m3_code(x * inverse[:, None]).to(tl.uint8)


def fp8_row(row, parameters, extra):
    """`FP8` on Blackwell: the hardware's conversion is the specification's."""
    from cute_fmha.kernels.blackwell.ptx_codes import pack_e4m3
    from cute_fmha.kernels.blackwell.softmax import scaled

    inverse = 1.0 / head_number(parameters[0], row)

    def apply(x, column):
        values = scaled(x, inverse)
        return [pack_e4m3(values[j : j + 4]) for j in range(0, len(values), 4)]

    return apply


@dataclass(frozen=True, eq=False)
class FP8(HeadScaled):
    """``e4m3(x · (1 / scale))`` in torch.float8_e4m3fn: to nearest even, saturating at ±448.

    scale: what the stored values are to be multiplied by: ``x ≈ scale · stored``, as vLLM's
        ``output_scale`` and `torch._scaled_mm`'s ``scale_a`` have it (TensorRT-LLM passes the
        inverse). A finite number, an FP32 tensor of one element, or FP32 ``[Hq]``, one per query
        head. Its reciprocal is rounded to FP32 once, then multiplied.

    ±inf is stored as ±448, NaN as 0x7F whatever its sign.
    """

    key = "fp8"
    triton = staticmethod(fp8_rows)
    blackwell = staticmethod(fp8_row)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scale, torch.Tensor) and self.scale <= 0:
            raise ValueError(f"FP8 scale must be > 0; got {self.scale!r}")

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    @staticmethod
    def reference(x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype) -> torch.Tensor:
        return to_e4m3(x * (1.0 / head_columns(parameters[0], x)))
