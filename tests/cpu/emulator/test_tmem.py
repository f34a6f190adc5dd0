"""Tensor memory: allocation, every shape of tcgen05.ld and st, cp, waits, and their faults."""

from __future__ import annotations

import numpy as np
import pytest
import tensor_kernels as tk

from cute_fmha.emulator.machine import EmulationError, Policy, decode_errors, run_ptx


def texts(result) -> str:
    return " | ".join(f"{f.kind}: {f.text}" for f in result.findings)


# ---------------------------------------------------------------- the shapes of ld and st


def offset(index: np.ndarray, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """Of a linear index (first mode fastest) in a layout."""
    total = np.zeros_like(index)
    for size, step in zip(shape, stride, strict=True):
        total = total + index % size * step
        index = index // size
    return total


def fragment(
    shape: str, n: int, packed: bool, split: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lane, column and bit of every 16-bit half of register r of thread t: [32, registers, 2].

    Each shape maps (thread, bit of its registers) to a bit of the matrix whose rows are lanes.
    """
    registers = n * {"16x128b": 2, "16x256b": 4}.get(shape, 1)
    thread = np.arange(32).reshape(32, 1, 1)
    value = np.arange(0, 32 * registers, 16).reshape(1, registers, 2)
    if shape == "32x32b":
        row, bit = 32 * n, thread * 32 * n + value
    elif shape == "16x64b":
        row = 64 * n
        bit = offset(thread, (2, 2, 8), (8 * row, 32, row)) + offset(value, (32, n), (1, 64))
    elif shape == "16x128b":
        row = 128 * n
        bit = offset(thread, (4, 8), (32, row)) + offset(value, (32, 2, n), (1, 8 * row, 128))
    elif shape == "16x256b":
        row = 256 * n
        bit = offset(thread, (4, 8), (64, row)) + offset(value, (64, 2, n), (1, 8 * row, 256))
    else:
        row = 64 * n
        bit = offset(thread, (16, 2), (row, 32 * n)) + value
    lane, within = bit // row, bit % row
    column = within // (16 if packed else 32)
    if shape == "16x32bx2":
        half = n * (2 if packed else 1)
        column = column % half + column // half * split
    return lane, column, np.zeros_like(within) if packed else within % 32


CASES = [
    (shape, n)
    for shape, most in (
        ("32x32b", 128),
        ("16x64b", 128),
        ("16x128b", 64),
        ("16x256b", 32),
        ("16x32bx2", 128),
    )
    for n in (1, 2, 4, 8, 16, 32, 64, 128)
    if n <= most
]
_BODY = """
    add.u32 %r8, %r5, {start};
    tcgen05.ld.sync.aligned.{shape}.x{n}{pack}.b32 {vector}, [%r8]{split};
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %d12, %r0, {thread_bytes}, %d4;
    {swap}
    tcgen05.st.sync.aligned.{shape}.x{n}{unpack}.b32 [%r8]{split}, {vector};
    tcgen05.wait::st.sync.aligned;
    @%p1 {commit}
"""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("shape", "n"), CASES)
def test_shapes(shape, n, packed, rng) -> None:
    half = n * (2 if packed else 1)
    split = min(half + 2 * int(rng.integers(0, 3)), 512 - half)
    lane, column, bit = fragment(shape, n, packed, split)
    registers = lane.shape[1]
    extent = int(column.max()) + 1
    columns = max(32, 1 << (min(extent + 8, 512) - 1).bit_length())
    base = 2 * int(rng.integers(0, (columns - extent) // 2 + 1))
    upper = 16 * int(rng.integers(2)) if shape != "32x32b" else 0
    swap = [
        f"ld.global.b32 %r9, [%d12+{4 * r}]; st.global.b32 [%d12+{4 * r}], %v{r};"
        f"mov.b32 %v{r}, %r9;"
        for r in range(registers)
    ]
    body = _BODY.format(
        shape=shape,
        n=n,
        pack=".pack::16b" if packed else "",
        unpack=".unpack::16b" if packed else "",
        start=upper << 16 | base,
        vector=tk.registers(registers),
        split=f", {split}" if shape == "16x32bx2" else "",
        thread_bytes=4 * registers,
        swap="\n    ".join(swap),
        commit=tk.COMMIT[1],
    )
    before = rng.integers(0, 2**32, (1, 128, columns), dtype=np.uint64).astype(np.uint32)
    stored = rng.integers(0, 2**32, (128, registers), dtype=np.uint64).astype(np.uint32)
    exchanged = stored.copy()
    after, _ = tk.run(tk.kernel(body, columns), np.zeros((1, 16), np.uint8), before, exchanged)

    wanted = before[0].copy()
    loaded = np.zeros((128, registers), np.uint32)
    for warp in range(4):
        at, thread = (32 * warp + upper + lane, base + column), slice(32 * warp, 32 * warp + 32)
        pieces = before[0][at] >> bit.astype(np.uint32) & 0xFFFF
        loaded[thread] = pieces[..., 0] | pieces[..., 1] << 16
        halves = np.stack([stored[thread] & 0xFFFF, stored[thread] >> 16], -1)
        if packed:
            wanted[at] = halves
        else:
            for i in range(2):
                here = at[0][..., i], at[1][..., i]
                clear = ~np.left_shift(np.uint32(0xFFFF), bit[..., i].astype(np.uint32))
                wanted[here] = (wanted[here] & clear) | halves[..., i] << bit[..., i].astype(
                    np.uint32
                )
    np.testing.assert_array_equal(exchanged, loaded)
    np.testing.assert_array_equal(after[0], wanted)


@pytest.mark.parametrize("kind", ["f32", "abs.NaN.f32", "NaN.f32", "abs.f32", "u32", "s32"])
@pytest.mark.parametrize("operation", ["min", "max"])
def test_reducing_load(operation, kind, rng) -> None:
    body = f"""
    tcgen05.ld.red.sync.aligned.32x32b.x16.{operation}.{kind} {tk.registers(16)}, %r9, [%r5];
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %d12, %r0, 4, %d4;
    st.global.b32 [%d12], %r9;
    @%p1 {tk.COMMIT[1]}
    """
    before = rng.integers(0, 2**32, (1, 128, 32), dtype=np.uint64).astype(np.uint32)
    if "f32" in kind:
        values = rng.standard_normal((1, 128, 32)).astype(np.float32)
        values[rng.random(values.shape) < 0.1] = np.nan
        values[0, 5], values[0, 6, :16] = np.nan, [0.0, -0.0] * 8
        values[0, 7, 3] = -np.inf
        before = values.view(np.uint32)
    out = np.zeros(128, np.uint32)
    tk.run(tk.kernel(body, 32), np.zeros((1, 16), np.uint8), before, out)
    used = before[0, :, :16]
    if "f32" not in kind:
        wanted = getattr(used.view(np.uint32 if kind == "u32" else np.int32), operation)(
            axis=1
        ).view(np.uint32)
        np.testing.assert_array_equal(out, wanted)
        return
    number = np.abs(used.view(np.float32)) if "abs" in kind else used.view(np.float32)
    ordered = {"min": np.minimum, "max": np.maximum, "fmin": np.fmin, "fmax": np.fmax}
    wanted = ordered[operation if "NaN" in kind else "f" + operation].reduce(number, axis=1)
    np.testing.assert_array_equal(out.view(np.float32), wanted)
    signed_zero = 0x80000000 if operation == "min" and "abs" not in kind else 0
    assert out[6] == signed_zero


# ---------------------------------------------------------------- cp


SHAPES = [
    ("128x256b", ""), ("4x256b", ""), ("128x128b", ""), ("64x128b", ".warpx2::02_13"),
    ("64x128b", ".warpx2::01_23"), ("32x128b", ".warpx4"),
]  # fmt: skip


def copied(rows: np.ndarray, shape: str, multicast: str) -> dict[int, np.ndarray]:
    """lane -> words"""
    if shape == "4x256b":
        return {32 * r: rows[r] for r in range(4)}
    if shape in ("128x256b", "128x128b"):
        return dict(enumerate(rows))
    if multicast == ".warpx4":
        return {32 * part + r: rows[r] for part in range(4) for r in range(32)}
    if multicast == ".warpx2::02_13":  # warps 0 and 2 the first half, 1 and 3 the second
        return {32 * warp + r: rows[32 * (warp % 2) + r] for warp in range(4) for r in range(32)}
    return {32 * warp + r: rows[32 * (warp // 2) + r] for warp in range(4) for r in range(32)}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("shape", "multicast"), SHAPES)
def test_copy(shape, multicast, group, rng) -> None:
    rows, size = int(shape.split("x")[0]), int(shape.split("x")[1][:-1]) // 8
    width = int(rng.choice([16, 32] if size == 32 else [16]))
    raw = rng.integers(0, 256, (group, max(rows, 8), size, 1), dtype=np.uint8)
    tiles = [tk.k_major(part, width) for part in raw]
    image = np.stack([tile.image for tile in tiles])
    lane = int(rng.integers(32)) if shape == "4x256b" else 0
    column = 4 * int(rng.integers(0, 7))
    body = tk.issue(f"tcgen05.cp.cta_group::{group}.{shape}{multicast} [%r23], %d23;", group)
    before = rng.integers(0, 2**32, (group, 128, 32), dtype=np.uint64).astype(np.uint32)
    commands = [tk.command(0, tiles[0].descriptor(tk.IMAGE, 0), 0, lane << 16 | column, False)]
    for mode in ("eager", "lazy"):
        after, _ = tk.run(tk.kernel(body, 32, group), image, before, commands, group, Policy(mode))
        wanted = before.copy()
        for rank in range(group):
            words = raw[rank, :rows, :, 0].copy().view(np.uint32)
            for at, word in copied(words, shape, multicast).items():
                wanted[rank, lane + at, column : column + size // 4] = word
        np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("shape", "multicast"), SHAPES)
def test_copy_with_decompression(shape, multicast, group, bits, rng) -> None:
    """Elements of 4 or 6 bits, 16 to a chunk and the rest padding, become bytes."""
    rows, size = int(shape.split("x")[0]), int(shape.split("x")[1][:-1]) // 8
    codes = rng.integers(0, 1 << bits, (group, max(rows, 8), size), dtype=np.uint8)
    ones = (codes.reshape(-1, 16, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(ones.reshape(len(ones), -1), axis=1, bitorder="little")
    padding = rng.integers(0, 256, (len(packed), 16 - packed.shape[1]), dtype=np.uint8)
    raw = np.concatenate([packed, padding], axis=1).reshape(group, -1, size, 1)
    tiles = [tk.k_major(part, 16) for part in raw]
    image = np.stack([tile.image for tile in tiles])
    name = f"{shape}{multicast}.b8x16.{'b4x16_p64' if bits == 4 else 'b6x16_p32'}"
    body = tk.issue(f"tcgen05.cp.cta_group::{group}.{name} [%r23], %d23;", group)
    before = rng.integers(0, 2**32, (group, 128, 32), dtype=np.uint64).astype(np.uint32)
    commands = [tk.command(0, tiles[0].descriptor(tk.IMAGE, 0), 0, 4, False)]
    for mode in ("eager", "lazy"):
        after, _ = tk.run(tk.kernel(body, 32, group), image, before, commands, group, Policy(mode))
        wanted = before.copy()
        for rank in range(group):
            values = codes[rank, :rows] * np.uint8(4 if bits == 4 else 1)
            for at, word in copied(values.view(np.uint32), shape, multicast).items():
                wanted[rank, at, 4 : 4 + size // 4] = word
        np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize("group", [1, 2])
def test_shift(group, rng) -> None:
    """One lane down in every part of 32 lanes, 8 columns; the last lane stays."""
    before = rng.integers(0, 2**32, (group, 128, 32), dtype=np.uint64).astype(np.uint32)
    body = tk.issue(f"tcgen05.shift.cta_group::{group}.down [%r23];", group)
    column = 4 * int(rng.integers(0, 7))
    commands = [tk.command(0, 0, 0, column, False)] * 2
    for mode in ("eager", "lazy"):
        image = np.zeros((group, 128), np.uint8)
        after, _ = tk.run(tk.kernel(body, 32, group), image, before, commands, group, Policy(mode))
        wanted = before.copy()
        parts = wanted.reshape(group, 4, 32, 32)[..., column : column + 8]
        parts[:, :, :30] = parts[:, :, 2:].copy()
        parts[:, :, 30] = parts[:, :, 31]
        np.testing.assert_array_equal(after, wanted)


def test_shift_somewhere_else() -> None:
    for lane, kind in ((16, "descriptor"), (32, "unmodelled")):
        body = tk.issue("tcgen05.shift.cta_group::1.down [%r23];")
        commands = [tk.command(0, 0, 0, lane << 16, False)]
        image, before = np.zeros((1, 128), np.uint8), np.zeros((1, 128, 32), np.uint32)
        with pytest.raises(EmulationError, match=kind):
            tk.run(tk.kernel(body, 32), image, before, commands)


def test_copy_then_multiply_in_order(rng) -> None:
    """A goes to tensor memory by cp and is used by the next instruction of the pipe."""
    a = rng.standard_normal((128, 16)).astype(np.float16)
    b = rng.standard_normal((32, 16)).astype(np.float16)
    tile_a, tile_b = (tk.k_major(x[..., None].view(np.uint8), 32) for x in (a, b))
    image = np.concatenate([tile_a.image, tile_b.image])[None]
    body = tk.issue(
        "tcgen05.cp.cta_group::1.128x256b [%r4 + 32], %d22;"
        "add.u32 %r24, %r4, 32; tcgen05.mma.cta_group::1.kind::f16 [%r23], [%r24], %d23, %r22, 0;"
    )
    idesc = tk.instruction_descriptor(128, 32, 0, 0, 1)
    commands = [
        tk.command(
            tile_a.descriptor(tk.IMAGE, 0),
            tile_b.descriptor(tk.IMAGE + tile_a.image.size, 0),
            idesc,
            0,
            False,
        )
    ]
    for mode in ("eager", "lazy", "random"):
        after, _ = tk.run(
            tk.kernel(body), image, np.zeros((1, 128, 64), np.uint32), commands, policy=Policy(mode)
        )
        np.testing.assert_allclose(
            after[0, :, :32].view(np.float32), a.astype(float) @ b.astype(float).T, atol=1e-4
        )


@pytest.mark.parametrize(
    "name",
    [
        "tcgen05.cp.cta_group::1.128x128b.b8x16 [%r4], %d0;",
        "tcgen05.cp.cta_group::1.128x256b.b4x16_p64 [%r4], %d0;",
        "tcgen05.cp.cta_group::1.128x256b.b8x16.b2x16_p96 [%r4], %d0;",
        "tcgen05.cp.cta_group::1.64x128b [%r4], %d0;",
        "tcgen05.cp.cta_group::1.128x128b.warpx4 [%r4], %d0;",
        "tcgen05.shift.cta_group::1.up [%r4];",
        "tcgen05.shift.cta_group::1 [%r4];",
        "tcgen05.ld.sync.aligned.32x32b.x3.b32 {%v0, %v1, %v2}, [%r4];",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%v0}, [%r4];",
        "tcgen05.ld.sync.aligned.16x256b.x64.b32 {%v0}, [%r4];",
        "tcgen05.ld.sync.aligned.32x32b.x1.unpack::16b.b32 {%v0}, [%r4];",
        "tcgen05.ld.red.sync.aligned.16x64b.x2.max.f32 {%v0, %v1}, %r9, [%r4];",
        "tcgen05.st.sync.aligned.32x32b.x1.pack::16b.b32 [%r4], {%v0};",
        "tcgen05.commit.cta_group::1.shared::cluster.b64 [%r3];",
        "tcgen05.fence::before_thread_sync.relaxed;",
    ],
)
def test_refused(name) -> None:
    assert "tcgen05" in decode_errors(tk.kernel(name, 32))


def test_two_cta_groups_are_refused() -> None:
    text = decode_errors(tk.kernel(tk.COMMIT[1].replace("group::1", "group::2"), 32))
    assert "must have the same cta_group" in text


# ---------------------------------------------------------------- allocation

_ALLOCATION = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .u64 out)
{{
    .reg .b32 %r<40>; .reg .b64 %d<8>; .reg .pred %p<8>;
    .shared .align 16 .b8 slot[64];
    .shared .align 8 .b8 bar[8];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, slot;
    mov.u32 %r2, bar;
    mov.u32 %r10, %cluster_ctarank;
    ld.param.u64 %d0, [out];
    setp.lt.u32 %p0, %r0, 32;
    setp.eq.u32 %p1, %r0, 0;
    setp.eq.u32 %p2, %r10, 0;
    mad.wide.u32 %d0, %r10, 64, %d0;
    {body}
    ret;
}}
"""


def alloc(i: int, size: int, group: int = 1) -> str:
    return (
        f"tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r1+{4 * i}], {size};\n"
        f"    bar.warp.sync 0xffffffff;\n"
        f"    ld.shared.b32 %r{20 + i}, [slot+{4 * i}];\n"
        f"    @%p1 st.global.b32 [%d0+{4 * i}], %r{20 + i};\n    "
    )


def dealloc(register: int, size: int, group: int = 1) -> str:
    return f"tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r{register}, {size};\n    "


RELINQUISH = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n    "


def allocate(body: str, check: bool = True, block: int = 32, ctas: int = 1, **options):
    out = np.full((ctas, 16), 0xFFFFFFFF, np.uint32)
    result = run_ptx(
        _ALLOCATION.format(body=body),
        out,
        block=(block, 1, 1),
        grid=(ctas, 1, 1),
        cluster=(ctas, 1, 1),
        check=check,
        policy=Policy(**options),
    )
    return out if check else texts(result)


def test_first_fit() -> None:
    body = alloc(0, 256) + alloc(1, 128) + alloc(2, 64) + alloc(3, 32) + alloc(4, 32)
    body += dealloc(22, 64) + dealloc(20, 256) + alloc(5, 32) + alloc(6, 32)
    body += dealloc(21, 128) + alloc(7, 32)
    body += "".join(dealloc(r, 32) for r in (23, 24, 25, 26, 27)) + RELINQUISH
    assert allocate(body)[0, :8].tolist() == [0, 256, 384, 448, 480, 0, 32, 64]


def test_all_columns() -> None:
    assert allocate(alloc(0, 512) + dealloc(20, 512) + alloc(1, 512) + dealloc(21, 512))[
        0, :2
    ].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (alloc(0, 16), "tmem: 16 columns cannot be allocated"),
        (alloc(0, 48), "tmem: 48 columns cannot be allocated"),
        (alloc(0, 0), "tmem: 0 columns cannot be allocated"),
        (alloc(0, 1024), "tmem: 1024 columns cannot be allocated"),
        (
            alloc(0, 32) + alloc(1, 64) + dealloc(20, 32) + dealloc(21, 64),
            "tmem: an allocation of 64 columns follows",
        ),
        (RELINQUISH + alloc(0, 32), "tmem: tcgen05.alloc after the CTA relinquished"),
        (
            alloc(0, 32) + dealloc(20, 32) + dealloc(20, 32),
            "tmem: 0x00000000 is freed, but not allocated",
        ),
        (
            alloc(0, 64) + dealloc(20, 32),
            "tmem: 32 columns at 0 are freed, but the allocation there is of 64",
        ),
        (alloc(0, 64) + "add.u32 %r20, %r20, 32;" + dealloc(20, 32), "of 64 columns at 0"),
        (alloc(0, 64) + "add.u32 %r20, %r20, 64;" + dealloc(20, 64), "is freed, but not allocated"),
        (alloc(0, 64) + dealloc(20, 48), "tmem: 48 columns cannot be"),
        (alloc(0, 512) + alloc(1, 32), "deadlock"),
        (alloc(0, 32), "tmem"),  # never freed
    ],
)
def test_wrong_allocation(body, message) -> None:
    assert message in allocate(body, check=False)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_allocation_waits_for_columns(mode) -> None:
    """Warp 1 needs all columns while warp 0 still has some."""
    body = (
        "@!%p0 bra other;\n"
        + alloc(0, 512)
        + "bar.sync 1, 64;\n"
        + dealloc(20, 512)
        + "bra done;\nother: bar.sync 1, 64; setp.eq.u32 %p1, %r0, 32;\n"
        + alloc(1, 512)
        + dealloc(21, 512)
        + "done:"
    )
    for seed in range(3):
        assert allocate(body, block=64, mode=mode, seed=seed, slice=1 + 3 * seed)[
            0, :2
        ].tolist() == [0, 0]


def test_collective_allocation() -> None:
    body = alloc(0, 128, 2) + alloc(1, 64, 2) + dealloc(21, 64, 2) + dealloc(20, 128, 2)
    for mode in ("eager", "random"):
        assert allocate(body, ctas=2, mode=mode, slice=3)[:, :2].tolist() == [[0, 128], [0, 128]]


def test_collective_allocation_by_one_cta_only() -> None:
    body = "@!%p2 bra done;\n" + alloc(0, 128, 2) + dealloc(20, 128, 2) + "done:"
    assert "tmem" in allocate(body, check=False, ctas=2) or "deadlock" in allocate(
        body, check=False, ctas=2
    )
    assert "needs a peer CTA" in allocate(alloc(0, 128, 2), check=False)


# ---------------------------------------------------------------- faults of accesses


def faulty(body: str, columns: int = 64, policy: Policy | None = None) -> str:
    before = np.zeros((1, 128, columns), np.uint32)
    _, result = tk.run(
        tk.kernel(body + f"@%p1 {tk.COMMIT[1]}", columns),
        np.zeros((1, 16), np.uint8),
        before,
        np.zeros((8, 16), np.uint64),
        policy=policy,
        check=False,
    )
    return texts(result)


LD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v40}, "
ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 "
WAIT_LD = "tcgen05.wait::ld.sync.aligned;"
WAIT_ST = "tcgen05.wait::st.sync.aligned;"
VALUE = "mov.b32 %v41, %r0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (LD + "[%r5 + 64];", "tmem: columns 64..64 of CTA 0 are used, but column 64"),
        (VALUE + ST + "[%r5 + 64], {%v41};", "tmem: columns 64..64"),
        ("mov.u32 %r8, 0xffff;" + LD + "[%r8];", "may use lanes"),
        (LD + "[%r4];", "may use lanes"),
        ("add.u32 %r8, %r5, 0x100000;" + LD + "[%r8];", "may use lanes"),
        ("tcgen05.ld.sync.aligned.16x64b.x1.b32 {%v40}, [%r5 + 1];", "alignment: column 1"),
        (
            "tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {%v40}, [%r5 + 1];",
            "alignment: column 1",
        ),
        ("tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%v40}, [%r5], 64;", "tmem: columns 64..64"),
        ("add.u32 %r8, %r5, %r0;" + LD + "[%r8];", "tmem: the lanes of a warp give different"),
        ("@%p1 " + LD + "[%r5];", "divergence"),
        ("@%p1 " + WAIT_LD, "divergence"),
    ],
)
def test_wrong_access(body, message) -> None:
    assert message in faulty(body)


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_missing_wait_for_a_store(mode) -> None:
    read = LD + "[%r5 + 3];" + WAIT_LD
    right = VALUE + ST + "[%r5 + 3], {%v41};" + WAIT_ST + read
    assert not faulty(right, policy=Policy(mode))
    text = faulty(right.replace(WAIT_ST, ""), policy=Policy(mode))
    assert "race" in text
    assert "TMEM of CTA 0 at column 3" in text


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_stores_of_a_warp_land_in_order(mode, rng) -> None:
    body = (
        VALUE
        + ST
        + "[%r5], {%v41}; add.u32 %v41, %v41, 1000;"
        + ST
        + "[%r5], {%v41};"
        + ST
        + "[%r5 + 1], {%v41};"
    )
    body += "add.u32 %v41, %v41, 1000;" + WAIT_ST + f"@%p1 {tk.COMMIT[1]}"
    before = np.zeros((1, 128, 32), np.uint32)
    after, _ = tk.run(
        tk.kernel(body, 32), np.zeros((1, 16), np.uint8), before, [], policy=Policy(mode, seed=3)
    )
    np.testing.assert_array_equal(after[0, :, 0], np.arange(128) + 1000)
    np.testing.assert_array_equal(after[0, :, 1], np.arange(128) + 1000)


def test_store_is_late_when_lazy() -> None:
    """Without the wait a lazy machine still shows the old cells (and reports it)."""
    body = f"""
    mov.b32 %v41, 77;
    {ST} [%r5], {{%v41}};
    {LD} [%r5];
    mad.wide.u32 %d12, %r0, 4, %d4;
    st.global.b32 [%d12], %v40;
    {WAIT_ST}
    @%p1 {tk.COMMIT[1]}
    """
    values = {}
    for mode in ("eager", "lazy"):
        out = np.full(128, 1, np.uint32)
        before = np.full((1, 128, 32), 5, np.uint32)
        _, result = tk.run(
            tk.kernel(body, 32),
            np.zeros((1, 16), np.uint8),
            before,
            out,
            policy=Policy(mode),
            check=False,
        )
        values[mode] = set(out.tolist())
        assert "race" in texts(result)
    assert values == {"eager": {77}, "lazy": {5}}


def test_missing_wait_for_a_load() -> None:
    body = LD + "[%r5];" + WAIT_LD + "add.u32 %v41, %v40, 1;"
    strict, loose = Policy(strict_tmem_load=True), Policy()
    assert not faulty(body, policy=strict)
    assert not faulty(body.replace(WAIT_LD, ""), policy=loose)
    text = faulty(body.replace(WAIT_LD, ""), policy=strict)
    assert "pending load" in text
    assert "%v40" in text


def test_store_over_a_load_without_a_wait() -> None:
    body = LD + "[%r5];" + WAIT_LD + VALUE + ST + "[%r5], {%v41};" + WAIT_ST
    used = body.replace(WAIT_LD, "add.u32 %v42, %v40, 1;", 1)
    for strict in (False, True):
        policy = Policy(strict_tmem_load=strict)
        assert not faulty(body, policy=policy)
        text = faulty(body.replace(WAIT_LD, "", 1), policy=policy)
        assert "pending load: columns 0..0 are stored to before the load" in text
    assert not faulty(used)  # the value is there, so the cells were read
    assert not faulty(body.replace("{%v41}", "{%v40}").replace(WAIT_LD, "", 1))


@pytest.mark.parametrize("mode", ["eager", "lazy"])
@pytest.mark.parametrize("before_release", [WAIT_LD, "add.u32 %v41, %v40, 1;", ""])
@pytest.mark.parametrize("later", [WAIT_LD, "add.u32 %v41, %v40, 1;"])
def test_load_released_before_it_is_over(mode, before_release, later, rng) -> None:
    """The cells of a load go to the tensor pipe, which may overwrite them before they are read."""
    b = rng.standard_normal((64, 16)).astype(np.float16)
    a = rng.standard_normal((128, 16)).astype(np.float16)
    tiles = [tk.k_major(x[..., None].view(np.uint8), 32) for x in (a, b)]
    image = np.concatenate([tile.image for tile in tiles])[None]
    idesc = tk.instruction_descriptor(128, 64, 0, 0, 1)
    starts = tk.IMAGE, tk.IMAGE + tiles[0].image.size
    descriptors = [tile.descriptor(start, 0) for tile, start in zip(tiles, starts, strict=True)]
    first, second = descriptors
    commands = [tk.command(first, second, idesc, 0, False)]
    issue = tk.issue("tcgen05.mma.cta_group::1.kind::f16 [%r23], %d22, %d23, %r22, %p6;")
    body = LD + "[%r5];" + before_release + "tcgen05.fence::before_thread_sync; bar.sync 0;"
    body += "tcgen05.fence::after_thread_sync;" + issue + later
    cells = np.zeros((1, 128, 64), np.uint32)
    _, result = tk.run(tk.kernel(body), image, cells, commands, policy=Policy(mode), check=False)
    assert ("race" in texts(result)) == (not before_release), texts(result)


def test_uninitialised_cells() -> None:
    source = tk.kernel(f"@%p1 {tk.COMMIT[1]}", 32)
    start, end = source.index("ld.global.v4.b32"), source.index("tcgen05.wait::st")
    source = source[:start] + source[end:]
    with pytest.raises(EmulationError, match="uninitialised"):
        tk.run(source, np.zeros((1, 16), np.uint8), np.zeros((1, 128, 32), np.uint32), [])


def test_counters(rng) -> None:
    before = np.zeros((1, 128, 64), np.uint32)
    _, result = tk.run(tk.kernel(f"@%p1 {tk.COMMIT[1]}"), np.zeros((1, 16), np.uint8), before, [])
    assert result.counters.tmem_read_bytes == result.counters.tmem_write_bytes == before.nbytes
