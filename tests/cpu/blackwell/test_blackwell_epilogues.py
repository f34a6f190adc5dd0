"""Epilogue ops on Blackwell, bit by bit against the specification: `Store` alone on fragments, and
at the end of the prefill kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments import (
    E4M3,
    SPECIAL_BLOCKS,
    allocate,
    any_floats,
    block_of,
    fill_rows,
    nvfp4_edges,
    on_reference,
    on_triton,
    rounding_edges,
    same_bits,
)
from own_op import Squared

from cute_fmha.emulator.backend import emulated_calls
from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Gate, Identity, Scale
from cute_fmha.epilogues.base import Parameters
from cute_fmha.epilogues.nvfp4 import swizzle
from cute_fmha.kernels.triton.plan import interpreting
from cute_fmha.testing import AttentionCase, Heads, Options, Source, check, dense_case, packed_case

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness
import store_harness as stores

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN, inf and zeros on purpose
policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)
RANDOM = harness.POLICIES[2]
HEADS = torch.tensor([0.037, 1.0, 250.0])
GUARD = 0x5A
FP16 = Source(torch.float16, std=1.0)


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory like ``x`` among guard bytes before, after and between its rows, all the bytes)."""
    tokens, heads, columns = x.shape
    size = x.element_size()
    memory = torch.full((tokens + 300, heads, (columns + 64) * size), GUARD, dtype=torch.uint8)
    inside = memory.view(x.dtype)[150 : 150 + tokens, :, :columns]
    return inside, memory


def on_blackwell(
    op: EpilogueOp, x: torch.Tensor, lengths: list[int] | None = None, policy: Any = RANDOM,
    **variant: Any,
) -> Any:  # fmt: skip
    """What ``op`` makes of ``x`` [tokens, heads, Dv], sequences of ``lengths``; nothing else is
    written, neither beside the rows nor in the padding of the scales."""
    lengths = lengths or [x.shape[0]]
    like, extra = allocate(op, x)
    out, memory = guarded(like)
    padding = torch.zeros(0, dtype=torch.bool)
    if extra is not None:
        codes = extra.view(torch.uint8)
        ones = torch.ones(x.shape[0], x.shape[1] * x.shape[2] // 16, dtype=torch.float8_e4m3fn)
        padding = (swizzle(ones).view(torch.uint8) == 0).view(codes.shape)
        codes.fill_(GUARD)
    stores.run(op, x, out, lengths, policy, extra, **variant)
    result = out.clone()
    out.view(torch.uint8).fill_(GUARD)
    assert (memory == GUARD).all(), "bytes beside the rows were written"
    if extra is not None:
        assert (codes[padding] == GUARD).all(), "padding of the scales was written"
        codes[padding] = 0
    return op.result(result, extra)


OUTPUTS = {
    "bf16": Identity(torch.bfloat16), "fp32": Identity(torch.float32),
    "scale": Scale(HEADS[:2], torch.float16), "fp8": FP8(torch.tensor(0.3)),
    "nvfp4": NVFP4(torch.tensor([0.7])),
}  # fmt: skip


@policies
@pytest.mark.parametrize("op", OUTPUTS.values(), ids=OUTPUTS)
def test_ragged_rows_end_where_the_next_sequence_begins(policy, op):
    """Sequences without a row, with one row, with whole tiles, and with both."""
    lengths = [130, 0, 256, 1, 77]
    x = torch.randn(sum(lengths), 2, 96)
    assert same_bits(on_blackwell(op, x, lengths, policy), on_reference(op, x))


def ops_for(x: torch.Tensor) -> list[EpilogueOp]:
    scales = HEADS[: x.shape[1]]
    return [
        Identity(torch.bfloat16), Identity(torch.float16),
        Scale(0.37), Scale(scales, torch.float16),
        FP8(1.0), FP8(scales), FP8(torch.tensor(0.3)),
        NVFP4(), NVFP4(300.0), NVFP4(torch.tensor([0.7])), NVFP4(1e30), NVFP4(1e-30),
    ]  # fmt: skip


def agree(actual: Any, expected: Any) -> bool:
    """Whether all bits are the same, but for the payloads of NaN in 16 and 32 bits."""

    def quiet(x: Any) -> Any:
        return (
            torch.where(x.isnan(), torch.nan, x)
            if isinstance(x, torch.Tensor) and x.itemsize > 1
            else x
        )

    return same_bits(quiet(actual), quiet(expected))


def fragments(tokens: int, heads: int, dv: int) -> list[torch.Tensor]:
    """Every exponent, the values of a real output, and blocks of all sizes."""
    powers = 2.0 ** torch.randint(-20, 20, (tokens, heads, 1))
    return [
        any_floats(tokens, heads, dv, seed=dv),
        torch.randn(tokens, heads, dv),
        torch.randn(tokens, heads, dv) * powers,
    ]


@pytest.mark.parametrize(
    ("dv", "run"),
    [
        (64, 0), (96, 16),
        *(
            pytest.param(dv, run, marks=pytest.mark.sweep)
            for dv in (64, 96, 128, 256, 512)
            for run in (0, 16, 32)
        ),
    ],
)  # fmt: skip
def test_fragments_have_the_same_bits(dv, run):
    """Through the chunk ring, and (``run``) stored by whoever holds so many columns of a row."""
    for x in fragments(150, 3, dv):
        for op in ops_for(x):
            assert agree(on_blackwell(op, x, run=run), on_reference(op, x)), op


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 is not set")
def test_triton_stores_the_same_bits():
    for x in fragments(30, 3, 64):
        for op in ops_for(x)[2:]:
            assert agree(on_blackwell(op, x), on_triton(op, x)), op


def test_rounding_edges_have_the_same_bits():
    x = fill_rows(rounding_edges(E4M3), 64)
    assert same_bits(on_blackwell(FP8(1.0), x), on_reference(FP8(1.0), x))
    for x in nvfp4_edges():
        assert same_bits(on_blackwell(NVFP4(), x), on_reference(NVFP4(), x))


def test_nvfp4_divides_as_the_specification():
    """Elements so near to where e2m1 rounds up that one unit in the last place of g / s tells."""
    scales = E4M3[1:]
    ties = torch.tensor([0.25, 0.75, 1.25, 3.5, 5.0])
    for g in (0.7, 3.1, 1234.567, 2.0**-100, 1.9 * 2.0**99):
        middle = ties / (torch.tensor(g) / scales)[:, None]
        below, above = (
            middle.nextafter(torch.tensor(0.0)),
            middle.nextafter(torch.tensor(torch.inf)),
        )
        peak = (6 * scales / torch.tensor(g))[:, None]
        x = fill_rows(torch.cat((peak, below, middle, above), 1).flatten(), 64)
        op = NVFP4(torch.tensor([g]))
        assert same_bits(on_blackwell(op, x), on_reference(op, x)), g


@pytest.mark.parametrize(("leading", "global_scale", "packed", "scale"), SPECIAL_BLOCKS)
def test_nvfp4_special_blocks(leading, global_scale, packed, scale):
    """Zeros, infinities, NaN, scales that over- and underflow: bytes and scale of the block."""
    result = on_blackwell(NVFP4(global_scale), block_of(*leading))
    assert result.packed[0, 0, : len(packed)].tolist() == packed
    assert not result.packed[0, 0, 8:].any()
    assert result.scales.view(torch.uint8)[0, :4].tolist() == [scale, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "run"),
    [
        (torch.float16, 0),
        *(
            pytest.param(dtype, run, marks=pytest.mark.sweep)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            for run in (0, 16, 32)
        ),
    ],
)
def test_gate_in_any_layout(dtype, run):
    """Rows on 16 bytes, no contiguous dimension, and contiguous rows anywhere."""
    x = torch.randn(140, 2, 64)
    flat = torch.randn(x.numel() + 1).to(dtype)
    for gate in (
        torch.randn(x.shape).to(dtype),
        torch.randn(*x.shape, 2).to(dtype)[..., 0],
        flat[1:].view(x.shape),
    ):
        out = on_blackwell(Gate(gate), x, run=run)
        torch.testing.assert_close(out, x * gate.float().sigmoid(), rtol=1e-6, atol=1e-6)


@policies
def test_own_op(policy):
    """On all backends; it says nothing of how rows leave."""
    case = dense_case(2, 65, 97, Heads(4, 2, 64, 64), Options(causal=True), FP16)
    weight = torch.rand(2 * 65)
    for backend in ("reference", "triton", "emulator") if interpreting() else ("emulator",):
        with emulated_calls(policy):
            x, _ = case.run(epilogue=Identity(torch.float32), backend=backend)
            out, _ = case.run(epilogue=Squared(weight), backend=backend)
        assert torch.equal(out, Squared.reference(x, (weight,), torch.float16)), backend


def test_op_without_blackwell_is_refused_there():
    case = dense_case(1, 3, 5, Heads(1, 1, 64, 64), Options(), FP16)
    with pytest.raises(NotImplementedError, match="'test:no-blackwell' has no Blackwell function"):
        case.run(epilogue=ReferenceOnly(), backend="emulator")


class ReferenceOnly(EpilogueOp):
    key = "test:no-blackwell"


# -- the prefill kernel ----------------------------------------------------------------------------


def stored(case: AttentionCase, op: EpilogueOp, policy: Any) -> tuple[Any, torch.Tensor]:
    """(result, lse) of an emulated call that gets its outputs among guard bytes; the padding of
    NVFP4's scales is left out of the result."""
    *batch, seqlen, heads, _ = case.q.shape
    tokens = case.q[..., 0, 0].numel()
    dtype, columns = op.out_dtype(case.q.dtype), op.out_columns(case.v.shape[-1])
    size = (columns + 32) * dtype.itemsize
    memory = torch.full((*batch, seqlen + 200, heads, size), GUARD, dtype=torch.uint8)
    out: Any = memory.view(dtype)[..., 100 : 100 + seqlen, :, :columns]
    spec = op.extra(tokens, heads, case.v.shape[-1])
    extra = None
    if spec is not None:
        extra = torch.full(spec.shape, GUARD, dtype=torch.uint8)
    given = out if extra is None else (out, extra.view(torch.float8_e4m3fn))
    with emulated_calls(policy):
        _, lse = case.run(epilogue=op, backend="emulator", out=given)
    result = out.clone()
    out.view(torch.uint8).fill_(GUARD)
    assert (memory == GUARD).all(), "bytes beside the rows were written"
    if extra is None:
        return result, lse
    inside = torch.ones(tokens, heads * case.v.shape[-1] // 16, dtype=torch.float8_e4m3fn)
    padding = swizzle(inside).view(torch.uint8) == 0
    assert (extra[padding] == GUARD).all(), "padding of the scales was written"
    return (result, extra.masked_fill(padding, 0)), lse


def prefill_ops(case: AttentionCase) -> list[EpilogueOp]:
    scales = torch.tensor([0.037, 250.0])
    gate = torch.randn(*case.q.shape[:-1], case.v.shape[-1]).to(case.q.dtype)
    return [Scale(scales, torch.float16), FP8(scales), NVFP4(torch.tensor(500.0)), Gate(gate)]


ALL_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def dense(dims: tuple[int, int]) -> AttentionCase:
    options = Options(causal=True, sink=True)
    return dense_case(2, 150, 140, Heads(2, 1, *dims), options, Source(torch.bfloat16, std=1.0))


def packed(dims: tuple[int, int]) -> AttentionCase:
    lengths = [130, 0, 3, 257], [40, 9, 0, 300]
    return packed_case(*lengths, Heads(2, 2, *dims), Options(causal=True), FP16)


SWEPT = [
    pytest.param(make, dims, marks=pytest.mark.sweep)
    for make in (dense, packed)
    for dims in ALL_DIMS
]


@pytest.mark.parametrize(("make", "dims"), [(dense, (96, 96)), (packed, (64, 64)), *SWEPT])
def test_prefill_stores_what_the_op_makes_of_the_output(make, dims):
    """Ragged ends, rows without a key, several heads and sequences: the bits that the specification
    makes of the kernel's own FP32 output, which is right."""
    case = make(dims)
    for policy in harness.POLICIES:
        x, lse = stored(case, Identity(torch.float32), policy)
        check(case, x, lse)
        for op in prefill_ops(case):
            result, its_lse = stored(case, op, policy)
            parameters: Parameters = (*op.tensors, *op.values)
            expected = op.reference(x, parameters, op.out_dtype(case.q.dtype))
            if isinstance(op, Gate):
                torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-6)
            elif isinstance(expected, tuple):
                assert same_bits(result, tuple(t.view(torch.uint8) for t in expected)), op
            else:
                assert same_bits(result, expected), op
            assert torch.equal(its_lse, lse)


def test_row_that_sees_nothing():
    """The sink's share apart, such a row is 0: what an op makes of 0 is stored, not 0."""
    case = dense_case(1, 200, 40, Heads(1, 1, 64, 64), Options(causal=True), FP16)
    gate = torch.randn(1, 200, 1, 64).half()
    gate[:, 10] = torch.nan
    for policy in harness.POLICIES:
        (packed, scales), _ = stored(case, NVFP4(), policy)
        assert not packed[:, :160].any()
        assert not scales.view(-1, 512)[0, :].any()  # rows 0–127, columns 0–3
        out, _ = stored(case, Gate(gate), policy)
        assert out[:, 10].isnan().all()
        assert not out[:, 11:160].any()
