"""Loads, stores, address arithmetic, atomics and matrices: against NumPy, and what is found."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fmha.emulator.machine import EmulationError, Policy, UnmodelledError, run_ptx

HEADER = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel({parameters})
{{
    .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .b64 %d<60>; .reg .b128 %q<4>; .reg .pred %p<8>;
    .reg .f32 %f<20>;
    {variables}
    mov.u32 %r0, %tid.x;
    {loads}
    {body}
    ret;
}}
"""


def kernel(body: str, pointers: int = 2, variables: str = "") -> str:
    """%r0: thread; %d0, %d1, ...: the pointers."""
    return HEADER.format(
        parameters=", ".join(f".param .u64 p{i}" for i in range(pointers)),
        loads="\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(pointers)),
        body=body,
        variables=variables,
    )


def aligned(count: int, dtype: type, rng: np.random.Generator | None = None) -> np.ndarray:
    """An array at a multiple of 128 bytes: random bytes or zeros."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 128, np.uint8)
    part = raw[-raw.ctypes.data % 128 :][:size]
    if rng is not None:
        part[:] = rng.integers(0, 256, size, dtype=np.uint8)
    return part.view(dtype)


def found(source: str, *arguments, **options) -> str:
    result = run_ptx(source, *arguments, check=False, **options)
    assert result.findings, "nothing was found"
    return " | ".join(f"{finding.kind}: {finding.text}" for finding in result.findings)


# ---------------------------------------------------------------- loads and stores


@pytest.mark.parametrize("name", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_loads_extend(name: str, rng: np.random.Generator) -> None:
    dtype = np.dtype({"u": "uint", "s": "int"}[name[0]] + name[1:])
    source = rng.integers(0, 256, 32 * dtype.itemsize, dtype=np.uint8).view(dtype)
    wide, narrow = np.zeros(32, np.int64), np.zeros(32, np.int32)
    body = f"""
    mad.wide.u32 %d3, %r0, {dtype.itemsize}, %d0;
    mad.wide.u32 %d4, %r0, 8, %d1;
    mad.wide.u32 %d5, %r0, 4, %d2;
    ld.global.{name} %d6, [%d3];
    ld.global.{name} %r1, [%d3];
    st.global.b64 [%d4], %d6;
    st.global.b32 [%d5], %r1;
    """
    run_ptx(kernel(body, 3), source, wide, narrow)
    np.testing.assert_array_equal(wide, source.astype(np.int64))
    np.testing.assert_array_equal(narrow, source.astype(np.int64).astype(np.int32))


@pytest.mark.parametrize("name", ["u8", "s8"])
def test_bytes_in_16_bit_registers(name: str, rng: np.random.Generator) -> None:
    source = rng.integers(0, 256, 32, dtype=np.uint8)
    out = np.zeros(32, np.uint16)
    body = f"""
    cvt.u64.u32 %d3, %r0; add.u64 %d4, %d0, %d3;
    mad.wide.u32 %d5, %r0, 2, %d1;
    ld.global.{name} %h1, [%d4];
    st.global.b16 [%d5], %h1;
    """
    run_ptx(kernel(body), source, out)
    signed = source.view(np.int8).astype(np.int16).view(np.uint16)
    np.testing.assert_array_equal(out, signed if name == "s8" else source)


VECTORS = [("b8", 1), ("b8", 2), ("b8", 4), ("b16", 1), ("b16", 2), ("b16", 4), ("b32", 1)]
VECTORS += [("b32", 2), ("b32", 4), ("b32", 8), ("b64", 1), ("b64", 2), ("b64", 4), ("b128", 1)]


@pytest.mark.parametrize(("width", "count"), VECTORS)
@pytest.mark.parametrize("order", ["straight", "permuted", "some lanes"])
def test_vectors(width: str, count: int, order: str, rng: np.random.Generator) -> None:
    size = int(width[1:]) // 8
    total = size * count
    register = {1: "h", 2: "h", 4: "r", 8: "d", 16: "q"}[size]
    names = [f"%{register}{i + (10 if size < 16 else 0)}" for i in range(count)]
    operand = names[0] if count == 1 else "{" + ", ".join(names) + "}"
    vector = f".v{count}" if count > 1 else ""
    place = np.arange(32, dtype=np.int32) if order != "permuted" else rng.permutation(32)
    place = place.astype(np.int32) * total
    source, out = aligned(32 * total, np.uint8, rng), aligned(32 * total, np.uint8)
    through_shared = total <= 16
    body = f"""
    mad.wide.u32 %d3, %r0, 4, %d2;
    ld.global.s32 %d4, [%d3];
    add.s64 %d5, %d0, %d4;
    add.s64 %d6, %d1, %d4;
    mov.u32 %r1, room;
    cvt.u32.u64 %r2, %d4;
    add.u32 %r1, %r1, %r2;
    setp.ge.u32 %p1, %r0, 29;
    {"@%p1 bra done;" if order == "some lanes" else ""}
    ld.global{vector}.{width} {operand}, [%d5];
    {f"st.shared{vector}.{width} [%r1], {operand};" if through_shared else ""}
    {f"ld.shared{vector}.{width} {operand}, [%r1];" if through_shared else ""}
    st.global{vector}.{width} [%d6], {operand};
    done:
    """
    variables = ".shared .align 128 .b8 room[1024];"
    result = run_ptx(kernel(body, 3, variables), source, out, place)
    lanes = 29 if order == "some lanes" else 32
    np.testing.assert_array_equal(out[: lanes * total], source[: lanes * total])
    assert not out[lanes * total :].any()
    if through_shared:
        assert result.counters.shared_read_bytes == lanes * total


def test_sinks_and_broadcast(rng: np.random.Generator) -> None:
    source, out = aligned(4, np.uint32, rng), np.zeros(32, np.uint32)
    body = """
    ld.global.nc.v4.b32 {_, %r1, _, %r2}, [%d0];
    xor.b32 %r1, %r1, %r2;
    mad.wide.u32 %d3, %r0, 4, %d1;
    st.global.b32 [%d3], %r1;
    """
    run_ptx(kernel(body), source, out)
    np.testing.assert_array_equal(out, np.full(32, source[1] ^ source[3]))


@pytest.mark.parametrize("form", ["pragma", "sink"])
@pytest.mark.parametrize("address", ["[data]", "[%r9]"])
def test_unused_parts_of_a_load_are_not_read(form: str, address: str) -> None:
    """Compilers widen loads: of three words to four, with a pragma about the bytes that count."""
    pragma = '.pragma "used_bytes_mask 0xf0f";' if form == "pragma" else ""
    second, fourth = ("%r5", "%r7") if form == "pragma" else ("_", "_")
    body = f"""
    .shared .align 16 .b8 data[512];
    mov.u32 %r8, data; shl.b32 %r9, %r0, 4; add.u32 %r9, %r9, %r8;
    st.shared.b32 [%r9], %r0; st.shared.b32 [%r9+8], %r0;
    bar.sync 0;
    {{pragma}}
    ld.shared.v4.b32 {{{{%r4, {second}, %r6, {fourth}}}}}, {address};
    add.u32 %r4, %r4, %r6; mad.wide.u32 %d3, %r0, 4, %d0; st.global.b32 [%d3], %r4;
    """
    out = np.zeros(32, np.uint32)
    run_ptx(kernel(body.format(pragma=pragma), 1), out)
    wanted = 2 * np.arange(32) if address == "[%r9]" else np.zeros(32)
    np.testing.assert_array_equal(out, wanted)
    if form == "pragma":
        with pytest.raises(EmulationError, match="never written"):
            run_ptx(kernel(body.format(pragma=""), 1), out)


LOADS = [".ca", ".cg", ".cs", ".lu", ".nc", ".volatile", ".relaxed.cta", ".relaxed.gpu", ".weak"]
LOADS += [".acquire.sys", ".acquire.cluster", ".nc.L1::no_allocate", ".L1::evict_last.L2::128B"]


@pytest.mark.parametrize("modifier", LOADS)
def test_cache_modifiers_of_loads(modifier: str, rng: np.random.Generator) -> None:
    before, _, after = modifier.partition(".L1") if ".L1" in modifier else (modifier, "", "")
    early = before in (".volatile", ".weak") or before.startswith((".relaxed", ".acquire"))
    after = f".L1{after}" if after else ""
    name = f"ld{before}.global{after}.b32" if early else f"ld.global{before}{after}.b32"
    source, out = rng.integers(0, 2**32, 32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = f"""
    mad.wide.u32 %d3, %r0, 4, %d0; mad.wide.u32 %d4, %r0, 4, %d1;
    {name} %r1, [%d3]; st.global.b32 [%d4], %r1;
    """
    run_ptx(kernel(body), source, out)
    np.testing.assert_array_equal(out, source)


STORES = [
    ".wb",
    ".cg",
    ".cs",
    ".wt",
    ".volatile",
    ".relaxed.gpu",
    ".release.sys",
    ".L1::no_allocate",
]


@pytest.mark.parametrize("modifier", STORES)
def test_cache_modifiers_of_stores(modifier: str) -> None:
    out = np.zeros(32, np.uint32)
    early = modifier.startswith((".volatile", ".relaxed", ".release"))
    name = f"st{modifier}.global.b32" if early else f"st.global{modifier}.b32"
    run_ptx(kernel(f"mad.wide.u32 %d3, %r0, 4, %d0; {name} [%d3], %r0;", 1), out)
    np.testing.assert_array_equal(out, np.arange(32))


def test_cache_hints_and_policies() -> None:
    out = np.zeros(32, np.uint32)
    body = """
    createpolicy.fractional.L2::evict_last.b64 %d5, 0f3F000000;
    mad.wide.u32 %d3, %r0, 4, %d0;
    st.global.L2::cache_hint.b32 [%d3], %r0, %d5;
    ld.global.L2::cache_hint.b32 %r1, [%d3], %d5;
    add.u32 %r1, %r1, 1;
    st.global.L2::cache_hint.b32 [%d3], %r1, %d5;
    prefetch.global.L2 [%d3];
    prefetch.global.L2::evict_last [%d3];
    prefetchu.L1 [%d3];
    applypriority.global.L2::evict_normal [%d0], 128;
    """
    run_ptx(kernel(body, 1), out)
    np.testing.assert_array_equal(out, np.arange(1, 33))


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.L3::hint.b32 %r1, [%d0];",
        "ld.mmio.relaxed.sys.global.b32 %r1, [%d0];",
        "st.global.v3.b32 [%d0], {%r0, %r0, %r0};",
        "st.param.b32 [p0], %r0;",
        "ld.shared.v2.b128 {%q1, %q2}, [%r0];",
        "ld.shared.v4.b64 {%d1, %d2, %d3, %d4}, [%r0];",
        "cvta.shared.u32 %r1, %r0;",
        "atom.global.add.b32 %r1, [%d0], %r0;",
        "atom.global.max.f32 %f1, [%d0], %f2;",
        "atom.global.add.f16x2 %r1, [%d0], %r0;",
        "red.global.exch.b32 [%d0], %r0;",
        "multimem.red.relaxed.sys.global.add.u32 [%d0], %r0;",
        "alloca.u64 %d3, 16;",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r0];",
        "createpolicies.b64 %d3;",
    ],
)
def test_refused(instruction: str) -> None:
    with pytest.raises(UnmodelledError, match=instruction.split()[0].split(".")[0]):
        run_ptx(kernel(instruction), np.zeros(64, np.uint32), np.zeros(64, np.uint32))


def test_generic_addresses_and_spaces(rng: np.random.Generator) -> None:
    source, out = rng.integers(0, 2**32, 32, dtype=np.uint32), np.zeros((32, 8), np.uint32)
    variables = ".shared .align 16 .b8 room[256]; .local .align 16 .b8 own[64];"
    body = """
    mad.wide.u32 %d3, %r0, 4, %d0;
    mad.wide.u32 %d4, %r0, 32, %d1;
    mov.u64 %d5, room;
    cvta.shared.u64 %d5, %d5;
    mad.wide.u32 %d5, %r0, 4, %d5;
    ld.b32 %r1, [%d3];
    st.b32 [%d5], %r1;
    cvta.to.shared.u64 %d6, %d5;
    ld.shared.b32 %r2, [%d6];
    st.b32 [%d4], %r2;
    mov.u64 %d7, own;
    st.local.b32 [%d7+4], %r0;
    cvta.local.u64 %d8, %d7;
    ld.b32 %r3, [%d8+4];
    st.b32 [%d4+4], %r3;
    st.b32 [%d8+8], %r1;
    ld.local.b32 %r4, [own+8];
    st.b32 [%d4+8], %r4;
    isspacep.shared %p1, %d5; isspacep.global %p2, %d3; isspacep.local %p3, %d8;
    isspacep.shared %p4, %d8; isspacep.shared::cluster %p5, %d5; isspacep.global %p6, %d5;
    selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 2, 0, %p2; or.b32 %r5, %r5, %r6;
    selp.u32 %r6, 4, 0, %p3; or.b32 %r5, %r5, %r6; selp.u32 %r6, 8, 0, %p4; or.b32 %r5, %r5, %r6;
    selp.u32 %r6, 16, 0, %p5; or.b32 %r5, %r5, %r6; selp.u32 %r6, 32, 0, %p6; or.b32 %r5, %r5, %r6;
    st.b32 [%d4+12], %r5;
    cvta.param.u64 %d9, p1;
    ld.u64 %d10, [%d9];
    sub.u64 %d10, %d10, %d1;
    st.u64 [%d4+16], %d10;
    """
    run_ptx(kernel(body, 2, variables), source, out)
    np.testing.assert_array_equal(out[:, 0], source)
    np.testing.assert_array_equal(out[:, 1], np.arange(32))
    np.testing.assert_array_equal(out[:, 2], source)
    np.testing.assert_array_equal(out[:, 3], np.full(32, 0b010111))
    assert not out[:, 4:6].any()


def test_constant_memory() -> None:
    source = kernel(
        "mov.u64 %d3, table; mad.wide.u32 %d3, %r0, 4, %d3; ld.const.b32 %r1, [%d3];"
        "mad.wide.u32 %d4, %r0, 4, %d0; st.global.b32 [%d4], %r1;",
        1,
    )
    values = ", ".join(str(7 * i) for i in range(32))
    head, entry, rest = source.partition(".visible")
    out = np.zeros(32, np.uint32)
    run_ptx(f"{head}.const .align 4 .b32 table[32] = {{{values}}};\n{entry}{rest}", out)
    np.testing.assert_array_equal(out, 7 * np.arange(32))


def test_discard_and_bulk_zeros() -> None:
    out, filled = np.full(32, 5, np.uint32), aligned(32, np.uint32)
    body = """
    mov.u32 %r1, room; mad.lo.u32 %r2, %r0, 4, %r1; mad.wide.u32 %d3, %r0, 4, %d0;
    st.shared.b32 [%r2], 3;
    bar.sync 0;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.bulk.weak.shared::cta [%r1], 64, 0;
    @%p1 discard.global.L2 [%d1], 128;
    bar.sync 0;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%d3], %r3;
    """
    filled[:] = 9
    run_ptx(kernel(body, 2, ".shared .align 16 .b8 room[128];"), out, filled)
    np.testing.assert_array_equal(out, [0] * 16 + [3] * 16)
    assert not (filled == 9).any()


# ---------------------------------------------------------------- distributed shared memory

PEERS = """
    mov.u32 %r1, %cluster_ctarank;
    mov.u32 %r2, %cluster_nctarank;
    add.u32 %r3, %r1, 1;
    rem.u32 %r3, %r3, %r2;
    mov.u32 %r4, room;
    mapa.shared::cluster.u32 %r5, %r4, %r3;
"""


def test_peers_write_and_read(rng: np.random.Generator) -> None:
    source, out = rng.integers(0, 2**32, (4, 32), dtype=np.uint32), np.zeros((4, 64), np.uint32)
    body = (
        PEERS
        + """
    mad.lo.u32 %r6, %r1, 32, %r0;
    mad.wide.u32 %d3, %r6, 4, %d0;
    ld.global.b32 %r7, [%d3];
    mad.lo.u32 %r8, %r0, 4, %r5;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    st.shared::cluster.b32 [%r8], %r7;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mad.lo.u32 %r9, %r0, 4, %r4;
    ld.shared.b32 %r10, [%r9];
    cvt.u64.u32 %d5, %r4; cvta.shared.u64 %d5, %d5;
    mapa.u64 %d6, %d5, %r3;
    mad.wide.u32 %d6, %r0, 4, %d6;
    ld.b32 %r11, [%d6];
    getctarank.shared::cluster.u32 %r12, %r8;
    setp.ne.u32 %p1, %r12, %r3;
    @%p1 mov.u32 %r11, 0;
    mad.lo.u32 %r13, %r1, 64, %r0;
    mad.wide.u32 %d4, %r13, 4, %d1;
    st.global.b32 [%d4], %r10;
    st.global.b32 [%d4+128], %r11;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    )
    run_ptx(
        kernel(body, 2, ".shared .align 16 .b8 room[128];"),
        source,
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
    )
    np.testing.assert_array_equal(out[:, :32], np.roll(source, 1, axis=0))
    np.testing.assert_array_equal(out[:, 32:], source)


def test_shared_without_cluster_is_the_own_ctas() -> None:
    body = PEERS + "mov.u32 %r9, 1; ld.shared.b32 %r9, [%r5];"
    text = found(
        kernel(body, 1, ".shared .align 16 .b8 room[128];"),
        np.zeros(4, np.uint32),
        grid=(2, 1, 1),
        cluster=(2, 1, 1),
    )
    assert "shared::cluster" in text


def test_rank_outside_of_the_cluster_is_found() -> None:
    body = (
        "mov.u32 %r4, room; mapa.shared::cluster.u32 %r5, %r4, 2; st.shared::cluster.b32 [%r5], 1;"
    )
    assert found(
        kernel(body, 1, ".shared .align 16 .b8 room[128];"),
        np.zeros(4, np.uint32),
        grid=(2, 1, 1),
        cluster=(2, 1, 1),
    )


@pytest.mark.parametrize("policy", ["eager", "lazy", "random"])
def test_asynchronous_stores_and_reductions_to_peers(policy: str, rng: np.random.Generator) -> None:
    source, out = (
        rng.integers(0, 2**30, (2, 32, 4), dtype=np.uint32),
        np.zeros((2, 32, 5), np.uint32),
    )
    body = (
        PEERS
        + """
    mov.u32 %r20, bar;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra ready;
    mbarrier.init.shared.b64 [%r20], 1;
    fence.mbarrier_init.release.cluster;
    st.shared.b32 [%r4+512], 100;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 640;
    ready:
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    mapa.shared::cluster.u32 %r21, %r20, %r3;
    mad.lo.u32 %r6, %r1, 32, %r0;
    mad.wide.u32 %d3, %r6, 16, %d0;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d3];
    mad.lo.u32 %r8, %r0, 16, %r5;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32
        [%r8], {%r10, %r11, %r12, %r13}, [%r21];
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32
        [%r5+512], %r0, [%r21];
    again:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r20], 0;
    @!%p2 bra again;
    mad.lo.u32 %r9, %r0, 16, %r4;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r9];
    ld.shared.b32 %r14, [%r4+512];
    mad.wide.u32 %d4, %r6, 20, %d1;
    st.global.b32 [%d4], %r10; st.global.b32 [%d4+4], %r11; st.global.b32 [%d4+8], %r12;
    st.global.b32 [%d4+12], %r13; st.global.b32 [%d4+16], %r14;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    )
    run_ptx(
        kernel(body, 2, ".shared .align 16 .b8 room[528]; .shared .align 8 .b64 bar;"),
        source,
        out,
        grid=(2, 1, 1),
        cluster=(2, 1, 1),
        policy=Policy(policy),
    )
    np.testing.assert_array_equal(out[:, :, :4], source[::-1])
    assert (out[:, :, 4] == 100 + 31 * 16).all()


# ---------------------------------------------------------------- atomics


def atomic_kernel(instruction: str, bytes_each: int, load: str) -> str:
    """Thread t applies source[t] to memory[t % 8]."""
    return kernel(
        f"""
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r1, %r1, %r2, %r0;
    mad.wide.u32 %d3, %r1, {bytes_each}, %d0;
    and.b32 %r2, %r0, 7;
    mad.wide.u32 %d4, %r2, {bytes_each}, %d1;
    {load}
    {instruction}
    """
    )


ATOMICS = [
    ("add.u32", np.uint32), ("add.s32", np.int32), ("add.u64", np.uint64), ("min.u32", np.uint32),
    ("max.u32", np.uint32), ("min.s32", np.int32), ("max.s32", np.int32), ("min.s64", np.int64),
    ("max.u64", np.uint64), ("and.b32", np.uint32), ("or.b32", np.uint32), ("xor.b32", np.uint32),
    ("and.b64", np.uint64), ("or.b64", np.uint64), ("xor.b64", np.uint64), ("add.f32", np.float32),
    ("add.f64", np.float64),
]  # fmt: skip
UFUNCS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), ATOMICS)
@pytest.mark.parametrize("verb", ["atom", "red"])
def test_atomics_of_many_warps(name: str, dtype: type, verb: str, rng: np.random.Generator) -> None:
    size = np.dtype(dtype).itemsize
    source: np.ndarray
    if np.dtype(dtype).kind == "f":
        source = rng.integers(-100, 100, 256).astype(dtype)  # exact in any order
    else:
        source = rng.integers(0, 256, 256 * size, dtype=np.uint8).view(dtype)
    memory: np.ndarray = np.full(8, source[0], dtype)
    expected = memory.copy()
    for t in range(256):
        expected[t % 8] = UFUNCS[name[:3].rstrip(".")](expected[t % 8], source[t])
    register = "r" if size == 4 else "d"
    load = f"ld.global.b{8 * size} %{register}10, [%d3];"
    result = f"%{register}11, " if verb == "atom" else ""
    instruction = f"{verb}.relaxed.gpu.global.{name} {result}[%d4], %{register}10;"
    with np.errstate(over="ignore"):
        run_ptx(
            atomic_kernel(instruction, size, load),
            source,
            memory,
            grid=(2, 1, 1),
            block=(128, 1, 1),
        )
    np.testing.assert_array_equal(memory, expected)


def test_inc_dec_exch_cas_return_old_values() -> None:
    memory = np.array([0, 5, 0, 7], np.uint32)
    out = np.zeros((4, 64), np.uint32)
    body = """
    mad.wide.u32 %d3, %r0, 4, %d1;
    atom.global.inc.u32 %r1, [%d0], 10;
    atom.global.dec.u32 %r2, [%d0+4], 20;
    atom.global.exch.b32 %r3, [%d0+8], %r0;
    add.u32 %r5, %r0, 1;
    atom.acq_rel.gpu.global.cas.b32 %r4, [%d0+12], 7, %r5;
    st.global.b32 [%d3], %r1; st.global.b32 [%d3+256], %r2; st.global.b32 [%d3+512], %r3;
    st.global.b32 [%d3+768], %r4;
    """
    run_ptx(kernel(body), memory, out, block=(64, 1, 1))
    incremented, decremented, a, b = [], [], 0, 5
    for _ in range(64):
        incremented.append(a)
        decremented.append(b)
        a = 0 if a >= 10 else a + 1
        b = 20 if b == 0 or b > 20 else b - 1
    assert sorted(out[0]) == sorted(incremented)
    assert sorted(out[1]) == sorted(decremented)
    assert memory[0] == a
    assert memory[1] == b
    exchanged = np.append(out[2], memory[2])
    assert sorted(exchanged) == sorted([0, *range(64)])  # every value was in memory once
    assert (out[3] == 7).sum() == 1
    assert set(out[3]) == {7, memory[3]}


def test_wide_cas_and_exch(rng: np.random.Generator) -> None:
    source, memory = aligned(4, np.uint64, rng), aligned(4, np.uint64)
    out = aligned(4, np.uint64)
    body = """
    setp.ne.u32 %p1, %r0, 0; @%p1 exit;
    ld.global.b128 %q0, [%d0];
    ld.global.b128 %q1, [%d0+16];
    atom.global.exch.b128 %q2, [%d1], %q0;
    atom.global.cas.b128 %q3, [%d1], %q0, %q1;
    st.global.b128 [%d2], %q2;
    st.global.b128 [%d2+16], %q3;
    """
    run_ptx(kernel(body, 3), source, memory, out)
    np.testing.assert_array_equal(memory[:2], source[2:])
    np.testing.assert_array_equal(out, [0, 0, *source[:2]])


def test_subnormals_are_flushed_in_global_memory_alone() -> None:
    tiny = np.array([1e-40, -1e-40, 1.2e-38, 3.0], np.float32)
    added = np.array([1e-40, -1e-41, -1.1755e-38, -3.0], np.float32)
    out, shared = tiny.copy(), np.zeros(4, np.float32)
    body = """
    setp.ge.u32 %p1, %r0, 4; @%p1 exit;
    mad.wide.u32 %d3, %r0, 4, %d0; mad.wide.u32 %d4, %r0, 4, %d1; mad.wide.u32 %d5, %r0, 4, %d2;
    mov.u32 %r1, room; mad.lo.u32 %r1, %r0, 4, %r1;
    ld.global.b32 %r2, [%d3]; ld.global.f32 %f1, [%d4];
    st.shared.b32 [%r1], %r2;
    red.shared.add.f32 [%r1], %f1;
    red.global.add.f32 [%d3], %f1;
    ld.shared.b32 %r3, [%r1];
    st.global.b32 [%d5], %r3;
    """
    run_ptx(kernel(body, 3, ".shared .align 16 .b8 room[16];"), out, added, shared)
    np.testing.assert_array_equal(shared.view(np.uint32), (tiny + added).view(np.uint32))
    assert out[0] == 0
    assert not np.signbit(out[0])
    assert out[1] == 0
    assert np.signbit(out[1])
    assert out[2] == 0
    assert out[3] == 0


def half_bits(values: np.ndarray, brain: bool) -> np.ndarray:
    """float32 rounded to nearest even, as bits."""
    if not brain:
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("brain", [False, True])
@pytest.mark.parametrize("vector", [1, 2, 4])
def test_packed_reductions(brain: bool, vector: int, rng: np.random.Generator) -> None:
    source = rng.standard_normal((32, vector * 2)).astype(np.float32)
    memory = rng.standard_normal((8, vector * 2)).astype(np.float32)
    bits, target = half_bits(source, brain), half_bits(memory, brain)

    def wide(a: np.ndarray) -> np.ndarray:
        return (a.astype(np.uint32) << 16).view(np.float32) if brain else a.view(np.float16)

    expected = target.copy()
    for t in range(32):
        total = wide(expected[t % 8]).astype(np.float32) + wide(bits[t]).astype(np.float32)
        expected[t % 8] = half_bits(total, brain)
    names = ["%r10", "%r11", "%r12", "%r13"][:vector]
    operand = names[0] if vector == 1 else "{" + ", ".join(names) + "}"
    suffix = f".v{vector}" if vector > 1 else ""
    kind = "bf16x2" if brain else "f16x2"
    load = f"ld.global{suffix}.b32 {operand}, [%d3];"
    instruction = f"red.global{suffix}.{kind}.add.noftz [%d4], {operand};"
    if vector == 1:
        instruction = f"red.global.add.noftz.{kind} [%d4], {operand};"
    run_ptx(atomic_kernel(instruction, 4 * vector, load), bits, target)
    np.testing.assert_array_equal(target, expected)


def test_vector_reductions_of_floats(rng: np.random.Generator) -> None:
    source = rng.integers(-50, 50, (32, 4)).astype(np.float32)
    memory = np.zeros((8, 4), np.float32)
    instruction = "red.relaxed.gpu.global.add.v4.f32 [%d4], {%r10, %r11, %r12, %r13};"
    load = "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d3];"
    run_ptx(atomic_kernel(instruction, 16, load), source, memory)
    np.testing.assert_array_equal(memory, source.reshape(4, 8, 4).sum(0))


def test_last_arriver_sees_what_the_others_wrote() -> None:
    """Release and acquire by an atomic: no race between a store and the last arriver's loads."""
    out, counter, total = np.zeros(4, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    body = """
    setp.ne.u32 %p1, %r0, 0; @%p1 exit;
    mov.u32 %r1, %ctaid.x; mad.wide.u32 %d3, %r1, 4, %d0;
    add.u32 %r2, %r1, 10;
    st.global.b32 [%d3], %r2;
    atom.{order}.gpu.global.add.u32 %r3, [%d1], 1;
    setp.ne.u32 %p2, %r3, 3; @%p2 exit;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0];
    add.u32 %r4, %r4, %r5; add.u32 %r6, %r6, %r7; add.u32 %r4, %r4, %r6;
    st.global.b32 [%d2], %r4;
    """
    run_ptx(kernel(body.format(order="acq_rel"), 3), out, counter, total, grid=(4, 1, 1))
    assert total[0] == 46
    counter[:] = 0
    assert "race" in found(
        kernel(body.format(order="relaxed"), 3), out, counter, total, grid=(4, 1, 1)
    )


# ---------------------------------------------------------------- matrices


def fragment(matrix: np.ndarray) -> np.ndarray:
    """What the 32 lanes hold of an 8 x 8 matrix: two elements each."""
    return matrix.reshape(32, 2)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads_and_stores(count: int, transposed: bool, rng: np.random.Generator) -> None:
    source = rng.integers(0, 2**16, (count, 8, 8), dtype=np.uint16)
    place = rng.permutation(8 * count).astype(np.uint32) * 16
    image = np.zeros(64 * count, np.uint16)
    for row, at in enumerate(place):
        image[at // 2 : at // 2 + 8] = source.reshape(-1, 8)[row]
    loaded, stored = np.zeros((32, count, 2), np.uint16), np.zeros(64 * count, np.uint16)
    names = [f"%r{10 + i}" for i in range(count)]
    operand = "{" + ", ".join(names) + "}"
    trans = ".trans" if transposed else ""
    copy = "\n".join(f"st.global.b32 [%d6+{4 * i}], {name};" for i, name in enumerate(names))
    body = f"""
    mov.u32 %r1, room;
    mul.lo.u32 %r2, %r0, {4 * count}; add.u32 %r3, %r1, %r2;
    cvt.u64.u32 %d4, %r2; add.u64 %d5, %d0, %d4; add.u64 %d6, %d2, %d4; add.u64 %d8, %d3, %d4;
    mov.u32 %r20, 0;
    fill:
    mad.wide.u32 %d7, %r20, 4, %d5; ld.global.b32 %r4, [%d7];
    mad.lo.u32 %r5, %r20, 4, %r3; st.shared.b32 [%r5], %r4;
    add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, {count}; @%p1 bra fill;
    bar.warp.sync -1;
    and.b32 %r6, %r0, {8 * count - 1};
    mad.wide.u32 %d9, %r6, 4, %d1; ld.global.b32 %r7, [%d9];
    add.u32 %r8, %r1, %r7;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {operand}, [%r8];
    {copy}
    bar.warp.sync -1;
    mad.lo.u32 %r9, %r6, 16, %r1;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 [%r9], {operand};
    bar.warp.sync -1;
    mov.u32 %r20, 0;
    drain:
    mad.lo.u32 %r5, %r20, 4, %r3; ld.shared.b32 %r4, [%r5];
    mad.wide.u32 %d7, %r20, 4, %d8; st.global.b32 [%d7], %r4;
    add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, {count}; @%p1 bra drain;
    """
    run_ptx(kernel(body, 4, ".shared .align 16 .b8 room[512];"), image, place, loaded, stored)
    for i in range(count):
        matrix = source[i].T if transposed else source[i]
        np.testing.assert_array_equal(loaded[:, i], fragment(np.ascontiguousarray(matrix)))
    np.testing.assert_array_equal(stored.reshape(count, 8, 8), source)


def test_movmatrix_transposes(rng: np.random.Generator) -> None:
    source, out = rng.integers(0, 2**16, (8, 8), dtype=np.uint16), np.zeros((8, 8), np.uint16)
    body = """
    mad.wide.u32 %d3, %r0, 4, %d0; mad.wide.u32 %d4, %r0, 4, %d1;
    ld.global.b32 %r1, [%d3];
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;
    st.global.b32 [%d4], %r2;
    """
    run_ptx(kernel(body), source, out)
    np.testing.assert_array_equal(out, source.T)


# ---------------------------------------------------------------- what must be found

ROOM = ".shared .align 16 .b8 room[128];"


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("ld.global.b32 %r1, [%d0+2];", "alignment"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+8];", "alignment"),
        ("mov.u32 %r1, room; st.shared.b64 [%r1+4], %d0;", "alignment"),
        ("mov.u32 %r1, room; atom.shared.add.u32 %r2, [%r1+1], 1;", "alignment"),
        ("ld.global.b32 %r1, [%d0+256];", "bounds"),
        ("ld.global.b32 %r1, [%d0+-4];", "bounds"),
        ("st.global.v2.b64 [%d0+256], {%d0, %d0};", "bounds"),
        ("mad.wide.u32 %d5, %r0, 12, %d0; st.global.b32 [%d5], %r0;", "bounds"),
        ("ld.shared.b32 %r1, [0x30000];", "bounds"),
        ("ld.shared.b32 %r1, [16];", "bounds"),
        ("mul.lo.u32 %r1, %r0, 64; st.shared.b32 [%r1], %r0;", "bounds"),
        ("mul.lo.u32 %r1, %r0, 65536; st.shared.b32 [%r1+1024], %r0;", "bounds"),
        ("st.local.b32 [own+64], %r0;", "bounds"),
        ("mov.u64 %d5, 0; ld.b32 %r1, [%d5];", "bounds"),
        ("cvta.param.u64 %d5, p0; st.b32 [%d5], %r0;", "bounds"),
        ("ld.param.u64 %d5, [p0+8];", "bounds"),
        ("cvta.to.shared.u64 %d5, %d0; ld.shared.b32 %r1, [%d5];", "bounds"),
        ("mov.u32 %r1, room; st.shared.b32 [%r1], %r0;", "race"),
        ("mov.u32 %r1, room; ld.shared.b32 %r2, [%r1];", "uninitialised"),
    ],
)
def test_found(instruction: str, kind: str) -> None:
    source = kernel(instruction, 1, ROOM + ".local .align 8 .b8 own[8];")
    text = found(source, aligned(64, np.uint32))
    assert kind in text.lower()


def test_same_value_from_all_lanes_is_no_race() -> None:
    out = np.zeros(4, np.uint32)
    run_ptx(kernel("st.global.b32 [%d0], 7;", 1), out)
    assert out[0] == 7


def test_errors_name_the_line() -> None:
    source = kernel("ld.global.b32 %r1, [%d0+2];", 1)
    with pytest.raises(EmulationError) as raised:
        run_ptx(source, np.zeros(8, np.uint32))
    line = 1 + next(i for i, text in enumerate(source.splitlines()) if "[%d0+2]" in text)
    assert str(line) in str(raised.value)
