"""Epilogue ops at the end of the MLA decode kernels: the specification's bits, split or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragments import allocate, on_reference, same_bits

from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Gate, Identity, Scale
from cute_fmha.epilogues.base import kind_of

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import mla_harness as harness
import store_harness as stores
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Int32

from cute_fmha.emulator.capture import compile_kernel, emulate
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_transposed_plan import MOST_ROWS
from cute_fmha.kernels.blackwell.epilogue import Op, device_view
from cute_fmha.kernels.blackwell.mla_decode import MlaDecode
from cute_fmha.kernels.blackwell.mla_decode_few import MlaDecodeFew
from cute_fmha.kernels.blackwell.mla_decode_few_plan import make_few_plan
from cute_fmha.kernels.blackwell.mla_decode_plan import make_plan

BF16 = torch.bfloat16
OPS = {
    "scale": lambda heads: Scale(torch.linspace(0.1, 3.0, heads), torch.float16),
    "fp8": lambda heads: FP8(torch.tensor(0.3)),
    "nvfp4": lambda heads: NVFP4(torch.tensor([0.7])),
}


def launch(op: EpilogueOp, case: Any, num_splits: int, policy: Any) -> Any:
    """What the kernel makes of the case's attention with ``op``: [tokens, heads, …]."""
    batch, seqlen_q, heads, width = case.q.shape
    tokens = batch * seqlen_q
    parameters: tuple[Any, ...] = (*op.tensors, *op.values)
    out, extra = allocate(op, torch.zeros(tokens, heads, 512))
    cut = Cut.WHOLE if num_splits == 1 else Cut.FIXED
    kinds = tuple(map(kind_of, parameters))
    compiled_in = Op(op.key, kinds, None if extra is None else kind_of(extra))
    features, count = harness.features_of(case), seqlen_q * heads
    kernel: Any
    if count <= MOST_ROWS:
        kernel = MlaDecodeFew(
            make_few_plan(width, 512, BF16, out.dtype, features, count, cut=cut, op=compiled_in)
        )
    else:
        page_size = case.kv_cache.shape[1]
        kernel = MlaDecode(
            make_plan(width, BF16, out.dtype, features, page_size, count, cut, compiled_in)
        )
    workspace = harness.Workspace.make(1 << 20)
    rows = device_view(out).view(batch, seqlen_q, heads, -1)
    tensors = harness.arguments(case, rows, workspace)
    values = (*parameters, *(() if extra is None else (extra,)))
    arguments = (
        tensors, harness.scalars_of(case, num_splits=num_splits), Int32(8),
        tuple(map(stores.argument, values)) or None, CUstream(0),
    )  # fmt: skip
    emulate(compile_kernel(kernel, *arguments), *arguments, policy=policy)
    assert not workspace.counters.any()
    return op.result(out, extra)


@pytest.mark.parametrize(
    ("name", "heads", "num_splits"),
    [
        ("nvfp4", 40, 2), ("fp8", 100, 1), ("nvfp4", 12, 2), ("fp8", 20, 1),
        *(
            pytest.param(name, heads, num_splits, marks=pytest.mark.sweep)
            for name in OPS for heads in (12, 20, 40, 100) for num_splits in (1, 3)
        ),
    ],
)  # fmt: skip
def test_ops_have_the_specifications_bits(name, heads, num_splits):
    """Of the FP32 output that the same kernel leaves without an op."""
    case = harness.case_of(heads, 1, [1, 300, 0, 65])
    policy = harness.POLICIES[2]
    x = launch(Identity(torch.float32), case, num_splits, policy)
    op = OPS[name](heads)
    assert same_bits(launch(op, case, num_splits, policy), on_reference(op, x))


@pytest.mark.sweep
@pytest.mark.parametrize("heads", [5, 20])
def test_an_op_that_reads_a_tensor_for_every_row(heads):
    case = harness.case_of(heads, 4, [300, 65])
    gate = Gate(torch.randn(2, 4, heads, 512, dtype=BF16))
    policy = harness.POLICIES[1]
    x = launch(Identity(torch.float32), case, 2, policy)
    result = launch(gate, case, 2, policy)
    torch.testing.assert_close(result, on_reference(gate, x), rtol=2**-7, atol=0)
