"""The order of work tiles: each once, the longest first, heads that share K and V together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.kernels.blackwell import prefill_schedule
from cute_fmha.kernels.blackwell.plan import Features, make_plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Scalars
from cute_fmha.tiling import ceil_div

BF16 = torch.bfloat16
ROW_BYTES = 2 * 128 * 2
"""K and V of one key at (128, 128)."""


class ListPlaces:
    """(exists, block, head, head_kv, batch) of every index, found by one warp."""

    def __init__(self, plan):
        self.plan = plan

    @cute.jit
    def __call__(self, mQ, mK, mStartQ, mStartK, mPlaces):
        self.kernel(mQ, mK, mStartQ, mStartK, mPlaces).launch(grid=(1, 1, 1), block=(32, 1, 1))

    @cute.kernel
    def kernel(self, mQ, mK, mStartQ, mStartK, mPlaces):
        mem = Global(*[None] * len(Global._fields))
        mem = mem._replace(mQ=mQ, mK=mK, mStartQ=mStartQ, mStartK=mStartK)
        scalars = Scalars(*[None] * len(Scalars._fields))
        order = prefill_schedule.Schedule(self.plan, mem, scalars)
        blocks = Int32(0)
        walk = prefill_schedule.Walk(Int32(prefill_schedule.TOP), Int32(0), Int32(0))
        if cutlass.const_expr(self.plan.features.packed):
            blocks = order.all_blocks()
        for index in cutlass.range(mPlaces.shape[0], unroll=1):
            if cutlass.const_expr(self.plan.features.packed):
                place, walk = order.find_packed(index, blocks, walk)
            else:
                place = order.find_dense(index)
            words = (place.exists, place.block, place.head, place.head_kv, place.batch)
            if cute.arch.lane_idx() == 0:
                for word in cutlass.range_constexpr(5):
                    mPlaces[index, word] = words[word]


def places(plan, shapes, count, starts=(None, None)):
    """The places of ``count`` indices; shapes are (SEQ, D, HEAD, BATCH) of Q and K."""

    def tensor(x):
        return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)

    found = torch.zeros(count, 5, dtype=torch.int32)
    given = [tensor(torch.empty(shape, dtype=BF16)) for shape in shapes]
    given += [None if x is None else tensor(torch.tensor(x, dtype=torch.int32)) for x in starts]
    emulate(compile_kernel(ListPlaces(plan), *given, tensor(found)), *given, tensor(found))
    return [tuple(row) for row in found.tolist()]


@pytest.mark.parametrize("fitting", [1, 3, 100])
def test_dense(monkeypatch, fitting):
    """6 pairs of K and V, of which ``fitting`` fit into the L2, in sections."""
    heads_q, heads_kv, batches, seqlen = 4, 2, 3, 700
    monkeypatch.setattr(prefill_schedule, "L2_BYTES", fitting * seqlen * ROW_BYTES)
    plan = make_plan(128, 128, BF16, BF16, Features(window_right=True))
    pairs = [(batch, head_kv) for batch in range(batches) for head_kv in range(heads_kv)]
    expected = [
        (1, block, 2 * head_kv + sub, head_kv, batch)
        for first in range(0, len(pairs), fitting)
        for block in (2, 1, 0)
        for batch, head_kv in pairs[first : first + fitting]
        for sub in range(2)
    ]
    shapes = [(seqlen, 128, heads, batches) for heads in (heads_q, heads_kv)]
    assert places(plan, shapes, len(expected)) == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("fitting", [1, 100])
def test_packed(monkeypatch, causal, pack, fitting):
    """Every work tile once and then none; the longest first in every section of heads."""
    lengths = [(300, 300), (0, 5), (1, 2000), (900, 900), (600, 1200), (40, 0), (513, 700)] * 6
    heads_q, heads_kv = 4, 2
    starts = [[sum(pair[side] for pair in lengths[:n]) for n in range(43)] for side in (0, 1)]
    monkeypatch.setattr(prefill_schedule, "L2_BYTES", fitting * starts[1][-1] * ROW_BYTES)
    plan = make_plan(128, 128, BF16, BF16, Features(window_right=causal, packed=True))
    plan = replace(plan, pack=pack)
    positions = plan.work_rows // pack
    blocks = [ceil_div(length_q, positions) for length_q, _ in lengths]
    heads = heads_q // pack
    total = sum(blocks) * heads
    shapes = [(starts[0][-1] * pack, 128, heads), (starts[1][-1], 128, heads_kv)]
    found = places(plan, shapes, total + 3, starts)
    assert [place[0] for place in found] == [1] * total + [0] * 3
    found = found[:total]
    assert sorted((place[4], place[2], place[1]) for place in found) == [
        (batch, head, block)
        for batch, count in enumerate(blocks)
        for head in range(heads)
        for block in range(count)
    ]
    assert all(place[3] == place[2] // (heads // heads_kv) for place in found)

    def keys(place):
        """Work tiles' worth of keys that a work tile sees; a row counts where there is no key."""
        top = max(ceil_div(lengths[place[4]][1], positions), blocks[place[4]])
        return top - (blocks[place[4]] - 1 - place[1]) if causal else top

    sections = min(fitting, heads_kv)
    for first in range(0, total, total // heads_kv * sections):
        section = found[first : first + total // heads_kv * sections]
        order = [keys(place) for place in section]
        assert order == sorted(order, reverse=True)
        assert {place[3] for place in section} == set(
            range(section[0][3], section[0][3] + sections)
        )
