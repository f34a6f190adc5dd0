"""Skip-softmax, CUDA graphs, determinism, PyTorch's machinery and launch counts on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from launches import recorded, tiles_of
from op_calls import op_call

from cute_fmha import SkipSoftmax, SkipStats, attention, make_workspace, mla_decode
from cute_fmha.bench.profile import count
from cute_fmha.kernels.triton.plan import COUNTER_BYTES
from cute_fmha.testing import (
    Case,
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

pytestmark = pytest.mark.gpu

BF16 = Source(torch.bfloat16, "cuda")
CAUSAL = Options(causal=True)
GQA = Heads(8, 2, 128, 128)

SHAPES: dict[str, tuple[Callable[[Source], Case], int | None]] = {
    "dense": (lambda source: dense_case(2, 300, 1000, GQA, CAUSAL, source), None),
    "packed": (
        lambda source: packed_case([300, 0, 200], [1000, 5, 700], GQA, CAUSAL, source),
        None,
    ),
    "paged": (lambda source: paged_case(300, [1000, 0, 700], 16, GQA, CAUSAL, source), None),
    "decode": (lambda source: paged_case(1, [3000, 0, 700], 64, GQA, CAUSAL, source), 3),
    "mla": (lambda source: mla_case(1, [3000, 0, 700, 65], 64, 16, 576, CAUSAL, source), 2),
    "mla, small pages": (
        lambda source: mla_case(1, [3000, 0, 700, 65], 16, 16, 576, CAUSAL, source),
        2,
    ),
}
"""A case and its number of splits. The shapes of different tests share compiled kernels."""

MAIN_SHAPES = ["dense", "decode", "mla"]


def make(shape: str, source: Source = BF16) -> tuple[Case, int | None]:
    build, num_splits = SHAPES[shape]
    return build(source), num_splits


def make_skippable(shape: str) -> tuple[Case, int | None, float]:
    """As `make`, with scores of which a threshold of the returned value skips a part."""
    source, policy = skip_friendly(replace(BF16, gap_block=64))
    assert isinstance(policy.value, float)
    return *make(shape, source), policy.value


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``call``, warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# Skip-softmax.


def policies(value: float, length: int) -> dict[str, SkipSoftmax]:
    on_device = torch.tensor([value], device="cuda")
    return {
        "host": SkipSoftmax(value),
        "device": SkipSoftmax(on_device),
        "factor": SkipSoftmax(threshold_scale_factor=value * length),
        "device factor": SkipSoftmax(threshold_scale_factor=on_device * length),
    }


SKIPS = [
    ("planned", "dense", "host"),
    ("planned", "dense", "device factor"),
    ("planned", "packed", "device"),
    ("planned", "paged", "factor"),
    ("planned", "decode", "host"),
    ("planned", "decode", "device factor"),
    ("planned", "mla", "host"),
    ("planned", "mla", "device factor"),
    ("planned", "mla, small pages", "factor"),
    ("portable", "dense", "host"),
    ("portable", "mla", "device"),
]


@pytest.mark.parametrize(("kernels", "shape", "policy"), SKIPS, indirect=["kernels"])
def test_skip_softmax(kernels, shape, policy):
    """The oracle's decisions exactly, a good part of the tiles skipped, and its results."""
    case, num_splits, value = make_skippable(shape)
    skip = policies(value, 1000)[policy]
    stats = SkipStats()
    out, lse = case.run(backend="triton", num_splits=num_splits, skip=skip, stats=stats)
    tiles = tiles_of(kernels[-1][1])
    oracle = case.oracle(tiles, skip)
    assert oracle.margin > 0.5, "decisions of this case are too close to call"
    assert stats.read() == (oracle.skipped, oracle.total)
    assert 0.1 < oracle.skipped / oracle.total < 0.95
    check(case, out, lse, tiles, skip)


@pytest.mark.parametrize("kernels", ["planned"], indirect=True)
@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_threshold_is_in_score_units(kernels, shape):
    """Tiles 14 below the maximum are skipped at ln λ = −12 and kept at ln λ = −16."""
    case, num_splits, _ = make_skippable(shape)
    for ln_lambda in (-12, -16):
        skip, stats = SkipSoftmax(math.exp(ln_lambda)), SkipStats()
        case.run(backend="triton", num_splits=num_splits, skip=skip, stats=stats)
        oracle = case.oracle(tiles_of(kernels[-1][1]), skip)
        assert stats.read() == (oracle.skipped, oracle.total)
        assert (oracle.skipped > 0) == (ln_lambda == -12)


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_counting_changes_no_bit(shape):
    """The production variant of a skipping launch, without counters, gives the same."""
    case, num_splits, value = make_skippable(shape)
    skip = SkipSoftmax(value)
    plain = case.run(backend="triton", num_splits=num_splits, skip=skip)
    counted = case.run(backend="triton", num_splits=num_splits, skip=skip, stats=SkipStats())
    assert equal(plain, counted)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("shape", ["dense", "mla"])
def test_device_threshold_out_of_range(shape, value):
    """NaN and values <= 0 are off: the counters say so. Values above 1 count as 1."""
    case, num_splits, _ = make_skippable(shape)
    policy = SkipSoftmax(threshold_scale_factor=torch.tensor([value * 1e6], device="cuda"))
    stats = SkipStats()
    with recorded() as launches:
        out, lse = case.run(backend="triton", num_splits=num_splits, skip=policy, stats=stats)
    tiles = tiles_of(launches[0][1])
    if value > 0:
        assert stats.read()[0] > 0
        return
    assert stats.read() == (0, case.oracle(tiles).total)
    check(case, out, lse)


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_threshold_changes_between_replays(shape):
    """One graph, λ in device memory: each replay takes the decisions of its λ, and counts them."""
    case, num_splits, value = make_skippable(shape)
    factor = torch.zeros(1, device="cuda")
    stats = SkipStats()
    out: list[torch.Tensor] = []
    skip = SkipSoftmax(threshold_scale_factor=factor)

    def call() -> None:
        out[:] = case.run(backend="triton", num_splits=num_splits, skip=skip, stats=stats)

    with recorded() as launches:
        graph = captured(call)
    tiles = tiles_of(launches[-1][1])
    seen = set()
    for lam in (0.0, value * 1000, 1e-30, value * 1000):
        factor.fill_(lam)
        stats.reset()
        graph.replay()
        policy = SkipSoftmax(threshold_scale_factor=lam)
        oracle = case.oracle(tiles, policy)
        assert stats.read() == (oracle.skipped, oracle.total)
        check(case, out[0], out[1], tiles, policy)
        seen.add(oracle.skipped)
    assert len(seen) == 2


# CUDA graphs.


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_counters_accumulate_under_graphs(shape):
    case, num_splits, value = make_skippable(shape)
    stats, skip = SkipStats(), SkipSoftmax(value)

    def call() -> None:
        case.run(backend="triton", num_splits=num_splits, skip=skip, stats=stats)

    call()
    once = stats.read()
    graph = captured(call)
    stats.reset()
    for _ in range(3):
        graph.replay()
    assert stats.read() == (3 * once[0], 3 * once[1])
    assert once[0] > 0


@pytest.mark.parametrize("shape", ["decode", "mla"])
def test_cache_changes_between_replays(kernels, shape):
    """Lengths, pages and tokens change under a captured graph, as from one step to the next."""
    case, num_splits = make(shape)
    workspace = make_workspace()
    out: list[torch.Tensor] = []

    def call() -> None:
        out[:] = case.run(backend="triton", num_splits=num_splits, workspace=workspace)

    graph = captured(call)
    if isinstance(case, MlaCase):
        table, lengths = case.block_table, case.cache_seqlens
    else:
        table, lengths = case.common["block_table"], case.common["seqused_k"]
    graph.replay()
    check(case, out[0], out[1])
    for shift in (1, 2):
        order = torch.arange(len(lengths), device="cuda").roll(shift)
        table.copy_(table[order])
        lengths.copy_(lengths[order] - (lengths[order] > 600).int())
        case.q.copy_(case.q.flip(0))
        graph.replay()
        check(case, out[0], out[1])
    assert not workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_graph_without_a_workspace(shape):
    """The graph then owns its scratch memory: eager calls in between do not disturb it."""
    case, num_splits = make(shape)
    out: list[torch.Tensor] = []

    def call() -> None:
        out[:] = case.run(backend="triton", num_splits=num_splits)

    graph = captured(call)
    expected = case.run(backend="triton", num_splits=num_splits)
    for _ in range(3):
        for tensor in out:
            tensor.fill_(math.nan)
        graph.replay()
        assert equal(tuple(out), expected)
        assert equal(case.run(backend="triton", num_splits=num_splits), expected)


# Determinism.


@pytest.mark.parametrize("shape", ["dense", "decode", "mla", "mla, small pages"])
def test_runs_are_identical(kernels, shape):
    """Launches in a row on one workspace: the same bits, and counters back at zero."""
    case, num_splits = make(shape)
    workspace = make_workspace()
    first = case.run(backend="triton", num_splits=num_splits, workspace=workspace)
    check(case, *first)
    for _ in range(20):
        again = case.run(backend="triton", num_splits=num_splits, workspace=workspace)
        assert equal(again, first)
    assert not workspace[:COUNTER_BYTES].any()


def test_one_workspace_for_all(kernels):
    """Different calls in a row on one workspace, nothing in between."""
    workspace = make_workspace()
    prepared = [make(shape) for shape in ("mla", "dense", "decode", "mla, small pages", "mla")]
    results = [
        case.run(backend="triton", num_splits=splits, workspace=workspace)
        for case, splits in prepared
    ]
    for (case, _), (out, lse) in zip(prepared, results, strict=True):
        check(case, out, lse)


def part(case: Case, entries: slice) -> Case:
    """Some batch entries of ``case``."""
    if isinstance(case, MlaCase):
        return replace(
            case,
            q=case.q[entries],
            block_table=case.block_table[entries],
            cache_seqlens=case.cache_seqlens[entries],
        )
    common = dict(case.common)
    for name in ("block_table", "seqused_k"):
        if name in common:
            common[name] = common[name][entries]
    if "block_table" in common:
        return replace(case, q=case.q[entries], common=common)
    return replace(case, q=case.q[entries], k=case.k[entries], v=case.v[entries], common=common)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [("planned", "dense"), ("planned", "decode"), ("planned", "mla"), ("portable", "mla")],
    indirect=["kernels"],
)
def test_batch_invariance(kernels, shape):
    """With ``num_splits`` fixed, two sequences' bits do not depend on how many run beside them."""
    lengths = [1000, 333, 64, *(500,) * 92]
    case: Case
    if shape == "mla":
        case = mla_case(1, lengths, 64, 128, 576, CAUSAL, BF16)
    elif shape == "decode":
        case = paged_case(1, lengths, 64, GQA, CAUSAL, BF16)
    else:
        case = dense_case(20, 300, 333, GQA, CAUSAL, BF16)
    splits = None if shape == "dense" else 5
    out, lse = case.run(backend="triton", num_splits=splits)
    for pair in (slice(0, 2), slice(1, 3)):
        assert equal(
            part(case, pair).run(backend="triton", num_splits=splits), (out[pair], lse[pair])
        )


# PyTorch's machinery.


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_opcheck(shape, monkeypatch):
    case, num_splits = make(shape)
    op, arguments = op_call(lambda: case.run(backend="triton", num_splits=num_splits), monkeypatch)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_compile(shape):
    """torch.compile(fullgraph=True) with Inductor, the op between two others."""
    case, num_splits = make(shape)

    def step(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = q * 2
        if isinstance(case, MlaCase):
            out, lse = mla_decode(
                q, case.kv_cache, case.block_table, case.cache_seqlens, return_lse=True,
                num_splits=num_splits, backend="triton",
            )  # fmt: skip
        else:
            out, lse = attention(
                q, case.k, case.v, return_lse=True, num_splits=num_splits, backend="triton",
                **case.common,
            )  # fmt: skip
        return out + 1, lse * 2

    torch._dynamo.reset()
    expected = step(case.q)
    assert equal(torch.compile(step, fullgraph=True)(case.q), expected)


# What a call costs.


COSTS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in MAIN_SHAPES]


@pytest.mark.parametrize(("shape", "counting"), COSTS)
def test_one_launch_no_synchronisation_no_allocation(shape, counting):
    case, num_splits = make(shape)
    workspace = make_workspace()
    results = case.run(backend="triton", num_splits=num_splits, workspace=workspace)
    stats = SkipStats() if counting else None
    factor = torch.tensor([1e-9], device="cuda")
    skip = SkipSoftmax(threshold_scale_factor=factor) if counting else None
    counts = count(
        lambda: case.run(
            backend="triton", num_splits=num_splits, workspace=workspace, out=results,
            stats=stats, skip=skip,
        )
    )  # fmt: skip
    assert counts.ideal, counts


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_portable_kernels_launch_once(shape):
    case, num_splits = make(shape)
    with recorded(portable=True):
        results = case.run(backend="triton", num_splits=num_splits)
        counts = count(lambda: case.run(backend="triton", num_splits=num_splits, out=results))
    # No workspace was given: the library's own is kept from the first call on.
    assert counts.ideal, counts


# Backends.


def test_auto_chooses_triton():
    case = dense_case(1, 300, 333, GQA, CAUSAL, BF16)
    with recorded() as launches:
        chosen = case.run()
        named = case.run(backend="triton")
    assert len(launches) == 2
    assert equal(chosen, named)


def test_named_backend_never_falls_back():
    case = dense_case(1, 300, 333, GQA, CAUSAL, replace(BF16, dtype=torch.float32))
    with recorded() as launches:
        with pytest.raises(NotImplementedError, match="backend='triton' cannot run this"):
            case.run(backend="triton")
        for backend in ("blackwell", "emulator"):
            with pytest.raises(NotImplementedError, match=f"backend='{backend}' cannot run this"):
                case.run(backend=backend)
        # `auto` may: FP32 runs by the specification.
        check(case, *case.run())
    assert not launches


def test_workspace_too_small():
    case, _ = make("mla")
    with pytest.raises(ValueError, match=r"workspace: got 1000 bytes; 2 splits of this problem"):
        case.run(backend="triton", num_splits=2, workspace=make_workspace(nbytes=1000))


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_memcheck_skip(shape):
    """For compute-sanitizer: the skipping, counting variants."""
    case, num_splits, value = make_skippable(shape)
    stats = SkipStats()
    case.run(backend="triton", num_splits=num_splits, skip=SkipSoftmax(value), stats=stats)
    assert stats.read()[0] > 0
