"""The specification against the definition, row by row; its tile oracle against a scalar replay.

Nothing here calls a function of `cute_fmha.reference` to compute what is expected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cute_fmha
from cute_fmha import SkipSoftmax, SkipStats, reference
from cute_fmha.problem import BlockMask
from cute_fmha.testing import (
    AttentionCase,
    Case,
    Heads,
    MlaCase,
    Options,
    Source,
    Tiles,
    check,
    dense_case,
    mla_case,
    packed_case,
    paged_case,
    random_case,
    skip_friendly,
)

FP64 = Source(dtype=torch.float64, std=1.0)
GQA = Heads(4, 2, 16, 8)


@dataclass(frozen=True)
class Sequence:
    """One sequence, found without the code under test: q [Lq, Hq, D], k, v [Lk, Hkv, D or Dv]."""

    index: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: slice | int

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[0], self.k.shape[0]


def paged_tokens(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    size = cache.shape[1]
    tokens = [cache[table[j // size], j % size] for j in range(length)]
    return torch.stack(tokens) if tokens else cache.new_empty(0, *cache.shape[2:])


def sequences(case: Case) -> list[Sequence]:
    options = case.common
    if isinstance(case, MlaCase):
        found = []
        for b, length in enumerate(case.cache_seqlens.tolist()):
            k = paged_tokens(case.kv_cache, case.block_table[b], length)
            found.append(Sequence(b, case.q[b], k, k[..., :512], b))
        return found
    cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    used, table = options.get("seqused_k"), options.get("block_table")
    found = []
    for b in range(case.q.shape[0] if cu_q is None else len(cu_q) - 1):
        rows = b if cu_q is None else slice(int(cu_q[b]), int(cu_q[b + 1]))
        if table is not None:
            assert used is not None
            k, v = (paged_tokens(x, table[b], int(used[b])) for x in (case.k, case.v))
        elif cu_k is not None:
            k, v = (x[int(cu_k[b]) : int(cu_k[b + 1])] for x in (case.k, case.v))
        else:
            length = case.k.shape[1] if used is None else int(used[b])
            k, v = case.k[b, :length], case.v[b, :length]
        found.append(Sequence(b, case.q[rows], k, v, rows))
    return found


def is_visible(case: Case, sequence: Sequence, head: int, i: int, j: int) -> bool:
    """The definition of every mask, for one query and one key."""
    options = case.common
    length_q, length_k = sequence.lengths
    diagonal = i + length_k - length_q
    if options.get("causal", isinstance(case, MlaCase)) and j > diagonal:
        return False
    left, right = options.get("window") or (-1, -1)
    if left >= 0 and j < diagonal - left:
        return False
    if right >= 0 and not options.get("causal") and j > diagonal + right:
        return False
    block = options.get("block_mask")
    if block is not None:
        b = sequence.index if block.mask.shape[0] > 1 else 0
        h = head if block.mask.shape[1] > 1 else 0
        return bool(block.mask[b, h, i // block.block_m, j // block.block_n])
    return True


def row_scores(case: Case, sequence: Sequence, head: int, i: int) -> dict[int, float]:
    """{visible key: score} of query ``i`` of ``head``."""
    options = case.common
    kv_head = head * sequence.k.shape[1] // sequence.q.shape[1]
    scale = options.get("scale") or 1 / math.sqrt(case.q.shape[-1])
    cap = options.get("softcap") or 0.0
    dots = (sequence.k[:, kv_head].double() @ sequence.q[i, head].double()).tolist()
    scores = {}
    for j in range(sequence.lengths[1]):
        if is_visible(case, sequence, head, i, j):
            s = dots[j] * scale
            scores[j] = cap * math.tanh(s / cap) if cap > 0 else s
    return scores


def row_result(
    case: Case, sequence: Sequence, head: int, scores: dict[int, float]
) -> tuple[torch.Tensor, float]:
    """(out [Dv], lse) of a row whose visible keys have ``scores``, in plain exponentials."""
    kv_head = head * sequence.k.shape[1] // sequence.q.shape[1]
    sink = case.common.get("sink")
    terms = {j: math.exp(s) for j, s in scores.items()}
    denominator = sum(terms.values())
    if sink is not None:
        denominator += math.exp(float(sink[head]))
    out = torch.zeros(sequence.v.shape[-1], dtype=torch.float64)
    for j, term in terms.items():
        out += term * sequence.v[j, kv_head].double()
    if denominator == 0:
        return out, -math.inf
    return out / denominator, math.log(denominator)


def place(case: Case, lse: torch.Tensor, sequence: Sequence, head: int) -> torch.Tensor:
    """The view of ``lse`` that holds the rows of ``sequence`` and ``head``, [Lq]."""
    if isinstance(sequence.rows, slice):
        return lse[head, sequence.rows]
    return lse[sequence.rows, head]


def brute_force(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the definition, one row at a time."""
    dim_v = 512 if isinstance(case, MlaCase) else case.v.shape[-1]
    out = torch.full((*case.q.shape[:-1], dim_v), float("nan"), dtype=torch.float64)
    lse_shape = [case.q.shape[-2], case.q.shape[-3]]
    lse = torch.full([*case.q.shape[:-3], *lse_shape], float("nan"), dtype=torch.float64)
    for sequence in sequences(case):
        for head in range(sequence.q.shape[1]):
            for i in range(sequence.lengths[0]):
                scores = row_scores(case, sequence, head, i)
                value, row_lse = row_result(case, sequence, head, scores)
                out[sequence.rows][i, head] = value
                place(case, lse, sequence, head)[i] = row_lse
    return out, lse


def assert_same(
    actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Equal to FP64 rounding; −inf where −inf, NaN nowhere."""
    for a, e in zip(actual, expected, strict=True):
        assert not e.isnan().any(), "the brute force left a row out"
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


LAYOUTS = {
    "dense": lambda o: dense_case(2, 5, 9, GQA, o, FP64),
    "dense, more queries than keys": lambda o: dense_case(2, 9, 4, GQA, o, FP64),
    "dense, poisoned tails": lambda o: dense_case(3, 4, 9, GQA, o, FP64, seqused_k=[9, 3, 0]),
    "packed": lambda o: packed_case([3, 0, 7, 1, 2], [5, 2, 4, 1, 0], GQA, o, FP64),
    "paged": lambda o: paged_case(3, [5, 0, 17, 4], 4, GQA, o, FP64),
    "paged, page size 1": lambda o: paged_case(2, [5, 1], 1, GQA, o, FP64),
    "paged, packed queries": lambda o: paged_case([3, 0, 1], [5, 2, 9], 4, GQA, o, FP64),
    "MHA": lambda o: dense_case(1, 4, 5, Heads(3, 3, 16, 16), o, FP64),
    "MQA": lambda o: dense_case(1, 4, 5, Heads(6, 1, 16, 16), o, FP64),
    "MLA": lambda o: mla_case(2, [5, 0, 9], 4, 3, 576, replace(o, blocks=None), FP64),
}
OPTIONS = {
    "plain": Options(),
    "causal": Options(causal=True),
    "window": Options(window=(2, 1)),
    "left window": Options(window=(1, -1)),
    "right window": Options(window=(-1, 0)),
    "causal window": Options(causal=True, window=(3, 5)),
    "softcap, scale": Options(softcap=0.7, scale=0.9),
    "sink": Options(sink=True),
    "block mask": Options(blocks=(2, 3, 0.5)),
    "all": Options(0.6, True, (4, -1), 1.5, True, (3, 2, 0.6)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reference_is_the_definition(layout, options):
    case = layout(options)
    assert_same(case.reference(), brute_force(case))


def fp64_case(seed: int, max_length: int = 24) -> Case:
    """A random case of few, narrow heads: small enough for Python loops."""
    heads = Heads(*[(4, 2), (3, 1), (2, 2)][seed % 3], 8, 8)
    options = Options(
        scale=[None, 0.4][seed % 2],
        causal=seed % 5 < 2,
        window=[None, None, (3, 2), (0, -1), (-1, 2)][seed // 3 % 5],
        softcap=[0.0, 1.3][seed // 7 % 2],
        sink=seed % 4 == 0,
        blocks=[None, (5, 3, 0.5)][seed // 11 % 2],
    )
    kind = ["dense", "packed", "paged"][seed // 2 % 3]
    return random_case(replace(FP64, seed=seed), kind, max_length, heads, options)


@given(st.integers(0, 1 << 20))
@settings(max_examples=40)
def test_reference_on_random_cases(seed):
    case = fp64_case(seed)
    assert_same(case.reference(), brute_force(case))


@pytest.mark.sweep
@given(st.integers(0, 1 << 40))
@settings(max_examples=1000, derandomize=False)
def test_reference_sweep(seed):
    case = fp64_case(seed, 40)
    assert_same(case.reference(), brute_force(case))


def test_rows_without_keys():
    case = dense_case(1, 4, 2, GQA, Options(causal=True), FP64)
    out, lse = case.reference()
    assert (out[0, :2] == 0).all()
    assert (lse[0, :, :2] == -math.inf).all()
    assert lse[0, :, 2:].isfinite().all()


def test_max_logits_by_definition():
    """The largest capped logit of every row, sinks left out; −inf where it sees no key."""
    options = Options(scale=0.7, causal=True, softcap=3.0, sink=True)
    case = mla_case(3, [70, 2, 0, 33], 16, 5, options=options, source=Source(std=1.0))
    out, largest = cute_fmha.mla_decode(
        case.q, case.kv_cache, case.block_table, case.cache_seqlens, **case.common,
        return_max_logits=True, backend="reference",
    )  # fmt: skip
    assert torch.equal(out, case.run(backend="reference")[0])
    for b, length in enumerate(case.cache_seqlens.tolist()):
        pages = case.block_table[b, : -(-length // 16)].long()
        keys = case.kv_cache[pages].flatten(0, 1)[:length, 0].double()
        products = torch.einsum("qhd,kd->hqk", case.q[b].double(), keys)
        logits = torch.full((5, 3, length + 1), -math.inf, dtype=torch.float64)
        logits[..., :length] = 3.0 * torch.tanh(0.7 / 3.0 * products)
        logits[..., :length].masked_fill_(
            torch.arange(length) > torch.arange(3)[:, None] + length - 3, -math.inf
        )
        expected = logits.amax(-1).float()
        torch.testing.assert_close(largest[b], expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("sink", [3.0, -200.0, 800.0, -math.inf])
def test_sink_of_rows_without_keys(sink):
    case = dense_case(1, 4, 2, GQA, Options(causal=True), FP64)
    logits = torch.full((4,), sink)
    out, lse = case.reference(sink=logits)
    assert (out[0, :2] == 0).all()
    assert (lse[0, :, :2] == sink).all()
    plain_out, plain_lse = case.reference()
    total = torch.logaddexp(plain_lse[0, :, 2:], torch.tensor(sink, dtype=torch.float64))
    torch.testing.assert_close(lse[0, :, 2:], total)
    share = torch.exp(plain_lse[0, :, 2:] - total).T[..., None]
    torch.testing.assert_close(out[0, 2:], plain_out[0, 2:] * share)


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 1, 8), 40.0, dtype=torch.float64)
    k = torch.stack([q[0] * 40, q[0] * 40, -q[0]], dim=1).view(1, 3, 1, 8)
    v = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 1, 8)
    out, lse = reference.attention_reference(q, k, v, scale=1.0)
    assert (out == 2.0).all()
    assert float(lse) == 8 * 40.0 * 1600 + math.log(2)


def test_chunks_do_not_change_the_result(monkeypatch):
    for options in (Options(causal=True, window=(7, -1)), Options(sink=True, blocks=(3, 4, 0.5))):
        case = dense_case(2, 19, 23, GQA, options, FP64)
        whole = case.reference()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_CHUNK_SCORES", 1)
            assert_same(case.reference(), whole)


def test_round_p_rounds_unnormalised_probabilities():
    case = dense_case(1, 3, 11, Heads(1, 1, 16, 8), Options(sink=True), FP64)
    (sequence,) = sequences(case)
    out, lse = case.reference(round_p=torch.bfloat16)
    for i in range(3):
        s = torch.tensor(list(row_scores(case, sequence, 0, i).values()), dtype=torch.float64)
        p = torch.exp(s - s.max())
        mass = p.sum() + torch.exp(case.common["sink"][0].double() - s.max())
        expected = (p.bfloat16().double() @ sequence.v[:, 0]) / mass
        torch.testing.assert_close(out[0, i, 0], expected)
    torch.testing.assert_close(lse, case.reference()[1])


# -- the tile oracle ------------------------------------------------------------------------------


@dataclass
class Replay:
    """Results and counts of the scalar replay."""

    out: torch.Tensor
    lse: torch.Tensor
    skipped: int = 0
    total: int = 0
    margin: float = math.inf


def ln_threshold(skip: SkipSoftmax | None, length_k: int) -> float | None:
    if skip is None or not float(skip.value) > 0:
        return None
    value = float(skip.value)
    return math.log(min(1.0, value / length_k if skip.relative else value))


def replay(case: Case, tiles: Tiles, skip: SkipSoftmax | None) -> Replay:
    """Each row's kept keys decided tile by tile with dictionaries, then the plain softmax."""
    out, lse = (x.fill_(math.nan) for x in brute_force(case))
    result = Replay(out, lse)
    for sequence in sequences(case):
        length_q, length_k = sequence.lengths
        group = sequence.q.shape[1] // sequence.k.shape[1] if tiles.pack_heads else 1
        threshold = ln_threshold(skip, length_k) if length_k else None
        for block in range(sequence.q.shape[1] // group):
            rows = [(m // group, block * group + m % group) for m in range(length_q * group)]
            for first in range(0, len(rows), tiles.tile_m):
                work = rows[first : first + tiles.tile_m]
                scores = [row_scores(case, sequence, head, i) for i, head in work]
                kept = keep_keys(case, sequence, tiles, threshold, work, scores, result)
                for (i, head), row, keys in zip(work, scores, kept, strict=True):
                    visible = {j: s for j, s in row.items() if j in keys}
                    out[sequence.rows][i, head], value = row_result(case, sequence, head, visible)
                    place(case, lse, sequence, head)[i] = value
    return result


def visited_tiles(
    case: Case, sequence: Sequence, tiles: Tiles, work: list[tuple[int, int]]
) -> tuple[list[int], set[int]]:
    """(tiles some row could see by causal and window alone, those the block mask also allows)."""
    unblocked = replace(case, common={k: v for k, v in case.common.items() if k != "block_mask"})
    only_blocks = replace(case, common={k: case.common.get(k) for k in ("block_mask",)})
    if isinstance(case, MlaCase):
        only_blocks = replace(case, common={"causal": False})
    length_k = sequence.lengths[1]
    numbers = range(-(-length_k // tiles.tile_n))

    def any_visible(of: Case, tile: int) -> bool:
        keys = range(tile * tiles.tile_n, min(length_k, (tile + 1) * tiles.tile_n))
        return any(is_visible(of, sequence, head, i, j) for i, head in work for j in keys)

    needed = [tile for tile in numbers if any_visible(unblocked, tile)]
    return needed, {tile for tile in needed if any_visible(only_blocks, tile)}


def keep_keys(case, sequence, tiles, threshold, work, scores, result) -> list[set[int]]:
    """The keys that each row of ``work`` keeps; adds the decisions to ``result``."""
    needed, allowed = visited_tiles(case, sequence, tiles, work)
    kept: list[set[int]] = [set() for _ in work]
    count, splits = len(needed), tiles.num_splits
    for split in range(splits):
        running = [-math.inf] * len(work)
        for tile in needed[count * split // splits : count * (split + 1) // splits]:
            if tile not in allowed:
                continue
            keys = range(tile * tiles.tile_n, (tile + 1) * tiles.tile_n)
            inside = [[row[j] for j in keys if j in row] for row in scores]
            gaps = [max(s) - m for s, m in zip(inside, running, strict=True) if s]
            result.total += 1
            if threshold is not None:
                if gaps and math.isfinite(max(gaps)):
                    result.margin = min(result.margin, abs(max(gaps) - threshold))
                if all(gap < threshold for gap in gaps):
                    result.skipped += 1
                    continue
            running = [max([m, *s]) for m, s in zip(running, inside, strict=True)]
            for row_keys in kept:
                row_keys.update(keys)
    return kept


def assert_replayed(case: Case, tiles: Tiles, skip: SkipSoftmax | None) -> Replay:
    expected = replay(case, tiles, skip)
    actual = case.oracle(tiles, skip)
    assert (actual.skipped, actual.total) == (expected.skipped, expected.total)
    assert actual.margin == pytest.approx(expected.margin, rel=1e-9)
    assert_same((actual.out, actual.lse), (expected.out, expected.lse))
    return expected


TILES = [
    Tiles(m, n, p, s) for m, n in ((4, 3), (1, 5), (6, 2)) for p in (False, True) for s in (1, 3)
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_oracle_without_skip_is_the_reference(options, tiles):
    for layout in ("dense, more queries than keys", "packed", "paged, packed queries"):
        case: Any = LAYOUTS[layout](options)
        result = case.oracle(tiles, None)
        assert_same((result.out, result.lse), case.reference())
        assert result.skipped == 0
        assert result.margin == math.inf


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_oracle_replays_every_decision(layout, tiles):
    for name in ("plain", "causal window", "all"):
        assert_replayed(layout(OPTIONS[name]), tiles, SkipSoftmax(0.9))


def test_oracle_skips_for_every_reason():
    """The structured scores: tiles go and stay, and no decision is near its threshold."""
    source, skip = skip_friendly(replace(FP64, std=0.1, gap_block=4))
    case = dense_case(2, 12, 40, GQA, Options(causal=True), source)
    for tiles in (Tiles(4, 4, False), Tiles(8, 8, True), Tiles(4, 4, True, 3)):
        expected = assert_replayed(case, tiles, skip)
        assert 0.05 < expected.skipped / expected.total < 0.95
        assert expected.margin > 5


@given(
    st.integers(0, 1 << 20), st.sampled_from(TILES), st.sampled_from([1e-3, 0.1, 0.6, 1.0]),
    st.booleans(),
)  # fmt: skip
@example(0, TILES[0], 1.0, False)
@settings(max_examples=30)
def test_oracle_on_random_cases(seed, tiles, value, relative):
    skip = SkipSoftmax(threshold_scale_factor=9 * value) if relative else SkipSoftmax(value)
    assert_replayed(fp64_case(seed), tiles, skip)


@pytest.mark.sweep
@given(
    st.integers(0, 1 << 40), st.builds(
        Tiles, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(1, 5)
    ), st.floats(1e-6, 1.0),
)  # fmt: skip
@settings(max_examples=600, derandomize=False)
def test_oracle_sweep(seed, tiles, value):
    assert_replayed(fp64_case(seed, 40), tiles, SkipSoftmax(value))


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, -math.inf])
def test_device_lambda_that_is_off(value):
    source, _ = skip_friendly(replace(FP64, gap_block=4))
    case = dense_case(1, 4, 40, GQA, Options(), source)
    for skip in (
        SkipSoftmax(torch.tensor([value])), SkipSoftmax(threshold_scale_factor=torch.tensor(value))
    ):  # fmt: skip
        assert case.oracle(Tiles(4, 4, False), skip).skipped == 0


def test_lambda_is_capped_at_one():
    source, _ = skip_friendly(replace(FP64, std=0.1, gap_block=4), gap=4.0)
    case = dense_case(2, 4, 40, GQA, Options(), source)
    tiles = Tiles(4, 4, False)
    one = case.oracle(tiles, SkipSoftmax(1.0))
    assert one.skipped > case.oracle(tiles, SkipSoftmax(0.5)).skipped > 0
    for capped in (
        SkipSoftmax(torch.tensor(7.0)), SkipSoftmax(threshold_scale_factor=1e9)
    ):  # fmt: skip
        assert case.oracle(tiles, capped).skipped == one.skipped


def test_factor_is_divided_by_each_sequence_length():
    """Low tiles are 4 below: ln(2 / 40) = −3.0 skips them, ln(2 / 400) = −5.3 keeps them."""
    source, _ = skip_friendly(replace(FP64, std=0.1, gap_block=4), gap=4.0)
    both = packed_case([4, 4], [40, 400], GQA, Options(), source)
    tiles = Tiles(4, 4, False)
    cu_q, cu_k = torch.tensor([0, 4]), torch.tensor([0, 40])
    short = replace(both, common={"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k})
    skipped = short.oracle(tiles, SkipSoftmax(2 / 40)).skipped
    assert skipped > 0
    assert both.oracle(tiles, SkipSoftmax(threshold_scale_factor=2.0)).skipped == skipped
    assert both.oracle(tiles, SkipSoftmax(2 / 40)).skipped > skipped


def test_values_of_skipped_tiles_are_not_read():
    source, skip = skip_friendly(replace(FP64, gap_block=4))
    case = dense_case(1, 4, 8, Heads(1, 1, 16, 16), Options(), source)
    k = case.k.clone()
    k[:, 4:] = k[:, :4] * 1.0 - case.q[:, :1] * 1000
    v = case.v.clone()
    v[:, 4:] = math.nan
    result = replace(case, k=k, v=v).oracle(Tiles(4, 4, False), skip)
    assert (result.skipped, result.total) == (1, 2)
    assert result.out.isfinite().all()


def test_oracle_rounds_p_relative_to_the_running_maximum():
    case = dense_case(1, 3, 12, Heads(1, 1, 16, 8), Options(), FP64)
    rounding: dict[str, Any] = {"round_p": torch.bfloat16}
    whole = case.oracle(Tiles(4, 12, False), **rounding)
    assert_same((whole.out, whole.lse), case.reference(**rounding))
    tiled = case.oracle(Tiles(4, 5, False), **rounding)
    (sequence,) = sequences(case)
    for i in range(3):
        s = torch.tensor(list(row_scores(case, sequence, 0, i).values()), dtype=torch.float64)
        running = torch.stack([s[:5].max(), s[:10].max(), s.max()]).repeat_interleave(5)[:12]
        p = torch.exp(s - running).bfloat16().double() * torch.exp(running - s.max())
        expected = p @ sequence.v[:, 0] / torch.exp(s - s.max()).sum()
        torch.testing.assert_close(tiled.out[0, i, 0], expected)


# -- the backend ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "packed", "paged", "mla"])
def test_backend_meets_the_gates(kind, dtype):
    for seed in range(4):
        case = random_case(Source(dtype, seed=seed, std=[0.1, 1.0][seed % 2]), kind, 200)
        check(case, *case.run(backend="reference"))


LONG = Heads(4, 2, 64, 64)
SKIPPING = {
    "dense": lambda o, s: dense_case(2, 200, 900, LONG, o, s),
    "packed": lambda o, s: packed_case([200, 0, 3], [1500, 5, 900], LONG, o, s),
    "paged": lambda o, s: paged_case(2, [1500, 0, 1400], 16, LONG, o, s),
    "mla": lambda o, s: mla_case(2, [1500, 0, 1400], 64, 3, 576, o, s),
}


@pytest.mark.parametrize("layout", SKIPPING.values(), ids=SKIPPING)
@pytest.mark.parametrize("num_splits", [None, 2])
def test_backend_skips_and_counts(layout, num_splits):
    source, skip = skip_friendly(Source(torch.float32, seed=3, gap_block=128))
    case = layout(Options(causal=True), source)
    tiles = Tiles(128, 128, False, num_splits or 1)
    expected = case.oracle(tiles, skip)
    assert 0 < expected.skipped < expected.total
    assert expected.margin > 1
    stats = SkipStats("cpu")
    call = {"backend": "reference", "num_splits": num_splits, "stats": stats}
    out, lse = case.run(skip=skip, **call)
    check(case, out, lse, tiles, skip)
    assert stats.read() == (expected.skipped, expected.total)
    out, lse = case.run(skip=SkipSoftmax(torch.tensor([skip.threshold])), **call)
    check(case, out, lse, tiles, skip)
    assert stats.read() == (2 * expected.skipped, 2 * expected.total)
    check(case, *case.run(**call))
    assert stats.read() == (2 * expected.skipped, 3 * expected.total)


def test_backend_counts_live_tiles_of_a_block_mask():
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 0, 0] = mask[..., 1, 1] = mask[..., 1, 2] = True
    case = dense_case(1, 256, 384, Heads(2, 1, 64, 64), Options(), Source(torch.float32))
    case = replace(case, common={"block_mask": BlockMask(mask, 128, 128)})
    stats = SkipStats("cpu")
    check(case, *case.run(backend="reference", stats=stats))
    assert stats.read() == (0, 2 * 3)


def test_backend_writes_into_strided_outputs():
    case = dense_case(2, 5, 9, Heads(4, 2, 64, 64), Options(), Source(torch.float32))
    storage = torch.zeros(2, 4, 5, 64)
    out, lse = storage.transpose(1, 2), torch.zeros(2, 4, 5)
    returned = cute_fmha.attention(
        case.q, case.k, case.v, return_lse=True, out=(out, lse), backend="reference"
    )
    assert returned[0] is out
    assert returned[1] is lse
    check(case, storage.transpose(1, 2), lse)


def test_backend_takes_every_problem():
    case = dense_case(1, 1, 1, GQA, Options(), FP64)
    assert isinstance(case, AttentionCase)
    problem = cute_fmha.problem.Problem(
        "attention", "dense", False, torch.float32, torch.float32, 1, 1, 1, 1, 1, 64, 64
    )
    target = cute_fmha.problem.target_of(torch.device("cpu"))
    assert reference.can_implement(problem, target) is None
