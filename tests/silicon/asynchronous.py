"""Asynchronous copies, mbarriers, clusters and distributed shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from silicon.model import CLUSTER_SYNC, Buffer, Case, entry, generator, output, random_bytes, source
from silicon.model import wait as wait_for
from silicon.tensors import floats

GROUP = "asynchronous"
INIT = """
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 1;
    @%p0 fence.mbarrier_init.release.cluster;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


def pair(n: int) -> dict[str, Any]:
    return {"grid": (n, 1, 1), "cluster": (n, 1, 1)}


# ---------------------------------------------------------------- cp.async


def _copies() -> list[Case]:
    name = "cp_async_sizes"
    body = """
    mad.lo.u32 %r3, %t, 96, %room; mad.wide.u32 %d3, %t, 16, %a0; mad.wide.u32 %d4, %t, 96, %a1;
    rem.u32 %r4, %t, 17; and.b32 %r5, %t, 1; setp.eq.u32 %p1, %r5, 1;
    rem.u32 %r6, %t, 5; rem.u32 %r7, %t, 9;
    cp.async.cg.shared.global [%r3], [%d3], 16, %r4;
    cp.async.cg.shared.global [%r3+16], [%d3], 16, %p1;
    cp.async.ca.shared.global [%r3+32], [%d3], 4, %r6;
    cp.async.ca.shared.global [%r3+36], [%d3+4], 4;
    cp.async.ca.shared.global [%r3+40], [%d3+8], 8, %r7;
    cp.async.ca.shared.global.L2::128B [%r3+48], [%d3], 16;
    cp.async.ca.shared.global [%r3+64], [%d3+1048576], 16, 0;
    cp.async.ca.shared.global [%r3+80], [%d3], 16, 16;
    cp.async.wait_all;
    """
    for i in range(6):
        body += f"""
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3+{16 * i}];
    st.global.v4.b32 [%d4+{16 * i}], {{%r10, %r11, %r12, %r13}};"""
    data = source(random_bytes(name, 512))
    text = entry(name, body, 2, room=4096)
    cases = [Case(name, name, text, (data, output((32, 24))))]
    name = "cp_async_pipeline"
    body = """
    mul.lo.u32 %r0, %t, 16; mov.u32 %r1, 0; mov.u32 %r2, 0;
    mad.wide.u32 %d0, %r0, 1, %a0; add.u32 %r3, %room, %r0;
    cp.async.cg.shared.global [%r3], [%d0], 16; cp.async.commit_group;
    cp.async.cg.shared.global [%r3+2048], [%d0+2048], 16; cp.async.commit_group;
    again:
    add.u32 %r4, %r1, 2; setp.lt.u32 %p1, %r4, 6;
    @!%p1 bra copied;
    rem.u32 %r5, %r4, 3; mad.lo.u32 %r5, %r5, 2048, %r3; mad.wide.u32 %d1, %r4, 2048, %d0;
    cp.async.cg.shared.global [%r5], [%d1], 16;
    copied:
    cp.async.commit_group; cp.async.wait_group 2; bar.sync 0;
    rem.u32 %r5, %r1, 3; mad.lo.u32 %r5, %r5, 2048, %room; xor.b32 %r6, %r0, 1040;
    add.u32 %r5, %r5, %r6; ld.shared.b32 %r7, [%r5]; mad.lo.u32 %r2, %r2, 3, %r7;
    bar.sync 0;
    add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 6; @%p2 bra again;
    mad.wide.u32 %d2, %t, 4, %a1; st.global.b32 [%d2], %r2;
    """
    data = source(random_bytes(name, 6 * 2048))
    text = entry(name, body, 2, room=6144)
    cases.append(Case(name, name, text, (data, output(128)), block=(128, 1, 1)))
    for noinc in (False, True):
        name = "cp_async_arrive" + ("_noinc" if noinc else "")
        own = "bar.warp.sync -1; @%p0 mbarrier.arrive.shared::cta.b64 _, [%bar];"
        body = f"""
    @%p0 mbarrier.init.shared::cta.b64 [%bar], {32 if noinc else 1}; bar.sync 0;
    setp.ge.u32 %p1, %t, 32; @%p1 bra consumer;
    mad.lo.u32 %r3, %t, 16, %room; mad.wide.u32 %d3, %t, 16, %a0;
    cp.async.cg.shared.global [%r3], [%d3], 16;
    cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared::cta.b64 [%bar];
    {"" if noinc else own}
    cp.async.wait_all;
    exit;
    consumer:
    {wait_for("again")}
    sub.u32 %r0, %t, 32; mad.lo.u32 %r3, %r0, 16, %room; mad.wide.u32 %d4, %r0, 16, %a1;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.b32 [%d4], {{%r4, %r5, %r6, %r7}};
    """
        text = entry(name, body, 2, room=1024)
        data = source(random_bytes(name, 512))
        cases.append(Case(name, name, text, (data, output((32, 4))), block=(64, 1, 1)))
    return cases


# ---------------------------------------------------------------- mbarriers


def _script(name: str, steps: list[str], columns: int) -> Case:
    """What one thread sees, step by step: %r9 after each."""
    body = "@!%p0 exit;\n"
    for i, step in enumerate(steps):
        body += f"{step} st.global.b32 [%a0+{4 * i}], %r9;\n"
    assert columns == len(steps)
    return Case(name, name, entry(name, body, 1, room=1024), (output(columns),))


def _mbarriers() -> list[Case]:
    pending = "mbarrier.pending_count.b64 %r9, %d9;"
    arrive = f"mbarrier.arrive.shared::cta.b64 %d9, [%bar]; {pending}"
    arrive2 = f"mbarrier.arrive.shared::cta.b64 %d9, [%bar], 2; {pending}"
    no_complete = f"mbarrier.arrive.noComplete.shared.b64 %d9, [%bar], 1; {pending}"
    drop = f"mbarrier.arrive_drop.shared::cta.b64 %d9, [%bar]; {pending}"
    drop2 = f"mbarrier.arrive_drop.shared::cta.b64 %d9, [%bar], 2; {pending}"
    state = "mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %d9; selp.b32 %r9, 1, 0, %p1;"
    keep = "mov.b64 %d8, %d9; mov.b32 %r9, 77;"
    kept = "mbarrier.try_wait.shared::cta.b64 %p1, [%bar], %d8; selp.b32 %r9, 1, 0, %p1;"

    def parity(which: int) -> str:
        return (
            f"mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], {which};"
            "selp.b32 %r9, 1, 0, %p1;"
        )

    def init(count: int) -> str:
        return f"mbarrier.init.shared::cta.b64 [%bar], {count}; mov.b32 %r9, {count};"

    def expect(count: int) -> str:
        form = "mbarrier.expect_tx.relaxed.cta.shared::cta.b64"
        return f"{form} [%bar], {count}; mov.b32 %r9, {count};"

    def complete(count: int) -> str:
        form = "mbarrier.complete_tx.relaxed.cta.shared::cta.b64"
        return f"{form} [%bar], {count}; mov.b32 %r9, {count};"

    both = [parity(0), parity(1)]
    counts = [init(5), *both, arrive, state, arrive2, keep, *both, no_complete, arrive, kept]
    counts += [*both, arrive2, arrive2, state, arrive, *both, arrive2, arrive, *both]
    drops = [init(4), drop, *both, arrive, arrive2, *both, arrive, drop2, *both, arrive, *both]
    drops += [arrive, *both, drop]
    bytes_ = [init(1), expect(96), *both, complete(64), arrive, *both, complete(32), *both]
    bytes_ += [
        f"mbarrier.arrive.expect_tx.shared::cta.b64 %d9, [%bar], 4096; {pending}", state, *both,
        complete(4000), *both, complete(96), *both, state, expect(1000000), complete(1000000),
        arrive, *both,
    ]  # fmt: skip
    again = "mbarrier.inval.shared::cta.b64 [%bar];"
    again += " mbarrier.init.shared::cta.b64 [%bar], 1; mov.b32 %r9, 1;"
    largest = [init((1 << 20) - 1), arrive, arrive2, state, *both]
    renewed = [init(1), arrive, again, *both, arrive, *both, arrive, *both]
    waits = [
        init(1),
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 1; selp.b32 %r9, 1, 0, %p1;",
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0, 1000; selp.b32 %r9, 1, 0, %p1;",
        arrive,
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 0; selp.b32 %r9, 1, 0, %p1;",
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%bar], 1, 1000; selp.b32 %r9, 1, 0, %p1;",
    ]
    scripts = {
        "counts": counts, "drops": drops, "bytes": bytes_, "largest": largest, "renewed": renewed,
        "waits": waits,
    }  # fmt: skip
    cases = [_script(f"mbarrier_{name}", steps, len(steps)) for name, steps in scripts.items()]
    name = "mbarrier_ring"
    body = f"""
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 64; @%p0 mbarrier.init.shared::cta.b64 [%bar+8], 64;
    bar.sync 0;
    mov.u32 %r1, 0; mov.u32 %r2, 0; setp.ge.u32 %p2, %t, 64; mad.lo.u32 %r3, %t, 4, %room;
    add.u32 %r7, %bar, 8;
    again:
    and.b32 %r4, %r1, 1;
    @%p2 bra consumer;
    xor.b32 %r6, %r4, 1;
    {wait_for("empty", "%r6", "%r7")}
    mad.lo.u32 %r5, %r1, 1000, %t; st.shared.b32 [%r3], %r5;
    mbarrier.arrive.shared::cta.b64 _, [%bar];
    bra next;
    consumer:
    {wait_for("full", "%r4", "%bar")}
    xor.b32 %r6, %r3, 4; ld.shared.b32 %r5, [%r6+-256]; mad.lo.u32 %r2, %r2, 5, %r5;
    mbarrier.arrive.shared::cta.b64 _, [%r7];
    next:
    add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 9; @%p3 bra again;
    mad.wide.u32 %d1, %t, 4, %a0; st.global.b32 [%d1], %r2;
    """
    text = entry(name, body, 1, room=1024)
    cases.append(Case(name, name, text, (output(128),), block=(128, 1, 1)))
    name = "mbarrier_states"
    body = """
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 64; bar.sync 0;
    mbarrier.arrive.shared::cta.b64 %d9, [%bar];
    mbarrier.pending_count.b64 %r1, %d9;
    again: mbarrier.try_wait.shared::cta.b64 %p1, [%bar], %d9; @!%p1 bra again;
    mad.wide.u32 %d1, %t, 4, %a0; st.global.b32 [%d1], %r1;
    """
    text = entry(name, body, 1, room=1024)
    cases.append(Case(name, name, text, (output(64, unordered=True),), block=(64, 1, 1)))
    return cases


# ---------------------------------------------------------------- bulk copies

REDUCTIONS = ["add.u32", "add.s32", "add.u64", "min.u32", "max.u32", "min.s32", "max.s32"]
REDUCTIONS += ["min.u64", "max.u64", "min.s64", "max.s64", "inc.u32", "dec.u32"]
REDUCTIONS += [f"{op}.{kind}" for op in ("and", "or", "xor") for kind in ("b32", "b64")]
FLOAT_REDUCTIONS = ["add.f32", "add.f64", "add.noftz.f16", "add.noftz.bf16"]
FLOAT_REDUCTIONS += [f"{op}.{kind}" for op in ("min", "max") for kind in ("f16", "bf16")]
NUMPY = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
#: Into shared memory of a peer.
PEER_REDUCTIONS = ["add.u32", "add.s32", "add.u64", "min.u32", "max.s32", "inc.u32", "dec.u32"]
PEER_REDUCTIONS += ["and.b32", "or.b32", "xor.b32"]


def _bulk() -> list[Case]:
    cases = []
    name = "bulk_there_and_back"
    body = f"""
    {INIT}
    @!%p0 bra waiting;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1040;
    cp.async.bulk.prefetch.L2.global [%a0], 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%room], [%a0], 1024, [%bar];
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%room+1024], [%a0+48], 16, [%bar];
    waiting:
    {wait_for("again")}
    mad.lo.u32 %r3, %t, 32, %room; ld.shared.b32 %r4, [%r3]; not.b32 %r4, %r4;
    st.shared.b32 [%r3], %r4;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 exit;
    cp.async.bulk.global.shared::cta.bulk_group [%a1], [%room], 1040;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.b32 [%room], 0;
    cp.async.bulk.wait_group 0;
    """
    data = source(random_bytes(name, 1024))
    text = entry(name, body, 2, room=2048)
    cases.append(Case(name, name, text, (data, output(260))))
    for form in REDUCTIONS + FLOAT_REDUCTIONS:
        name = "bulk_" + form.replace(".", "_")
        kind = form.split(".")[-1]
        body = f"""
    mad.lo.u32 %r3, %t, 16, %room; mad.wide.u32 %d3, %t, 16, %a0;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d3];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 exit;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{form} [%a1], [%room], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
        arrays = [random_bytes(name + end, 512) for end in ("", " memory")]
        if form in FLOAT_REDUCTIONS:
            size = int(kind.removeprefix("b")[1:]) // 8
            arrays = [
                floats(name + end, NUMPY[kind], 512 // size).view(np.uint8)
                for end in ("", " memory")
            ]
        elif form.startswith(("inc", "dec")):
            for array in arrays:
                array.view(np.uint32)[:] %= 7
        arguments = (source(arrays[0]), Buffer(arrays[1], output=True))
        cases.append(Case(name, name, entry(name, body, 2, room=1024), arguments))
    return [*cases, *_bulk_clusters()]


def _bulk_clusters() -> list[Case]:
    name = "bulk_multicast"
    body = f"""
    {INIT}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 256;
    {CLUSTER_SYNC}
    mov.u32 %r10, %cluster_ctarank; setp.eq.and.u32 %p1, %r10, 0, %p0; mov.b16 %h1, 11;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%room], [%a0], 256, [%bar], %h1;
    {wait_for("again")}
    setp.eq.and.u32 %p1, %r10, 1, %p0;
    mapa.shared::cluster.u32 %r11, %room, 2; mapa.shared::cluster.u32 %r12, %bar, 2;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%r11], [%room], 256, [%r12];
    mad.lo.u32 %r3, %t, 8, %room; ld.shared.v2.b32 {{%r4, %r5}}, [%r3];
    mad.lo.u32 %r6, %r10, 32, %t; mad.wide.u32 %d3, %r6, 8, %a1;
    st.global.v2.b32 [%d3], {{%r4, %r5}};
    {CLUSTER_SYNC}
    """
    data = source(random_bytes(name, 256))
    text = entry(name, body, 2, room=1024)
    cases = [Case(name, name, text, (data, output((4, 64))), **pair(4))]
    for form in PEER_REDUCTIONS:
        name = "bulk_peer_" + form.replace(".", "_")
        body = f"""
    mov.u32 %r10, %cluster_ctarank; mad.lo.u32 %r3, %t, 16, %room;
    mad.lo.u32 %r6, %r10, 32, %t; mad.wide.u32 %d3, %r6, 16, %a0;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d3];
    st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d3+1024];
    st.shared.v4.b32 [%r3+512], {{%r4, %r5, %r6, %r7}};
    {INIT}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
    fence.proxy.async;
    {CLUSTER_SYNC}
    xor.b32 %r13, %r10, 1;
    mapa.shared::cluster.u32 %r11, %room, %r13; mapa.shared::cluster.u32 %r12, %bar, %r13;
    @%p0 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{form}
        [%r11+512], [%room], 512, [%r12];
    {wait_for("again")}
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3+512];
    mad.lo.u32 %r6, %r10, 32, %t; mad.wide.u32 %d4, %r6, 16, %a1;
    ld.shared.b32 %r6, [%r3+520];
    st.global.v4.b32 [%d4], {{%r4, %r5, %r6, %r7}};
    {CLUSTER_SYNC}
    """
        values = random_bytes(name, 2048)
        if form.startswith(("inc", "dec")):
            values.view(np.uint32)[:] %= 7
        arguments = (source(values), output((2, 128)))
        cases.append(Case(name, name, entry(name, body, 2, room=2048), arguments, **pair(2)))
    return cases


# ---------------------------------------------------------------- clusters

PEER = """
    mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, %cluster_nctarank;
    add.u32 %r3, %r1, 1; rem.u32 %r3, %r3, %r2;
    mapa.shared::cluster.u32 %r5, %room, %r3; mapa.shared::cluster.u32 %r21, %bar, %r3;
    mad.lo.u32 %r6, %r1, 32, %t;
"""


def _distributed() -> list[Case]:
    name = "distributed_shared"
    body = f"""
    {PEER}
    mad.wide.u32 %d3, %r6, 4, %a0; ld.global.b32 %r7, [%d3]; mad.lo.u32 %r8, %t, 4, %r5;
    {CLUSTER_SYNC}
    st.shared::cluster.b32 [%r8], %r7;
    {CLUSTER_SYNC}
    mad.lo.u32 %r9, %t, 4, %room; ld.shared.b32 %r10, [%r9];
    cvt.u64.u32 %d5, %room; cvta.shared.u64 %d5, %d5; mapa.u64 %d6, %d5, %r3;
    mad.wide.u32 %d6, %t, 4, %d6; ld.b32 %r11, [%d6]; ld.shared::cluster.b32 %r12, [%r8];
    getctarank.shared::cluster.u32 %r13, %r8; getctarank.u64 %r14, %d6;
    isspacep.shared::cluster %p1, %d6; isspacep.shared::cta %p2, %d6; isspacep.global %p3, %d6;
    isspacep.shared::cta %p4, %d5;
    selp.b32 %r15, 1, 0, %p1; selp.b32 %r16, 2, 0, %p2; or.b32 %r15, %r15, %r16;
    selp.b32 %r16, 4, 0, %p3; or.b32 %r15, %r15, %r16; selp.b32 %r16, 8, 0, %p4;
    or.b32 %r15, %r15, %r16;
    mapa.shared::cluster.u32 %r17, %room, %r1; mad.lo.u32 %r17, %t, 4, %r17;
    ld.shared::cluster.b32 %r17, [%r17];
    mad.wide.u32 %d4, %r6, 28, %a1;
    st.global.b32 [%d4], %r10; st.global.b32 [%d4+4], %r11; st.global.b32 [%d4+8], %r12;
    st.global.b32 [%d4+12], %r13; st.global.b32 [%d4+16], %r14; st.global.b32 [%d4+20], %r15;
    st.global.b32 [%d4+24], %r17;
    {CLUSTER_SYNC}
    """
    text = entry(name, body, 2, room=1024)
    cases = []
    for n in (2, 4, 8):
        data = source(random_bytes(f"{name} {n}", n * 128).view(np.uint32))
        cases.append(Case(f"{name}_{n}", name, text, (data, output((n * 32, 7))), **pair(n)))
    name = "distributed_atomics"
    body = f"""
    mad.lo.u32 %r9, %t, 4, %room;
    st.shared.b32 [%r9], 1000; st.shared.b32 [%r9+128], 0; st.shared.b32 [%r9+256], 5;
    st.shared.b32 [%r9+384], -1;
    {PEER}
    mad.wide.u32 %d3, %r6, 4, %a0; ld.global.b32 %r7, [%d3]; mad.lo.u32 %r8, %t, 4, %r5;
    {CLUSTER_SYNC}
    atom.shared::cluster.add.u32 %r10, [%r8], %r7;
    atom.shared::cluster.exch.b32 %r11, [%r8+128], %r7;
    red.shared::cluster.max.s32 [%r8+256], %r7;
    mapa.shared::cluster.u32 %r12, %room, 0;
    red.relaxed.cluster.shared::cluster.xor.b32 [%r12+384], %r7;
    atom.relaxed.cluster.shared::cluster.cas.b32 %r13, [%r8+128], %r7, 99;
    {CLUSTER_SYNC}
    mad.wide.u32 %d4, %r6, 28, %a1;
    st.global.b32 [%d4], %r10; st.global.b32 [%d4+4], %r11; st.global.b32 [%d4+8], %r13;
    ld.shared.b32 %r14, [%r9]; st.global.b32 [%d4+12], %r14;
    ld.shared.b32 %r14, [%r9+128]; st.global.b32 [%d4+16], %r14;
    ld.shared.b32 %r14, [%r9+256]; st.global.b32 [%d4+20], %r14;
    ld.shared.b32 %r14, [%r9+384]; st.global.b32 [%d4+24], %r14;
    """
    text = entry(name, body, 2, room=1024)
    data = source(random_bytes(name, 4 * 128).view(np.uint32))
    cases.append(Case(name, name, text, (data, output((128, 7))), **pair(4)))
    return [*cases, *_remote_barriers(), *_remote_stores()]


def _remote_barriers() -> list[Case]:
    name = "remote_arrivals"
    body = f"""
    {PEER}
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 64; @%p0 mbarrier.init.shared::cta.b64 [%bar+8], 3;
    @%p0 fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
    mad.lo.u32 %r8, %t, 4, %r5; mad.lo.u32 %r7, %r1, 1000, %t;
    st.shared::cluster.b32 [%r8], %r7;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r21], 2;
    {wait_for("first")}
    mad.lo.u32 %r9, %t, 4, %room; ld.shared.b32 %r10, [%r9];
    @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r21+8], 3;
    add.u32 %r20, %bar, 8;
    {wait_for("second", 0, "%r20")}
    mad.wide.u32 %d4, %r6, 4, %a0; st.global.b32 [%d4], %r10;
    barrier.cluster.arrive; barrier.cluster.wait;
    """
    # The acquire of what a peer released is at cluster scope.
    body = body.replace(
        "mbarrier.try_wait.parity.shared::cta",
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta",
    )
    text = entry(name, body, 1, room=1024)
    return [Case(f"{name}_{n}", name, text, (output(32 * n),), **pair(n)) for n in (2, 3)]


STORES = [("b32", 1), ("b32", 2), ("b32", 4), ("b64", 1), ("b64", 2), ("f32", 2), ("u64", 1)]
REMOTE = ["add.u32", "add.s32", "add.u64", "min.u32", "max.u32", "min.s32", "max.s32"]
REMOTE += ["inc.u32", "dec.u32", "and.b32", "or.b32", "xor.b32"]


def _remote_stores() -> list[Case]:
    """st.async and red.async: every form into its own kilobyte of the next CTA."""
    total = sum(32 * (8 if kind.endswith("64") else 4) * n for kind, n in STORES)
    total += sum(32 * (8 if form.endswith("64") else 4) for form in REMOTE)
    rows = len(STORES) + len(REMOTE)
    name = "remote_stores"
    begin = f"""
    mov.u32 %r30, 0; mad.lo.u32 %r31, %t, 4, %room;
    mark:
    mul.lo.u32 %r32, %r30, 3; st.shared.b32 [%r31], %r32;
    add.u32 %r31, %r31, 128; add.u32 %r30, %r30, 1;
    setp.lt.u32 %p1, %r30, {4 * rows}; @%p1 bra mark;
    @%p0 mbarrier.init.shared::cta.b64 [%bar], 1; @%p0 fence.mbarrier_init.release.cluster;
    bar.warp.sync -1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {total};
    {CLUSTER_SYNC}
    {PEER}
    mad.wide.u32 %d3, %r6, 16, %a0; ld.global.v4.b32 {{%r40, %r41, %r42, %r43}}, [%d3];
    mov.b64 %d40, {{%r40, %r41}}; mov.b64 %d41, {{%r42, %r43}};
    """
    body = begin
    for i, (kind, n) in enumerate(STORES):
        letter, size = ("d", 8) if kind.endswith("64") else ("r", 4)
        operand = ", ".join(f"%{letter}{40 + k}" for k in range(n))
        v, operand = (f".v{n}", f"{{{operand}}}") if n > 1 else ("", operand)
        body += f"""
    mad.lo.u32 %r8, %t, {size * n}, %r5;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{v}.{kind}
        [%r8+{512 * i}], {operand}, [%r21];"""
        if i == 0:
            body = body.replace("st.async.weak.", "st.async.")
    for i, form in enumerate(REMOTE, len(STORES)):
        letter, size = ("d", 8) if form.endswith("64") else ("r", 4)
        body += f"""
    mad.lo.u32 %r8, %t, {size}, %r5;
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{form}
        [%r8+{512 * i}], %{letter}40, [%r21];"""
    body += f"""
    {wait_for("again").replace("parity.shared", "parity.acquire.cluster.shared")}
    mov.u32 %r30, 0; mad.lo.u32 %r31, %t, 4, %room; mad.wide.u32 %d4, %r1, {512 * rows}, %a1;
    mad.wide.u32 %d4, %t, 4, %d4;
    drain:
    ld.shared.b32 %r32, [%r31]; st.global.b32 [%d4], %r32; add.s64 %d4, %d4, 128;
    add.u32 %r31, %r31, 128; add.u32 %r30, %r30, 1;
    setp.lt.u32 %p1, %r30, {4 * rows}; @%p1 bra drain;
    {CLUSTER_SYNC}
    """
    text = entry(name, body, 2, room=512 * rows)
    words = random_bytes(name, 2 * 512).view(np.uint32)
    small = generator(name).integers(0, 400, 32, dtype=np.uint32)
    words[::8] = small  # so that inc and dec do both things
    return [Case(name, name, text, (source(words), output((2, rows, 128))), **pair(2))]


def cases() -> list[Case]:
    found = [*_copies(), *_mbarriers(), *_bulk(), *_distributed()]
    return [Case(**{**case.__dict__, "group": GROUP}) for case in found]
