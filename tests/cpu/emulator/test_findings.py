"""What counts as a fault, and what a finding tells: undefined registers, benign races, cp.async and
the tensor core, scopes, pairs of CTAs, bounds, deadlocks, variables shared by kernels."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ptx_source
import pytest
import tensor_kernels as tk
from outcomes import kinds

from cute_fmha.emulator import build
from cute_fmha.emulator.machine import (
    Machine,
    Policy,
    Result,
    load,
    memory_of,
    pack_arguments,
    run_ptx,
)

POLICIES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in (1, 2, 3, 4)]
all_policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.mode}{p.seed}")


def module(body: str) -> str:
    return ptx_source.module(
        "    mad.wide.u32 %rd39, %t, 4, %out;\n" + body, "data", "out", align=1024
    )


def run(body: str, warps: int = 1, **options: Any) -> tuple[Result, np.ndarray]:
    options.setdefault("check", False)
    data, out = np.arange(2048, dtype=np.int32), np.zeros(1024, np.int32)
    options.setdefault("dynamic_shared", 4096)
    return run_ptx(module(body), data, out, block=(32 * warps, 1, 1), **options), out


# ---------------------------------------------------------------- undefined registers

STORE = "st.global.b32 [%rd39], %r9;"
MOVES = {
    "mov": "mov.b32 %r9, %r1;",
    "twice": "mov.b32 %r2, %r1; mov.b32 %r9, %r2;",
    "64 bits": "mov.b64 %rd1, %rd2; cvt.u32.u64 %r9, %rd1;",
    "pack": "mov.b64 %rd1, {%r1, %r2}; cvt.u32.u64 %r9, %rd1;",
    "unpack": "mov.b64 %rd1, {%r1, %r2}; mov.b64 {%r9, _}, %rd1;",
    "halves": "mov.b32 %r9, {%h1, %h2};",
    "half": "mov.b32 {%h1, _}, %r1; cvt.u32.u16 %r9, %h1;",
    "wide": "mov.b128 %q1, {%rd1, %rd2}; mov.b128 %q2, %q1; mov.b128 {%rd3, _}, %q2;"
    "mov.b64 {%r9, _}, %rd3;",
    "taken by selp": "selp.b32 %r9, %r1, 7, %p13;",
    "predicate": "mov.pred %p1, %p2; mov.u32 %r9, 1; @%p1 mov.u32 %r9, 2;",
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_registers_undefined(name: str) -> None:
    """Moving what nobody wrote is no fault; using it is, once it was moved."""
    move = "setp.eq.u32 %p13, 0, 0;" + MOVES[name]
    moved = move.replace("@%p1 mov", "mov").replace("cvt.u32.u64 %r9, %rd1;", "")
    moved = moved.replace("cvt.u32.u16 %r9, %h1;", "")
    result, _ = run(moved)
    assert not result.findings, result.report()
    result, _ = run(move + STORE)
    assert kinds(result) == {"uninitialised"}, name
    assert result.findings[0].count == 1


USES = [
    "add.u32 %r9, %r1, 1;",
    "st.shared.b32 [%smem], %r1;",
    "ld.shared.b32 %r9, [%r1];",
    "setp.eq.u32 %p1, %r1, 0;",
    "selp.b32 %r9, 1, 2, %p1;",
    "@%p1 mov.u32 %r9, 0;",
    "cvt.u64.u32 %rd1, %r1;",
    "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;",
]


@pytest.mark.parametrize("use", USES)
def test_uses_of_undefined_registers(use: str) -> None:
    assert "uninitialised" in kinds(run("st.shared.b32 [%smem], 0;" + use)[0])


def test_what_is_not_taken_or_partly_packed_may_be_undefined() -> None:
    body = """
    setp.lt.u32 %p1, %lane, 16;
    @%p1 mov.u32 %r1, 5;
    selp.b32 %r9, %r1, 7, %p1;
    mov.b64 %rd1, {%r9, %lane};
    cvt.u32.u64 %r9, %rd1;
    """
    result, out = run(body + STORE)
    assert not result.findings, result.report()
    assert out[:32].tolist() == [5] * 16 + [7] * 16
    result, _ = run(body.replace("selp.b32 %r9, %r1, 7, %p1;", "mov.b32 %r9, %r1;") + STORE)
    assert not result.findings, "a pack with a defined part counts as defined"
    partly = "setp.lt.u32 %p1, %lane, 16; @%p1 mov.u32 %r1, 5; mov.b32 %r9, %r1;"
    result, _ = run(partly + STORE)
    assert "ffff0000" in result.findings[0].text
    result, _ = run(partly + "mov.b32 %r9, 3;" + STORE)
    assert not result.findings


# ---------------------------------------------------------------- benign races

BOTH = "setp.lt.u32 %p1, %warp, 2; add.u32 %r1, %lane, WHAT; "
STORES = {
    "global": "mad.wide.u32 %rd1, %lane, 4, %out; st.global.b32 [%rd1], %r1;",
    "shared": "mad.lo.u32 %r2, %lane, 4, %smem; st.shared.b32 [%r2], %r1;",
    "vector": "mad.lo.u32 %r2, %lane, 8, %smem; st.shared.v2.b32 [%r2], {%r1, %r1};",
    "scattered": "mad.lo.u32 %r2, %lane, 64, %smem; st.shared.b32 [%r2], %r1;",
    "generic": "mad.wide.u32 %rd1, %lane, 4, %out; @%p1 st.b32 [%rd1], %r1;",
    "one lane": "@%p12 st.shared.b32 [%smem], %r1;",
}


@pytest.mark.parametrize("name", STORES)
def test_races_of_equal_bytes(name: str) -> None:
    body = BOTH + STORES[name]
    result, _ = run(body.replace("WHAT", "9"), warps=2)
    assert not result.findings, result.report()
    (note,) = result.notes
    assert note.kind == "benign race"
    assert "two unordered writes of equal bytes" in note.text
    assert "note, benign race" in result.report()
    result, _ = run(body.replace("WHAT", "9"), warps=2, policy=Policy(benign_races=True))
    assert kinds(result) == {"benign race"}
    assert not result.notes
    result, _ = run(body.replace("WHAT", "%warp"), warps=2)
    assert kinds(result) == {"race"}


def test_a_read_makes_it_a_race() -> None:
    body = """
    setp.eq.u32 %p1, %warp, 0;
    @%p10 st.shared.b32 [%smem], 0;
    bar.sync 0;
    @%p1 ld.shared.b32 %r1, [%smem];
    setp.eq.u32 %p2, %t, 32;
    @%p2 st.shared.b32 [%smem], 0;
    """
    assert kinds(run(body, warps=2)[0]) == {"race"}


# ---------------------------------------------------------------- cp.async and the tensor core

TENSOR_READ = """
    .shared .align 4 .b8 slot[4];
    .shared .align 8 .b8 bar[8];
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 32;
    @%p10 mbarrier.init.shared.b64 [bar], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    ld.shared.b32 %r5, [slot];
    mad.lo.u32 %r2, %lane, 16, %smem;
    mad.wide.u32 %rd1, %lane, 16, %data;
    WRITE
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r5], {%lane};
    tcgen05.wait::st.sync.aligned;
    bar.sync 0;
    shr.u32 %r3, %smem, 4;
    cvt.u64.u32 %rd2, %r3;
    or.b64 %rd2, %rd2, DESCRIPTOR;
    @%p10 tcgen05.cp.cta_group::1.4x256b [%r5], %rd2;
    @%p10 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];
    AGAIN: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0;
    @!%p1 bra AGAIN;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r9}, [%r5];
    tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%rd39], %r9;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r5, 32;
"""
COPY = "cp.async.ca.shared.global [%r2], [%rd1], 16; cp.async.wait_all;"
PLAIN = "st.shared.v4.b32 [%r2], {%lane, 0, 0, 0};"
FENCED = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize(
    ("write", "strict", "expected"),
    [
        (COPY, False, set()),
        (COPY, True, {"proxy"}),
        (COPY + FENCED, True, set()),
        (PLAIN, False, {"proxy"}),
        (PLAIN + FENCED, False, set()),
    ],
)
def test_copied_data_for_the_tensor_core(write: str, strict: bool, expected: set[str]) -> None:
    descriptor = str(tk.smem_descriptor(0, 128, 256, 16))
    body = TENSOR_READ.replace("WRITE", write).replace("DESCRIPTOR", descriptor)
    for mode in ("eager", "lazy"):
        result, out = run(body, policy=Policy(mode, strict_cp_async=strict))
        assert kinds(result) == expected, result.report()
        assert out[0] == 0


@pytest.mark.parametrize("strict", [False, True])
def test_copied_data_that_a_bulk_copy_overwrites(strict: bool) -> None:
    body = f"""
    .shared .align 8 .b8 bar[8];
    @%p10 mbarrier.init.shared.b64 [bar], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    mad.lo.u32 %r2, %lane, 16, %smem; mad.wide.u32 %rd1, %lane, 16, %data;
    {COPY}
    bar.sync 0;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;
    @%p10 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [%out], 64,
        [bar];
    AGAIN: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0;
    @!%p1 bra AGAIN;
    """
    result, _ = run(body, policy=Policy(strict_cp_async=strict))
    assert kinds(result) == ({"proxy"} if strict else set()), result.report()


def test_copied_data_for_a_bulk_copy_needs_the_fence() -> None:
    """Bulk copies that read it are no exception."""
    body = f"""
    mad.lo.u32 %r2, %lane, 16, %smem; mad.wide.u32 %rd1, %lane, 16, %data;
    {COPY}
    bar.sync 0;
    @%p10 cp.async.bulk.global.shared::cta.bulk_group [%out], [%smem], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    assert kinds(run(body)[0]) == {"proxy"}


# ---------------------------------------------------------------- scopes

FLAG = """
    @!%p11 bra RECEIVER;
    add.s64 %rd1, %data, 0;
    @%p10 st.global.b32 [%rd1+1024], 5;
    bar.sync 0;
    @!%p10 bra END;
    SEND
    bra END;
RECEIVER:
    POLL
    setp.ne.u32 %p1, %r3, 77;
    @%p1 bra RECEIVER;
    AFTER
    ld.global.b32 %r9, [%data+1024];
    st.global.b32 [%rd39], %r9;
END:
"""
SCOPED = [
    ("gpu", "gpu", "gpu", 1, True),
    ("cluster", "cluster", "cluster", 2, True),
    ("cluster", "gpu", "gpu", 2, True),
    ("gpu", "gpu", "cluster", 2, True),
    ("cluster", "cluster", "cluster", 1, False),
    ("gpu", "gpu", "cluster", 1, False),
    ("cta", "cta", "gpu", 2, False),
    ("gpu", "gpu", "cta", 2, False),
    ("cta", "gpu", "gpu", 2, False),
    ("gpu", "cta", "gpu", 1, False),
]


@pytest.mark.parametrize(("fence", "send", "receive", "cluster", "right"), SCOPED)
@pytest.mark.parametrize("form", ["release", "fence"])
def test_scopes(fence: str, send: str, receive: str, cluster: int, right: bool, form: str) -> None:
    """Data passed on through a flag of too narrow a scope is a race."""
    if form == "release" and fence != send:
        return
    if form == "release":
        sending = f"st.release.{send}.global.b32 [%data], 77;"
        receiving, after = f"ld.acquire.{receive}.global.b32 %r3, [%data];", ""
    else:
        sending = f"fence.acq_rel.{fence}; st.relaxed.{send}.global.b32 [%data], 77;"
        receiving = f"ld.relaxed.{receive}.global.b32 %r3, [%data];"
        after = f"fence.acq_rel.{receive};"
    body = FLAG.replace("SEND", sending).replace("POLL", receiving).replace("AFTER", after)
    for policy in POLICIES:
        result, out = run(body, grid=(2, 1, 1), cluster=(cluster, 1, 1), policy=policy)
        assert kinds(result) == (set() if right else {"race"}), result.report()
        assert out[0] == 5


def test_a_narrow_scope_is_enough_within_the_cta() -> None:
    body = """
    setp.eq.u32 %p1, %warp, 0;
    @!%p1 bra RECEIVER;
    @%p10 st.shared.b32 [%smem+4], 5;
    @%p10 st.release.cta.shared.b32 [%smem], 77;
    bra END;
RECEIVER:
    atom.acquire.cta.shared.add.u32 %r3, [%smem], 0;
    setp.ne.u32 %p2, %r3, 77;
    @%p2 bra RECEIVER;
    ld.shared.b32 %r9, [%smem+4];
    st.global.b32 [%rd39], %r9;
END:
    """
    start = "@%p10 st.shared.b32 [%smem], 0; bar.sync 0;"
    for policy in POLICIES:
        result, out = run(start + body, warps=2, policy=policy)
        assert not result.findings, result.report()
        assert out[32:64].tolist() == [5] * 32


# ---------------------------------------------------------------- pairs of CTAs


def pair(body: str, group: int = 2, **options: Any) -> tuple[Result, np.ndarray]:
    text = ".shared .align 4 .b8 slot[8];\n" + body.replace("GROUP", f"cta_group::{group}")
    return run(text, grid=(2, 1, 1), cluster=(2, 1, 1), **options)


ALLOC = "tcgen05.alloc.GROUP.sync.aligned.shared::cta.b32 [slot], 64;"
DEALLOC = "ld.shared.b32 %r5, [slot]; tcgen05.dealloc.GROUP.sync.aligned.b32 %r5, 64;"
RELINQUISH = "tcgen05.relinquish_alloc_permit.GROUP.sync.aligned;"
# The second CTA stays behind for a while; the first tells when it came past a step.
LATE = """
    @%p11 bra GO;
    mov.u32 %r1, 0;
    WORK: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 400; @%p1 bra WORK;
    st.relaxed.gpu.global.b32 [%out+2000], 1;
    GO: STEP
    @!%p11 bra END;
    ld.relaxed.gpu.global.b32 %r9, [%out+2000];
    st.global.b32 [%out], %r9;
    END:
"""


@pytest.mark.parametrize("step", ["alloc", "relinquish", "dealloc"])
@all_policies
def test_collective_steps_wait_for_the_peer(step: str, policy: Policy) -> None:
    steps = {"alloc": ALLOC, "relinquish": RELINQUISH, "dealloc": DEALLOC}
    names = list(steps)
    before = "".join(steps[name] for name in names[: names.index(step)])
    after = "".join(steps[name] for name in names[names.index(step) + 1 :])
    body = before + LATE.replace("STEP", steps[step]) + after
    result, out = pair(body, policy=policy)
    assert not result.findings, result.report()
    assert out[0] == 1
    result, out = pair(body, group=1, policy=Policy("eager", slice=4))
    assert not result.findings, result.report()
    assert out[0] == 0, "a CTA on its own does not wait"


def test_a_peer_uses_the_pair_s_columns_at_once() -> None:
    """When alloc returns in one CTA the columns of the other one are allocated, too."""
    a = np.zeros((256, 16), np.uint8)
    for seed in range(20):
        policy = Policy("random", seed=seed, slice=(1, 7, 1000)[seed % 3])
        result, _ = pair(
            ALLOC
            + """
    .shared .align 8 .b8 bar[8];
    @%p10 mbarrier.init.shared.b64 [bar], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    mad.lo.u32 %r2, %lane, 16, %smem;
    st.shared.v4.b32 [%r2], {%lane, 0, 0, 0};
    fence.proxy.async.shared::cta;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    ld.shared.b32 %r5, [slot];
    shr.u32 %r3, %smem, 4; cvt.u64.u32 %rd2, %r3; or.b64 %rd2, %rd2, DESCRIPTOR;
    and.pred %p2, %p10, %p11;
    @%p2 tcgen05.cp.cta_group::2.4x256b [%r5], %rd2;
    @%p2 tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.b64 [bar];
    @!%p11 bra PAST;
    AGAIN: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0;
    @!%p1 bra AGAIN;
    PAST: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    """.replace("DESCRIPTOR", str(tk.smem_descriptor(0, 128, 256, a.shape[1])))
            + DEALLOC,
            policy=policy,
        )
        assert not result.findings, result.report()


@pytest.mark.parametrize("other", [ALLOC.replace("64", "32"), RELINQUISH])
def test_a_pair_takes_the_same_step(other: str) -> None:
    body = "@!%p11 bra OTHER;" + ALLOC + "bra END; OTHER: " + other + "END:"
    result, _ = pair(body)
    assert "tmem" in kinds(result)
    assert "a pair performs them collectively" in result.report()


# ---------------------------------------------------------------- what findings tell


@pytest.mark.parametrize(
    ("offset", "distance"),
    [(8192 + 12, "12 bytes past its end"), (-4, "4 bytes before its start"), (8190, "last 2")],
)
def test_bounds_name_the_place(offset: int, distance: str) -> None:
    access = "ld.global.b32 %r1, [%rd1];" if offset != 8190 else "ld.global.b32 %r1, [%rd1-2];"
    if offset == 8190:  # a 4-byte access cannot be unaligned: 8 bytes of which 4 are inside
        access, distance, offset = "ld.global.v2.b32 {%r1, %r2}, [%rd1];", "the last 4 of", 8188
    room = np.zeros(4096, np.int32)
    start = 1024 + (room[1024:].ctypes.data // 4) % 2  # 8188 has to be a multiple of 8
    data = room[start : start + 2048]
    if data.ctypes.data % 8 != 4:
        data = room[start + 1 : start + 2049]
    body = module(f"@!%p10 bra END; add.s64 %rd1, %data, {offset}; {access} END:")
    result = run_ptx(body, data, np.zeros(64, np.int32), check=False)
    (finding,) = result.findings
    assert finding.kind == "bounds"
    assert finding.kernel == "kernel"
    assert f"offset {offset} of argument 0, which has 8192 bytes" in finding.text
    assert distance in finding.text
    assert finding.line == next(
        i for i, line in enumerate(body.split("\n"), 1) if "ld.global" in line
    )
    assert "in kernel kernel" in str(finding)
    assert f"PTX line {finding.line}" in str(finding)


def test_bounds_of_shared_memory_name_the_place() -> None:
    result, _ = run("st.shared.b32 [%smem + 4096], 0;")
    assert "4 bytes at shared+5120: the CTA's shared memory is 1024 .. 5120" in str(
        result.findings[0]
    )


def test_a_deadlock_tells_who_should_have_arrived() -> None:
    """Warps 0 and 1 and a bulk copy arrive in phase 0; in phase 1 warp 1 does not."""
    body = """
    .shared .align 8 .b8 bar[8];
    .file 1 "model.py"
    @%p10 mbarrier.init.shared.b64 [bar], 3;
    @%p10 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [%data], 64,
        [bar];
    setp.eq.u32 %p2, %t, 32;
    @%p2 mbarrier.arrive.shared.b64 _, [bar];
    setp.eq.u32 %p3, %t, 64;
    @%p3 mbarrier.arrive.shared.b64 _, [bar];
    .loc 1 17 0
    ONE: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 0;
    @!%p4 bra ONE;
    setp.eq.u32 %p5, %warp, 1;
    @%p5 exit;
    @%p1 mbarrier.arrive.shared.b64 _, [bar];
    @%p3 mbarrier.arrive.shared.b64 _, [bar];
    .loc 1 23 0
    TWO: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 1;
    @!%p4 bra TWO;
    """
    source = module(body).replace('    .file 1 "model.py"\n', "") + '.file 1 "model.py"\n'
    lines = source.split("\n")

    def line_of(text: str, last: bool = False) -> int:
        found = [i for i, line in enumerate(lines, 1) if text in line]
        return found[-1 if last else 0]

    data = np.zeros(64, np.int64)
    data = data[data.ctypes.data % 16 // 8 :]
    for policy in POLICIES:
        result = run_ptx(
            source,
            data,
            np.zeros(128, np.int32),
            block=(96, 1, 1),
            dynamic_shared=64,
            policy=policy,
            check=False,
        )
        assert kinds(result) == {"deadlock"}, result.report()
        table = result.deadlock.splitlines()
        assert len(table) == 2
        waits = line_of("try_wait", last=True)
        for line in table:
            assert f"PTX line {waits} (model.py:23)" in line
            assert "1 phases completed, missing 1 of 3 arrivals and 0 bytes" in line
            now, before = line.split("arrived in this phase: ")[1].split(
                "; in earlier phases, but not in this: "
            )
            assert f"warp 0 (PTX line {line_of('@%p1 mbarrier.arrive.shared')}" in now
            assert f"warp 2 (PTX line {line_of('@%p3 mbarrier', last=True)}" in now
            assert f"warp 1 (PTX line {line_of('@%p2 mbarrier')}" in before
            assert f"TMA load of warp 0 (PTX line {line_of('cp.async.bulk')}" in before
        assert "warp 1" in result.findings[-1].text


def test_a_deadlock_tells_who_arrives_in_other_ctas() -> None:
    body = """
    .shared .align 8 .b8 bar[8];
    @%p10 mbarrier.init.shared.b64 [bar], 1;
    bar.sync 0;
    setp.eq.u32 %p1, %t, 32;
    and.pred %p1, %p1, %p11;
    @%p1 mbarrier.arrive.shared.b64 _, [bar];
    setp.eq.u32 %p3, %warp, 1;
    @%p3 exit;
    ONE: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 0;
    @!%p4 bra ONE;
    """
    result, _ = run(body, warps=2, grid=(2, 1, 1))
    (line,) = result.deadlock.splitlines()
    assert line.startswith("CTA 1 warp  0")
    assert "in other CTAs: warp 1 of CTA 0 (PTX line" in line


# ---------------------------------------------------------------- modules and the cache


def test_kernels_of_a_module_share_its_variables() -> None:
    source = """
.version 8.8
.target sm_100a
.address_size 64
.global .align 4 .b32 counter = 5;
.visible .entry count() {
    .reg .b32 %r<4>;
    .global .align 4 .b32 mine = 3;
    ld.global.b32 %r1, [counter]; add.u32 %r1, %r1, 1; st.global.b32 [counter], %r1;
    ld.global.b32 %r2, [mine]; add.u32 %r2, %r2, 10; st.global.b32 [mine], %r2;
    ret;
}
.visible .entry show(.param .u64 out) {
    .reg .b32 %r<4>; .reg .b64 %rd<3>;
    .global .align 4 .b32 own = 40;
    ld.param.u64 %rd1, [out];
    ld.global.b32 %r1, [counter]; st.global.b32 [%rd1], %r1;
    ld.global.b32 %r1, [own]; st.global.b32 [%rd1+4], %r1;
    ret;
}
"""
    out = np.zeros(2, np.int32)
    region = memory_of(out, "out")
    assert region is not None
    machine = Machine([region])
    count, show = load(source, "count"), load(source, "show")
    count.reset_globals()
    for _ in range(3):
        machine.launch(count, b"", block=(1, 1, 1)).check()
    machine.launch(show, pack_arguments(show, [out])[0], block=(1, 1, 1)).check()
    assert out.tolist() == [8, 40]
    show.reset_globals()
    machine.launch(show, pack_arguments(show, [out])[0], block=(1, 1, 1)).check()
    assert out.tolist() == [5, 40]


def test_old_objects_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_FMHA_CACHE", str(tmp_path))
    source = tmp_path / "part.c"
    for version in range(8):
        source.write_text(f"int version(void) {{ return {version}; }}\n")
        build.build_library("thing", [source])
        for path in (tmp_path / "thing").iterdir():
            if path.stat().st_mtime > time.time() - 3600:
                age = time.time() - 7200 + version
                os.utime(path, (age, age))
    names = sorted(path.suffix for path in (tmp_path / "thing").iterdir())
    assert names.count(".o") <= 5
    assert names.count(".so") <= 5


# ---------------------------------------------------------------- schedules


def test_random_turns_do_not_stall_when_everyone_waits() -> None:
    """256 warps wait for 8 copies: sitting out turns at random must not keep them waiting."""
    body = """
    .shared .align 8 .b8 bar[8];
    @%p10 mbarrier.init.shared.b64 [bar], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 64;
    @%p10 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [%data], 64,
        [bar];
    AGAIN: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0;
    @!%p1 bra AGAIN;
    """
    data = np.zeros(64, np.int64)
    data = data[data.ctypes.data % 16 // 8 :]
    for seed in range(8):
        policy = Policy("random", seed=seed, resident=8)
        run_ptx(
            module(body),
            data,
            np.zeros(1024, np.int32),
            grid=(8, 1, 1),
            block=(1024, 1, 1),
            dynamic_shared=64,
            policy=policy,
        )
