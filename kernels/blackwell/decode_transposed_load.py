"""The warps of `decode_transposed` and `decode` that bring latents, keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.block_table import ROW_BYTES, box_place, lane_pages
from cute_fmha.kernels.blackwell.decode_transposed_plan import BLOCK, TransposedPlan
from cute_fmha.kernels.blackwell.decode_transposed_work import Global, Shared, Work, turn
from cute_fmha.kernels.blackwell.pipelines import Barriers, Cursor, Fixed
from cute_fmha.kernels.blackwell.worklist import Piece


@cute.jit
def lookup(plan: TransposedPlan, mem: Global, piece: Piece, n: Int32):
    """What a lane looks up in the table for tile ``n``: where box ``lane`` lies, in coordinates
    (PAGE_ROW, PAGE, END) of a `ragged` map, with KV heads (PAGE_ROW, HEAD, PAGE, END); gathered,
    the pages of tokens ``lane``, ``lane`` + 32."""
    first, extent = n * plan.tile_n, mem.mL.shape[0]
    if cutlass.const_expr(plan.gather):
        found = lane_pages(mem.mTable, piece, first, cute.arch.lane_idx())
    else:
        token = first + box_of_lane(plan) * plan.box
        found = box_place(mem.mTable, piece, token, plan.box, extent, extent)
        if cutlass.const_expr(not plan.latent):
            found.insert(1, piece.head)
    return found


def box_of_lane(plan: TransposedPlan) -> Any:
    """The box that a lane looks up; those without one do as the last one does."""
    return 0 if plan.boxes == 1 else cutlass.min(cute.arch.lane_idx(), plan.boxes - 1)


def together(plan: TransposedPlan, stages: int) -> int:
    """Parts that are fetched box by box, so that what finds a box is read once for them: two, if
    tiles have several boxes and the ring has room for two tiles beside the two parts. For latents
    and 32 rows it has not, and waiting for two takes 10 % longer in the emulator's model."""
    return 2 if plan.boxes > 1 and stages >= 2 * plan.parts + 2 else 1


class Buffer(NamedTuple):
    """Where ``blocks`` blocks from ``first`` on go, one after the other, and who is told."""

    first: int
    blocks: int
    address: Int32
    barrier: Any


@dataclass(frozen=True)
class Ring(Fixed):
    """Buffers of ``blocks`` blocks, of which the barriers ``full`` tell."""

    full: str
    buffers: Any
    blocks: int
    size: int

    def buffer(self, barriers: Barriers, at: Cursor, first: int) -> Buffer:
        """The one at a place, for blocks from ``first`` on, whose bytes are now expected."""
        address = self.buffers.iterator.toint() + at.index * self.size
        barrier = barriers.expect_elected(self.full, self.size, at.index)
        return Buffer(first, self.blocks, address, barrier)


class BoxTable(Fixed):
    """The boxes of one tile: what `lookup` gave every lane, made known to the one that fetches."""

    def __init__(
        self, plan: TransposedPlan, tma: cute.CopyAtom, sBoxes: cute.Tensor, found: Any
    ) -> None:
        self.plan = plan
        self.tensor_map = ptx.tensor_map(tma)
        self.found = found
        self.numbers = sBoxes.iterator.toint()
        if plan.boxes > 1:
            cute.arch.sync_warp()
            if plan.gather:
                for half, page in enumerate(found):
                    sBoxes[half * 32 + cute.arch.lane_idx()] = page
            else:
                numbers = [*found, *[Int32(0)] * (4 - len(found))]
                ptx.store_shared(self.numbers + box_of_lane(plan) * 16, numbers)
            cute.arch.sync_warp()

    def fetch(self, buffers: list[Buffer]) -> None:
        """Box by box: what it is found by goes to uniform registers once. One lane."""
        plan = self.plan
        for i in range(plan.boxes):
            found = self.found
            if plan.boxes > 1:
                found = ptx.load_shared(self.numbers, offset=i * 16)
            for buffer in buffers:
                for b in range(buffer.blocks):
                    ptx.tma_load(
                        buffer.address, b * plan.block_bytes + i * plan.box * ROW_BYTES,
                        self.tensor_map,
                        [(buffer.first + b) * BLOCK, *found[: len(self.found) + 2 * plan.gather]],
                        buffer.barrier.toint(), plan.gather,
                    )  # fmt: skip


@cute.jit
def load(plan: TransposedPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """As ``load`` latents, or keys where values are a tensor of their own; these as
    ``load_values``, and none of a tile that is skipped.

    Reads: the block table, latents, keys or values in global memory, sKeep.
    Writes: sV and sR, or sK, by TMA, sBoxes.
    Waits: v_empty and r_empty, or k_empty; decided.
    Signals: v_full and r_full, or k_full; decision_read.

    Rows past the sequence are outside of the tensor map (`ragged`), as is page −1, and arrive as
    zeros, whatever memory holds there."""
    apart = barriers.role == "load_values"
    name, stages, buffers = plan.s_ring, plan.s_stages, shared.sV if plan.latent else shared.sK
    tma, sBoxes = mem.tma, shared.sBoxes[None, 0]
    if cutlass.const_expr(apart):
        name, stages, buffers = "v", plan.v_stages, shared.sV
        tma, sBoxes = mem.tma_v, shared.sBoxes[None, 1]
    empty = name + "_empty"
    step = together(plan, stages)
    v, r = Cursor(stages), Cursor(plan.r_stages)
    count = Int32(0)  # tiles
    values = Ring(name + "_full", buffers, plan.part_blocks, plan.part_bytes)
    rope = Ring("r_full", shared.sR, plan.rope_blocks, plan.block_bytes)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        found = lookup(plan, mem, piece, piece.begin)
        for n in cutlass.range(piece.begin, piece.end, unroll=1):
            boxes = BoxTable(plan, tma, sBoxes, found)
            # The table is asked for the next tile while the rings are full.
            found = lookup(plan, mem, piece, n + 1)
            keep: Any = True
            if cutlass.const_expr(apart and plan.features.skip):
                buffer, phase = turn(plan, count)
                barriers.wait("decided", phase, buffer)
                keep = shared.sKeep[buffer] != 0
                barriers.arrive("decision_read", buffer)
                count = count + 1
            if keep:
                for first in cutlass.range_constexpr(0, plan.parts, step):
                    taken = []
                    for part in cutlass.range_constexpr(first, min(first + step, plan.parts)):
                        barriers.wait(empty, v.empty_phase, v.index)
                        taken.append((values, v, part * plan.part_blocks))
                        v = v.next()
                    if cutlass.const_expr(plan.rope_blocks > 0 and first + step >= plan.parts):
                        barriers.wait("r_empty", r.empty_phase, r.index)
                        taken.append((rope, r, plan.parts * plan.part_blocks))
                        r = r.next()
                    with cute.arch.elect_one():
                        boxes.fetch([ring.buffer(barriers, at, block) for ring, at, block in taken])
        place = work.pieces.next(place, piece)
    # The last releases are the last signals of the tensor core: stay until they are in.
    for _stage in cutlass.range_constexpr(stages):
        barriers.wait(empty, v.empty_phase, v.index)
        v = v.next()
    if cutlass.const_expr(plan.rope_blocks > 0):
        for _stage in cutlass.range_constexpr(plan.r_stages):
            barriers.wait("r_empty", r.empty_phase, r.index)
            r = r.next()


@cute.jit
def query(plan: TransposedPlan, work: Work, mem: Global, shared: Shared, barriers: Barriers):
    """16 bytes a lane at a time; rows that do not exist become 0.

    Reads: Q in global memory. Writes: sQ. Waits: q_empty. Signals: q_full.
    """
    thread = cute.arch.thread_idx()[0] - 32 * plan.role("query").warps[0]
    threads = 32 * len(plan.role("query").warps)
    chunks = plan.head_dim // 8
    batch_chunks = plan.head_dim // BLOCK
    block_bytes = plan.rows * BLOCK * plan.dtype.itemsize
    phase = Int32(0)
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        if piece.end > piece.begin:
            barriers.wait("q_empty", phase ^ 1)
            for first in cutlass.range(
                thread, plan.rows * chunks, threads * batch_chunks, unroll=1
            ):
                pieces = []
                for j in cutlass.range_constexpr(batch_chunks):
                    row = (first + j * threads) // chunks
                    chunk = (first + j * threads) % chunks
                    position, head, exists = work.position(piece, row)
                    at = (piece.batch, position, head, chunk * 8)
                    source = mem.mQ.iterator + cute.crd2idx(at, mem.mQ.layout)
                    words = ptx.load_global(source.toint(), exists)
                    swizzled = (chunk % 8 ^ row % 8) * 16
                    target = chunk // 8 * block_bytes + row * 128 + swizzled
                    pieces.append((target, words))
                for target, words in pieces:
                    ptx.store_shared(shared.sQ + target, words)
            cute.arch.fence_proxy("async.shared", space="cta")
            barriers.arrive("q_full")
            phase = phase ^ 1
        place = work.pieces.next(place, piece)
