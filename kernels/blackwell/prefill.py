"""Prefill on Blackwell (sm_100a, sm_103a): one persistent, warp-specialised tcgen05 kernel.

Mathematics, per query row i, in base 2 (`softmax`): S = Q Kᵀ by KV tiles n = begin … end − 1,

    m' = max(m, S),  P = 2^(c·S − c·m'),  fade = 2^(c·m − c·m'),  l' = fade · l + ΣP,
    O' = fade · O + P V,

out = O / l, lse = ln 2 · (c·m + log2 l), c = scale · log2 e. A sink joins m and l at the end; a
softcap replaces S by tanh(scale / cap · S) and c by cap · log2 e. With skip-softmax a KV tile whose
every row has c · (max S − running maximum) < log2 λ is left out, before its V is asked for.

Shapes: q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], out [B, Sq, Hq, Dv], lse
[B, Hq, Sq]; any strides with a contiguous last dimension and rows on 16 bytes. A work tile is two Q
tiles (one for Dv 256) of 128 rows of one head; each has its own exact range of KV tiles.

Warps (two Q tiles; with one, the softmax has warps 0–3 and the others follow)

    0–3, 4–7   softmax     S → P of Q tile 0 and 1, a row per thread; decides what is skipped
    8–11       correction  O · fade when the maximum moved; at the end O / l → chunks, LSE
    12         mma         S = Q Kᵀ, O += P V; owns TMEM
    13         load        Q, K, V by TMA
    14         epilogue    chunks of O → global memory by TMA
    15         idle

TMEM, in 32-bit columns, at Dv 128 (`tmem.attention_map`)

    0        64       128      192      256               384               512
    | S0     | P0     | S1     | P1     | O0              | O1              |
    S0 is 0–127, S1 128–255: P lies over the upper half of its own S, which is read by then.

Pipelines: `pipelines.prefill_topology`.

Timeline of KV tile n in steady state, two Q tiles (numbers: Q tile; time goes down)

    load            mma                     softmax 0        softmax 1        correction
    K(n + 1)        PV 0 (n−1)                               exp 1 (n−1)
                    QK 0 (n)                                 exp 1, P 1
                    PV 1 (n−1)              max 0, vote ─┐                    fade 0
    V(n) <──────────────────────────────────────────────┤
                    QK 1 (n)                exp 0, P 0 ──┘   max 1, vote      fade 1
    K(n + 2)        PV 0 (n)  <───────────                   exp 1, P 1

K(n + 1) is in flight before the load warp waits for the decision on tile n, so that the next S
depends on no decision. V(n) is asked for at the first vote to keep it, and has the time of 128
exponentials per row to arrive. When both Q tiles skip, V, both products and the corrections go; S
of the next tile may overwrite S as soon as the vote is in.

Constraints: `plan.can_implement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
import torch
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05

from cute_fmha import tiling
from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.device import device_function
from cute_fmha.kernels.blackwell.mask import mask_row
from cute_fmha.kernels.blackwell.mma import (
    Operand,
    instruction_descriptor,
    multiply_shared,
    multiply_tmem,
)
from cute_fmha.kernels.blackwell.pipelines import Barriers, Carried, Cursor, prefill_topology
from cute_fmha.kernels.blackwell.plan import Plan
from cute_fmha.kernels.blackwell.softmax import (
    ABSENT,
    EMPTY,
    LOG2_E,
    capped,
    exponentials,
    keeps_tile,
    log2_threshold,
    new_maximum,
    packed,
    row_maximum,
    row_sum,
    scaled,
    with_sink,
)

LN2 = math.log(2.0)

DTYPES = {
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.float32: cutlass.Float32,
}

kv_tile_ranges = device_function(tiling.kv_tile_ranges)


def tmem_row(tmem: Any, thread: Int32) -> Int32:
    """TMEM address of the row that ``thread`` of a warpgroup may access: lanes are bits 16–31."""
    return tmem.toint() + (thread // 32 << 21)


class Mmas(NamedTuple):
    """S = Q Kᵀ and O = P V."""

    qk: cute.TiledMma
    pv: cute.TiledMma


class Global(NamedTuple):
    """Global tensors as the TMA sees them, their copy atoms, and what is addressed directly."""

    tma_q: cute.CopyAtom
    mQ: cute.Tensor  # (SEQ_Q, D, HEAD_Q, BATCH)
    tma_k: cute.CopyAtom
    mK: cute.Tensor  # (SEQ_K, D, HEAD_KV, BATCH)
    tma_v: cute.CopyAtom
    mV: cute.Tensor  # (DV, SEQ_K, HEAD_KV, BATCH)
    tma_o: cute.CopyAtom
    mO: cute.Tensor  # (SEQ_Q, DV, HEAD_Q, BATCH)
    mLSE: cute.Tensor  # (BATCH, HEAD_Q, SEQ_Q)
    mSink: cute.Tensor  # (HEAD_Q,)
    mSkip: cute.Tensor  # (1,): in place of the scalar
    mStats: cute.Tensor  # (2,): KV tiles skipped, and all


class Layouts(NamedTuple):
    """Layouts of the shared buffers."""

    sQ: cute.ComposedLayout
    sK: cute.ComposedLayout
    sV: cute.ComposedLayout
    sO: cute.ComposedLayout


class Scalars(NamedTuple):
    """Run-time values."""

    scale_log2: Float32  # scale · log2 e; with a softcap cap · log2 e
    cap_inner: Float32  # scale / cap
    window_left: Int32
    window_right: Int32
    skip: Float32  # λ, or the factor that λ is over the KV length


class Shared(NamedTuple):
    """Shared memory of a CTA."""

    sQ: Any  # (MMA, MMA_M, MMA_K, TILE)
    sK: Any  # (MMA, MMA_N, MMA_K, STAGE)
    sV: Any  # (MMA, MMA_N, MMA_K, STAGE)
    sO: Any  # (ROWS, CHUNK, STAGE)
    sScale: Any  # (ROWS, TILE): fade of a KV tile, at the end the row sum
    sMax: Any  # (ROWS, TILE): at the end the row maximum
    sKeep: Any  # (2, TILE): whether a KV tile is kept


SKIPPED = -1.0
"""In place of a fade: the KV tile is skipped."""


@dataclass(frozen=True)
class RowState(Carried):
    """A row's softmax: the maximum that P is relative to, Σ P, and the maximum of the kept tiles,
    which decides what is skipped."""

    maximum: Float32
    total: Float32
    running: Float32


@dataclass(frozen=True)
class SoftmaxPhases(Carried):
    """Parities of s_full and scale_full, and the number of decisions made."""

    s: Int32
    scale: Int32
    decisions: Int32

    def after_scale(self) -> SoftmaxPhases:
        return replace(self, scale=self.scale ^ 1)


@dataclass(frozen=True)
class Counts(Carried):
    """KV tiles of this warpgroup so far."""

    skipped: Int32
    visited: Int32


class Prefill:
    """The kernel of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.topology = prefill_topology(plan)
        self.dtype = DTYPES[plan.dtype]
        self.out_dtype = DTYPES[plan.out_dtype]
        self.qk_tiler = (plan.tile_m, plan.tile_n, plan.head_dim)
        self.pv_tiler = (plan.tile_m, plan.head_dim_v, plan.tile_n)
        self.store = Store(plan.tile_m, plan.chunk, plan.chunks, self.out_dtype)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mSink: cute.Tensor,
        mSkip: cute.Tensor,
        mStats: cute.Tensor,
        scalars: Scalars,
        ctas: Int32,
        stream: CUstream,
    ):
        """Launch on ``[B, S, H, D]`` tensors with at most ``ctas`` CTAs."""
        plan = self.plan
        # (SEQ, D, HEAD, BATCH); V is (DV, SEQ, HEAD, BATCH)
        mQ = cute.make_tensor(mQ.iterator, cute.select(mQ.layout, mode=[1, 3, 2, 0]))
        mK = cute.make_tensor(mK.iterator, cute.select(mK.layout, mode=[1, 3, 2, 0]))
        mV = cute.make_tensor(mV.iterator, cute.select(mV.layout, mode=[3, 1, 2, 0]))
        mO = cute.make_tensor(mO.iterator, cute.select(mO.layout, mode=[1, 3, 2, 0]))
        one = tcgen05.CtaGroup.ONE
        mmas = Mmas(
            qk=sm100.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, one,
                self.qk_tiler[:2],
            ),
            pv=sm100.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.MN, Float32, one,
                self.pv_tiler[:2], tcgen05.OperandSource.TMEM,
            ),
        )  # fmt: skip
        layouts = Layouts(
            sQ=sm100.make_smem_layout_a(mmas.qk, self.qk_tiler, self.dtype, plan.q_tiles),
            sK=sm100.make_smem_layout_b(mmas.qk, self.qk_tiler, self.dtype, plan.k_stages),
            sV=sm100.make_smem_layout_b(mmas.pv, self.pv_tiler, self.dtype, plan.v_stages),
            sO=sm100.make_smem_layout_epi(
                self.out_dtype, cutlass.utils.LayoutEnum.ROW_MAJOR, (plan.tile_m, plan.chunk),
                plan.o_stages,
            ),
        )  # fmt: skip
        load, save = cpasync.CopyBulkTensorTileG2SOp(one), cpasync.CopyBulkTensorTileS2GOp()
        cluster = cute.tiled_divide(cute.make_layout((1, 1, 1)), (mmas.qk.thr_id.shape,)).shape
        tile = [0, 1, 2]
        tma_q, gQ = cute.nvgpu.make_tiled_tma_atom_A(
            load, mQ, cute.select(layouts.sQ, mode=tile), self.qk_tiler, mmas.qk, cluster
        )
        tma_k, gK = cute.nvgpu.make_tiled_tma_atom_B(
            load, mK, cute.select(layouts.sK, mode=tile), self.qk_tiler, mmas.qk, cluster
        )
        tma_v, gV = cute.nvgpu.make_tiled_tma_atom_B(
            load, mV, cute.select(layouts.sV, mode=tile), self.pv_tiler, mmas.pv, cluster
        )
        tma_o, gO = cpasync.make_tiled_tma_atom(
            save, mO, cute.select(layouts.sO, mode=[0, 1]), (plan.tile_m, plan.chunk)
        )
        work = cute.ceil_div(mQ.shape[0], plan.work_rows) * mQ.shape[2] * mQ.shape[3]
        mem = Global(tma_q, gQ, tma_k, gK, tma_v, gV, tma_o, gO, mLSE, mSink, mSkip, mStats)
        self.kernel(mmas, mem, layouts, scalars).launch(
            grid=(cutlass.min(work, ctas), 1, 1), block=(plan.threads, 1, 1), min_blocks_per_mp=1,
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(self, mmas: Mmas, mem: Global, layouts: Layouts, scalars: Scalars):
        """Allocate, initialise the barriers, dispatch the roles."""
        plan = self.plan

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sQ)], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sK)], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sV)], 1024]
            sO: cute.struct.Align[
                cute.struct.MemRange[self.out_dtype, cute.cosize(layouts.sO)], 1024
            ]
            sScale: cute.struct.MemRange[Float32, plan.q_tiles * plan.tile_m]
            sMax: cute.struct.MemRange[Float32, plan.q_tiles * plan.tile_m]
            sKeep: cute.struct.MemRange[Int32, 2 * plan.q_tiles]
            barriers: cute.struct.MemRange[Int64, self.topology.size]
            tmem: Int32

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        barriers = Barriers(self.topology, storage.barriers.data_ptr())
        per_row = cute.make_layout((plan.tile_m, plan.q_tiles))
        shared = Shared(
            sQ=storage.sQ.get_tensor(layouts.sQ.outer, swizzle=layouts.sQ.inner),
            sK=storage.sK.get_tensor(layouts.sK.outer, swizzle=layouts.sK.inner),
            sV=storage.sV.get_tensor(layouts.sV.outer, swizzle=layouts.sV.inner),
            sO=storage.sO.get_tensor(layouts.sO.outer, swizzle=layouts.sO.inner),
            sScale=storage.sScale.get_tensor(per_row),
            sMax=storage.sMax.get_tensor(per_row),
            sKeep=storage.sKeep.get_tensor(cute.make_layout((2, plan.q_tiles))),
        )
        mma_warp, load_warp, epilogue_warp = (
            plan.role(name).warps[0] for name in ("mma", "load", "epilogue")
        )
        if warp == load_warp:
            for atom in (mem.tma_q, mem.tma_k, mem.tma_v, mem.tma_o):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                barriers.initialise()
            cute.arch.mbarrier_init_fence()
        if warp == mma_warp:
            cute.arch.alloc_tmem(plan.tmem.columns, storage.tmem)
            cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.sync_threads()
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem)

        if warp < plan.role("softmax").warps[-1] + 1:
            cute.arch.setmaxregister_increase(plan.role("softmax").registers)
            self.softmax(mmas, mem, shared, scalars, tmem, barriers.of("softmax"))
        elif warp < plan.role("correction").warps[-1] + 1:
            cute.arch.setmaxregister_decrease(plan.role("correction").registers)
            self.correction(mmas, mem, shared, scalars, tmem, barriers.of("correction"))
        else:
            cute.arch.setmaxregister_decrease(plan.role("mma").registers)
            if warp == mma_warp:
                self.mma(mmas, mem, shared, scalars, tmem, barriers.of("mma"))
            elif warp == load_warp:
                self.load(mmas, mem, shared, scalars, barriers.of("load"))
            elif warp == epilogue_warp:
                self.epilogue(mem, shared, barriers.of("epilogue"))
        cute.arch.sync_threads()
        if warp == mma_warp:
            cute.arch.dealloc_tmem(tmem, plan.tmem.columns)

    # ------------------------------------------------------------------ work

    def works(self, mem: Global) -> tuple[Int32, Int32, Int32]:
        """The work tiles of this CTA, as a range (first, end, step)."""
        total = cute.ceil_div(mem.mQ.shape[0], self.plan.work_rows) * mem.mQ.shape[2]
        return cute.arch.block_idx()[0], total * mem.mQ.shape[3], cute.arch.grid_dim()[0]

    def coordinates(self, mem: Global, work: Int32) -> tuple[Int32, Int32, Int32]:
        """(work block of rows, query head, batch) of a work tile."""
        heads, batches = mem.mQ.shape[2], mem.mQ.shape[3]
        block = work // (heads * batches)
        rest = work - block * (heads * batches)
        batch = rest // heads
        return block, rest - batch * heads, batch

    @cute.jit
    def tiles(self, mem: Global, scalars: Scalars, row: Int32):
        """KV tiles (begin, full_begin, full_end, end) of the Q tile whose first row is ``row``;
        all 0 when there are none."""
        seqlen_q, seqlen_k = mem.mQ.shape[0], mem.mK.shape[0]
        left, right = self.window(scalars)
        row_end = cutlass.min(row + self.plan.tile_m, seqlen_q)
        begin, full_begin, full_end, end = kv_tile_ranges(
            row, row_end, seqlen_q, seqlen_k, left, right, self.plan.tile_n
        )
        if row >= seqlen_q or end <= begin:
            begin, full_begin, full_end, end = Int32(0), Int32(0), Int32(0), Int32(0)
        return begin, full_begin, full_end, end

    def window(self, scalars: Scalars) -> tuple[Any, Any]:
        """Window sides; the Python integer −1 for a side that is not compiled in."""
        features = self.plan.features
        return (
            scalars.window_left if features.window_left else -1,
            scalars.window_right if features.window_right else -1,
        )

    @cute.jit
    def ranges(self, mem: Global, scalars: Scalars, block: Int32):
        """([begin of every Q tile], [end of every Q tile], begin and end of their union)."""
        begins, ends = [], []
        for t in cutlass.range_constexpr(self.plan.q_tiles):
            row = block * self.plan.work_rows + t * self.plan.tile_m
            begin, _, _, end = self.tiles(mem, scalars, row)
            begins.append(begin)
            ends.append(end)
        first, last = begins[0], ends[0]
        if cutlass.const_expr(self.plan.q_tiles == 2):
            # A later tile begins and ends no earlier, unless one of them is empty.
            first = begins[1] if ends[0] == 0 else begins[0]
            last = cutlass.max(ends[0], ends[1])
        return begins, ends, first, last

    # ------------------------------------------------------------------ roles

    @cute.jit
    def load(self, mmas: Mmas, mem: Global, shared: Shared, scalars: Scalars, barriers: Barriers):
        """Reads: Q, K, V in global memory. Writes: sQ, sK, sV by TMA.
        Waits: q_empty, k_empty, v_empty. Signals: q_full, k_full, v_full.
        Registers: 48."""
        plan = self.plan
        element = plan.dtype.itemsize
        qk, pv = mmas.qk.get_slice(0), mmas.pv.get_slice(0)
        q_bytes = plan.tile_m * plan.head_dim * element
        k_bytes = plan.tile_n * plan.head_dim * element
        v_bytes = plan.tile_n * plan.head_dim_v * element
        group = mem.mQ.shape[2] // mem.mK.shape[2]
        q_phase = Int32(0)
        decisions = [Int32(0) for _ in range(plan.q_tiles)]
        k, v = Cursor(plan.k_stages), Cursor(plan.v_stages)
        first_work, works, step = self.works(mem)
        for work in cutlass.range(first_work, works, step, unroll=1):
            block, head, batch = self.coordinates(mem, work)
            mQ = mem.mQ[None, None, head, batch]
            mK = mem.mK[None, None, head // group, batch]
            mV = mem.mV[None, None, head // group, batch]
            # (ROW, D, ROW_TILE), (KEY, D, KEY_TILE), (DV, KEY, KEY_TILE)
            gQ = cute.local_tile(mQ, (plan.tile_m, plan.head_dim), (None, 0))
            gK = cute.local_tile(mK, (plan.tile_n, plan.head_dim), (None, 0))
            gV = cute.local_tile(mV, (plan.head_dim_v, plan.tile_n), (0, None))
            # (TMA, STAGE) and (TMA, TILE) each
            tQsQ, tQgQ = self.partition(mem.tma_q, shared.sQ, qk.partition_A(gQ))
            tKsK, tKgK = self.partition(mem.tma_k, shared.sK, qk.partition_B(gK))
            tVsV, tVgV = self.partition(mem.tma_v, shared.sV, pv.partition_B(gV))
            begins, ends, begin, end = self.ranges(mem, scalars, block)
            if end > begin:
                for n in cutlass.range(begin, end + 1, unroll=1):
                    if n < end:
                        barriers.wait("k_empty", k.empty_phase, k.index)
                        bar = barriers.expect("k_full", k_bytes, k.index)
                        cute.copy(mem.tma_k, tKgK[None, n], tKsK[None, k.index], tma_bar_ptr=bar)
                        k = k.next()
                    if n == begin:
                        for t in cutlass.range_constexpr(plan.q_tiles):
                            barriers.wait("q_empty", q_phase ^ 1, t)
                            bar = barriers.expect("q_full", q_bytes, t)
                            cute.copy(
                                mem.tma_q,
                                tQgQ[None, block * plan.q_tiles + t],
                                tQsQ[None, t],
                                tma_bar_ptr=bar,
                            )
                        q_phase = q_phase ^ 1
                    else:
                        keep = Boolean(True)
                        if cutlass.const_expr(plan.features.skip):
                            keep = Boolean(False)
                            for t in cutlass.range_constexpr(plan.q_tiles):
                                if begins[t] < n and n <= ends[t]:
                                    keep = keep | self.decision(shared, barriers, t, decisions[t])
                                    decisions[t] = decisions[t] + 1
                        if keep:
                            barriers.wait("v_empty", v.empty_phase, v.index)
                            bar = barriers.expect("v_full", v_bytes, v.index)
                            cute.copy(
                                mem.tma_v, tVgV[None, n - 1], tVsV[None, v.index], tma_bar_ptr=bar
                            )
                            v = v.next()
        # The release of the last V is the last signal of the tensor core: stay until it is in.
        for _stage in cutlass.range_constexpr(plan.v_stages):
            barriers.wait("v_empty", v.empty_phase, v.index)
            v = v.next()

    def partition(self, tma: Any, shared: Any, tile: Any) -> Any:
        """(shared buffers, global tiles) of a TMA load without multicast: (TMA, STAGE | TILE)."""
        return cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(shared, 0, 3),
            cute.group_modes(tile, 0, 3),
        )  # fmt: skip

    def decision(self, shared: Shared, barriers: Barriers, t: int, count: Int32) -> Boolean:
        """Wait for decision ``count`` of Q tile ``t``: whether it keeps the KV tile."""
        barriers.wait_tmem("decided", count >> 1 & 1, 2 * t + (count & 1))
        return shared.sKeep[count & 1, t] != 0

    @cute.jit
    def mma(
        self, mmas: Mmas, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
        barriers: Barriers,
    ):  # fmt: skip
        """Reads: sQ, sK, sV, P. Writes: S, O in TMEM.
        Waits: q_full, k_full, v_full, p_ready, p_last.
        Signals: q_empty, k_empty, v_empty, s_full, o_full. Registers: 48."""
        plan = self.plan
        qk, pv = mmas.qk.get_slice(0), mmas.pv.get_slice(0)
        # (MMA, MMA_M, MMA_K, TILE), (MMA, MMA_N, MMA_K, STAGE) twice
        q = Operand.of(qk.make_fragment_A(shared.sQ))
        k_tiles = Operand.of(qk.make_fragment_B(shared.sK))
        v_tiles = Operand.of(pv.make_fragment_B(shared.sV))
        columns = tmem.toint()
        tS, tP, tO = (
            [columns + plan.tmem[f"{name}{t}"].start for t in range(plan.q_tiles)]
            for name in ("S", "P", "O")
        )
        qk_kind = instruction_descriptor(self.dtype, plan.tile_m, plan.tile_n, False)
        pv_kind = instruction_descriptor(self.dtype, plan.tile_m, plan.head_dim_v, True)
        steps = range(plan.tile_n // 16)
        split = len(steps) * 3 // 4
        q_phase = Int32(0)
        p_phase = [Int32(0) for _ in range(plan.q_tiles)]
        decisions = [Int32(0) for _ in range(plan.q_tiles)]
        k, v = Cursor(plan.k_stages), Cursor(plan.v_stages)
        first_work, works, step = self.works(mem)
        for work in cutlass.range(first_work, works, step, unroll=1):
            block, _, _ = self.coordinates(mem, work)
            begins, ends, begin, end = self.ranges(mem, scalars, block)
            if end > begin:
                for t in cutlass.range_constexpr(plan.q_tiles):
                    barriers.wait("q_full", q_phase, t)
                q_phase = q_phase ^ 1
                fresh = [Boolean(True) for _ in range(plan.q_tiles)]
                for n in cutlass.range(begin, end + 1, unroll=1):
                    v_used = Boolean(False)
                    for t in cutlass.range_constexpr(plan.q_tiles):
                        if begins[t] < n and n <= ends[t]:
                            keep = Boolean(True)
                            if cutlass.const_expr(plan.features.skip):
                                keep = self.decision(shared, barriers, t, decisions[t])
                                decisions[t] = decisions[t] + 1
                            if keep:
                                if not v_used:
                                    barriers.wait("v_full", v.phase, v.index)
                                v_used = Boolean(True)
                                barriers.wait_tmem("p_ready", p_phase[t], t)
                                v_tile = v_tiles.tile(v.index)
                                multiply_tmem(
                                    tO[t],
                                    tP[t],
                                    v_tiles,
                                    v_tile,
                                    pv_kind,
                                    steps[:split],
                                    not fresh[t],
                                )
                                barriers.wait_tmem("p_last", p_phase[t], t)
                                multiply_tmem(
                                    tO[t],
                                    tP[t],
                                    v_tiles,
                                    v_tile,
                                    pv_kind,
                                    steps[split:],
                                    Boolean(True),
                                )
                                fresh[t] = Boolean(False)
                                p_phase[t] = p_phase[t] ^ 1
                            if n == ends[t]:
                                barriers.commit("o_full", t)
                        if cutlass.const_expr(t == 0):  # noqa: SIM102  (compile and run time)
                            if n < end:
                                barriers.wait("k_full", k.phase, k.index)
                        if begins[t] <= n and n < ends[t]:
                            multiply_shared(
                                tS[t], q, q.tile(t), k_tiles, k_tiles.tile(k.index), qk_kind
                            )
                            barriers.commit("s_full", t)
                    if v_used:
                        barriers.commit("v_empty", v.index)
                        v = v.next()
                    if n < end:
                        barriers.commit("k_empty", k.index)
                        k = k.next()
                    if n == end - 1:
                        for t in cutlass.range_constexpr(plan.q_tiles):
                            barriers.commit("q_empty", t)

    @cute.jit
    def softmax(
        self, mmas: Mmas, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
        barriers: Barriers,
    ):  # fmt: skip
        """One warpgroup per Q tile, one row per thread.

        Reads: S. Writes: P over S, sScale, sMax.
        Waits: s_full, scale_empty. Signals: p_ready, p_last, scale_full. Registers: 192."""
        plan = self.plan
        tile = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4
        thread = cute.arch.thread_idx()[0] % 128
        phases = SoftmaxPhases(Int32(0), Int32(0), Int32(0))
        counts = Counts(Int32(0), Int32(0))
        if cutlass.const_expr(plan.features.skip):
            skip = scalars.skip
            if cutlass.const_expr(plan.features.skip_tensor):
                skip = mem.mSkip[0]
            if cutlass.const_expr(plan.features.skip_relative):
                skip = skip / Float32(mem.mK.shape[0])
            scalars = scalars._replace(skip=log2_threshold(skip))
        group = (mmas, mem, shared, scalars, tmem, barriers, tile, thread)
        first_work, works, step = self.works(mem)
        for work in cutlass.range(first_work, works, step, unroll=1):
            block, _, _ = self.coordinates(mem, work)
            first_row = block * plan.work_rows + tile * plan.tile_m
            begin, full_begin, full_end, end = self.tiles(mem, scalars, first_row)
            row = first_row + thread
            running = cutlass.select_(row < mem.mQ.shape[0], Float32(EMPTY), Float32(ABSENT))
            state = RowState(Float32(EMPTY), Float32(0.0), running)
            if cutlass.const_expr(plan.features.window_left):
                for n in cutlass.range(begin, full_begin, unroll=1):
                    state, phases, counts = self.softmax_step(
                        group, row, n, begin, state, phases, counts, True
                    )
            for n in cutlass.range(full_begin, full_end, unroll=1):
                state, phases, counts = self.softmax_step(
                    group, row, n, begin, state, phases, counts, False
                )
            for n in cutlass.range(full_end, end, unroll=1):
                state, phases, counts = self.softmax_step(
                    group, row, n, begin, state, phases, counts, True
                )
            if end > begin:
                barriers.wait("scale_empty", phases.scale ^ 1, tile)
                phases = phases.after_scale()
                shared.sScale[thread, tile] = state.total
                shared.sMax[thread, tile] = state.maximum
                barriers.arrive("scale_full", tile)
        if cutlass.const_expr(plan.features.count):  # noqa: SIM102  (compile and run time)
            if thread == 0:
                cute.arch.atomic_add(mem.mStats.iterator, Int64(counts.skipped))
                cute.arch.atomic_add(mem.mStats.iterator + 1, Int64(counts.visited))

    @cute.jit
    def softmax_step(
        self, group, row: Int32, n: Int32, begin: Int32, state, phases, counts,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """One KV tile of one row: the row's next state, the phases and the counts."""
        plan = self.plan
        _, mem, shared, scalars, tmem, barriers, tile, thread = group
        s0 = plan.tmem["S0"].start
        tS = tmem_row(tmem, thread) + s0 + tile * plan.tile_n
        tP = tS + (plan.tmem["P0"].start - s0)
        width = 32
        barriers.wait_tmem("s_full", phases.s, tile)
        scores = []
        for c in cutlass.range_constexpr(0, plan.tile_n, width):
            scores += ptx.tcgen05_load(tS + c, width)
        scores = ptx.tcgen05_wait_load(scores)
        if cutlass.const_expr(plan.features.softcap):
            scores = capped(scores, scalars.cap_inner)
        if cutlass.const_expr(masked):
            lengths = mem.mQ.shape[0], mem.mK.shape[0]
            scores = mask_row(scores, row, n * plan.tile_n, lengths, self.window(scalars))
        if cutlass.const_expr(plan.features.skip):
            tile_max = row_maximum(scores, Float32(-Float32.inf))
            vote = keeps_tile(tile_max, state.running, scalars.scale_log2, scalars.skip)
            keep = ptx.barrier_any(tile + 1, plan.tile_m, vote)
            slot = phases.decisions & 1
            if thread < 32:
                with cute.arch.elect_one():
                    shared.sKeep[slot, tile] = Int32(keep)
                ptx.tcgen05_fence_before()
                cute.arch.sync_warp()
                barriers.arrive_leader("decided", 2 * tile + slot)
            counts = Counts(counts.skipped + Int32(not keep), counts.visited + 1)
            if keep:
                state = self.probabilities(
                    group, scores, tP, tile_max, state, phases, Boolean(True)
                )
            else:
                barriers.wait("scale_empty", phases.scale ^ 1, tile)
                shared.sScale[thread, tile] = Float32(SKIPPED)
                barriers.arrive("scale_full", tile)
            phases = SoftmaxPhases(phases.s ^ 1, phases.scale ^ 1, phases.decisions + 1)
        else:
            tile_max = row_maximum(scores, state.maximum)
            state = self.probabilities(group, scores, tP, tile_max, state, phases, n > begin)
            scale_phase = phases.scale ^ Int32(n > begin)
            phases = SoftmaxPhases(phases.s ^ 1, scale_phase, phases.decisions)
            counts = Counts(counts.skipped, counts.visited + 1)
        return state, phases, counts

    @cute.jit
    def probabilities(
        self, group, scores, tP: Int32, tile_max: Float32, state, phases, tell: Boolean
    ):
        """P of a kept tile, handed to the MMA; with ``tell`` the correction learns what is left
        of O."""
        plan = self.plan
        _, _, shared, scalars, _, barriers, tile, thread = group
        running = cute.arch.fmax(state.running, tile_max)
        tile_max = cute.arch.fmax(state.maximum, tile_max)
        maximum, fade = new_maximum(
            state.maximum, tile_max, scalars.scale_log2, plan.rescale_threshold
        )
        if tell:
            barriers.wait("scale_empty", phases.scale ^ 1, tile)
            shared.sScale[thread, tile] = fade
            barriers.arrive("scale_full", tile)
        minus_max = -maximum * scalars.scale_log2
        quarter = plan.tile_n // 4
        p = []
        for q in cutlass.range_constexpr(4):
            part = exponentials(
                scores[q * quarter : (q + 1) * quarter], scalars.scale_log2, minus_max
            )
            ptx.tcgen05_store(tP + q * quarter // 2, packed(part, self.dtype))
            p += part
            if cutlass.const_expr(q == 2):
                ptx.tcgen05_wait_store()
                barriers.arrive_tmem("p_ready", tile)
        ptx.tcgen05_wait_store()
        barriers.arrive_tmem("p_last", tile)
        return RowState(maximum, row_sum(p, state.total * fade), running)

    @cute.jit
    def correction(
        self, mmas: Mmas, mem: Global, shared: Shared, scalars: Scalars, tmem: cute.Pointer,
        barriers: Barriers,
    ):  # fmt: skip
        """Keeps O consistent with the running maximum; at the end normalises it.

        Reads: sScale, sMax, O. Writes: O, the chunk buffers, LSE.
        Waits: scale_full, o_full, chunk_empty. Signals: p_ready, scale_empty, chunk_full.
        Registers: 80."""
        plan = self.plan
        thread = cute.arch.thread_idx()[0] % 128
        scale_phase = [Int32(0) for _ in range(plan.q_tiles)]
        o_phase = [Int32(0) for _ in range(plan.q_tiles)]
        chunk = Cursor(plan.o_stages)
        seqlen_q = mem.mQ.shape[0]
        first_work, works, step = self.works(mem)
        for work in cutlass.range(first_work, works, step, unroll=1):
            block, head, batch = self.coordinates(mem, work)
            begins, ends, begin, end = self.ranges(mem, scalars, block)
            fresh = [Boolean(True) for _ in range(plan.q_tiles)]
            for t in cutlass.range_constexpr(plan.q_tiles):
                # O is free: the first P V overwrites it. Which tile that is, a skip decides.
                if cutlass.const_expr(not plan.features.skip):  # noqa: SIM102
                    if ends[t] > begins[t]:
                        barriers.arrive_tmem("p_ready", t)
                        fresh[t] = Boolean(False)
            first_told = begin if cutlass.const_expr(plan.features.skip) else begin + 1
            for n in cutlass.range(first_told, end, unroll=1):
                for t in cutlass.range_constexpr(plan.q_tiles):
                    told = begins[t] < n
                    if cutlass.const_expr(plan.features.skip):
                        told = begins[t] <= n
                    if told and n < ends[t]:
                        barriers.wait_tmem("scale_full", scale_phase[t], t)
                        scale_phase[t] = scale_phase[t] ^ 1
                        fade = shared.sScale[thread, t]
                        barriers.arrive("scale_empty", t)
                        if cute.arch.vote_any_sync(fade != SKIPPED):
                            # S(n) was complete when its fade was written, and P V (n − 1) before.
                            if not fresh[t] and cute.arch.vote_any_sync(fade < 1.0):
                                tO = tmem_row(tmem, thread) + plan.tmem[f"O{t}"].start
                                self.rescale(tO, fade)
                            fresh[t] = Boolean(False)
                            barriers.arrive_tmem("p_ready", t)
            for t in cutlass.range_constexpr(plan.q_tiles):
                first_row = block * plan.work_rows + t * plan.tile_m
                if first_row < seqlen_q:
                    empty = fresh[t]
                    total, row_max = Float32(0.0), Float32(EMPTY)
                    if ends[t] > begins[t]:
                        barriers.wait("scale_full", scale_phase[t], t)
                        scale_phase[t] = scale_phase[t] ^ 1
                        total = shared.sScale[thread, t]
                        row_max = shared.sMax[thread, t]
                        barriers.arrive("scale_empty", t)
                        barriers.wait_tmem("o_full", o_phase[t], t)
                        o_phase[t] = o_phase[t] ^ 1
                    maximum_log2 = row_max * scalars.scale_log2
                    left = Float32(1.0)
                    if cutlass.const_expr(plan.features.sink):
                        maximum_log2, total, left = with_sink(
                            maximum_log2, total, mem.mSink[head] * LOG2_E
                        )
                    nothing = total == 0.0
                    scale = 0.0 if nothing else left * cute.arch.rcp_approx(total)
                    tO = tmem_row(tmem, thread) + plan.tmem[f"O{t}"].start
                    chunk = self.store.produce(tO, shared.sO, thread, scale, empty, barriers, chunk)
                    if cutlass.const_expr(plan.features.lse):
                        lse = -Float32.inf
                        if not nothing:
                            lse = LN2 * (maximum_log2 + cute.math.log2(total, fastmath=True))
                        row = first_row + thread
                        if row < seqlen_q:
                            mem.mLSE[batch, head, row] = lse

    def rescale(self, tO: Int32, fade: Float32) -> None:
        """O = fade · O, 16 columns at a time."""
        width = 16
        for c in range(0, self.plan.head_dim_v, width):
            part = ptx.tcgen05_wait_load(ptx.tcgen05_load(tO + c, width))
            ptx.tcgen05_store(tO + c, scaled(part, fade))
        ptx.tcgen05_wait_store()

    @cute.jit
    def epilogue(self, mem: Global, shared: Shared, barriers: Barriers):
        """Reads: the chunk buffers. Writes: O in global memory by TMA.
        Waits: chunk_full. Signals: chunk_empty. Registers: 48."""
        plan = self.plan
        chunk = Cursor(plan.o_stages)
        first_work, works, step = self.works(mem)
        for work in cutlass.range(first_work, works, step, unroll=1):
            block, head, batch = self.coordinates(mem, work)
            # (ROWS, CHUNK, ROW_TILE, CHUNKS)
            gO = cute.local_tile(
                mem.mO[None, None, head, batch], (plan.tile_m, plan.chunk), (None, None)
            )
            for t in cutlass.range_constexpr(plan.q_tiles):
                tile = block * plan.q_tiles + t
                if tile * plan.tile_m < mem.mQ.shape[0]:
                    chunk = self.store.consume(
                        mem.tma_o, gO[None, None, tile, None], shared.sO, barriers, chunk
                    )
        cute.arch.cp_async_bulk_wait_group(0)
