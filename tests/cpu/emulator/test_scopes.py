"""Scopes of mbarriers, fences, the cluster barrier and atomics: whom an order reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from outcomes import clean, kinds, text

from cute_fmha.emulator.machine import Policy, run_ptx

MODES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in (1, 2, 3)]

# CTA 1 of a cluster of two is the sender, CTA 0 the receiver; the data is in CTA 0's shared memory.
KERNEL = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .u64 flag, .param .u64 out)
{
    .reg .b32 %r<40>, %t, %rank, %data, %bar;
    .reg .b64 %rd<20>, %flag, %out;
    .reg .pred %p<20>, %first, %warp0;
    .shared .align 16 .b8 data[16];
    .shared .align 8 .b8 bar[8];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %rank, %cluster_ctarank;
    setp.eq.u32 %first, %t, 0;
    setp.lt.u32 %warp0, %t, 32;
    mov.u32 %r0, data;
    mapa.shared::cluster.u32 %data, %r0, 0;
    mov.u32 %r1, bar;
    mapa.shared::cluster.u32 %bar, %r1, 0;
    @%first mbarrier.init.shared::cta.b64 [bar], 1;
    @%first st.shared.b32 [data], 0;
    barrier.cluster.arrive; barrier.cluster.wait;
    setp.eq.u32 %p1, %rank, SENDER;
    @%p1 bra SEND;
    RECEIVE
    bra END;
SEND:
    SENDING
END:
    barrier.cluster.arrive; barrier.cluster.wait;
    ret;
}
"""
WRITE = "@%first st.shared::cluster.b32 [%data], 7;"
READ = "ld.shared.b32 %r9, [data]; @%first st.global.b32 [%out], %r9;"
ARRIVE = "@%first mbarrier.arrive{}.shared::cluster.b64 _, [%bar]; {}"
WAIT = "W: mbarrier.try_wait.parity{}.shared::cta.b64 %p2, [bar], 0; @!%p2 bra W; {}"


def run(sending: str, receiving: str, sender: int = 1, **options: Any) -> tuple[Any, int]:
    flag, out = np.zeros(4, np.int32), np.zeros(4, np.int32)
    body = KERNEL.replace("SENDING", sending).replace("RECEIVE", receiving)
    options = {"block": (64, 1, 1), "grid": (2, 1, 1), "cluster": (2, 1, 1), **options}
    body = body.replace("SENDER", str(sender))
    result = run_ptx(body, flag, out, check=False, **options)
    return result, int(out[0])


CLUSTER, CTA = ".cluster", ".cta"
MBARRIERS = [  # the arrival, the wait, and whether that synchronises two CTAs
    (".release.cluster", ".acquire.cluster", True),
    (".release.cta", ".acquire.cluster", False),
    (".release.cluster", ".acquire.cta", False),
    (".release.cta", ".acquire.cta", False),
]


@pytest.mark.parametrize(("arrival", "wait", "right"), MBARRIERS)
def test_remote_arrival(arrival: str, wait: str, right: bool) -> None:
    for policy in MODES:
        sending = WRITE + ARRIVE.format(arrival, "")
        result, got = run(sending, WAIT.format(wait, READ), policy=policy)
        assert kinds(result) == (set() if right else {"race"}), result.report()
        assert got == 7


@pytest.mark.parametrize("name", ["remote", "own"])
def test_no_scope(name: str) -> None:
    """An arrival without a scope reaches other CTAs; strict_scopes makes it .cta, as the ISA."""
    if name == "remote":
        sending, receiving = WRITE + ARRIVE.format("", ""), WAIT.format("", READ)
    else:  # in one CTA the default is enough
        write = "@%p3 st.shared.b32 [data], 7; @%p3 mbarrier.arrive.shared.b64 _, [bar];"
        sending = ""
        receiving = "setp.eq.u32 %p3, %t, 32;" + write + WAIT.format("", READ)
    for policy in MODES:
        clean(run(sending, receiving, policy=policy)[0])
        strict = Policy(policy.mode, seed=policy.seed, strict_scopes=True)
        result, got = run(sending, receiving, policy=strict)
        assert kinds(result) == ({"race"} if name == "remote" else set()), result.report()
        assert got == 7


def test_a_narrow_arrival_in_the_own_cta() -> None:
    write = "setp.eq.u32 %p3, %t, 32; @%p3 st.shared.b32 [data], 7;"
    for wait in (".acquire.cta", ".acquire.cluster"):
        arrive = "@%p3 mbarrier.arrive.release.cta.shared::cta.b64 _, [bar];"
        for policy in MODES:
            clean(run("", write + arrive + WAIT.format(wait, READ), policy=policy)[0])


RELAXED = [  # fences around relaxed operations of .cluster or .cta scope
    ("fence.acq_rel.cluster;", ".relaxed.cluster", "fence.acq_rel.cluster;", True),
    ("fence.acq_rel.gpu;", ".relaxed.cluster", "fence.acq_rel.cluster;", True),
    ("fence.acq_rel.cta;", ".relaxed.cluster", "fence.acq_rel.cluster;", False),
    ("fence.acq_rel.cluster;", ".relaxed.cluster", "fence.acq_rel.cta;", False),
    ("fence.acq_rel.cluster;", ".relaxed.cta", "fence.acq_rel.cluster;", False),
    ("", ".relaxed.cluster", "fence.acq_rel.cluster;", False),
    ("fence.acq_rel.cluster;", ".relaxed.cluster", "", False),
]


@pytest.mark.parametrize(("before", "form", "after", "right"), RELAXED)
def test_fences_around_a_remote_arrival(before: str, form: str, after: str, right: bool) -> None:
    for policy in MODES:
        sending = WRITE + before + ARRIVE.format(form, "")
        result, _ = run(sending, WAIT.format(form, after + READ), policy=policy)
        assert kinds(result) == (set() if right else {"race"}), result.report()


@pytest.mark.parametrize(
    ("fence", "right"), [("cluster", True), ("gpu", True), ("cta", False), ("", False)]
)
def test_fences_around_the_cluster_barrier(fence: str, right: bool) -> None:
    fence = fence and f"fence.acq_rel.{fence};"
    barrier = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    for policy in MODES:
        result, _ = run(WRITE + fence + barrier, barrier + READ, policy=policy)
        assert kinds(result) == (set() if right else {"race"}), result.report()
        # Warps of one CTA: every fence will do.
        own = "setp.eq.u32 %p3, %t, 32; @%p3 st.shared.b32 [data], 7;" + fence + barrier + READ
        result, _ = run(barrier, own, policy=policy)
        assert kinds(result) == (set() if fence else {"race"}), result.report()


ADD = "@%first red.relaxed.{}.shared::cluster.add.u32 [%data], 1;"
ATOMICS = [("cluster", "cluster", True), ("gpu", "cluster", True), ("sys", "gpu", True),
           ("cta", "cluster", False), ("cluster", "cta", False), ("cta", "cta", False)]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "right"), ATOMICS)
def test_atomics_of_two_ctas(one: str, other: str, right: bool) -> None:
    """They are a race unless the scope of each includes the other's thread."""
    for policy in MODES:
        result, _ = run(ADD.format(one), ADD.format(other), policy=policy)
        assert kinds(result) == (set() if right else {"race"}), result.report()
        assert right or "scopes do not include each other" in text(result)


@pytest.mark.parametrize(("scope", "cluster", "right"), [
    ("gpu", 1, True), ("cluster", 2, True), ("cluster", 1, False), ("cta", 2, False)])  # fmt: skip
def test_atomics_in_global_memory(scope: str, cluster: int, right: bool) -> None:
    add = f"@%first atom.relaxed.{scope}.global.add.u32 %r9, [%flag], 1;"
    body = KERNEL.partition("    mov.u32 %r0, data;")[0] + add + " ret; }"
    body = body.replace("mov.u32 %rank, %cluster_ctarank;", "")
    for policy in MODES:
        flag, out = np.zeros(4, np.int32), np.zeros(4, np.int32)
        options: dict[str, Any] = {"block": (64, 1, 1), "grid": (2, 1, 1)}
        options["cluster"] = (cluster, 1, 1)
        result = run_ptx(body, flag, out, policy=policy, check=False, **options)
        assert kinds(result) == (set() if right else {"race"}), result.report()
        assert flag[0] == 2
    own = add.replace("%first", "%p9")
    body = body.replace(add, "and.b32 %r8, %t, 31; setp.eq.u32 %p9, %r8, 0;" + own)
    flag = np.zeros(4, np.int32)
    clean(run_ptx(body, flag, out, block=(64, 1, 1), check=False))  # two warps of one CTA
    assert flag[0] == 2


POLL = """
F: ld.relaxed.cluster.global.b32 %r9, [%flag];
    setp.eq.u32 %p4, %r9, 0;
    @%p4 bra F;
"""


def test_order_in_execution_is_enough_to_arrive() -> None:
    """A scope that is too narrow releases nothing; but who arrives next may know of the phase."""
    arrive = "mbarrier.arrive.release.cta.shared::cluster.b64 _, [%bar];"
    told = "@%first st.relaxed.cluster.global.b32 [%flag], 1; L:"
    receiving = "@!%warp0 bra L;" + WAIT.format(".acquire.cta", told)
    for policy in MODES:
        for poll in (POLL, ""):
            second = f"@%warp0 bra D; setp.eq.u32 %p3, %t, 32; {poll} @%p3 {arrive} D:"
            result, _ = run(f"@%first {arrive} {second}", receiving, policy=policy)
            assert not poll or not result.findings, result.report()
            assert poll or result.findings
