"""Decode of ordinary heads on Blackwell (sm_100a, sm_103a): operands swapped, as in
`mla_decode_small`, whose roles these are; keys and values are tensors of their own.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cuda.bindings.driver import CUstream  # type: ignore[import-untyped]
from cutlass import Int32

from cute_fmha.kernels.blackwell.mla_arguments import Scalars, Tensors
from cute_fmha.kernels.blackwell.mla_decode_small import MlaDecodeSmall, boxed
from cute_fmha.kernels.blackwell.mla_decode_small_plan import BLOCK
from cute_fmha.kernels.blackwell.mla_decode_small_work import Global
from cute_fmha.kernels.blackwell.ragged import ragged
from cute_fmha.kernels.blackwell.worklist import most_workers


class Decode(MlaDecodeSmall):
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
        self.kernel(mem, scalars).launch(
            grid=(cutlass.min(workers, ctas), 1, 1), block=(plan.threads, 1, 1),
            min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip


def by_row(tensor: cute.Tensor) -> cute.Tensor:
    """(PAGE, PAGE_ROW, HEAD_KV, D) as (PAGE_ROW, D, HEAD_KV, PAGE)."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=[1, 3, 2, 0]))
