"""The softmax warpgroup of `decode_transposed`: scores lie transposed, tokens along TMEM lanes.

A warp has 16 tokens of a tile in 16 lanes (of a tile of 128 tokens 32), and reads them as fragments
of 16, so that all its threads have work: thread t holds tokens t / 4 and t / 4 + 8 of a fragment,
and of every 8 rows (query position × head) rows 2 (t % 4) and the next. Everything about rows is
kept once per thread that holds scores of them; row sums are added up over threads at the end only.

Exponents are e = c·s − c·m. While every e of a tile stays below the rescale threshold, m is good
enough: all that threads tell each other is one vote. Only when one is not, maxima of the tile are
taken over threads and warps, m moves, and O is rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.decode_transposed_epilogue import finish, nothing
from cute_fmha.kernels.blackwell.decode_transposed_plan import TransposedPlan
from cute_fmha.kernels.blackwell.decode_transposed_work import (
    EXCHANGE,
    VOTE,
    Global,
    Group,
    Shared,
    Work,
    turn,
)
from cute_fmha.kernels.blackwell.pipelines import Barriers
from cute_fmha.kernels.blackwell.softmax import (
    ABSENT,
    EMPTY,
    capped,
    packed,
)
from cute_fmha.kernels.blackwell.worklist import Piece

KEEPS, RAISES = 1, 2
"""What a thread says of a tile when tiles may be skipped."""


@dataclass
class Rows:
    """Of every row of a thread: −c·m, the thread's part of Σ P, where tiles are skipped − c times
    the maximum of the kept tiles, which decides, and where it is asked for the largest score of the
    thread's tokens."""

    minus: list[Float32]
    total: list[Float32]
    running: list[Float32]
    largest: list[Float32]

    def __extract_mlir_values__(self) -> list[Any]:
        lists = (self.minus, self.total, self.running, self.largest)
        return [Float32(x).ir_value() for numbers in lists for x in numbers]

    def __new_from_mlir_values__(self, values: list[Any]) -> Rows:
        numbers = iter(map(Float32, values))
        lists = (self.minus, self.total, self.running, self.largest)
        return Rows(*([next(numbers) for _ in old] for old in lists))


@dataclass
class Tally:
    """Tiles so far: of the CTA (which buffers and phases follow from), and the skipped ones."""

    count: Int32
    skipped: Int32

    def __extract_mlir_values__(self) -> list[Any]:
        return [Int32(self.count).ir_value(), Int32(self.skipped).ir_value()]

    def __new_from_mlir_values__(self, values: list[Any]) -> Tally:
        return Tally(Int32(values[0]), Int32(values[1]))


def paired(registers: int, rows: int) -> list[tuple[int, int]]:
    """(first register, first row among the thread's) of the pairs in fragments: of every eight rows
    two tokens, of each of them two neighbouring rows."""
    return [(first, first // 4 * 2 % rows) for first in range(0, registers, 2)]


def exponents(scores: list[Float32], scale: Float32, minus: list[Float32]) -> list[Float32]:
    """e = c·s − c·m."""
    result: list[Float32] = []
    for first, i in paired(len(scores), len(minus)):
        result += cute.arch.fma_packed_f32x2(
            (scores[first], scores[first + 1]), (scale, scale), (minus[i], minus[i + 1])
        )
    return result


def largest(values: list[Float32]) -> Float32:
    """The maximum, three at a time."""
    while len(values) > 2:
        rest = len(values) % 3
        whole = len(values) - rest
        values = [ptx.max3(*values[j : j + 3]) for j in range(0, whole, 3)] + values[whole:]
    return cute.arch.fmax(*values) if len(values) == 2 else values[0]


def masked(group: Group, piece: Piece, n: Int32, scores: list[Float32]) -> list[Float32]:
    """−inf where a row may not attend to a token, and in rows that do not exist.

    Scores are selected, never computed with: those of tokens past the sequence may be NaN.
    """
    left, right = group.work.window()
    length = piece.length - n * group.plan.tile_n
    result = list(scores)
    for i, row in enumerate(group.rows()):
        position, _, exists = group.work.position(piece, row)
        diagonal, end = position + length - group.work.sizes.seqlen_q, length
        if not isinstance(right, int):
            end = cutlass.min(end, diagonal + right + 1)
        end = cutlass.select_(exists, end, Int32(0))
        for index, at in enumerate(group.places(i)):
            token = group.token(index)
            seen = token < end
            if not isinstance(left, int):
                seen = seen & (token >= diagonal - left)
            result[at] = cutlass.select_(seen, scores[at], Float32(-Float32.inf))
    return result


@cute.jit
def softmax(
    plan: TransposedPlan, dtype, store: Store, work: Work, mem: Global, shared: Shared,
    scalars: Scalars, tmem: cute.Pointer, barriers: Barriers,
):  # fmt: skip
    """Reads: S, O. Writes: P, sKeep, O, LSE and the largest logits in global memory.
    Waits: s_full, o_full. Signals: p_full."""
    thread = cute.arch.thread_idx()[0]
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    group = Group(
        plan, dtype, work, mem, shared, scalars, tmem.toint() + (warp << 21), barriers, warp,
        thread % 32,
    )  # fmt: skip
    tally = Tally(Int32(0), Int32(0))
    place = work.pieces.start
    while work.pieces.more(place):
        piece = work.pieces.piece(place)
        if piece.end > piece.begin:
            threshold = work.threshold(piece)
            state = unseen(group, piece)
            if cutlass.const_expr(plan.features.window_left):
                for n in cutlass.range(piece.begin, piece.full_begin, unroll=1):
                    state, tally = step(group, piece, threshold, n, state, tally, True)
            for n in cutlass.range(piece.full_begin, piece.full_end, unroll=1):
                state, tally = step(group, piece, threshold, n, state, tally, False)
            for n in cutlass.range(piece.full_end, piece.end, unroll=1):
                state, tally = step(group, piece, threshold, n, state, tally, True)
            finish(group, store, place, piece, state, tally.count)
        elif piece.exists != 0:
            nothing(group, store, piece)
        place = work.pieces.next(place, piece)
    if cutlass.const_expr(plan.features.count):  # noqa: SIM102  (compile and run time)
        if thread == 0:
            cute.arch.atomic_add(mem.mStats.iterator, Int64(tally.skipped))
            cute.arch.atomic_add(mem.mStats.iterator + 1, Int64(tally.count))


def unseen(group: Group, piece: Piece) -> Rows:
    """Rows before their first tile; a row that does not exist never asks for anything."""
    minus = []
    for row in group.rows():
        _, _, exists = group.work.position(piece, row)
        maximum = cutlass.select_(exists, Float32(EMPTY), Float32(ABSENT))
        minus.append(-maximum * group.scalars.scale_log2)
    features = group.plan.features
    running = list(minus) if features.skip else []
    largest = [Float32(EMPTY) for _ in minus] if features.max_logits else []
    return Rows(minus, [Float32(0.0) for _ in minus], running, largest)


@cute.jit
def step(
    group: Group, piece: Piece, threshold: Float32, n: Int32, state, tally,
    is_masked: cutlass.Constexpr,
):  # fmt: skip
    """One tile: the next state and tally."""
    plan = group.plan
    buffer, phase = turn(plan, tally.count)
    group.barriers.wait_tmem("s_full", phase, buffer)
    tS = group.tmem + plan.tmem["S0"].start + buffer * plan.rows
    scores = []
    for lane in cutlass.range_constexpr(0, plan.tile_n // 4, 16):
        scores += ptx.tcgen05_load_fragment(tS + (lane << 16), plan.rows // 8)
    scores = ptx.tcgen05_wait_load(scores)
    if cutlass.const_expr(plan.features.softcap):
        scores = capped(scores, group.scalars.cap_inner)
    if cutlass.const_expr(is_masked):
        scores = masked(group, piece, n, scores)
    if cutlass.const_expr(plan.features.max_logits):
        state = seen(group, scores, state)
    scale = group.scalars.scale_log2
    first = n == piece.begin
    if cutlass.const_expr(plan.features.skip):
        above = largest(exponents(scores, scale, state.running))
        flags = Int32((above >= threshold) | first) * KEEPS | Int32(above > 0.0) * RAISES
        flags = agree(group, buffer, flags)
        keep = flags & KEEPS != 0
        tell(group, buffer, phase, Int32(keep))
        if keep:
            if flags & RAISES != 0:
                state = raised(group, scores, state, tally.count, first)
            e = exponents(scores, scale, state.minus)
            state = probabilities(group, e, state, buffer)
        tally = Tally(tally.count + 1, tally.skipped + Int32(not keep))
    else:
        e = exponents(scores, scale, state.minus)
        if ptx.barrier_any(Int32(VOTE), 128, largest(e) > plan.rescale_threshold):
            state = raised(group, scores, state, tally.count, first)
            e = exponents(scores, scale, state.minus)
        state = probabilities(group, e, state, buffer)
        tally = Tally(tally.count + 1, tally.skipped)
    cute.arch.fence_proxy("async.shared", space="cta")
    group.barriers.arrive_tmem("p_full", buffer)
    return state, tally


def seen(group: Group, scores: list[Float32], state: Rows) -> Rows:
    """The state after the scores of a tile, kept or not."""
    tops = [
        largest([top, *(scores[at] for at in group.places(i))])
        for i, top in enumerate(state.largest)
    ]
    return Rows(state.minus, state.total, state.running, tops)


@cute.jit
def tell(group: Group, buffer: Int32, phase: Int32, keep: Int32):
    """Write down whether a tile is kept; values of their own are not fetched before."""
    sKeep = group.shared.sKeep
    if group.warp == 0:
        if cutlass.const_expr(not group.plan.latent):
            group.barriers.wait("decision_read", phase ^ 1, buffer)
        with cute.arch.elect_one():
            sKeep[buffer] = keep
        if cutlass.const_expr(not group.plan.latent):
            group.barriers.arrive_leader("decided", buffer)


def agree(group: Group, buffer: Int32, flags: Int32) -> Int32:
    """The flags that any thread of the warpgroup has set."""
    flags = cute.arch.warp_redux_sync(flags, "or")
    votes = group.shared.sVote + buffer * 16
    with cute.arch.elect_one():
        ptx.store_shared_word(votes + group.warp * 4, flags)
    cute.arch.barrier(barrier_id=VOTE, number_of_threads=128)
    a, b, c, d = ptx.load_shared(votes)
    return a | b | c | d


@cute.jit
def raised(group: Group, scores, state, count: Int32, first: Boolean):
    """The state after a tile that raises a maximum: maxima of all its tokens, O and sums rescaled
    in the rows where they moved by more than the threshold."""
    plan, shared = group.plan, group.shared
    scale = group.scalars.scale_log2
    rows = group.rows()
    tops = []
    for i in cutlass.range_constexpr(len(rows)):
        top = largest([scores[at] for at in group.places(i)])
        for distance in (4, 8, 16):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, distance))
        tops.append(top)
    if group.lane < 4:
        for i in cutlass.range_constexpr(len(rows)):
            shared.sMax[rows[i], group.warp] = tops[i]
    cute.arch.barrier(barrier_id=EXCHANGE, number_of_threads=128)
    minus, total, running, fades = [], [], [], []
    for i in cutlass.range_constexpr(len(rows)):
        of_warps = [shared.sMax[rows[i], warp] for warp in range(4)]
        minus_top = -largest(of_warps) * scale
        moves = state.minus[i] - minus_top > plan.rescale_threshold
        minus.append(cutlass.select_(moves, minus_top, state.minus[i]))
        fades.append(ptx.exp2(minus[i] - state.minus[i]))
        total.append(state.total[i] * fades[i])
        if cutlass.const_expr(plan.features.skip):
            running.append(cute.arch.fmin(state.running[i], minus_top))
    if not first:
        faded = Boolean(False)
        for i in cutlass.range_constexpr(len(rows)):
            faded = faded | (fades[i] < 1.0)
        if cute.arch.vote_any_sync(faded):
            if group.lane < 4:
                for i in cutlass.range_constexpr(len(rows)):
                    shared.sFade[rows[i], group.warp] = fades[i]
            cute.arch.sync_warp()
            group.wait_product(count - 1)
            rescale(group)
    return Rows(minus, total, running, state.largest)


@cute.jit
def rescale(group: Group):
    """O = fade · O; rows lie along TMEM columns."""
    plan = group.plan
    fades = [group.shared.sFade[row, group.warp] for _, row in group.held()]
    for part in cutlass.range(plan.parts, unroll=1):
        tO = group.tmem + plan.tmem["O0"].start + part * plan.rows
        values = group.load_part(tO)
        faded = []
        for j in cutlass.range_constexpr(0, len(values), 2):
            faded += cute.arch.mul_packed_f32x2(
                (values[j], values[j + 1]), (fades[j], fades[j + 1])
            )
        group.store_part(tO, faded)
    ptx.tcgen05_wait_store()


def probabilities(group: Group, e: list[Float32], state: Rows, buffer: Int32) -> Rows:
    """P = 2^e into its buffer, where a token's rows lie next to each other; the next state."""
    plan = group.plan
    p = [ptx.exp2(x) for x in e]
    total = list(state.total)
    for first, i in paired(len(p), len(total)):
        total[i : i + 2] = cute.arch.add_packed_f32x2(
            (total[i], total[i + 1]), (p[first], p[first + 1])
        )
    words = packed(p, group.dtype)
    # Lane l gives the address of 8 rows of a token: of matrix l / 8, its token l % 8.
    width = plan.rows * plan.dtype.itemsize
    matrix = group.lane // 8
    token = group.warp * (plan.tile_n // 4) + matrix % 2 * 8 + group.lane % 8
    target = group.shared.sP + buffer * plan.p_bytes + token * width
    swizzle = token * width // 128 % (width // 16)
    for eight in range(0, plan.rows // 8, 2):
        piece = target + (eight + matrix // 2 ^ swizzle) * 16
        for i in range(plan.tile_n // 64):
            # 16 tokens further the swizzle is the same.
            at = 2 * eight + i * plan.rows // 4
            ptx.store_matrices(piece + i * 16 * width, words[at : at + 4])
    return Rows(state.minus, total, state.running, state.largest)
