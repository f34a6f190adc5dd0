"""Asynchronous operations under all policies: rings of copies, right ones and wrong ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ptx_source
import pytest
from outcomes import clean, kinds, text

from cute_fmha.emulator.machine import Policy, run_ptx

POLICIES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in range(1, 6)]
all_policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.mode}{p.seed}")
STAGES, TILES, TILE_BYTES = 3, 11, 256
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def module(body: str) -> str:
    return ptx_source.module(body, "in", "out")


def run(body: str, source: np.ndarray, out: np.ndarray, warps: int = 3, **options: Any) -> Any:
    options.setdefault("check", False)
    return run_ptx(
        module(body), source, out, block=(32 * warps, 1, 1), dynamic_shared=8192, **options
    )


def fresh(n: int, seed: int = 0) -> np.ndarray:
    print("seed", seed)
    return np.random.default_rng(seed).integers(-1000, 1000, n).astype(np.int32)


# ---------------------------------------------------------------- a ring of bulk copies
# full barriers at 0, 8, 16; empty barriers at 64, 72, 80; tiles at 1024 + 256 stage

INIT = """
    @!%p10 bra READY;
    mov.u32 %r0, 0;
INIT:
    mad.lo.u32 %r1, %r0, 8, %smem;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1 + 64], 2;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 3;
    @%p0 bra INIT;
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
"""

RING = (
    INIT
    + f"""
    mov.u32 %r0, 0;
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
    mov.u32 %r20, 0;
    setp.ne.u32 %p1, %warp, 0;
    @%p1 bra CONSUMER;
PRODUCER:
    mad.lo.u32 %r1, %r8, 8, %smem;
    xor.b32 %r3, %r9, 1;
WAIT_EMPTY:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1 + 64], %r3;
    @!%p2 bra WAIT_EMPTY;
    mad.lo.u32 %r2, %r8, {TILE_BYTES}, %smem;
    add.u32 %r2, %r2, 1024;
    mul.wide.u32 %rd1, %r0, {TILE_BYTES};
    add.s64 %rd1, %in, %rd1;
    @%p12 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {TILE_BYTES};
    @%p12 {BULK} [%r2], [%rd1], {TILE_BYTES}, [%r1];
    add.u32 %r8, %r8, 1;
    setp.eq.u32 %p3, %r8, {STAGES};
    selp.b32 %r8, 0, %r8, %p3;
    @%p3 xor.b32 %r9, %r9, 1;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, {TILES};
    @%p0 bra PRODUCER;
    bra END;
CONSUMER:
    mad.lo.u32 %r1, %r8, 8, %smem;
WAIT_FULL:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1], %r9;
    @!%p2 bra WAIT_FULL;
    mad.lo.u32 %r2, %r8, {TILE_BYTES}, %smem;
    shl.b32 %r4, %t, 2;
    add.u32 %r2, %r2, %r4;
    ld.shared.b32 %r5, [%r2 + 896];
    add.u32 %r20, %r20, %r5;
    bar.warp.sync -1;
    @%p12 mbarrier.arrive.shared.b64 _, [%r1 + 64];
    add.u32 %r8, %r8, 1;
    setp.eq.u32 %p3, %r8, {STAGES};
    selp.b32 %r8, 0, %r8, %p3;
    @%p3 xor.b32 %r9, %r9, 1;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, {TILES};
    @%p0 bra CONSUMER;
    mul.wide.u32 %rd2, %t, 4;
    add.s64 %rd2, %out, %rd2;
    st.global.b32 [%rd2 + -128], %r20;
END:
"""
)


@all_policies
@pytest.mark.parametrize("pieces", [1, 40])
def test_ring(policy: Policy, pieces: int) -> None:
    source, out = fresh(TILES * 64, pieces), np.zeros(64, np.int32)
    policy = replace(policy, slice=pieces)
    clean(run(RING, source, out, policy=policy))
    assert np.array_equal(out, source.reshape(TILES, 64).sum(0))


EMPTY = """WAIT_EMPTY:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1 + 64], %r3;
    @!%p2 bra WAIT_EMPTY;"""
FULL = """WAIT_FULL:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1], %r9;
    @!%p2 bra WAIT_FULL;"""
READ = """    ld.shared.b32 %r5, [%r2 + 896];
    add.u32 %r20, %r20, %r5;
    bar.warp.sync -1;
"""
RELEASE = "    @%p12 mbarrier.arrive.shared.b64 _, [%r1 + 64];\n"
FLIP = "    @%p3 xor.b32 %r9, %r9, 1;\n"
MUTANTS = {
    "no wait for empty": (EMPTY, "", {"race", "barrier", "parity", "transaction"}),
    "no wait for full": (FULL, "", {"race", "uninitialised"}),
    "no fence after init": ("fence.mbarrier_init.release.cluster;", "", {"proxy"}),
    "no barrier after init": ("bar.sync 0;", "", {"race", "barrier"}),
    "too many bytes expected": ("_, [%r1], 256;", "_, [%r1], 272;", {"deadlock", "transaction"}),
    "too few bytes expected": ("_, [%r1], 256;", "_, [%r1], 240;", {"transaction"}),
    "consumer does not release": (RELEASE, "", {"deadlock"}),
    "consumer releases before it reads": (READ + RELEASE, RELEASE + READ, {"race"}),
    "parity never flips": (FLIP, "", {"race", "deadlock", "barrier", "parity"}),
}


@all_policies
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_rings(policy: Policy, name: str) -> None:
    old, new, expected = MUTANTS[name]
    assert old in RING
    body = RING.replace(old, new)
    source, out = fresh(TILES * 64), np.zeros(64, np.int32)
    result = run(body, source, out, policy=policy)
    assert kinds(result) & expected, text(result) or "no finding"


@pytest.mark.parametrize("branch", ["@!%p2 bra WAIT_EMPTY;", "@!%p2 bra WAIT_FULL;"])
def test_waits_are_tried_again(branch: str) -> None:
    """A try_wait may give up: a kernel that ignores its answer fails under some seed."""
    body = RING.replace(branch, "")
    source, out = fresh(TILES * 64), np.zeros(64, np.int32)
    found: set[str] = set()
    for seed in range(10):
        found |= kinds(run(body, source, out, policy=Policy("random", seed=seed)))
    assert "race" in found


def test_reproducible() -> None:
    def once(seed: int) -> Any:
        result = run(
            RING, fresh(TILES * 64), np.zeros(64, np.int32), policy=Policy("random", seed=seed)
        )
        return result.counters.steps, result.counters.wait_failures

    assert once(3) == once(3)
    assert len({once(seed) for seed in range(4)}) > 1


# ---------------------------------------------------------------- many copies in flight


@all_policies
def test_more_copies_than_slots(policy: Policy) -> None:
    source, out = fresh(200 * 4), np.zeros(200 * 4, np.int32)
    body = (
        INIT
        + """
    setp.ne.u32 %p1, %warp, 0;
    @%p1 bra CONSUMER;
    mov.u32 %r0, 0;
    @%p12 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 3200;
COPY:
    mad.lo.u32 %r2, %r0, 16, %smem;
    mul.wide.u32 %rd1, %r0, 16;
    add.s64 %rd1, %in, %rd1;
    @%p12 BULK [%r2 + 1024], [%rd1], 16, [%smem];
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 200;
    @%p0 bra COPY;
    bra END;
CONSUMER:
    mbarrier.try_wait.parity.shared.b64 %p2, [%smem], 0;
    @!%p2 bra CONSUMER;
    shl.b32 %r0, %lane, 2;
READ:
    add.u32 %r1, %smem, %r0;
    ld.shared.b32 %r2, [%r1 + 1024];
    cvt.u64.u32 %rd1, %r0;
    add.s64 %rd1, %out, %rd1;
    st.global.b32 [%rd1], %r2;
    add.u32 %r0, %r0, 128;
    setp.lt.u32 %p0, %r0, 3200;
    @%p0 bra READ;
END:
"""
    )
    clean(run(body.replace("BULK", BULK), source, out, warps=2, policy=policy))
    assert np.array_equal(out, source)


# ---------------------------------------------------------------- bulk stores

STORE = """
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %r1, %smem;
    mad.lo.u32 %r2, %t, 5, 1;
    st.shared.b32 [%r1], %r2;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p10 cp.async.bulk.global.shared::cta.bulk_group [%out], [%smem], 384;
    @%p10 cp.async.bulk.commit_group;
    @%p10 cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    st.shared.b32 [%r1], 0;
    @%p10 cp.async.bulk.wait_group 0;
"""


@all_policies
def test_store(policy: Policy) -> None:
    out = np.zeros(96, np.int32)
    clean(run(STORE, fresh(4), out, policy=policy))
    assert np.array_equal(out, np.arange(96) * 5 + 1)


@all_policies
@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("fence.proxy.async.shared::cta;", "proxy"),
        ("    bar.sync 0;\n    @%p10 cp", "race"),
        ("@%p10 cp.async.bulk.wait_group.read 0;", "race"),
        ("@%p10 cp.async.bulk.wait_group.read 0;\n    bar.sync 0;", "race"),
    ],
)
def test_wrong_stores(policy: Policy, line: str, kind: str) -> None:
    assert line in STORE
    body = STORE.replace(line, "    @%p10 cp" if line.endswith("cp") else "", 1)
    assert kind in kinds(run(body, fresh(4), np.zeros(96, np.int32), policy=policy))


@all_policies
def test_fence_by_the_reader_side(policy: Policy) -> None:
    """The thread that starts the copy may fence for all, once it is ordered after their writes."""
    body = STORE.replace("fence.proxy.async.shared::cta;", "", 1).replace(
        "@%p10 cp.async.bulk.global", "@%p10 fence.proxy.async; @%p10 cp.async.bulk.global"
    )
    clean(run(body, fresh(4), np.zeros(96, np.int32), policy=policy))


@all_policies
def test_fence_before_the_write(policy: Policy) -> None:
    fence = "fence.proxy.async.shared::cta;"
    body = fence + STORE.replace(fence, "", 1)
    assert "proxy" in kinds(run(body, fresh(4), np.zeros(96, np.int32), policy=policy))


# ---------------------------------------------------------------- cp.async

COPY = """
    shl.b32 %r1, %t, 4;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd1, %in, %rd1;
    add.u32 %r2, %smem, %r1;
    cp.async.cg.shared.global [%r2], [%rd1], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r3, %r1, 512;
    add.u32 %r3, %r3, %smem;
    ld.shared.b32 %r4, [%r3];
    mul.wide.u32 %rd2, %t, 4;
    add.s64 %rd2, %out, %rd2;
    st.global.b32 [%rd2], %r4;
"""


@all_policies
def test_copy_groups(policy: Policy) -> None:
    source, out = fresh(4 * 64), np.zeros(64, np.int32)
    clean(run(COPY, source, out, warps=2, policy=policy))
    assert np.array_equal(out, source[::4].reshape(2, 32)[::-1].ravel())


@all_policies
@pytest.mark.parametrize("line", ["cp.async.wait_group 0;", "bar.sync 0;"])
def test_wrong_copy_groups(policy: Policy, line: str) -> None:
    body = COPY.replace(line, "")
    found = kinds(run(body, fresh(4 * 64), np.zeros(64, np.int32), warps=2, policy=policy))
    assert found & {"race", "uninitialised"}
