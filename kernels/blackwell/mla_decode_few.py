"""MLA decode for few rows on Blackwell (sm_100a, sm_103a): `decode_transposed` with latents.

Rows are those of a sequence, at most 32. Per tile of 64 tokens with latents L [64, 576], which are
the keys, and of which the first 512 columns are the values:

    Sᵀ [64, N]  = L Qᵀ                          A = L, K-major, M = 64
    Oᵀ [512, N] = fade · Oᵀ + L[:, :512]ᵀ Pᵀ    A = the same bytes, MN-major, four times M = 128

Shapes: q [B, Sq, Hq, D], latents [PAGES, PAGE, 1, D], table [B, MAX_PAGES], lengths [B], out
[B, Sq, Hq, Dv], lse [B, Hq, Sq]; (D, Dv) is (576, 512) or (512, 512). Unpaged: a page a sequence.

Shared memory at N = 16 (swizzled rows of 128 bytes; `TransposedPlan.shared_parts`)
    Q 18 KiB | V: 11 parts of 128 columns × 64 tokens, 16 KiB each | rope: 2 parts of 8 KiB
    | P: 2 of 2 KiB | O: 8 KiB, a part on its way out
A tile is four parts and a rope part. They are fetched, multiplied and released one by one: 2¾ tiles
of latents are in flight or in use. Every part is fetched once and read twice.

TMEM, in 32-bit columns, N = 16 (`TransposedPlan.tmem`): a lane of O is a value column, S has 16
tokens in the lower 16 lanes of each warp.

    0     16    32    48    64    80    96
    | O0  | O1  | O2  | O3  | S0  | S1  |

Pipelines: `decode_transposed.topology`.

Timeline of tile n in steady state, when latents are what the CTA waits for

    load                 mma                       softmax
    parts of n + 2       QK (n), part by part
                         … rope(n): S complete
    rope of n + 2        (n + 1 is not there)      e = c·S − c·m, vote, P(n)
                         PV (n) <───────────────── P(n)
    parts of n + 3 <──── release, part by part
                         QK (n + 1), part by part

If the parts of n + 1 are there first, QK (n + 1) is issued before PV (n) and hides the softmax.

Constraints: `mla_decode_few_plan.can_implement`.
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


class MlaDecodeFew(TransposedDecode):
    """The kernel of one plan."""

    @cute.jit
    def __call__(
        self, tensors: Tensors, scalars: Scalars, ctas: Int32, op: tuple[Any, ...] | None,
        stream: CUstream,
    ):  # fmt: skip
        """Launch with at most ``ctas`` CTAs. ``op``: what the epilogue op reads, and its second
        output."""
        plan = self.plan
        mQ, mKV, mTable = tensors[:3]
        # (PAGE_ROW, D, PAGE)
        mL = cute.make_tensor(mKV.iterator, cute.select(mKV.layout, mode=[1, 3, 0]))
        if cutlass.const_expr(plan.gather):
            # (PAGE, D), and boxes of one row
            mL = cute.make_tensor(mL.iterator, cute.select(mL.layout, mode=[2, 1]))
            shape = (1, BLOCK)
        else:
            mL = ragged(mL, 0)
            shape = (plan.box, BLOCK)
        tma, mL = boxed(mL, shape)
        mem = Global(tma, mL, mQ, *tensors[2:], op)
        workers = most_workers(
            plan.cutting, mQ.shape[1] * mQ.shape[2], mQ.shape[0], mTable.shape[1] * mKV.shape[1],
            scalars.num_splits,
        )  # fmt: skip
        self.start(mem, scalars, cutlass.min(workers, ctas), stream)
