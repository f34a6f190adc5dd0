"""cp.async, bulk copies and their groups: against NumPy, and what must be found."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fmha.emulator.machine import Policy, UnmodelledError, run_ptx

POLICIES = ["eager", "lazy", "random"]
HEADER = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel({parameters})
{{
    .reg .b16 %h<8>; .reg .b32 %r<60>; .reg .b64 %d<60>; .reg .pred %p<8>;
    .shared .align 128 .b8 room[{room}];
    .shared .align 8 .b64 bar;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, room;
    mov.u32 %r2, bar;
    setp.eq.u32 %p0, %r0, 0;
    {loads}
    {body}
    ret;
}}
"""


def kernel(body: str, pointers: int = 2, room: int = 4096) -> str:
    """%r0: thread; %p0: thread 0; %r1: shared memory; %r2: mbarrier; %d0, %d1, ...: pointers."""
    return HEADER.format(
        parameters=", ".join(f".param .u64 p{i}" for i in range(pointers)),
        loads="\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(pointers)),
        body=body,
        room=room,
    )


def wait(parity: int, label: str) -> str:
    return f"""
    {label}:
    mbarrier.try_wait.parity.shared.b64 %p7, [%r2], {parity};
    @!%p7 bra {label};
    """


INIT = """
    @%p0 mbarrier.init.shared.b64 [%r2], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


def aligned(count: int, dtype: type, rng: np.random.Generator | None = None) -> np.ndarray:
    """An array at a multiple of 128 bytes: random bytes or zeros."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros(count * size + 128, np.uint8)
    start = -raw.ctypes.data % 128
    part = raw[start : start + count * size]
    if rng is not None:
        part[:] = rng.integers(0, 256, part.size, dtype=np.uint8)
    return part.view(dtype)


def found(source: str, *arguments, **options) -> str:
    result = run_ptx(source, *arguments, check=False, **options)
    assert result.findings, "nothing was found"
    return " | ".join(f"{finding.kind}: {finding.text}" for finding in result.findings)


# ---------------------------------------------------------------- cp.async

PIPELINE = """
    mad.lo.u32 %r3, %r0, {size}, %r1;
    mad.wide.u32 %d3, %r0, {size}, %d0;
    mad.wide.u32 %d4, %r0, {size}, %d1;
    cp.async.{cache}.shared.global [%r3], [%d3], {size};
    cp.async.commit_group;
    cp.async.{cache}.shared.global [%r3+{stage}], [%d3+{stage}], {size};
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.warp.sync -1;
    ld.shared.b32 %r4, [%r3]; st.global.b32 [%d4], %r4;
    cp.async.wait_group {last};
    ld.shared.b32 %r4, [%r3+{stage}]; st.global.b32 [%d4+{stage}], %r4;
"""


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("policy", POLICIES)
def test_groups_of_cp_async(cache: str, size: int, policy: str, rng: np.random.Generator) -> None:
    source, out = aligned(32 * size * 2, np.uint8, rng), aligned(32 * size * 2, np.uint8)
    body = PIPELINE.format(cache=cache, size=size, stage=32 * size, last=0)
    run_ptx(kernel(body), source, out, policy=Policy(policy, seed=3))
    words = size // 4
    np.testing.assert_array_equal(out.view(np.uint32)[::words], source.view(np.uint32)[::words])


@pytest.mark.parametrize("policy", POLICIES)
def test_waiting_for_too_few_groups_is_found(policy: str, rng: np.random.Generator) -> None:
    source, out = aligned(1024, np.uint8, rng), aligned(1024, np.uint8)
    body = PIPELINE.format(cache="cg", size=16, stage=512, last=1)
    text = found(kernel(body), source, out, policy=Policy(policy))
    assert "race" in text or "uninitialised" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_wait_all_covers_uncommitted_copies(policy: str, rng: np.random.Generator) -> None:
    source, out = aligned(128, np.uint32, rng), aligned(128, np.uint32)
    body = """
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d0; mad.wide.u32 %d4, %r0, 16, %d1;
    cp.async.ca.shared::cta.global.L2::128B [%r3], [%d3], 16;
    cp.async.wait_{what};
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.b32 [%d4], {{%r4, %r5, %r6, %r7}};
    """
    run_ptx(kernel(body.format(what="all")), source, out, policy=Policy(policy))
    np.testing.assert_array_equal(out, source)
    assert found(kernel(body.format(what="group 0")), source, out, policy=Policy(policy))


def test_sizes_and_ignored_sources(rng: np.random.Generator) -> None:
    source, out = aligned(32 * 16, np.uint8, rng), aligned(32 * 32, np.uint8)
    body = """
    mad.lo.u32 %r3, %r0, 32, %r1; mad.wide.u32 %d3, %r0, 16, %d0; mad.wide.u32 %d4, %r0, 32, %d1;
    rem.u32 %r4, %r0, 17;
    and.b32 %r5, %r0, 1; setp.eq.u32 %p1, %r5, 1;
    cp.async.cg.shared.global [%r3], [%d3], 16, %r4;
    cp.async.cg.shared.global [%r3+16], [%d3], 16, %p1;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
    st.global.v4.b32 [%d4], {%r4, %r5, %r6, %r7};
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3+16];
    st.global.v4.b32 [%d4+16], {%r4, %r5, %r6, %r7};
    """
    run_ptx(kernel(body), source, out)
    rows = source.reshape(32, 16)
    for lane, row in enumerate(out.reshape(32, 2, 16)):
        size = lane % 17
        np.testing.assert_array_equal(row[0], [*rows[lane, :size], *[0] * (16 - size)])
        np.testing.assert_array_equal(row[1], rows[lane] * (lane % 2 == 0))


def test_a_size_of_zero_reads_nothing() -> None:
    """The usual predicate: the source of a copy of no bytes may lie outside."""
    out = aligned(4, np.uint32)
    body = """
    cp.async.ca.shared.global [%r1], [%d0+1048576], 16, 0;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];
    @%p0 st.global.v4.b32 [%d0], {%r4, %r5, %r6, %r7};
    """
    out[:] = 1
    run_ptx(kernel("@!%p0 exit;" + body, 1), out)
    assert not out.any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("noinc", [True, False])
def test_arrival_after_cp_async(policy: str, noinc: bool, rng: np.random.Generator) -> None:
    """Warp 0 copies and its lanes arrive by their copies; warp 1 waits and reads."""
    source, out = aligned(128, np.uint32, rng), aligned(128, np.uint32)
    count = 32 if noinc else 1
    body = f"""
    @%p0 mbarrier.init.shared.b64 [%r2], {count};
    bar.sync 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra consumer;
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d0;
    cp.async.cg.shared.global [%r3], [%d3], 16;
    cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%r2];
    {"" if noinc else "bar.warp.sync -1; @%p0 mbarrier.arrive.shared.b64 _, [%r2];"}
    cp.async.wait_all;
    exit;
    consumer:
    {wait(0, "again")}
    sub.u32 %r0, %r0, 32;
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d4, %r0, 16, %d1;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.b32 [%d4], {{%r4, %r5, %r6, %r7}};
    """
    run_ptx(kernel(body), source, out, block=(64, 1, 1), policy=Policy(policy, seed=1))
    np.testing.assert_array_equal(out, source)


def test_async_readers_of_cp_async_need_a_proxy_fence(rng: np.random.Generator) -> None:
    source, out = aligned(128, np.uint32, rng), aligned(128, np.uint32)
    body = """
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d0;
    cp.async.cg.shared.global [%r3], [%d3], 16;
    cp.async.wait_all;
    {fence}
    bar.sync 0;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 512;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    run_ptx(kernel(body.format(fence="fence.proxy.async.shared::cta;")), source, out)
    np.testing.assert_array_equal(out, source)
    assert "proxy" in found(kernel(body.format(fence="")), source, out)


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("cp.async.cg.shared.global [%r1+8], [%d0], 16;", "alignment"),
        ("cp.async.cg.shared.global [%r1], [%d0+4], 16;", "alignment"),
        ("cp.async.ca.shared.global [%r1], [%d0+512], 4;", "bounds"),
        ("cp.async.ca.shared.global [0x30000], [%d0], 4;", "bounds"),
        ("cp.async.ca.shared.global [%r1], [%d0], 4, 5;", "other"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r1], 24;", "alignment"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d0+8], [%r1], 16;", "alignment"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d0+496], [%r1], 32;", "bounds"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%d0], [0x38ff0], 32;", "bounds"),
    ],
)
def test_found(instruction: str, kind: str) -> None:
    assert kind in found(kernel("@!%p0 exit; " + instruction, 1), aligned(128, np.uint32))


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.cg.shared.global [%r1], [%d0], 8;",
        "cp.async.cs.shared.global [%r1], [%d0], 16;",
        "cp.async.bulk.wait_all;",
        "cp.async.bulk.shared::cluster.global.bulk_group [%r1], [%d0], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f8 [%d0], [%r1], 16;",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%d0], [%r1], 16, %h1;",
    ],
)
def test_refused(instruction: str) -> None:
    with pytest.raises(UnmodelledError, match=r"cp\."):
        run_ptx(kernel(instruction, 1), aligned(128, np.uint32))


# ---------------------------------------------------------------- bulk copies

THERE_AND_BACK = (
    INIT
    + """
    @!%p0 bra waiting;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {expected};
    cp.async.bulk.prefetch.L2.global [%d0], 1024;
    cp.async.bulk.{space}.global.mbarrier::complete_tx::bytes [%r1], [%d0], 1024, [%r2];
    waiting:
    """
    + wait(0, "again")
    + """
    mad.lo.u32 %r3, %r0, 32, %r1;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    not.b32 %r4, %r4;
    st.shared.b32 [%r3], %r4;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 exit;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r1], 1024;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group{read} {newest};
    {after}
    """
)


def there_and_back(**options: object) -> str:
    given = {"expected": 1024, "space": "shared::cluster", "read": "", "newest": 0, "after": ""}
    return kernel(THERE_AND_BACK.format(**(given | options)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_bulk_copies(policy: str, space: str, rng: np.random.Generator) -> None:
    source, out = aligned(256, np.uint32, rng), aligned(256, np.uint32)
    expected = source.copy()
    expected[::8] = ~expected[::8]
    result = run_ptx(there_and_back(space=space), source, out, policy=Policy(policy, seed=5))
    np.testing.assert_array_equal(out, expected)
    assert result.counters.tma_load_bytes == result.counters.tma_store_bytes == 1024


OVERWRITE = "st.shared.b32 [%r1], 0;"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_source_may_be_overwritten_after_it_was_read(
    policy: str, rng: np.random.Generator
) -> None:
    source, out = aligned(256, np.uint32, rng), aligned(256, np.uint32)
    expected = source.copy()
    expected[::8] = ~expected[::8]
    run_ptx(there_and_back(read=".read", after=OVERWRITE), source, out, policy=Policy(policy))
    np.testing.assert_array_equal(out, expected)
    text = found(there_and_back(newest=1, after=OVERWRITE), source, out, policy=Policy(policy))
    assert "race" in text


@pytest.mark.parametrize("policy", POLICIES)
def test_waiting_for_the_read_is_not_waiting_for_the_write(
    policy: str, rng: np.random.Generator
) -> None:
    source, out = aligned(256, np.uint32, rng), aligned(256, np.uint32)
    look = "ld.global.b32 %r9, [%d1];"
    run_ptx(there_and_back(after=look), source, out, policy=Policy(policy))
    text = found(there_and_back(read=".read", after=look), source, out, policy=Policy(policy))
    assert "race" in text


@pytest.mark.parametrize("expected", [1008, 1040])
def test_wrong_transaction_counts_are_found(expected: int, rng: np.random.Generator) -> None:
    source, out = aligned(256, np.uint32, rng), aligned(256, np.uint32)
    assert found(there_and_back(expected=expected), source, out)


def test_every_lane_has_its_own_groups(rng: np.random.Generator) -> None:
    """Lane 1 commits no group of its own; lane 0's wait does not cover lane 1's copy."""
    source, out = aligned(256, np.uint32, rng), aligned(8, np.uint32)
    body = """
    setp.gt.u32 %p1, %r0, 1; @%p1 exit;
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d1;
    st.shared.v4.b32 [%r3], {{%r0, %r0, %r0, %r0}};
    fence.proxy.async.shared::cta;
    cp.async.bulk.global.shared::cta.bulk_group [%d3], [%r3], 16;
    {who}cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.b32 [%r3], 5;
    """
    run_ptx(kernel(body.format(who="")), source, out, policy=Policy("lazy"))
    np.testing.assert_array_equal(out, [0] * 4 + [1] * 4)
    assert "race" in found(kernel(body.format(who="@%p0 ")), source, out, policy=Policy("lazy"))


@pytest.mark.parametrize("policy", POLICIES)
def test_bulk_copies_to_a_peer_and_multicast(policy: str, rng: np.random.Generator) -> None:
    """Rank 0 multicasts to ranks 0, 1 and 3; rank 1 hands its part on to rank 2."""
    source, out = aligned(64, np.uint32, rng), aligned(4 * 64, np.uint32)
    body = (
        """
    @%p0 mbarrier.init.shared.b64 [%r2], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u32 %r10, %cluster_ctarank;
    setp.eq.and.u32 %p1, %r10, 0, %p0;
    mov.b16 %h1, 11;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r1], [%d0], 256, [%r2], %h1;
    """
        + wait(0, "again")
        + """
    setp.eq.and.u32 %p1, %r10, 1, %p0;
    mapa.shared::cluster.u32 %r11, %r1, 2; mapa.shared::cluster.u32 %r12, %r2, 2;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%r11], [%r1], 256, [%r12];
    mad.lo.u32 %r3, %r0, 8, %r1;
    ld.shared.v2.b32 {%r4, %r5}, [%r3];
    mad.lo.u32 %r6, %r10, 32, %r0; mad.wide.u32 %d3, %r6, 8, %d1;
    st.global.v2.b32 [%d3], {%r4, %r5};
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    )
    result = run_ptx(
        kernel(body),
        source,
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        policy=Policy(policy, seed=2),
    )
    np.testing.assert_array_equal(out.reshape(4, 64), np.tile(source, (4, 1)))
    assert result.counters.tma_multicast_bytes == 512


REDUCTIONS = [
    ("add.u32", np.uint32), ("min.s32", np.int32), ("max.u32", np.uint32), ("and.b32", np.uint32),
    ("or.b32", np.uint32), ("xor.b64", np.uint64), ("add.u64", np.uint64), ("max.s64", np.int64),
    ("inc.u32", np.uint32), ("dec.u32", np.uint32), ("add.f32", np.float32),
    ("add.f64", np.float64), ("add.noftz.f16", np.float16), ("min.f16", np.float16),
    ("max.f16", np.float16),
]  # fmt: skip


def reduced(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    verb = name.split(".")[0]
    if verb == "inc":
        return np.where(a >= b, 0, a + 1).astype(a.dtype)
    if verb == "dec":
        return np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype)
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return functions[verb](a, b)


@pytest.mark.parametrize(("name", "dtype"), REDUCTIONS)
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_bulk_reductions(name: str, dtype: type, policy: str, rng: np.random.Generator) -> None:
    count = 512 // np.dtype(dtype).itemsize
    source, memory = aligned(count, dtype, rng), aligned(count, dtype, rng)
    if np.dtype(dtype).kind == "f":
        source[:] = rng.standard_normal(count).astype(dtype)
        memory[:] = rng.standard_normal(count).astype(dtype)
    with np.errstate(over="ignore"):
        expected = reduced(name, memory, source)
    body = f"""
    mad.lo.u32 %r3, %r0, 16, %r1; mad.wide.u32 %d3, %r0, 16, %d0;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d3];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 exit;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{name} [%d1], [%r1], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    run_ptx(kernel(body), source, memory, policy=Policy(policy))
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_reductions_into_one_peer_do_not_race(policy: str, rng: np.random.Generator) -> None:
    source, out = aligned(4 * 64, np.uint32, rng), aligned(64, np.uint32)
    body = (
        """
    mov.u32 %r10, %cluster_ctarank;
    mad.lo.u32 %r3, %r0, 8, %r1;
    mad.lo.u32 %r6, %r10, 32, %r0; mad.wide.u32 %d3, %r6, 8, %d0;
    ld.global.v2.b32 {%r4, %r5}, [%d3];
    st.shared.v2.b32 [%r3], {%r4, %r5};
    st.shared.v2.b32 [%r3+256], {0, 0};
    @%p0 mbarrier.init.shared.b64 [%r2], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    setp.eq.and.u32 %p1, %r10, 0, %p0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
    fence.proxy.async;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mapa.shared::cluster.u32 %r11, %r1, 0; mapa.shared::cluster.u32 %r12, %r2, 0;
    @%p0 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32
        [%r11+256], [%r1], 256, [%r12];
    setp.ne.u32 %p1, %r10, 0;
    @%p1 bra done;
    """
        + wait(0, "again")
        + """
    ld.shared.v2.b32 {%r4, %r5}, [%r3+256];
    mad.wide.u32 %d4, %r0, 8, %d1;
    st.global.v2.b32 [%d4], {%r4, %r5};
    done:
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """
    )
    run_ptx(
        kernel(body),
        source,
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        policy=Policy(policy, seed=4),
    )
    total = source.reshape(4, 64).astype(np.uint64).sum(0)
    np.testing.assert_array_equal(out, total.astype(np.uint32))
