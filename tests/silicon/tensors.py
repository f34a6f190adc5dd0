"""Tensor copies: boxes of every rank, swizzle and position; stores, reductions, multicast."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from silicon.model import (
    CLUSTER_SYNC,
    ITEM_BYTES,
    PLAIN,
    Buffer,
    Case,
    Map,
    entry,
    generator,
    output,
    random_bytes,
    wait,
)

GROUP = "tensors"
ROOM = 4096
SWIZZLES = (0, 32, 64, 128)
LOAD = "cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
#: The words of a kernel: five coordinates, where in shared memory, how many bytes.
SHIFT, BYTES = "%w5", "%w6"


def vector(rank: int) -> str:
    return "{" + ", ".join(f"%w{i}" for i in range(rank)) + "}"


def words(at: tuple[int, ...], shift: int, size: int) -> bytes:
    return struct.pack("<5i2I", *at, *[0] * (5 - len(at)), shift, size)


# Shared memory starts as words that count, so that what a copy leaves alone is seen.
MARK = f"""
    mov.u32 %r10, %t;
    mark:
    mad.lo.u32 %r11, %r10, 4, %room; mad.lo.u32 %r12, %r10, 0x10001, 0xabcd1234;
    st.shared.b32 [%r11], %r12;
    add.u32 %r10, %r10, 32; setp.lt.u32 %p1, %r10, {ROOM // 4}; @%p1 bra mark;
    fence.proxy.async.shared::cta;
"""
FILL = f"""
    mov.u32 %r10, %t;
    fill:
    mad.lo.u32 %r11, %r10, 4, %room; mad.wide.u32 %d5, %r10, 4, %a0;
    ld.global.b32 %r12, [%d5]; st.shared.b32 [%r11], %r12;
    add.u32 %r10, %r10, 32; setp.lt.u32 %p1, %r10, {ROOM // 4}; @%p1 bra fill;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""
DUMP = f"""
    mov.u32 %r10, %t;
    dump:
    mad.lo.u32 %r11, %r10, 4, %room; mad.wide.u32 %d5, %r10, 4, %a0;
    ld.shared.b32 %r12, [%r11]; st.global.b32 [%d5], %r12;
    add.u32 %r10, %r10, 32; setp.lt.u32 %p1, %r10, {ROOM // 4}; @%p1 bra dump;
"""
INIT = """
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 1;
    @%p0 fence.mbarrier_init.release.cluster;
"""


def load_kernel(rank: int) -> str:
    body = f"""
    {MARK} {INIT}
    fence.proxy.async.shared::cta; bar.sync 0;
    add.u32 %r1, %room, {SHIFT};
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {BYTES};
    @%p0 cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile [%m0, {vector(rank)}];
    @%p0 {LOAD.format(rank=rank)} [%r1], [%m0, {vector(rank)}], [%bar];
    {wait("again")}
    {DUMP}
    """
    return entry(f"tensor_load_{rank}d", body, 1, maps=1, words=7, room=ROOM)


def store_kernel(rank: int, verb: str = "") -> str:
    name = f"tensor_{verb or 'store'}_{rank}d"
    operation = f"cp.{'reduce.' if verb else ''}async.bulk.tensor"
    body = f"""
    {FILL}
    add.u32 %r1, %room, {SHIFT};
    @!%p0 exit;
    {operation}.{rank}d.global.shared::cta{"." + verb if verb else ""}.tile.bulk_group
        [%m0, {vector(rank)}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    return entry(name, body, 1, maps=1, words=7, room=ROOM)


def box_bytes(m: Map) -> int:
    steps = m.steps or (1,) * len(m.box)
    counts = [-(-extent // step) for extent, step in zip(m.box, steps, strict=True)]
    counts[-1] = m.box[-1]
    return int(np.prod(counts)) * ITEM_BYTES[m.dtype]


def extent(m: Map) -> int:
    """Bytes of shared memory: with a swizzle, rows begin its width apart."""
    rows = box_bytes(m) // (m.box[-1] * ITEM_BYTES[m.dtype])
    return -(-rows * m.swizzle // 128) * 128 if m.swizzle else box_bytes(m)


def load(name: str, m: Map, at: tuple[int, ...], shift: int = 0) -> Case:
    """`at` has the contiguous dimension first, as in PTX."""
    rank = len(m.shape)
    out = output(ROOM // 4)
    arguments = (out, m, words(at, shift, box_bytes(m)))
    return Case(name, f"tensor_load_{rank}d", load_kernel(rank), arguments)


def store(name: str, m: Map, at: tuple[int, ...], shift: int = 0, verb: str = "") -> Case:
    """A store; Hopper refuses negative coordinates there (see `failing`)."""
    rank = len(m.shape)
    if ITEM_BYTES[m.dtype] and m.dtype.startswith(("float", "bfloat")) and verb:
        shared = floats(name + " box", m.dtype, ROOM // ITEM_BYTES[m.dtype]).view(np.uint8)
    else:
        shared = random_bytes(name + " box", ROOM)
        if verb in ("inc", "dec"):
            shared.view(np.uint32)[:] %= 7
    text = store_kernel(rank, verb)
    arguments = (Buffer(shared), m, words(at, shift, 0))
    return Case(name, f"tensor_{verb or 'store'}_{rank}d", text, arguments)


def copy(stores: bool) -> Callable[..., Case]:
    def inside(name: str, m: Map, at: tuple[int, ...], shift: int = 0) -> Case:
        return store(name, m, tuple(max(x, 0) for x in at), shift)

    return inside if stores else load


def numbers(rng: np.random.Generator, count: int, exponents: int) -> np.ndarray:
    """Floats of several magnitudes, by exact operations alone: the same on every processor."""
    whole = rng.integers(-(1 << 52), 1 << 52, count).astype(np.float64)
    return np.ldexp(whole, rng.integers(-exponents, exponents, count, dtype=np.int32) - 51)


def floats(name: str, dtype: str, count: int) -> np.ndarray:
    """With subnormal numbers, infinities and NaNs among them."""
    rng = generator(name)
    x = numbers(rng, count, 5)
    x[::31], x[7::31], x[11::61] = 0.0, -np.inf, np.nan
    tiny = {"float16": 2.0**-22, "float64": 2.0**-1040}.get(dtype, 2.0**-130)
    x[3::13] = tiny * rng.integers(-9, 10, len(x[3::13]))
    if dtype == "bfloat16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def tensor(name: str, shape: tuple[int, ...], dtype: str, written: bool = False) -> Buffer:
    size = int(np.prod(shape)) * ITEM_BYTES[dtype]
    data = random_bytes(name, size).view(PLAIN[dtype]).reshape(shape)
    return Buffer(data, output=written)


def geometry(
    name: str, rank: int, dtype: str, swizzle: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape and box (contiguous last), and coordinates (contiguous first) in and around it: those
    of the contiguous dimension have to be multiples of 16 bytes, or the kernel fails."""
    rng = generator(name + " geometry")
    size = ITEM_BYTES[dtype]
    chunk = 16 // size
    widest = (swizzle or 256) // 16
    inner = chunk * int(rng.choice([c for c in (1, 2, 4, 8, 16) if c <= widest]))
    box = [1] * (rank - 1) + [min(inner, 256)]
    for _ in range(12):
        axis = int(rng.integers(0, rank))
        grown = box[axis] * 2 + int(rng.integers(0, 2))
        rest = int(np.prod(box)) // box[axis]
        padded = grown * rest // box[-1] * max(swizzle, box[-1] * size)
        if axis < rank - 1 and padded <= 3072 and grown * rest * size <= 1536 and grown < 256:
            box[axis] = grown
    shape = [int(rng.integers(1, 2 * extent + 2)) for extent in box]
    shape[-1] = -(-shape[-1] // chunk) * chunk
    at = [int(rng.integers(1 - extent, n)) for extent, n in zip(box, shape, strict=True)]
    at[-1] = at[-1] // chunk * chunk
    return tuple(shape), tuple(box), tuple(at[::-1])


TYPES = ("uint8", "uint16", "uint32", "uint64", "int32", "float16", "bfloat16", "float32")


def _boxes() -> list[Case]:
    """Loads and stores of every rank and swizzle."""
    cases = []
    for rank in range(1, 6):
        for swizzle in SWIZZLES:
            for trial in range(3):
                for stores in (False, True):
                    verb = "store" if stores else "load"
                    name = f"tensor_{verb}_{rank}d_swizzle{swizzle}_{trial}"
                    rng = generator(name)
                    dtype = TYPES[int(rng.integers(len(TYPES)))]
                    shape, box, at = geometry(name, rank, dtype, swizzle)
                    if trial == 0:
                        at = (0,) * rank
                    m = Map(tensor(name, shape, dtype, stores), dtype, shape, box, swizzle=swizzle)
                    room = (ROOM - extent(m)) // 128 + 1
                    shift = 128 * int(rng.integers(0, room))
                    cases.append(copy(stores)(name, m, at, shift))
    return cases


SIDES = {
    "left": (-8, 3), "right": (32, 3), "below": (8, -3), "above": (8, 15), "corner": (-24, -2),
    "opposite": (40, 18), "nothing": (-32, 0), "far": (2**31 - 8, -(2**31)), "inside": (16, 7),
    "far_left": (-(2**31), 2), "far_above": (16, 2**31 - 1),
}  # fmt: skip


def _sides() -> list[Case]:
    cases = []
    for side, at in SIDES.items():
        for stores in (False, True):
            name = f"tensor_{'store' if stores else 'load'}_{side}"
            shape = (20, 48)
            m = Map(tensor(name, shape, "uint16", stores), "uint16", shape, (8, 32), swizzle=64)
            cases.append(copy(stores)(name, m, at, 512))
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        name = f"tensor_load_nan_{dtype}"
        shape = (8, 16)
        m = Map(tensor(name, shape, dtype), dtype, shape, (4, 16), fill="nan")
        chunk = 16 // ITEM_BYTES[dtype]
        cases.append(load(name, m, (-chunk, 6)))
        name = f"tensor_load_nan_far_{dtype}"
        m = Map(tensor(name, shape, dtype), dtype, shape, (4, 16), fill="nan", swizzle=0)
        cases.append(load(name, m, (chunk, 9), 128))
    return cases


def _strides() -> list[Case]:
    """Traversal strides, views, repeated rows, a tensor inside of a larger buffer."""
    cases = []
    steps = {"plain": (2, 3, 1), "inner": (2, 1, 4), "eight": (8, 7, 1), "uneven": (3, 4, 2)}
    for name_of, step in steps.items():
        for stores in (False, True):
            name = f"tensor_{'store' if stores else 'load'}_steps_{name_of}"
            shape = (9, 17, 32)
            data = tensor(name, shape, "uint32", stores)
            m = Map(data, "uint32", shape, (4, 9, 16), swizzle=64, steps=step)
            cases.append(copy(stores)(name, m, (8, -3, 4), 256))
            if step[-1] == 1 and not stores:
                cases.append(load(f"{name}_inside", m, (4, 2, 3)))
    shape = (4, 32, 64)
    for stores in (False, True):
        name = f"tensor_{'store' if stores else 'load'}_view"
        data = tensor(name, shape, "uint16", stores)
        view: dict[str, Any] = {
            "shape": (4, 16, 32), "box": (2, 8, 16), "strides": (4096, 256, 2), "offset": 32,
        }  # fmt: skip
        m = Map(data, "uint16", **view)
        cases.append(copy(stores)(name, m, (24, 1, 2)))
    name = "tensor_load_permuted"
    m = Map(
        tensor(name, shape, "uint16"), "uint16", (32, 4, 64), (5, 3, 32), strides=(128, 4096, 2),
        swizzle=64,
    )  # fmt: skip
    cases.append(load(name, m, (40, -1, 9), 384))
    name = "tensor_load_repeated"
    m = Map(
        tensor(name, shape, "uint16"), "uint16", (5, 8, 16), (3, 8, 16), strides=(0, 128, 2)
    )  # fmt: skip
    cases.append(load(name, m, (0, 0, 1)))
    name = "tensor_load_large"
    large = (512, 256)
    cases.append(load(name, Map(tensor(name, large, "uint16"), "uint16", large, (4, 64),
                                swizzle=128), (192, 500)))  # fmt: skip
    return cases


REDUCTIONS = [(verb, dtype) for verb in ("add", "min", "max") for dtype in ("uint32", "uint64")]
REDUCTIONS += [("add", "int32"), ("min", "int32"), ("max", "int32"), ("min", "int64")]
REDUCTIONS += [("max", "int64"), ("inc", "uint32"), ("dec", "uint32")]
REDUCTIONS += [(verb, dtype) for verb in ("and", "or", "xor") for dtype in ("uint32", "uint64")]
REDUCTIONS += [("add", "float32"), ("add", "float64"), ("add", "float16"), ("add", "bfloat16")]
REDUCTIONS += [(verb, dtype) for verb in ("min", "max") for dtype in ("float16", "bfloat16")]


def _reductions() -> list[Case]:
    cases = []
    for verb, dtype in REDUCTIONS:
        name = f"tensor_{verb}_{dtype}"
        size = ITEM_BYTES[dtype]
        shape, box = (12, 64 // size), (8, 32 // size)
        data = tensor(name, shape, dtype, True).data
        if "float" in dtype:
            data = floats(name, dtype, data.size).reshape(shape)
        elif verb in ("inc", "dec"):
            data = data % 7
        m = Map(Buffer(data, output=True), dtype, shape, box, swizzle=32)
        cases.append(store(name, m, (16 // size, 6), 0, verb))
    return cases


def _multicast() -> list[Case]:
    """Rank 2 loads for ranks 0, 2 and 3; every rank reports what it has."""
    body = f"""
    {MARK} {INIT}
    mov.u32 %r30, %cluster_ctarank;
    setp.ne.and.u32 %p2, %r30, 1, %p0;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {BYTES};
    {CLUSTER_SYNC}
    add.u32 %r1, %room, {SHIFT};
    setp.eq.and.u32 %p2, %r30, 2, %p0;
    mov.b16 %h1, 13;
    @%p2 {LOAD.format(rank=2)}.multicast::cluster [%r1], [%m0, {vector(2)}], [%bar], %h1;
    setp.eq.u32 %p3, %r30, 1;
    @%p3 bra leave;
    {wait("again")}
    leave:
    mad.wide.u32 %a0, %r30, {ROOM}, %a0;
    {DUMP}
    {CLUSTER_SYNC}
    """
    text = entry("tensor_multicast", body, 1, maps=1, words=7, room=ROOM)
    name, shape = "tensor_multicast", (16, 32)
    m = Map(tensor(name, shape, "uint16"), "uint16", shape, (8, 32), swizzle=64)
    arguments = (output((4, ROOM // 4)), m, words((0, 5), 1024, box_bytes(m)))
    launch: dict[str, Any] = {"grid": (4, 1, 1), "cluster": (4, 1, 1)}
    cases = [Case(name, name, text, arguments, **launch)]
    name = "tensor_load_into_a_peer"
    body = f"""
    {MARK} {INIT}
    mov.u32 %r30, %cluster_ctarank; xor.b32 %r31, %r30, 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {BYTES};
    {CLUSTER_SYNC}
    add.u32 %r1, %room, {SHIFT};
    mapa.shared::cluster.u32 %r1, %r1, %r31; mapa.shared::cluster.u32 %r2, %bar, %r31;
    mad.lo.u32 %r3, %r30, 4, %w1;
    @%p0 {LOAD.format(rank=2)} [%r1], [%m0, {{%w0, %r3}}], [%r2];
    {wait("again")}
    mad.wide.u32 %a0, %r30, {ROOM}, %a0;
    {DUMP}
    {CLUSTER_SYNC}
    """
    text = entry(name, body, 1, maps=1, words=7, room=ROOM)
    m = Map(tensor(name, shape, "uint16"), "uint16", shape, (8, 32), swizzle=64)
    arguments = (output((2, ROOM // 4)), m, words((-8, 7), 128, box_bytes(m)))
    launch = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
    return [*cases, Case(name, name, text, arguments, **launch)]


def cases() -> list[Case]:
    found = [*_boxes(), *_sides(), *_strides(), *_reductions(), *_multicast()]
    return [Case(**{**case.__dict__, "group": GROUP}) for case in found]


#: Boxes that do not begin at a multiple of 16 bytes of their rows: kind, type, swizzle, place.
UNALIGNED = [
    ("load", "uint16", 0, (3, 0)), ("load", "uint16", 64, (-1, 2)),
    ("load", "float32", 128, (2, 0)), ("load", "uint8", 32, (15, 1)),
    ("load", "uint64", 0, (1, 0)), ("store", "uint16", 0, (4, 0)),
    ("store", "float32", 64, (-2, 1)), ("add", "uint32", 0, (1, 0)),
    ("add", "float16", 128, (7, 3)),
]  # fmt: skip
NEGATIVE = [("store", "uint16", 64, (-8, 3)), ("store", "uint32", 0, (0, -1))]


def failing() -> list[Case]:
    """Kernels that end in an error."""
    found = []
    for kind, dtype, swizzle, at in (*UNALIGNED, *NEGATIVE):
        place = "negative" if (kind, dtype, swizzle, at) in NEGATIVE else "unaligned"
        name = f"{place}_{kind}_{dtype}_{swizzle}"
        size, shape = ITEM_BYTES[dtype], (16, 256 // ITEM_BYTES[dtype])
        data = tensor(name, shape, dtype, kind != "load")
        m = Map(data, dtype, shape, (4, (swizzle or 64) // size), swizzle=swizzle)
        if kind == "load":
            found.append(load(name, m, at))
        else:
            found.append(store(name, m, at, 0, "" if kind == "store" else kind))
    return [Case(**{**case.__dict__, "group": "failing"}) for case in found]


def encodings() -> list[Map]:
    """Maps whose encoding alone is compared: extreme sizes, every type, box and stride."""
    room = Buffer(np.zeros(1 << 20, np.uint8))
    maps = []
    for dtype, size in ITEM_BYTES.items():
        chunk = 16 // size
        maps += [
            Map(room, dtype, (4, chunk), (2, chunk)),
            Map(room, dtype, (1 << 20,), (256 if size * 256 <= 4096 else 64,)),
            Map(room, dtype, (3, 5, 7, 9, 64), (1, 2, 3, 4, chunk), swizzle=32),
            Map(room, dtype, (1 << 31, 2 * chunk), (256, 2 * chunk), swizzle=32, offset=4096),
            Map(
                room, dtype, (2, 3, 4, 2 * chunk), (1, 1, 1, chunk),
                strides=(0x7FFFFFFFF0, 0x1234567890, 0x100000000, size), offset=16,
            ),
            Map(room, dtype, (100, 8 * chunk), (8, 8 * chunk), swizzle=128, steps=(8, 1)),
            Map(room, dtype, (9, 9, 9, 9, chunk), (8,) * 4 + (chunk,), steps=(5, 4, 3, 2, 1),
                swizzle=64),
        ]  # fmt: skip
        if "float" in dtype:
            maps.append(Map(room, dtype, (4, chunk), (2, chunk), fill="nan", swizzle=64))
    for bytes_ in ((1 << 17) - 16, 1 << 17, (1 << 17) + 16):  # a flag tells large tensors
        maps.append(Map(room, "uint8", (bytes_,), (64,)))
        maps.append(Map(room, "uint8", (bytes_ // 16, 16), (4, 16), strides=(32, 1)))
        maps.append(Map(room, "uint8", (bytes_ // 32, 2, 16), (4, 2, 16), strides=(16, 64, 1)))
    return maps
