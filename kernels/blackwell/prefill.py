"""Prefill on Blackwell (sm_100a, sm_103a): one persistent, warp-specialised tcgen05 kernel.

Mathematics, per query row i, in base 2 (`softmax`): S = Q Kᵀ by KV tiles n = begin … end − 1,

    m' = max(m, S),  P = 2^(c·S − c·m'),  fade = 2^(c·m − c·m'),  l' = fade · l + ΣP,
    O' = fade · O + P V,

out = O / l, lse = ln 2 · (c·m + log2 l), c = scale · log2 e. A sink joins m and l at the end; a
softcap replaces S by tanh(scale / cap · S) and c by cap · log2 e. With skip-softmax a KV tile whose
every row has c · (max S − running maximum) < log2 λ is left out, before its V is asked for.

Shapes: q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], out [B, Sq, Hq, Dv], lse
[B, Hq, Sq]; or packed sequences, q [total_q, Hq, D], k [total_k, Hkv, D] …, lse [Hq, total_q],
whose lengths are on the device; any strides with a contiguous last dimension and rows on 16 bytes.
A work tile is two Q tiles of 128 rows of one head of one sequence; each has its own exact range of
KV tiles. At Dv 256 two CTAs have one each, and the KV tiles in common (`Plan.pair`, below). Rows
are positions, or where that fills tiles better one of the heads of a group each
(`plan.packed_heads`); Q and O then have the mode (GROUP, SEQ), of which a TMA box takes whole
positions. Tensor maps end where sequences do (`ragged`): V past the end is read as 0, O past the
end is not written; K past the end is whatever it is, and masked.

Warps

    0–3, 4–7   softmax     S → P of Q tile 0 and 1, a row per thread; decides what is skipped
    8–11       correction  O · fade when the maximum moved; at the end O / l → chunks, LSE
    12         mma         S = Q Kᵀ, O += P V; owns TMEM
    13         load        Q, K by TMA
    14         epilogue    chunks of O → global memory by TMA; hands out the work
    15         load_values V by TMA, where a Q tile keeps the KV tile

TMEM, in 32-bit columns, at Dv 128 (`tmem.attention_map`)

    0        64       128      192      256               384               512
    | S0     | P0     | S1     | P1     | O0              | O1              |
    S0 is 0–127, S1 128–255: P lies over the upper half of its own S, which is read by then.

Pipelines: `topology.prefill_topology`.

Timeline of KV tile n in steady state, two Q tiles (numbers: Q tile; time goes down)

    load        load_values   mma              softmax 0          softmax 1          correction
    K(n + 1)                  PV 0 (n−1)                          exp 1, P 1 (n−1)
                              QK 0 (n)                            ↓
                              PV 1 (n−1)       max 0, vote ─┐                        fade 0
                V(n) <──────────────────────── 16 exps 0    │
                              QK 1 (n)         exp 0, P 0 <─┘     max 1, vote ─┐     fade 1
    K(n + 2)                  PV 0 (n) <────── ↓                  16 exps 1    │
                              QK 0 (n+1)                          exp 1, P 1 <─┘

K has a warp of its own, so that no decision stands before it: it is as many tiles ahead as there
are stages. V(n) is asked for when the first Q tile keeps tile n, and has the time of that tile's
exponentials to arrive. Nobody waits for the votes of the four warps to come together: a warp goes
on with `plan.ahead` exponentials, which are lost where the tile is skipped. Then also V, P V, the
other exponentials and the correction go, and S of the next tile overwrites this one; that of Q
tile 1 also before P V of Q tile 0, whose P is still in the making (`mma`). P is handed on in parts
(`Plan.p_parts`), so that P V begins before all of it is there.

A pair of CTAs (Dv 256): MMAs of 256 rows, from the first CTA's MMA warp for both. Each CTA has its
128 rows of Q, S, P and O, of every KV tile half of the keys of K and half of the columns of V.
O takes half of TMEM, S has the other half twice; the softmax warpgroups take KV tiles by turns, and
hand the row maxima on. Each sums its own P, relative to its own last maximum.

    mma          softmax 0                    softmax 1                    correction
    QK (n + 1)   max n, told ──────────────>  ↓ exp n − 1                  fade n
    PV (n − 1)   exp n                        P (n − 1)
    QK (n + 2)   ↓                   ┌──────  max n + 1, told              fade n + 1
    PV (n) <──── P (n)               │        exp n + 1
    QK (n + 3)   max n + 2, told <───┘        ↓                            fade n + 2

A rescaling waits for P V of the tile before (its release of V), which S no longer comes after. A
tile is skipped where the rows of both CTAs leave it; their warps vote in both. Launch control
answers both CTAs at once, each writes the same record for itself.

Constraints: `plan.can_implement`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Float32, Int8, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.pipelines import Barriers, meet
from cute_fmha.kernels.blackwell.plan import GROUPS, HEADER, MASK_TILES, RANGE, WORK_STAGES, Plan
from cute_fmha.kernels.blackwell.prefill_correction import correction, epilogue
from cute_fmha.kernels.blackwell.prefill_load import load, load_values
from cute_fmha.kernels.blackwell.prefill_mma import mma, mma_pair
from cute_fmha.kernels.blackwell.prefill_operands import (
    Global,
    Layouts,
    Lengths,
    Mmas,
    Scalars,
    Shared,
    Tensors,
)
from cute_fmha.kernels.blackwell.prefill_schedule import Schedule
from cute_fmha.kernels.blackwell.prefill_softmax import softmax
from cute_fmha.kernels.blackwell.prefill_work import Work
from cute_fmha.kernels.blackwell.ragged import ragged
from cute_fmha.kernels.blackwell.topology import prefill_topology


class Prefill:
    """The kernel of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.topology = prefill_topology(plan)
        self.dtype = DTYPES[plan.dtype]
        self.out_dtype = DTYPES[plan.out_dtype]
        self.qk_tiler = (plan.mma_rows, plan.tile_n, plan.head_dim)
        self.pv_tiler = (plan.mma_rows, plan.head_dim_v, plan.tile_n)
        self.votes = plan.ctas * plan.role("softmax").group_warps  # on a KV tile
        self.store = Store(plan.tile_m, plan.leaving, self.out_dtype)

    @cute.jit
    def __call__(
        self, tensors: Tensors, op: tuple | None, lengths: Lengths, scalars: Scalars,
        stream: CUstream,
    ):  # fmt: skip
        """Launch on ``[B, S, H, D]`` tensors, or packed ones ``[total, H, D]`` of ``lengths``.
        ``op``: what the epilogue op reads, and its second output."""
        plan = self.plan
        mQ, mK, mV, mO = (self.rows(mX) for mX in tensors[:4])
        mV = cute.make_tensor(
            mV.iterator, cute.select(mV.layout, mode=[1, 0, *range(2, cute.rank(mV))])
        )
        works = self.works(mQ, mK, lengths)
        if cutlass.const_expr(plan.pack > 1):
            mQ, mO = self.packed_heads(mQ), self.packed_heads(mO)
        if cutlass.const_expr(plan.ragged_keys):
            mV = ragged(mV, 1)
        if cutlass.const_expr(plan.features.packed):
            mO = ragged(mO, 0)
        group = tcgen05.CtaGroup.TWO if plan.pair else tcgen05.CtaGroup.ONE
        mmas = Mmas(
            qk=sm100.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, group,
                self.qk_tiler[:2],
            ),
            pv=sm100.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.MN, Float32, group,
                self.pv_tiler[:2], tcgen05.OperandSource.TMEM,
            ),
        )  # fmt: skip
        layouts = Layouts(
            sQ=sm100.make_smem_layout_a(mmas.qk, self.qk_tiler, self.dtype, plan.q_tiles),
            sK=sm100.make_smem_layout_b(mmas.qk, self.qk_tiler, self.dtype, plan.k_stages),
            sV=sm100.make_smem_layout_b(mmas.pv, self.pv_tiler, self.dtype, plan.v_stages),
            sO=sm100.make_smem_layout_epi(
                self.out_dtype, cutlass.utils.LayoutEnum.ROW_MAJOR,
                (plan.tile_m, plan.leaving.chunk), plan.o_stages,
            ),
        )  # fmt: skip
        load, save = cpasync.CopyBulkTensorTileG2SOp(group), cpasync.CopyBulkTensorTileS2GOp()
        ctas = cute.make_layout((plan.ctas, 1, 1))
        cluster = cute.tiled_divide(ctas, (mmas.qk.thr_id.shape,)).shape
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
            save, mO, cute.select(layouts.sO, mode=[0, 1]), (plan.tile_m, plan.leaving.chunk)
        )
        mem = Global(
            tma_q, gQ, tma_k, gK, tma_v, gV, tma_o, gO, *tensors[4:8], op, *lengths[:3],
            tensors.mMask,
        )  # fmt: skip
        self.kernel(mmas, mem, layouts, scalars).launch(
            grid=(works * plan.ctas, 1, 1), block=(plan.threads, 1, 1),
            cluster=(plan.ctas, 1, 1), min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip

    def rows(self, mX: cute.Tensor) -> cute.Tensor:
        """(SEQ, D, HEAD, BATCH) of ``[B, S, H, D]``, (SEQ, D, HEAD) of ``[total, H, D]``.

        There is a row even where there is none: a tensor map must not be empty.
        """
        order = [0, 2, 1] if self.plan.features.packed else [1, 3, 2, 0]
        layout = cute.select(mX.layout, mode=order)
        shape = (cutlass.max(layout.shape[0], 1), *layout.shape[1:])
        return cute.make_tensor(mX.iterator, cute.make_layout(shape, stride=layout.stride))

    def packed_heads(self, mX: cute.Tensor) -> cute.Tensor:
        """((GROUP, SEQ), D, HEAD_KV, …) of (SEQ, D, HEAD, …)."""
        pack = self.plan.pack
        seq, dim, head, *rest = mX.shape
        by_seq, by_dim, by_head, *by_rest = mX.stride
        layout = cute.make_layout(
            ((pack, seq), dim, head // pack, *rest),
            stride=((by_head, by_seq), by_dim, by_head * pack, *by_rest),
        )
        return cute.make_tensor(mX.iterator, layout)

    def works(self, mQ: cute.Tensor, mK: cute.Tensor, lengths: Lengths) -> Int32:
        """CTAs: as many as there are work tiles, or with packed sequences may be."""
        plan = self.plan
        positions = plan.work_rows // plan.pack
        if lengths.cu_seqlens_q is not None:
            # Every sequence may have one work tile that is not full.
            batches = lengths.cu_seqlens_q.shape[0] - 1
            longest = cute.ceil_div(lengths.max_seqlen_q, positions) * batches
            blocks = cutlass.min(mQ.shape[0] // positions + batches, longest)
        else:
            blocks = cute.ceil_div(mQ.shape[0], positions) * mQ.shape[3]
        return blocks * (mQ.shape[2] // plan.pack)

    @cute.kernel
    def kernel(self, mmas: Mmas, mem: Global, layouts: Layouts, scalars: Scalars):
        """Allocate, initialise the barriers, dispatch the roles."""
        plan = self.plan
        words = HEADER + RANGE * plan.q_tiles

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sQ)], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sK)], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.sV)], 1024]
            sO: cute.struct.Align[
                cute.struct.MemRange[
                    self.out_dtype, 0 if plan.o_over_v else cute.cosize(layouts.sO)
                ],
                1024,
            ]
            sScale: cute.struct.MemRange[Float32, GROUPS * plan.tile_m]
            sMax: cute.struct.MemRange[Float32, GROUPS * plan.tile_m]
            sVotes: cute.struct.Align[cute.struct.MemRange[Int8, self.votes * GROUPS], 4]
            sWork: cute.struct.Align[cute.struct.MemRange[Int32, words * WORK_STAGES], 16]
            sMask: cute.struct.MemRange[Int32, max(plan.mask_words, 1)]
            sClaim: cute.struct.Align[cute.struct.MemRange[Int32, 4], 16]
            barriers: cute.struct.MemRange[Int64, self.topology.size]
            tmem: Int32

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        barriers = Barriers(self.topology, storage.barriers.data_ptr())
        per_row = cute.make_layout((plan.tile_m, GROUPS))
        votes = storage.sVotes.get_tensor(cute.make_layout((self.votes, GROUPS)))
        o_buffers = storage.sV.data_ptr() if plan.o_over_v else storage.sO.data_ptr()
        o_buffers = cute.recast_ptr(o_buffers, layouts.sO.inner, dtype=self.out_dtype)
        shared = Shared(
            sQ=storage.sQ.get_tensor(layouts.sQ.outer, swizzle=layouts.sQ.inner),
            sK=storage.sK.get_tensor(layouts.sK.outer, swizzle=layouts.sK.inner),
            sV=storage.sV.get_tensor(layouts.sV.outer, swizzle=layouts.sV.inner),
            sO=cute.make_tensor(o_buffers, layouts.sO.outer),
            sScale=storage.sScale.get_tensor(per_row),
            sMax=storage.sMax.get_tensor(per_row),
            sVotes=votes,
            sKeep=cute.recast_tensor(votes, Int32),
            sWork=storage.sWork.get_tensor(cute.make_layout((words, WORK_STAGES))),
            sMask=storage.sMask.get_tensor(
                cute.make_layout((2 * plan.q_tiles, MASK_TILES // 32, WORK_STAGES))
            ),
            sClaim=storage.sClaim.get_tensor(cute.make_layout(4)),
        )
        mma_warp, load_warp, values_warp, epilogue_warp = (
            plan.role(name).warps[0] for name in ("mma", "load", "load_values", "epilogue")
        )
        if warp == load_warp:
            for atom in (mem.tma_q, mem.tma_k, mem.tma_v, mem.tma_o):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                barriers.initialise()
            cute.arch.mbarrier_init_fence()
        if warp == mma_warp:
            cute.arch.alloc_tmem(plan.tmem.columns, storage.tmem, is_two_cta=plan.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=plan.pair)
        meet(plan.ctas)
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem)
        work = Work(plan, mem, scalars, shared)
        if warp < plan.role("softmax").warps[-1] + 1:
            cute.arch.setmaxregister_increase(plan.role("softmax").registers)
            softmax(plan, work, mem, shared, scalars, tmem, barriers.of("softmax"))
        elif warp < plan.role("correction").warps[-1] + 1:
            cute.arch.setmaxregister_decrease(plan.role("correction").registers)
            correction(
                plan,
                work,
                self.store,
                mem,
                shared,
                scalars,
                tmem,
                barriers.of("correction"),
            )
        else:
            cute.arch.setmaxregister_decrease(plan.role("mma").registers)
            if warp == mma_warp:
                multiply = mma_pair if plan.pair else mma
                multiply(plan, work, mmas, shared, tmem, barriers.of("mma"))
            elif warp == load_warp:
                load(plan, work, mmas, mem, shared, barriers.of("load"))
            elif warp == values_warp:
                load_values(plan, work, mmas, mem, shared, barriers.of("load_values"))
            elif warp == epilogue_warp:
                epilogue(
                    plan,
                    work,
                    Schedule(plan, mem, scalars),
                    self.store,
                    mem,
                    shared,
                    barriers.of("epilogue"),
                )
        meet(plan.ctas)
        if warp == mma_warp:
            cute.arch.dealloc_tmem(tmem, plan.tmem.columns, is_two_cta=plan.pair)
