"""tcgen05.mma over all K steps of a tile, from descriptors that are made in place.

CuTe's `gemm` computes the descriptor of every step as a value of its own. All of them follow from
the kernel's parameters alone, so that the compiler moves them to the entry of the kernel and spills
them. Here a tile is one descriptor, and its steps are constants inside the instruction sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import tcgen05

from cute_fmha.kernels.blackwell import ptx_mma


def instruction_descriptor(
    dtype: Any, m: int, n: int, b_is_mn_major: bool, a_is_mn_major: bool = False
) -> int:
    """The 32-bit descriptor of a dense f16/bf16 MMA with an FP32 accumulator."""
    kind = {cutlass.Float16: 0, cutlass.BFloat16: 1}[dtype]
    majors = a_is_mn_major << 15 | b_is_mn_major << 16
    return 1 << 4 | kind << 7 | kind << 10 | majors | n >> 3 << 17 | m >> 4 << 24


@dataclass(frozen=True)
class Operand:
    """A ring of tiles in shared memory: the words of the descriptor of the first, ``stage`` from
    one tile to the next and ``steps`` of the K steps inside a tile, in units of 16 bytes.

    Only the low word of a descriptor, which has the address, ever changes.
    """

    low: Int32
    high: Int32
    stage: int
    steps: tuple[int, ...]

    @staticmethod
    def of(fragment: cute.Tensor) -> Operand:
        """From an MMA fragment (MMA, MMA_MN, MMA_K, STAGE)."""
        layout = fragment.layout
        first = tcgen05.smem_descriptor_to_int(fragment.iterator)
        return Operand(
            Int32(first & 0xFFFFFFFF),
            Int32(first >> 32),
            cute.crd2idx((0, 0, 0, 1), layout) if cute.size(layout, mode=[3]) > 1 else 0,
            tuple(cute.crd2idx((0, 0, k, 0), layout) for k in range(cute.size(layout, mode=[2]))),
        )

    @staticmethod
    def swizzled(
        start: Int32, leading: int, stride: int, steps: tuple[int, ...], stage: int = 0,
        width: int = 128,
    ) -> Operand:  # fmt: skip
        """Rows of ``width`` bytes with the swizzle of that width from shared address ``start`` on;
        all distances in bytes.

        K-major: ``stride`` from one group of 8 rows to the next, ``leading`` is of no meaning.
        MN-major: rows are K, ``stride`` between groups of 8 along K, ``leading`` between one row's
        worth of values along MN and the next.
        """
        layout = {128: 2, 64: 4, 32: 6}[width]
        # The upper word is signed: the layout has its top three bits.
        high = (stride >> 4 | 1 << 14 | layout << 29) - (layout >> 2 << 32)
        return Operand(
            (start >> 4) | (leading >> 4 << 16),
            Int32(high),
            stage >> 4,
            tuple(step >> 4 for step in steps),
        )

    def units(self, count: int, distance: int = 64 * 128) -> Operand:
        """``count`` tiles of the same steps, ``distance`` bytes from one to the next, as one."""
        steps = (step + i * (distance >> 4) for i in range(count) for step in self.steps)
        return Operand(self.low, self.high, self.stage, tuple(steps))

    def tile(self, index: Any) -> Int32:
        """Low word of the descriptor of tile ``index``."""
        return self.low + index * self.stage


def multiply_shared(
    accumulator: Int32, a: Operand, a_tile: Int32, b: Operand, b_tile: Int32, descriptor: int,
    done: tuple[Int32, int], pair: bool = False,
) -> None:  # fmt: skip
    """accumulator = A Bᵀ, both in shared memory, of a ``pair`` of CTAs in both of them; commits to
    the mbarrier ``done``."""
    steps = tuple(zip(a.steps, b.steps, strict=True))
    ptx_mma.tcgen05_mma_shared(
        accumulator, (a_tile, a.high), (b_tile, b.high), descriptor, steps, done, pair
    )


def multiply(
    form: str, accumulator: Int32, a: Operand | Int32, b: Operand, b_tile: Int32, descriptor: int,
    accumulate: Any, a_tile: Any = 0,
) -> None:  # fmt: skip
    """accumulator (+)= A B over the steps of B, by MMAs of ``form``; A is in shared memory, or in
    TMEM from that address on, 16 values of a step in 8 columns."""
    if isinstance(a, Operand):
        words: Any = (a.low + a_tile, a.high)
        steps = tuple(zip(a.steps, b.steps, strict=True))
    else:
        words = a
        steps = tuple((8 * k, step) for k, step in enumerate(b.steps))
    ptx_mma.tcgen05_mma(form, accumulator, words, (b_tile, b.high), descriptor, steps, accumulate)


def multiply_tmem(
    accumulator: Int32, a: Int32, b: Operand, b_tile: Int32, descriptor: int,
    accumulate: Int32, gates: dict[int, int], barrier: tuple[Int32, Int32], pair: bool = False,
) -> None:  # fmt: skip
    """accumulator (+)= A B; A is in TMEM, 16 values of a step in 8 columns. ``gates``:
    steps before which a phase of an mbarrier has to be over, and the mbarrier's offset;
    ``barrier``: the address that it is from, and the phase."""
    pairs = tuple((8 * k, step) for k, step in enumerate(b.steps))
    ptx_mma.tcgen05_mma_tmem(
        accumulator, a, (b_tile, b.high), descriptor, pairs, accumulate, gates, barrier, pair
    )
