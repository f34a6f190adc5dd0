"""MLA decode on Blackwell (sm_100a, sm_103a) for many heads: one persistent tcgen05 kernel.

Mathematics: that of `prefill`, with K a latent row of D columns and V its first Dv; row r of a
sequence is (position, head) = (r / Hq, r % Hq), its softmax in base 2 (`softmax`).

Shapes: q [B, Sq, Hq, D], latent cache [PAGES, PAGE, 1, D], block table [B, MAX_PAGES], lengths [B],
out [B, Sq, Hq, Dv], lse [B, Hq, Sq]; (D, Dv) is (576, 512) or (512, 512). A CTA has 64 rows of one
sequence and fetches tiles of 64 latent rows. Beyond 64 rows a pair of CTAs shares them: each keeps
64 rows and fetches 64 of the 128 keys of a KV tile.

Each latent row is fetched once: its columns are K-major for Q Kᵀ, and the same bytes MN-major for
P V. In a pair half of them change places in between (`mla_decode_swap` says why).

M = 64 a CTA on all 128 lanes of TMEM: `tcgen05.mma.ws` of one CTA puts the upper half of N into
lanes 64–127, the MMA of a pair the half of N that comes from the second CTA. S folds the keys so,
O the value columns. A in TMEM is read by each half of the lanes for itself, so Q is there twice;
the columns that find no place stay in shared memory.

Warps

    0–3    softmax   Q → TMEM; S → P, half a row per thread; decides what is skipped; rescales O
    4–7    epilogue  O / l → chunks, LSE
    8      mma       S = Q Kᵀ, O += P V; owns TMEM; in a pair the first CTA's works for both
    9      load      latent tiles by TMA, through the block table
    10     store     chunks of O → global memory by TMA
    11     idle
    12–13  swap      in a pair: a stage of V to the other CTA (14, 15 idle)

TMEM, in 32-bit columns, at 576/512 (`MlaPlan.tmem`)

    0                                256   288                              512
    | O: 512 columns in two halves   | S   | Q: columns 0–447               |    one CTA
    | O: 512 columns in two halves   | S       | Q: columns 0–383           |    pair
    0                                256       320                          512

Shared memory: five halves of a latent tile (64 rows × 256 columns, 32 KiB each), two rope tiles
(one in a pair), 16 KiB of P, the rest of Q, a chunk of the output.

Work: pieces of work tiles (`worklist`); partial results of those that are cut are reduced in the
same launch (`splitkv`), by the softmax and epilogue warps.

Pipelines: `mla_decode_plan.topology`.

Timeline of KV tile n in steady state (time goes down; the swap in a pair only)

    load             mma               softmax                   swap
    half 0 (n + 2)   QK (n + 1)        max (n), exchange, vote   stage (n) out, in
                     P V (n)   <────── exp (n), P (n)    <──────
    half 1 (n + 2)   QK (n + 2)        max (n + 1) …

S (n + 1) is made while the softmax works on S (n), which it has taken to registers by then. The
decision on a tile comes before its P V; a skipped tile costs Q Kᵀ and the maxima only.

Constraints: `mla_decode_plan.can_implement`.
"""

from __future__ import annotations

import functools
from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, tcgen05

from cute_fmha.epilogues.store import Store
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_arguments import Scalars, Tensors
from cute_fmha.kernels.blackwell.decode_output import combine
from cute_fmha.kernels.blackwell.device import DTYPES
from cute_fmha.kernels.blackwell.mla_decode_epilogue import COMBINE, COMBINE_WARPS, epilogue, write
from cute_fmha.kernels.blackwell.mla_decode_load import load
from cute_fmha.kernels.blackwell.mla_decode_mma import mma
from cute_fmha.kernels.blackwell.mla_decode_operands import Global, Shared, Work
from cute_fmha.kernels.blackwell.mla_decode_plan import KEYS, ROWS, UNIT, MlaPlan, topology
from cute_fmha.kernels.blackwell.mla_decode_softmax import softmax
from cute_fmha.kernels.blackwell.mla_decode_swap import swap
from cute_fmha.kernels.blackwell.pipelines import Barriers, meet
from cute_fmha.kernels.blackwell.ragged import ragged
from cute_fmha.kernels.blackwell.worklist import FOUND, most_workers


def swizzled(bits: int, shape: Any, stride: Any) -> cute.ComposedLayout:
    """A layout of rows of 16, 32, 64 or 128 bytes (0 to 3 bits) in shared memory."""
    return cute.make_composed_layout(
        cute.make_swizzle(bits, 4, 3), 0, cute.make_layout(shape, stride=stride)
    )


class MlaDecode:
    """The kernel of one plan."""

    def __init__(self, plan: MlaPlan) -> None:
        self.plan = plan
        self.topology = topology(plan)
        self.dtype = DTYPES[plan.dtype]
        self.out_dtype = DTYPES[plan.out_dtype]
        self.store = Store(2 * ROWS, plan.leaving, self.out_dtype)

    @cute.jit
    def __call__(
        self, tensors: Tensors, scalars: Scalars, ctas: Int32, op: tuple[Any, ...] | None,
        stream: CUstream,
    ):  # fmt: skip
        """Launch with at most ``ctas`` CTAs. Positions and heads of mO follow each other evenly.
        ``op``: what the epilogue op reads, and its second output."""
        plan = self.plan
        mQ, mKV, mTable, mLens, mO = tensors[:5]
        tma_latent, tma_rope, gKV = self.maps(mKV)
        tma_o, gO = self.output(mO)
        mem = Global(
            mQ, tma_latent, tma_rope, gKV, mTable, mLens, tma_o, gO, *tensors[4:], op
        )  # fmt: skip
        clusters = most_workers(
            plan.cutting, mQ.shape[1] * mQ.shape[2], mQ.shape[0], mTable.shape[1] * mKV.shape[1],
            scalars.num_splits,
        )  # fmt: skip
        clusters = cutlass.min(clusters, cutlass.max(ctas // plan.ctas, 1))
        self.kernel(mem, scalars).launch(
            grid=(clusters * plan.ctas, 1, 1), block=(plan.threads, 1, 1),
            cluster=(plan.ctas, 1, 1), min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip

    def maps(self, mKV: cute.Tensor) -> tuple[cute.CopyAtom, cute.CopyAtom, cute.Tensor]:
        """How latent and rope columns are loaded, and the cache as the TMA sees it."""
        plan = self.plan
        load = cpasync.CopyBulkTensorTileG2SOp(
            tcgen05.CtaGroup.TWO if plan.pair else tcgen05.CtaGroup.ONE
        )
        pages, page_rows, _, width = mKV.shape
        stride, page_stride = mKV.stride[1], mKV.stride[0]
        boxes: Any
        if plan.gather:
            # (PAGE, D)
            rows = cute.make_layout((pages, width), stride=(page_stride, 1))
            mKV, boxes = cute.make_tensor(mKV.iterator, rows), ((1, UNIT),) * 2
        else:
            # (PAGE_ROW, UNIT_COLUMN, UNIT, PAGE, END)
            units = cute.make_layout(
                (page_rows, UNIT, plan.units, pages), stride=(stride, 1, UNIT, page_stride)
            )
            mKV = ragged(cute.make_tensor(mKV.iterator, units), 0)
            boxes = ((plan.box_rows, UNIT, plan.box_units), (plan.box_rows, UNIT, 1))
        atoms = []
        for box in boxes:
            strides = (UNIT, 1, KEYS * UNIT)[: len(box)]
            atom, gKV = cpasync.make_tiled_tma_atom(load, mKV, swizzled(3, box, strides), box)
            atoms.append(atom)
        return *atoms, gKV

    def output(self, mO: cute.Tensor) -> tuple[cute.CopyAtom, cute.Tensor]:
        """How chunks of the output are stored, and the output as the TMA sees it."""
        plan, leaving = self.plan, self.plan.leaving
        run = leaving.elements
        # Run j of half h of the lanes has elements from (2 j + h) · run on: (ROW, CHUNK_COLUMN,
        # HALF, (CHUNK, RUN), BATCH)
        runs = cute.make_layout(
            (mO.shape[1] * mO.shape[2], leaving.chunk, 2, (leaving.chunks, plan.runs), mO.shape[0]),
            stride=(mO.stride[2], 1, run, (leaving.chunk, 2 * run), mO.stride[0]),
        )
        box = (ROWS, leaving.chunk, 2)
        layout = swizzled(self.chunk_swizzle, box, (leaving.chunk, 1, ROWS * leaving.chunk))
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), cute.make_tensor(mO.iterator, runs), layout, box
        )

    @property
    def chunk_swizzle(self) -> int:
        """Bits of the swizzle of 128, 64, 32 or 16 bytes."""
        return (self.plan.leaving.chunk_bytes // 16).bit_length() - 1

    @cute.kernel
    def kernel(self, mem: Global, scalars: Scalars):
        """Allocate, initialise the barriers, dispatch the roles."""
        plan = self.plan
        storage = cutlass.utils.SmemAllocator().allocate(self.storage())
        shared = self.shared(storage)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        barriers = Barriers(self.topology, storage.barriers.data_ptr())
        mma_warp, load_warp, store_warp = (
            plan.role(name).warps[0] for name in ("mma", "load", "store")
        )
        if warp == load_warp:
            for atom in (mem.tma_latent, mem.tma_rope, mem.tma_o):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                barriers.initialise()
            cute.arch.mbarrier_init_fence()
        if warp == mma_warp:
            cute.arch.alloc_tmem(plan.tmem.columns, storage.tmem, is_two_cta=plan.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=plan.pair)
        if warp == store_warp:
            Work(plan, mem, scalars).begin(shared.sFound)
        meet(plan.ctas)
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem)

        work = functools.partial(Work, plan, mem, scalars, shared.sFound)
        if warp < COMBINE_WARPS:
            if warp < plan.role("softmax").warps[-1] + 1:
                self.take_registers("softmax")
                softmax(plan, work(), mem, shared, scalars, tmem, barriers.of("softmax"))
            else:
                self.take_registers("epilogue")
                epilogue(
                    plan, work(), self.store, mem, shared, scalars, tmem, barriers.of("epilogue")
                )
            # In here: behind the other roles the compiler would have it do with their registers.
            if cutlass.const_expr(plan.cut is not Cut.WHOLE):
                combine(work(), self.store, warp, COMBINE_WARPS, COMBINE)
        elif warp < plan.role("idle").warps[-1] + 1:
            self.take_registers("mma")
            if warp == mma_warp:
                mma(plan, work(), shared, tmem, barriers.of("mma"))
            elif warp == load_warp:
                load(plan, work(), mem, shared, barriers.of("load"))
            elif warp == store_warp:
                write(plan, work(), self.store, mem, shared, barriers.of("store"))
        elif cutlass.const_expr(plan.pair):
            self.take_registers("swap")
            if warp < plan.role("swap").warps[-1] + 1:
                swap(plan, work(), shared, barriers.of("swap"))
        meet(plan.ctas)
        if warp == mma_warp:
            # Read again: all roles would have to keep the address until here.
            tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem)
            cute.arch.dealloc_tmem(tmem, plan.tmem.columns, is_two_cta=plan.pair)

    def take_registers(self, role: str) -> None:
        """Have as many as ``role`` is to have, from those that all threads start with."""
        registers = self.plan.role(role).registers
        if registers > self.plan.first_registers:
            cute.arch.setmaxregister_increase(registers)
        else:
            cute.arch.setmaxregister_decrease(registers)

    # ------------------------------------------------------------------ shared memory

    def storage(self) -> Any:
        """The struct of shared memory."""
        plan = self.plan

        def aligned(dtype: Any, count: int) -> Any:
            return cute.struct.Align[cute.struct.MemRange[dtype, count], 1024]

        fields = {
            "sLatent": aligned(self.dtype, plan.stages * plan.half_units * KEYS * UNIT),
            "sRope": aligned(self.dtype, plan.rope_stages * KEYS * UNIT * plan.rope),
            "sP": aligned(self.dtype, plan.p_stages * plan.p_units * ROWS * UNIT),
            "sQ": aligned(self.dtype, plan.q_shared_units * ROWS * UNIT),
            "sO": aligned(self.out_dtype, plan.o_stages * 2 * ROWS * plan.leaving.chunk),
            "sTokens": cute.struct.Align[cute.struct.MemRange[Int32, KEYS * plan.gather], 16],
            "sMax": cute.struct.MemRange[Float32, 4 * ROWS],
            "sTotal": cute.struct.MemRange[Float32, 2 * ROWS],
            "sRowMax": cute.struct.MemRange[Float32, ROWS],
            "sLargest": cute.struct.MemRange[Float32, ROWS * plan.features.max_logits],
            "sKeep": cute.struct.MemRange[Int32, 2 * plan.ctas],
            "sKept": cute.struct.MemRange[Int32, 1],
            "sFound": cute.struct.Align[cute.struct.MemRange[Int32, FOUND], 16],
            "barriers": cute.struct.MemRange[Int64, self.topology.size],
            "tmem": Int32,
        }
        return cute.struct(type("Storage", (), {"__annotations__": fields}))

    def shared(self, storage: Any) -> Shared:
        """The buffers as tensors."""
        plan = self.plan
        wide = cute.make_swizzle(3, 4, 3)
        unit, chunk = KEYS * UNIT, plan.leaving.chunk

        def units(buffer: Any, *counts: int) -> Any:
            """(ROW, UNIT_COLUMN, …)"""
            strides = [unit]
            for count in counts[:-1]:
                strides.append(strides[-1] * count)
            layout = cute.make_layout((KEYS, UNIT, *counts), stride=(UNIT, 1, *strides))
            return buffer.get_tensor(layout, swizzle=wide)

        # ((ROW, CHUNK_COLUMN), HALF, STAGE)
        chunks = cute.make_layout(
            ((ROWS, chunk), 2, plan.o_stages), stride=((chunk, 1), ROWS * chunk, 2 * ROWS * chunk)
        )
        return Shared(
            sLatent=units(storage.sLatent, plan.half_units, plan.stages),
            sRope=units(storage.sRope, 1, plan.rope_stages) if plan.rope else None,
            sP=units(storage.sP, plan.p_units, plan.p_stages),
            sQ=units(storage.sQ, plan.q_shared_units),
            sTokens=storage.sTokens.get_tensor(cute.make_layout(KEYS)) if plan.gather else None,
            sO=storage.sO.get_tensor(chunks, swizzle=cute.make_swizzle(self.chunk_swizzle, 4, 3)),
            sMax=storage.sMax.get_tensor(cute.make_layout((2 * ROWS, 2))),
            sTotal=storage.sTotal.get_tensor(cute.make_layout(2 * ROWS)),
            sRowMax=storage.sRowMax.get_tensor(cute.make_layout(ROWS)),
            sLargest=(
                storage.sLargest.get_tensor(cute.make_layout(ROWS))
                if plan.features.max_logits
                else None
            ),
            sKeep=storage.sKeep.get_tensor(cute.make_layout((2, plan.ctas), stride=(plan.ctas, 1))),
            sKept=storage.sKept.get_tensor(cute.make_layout(1)),
            sFound=storage.sFound.get_tensor(cute.make_layout(FOUND)),
        )
