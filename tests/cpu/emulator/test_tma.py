"""Tensor copies: boxes of every rank, swizzle and position against NumPy, and what is found."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from cute_fmha.emulator.machine import Policy, UnmodelledError, run_ptx
from cute_fmha.emulator.tensormap import describe, tensor_map

POLICIES = ["eager", "lazy", "random"]
SWIZZLES = [0, 32, 64, 128]
ROOM = 16384
HEADER = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .align 64 .b8 map[128], .param .u64 p0, .param .align 4 .b8 at[20],
                       .param .u32 shift)
{{
    .reg .b16 %h<8>; .reg .b32 %r<60>; .reg .b64 %d<60>; .reg .pred %p<8>;
    .shared .align 1024 .b8 room[{room}];
    .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, room;
    mov.u32 %r2, bar;
    ld.param.u32 %r3, [shift];
    add.u32 %r3, %r1, %r3;
    setp.eq.u32 %p0, %r0, 0;
    mov.u64 %d1, map;
    cvta.param.u64 %d1, %d1;
    ld.param.u64 %d0, [p0];
    ld.param.b32 %r10, [at]; ld.param.b32 %r11, [at+4]; ld.param.b32 %r12, [at+8];
    ld.param.b32 %r13, [at+12]; ld.param.b32 %r14, [at+16];
    {body}
    ret;
}}
"""
COORDINATES = ["%r10", "%r11", "%r12", "%r13", "%r14"]
INIT = """
    @%p0 mbarrier.init.shared.b64 [%r2], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
WAIT = """
    again:
    mbarrier.try_wait.parity.shared.b64 %p7, [%r2], 0;
    @!%p7 bra again;
"""
FILL = """
    mov.u32 %r20, %r0;
    fill:
    mad.lo.u32 %r21, %r20, 16, %r1; mad.wide.u32 %d5, %r20, 16, %d0;
    ld.global.v4.b32 {{%r22, %r23, %r24, %r25}}, [%d5];
    st.shared.v4.b32 [%r21], {{%r22, %r23, %r24, %r25}};
    add.u32 %r20, %r20, 32; setp.lt.u32 %p6, %r20, {chunks}; @%p6 bra fill;
"""
DUMP = """
    mov.u32 %r20, %r0;
    dump:
    mad.lo.u32 %r21, %r20, 16, %r1; mad.wide.u32 %d5, %r20, 16, %d0;
    ld.shared.v4.b32 {{%r22, %r23, %r24, %r25}}, [%r21];
    st.global.v4.b32 [%d5], {{%r22, %r23, %r24, %r25}};
    add.u32 %r20, %r20, 32; setp.lt.u32 %p6, %r20, {chunks}; @%p6 bra dump;
"""


def aligned(shape: tuple[int, ...], dtype: type | str, rng: np.random.Generator | None = None):
    """An array at a multiple of 128 bytes: random bytes or zeros."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128, np.uint8)
    part = raw[-raw.ctypes.data % 128 :][:size]
    if rng is not None:
        part[:] = rng.integers(0, 256, size, dtype=np.uint8)
    return part.view(dtype).reshape(shape)


def packed(coordinates) -> bytes:
    return struct.pack("<5i", *coordinates, *[0] * (5 - len(coordinates)))


def kernel(body: str) -> str:
    return HEADER.format(body=body, room=ROOM)


def vector(rank: int) -> str:
    return "{" + ", ".join(COORDINATES[:rank]) + "}"


def load_kernel(rank: int, box_bytes: int, *, space: str = "shared::cluster") -> str:
    return kernel(
        INIT
        + FILL.format(chunks=ROOM // 16)
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {box_bytes};
    @%p0 cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile [%d1, {vector(rank)}];
    @%p0 cp.async.bulk.tensor.{rank}d.{space}.global.tile.mbarrier::complete_tx::bytes
        [%r3], [%d1, {vector(rank)}], [%r2];
    """
        + WAIT
        + DUMP.format(chunks=ROOM // 16)
    )


def store_kernel(rank: int, operation: str = "cp.async.bulk.tensor", verb: str = "") -> str:
    return kernel(
        FILL.format(chunks=ROOM // 16)
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 exit;
    {operation}.{rank}d.global.shared::cta{verb}.tile.bulk_group [%d1, {vector(rank)}], [%r3];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    )


# ---------------------------------------------------------------- the model


def place(byte: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the byte of a dense box lies: within every line of 128 bytes, 16-byte chunks are
    exchanged by the line's number. 128: eight chunks by the number modulo 8; 64: groups of four by
    the number modulo 4; 32: pairs by the number modulo 2."""
    if not swizzle:
        return byte
    group = swizzle // 16
    line, within = byte // 128, byte % 128
    chunk, rest = within // 16, within % 16
    chunk = chunk // group * group + np.bitwise_xor(chunk % group, line % group)
    return line * 128 + chunk * 16 + rest


def box_places(shape, item_bytes: int, shift: int, swizzle: int) -> np.ndarray:
    """Of every byte of a box, in order: rows begin a swizzle's width apart."""
    row_bytes = shape[-1] * item_bytes
    rows = int(np.prod(shape[:-1]))
    starts = np.arange(rows) * (swizzle or row_bytes)
    return place((shift + starts[:, None] + np.arange(row_bytes)).reshape(-1), swizzle)


def take_box(array, coordinates, box, steps, outside) -> np.ndarray:
    """The box, out of bounds `outside`; coordinates have the contiguous dimension first."""
    counts = [-(-extent // step) for extent, step in zip(box, steps, strict=True)]
    out = np.full(counts, outside, array.dtype)
    ranges = []
    for axis, count in enumerate(counts):
        start = coordinates[::-1][axis]
        ranges.append([start + i * steps[axis] for i in range(count)])
    for index in itertools.product(*(range(count) for count in counts[:-1])):
        at = [ranges[axis][i] for axis, i in enumerate(index)]
        if all(0 <= a < size for a, size in zip(at, array.shape, strict=False)):
            last = np.array(ranges[-1])
            good = (last >= 0) & (last < array.shape[-1])
            inside = (*index, good)
            out[inside] = array[tuple(at)][last[good]]
    return out


def put_box(array, coordinates, box, values, combine=None) -> None:
    """The inverse: writes what is in bounds."""
    for index in np.ndindex(*box):
        at = tuple(start + i for start, i in zip(coordinates[::-1], index, strict=True))
        if all(0 <= a < size for a, size in zip(at, array.shape, strict=True)):
            array[at] = combine(array[at], values[index]) if combine else values[index]


def shared_image(initial: np.ndarray, dense: np.ndarray, shift: int, swizzle: int) -> np.ndarray:
    image = initial.view(np.uint8).copy().reshape(-1)
    data = np.ascontiguousarray(dense).view(np.uint8).reshape(-1)
    image[box_places(dense.shape, dense.itemsize, shift, swizzle)] = data
    return image


def random_case(rank: int, dtype: str, swizzle: int, rng: np.random.Generator):
    """Shape, box (both contiguous last) and coordinates (contiguous first) around the tensor."""
    size = np.dtype(dtype).itemsize
    per_chunk = 16 // size
    widest = (swizzle or 256) // 16
    inner = per_chunk * int(rng.choice([c for c in (1, 2, 4, 8, 16) if c <= widest]))
    box = [1] * (rank - 1) + [inner]
    while True:
        axis = int(rng.integers(0, rank)) if rank > 1 else 0
        if axis == rank - 1 or box[axis] > 127 or int(np.prod(box)) * 2 * size > 8192:
            break
        box[axis] = box[axis] * 2 + int(rng.integers(0, 2))
    if int(np.prod(box[:-1])) * max(inner * size, swizzle) > 12288:
        box = [1] * (rank - 1) + [inner]
    shape = [int(rng.integers(1, 2 * extent + 2)) for extent in box]
    shape[-1] = -(-shape[-1] // per_chunk) * per_chunk
    at = [int(rng.integers(-extent - 1, n + 2)) for extent, n in zip(box, shape, strict=True)]
    at[-1] = at[-1] // per_chunk * per_chunk
    return tuple(shape), box, at[::-1]


# ---------------------------------------------------------------- loads


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_loads(rank: int, swizzle: int, rng: np.random.Generator) -> None:
    for trial in range(5):
        dtype = ["uint8", "uint16", "uint32", "uint64"][int(rng.integers(4))]
        shape, box, at = random_case(rank, dtype, swizzle, rng)
        if trial == 0:
            at = [0] * rank
        array = aligned(shape, dtype, rng)
        dense = take_box(array, at, box, [1] * rank, 0)
        shift = 128 * int(rng.integers(0, 16))
        out = aligned((ROOM,), np.uint8, rng)
        expected = shared_image(out, dense, shift, swizzle)
        source = load_kernel(rank, dense.nbytes)
        policy = Policy(POLICIES[trial % 3], seed=trial)
        descriptor = tensor_map(array, box, swizzle=swizzle)
        print(shape, box, at, dtype, shift, describe(descriptor))
        result = run_ptx(source, descriptor, out, packed(at), shift, policy=policy, memory=[array])
        np.testing.assert_array_equal(out, expected)
        assert result.counters.tma_load_bytes == dense.nbytes


@pytest.mark.parametrize("side", ["left", "right", "below", "above", "corner", "nothing", "far"])
def test_every_side_out_of_bounds(side: str, rng: np.random.Generator) -> None:
    array, out = aligned((20, 48), np.uint16, rng), aligned((ROOM,), np.uint8, rng)
    at = {
        "left": (-8, 3),
        "right": (32, 3),
        "below": (8, -3),
        "above": (8, 15),
        "corner": (-24, -2),
        "nothing": (-32, 0),
        "far": (2**31 - 8, -(2**31)),
    }[side]
    dense = take_box(array, at, [8, 32], [1, 1], 0)
    expected = shared_image(out, dense, 0, 64)
    descriptor = tensor_map(array, (8, 32), swizzle=64)
    run_ptx(load_kernel(2, 512), descriptor, out, packed(at), 0, memory=[array])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_filled_with_nan(dtype: str, rng: np.random.Generator) -> None:
    plain = {"bfloat16": "uint16"}.get(dtype, dtype)
    array, out = aligned((8, 16), plain), aligned((ROOM,), np.uint8)
    array[:] = rng.integers(1, 9, array.shape)
    descriptor = tensor_map(array, (4, 16), dtype=dtype, fill="nan")
    size = array.itemsize
    left = 16 // size
    run_ptx(load_kernel(2, 64 * size), descriptor, out, packed((-left, 6)), 0, memory=[array])
    got = out[: 64 * size].view(plain).reshape(4, 16)
    if dtype == "bfloat16":
        values = (got.astype(np.uint32) << 16).view(np.float32)
        inside = values[:2, left:]
        np.testing.assert_array_equal(got[:2, left:], array[6:, :-left])
    else:
        values = got
        inside = values[:2, left:]
        np.testing.assert_array_equal(inside, array[6:, :-left])
    assert np.isnan(values[2:]).all()
    assert np.isnan(values[:, :left]).all()
    assert not np.isnan(inside).any()


def test_element_strides(rng: np.random.Generator) -> None:
    array, out = aligned((9, 17, 32), np.uint32, rng), aligned((ROOM,), np.uint8, rng)
    box, steps, at = (4, 9, 16), (2, 3, 1), (8, -3, 4)
    dense = take_box(array, at, box, steps, 0)
    assert dense.shape == (2, 3, 16)
    expected = shared_image(out, dense, 0, 64)
    descriptor = tensor_map(array, box, element_strides=steps, swizzle=64)
    run_ptx(load_kernel(3, dense.nbytes), descriptor, out, packed(at), 0, memory=[array])
    np.testing.assert_array_equal(out, expected)


def test_strided_and_broadcast_dimensions(rng: np.random.Generator) -> None:
    memory, out = aligned((4, 32, 64), np.uint16, rng), aligned((ROOM,), np.uint8, rng)
    view = memory[:, ::2, 16:48]
    dense = take_box(view, (8, 1, 2), (2, 8, 16), (1, 1, 1), 0)
    expected = shared_image(out, dense, 0, 0)
    descriptor = tensor_map(view, (2, 8, 16))
    run_ptx(load_kernel(3, dense.nbytes), descriptor, out, packed((8, 1, 2)), 0, memory=[memory])
    np.testing.assert_array_equal(out, expected)
    repeated = np.broadcast_to(memory[0, :8, :16], (5, 8, 16))
    descriptor = tensor_map(repeated, (3, 8, 16))
    out[:] = 0
    source = load_kernel(3, 3 * 8 * 32)
    run_ptx(source, descriptor, out, packed((0, 0, 1)), 0, memory=[memory])
    np.testing.assert_array_equal(out[: 3 * 256].reshape(3, 256), np.tile(out[:256], (3, 1)))
    np.testing.assert_array_equal(out[:256].view(np.uint16).reshape(8, 16), memory[0, :8, :16])


@pytest.mark.parametrize("policy", POLICIES)
def test_gather4(policy: str, rng: np.random.Generator) -> None:
    array, out = aligned((50, 128), np.uint16, rng), aligned((ROOM,), np.uint8, rng)
    rows = [17, -1, 3, 50]
    dense = np.zeros((4, 64), np.uint16)
    dense[0], dense[2] = array[17, 32:96], array[3, 32:96]
    expected = shared_image(out, dense, 256, 128)
    source = load_kernel(2, 512, space="shared::cta").replace(
        ".global.tile.", ".global.tile::gather4."
    )
    source = source.replace("L2.global.tile ", "L2.global.tile::gather4 ")
    source = source.replace(vector(2), vector(5))
    descriptor = tensor_map(array, (1, 64), swizzle=128)
    at = packed([32, *rows])
    run_ptx(source, descriptor, out, at, 256, policy=Policy(policy), memory=[array])
    np.testing.assert_array_equal(out, expected)


LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
MULTICAST = (
    INIT
    + """
    mov.u32 %r30, %cluster_ctarank;
    setp.ne.and.u32 %p1, %r30, 1, %p0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 512;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    setp.eq.and.u32 %p1, %r30, 2, %p0;
    mov.b16 %h1, 13;
    @%p1 LOAD.multicast::cluster [%r3], [%d1, {%r10, %r11}], [%r2], %h1;
    setp.eq.u32 %p2, %r30, 1;
    @%p2 bra leave;
    """
    + WAIT
    + """
    mad.lo.u32 %r31, %r0, 16, %r3;
    ld.shared.v4.b32 {%r22, %r23, %r24, %r25}, [%r31];
    mad.lo.u32 %r32, %r30, 32, %r0; mad.wide.u32 %d5, %r32, 16, %d0;
    st.global.v4.b32 [%d5], {%r22, %r23, %r24, %r25};
    leave:
    @%p2 st.shared.b32 [%r1], 0;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
)


@pytest.mark.parametrize("policy", POLICIES)
def test_multicast(policy: str, rng: np.random.Generator) -> None:
    array, out = aligned((16, 32), np.uint16, rng), aligned((4, 512), np.uint8)
    dense = take_box(array, (0, 5), (8, 32), (1, 1), 0)
    descriptor = tensor_map(array, (8, 32), swizzle=64)
    result = run_ptx(
        kernel(MULTICAST.replace("LOAD", LOAD)),
        descriptor,
        out,
        packed((0, 5)),
        1024,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        policy=Policy(policy, seed=9),
        memory=[array],
    )
    image = shared_image(np.zeros(512, np.uint8), dense, 0, 64)
    for rank in (0, 2, 3):
        np.testing.assert_array_equal(out[rank], image)
    assert not out[1].any()
    assert result.counters.tma_multicast_bytes == 1024


PAIR = (
    INIT
    + """
    mov.u32 %r30, %cluster_ctarank;
    and.b32 %r33, %r30, 1;
    setp.eq.u32 %p1, %r33, 0;
    setp.eq.and.u32 %p2, %r33, 0, %p0;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    and.b32 %r34, %r2, 0xFEFFFFFF;
    shl.b32 %r35, %r30, 3; add.s32 %r11, %r11, %r35;
    @%p0 LOAD.cta_group::2 [%r3], [%d1, {%r10, %r11}], [%r34];
    @!%p1 bra ready;
    """
    + WAIT
    + """
    ready:
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mad.lo.u32 %r31, %r0, 16, %r3;
    ld.shared.v4.b32 {%r22, %r23, %r24, %r25}, [%r31];
    mad.lo.u32 %r32, %r30, 32, %r0; mad.wide.u32 %d5, %r32, 16, %d0;
    st.global.v4.b32 [%d5], {%r22, %r23, %r24, %r25};
    """
)


@pytest.mark.parametrize("policy", POLICIES)
def test_pairs_report_to_the_even_cta(policy: str, rng: np.random.Generator) -> None:
    array, out = aligned((32, 32), np.uint16, rng), aligned((4, 512), np.uint8)
    descriptor = tensor_map(array, (8, 32))
    run_ptx(
        kernel(PAIR.replace("LOAD", LOAD)),
        descriptor,
        out,
        packed((0, 0)),
        0,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        policy=Policy(policy, seed=9),
        memory=[array],
    )
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 32), array)


def test_the_barrier_of_another_cta_needs_a_pair() -> None:
    array, out = aligned((32, 32), np.uint16), aligned((4, 512), np.uint8)
    source = kernel(PAIR.replace("LOAD", LOAD).replace(".cta_group::2", ""))
    result = run_ptx(
        source,
        tensor_map(array, (8, 32)),
        out,
        packed((0, 0)),
        0,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        memory=[array],
        check=False,
    )
    assert "barrier" in {finding.kind for finding in result.findings}


@pytest.mark.parametrize("where", ["global", "const"])
def test_maps_outside_of_the_parameters(where: str, rng: np.random.Generator) -> None:
    array, out = aligned((8, 8), np.uint16, rng), aligned((ROOM,), np.uint8, rng)
    descriptor = tensor_map(array, (8, 8))
    expected = shared_image(out, array, 0, 0)
    values = ", ".join(str(byte) for byte in descriptor)
    source = load_kernel(2, 128).replace(
        ".visible", f".{where} .align 64 .b8 other[128] = {{{values}}};\n.visible", 1
    )
    source = source.replace(
        "cvta.param.u64 %d1, %d1;", f"mov.u64 %d1, other; cvta.{where}.u64 %d1, %d1;"
    )
    run_ptx(source, bytes(128), out, packed((0, 0)), 0, memory=[array])
    np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------- stores and reductions


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_stores(rank: int, swizzle: int, rng: np.random.Generator) -> None:
    for trial in range(5):
        dtype = ["uint8", "uint16", "uint32", "uint64"][int(rng.integers(4))]
        shape, box, at = random_case(rank, dtype, swizzle, rng)
        at = [0 if trial == 0 else max(x, 0) for x in at]
        array = aligned(shape, dtype, rng)
        shift = 128 * int(rng.integers(0, 16))
        image = aligned((ROOM,), np.uint8, rng)
        bytes_ = int(np.prod(box)) * array.itemsize
        values = image[box_places(box, array.itemsize, shift, swizzle)].view(dtype).reshape(box)
        expected = array.copy()
        put_box(expected, at, box, values)
        descriptor = tensor_map(array, box, swizzle=swizzle)
        policy = Policy(POLICIES[trial % 3], seed=trial)
        print(shape, box, at, dtype, shift, describe(descriptor))
        source = store_kernel(rank)
        result = run_ptx(
            source, descriptor, image, packed(at), shift, policy=policy, memory=[array]
        )
        np.testing.assert_array_equal(array, expected)
        assert result.counters.tma_store_bytes == bytes_


REDUCTIONS = [
    ("add", "uint32"), ("min", "uint32"), ("max", "int32"), ("and", "uint32"), ("or", "uint64"),
    ("xor", "uint32"), ("add", "float32"), ("add", "float16"), ("max", "float16"),
    ("inc", "uint32"), ("dec", "uint32"), ("add", "bfloat16"), ("min", "int64"),
]  # fmt: skip


def combine(verb: str, dtype: str):
    def bfloat(a: int, b: int) -> int:
        x = np.array([a, b], np.uint32) << 16
        total = np.float32(x.view(np.float32)[0] + x.view(np.float32)[1]).view(np.uint32)
        return int((int(total) + 0x7FFF + (int(total) >> 16 & 1)) >> 16)

    if dtype == "bfloat16":
        return bfloat
    return {
        "add": lambda a, b: a + b,
        "min": min,
        "max": max,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "inc": lambda a, b: 0 if a >= b else a + 1,
        "dec": lambda a, b: b if a == 0 or a > b else a - 1,
    }[verb]


@pytest.mark.parametrize(("verb", "dtype"), REDUCTIONS)
def test_reductions(verb: str, dtype: str, rng: np.random.Generator) -> None:
    plain = {"bfloat16": "uint16"}.get(dtype, dtype)
    size = np.dtype(plain).itemsize
    array = aligned((12, 64 // size), plain, rng)
    image = aligned((ROOM,), np.uint8, rng)
    box = [8, 32 // size]
    if dtype.startswith("float"):
        array[:] = rng.standard_normal(array.shape)
        image.view(plain)[:] = rng.standard_normal(ROOM // size)
    elif dtype == "bfloat16":
        for target in (array.reshape(-1), image.view(np.uint16)):
            numbers = rng.standard_normal(target.size).astype(np.float32)
            target[:] = numbers.view(np.uint32) >> 16
    at = [16 // size, 6]
    values = image[place(np.arange(256), 32)].view(plain).reshape(box)
    expected = array.copy()
    with np.errstate(over="ignore"):
        put_box(expected, at, box, values, combine(verb, dtype))
    descriptor = tensor_map(array, box, dtype=dtype, swizzle=32)
    source = store_kernel(2, "cp.reduce.async.bulk.tensor", f".{verb}")
    run_ptx(source, descriptor, image, packed(at), 0, policy=Policy("lazy"), memory=[array])
    np.testing.assert_array_equal(array, expected)


def test_scatter4(rng: np.random.Generator) -> None:
    array, image = aligned((20, 32), np.uint32, rng), aligned((ROOM,), np.uint8, rng)
    values = image[place(np.arange(256), 64)].view(np.uint32).reshape(4, 16)
    expected = array.copy()
    expected[7, 8:24], expected[0, 8:24] = values[0], values[3]
    source = store_kernel(2).replace(".tile.", ".tile::scatter4.").replace(vector(2), vector(5))
    descriptor = tensor_map(array, (1, 16), swizzle=64)
    run_ptx(source, descriptor, image, packed([8, 7, -1, 20, 0]), 0, memory=[array])
    np.testing.assert_array_equal(array, expected)


EARLY = """
    mad.lo.u32 %r21, %r0, 16, %r1;
    st.shared.v4.b32 [%r21], {{%r0, %r0, %r0, %r0}};
    {fence}
    bar.sync 0;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d1, {{%r10, %r11}}], [%r1];
    @%p0 cp.async.bulk.commit_group;
    {wait}
    bar.sync 0;
    st.shared.b32 [%r21], 77;
    {last}
"""
READ = "cp.async.bulk.wait_group.read 0;"


@pytest.mark.parametrize("policy", POLICIES)
def test_overwriting_the_source_of_a_store(policy: str) -> None:
    array, unused = aligned((8, 16), np.uint32), aligned((16,), np.uint8)
    descriptor = tensor_map(array, (8, 16))

    def run(wait: str, fence: str = "fence.proxy.async.shared::cta;"):
        array[:] = 0
        last = "@%p0 cp.async.bulk.wait_group 0;"
        return run_ptx(
            kernel(EARLY.format(wait=wait, fence=fence, last=last)),
            descriptor,
            unused,
            packed((0, 0)),
            0,
            policy=Policy(policy),
            memory=[array],
            check=False,
        )

    right = np.repeat(np.arange(32, dtype=np.uint32), 4).reshape(8, 16)
    assert run(f"@%p0 {READ}").ok
    np.testing.assert_array_equal(array, right)
    early = run("")
    assert "race" in {finding.kind for finding in early.findings}
    if policy == "lazy":
        assert (array == 77).any()
    unfenced = run(f"@%p0 {READ}", fence="")
    assert {finding.kind for finding in unfenced.findings} == {"proxy"}
    # another lane's wait covers only that lane's groups
    elsewhere = run("setp.eq.u32 %p3, %r0, 1; @%p3 " + READ)
    assert "race" in {finding.kind for finding in elsewhere.findings}


# ---------------------------------------------------------------- what must be found


def broken(descriptor: bytes, offset: int, value: int, form: str = "<I") -> bytes:
    changed = bytearray(descriptor)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def flags(descriptor: bytes, clear: int, set_: int) -> bytes:
    old = struct.unpack_from("<I", descriptor, 8)[0]
    return broken(descriptor, 8, old & ~clear | set_)


@pytest.mark.parametrize(("dtype", "swizzle", "inner"), [
    ("uint16", 0, 3), ("uint16", 64, -1), ("float32", 128, 2), ("uint8", 32, 15), ("float64", 0, 1),
])  # fmt: skip
def test_boxes_begin_at_16_bytes(dtype: str, swizzle: int, inner: int) -> None:
    """Hopper fails with an illegal instruction otherwise."""
    array, out = aligned((16, 64), dtype), aligned((ROOM,), np.uint8)
    box = (4, (swizzle or 64) // array.itemsize)
    descriptor = tensor_map(array, box, swizzle=swizzle)
    bytes_ = 4 * (swizzle or 64)
    sources = [load_kernel(2, bytes_), store_kernel(2)]
    if dtype == "float32":
        sources.append(store_kernel(2, "cp.reduce.async.bulk.tensor", ".add"))
    for source in sources:
        for at, right in ((inner, False), (inner * 16 // array.itemsize, True)):
            where = packed((at, 1))
            result = run_ptx(source, descriptor, out, where, 0, memory=[array], check=False)
            # Neither does a store begin at a negative coordinate.
            fine = right and (at >= 0 or source is sources[0])
            assert {finding.kind for finding in result.findings} == (
                set() if fine else {"descriptor"}
            )


def test_rows_narrower_than_the_swizzle_need_its_room() -> None:
    """90 rows of 16 bytes, 32 bytes apart: more than the 1440 bytes that are copied."""
    array, out = aligned((90, 4), np.float32), aligned((ROOM,), np.uint8)
    descriptor = tensor_map(array, (90, 4), swizzle=32)
    for shift, right in ((ROOM - 90 * 32 & ~127, True), (ROOM - 2048, False)):
        source = load_kernel(2, 1440)
        result = run_ptx(
            source, descriptor, out, packed((0, 0)), shift, memory=[array], check=False
        )
        assert ("bounds" in {finding.kind for finding in result.findings}) != right


FAULTS = {
    "zeros": lambda d: bytes(128),
    "other rank": lambda d: flags(d, 0x70, 2 << 4),
    "rank 8": lambda d: flags(d, 0x70, 7 << 4),
    "type": lambda d: flags(d, 15 << 7, 14 << 7),
    "interleave": lambda d: flags(d, 0, 1 << 11),
    "tf32": lambda d: flags(d, 0, 1 << 16),
    "atomicity": lambda d: flags(d, 0, 1 << 19),
    "nan for integers": lambda d: flags(d, 15 << 7, 1 << 7 | 1 << 15),
    "address": lambda d: broken(d, 0, struct.unpack_from("<Q", d, 0)[0] + 8, "<Q"),
    "box of 12 bytes": lambda d: broken(d, 55, 5, "<B"),
    "box wider than the swizzle": lambda d: broken(d, 55, 127, "<B"),
    "box larger than shared memory": lambda d: broken(
        flags(d, 3 << 13 | 15 << 7, 4 << 7), 55, 0xFFFF, "<H"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_descriptor_faults(fault: str, rng: np.random.Generator) -> None:
    array, out = aligned((1024, 1024), np.float16), aligned((ROOM,), np.uint8, rng)
    descriptor = tensor_map(array, (8, 64), swizzle=128)
    source = load_kernel(2, 1024)
    run_ptx(source, descriptor, out, packed((0, 0)), 0, memory=[array])
    changed = FAULTS[fault](descriptor)
    assert describe(changed)
    result = run_ptx(source, changed, out, packed((0, 0)), 0, memory=[array], check=False)
    assert "descriptor" in {finding.kind for finding in result.findings}


def test_position_faults(rng: np.random.Generator) -> None:
    array, out = aligned((16, 64), np.uint16), aligned((ROOM,), np.uint8, rng)
    descriptor = tensor_map(array, (8, 64), swizzle=128)
    source = load_kernel(2, 1024)

    def kinds(shift: int = 0, code: str = source, **options) -> set[str]:
        options = {"memory": [array]} | options
        result = run_ptx(code, descriptor, out, packed((0, 0)), shift, check=False, **options)
        return {finding.kind for finding in result.findings}

    assert not kinds(128)
    assert kinds(64) == {"alignment"}
    assert "bounds" in kinds(1 << 18)
    assert "bounds" in kinds(memory=[array[:4]])
    assert kinds(code=load_kernel(2, 1008))
    assert kinds(code=load_kernel(2, 1040))
    unaligned = source.replace(
        "cvta.param.u64 %d1, %d1;", "cvta.param.u64 %d1, %d1; add.u64 %d1, %d1, 32;"
    )
    assert kinds(code=unaligned) == {"alignment"}
    in_shared = source.replace(
        "cvta.param.u64 %d1, %d1;", "cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d1, %d1;"
    )
    assert kinds(code=in_shared) == {"descriptor"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".global.tile.mbarrier", ".global.im2col.mbarrier"),
        (".global.tile.mbarrier", ".global.tile.cta_group::3.mbarrier"),
        (".2d.shared", ".6d.shared"),
        ("[%d1, {%r10, %r11}], [%r2]", "[%d1, {%r10, %r11, %r12}], [%r2]"),
        ("complete_tx::bytes", "complete_tx::bytes.multicast::cluster"),
    ],
)
def test_refused(old: str, new: str) -> None:
    source = load_kernel(2, 1024)
    assert old in source
    with pytest.raises(UnmodelledError, match=r"cp\.async\.bulk\.tensor"):
        run_ptx(source.replace(old, new), bytes(128), aligned((16,), np.uint8), packed((0, 0)), 0)


def test_description() -> None:
    array = aligned((300, 24, 64), np.float16)
    text = describe(
        tensor_map(array, (2, 8, 64), swizzle=128, fill="nan", element_strides=(1, 2, 1))
    )
    assert text == (
        f"f16 tensor at {array.ctypes.data:#x}, sizes [64, 24, 300], strides [2, 128, 3072] bytes, "
        "box [64, 8, 2], swizzle 128 bytes, element strides [1, 2, 1], filled with NaN"
    )
    with pytest.raises(ValueError, match="box"):
        tensor_map(array, (2, 8, 512))
    with pytest.raises(ValueError, match="stride"):
        tensor_map(np.zeros((4, 3), np.float16), (1, 3))
