"""The swap warps of `mla_decode` in a pair of CTAs: values to where P V needs them.

A pair's MMA reads B at the same shared address of both CTAs: for Q Kᵀ the same columns of different
keys, for P V different columns of the same keys. With keys T0, T1 and columns C0, C1:

                 Q Kᵀ                       P V
              CTA 0      CTA 1          CTA 0      CTA 1
    stage 0   T0 × C0    T1 × C0        T0 × C0    T0 × C1
    stage 1   T0 × C1    T1 × C1        T1 × C0    T1 × C1

So no byte can serve both without moving, but half of them can stay: after Q Kᵀ, stage 1 of CTA 0
and stage 0 of CTA 1 change places. Each latent row is fetched once, and a skipped tile is not
swapped.

Where two places are to change their contents, one of them must be kept elsewhere meanwhile. Each
CTA keeps half of its stage in registers; the other half follows in one bulk copy as soon as its
place is free, and when that has arrived, so is the place where the registers go:

    CTA 0                              CTA 1
    keep half 0          given ──>     copy half 0 of stage 0 to CTA 0
                         <── moved
    store half 0 to CTA 1                                           and half 1 the other way round
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.mla_decode_operands import Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor

STEP = 2 * 32 * 16
"""Bytes that the two warps of the role load at a time."""


@cute.jit
def swap(plan: MlaPlan, work: Work, shared: Shared, barriers: Barriers):
    """Reads: a stage of sLatent. Writes: a stage of the other CTA's sLatent, half of it by a bulk
    copy.
    Waits: s_full or voted, given, moved. Signals: given, moved, swapped. Registers: 88."""
    thread = cute.arch.thread_idx()[0] % 64
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    half = plan.half_bytes // 2
    latent = shared.sLatent.iterator.toint()
    kept = latent + work.rank * half + thread * 16
    copied = latent + (work.rank ^ 1) * half
    kept_target = ptx.map_shared(kept, work.rank ^ 1)
    copied_target = ptx.map_shared(copied, work.rank ^ 1)
    moved = ptx.map_shared(barriers.at("moved").toint(), work.rank ^ 1)
    s, phase = Cursor(2), Int32(0)
    # CTA 0 gives the second stage of a tile away and gets one there, CTA 1 the first. Where the
    # one begins that is given, and the other CTA's that takes it:
    given = (1 - work.rank) * plan.half_bytes
    taken = work.rank * plan.half_bytes
    place = work.pieces.start
    while work.pieces.more(place):
        keys = work.pieces.piece(place)
        for _ in cutlass.range(keys.begin, keys.end, unroll=1):
            keep = Boolean(True)
            if cutlass.const_expr(plan.features.skip):
                # Who votes has S.
                barriers.wait("voted", s.phase, s.index)
                keep = shared.keeps(s.index)
            else:
                barriers.wait("s_full", s.phase, s.index)
            if keep:
                words = []
                for offset in cutlass.range_constexpr(0, half, STEP):
                    words.append(ptx.load_shared(kept + given, offset=offset))
                barriers.arrive("given")
                if warp == plan.role("swap").warps[0]:
                    with cute.arch.elect_one():
                        barriers.expect_elected("moved", half)
                        barriers.wait("given", phase)
                        ptx.copy_cluster(copied_target + taken, copied + given, half, moved)
                barriers.wait("moved", phase)
                phase = phase ^ 1
                target = kept_target + taken
                for i in cutlass.range_constexpr(len(words)):
                    ptx.store_cluster(target, words[i], i * STEP)
                cute.arch.fence_proxy("async.shared", space="cluster")
            barriers.arrive("swapped", s.index)
            s = s.next()
            given, taken = two_on(plan, given), two_on(plan, taken)
        place = work.pieces.next(place, keys)


def two_on(plan: MlaPlan, start: Int32) -> Int32:
    """Where the stage begins that comes two after the one at ``start``."""
    last = (plan.stages - 2) * plan.half_bytes
    step = cutlass.select_(start < last, Int32(2 * plan.half_bytes), Int32(-last))
    return start + step
