"""Shuffles, votes, matches, reductions and barriers of warps; branches; special registers."""

from __future__ import annotations

import numpy as np

from silicon.model import Case, entry, generator, output, random_bytes, source

GROUP = "warps"
LANE = "mad.wide.u32 %d0, %t, 4, %a0; ld.global.b32 %r0, [%d0];"


def _store(columns: int, values: list[str], pointer: str, index: str = "%t") -> str:
    """Row `index` of a matrix of 32-bit words."""
    at = f"mad.wide.u32 %d1, {index}, {4 * columns}, {pointer};"
    return at + "".join(f"st.global.b32 [%d1+{4 * i}], {v};" for i, v in enumerate(values))


def _shuffles() -> list[Case]:
    cases = []
    for mode in ("idx", "up", "down", "bfly"):
        for form in ("lanes", "segments", "any"):
            rng = generator(f"shfl {mode} {form}")
            value = rng.integers(0, 2**32, 32, dtype=np.uint32)
            lane = rng.integers(0, 32, 32, dtype=np.uint32)
            clamp = 0 if mode == "up" else 31
            if form == "lanes":
                c = np.full(32, clamp, np.uint32)
            elif form == "segments":
                width = 2 ** rng.integers(0, 6, 32)
                c = ((32 - width) << 8 | clamp).astype(np.uint32)
            else:
                c = rng.integers(0, 2**13, 32, dtype=np.uint32)
                lane = rng.integers(0, 2**32, 32, dtype=np.uint32)
            name = f"shfl_{mode}_{form}"
            body = f"""
    {LANE} ld.global.b32 %r1, [%d0+128]; ld.global.b32 %r2, [%d0+256];
    shfl.sync.{mode}.b32 %r3|%p1, %r0, %r1, %r2, 0xffffffff;
    selp.b32 %r4, 1, 0, %p1;
    shfl.sync.{mode}.b32 %r5, %r0, 5, {clamp}, -1;
    {_store(3, ["%r3", "%r4", "%r5"], "%a1")}
    """
            data = source(np.stack([value, lane, c]))
            cases.append(Case(name, name, entry(name, body, 2), (data, output((32, 3)))))
    name = "shfl_of_a_part"
    body = f"""
    {LANE} mov.u32 %r3, 0; and.b32 %r1, %t, 3;
    setp.eq.u32 %p1, %r1, 2;
    @!%p1 bra other;
    add.u32 %r2, %t, 4; and.b32 %r2, %r2, 31;
    shfl.sync.idx.b32 %r3, %r0, %r2, 31, 0x44444444;
    other:
    bar.warp.sync -1;
    {_store(1, ["%r3"], "%a1")}
    """
    data = source(random_bytes(name, 128).view(np.uint32))
    cases.append(Case(name, name, entry(name, body, 2), (data, output(32))))
    return cases


def _votes() -> list[Case]:
    rounds = []
    for i in range(8):
        rounds.append(f"""
    ld.global.b32 %r0, [%d0+{128 * i}]; setp.ne.u32 %p1, %r0, 0;
    vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p1, -1;
    vote.sync.uni.pred %p4, %p1, -1; vote.sync.ballot.b32 %r1, %p1, -1;
    vote.sync.ballot.b32 %r5, !%p1, -1;
    selp.b32 %r2, 1, 0, %p2; selp.b32 %r3, 2, 0, %p3; selp.b32 %r4, 4, 0, %p4;
    or.b32 %r2, %r2, %r3; or.b32 %r2, %r2, %r4;
    st.global.b32 [%d1+{12 * i}], %r1; st.global.b32 [%d1+{12 * i + 4}], %r2;
    st.global.b32 [%d1+{12 * i + 8}], %r5;""")
    name = "votes"
    body = "mad.wide.u32 %d0, %t, 4, %a0; mad.wide.u32 %d1, %t, 96, %a1;" + "".join(rounds)
    values = (generator(name).random((8, 32)) < 0.5).astype(np.uint32)
    values[0], values[1], values[2] = 1, 0, np.arange(32) != 9
    cases = [Case(name, name, entry(name, body, 2), (source(values), output((32, 8, 3))))]
    name = "votes_of_a_part"
    body = f"""
    {LANE} and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 1; setp.gt.s32 %p2, %r0, 0;
    mov.u32 %r2, 0; mov.u32 %r3, 0;
    @!%p1 bra even;
    vote.sync.ballot.b32 %r2, %p2, 0xaaaaaaaa;
    redux.sync.min.s32 %r3, %r0, 0xaaaaaaaa;
    bra joined;
    even:
    vote.sync.ballot.b32 %r2, %p2, 0x55555555;
    redux.sync.max.s32 %r3, %r0, 0x55555555;
    joined:
    bar.warp.sync -1;
    elect.sync %r4|%p3, 0xffffffff;
    selp.b32 %r5, 1, 0, %p3;
    {_store(4, ["%r2", "%r3", "%r4", "%r5"], "%a1")}
    """
    data = source(random_bytes(name, 128).view(np.uint32))
    cases.append(Case(name, name, entry(name, body, 2), (data, output((32, 4)))))
    name = "elect_of_a_part"
    body = f"""
    mov.u32 %r1, 99; mov.u32 %r2, 0;
    setp.lt.u32 %p1, %t, 7; @%p1 bra low;
    elect.sync %r1|%p2, 0xffffff80; selp.b32 %r2, 1, 0, %p2;
    bra joined;
    low:
    elect.sync %r1|%p2, 0x7f; selp.b32 %r2, 2, 0, %p2;
    joined:
    {_store(2, ["%r1", "%r2"], "%a0")}
    """
    cases.append(Case(name, name, entry(name, body, 1), (output((32, 2)),)))
    return cases


def _matches() -> list[Case]:
    name = "matches"
    body = """
    mad.wide.u32 %d0, %t, 8, %a0; ld.global.b64 %d2, [%d0]; ld.global.b64 %d3, [%d0+256];
    cvt.u32.u64 %r0, %d2; cvt.u32.u64 %r1, %d3;
    match.any.sync.b32 %r2, %r0, -1; match.any.sync.b64 %r3, %d2, -1;
    match.all.sync.b32 %r4|%p1, %r0, -1; match.all.sync.b64 %r5|%p2, %d2, -1;
    match.all.sync.b32 %r6|%p3, %r1, -1; match.all.sync.b64 %r7|%p4, %d3, -1;
    selp.b32 %r8, 1, 0, %p1; selp.b32 %r9, 2, 0, %p2; or.b32 %r8, %r8, %r9;
    selp.b32 %r9, 4, 0, %p3; or.b32 %r8, %r8, %r9; selp.b32 %r9, 8, 0, %p4; or.b32 %r8, %r8, %r9;
    """ + _store(7, ["%r2", "%r3", "%r4", "%r5", "%r6", "%r7", "%r8"], "%a1")
    values = generator(name).integers(0, 5, (2, 32)).astype(np.uint64)
    values[0] += generator(name + "high").integers(0, 2, 32).astype(np.uint64) << np.uint64(32)
    values[1] = 1234567890123
    return [Case(name, name, entry(name, body, 2), (source(values), output((32, 7))))]


def _reductions() -> list[Case]:
    name = "redux"
    operations = [f"{op}.{kind}" for kind in ("u32", "s32") for op in ("add", "min", "max")]
    operations += [f"{op}.b32" for op in ("and", "or", "xor")]
    body = LANE + "".join(
        f"redux.sync.{op} %r{10 + i}, %r0, -1;" for i, op in enumerate(operations)
    )
    body += _store(9, [f"%r{10 + i}" for i in range(9)], "%a1")
    data = source(random_bytes(name, 128).view(np.uint32))
    return [Case(name, name, entry(name, body, 2), (data, output((32, 9))))]


def _branches() -> list[Case]:
    name = "divergent_loops"
    body = f"""
    {LANE} and.b32 %r1, %r0, 15; mov.u32 %r2, 0; mov.u32 %r3, 0;
    outer:
    setp.ge.u32 %p1, %r2, %r1; @%p1 bra done;
    add.u32 %r2, %r2, 1;
    and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0; @%p2 bra outer;
    mov.u32 %r5, 0;
    inner:
    mad.lo.u32 %r3, %r3, 5, %r0; add.u32 %r5, %r5, 1;
    setp.lt.u32 %p3, %r5, %r2; @%p3 bra inner;
    setp.gt.u32 %p4, %r3, 0xf0000000; @%p4 bra done;
    bra outer;
    done:
    bar.warp.sync -1;
    shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;
    {_store(3, ["%r2", "%r3", "%r6"], "%a1")}
    """
    data = source(random_bytes(name, 128).view(np.uint32))
    cases = [Case(name, name, entry(name, body, 2), (data, output((32, 3))))]
    name = "branch_tables"
    body = f"""
    {LANE} and.b32 %r1, %r0, 3;
    targets: .branchtargets zero, one, two, zero;
    brx.idx %r1, targets;
    zero: add.u32 %r2, %r0, 17; bra after;
    one: xor.b32 %r2, %r0, %t; bra after;
    two: not.b32 %r2, %r0; bra after;
    after:
    bar.warp.sync -1;
    {_store(1, ["%r2"], "%a1")}
    """
    cases.append(Case(name, name, entry(name, body, 2), (data, output(32))))
    name = "exits"
    body = f"""
    {LANE} {_store(2, ["1", "%r0"], "%a1")}
    and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1; @%p1 exit;
    st.global.b32 [%d1], 2;
    """
    cases.append(Case(name, name, entry(name, body, 2), (data, output((32, 2)))))
    return cases


SPECIAL = ["%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%laneid"]
SPECIAL += ["%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"]
SPECIAL += [f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")]
SPECIAL += [
    f"%{name}.{axis}"
    for name in ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
    for axis in "xyz"
]
SPECIAL += ["%cluster_ctarank", "%cluster_nctarank", "%dynamic_smem_size"]
# Not %warpid: an H200 numbers warps by the slots of its SM that they run in.


def _special() -> list[Case]:
    name = "special_registers"
    reads = "".join(
        f"mov.u32 %r10, {register}; st.global.b32 [%d0+{4 * i}], %r10;"
        for i, register in enumerate(SPECIAL)
    )
    n = len(SPECIAL)
    body = f"""
    mov.u32 %r0, %ctaid.z; mov.u32 %r1, %nctaid.y; mad.lo.u32 %r0, %r0, %r1, 0;
    mov.u32 %r1, %ctaid.y; add.u32 %r0, %r0, %r1; mov.u32 %r1, %nctaid.x;
    mul.lo.u32 %r0, %r0, %r1; mov.u32 %r1, %ctaid.x; add.u32 %r0, %r0, %r1;
    mov.u32 %r1, %ntid.z; mov.u32 %r2, %tid.z; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %ntid.y; mov.u32 %r2, %tid.y; mad.lo.u32 %r0, %r0, %r1, %r2;
    mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r0, %r0, %r1, %r2;
    mad.wide.u32 %d0, %r0, {4 * n}, %a0;
    {reads}
    """
    shapes = [
        ((2, 3, 2), (4, 3, 2), (1, 1, 1), 0),
        ((4, 4, 2), (8, 1, 2), (2, 2, 1), 1024),
        ((4, 2, 4), (8, 2, 1), (1, 2, 4), 0),
        ((8, 1, 2), (16, 1, 1), (8, 1, 1), 16),
        ((3, 2, 1), (16, 1, 1), (3, 2, 1), 16),
    ]
    text = entry(name, body, 1)
    cases = []
    for grid, block, cluster, shared in shapes:
        threads = int(np.prod(grid)) * int(np.prod(block))
        size = "x".join(map(str, cluster))
        cases.append(
            Case(
                f"{name}_{size}", name, text, (output((threads, n)),), grid, block, cluster,
                shared,
            )
        )  # fmt: skip
    return cases


def _explicit_cluster() -> list[Case]:
    name = "explicit_cluster"
    body = """
    mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 4, %a0;
    mov.pred %p1, %is_explicit_cluster; selp.b32 %r1, 1, 2, %p1;
    st.global.b32 [%d0], %r1;
    """
    text = entry(name, body, 1)
    return [
        Case(f"{name}_{n}", name, text, (output(4),), (4, 1, 1), cluster=(n, 1, 1)) for n in (1, 2)
    ]


def _named_barriers() -> list[Case]:
    name = "named_barriers"
    body = """
    shr.u32 %r1, %t, 5; setp.ge.u32 %p1, %t, 64;
    mad.lo.u32 %r2, %t, 4, %room;
    mov.u32 %r10, 0; mov.u32 %r11, 0;
    again:
    @%p1 bra consumer;
    mad.lo.u32 %r3, %r10, 1000, %t; st.shared.b32 [%r2], %r3;
    bar.arrive 3, 128;
    barrier.sync 4, 128;
    bra next;
    consumer:
    barrier.sync 3, 128;
    sub.u32 %r4, %r2, 256; xor.b32 %r4, %r4, 4; ld.shared.b32 %r3, [%r4];
    mad.lo.u32 %r11, %r11, 7, %r3;
    bar.arrive 4, 128;
    next:
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 5; @%p2 bra again;
    bar.sync 0;
    mov.u32 %r5, 9;
    bar.red.popc.u32 %r6, 1, %p1; bar.red.and.pred %p3, 2, %p1; bar.red.or.pred %p4, %r5, %p1;
    selp.b32 %r7, 1, 0, %p3; selp.b32 %r8, 2, 0, %p4; or.b32 %r7, %r7, %r8;
    setp.lt.u32 %p5, %t, 32; mov.u32 %r9, 0;
    @%p5 bra end;
    setp.eq.u32 %p6, %t, 50;
    barrier.cta.red.popc.aligned.u32 %r9, 5, 96, !%p6;
    barrier.cta.red.or.pred %p7, 6, 96, %p6;
    @%p7 add.u32 %r9, %r9, 1000;
    end:
    """ + _store(4, ["%r11", "%r6", "%r7", "%r9"], "%a0")
    text = entry(name, body, 1, room=1024)
    return [Case(name, name, text, (output((128, 4)),), block=(128, 1, 1))]


def cases() -> list[Case]:
    found = [
        *_shuffles(),
        *_votes(),
        *_matches(),
        *_reductions(),
        *_branches(),
        *_special(),
        *_explicit_cluster(),
    ]
    found += _named_barriers()
    return [Case(**{**case.__dict__, "group": GROUP}) for case in found]
