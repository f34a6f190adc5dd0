"""Mutants of a small pipeline, the rules that mutants led to, mutants of FlashAttention-4."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import peers_fa4
import pytest
import torch

from cute_fmha.emulator import capture as cap
from cute_fmha.emulator.machine import Policy, load, run_ptx
from cute_fmha.emulator.mutate import POLICIES, MutationReport, mutants, run_mutants

HEAD = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .u64 out)
{
    .reg .pred %p<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<16>;
    .shared .align 16 .b8 ring[256];
    .shared .align 8 .b8 full[16];
    .shared .align 8 .b8 empty[16];
    mov.u32 %r0, %tid.x;
    shr.u32 %r1, %r0, 5;
    and.b32 %r2, %r0, 31;
    setp.eq.u32 %p0, %r0, 0;
"""
INIT = """
    @%p0 mbarrier.init.shared.b64 [full], 32;
    @%p0 mbarrier.init.shared.b64 [full+8], 32;
    @%p0 mbarrier.init.shared.b64 [empty], 32;
    @%p0 mbarrier.init.shared.b64 [empty+8], 32;
    bar.sync 0;
"""


def wait(barrier: str, parity: str, label: str) -> str:
    return f"""
{label}:
    mbarrier.try_wait.parity.shared.b64 %p1, [{barrier}], {parity};
    @!%p1 bra {label};
"""


# Warp 0 writes 6 rows through a ring of two; warp 1 sums them.
PIPELINE = (
    HEAD
    + INIT
    + """
    mov.u32 %r3, 0;
    mov.u32 %r10, 0;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra CONSUMER;
PRODUCER:
    and.b32 %r4, %r3, 1;
    shr.u32 %r5, %r3, 1;
    and.b32 %r5, %r5, 1;
    xor.b32 %r5, %r5, 1;
    mov.u32 %r6, empty;
    mad.lo.u32 %r6, %r4, 8, %r6;
"""
    + wait("%r6", "%r5", "FREE")
    + """
    mov.u32 %r7, ring;
    mad.lo.u32 %r7, %r4, 128, %r7;
    mad.lo.u32 %r7, %r2, 4, %r7;
    mad.lo.u32 %r8, %r3, 1000, %r2;
    st.shared.b32 [%r7], %r8;
    mov.u32 %r6, full;
    mad.lo.u32 %r6, %r4, 8, %r6;
    mbarrier.arrive.shared.b64 %rd1, [%r6];
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 6;
    @%p3 bra PRODUCER;
    ret;
CONSUMER:
    and.b32 %r4, %r3, 1;
    shr.u32 %r5, %r3, 1;
    and.b32 %r5, %r5, 1;
    mov.u32 %r6, full;
    mad.lo.u32 %r6, %r4, 8, %r6;
"""
    + wait("%r6", "%r5", "READY")
    + """
    mov.u32 %r7, ring;
    mad.lo.u32 %r7, %r4, 128, %r7;
    mad.lo.u32 %r7, %r2, 4, %r7;
    ld.shared.b32 %r8, [%r7];
    add.u32 %r10, %r10, %r8;
    mov.u32 %r6, empty;
    mad.lo.u32 %r6, %r4, 8, %r6;
    mbarrier.arrive.shared.b64 %rd1, [%r6];
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 6;
    @%p3 bra CONSUMER;
    ld.param.u64 %rd2, [out];
    mad.wide.u32 %rd3, %r2, 4, %rd2;
    st.global.b32 [%rd3], %r10;
    ret;
}
"""
)


def captured(ptx: str, out: torch.Tensor, threads: int = 64) -> cap.Capture:
    parameter = out.data_ptr().to_bytes(8, "little")
    launch = cap.Launch("kernel", (1, 1, 1), (threads, 1, 1), (1, 1, 1), 0, 0, {}, (parameter,))
    return cap.Capture(ptx, [launch], [cap.Memory.of("out", out)])


def test_pipeline() -> None:
    out = torch.full((32,), 7, dtype=torch.int32)
    seen: list[int] = []
    report = run_mutants(captured(PIPELINE, out), progress=lambda i, n, outcome: seen.append(n - i))
    assert seen == list(range(len(report.outcomes)))[::-1]
    assert (out == 7).all(), "the memory is not as it was"
    groups = {outcome.mutant.group for outcome in report.outcomes}
    assert {"mbarrier.arrive", "mbarrier wait", "bar.sync", "mbarrier.init count"} <= groups
    assert {"ld.shared offset", "st.shared offset", "loop step"} <= groups
    assert not report.of("missed"), str(report)
    assert not report.of("redundant")
    hows = {(o.mutant.group, o.mutant.change): o.how for o in report.outcomes}
    assert hows["mbarrier wait", "succeeds at once"] in ("race", "uninitialised")
    assert hows["mbarrier.arrive", "deleted"] == "deadlock"
    # Nothing of a mutant is left behind.
    result = run_ptx(PIPELINE, out.numpy(), block=(64, 1, 1))
    assert result.ok
    assert np.array_equal(out.numpy(), 15_000 + 6 * np.arange(32))
    assert "| mbarrier wait" in report.table()
    parsed = json.loads(report.json())
    assert len(parsed["outcomes"]) == len(report.outcomes)


def test_verdicts() -> None:
    """A second wait for the same phase is redundant; what is never executed is not counted."""
    twice = PIPELINE.replace(
        wait("%r6", "%r5", "READY"),
        wait("%r6", "%r5", "READY") + wait("%r6", "%r5", "AGAIN"),
    ).replace(
        "    ret;\nCONSUMER", "    bra END;\n    fence.proxy.async;\nEND:\n    ret;\nCONSUMER"
    )
    out = torch.zeros(32, dtype=torch.int32)
    report = run_mutants(captured(twice, out), chosen=lambda m: m.order)
    waits = [o for o in report.outcomes if o.mutant.group == "mbarrier wait"]
    # With two waits in a row either one may go.
    assert [o.verdict for o in waits] == ["caught", "missed", "redundant"], str(report)
    assert report.waits[waits[2].mutant.pc].redundant
    assert not report.waits[waits[1].mutant.pc].redundant
    (fence,) = (o for o in report.outcomes if o.mutant.group.startswith("fence"))
    assert fence.verdict == "not executed"


ROWS = (
    HEAD
    + """
    ld.param.u64 %rd2, [out];
    mov.u32 %r3, 0;
ROW:
    mad.lo.u32 %r4, %r3, 32, %r2;
    mad.wide.u32 %rd3, %r4, 4, %rd2;
    st.global.b32 [%rd3], %r4;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 4;
    @%p3 bra ROW;
    ret;
}
"""
)


def test_store_that_is_not_made() -> None:
    """Results that are there before the kernel runs do not hide that a mutant stores too little."""
    out = torch.cat([torch.arange(128), torch.tensor([5] * 8)]).int()
    before = out.clone()
    report = run_mutants(captured(ROWS, out, 32), numbers=True)
    (step,) = report.outcomes
    assert (step.mutant.group, step.verdict, step.how) == ("loop step", "caught", "numbers")
    assert step.numbers
    assert torch.equal(out, before)


def test_mutant_without_an_end() -> None:
    """A loop that steps over its end is stopped after a few times the unaltered instructions."""
    counting = (
        HEAD
        + """
    mov.u32 %r3, 0;
TURN:
    add.u32 %r3, %r3, 1;
    setp.ne.u32 %p3, %r3, 3;
    @%p3 bra TURN;
    ret;
}
"""
    )
    report = run_mutants(captured(counting, torch.zeros(1)))
    (step,) = report.outcomes
    assert (step.mutant.group, step.verdict, step.how) == ("loop step", "caught", "endless loop")
    assert "stopped after" in step.text


def test_list() -> None:
    program = load(PIPELINE, "kernel")
    found = mutants(program)
    assert found == mutants(program)
    arrivals = [m for m in found if m.group == "mbarrier.arrive"]
    assert len(arrivals) == 2
    assert "mbarrier.arrive" in str(arrivals[0])
    assert all(program.module.line(m.line) == m.text for m in found)


# ------------------------------------------------------------------------------------ rules
# What the detector did not notice until mutants of FlashAttention-4 showed it.


def kinds(body: str, threads: int = 64) -> list[tuple[str, str]]:
    """Findings under every policy; the same ones, as they do not depend on timing."""
    out = np.zeros(32, np.int32)
    results = [
        run_ptx(HEAD + body + "\n}", out, block=(threads, 1, 1), policy=policy, check=False)
        for policy in POLICIES.values()
    ]
    every = [[(f.kind, f.text) for f in result.findings] for result in results]
    assert len({bool(found) for found in every}) == 1, every
    return every[0]


FEEDBACK = (
    INIT
    + """
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra TAKE;
    bar.arrive 1, 64;
    FEEDBACK
    bar.arrive 1, 64;
    ret;
TAKE:
    bar.sync 1, 64;
    mbarrier.arrive.shared.b64 %rd1, [full];
    bar.sync 1, 64;
    ret;
"""
)


def test_arrival_at_a_named_barrier_without_order() -> None:
    """bar.arrive twice: the first phase has to be known to be over."""
    assert not kinds(FEEDBACK.replace("FEEDBACK", wait("full", "0", "TAKEN")))
    found = kinds(FEEDBACK.replace("FEEDBACK", ""))
    assert any(kind == "barrier" and "arrives" in text for kind, text in found), found


ROUNDS = """
    @%p0 mbarrier.init.shared.b64 [full], 64;
    @%p0 mbarrier.init.shared.b64 [empty], 32;
    bar.sync 0;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra OTHER;
    mbarrier.arrive.shared.b64 %rd1, [full];
    WAIT
    mbarrier.arrive.shared.b64 %rd1, [full];
    bar.sync 0;
    ret;
OTHER:
    mbarrier.arrive.shared.b64 %rd1, [full];
    WAIT2
    mbarrier.arrive.shared.b64 %rd1, [full];
    bar.sync 0;
    ret;
"""


def test_arrival_at_an_mbarrier_without_order() -> None:
    """A second arrival could be counted for the first phase."""
    both = ROUNDS.replace("WAIT2", wait("full", "0", "B")).replace("WAIT", wait("full", "0", "A"))
    assert not kinds(both)
    one = ROUNDS.replace("WAIT2", wait("full", "0", "B")).replace("WAIT", "")
    found = kinds(one)
    assert any(kind == "barrier" for kind, _ in found), found


COMMIT = """
    .shared .align 16 .b8 place[16];
    @%p0 mbarrier.init.shared.b64 [full], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra OTHER;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [place], 32;
    @%p0 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [full];
    mov.u32 %r9, 0;
SPIN:
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p4, %r9, 2000;
    @%p4 bra SPIN;
    ld.shared.b32 %r8, [place];
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r8, 32;
    ret;
OTHER:
    WAIT
    ret;
"""


def test_exit_before_an_arrival() -> None:
    """Some warp of the CTA has to know of every arrival at its barriers, however early it came."""
    assert not kinds(COMMIT.replace("WAIT", wait("full", "0", "DONE")))
    found = kinds(COMMIT.replace("WAIT", ""))
    assert any("exit" in text for _, text in found), found


# ------------------------------------------------------------------------------------ FA4

needs_fa4 = pytest.mark.skipif(
    not peers_fa4.available, reason="flash-attn-4 (and CuTe DSL) are not installed"
)
PIPES = (
    "mbarrier.arrive", "tcgen05.commit", "bar.arrive", "fence.proxy.async",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read", "tcgen05.wait::st",
    "barrier.cluster.arrive", "barrier.cluster.wait",
)  # fmt: skip


def flash_attention_4(heads: int, queries: int, keys: int, sms: int, **options: Any) -> cap.Capture:
    """A launch of FlashAttention-4's forward; later key blocks have smaller scores.

    Blocks are visited from the last to the first, so maxima grow and accumulators are rescaled.
    """
    generator = torch.Generator().manual_seed(5)

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, 128, generator=generator)

    q, k, v = normal(queries), normal(keys), normal(keys)
    k *= torch.logspace(0.8, -0.8, keys)[None, :, None, None]
    captures: list[cap.Capture] = []

    def run(compiled: Any, *args: Any, **kwargs: Any) -> None:
        captures.append(cap.capture(compiled, *args, **kwargs))

    device = functools.partial(cap.emulated_device, cap.Device(sms=sms))
    with (
        mock.patch.object(cap, "emulated_device", device),
        peers_fa4.interface(run) as module,
        torch.no_grad(),
    ):
        module.flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    (only,) = captures
    return only


# In a kernel of one tile per CTA nobody waits for what is released for the next tile. A deleted
# arrival that goes unnoticed proves that: its phase never completes, so a wait would not end.
LAST_TILE = {
    "mbarrier.arrive": 3,
    "tcgen05.commit": 1,
    "cp.async.bulk.commit_group": 1,
    "cp.async.bulk.wait_group.read": 2,
}


def check_order(report: MutationReport, one_tile: bool = False) -> None:
    """Everything that gives order is noticed, but for what is known not to matter."""
    missed = Counter(outcome.mutant.group for outcome in report.missed_order)
    for group in PIPES:
        assert missed[group] <= (LAST_TILE.get(group, 0) if one_tile else 0), str(report)
    # A tail announces a tile that never comes.
    assert missed["mbarrier.arrive.expect_tx"] <= 1, str(report)
    # In a cluster kernel a second fence follows.
    fences = sum(o.mutant.group == "fence.mbarrier_init" for o in report.outcomes)
    assert missed["fence.mbarrier_init"] <= fences - 1 or not fences, str(report)
    for outcome in report.missed_order:
        if outcome.mutant.group == "bar.sync":
            # Of the allocation: mbarriers order every use of it, too.
            assert outcome.mutant.change == "does not wait", str(outcome)
    expected = {*PIPES, "mbarrier.arrive.expect_tx", "fence.mbarrier_init", "bar.sync"}
    assert set(missed) <= expected | {"mbarrier wait"}, str(report)
    # Tails, and waits for what another wait of the same warp covers.
    assert missed["mbarrier wait"] <= 8, str(report)


@needs_fa4
def test_flash_attention_4() -> None:
    """Three tiles on one SM: the order mutants of the arrivals, commits, fences and bulk waits."""
    launch = flash_attention_4(heads=3, queries=256, keys=384, sms=1)
    fast = {name: POLICIES[name] for name in ("eager", "lazy", "random 1")}
    report = run_mutants(launch, policies=fast, chosen=lambda m: m.order and m.group in PIPES)
    check_order(report)
    assert len(report.of("caught")) > 40


@needs_fa4
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("sms", "options"),
    [
        (1, {"heads": 3, "queries": 256, "keys": 384}),
        (148, {"heads": 1, "queries": 256, "keys": 640, "causal": True}),
        (2, {"heads": 3, "queries": 512, "keys": 384}),
    ],
    ids=["full", "causal", "pair"],
)
def test_flash_attention_4_all(sms: int, options: dict[str, Any]) -> None:
    """Every mutant; numbers that are missed have no effect in this problem."""
    report = run_mutants(flash_attention_4(sms=sms, **options))
    print(report)
    check_order(report, one_tile="causal" in options)
    executed = len(report.outcomes) - len(report.of("not executed"))
    caught = len(report.of("caught")) + len(report.of("redundant"))
    unused = [o for o in report.of("missed") if o.mutant.group == "shared descriptor LBO"]
    assert caught + len(unused) > 0.9 * executed


def test_known_findings_are_no_catch() -> None:
    """A kernel with a finding of its own: mutants are caught by other findings only."""
    racing = PIPELINE.replace(
        "    ret;\nCONSUMER", "    st.shared.b32 [ring], %r2;\n    ret;\nCONSUMER"
    )
    out = torch.zeros(32, dtype=torch.int32)
    report = run_mutants(
        captured(racing, out), policies={"lazy": Policy("lazy")}, chosen=lambda m: m.order
    )
    assert report.known["lazy"] > 0
    assert report.of("caught")
