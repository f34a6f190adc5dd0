"""The machine's core: parsing, divergence, lanes acting together, scheduling, findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cute_fmha.emulator import build, ptx
from cute_fmha.emulator.machine import (
    EmulationError,
    Machine,
    Policy,
    Region,
    Result,
    UnmodelledError,
    load,
    merge_regions,
    pack_arguments,
    run_ptx,
)

HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .b64 %d<40>; .reg .f32 %f<20>;"
)
# Lane t of the block stores %r0 to out[t].
STORE = """
    ld.param.u64 %d30, [out];
    mov.u32 %r50, %tid.x;
    mul.wide.u32 %d31, %r50, 4;
    add.s64 %d32, %d30, %d31;
    st.global.u32 [%d32], %r0;
"""


def kernel(body: str, parameters: str = ".param .u64 out", before: str = "") -> str:
    return f"{HEADER}{before}\n.visible .entry k({parameters})\n{{\n{REGISTERS}\n{body}\n}}\n"


def lanes(body: str, *inputs: np.ndarray, threads: int = 32, **options: Any) -> np.ndarray:
    """%r0 of every thread; inputs arrive in %r1, %r2, ..."""
    load_inputs = ["mov.u32 %r50, %tid.x;", "mul.wide.u32 %d31, %r50, 4;"]
    names = [".param .u64 out"]
    for i in range(len(inputs)):
        names.append(f".param .u64 in{i}")
        load_inputs += [
            f"ld.param.u64 %d30, [in{i}];",
            "add.s64 %d32, %d30, %d31;",
            f"ld.global.u32 %r{i + 1}, [%d32];",
        ]
    out = np.full(threads, 0xDEADBEEF, np.uint32)
    source = kernel("\n".join(load_inputs) + body + STORE, ", ".join(names))
    run_ptx(source, out, *inputs, block=(threads, 1, 1), **options)
    return out


def finds(kind: str, source: str, *arguments: Any, **options: Any) -> Result:
    """The result of a run that must report a finding of this kind."""
    with pytest.raises(EmulationError) as caught:
        run_ptx(source, *arguments, **options)
    result = caught.value.result
    assert result is not None
    assert kind in {finding.kind for finding in result.findings}, result.report()
    return result


def words(rng: np.random.Generator, n: int = 32) -> np.ndarray:
    return rng.integers(0, 2**32, n, dtype=np.uint32)


# ---------------------------------------------------------------- parser


@pytest.mark.parametrize(
    ("text", "operand"),
    [
        ("%r12", ptx.Name("%r12")),
        ("!%p3", ptx.Name("%p3", negate=True)),
        ("_", ptx.Sink()),
        ("P1", ptx.Name("P1")),
        ("table+8", ptx.Name("table", addend=8)),
        ("-1", ptx.Constant(-1)),
        ("0x1F", ptx.Constant(31)),
        ("0b101", ptx.Constant(5)),
        ("017", ptx.Constant(15)),
        ("42U", ptx.Constant(42)),
        ("WARP_SZ", ptx.Constant(32)),
        ("0f3F800000", ptx.Constant(0x3F800000, "f32")),
        ("0dBFF0000000000000", ptx.Constant(0xBFF0000000000000, "f64")),
        ("1.5e3", ptx.Constant(1500.0, "decimal")),
        ("(1 << 4) + 2*3 - ~0", ptx.Constant(23)),
        ("%r1|%p2", ptx.Vector((ptx.Name("%r1"), ptx.Name("%p2")))),
        ("_|%p2", ptx.Vector((ptx.Sink(), ptx.Name("%p2")))),
        ("{%r1, _, 0x4}", ptx.Vector((ptx.Name("%r1"), ptx.Sink(), ptx.Constant(4)))),
        ("[%rd1]", ptx.Address(ptx.Name("%rd1"))),
        ("[%rd1+8]", ptx.Address(ptx.Name("%rd1"), 8)),
        ("[%rd1 + 0x8]", ptx.Address(ptx.Name("%rd1"), 8)),
        ("[%rd1+-8]", ptx.Address(ptx.Name("%rd1"), -8)),
        ("[%rd1-8]", ptx.Address(ptx.Name("%rd1"), -8)),
        ("[sym + 4]", ptx.Address(ptx.Name("sym"), 4)),
        ("[1024]", ptx.Address(ptx.Constant(1024))),
        (
            "[%rd1, {%r1, 2}]",
            ptx.Vector(
                (ptx.Address(ptx.Name("%rd1")), ptx.Vector((ptx.Name("%r1"), ptx.Constant(2))))
            ),
        ),
    ],
)
def test_operands(text: str, operand: ptx.Operand) -> None:
    assert ptx.parse_operand(text) == operand


def test_unreadable_operands() -> None:
    for text in ("%r1 %r2", "[%r1*2]", "{%r1", "0f123", "a|b|c", "__import__('os')"):
        with pytest.raises(ValueError, match=r"cannot read|not declared"):
            ptx.parse_operand(text)


def test_module() -> None:
    source = (
        HEADER
        + """
    .extern .shared .align 1024 .b8 dynamic[];  // comment { ;
    .shared .align 8 .b64 bars[3]; /* two
    lines; */
    .const .align 4 .b32 table[3] = {1, -2, 0x10};
    .extern .func (.param .b32 r) vprintf (.param .b64 a);
    .visible .entry first(.param .align 64 .b8 map[128], .param .f32 scale,
                          .param .u64 .ptr .global .align 16 p)
    .reqntid 128, 1, 1
    .maxnreg 168
    { .reg .b32 %r<3>; .loc 1 17 3, function_name $L__info, inlined_at 2 3 4
      mov.b32 %r1, %r2;
      .pragma "nounroll";
      ret; }
    .visible .entry second() { ret; }
    .file 1 "/a/b.py"
    .section .debug_str { $L__info: .b8 98, 0 }
    """
    )
    module = ptx.parse(source)
    assert list(module.kernels) == ["first", "second"]
    first = module.kernels["first"]
    assert [(p.name, p.type, p.align, p.bytes, p.array) for p in first.parameters] == [
        ("map", "b8", 64, 128, True),
        ("scale", "f32", 4, 4, False),
        ("p", "u64", 8, 8, False),
    ]
    assert first.directives == {"reqntid": (128, 1, 1), "maxnreg": (168,)}
    assert [i.name for i in first.instructions] == ["mov.b32", "ret"]
    assert first.instructions[0].source == (1, 17)
    assert module.line(first.instructions[0].line) == "mov.b32 %r1, %r2;"
    assert module.files == {1: "/a/b.py"}
    assert module.variables["dynamic"].size == 0
    assert module.variables["bars"].size == 24
    assert module.variables["table"].initial == np.array([1, -2, 16], "<i4").tobytes()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", r"PTX line 8.*\n.*frobnicate.b32: no instruction family"),
        ("mov.b32 %r1, nobody;", "PTX line 8: mov.b32: nobody is not declared"),
        ("bra NOWHERE;", "NOWHERE is not declared"),
        ("mov.b32 %r1, %envreg3;", "%envreg3 is not modelled"),
        ("add.u32 %r1, %clock, 1;", "modelled in mov only"),
        ("call.uni (r), f, (a);", "calls of functions"),
        ("shfl.idx.b32 %r1, %r2, 0, 31;", "only the .sync form"),
        ("setmaxnreg.inc.sync.aligned.u32 33;", "multiple of 8"),
        ("@%r1 bra L; L:", "%r1 is not a predicate"),
    ],
)
def test_refused(body: str, message: str) -> None:
    with pytest.raises((UnmodelledError, ptx.PtxError), match=message):
        run_ptx(kernel(body), np.zeros(1, np.uint32))


# ---------------------------------------------------------------- names and variables


def test_scoped_blocks(rng: np.random.Generator) -> None:
    """Blocks have their own registers and labels, and see those around them."""
    x = words(rng)
    block = """
    {
        .reg .b32 x; .reg .pred P;
        mov.b32 x, %r1;
        AGAIN: add.u32 x, x, 1;
        { .reg .b32 x, y; mov.b32 x, 3; add.u32 y, x, %r1; mov.b32 %r3, y; }
        setp.lt.u32 P, x, %r4;
        @P bra.uni AGAIN;
        bra DONE;
        add.u32 x, x, 100;
        DONE: add.u32 %r0, %r0, x;
    }
    """
    got = lanes("mov.b32 %r0, 0; add.u32 %r4, %r1, 5;" + block + block, x % 1000)
    assert np.array_equal(got, 2 * (x % 1000 + 5))


def test_variables() -> None:
    before = """
    .global .align 4 .b32 table[4] = {10, 20, 30, 40};
    .const .f64 pi = 0d400921FB54442D18;
    .shared .align 16 .b8 first[24];
    .extern .shared .align 1024 .b8 dynamic[];
    """
    body = """
    .shared .align 128 .b32 second;
    .local .align 8 .b8 depot[16];
    mov.b32 %r1, first; mov.b32 %r2, second; mov.b32 %r3, dynamic; mov.u32 %r4, first+8;
    mov.b64 %d1, table;
    ld.global.u32 %r5, [%d1+8];
    ld.global.u32 %r6, [table+4];
    ld.const.b64 %d3, [pi];
    mov.b64 {%r7, %r8}, %d3;
    mov.u32 %r9, %tid.x;
    st.local.u32 [depot+4], %r9;
    ld.local.u32 %r10, [depot+4];
    ld.param.u64 %d2, [out];
    st.global.v4.u32 [%d2], {%r1, %r2, %r3, %r4};
    st.global.v4.u32 [%d2+16], {%r5, %r6, %r7, %r8};
    setp.eq.u32 %p1, %r9, 5;
    @%p1 st.global.u32 [%d2+32], %r10;
    """
    out = np.zeros(9, np.uint32)
    run_ptx(
        kernel(body, before=before),
        out,
        dynamic_shared=64,
        policy=Policy(races=False),
    )
    low, high = np.float64(np.pi).view(np.uint64) & 0xFFFFFFFF, np.float64(np.pi).view(np.uint64)
    assert out.tolist() == [1024, 1152, 2048, 1032, 30, 20, low, high >> 32, 5]


def test_global_variables_start_anew() -> None:
    body = "ld.global.u32 %r0, [count]; add.u32 %r0, %r0, 1; st.global.u32 [count], %r0;" + STORE
    source = kernel(body, before=".global .align 4 .b32 count = 7;")
    for _ in range(2):
        out = np.zeros(1, np.uint32)
        run_ptx(source, out, block=(1, 1, 1))
        assert out[0] == 8


def test_constants() -> None:
    body = """
    mov.f32 %f1, 1.5; mov.b32 %r1, 0f40000000; mov.b32 %f2, %r1; mul.f32 %f3, %f1, %f2;
    mov.b32 %r2, %f3; mov.b16 %h1, -1; mov.b16 %h2, 0x1234; mov.b32 %r3, {%h1, %h2};
    mov.b64 %d1, 0xffffffff00000001; mov.b64 {%r4, %r5}, %d1; xor.b32 %r0, %r2, %r3;
    xor.b32 %r0, %r0, %r4; xor.b32 %r0, %r0, %r5;
    """
    expected = np.float32(3).view(np.uint32) ^ 0x1234FFFF ^ 1 ^ 0xFFFFFFFF
    assert np.all(lanes(body) == expected)


Context = dict[str, Any]


def axis_of(name: str, i: int) -> Callable[[Context], Any]:
    return lambda context: context[name][i]


NAMES = (
    "tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid",
)  # fmt: skip
SPECIAL: dict[str, Callable[[Context], Any]] = {
    **{f"%{name}.{axis}": axis_of(name, i) for name in NAMES for i, axis in enumerate("xyz")},
    "%laneid": lambda c: c["lane"],
    "%warpid": lambda c: c["warp"],
    "%lanemask_eq": lambda c: 1 << c["lane"],
    "%lanemask_lt": lambda c: (1 << c["lane"]) - 1,
    "%lanemask_le": lambda c: (2 << c["lane"]) - 1,
    "%lanemask_gt": lambda c: (0xFFFFFFFF << (c["lane"] + 1)) & 0xFFFFFFFF,
    "%lanemask_ge": lambda c: (0xFFFFFFFF << c["lane"]) & 0xFFFFFFFF,
    "%cluster_ctarank": lambda c: c["rank"],
    "%cluster_nctarank": lambda c: 4,
    "%is_explicit_cluster": lambda c: 1,
    "%dynamic_smem_size": lambda c: 4096,
    "%nsmid": lambda c: 148,
}


def test_special_registers() -> None:
    grid, block, cluster = (4, 2, 3), (7, 3, 2), (2, 2, 1)
    threads, ctas, n = 42, 24, len(SPECIAL)
    predicate = "mov.pred %p1, %is_explicit_cluster; selp.u32 %r2, 1, 0, %p1;"
    stores = "".join(
        (predicate if name == "%is_explicit_cluster" else f"mov.u32 %r2, {name};")
        + f" st.global.u32 [%d4+{4 * i}], %r2;\n"
        for i, name in enumerate(SPECIAL)
    )
    body = f"""
    mov.u32 %r1, %tid.z; mov.u32 %r2, %ntid.y; mov.u32 %r3, %tid.y;
    mad.lo.s32 %r1, %r1, %r2, %r3; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
    mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r4, %ctaid.z; mov.u32 %r2, %nctaid.y; mov.u32 %r3, %ctaid.y;
    mad.lo.s32 %r4, %r4, %r2, %r3; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r4, %r4, %r2, %r3;
    mad.lo.s32 %r1, %r4, {threads}, %r1;
    ld.param.u64 %d1, [out]; mul.wide.u32 %d2, %r1, {4 * n}; add.s64 %d4, %d1, %d2;
    {stores}
    """
    out = np.zeros((ctas, threads, n), np.uint32)
    policy = Policy("random", seed=3, slice=5, resident=8)
    result = run_ptx(
        kernel(body), out, grid=grid, block=block, cluster=cluster, dynamic_shared=4096,
        policy=policy,
    )  # fmt: skip
    for cta in range(ctas):
        ctaid = (cta % 4, cta // 4 % 2, cta // 8)
        within = tuple(i % c for i, c in zip(ctaid, cluster, strict=True))
        for thread in range(threads):
            context = {
                "tid": (thread % 7, thread // 7 % 3, thread // 21),
                "ntid": block, "ctaid": ctaid, "nctaid": grid,
                "clusterid": tuple(i // c for i, c in zip(ctaid, cluster, strict=True)),
                "nclusterid": (2, 1, 3), "cluster_ctaid": within, "cluster_nctaid": cluster,
                "rank": within[0] + 2 * within[1], "lane": thread % 32, "warp": thread // 32,
            }  # fmt: skip
            expected = [value(context) for value in SPECIAL.values()]
            assert out[cta, thread].tolist() == expected
    assert result.counters.steps == int(result.executed.sum())
    assert result.counters.by_warp.sum() == result.counters.steps


def test_clocks_advance() -> None:
    body = """
    mov.u32 %r1, %clock; mov.u64 %d1, %globaltimer; nanosleep.u32 100;
    mov.u32 %r2, %clock; mov.u64 %d2, %globaltimer; mov.u64 %d3, %clock64;
    sub.u32 %r0, %r2, %r1; sub.s64 %d2, %d2, %d1; cvt.u32.u64 %r3, %d2;
    min.u32 %r0, %r0, %r3;
    """
    assert np.all(lanes(body) >= 100)


def test_sleeping_gives_others_their_turn() -> None:
    """A warp that polls memory runs a few instructions for each slice of the one it waits for."""
    body = """
    ld.param.u64 %d0, [out];
    mov.u32 %r0, %tid.x; setp.ge.u32 %p1, %r0, 32; mov.b32 %r1, 0;
    @%p1 bra WORK;
    POLL: nanosleep.u32 20; ld.acquire.gpu.global.u32 %r2, [%d0];
    setp.eq.u32 %p2, %r2, 0; @%p2 bra POLL;
    bra END;
    WORK: add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 10000; @%p2 bra WORK;
    atom.release.gpu.global.add.u32 %r2, [%d0], 1;
    END: ret;
    """
    result = run_ptx(kernel(body), np.zeros(1, np.uint32), block=(64, 1, 1))
    polling, working = result.counters.by_warp.sum(axis=1)[:2]
    assert working > 30000
    assert polling < working / 20


# ---------------------------------------------------------------- divergence


def test_branches(rng: np.random.Generator) -> None:
    x = words(rng)
    body = """
    and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; and.b32 %r3, %r1, 2; setp.eq.u32 %p2, %r3, 0;
    @!%p1 bra ODD;
    mov.b32 %r0, 10;
    @%p2 bra JOIN;
    add.u32 %r0, %r0, 1;
    bra JOIN;
    ODD: mov.b32 %r0, 20;
    @%p2 bra JOIN;
    add.u32 %r0, %r0, 2;
    JOIN: add.u32 %r0, %r0, 100;
    """
    expected = 100 + np.where(x & 1, 20 + np.where(x & 2, 2, 0), 10 + np.where(x & 2, 1, 0))
    assert np.array_equal(lanes(body, x), expected)


def test_loops_meet_again(rng: np.random.Generator) -> None:
    """Nested loops with their own trip counts: right values, and one fragment after them."""
    x, y = words(rng) % 9, words(rng) % 5
    body = """
    mov.b32 %r0, 0; mov.b32 %r3, 0;
    OUTER: setp.ge.u32 %p1, %r3, %r1; @%p1 bra END;
    mov.b32 %r4, 0;
    INNER: setp.ge.u32 %p2, %r4, %r2; @%p2 bra NEXT;
    add.u32 %r0, %r0, %r3; add.u32 %r4, %r4, 1; bra INNER;
    NEXT: add.u32 %r3, %r3, 1; bra.uni OUTER;
    END: add.u32 %r0, %r0, 7;
    """
    out = np.zeros(32, np.uint32)
    source = kernel(
        "mov.u32 %r50, %tid.x; mul.wide.u32 %d31, %r50, 4; ld.param.u64 %d1, [a];"
        "ld.param.u64 %d2, [b]; add.s64 %d1, %d1, %d31; add.s64 %d2, %d2, %d31;"
        "ld.global.u32 %r1, [%d1]; ld.global.u32 %r2, [%d2];" + body + STORE,
        ".param .u64 out, .param .u64 a, .param .u64 b",
    )
    result = run_ptx(source, out, x, y)
    assert np.array_equal(out, 7 + x * (x - 1) // 2 * y)
    assert result.executed[0, -3] == 1  # the store


def test_blocks_out_of_line() -> None:
    """A body laid out behind the place where the lanes meet again, at an .aligned instruction."""
    body = """
    mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 3; mov.b32 %r0, 5;
    @%p1 bra FAR;
    BACK: bar.warp.sync -1;
    bar.sync 0;
    bra END;
    FAR: mov.b32 %r0, 6; bra BACK;
    END: nanosleep.u32 1;
    """
    assert lanes(body).tolist() == [6] * 3 + [5] * 29


def test_exit_of_some_lanes(rng: np.random.Generator) -> None:
    x = words(rng) % 4
    body = """
    mov.b32 %r0, 77;
    setp.eq.u32 %p1, %r1, 0; @%p1 exit;
    setp.eq.u32 %p1, %r1, 1; @%p1 bra OUT;
    bar.warp.sync -1;
    activemask.b32 %r0;
    bra ON;
    OUT: ret;
    ON:
    """
    got = lanes(body, x)
    active = int(sum(1 << i for i in range(32) if x[i] > 1))
    assert np.array_equal(got, np.where(x > 1, active, 0xDEADBEEF))


def test_indexed_branch(rng: np.random.Generator) -> None:
    x = words(rng) % 3
    body = """
    TABLE: .branchtargets A, B, C;
    brx.idx %r1, TABLE;
    A: mov.b32 %r0, 1; bra END;
    B: mov.b32 %r0, 2; bra END;
    C: mov.b32 %r0, 3;
    END: add.u32 %r0, %r0, 1;
    """
    assert np.array_equal(lanes(body, x), x + 2)
    finds("other", kernel("mov.b32 %r1, 3;" + body), np.zeros(1, np.uint32))


def test_uniform_branch_that_is_not() -> None:
    body = "mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 3; @%p1 bra.uni L; L: ret;"
    finds("divergence", kernel(body), np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    "body",
    [
        # half of the warp, while the other half waits for it elsewhere
        "@%p1 bra L; bar.sync 0; L: shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;",
        # a guard that splits the warp
        "@%p1 bar.sync 0;",
        # each half at its own one
        "@%p1 bra L; bar.sync 0; bra END; L: bar.sync 0; END: ret;",
    ],
)
def test_aligned_without_the_whole_warp(body: str) -> None:
    halves = "mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16;"
    finds("divergence", kernel(halves + body), np.zeros(1, np.uint32))


def test_undefined_register() -> None:
    body = """
    mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16;
    @%p1 mov.b32 %r2, 5;
    add.u32 %r3, %r2, 1; add.u32 %r3, %r2, 1;
    """
    result = finds("uninitialised", kernel(body), np.zeros(1, np.uint32))
    (finding,) = result.findings
    assert "%r2" in finding.text
    assert "ffff0000" in finding.text
    assert "add.u32 %r3, %r2, 1" in finding.where


# ---------------------------------------------------------------- lanes acting together


def shuffled(mode: str, x: np.ndarray, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The ISA's definition, lane by lane."""
    value, inside = np.empty(32, np.uint32), np.empty(32, bool)
    clamp, segment = c & 31, c >> 8 & 31
    for lane in range(32):
        highest = (lane & segment) | (clamp & ~segment & 31)
        lowest = lane & segment
        j, ok = {
            "up": (lane - b, lane - b >= highest),
            "down": (lane + b, lane + b <= highest),
            "bfly": (lane ^ b, (lane ^ b) <= highest),
            "idx": (lowest | (b & ~segment & 31), (lowest | (b & ~segment & 31)) <= highest),
        }[mode]
        value[lane], inside[lane] = x[j if ok else lane], ok
    return value, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode: str, rng: np.random.Generator) -> None:
    x = words(rng)
    for width in (1, 2, 4, 8, 16, 32):
        for b in {0, 1, 31, *map(int, rng.integers(0, 32, 3))}:
            c = (32 - width) << 8 | (0 if mode == "up" else 31)
            body = f"""
            shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;
            shfl.sync.{mode}.b32 %r3, %r1, {b}, {c}, 0xffffffff;
            xor.b32 %r3, %r3, %r2; selp.b32 %r4, 1, 0, %p1;
            add.u32 %r0, %r2, %r4; add.u32 %r0, %r0, %r3;
            """
            value, inside = shuffled(mode, x, b, c)
            assert np.array_equal(lanes(body, x), value + inside.astype(np.uint32)), (width, b)


def test_shuffle_by_lane(rng: np.random.Generator) -> None:
    x, index = words(rng), words(rng)
    got = lanes("shfl.sync.idx.b32 %r0, %r1, %r2, 31, -1;", x, index)
    assert np.array_equal(got, x[index % 32])


def test_shuffle_from_a_lane_that_is_not_there() -> None:
    body = """
    mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16; @!%p1 exit;
    shfl.sync.down.b32 %r2, %r1, 8, 31, 0xffff;
    """
    result = finds("divergence", kernel(body), np.zeros(1, np.uint32))
    assert "00ff0000" in result.findings[0].text


def test_votes_and_matches(rng: np.random.Generator) -> None:
    x = words(rng) % 3
    body = """
    setp.eq.u32 %p1, %r1, 0;
    vote.sync.ballot.b32 %r2, %p1, -1;
    vote.sync.ballot.b32 %r3, !%p1, -1;
    vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
    vote.sync.uni.pred %p4, %p1, -1;
    match.any.sync.b32 %r4, %r1, -1;
    match.all.sync.b32 %r5|%p5, %r1, -1;
    mov.b64 %d1, {%r1, %r1}; match.any.sync.b64 %r6, %d1, -1;
    selp.b32 %r7, 1, 0, %p2; selp.b32 %r8, 2, 0, %p3; selp.b32 %r9, 4, 0, %p4;
    selp.b32 %r10, 8, 0, %p5;
    add.u32 %r7, %r7, %r8; add.u32 %r7, %r7, %r9; add.u32 %r7, %r7, %r10;
    """
    bits = 1 << np.arange(32, dtype=np.uint64)
    for values in (x, np.zeros_like(x), np.ones_like(x)):
        zero = values == 0
        ballot = int(bits[zero].sum())
        same = np.array([bits[values == v].sum() for v in values]).astype(np.uint32)
        uniform = np.all(values == values[0])
        flags = zero.any() + 2 * zero.all() + 4 * (zero.all() or not zero.any()) + 8 * uniform
        for register, expected in {
            2: ballot, 3: ballot ^ 0xFFFFFFFF, 4: same, 5: 0xFFFFFFFF if uniform else 0, 6: same,
            7: flags,
        }.items():  # fmt: skip
            got = lanes(f"{body} mov.b32 %r0, %r{register};", values)
            assert np.array_equal(got, np.broadcast_to(np.uint32(expected), 32)), register


def test_elect() -> None:
    body = "elect.sync %r2|%p1, -1; selp.b32 %r3, 100, 0, %p1; add.u32 %r0, %r2, %r3;"
    assert lanes(body).tolist() == [100] + [0] * 31
    body = """
    setp.lt.u32 %p2, %r1, 8; @%p2 bra END; elect.sync _|%p1, 0xffffff00;
    selp.b32 %r0, 1, 0, %p1; bra ON; END: mov.b32 %r0, 5; ON:
    """
    assert lanes(body, np.arange(32, dtype=np.uint32)).tolist() == [5] * 8 + [1] + [0] * 23


REDUCTIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "add.u32": lambda x: x.sum(dtype=np.uint32),
    "add.s32": lambda x: x.view(np.int32).sum(dtype=np.int32).view(np.uint32),
    "min.u32": np.min,
    "max.u32": np.max,
    "min.s32": lambda x: x.view(np.int32).min().view(np.uint32),
    "max.s32": lambda x: x.view(np.int32).max().view(np.uint32),
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
    "min.f32": lambda x: np.fmin.reduce(x.view(np.float32)).view(np.uint32),
    "max.f32": lambda x: np.fmax.reduce(x.view(np.float32)).view(np.uint32),
    "max.abs.f32": lambda x: np.fmax.reduce(np.abs(x.view(np.float32))).view(np.uint32),
    "min.abs.NaN.f32": lambda x: np.minimum.reduce(np.abs(x.view(np.float32))).view(np.uint32),
    "max.NaN.f32": lambda x: np.maximum.reduce(x.view(np.float32)).view(np.uint32),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_redux(operation: str, rng: np.random.Generator) -> None:
    draws = [words(rng), words(rng) | 0xFFFF0000]
    if "f32" in operation:
        normal = rng.standard_normal(32).astype(np.float32)
        edges = np.array([np.inf, -np.inf, 0.0, 1e-42, -1e-42, 3e38], np.float32)
        with_nan = normal.copy()
        with_nan[rng.integers(0, 32, 3)] = np.nan
        draws = [normal, np.tile(edges, 6)[:32], with_nan, np.full(32, np.nan, np.float32)]
    for x in draws:
        got = lanes(f"redux.sync.{operation} %r0, %r1, -1;", x.view(np.uint32))
        expected = np.uint32(REDUCTIONS[operation](x))
        if "f32" in operation and np.isnan(expected.view(np.float32)):
            expected = np.uint32(0x7FFFFFFF)  # the canonical NaN
        assert np.all(got == expected)


def test_redux_of_signed_zeros() -> None:
    zeros = np.where(np.arange(32) % 2, 0x80000000, 0).astype(np.uint32)
    assert np.all(lanes("redux.sync.max.f32 %r0, %r1, -1;", zeros) == 0)
    assert np.all(lanes("redux.sync.min.f32 %r0, %r1, -1;", zeros) == 0x80000000)


def test_groups_with_their_own_masks(rng: np.random.Generator) -> None:
    """Lanes name different members at the same instruction."""
    x = words(rng)
    member = np.where(np.arange(32) < 12, 0xFFF, 0xFFFFF000).astype(np.uint32)
    got = lanes("redux.sync.add.u32 %r0, %r1, %r2;", x, member)
    sums = x[:12].sum(dtype=np.uint32), x[12:].sum(dtype=np.uint32)
    assert np.array_equal(got, np.where(np.arange(32) < 12, *sums))


def test_members_that_come_later() -> None:
    """Lanes that took a branch are waited for at a collective with a full mask."""
    body = """
    mov.u32 %r1, %laneid; setp.ge.u32 %p1, %r1, 4; mov.b32 %r2, 1;
    @%p1 bra MEET;
    BACK: mov.b32 %r2, 2;
    bra MEET2;
    MEET: mov.b32 %r3, 0;
    MEET2: redux.sync.add.u32 %r0, %r2, -1;
    """
    assert lanes(body).tolist() == [36] * 32


def test_members_that_never_come() -> None:
    body = """
    mov.u32 %r1, %laneid; setp.ge.u32 %p1, %r1, 4;
    @%p1 bra ELSE;
    shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; bra END;
    ELSE: shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
    END: ret;
    """
    result = finds("divergence", kernel(body), np.zeros(1, np.uint32))
    assert "0000000f" in result.findings[0].text
    assert "fffffff0" in result.findings[0].text


def test_lane_outside_of_its_member_mask() -> None:
    finds("divergence", kernel("elect.sync _|%p1, 0xff;"), np.zeros(1, np.uint32))


def test_warp_barrier_at_two_places() -> None:
    """bar.warp.sync lets lanes meet that come to it from different instructions."""
    body = """
    mov.u32 %r1, %laneid; setp.ge.u32 %p1, %r1, 4; mov.b32 %r0, 1;
    @%p1 bra ELSE;
    bar.warp.sync -1; add.u32 %r0, %r0, 1; bra END;
    ELSE: bar.warp.sync 0xffffffff; add.u32 %r0, %r0, 2;
    END: nanosleep.u32 1;
    """
    assert lanes(body).tolist() == [2] * 4 + [3] * 28


# ---------------------------------------------------------------- scheduling


ORDER = """
    ld.param.u64 %d1, [out];
    mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; mov.b32 %r9, 0;
    LOOP: atom.global.add.u32 %r3, [%d1], 1;
    mul.wide.u32 %d2, %r3, 4; add.s64 %d2, %d2, %d1; st.global.u32 [%d2+4], %r1;
    add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 10; @%p1 bra LOOP;
"""


def order(policy: Policy) -> tuple[int, ...]:
    out = np.zeros(1 + 10 * 128, np.uint32)
    run_ptx(kernel(ORDER), out, block=(128, 1, 1), policy=policy)
    assert sorted(out[1:].tolist()) == sorted(list(range(128)) * 10)
    return tuple(out.tolist())


def test_schedules_follow_their_seed() -> None:
    first = order(Policy("random", seed=1, slice=4))
    assert first == order(Policy("random", seed=1, slice=4))
    assert first != order(Policy("random", seed=2, slice=4))
    assert order(Policy("eager", slice=4)) == order(Policy("eager", slice=4, seed=9))
    assert order(Policy("eager", slice=1)) != order(Policy("eager", slice=1000))


MBARRIER = ".shared .align 8 .b64 bar;\n"


def test_deadlock_table() -> None:
    body = """
    .reg .pred P1;
    mov.b32 %r9, bar;
    mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 3;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 512;
    setp.ge.u32 %p1, %r1, 64; @%p1 bra OTHER;
    WAIT: mbarrier.try_wait.parity.shared.b64 P1, [bar], 0;
    @P1 bra DONE; bra WAIT; DONE: ret;
    OTHER: setp.ge.u32 %p1, %r1, 96; @%p1 exit; bar.sync 3, 64;
    """
    for mode in ("eager", "lazy", "random"):
        source = kernel(body, before=MBARRIER)
        result = finds(
            "deadlock", source, np.zeros(1, np.uint32), block=(128, 1, 1), policy=Policy(mode)
        )
        table = result.deadlock.splitlines()
        assert len(table) == 3, result.deadlock
        for line in table[:2]:
            assert "mbarrier at shared+1024, parity 0: 0 phases" in line
            assert "2 of 3 arrivals and 512 bytes" in line
        assert "barrier 3: 32 of 64 threads arrived" in table[2]
        assert "1 have exited" in result.findings[-1].text
        result.report()


def test_lanes_overtake_as_a_last_resort() -> None:
    """Lane 0 waits for what lanes behind it in the program do."""
    body = """
    .reg .pred P1;
    mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; mov.b32 %r0, 1;
    @!%p1 mbarrier.init.shared.b64 [bar], 31;
    bar.warp.sync -1;
    @%p1 bra ELSE;
    WAIT: mbarrier.try_wait.parity.shared.b64 P1, [bar], 0;
    @P1 bra END; bra WAIT;
    ELSE: mbarrier.arrive.shared.b64 _, [bar]; mov.b32 %r0, 2;
    END: nanosleep.u32 1;
    """
    for mode in ("eager", "lazy", "random"):
        out = np.zeros(32, np.uint32)
        source = kernel(body + STORE, before=MBARRIER)
        run_ptx(source, out, policy=Policy(mode))
        assert out.tolist() == [1] + [2] * 31


def test_waiting_between_warps() -> None:
    """A ring of mbarriers through four warps, many times round, under every policy."""
    body = """
    .reg .pred P1;
    mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 5; mov.b32 %r10, bars; mov.b32 %r0, 0;
    setp.eq.u32 %p1, %r1, 0; @!%p1 bra READY;
    st.shared.u32 [count], %r0;
    mbarrier.init.shared.b64 [%r10], 32; mbarrier.init.shared.b64 [%r10+8], 32;
    mbarrier.init.shared.b64 [%r10+16], 32; mbarrier.init.shared.b64 [%r10+24], 32;
    READY: bar.sync 0;
    mov.u32 %r11, %laneid; setp.eq.u32 %p4, %r11, 0;
    shl.b32 %r3, %r2, 3; add.u32 %r3, %r3, %r10;
    add.u32 %r4, %r2, 1; and.b32 %r4, %r4, 3; shl.b32 %r4, %r4, 3; add.u32 %r4, %r4, %r10;
    mov.b32 %r5, 0; setp.ne.u32 %p2, %r2, 0;
    LOOP: and.b32 %r6, %r5, 1; xor.b32 %r7, %r6, 1; selp.b32 %r6, %r6, %r7, %p2;
    WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r3], %r6; @P1 bra GO; bra WAIT;
    GO: ld.shared.u32 %r8, [count]; add.u32 %r0, %r8, 1; bar.warp.sync -1;
    @%p4 st.shared.u32 [count], %r0; bar.warp.sync -1;
    mbarrier.arrive.shared.b64 _, [%r4];
    add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 20; @%p3 bra LOOP;
    """
    before = ".shared .align 8 .b64 bars[4];\n.shared .align 4 .b32 count;\n"
    for policy in (
        Policy(),
        Policy(slice=1),
        Policy("lazy"),
        Policy("random", 1, slice=7),
        Policy("random", 2, slice=3),
    ):
        out = np.zeros(128, np.uint32)
        run_ptx(kernel(body + STORE, before=before), out, block=(128, 1, 1), policy=policy)
        assert out.tolist() == np.repeat([77, 78, 79, 80], 32).tolist()


def test_setmaxnreg_waits_for_registers() -> None:
    body = """
    mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 128; @%p1 bra GIVE;
    setmaxnreg.inc.sync.aligned.u32 {more}; bra END;
    GIVE: setmaxnreg.dec.sync.aligned.u32 56;
    END: bar.sync 0; mov.u32 %r0, %tid.x;
    """
    source = kernel(body + STORE).replace("u64 out)", "u64 out)\n.maxnreg 128")
    out = np.zeros(256, np.uint32)
    run_ptx(source.replace("{more}", "200"), out, block=(256, 1, 1))
    assert np.array_equal(out, np.arange(256))
    result = finds("deadlock", source.replace("{more}", "208"), out, block=(256, 1, 1))
    assert "registers that other warps have to give back" in result.deadlock


def test_endless_loop_stops() -> None:
    result = finds(
        "other", kernel("L: bra L;"), np.zeros(1, np.uint32), policy=Policy(max_steps=100_000)
    )
    assert "stopped after" in result.findings[0].text


def test_progress_can_stop_a_launch() -> None:
    calls: list[tuple[int, int, int]] = []

    def tick(steps: int, done: int, ctas: int) -> bool:
        calls.append((steps, done, ctas))
        return len(calls) == 2

    run_ptx(kernel("L: bra L;"), np.zeros(1, np.uint32), grid=(3, 1, 1), tick=tick)
    assert [call[1:] for call in calls] == [(0, 3), (0, 3)]

    def interrupted(steps: int, done: int, ctas: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ptx(kernel("L: bra L;"), np.zeros(1, np.uint32), tick=interrupted)


def test_trap() -> None:
    body = "mov.u32 %r1, %laneid; setp.eq.u32 %p1, %r1, 9; @%p1 trap;"
    assert "00000200" in finds("other", kernel(body), np.zeros(1, np.uint32)).findings[0].text


# ---------------------------------------------------------------- the end of a CTA


def test_tensor_memory_left_allocated() -> None:
    body = """
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [place], 64;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    """
    source = kernel(body, before=".shared .align 4 .b32 place;")
    result = finds("tmem", source, np.zeros(1, np.uint32))
    assert "exits with 64 TMEM columns" in result.report()


BULK = """
    .reg .pred P1;
    mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; @!%p1 exit;
    ld.param.u64 %d1, [out]; mov.b32 %r2, bar; mov.b32 %r3, tile;
    mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d1], 128, [%r2];
    {wait}
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r2], 0; @P1 bra END; bra WAIT; END: ret;"
TILE = ".shared .align 8 .b64 bar;\n.shared .align 128 .b8 tile[128];\n"


def test_exit_with_a_copy_in_flight() -> None:
    memory = np.zeros(32, np.uint32)
    waits = kernel(BULK.format(bytes=128, wait=WAIT), before=TILE)
    leaves = kernel(BULK.format(bytes=128, wait=""), before=TILE)
    for mode in ("eager", "lazy"):
        run_ptx(waits, memory, policy=Policy(mode))
    result = finds("other", leaves, memory, policy=Policy("lazy"))
    assert "exited while this TMA load is in flight" in result.report()


def test_wrong_byte_counts() -> None:
    memory = np.zeros(32, np.uint32)
    for mode in ("eager", "lazy"):
        more = kernel(BULK.format(bytes=144, wait=WAIT), before=TILE)
        result = finds("deadlock", more, memory, policy=Policy(mode))
        assert "missing 0 of 1 arrivals and 16 bytes" in result.deadlock
    less = kernel(BULK.format(bytes=64, wait=""), before=TILE)
    assert "64 bytes more than expected" in finds("transaction", less, memory).report()


# ---------------------------------------------------------------- memory bounds, arguments


@pytest.mark.parametrize("offset", [128, -4, 1 << 40])
def test_bounds(offset: int) -> None:
    memory = np.zeros(64, np.uint32)
    out = memory[16:48]
    body = f"ld.param.u64 %d1, [out]; mov.b32 %r1, 7; st.global.u32 [%d1+{offset}], %r1;"
    finding = finds("bounds", kernel(body), out, block=(1, 1, 1)).findings[0]
    assert finding.fatal
    assert "st.global.u32 [%d1+" in finding.where
    if offset < 1000:
        assert f"offset {offset} of argument 0, which has 128 bytes" in finding.text
    assert not memory.any()


def test_read_only_memory() -> None:
    out = np.zeros(4, np.uint32)
    out.flags.writeable = False
    assert "read only" in finds("bounds", kernel(STORE.replace("%r0", "%r50")), out,
                                block=(4, 1, 1)).findings[0].text  # fmt: skip


def test_regions_merge() -> None:
    regions = [Region(100, 10, "b"), Region(0, 10, "a"), Region(105, 20, "c", False)]
    assert merge_regions(regions) == [Region(0, 10, "a"), Region(100, 25, "b / c")]


def test_arguments() -> None:
    parameters = ".param .u64 a, .param .align 16 .b8 s[24], .param .f32 f, .param .s16 h"
    program = load(kernel("ret;", parameters))
    array = np.zeros(3, np.float64)
    data, regions = pack_arguments(program, (array, bytes(range(24)), 1.5, -2))
    expected = bytearray(46)
    expected[:8] = array.ctypes.data.to_bytes(8, "little")
    expected[16:40] = bytes(range(24))
    expected[40:44] = np.float32(1.5).tobytes()
    expected[44:46] = b"\xfe\xff"
    assert data == bytes(expected)
    assert regions == [Region(array.ctypes.data, 24, "argument 0")]
    for wrong in ((array,), (array, b"", 1.5, 0), (array, 3, 1.5, 0)):
        with pytest.raises(ValueError, match=r"arguments|bytes"):
            pack_arguments(program, wrong)


def test_several_launches_share_memory() -> None:
    memory = np.zeros(32, np.uint32)
    source = kernel(
        "ld.param.u64 %d1, [out]; mov.u32 %r1, %tid.x; mul.wide.u32 %d2, %r1, 4;"
        "add.s64 %d1, %d1, %d2; ld.global.u32 %r2, [%d1]; ld.param.u32 %r3, [n];"
        "add.u32 %r2, %r2, %r3; st.global.u32 [%d1], %r2;",
        ".param .u64 out, .param .u32 n",
    )
    program = load(source)
    machine = Machine([Region(memory.ctypes.data, memory.nbytes, "counts")], Policy("lazy"))
    for n in (3, 4):
        params = memory.ctypes.data.to_bytes(8, "little") + n.to_bytes(4, "little")
        machine.launch(program, params, (1, 1, 1), (32, 1, 1)).check()
    assert np.all(memory == 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "multiple of the cluster"),
        ({"block": (1025, 1, 1)}, "at most 1024"),
        ({"block": (64, 1, 1)}, "requires"),
        ({"dynamic_shared": 228 << 10}, "227 KiB"),
        ({"grid": (0, 1, 1)}, "positive"),
    ],
)
def test_launches_that_the_driver_refuses(options: dict[str, Any], message: str) -> None:
    source = kernel("ret;")
    if message == "requires":
        source = source.replace("u64 out)", "u64 out)\n.reqntid 32, 1, 1")
    with pytest.raises(ValueError, match=message):
        run_ptx(source, np.zeros(1, np.uint32), **options)


def test_python_lines() -> None:
    source = kernel(".loc 1 42 5\n trap;") + '\n.file 1 "/src/kernel.py"\n'
    finding = finds("other", source, np.zeros(1, np.uint32)).findings[0]
    assert finding.python == ("/src/kernel.py", 42)
    assert "/src/kernel.py:42" in str(finding)


# ---------------------------------------------------------------- build


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    build.compiler.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match="install gcc or clang"):
        build.compiler()
    build.compiler.cache_clear()


def test_library_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CUTE_FMHA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "three.c"
    source.write_text("int three(void) { return 3; }\n")
    first = build.build_library("three", [source])
    stamp = first.stat().st_mtime_ns
    assert build.build_library("three", [source]) == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text("int three(void) { return 4; }\n")
    assert build.build_library("three", [source]) != first
    source.write_text("int three(void) { return }\n")
    with pytest.raises(build.BuildError, match=r"three\.c"):
        build.build_library("three", [source])
    assert not list((tmp_path / "cache").rglob(".*"))
