"""Loads, stores, generic addresses, matrices and atomics."""

from __future__ import annotations

import numpy as np

from silicon.model import Buffer, Case, entry, generator, output, random_bytes, source
from silicon.tensors import numbers

GROUP = "memory"
TYPES = ("u8", "s8", "u16", "s16", "u32", "s32")
VECTORS = [("b8", 1), ("b8", 2), ("b8", 4), ("b16", 1), ("b16", 2), ("b16", 4), ("b32", 1)]
VECTORS += [("b32", 2), ("b32", 4), ("b64", 1), ("b64", 2), ("b128", 1)]


def _extending() -> list[Case]:
    name = "loads_extend"
    body = "mad.wide.u32 %d0, %t, 4, %a0; mad.wide.u32 %d1, %t, 120, %a1;"
    body += "mad.lo.u32 %r9, %t, 4, %room; ld.global.b32 %r1, [%d0]; st.shared.b32 [%r9], %r1;"
    for i, kind in enumerate(TYPES):
        body += f"""
    ld.global.{kind} %d2, [%d0]; ld.shared.{kind} %r2, [%r9]; ld.global.{kind} %r3, [%d0];
    st.global.b64 [%d1+{16 * i}], %d2; st.global.b32 [%d1+{16 * i + 8}], %r2;
    st.global.b32 [%d1+{16 * i + 12}], %r3;"""
    body += """
    ld.global.u8 %h1, [%d0+1]; ld.global.s8 %h2, [%d0+1]; ld.global.s16 %h3, [%d0+2];
    st.global.b16 [%d1+96], %h1; st.global.b16 [%d1+98], %h2; st.global.b16 [%d1+100], %h3;
    st.global.b8 [%d1+102], %r1; st.global.u16 [%d1+104], %r1; st.global.b32 [%d1+108], %d2;
    st.shared.u8 [%r9+1], %r3; ld.shared.b32 %r4, [%r9]; st.global.b32 [%d1+112], %r4;
    """
    data = source(random_bytes(name, 128))
    text = entry(name, body, 2, room=1024)
    return [Case(name, name, text, (data, output((32, 120), np.uint8)))]


def _vectors() -> list[Case]:
    name = "vectors"
    body, offset = "mad.wide.u32 %d20, %t, 16, 0;", 0
    for width, count in VECTORS:
        size = int(width[1:]) // 8
        total = size * count
        register = {1: "h", 2: "h", 4: "r", 8: "d", 16: "q"}[size]
        names = [f"%{register}{i + (1 if size == 16 else 30)}" for i in range(count)]
        operand = names[0] if count == 1 else "{" + ", ".join(names) + "}"
        v = f".v{count}" if count > 1 else ""
        body += f"""
    mul.lo.u32 %r0, %t, {total}; xor.b32 %r1, %r0, {3 * total};
    mad.wide.u32 %d0, %r0, 1, %a0; mad.wide.u32 %d1, %r1, 1, %a1;
    add.u32 %r2, %room, %r0; add.u32 %r3, %room, %r1;
    ld.global{v}.{width} {operand}, [%d0+{offset}];
    st.shared{v}.{width} [%r3], {operand};
    bar.warp.sync -1;
    ld.shared{v}.{width} {operand}, [%r2];
    st.global{v}.{width} [%d1+{offset}], {operand};
    bar.warp.sync -1;"""
        offset += 32 * total
    data = source(random_bytes(name, offset))
    text = entry(name, body, 2, room=1024)
    cases = [Case(name, name, text, (data, output(offset, np.uint8)))]
    name = "some_lanes_and_sinks"
    body = """
    mad.wide.u32 %d0, %t, 16, %a0; mad.wide.u32 %d1, %t, 16, %a1;
    and.b32 %r0, %t, 5; setp.eq.u32 %p1, %r0, 4; mov.u32 %r1, 7; mov.u32 %r2, 8;
    @%p1 ld.global.nc.v4.b32 {_, %r1, _, %r2}, [%d0];
    st.global.v2.b32 [%d1], {%r1, %r2};
    @!%p1 st.global.cs.v2.b32 [%d1+8], {%r2, %t};
    """
    data = source(random_bytes(name, 512))
    cases.append(Case(name, name, entry(name, body, 2), (data, output((32, 4)))))
    return cases


LOADS = ["ld.global.ca", "ld.global.cg", "ld.global.cs", "ld.global.lu", "ld.global.nc"]
LOADS += ["ld.volatile.global", "ld.relaxed.cta.global", "ld.relaxed.gpu.global", "ld.weak.global"]
LOADS += ["ld.acquire.sys.global", "ld.acquire.cluster.global", "ld.global.nc.L1::no_allocate"]
LOADS += ["ld.global.L1::evict_last.L2::128B", "ld.global.L2::256B"]
STORES = ["st.global.wb", "st.global.cg", "st.global.cs", "st.global.wt", "st.volatile.global"]
STORES += ["st.relaxed.gpu.global", "st.release.sys.global", "st.global.L1::no_allocate"]


def _modifiers() -> list[Case]:
    name = "cache_modifiers"
    body = "mad.wide.u32 %d0, %t, 4, %a0; mad.wide.u32 %d1, %t, 4, %a1;"
    body += "createpolicy.fractional.L2::evict_last.b64 %d5, 0f3F000000;"
    for i, load in enumerate(LOADS):
        store = STORES[i % len(STORES)]
        body += f"{load}.b32 %r1, [%d0+{128 * i}]; {store}.b32 [%d1+{128 * i}], %r1;\n"
    body += f"""
    ld.global.L2::cache_hint.b32 %r1, [%d0], %d5;
    st.global.L2::cache_hint.b32 [%d1+{128 * len(LOADS)}], %r1, %d5;
    prefetch.global.L2 [%d1]; prefetchu.L1 [%d0];
    """
    data = source(random_bytes(name, 128 * len(LOADS)).view(np.uint32))
    out = output((len(LOADS) + 1, 32))
    return [Case(name, name, entry(name, body, 2), (data, out))]


def _spaces() -> list[Case]:
    name = "generic_addresses"
    body = f"""
    mad.wide.u32 %d3, %t, 4, %a0; mad.wide.u32 %d4, %t, 40, %a1;
    mov.u64 %d5, {name}_room; cvta.shared.u64 %d5, %d5; mad.wide.u32 %d5, %t, 4, %d5;
    ld.b32 %r1, [%d3]; st.b32 [%d5], %r1;
    cvta.to.shared.u64 %d6, %d5; ld.shared.b32 %r2, [%d6]; st.b32 [%d4], %r2;
    mov.u64 %d7, own; st.local.b32 [%d7+4], %t; cvta.local.u64 %d8, %d7;
    ld.b32 %r3, [%d8+4]; st.b32 [%d4+4], %r3;
    st.b32 [%d8+8], %r1; ld.local.b32 %r4, [own+8]; st.b32 [%d4+8], %r4;
    isspacep.shared %p1, %d5; isspacep.global %p2, %d3; isspacep.local %p3, %d8;
    isspacep.shared %p4, %d8; isspacep.shared::cluster %p5, %d5; isspacep.global %p6, %d5;
    isspacep.shared %p7, %d3;
    mov.u64 %d11, {name}_table; cvta.const.u64 %d11, %d11;
    selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 2, 0, %p2; or.b32 %r5, %r5, %r6;
    selp.u32 %r6, 4, 0, %p3; or.b32 %r5, %r5, %r6; selp.u32 %r6, 8, 0, %p4; or.b32 %r5, %r5, %r6;
    selp.u32 %r6, 16, 0, %p5; or.b32 %r5, %r5, %r6; selp.u32 %r6, 32, 0, %p6; or.b32 %r5, %r5, %r6;
    selp.u32 %r6, 64, 0, %p7; or.b32 %r5, %r5, %r6;
    st.b32 [%d4+12], %r5;
    mad.wide.u32 %d11, %t, 4, %d11; ld.b32 %r7, [%d11]; st.b32 [%d4+16], %r7;
    mov.u64 %d12, {name}_table; mad.wide.u32 %d12, %t, 4, %d12; ld.const.b32 %r8, [%d12];
    st.b32 [%d4+20], %r8;
    mov.u64 %d13, {name}_variable; mad.wide.u32 %d13, %t, 4, %d13; ld.global.b32 %r9, [%d13];
    st.b32 [%d4+24], %r9;
    ld.param.u8 %r10, [{name}_w+1]; ld.param.v2.b32 {{%r11, %r12}}, [{name}_w+8];
    st.b32 [%d4+28], %r10; xor.b32 %r11, %r11, %r12; st.b32 [%d4+32], %r11;
    mov.u64 %d14, {name}_w; cvta.param.u64 %d14, %d14; ld.b32 %r13, [%d14+4];
    st.b32 [%d4+36], %r13;
    """
    values = ", ".join(str(7 * i * i) for i in range(32))
    before = f".const .align 4 .b32 {name}_table[32] = {{{values}}};\n"
    before += f".global .align 4 .u32 {name}_variable[32] = {{{values}}};"
    text = entry(
        name, body, 2, words=4, room=1024, declarations=".local .align 16 .b8 own[64];",
        before=before,
    )  # fmt: skip
    text = text.replace(f".param .align 4 .b8 {name}_w", f".param .align 16 .b8 {name}_w")
    data = source(random_bytes(name, 128).view(np.uint32))
    words = random_bytes(name + " words", 16).tobytes()
    return [Case(name, name, text, (data, output((32, 10)), words))]


def _dynamic() -> list[Case]:
    """More shared memory than a kernel may declare; and what has no effect on results."""
    name, size = "dynamic_shared", 100_000
    body = f"""
    mov.u32 %r0, {name}_all; mov.u32 %r1, %dynamic_smem_size; mad.lo.u32 %r2, %t, 4, %r0;
    nanosleep.u32 20; membar.gl; fence.acq_rel.gpu; fence.sc.cta; fence.proxy.async;
    griddepcontrol.wait; griddepcontrol.launch_dependents;
    add.u32 %r3, %r2, {size - 512}; mad.lo.u32 %r4, %t, 77, 5;
    st.shared.b32 [%r3], %r4; st.shared.b32 [%r2+4096], %r1;
    bar.sync 0;
    xor.b32 %r5, %t, 127; mad.lo.u32 %r5, %r5, 4, %r0; add.u32 %r6, %r5, {size - 512};
    ld.shared.b32 %r7, [%r6]; ld.shared.b32 %r8, [%r5+4096];
    mad.wide.u32 %d0, %t, 8, %a0; st.global.v2.b32 [%d0], {{%r7, %r8}};
    """
    before = f".extern .shared .align 16 .b8 {name}_all[];"
    text = entry(name, body, 1, before=before)
    return [Case(name, name, text, (output((128, 2)),), block=(128, 1, 1), shared=size)]


def _matrices() -> list[Case]:
    cases = []
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            name = f"matrix_x{count}{trans.replace('.', '_')}"
            names = [f"%r{10 + i}" for i in range(count)]
            operand = "{" + ", ".join(names) + "}"
            copy = "".join(f"st.global.b32 [%d3+{4 * i}], {n};" for i, n in enumerate(names))
            fill = "".join(
                f"ld.global.b32 %r4, [%d0+{128 * i}]; st.shared.b32 [%r1+{128 * i}], %r4;"
                for i in range(4)
            )
            drain = "".join(
                f"ld.shared.b32 %r4, [%r1+{128 * i}]; st.global.b32 [%d4+{128 * i}], %r4;"
                for i in range(4)
            )
            body = f"""
    mad.wide.u32 %d0, %t, 4, %a0; mad.lo.u32 %r1, %t, 4, %room; mad.wide.u32 %d4, %t, 4, %a3;
    {fill}
    bar.warp.sync -1;
    mad.wide.u32 %d1, %t, 4, %a1; ld.global.b32 %r2, [%d1];
    add.u32 %r3, %room, %r2;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {operand}, [%r3];
    mad.wide.u32 %d3, %t, {4 * count}, %a2;
    {copy}
    bar.warp.sync -1;
    xor.b32 %r3, %r2, 64; add.u32 %r3, %room, %r3;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3], {operand};
    bar.warp.sync -1;
    {drain}
    """
            image = source(random_bytes(name, 512))
            place = source(generator(name).permutation(32).astype(np.uint32) * 16)
            text = entry(name, body, 4, room=1024)
            results = (output((32, count)), output(128))
            cases.append(Case(name, name, text, (image, place, *results)))
    name = "movmatrix"
    body = """
    mad.wide.u32 %d0, %t, 4, %a0; mad.wide.u32 %d1, %t, 4, %a1; ld.global.b32 %r1, [%d0];
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.b32 [%d1], %r2;
    """
    data = source(random_bytes(name, 128).view(np.uint32))
    cases.append(Case(name, name, entry(name, body, 2), (data, output(32))))
    return cases


# ---------------------------------------------------------------- atomics

INTEGER = [f"{op}.{kind}" for kind in ("u32", "u64", "s32") for op in ("add", "min", "max")]
INTEGER += [f"{op}.s64" for op in ("min", "max")]
INTEGER += [f"{op}.{kind}" for kind in ("b32", "b64") for op in ("and", "or", "xor", "exch", "cas")]
INTEGER += ["inc.u32", "dec.u32", "exch.b128", "cas.b128", "cas.b16"]
#: Instruction, its vector if any, and the kind of the elements.
FLOAT = [
    ("add.f32", "", "f32"), ("add.f64", "", "f64"), ("add.noftz.f16", "", "f16"),
    ("add.noftz.bf16", "", "bf16"), ("add.noftz.f16x2", "", "f16x2"),
    ("add.noftz.bf16x2", "", "bf16x2"),
]  # fmt: skip
FLOAT_VECTORS = [("add", f"v{n}", "f32") for n in (2, 4)]
FLOAT_VECTORS += [
    (f"{op}.noftz", f"v{n}", kind)
    for op in ("add", "min", "max")
    for kind, n in (("f16", 2), ("f16", 8), ("bf16", 4), ("f16x2", 2), ("bf16x2", 4))
]


def _bytes(kind: str) -> int:
    packed = 2 if kind.endswith("x2") else 1
    return packed * int("".join(ch for ch in kind.removesuffix("x2") if ch.isdigit())) // 8


def _atomic(name: str, instruction: str, kind: str, count: int, how: str, data: np.ndarray) -> Case:
    """Every lane on its own memory: (old value, source, compared value) from three arrays."""
    size = _bytes(kind)
    total = size * count
    letter = {2: "h", 4: "r", 8: "d", 16: "q"}[size]
    sets = [
        [f"%{letter}{base + i}" for i in range(count)]
        for base in ((1, 2, 3) if size == 16 else (10, 20, 30))
    ]
    old, value, compared = (s[0] if count == 1 else "{" + ", ".join(s) + "}" for s in sets)
    v = f".v{count}" if count > 1 else ""
    load_v, bits, loads = v, 8 * size, sets
    if count == 8:  # loads of eight halves are loads of four words
        load_v, bits = ".v4", 32
        loads = [[f"%r{base + i}" for i in range(4)] for base in (10, 20, 30)]
    vectors = [s[0] if len(s) == 1 else "{" + ", ".join(s) + "}" for s in loads]
    split, join = "", ""
    if count == 8:
        split = "".join(
            f"mov.b32 {{%h{20 + 2 * i}, %h{21 + 2 * i}}}, %r{20 + i};" for i in range(4)
        )
        join = "".join(f"mov.b32 %r{10 + i}, {{%h{10 + 2 * i}, %h{11 + 2 * i}}};" for i in range(4))
    space = "shared" if "shared" in how else "global"
    at = "[%d5]" if space == "global" else "[%r5]"
    cas = instruction.startswith("cas")
    operands = f"{at}, {value}" if not cas else f"{at}, {compared}, {value}"
    if how.endswith("atom"):
        operands = f"{old}, {operands}"
    verb = "atom" if how.endswith("atom") else "red"
    first = f"ld.global{load_v}.b{bits} {vectors[1]}, [%d0];"
    body = f"""
    mad.wide.u32 %d0, %t, {total}, %a0; mad.wide.u32 %d5, %t, {total}, %a1;
    mad.wide.u32 %d6, %t, {total}, %a2; mad.lo.u32 %r5, %t, {total}, %room;
    {first if space == "shared" else ""}
    {f"ld.global{load_v}.b{bits} {vectors[0]}, [%d5];" if space == "shared" else ""}
    {f"st.shared{load_v}.b{bits} [%r5], {vectors[0]};" if space == "shared" else ""}
    {first}
    {f"ld.global{load_v}.b{bits} {vectors[2]}, [%d0+{32 * total}];" if cas else ""}
    {split}
    {verb}.relaxed.gpu.{space}.{instruction.replace("@", v)} {operands};
    {join if verb == "atom" else ""}
    {f"st.global{load_v}.b{bits} [%d6], {vectors[0]};" if verb == "atom" else ""}
    {f"ld.shared{load_v}.b{bits} {vectors[0]}, [%r5];" if space == "shared" else ""}
    {f"st.global{load_v}.b{bits} [%d5], {vectors[0]};" if space == "shared" else ""}
    """
    sources, targets = data[0], data[1].copy()
    extra = targets.copy()
    extra[: len(extra) // 2] ^= 1  # half of the compared values are there
    arguments = (source(np.stack([sources, extra])), Buffer(targets, output=True))
    results: tuple[Buffer, ...] = (output(len(sources), np.uint8),)
    return Case(name, name, entry(name, body, 3, room=1024), (*arguments, *results))


def _integer_atomics() -> list[Case]:
    cases = []
    for operation in INTEGER:
        op, kind = operation.split(".")
        for how in ("global_atom", "global_red", "shared_atom"):
            if (how == "global_red" and op in ("exch", "cas")) or (kind == "b128" and "red" in how):
                continue
            name = f"{how}_{op}_{kind}"
            size = 32 * _bytes(kind)
            data = random_bytes(name, 2 * size).reshape(2, size)
            if op in ("inc", "dec"):
                words = data.view(np.uint32)
                words[:] = generator(name).integers(0, 5, words.shape)
            cases.append(_atomic(name, operation, kind, 1, how, data))
    return cases


def _numbers(name: str, kind: str, count: int) -> np.ndarray:
    """Bytes of floats: ordinary, subnormal, infinite, NaN; sums that cancel."""
    rng = generator(name)
    x = numbers(rng, 2 * count, 6)
    base = kind.removesuffix("x2")
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0]
    for i, value in enumerate(special):
        x[i::23] = value
    tiny = {"f16": 2.0**-22, "bf16": 2.0**-130, "f32": 2.0**-130, "f64": 2.0**-1040}[base]
    x[5::7] = tiny * rng.integers(-9, 10, len(x[5::7]))
    x[count + 9 :: 17] = -x[9 : 9 + len(x[count + 9 :: 17]) * 17 : 17]
    with np.errstate(over="ignore"):
        if base == "bf16":
            bits: np.ndarray = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            bits = x.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[base])
    return bits.view(np.uint8).reshape(2, -1)


def _float_atomics() -> list[Case]:
    cases = []
    for operation, _, kind in FLOAT:
        for how in ("global_atom", "global_red", "shared_atom"):
            name = f"{how}_{operation.replace('.', '_')}"
            packed = 2 if kind.endswith("x2") else 1
            data = _numbers(name, kind, 32 * packed)
            cases.append(_atomic(name, operation, kind, 1, how, data))
    for operation, vector, kind in FLOAT_VECTORS:
        for how in ("global_atom", "global_red"):
            count = int(vector[1:])
            name = f"{how}_{operation.replace('.', '_')}_{vector}_{kind}"
            packed = 2 if kind.endswith("x2") else 1
            data = _numbers(name, kind, 32 * packed * count)
            op, _, rest = operation.partition(".")
            form = f"{vector}.{kind}.{op}" + (f".{rest}" if rest else "")
            cases.append(_atomic(name, form, kind, count, how, data))
    return cases


def _contended() -> list[Case]:
    """Many CTAs on few words: final values, and old values in any order."""
    name = "contended"
    body = """
    mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mad.lo.u32 %r0, %r0, %r1, %t;
    mad.wide.u32 %d0, %r0, 4, %a0; ld.global.b32 %r2, [%d0];
    and.b32 %r3, %r0, 7; mad.wide.u32 %d1, %r3, 4, %a1;
    red.global.add.u32 [%d1], %r2; red.global.max.s32 [%d1+32], %r2;
    red.relaxed.gpu.global.xor.b32 [%d1+64], %r2; red.global.min.u32 [%d1+96], %r2;
    cvt.rn.f32.u32 %f1, %r3; red.global.add.f32 [%d1+128], %f1;
    atom.global.add.u32 %r4, [%a1+160], 3; st.global.b32 [%d0], %r4;
    atom.global.inc.u32 %r5, [%a1+164], 100; mad.wide.u32 %d2, %r0, 4, %a2;
    st.global.b32 [%d2], %r5;
    atom.global.dec.u32 %r6, [%a1+168], 60; mad.wide.u32 %d3, %r0, 4, %a3;
    st.global.b32 [%d3], %r6;
    """
    words = random_bytes(name, 2048).view(np.uint32)
    memory = np.zeros(48, np.uint32)
    memory[24:32] = 0xFFFFFFFF
    memory[40:43] = (5, 90, 33)
    arguments = (
        Buffer(words, output=True, unordered=True),
        Buffer(memory, output=True),
        output(512, unordered=True),
        output(512, unordered=True),
    )
    return [Case(name, name, entry(name, body, 4), arguments, grid=(4, 1, 1), block=(128, 1, 1))]


def cases() -> list[Case]:
    found = [*_extending(), *_vectors(), *_modifiers(), *_spaces(), *_dynamic(), *_matrices()]
    found += [*_integer_atomics(), *_float_atomics(), *_contended()]
    return [Case(**{**case.__dict__, "group": GROUP}) for case in found]
