"""The race detector: flags, fences and atomics between CTAs, bytes, tensor memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import ptx_source
import pytest
from outcomes import clean, kinds, text

from cute_fmha.emulator.machine import Policy, run_ptx

POLICIES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in (1, 2, 3, 4)]
all_policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.mode}{p.seed}")


def module(body: str) -> str:
    return ptx_source.module(body, "data", "flag", "out")


def run(body: str, warps: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    options.setdefault("check", False)
    options.setdefault("policy", Policy("eager"))
    data, flag, out = np.zeros(1024, np.int32), np.zeros(16, np.int32), np.zeros(1024, np.int32)
    block = (32 * warps, 1, 1)
    result = run_ptx(module(body), data, flag, out, block=block, dynamic_shared=4096, **options)
    return result, out


# ---------------------------------------------------------------- flags in global memory


def flag_kernel(send: str, poll: str) -> str:
    """CTA 0 writes data and raises the flag; CTA 1 polls the flag and reads the data."""
    return f"""
    mul.wide.u32 %rd1, %t, 4;
    @!%p11 bra RECEIVER;
    add.s64 %rd2, %data, %rd1;
    add.u32 %r1, %t, 70;
    st.global.b32 [%rd2], %r1;
    bar.sync 0;
    mov.u32 %r2, 1;
    @!%p10 bra END;
    {send}
    bra END;
RECEIVER:
    {poll}
    setp.eq.u32 %p1, %r3, 0;
    @%p1 bra RECEIVER;
    AFTER
    xor.b32 %r4, %t, 32;
    mul.wide.u32 %rd3, %r4, 4;
    add.s64 %rd2, %data, %rd3;
    ld.global.b32 %r1, [%rd2];
    add.s64 %rd2, %out, %rd1;
    st.global.b32 [%rd2], %r1;
END:
"""


FENCE = "fence.acq_rel.gpu;"
RIGHT = {
    "release and acquire": (
        "st.release.gpu.global.b32 [%flag], %r2;",
        "ld.acquire.gpu.global.b32 %r3, [%flag];",
        "",
    ),
    "system scope": (
        "st.release.sys.global.b32 [%flag], %r2;",
        "ld.acquire.sys.global.b32 %r3, [%flag];",
        "",
    ),
    "relaxed with fences": (
        f"{FENCE} st.relaxed.gpu.global.b32 [%flag], %r2;",
        "ld.relaxed.gpu.global.b32 %r3, [%flag];",
        FENCE,
    ),
    "volatile with membar": (
        "membar.gl; st.volatile.global.b32 [%flag], %r2;",
        "ld.volatile.global.b32 %r3, [%flag];",
        "membar.gl;",
    ),
    "reduction": (
        "red.release.gpu.global.add.u32 [%flag], %r2;",
        "ld.acquire.gpu.global.b32 %r3, [%flag];",
        "",
    ),
    "exchange": (
        "atom.release.gpu.global.exch.b32 %r9, [%flag], %r2;",
        "atom.acquire.gpu.global.or.b32 %r3, [%flag], 0;",
        "",
    ),
    "sc fences": (
        "fence.sc.gpu; red.relaxed.gpu.global.add.u32 [%flag], %r2;",
        "ld.relaxed.gpu.global.b32 %r3, [%flag];",
        "fence.sc.gpu;",
    ),
}
WRONG = {
    "plain": ("st.global.b32 [%flag], %r2;", "ld.global.b32 %r3, [%flag];", ""),
    "relaxed": (
        "st.relaxed.gpu.global.b32 [%flag], %r2;",
        "ld.relaxed.gpu.global.b32 %r3, [%flag];",
        "",
    ),
    "volatile": (
        "st.volatile.global.b32 [%flag], %r2;",
        "ld.volatile.global.b32 %r3, [%flag];",
        "",
    ),
    "no acquire": (
        "st.release.gpu.global.b32 [%flag], %r2;",
        "ld.relaxed.gpu.global.b32 %r3, [%flag];",
        "",
    ),
    "no release": (
        "st.relaxed.gpu.global.b32 [%flag], %r2;",
        "ld.acquire.gpu.global.b32 %r3, [%flag];",
        "",
    ),
    "fence after the flag": (
        f"st.relaxed.gpu.global.b32 [%flag], %r2; {FENCE}",
        "ld.acquire.gpu.global.b32 %r3, [%flag];",
        "",
    ),
}


@all_policies
@pytest.mark.parametrize("name", RIGHT)
def test_flags(policy: Policy, name: str) -> None:
    send, poll, after = RIGHT[name]
    body = flag_kernel(send, poll).replace("AFTER", after)
    result, out = run(body, warps=2, grid=(2, 1, 1), policy=policy)
    clean(result)
    assert np.array_equal(out[:64], (np.arange(64) ^ 32) + 70)


@all_policies
@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags(policy: Policy, name: str) -> None:
    send, poll, after = WRONG[name]
    body = flag_kernel(send, poll).replace("AFTER", after)
    result, _ = run(body, warps=2, grid=(2, 1, 1), policy=policy)
    assert "race" in kinds(result)


def last_arriver(atomic: str) -> str:
    """Every CTA writes its part; the one that comes last adds all of them up."""
    return f"""
    mad.lo.u32 %r1, %cta, 64, %t;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd2, %data, %rd1;
    st.global.b32 [%rd2], %r1;
    bar.sync 0;
    @!%p10 bra SHARE;
    {atomic}
    st.shared.b32 [%smem], %r2;
SHARE:
    bar.sync 0;
    ld.shared.b32 %r2, [%smem];
    mov.u32 %r3, %nctaid.x;
    sub.u32 %r3, %r3, 1;
    setp.ne.u32 %p1, %r2, %r3;
    @%p1 bra END;
    mov.u32 %r4, 0;
    mov.u32 %r5, 0;
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd2, %data, %rd1;
ADD:
    ld.global.b32 %r6, [%rd2];
    add.u32 %r5, %r5, %r6;
    add.s64 %rd2, %rd2, 256;
    add.u32 %r4, %r4, 1;
    setp.le.u32 %p2, %r4, %r3;
    @%p2 bra ADD;
    add.s64 %rd2, %out, %rd1;
    st.global.b32 [%rd2], %r5;
END:
"""


@all_policies
@pytest.mark.parametrize(
    "atomic",
    [
        "atom.acq_rel.gpu.global.add.u32 %r2, [%flag], 1;",
        "fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 %r2, [%flag], 1; fence.acq_rel.gpu;",
        "membar.gl; atom.global.add.u32 %r2, [%flag], 1; membar.gl;",
        "atom.acq_rel.gpu.global.inc.u32 %r2, [%flag], 1000;",
    ],
)
def test_last_arriver(policy: Policy, atomic: str) -> None:
    result, out = run(last_arriver(atomic), warps=2, grid=(6, 1, 1), policy=policy)
    clean(result)
    assert np.array_equal(out[:64], 6 * np.arange(64) + 64 * 15)


@all_policies
@pytest.mark.parametrize(
    "atomic",
    [
        "atom.relaxed.gpu.global.add.u32 %r2, [%flag], 1;",
        "atom.acquire.gpu.global.add.u32 %r2, [%flag], 1;",
        "atom.release.gpu.global.add.u32 %r2, [%flag], 1;",
        "fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 %r2, [%flag], 1;",
    ],
)
def test_wrong_last_arriver(policy: Policy, atomic: str) -> None:
    result, _ = run(last_arriver(atomic), warps=2, grid=(6, 1, 1), policy=policy)
    assert "race" in kinds(result)


def test_report_names_both_sides() -> None:
    send, poll, _ = WRONG["relaxed"]
    source = flag_kernel(send, poll).replace("AFTER", "")
    result, _ = run(source, warps=2, grid=(2, 1, 1))
    lines = module(source).splitlines()
    write = next(i for i, line in enumerate(lines, 1) if "st.global.b32 [%rd2], %r1;" in line)
    message = text(result)
    assert f"line {write}" in message
    assert "of CTA 0" in message
    assert "of CTA 1" in message
    assert "ld.global.b32" in message


# ---------------------------------------------------------------- atomics


@all_policies
def test_atomics_do_not_race_with_each_other(policy: Policy) -> None:
    body = """
    @%p10 st.shared.b32 [%smem], 0;
    bar.sync 0;
    atom.shared.add.u32 %r1, [%smem], 1;
    red.shared.add.u32 [%smem], 2;
    red.global.add.u32 [%flag], 1;
    bar.sync 0;
    ld.shared.b32 %r1, [%smem];
    @%p10 st.global.b32 [%out], %r1;
"""
    result, out = run(body, warps=4, policy=policy)
    clean(result)
    assert out[0] == 3 * 128


@pytest.mark.parametrize("other", ["ld.shared.b32 %r2, [%smem];", "st.shared.b32 [%smem], 0;"])
def test_atomic_against_plain(other: str) -> None:
    body = f"""
    @%p10 st.shared.b32 [%smem], 0;
    bar.sync 0;
    setp.eq.u32 %p1, %warp, 0;
    @%p1 red.shared.add.u32 [%smem], 1;
    @!%p1 {other}
"""
    assert "race" in kinds(run(body, warps=2)[0])


# ---------------------------------------------------------------- bytes


def test_neighbouring_bytes() -> None:
    """Warps write alternating bytes, halves and words of the same 16 bytes: that is no race."""
    for bytes_, store in ((1, "st.shared.b8"), (2, "st.shared.b16"), (4, "st.shared.b32")):
        value = "%r2" if bytes_ == 4 else "%h1"
        body = f"""
    mad.lo.u32 %r1, %lane, 4, %warp;
    mad.lo.u32 %r1, %r1, {bytes_}, %smem;
    mov.u32 %r2, %t;
    cvt.u16.u32 %h1, %r2;
    {store} [%r1], {value};
    ld.shared.b{8 * bytes_} {value}, [%r1];
    {store} [%r1], {value};
"""
        clean(run(body, warps=4)[0])
        assert "race" in kinds(run(body + f"ld.shared.b{8 * bytes_} {value}, [%smem];", warps=4)[0])


def test_overlapping_widths() -> None:
    body = """
    setp.eq.u32 %p1, %warp, 0;
    mov.u32 %r1, 0x70007;
    cvt.u16.u32 %h1, %r1;
    @%p1 st.shared.v2.b32 [%smem], {%r1, %r1};
    @!%p1 mov.u16 %h1, 9;
    @!%p1 st.shared.b16 [%smem + OFFSET], %h1;
"""
    for offset in (0, 2, 6):
        assert "race" in kinds(run(body.replace("OFFSET", str(offset)), warps=2)[0])
    for offset in (8, 14, 16):
        clean(run(body.replace("OFFSET", str(offset)), warps=2)[0])


def test_reads_of_several_warps_before_a_write() -> None:
    """A write must be ordered after every reader, not only after the last one."""
    body = """
    @%p10 st.shared.b32 [%smem], 7;
    bar.sync 0;
    ld.shared.b32 %r1, [%smem];
    ORDER
    setp.eq.u32 %p1, %warp, 0;
    @%p1 st.shared.b32 [%smem], 8;
"""
    clean(run(body.replace("ORDER", "bar.sync 0;"), warps=6)[0])
    partial = "setp.ne.u32 %p2, %warp, 3; @%p2 barrier.sync 1, 160;"
    result, _ = run(body.replace("ORDER", partial), warps=6)
    assert "race" in kinds(result)
    assert "warp 3" in text(result)


def test_uninitialised() -> None:
    result, _ = run("ld.shared.b32 %r1, [%smem + 100];")
    assert kinds(result) == {"uninitialised"}
    result, _ = run("st.shared.b16 [%smem + 100], 0; ld.shared.b32 %r1, [%smem + 100];")
    assert kinds(result) == {"uninitialised"}
    clean(run("st.shared.b32 [%smem + 100], 0; ld.shared.b16 %h1, [%smem + 102];")[0])


def test_detection_can_be_switched_off() -> None:
    body = "st.shared.b32 [%smem], %t; ld.shared.b32 %r1, [%smem + 100];"
    clean(run(body, warps=4, policy=Policy("eager", races=False))[0])


def test_launches_are_ordered() -> None:
    """Two launches on the same memory: each starts with nothing known, and finds nothing."""
    body = """
    mad.lo.u32 %r1, %cta, 32, %t;
    xor.b32 %r1, %r1, MASK;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd1, %data, %rd1;
    ld.global.b32 %r2, [%rd1];
    add.u32 %r2, %r2, 1;
    st.global.b32 [%rd1], %r2;
"""
    for mask in (0, 32):
        clean(run(body.replace("MASK", str(mask)), grid=(4, 1, 1))[0])


def test_many_readers_and_states() -> None:
    """Enough different states that old ones are collected: still nothing false, and races found."""
    body = """
    mov.u32 %r0, 0;
    LOOP:
    add.u32 %r1, %t, %r0;
    and.b32 %r1, %r1, 127;
    mad.lo.u32 %r1, %r1, 4, %smem;
    st.shared.b32 [%r1], %r0;
    bar.sync 0;
    xor.b32 %r2, %r1, 256;
    ld.shared.b32 %r3, [%r2];
    bar.sync 0;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 300;
    @%p0 bra LOOP;
    RACE
"""
    clean(run(body.replace("RACE", ""), warps=4)[0])
    result, _ = run(body.replace("RACE", "st.shared.b32 [%smem], %warp;"), warps=4)
    assert "race" in kinds(result)


# ---------------------------------------------------------------- tensor memory

TMEM = """
    setp.eq.u32 %p1, %warp, 0;
    @!%p1 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%smem], 32;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
ALLOCATED:
    bar.sync 0;
    ld.shared.b32 %r1, [%smem];
    setp.eq.u32 %p2, %warp, 4;
    @%p2 bra READ;
    @!%p1 bra END;
    tcgen05.st.sync.aligned.32x32b.x2.b32 [%r1], {%t, %warp};
    tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync;
    bar.sync 1, 64;
    bra END;
READ:
    bar.sync 1, 64;
    tcgen05.fence::after_thread_sync;
    tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r2, %r3}, [%r1];
    tcgen05.wait::ld.sync.aligned;
    mul.wide.u32 %rd1, %lane, 4;
    add.s64 %rd1, %out, %rd1;
    st.global.b32 [%rd1], %r2;
END:
    bar.sync 2;
    @!%p1 bra DONE;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 32;
DONE:
"""


@all_policies
def test_tensor_memory(policy: Policy) -> None:
    """Warps 0 and 4 share their lanes of tensor memory: one writes, the other reads."""
    result, out = run(TMEM, warps=5, policy=policy)
    clean(result)
    assert np.array_equal(out[:32], np.arange(32))


@all_policies
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("bar.sync 1, 64;", {"race", "uninitialised"}),
        ("tcgen05.wait::st.sync.aligned;", {"race", "uninitialised"}),
        ("tcgen05.st.sync.aligned.32x32b.x2.b32 [%r1], {%t, %warp};", {"uninitialised"}),
    ],
)
def test_wrong_use_of_tensor_memory(policy: Policy, line: str, found: set[str]) -> None:
    result, _ = run(TMEM.replace(line, ""), warps=5, policy=policy)
    assert kinds(result) & found
