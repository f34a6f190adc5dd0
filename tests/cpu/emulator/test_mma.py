"""tcgen05.mma against float64: layouts, swizzles, kinds, pairs of CTAs, masks, and its faults."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import tensor_kernels as tk

from cute_fmha.emulator.machine import EmulationError, Policy, decode_errors

F16, F32, S32 = 0, 1, 2


# ---------------------------------------------------------------- where D lies, by the ISA's names


def d_lanes(d: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """One CTA's rows of D as [128, columns], and which lanes hold something."""
    n = d.shape[1]
    lanes = np.zeros((128, n), d.dtype)
    used = np.ones(128, bool)
    if layout in "AD":
        return d, used
    if layout in "BE":
        return np.concatenate([d[:, : n // 2], d[:, n // 2 :]]), used
    if layout == "G":
        return np.concatenate(np.split(d, 4, axis=1)), used
    used[:] = False
    for warp in range(4):
        lanes[32 * warp : 32 * warp + 16] = d[16 * warp : 16 * warp + 16]
        used[32 * warp : 32 * warp + 16] = True
    return lanes, used


def layout_of(m: int, group: int, ws: bool) -> str:
    if group == 2:
        return "A" if m == 256 else "B"
    return {128: "D", 64: "E" if ws else "F", 32: "G"}[m]


def a_lanes(a: np.ndarray, layout: str) -> np.ndarray:
    """A's rows as the lanes that multiply them: folded layouts need a copy in every part."""
    if layout == "F":
        return d_lanes(a, "F")[0]
    return np.concatenate([a] * (128 // a.shape[0]))


# ---------------------------------------------------------------- a product of random matrices


def halves(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)[..., None].view(np.uint8)


def bfloats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values rounded (by truncation) to bf16, and their bytes."""
    bits = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
    raw = (bits >> 16).astype(np.uint16)[..., None].view(np.uint8)
    return bits.view(np.float32).astype(np.float64), raw


@dataclass
class Inputs:
    value: np.ndarray  # float64 [rows, K]
    raw: np.ndarray  # bytes [rows, K, element bytes]
    code: int  # in the instruction descriptor


def draw(rng: np.random.Generator, rows: int, depth: int, kind: str) -> Inputs:
    if kind == "f16":
        value = rng.standard_normal((rows, depth)).astype(np.float16)
        return Inputs(value.astype(np.float64), halves(value), 0)
    if kind == "bf16":
        value, raw = bfloats(
            rng.standard_normal((rows, depth)) * 2.0 ** rng.integers(-8, 8, (rows, depth))
        )
        return Inputs(value, raw, 1)
    if kind in ("u8", "s8"):
        raw = rng.integers(0, 256, (rows, depth, 1), dtype=np.uint8)
        return Inputs(
            (raw if kind == "u8" else raw.view(np.int8))[..., 0].astype(np.float64),
            raw,
            int(kind == "s8"),
        )
    bits, code, e, m, special = tk.FORMATS[kind]
    codes = rng.integers(0, 2**bits, (rows, depth))
    value = tk.minifloat(codes, e, m, special)
    codes = np.where(np.isfinite(value), codes, 1)
    return Inputs(tk.minifloat(codes, e, m, special), tk.padded_chunks(codes, bits), code)


PTX_KIND = {"f16": "f16", "bf16": "f16", "u8": "i8", "s8": "i8"}


def instruction(
    kind: str, group: int = 1, ws: bool = False, a_tmem: bool = False, tail: str = ""
) -> str:
    name = (
        f"tcgen05.mma{'.ws' if ws else ''}.cta_group::{group}.kind::{PTX_KIND.get(kind, 'f8f6f4')}"
    )
    address = "add.u32 %r20, %r20, 0; " if a_tmem else ""
    return f"{address}{name} [%r23], {'[%r20]' if a_tmem else '%d22'}, %d23, %r22, {tail}%p6;"


def lay_out(inputs: Inputs, rows: slice, width: int, transpose: bool) -> tk.Operand:
    return (tk.mn_major if transpose else tk.k_major)(inputs.raw[rows], width)


def words(value: np.ndarray, d: int) -> np.ndarray:
    """Cells of accumulators."""
    if d == F16:
        return value.astype(np.float16).view(np.uint16).astype(np.uint32)
    if d == S32:
        return value.astype(np.int64).astype(np.int32).view(np.uint32)
    return value.astype(np.float32).view(np.uint32)


def numbers(cells: np.ndarray, d: int) -> np.ndarray:
    if d == F16:
        return (cells & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
    return cells.view(np.int32 if d == S32 else np.float32).astype(np.float64)


def check_product(
    rng: np.random.Generator,
    m: int,
    n: int,
    kinds: tuple[str, str] = ("f16", "f16"),
    widths: tuple[int, int] = (128, 128),
    transpose: tuple[int, int] = (0, 0),
    negate: tuple[int, int] = (0, 0),
    d: int = F32,
    group: int = 1,
    ws: bool = False,
    a_tmem: bool = False,
    accumulate: bool = True,
    lane: int = 0,
    policy: Policy | None = None,
) -> None:
    """Chains as many instructions as the narrower swizzle holds, at a random column of D."""
    size = 2 if kinds[0] in ("f16", "bf16") else 1
    layout = layout_of(m, group, ws)
    spans = [w if not t and w > 16 else 64 for w, t in zip(widths, transpose, strict=True)]
    steps = min(2, *(span // 32 for span in spans))
    depth = [span // size for span in spans]
    used = steps * 32 // size
    a, b = draw(rng, m, depth[0], kinds[0]), draw(rng, n, depth[1], kinds[1])
    share_m, share_n, fold = m // group, n // group, {"B": 2, "E": 2, "G": 4}.get(layout, 1)
    images = []
    for rank in range(group):
        tile_a = lay_out(
            a, slice(rank * share_m, (rank + 1) * share_m), widths[0], bool(transpose[0])
        )
        tile_b = lay_out(
            b, slice(rank * share_n, (rank + 1) * share_n), widths[1], bool(transpose[1])
        )
        start_b = -(-tile_a.image.size // 1024) * 1024
        image = np.zeros(-(-(start_b + tile_b.image.size) // 16) * 16, np.uint8)
        image[: tile_a.image.size] = tile_a.image
        image[start_b : start_b + tile_b.image.size] = tile_b.image
        images.append(image)
    columns = max(64, 1 << (n // fold + (64 if a_tmem else 8) - 1).bit_length())
    at = 2 * int(rng.integers(0, (columns - n // fold - (64 if a_tmem else 0)) // 2 + 1))
    at_a = columns - 64
    old = (
        rng.standard_normal((m, n)) * 4
        if d != S32
        else rng.integers(-(2**30), 2**30, (m, n)).astype(np.float64)
    )
    before = rng.integers(0, 2**32, (group, 128, columns), dtype=np.uint64).astype(np.uint32)
    masks = []
    for rank in range(group):
        cells, lanes = d_lanes(words(old[rank * share_m : (rank + 1) * share_m], d), layout)
        lanes = np.roll(lanes, lane)
        masks.append(lanes)
        before[rank, lanes, at : at + n // fold] = np.roll(cells, lane, 0)[lanes]
        if a_tmem:
            raw = a.raw[rank * share_m : (rank + 1) * share_m, :used]
            packed = np.ascontiguousarray(raw).reshape(share_m, -1).view(np.uint32)
            before[rank, :, at_a : at_a + packed.shape[1]] = np.roll(
                a_lanes(packed, layout), lane, 0
            )
    idesc = tk.instruction_descriptor(m, n, a.code, b.code, d, transpose, negate)
    commands = [
        tk.command(
            (lane << 16 | at_a + 8 * k) if a_tmem else tile_a.descriptor(tk.IMAGE, k),
            tile_b.descriptor(tk.IMAGE + start_b, k),
            idesc,
            lane << 16 | at,
            accumulate or k > 0,
        )
        for k in range(steps)
    ]
    source = tk.kernel(tk.issue(instruction(kinds[0], group, ws, a_tmem), group), columns, group)
    after, result = tk.run(source, np.stack(images), before, commands, group, policy)

    av, bv = a.value[:, :used], b.value[:, :used]
    sign = (-1) ** (negate[0] + negate[1])
    wanted = sign * av @ bv.T + (numbers(words(old, d), d) if accumulate else 0)
    bound = np.abs(av) @ np.abs(bv.T) + np.abs(old)
    for rank in range(group):
        lanes = masks[rank]
        part, _ = d_lanes(wanted[rank * share_m : (rank + 1) * share_m], layout)
        limit, _ = d_lanes(bound[rank * share_m : (rank + 1) * share_m], layout)
        part, limit = np.roll(part, lane, 0)[lanes], np.roll(limit, lane, 0)[lanes]
        cells = after[rank, lanes, at : at + n // fold]
        if d == S32:
            np.testing.assert_array_equal(cells, words(part, d))
        elif d == F16:
            assert not (cells >> 16).any()
            error = np.abs(numbers(cells, d) - part)
            assert np.all((error <= steps * 2.0**-10 * limit + 1e-6) | (limit > 6e4))
        else:
            assert np.all(np.abs(numbers(cells, d) - part) <= 2.0**-19 * limit)
        touched = np.zeros((128, columns), bool)
        touched[lanes, at : at + n // fold] = True
        np.testing.assert_array_equal(after[rank][~touched], before[rank][~touched])
    assert result.counters.mma_flops == 2 * m * n * used


# ---------------------------------------------------------------- shapes, layouts, kinds


@pytest.mark.parametrize("width", [(16, 16), (32, 128), (64, 32), (128, 64)])
@pytest.mark.parametrize("transpose", list(itertools.product((0, 1), (0, 1))))
@pytest.mark.parametrize("m", [64, 128])
def test_swizzles_and_transposes(m, transpose, width, rng) -> None:
    n = 64 if transpose[1] else int(rng.choice([8, 24, 64, 96]))
    check_product(rng, m, n, widths=width, transpose=transpose)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("transpose", list(itertools.product((0, 1), (0, 1))))
def test_8_bit_swizzles_and_transposes(transpose, width, rng) -> None:
    check_product(rng, 128, 128, ("e4m3", "e5m2"), (width, width), transpose)


@pytest.mark.parametrize("n", [8, 16, 40, 128, 248, 256])
@pytest.mark.parametrize("m", [64, 128])
def test_shapes(m, n, rng) -> None:
    check_product(rng, m, n, ("bf16", "bf16"), accumulate=bool(rng.integers(2)))


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("a_tmem", [False, True])
def test_weight_stationary(m, n, a_tmem, rng) -> None:
    check_product(rng, m, n, ws=True, a_tmem=a_tmem)


@pytest.mark.parametrize("n", [16, 48, 128, 256])
@pytest.mark.parametrize("m", [128, 256])
@pytest.mark.parametrize("a_tmem", [False, True])
def test_pairs(m, n, a_tmem, rng) -> None:
    check_product(rng, m, n, ("bf16", "bf16"), group=2, a_tmem=a_tmem)


@pytest.mark.parametrize("transpose", [(0, 1), (1, 0), (1, 1)])
def test_transposed_pairs(transpose, rng) -> None:
    check_product(rng, 256, 128, transpose=transpose, group=2)
    check_product(rng, 128, 64, ("e4m3", "e4m3"), (64, 32), transpose, group=2)


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize(
    "kinds", [("f16", "f16"), ("bf16", "bf16"), ("e4m3", "e5m2"), ("s8", "u8")]
)
def test_a_in_tensor_memory(m, kinds, rng) -> None:
    check_product(
        rng,
        m,
        48 if kinds[0] != "s8" else 64,
        kinds,
        a_tmem=True,
        d=S32 if kinds[0] == "s8" else F32,
    )


def test_upper_half_of_the_lanes(rng) -> None:
    check_product(rng, 64, 32, lane=16)
    check_product(rng, 64, 32, lane=16, a_tmem=True)


@pytest.mark.parametrize("kinds", list(itertools.product(tk.FORMATS, tk.FORMATS)))
def test_f8f6f4(kinds, rng) -> None:
    d = F32 if "e5m2" in kinds or rng.integers(2) else F16
    check_product(rng, 128, 32, kinds, d=d, accumulate=d == F32)


@pytest.mark.parametrize("kinds", list(itertools.product(("u8", "s8"), ("u8", "s8"))))
def test_integers(kinds, rng) -> None:
    check_product(rng, 128, 32, kinds, d=S32)


@pytest.mark.parametrize("m", [64, 128])
def test_f16_accumulators(m, rng) -> None:
    check_product(rng, m, 64, d=F16)
    check_product(rng, m, 64, d=F16, accumulate=False)


@pytest.mark.parametrize("negate", [(0, 1), (1, 0), (1, 1)])
def test_negation(negate, rng) -> None:
    check_product(rng, 128, 64, negate=negate)
    check_product(rng, 128, 64, ("e4m3", "e2m1"), negate=negate, a_tmem=True)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_policies(mode, rng) -> None:
    for group in (1, 2):
        policy = Policy(mode, seed=int(rng.integers(1 << 30)), slice=8)
        check_product(rng, 128 * group, 64, group=group, policy=policy)


# ---------------------------------------------------------------- one instruction, chosen values


def one_product(
    a: np.ndarray,
    b: np.ndarray,
    before: np.ndarray,
    *,
    kind: str = "f16",
    codes=(0, 0),
    d: int = F32,
    ws: bool = False,
    enable: bool = True,
    tail: str = "",
    after_enable: str = "",
    extra: int = 0,
    mask=(),
    saturate: int = 0,
    check: bool = True,
    policy: Policy | None = None,
):
    """D at column 0 of 128 x columns; a and b: raw [rows, K, bytes] of one K."""
    tile_a, tile_b = tk.k_major(a, 16 if a.shape[1] * a.shape[2] != 32 else 32), tk.k_major(b, 32)
    start_b = -(-tile_a.image.size // 1024) * 1024
    image = np.zeros((1, start_b + tile_b.image.size), np.uint8)
    image[0, : tile_a.image.size] = tile_a.image
    image[0, start_b:] = tile_b.image
    code_a, code_b = codes
    idesc = tk.instruction_descriptor(a.shape[0], b.shape[0], code_a, code_b, d, saturate=saturate)
    text = instruction(kind, ws=ws, tail=tail).replace("%p6;", f"%p6{after_enable};")
    commands = [
        tk.command(
            tile_a.descriptor(tk.IMAGE, 0),
            tile_b.descriptor(tk.IMAGE + start_b, 0),
            idesc,
            0,
            enable,
            extra,
            mask,
        )
    ]
    source = tk.kernel(tk.issue(text), before.shape[1])
    after, result = tk.run(source, image, before[None], commands, policy=policy, check=check)
    return after[0], result


def identity(rows: int, one: int, depth: int, size: int) -> np.ndarray:
    raw = np.zeros((rows, depth, size), np.uint8)
    for k in range(min(rows, depth)):
        raw[k, k] = np.array([one], "<u2").view(np.uint8)[:size]
    return raw


@pytest.mark.parametrize("name", list(tk.FORMATS))
def test_every_pattern(name) -> None:
    """B holds every code once, A is the identity: D is the decoded table."""
    bits, code, e, m, special = tk.FORMATS[name]
    one = {"e4m3": 0x38, "e5m2": 0x3C, "e2m3": 0x08, "e3m2": 0x0C, "e2m1": 0x02}[name]
    for first in range(0, 2**bits, 256):
        codes = (first + np.arange(256).reshape(8, 32)) % 2**bits
        eye = np.zeros((128, 32), np.int64)
        eye[np.arange(32), np.arange(32)] = one
        after, _ = one_product(
            tk.padded_chunks(eye, bits),
            tk.padded_chunks(codes, bits),
            np.zeros((128, 32), np.uint32),
            kind=name,
            codes=(code, code),
            enable=False,
        )
        value = tk.minifloat(codes, e, m, special).T
        got = after[:32, :8].view(np.float32)
        finite = np.isfinite(value).all(axis=0)  # an infinity or NaN times the zeros of A is NaN
        np.testing.assert_array_equal(got[:, finite], value[:, finite])
        assert np.isnan(got[:, ~finite]).sum() >= (
            got[:, ~finite].size - (~np.isfinite(value)).sum()
        )


def test_special_values_propagate() -> None:
    a = np.ones((128, 16), np.float16)
    b = np.ones((8, 16), np.float16)
    a[3, 5], a[4, 6], a[5, 0] = np.inf, np.nan, 6e-8
    b[2, 0], b[3, 1] = -np.inf, 65504
    after, _ = one_product(halves(a), halves(b), np.zeros((128, 32), np.uint32), enable=False)
    with np.errstate(invalid="ignore"):
        wanted = a.astype(np.float64) @ b.astype(np.float64).T
    got = after[:, :8].view(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted.astype(np.float32), rtol=1e-6)


def test_f16_accumulator_overflows_to_infinity() -> None:
    a, b = np.full((128, 16), 200, np.float16), np.full((8, 16), 200, np.float16)
    after, _ = one_product(
        halves(a), halves(b), np.zeros((128, 32), np.uint32), d=F16, enable=False
    )
    assert (after[:, :8] == 0x7C00).all()


def test_scale_input_d(rng) -> None:
    a, b = draw(rng, 128, 16, "f16"), draw(rng, 64, 16, "f16")
    old = rng.standard_normal((128, 64)).astype(np.float32)
    for shift in (0, 1, 15):
        after, _ = one_product(a.raw, b.raw, old.view(np.uint32), after_enable=f", {shift}")
        wanted = a.value @ b.value.T + old * 2.0**-shift
        np.testing.assert_allclose(after.view(np.float32), wanted, atol=1e-4)


def test_disabled_lanes(rng) -> None:
    a, b = draw(rng, 128, 16, "f16"), draw(rng, 64, 16, "f16")
    old = rng.standard_normal((128, 64)).astype(np.float32)
    mask = rng.integers(0, 2**32, 4, dtype=np.uint64).astype(np.uint32)
    after, _ = one_product(
        a.raw, b.raw, old.view(np.uint32), tail="{%m0, %m1, %m2, %m3}, ", mask=mask
    )
    off = (mask[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(128, 1)
    wanted = np.where(off, old, a.value @ b.value.T + old)
    np.testing.assert_allclose(after.view(np.float32), wanted, atol=1e-4)


def test_disabled_lanes_of_a_pair(rng) -> None:
    a, b = draw(rng, 256, 16, "f16"), draw(rng, 64, 16, "f16")
    images, tiles = [], []
    for rank in range(2):
        tile_a, tile_b = (
            tk.k_major(a.raw[128 * rank :][:128], 32),
            tk.k_major(b.raw[32 * rank :][:32], 32),
        )
        images.append(np.concatenate([tile_a.image, tile_b.image]))
        tiles = [tile_a.descriptor(tk.IMAGE, 0), tile_b.descriptor(tk.IMAGE + tile_a.image.size, 0)]
    mask = rng.integers(0, 2**32, 8, dtype=np.uint64).astype(np.uint32)
    old = rng.standard_normal((2, 128, 64)).astype(np.float32)
    text = instruction("f16", 2, tail=tk.registers(8, "%m") + ", ")
    first, second = tiles
    idesc = tk.instruction_descriptor(256, 64, 0, 0, F32)
    commands = [tk.command(first, second, idesc, 0, True, 0, mask)]
    after, _ = tk.run(
        tk.kernel(tk.issue(text, 2), 64, 2), np.stack(images), old.view(np.uint32), commands, 2
    )
    off = (mask[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).reshape(256, 1)
    wanted = np.where(off, old.reshape(256, 64), a.value @ b.value.T + old.reshape(256, 64))
    np.testing.assert_allclose(after.view(np.float32).reshape(256, 64), wanted, atol=1e-4)


ZERO_MASKS = {  # the ISA's examples: (M, starts, firsts, masks from column 0 on)
    128: ((0,), (0,), ["0000111"]),
    64: ((0, 0), (1, 0), ["1110000", "0000111"]),
    32: ((0, 1, 2, 1), (1, 1, 0, 0), ["1110000", "1100001", "0011100", "0001110"]),
}


@pytest.mark.parametrize("m", [32, 64, 128])
@pytest.mark.parametrize("generated", [False, True])
def test_zero_column_mask(m, generated, rng) -> None:
    starts, firsts, patterns = ZERO_MASKS[m]
    extra = int(generated) << 39 | 2 << 40 | 3 << 48
    for i, (start, first) in enumerate(zip(starts, firsts, strict=True)):
        extra |= start << 8 * i | first << 32 + i
    a, b = draw(rng, m, 16, "f16"), draw(rng, 64, 16, "f16")
    after, _ = one_product(
        a.raw,
        b.raw,
        np.zeros((128, 64), np.uint32),
        ws=True,
        enable=False,
        after_enable=", %d27",
        extra=extra,
    )
    count = 64 // len(patterns)
    zero = np.array([int((p * 10)[j]) for p in patterns for j in range(count)], bool)
    wanted = a.value @ b.value.T
    if generated:
        # a pattern continues periodically, seven columns to a period
        wanted[:, zero] = 0
    layout = layout_of(m, 1, True)
    part, _ = d_lanes(wanted, layout)
    np.testing.assert_allclose(after[:, : part.shape[1]].view(np.float32), part, atol=1e-4)


def test_saturating_integers() -> None:
    a, b = np.full((128, 32, 1), 255, np.uint8), np.full((32, 32, 1), 255, np.uint8)
    old = np.full((128, 32), 2**31 - 100, np.int32)
    for saturate in (0, 1):
        after, _ = one_product(a, b, old.view(np.uint32), kind="u8", d=S32, saturate=saturate)
        exact = 2**31 - 100 + 32 * 255 * 255
        assert (after == (2**31 - 1 if saturate else exact)).all()


def test_accumulators_of_a_long_chain(rng) -> None:
    depth = 64
    a, b = draw(rng, 128, depth, "f16"), draw(rng, 64, depth, "f16")
    tile_a, tile_b = tk.k_major(a.raw, 16), tk.mn_major(b.raw, 128)
    image = np.concatenate([tile_a.image, tile_b.image])[None]
    assert tile_a.image.size % 1024 == 0
    idesc = tk.instruction_descriptor(128, 64, 0, 0, F32, (0, 1))
    commands = [
        tk.command(
            tile_a.descriptor(tk.IMAGE, k),
            tile_b.descriptor(tk.IMAGE + tile_a.image.size, k),
            idesc,
            0,
            k > 0,
        )
        for k in range(depth // 16)
    ]
    before = np.full((1, 128, 64), 0x7FC00000, np.uint32)
    for mode in ("eager", "lazy", "random"):
        after, _ = tk.run(
            tk.kernel(tk.issue(instruction("f16"))),
            image,
            before,
            commands,
            policy=Policy(mode, seed=5),
        )
        np.testing.assert_allclose(after[0].view(np.float32), a.value @ b.value.T, atol=1e-4)


def test_base_offset(rng) -> None:
    """A pattern that starts 3 * 128 bytes after a multiple of 1024 needs the base offset 3."""
    a, b = draw(rng, 128, 64, "f16"), draw(rng, 64, 64, "f16")
    tile_a, tile_b = tk.k_major(a.raw, 128), tk.k_major(b.raw, 128)
    image = np.concatenate(
        [np.zeros(384, np.uint8), tile_a.image, np.zeros(640, np.uint8), tile_b.image]
    )[None]
    commands = [
        tk.command(
            tk.smem_descriptor(tk.IMAGE + 384, 0, 1024, 128, base=3),
            tile_b.descriptor(tk.IMAGE + tile_a.image.size + 1024, 0),
            tk.instruction_descriptor(128, 64, 0, 0, F32),
            0,
            False,
        )
    ]
    after, _ = tk.run(
        tk.kernel(tk.issue(instruction("f16"))), image, np.zeros((1, 128, 64), np.uint32), commands
    )
    np.testing.assert_allclose(
        after[0].view(np.float32), a.value[:, :16] @ b.value[:, :16].T, atol=1e-4
    )


def test_padded_row_groups(rng) -> None:
    a, b = draw(rng, 128, 32, "f16"), draw(rng, 64, 64, "f16")
    tile_a, tile_b = tk.k_major(a.raw, 64, gap=512), tk.k_major(b.raw, 16, gap=48)
    image = np.concatenate([tile_a.image, tile_b.image])[None]
    image = np.pad(image, ((0, 0), (0, -image.shape[1] % 16)))
    commands = [
        tk.command(
            tile_a.descriptor(tk.IMAGE, k),
            tile_b.descriptor(tk.IMAGE + tile_a.image.size, k),
            tk.instruction_descriptor(128, 64, 0, 0, F32),
            0,
            k > 0,
        )
        for k in range(2)
    ]
    after, _ = tk.run(
        tk.kernel(tk.issue(instruction("f16"))), image, np.zeros((1, 128, 64), np.uint32), commands
    )
    np.testing.assert_allclose(after[0].view(np.float32), a.value @ b.value[:, :32].T, atol=1e-4)


# ---------------------------------------------------------------- faults


def found(
    instruction_text: str, words: np.ndarray, columns: int = 64, bytes_: int = 1 << 15, **options
) -> str:
    before = np.zeros((1, 128, columns), np.uint32)
    image = np.zeros((1, bytes_), np.uint8)
    _, result = tk.run(
        tk.kernel(tk.issue(instruction_text, **options), columns),
        image,
        before,
        [words],
        check=False,
    )
    assert result.findings, "nothing was found"
    return " | ".join(f"{f.kind}: {f.text}" for f in result.findings)


GOOD_SMEM = tk.smem_descriptor(tk.IMAGE, 0, 1024, 128)
GOOD_IDESC = tk.instruction_descriptor(128, 64, 0, 0, F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idesc": tk.instruction_descriptor(96, 64, 0, 0, F32)}, "descriptor: there is no M = 96"),
        (
            {"idesc": tk.instruction_descriptor(256, 64, 0, 0, F32)},
            "descriptor: there is no M = 256",
        ),
        (
            {"idesc": tk.instruction_descriptor(128, 0, 0, 0, F32)},
            "descriptor: there is no M = 128, N = 0",
        ),
        (
            {"idesc": tk.instruction_descriptor(128, 264, 0, 0, F32)},
            "descriptor: there is no M = 128, N = 264",
        ),
        (
            {"idesc": tk.instruction_descriptor(128, 64, 2, 2, F32)},
            "descriptor: kind::f16 has no input formats",
        ),
        ({"idesc": tk.instruction_descriptor(128, 64, 1, 1, F16)}, "descriptor: bf16 inputs need"),
        (
            {"idesc": tk.instruction_descriptor(128, 64, 0, 1, F32)},
            "unmodelled: kind::f16 with one f16",
        ),
        (
            {"idesc": tk.instruction_descriptor(128, 64, 0, 0, S32)},
            "descriptor: kind::f16 has no accumulator",
        ),
        ({"idesc": GOOD_IDESC | 4}, "descriptor: the sparsity bit"),
        ({"idesc": GOOD_IDESC | 8}, "descriptor: saturation"),
        ({"idesc": GOOD_IDESC | 1 << 23}, "descriptor: reserved bits"),
        ({"idesc": GOOD_IDESC | 1 << 30}, "descriptor: a maximum shift"),
        ({"a": GOOD_SMEM & ~(1 << 46)}, "descriptor: bits 46..48"),
        ({"b": GOOD_SMEM | 1 << 55}, "descriptor: bits 53..60"),
        ({"a": GOOD_SMEM | 1 << 52}, "unmodelled: an absolute leading-dimension"),
        (
            {"a": GOOD_SMEM & ~(7 << 61) | 1 << 61},
            "unmodelled: 128-byte swizzle with 32-byte atoms",
        ),
        ({"a": GOOD_SMEM | 1 << 61}, "descriptor: there is no swizzling mode 3"),
        ({"a": tk.smem_descriptor(tk.IMAGE + (1 << 15) - 1024, 0, 1024, 128)}, "bounds: the tile"),
        ({"d": 1}, "alignment: D at column 1"),
        ({"d": 16 << 16}, "descriptor: D at lane 16"),
        ({"d": 32}, "tmem: columns 32..95 of CTA 0 are used, but column 64 is not allocated"),
    ],
)
def test_illegal_descriptors(change, message) -> None:
    fields = {"a": GOOD_SMEM, "b": GOOD_SMEM, "idesc": GOOD_IDESC, "d": 0, "enable": True} | change
    assert message in found(instruction("f16"), tk.command(**fields))


def test_illegal_a_in_tensor_memory() -> None:
    for a, idesc, d, message in (
        (34, GOOD_IDESC, 0, "alignment: A at column 34"),
        (60, GOOD_IDESC, 0, "tmem: columns 60..67"),
        (
            16 << 16 | 32,
            tk.instruction_descriptor(64, 32, 0, 0, F32),
            0,
            "A at lane 16, D at lane 0",
        ),
        (
            32,
            tk.instruction_descriptor(128, 64, 0, 0, F32, (1, 0)),
            0,
            "A in tensor memory cannot be transposed",
        ),
    ):
        assert message in found(
            instruction("f16", a_tmem=True), tk.command(a, GOOD_SMEM, idesc, d, True)
        )


def test_formats_that_cannot_be() -> None:
    for kind, idesc, message in (
        (
            "e4m3",
            tk.instruction_descriptor(128, 64, 2, 0, F32),
            "kind::f8f6f4 has no input formats",
        ),
        ("e4m3", tk.instruction_descriptor(128, 64, 5, 0, F32, (1, 0)), "cannot be transposed"),
        ("e4m3", tk.instruction_descriptor(128, 24, 0, 0, F32, (0, 1)), "needs N in steps of 16"),
        ("u8", tk.instruction_descriptor(128, 40, 0, 0, S32), "there is no M = 128, N = 40"),
        ("u8", tk.instruction_descriptor(128, 32, 0, 0, F32), "accumulates in s32"),
        ("u8", tk.instruction_descriptor(128, 32, 0, 0, S32, negate=(1, 0)), "cannot negate"),
    ):
        assert message in found(instruction(kind), tk.command(GOOD_SMEM, GOOD_SMEM, idesc, 0, True))
    text = found(
        instruction("e2m1", a_tmem=True),
        tk.command(32, GOOD_SMEM, tk.instruction_descriptor(128, 32, 5, 5, F32), 0, True),
    )
    assert "unmodelled: 4-bit and 6-bit A in tensor memory" in text


@pytest.mark.parametrize(
    "name",
    [
        "tcgen05.mma.cta_group::1.kind::tf32",
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
        "tcgen05.mma.cta_group::1.kind::mxf4.block_scale",
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16",
        "tcgen05.mma.sp.cta_group::1.kind::f16",
        "tcgen05.mma.cta_group::1.kind::f16.ashift",
        "tcgen05.mma.cta_group::1.kind::f16.collector::b0::fill",
        "tcgen05.mma.cta_group::2.kind::f16",
        "tcgen05.mma.ws.cta_group::2.kind::f16",
    ],
)
def test_refused(name) -> None:
    text = decode_errors(tk.kernel(tk.issue(f"{name} [%r23], %d22, %d23, %r22, %p6;")))
    assert name in text


def test_collector_hints() -> None:
    for hint in ("a::fill", "a::use", "a::lastuse", "a::discard"):
        text = (
            f"tcgen05.mma.cta_group::1.kind::f16.collector::{hint} [%r23], %d22, %d23, %r22, %p6;"
        )
        assert not decode_errors(tk.kernel(tk.issue(text)))
    name = "tcgen05.mma.ws.cta_group::1.kind::f16.collector::b3::fill"
    text = f"{name} [%r23], %d22, %d23, %r22, 1, %d27;"
    assert not decode_errors(tk.kernel(tk.issue(text)))


# ---------------------------------------------------------------- time


def product_source(before_issue: str = "", after_commit: str = "", replace=("", "")) -> str:
    body = before_issue + tk.issue(instruction("f16")) + after_commit
    return tk.kernel(body).replace(*replace) if replace[0] else tk.kernel(body)


def product_findings(source: str, mode: str, rng: np.random.Generator) -> str:
    a, b = draw(rng, 128, 64, "f16"), draw(rng, 64, 64, "f16")
    tile_a, tile_b = tk.k_major(a.raw, 128), tk.k_major(b.raw, 128)
    image = np.concatenate([tile_a.image, tile_b.image])[None]
    commands = [
        tk.command(
            tile_a.descriptor(tk.IMAGE, k),
            tile_b.descriptor(tk.IMAGE + tile_a.image.size, k),
            GOOD_IDESC,
            0,
            k > 0,
        )
        for k in range(4)
    ]
    before = np.zeros((1, 128, 64), np.uint32)
    policy = Policy(mode, seed=int(rng.integers(1 << 30)))
    _, result = tk.run(source, image, before, commands, policy=policy, check=False)
    return " | ".join(f"{f.kind}: {f.text}" for f in result.findings)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_nothing_is_found_in_a_right_kernel(mode, rng) -> None:
    assert not product_findings(product_source(), mode, rng)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_missing_wait_for_the_commit(mode, rng) -> None:
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3], 0;\n    @!%p4 bra wait_loop;"
    source = product_source(replace=(wait, ""))
    assert "try_wait" not in source
    text = product_findings(source, mode, rng)
    if mode == "eager":
        assert "race" in text
        assert "TMEM" in text
    else:  # the columns may be freed, and the CTA may have exited, before the pipe begins
        assert "race" in text or "tmem: columns 0..63" in text


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_missing_proxy_fence(mode, rng) -> None:
    text = product_findings(
        product_source(replace=("fence.proxy.async.shared::cta;", "")), mode, rng
    )
    assert "missing fence.proxy.async" in text


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_operand_overwritten_too_early(mode, rng) -> None:
    """The issuing thread writes to A after the commit, which has not been waited for."""
    text = product_findings(
        product_source(after_commit="@%p2 st.shared.b32 [dynamic], %r0;"), mode, rng
    )
    assert "race" in text
    assert "shared memory" in text


def test_missing_commit_is_a_deadlock(rng) -> None:
    body = tk.issue(instruction("f16"), commit="")
    text = product_findings(tk.kernel(body), "lazy", rng)
    assert "deadlock" in text


def test_commit_to_no_barrier(rng) -> None:
    commit = tk.COMMIT[1].replace("[%r3]", "[%r3+8]")
    text = product_findings(tk.kernel(tk.issue(instruction("f16"), commit=commit)), "lazy", rng)
    assert "barrier: no mbarrier" in text


def test_pair_without_a_cluster(rng) -> None:
    body = tk.issue(instruction("f16", 2), 2)
    source = tk.kernel(body, 64, 2)
    with pytest.raises(EmulationError, match="needs a peer CTA"):
        tk.run(source, np.zeros((1, 1024), np.uint8), np.zeros((1, 128, 64), np.uint32), [])
