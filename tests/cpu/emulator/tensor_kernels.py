"""Kernels and NumPy models for the tests of tensor memory and tcgen05.mma (helper, not collected).

The kernels fill the allocated columns of every CTA from an array, copy an image of shared memory,
let one thread of the first CTA issue what a test wants, wait for its commit, and write all columns
back. The models of layouts are written row by row, from the figures of the PTX ISA and CUTLASS's
traits, and share nothing with the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cute_fmha.emulator.machine import Policy, Result, run_ptx

IMAGE = 2048  # where dynamic shared memory begins, after the static variables
COMMAND_WORDS = 16

_KERNEL = """
.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry kernel(.param .u64 image, .param .u64 image_bytes, .param .u64 before,
                       .param .u64 after, .param .u64 commands, .param .u64 n_commands)
.reqntid 128
{{
    .reg .b16 %h<8>; .reg .b32 %r<80>; .reg .b32 %v<128>; .reg .b64 %d<80>; .reg .pred %p<16>;
    .reg .b32 %m<8>;
    .shared .align 16 .b8 slot[16];
    .shared .align 8 .b8 bar[8];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %cluster_ctarank;
    ld.param.u64 %d0, [image];
    ld.param.u64 %d1, [image_bytes];
    ld.param.u64 %d2, [before];
    ld.param.u64 %d3, [after];
    ld.param.u64 %d4, [commands];
    ld.param.u64 %d5, [n_commands];
    mov.u32 %r2, slot;
    mov.u32 %r3, bar;
    setp.lt.u32 %p0, %r0, 32;
    setp.eq.u32 %p1, %r0, 0;
    setp.eq.u32 %p2, %r1, 0;
    and.pred %p2, %p1, %p2;
    @%p0 tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r2], {columns};
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    ld.shared.b32 %r4, [slot];
    and.b32 %r5, %r0, 0xe0;
    shl.b32 %r5, %r5, 16;
    add.u32 %r5, %r5, %r4;           // the warp's lanes
    mad.wide.u32 %d6, %r1, {cta_bytes}, %d2;
    mad.wide.u32 %d6, %r0, {lane_bytes}, %d6;
    mad.wide.u32 %d7, %r1, {cta_bytes}, %d3;
    mad.wide.u32 %d7, %r0, {lane_bytes}, %d7;
    {fill}
    tcgen05.wait::st.sync.aligned;
    mul.wide.u32 %d8, %r1, 1;
    mad.lo.u64 %d8, %d8, %d1, %d0;
    mul.wide.u32 %d9, %r0, 16;
    mov.u32 %r6, dynamic;
    mov.u32 %r7, 0;
    mov.b64 %d10, {{%r6, %r7}};
image_loop:
    setp.ge.u64 %p3, %d9, %d1;
    @%p3 bra image_done;
    add.u64 %d11, %d8, %d9;
    add.u64 %d12, %d10, %d9;
    mov.b64 {{%r7, %r8}}, %d12;
    ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%d11];
    st.shared.v4.b32 [%r7], {{%v0, %v1, %v2, %v3}};
    add.u64 %d9, %d9, 2048;
    bra image_loop;
image_done:
    fence.proxy.async.shared::cta;
    tcgen05.fence::before_thread_sync;
    {sync}
    tcgen05.fence::after_thread_sync;
    {body}
wait_loop:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3], 0;
    @!%p4 bra wait_loop;
    tcgen05.fence::after_thread_sync;
    {dump}
    tcgen05.fence::before_thread_sync;
    {sync}
    @%p0 tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r4, {columns};
    ret;
}}
"""

_ISSUE = """
    @!%p2 bra issued;
    mov.u64 %d20, 0;
    mov.u64 %d21, %d4;
issue_loop:
    setp.ge.u64 %p5, %d20, %d5;
    @%p5 bra issue_done;
    ld.global.v2.u64 {{%d22, %d23}}, [%d21];
    ld.global.v2.u64 {{%d24, %d25}}, [%d21+16];
    ld.global.v2.u64 {{%d26, %d27}}, [%d21+32];
    ld.global.v4.b32 {{%m0, %m1, %m2, %m3}}, [%d21+64];
    ld.global.v4.b32 {{%m4, %m5, %m6, %m7}}, [%d21+80];
    mov.b64 {{%r20, %r8}}, %d22;
    mov.b64 {{%r22, %r8}}, %d24;
    mov.b64 {{%r23, %r8}}, %d25;
    add.u32 %r20, %r20, %r4;
    add.u32 %r23, %r23, %r4;
    setp.ne.u64 %p6, %d26, 0;
    {instruction}
    add.u64 %d20, %d20, 1;
    add.u64 %d21, %d21, 128;
    bra issue_loop;
issue_done:
    {commit}
issued:
"""


def registers(n: int, prefix: str = "%v", start: int = 0) -> str:
    return "{" + ", ".join(f"{prefix}{start + i}" for i in range(n)) + "}"


def _columns(template: str, load: bool, columns: int) -> str:
    text = []
    for first in range(0, columns, 32):
        words = [
            f"{'st' if load else 'ld'}.global.v4.b32 "
            + (f"[%d7+{4 * (first + i)}], {registers(4, start=i)};" if load else "")
            + ("" if load else f"{registers(4, start=i)}, [%d6+{4 * (first + i)}];")
            for i in range(0, 32, 4)
        ]
        access = template.format(first=first, vector=registers(32))
        text += [access, *words] if load else [*words, access]
    return "\n    ".join(text)


WAIT_LD = "tcgen05.wait::ld.sync.aligned;"


def kernel(body: str, columns: int = 64, group: int = 1) -> str:
    sync = (
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        if group == 2
        else "bar.sync 0;"
    )
    fill = "tcgen05.st.sync.aligned.32x32b.x32.b32 [%r5 + {first}], {vector};"
    dump = "tcgen05.ld.sync.aligned.32x32b.x32.b32 {vector}, [%r5 + {first}]; " + WAIT_LD
    return _KERNEL.format(
        body=body,
        columns=columns,
        group=group,
        sync=sync,
        cta_bytes=128 * columns * 4,
        lane_bytes=columns * 4,
        fill=_columns(fill, False, columns),
        dump=_columns(dump, True, columns),
    )


COMMIT = {
    1: "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];",
    2: "mov.b16 %h0, 3; tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster"
    ".multicast::cluster.b64 [%r3], %h0;",
}


def issue(instruction: str, group: int = 1, commit: str | None = None) -> str:
    """One thread issues `instruction` for every command, then commits.

    %d22 and %r20: A; %d23: B; %r22: instruction descriptor; %r23: D; %p6: enable; %d27: extra word;
    %m0 .. %m7: disabled lanes.
    """
    return _ISSUE.format(
        instruction=instruction, commit=COMMIT[group] if commit is None else commit
    )


def command(
    a: int, b: int, idesc: int, d: int, enable: bool, extra: int = 0, mask=()
) -> np.ndarray:
    words = np.zeros(COMMAND_WORDS, np.uint64)
    words[:6] = [a, b, idesc, d, int(enable), extra]
    lanes = np.zeros(8, np.uint32)
    lanes[: len(mask)] = mask
    words[8:12] = lanes.view(np.uint64)
    return words


def run(
    source: str,
    image: np.ndarray,
    before: np.ndarray,
    commands: list[np.ndarray] | np.ndarray,
    group: int = 1,
    policy: Policy | None = None,
    check: bool = True,
) -> tuple[np.ndarray, Result]:
    """image: [ctas, bytes]; before: [ctas, 128, columns] cells. Returns the cells afterwards."""
    after = np.zeros_like(before)
    image = np.ascontiguousarray(image, np.uint8)
    assert image.shape[1] % 16 == 0
    table = np.zeros((1, COMMAND_WORDS), np.uint64)
    if isinstance(commands, np.ndarray):
        table = commands
    elif commands:
        table = np.stack(commands)
    result = run_ptx(
        source,
        image,
        image.shape[1],
        before,
        after,
        table,
        len(commands),
        grid=(group, 1, 1),
        block=(128, 1, 1),
        cluster=(group, 1, 1),
        dynamic_shared=image.shape[1],
        policy=policy,
        check=check,
    )
    return after, result


# ---------------------------------------------------------------- descriptors and shared layouts

SWIZZLES = {16: 0, 32: 6, 64: 4, 128: 2}  # width in bytes -> layout field


def smem_descriptor(start: int, leading: int, stride: int, width: int, base: int = 0) -> int:
    assert start % 16 == leading % 16 == stride % 16 == 0
    return (
        (start >> 4)
        | (leading >> 4) << 16
        | (stride >> 4) << 32
        | 1 << 46
        | base << 49
        | SWIZZLES[width] << 61
    )


def instruction_descriptor(
    m: int, n: int, a: int, b: int, d: int, transpose=(0, 0), negate=(0, 0), saturate: int = 0
) -> int:
    return (
        saturate << 3
        | d << 4
        | a << 7
        | b << 10
        | negate[0] << 13
        | negate[1] << 14
        | transpose[0] << 15
        | transpose[1] << 16
        | (n >> 3) << 17
        | (m >> 4) << 24
    )


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, K, bytes of an element] laid out for the tensor core.

    `image` is what lies at `start`; `step(k)` the start address for the k-th instruction.
    """

    image: np.ndarray
    leading: int
    stride: int
    width: int
    step_bytes: int

    def descriptor(self, start: int, step: int) -> int:
        return smem_descriptor(
            start + step * self.step_bytes, self.leading, self.stride, self.width
        )


def _swizzle_box(box: np.ndarray, width: int) -> np.ndarray:
    """A box of lines of `width` bytes as TMA writes it: chunk c of the y-th 128 bytes moves to
    c ^ (y % 8) for 128-byte lines, and likewise with fewer bits for shorter ones."""
    lines = box.reshape(-1, width // 16, 16)
    out = np.empty_like(lines)
    for i in range(lines.shape[0]):
        turn = (i * width // 128) % (width // 16)
        for c in range(width // 16):
            out[i, c ^ turn] = lines[i, c]
    return out.reshape(-1)


def k_major(values: np.ndarray, width: int, gap: int = 0) -> Operand:
    """values: [rows, K, element bytes]. Swizzled: K is `width` bytes, `gap` bytes between 8 rows.
    Without swizzle: 8 x 16-byte core matrices, their columns `gap` bytes apart."""
    rows, depth, size = values.shape
    raw = np.ascontiguousarray(values).reshape(rows, depth * size)
    if width > 16:
        assert raw.shape[1] == width
        assert gap % (8 * width) == 0
        groups = []
        for r in range(0, rows, 8):
            groups.append(_swizzle_box(raw[r : r + 8].reshape(-1), width))
            groups.append(np.zeros(gap, np.uint8))
        return Operand(np.concatenate(groups), 0, 8 * width + gap, width, 32)
    leading, stride = 128 * (rows // 8) + gap, 128
    image = np.zeros(leading * (raw.shape[1] // 16), np.uint8)
    for c in range(raw.shape[1] // 16):
        for r in range(rows):
            at = c * leading + r // 8 * stride + r % 8 * 16
            image[at : at + 16] = raw[r, 16 * c : 16 * c + 16]
    return Operand(image, leading, stride, width, 2 * leading)


def mn_major(values: np.ndarray, width: int) -> Operand:
    """values: [rows, K, element bytes], rows contiguous. Swizzled: boxes of all K lines of `width`
    bytes. Without swizzle: 8 k x 16 bytes of rows."""
    rows, depth, size = values.shape
    raw = np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(depth, rows * size)
    per_step = 32 // size  # k of one instruction
    if width > 16:
        width_bytes = rows * size
        assert width_bytes % width == 0
        boxes = [
            _swizzle_box(np.ascontiguousarray(raw[:, x : x + width]).reshape(-1), width)
            for x in range(0, width_bytes, width)
        ]
        leading, stride = depth * width, 8 * width
        return Operand(np.concatenate(boxes), leading, stride, width, per_step * width)
    chunks = rows * size // 16
    stride, leading = 128, 128 * chunks
    image = np.zeros(leading * (depth // 8), np.uint8)
    for k in range(depth):
        for c in range(chunks):
            at = c * stride + k // 8 * leading + k % 8 * 16
            image[at : at + 16] = raw[k, 16 * c : 16 * c + 16]
    return Operand(image, leading, stride, width, per_step // 8 * leading)


# ---------------------------------------------------------------- number formats


def minifloat(code: np.ndarray, exponent: int, mantissa: int, special: str) -> np.ndarray:
    """Values of a small float by its definition. special: "ieee", "e4m3" (only one NaN), "none"."""
    code = np.asarray(code).astype(np.int64)
    bias = 2 ** (exponent - 1) - 1
    e = code >> mantissa & (2**exponent - 1)
    f = code & (2**mantissa - 1)
    sign = np.where(code >> (exponent + mantissa) & 1, -1.0, 1.0)
    value = np.where(
        e == 0, f * 2.0 ** (1 - bias - mantissa), (1 + f / 2**mantissa) * 2.0 ** (e - bias)
    )
    if special == "ieee":
        value = np.where(e == 2**exponent - 1, np.where(f == 0, np.inf, np.nan), value)
    if special == "e4m3":
        value = np.where((e == 15) & (f == 7), np.nan, value)
    return sign * value


FORMATS = {  # name: (bits, code in the descriptor, exponent bits, mantissa bits, specials)
    "e4m3": (8, 0, 4, 3, "e4m3"),
    "e5m2": (8, 1, 5, 2, "ieee"),
    "e2m3": (6, 3, 2, 3, "none"),
    "e3m2": (6, 4, 3, 2, "none"),
    "e2m1": (4, 5, 2, 1, "none"),
}


def padded_chunks(code: np.ndarray, bits: int) -> np.ndarray:
    """[rows, K] codes as bytes [rows, K, 1]: 16 of 4 or 6 bits at the low end of 16 bytes."""
    if bits == 8:
        return code.astype(np.uint8)[..., None]
    rows, depth = code.shape
    groups = code.reshape(rows, depth // 16, 16).astype(np.int64)
    flat = (
        (groups[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(rows, depth // 16, -1)
    )
    packed = np.packbits(flat, axis=-1, bitorder="little")
    out = np.zeros((rows, depth // 16, 16), np.uint8)
    out[..., : packed.shape[-1]] = packed
    return out.reshape(rows, depth, 1)
