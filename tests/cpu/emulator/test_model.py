"""The resource model: its rates, its arithmetic, and the counters it starts from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import peers_fa4
import pytest
import tensor_kernels as tk

from cute_fmha.emulator import model
from cute_fmha.emulator.binding import CLASSES
from cute_fmha.emulator.capture import Report, emulate
from cute_fmha.emulator.machine import Counters, Policy, run_ptx

NONE = Counters(
    steps=0,
    by_class=dict.fromkeys(CLASSES, 0),
    by_warp=np.zeros((32, len(CLASSES)), np.int64),
    cycles=0.0,
    tensor_cycles=0.0,
)


def test_rates_add_up_to_the_published_ones() -> None:
    rates = model.B200
    sms = model.SMS * model.CLOCK_HZ
    assert rates.tensor_flops * sms == pytest.approx(2.25e15, rel=0.01)
    assert rates.memory_bytes * model.CLOCK_HZ == pytest.approx(8e12)
    assert 2 * rates.fp32 * model.SMS * 1.98e9 == pytest.approx(75e12, rel=0.01)


@pytest.mark.parametrize(("m", "cycles"), [(128, (1024, 768, 1024)), (256, (2048, 1536, 2048))])
def test_tiles_of_the_flashattention_4_paper(m: int, cycles: tuple[int, ...]) -> None:
    """Table 1 of arXiv 2603.05451: a tile of M x 128 scores, head dimension 128, BF16.

    Operands in shared memory for each 128 x 128 product: Q and K, then V.
    """
    n = d = 128
    flops = 4 * m * n * d
    operands = m // 128 * (128 * d + 128 * d + 128 * n) * 2
    counters = dataclasses.replace(
        NONE,
        mma_flops=flops,
        tensor_cycles=flops / 8192,
        mma_shared_bytes=operands,
        mufu_ops=m * n,
    )
    found = model.estimate(counters, 1).cycles
    assert tuple(
        found[unit] for unit in ("tensor core", "shared memory", "special functions")
    ) == pytest.approx(cycles)


def test_units_and_the_bottleneck() -> None:
    counters = dataclasses.replace(
        NONE,
        by_class={**NONE.by_class, "move": 10_000, "integer": 800, "fma": 200},
        fma_ops=1280,
        mufu_ops=32,
        shared_read_bytes=128 * 30,
        shared_write_bytes=128 * 10,
        mma_shared_bytes=128 * 60,
        global_read_bytes=1 << 30,
    )
    estimate = model.estimate(counters, 4)
    assert estimate.cycles == {
        "tensor core": 0,
        "special functions": 0.5,
        "FP32": 2.5,
        "shared memory": 25,
        "issue": 62.5,
    }
    assert (estimate.bottleneck, estimate.bound) == ("issue", 62.5)
    tile = estimate.per_tile(5)
    assert tile.cycles["issue"] == 12.5
    text = str(tile)
    assert text.startswith("modelled cycles per tile: issue 12, ")
    assert text.endswith("bottleneck: issue")
    rates = dataclasses.replace(model.B200, special_functions=0.01)
    assert model.estimate(counters, 4, rates=rates).bottleneck == "special functions"


def test_device_memory() -> None:
    """Every distinct byte once, and the time of the launch over its waves of CTAs."""
    counters = dataclasses.replace(NONE, global_read_bytes=1 << 30, global_write_bytes=1 << 20)

    def cycles(ctas: int, distinct: int) -> float:
        return model.estimate(counters, ctas, distinct_bytes=distinct).cycles["device memory"]

    one_megabyte = (1 << 20) / 8e12 * model.CLOCK_HZ
    assert cycles(1, 1 << 20) == pytest.approx(one_megabyte)
    assert cycles(148, 1 << 20) == pytest.approx(one_megabyte)
    assert cycles(1480, 1 << 20) == pytest.approx(one_megabyte / 10)
    assert cycles(1, 1 << 40) == pytest.approx(one_megabyte * 1025)  # no more than was asked for
    assert "device memory" not in model.estimate(counters, 1).cycles


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="ctas must be at least 1"):
        model.estimate(NONE, 0)
    with pytest.raises(ValueError, match="tiles must be positive"):
        model.estimate(NONE, 1).per_tile(0)


# ---------------------------------------------------------------- the engine's counters


@pytest.mark.parametrize(
    ("kind", "code", "k", "size", "group", "flops"),
    [
        ("f16", 0, 16, 2, 1, 8192),
        ("f16", 1, 16, 2, 2, 8192),
        ("f8f6f4", 0, 32, 1, 1, 16384),
        ("f8f6f4", 1, 32, 1, 2, 16384),
    ],
)
def test_tensor_cycles_are_those_of_the_rates(
    kind: str, code: int, k: int, size: int, group: int, flops: int
) -> None:
    """Cycles of all tensor cores together: a pair of CTAs keeps two busy."""
    m, n = 128 * group, 64
    rows = max(128, n // group)
    tile = tk.k_major(np.zeros((rows, k, size), np.uint8), 32)
    idesc = tk.instruction_descriptor(m, n, code, code, 1)
    descriptor = tile.descriptor(tk.IMAGE, 0)
    command = tk.command(descriptor, descriptor, idesc, 0, False)
    name = f"tcgen05.mma.cta_group::{group}.kind::{kind} [%r23], %d22, %d23, %r22, %p6;"
    image = np.concatenate([tile.image.reshape(-1).view(np.uint8)] * 1)
    before = np.zeros((group, 128, 64), np.uint32)
    source = tk.kernel(tk.issue(name, group), 64, group)
    _, result = tk.run(source, np.stack([image] * group), before, [command] * 3, group)
    counters = result.counters
    assert counters.mma_flops == 3 * 2 * m * n * k
    assert counters.tensor_cycles == counters.mma_flops / flops
    estimate = model.estimate(counters, group)
    assert estimate.cycles["tensor core"] == 3 * 2 * 128 * n * k / flops


KERNEL = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .u64 out)
{
    .reg .b32 %r<8>;
    .reg .f32 %f<4>;
    .reg .b64 %d<4>;
    .shared .align 16 .b8 box[2048];
    ld.param.u64 %d0, [out];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    add.u64 %d0, %d0, %d1;
    mov.u32 %r1, box;
    shl.b32 %r2, %r0, 2;
    add.u32 %r1, %r1, %r2;
    cvt.rn.f32.u32 %f0, %r0;
    ex2.approx.ftz.f32 %f1, %f0;
    ex2.approx.ftz.f32 %f1, %f1;
    fma.rn.f32 %f1, %f1, %f0, %f0;
    st.shared.f32 [%r1], %f1;
    ld.shared.f32 %f2, [%r1];
    st.global.f32 [%d0], %f2;
    ret;
}
"""


def test_counters_of_a_kernel() -> None:
    out = np.zeros(128, np.float32)
    result = run_ptx(KERNEL, out, grid=(2, 1, 1), block=(128, 1, 1), policy=Policy(races=False))
    estimate = model.estimate(result.counters, 2, distinct_bytes=out.nbytes)
    assert estimate.cycles["special functions"] == 2 * 128 / 16
    assert estimate.cycles["FP32"] == 128 / 128
    assert estimate.cycles["shared memory"] == 2 * 512 / 128
    assert estimate.cycles["device memory"] == pytest.approx(512 / 8e12 * model.CLOCK_HZ)
    moves = result.counters.by_class["move"]
    assert estimate.cycles["issue"] == (result.counters.steps - moves) / 4 / 2


@pytest.mark.skipif(not peers_fa4.available, reason="flash-attn-4 is not installed")
def test_flashattention_4() -> None:
    """Its tiles are 256 x 128: 2048 cycles of the tensor core, fewer exponentials than scores."""
    reports: list[Report] = []

    def run(compiled: Any, *args: Any, **kwargs: Any) -> None:
        reports.append(emulate(compiled, *args, policy=Policy(races=False), **kwargs))

    peers_fa4.run_case(peers_fa4.CASES["d128"], run)
    (report,) = reports
    counters = report.results[0].counters
    scores = 2 * 512 * 512
    assert counters.mma_flops == 4 * scores * 128
    assert counters.tma_store_bytes == 2 * 512 * 128 * 2  # every byte of the output once
    tile = model.estimate(counters, 4).per_tile(512 / 128)
    assert tile.cycles["tensor core"] == 2048
    assert 0.5 * scores < counters.mufu_ops < scores  # some of exp2 is a polynomial
    assert counters.cycles > tile.bound * 4  # the timeline has latencies as well
