"""The MMA warp of `decode_transposed`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha.kernels.blackwell.decode_transposed_plan import TransposedPlan
from cute_fmha.kernels.blackwell.decode_transposed_work import Shared, Work, turn
from cute_fmha.kernels.blackwell.mma import Operand, instruction_descriptor, multiply
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor

FORM = "cta_group::1"

ATOM = 1024
"""Bytes of 8 rows of 128."""


@dataclass(frozen=True)
class Operands:
    """Latents are there twice: tokens are rows of A in S, and K in O."""

    q: Operand  # (ROW, columns of a part, PART), K-major
    q_rope: Operand
    k: Operand  # (TOKEN, columns of a part, STAGE), K-major
    k_rope: Operand
    v: Operand  # (columns of a part, TOKEN, STAGE), MN-major
    p: Operand  # (ROW, TOKEN, BUFFER), MN-major


def operands(plan: TransposedPlan, shared: Shared) -> Operands:
    """In a block, a K step of 16 columns is 32 bytes, one of 16 tokens two atoms."""
    width = plan.rows * plan.dtype.itemsize
    q_block = plan.rows * 128
    part = [(block, k) for block in range(plan.part_blocks) for k in range(4)]
    rows = tuple(block * q_block + k * 32 for block, k in part)
    columns = tuple(block * plan.block_bytes + k * 32 for block, k in part)
    tokens = range(plan.tile_n // 16)
    sV = shared.sV.iterator.toint()
    sK = sV if plan.latent else shared.sK.iterator.toint()
    sR = shared.sR.iterator.toint() if plan.rope_blocks else sV
    q = Operand.swizzled(shared.sQ, 0, ATOM, rows, plan.part_blocks * q_block)
    return Operands(
        q=q,
        q_rope=replace(q, steps=q.steps[:4]),
        k=Operand.swizzled(sK, 0, ATOM, columns, plan.part_bytes),
        k_rope=Operand.swizzled(sR, 0, ATOM, columns[:4], plan.block_bytes),
        v=Operand.swizzled(
            sV, plan.block_bytes, ATOM, tuple(k * 2 * ATOM for k in tokens), plan.part_bytes
        ),
        p=Operand.swizzled(
            shared.sP, 0, 8 * width, tuple(k * 16 * width for k in tokens), plan.p_bytes, width
        ),
    )


@cute.jit
def mma(
    plan: TransposedPlan, dtype, work: Work, shared: Shared, tmem: cute.Pointer, barriers: Barriers
):
    """Reads: sQ, sV, sR, sK, sP, sKeep. Writes: S, O in TMEM.
    Waits: q_full, v_full, r_full, k_full, p_full.
    Signals: q_empty, v_empty, r_empty, k_empty, s_full, o_full.

    S of the next tile is made from its parts as they arrive; when one is not there yet, P V of the
    tile before goes first, so that its parts are released while there is nothing else to do."""
    ops = operands(plan, shared)
    s_kind = instruction_descriptor(dtype, plan.tile_n, plan.rows, False)
    full, lead = plan.s_ring + "_full", plan.depth - 1
    count = Int32(0)  # tiles whose S was made
    done = Int32(0)  # tiles whose P V was
    q_phase = Int32(0)
    s, r = Cursor(plan.s_stages), Cursor(plan.r_stages)
    held = Cursor(plan.v_stages)  # the first part that P V has not seen
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        if piece.end > piece.begin:
            barriers.wait("q_full", q_phase)
            q_phase = q_phase ^ 1
            for n in cutlass.range(piece.begin, piece.end + lead, unroll=1):
                pending = n >= piece.begin + lead
                fresh = n == piece.begin + lead
                if n < piece.end:
                    buffer, _ = turn(plan, count)
                    tS = tmem.toint() + plan.tmem["S0"].start + buffer * plan.rows
                    for part in cutlass.range(plan.parts, unroll=1):
                        if pending and not barriers.test(full, s.phase, s.index):
                            held = value_product(
                                plan, dtype, ops, shared, tmem, barriers, done, held, fresh
                            )
                            done, pending = done + 1, Boolean(False)
                        barriers.wait(full, s.phase, s.index)
                        multiply(
                            FORM, tS, ops.k, ops.q, ops.q.tile(part), s_kind, part > 0,
                            s.index * ops.k.stage,
                        )  # fmt: skip
                        if cutlass.const_expr(not plan.latent):
                            barriers.commit("k_empty", s.index)
                        s = s.next()
                    if cutlass.const_expr(plan.rope_blocks > 0):
                        barriers.wait("r_full", r.phase, r.index)
                        multiply(
                            FORM, tS, ops.k_rope, ops.q_rope, ops.q_rope.tile(plan.parts), s_kind,
                            True, r.index * ops.k_rope.stage,
                        )  # fmt: skip
                        barriers.commit("r_empty", r.index)
                        r = r.next()
                    barriers.commit("s_full", buffer)
                    count = count + 1
                    if n == piece.end - 1:
                        barriers.commit("q_empty")
                if pending:
                    held = value_product(
                        plan, dtype, ops, shared, tmem, barriers, done, held, fresh
                    )
                    done = done + 1
        place = work.pieces.next(place, piece)


@cute.jit
def value_product(
    plan: TransposedPlan, dtype, ops: Operands, shared: Shared, tmem: cute.Pointer,
    barriers: Barriers, number: Int32, held: Cursor, fresh: Boolean,
):  # fmt: skip
    """O (+)= P V of tile ``number``, part by part, each released at once; the next part's place."""
    o_kind = instruction_descriptor(
        dtype, plan.columns, plan.rows, b_is_mn_major=True, a_is_mn_major=True
    )
    buffer, phase = turn(plan, number)
    barriers.wait_tmem("p_full", phase, buffer)
    keep, parts = Boolean(True), plan.parts
    if cutlass.const_expr(plan.features.skip):
        keep = shared.sKeep[buffer] != 0
        if cutlass.const_expr(not plan.latent):
            parts = parts * Int32(keep)  # of a skipped tile there are no values
    for part in cutlass.range(parts, unroll=1):
        if cutlass.const_expr(not plan.latent):
            barriers.wait("v_full", held.phase, held.index)
        if keep:
            multiply(
                FORM, tmem.toint() + plan.tmem["O0"].start + part * plan.rows, ops.v, ops.p,
                ops.p.tile(buffer), o_kind, not fresh, held.index * ops.v.stage,
            )  # fmt: skip
        barriers.commit("v_empty", held.index)
        held = held.next()
    barriers.commit("o_full", buffer)
    return held
