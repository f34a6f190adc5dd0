"""Online softmax of one score row per thread, in base 2; registers only, no synchronisation.

Scores are raw products q·k. With c = scale · log2 e, row maximum m and P = 2^(c·s − c·m):

    m' = max(m, max_j s_j),      fade = 2^(c·(m − m')),
    l' = fade · l + Σ_j P_j,     O' = fade · O + P V.

While c·(m − m') ≥ −threshold the old maximum is kept and fade is exactly 1: P then stays below
2^threshold, and O need not be touched. A row's maximum starts at the finite `EMPTY`, so that
−inf − −inf never occurs: a masked score gives P = 0 whatever the row has seen.
"""

from __future__ import annotations

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.ptx_codes import max3_magnitude
from cute_fmha.kernels.blackwell.scores import LOG2_E

LN2 = math.log(2.0)

EMPTY = -1.0e30
"""Maximum of a row that has seen no key."""

ABSENT = 1.0e30
"""Running maximum of a row past the sequence: no tile ever matters to it."""


def raw_threshold(value: Float32, scale_log2: Float32) -> Float32:
    """log2 λ / c: a row whose scores in a tile stay below its maximum and this does not need it.

    λ <= 0 and NaN skip nothing: the sum is then below any score, but finite, so that a row which
    sees no key of a tile (its maximum there is −inf) does not need it. λ >= 1 is 1.
    """
    log = cute.math.log2(cute.arch.fmin(value, 1.0), fastmath=True)
    nothing = Float32(-3.0e38)
    raw = cute.arch.fmax(log * cute.arch.rcp_approx(scale_log2), nothing)
    return cutlass.select_(value > 0.0, raw, nothing)


def log2_threshold(value: Float32) -> Float32:
    """log2 λ: −inf, which skips nothing, for λ <= 0 and NaN, and 0 for λ >= 1."""
    log = cute.math.log2(cute.arch.fmin(value, 1.0), fastmath=True)
    return cutlass.select_(value > 0.0, log, Float32(-Float32.inf))


def keeps_tile(
    tile_max: Float32, running: Float32, scale_log2: Float32, threshold: Float32
) -> Boolean:
    """Whether a row whose scores in the tile reach ``tile_max`` (−inf: none is visible) needs it:
    not when c · (tile_max − running) < log2 λ."""
    gap = (tile_max - running) * scale_log2
    return (gap >= threshold) & (tile_max > -Float32.inf)


def row_maximum(scores: list[Float32], start: Float32) -> Float32:
    """max(start, scores): three-input maxima in four independent chains."""
    chains = [start, *scores[:3]]
    rest = scores[3:]
    for turn, j in enumerate(range(0, len(rest) - 1, 2)):
        chains[turn % 4] = ptx.max3(chains[turn % 4], rest[j], rest[j + 1])
    last = ptx.max3(chains[0], chains[1], rest[-1])
    return ptx.max3(last, chains[2], chains[3])


def new_maximum(
    row_max: Float32, tile_max: Float32, scale_log2: Float32, threshold: float
) -> tuple[Float32, Float32]:
    """(maximum to subtract, fade); ``tile_max`` includes ``row_max``."""
    gap = (row_max - tile_max) * scale_log2
    fade = ptx.exp2(gap)
    if threshold == 0.0:
        return tile_max, fade
    keep = gap >= -threshold
    return cutlass.select_(keep, row_max, tile_max), cutlass.select_(keep, Float32(1.0), fade)


def tanh(x: Float32) -> Float32:
    """tanh to FP32 accuracy: 1 − 2 / (e^2x + 1), and near 0, where that cancels, a series."""
    far = 1.0 - 2.0 * cute.arch.rcp_approx(ptx.exp2(x * (2.0 * LOG2_E)) + 1.0)
    square = x * x
    series = Float32(62 / 2835)
    for coefficient in (-17 / 315, 2 / 15, -1 / 3, 1.0):
        series = series * square + coefficient
    return cutlass.select_(square < 0.0625, x * series, far)


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + e^−x)."""
    return cute.arch.rcp_approx(ptx.exp2(x * -LOG2_E) + 1.0)


def capped(scores: list[Float32], inner: Float32) -> list[Float32]:
    """tanh(inner · s), inner = scale / cap: with c = cap · log2 e they replace the raw scores."""
    return [tanh(score * inner) for score in scores]


def with_sink(
    maximum_log2: Float32, total: Float32, sink_log2: Float32
) -> tuple[Float32, Float32, Float32]:
    """A further logit without a value joins the row: (maximum, sum, what is left of O), all in
    base 2. A row that has seen no key has the sink as its only column."""
    joint = cute.arch.fmax(maximum_log2, sink_log2)
    fade = ptx.exp2(maximum_log2 - joint)
    return joint, total * fade + ptx.exp2(sink_log2 - joint), fade


@cute.jit
def normaliser(total: Float32, left: Float32):
    """What a row of O is to be multiplied with at the end, where ``left`` of it is left: a row that
    has seen no key is 0."""
    nothing = total == 0.0
    return 0.0 if nothing else left * cute.arch.rcp_approx(total)


@cute.jit
def log_sum_exp(maximum_log2: Float32, total: Float32):
    """The LSE of a row; −inf where it has seen no key."""
    lse = -Float32.inf
    nothing = total == 0.0
    if not nothing:
        lse = LN2 * (maximum_log2 + cute.math.log2(total, fastmath=True))
    return lse


POWER_OF_TWO = (0.6931241750717163, 0.24024099111557007, 0.055906426161527634, 0.009582852944731712)
"""2^f − 1 over f, f², f³, f⁴ for |f| <= 1/2: relative error at most 2.9e-6, and none at 0."""

ROUND = 1.5 * 2.0**23
"""x + ROUND − ROUND is x rounded to an integer, and the sum's low bits are that integer."""


def powers_of_two(x: tuple[Float32, Float32]) -> list[Float32]:
    """2^x of a pair without the special-function unit, x < 127: exactly 1 at 0, and 0 at −127 and
    below. 2^x = 2^n · 2^f, |f| <= 1/2: a polynomial, whose exponent n is added to."""
    x = tuple(cute.arch.fmax(value, Float32(-127.0)) for value in x)
    shifted = cute.arch.add_packed_f32x2(x, (Float32(ROUND),) * 2)
    whole = cute.arch.add_packed_f32x2(shifted, (Float32(-ROUND),) * 2)
    part = cute.arch.fma_packed_f32x2(whole, (Float32(-1.0),) * 2, x)
    power = (Float32(POWER_OF_TWO[-1]),) * 2
    for coefficient in (*POWER_OF_TWO[-2::-1], 1.0):
        power = cute.arch.fma_packed_f32x2(power, part, (Float32(coefficient),) * 2)
    return [
        ptx.float_of(ptx.bits_of(value) + (ptx.bits_of(n) << 23))
        for value, n in zip(power, shifted, strict=True)
    ]


def exponentials(
    scores: list[Float32], scale_log2: Float32, minus_max: Float32, by_polynomial: int = 0
) -> list[Float32]:
    """P = 2^(c·s − c·m) in FP32; ``minus_max`` is −c·m. Of every 16 values the last
    ``by_polynomial`` take the multiply-add units, the others the special-function unit."""
    result = []
    for j in range(0, len(scores), 2):
        pair = cute.arch.fma_packed_f32x2(
            (scores[j], scores[j + 1]), (scale_log2, scale_log2), (minus_max, minus_max)
        )
        if j % 16 >= 16 - by_polynomial:
            result += powers_of_two(pair)
        else:
            result += [ptx.exp2(pair[0]), ptx.exp2(pair[1])]
    return result


def packed(values: list[Float32], dtype: Any) -> list[Int32]:
    """``values`` rounded to a 16-bit ``dtype``, two to a register."""
    return [ptx.pack(values[j], values[j + 1], dtype) for j in range(0, len(values), 2)]


def scaled(values: list[Float32], factor: Float32) -> list[Float32]:
    """``factor`` times ``values``."""
    result: list[Float32] = []
    for j in range(0, len(values), 2):
        result += cute.arch.mul_packed_f32x2((values[j], values[j + 1]), (factor, factor))
    return result


def largest_magnitude(values: list[Float32]) -> Float32:
    """max |values|; NaN if one of them is NaN."""
    while len(values) > 1:
        values = [
            max3_magnitude(values[j], *(values[j + 1 : j + 3] * 2)[:2])
            if j + 1 < len(values)
            else values[j]
            for j in range(0, len(values), 3)
        ]
    return values[0]


def row_sum(values: list[Float32], start: Float32) -> Float32:
    """start + Σ values, in two chains of pairs."""
    chains = [(start, Float32(0.0)), (values[0], values[1])]
    for turn, j in enumerate(range(2, len(values), 2)):
        chains[turn % 2] = cute.arch.add_packed_f32x2(chains[turn % 2], (values[j], values[j + 1]))
    total = cute.arch.add_packed_f32x2(*chains)
    return total[0] + total[1]
