"""Barriers of the emulator: what they order, what they compute, and how they are misused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ptx_source
import pytest
from outcomes import clean, kinds, text

from cute_fmha.emulator.machine import Policy, run_ptx

SHARED = 4096
POLICIES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in (1, 2, 3)]
all_policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.mode}{p.seed}")


def module(body: str) -> str:
    return ptx_source.module(body, "out")


def run(body: str, out: np.ndarray | None = None, warps: int = 2, **options: Any) -> Any:
    options.setdefault("policy", Policy("eager"))
    options.setdefault("check", False)
    out = np.zeros(64, np.int32) if out is None else out
    return run_ptx(module(body), out, block=(32 * warps, 1, 1), dynamic_shared=SHARED, **options)


STORE_OUT = """
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd1, %out, %rd1;
    st.global.b32 [%rd1], %r1;
"""

# ---------------------------------------------------------------- named barriers


def exchange(barrier: str) -> str:
    """Thread t writes 3 t, and reads what the thread one warp further wrote."""
    return f"""
    mul.lo.u32 %r0, %t, 3;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %smem;
    st.shared.b32 [%r2], %r0;
    {barrier}
    add.u32 %r3, %t, 32;
    mov.u32 %r4, %ntid.x;
    rem.u32 %r3, %r3, %r4;
    shl.b32 %r3, %r3, 2;
    add.u32 %r3, %r3, %smem;
    ld.shared.b32 %r1, [%r3];
{STORE_OUT}
"""


@all_policies
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "barrier.sync 0;",
        "barrier.cta.sync.aligned 0, 128;",
        "mov.u32 %r5, 7; mov.u32 %r6, 128; barrier.sync.aligned %r5, %r6;",
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
        "fence.acq_rel.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;",
    ],
)
def test_barrier_orders(policy: Policy, barrier: str) -> None:
    out = np.zeros(128, np.int32)
    clean(run(exchange(barrier), out, warps=4, policy=policy))
    assert np.array_equal(out, (np.arange(128) + 32) % 128 * 3)


@all_policies
@pytest.mark.parametrize(
    "barrier",
    [
        "",
        "barrier.sync %warp, 32;",
        "bar.arrive 1, 128;",
        "barrier.cluster.arrive; ",
        "barrier.cluster.arrive.relaxed; barrier.cluster.wait;",
        "bar.warp.sync -1;",
        "fence.acq_rel.gpu;",
        "membar.gl;",
    ],
)
def test_no_barrier_is_a_race(policy: Policy, barrier: str) -> None:
    result = run(exchange(barrier), np.zeros(128, np.int32), warps=4, policy=policy)
    assert "race" in kinds(result)
    assert "st.shared.b32" in text(result)
    assert "ld.shared.b32" in text(result)


PING_PONG = """
    mov.u32 %r0, 0;
    setp.ne.u32 %p0, %warp, 0;
    shl.b32 %r2, %lane, 2;
    add.u32 %r2, %r2, %smem;
    mov.u32 %r1, 0;
    @%p0 bra CONSUMER;
PRODUCER:
    {wait}
    add.u32 %r3, %r0, %lane;
    st.shared.b32 [%r2], %r3;
    bar.arrive 1, 64;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p1, %r0, 9;
    @%p1 bra PRODUCER;
    {last_wait}
    bra END;
CONSUMER:
    bar.arrive 2, 64;
CONSUMER_LOOP:
    bar.sync 1, 64;
    xor.b32 %r4, %r2, 124;
    ld.shared.b32 %r3, [%r4];
    add.u32 %r1, %r1, %r3;
    bar.arrive 2, 64;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p1, %r0, 9;
    @%p1 bra CONSUMER_LOOP;
END:
"""


@all_policies
def test_arrive_and_sync(policy: Policy) -> None:
    out = np.zeros(64, np.int32)
    body = PING_PONG.format(wait="bar.sync 2, 64;", last_wait="bar.sync 2, 64;") + STORE_OUT
    clean(run(body, out, policy=policy))
    assert np.array_equal(out[32:], 9 * (np.arange(32) ^ 31) + 36)


def test_producer_that_does_not_wait() -> None:
    result = run(PING_PONG.format(wait="", last_wait="") + STORE_OUT)
    assert kinds(result) & {"race", "barrier"}


@all_policies
def test_reductions(policy: Policy) -> None:
    out = np.zeros(3 * 96, np.int32)
    body = """
    mul.lo.u32 %r0, %t, 2654435761;
    shr.u32 %r0, %r0, 28;
    setp.lt.u32 %p0, %r0, 5;
    bar.red.popc.u32 %r1, 3, %p0;
    setp.lt.u32 %p1, %t, 96;
    barrier.red.and.pred %p2, 4, 96, %p1;
    barrier.cta.red.or.pred %p3, 5, 96, !%p1;
    selp.b32 %r2, 1, 0, %p2;
    selp.b32 %r3, 1, 0, %p3;
    mul.wide.u32 %rd1, %t, 12;
    add.s64 %rd1, %out, %rd1;
    st.global.b32 [%rd1], %r1;
    st.global.b32 [%rd1 + 4], %r2;
    st.global.b32 [%rd1 + 8], %r3;
"""
    clean(run(body, out, warps=3, policy=policy))
    votes = (np.arange(96, dtype=np.uint64) * 2654435761 % 2**32 >> 28) < 5
    assert (out.reshape(96, 3) == [votes.sum(), 1, 0]).all()


def test_lanes_arrive_at_different_places() -> None:
    out = np.zeros(64, np.int32)
    body = f"""
    mov.u32 %r1, %t;
    setp.lt.u32 %p0, %lane, 10;
    @%p0 bra FEW;
    barrier.sync 1, 64;
    add.u32 %r1, %r1, 100;
    bra END;
FEW:
    barrier.sync 1, 64;
    add.u32 %r1, %r1, 200;
END:
{STORE_OUT}
"""
    clean(run(body, out))
    lane = np.arange(64) % 32
    assert np.array_equal(out, np.arange(64) + np.where(lane < 10, 200, 100))


def test_exited_threads_are_not_waited_for() -> None:
    out = np.zeros(96, np.int32)
    body = f"""
    setp.eq.u32 %p0, %warp, 1;
    @%p0 ret;
    mov.u32 %r1, 5;
    bar.sync 0;
    barrier.cluster.arrive;
    barrier.cluster.wait;
{STORE_OUT}
"""
    for policy in POLICIES:
        clean(run(body, out, warps=3, policy=policy))
    assert np.array_equal(out, np.repeat([5, 0, 5], 32))


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("setp.eq.u32 %p0, %warp, 0; @%p0 bar.sync 1, 64;", "deadlock", ""),
        (
            "setp.eq.u32 %p0, %warp, 0; @%p0 bar.arrive 1, 64; @%p0 bar.arrive 1, 64;",
            "barrier",
            "twice",
        ),
        ("add.u32 %r0, %warp, 2; shl.b32 %r0, %r0, 5; bar.sync 1, %r0;", "barrier", "others for"),
        ("mov.u32 %r0, 16; bar.sync %r0;", "barrier", "no barrier 16"),
        ("bar.sync 1, 48;", "barrier", "whole warps"),
        ("bar.sync 1, 0;", "barrier", "whole warps"),
        ("barrier.sync %lane, 64;", "divergence", "different barriers"),
        ("setp.eq.u32 %p0, %lane, 3; @%p0 bar.sync 0;", "divergence", ""),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "barrier", "again"),
        ("barrier.cluster.wait;", "barrier", "without having arrived"),
        (
            "setp.eq.u32 %p0, %warp, 0; @%p0 barrier.cluster.arrive; @%p0 barrier.cluster.wait;"
            "@!%p0 bar.sync 3, 160;",
            "deadlock",
            "",
        ),
    ],
)
def test_misuse(body: str, kind: str, message: str) -> None:
    result = run(body, warps=5)
    assert kind in kinds(result), text(result)
    assert message in text(result)


# ---------------------------------------------------------------- mbarrier


def with_mbarrier(
    body: str, count: int = 1, fence: str = "fence.mbarrier_init.release.cluster;"
) -> str:
    """`body` after thread 0 initialised the mbarrier at %smem."""
    return f"""
    setp.eq.u32 %p10, %t, 0;
    setp.eq.u32 %p11, %lane, 0;
    setp.eq.u32 %p12, %warp, 0;
    @%p10 mbarrier.init.shared::cta.b64 [%smem], {count};
    @%p10 {fence}
    bar.sync 0;
{body}
"""


def wait(parity: str, name: str, kind: str = "mbarrier.try_wait.parity.shared::cta.b64") -> str:
    return f"""
{name}:
    {kind} %p1, [%smem], {parity};
    @!%p1 bra {name};
"""


ROUNDS = f"""
    mov.u32 %r0, 0;
    mov.u32 %r1, 0;
LOOP:
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %smem;
    and.b32 %r6, %r0, 1;
    mad.lo.u32 %r2, %r6, 1024, %r2;
    add.u32 %r3, %t, %r0;
    st.shared.b32 [%r2 + 64], %r3;
    ARRIVE
{wait("%r6", "WAIT")}
    xor.b32 %r4, %r2, 128;
    ld.shared.b32 %r3, [%r4 + 64];
    add.u32 %r1, %r1, %r3;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 6;
    @%p0 bra LOOP;
{STORE_OUT}
"""


@all_policies
@pytest.mark.parametrize(
    ("count", "arrive"),
    [
        (64, "mbarrier.arrive.shared::cta.b64 _, [%smem];"),
        (64, "mbarrier.arrive.shared.b64 %rd2, [%smem], 1;"),
        (2, "@%p11 mbarrier.arrive.release.cta.shared::cta.b64 _, [%smem];"),
        (6, "@%p11 mbarrier.arrive.shared::cluster.b64 _, [%smem], 3;"),
        (2, "fence.acq_rel.cta; @%p11 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%smem];"),
        (2, "@%p11 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%smem], 0;"),
        (2, "@%p11 mbarrier.arrive.noComplete.b64 %rd2, [%smem], 0 + 1;"),
    ],
)
def test_mbarrier_orders(policy: Policy, count: int, arrive: str) -> None:
    if "noComplete" in arrive:
        count, arrive = 4, arrive.replace("0 + 1", "1").replace("[%smem]", "[%rd3]")
        arrive = (
            "mul.wide.u32 %rd3, %smem, 1; cvta.shared.u64 %rd3, %rd3;"
            + arrive
            + "@%p11 mbarrier.arrive.b64 _, [%rd3];"
        )
    out = np.zeros(64, np.int32)
    clean(run(with_mbarrier(ROUNDS.replace("ARRIVE", arrive), count), out, policy=policy))
    assert np.array_equal(out, 6 * (np.arange(64) ^ 32) + 15)


@all_policies
def test_relaxed_arrival_orders_nothing(policy: Policy) -> None:
    arrive = "@%p11 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%smem];"
    assert "race" in kinds(run(with_mbarrier(ROUNDS.replace("ARRIVE", arrive), 2), policy=policy))


def test_relaxed_wait_orders_nothing() -> None:
    arrive = "@%p11 mbarrier.arrive.shared::cta.b64 _, [%smem];"
    rounds = ROUNDS.replace("ARRIVE", arrive)
    relaxed = rounds.replace("try_wait.parity", "try_wait.parity.relaxed.cta")
    assert "race" in kinds(run(with_mbarrier(relaxed, 2)))
    fenced = relaxed.replace("xor.b32", "fence.acq_rel.cta; xor.b32")
    clean(run(with_mbarrier(fenced, 2)))


@all_policies
def test_missing_arrival_is_a_deadlock(policy: Policy) -> None:
    body = with_mbarrier("@%p10 mbarrier.arrive.shared.b64 _, [%smem];" + wait("0", "WAIT"), 2)
    result = run(body, policy=policy)
    assert kinds(result) == {"deadlock"}
    assert result.counters.wait_failures >= 2


@all_policies
@pytest.mark.parametrize("kind", ["try_wait", "test_wait"])
def test_states(policy: Policy, kind: str) -> None:
    """Every thread waits for the phase of its own arrival; the state tells what was missing."""
    out = np.zeros(64, np.int32)
    body = f"""
    mbarrier.arrive.shared.b64 %rd2, [%smem];
    mbarrier.pending_count.b64 %r1, %rd2;
{wait("%rd2", "WAIT", f"mbarrier.{kind}.shared.b64")}
{STORE_OUT}
"""
    clean(run(with_mbarrier(body, 64), out, policy=policy))
    assert np.array_equal(np.sort(out), np.repeat([32, 64], 32))  # a warp arrives as one


def test_arrive_drop() -> None:
    """Warp 1 takes part in the first phase only."""
    out = np.zeros(64, np.int32)
    body = f"""
    setp.eq.u32 %p2, %t, 32;
    @%p2 mbarrier.arrive_drop.shared.b64 _, [%smem];
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
{wait("0", "FIRST")}
    bar.sync 1;
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
{wait("1", "SECOND")}
    mov.u32 %r1, 9;
{STORE_OUT}
"""
    for policy in POLICIES:
        clean(run(with_mbarrier(body, 2), out, policy=policy))
    assert (out == 9).all()


@all_policies
def test_transactions(policy: Policy) -> None:
    body = f"""
    setp.eq.u32 %p2, %t, 32;
    @%p10 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%smem], 96;
    @%p10 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%smem], 32;
    bar.sync 1;
    @%p2 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%smem], 64;
    @%p2 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%smem], 64;
{wait("0", "WAIT")}
"""
    wrong = run(with_mbarrier(body.replace("[%smem], 32;", "[%smem], 16;")), policy=policy)
    assert kinds(wrong) == {"transaction", "deadlock"}
    clean(run(with_mbarrier(body), policy=policy))


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("@%p11 mbarrier.arrive.shared.b64 _, [%smem], 2;", "barrier", "only 1 of 1"),
        ("@%p12 mbarrier.arrive.shared.b64 _, [%smem];", "barrier", "32 arrivals"),
        ("@%p10 mbarrier.arrive.shared.b64 _, [%smem], 0;", "barrier", "0 arrivals"),
        ("@%p10 mbarrier.arrive.noComplete.shared.b64 %rd2, [%smem], 1;", "barrier", "noComplete"),
        (
            "@%p10 mbarrier.complete_tx.shared.b64 [%smem], 64;"
            "@%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 32;",
            "transaction",
            "32 more bytes",
        ),
        ("@%p10 mbarrier.expect_tx.shared.b64 [%smem], 1048576;", "transaction", "range"),
        ("@%p10 mbarrier.arrive.shared.b64 _, [%smem + 8];", "barrier", "never initialised"),
        ("@%p10 mbarrier.arrive.shared.b64 _, [%smem + 4];", "alignment", "8 bytes"),
        (
            "@%p10 mbarrier.inval.shared.b64 [%smem]; @%p10 mbarrier.arrive.shared.b64 _, [%smem];",
            "barrier",
            "invalidated",
        ),
        ("@%p12 mbarrier.init.shared.b64 [%smem + 16], %r1;", "uninitialised", ""),
        (
            "add.u32 %r1, %lane, 1; @%p12 mbarrier.init.shared.b64 [%smem + 16], %r1;",
            "barrier",
            "1 and for 2",
        ),
        ("@%p10 mbarrier.init.shared.b64 [%smem + 16], 0;", "barrier", "0 arrivals"),
        (
            "@%p10 mbarrier.expect_tx.shared.b64 [%smem], 16;"
            "@%p10 mbarrier.init.shared.b64 [%smem], 1;",
            "barrier",
            "middle of a phase",
        ),
        ("@%p10 mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 2;", "parity", "not a parity"),
        ("@%p10 ld.shared.b32 %r1, [%smem];", "barrier", "ordinary access"),
        ("@%p10 st.shared.b32 [%smem + 4], 0;", "barrier", "ordinary access"),
    ],
)
def test_mbarrier_misuse(body: str, kind: str, message: str) -> None:
    result = run(with_mbarrier(body))
    assert kind in kinds(result), text(result)
    assert message in text(result)


def test_old_state() -> None:
    body = (
        "@!%p10 bra END; mbarrier.arrive.shared.b64 %rd2, [%smem];"
        "mbarrier.arrive.shared.b64 _, [%smem];"
        "mbarrier.test_wait.shared.b64 %p1, [%smem], %rd2; END:"
    )
    assert "parity" in kinds(run(with_mbarrier(body)))


@all_policies
def test_use_not_ordered_after_initialisation(policy: Policy) -> None:
    """Without a barrier after mbarrier.init the other warp may come first, or sees no order."""
    body = with_mbarrier("@%p11 mbarrier.arrive.shared.b64 _, [%smem];", 2).replace(
        "bar.sync 0;", ""
    )
    assert kinds(run(body, policy=policy)) & {"race", "barrier"}


def test_initialised_by_all_lanes() -> None:
    body = "mbarrier.init.shared.b64 [%smem], 1; bar.sync 0;"
    body += "@%p10 mbarrier.arrive.shared.b64 _, [%smem];"
    clean(run("setp.eq.u32 %p10, %t, 0;" + body, warps=1))


@all_policies
def test_initialised_again(policy: Policy) -> None:
    again = f"""
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
{wait("0", "FIRST")}
    bar.sync 0;
    INVAL
    @%p10 mbarrier.init.shared.b64 [%smem], 2;
    bar.sync 0;
    @%p11 mbarrier.arrive.shared.b64 _, [%smem];
{wait("0", "SECOND")}
"""
    clean(run(with_mbarrier(again.replace("INVAL", "")), policy=policy))
    inval = "@%p10 mbarrier.inval.shared.b64 [%smem];"
    clean(run(with_mbarrier(again.replace("INVAL", inval)), policy=policy))


def test_initialised_while_a_warp_waits() -> None:
    body = """
    @%p12 bar.sync 1, 64;
    @%p12 mbarrier.init.shared.b64 [%smem], 1;
    @%p12 ret;
    bar.arrive 1, 64;
    mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0;
"""
    result = run(with_mbarrier(body), policy=Policy("eager", slice=1000))
    assert "warp 1 waits for it" in text(result)


def test_memory_of_an_invalidated_mbarrier_is_ordinary() -> None:
    body = """
    bar.sync 0;
    @%p10 mbarrier.inval.shared.b64 [%smem];
    bar.sync 0;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %smem;
    st.shared.b32 [%r2], %t;
    ld.shared.b32 %r1, [%r2];
"""
    clean(run(with_mbarrier(body)))


def test_phase_that_a_waiter_misses() -> None:
    """Two phases complete while warp 1 waits for the first: its parity comes round again."""
    body = """
    @%p12 bar.sync 1, 64;
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    @%p12 ret;
    bar.arrive 1, 64;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0, 1000000;
    @!%p1 bra WAIT;
"""
    result = run(with_mbarrier(body), policy=Policy("eager", slice=1000))
    assert "parity" in kinds(result)
    assert "two phases" in text(result)


def test_parity_of_two_phases_ago() -> None:
    """Warp 1 saw phase 0 and then waits for phase 1, when phases 1 and 2 are over already."""
    body = """
    @!%p12 bra OTHER;
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    bar.sync 1, 64;
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    ret;
OTHER:
    FIRST: mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0;
    @!%p1 bra FIRST;
    bar.arrive 1, 64;
    mov.u32 %r0, 0;
    DELAY: add.u32 %r0, %r0, 1;
    setp.lt.u32 %p2, %r0, 2000;
    @%p2 bra DELAY;
    mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 1;
"""
    result = run(with_mbarrier(body), policy=Policy("eager", slice=20))
    assert "parity" in kinds(result), text(result)


def test_time_out() -> None:
    """A try_wait that nobody answers returns false once, so that its warp can go on to arrive."""
    out = np.zeros(32, np.int32)
    body = f"""
    mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0;
    @%p10 mbarrier.arrive.shared.b64 _, [%smem];
    mbarrier.try_wait.parity.shared.b64 %p2, [%smem], 0;
    selp.b32 %r1, 10, 0, %p1;
    selp.b32 %r2, 1, 0, %p2;
    add.u32 %r1, %r1, %r2;
{STORE_OUT}
"""
    clean(run(with_mbarrier(body), out, warps=1))
    assert (out == 1).all()


def test_lanes_wait_for_different_barriers() -> None:
    out = np.zeros(32, np.int32)
    body = f"""
    shl.b32 %r2, %lane, 3;
    add.u32 %r2, %r2, %smem;
    mbarrier.init.shared.b64 [%r2], 1;
    and.b32 %r3, %lane, 1;
    setp.eq.u32 %p0, %r3, 0;
    @%p0 mbarrier.arrive.shared.b64 _, [%r2];
    mbarrier.test_wait.parity.shared.b64 %p1, [%r2], 0;
    selp.b32 %r1, 1, 0, %p1;
{STORE_OUT}
"""
    clean(run(body, out, warps=1))
    assert np.array_equal(out, 1 - np.arange(32) % 2)


# ---------------------------------------------------------------- clusters

REMOTE = """
    mov.u32 %r10, %cluster_ctarank;
    xor.b32 %r11, %r10, 1;
    mapa.shared::cluster.u32 %r12, %smem, %r11;
"""


def remote_exchange(first: str, second: str) -> str:
    return f"""{REMOTE}
    shl.b32 %r2, %t, 2;
    add.u32 %r3, %r2, %smem;
    mad.lo.u32 %r4, %r10, 1000, %t;
    st.shared.b32 [%r3], %r4;
    {first}
    add.u32 %r3, %r2, %r12;
    ld.shared::cluster.b32 %r1, [%r3];
    {second}
    mad.lo.u32 %t, %r10, 64, %t;
{STORE_OUT}
"""


CLUSTER_SYNC = "barrier.cluster.arrive; barrier.cluster.wait;"


@all_policies
def test_distributed_shared_memory(policy: Policy) -> None:
    out = np.zeros(128, np.int32)
    options: dict[str, Any] = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "policy": policy}
    clean(run(remote_exchange(CLUSTER_SYNC, CLUSTER_SYNC), out, **options))
    assert np.array_equal(out, np.concatenate([1000 + np.arange(64), np.arange(64)]))
    for first, second in (("bar.sync 0;", CLUSTER_SYNC), ("", CLUSTER_SYNC)):
        assert kinds(run(remote_exchange(first, second), out, **options)) & {
            "race",
            "uninitialised",
        }
    relaxed = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    assert "race" in kinds(run(remote_exchange(relaxed, CLUSTER_SYNC), out, **options))


@all_policies
@pytest.mark.parametrize("ordered", [True, False])
def test_remote_arrival(policy: Policy, ordered: bool) -> None:
    """CTA 1 writes into CTA 0's memory, then arrives at CTA 0's mbarrier."""
    out = np.zeros(32, np.int32)
    body = f"""{REMOTE}
    setp.eq.u32 %p10, %t, 0;
    setp.eq.u32 %p3, %r10, 0;
    @%p10 mbarrier.init.shared.b64 [%smem], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    @%p3 bra OWNER;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %r12;
    st.shared::cluster.b32 [%r2 + 64], %t;
    @%p10 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];
    bra END;
OWNER:
{wait("0", "WAIT") if ordered else ""}
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r2, %smem;
    ld.shared.b32 %r1, [%r2 + 64];
{STORE_OUT}
END:
    barrier.cluster.arrive;
    barrier.cluster.wait;
"""
    result = run(body, out, warps=1, grid=(2, 1, 1), cluster=(2, 1, 1), policy=policy)
    if ordered:
        clean(result)
        assert np.array_equal(out, np.arange(32))
    else:
        assert kinds(result) & {"race", "uninitialised"}


@all_policies
def test_cluster_launch_control(policy: Policy) -> None:
    """Persistent clusters take every tile of the grid exactly once."""
    grid, cluster = (6, 2, 2), (2, 1, 1)
    out = np.zeros(24, np.int32)
    multicast = "mbarrier::complete_tx::bytes.multicast::cluster::all"
    body = f"""{REMOTE}
    setp.eq.u32 %p10, %t, 0;
    setp.eq.u32 %p12, %r10, 0;
    @%p10 mbarrier.init.shared.b64 [%smem], 1;
    @%p10 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mov.u32 %r20, %ctaid.x;
    mov.u32 %r21, %ctaid.y;
    mov.u32 %r22, %ctaid.z;
    mov.u32 %r7, 0;
TILE:
    mad.lo.u32 %r1, %r22, 2, %r21;
    mad.lo.u32 %r1, %r1, 6, %r20;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd1, %out, %rd1;
    @%p10 red.global.add.u32 [%rd1], 1;
    @%p10 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 16;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    and.pred %p13, %p10, %p12;
    @%p13 clusterlaunchcontrol.try_cancel.async.shared::cta.{multicast}.b128 [%smem + 16], [%smem];
{wait("%r7", "WAIT")}
    xor.b32 %r7, %r7, 1;
    ld.shared.b128 %q0, [%smem + 16];
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %q0;
    @!%p4 bra END;
    clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {{%r20, %r21, %r22, _}}, %q0;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r23, %q0;
    add.u32 %r20, %r23, %r10;
    fence.proxy.async.shared::cta;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    bra TILE;
END:
    griddepcontrol.launch_dependents;
    griddepcontrol.wait;
"""
    options: dict[str, Any] = {
        "warps": 1,
        "grid": grid,
        "cluster": cluster,
        "policy": replace(policy, resident=4),
    }
    clean(run(body, out, **options))
    assert (out == 1).all(), out
    # The answer that was read is overwritten through the async proxy.
    assert kinds(run(body.replace("fence.proxy.async.shared::cta;", ""), out, **options)) == {
        "proxy"
    }
