"""The swap warps of `mla_decode` in a pair of CTAs: values to where P V needs them.

A pair's MMA reads B at the same shared address of both CTAs: for Q Kᵀ the same columns of different
keys, for P V different columns of the same keys. With keys T0, T1 and columns C0, C1:

                 Q Kᵀ                       P V
              CTA 0      CTA 1          CTA 0      CTA 1
    stage 0   T0 × C0    T1 × C0        T0 × C0    T0 × C1
    stage 1   T0 × C1    T1 × C1        T1 × C0    T1 × C1

So no byte can serve both without moving, but half of them can stay: after Q Kᵀ, stage 1 of CTA 0
and stage 0 of CTA 1 change places, through registers and distributed shared memory. Each latent row
is fetched once, and a skipped tile is not swapped.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_operands import Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor

STEP = 2 * 32 * 16
"""Bytes that the two warps of the role move at a time."""


@cute.jit
def swap(plan: MlaPlan, work: Work, shared: Shared, barriers: Barriers):
    """Reads: a stage of sLatent. Writes: a stage of the other CTA's sLatent.
    Waits: s_full, voted, given. Signals: given, swapped. Registers: 144."""
    own = shared.sLatent.iterator.toint() + cute.arch.thread_idx()[0] % 64 * 16
    other = ptx.map_shared(own, work.rank ^ 1)
    s, exchange, k = Cursor(2), Cursor(2), Cursor(plan.stages)
    place = work.pieces.start
    while work.pieces.more(place):
        keys = work.pieces.piece(place)
        for _ in cutlass.range(keys.begin, keys.end, unroll=1):
            first, second = k.index, k.next().index
            k = k.next().next()
            barriers.wait("s_full", s.phase, s.index)
            keep = Boolean(True)
            if cutlass.const_expr(plan.features.skip):
                barriers.wait("voted", s.phase, s.index)
                keep = shared.keeps(s.index)
            if keep:
                # CTA 0 gives its second stage away and gets one there, CTA 1 its first.
                given = second if work.rank == 0 else first
                taken = first if work.rank == 0 else second
                source, target = own + given * plan.half_bytes, other + taken * plan.half_bytes
                words = []
                for offset in cutlass.range_constexpr(0, plan.half_bytes, STEP):
                    words.append(ptx.load_shared(source, offset=offset))
                barriers.arrive("given", exchange.index)
                barriers.wait("given", exchange.phase, exchange.index)
                exchange = exchange.next()
                for i in cutlass.range_constexpr(len(words)):
                    ptx.store_cluster(target, words[i], i * STEP)
                cute.arch.fence_proxy("async.shared", space="cluster")
            barriers.arrive("swapped", s.index)
            s = s.next()
        place = work.pieces.next(place, keys)
