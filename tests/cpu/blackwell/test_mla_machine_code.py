"""Machine code of the MLA decode kernels with epilogue ops: no stack in variants at random, and FP8
conversions that ptxas does not merge."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

from cute_fmha import machine_code
from cute_fmha.epilogues.base import Kind
from cute_fmha.kernels.blackwell import launch, mla_host, prefill_host
from cute_fmha.kernels.blackwell.cutting import Cut
from cute_fmha.kernels.blackwell.decode_transposed_plan import PART_BLOCKS, TransposedPlan, box_of
from cute_fmha.kernels.blackwell.epilogue import Op
from cute_fmha.kernels.blackwell.mla_decode_few_plan import make_few_plan
from cute_fmha.kernels.blackwell.mla_decode_plan import MlaPlan, make_plan
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.kernels.blackwell.plan import make_plan as prefill_plan

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn

NUMBER, ONE, BY_HEAD = Kind(None, 0, False), Kind(FP32, 0, False), Kind(FP32, 1, False)
FP8 = Op("fp8", (ONE,))
NVFP4 = Op("nvfp4", (ONE,), Kind(E4M3, 2, True))
OPS: list[tuple[Op, torch.dtype | None]] = [
    (Op(), None),
    (Op(), FP32),
    (NVFP4, torch.uint8),
    (Op("nvfp4", (NUMBER,), Kind(E4M3, 2, True)), torch.uint8),
    (FP8, E4M3),
    (Op("fp8", (BY_HEAD,)), E4M3),
    (Op("scale", (NUMBER,)), None),
    (Op("scale", (BY_HEAD,)), None),
    (Op("scale", (BY_HEAD,)), FP32),
    (Op("gate", (Kind(BF16, 3, True),)), None),
    (Op("gate", (Kind(FP16, 3, False),)), None),
]


def read(host: Any, plan: Any, arch: str = "sm_100a") -> machine_code.MachineCode:
    try:
        machine_code.tool("nvdisasm")
    except machine_code.ToolError as error:
        pytest.skip(str(error))
    return machine_code.read(launch.binary_of(host, plan, arch).cubin)


def few_rows(op: Op, out_dtype: torch.dtype, cut: Cut) -> TransposedPlan:
    return make_few_plan(576, 512, BF16, out_dtype, Features(window_right=True), 16, 64, cut, op)


@pytest.mark.parametrize(
    ("host", "plan"),
    [
        (mla_host, few_rows(FP8, E4M3, Cut.WHOLE)),
        *(
            pytest.param(host, plan, marks=pytest.mark.sweep)
            for host, plan in (
                (mla_host, few_rows(FP8, E4M3, Cut.SHARE)),
                (mla_host, few_rows(NVFP4, torch.uint8, Cut.SHARE)),
                (mla_host, make_plan(576, BF16, E4M3, Features(), 64, 64, Cut.SHARE, FP8)),
                (mla_host, make_plan(576, BF16, E4M3, Features(), 64, 128, Cut.FIXED, FP8)),
                (
                    mla_host,
                    make_plan(576, BF16, torch.uint8, Features(), 64, 64, Cut.SHARE, NVFP4),
                ),
                (prefill_host, prefill_plan(128, 128, BF16, E4M3, Features(packed=True), FP8)),
                (prefill_host, prefill_plan(192, 128, BF16, torch.uint8, Features(), NVFP4)),
            )
        ),
    ],
    ids=lambda value: value.op.key if hasattr(value, "op") else "",
)
def test_conversions_to_fp8_merge_with_nothing(host, plan):
    """Of a word whose two pairs are equal (of a row without keys all are zeros) ptxas 12 makes one
    conversion that merges into a register that nobody wrote. See `ptx_codes.pack_e4m3`."""
    merge = r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB_MERGE_C .*?(\w+)(?:\.reuse)? ;"
    merged = re.findall(merge, read(host, plan).listing)
    assert merged
    assert set(merged) == {"RZ"}


def sample(seed: int, count: int) -> list[tuple[TransposedPlan, str]]:
    """Plans at random, and what they are compiled for."""
    draw = random.Random(seed)
    names = ("window_left", "window_right", "lse", "sink", "softcap", "skip", "count")
    variants = []
    for _ in range(count):
        present: dict[str, Any] = {name: draw.random() < 0.6 for name in names}
        for name in ("skip_tensor", "skip_relative"):
            present[name] = present["skip"] and draw.random() < 0.5
        op, out_dtype = draw.choice(OPS)
        dtype = draw.choice([BF16, FP16])
        plan = make_few_plan(
            draw.choice([576, 576, 512]), 512, dtype, out_dtype or dtype, Features(**present),
            draw.choice([16, 32]), box_of(draw.choice([1, 8, 16, 32, 128])),
            draw.choice(list(Cut)), op,
        )  # fmt: skip
        variants.append((plan, draw.choice(["sm_100a"] * 5 + ["sm_103a"])))
    return variants


@pytest.mark.parametrize(
    ("plan", "arch"),
    [
        pytest.param(*variant, marks=[pytest.mark.sweep] * (i >= 2))
        for i, variant in enumerate(sample(5, 24))
    ],
    ids=range(24),
)
def test_no_variant_has_a_stack(plan, arch):
    """S of a part and of the rope columns, P V of a part at two places, 16 of K at a time."""
    code = read(mla_host, plan, arch)
    assert (code.stack, code.local, code.spills) == (0, 0, 0), plan
    products = PART_BLOCKS * 4 + plan.rope_blocks * 4 + 2 * plan.tile_n // 16
    assert code.count("UTCHMMA") == products


EVERYTHING = Features(
    window_left=True, window_right=True, sink=True, softcap=True, skip=True, skip_tensor=True,
    skip_relative=True, count=True, max_logits=True,
)  # fmt: skip


def sample_of_many_rows(seed: int, count: int) -> list[tuple[MlaPlan, str]]:
    """Likewise, with all features or none: crowded are the epilogue warps and the combine."""
    draw = random.Random(seed)
    variants = []
    for _ in range(count):
        (op, out_dtype), dtype = draw.choice(OPS), draw.choice([BF16, FP16])
        plan = make_plan(
            576, dtype, out_dtype or dtype, draw.choice([Features(lse=False), EVERYTHING]), 64,
            draw.choice([64, 128, 128]), draw.choice(list(Cut)), op,
        )  # fmt: skip
        variants.append((plan, draw.choice(["sm_100a"] * 4 + ["sm_103a"])))
    return variants


CROWDED = (make_plan(576, BF16, torch.uint8, EVERYTHING, 64, 128, Cut.FIXED, NVFP4), "sm_100a")


@pytest.mark.parametrize(
    ("plan", "arch"),
    [CROWDED, *(pytest.param(*v, marks=pytest.mark.sweep) for v in sample_of_many_rows(1, 20))],
    ids=range(21),
)
def test_no_variant_of_many_rows_has_a_stack(plan, arch):
    """36 K steps of Q Kᵀ, and two halves of O over the keys."""
    code = read(mla_host, plan, arch)
    assert (code.stack, code.local, code.spills) == (0, 0, 0), plan
    assert code.count("UTCHMMA") == 36 + 2 * plan.tile_n // 16


@pytest.mark.sweep
@pytest.mark.parametrize("page_size", [1, 16, 0])
@pytest.mark.parametrize("rows", [64, 128])
def test_small_pages_leave_no_stack(rows, page_size):
    """Their boxes take uniform registers, which are spilled first."""
    features = Features(window_right=True, sink=True, skip=True, count=True)
    code = read(mla_host, make_plan(576, BF16, BF16, features, page_size, rows, Cut.SHARE))
    assert (code.stack, code.local, code.spills) == (0, 0, 0)
