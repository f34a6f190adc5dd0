"""Warp-specialised prefill for Hopper (sm_90a), in Gluon: TMA, mbarriers, asynchronous wgmma.

Mathematics, for one tile of query rows and its KV tiles n = begin … end − 1 in ascending order
(scores in log2 units, x = scale · log2 e):

    S(n) = Q K(n)ᵀ,  m' = max(m, x · rowmax S(n)),  P(n) = exp2(x S(n) − m'),  α = exp2(m − m')
    l' = α l + rowsum P(n),  O' = α O + P(n) V(n);      out = O / l,  LSE = ln 2 · (m + log2 l)

With softcap c, x S is replaced by c log2 e · tanh(scale S / c). A sink joins l (and m) at the end.
Masked scores are −inf; m starts at a finite −1e30, so a row that sees no key keeps l = 0 and gives
0 and −inf. The row sum stays one partial sum per thread until the end.

Shapes: q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]``; packed tensors are the
same with B = 1 and the sequence's first row added. D is split in D0 + D1, powers of two (192 = 128
+ 64, 96 = 64 + 32); V is padded to a power of two by TMA's zero fill.

| warps | role | registers | reads | writes |
| --- | --- | --- | --- | --- |
| 0–3, 4–7 (, 8–11) | `consume`: S, softmax, O of 64 rows | 160–240 | sQ, sK, sV | out, LSE |
| next 1 | `load`: takes tickets, TMA | 24–40 | q, k, v | sQ, sK, sV, sWork |

    load ── q_full ──▶ consume      work tile: sQ, one buffer per warpgroup
    load ── k_full ──▶ consume      ring of k_stages K tiles    ◀── k_empty ── consume
    load ── v_full ──▶ consume      ring of v_stages V tiles    ◀── v_empty ── consume
    load ── work_full ─▶ consume    two work-tile messages      ◀── work_empty ── consume
    consume ── order ──▶ next consume    ping-pong: the right to issue wgmma goes round
    consume ── voted ──▶ load            skip-softmax: does this warpgroup need V(n)?

One steady iteration of two warpgroups (A, B), each half a period apart:

    tensor core   A: S(n) A: PV(n−1)   B: S(n) B: PV(n−1)   A: S(n+1) A: PV(n)   …
    A             issue | max | ·      exp2, rescale O, P   issue | max          …
    B             exp2, rescale O, P   issue | max | ·      exp2, rescale O, P   …
    load          K(n+1)   V(n)                             K(n+2)   V(n+1)

Three consumer warpgroups at Dv = 64, else two.

Scheduling: a persistent CTA takes the next ticket of a global counter (int32 [2] in the workspace,
left at zero). Tickets run through sections of heads whose K and V fit in part of the L2, longest
query tiles first under a causal mask. A static round-robin of such a list reached 420–511 TFLOP/s
at causal 2 × 16 × 8192 × 128 by section size, the tickets (with smaller changes) 571–620.

Skip-softmax: the voting unit (`Plan.tile_m`) is one warpgroup's 64 rows. Each warpgroup votes as
soon as the row maxima of S(n) are known, while its PV(n−1) runs; V(n) is fetched on the first
vote to keep, and not at all when every vote is to skip. PV(n) is issued one iteration after the
vote. With nothing skipped this variant still measured 14 % below the plain one (d128).

Memory past a sequence's end may hold NaN: scores there are masked, V rows are zeroed in shared
memory (0 · NaN is NaN) in the one tile that can contain them, and output rows are predicated.

Constraints: `can_implement` and, for what depends on the tensors, `unaligned`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cute_fmha import tiling
from cute_fmha.problem import Problem, Target, target_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call

kv_tile_ranges = gluon.jit(tiling.kv_tile_ranges)

NO_MAX = gl.constexpr(-1.0e30)
DEAD_MAX = gl.constexpr(1.0e30)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)

SECTION_BYTES = 16 << 20
"""K and V of the heads in flight together. 32 MiB was slower in most single timings, not in all."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the kernel is compiled for.

    tile_m: query rows of one warpgroup, the unit that votes and counts. tile_n: keys per tile.
    d0 + d1: head dim; dv: padded, dv_valid: true value width. registers: per thread of a
    consumer, of the producer, and at launch. overlap_pv: wait for PV(n−1) only after softmax(n).
    poison: V rows past the end of a sequence may be NaN.
    """

    tile_m: int
    tile_n: int
    consumers: int
    k_stages: int
    v_stages: int
    registers: tuple[int, int, int]
    d0: int
    d1: int
    dv: int
    dv_valid: int
    q_in_registers: bool
    overlap_pv: bool
    window_left: bool
    window_right: bool
    softcap: bool
    skip: bool
    skip_relative: bool = False
    poison: bool = False

    @property
    def warps(self) -> int:
        return 4 * self.consumers + 1

    @property
    def stages(self) -> int:
        return self.k_stages


class Barriers(NamedTuple):
    """mbarriers, by the state they announce; ``voted`` per V stage and warpgroup."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    order: Any
    work_full: Any
    work_empty: Any
    voted: Any


class Buffers(NamedTuple):
    """Shared memory: Q per warpgroup, rings of K (two parts of D) and V, work tiles, votes."""

    sQ0: Any
    sQ1: Any
    sK0: Any
    sK1: Any
    sV: Any
    sWork: Any
    sKeep: Any


# ------------------------------------------------------------------------------ work tiles
@gluon.jit
def locate(ticket, sizes, sequences, PLAN: gl.constexpr):
    """Ticket -> (batch, head, first query row, q start, q length, k start, k length)."""
    length_q, length_k, heads_q, _group, batch_heads, section, tiles_m = sizes
    first = ticket // (section * tiles_m) * section
    ticket -= first * tiles_m
    width = gl.minimum(section, batch_heads - first)
    tile = ticket // width
    head = first + ticket % width
    if PLAN.window_right:
        tile = tiles_m - 1 - tile
    batch = head // heads_q
    head = head % heads_q
    cu_q, cu_k, seqused = sequences
    q_start = 0
    k_start = 0
    if cu_q is not None:
        q_start = gl.load(cu_q + batch)
        length_q = gl.load(cu_q + batch + 1) - q_start
        k_start = gl.load(cu_k + batch)
        length_k = gl.load(cu_k + batch + 1) - k_start
    if seqused is not None:
        length_k = gl.load(seqused + batch)
    return batch, head, tile * PLAN.tile_m * PLAN.consumers, q_start, length_q, k_start, length_k


@gluon.jit
def post(work, fields, sWork, barriers):
    """Hand a work tile to the consumers, who then neither divide nor read global memory."""
    slot = work % 2
    mbarrier.wait(barriers.work_empty.index(slot), ((work // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mail = sWork.index(slot)
    for i in gl.static_range(6):
        mail.slice(i, 1).store(gl.full([1], fields[i], gl.int32, layout))
    mbarrier.arrive(barriers.work_full.index(slot), count=1)


@gluon.jit
def read_field(mail, i: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(mail.slice(i, 1).load(layout), axis=0)


@gluon.jit
def receive(work, sWork, barriers):
    """The next work tile: (batch or −1 for none, head, first row, q start, q and k length)."""
    slot = work % 2
    mbarrier.wait(barriers.work_full.index(slot), (work // 2) & 1)
    mail = sWork.index(slot)
    batch = read_field(mail, 0)
    head = read_field(mail, 1)
    first = read_field(mail, 2)
    q_start = read_field(mail, 3)
    length_q = read_field(mail, 4)
    length_k = read_field(mail, 5)
    mbarrier.arrive(barriers.work_empty.index(slot), count=1)
    return batch, head, first, q_start, length_q, length_k


# ------------------------------------------------------------------------------ producer
@gluon.jit
def load_k(descs, buffers, barriers, place, row, ring, PLAN: gl.constexpr):
    batch, head = place
    slot = ring % PLAN.k_stages
    full = barriers.k_full.index(slot)
    mbarrier.wait(barriers.k_empty.index(slot), ((ring // PLAN.k_stages) & 1) ^ 1)
    mbarrier.expect(full, PLAN.tile_n * (PLAN.d0 + PLAN.d1) * 2)
    tma.async_copy_global_to_shared(descs[2], [batch, row, head, 0], full, buffers.sK0.index(slot))
    if PLAN.d1 > 0:
        tma.async_copy_global_to_shared(
            descs[3], [batch, row, head, PLAN.d0], full, buffers.sK1.index(slot)
        )


@gluon.jit
def load_v(desc, buffers, barriers, place, row, ring, PLAN: gl.constexpr):
    """V of one tile; with skip-softmax only once a warpgroup has voted to keep the tile.

    The barrier of a tile that nobody needs is completed without data, so that ring positions
    stay those of the KV tiles.
    """
    CONSUMERS: gl.constexpr = PLAN.consumers
    batch, head = place
    slot = ring % PLAN.v_stages
    phase = (ring // PLAN.v_stages) & 1
    full = barriers.v_full.index(slot)
    wanted = ring < 0
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for c in gl.static_range(CONSUMERS if PLAN.skip else 1):
        fetch = not wanted
        if PLAN.skip:
            vote = slot * CONSUMERS + c
            mbarrier.wait(barriers.voted.index(vote), phase)
            fetch = fetch & (gl.max(buffers.sKeep.index(vote).load(layout), axis=0) > 0)
        if fetch:
            mbarrier.wait(barriers.v_empty.index(slot), phase ^ 1)
            mbarrier.expect(full, PLAN.tile_n * PLAN.dv * 2)
            stage = buffers.sV.index(slot)
            tma.async_copy_global_to_shared(desc, [batch, row, head, 0], full, stage)
        wanted = wanted | fetch
    if PLAN.skip and not wanted:
        mbarrier.wait(barriers.v_empty.index(slot), phase ^ 1)
        mbarrier.arrive(full, count=1)


@gluon.jit
def load(arguments, PLAN: gl.constexpr):
    """Reads: q, k, v, sequence bounds, votes. Writes: sQ, sK, sV, sWork. Waits: *_empty, voted.
    Signals: *_full. Registers: PLAN.registers[1]."""
    descs, buffers, barriers, sizes, sequences, window, total, counters = arguments
    CONSUMERS: gl.constexpr = PLAN.consumers
    ring = 0
    loaded = 0
    work = 0
    ticket = gl.program_id(0)
    while ticket < total:
        batch, head, row, q_start, length_q, k_start, length_k = locate(
            ticket, sizes, sequences, PLAN
        )
        fields = (batch, head, row, q_start, length_q, length_k)
        post(work, fields, buffers.sWork, barriers)
        work += 1
        begin, _f0, _f1, end = kv_tile_ranges(
            row, gl.minimum(row + PLAN.tile_m * CONSUMERS, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        if row >= length_q:
            end = begin
        if sequences[0] is not None:
            batch = 0
        place = (batch, head // sizes[3])
        if begin < end:
            for c in gl.static_range(CONSUMERS):
                full = barriers.q_full.index(c)
                q_row = q_start + row + c * PLAN.tile_m
                mbarrier.wait(barriers.q_empty.index(c), (loaded & 1) ^ 1)
                mbarrier.expect(full, PLAN.tile_m * (PLAN.d0 + PLAN.d1) * 2)
                tma.async_copy_global_to_shared(
                    descs[0], [batch, q_row, head, 0], full, buffers.sQ0.index(c)
                )
                if PLAN.d1 > 0:
                    tma.async_copy_global_to_shared(
                        descs[1], [batch, q_row, head, PLAN.d0], full, buffers.sQ1.index(c)
                    )
            loaded += 1
            k_row = k_start + begin * PLAN.tile_n
            load_k(descs, buffers, barriers, place, k_row, ring, PLAN)
        for tile in range(begin, end):
            k_row = k_start + tile * PLAN.tile_n
            if tile + 1 < end:
                load_k(descs, buffers, barriers, place, k_row + PLAN.tile_n, ring + 1, PLAN)
            load_v(descs[4], buffers, barriers, place, k_row, ring, PLAN)
            ring += 1
        ticket = gl.num_programs(0) + gl.atomic_add(counters, 1, sem="relaxed")
    post(work, (-1, 0, 0, 0, 0, 0), buffers.sWork, barriers)
    # The last CTA to stop leaves both counters at zero for the next launch.
    if gl.atomic_add(counters + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


# ------------------------------------------------------------------------------ softmax
@gluon.jit
def mask_scores(s, row, column, lengths, window, PLAN: gl.constexpr):
    """−inf where a key is past the sequence's end or outside the window (see tiling.py)."""
    length_q, length_k = lengths
    columns = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    rows = row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, s.type.layout))
    diagonal = rows + (length_k - length_q)
    limit = gl.full_like(rows, 0) + (length_k - 1)
    if PLAN.window_right:
        limit = gl.minimum(limit, diagonal + window[1])
    visible = columns[None, :] <= limit[:, None]
    if PLAN.window_left:
        visible = visible & (columns[None, :] >= (diagonal - window[0])[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def finish_scores(s, scores, row, column, lengths, window, MASK: gl.constexpr, PLAN: gl.constexpr):
    """(s, multiplier, row maxima): softcap and mask applied; multiplier · s is in log2 units."""
    multiplier = scores[0]
    if PLAN.softcap:
        e = gl.exp2(s * (2.0 * LOG2_E * scores[1] / scores[2]))
        s = (scores[2] * LOG2_E) * (1.0 - 2.0 / (e + 1.0))
        multiplier = 1.0
    if MASK:
        s = mask_scores(s, row, column, lengths, window, PLAN)
    return s, multiplier, row_maxima(s) * multiplier


@gluon.jit
def row_maxima(s):
    """Row maxima: pairs first (independent instructions), then this thread's, then the quad's."""
    ROWS: gl.constexpr = s.shape[0]
    COLUMNS: gl.constexpr = s.shape[1]
    x = gl.max(s.reshape([ROWS, COLUMNS // 8, 4, 2]), axis=3)
    x = gl.max(gl.max(x, axis=1), axis=1)
    return gl.convert_layout(x, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.jit
def lane_sums(p):
    """[rows, 4]: the sum of what each thread of a row's quad holds (no shuffle)."""
    ROWS: gl.constexpr = p.shape[0]
    COLUMNS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([ROWS, COLUMNS // 8, 4, 2]), axis=3), axis=1)


@gluon.jit
def softmax(s, tile_max, multiplier, row_max, row_sum):
    """(P, α, new row max, new lane sums)."""
    new_max = gl.maximum(row_max, tile_max)
    p = gl.exp2(s * multiplier - new_max[:, None])
    alpha = gl.exp2(row_max - new_max)
    scale = gl.convert_layout(alpha, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True)
    return p, alpha, new_max, row_sum * scale[:, None] + lane_sums(p)


@gluon.jit
def rescale(acc, alpha):
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def log2_lambda(skip, length_k, PLAN: gl.constexpr):
    """log2 λ, once per work tile; −inf where λ is off (NaN or <= 0)."""
    value = skip[1]
    if skip[0] is not None:
        value = gl.load(skip[0])
    if PLAN.skip_relative:
        value = value / gl.maximum(length_k, 1).to(gl.float32)
    bounded = gl.minimum(gl.where(value > 0.0, value, 1.0), 1.0)
    return gl.where(value > 0.0, gl.log2(bounded), float("-inf"))


# ------------------------------------------------------------------------------ consumer
@gluon.jit
def issue_scores(q_tiles, buffers, slot, PLAN: gl.constexpr, LAYOUT: gl.constexpr):
    """Start S = Q Kᵀ."""
    zero = gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, LAYOUT)
    k0 = buffers.sK0.index(slot)
    s = warpgroup_mma(q_tiles[0], k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if PLAN.d1 > 0:
        k1 = buffers.sK1.index(slot)
        s = warpgroup_mma(q_tiles[1], k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def pass_turn(barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    mbarrier.arrive(barriers.order.index((WHO + 1) % PLAN.consumers), count=1)


@gluon.jit
def vote(keep, ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """Tell the producer whether this warpgroup needs the tile's V."""
    slot = (ring % PLAN.v_stages) * PLAN.consumers + WHO
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    buffers.sKeep.index(slot).store(gl.full([1], keep, gl.int32, layout))
    mbarrier.arrive(barriers.voted.index(slot), count=1)


@gluon.jit
def release(ring, buffers, barriers, WHO: gl.constexpr, PLAN: gl.constexpr):
    """A tile that only other warpgroups need: wait for it (or one phase of an empty barrier could
    count this warpgroup twice), then hand it back."""
    mbarrier.wait(barriers.order.index(WHO), ring & 1)
    pass_turn(barriers, WHO, PLAN)
    slot = ring % PLAN.k_stages
    mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
    mbarrier.arrive(barriers.k_empty.index(slot), count=1)
    if PLAN.skip:
        vote(0, ring, buffers, barriers, WHO, PLAN)
    slot = ring % PLAN.v_stages
    mbarrier.wait(barriers.v_full.index(slot), (ring // PLAN.v_stages) & 1)
    mbarrier.arrive(barriers.v_empty.index(slot), count=1)


@gluon.jit
def kv_loop(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles [lo, hi): S(n) and PV(n−1) on the tensor core, then the softmax of tile n.

    State: O, P(n−1), row max, lane sums, whether P(n−1) awaits its product, tiles skipped.
    """
    acc, p, row_max, row_sum, pending, skipped = state
    offset, end, row = spot
    lengths, window, scores, _log2_threshold = values
    for tile in range(lo, hi):
        ring = tile + offset
        slot = ring % PLAN.k_stages
        last = (ring - 1) % PLAN.v_stages
        phase = ((ring - 1) // PLAN.v_stages) & 1
        mbarrier.wait(barriers.order.index(WHO), ring & 1)
        mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
        s = issue_scores(q_tiles, buffers, slot, PLAN, LAYOUT)
        mbarrier.wait(barriers.v_full.index(last), phase)
        acc = warpgroup_mma(p, buffers.sV.index(last), acc, is_async=True)
        pass_turn(barriers, WHO, PLAN)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(barriers.k_empty.index(slot), count=1)
        if not PLAN.q_in_registers:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=tile == end - 1)
        s, multiplier, tile_max = finish_scores(
            s, scores, row, tile * PLAN.tile_n, lengths, window, MASK, PLAN
        )
        new_p, alpha, row_max, row_sum = softmax(s, tile_max, multiplier, row_max, row_sum)
        if PLAN.overlap_pv:
            # ptxas hoists the wgmma wait over the softmax unless a branch lies between them; this
            # wait has already been satisfied and is there for its branch.
            next_p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
            mbarrier.wait(barriers.v_full.index(last), phase)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        else:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            next_p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
        mbarrier.arrive(barriers.v_empty.index(last), count=1)
        acc = rescale(acc, alpha)
        p = next_p
    return acc, p, row_max, row_sum, pending, skipped


@gluon.jit
def kv_loop_skip(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`kv_loop` with a vote per tile. No wgmma is in flight where control flow divides: ptxas may
    serialise wgmma across branches (not tried)."""
    acc, p, row_max, row_sum, pending, skipped = state
    offset, end, row = spot
    lengths, window, scores, log2_threshold = values
    for tile in range(lo, hi):
        ring = tile + offset
        slot = ring % PLAN.k_stages
        last = (ring - 1) % PLAN.v_stages
        phase = ((ring - 1) // PLAN.v_stages) & 1
        column = tile * PLAN.tile_n
        mbarrier.wait(barriers.order.index(WHO), ring & 1)
        mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
        if pending:
            raw = issue_scores(q_tiles, buffers, slot, PLAN, LAYOUT)
            mbarrier.wait(barriers.v_full.index(last), phase)
            acc = warpgroup_mma(p, buffers.sV.index(last), acc, is_async=True)
            pass_turn(barriers, WHO, PLAN)
            raw = warpgroup_mma_wait(1, deps=(raw,))
            mbarrier.arrive(barriers.k_empty.index(slot), count=1)
            s, multiplier, tile_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = gl.max((tile_max >= row_max + log2_threshold).to(gl.int32), axis=0)
            vote(keep, ring, buffers, barriers, WHO, PLAN)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        else:
            raw = issue_scores(q_tiles, buffers, slot, PLAN, LAYOUT)
            pass_turn(barriers, WHO, PLAN)
            raw = warpgroup_mma_wait(0, deps=(raw,))
            mbarrier.arrive(barriers.k_empty.index(slot), count=1)
            s, multiplier, tile_max = finish_scores(
                raw, scores, row, column, lengths, window, MASK, PLAN
            )
            keep = gl.max((tile_max >= row_max + log2_threshold).to(gl.int32), axis=0)
            vote(keep, ring, buffers, barriers, WHO, PLAN)
            mbarrier.wait(barriers.v_full.index(last), phase)
        mbarrier.arrive(barriers.v_empty.index(last), count=1)
        if not PLAN.q_in_registers:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=tile == end - 1)
        pending = keep > 0
        if pending:
            new_p, alpha, row_max, row_sum = softmax(s, tile_max, multiplier, row_max, row_sum)
            acc = rescale(acc, alpha)
            p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
        else:
            # Not needed again, and better dead than carried: 32 registers.
            p = gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, p.dtype, p.type.layout)
            skipped += 1
    return acc, p, row_max, row_sum, pending, skipped


@gluon.jit
def kv_phase(
    state, lo, hi, spot, q_tiles, buffers, barriers, values,
    MASK: gl.constexpr, WHO: gl.constexpr, PLAN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    if PLAN.skip:
        state = kv_loop_skip(
            state, lo, hi, spot, q_tiles, buffers, barriers, values, MASK, WHO, PLAN, LAYOUT
        )
    else:
        state = kv_loop(
            state, lo, hi, spot, q_tiles, buffers, barriers, values, MASK, WHO, PLAN, LAYOUT
        )
    return state


@gluon.jit
def zero_rows(stage, valid, PLAN: gl.constexpr):
    """Zero rows [valid, tile_n) of a V stage. Every warpgroup does so before it reads them; they
    write the same zeros."""
    CHUNKS: gl.constexpr = PLAN.tile_n // 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    for i in gl.static_range(CHUNKS):
        if valid < (i + 1) * 16:
            part = stage.slice(i * 16, 16)
            value = part.load(layout)
            keep = (rows + i * 16 < valid)[:, None]
            part.store(gl.where(keep, value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def first_tile(begin, full, spot, q_tiles, buffers, barriers, values, WHO: gl.constexpr,
               PLAN: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr):  # fmt: skip
    """Tile ``begin``: (P, row max, lane sums). It always holds a visible key, so it is kept."""
    offset, end, row = spot
    lengths, window, scores, _log2_threshold = values
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ring = begin + offset
    slot = ring % PLAN.k_stages
    mbarrier.wait(barriers.order.index(WHO), ring & 1)
    mbarrier.wait(barriers.k_full.index(slot), (ring // PLAN.k_stages) & 1)
    s = issue_scores(q_tiles, buffers, slot, PLAN, S_LAYOUT)
    pass_turn(barriers, WHO, PLAN)
    if PLAN.skip:
        vote(1, ring, buffers, barriers, WHO, PLAN)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(barriers.k_empty.index(slot), count=1)
    if not PLAN.q_in_registers:
        mbarrier.arrive(barriers.q_empty.index(WHO), count=1, pred=begin == end - 1)
    s, multiplier, _maxima = finish_scores(
        s, scores, row, begin * PLAN.tile_n, lengths, window, False, PLAN
    )
    if (begin < full[0]) | (begin >= full[1]):
        s = mask_scores(s, row, begin * PLAN.tile_n, lengths, window, PLAN)
    row_max = gl.full([PLAN.tile_m], NO_MAX, gl.float32, ROWS)
    if PLAN.skip:
        # Rows past the sequence's end never vote.
        rows = row + gl.arange(0, PLAN.tile_m, layout=ROWS)
        row_max = gl.where(rows < lengths[0], NO_MAX, DEAD_MAX)
    row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
    p, _alpha, row_max, row_sum = softmax(
        s, row_maxima(s) * multiplier, multiplier, row_max, row_sum
    )
    return gl.convert_layout(p.to(buffers.sV.dtype), P_LAYOUT), row_max, row_sum


@gluon.jit
def attend(
    begin, full, spot, buffers, barriers, values, WHO: gl.constexpr, PLAN: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """This warpgroup's rows against tiles [begin, end), at least one: (O, row max, lane sums,
    tiles skipped)."""
    offset, end, _row = spot
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    q_tiles = (buffers.sQ0.index(WHO), buffers.sQ1.index(WHO))
    if PLAN.q_in_registers:
        A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
        q_tiles = (q_tiles[0].load(A_LAYOUT), q_tiles[1].load(A_LAYOUT))
        fence_async_shared()
        mbarrier.arrive(barriers.q_empty.index(WHO), count=1)
    p, row_max, row_sum = first_tile(
        begin, full, spot, q_tiles, buffers, barriers, values, WHO, PLAN, S_LAYOUT, P_LAYOUT
    )
    acc = gl.full([PLAN.tile_m, PLAN.dv], 0.0, gl.float32, O_LAYOUT)
    state = (acc, p, row_max, row_sum, begin < end, begin * 0)
    lo = begin + 1
    if PLAN.window_left:
        state = kv_phase(
            state, lo, full[0], spot, q_tiles, buffers, barriers, values, True, WHO, PLAN, S_LAYOUT
        )
    lo = gl.maximum(lo, full[0])
    state = kv_phase(
        state, lo, full[1], spot, q_tiles, buffers, barriers, values, False, WHO, PLAN, S_LAYOUT
    )
    lo = gl.maximum(lo, full[1])
    state = kv_phase(
        state, lo, end, spot, q_tiles, buffers, barriers, values, True, WHO, PLAN, S_LAYOUT
    )
    acc, p, row_max, row_sum, pending, skipped = state
    last = end - 1 + offset
    slot = last % PLAN.v_stages
    mbarrier.wait(barriers.v_full.index(slot), (last // PLAN.v_stages) & 1)
    if pending:
        if PLAN.poison:
            valid = values[0][1] - (end - 1) * PLAN.tile_n
            if valid < PLAN.tile_n:
                zero_rows(buffers.sV.index(slot), valid, PLAN)
        acc = warpgroup_mma(p, buffers.sV.index(slot), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(barriers.v_empty.index(slot), count=1)
    return acc, row_max, row_sum, skipped


@gluon.jit
def consume(arguments, WHO: gl.constexpr, PLAN: gl.constexpr):
    """Reads: sQ, sK, sV, sWork. Writes: out, LSE, votes, counters. Waits: *_full, order.
    Signals: *_empty, order, voted. Registers: PLAN.registers[0]."""
    outputs, buffers, barriers, packed, window, scores, skip, stats = arguments
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.tile_n, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.dv, 16])
    ring = 0
    loaded = 0
    work = 0
    batch, head, first, q_start, length_q, length_k = receive(work, buffers.sWork, barriers)
    while batch >= 0:
        work += 1
        row = first + WHO * PLAN.tile_m
        all_begin, _f0, _f1, all_end = kv_tile_ranges(
            first, gl.minimum(first + PLAN.tile_m * PLAN.consumers, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        begin, full_begin, full_end, end = kv_tile_ranges(
            row, gl.minimum(row + PLAN.tile_m, length_q), length_q, length_k,
            window[0], window[1], PLAN.tile_n,
        )  # fmt: skip
        if first >= length_q:
            all_end = all_begin
        if (row >= length_q) | (begin >= end):
            begin = all_end
            end = all_end
        offset = ring - all_begin
        for tile in range(all_begin, begin):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        if all_begin < all_end:
            mbarrier.wait(barriers.q_full.index(WHO), loaded & 1)
            loaded += 1
        acc = gl.full([PLAN.tile_m, PLAN.dv], 0.0, gl.float32, O_LAYOUT)
        row_max = gl.full([PLAN.tile_m], NO_MAX, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = lane_sums(gl.full([PLAN.tile_m, PLAN.tile_n], 0.0, gl.float32, S_LAYOUT))
        skipped = begin * 0
        if begin < end:
            log2_threshold = 0.0
            if PLAN.skip:
                log2_threshold = log2_lambda(skip, length_k, PLAN)
            acc, row_max, row_sum, skipped = attend(
                begin, (full_begin, full_end), (offset, end, row), buffers, barriers,
                ((length_q, length_k), window, scores, log2_threshold), WHO, PLAN,
                S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
        elif all_begin < all_end:
            mbarrier.arrive(barriers.q_empty.index(WHO), count=1)
        for tile in range(end, all_end):
            release(tile + offset, buffers, barriers, WHO, PLAN)
        ring = offset + all_end
        if row < length_q:
            place = (batch, head, row, q_start, length_q)
            store(outputs, acc, row_max, row_sum, place, scores[3], packed, PLAN)
            if stats is not None:
                gl.atomic_add(stats, skipped.to(gl.int64), sem="relaxed")
                gl.atomic_add(stats + 1, (end - begin).to(gl.int64), sem="relaxed")
        batch, head, first, q_start, length_q, length_k = receive(work, buffers.sWork, barriers)


# ------------------------------------------------------------------------------ epilogue
@gluon.constexpr_function
def row_layout(columns):
    """Eight adjacent columns per thread: 16-byte stores, 64 bytes of a row per quad."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    while 32 << (len(registers) - 4) < columns:
        registers.append([0, 32 << (len(registers) - 4)])
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def store(outputs, acc, row_max, row_sum, place, sink, packed, PLAN: gl.constexpr):
    """Normalise, round once, store rows below the sequence's length; LSE in natural units."""
    out, out_strides, lse, lse_strides = outputs
    batch, head, row, q_start, length_q = place
    row_sum = gl.convert_layout(gl.sum(row_sum, axis=1), row_max.type.layout, assert_trivial=True)
    if sink is not None:
        sink_log2 = gl.load(sink + head) * LOG2_E
        joint = gl.maximum(row_max, sink_log2)
        alpha = gl.exp2(row_max - joint)
        row_sum = row_sum * alpha + gl.exp2(sink_log2 - joint)
        row_max = joint
        acc = rescale(acc, alpha)
    value = rescale(acc, 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)).to(out.dtype.element_ty)
    if out.dtype.element_ty.primitive_bitwidth == 16:
        value = gl.convert_layout(value, row_layout(PLAN.dv))
    rows = row + gl.arange(0, PLAN.tile_m, layout=gl.SliceLayout(1, value.type.layout))
    columns = gl.arange(0, PLAN.dv, layout=gl.SliceLayout(0, value.type.layout))
    if packed is None:
        out += batch.to(gl.int64) * out_strides[0]
    out += head.to(gl.int64) * out_strides[2]
    pointers = (out + (q_start + rows).to(gl.int64) * out_strides[1])[:, None] + columns[None, :]
    mask = (rows < length_q)[:, None]
    if PLAN.dv_valid < PLAN.dv:
        mask = mask & (columns < PLAN.dv_valid)[None, :]
    gl.store(pointers, value, mask=mask)
    if lse is not None:
        if packed is None:
            lse += batch.to(gl.int64) * lse_strides[0]
        lse += head.to(gl.int64) * lse_strides[1]
        rows = row + gl.arange(0, PLAN.tile_m, layout=row_max.type.layout)
        row_lse = (row_max + gl.log2(row_sum)) * LN_2
        gl.store(lse + q_start + rows, row_lse, mask=rows < length_q)


# ------------------------------------------------------------------------------ kernel
@gluon.jit(do_not_specialize=["sizes", "window", "scores", "skip", "total"])
def prefill_kernel(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, outputs, sizes, sequences, window, scores, skip,
    stats, counters, total, PLAN: gl.constexpr,
):  # fmt: skip
    """Descriptors stay outside tuples: Triton 3.6 launches no others. Tuples: outputs (out,
    strides, lse, strides), sizes (Sq, Sk, heads q, group, batch · heads, heads per section, work
    tiles per head), sequences (cu_q, cu_k, seqused), window (left, right), scores (scale · log2 e,
    scale, softcap, sink), skip (tensor, value)."""
    CONSUMERS: gl.constexpr = PLAN.consumers
    K_STAGES: gl.constexpr = PLAN.k_stages
    V_STAGES: gl.constexpr = PLAN.v_stages
    dtype: gl.constexpr = q0_desc.dtype
    shared0: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PLAN.tile_n, PLAN.d0], dtype)
    d1: gl.constexpr = PLAN.d1 or 64
    shared1: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PLAN.tile_n, d1], dtype)
    shared_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PLAN.tile_n, PLAN.dv], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sQ0 = gl.allocate_shared_memory(dtype, [CONSUMERS, PLAN.tile_m, PLAN.d0], shared0)
    sK0 = gl.allocate_shared_memory(dtype, [K_STAGES, PLAN.tile_n, PLAN.d0], shared0)
    sQ1 = sQ0
    sK1 = sK0
    if PLAN.d1 > 0:
        sQ1 = gl.allocate_shared_memory(dtype, [CONSUMERS, PLAN.tile_m, PLAN.d1], shared1)
        sK1 = gl.allocate_shared_memory(dtype, [K_STAGES, PLAN.tile_n, PLAN.d1], shared1)
    sV = gl.allocate_shared_memory(dtype, [V_STAGES, PLAN.tile_n, PLAN.dv], shared_v)
    sWork = gl.allocate_shared_memory(gl.int32, [2, 8], plain)
    sKeep = gl.allocate_shared_memory(gl.int32, [V_STAGES * CONSUMERS, 1], plain)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    order = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bar)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    voted = gl.allocate_shared_memory(gl.int64, [V_STAGES * CONSUMERS, 1], bar)
    # One arrival per role that signals: `load` (1) or each consumer warpgroup (CONSUMERS).
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES * CONSUMERS):
        mbarrier.init(voted.index(i), count=1)
    mbarrier.arrive(order.index(0), count=1)
    barriers = Barriers(
        q_full, q_empty, k_full, k_empty, v_full, v_empty, order, work_full, work_empty, voted
    )
    buffers = Buffers(sQ0, sQ1, sK0, sK1, sV, sWork, sKeep)
    descs = (q0_desc, q1_desc, k0_desc, k1_desc, v_desc)
    producer = (descs, buffers, barriers, sizes, sequences, window, total, counters)
    consumer = (outputs, buffers, barriers, sequences[0], window, scores, skip, stats)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (consumer, 0, PLAN)),
                (consume, (consumer, 1, PLAN)),
                (load, (producer, PLAN)),
            ],
            [4, 1],
            [PLAN.registers[0], PLAN.registers[1]],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (consumer, 0, PLAN)),
                (consume, (consumer, 1, PLAN)),
                (consume, (consumer, 2, PLAN)),
                (load, (producer, PLAN)),
            ],
            [4, 4, 1],
            [PLAN.registers[0], PLAN.registers[0], PLAN.registers[1]],
        )


# ------------------------------------------------------------------------------ host
_DIMS = {
    (64, 64): (64, 0, 64),
    (96, 96): (64, 32, 128),
    (128, 128): (128, 0, 128),
    (192, 128): (128, 64, 128),
    (256, 256): (256, 0, 256),
}
"""(D, Dv) -> (D0, D1, padded Dv)."""

_DTYPES = (torch.float16, torch.bfloat16)


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why this kernel cannot run ``problem`` on ``target``; None when it can."""
    if target.device_type != "cuda" or target.arch != 90:
        return f"it needs sm_90, this device is {target.device_type} arch {target.arch}"
    if problem.op != "attention" or problem.layout == "paged":
        return f"it takes dense or packed attention, not {problem.layout} {problem.op}"
    if (problem.head_dim, problem.head_dim_v) not in _DIMS:
        return f"head dims {(problem.head_dim, problem.head_dim_v)} are not in {tuple(_DIMS)}"
    if problem.dtype not in _DTYPES or problem.out_dtype not in (*_DTYPES, torch.float32):
        return f"it takes float16 or bfloat16, not {problem.dtype} to {problem.out_dtype}"
    if problem.block_mask is not None:
        return "it has no block mask"
    if not problem.epilogue.startswith("identity"):
        return f"it has no epilogue {problem.epilogue}"
    return None


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, target: Target) -> Plan:
    """The plan of ``problem``; `run` adds what only the tensors tell."""
    d0, d1, dv = _DIMS[problem.head_dim, problem.head_dim_v]
    # O is small at 64: a third warpgroup fits, but not beside what skipping keeps in registers.
    three = dv == 64 and not problem.skip
    # What compiles without spills: wide heads need it in the consumers, the rest in the producer.
    wide = problem.head_dim >= 192 or problem.skip
    registers = (160, 32, 128) if three else (240, 24, 168) if wide else (232, 40, 168)
    return Plan(
        tile_m=64,
        tile_n=64 if dv == 256 else 128,
        consumers=3 if three else 2,
        k_stages=2,
        v_stages=2,
        registers=registers,
        d0=d0,
        d1=d1,
        dv=dv,
        dv_valid=problem.head_dim_v,
        q_in_registers=problem.head_dim == 128 and not problem.skip,
        overlap_pv=dv == 256,
        window_left=problem.window_left >= 0,
        window_right=problem.window_right >= 0,
        softcap=problem.softcap,
        skip=problem.skip,
    )


@functools.lru_cache(maxsize=4096)
def _variant(base: Plan, skip_relative: bool, poison: bool) -> Plan:
    return dataclasses.replace(base, skip_relative=skip_relative, poison=poison)


def unaligned(call: Call) -> str | None:
    """Why the tensors of ``call`` cannot be read through TMA descriptors; None when they can."""
    for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
        if tensor.data_ptr() % 16 != 0:
            return f"{name} does not start at a multiple of 16 bytes"
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size > 1 and (stride % 8 != 0 or stride < 0):
                return f"{name} has strides {tuple(tensor.stride())}, not all multiples of 8"
    return None


@functools.cache
def _descriptor_layout(columns: int) -> gl.NVMMASharedLayout:
    width = 64 if columns == 32 else 128
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=4)


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``[batch, row, head, column]`` boxes of ``rows`` × ``columns``; zeros outside the tensor."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(0)
    # The stride of a dimension of size 1 is arbitrary in torch but checked by the driver.
    pairs = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    strides = [stride if size > 1 else 8 for size, stride in pairs]
    return TensorDescriptor(
        tensor, list(tensor.shape), [*strides, 1], [1, rows, 1, columns],
        _descriptor_layout(columns),
    )  # fmt: skip


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def _ticket_counters(call: Call) -> torch.Tensor:
    """int32 [2], zero: of the workspace, else kept per stream (captured graphs get their own)."""
    if call.workspace is not None:
        return call.workspace[:8].view(torch.int32)
    device = call.q.device
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]


def run(call: Call) -> None:
    """Launch once; writes ``call.out``, ``call.lse`` and ``call.stats``."""
    problem, q, out, lse = call.problem, call.q, call.out, call.lse
    if out.numel() == 0:
        return
    # Without keys nothing is loaded; a descriptor must still describe something.
    k, v = (call.k, call.v) if call.k.numel() > 0 else (q, q)
    packed = call.cu_seqlens_q is not None
    target = target_of(q.device)
    poison = packed or call.seqused_k is not None
    config = _variant(plan(problem, target), call.skip_relative, poison)
    second = config.d1 or config.d0
    descs = (
        _descriptor(q, config.tile_m, config.d0),
        _descriptor(q, config.tile_m, second),
        _descriptor(k, config.tile_n, config.d0),
        _descriptor(k, config.tile_n, second),
        _descriptor(v, config.tile_n, config.dv),
    )
    tiles_m = tiling.ceil_div(problem.seqlen_q, config.tile_m * config.consumers)
    heads = problem.batch * problem.heads_q
    head_bytes = 2 * (problem.head_dim + problem.head_dim_v) * max(problem.seqlen_k, 1)
    section = min(heads, problem.group * max(1, SECTION_BYTES // head_bytes))
    lengths = (problem.seqlen_q, problem.seqlen_k)
    sizes = (*lengths, problem.heads_q, problem.group, heads, section, tiles_m)
    lse_strides = (0, 0)
    if lse is not None:
        lse_strides = (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))
    prefill_kernel[(min(heads * tiles_m, target.num_sms),)](
        *descs,
        (out, (0, *out.stride()[:2]) if packed else out.stride()[:3], lse, lse_strides),
        sizes,
        (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k),
        (
            problem.window_left if config.window_left else -1,
            problem.window_right if config.window_right else -1,
        ),
        (call.scale * LOG2_E.value, call.scale, call.softcap, call.sink),
        (call.skip_tensor, call.skip_value),
        call.stats,
        _ticket_counters(call),
        heads * tiles_m,
        config,
        num_warps=4,
        maxnreg=config.registers[2],
    )
