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
soon as the maxima of S(n) are known, while its PV(n−1) runs: one redux per warp, its flag to shared
memory, one barrier, and whoever needs the decision reads the four flags with one load. V(n) is
fetched on the first vote to keep, and not at all when every vote is to skip. PV(n) is issued one
iteration after the vote. With Q in shared memory and flags per row this cost 5 to 7 % at d128 with
nothing skipped; gl.max as the reduction (two more barriers, five shuffles) cost 12 %.

Registers: Triton compiles the partitions as branches of one dispatch loop. What is hoisted out of
one partition hence occupies registers of all, those of the producer too, and is spilled. That is
why work-tile messages are read twice and why there are zeros that the compiler cannot know.

Memory past a sequence's end may hold NaN: scores there are masked, V rows are zeroed in shared
memory (0 · NaN is NaN) in the one tile that can contain them, and output rows are predicated.

Constraints: `can_implement`; rows of q, k and v start on 16 bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cute_fmha import tiling
from cute_fmha.epilogues.cast import IDENTITY
from cute_fmha.kernels.triton.hopper_prefill_consumer import consume
from cute_fmha.kernels.triton.hopper_prefill_producer import load
from cute_fmha.kernels.triton.primitives import LOG2_E
from cute_fmha.problem import Problem, Target, target_of
from cute_fmha.workspace import workspace_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call

SECTION_BYTES = 16 << 20
"""K and V of the heads in flight together. 32 MiB was slower in most single timings, not in all."""

TICKET_BYTES = 8
"""int32 counters at the head of a workspace: tickets, and CTAs that have stopped."""


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
    """Shared memory: Q per warpgroup, rings of K (two parts of D), V, work tiles, votes by warp."""

    sQ0: Any
    sQ1: Any
    sK0: Any
    sK1: Any
    sV: Any
    sWork: Any
    sKeep: Any


# ------------------------------------------------------------------------------ kernel
@gluon.jit(do_not_specialize=["sizes", "window", "scores", "skip", "total"])
def prefill_kernel(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, outputs, sizes, sequences, window, scores, skip,
    stats, counters, total, PLAN: gl.constexpr,
):  # fmt: skip
    """Descriptors stay outside tuples: Triton 3.6 launches no others. Tuples: outputs (out,
    strides, lse, strides), sizes (Sq, Sk, heads q, group, batch · heads, heads per section, work
    tiles per head), sequences (cu_q, cu_k, seqused), window (left, right), scores (scale · log2 e,
    2 · log2 e · scale / softcap, softcap · log2 e, sink), skip (tensor, value)."""
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
    sKeep = gl.allocate_shared_memory(gl.int32, [V_STAGES * CONSUMERS, 4], plain)
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
    if problem.dtype not in _DTYPES:
        return f"it takes float16 or bfloat16, not {problem.dtype}"
    if problem.block_mask is not None:
        return "it has no block mask"
    if problem.epilogue != IDENTITY.key:
        return f"it has no epilogue {problem.epilogue!r}"
    return None


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, target: Target) -> Plan:
    """The plan of ``problem``; `run` adds what only the tensors tell."""
    d0, d1, dv = _DIMS[problem.head_dim, problem.head_dim_v]
    # O is small at 64: a third warpgroup fits, but not beside what skipping or softcap need.
    three = dv == 64 and not (problem.skip or problem.softcap)
    # What compiles without spills: wide heads need it in the consumers, the rest in the producer.
    wide = problem.head_dim >= 192
    # With skip-softmax, Q has no room in registers beside what these need.
    extras = problem.softcap or problem.window_left >= 0
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
        q_in_registers=problem.head_dim == 128 and not (problem.skip and extras),
        overlap_pv=dv == 256,
        window_left=problem.window_left >= 0,
        window_right=problem.window_right >= 0,
        softcap=problem.softcap,
        skip=problem.skip,
    )


@functools.lru_cache(maxsize=4096)
def _variant(base: Plan, skip_relative: bool, poison: bool) -> Plan:
    return dataclasses.replace(base, skip_relative=skip_relative, poison=poison)


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
    scale = call.scale * LOG2_E.value
    inner = 2.0 * scale / call.softcap if config.softcap else 0.0
    scores = (scale, inner, call.softcap * LOG2_E.value, call.sink)
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
        scores,
        (call.skip_tensor, call.skip_value),
        call.stats,
        workspace_of(call.workspace, q.device, TICKET_BYTES).view(torch.int32),
        heads * tiles_m,
        config,
        num_warps=4,
        maxnreg=config.registers[2],
    )
