"""The custom ops under PyTorch's own checks, under torch.compile, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from fragments import same_bits
from op_calls import op_call
from torch._dynamo.testing import CompileCounterWithBackend

import cute_fmha
from cute_fmha import SkipSoftmax, SkipStats, ops, skip_softmax
from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Identity, Scale
from cute_fmha.epilogues.base import Extra
from cute_fmha.testing import (
    AttentionCase,
    Heads,
    MlaCase,
    Options,
    Source,
    check,
    dense_case,
    mla_case,
    packed_case,
    paged_case,
    skip_friendly,
)

GQA = Heads(4, 2, 64, 64)
ALL = Options(0.2, True, (40, -1), 3.0, True, (64, 64, 0.7))
CASES = {
    "dense": lambda: dense_case(2, 5, 9, GQA, Options(causal=True)),
    "dense, all options": lambda: dense_case(2, 130, 200, GQA, ALL, seqused_k=[200, 3]),
    "packed": lambda: packed_case([3, 0, 4], [5, 2, 0], GQA),
    "paged": lambda: paged_case(2, [5, 17, 0], 16, GQA, Options(sink=True)),
    "paged, packed queries": lambda: paged_case([2, 0, 5], [5, 17, 0], 16, GQA),
    "mla": lambda: mla_case(2, [5, 0, 17], 16, 3),
}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@pytest.mark.parametrize("wanted", [{}, {"return_lse": True}])
def test_max_logits(wanted, monkeypatch):
    case = mla_case(2, [5, 0, 17], 16, 3)
    arguments = case.q, case.kv_cache, case.block_table, case.cache_seqlens

    def call(q, cache, table, lengths):
        return cute_fmha.mla_decode(
            q,
            cache,
            table,
            lengths,
            **case.common,
            **wanted,
            return_max_logits=True,
            backend="reference",
        )

    expected = call(*arguments)
    assert len(expected) == 2 + len(wanted)
    for got, want in zip(compiled(call)(*arguments), expected, strict=True):
        assert torch.equal(got, want)
    torch.library.opcheck(*op_call(lambda: call(*arguments), monkeypatch))


@cases
@pytest.mark.parametrize("counting", [False, True])
def test_opcheck(make, counting, monkeypatch):
    """Schema (which arguments are written), autograd registration, fakes, dynamic shapes."""
    call = {}
    if counting:
        call = {"stats": SkipStats("cpu"), "skip": SkipSoftmax(torch.tensor([0.1]))}
    case = make()
    torch.library.opcheck(*op_call(lambda: case.run(backend="reference", **call), monkeypatch))


EPILOGUES: dict[str, Callable[[], EpilogueOp]] = {
    "scale": lambda: Scale(0.5),
    "fp8": lambda: FP8(torch.tensor([0.01])),
    "nvfp4": lambda: NVFP4(torch.tensor([9.0])),
}
epilogues = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)


class Peaks(EpilogueOp):
    """Two outputs, and two parameters of different kinds."""

    key = "test:peaks"

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (torch.tensor(3.0),)

    @property
    def values(self) -> tuple[float, ...]:
        return (2.0,)

    def extra(self, tokens: int, heads: int, head_dim_v: int) -> Extra:
        return Extra((tokens, heads), torch.float32, False)

    @staticmethod
    def reference(x, parameters, out_dtype):
        tensor, value = parameters
        return (x * tensor).to(out_dtype), x.abs().amax(-1).flatten(0, -2) * value


@pytest.mark.parametrize("epilogue", [*EPILOGUES.values(), Peaks], ids=[*EPILOGUES, "two outputs"])
@pytest.mark.parametrize("make", [CASES["packed"], CASES["mla"]], ids=["packed", "mla"])
def test_opcheck_with_an_epilogue(make, epilogue, monkeypatch):
    """PyTorch 2.13 cannot compare FP8 tensors, which some of its checks do."""
    case, op_object = make(), epilogue()
    op, arguments = op_call(lambda: case.run(backend="reference", epilogue=op_object), monkeypatch)
    checks = ["test_autograd_registration", "test_faketensor"]
    if not any(getattr(a, "dtype", None) == torch.float8_e4m3fn for a in arguments):
        checks += ["test_schema", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["attention", "mla_decode"])
def test_schema_declares_every_written_argument(name):
    schema = getattr(torch.ops.cute_fmha, name).default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    mla = ["max_logits"] if name == "mla_decode" else []
    assert written == ["out", "lse", *mla, "workspace", "stats", "extra"]
    assert list(schema.returns) == []


def compiled(function, backend: Any = "aot_eager", **options: Any):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def test_op_is_called_with_what_it_declares(monkeypatch):
    for make in CASES.values():
        case = cast(Any, make())
        op, arguments = op_call(partial(case.run, backend="reference"), monkeypatch)
        assert len(arguments) == len(op._schema.arguments)


@cases
def test_compiles_into_one_graph(make):
    case = make()
    out, lse = compiled(lambda: case.run(backend="reference"))()
    expected_out, expected_lse = case.run(backend="reference")
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    check(case, out, lse)


def surrounded(case: AttentionCase | MlaCase, bias: torch.Tensor) -> torch.Tensor:
    """A graph with work before and after the op, which functionalisation must keep in order."""
    out, lse = replace(case, q=case.q * 2).run(backend="reference")
    return out * bias + lse.mean()


@pytest.mark.parametrize("make", [CASES["dense"], CASES["mla"]], ids=["dense", "mla"])
def test_compiles_inside_a_graph(make):
    case, bias = make(), torch.tensor(0.5)
    actual = compiled(surrounded)(case, bias)
    assert torch.equal(actual, surrounded(case, bias))


def test_compiled_outputs_are_written_in_place():
    case = dense_case(1, 3, 5, GQA)
    out, lse = torch.zeros(1, 3, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 4, 3)

    def step(out: torch.Tensor, lse: torch.Tensor) -> None:
        case.run(out=(out, lse), backend="reference")

    compiled(step)(out, lse)
    check(case, out, lse)


def test_compiled_calls_count_skip_and_follow_the_context():
    source, skip = skip_friendly(Source(torch.float32, gap_block=128, seed=5))
    case = dense_case(1, 128, 1536, Heads(1, 1, 64, 64), Options(), source)
    stats, rate = SkipStats("cpu"), torch.tensor([skip.threshold])

    def counted(**call: Any) -> tuple[int, int]:
        stats.reset()
        step = compiled(lambda: case.run(stats=stats, backend="reference", **call))
        step()
        return stats.read()

    assert counted() == (0, 12)
    skipped, total = counted(skip=skip)
    assert 0 < skipped < total == 12
    assert counted(skip=SkipSoftmax(rate)) == (skipped, total)
    ambient = compiled(lambda: case.run(stats=stats, backend="reference"))
    ambient()
    stats.reset()
    with skip_softmax(skip):
        ambient()
    assert stats.read() == (skipped, total), "the graph outside the context was reused inside"
    stats.reset()
    ambient()
    assert stats.read() == (0, total)


def test_compiled_graph_is_reused_for_other_lengths():
    """``cache_seqlens`` is data: new lengths recompile nothing."""
    case = mla_case(1, [30, 40], 16, 3)
    graphs = CompileCounterWithBackend("aot_eager")
    step = compiled(
        lambda lengths: replace(case, cache_seqlens=lengths).run(backend="reference"), graphs
    )
    for lengths in ([30, 40], [3, 0], [17, 39]):
        tensor = torch.tensor(lengths, dtype=torch.int32)
        check(replace(case, cache_seqlens=tensor), *step(tensor))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("paged", [False, True])
def test_dynamic_shapes_compile_once(paged):
    """Another batch size or length recompiles nothing, or a server would run out of its limit.

    The sizes of the first call differ from each other: PyTorch assumes that equal ones stay equal.
    """
    graphs = CompileCounterWithBackend("aot_eager")
    step = compiled(
        lambda q, k, v, options: cute_fmha.attention(q, k, v, **options, backend="reference"),
        graphs, dynamic=True,
    )  # fmt: skip
    counts = []
    for batch, length in ((5, 11), (3, 7), (6, 9), (9, 37)):
        options = Options(causal=True)
        if paged:
            lengths = [length * 9 + i for i in range(batch)]
            case = paged_case(length, lengths, 16, GQA, options)
        else:
            case = dense_case(batch, length, length + 2, GQA, options)
        check(case, step(case.q, case.k, case.v, case.common), None)
        counts.append(graphs.frame_count)
    assert counts[0] > 0
    assert counts[-1] == counts[0]


def test_dynamic_mla_batch_compiles_once():
    graphs = CompileCounterWithBackend("aot_eager")
    step = compiled(
        lambda *tensors: cute_fmha.mla_decode(*tensors, backend="reference"), graphs, dynamic=True
    )
    counts = []
    for batch in (5, 4, 9):
        case = mla_case(2, list(range(90, 90 + batch)), 16, 3)
        out = step(case.q, case.kv_cache, case.block_table, case.cache_seqlens)
        check(case, out, None)
        counts.append(graphs.frame_count)
    assert counts[-1] == counts[0] > 0


def test_compiles_with_a_cast():
    case = dense_case(1, 3, 5, GQA)
    out, lse = compiled(lambda: case.run(epilogue=Identity(torch.float32), backend="reference"))()
    assert out.dtype == torch.float32
    check(case, out, lse)


@epilogues
@pytest.mark.parametrize("inside", [False, True], ids=["op outside", "op inside"])
@pytest.mark.parametrize("make", [CASES["dense"], CASES["mla"]], ids=["dense", "mla"])
def test_compiles_with_an_epilogue(make: Any, epilogue: Any, inside: bool) -> None:
    """One graph, whether the op is made in it or before; its tensors are inputs, not constants."""
    case, op = make(), epilogue()
    parameter = (*op.tensors, *op.values)[0]

    def step(parameter: Any) -> Any:
        used = type(op)(parameter) if inside else op
        out, lse = case.run(epilogue=used, backend="reference")
        first = out.packed if isinstance(op, NVFP4) else out
        return out, lse, first.view(torch.uint8)

    graphs = CompileCounterWithBackend("aot_eager")
    function = compiled(step, graphs)
    for _ in range(2):
        (out, lse, _), (expected, expected_lse, _) = function(parameter), step(parameter)
        assert type(out) is type(expected)
        assert same_bits(out, expected)
        assert torch.equal(lse, expected_lse)
        if isinstance(parameter, torch.Tensor):
            parameter.mul_(3)
    assert graphs.frame_count == 1


def test_dynamic_batch_with_a_second_output_compiles_once():
    graphs = CompileCounterWithBackend("aot_eager")
    step = compiled(
        lambda q, k, v: cute_fmha.attention(q, k, v, epilogue=NVFP4(9.0), backend="reference"),
        graphs, dynamic=True,
    )  # fmt: skip
    counts = []
    for batch, length in ((5, 11), (3, 7), (6, 90)):
        case = dense_case(batch, length, length + 2, GQA)
        packed, scales = step(case.q, case.k, case.v)
        expected, _ = case.run(epilogue=NVFP4(9.0), backend="reference")
        assert same_bits((packed, scales), expected)
        counts.append(graphs.frame_count)
    assert counts[-1] == counts[0] > 0


def test_inductor_compiles():
    """One case through code generation: buffers that the op writes must not be reused early."""
    case = dense_case(1, 3, 5, GQA, Options(), Source(torch.float32))
    bias = torch.tensor(0.5)
    actual = compiled(surrounded, "inductor")(case, bias)
    torch.testing.assert_close(actual, surrounded(case, bias), rtol=1e-6, atol=1e-7)


def test_fake_tensors_run_no_kernel():
    with torch._subclasses.FakeTensorMode() as mode:
        q = torch.empty(2, 4, 4, 64, dtype=torch.bfloat16)
        out, lse = cute_fmha.attention(q, q, q, return_lse=True, backend="reference")
    assert mode is not None
    assert (tuple(out.shape), out.dtype) == ((2, 4, 4, 64), torch.bfloat16)
    assert (tuple(lse.shape), lse.dtype) == ((2, 4, 4), torch.float32)


def test_call_carries_the_problem(monkeypatch):
    """What dispatch receives, field by field, for a call that sets everything."""
    calls: list[ops.Call] = []
    monkeypatch.setattr(ops.dispatch, "run", lambda call, backend: calls.append(call))
    case = dense_case(2, 130, 200, GQA, ALL, seqused_k=[200, 3])
    case.run(skip=SkipSoftmax(threshold_scale_factor=7.0), num_splits=3, backend="reference")
    mla_case(2, [5, 17], 16, 3).run(window=(9, -1), backend="reference")
    dense, latent = calls
    p = dense.problem
    assert (p.op, p.layout, p.packed_q, p.batch) == ("attention", "dense", False, 2)
    assert (p.seqlen_q, p.seqlen_k, p.group, p.head_dim, p.head_dim_v) == (130, 200, 2, 64, 64)
    assert (p.window_left, p.window_right, p.softcap, p.sink) == (40, 0, True, True)
    assert (p.block_mask, p.skip, p.stats, p.num_splits) == ((64, 64), True, False, 3)
    assert (dense.scale, dense.softcap) == (0.2, 3.0)
    assert (dense.skip_value, dense.skip_relative, dense.skip_tensor) == (7.0, True, None)
    p = latent.problem
    assert (p.op, p.layout, p.page_size, p.group) == ("mla_decode", "paged", 16, 3)
    assert (p.window_left, p.window_right, p.head_dim, p.head_dim_v) == (9, 0, 576, 512)
    assert latent.block_table is not None
    assert p.seqlen_k == latent.block_table.shape[1] * 16
    assert latent.v.shape[-1] == 512
    assert latent.v.data_ptr() == latent.k.data_ptr()


def test_import_loads_no_backend():
    """Of the testing helpers, which import the front door and the specification."""
    program = (
        "import sys, cute_fmha.testing\n"
        "assert {'cute_fmha.api', 'cute_fmha.reference'} <= set(sys.modules)\n"
        "heavy = {'triton', 'cutlass', 'transformers'} & set(sys.modules)\n"
        "own = [m for m in sys.modules if m.startswith('cute_fmha.kernels')]\n"
        "assert not heavy and not own, (heavy, own)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
