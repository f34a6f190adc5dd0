"""Work lists and the combine of partial results, without an MLA kernel around them."""

from __future__ import annotations

import random

import pytest
import torch

from cute_fmha.emulator.machine import Policy
from cute_fmha.kernels.blackwell.cutting import Cut, Cutting
from cute_fmha.tiling import equal_share, kv_tile_ranges, split_tile_range
from cute_fmha.tiling import tiles_before_cut as before_cut

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import splitkv_kernel as fake

# With few CTAs on the machine nobody may wait for a partial result, with many everybody does. Who
# waits for ever runs out of steps.
POLICIES = [
    Policy(mode, seed=seed, resident=resident, slice=steps, max_steps=30_000_000)
    for mode, seed, resident, steps in (
        ("eager", 0, 4, 256),
        ("lazy", 0, 64, 256),
        ("random", 1, 64, 40),
        ("random", 2, 7, 40),
        ("random", 3, 1, 256),
    )
]
policies = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)

LENGTHS = {
    "one": [331],
    "empty": [0, 0, 0],
    "mixed": [0, 64, 1, 300, 63, 65, 0, 17],
    "one long": [3, 400, 9, 0, 8, 2],
    "many": [(7 * i) % 23 for i in range(70)],
}


def work_counts(lengths, seqlen_q, heads, rows, tile_n, window=(-1, -1)):
    """KV tiles of every work tile."""
    counts = []
    for length in lengths:
        for first in range(0, seqlen_q * heads, rows):
            last = min(first + rows, seqlen_q * heads) - 1
            begin, _, _, end = kv_tile_ranges(
                first // heads, last // heads + 1, seqlen_q, length, window[0], window[1], tile_n
            )
            counts.append(end - begin)
    return counts


def pieces_by_share(counts, workers, overhead, least):
    """[[(worker, first tile, end)] of each work tile], by walking along the line."""
    share = equal_share(sum(counts) + overhead * len(counts), workers, overhead, least)
    pieces, at = [], 0
    for count in counts:
        cuts = [0]
        own: list[tuple[int, int, int]] = []
        for worker in range(at // share, (at + count + overhead - 1) // share + 1):
            low, high = cuts[-1], before_cut((worker + 1) * share - at, count, overhead, least)
            if low < high or (count == 0 and not own):
                own.append((worker, low, high))
            cuts.append(high)
        pieces.append(own)
        at += count + overhead
    return pieces


def test_shares_cover_every_tile_once():
    """Also: pieces are not too small, no worker has more than its share and what a cut may move."""
    rng = random.Random(0)
    for _ in range(300):
        counts = [rng.choice([0, 1, 2, rng.randrange(40)]) for _ in range(rng.randrange(1, 30))]
        overhead, least, workers = rng.randrange(1, 4), rng.randrange(1, 4), rng.randrange(1, 40)
        total = sum(counts) + overhead * len(counts)
        load = [0] * workers
        for count, own in zip(
            counts, pieces_by_share(counts, workers, overhead, least), strict=True
        ):
            assert [low for _, low, _ in own] == [0, *(high for _, _, high in own[:-1])]
            assert own[-1][2] == count
            assert all(high - low >= min(least, count) for _, low, high in own)
            for worker, low, high in own:
                load[worker] += high - low
        assert max(load) < equal_share(total, workers, overhead, least) + 2 * least


def test_equal_work_is_not_cut():
    """As many sequences of one length as workers: a whole one each."""
    assert pieces_by_share([32] * 148, 148, 2, 2) == [[(c, 0, 32)] for c in range(148)]


def check(kernel, problem, policy, before=None, window=(-1, -1), workers=6, num_splits=1):
    """Output, LSE, the number of pieces; the counters are zero again."""
    result = fake.run(
        kernel, problem, policy, workers=workers, num_splits=num_splits, window=window,
        before=before,
    )  # fmt: skip
    out, lse = problem.reference(*window)
    torch.testing.assert_close(result.out.double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.lse.double(), lse, atol=1e-5, rtol=1e-6)
    assert not result.counters.any()
    cutting = kernel.cutting
    _, seqlen_q, heads, _ = problem.scores.shape
    counts = work_counts(
        problem.lengths.tolist(), seqlen_q, heads, cutting.rows, cutting.tile_n, window
    )
    expected = [1] * len(counts)
    if cutting.cut is Cut.SHARE:
        own = pieces_by_share(counts, workers, cutting.overhead, cutting.least)
        expected = [len(pieces) for pieces in own]
    elif cutting.cut is Cut.FIXED:
        expected = [max(1, min(count, num_splits)) for count in counts]
    assert result.pieces.flatten().tolist() == [kernel.ranks * n for n in expected]
    return result


@policies
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_shares(policy, lengths):
    kernel = fake.Fake(Cutting(Cut.SHARE, 64, 4))
    check(kernel, fake.Problem.make(LENGTHS[lengths], 1, 64), policy, workers=11)


@policies
@pytest.mark.parametrize("num_splits", [1, 2, 5, 40])
def test_fixed(policy, num_splits):
    kernel = fake.Fake(Cutting(Cut.FIXED, 16, 4), row_minor=False)
    problem = fake.Problem.make(LENGTHS["mixed"], 1, 16)
    check(kernel, problem, policy, workers=9, num_splits=num_splits)


@policies
@pytest.mark.parametrize("cut", list(Cut))
def test_row_blocks_and_windows(policy, cut):
    """Four positions of 40 heads are three blocks of 64 rows, of which the last is not full."""
    problem = fake.Problem.make([150, 3, 0, 70], 4, 40)
    cutting = Cutting(cut, 64, 4, window_left=True, window_right=True)
    for window in ((30, 0), (1000, 3)):
        check(fake.Fake(cutting), problem, policy, window=window, num_splits=3)


@policies
@pytest.mark.parametrize("cut", [Cut.FIXED, Cut.SHARE])
def test_clusters(policy, cut):
    """Two CTAs, each with half the rows of a work tile."""
    kernel = fake.Fake(Cutting(cut, 128, 4), ranks=2)
    problem = fake.Problem.make(LENGTHS["mixed"], 2, 50)
    check(kernel, problem, policy, workers=5, num_splits=3)


@pytest.mark.parametrize("cut", [Cut.FIXED, Cut.SHARE])
def test_launches_that_follow_on_one_workspace(cut):
    """Lengths change between them, as between replays of a CUDA graph."""
    kernel = fake.Fake(Cutting(cut, 64, 4))
    problem = fake.Problem.make([200, 90, 300], 1, 64)
    for policy in POLICIES:
        before = None
        for lengths in ([200, 90, 300], [0, 90, 10], [1, 5, 299], [200, 90, 300]):
            problem.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
            before = check(kernel, problem, policy, before, workers=11, num_splits=7)


def test_bits_do_not_depend_on_timing():
    """Whoever reduces: the same order of summation."""
    for cut in (Cut.FIXED, Cut.SHARE):
        kernel = fake.Fake(Cutting(cut, 64, 4))
        problem = fake.Problem.make([900, 90], 1, 64)
        results = [
            fake.run(kernel, problem, policy, workers=40, num_splits=23) for policy in POLICIES
        ]
        assert int(results[0].pieces.max()) > 16
        assert all(torch.equal(result.out, results[0].out) for result in results)
        assert all(torch.equal(result.lse, results[0].lse) for result in results)


def test_a_fixed_split_does_not_depend_on_the_batch():
    kernel = fake.Fake(Cutting(Cut.FIXED, 64, 4))
    batch = fake.Problem.make([130, 0, 77, 300], 1, 64)
    alone = fake.Problem(batch.scores[2:3], batch.values[2:3], batch.lengths[2:3].clone())
    together = fake.run(kernel, batch, POLICIES[2], workers=11, num_splits=5)
    single = fake.run(kernel, alone, POLICIES[3], workers=3, num_splits=5)
    assert torch.equal(single.out[0], together.out[2])


def test_partition_is_that_of_tiling():
    """Fewer tiles than splits: the pieces that are not empty."""
    for count in range(1, 9):
        for splits in range(1, 12):
            of_tiling = [split_tile_range(0, count, s, splits) for s in range(splits)]
            fewer = min(splits, count)
            assert [p for p in of_tiling if p[0] < p[1]] == [
                split_tile_range(0, count, s, fewer) for s in range(fewer)
            ]
