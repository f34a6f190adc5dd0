"""Epilogue ops on a GPU: the bits of the specification, from either family of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments import any_floats, fill_rows, on_reference, on_triton, rounding_edges, same_bits
from launches import recorded

from cute_fmha import SkipStats, attention, make_workspace
from cute_fmha.epilogues import FP8, NVFP4, Gate, Identity, NVFP4Output, Scale
from cute_fmha.testing import (
    Case,
    Heads,
    Options,
    Source,
    dense_case,
    mla_case,
    packed_case,
    paged_case,
)

pytestmark = pytest.mark.gpu

E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BF16 = Source(torch.bfloat16, "cuda", std=1.0)
FP16 = Source(torch.float16, "cuda", std=1.0)
GQA = Heads(8, 2, 128, 128)
CASES: dict[str, tuple[Any, int | None]] = {
    "prefill": (lambda: dense_case(2, 300, 333, GQA, Options(causal=True), BF16), None),
    "prefill 96": (lambda: dense_case(2, 150, 333, Heads(3, 1, 96, 96), Options(), FP16), None),
    "prefill 256": (lambda: dense_case(1, 150, 333, Heads(2, 1, 256, 256), Options(), BF16), None),
    "prefill 512": (lambda: dense_case(1, 80, 133, Heads(2, 1, 512, 512), Options(), BF16), None),
    "packed": (lambda: packed_case([133, 0, 4], [140, 2, 0], GQA, Options(sink=True), FP16), None),
    "decode": (lambda: dense_case(4, 1, 3000, GQA, Options(causal=True), BF16), 1),
    "decode, splits": (lambda: paged_case([2, 0, 5], [5, 700, 0], 16, GQA, Options(), BF16), 4),
    "mla": (lambda: mla_case(2, [5, 0, 700], 64, 16, 576, Options(), BF16), 1),
    "mla, splits": (lambda: mla_case(1, [5, 0, 7000], 64, 128, 576, Options(), FP16), 4),
}


def on_both(op: Any, x: torch.Tensor) -> tuple[Any, Any]:
    """What Triton on the GPU, and the specification on the CPU, make of ``x``."""
    moved = type(op)(*(p.cuda() if isinstance(p, torch.Tensor) else p for p in vars(op).values()))
    actual = on_triton(moved, x.cuda())
    cpu = actual.cpu() if isinstance(actual, torch.Tensor) else [t.cpu() for t in actual]
    return cpu, on_reference(op, x)


@pytest.mark.parametrize("dv", [64, 96, 128])
def test_fragments_have_the_same_bits(dv):
    scales = torch.tensor([0.037, 3.0, 250.0])
    for x in (any_floats(400, 3, dv, seed=dv), torch.randn(400, 3, dv)):
        for op in (Scale(scales), FP8(scales), FP8(0.3), NVFP4(300.0), NVFP4(torch.ones(1)),
                   NVFP4(1e-30)):  # fmt: skip
            actual, expected = on_both(op, x)
            if isinstance(op, Scale):
                # Only NaN may differ: a GPU makes one of its own, without the operand's payload.
                assert torch.equal(actual.isnan(), expected.isnan())
                actual, expected = actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)
            assert same_bits(actual, expected), op


def test_rounding_edges_have_the_same_bits():
    edges = rounding_edges(E4M3)
    assert same_bits(*on_both(FP8(1.0), fill_rows(edges, 64)))
    peaks = edges[:, None] * torch.tensor([6.0]) * torch.linspace(-1, 1, 16)
    assert same_bits(*on_both(NVFP4(), fill_rows(peaks.flatten(), 64)))
    edges = rounding_edges(E2M1)
    edges = edges[edges.abs() <= 6]
    blocks = torch.nn.functional.pad(edges, (0, -len(edges) % 15)).view(-1, 15)
    x = fill_rows(torch.nn.functional.pad(blocks, (0, 1), value=6.0).flatten(), 64)
    assert same_bits(*on_both(NVFP4(), x))


@pytest.mark.parametrize(("make", "num_splits"), CASES.values(), ids=CASES)
def test_calls_store_what_the_op_makes_of_the_output(make, num_splits):
    """The portable kernels: their FP32 output is the op's input, bit by bit."""
    case: Case = make()
    heads = case.q.shape[-2]
    scale = torch.linspace(0.01, 3.0, heads, device="cuda")
    call = {"backend": "triton", "num_splits": num_splits}
    # At 256 the ops have smaller tiles than the plain kernel, and other tiles other sums.
    tiles = {"tile_m": 64, "tile_n": 32} if case.q.shape[-1] == 256 else {}
    with recorded(portable=True, **tiles):
        x, _ = case.run(epilogue=Identity(torch.float32), **call)
        for op in (Scale(scale), FP8(scale), NVFP4(torch.full((1,), 77.0, device="cuda"))):
            result, _ = case.run(epilogue=op, **call)
            expected = op.reference(x, (*op.tensors, *op.values), op.out_dtype(case.q.dtype))
            tensors = result if isinstance(result, tuple) else (result,)
            wanted = expected if isinstance(expected, tuple) else (expected,)
            same = [
                (a.view(torch.uint8) != e.contiguous().view(torch.uint8)).float().mean().item()
                for a, e in zip(tensors, wanted, strict=True)
            ]
            # Another epilogue may fuse the combine's arithmetic in another way: an ulp of x.
            assert max(same) <= 1e-3, (op, same)
        gate = torch.randn_like(x).to(case.q.dtype)
        out, _ = case.run(epilogue=Gate(gate), **call)
        torch.testing.assert_close(out.float(), x * gate.float().sigmoid(), rtol=2**-7, atol=2**-20)


def test_planned_kernels_take_the_ops():
    """A call that would go to a Hopper kernel goes to a portable one instead."""
    case = dense_case(1, 200, 333, GQA, Options(causal=True), BF16)
    with recorded(portable=True):
        x, _ = case.run(epilogue=Identity(torch.float32), backend="triton")
    out, _ = case.run(epilogue=FP8(0.01), backend="auto")
    assert out.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(out.float() * 0.01, x, rtol=1 / 15, atol=1e-4)


def test_graphs_follow_the_scale():
    """One launch with ``out=``; the op's tensor is read at every replay."""
    case = dense_case(2, 1, 900, GQA, Options(), BF16)
    scale = torch.full((1,), 10.0, device="cuda")
    op, workspace = NVFP4(scale), make_workspace("cuda")
    out = NVFP4Output(
        *(torch.zeros_like(t) for t in attention(case.q, case.k, case.v, epilogue=op))
    )

    def step() -> None:
        attention(case.q, case.k, case.v, epilogue=op, out=out, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (10.0, 300.0):
        scale.fill_(value)
        graph.replay()
        expected = attention(case.q, case.k, case.v, epilogue=NVFP4(value))
        assert same_bits(out, expected)


def test_counters_go_with_an_op():
    case = dense_case(1, 200, 333, GQA, Options(causal=True), BF16)
    stats = SkipStats("cuda")
    case.run(epilogue=FP8(0.01), backend="triton", stats=stats)
    assert stats.read()[1] > 0
