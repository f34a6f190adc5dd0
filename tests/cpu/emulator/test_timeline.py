"""Timelines: blocks of one CTA, their merging, trace files and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peers_fa4
import pytest

from cute_fmha.emulator import timeline
from cute_fmha.emulator.capture import Report, emulate
from cute_fmha.emulator.machine import Policy, Result, run_ptx
from cute_fmha.emulator.timeline import Block, blocks, guess_roles, merge, plot, write_trace

# Warp 0 copies 512 bytes to shared memory; warp 1 waits for them, and both meet at a barrier.
KERNEL = """
.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 128 .b8 buffer[];
.visible .entry kernel(.param .u64 in, .param .u64 out)
{
    .reg .b32 %r<12>;
    .reg .f32 %f<4>;
    .reg .b64 %d<6>;
    .reg .pred %p<4>;
    ld.param.u64 %d0, [in];
    ld.param.u64 %d1, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, buffer;
    add.u32 %r2, %r1, 1024;
    setp.eq.u32 %p0, %r0, 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    @!%p0 bra issued;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], 512, [%r2];
issued:
    @%p1 bra end;
wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra wait;
    and.b32 %r3, %r0, 31;
    mul.wide.u32 %d2, %r3, 4;
    shl.b32 %r4, %r3, 2;
    add.u32 %r4, %r4, %r1;
    ld.shared.f32 %f0, [%r4];
    ex2.approx.ftz.f32 %f0, %f0;
    add.u64 %d1, %d1, %d2;
    st.global.f32 [%d1], %f0;
end:
    bar.sync 1;
    ret;
}
"""
BARRIER = 1024 + 1024  # dynamic shared memory starts at 1024


def traced(cta: int = 1, mode: str = "lazy") -> Result:
    source, out = np.ones(128, np.float32), np.zeros(32, np.float32)
    return run_ptx(
        KERNEL,
        source,
        out,
        grid=(2, 1, 1),
        block=(64, 1, 1),
        dynamic_shared=2048,
        policy=Policy(mode, trace_cta=cta, races=False),
    )


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_blocks_of_a_kernel(mode: str) -> None:
    found = blocks(traced(mode=mode))
    lanes = {block.lane: block.lane_name for block in found}
    assert lanes == {0: "0 load", 1: "1 exp", -1: "TMA load"}
    (copy,) = (block for block in found if block.lane == -1)
    assert copy.kind == "asynchronous"
    assert copy.name.startswith("cp.async.bulk.shared")
    assert copy.where.startswith("PTX ")
    assert copy.duration > 100
    waits = {block.name: block for block in found if block.kind == "wait"}
    known = f"mbarrier {BARRIER:#x}"
    wait = waits.get(known) or waits["mbarrier"]  # the copy may be over when the warp looks for it
    assert wait.lane == 1
    assert wait.finish == pytest.approx(copy.finish)
    assert mode != "lazy" or known in waits
    assert any(name.startswith("bar.sync") for name in waits)
    for lane in (0, 1):
        own = [block for block in found if block.lane == lane]
        assert all(a.finish <= b.start + 1e-9 for a, b in itertools.pairwise(own))


def test_names_given_by_the_caller() -> None:
    found = blocks(traced(), roles={0: "producer"}, barriers={BARRIER: "tile full"})
    assert {block.lane_name for block in found} == {"0 producer", "1", "TMA load"}
    assert any(block.name == "tile full" for block in found)


def test_only_the_traced_cta() -> None:
    assert not blocks(traced(cta=7))
    assert guess_roles(traced(cta=7)) == {0: "load", 1: "exp"}


def block(start: float, finish: float, kind: str = "instructions", lane: int = 0) -> Block:
    return Block(lane, str(lane), kind, f"at {start}", start, finish, "")


def test_merge() -> None:
    joined = [block(0, 10), block(10, 10.2, "wait"), block(10.2, 20)]
    assert [(b.start, b.finish, b.count) for b in merge(joined, 0.5)] == [(0, 20, 2)]
    kept = [block(0, 10), block(10, 30, "wait"), block(30, 40)]
    assert merge(kept, 0.5) == kept
    waits = [block(0, 10, "wait"), block(10, 20, "wait")]
    assert merge(waits, 0.5) == waits  # two long waits stay two
    apart = [block(0, 1), block(50, 51)]
    assert merge(apart, 0.5) == apart
    assert merge([block(3, 3, "asynchronous", -3)], 0.5) == []


def random_blocks(count: int, seed: int) -> list[Block]:
    draw, out = random.Random(seed), []
    for lane in range(4):
        now = 0.0
        for _ in range(count):
            finish = now + draw.choice([0, 0.1, 1, 3, 20])
            out.append(block(now, finish, draw.choice(timeline.KINDS), lane))
            now = finish + draw.choice([0, 0, 0.2, 5])
    return out


@pytest.mark.parametrize("seed", range(5))
def test_merged_blocks_stay_in_order_and_within_their_span(seed: int) -> None:
    found = random_blocks(200, seed)
    for shortest in (0.5, 2, 30):
        kept = merge(found, shortest)
        assert sum(b.count for b in kept) <= len(found)
        for lane in range(4):
            own = [b for b in kept if b.lane == lane]
            mine = [b for b in found if b.lane == lane]
            assert all(a.finish <= b.start for a, b in itertools.pairwise(own))
            assert min(b.start for b in mine) <= min((b.start for b in own), default=0)
            assert max((b.finish for b in own), default=0) <= max(b.finish for b in mine)


def test_no_more_blocks_than_asked_for() -> None:
    result = traced()
    events = np.repeat(result.events, 500)
    events["start"] += np.arange(len(events)) * 40.0
    events["finish"] += np.arange(len(events)) * 40.0
    many = dataclasses.replace(result, events=events)
    assert len(blocks(many)) > 300
    assert len(blocks(many, most=300)) <= 300


def test_trace(tmp_path: Path) -> None:
    found = [*blocks(traced()), block(5, 30, "asynchronous", -1), block(6, 40, "asynchronous", -1)]
    found = timeline._with_slots(sorted(found, key=lambda b: (b.lane, b.start)))
    path = write_trace(tmp_path / "trace.json", found)
    trace = json.loads(path.read_text())
    assert "not a measurement" in trace["otherData"]["time"]
    events: list[dict[str, Any]] = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values())[:2] == ["warp 0 load", "warp 1 exp"]
    assert any(name.endswith("(2)") for name in names.values())  # operations that overlap
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == len(found)
    for tid in names:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in complete if e["tid"] == tid)
        assert all(a[1] <= b[0] + 2e-3 for a, b in itertools.pairwise(spans))


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = blocks(traced())
    whole = plot(tmp_path / "whole.png", found, title="a title")
    part = plot(tmp_path / "part.png", found, span=(0, 50))
    for path in (whole, part):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="no events"):
        plot(tmp_path / "none.png", [])


@pytest.mark.skipif(not peers_fa4.available, reason="flash-attn-4 is not installed")
def test_flashattention_4(tmp_path: Path) -> None:
    reports: list[Report] = []

    def run(compiled: Any, *args: Any, **kwargs: Any) -> None:
        policy = Policy("lazy", trace_cta=0, races=False)
        reports.append(emulate(compiled, *args, policy=policy, **kwargs))

    peers_fa4.run_case(peers_fa4.CASES["d128"], run)
    found = blocks(reports[0].results[0])
    names = {block.lane: block.lane_name for block in found}
    assert names[12] == "12 MMA"
    assert names[14] == "14 load"
    assert all(names[warp].endswith("exp") for warp in range(8))
    assert {names[-1], names[-2], names[-3]} == {"TMA load", "TMA store", "tensor core"}
    python = [block.name for block in found if block.kind == "instructions"]
    assert all(".py:" in name for name in python)
    assert write_trace(tmp_path / "trace.json", found).stat().st_size < 5 << 20
