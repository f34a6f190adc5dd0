"""Decode of ordinary heads on Blackwell (sm_100a, sm_103a): `decode_transposed` with keys and
values that are tensors of their own, of equal width D and with KV heads.

Rows are (query position, head of the group). Per tile of 128 keys:

    Sᵀ [128, N] = K Qᵀ                  A = K, K-major, M = 128
    Oᵀ [D, N]   = fade · Oᵀ + Vᵀ Pᵀ     A = V, MN-major, D / 128 times M = 128, or once M = 64

Shapes: q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D] or, with a table [B, MAX_PAGES], [PAGES, PAGE,
Hkv, D]; lengths [B], or none where every key is in use; out [B, Sq, Hq, D], lse [B, Hq, Sq]; D is
64, 128, 256 or 512.

Warps as in `decode_transposed`: load brings keys, load_values values, with skip-softmax those of
kept tiles only; query is one warp. A softmax thread has four keys of N / 4 rows.

Shared memory at D = 128, N = 16 (`TransposedPlan.shared_parts`)
    Q 4 KiB | K: 3 parts of 128 columns × 128 keys, 32 KiB each | V: 3 | P: 2 of 4 KiB | O: 8 KiB
A part is released when its product is done: K after S, V after P V; no tile has to fit whole.

TMEM at D = 128, N = 16: O0 0–15, S0 16–31, S1 32–47. With skip-softmax there are four S and four P.

Pipelines: `decode_transposed.topology`.

Timeline with skip-softmax, four tiles deep, in steady state

    load          mma            softmax             load_values
    K (n + 4)     S (n + 3)      keep (n + 2)? P     V (n + 2), if kept
                  P V (n)

so that a tile's values have the time of three tiles to arrive although nobody asks for them before
the decision; without skip-softmax they come along with the keys, and the depth is two.

Constraints: `decode_plan.can_implement`. When it is chosen: `cycles` there and in `prefill_host`.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Int32

from cute_fmha.kernels.blackwell.decode_arguments import Scalars, Tensors
from cute_fmha.kernels.blackwell.decode_transposed import TransposedDecode, boxed
from cute_fmha.kernels.blackwell.decode_transposed_plan import BLOCK
from cute_fmha.kernels.blackwell.decode_transposed_work import Global
from cute_fmha.kernels.blackwell.ragged import ragged
from cute_fmha.kernels.blackwell.worklist import most_workers


class Decode(TransposedDecode):
    """The kernel of one plan."""

    @cute.jit
    def __call__(
        self, tensors: Tensors, mV: cute.Tensor, scalars: Scalars, ctas: Int32,
        op: tuple[Any, ...] | None, stream: CUstream,
    ):  # fmt: skip
        """Launch with at most ``ctas`` CTAs. ``op``: what the epilogue op reads, and its second
        output."""
        plan = self.plan
        mQ, mK, mTable = tensors[:3]
        shape = (plan.box, BLOCK)
        tma_k, keys = boxed(ragged(by_row(mK), 0), shape)
        tma_v, values = boxed(ragged(by_row(mV), 0), shape)
        mem = Global(tma_k, keys, mQ, *tensors[2:], op, tma_v, values)
        longest = mK.shape[1]
        if cutlass.const_expr(plan.paged):
            longest = longest * mTable.shape[1]
        kv_heads = mK.shape[2]
        workers = most_workers(
            plan.cutting, mQ.shape[1] * (mQ.shape[2] // kv_heads), mQ.shape[0] * kv_heads, longest,
            scalars.num_splits,
        )  # fmt: skip
        self.start(mem, scalars, cutlass.min(workers, ctas), stream)


def by_row(tensor: cute.Tensor) -> cute.Tensor:
    """(PAGE, PAGE_ROW, HEAD_KV, D) as (PAGE_ROW, D, HEAD_KV, PAGE)."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[1, 3, 2, 0]))
