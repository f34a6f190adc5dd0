"""`NVFP4`: e2m1 pairs in bytes and one e4m3 scale per 16 elements, for block-scaled GEMMs.

For 16 neighbours x along the head dim, with the global scale g, everything in FP32:

    s = e4m3(max |x| · (1/6) · g)        the block's scale, saturating at 448
    stored = e2m1(x · (g / s))           ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; all ±0 where s is 0

so x ≈ stored · s / g. The usual g is 448 · 6 / max |out|, as vLLM's and TensorRT-LLM's
``global_scale``; the GEMM's alpha takes 1 / g. Both roundings are to nearest even.

The consumer is the output projection, whose operand A is ``[tokens, Hq · Dv]``: tokens are its rows
(batch × positions), heads × Dv its columns.

    packed  uint8 [..., Hq, Dv / 2]: the element of even index in the low four bits. As
            [tokens, Hq · Dv / 2] it is A (``.view(torch.float4_e2m1fn_x2)`` for PyTorch).
    scales  float8_e4m3fn [tokens to 128, Hq · Dv / 16 to 4], both rounded up, contiguous; the
            memory is 128×4 tiles in row-major order, 512 bytes each, the scale of (row r, column c)
            of a tile at byte (r % 32) · 16 + (r // 32) · 4 + c  (cuBLAS, CUTLASS, cuDNN).

Padding scales are zero: `cute_fmha.attention` clears what it allocates; no kernel writes them, so a
caller who passes ``out=`` clears its scales once.

Zero blocks have scale 0 and keep the signs of their zeros; so have blocks whose scale is below half
the smallest e4m3 (2⁻¹⁰). ±inf gives its block scale 448 and is stored as ±6. NaN makes its block's
scale NaN (0x7F), all its elements 7 (+6): a NaN stays visible after the GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from cute_fmha.epilogues.base import EpilogueOp, Extra, Parameters
from cute_fmha.epilogues.fp8 import e4m3_code, to_e4m3

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 16
"""Elements that share a scale."""

_E2M1_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
              (5.0, False))  # fmt: skip
"""Midpoints between the e2m1 magnitudes, and whether they round up (to the even code)."""


class NVFP4Output(NamedTuple):
    """See the module docstring."""

    packed: torch.Tensor
    scales: torch.Tensor


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """FP32 to the four bits of e2m1 in uint8: to nearest even, saturating at ±6, NaN as +6."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint, up in _E2M1_TIES:
        code += magnitude >= midpoint if up else magnitude > midpoint
    code |= x.signbit().to(torch.uint8) << 3
    return code.masked_fill(x.isnan(), 7)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Scales ``[rows, columns]`` in 128×4 tiles, zeros where a tile is not full."""
    rows, columns = scales.shape
    tiles = (-(-rows // 128), -(-columns // 4))
    padded = scales.new_zeros(tiles[0] * 128, tiles[1] * 4, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiled = padded.view(tiles[0], 4, 32, tiles[1], 4).permute(0, 3, 2, 1, 4)
    return tiled.reshape(padded.shape).view(scales.dtype)


def e2m1_code(x):
    """Triton: `to_e2m1` as an int32 code, like `e4m3_code`."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x40C00000)  # 6
    normal = ((capped + 0x1FFFFF + ((capped >> 22) & 1)) >> 22) - (126 << 1)
    small = tl.minimum(magnitude, 0x3F800000).to(tl.float32, bitcast=True) + 4194304.0
    subnormal = small.to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(magnitude >= 0x3F800000, normal, subnormal) | ((bits >> 28) & 8)
    return tl.where(magnitude > 0x7F800000, 7, code)


def nvfp4_rows(x, token, head, live, parameters, extra, DV):
    """`NVFP4` in Triton: returns the bytes, stores the scales."""
    blocks = tl.reshape(x, [x.shape[0], x.shape[1] // 16, 16])
    # As integers magnitudes keep their order, and a NaN is the largest.
    magnitude = blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(magnitude, axis=2).to(tl.float32, bitcast=True)
    global_scale = parameters[0][0]
    if parameters[0][1] is not None:
        global_scale = tl.load(global_scale)
    code = e4m3_code(peak * (1.0 / 6.0) * global_scale)
    scale = tl.where(
        code >= 8, ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True), code * 0.001953125
    )
    inverse = tl.div_rn(tl.full(scale.shape, global_scale, tl.float32), scale)
    inverse = tl.where(code == 0, 0.0, tl.where(code == 0x7F, float("nan"), inverse))
    low, high = tl.split(
        tl.reshape(e2m1_code(blocks * inverse[:, :, None]), [x.shape[0], x.shape[1] // 2, 2])
    )
    block = tl.arange(0, x.shape[1] // 16)
    column = (head * (DV // 16))[:, None] + block[None, :]
    row = token[:, None]
    tile = (row // 128) * (extra[1][0] * 128) + (column // 4) * 512
    inside = (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
    mask = live[:, None] & (block < DV // 16)[None, :]
    tl.store(extra[0] + tile + inside, code.to(tl.uint8), mask=mask)
    return (low | (high << 4)).to(tl.uint8)


def quotients(numerator, scales):
    """Blackwell: ``numerator`` over each of two e4m3 ``scales``, rounded correctly.

    A reciprocal that is right to one unit in the last place, one Newton step, a product and its
    remainder: with divisors of four bits that gives the correctly rounded quotient for every
    numerator far from the ends of the range. The compiler's own division costs a branch and a call
    for those ends, and with them registers.
    """
    from cutlass import Float32, cute

    def fma(a, b, c):
        return cute.arch.fma_packed_f32x2(tuple(a), tuple(b), tuple(c))

    minus = [-scale for scale in scales]
    rough = [cute.arch.rcp_approx(scale) for scale in scales]
    inverse = fma(fma(minus, rough, (Float32(1.0), Float32(1.0))), rough, rough)
    quotient = cute.arch.mul_packed_f32x2((numerator, numerator), inverse)
    return fma(fma(minus, quotient, (numerator, numerator)), inverse, quotient)


def nvfp4_row(row, parameters, extra):
    """`NVFP4` on Blackwell: a thread has whole blocks; scales are stored in pairs where it has two,
    as bytes of one tile."""
    from cutlass import Float32, Int64, select_

    from cute_fmha.kernels.blackwell import ptx
    from cute_fmha.kernels.blackwell.ptx_codes import pack_e2m1, pack_e4m3, unpack_e4m3
    from cute_fmha.kernels.blackwell.softmax import largest_magnitude, scaled

    (global_scale,) = parameters
    tiles = extra.iterator.toint() + Int64(row.token // 128) * (extra.stride[0] * 128)
    row_begin = tiles + (row.token % 32 * 16 + row.token % 128 // 32 * 4)
    first = row.head * (row.width // BLOCK)
    if row.width % (4 * BLOCK) == 0:  # A head begins with a tile.
        row_begin, first = row_begin + first // 4 * 512, 0

    def apply(x, column):
        blocks = [x[j : j + BLOCK] for j in range(0, len(x), BLOCK)]
        sized = [largest_magnitude(block) * (1.0 / 6.0) * global_scale for block in blocks]
        codes = pack_e4m3(sized)
        block = first + column // BLOCK
        address = row_begin + (block // 4 * 512 + block % 4)
        ptx.store_global_bytes(address, codes, len(blocks), row.live)
        scales = unpack_e4m3(codes)
        words = []
        for values, scale, factor in zip(blocks, scales, quotients(global_scale, scales)):  # noqa: B905
            stored = scaled(values, select_(scale == 0.0, Float32(0.0), factor))
            words += [pack_e2m1(stored[:8]), pack_e2m1(stored[8:])]
        return words

    return apply


@dataclass(frozen=True, eq=False)
class NVFP4(EpilogueOp):
    """Packed e2m1 and swizzled e4m3 block scales; the call returns an `NVFP4Output`.

    global_scale: g of the module docstring: a number from 2⁻¹⁰⁰ to 2¹⁰⁰, or an FP32 tensor of one
        element on the device of q (read there, not checked: 0 or NaN spoil the result, and beyond
        that range backends differ).
    """

    global_scale: float | torch.Tensor = 1.0

    key = "nvfp4"
    triton = staticmethod(nvfp4_rows)
    blackwell = staticmethod(nvfp4_row)

    def __post_init__(self) -> None:
        scale = self.global_scale
        if isinstance(scale, torch.Tensor):
            if scale.dtype != torch.float32 or scale.numel() != 1:
                raise ValueError(
                    "NVFP4 global_scale as a tensor must hold one float32 element; got "
                    f"{scale.dtype} {tuple(scale.shape)}"
                )
        elif not (isinstance(scale, (int, float)) and 2.0**-100 <= scale <= 2.0**100):
            raise ValueError(
                f"NVFP4 global_scale must be a number from 2**-100 to 2**100; got {scale!r}"
            )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        scale = self.global_scale
        return (scale.reshape(()),) if isinstance(scale, torch.Tensor) else ()

    @property
    def values(self) -> tuple[float, ...]:
        scale = self.global_scale
        return () if isinstance(scale, torch.Tensor) else (float(scale),)

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    @staticmethod
    def out_columns(head_dim_v: int) -> int:
        return head_dim_v // 2

    def extra(self, tokens: int, heads: int, head_dim_v: int) -> Extra:
        columns = heads * head_dim_v // BLOCK
        padded = -(-tokens // 128) * 128, -(-columns // 4) * 4
        return Extra(padded, torch.float8_e4m3fn, padded != (tokens, columns))

    def result(self, out: torch.Tensor, extra: torch.Tensor | None) -> NVFP4Output:
        assert extra is not None
        return NVFP4Output(out, extra)

    @staticmethod
    def reference(
        x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        global_scale = torch.as_tensor(parameters[0], dtype=torch.float32, device=x.device)
        blocks = x.unflatten(-1, (-1, BLOCK))
        scales = to_e4m3(blocks.abs().amax(-1) * (1.0 / 6.0) * global_scale)
        divisor = scales.float()
        inverse = torch.where(divisor == 0, 0.0, global_scale / divisor)
        code = to_e2m1(blocks * inverse[..., None]).flatten(-2)
        rows = scales.reshape(-1, x.shape[-2] * x.shape[-1] // BLOCK)
        return code[..., ::2] | code[..., 1::2] << 4, swizzle(rows)
