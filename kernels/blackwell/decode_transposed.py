"""Decode on Blackwell (sm_100a, sm_103a) with swapped operands: S, P and O stand transposed.

Rows are (query position, head), position-major. A work tile is at most 16 or 32 of them
(`TransposedPlan.rows` = N), of one KV head of one sequence: as rows of A they would be padded to 64
or 128. Here they are B, and what A has many of are tokens and value columns. Per tile of T tokens
with keys K [T, D] and values V [T, Dv]:

    Sᵀ [T, N]  = K Qᵀ                    A = K, K-major, M = T
    Pᵀ [T, N]  = 2^(c·Sᵀ − c·m)
    Oᵀ [Dv, N] = fade · Oᵀ + Vᵀ Pᵀ       A = V, MN-major, M = 128 value columns at a time, or 64

out = O / l, lse = ln 2 · (c·m + log2 l), c = scale · log2 e, l = ΣP. A sink joins m and l at the
end; a softcap replaces S by tanh(scale / cap · S) and c by cap · log2 e. With skip-softmax a tile
whose every row has c · (max S − running maximum) < log2 λ is left out before P and its product.

Two kernels are made of this, which tell their shapes, memory and timelines: `mla_decode_few`, where
K and V are the same latents and T = 64, and `decode`, where they are tensors of their own and
T = 128. A tile is fetched, multiplied and released in parts of 128 columns, or of 64 if D is 64.

Warps
    0–3   softmax       S → P, O · fade; at the end O / l and LSE to global memory
    4     mma           S = K Qᵀ, O += V P; owns TMEM
    5     load          block table, latents or keys by TMA
    6, 7  query         Q → shared memory; rows that do not exist become 0
       7  load_values   values by TMA where they are a tensor of their own; `query` is 6 alone then

Pipelines: `topology`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, tcgen05

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_arguments import Scalars
from cute_fmha.kernels.blackwell.decode_output import combine
from cute_fmha.kernels.blackwell.decode_transposed_load import load, query
from cute_fmha.kernels.blackwell.decode_transposed_mma import mma
from cute_fmha.kernels.blackwell.decode_transposed_plan import BLOCK, TransposedPlan
from cute_fmha.kernels.blackwell.decode_transposed_softmax import softmax
from cute_fmha.kernels.blackwell.decode_transposed_work import COMBINE, Global, Shared, Work
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.pipelines import Barriers
from cute_fmha.kernels.blackwell.topology import Barrier, Topology
from cute_fmha.kernels.blackwell.worklist import FOUND


def topology(plan: TransposedPlan) -> Topology:
    """The barriers of `decode_transposed`.

        load  ── v_full, r_full ──> mma ── s_full ──> softmax
              <─ v_empty, r_empty ─     <─ p_full ───
        query ── q_full ──────────>     ── o_full ──>
              <─ q_empty ──────────

    s_full, p_full and o_full exist once per buffer. That the two S and the two P are free again
    needs no barrier: S(n + 2) is issued after P(n) was handed over, and complete after P V (n) is.

    Keys and values that are tensors of their own come by two warps, values where a tile is kept:

        load ─────── k_full ─────> mma         softmax ── decided ───────> load_values
             <────── k_empty ─────                     <─ decision_read ──
        load_values ─ v_full ────>
             <────── v_empty ─────
    """
    values, more = "load", []
    if plan.rope_blocks:
        more += [
            Barrier("r_full", plan.r_stages, (("load", "bytes"),)),
            Barrier("r_empty", plan.r_stages, (("mma", "commit"),)),
        ]
    if not plan.latent:
        values = "load_values"
        more += [
            Barrier("k_full", plan.k_stages, (("load", "bytes"),)),
            Barrier("k_empty", plan.k_stages, (("mma", "commit"),)),
        ]
        if plan.features.skip:
            more += [
                Barrier("decided", plan.depth, (("softmax", "leader"),)),
                Barrier("decision_read", plan.depth, (("load_values", "warp"),)),
            ]
    return Topology(
        plan.roles,
        (
            Barrier("q_full", 1, (("query", "warp"),)),
            Barrier("q_empty", 1, (("mma", "commit"),)),
            Barrier("v_full", plan.v_stages, ((values, "bytes"),)),
            Barrier("v_empty", plan.v_stages, (("mma", "commit"),)),
            *more,
            Barrier("s_full", plan.depth, (("mma", "commit"),)),
            Barrier("p_full", plan.depth, (("softmax", "warp"),)),
            Barrier("o_full", plan.depth, (("mma", "commit"),)),
        ),
    )


def boxed(tensor: cute.Tensor, shape: tuple[int, int]) -> tuple[cute.CopyAtom, cute.Tensor]:
    """(copy atom, tensor as the TMA sees it) for boxes of (tokens, 64 columns)."""
    # (BOX, 64): rows of 128 bytes
    box = cute.make_composed_layout(
        cute.make_swizzle(3, 4, 3), 0, cute.make_layout(shape, stride=(BLOCK, 1))
    )
    load_op = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
    atom, seen = cpasync.make_tiled_tma_atom(load_op, tensor, box, shape)
    return atom, seen


class TransposedDecode:
    """The kernel of one plan; who calls it says where keys and values lie."""

    def __init__(self, plan: TransposedPlan) -> None:
        self.plan = plan
        self.topology = topology(plan)
        self.dtype = DTYPES[plan.dtype]
        self.store = Store(plan.rows, plan.leaving, DTYPES[plan.out_dtype])

    def start(self, mem: Global, scalars: Scalars, ctas: Int32, stream: CUstream) -> None:
        """Launch ``ctas`` CTAs."""
        self.kernel(mem, scalars).launch(
            grid=(ctas, 1, 1), block=(self.plan.threads, 1, 1), min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(self, mem: Global, scalars: Scalars):
        """Allocate, initialise the barriers, dispatch the roles."""
        plan = self.plan
        q, v, k, r, p = (
            plan.shared_parts[name] // plan.dtype.itemsize for name in ("Q", "V", "K", "rope", "P")
        )

        @cute.struct
        class Storage:
            sQ: cute.struct.Align[cute.struct.MemRange[self.dtype, q], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[self.dtype, v], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[self.dtype, k], 1024]
            sR: cute.struct.Align[cute.struct.MemRange[self.dtype, r], 1024]
            sP: cute.struct.Align[cute.struct.MemRange[self.dtype, p], 1024]
            sO: cute.struct.Align[cute.struct.MemRange[Float32, plan.rows * plan.columns], 128]
            sMax: cute.struct.MemRange[Float32, 4 * plan.rows]
            sFade: cute.struct.MemRange[Float32, 4 * plan.rows]
            sMinus: cute.struct.MemRange[Float32, plan.rows]
            sLargest: cute.struct.MemRange[Float32, 4 * plan.rows * plan.features.max_logits]
            sVote: cute.struct.Align[cute.struct.MemRange[Int32, 4 * plan.depth], 16]
            sKeep: cute.struct.MemRange[Int32, plan.depth]
            sFound: cute.struct.Align[cute.struct.MemRange[Int32, FOUND], 16]
            sBoxes: cute.struct.Align[cute.struct.MemRange[Int32, 2 * plan.tile_n], 16]
            barriers: cute.struct.MemRange[Int64, self.topology.size]
            tmem: Int32

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = cutlass.utils.SmemAllocator().allocate(Storage)
        barriers = Barriers(self.topology, storage.barriers.data_ptr())
        shared = self.shared(storage)
        mma_warp, load_warp = (plan.role(name).warps[0] for name in ("mma", "load"))
        if warp == load_warp:
            cpasync.prefetch_descriptor(mem.tma)
            if cutlass.const_expr(not plan.latent):
                cpasync.prefetch_descriptor(mem.tma_v)
            with cute.arch.elect_one():
                barriers.initialise()
            cute.arch.mbarrier_init_fence()
        if warp == mma_warp:
            cute.arch.alloc_tmem(plan.tmem.columns, storage.tmem)
            cute.arch.relinquish_tmem_alloc_permit()
        if warp == plan.role("query").warps[0]:
            Work(plan, mem, scalars).begin(shared.sFound)
        cute.arch.sync_threads()
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem)

        work = Work(plan, mem, scalars, shared.sFound)
        if warp < mma_warp:
            softmax(
                plan, self.dtype, self.store, work, mem, shared, scalars, tmem,
                barriers.of("softmax"),
            )  # fmt: skip
        elif warp == mma_warp:
            mma(plan, self.dtype, work, shared, tmem, barriers.of("mma"))
        elif warp == load_warp:
            load(plan, work, mem, shared, barriers.of("load"))
        elif warp <= plan.role("query").warps[-1]:
            query(plan, work, mem, shared, barriers.of("query"))
        elif cutlass.const_expr(not plan.latent):
            load(plan, work, mem, shared, barriers.of("load_values"))
        if cutlass.const_expr(plan.cut is not Cut.WHOLE):
            combine(work, self.store, warp, plan.threads // 32, COMBINE)
        cute.arch.sync_threads()
        if warp == mma_warp:
            cute.arch.dealloc_tmem(tmem, plan.tmem.columns)

    def shared(self, storage) -> Shared:
        """The buffers of ``storage``."""
        plan = self.plan
        block = plan.tile_n * BLOCK

        def ring(buffer, blocks: int, stages: int) -> cute.Tensor:
            # (BOX, 64, BOX_OF_TILE, BLOCK, STAGE)
            layout = cute.make_layout(
                (plan.box, BLOCK, plan.boxes, blocks, stages),
                stride=(BLOCK, 1, plan.box * BLOCK, block, blocks * block),
            )
            return buffer.get_tensor(layout, swizzle=cute.make_swizzle(3, 4, 3))

        by_warp = cute.make_layout((plan.rows, 4))
        return Shared(
            sQ=storage.sQ.data_ptr().toint(),
            sV=ring(storage.sV, plan.part_blocks, plan.v_stages),
            sR=ring(storage.sR, 1, plan.r_stages) if plan.rope_blocks else None,
            sP=storage.sP.data_ptr().toint(),
            sO=storage.sO.get_tensor(cute.make_layout((plan.columns, plan.rows))),
            sMax=storage.sMax.get_tensor(by_warp),
            sFade=storage.sFade.get_tensor(by_warp),
            sMinus=storage.sMinus.get_tensor(cute.make_layout(plan.rows)),
            sLargest=(storage.sLargest.get_tensor(by_warp) if plan.features.max_logits else None),
            sVote=storage.sVote.data_ptr().toint(),
            sKeep=storage.sKeep.get_tensor(cute.make_layout(plan.depth)),
            sFound=storage.sFound.get_tensor(cute.make_layout(FOUND)),
            sBoxes=storage.sBoxes.get_tensor(cute.make_layout((plan.tile_n, 2))),
            sK=None if plan.latent else ring(storage.sK, plan.part_blocks, plan.k_stages),
        )
