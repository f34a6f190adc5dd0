"""FP32 fragments through an op's Triton function alone, and the values that rounding may get wrong.

The kernel is what stands around the op in every portable kernel: `primitives.store_rows`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from cute_fmha.epilogues import EpilogueOp
from cute_fmha.kernels.triton.epilogue import epilogue_arguments, kernel_view
from cute_fmha.kernels.triton.primitives import store_rows

ROWS = 16


@triton.jit
def fragment_kernel(
    x, out, out_strides, epilogue, rows_in_all, heads,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows_in_all
    columns = tl.arange(0, WIDTH)
    mask = live[:, None] & (columns < DV)[None, :]
    tile = tl.load(x + row[:, None] * DV + columns[None, :], mask=mask, other=0.0)
    token = (row // heads).to(tl.int64)
    store_rows(
        tile, tile, token, live, 0, row % heads, out, out_strides, None, (0, 0), epilogue,
        True, DV, EPILOGUE,
    )  # fmt: skip


def allocate(op: EpilogueOp, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, second output) of ``op`` for FP32 ``x`` ``[tokens, heads, Dv]``."""
    tokens, heads, dv = x.shape
    out = x.new_empty(tokens, heads, op.out_columns(dv), dtype=op.out_dtype(x.dtype))
    spec = op.extra(tokens, heads, dv)
    return out, None if spec is None else x.new_zeros(spec.shape, dtype=spec.dtype)


def on_triton(op: EpilogueOp, x: torch.Tensor) -> Any:
    """What ``op`` makes of ``x`` ``[tokens, heads, Dv]`` in Triton, as a call would return it."""
    tokens, heads, dv = x.shape
    out, extra = allocate(op, x)
    call: Any = SimpleNamespace(
        problem=SimpleNamespace(epilogue=op.key, seqlen_q=tokens),
        parameters=(*op.tensors, *op.values),
        extra=extra,
    )
    function, epilogue = epilogue_arguments(call)
    fragment_kernel[(-(-tokens * heads // ROWS),)](
        x.contiguous(), kernel_view(out), (0, *out.stride()[:2]), epilogue, tokens * heads, heads,
        ROWS=ROWS, WIDTH=triton.next_power_of_2(dv), DV=dv, EPILOGUE=function,
    )  # fmt: skip
    return op.result(out, extra)


def on_reference(op: EpilogueOp, x: torch.Tensor) -> Any:
    """The same by definition."""
    stored = op.reference(x, (*op.tensors, *op.values), op.out_dtype(x.dtype))
    return op.result(*stored) if isinstance(stored, tuple) else op.result(stored, None)


def same_bits(actual: Any, expected: Any) -> bool:
    """Whether two results of an op agree in every bit (NaN included)."""
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected)  # noqa: B905
    return all(
        a.shape == e.shape and torch.equal(a.contiguous().view(torch.uint8), e.view(torch.uint8))
        for a, e in pairs
    )


def any_floats(*shape: int, seed: int = 0) -> torch.Tensor:
    """FP32 of uniformly drawn bits: every exponent, subnormals, infinities, NaN of both signs."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)
    return bits.view(torch.float32)


def around(values: torch.Tensor) -> torch.Tensor:
    """Each FP32 value and its two neighbours, of both signs."""
    steps = [values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(torch.tensor(0.0))]
    positive = torch.cat(steps)
    return torch.cat((positive, -positive))


def rounding_edges(magnitudes: torch.Tensor) -> torch.Tensor:
    """Around every value of a format, every midpoint, and what lies beyond its largest value."""
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    top = magnitudes[-1] + (magnitudes[-1] - magnitudes[-2]) * torch.tensor([0.5, 1.0, 1.5, 1e9])
    special = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1.1754944e-38, 3.4028235e38])
    return torch.cat((around(torch.cat((magnitudes, midpoints, top))), special, -special))


E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The magnitudes of the formats, in the order of their codes."""


def nvfp4_edges() -> list[torch.Tensor]:
    """Rows in which NVFP4 rounds elements, or scales, at the edges of their formats."""
    # A 6 in each block makes its scale 1: the others are rounded as they are.
    edges = rounding_edges(E2M1)
    edges = edges[edges.abs() <= 6]
    blocks = torch.nn.functional.pad(edges, (0, -len(edges) % 15)).view(-1, 15)
    elements = fill_rows(torch.nn.functional.pad(blocks, (0, 1), value=6.0).flatten(), 64)
    peaks = rounding_edges(E4M3)[:, None] * torch.tensor([6.0])
    return [elements, fill_rows((peaks * torch.linspace(-1, 1, 16)).flatten(), 64)]


SPECIAL_BLOCKS: list[tuple[tuple[float, ...], float, list[int], int]] = [
    ((0.0, -0.0), 1.0, [0x80], 0),
    ((6.0, -3.0), 1.0, [0xD7], 0x38),
    ((torch.inf, 1.0, -torch.inf, -1.0), 1.0, [0x07, 0x8F], 0x7E),
    ((torch.inf, 448.0), 1.0, [0x27], 0x7E),
    ((torch.nan, 1.0), 1.0, [0x77], 0x7F),
    ((1.0, -torch.nan, torch.inf, 0.0), 1.0, [0x77, 0x77], 0x7F),
    ((1e9, -1e-3), 1.0, [0x87], 0x7E),
    # Half of the smallest e4m3 goes to even, to 0, and takes the block with it.
    ((6 * 2.0**-10, -1.0 * 2.0**-10), 1.0, [0x80], 0),
    ((6.1 * 2.0**-10, -3.1 * 2.0**-10), 1.0, [0xB5], 1),
    ((3e38, -3e38), 1e30, [0xF7], 0x7E),
]
"""The first elements of a block of zeros, NVFP4's global scale, bytes and scale of the block."""


def block_of(*leading: float) -> torch.Tensor:
    """One block of 16 (and three of zeros): the given elements, then zeros."""
    return fill_rows(torch.tensor(leading), 64)


def fill_rows(values: torch.Tensor, dv: int) -> torch.Tensor:
    """``values`` as rows ``[tokens, 1, dv]``, ending in zeros."""
    padding = -values.numel() % dv
    return torch.nn.functional.pad(values, (0, padding)).view(-1, 1, dv)
