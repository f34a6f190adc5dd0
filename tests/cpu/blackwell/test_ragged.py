"""Ragged tensor maps: loads that end in zeros, stores that leave the next sequence alone."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import cutlass
import cutlass.cute as cute
import prefill_harness as harness
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, tcgen05

from cute_fmha.emulator.capture import compile_kernel, device_tensor, emulate
from cute_fmha.kernels.blackwell.ragged import cut, ragged

ROWS, WIDTH = 64, 64


def tensor(x):
    return device_tensor(x, 16).mark_layout_dynamic(leading_dim=x.dim() - 1)


class CopySequence:
    """Copies rows start … start + length − 1 of x to y through shared memory, 64 at a time: x and y
    ``[total, heads, 64]``. ``group`` heads of a position may share a tile. sums ``[tiles, heads or
    1, 32]`` get those of each tile's first 32 columns, rows past the end included."""

    def __init__(self, group: int) -> None:
        self.group = group

    @cute.jit
    def __call__(
        self, mX: cute.Tensor, mY: cute.Tensor, mSums: cute.Tensor, start: Int32, length: Int32
    ):
        # (SEQ, D, HEAD), or ((HEAD, SEQ), D) where all heads share a tile
        modes = [0, 2, 1] if self.group == 1 else [1, 0, 2]
        mX, mY = (cute.make_tensor(m.iterator, cute.select(m.layout, mode=modes)) for m in (mX, mY))
        if cutlass.const_expr(self.group > 1):
            mX, mY = (self.packed(m) for m in (mX, mY))
        layout = cute.make_layout((ROWS, WIDTH), stride=(WIDTH, 1))
        tile = (ROWS, WIDTH)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        tma_x, gX = cpasync.make_tiled_tma_atom(load, ragged(mX, 0), layout, tile)
        save = cpasync.CopyBulkTensorTileS2GOp()
        tma_y, gY = cpasync.make_tiled_tma_atom(save, ragged(mY, 0), layout, tile)
        heads = 1 if self.group > 1 else mX.shape[2]
        grid = (cute.ceil_div(length * self.group, ROWS), heads, 1)
        self.kernel(tma_x, gX, tma_y, gY, mSums, start, length).launch(grid=grid, block=(32, 1, 1))

    def packed(self, m: cute.Tensor) -> cute.Tensor:
        layout = cute.make_layout(
            ((self.group, m.shape[1]), m.shape[2]),
            stride=((m.stride[0], m.stride[1]), m.stride[2]),
        )
        return cute.make_tensor(m.iterator, layout)

    @cute.kernel
    def kernel(self, tma_x, gX, tma_y, gY, mSums, start: Int32, length: Int32):
        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout((ROWS, WIDTH), stride=(WIDTH, 1))
        buffer = smem.allocate_tensor(cutlass.BFloat16, layout, byte_alignment=128)
        barrier = smem.allocate_array(Int64, 1)
        block, head, _ = cute.arch.block_idx()
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        gX, gY = cut(gX, 0, start, length), cut(gY, 0, start, length)
        if cutlass.const_expr(self.group == 1):
            gX, gY = gX[None, None, head], gY[None, None, head]
        one, parts = cute.make_layout(1), []
        for tma, tensor in ((tma_x, gX), (tma_y, gY)):
            # (ROW, D, ROW_TILE)
            tiles = cute.local_tile(tensor, (ROWS, WIDTH), (None, 0))
            sides = (cute.group_modes(buffer, 0, 2), cute.group_modes(tiles, 0, 2))
            parts.append(cpasync.tma_partition(tma, 0, one, *sides))
        (sX, tXgX), (sY, tYgY) = parts
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, ROWS * WIDTH * 2)
        cute.copy(tma_x, tXgX[None, block], sX, tma_bar_ptr=barrier)
        cute.arch.mbarrier_wait(barrier, 0)
        total = Float32(0.0)
        for row in cutlass.range(ROWS):
            total += Float32(buffer[row, cute.arch.lane_idx()])
        mSums[block, head, cute.arch.lane_idx()] = total
        cute.copy(tma_y, sY, tYgY[None, block])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0)


@pytest.mark.parametrize(("heads", "group"), [(2, 1), (4, 4)])
def test_rows_past_the_end(heads, group):
    """Read as 0, though they are NaN; stored nowhere. Also at either end of the tensor."""
    total = 150
    x = torch.full((total, heads, WIDTH), math.nan, dtype=torch.bfloat16)
    sums = torch.zeros(-(-total * group // ROWS), heads // group, 32)
    compiled = compile_kernel(
        CopySequence(group), *map(tensor, (x, x.clone(), sums)), Int32(0), Int32(1)
    )
    for start, length in ((0, 1), (0, 70), (40, 64), (87, 63), (0, 150), (149, 1)):
        rows = slice(start, start + length)
        x.fill_(math.nan)
        x[rows] = torch.randint(-8, 8, (length, heads, WIDTH))
        expected = torch.full_like(x, 7.0)
        expected[rows] = x[rows]
        # [tiles, rows of a tile, heads or 1, 32]
        tiles = x[rows, :, :32].float().reshape(length * group, heads // group, 32).split(ROWS)
        for policy in harness.POLICIES[:3]:
            y = torch.full_like(x, 7.0)
            sums.fill_(math.nan)
            arguments = map(tensor, (x, y, sums))
            emulate(compiled, *arguments, Int32(start), Int32(length), policy=policy)
            assert torch.equal(y, expected)
            assert torch.equal(sums[: len(tiles)], torch.stack([tile.sum(0) for tile in tiles]))
