"""Who works on what in `prefill`: the order of work tiles, and what all roles must know of one.

The grid has a CTA for every work tile that there may be. Those that run take over work tiles of
CTAs that have not started (cluster launch control), one ahead of what they work on, until none is
left: work goes to whoever is free, and no counter has to be kept or reset. The epilogue warp does
it: the record of the work tile after next has its place when it has stored a work tile.

Work tiles are given out by ascending index, and the index is chosen so that

* the longest come first: with a causal mask the last rows of a sequence see the most keys, and
  what ends the launch are short ones;
* heads that share K and V are neighbours, and of all (K, V) pairs as many take turns as the L2
  holds: a section of them goes through all its rows before the next one begins.

    dense     index ──> section, block of rows (last ones first), sequence and head in the section
    packed    index ──> section of heads, level, sequence, head in the section

Lengths of packed sequences are on the device, so that there the warp searches, a sequence per lane.
The level of a work tile is its length: with a causal mask the number of work tiles' worth of keys
up to its last row, otherwise of all keys. As its indices ascend, a CTA only ever walks down the
levels of a section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_fmha import tiling
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.blockmask import TileBits
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.mask import window_sides
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Fixed
from cute_fmha.kernels.blackwell.plan import HEADER, RANGE, Plan
from cute_fmha.kernels.blackwell.prefill_operands import Global, Scalars, Shared

kv_tile_ranges = device_function(tiling.kv_tile_ranges)

L2_BYTES = 48 << 20
"""K and V that take turns in the L2: its 126 MB are two halves that may hold the same lines, and Q
and O pass through."""

TOP = 0x7FFFFFFF
"""A level above all."""

SOME, OWN = 1, 2
"""What is left: there may be work of CTAs that have not started; and the CTA's own before that."""


@dataclass(frozen=True)
class Place(Carried):
    """Where a work tile lies: block ``block`` of the rows of one head (of Q) of one sequence."""

    exists: Int32
    block: Int32
    head: Int32
    head_kv: Int32
    batch: Int32


@dataclass(frozen=True)
class Walk(Carried):
    """A walk down the levels: ``above`` work tiles of every head lie above ``level``, ``passed``
    there or above."""

    level: Int32
    above: Int32
    passed: Int32


class Sequence(NamedTuple):
    """Where a sequence lies in packed tensors, and how long it is."""

    start_q: Any
    start_k: Any
    seqlen_q: Any
    seqlen_k: Any


class Levels(NamedTuple):
    """Work tiles of a sequence: ``blocks`` of them, on levels ``bottom`` … ``top``."""

    blocks: Any
    bottom: Any
    top: Any


@dataclass(frozen=True)
class Turn(Carried):
    """How far the work is given out."""

    left: Int32  # OWN, then SOME until the end is told
    phase: Int32  # of the next claim
    blocks: Int32  # of packed sequences, all work tiles of a head
    level: Int32  # and the walk
    above: Int32
    passed: Int32


class Schedule(Fixed):
    """The order of all work tiles, and their records."""

    def __init__(self, plan: Plan, mem: Global, scalars: Scalars) -> None:
        self.plan = plan
        self.mem = mem
        self.scalars = scalars
        self.heads_kv = mem.mK.shape[2]
        self.unit = mem.mQ.shape[2] // self.heads_kv  # heads of Q that have K and V in common
        if plan.features.packed:
            self.batches = mem.mStartQ.shape[0] - 1
            self.pairs = self.heads_kv
        else:
            self.batches = mem.mQ.shape[3]
            self.pairs = self.heads_kv * self.batches
        row = (plan.head_dim + plan.head_dim_v) * plan.dtype.itemsize
        fitting = cutlass.max(L2_BYTES // row // cutlass.max(mem.mK.shape[0], 1), 1)
        self.section = cutlass.min(fitting, self.pairs)

    # ------------------------------------------------------------------ sequences

    def sequence(self, batch: Int32) -> Sequence:
        """Sequence ``batch``."""
        mem, features = self.mem, self.plan.features
        if features.packed:
            start_q, start_k = mem.mStartQ[batch], mem.mStartK[batch]
            seqlen_q = mem.mStartQ[batch + 1] - start_q
            seqlen_k = mem.mStartK[batch + 1] - start_k
        else:
            start_q, start_k = Int32(0), Int32(0)
            seqlen_q, seqlen_k = cute.size(mem.mQ.shape[0]) // self.plan.pack, mem.mK.shape[0]
        if features.used:
            seqlen_k = mem.mUsed[batch]
        return Sequence(start_q, start_k, seqlen_q, seqlen_k)

    @cute.jit
    def levels(self, batch: Int32):
        """The levels of sequence ``batch``; past the last one there are no work tiles."""
        plan = self.plan
        positions = plan.work_rows // plan.pack
        blocks, top = Int32(0), Int32(0)
        if batch < self.batches:
            sequence = self.sequence(batch)
            blocks = cute.ceil_div(sequence.seqlen_q, positions)
            # Rows that precede all keys are short, but they are there.
            top = cutlass.max(cute.ceil_div(sequence.seqlen_k, positions), blocks)
        bottom = top
        if cutlass.const_expr(plan.features.window_right and not plan.features.window_left):
            bottom = top - blocks + 1
        return Levels(blocks, bottom, top)

    def down_to(self, levels: Levels, level: Int32) -> Int32:
        """How many of a sequence's work tiles lie on ``level`` or above."""
        reached = cutlass.min(levels.top - level + 1, levels.blocks)
        flat = cutlass.select_(levels.bottom == levels.top, levels.blocks, reached)
        return cutlass.select_(levels.top >= level, flat, Int32(0))

    @cute.jit
    def all_blocks(self):
        """Work tiles of one head, of all sequences."""
        lane, total = cute.arch.lane_idx(), Int32(0)
        for first in cutlass.range(0, self.batches, 32, unroll=1):
            total += self.levels(first + lane).blocks
        return cute.arch.warp_reduction_sum(total)

    # ------------------------------------------------------------------ order

    @cute.jit
    def descend(self, walk: Walk):
        """To the next lower level that has work tiles."""
        lane, level, passed = cute.arch.lane_idx(), Int32(0), Int32(0)
        for first in cutlass.range(0, self.batches, 32, unroll=1):
            levels = self.levels(first + lane)
            if levels.blocks > 0 and levels.bottom < walk.level:
                level = cutlass.max(level, cutlass.min(levels.top, walk.level - 1))
        level = cute.arch.warp_reduction_max(level)
        for first in cutlass.range(0, self.batches, 32, unroll=1):
            passed += self.down_to(self.levels(first + lane), level)
        return Walk(level, walk.passed, cute.arch.warp_reduction_sum(passed))

    @cute.jit
    def on_level(self, walk: Walk, which: Int32):
        """(sequence, block) of work tile ``which`` of a head on the walk's level."""
        lane, batch, index = cute.arch.lane_idx(), Int32(0), Int32(0)
        for first in cutlass.range(0, self.batches, 32, unroll=1):
            levels = self.levels(first + lane)
            here = self.down_to(levels, walk.level) - self.down_to(levels, walk.level + 1)
            until = here
            for step in cutlass.range_constexpr(5):
                other = cute.arch.shuffle_sync_up(until, 1 << step)
                until += cutlass.select_(lane >= 1 << step, other, Int32(0))
            found = cute.arch.vote_ballot_sync((until - here <= which) & (which < until))
            if found != 0:
                source = cute.arch.popc(found - 1)
                batch = first + source
                index = which - cute.arch.shuffle_sync(until - here, source)
            which -= cute.arch.shuffle_sync(until, 31)
        levels = self.levels(batch)
        return batch, levels.blocks - 1 - (levels.top - walk.level) - index

    @cute.jit
    def find_packed(self, index: Int32, blocks: Int32, walk: Walk):
        """(place of work tile ``index``, the walk there); every head has ``blocks`` of them."""
        of_section = self.section * self.unit * blocks
        exists = index < self.pairs * self.unit * blocks
        place = Place(Int32(exists), Int32(0), Int32(0), Int32(0), Int32(0))
        if exists:
            section = index // of_section
            rest = index - section * of_section
            width = cutlass.min(self.section, self.pairs - section * self.section) * self.unit
            which = rest // width
            head = section * self.section * self.unit + rest - which * width
            if which < walk.above:
                walk = Walk(Int32(TOP), Int32(0), Int32(0))
            while walk.passed <= which:
                walk = self.descend(walk)
            batch, block = self.on_level(walk, which - walk.above)
            place = Place(Int32(1), block, head, head // self.unit, batch)
        return place, walk

    def find_dense(self, index: Int32) -> Place:
        """Place of work tile ``index``."""
        rows = cute.size(self.mem.mQ.shape[0])
        blocks = cute.ceil_div(rows, self.plan.work_rows)
        of_section = self.section * self.unit * blocks
        section = index // of_section
        rest = index - section * of_section
        width = cutlass.min(self.section, self.pairs - section * self.section) * self.unit
        turn = rest // width
        rest -= turn * width
        pair = section * self.section + rest // self.unit
        batch = pair // self.heads_kv
        head_kv = pair - batch * self.heads_kv
        head = head_kv * self.unit + rest % self.unit
        return Place(Int32(1), blocks - 1 - turn, head, head_kv, batch)

    # ------------------------------------------------------------------ giving out

    def start(self) -> Turn:
        blocks = self.all_blocks() if self.plan.features.packed else Int32(0)
        zero = Int32(0)
        return Turn(Int32(OWN), zero, blocks, Int32(TOP), zero, zero)

    @cute.jit
    def hand_out(self, turn: Turn, slot: Int32, parity: Int32, shared: Shared, barriers: Barriers):
        """Write the record of the next work tile, or that there is none, where all others have
        given a record back. One warp, whose own use of place ``slot`` is over; ``parity`` is
        that use's, 1 if there was none.

        Reads: lengths in global memory. Writes: sWork, by cluster launch control sClaim.
        Waits: work_empty, claimed. Signals: work_full, claimed."""
        if turn.left != 0:
            barriers.wait("work_empty", parity, slot)
            # Not claimed earlier: somebody else may be free before.
            left, phase = turn.left, turn.phase
            index = cute.arch.block_idx()[0] // self.plan.ctas
            walk = Walk(turn.level, turn.above, turn.passed)
            place = Place(Int32(0), Int32(0), Int32(0), Int32(0), Int32(0))
            while (left != 0) & (place.exists == 0):
                if left != OWN:
                    left, index = claim(self.plan, shared, barriers, phase)
                    phase = phase ^ 1
                if left != 0:
                    left = Int32(SOME)
                    # There may be fewer work tiles than CTAs; those that are left are dropped.
                    if cutlass.const_expr(self.plan.features.packed):
                        place, walk = self.find_packed(index, turn.blocks, walk)
                    else:
                        place = self.find_dense(index)
            lane = cute.arch.lane_idx()
            if left != 0:
                self.write(place, shared.sWork, shared.sMask, slot)
            elif lane < HEADER:
                shared.sWork[lane, slot] = Int32(-1)
            barriers.arrive("work_full", slot)
            turn = Turn(left, phase, turn.blocks, walk.level, walk.above, walk.passed)
        return turn

    # ------------------------------------------------------------------ what a work tile needs

    @cute.jit
    def write(self, place: Place, sWork: cute.Tensor, sMask: Any, slot: Int32):
        """The record of a work tile, for all roles."""
        plan, lane = self.plan, cute.arch.lane_idx()
        sequence = self.sequence(place.batch)
        if lane == 0:
            header = (place.block, place.head, place.head_kv, place.batch, *sequence)
            for word in cutlass.range_constexpr(HEADER):
                sWork[word, slot] = header[word]
        if lane < plan.q_tiles:
            for word, value in enumerate(self.keys(place.block, lane, sequence)):
                sWork[HEADER + RANGE * lane + word, slot] = value
        if cutlass.const_expr(plan.features.block_mask is not None):
            cute.arch.sync_warp()
            self.write_bits(place, sWork, sMask, slot)

    @cute.jit
    def write_bits(self, place: Place, sWork: cute.Tensor, sMask: Any, slot: Int32):
        """The bits of a block mask, and ranges without what it hides at either end. What the record
        has is read from there: this warp has few registers."""
        q_tiles = self.plan.q_tiles
        bits = TileBits(self.plan, self.mem.mMask, sMask)
        # The words of any Q tile are words of all.
        first_word, end_word = Int32(TOP), Int32(0)
        for t in cutlass.range_constexpr(q_tiles):
            begin, end = sWork[HEADER + RANGE * t, slot], sWork[HEADER + RANGE * t + 3, slot]
            first_word = cutlass.select_(
                begin < end, cutlass.min(first_word, begin // 32), first_word
            )
            end_word = cutlass.max(end_word, (end + 31) // 32)
        for t in cutlass.range_constexpr(q_tiles):
            begin, end = bits.write(place, t, sWork, (first_word, end_word), slot)
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                sWork[HEADER + RANGE * t, slot] = begin
                sWork[HEADER + RANGE * t + 3, slot] = end

    @cute.jit
    def keys(self, block: Int32, t: Int32, sequence: Sequence):
        """The four of `KeyTiles` for Q tile ``t``."""
        plan = self.plan
        # Positions, of which a Q tile has all heads of a group where heads are packed.
        per_tile = plan.mma_rows // plan.pack
        position = (block * plan.q_tiles + t) * per_tile
        position_end = cutlass.min(position + per_tile, sequence.seqlen_q)
        begin, full_begin, full_end, end = kv_tile_ranges(
            position, position_end, sequence.seqlen_q, sequence.seqlen_k,
            *window_sides(plan.features, self.scalars), plan.tile_n,
        )  # fmt: skip
        if position >= sequence.seqlen_q or end <= begin:
            begin, full_begin, full_end, end = Int32(0), Int32(0), Int32(0), Int32(0)
        return begin, full_begin, full_end, end


@cute.jit
def claim(plan: Plan, shared: Shared, barriers: Barriers, phase: Int32):
    """(whether there is, which) work tile of a CTA that has not started and now never will; of a
    pair the first CTA asks, and both get the answer."""
    bar = barriers.expect("claimed", 16)
    asks = Boolean(True)
    if cutlass.const_expr(plan.pair):
        barriers.arrive("claiming")
        asks = ptx.cluster_rank() == 0
        if asks:
            barriers.wait("claiming", phase)
    if asks:
        with cute.arch.elect_one():
            cute.arch.issue_clc_query(bar, shared.sClaim.iterator, multicast=plan.pair)
    barriers.wait("claimed", phase)
    index, _, _, claimed = cute.arch.clc_response(shared.sClaim.iterator)
    # The next answer comes through the async proxy.
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()
    return claimed, index // plan.ctas
