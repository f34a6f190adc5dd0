"""Epilogue ops: formats against definitions of their own, Triton against the specification bit by
bit, what the calls return and refuse."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any, cast

import pytest
import torch
from fragments import (
    E2M1,
    E4M3,
    SPECIAL_BLOCKS,
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

import cute_fmha
from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Gate, Identity, NVFP4Output, Scale
from cute_fmha.epilogues.base import resolve
from cute_fmha.epilogues.fp8 import to_e4m3
from cute_fmha.epilogues.nvfp4 import swizzle, to_e2m1
from cute_fmha.kernels.triton.plan import interpreting
from cute_fmha.testing import (
    Case,
    Heads,
    MlaCase,
    Options,
    Source,
    dense_case,
    error_report,
    mla_case,
    packed_case,
    paged_case,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN, inf and zeros on purpose
triton_only = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 is not set")

HEADS = torch.tensor([0.037, 1.0, 3.0, 250.0])


def nearest_code(x: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """The code of the nearest of ``magnitudes``, in FP64, ties to the even code; without sign."""
    values = magnitudes.double()
    x = x.abs().double().clamp(max=2 * float(values[-1]))
    above = torch.searchsorted(values, x).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - x, x - values[below]
    even = (up == down) & (above % 2 == 0)
    return torch.where((up < down) | even, above, below)


def test_e4m3_is_the_nearest():
    x = torch.cat((rounding_edges(E4M3), any_floats(20000)))
    x = x[~x.isnan()]
    expected = nearest_code(x, E4M3) | (x.signbit().long() << 7)
    assert torch.equal(to_e4m3(x).view(torch.uint8).long(), expected)
    nan = torch.tensor([torch.nan, -torch.nan])
    assert to_e4m3(nan).view(torch.uint8).tolist() == [0x7F, 0x7F]


def test_e2m1_is_the_nearest():
    x = torch.cat((rounding_edges(E2M1), any_floats(20000), torch.randn(20000) * 3))
    x = x[~x.isnan()]
    expected = nearest_code(x, E2M1) | (x.signbit().long() << 3)
    assert torch.equal(to_e2m1(x).long(), expected)
    assert to_e2m1(torch.tensor([torch.nan, -torch.nan])).tolist() == [7, 7]


def scale_address(row: int, column: int, columns: int) -> int:
    """The byte of a scale, as CUTLASS writes the layout: atoms ((32, 4), 4) : ((16, 4), 1), and
    the atoms of one 128-row block after each other."""
    atoms_per_row_block = -(-columns // 4)
    atom = row // 128 * atoms_per_row_block + column // 4
    return atom * 512 + row % 128 % 32 * 16 + row % 128 // 32 * 4 + column % 4


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (5, 6), (128, 8), (129, 3), (300, 18)])
def test_swizzle(rows, columns):
    scales = torch.randint(1, 256, (rows, columns), dtype=torch.uint8)
    flat = swizzle(scales.view(torch.float8_e4m3fn)).view(torch.uint8).flatten()
    assert flat.numel() % 512 == 0
    for row in range(rows):
        for column in range(columns):
            address = scale_address(row, column, columns)
            assert flat[address] == scales[row, column]
            flat[address] = 0
    assert not flat.any(), "padding is not zero"


def test_scales_are_where_cutlass_reads_them():
    """NVIDIA's own layout of the scales of a ``[rows, 16 · columns]`` operand."""
    cutlass = pytest.importorskip("cutlass")
    from cutlass import cute
    from cutlass.utils import blockscaled_layout as layouts

    found = {}

    @cute.jit
    def visit():
        layout = layouts.tile_atom_to_shape_SF((384, 16 * 12, 1), 16)
        for row in cutlass.range_constexpr(0, 384, 7):
            for column in cutlass.range_constexpr(12):
                found[row, column] = layout((row, 16 * column + 5, 0))

    visit()
    assert found == {place: scale_address(*place, 12) for place in found}
    assert len(found) == 55 * 12


OUTSIDE = """
import sys, types, unittest
import torch
sys.modules["expecttest"] = types.ModuleType("expecttest")  # imported there, not used
sys.modules["expecttest"].TestCase = unittest.TestCase
from torch.testing._internal import common_quantized as outside
from cute_fmha.epilogues.nvfp4 import NVFP4, swizzle, to_e2m1

torch.manual_seed(0)
x = torch.cat((torch.randn(10000) * 4, torch.arange(-64, 65) / 8, torch.tensor([1e30, -0.0])))
assert torch.equal(outside._f32_to_floatx_unpacked(x, 2, 1), to_e2m1(x))
scales = torch.randint(0, 127, (300, 18), dtype=torch.uint8)
blocked = outside.to_blocked(scales).flatten()
assert torch.equal(blocked, swizzle(scales.view(torch.float8_e4m3fn)).view(torch.uint8).flatten())
y = (torch.randn(5, 2, 64) * 3).bfloat16().clamp(-6, 6)
y[..., ::16] = 6  # every block's scale is 1
packed = NVFP4.reference(y.float(), (1.0,), torch.uint8)[0]
pairs = outside._bfloat16_to_float4_e2m1fn_x2(y.flatten(0, 1)).view(torch.uint8)
assert torch.equal(pairs, packed.flatten(0, 1))
"""


def test_formats_are_those_of_pytorchs_own_tests(tmp_path):
    """Rounding, order in a byte, and swizzle by what PyTorch tests its block-scaled GEMMs with; in
    a process of its own, since that module changes global settings."""
    subprocess.run([sys.executable, "-c", OUTSIDE], check=True, cwd=tmp_path)


def decoded(result: NVFP4Output, shape: torch.Size, global_scale: float) -> torch.Tensor:
    """FP64 from the bytes alone: nibbles by exponent and mantissa, scales by `scale_address`."""
    *_, heads, dv = shape
    code = torch.stack((result.packed & 15, result.packed >> 4), -1).flatten(-2).long()
    exponent, mantissa = (code >> 1) & 3, (code & 1).double()
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    value = torch.where(code >= 8, -magnitude, magnitude).reshape(-1, heads * dv)
    columns = heads * dv // 16
    addresses = [
        [scale_address(row, column, columns) for column in range(columns)]
        for row in range(value.shape[0])
    ]
    scales = result.scales.flatten()[torch.tensor(addresses)].double()
    return (value * scales.repeat_interleave(16, 1) / global_scale).view(shape)


@pytest.mark.parametrize("global_scale", [1.0, 37.5, 448 * 6 / 4.5])
def test_nvfp4_decodes_to_what_was_stored(global_scale):
    x = torch.randn(131, 3, 96)
    result = on_reference(NVFP4(global_scale), x)
    assert result.packed.shape == (131, 3, 48)
    assert result.scales.shape == (256, 20)
    value = decoded(result, x.shape, global_scale)
    # Half the widest gap of e2m1 is 1, and so is at most what a scale rounded down cuts off.
    step = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True) / 6 * (1 + 1 / 16)
    error = (value - x).unflatten(-1, (-1, 16)).abs()
    assert (error <= step).all()
    assert error_report(value, x).cosine > 0.99
    exact = torch.tensor([0.0, 0.5, -1.0, 1.5, -2.0, 3.0, 4.0, -6.0]).repeat(12).view(1, 1, 96)
    assert torch.equal(decoded(on_reference(NVFP4(), exact), exact.shape, 1.0), exact.double())


@pytest.mark.parametrize("run", [on_reference, pytest.param(on_triton, marks=triton_only)])
@pytest.mark.parametrize(("leading", "global_scale", "packed", "scale"), SPECIAL_BLOCKS)
def test_nvfp4_special_blocks(run, leading, global_scale, packed, scale):
    """Zeros, infinities, NaN, scales that over- and underflow: bytes and scale of the block."""
    result = run(NVFP4(global_scale), block_of(*leading))
    assert result.packed[0, 0, : len(packed)].tolist() == packed
    assert not result.packed[0, 0, 8:].any()
    assert result.scales.view(torch.uint8)[0, :4].tolist() == [scale, 0, 0, 0]


def ops_for(x: torch.Tensor) -> list[EpilogueOp]:
    heads = x.shape[-2]
    scales = HEADS[:heads]
    return [
        Scale(0.37), Scale(scales), Scale(torch.tensor([2.5]), torch.float32),
        FP8(1.0), FP8(scales), FP8(torch.tensor(0.3)),
        NVFP4(), NVFP4(300.0), NVFP4(torch.tensor([0.7])), NVFP4(1e30), NVFP4(1e-30),
    ]  # fmt: skip


@triton_only
@pytest.mark.parametrize("dv", [64, 96])
@pytest.mark.parametrize("heads", [1, 3])
def test_fragments_have_the_same_bits(heads, dv):
    """Every exponent, the values of a real output, and the edges of both formats."""
    tokens = 40
    fragments = [
        any_floats(tokens, heads, dv, seed=dv),
        torch.randn(tokens, heads, dv),
        torch.randn(tokens, heads, dv) * 2.0 ** torch.randint(-20, 20, (tokens, heads, 1)),
    ]
    for x in fragments:
        for op in ops_for(x):
            assert same_bits(on_triton(op, x), on_reference(op, x)), op


@triton_only
def test_rounding_edges_have_the_same_bits():
    x = fill_rows(rounding_edges(E4M3), 64)
    assert same_bits(on_triton(FP8(1.0), x), on_reference(FP8(1.0), x))
    elements, scales = nvfp4_edges()
    expected = on_reference(NVFP4(), elements)
    assert (expected.scales.view(torch.uint8)[: elements.shape[0]] == 0x38).any()
    assert same_bits(on_triton(NVFP4(), elements), expected)
    assert same_bits(on_triton(NVFP4(), scales), on_reference(NVFP4(), scales))


ODD = Heads(3, 1, 96, 96)
GQA = Heads(4, 2, 64, 64)
FP16 = Source(torch.float16, std=1.0)
FP32 = Source(torch.float32, std=1.0)
CASES: dict[str, tuple[Any, int | None]] = {
    "prefill": (lambda: dense_case(2, 65, 97, ODD, Options(causal=True), FP16), None),
    "prefill, packed": (lambda: packed_case([33, 0, 4], [40, 2, 0], GQA, Options(), FP32), None),
    "decode": (lambda: dense_case(2, 3, 97, GQA, Options(sink=True), FP32), 1),
    "decode, splits": (lambda: dense_case(2, 3, 97, GQA, Options(causal=True), FP16), 3),
    "decode, packed queries": (lambda: paged_case([2, 0, 5], [5, 70, 0], 16, GQA, Options(), FP16),
                               2),
    "mla, splits": (lambda: mla_case(2, [5, 0, 70], 16, 3, 576, Options(), FP16), 2),
}  # fmt: skip


def parts(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@triton_only
@pytest.mark.parametrize(("make", "num_splits"), CASES.values(), ids=CASES)
def test_calls_store_what_the_op_makes_of_the_output(make, num_splits):
    """On either backend: the bits that the specification makes of that backend's FP32 output."""
    case: Case = make()
    heads = case.q.shape[-2]
    for backend in ("triton", "reference"):
        call = {"backend": backend, "num_splits": num_splits}
        x, expected_lse = case.run(epilogue=Identity(torch.float32), **call)
        for op in (Scale(HEADS[:heads]), FP8(HEADS[:heads]), NVFP4(torch.tensor([77.0]))):
            result, lse = case.run(epilogue=op, **call)
            expected = op.reference(x, (*op.tensors, *op.values), op.out_dtype(case.q.dtype))
            assert same_bits(parts(result), parts(expected)), (backend, op)
            assert torch.equal(lse, expected_lse)


@triton_only
@pytest.mark.parametrize(("make", "num_splits"), CASES.values(), ids=CASES)
def test_gate(make, num_splits):
    case: Case = make()
    for backend in ("triton", "reference"):
        call = {"backend": backend, "num_splits": num_splits}
        x, _ = case.run(epilogue=Identity(torch.float32), **call)
        gate = torch.randn(*x.shape, 2)[..., 0].half()  # no dimension of it is contiguous
        out, _ = case.run(epilogue=Gate(gate), **call)
        assert out.dtype == case.q.dtype
        expected = x * gate.float().sigmoid()
        torch.testing.assert_close(out.float(), expected, rtol=2**-10, atol=2**-24)


# -- calls ----------------------------------------------------------------------------------------


def small(**call: Any) -> Any:
    case = dense_case(2, 3, 5, ODD, Options(), FP16)
    return cute_fmha.attention(case.q, case.k, case.v, **({"backend": "reference"} | call))


BACKENDS = ["reference", pytest.param("triton", marks=triton_only)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_given_as_it_is_returned(backend):
    call = {"epilogue": NVFP4(9.0), "backend": backend}
    result = small(**call)
    assert isinstance(result, NVFP4Output)
    packed, scales = result
    assert (packed.shape, packed.dtype) == ((2, 3, 3, 48), torch.uint8)
    assert (scales.shape, scales.dtype) == ((128, 20), torch.float8_e4m3fn)
    again, lse = small(**call, return_lse=True)
    assert same_bits(again, result)
    mine = NVFP4Output(torch.zeros_like(packed), torch.zeros_like(scales))
    for out in (mine, tuple(mine)):
        for tensor in mine:
            tensor.view(torch.uint8).zero_()
        back = small(**call, out=out)
        assert back.packed is mine.packed
        assert back.scales is mine.scales
        assert same_bits(back, result)
    my_lse = torch.zeros_like(lse)
    (back, back_lse) = small(**call, out=(mine, my_lse), return_lse=True)
    assert back.packed is mine.packed
    assert back_lse is my_lse
    assert torch.equal(my_lse, lse)
    back, new_lse = small(**call, out=mine, return_lse=True)
    assert torch.equal(new_lse, lse)
    wide = torch.full((2, 3, 3, 50), 0xAA, dtype=torch.uint8)
    small(**call, out=(wide[..., :48], scales))
    assert torch.equal(wide[..., :48], packed)
    assert (wide[..., 48:] == 0xAA).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_out(backend):
    out = torch.zeros(2, 3, 3, 96).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.01])
    assert small(epilogue=FP8(scale), out=out, backend=backend) is out
    x = small(epilogue=Identity(torch.float32), backend=backend)
    torch.testing.assert_close(out.float() * 0.01, x, rtol=1 / 16, atol=0.01 * 2**-10)


def test_tensors_are_read_by_every_call():
    """The op's class outlives the call, its tensors do not, and equal keys share no numbers."""
    scale = torch.tensor([1.0])
    op = Scale(scale)
    once = small(epilogue=op)
    scale.fill_(2.0)
    assert torch.equal(small(epilogue=op), 2 * once)
    assert torch.equal(small(epilogue=Scale(4.0)), 4 * once)
    alive = weakref.ref(scale)
    del scale, op
    gc.collect()
    assert alive() is None


META = torch.zeros(1, device="meta")
CALL_REFUSALS = [
    (Scale(torch.zeros(2)), {}, r"Scale scale: got \(2,\); allowed: one element or \[Hq\] = \[3\]"),
    (FP8(META), {}, "epilogue tensor device: got meta; allowed: cpu"),
    (NVFP4(META), {}, "epilogue tensor device: got meta; allowed: cpu"),
    (Gate(torch.zeros(2, 3, 3, 64)), {}, r"gate: got \(2, 3, 3, 64\); allowed: \(2, 3, 3, 96\)"),
    (NVFP4(), {"out": torch.zeros(2, 3, 3, 48)}, "out: got Tensor; allowed: a pair.*nvfp4"),
    (NVFP4(), {"out": (torch.zeros(1),) * 3}, "out: got tuple; allowed: a pair"),
    (NVFP4(), {"out": ((torch.zeros(1),) * 2, torch.zeros(1))}, "with return_lse"),
    (
        NVFP4(), {"out": (torch.zeros(2, 3, 3, 48), torch.zeros(128, 20))},
        r"out \(second\) dtype: got torch.float32; allowed: torch.float8_e4m3fn",
    ),
    (
        NVFP4(),
        {"out": (torch.zeros(2, 3, 3, 48), torch.zeros(6, 18).to(torch.float8_e4m3fn))},
        r"out \(second\) shape: got \(6, 18\); allowed:.*= \[128, 20\]",
    ),
    (
        NVFP4(), {"out": (torch.zeros(2, 3, 3, 96), swizzle(to_e4m3(torch.ones(6, 18))))},
        "out dtype: got torch.float32; allowed: torch.uint8",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "call", "message"), CALL_REFUSALS)
def test_calls_refuse(op, call, message):
    with pytest.raises(ValueError, match=message):
        small(epilogue=op, **call)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Identity(torch.int8), "Identity dtype must be one of"),
        (lambda: Scale(1.0, torch.uint8), "Scale dtype must be one of"),
        (lambda: Scale(float("nan")), "Scale scale must be a finite number or a tensor; got nan"),
        (lambda: Scale(cast(Any, "1")), "must be a finite number"),
        (lambda: Scale(torch.zeros(2, 2)), r"one element or \[Hq\]; got torch.float32 \(2, 2\)"),
        (lambda: FP8(torch.zeros(1).half()), "FP8 scale as a tensor must be float32.*float16"),
        (lambda: FP8(0.0), "FP8 scale must be > 0; got 0.0"),
        (
            lambda: NVFP4(-1.0),
            r"NVFP4 global_scale must be a number from 2\*\*-100 to 2\*\*100; got -1.0",
        ),
        (lambda: NVFP4(float("inf")), "global_scale must be a number from .*; got inf"),
        (lambda: NVFP4(torch.zeros(2)), r"must hold one float32 element; got torch.float32 \(2,\)"),
    ],
)
def test_ops_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_of_parameters_are_refused():
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(NotImplementedError, match="requires_grad is True"):
        small(epilogue=Scale(scale))


def test_mla_output_shapes():
    case = mla_case(2, [5, 17], 16, 3)
    assert isinstance(case, MlaCase)
    (packed, scales), _ = case.run(epilogue=NVFP4(), backend="reference")
    assert packed.shape == (2, 2, 3, 256)
    assert scales.shape == (128, 96)


# -- an op of one's own ---------------------------------------------------------------------------


class ReferenceOnly(EpilogueOp):
    key = "test:reference-only"

    @staticmethod
    def reference(x, parameters, out_dtype):
        return (-x).to(out_dtype)


@triton_only
@pytest.mark.parametrize("seqlen_q", [65, 3])
def test_own_op(seqlen_q):
    case = dense_case(2, seqlen_q, 97, GQA, Options(causal=True), FP16)
    weight = torch.rand(2 * seqlen_q)
    for backend in ("reference", "triton"):
        x, _ = case.run(epilogue=Identity(torch.float32), backend=backend)
        out, _ = case.run(epilogue=Squared(weight), backend=backend)
        assert torch.equal(out, Squared.reference(x, (weight,), torch.float16))


@triton_only
def test_op_without_triton_is_refused_there():
    assert torch.equal(small(epilogue=ReferenceOnly()), -small())
    with pytest.raises(NotImplementedError, match="'test:reference-only' has no Triton function"):
        small(epilogue=ReferenceOnly(), backend="triton")


def test_keys_belong_to_one_class():
    assert resolve("test:squared") is Squared
    with pytest.raises(ValueError, match="'nvfp4' belongs to NVFP4"):
        type("Other", (EpilogueOp,), {"key": "nvfp4"})
    assert resolve("nvfp4") is NVFP4
    type(Squared.__name__, (EpilogueOp,), {**vars(Squared)})  # a module that is loaded again
    assert resolve("test:squared") is not Squared
