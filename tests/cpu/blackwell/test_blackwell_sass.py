"""Machine code of the Blackwell prefill kernel: tensor-core instructions, no stack, no spills."""

from __future__ import annotations

import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fmha.epilogues.base import Kind
from cute_fmha.kernels.blackwell.epilogue import Op
from cute_fmha.kernels.blackwell.plan import HEAD_DIMS, Features, make_plan

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import prefill_harness as harness
import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WINDOW: dict[str, Any] = {"window_left": True, "window_right": True}
EVERYTHING = Features(
    **WINDOW, sink=True, softcap=True, skip=True, skip_tensor=True, skip_relative=True, count=True
)
BF16, FP16 = torch.bfloat16, torch.float16

no_disassembler = pytest.mark.skipif(
    not (TOOLS / "nvdisasm").exists(), reason="no nvdisasm beside Triton"
)


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check(dims, dtype, out_dtype, features, arch, folder, pack=1):
    """No stack, the tensor core's instructions in the number that the plan implies, and masks
    whose bits reach predicates seven at a time."""
    plan = replace(make_plan(*dims, dtype, out_dtype, features), pack=pack)
    path = folder / "kernel.cubin"
    path.write_bytes(harness.build(plan, arch).cubin)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    code = tool("nvdisasm", "-c", str(path))
    # Four products a KV tile: two Q tiles, Q Kᵀ over D and P V over the keys, 16 at a time. With
    # decisions Q Kᵀ of the second Q tile may come before P V of the first.
    early = plan.head_dim if features.skip and not plan.pair else 0
    products = plan.q_tiles * (plan.head_dim + plan.tile_n) + early
    assert code.count("UTCHMMA") == products // 16
    for instruction in ("LDTM", "STTM", "UTMALDG", "UTMASTG", "UTCBAR", "FFMA2", "FMNMX3"):
        assert instruction in code, instruction
    assert not re.search(r"\b(STL|LDL)\b", code)
    # The end of the sequence is a boundary, too; four moves make 28 predicates of a word's 32.
    loops = 2 if features.window_left and not features.block_mask else 1
    assert len(re.findall(r"\bR2P\b", code)) >= loops * plan.tile_n // 32 * 4


@no_disassembler
@pytest.mark.parametrize(
    ("dims", "features", "arch"),
    [
        ((128, 128), Features(**WINDOW), "sm_100a"),
        ((128, 128), Features(**WINDOW, sink=True, skip=True, count=True), "sm_100a"),
        ((192, 128), Features(window_right=True), "sm_103a"),
        ((256, 256), Features(window_right=True, softcap=True), "sm_100a"),
        ((96, 96), EVERYTHING, "sm_100a"),
    ],
    ids=["window", "skip", "192-sm103", "256-softcap", "96-everything"],
)
def test_machine_code(dims, features, arch, tmp_path):
    check(dims, BF16, BF16, features, arch, tmp_path)


PACKED_BLOCKS = Features(
    **WINDOW,
    packed=True,
    used=True,
    block_mask=(100, 48),
    skip=True,
    skip_relative=True,
    count=True,
)


@no_disassembler
def test_machine_code_of_packed_sequences(tmp_path):
    check((128, 128), BF16, BF16, PACKED_BLOCKS, "sm_100a", tmp_path)


@no_disassembler
@pytest.mark.sweep
@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize(
    ("features", "pack"),
    [
        (Features(window_right=True), 8),
        (Features(**WINDOW, packed=True, used=True, sink=True), 1),
        (Features(window_right=True, packed=True), 4),
        (Features(window_right=True, block_mask=(64, 64)), 1),
        (PACKED_BLOCKS, 1),
        (PACKED_BLOCKS, 8),
    ],
    ids=["8", "packed", "packed-4", "blocks", "packed-blocks", "packed-blocks-8"],
)
def test_machine_code_of_sequences_and_groups(dims, features, pack, tmp_path):
    check(dims, BF16, BF16, features, "sm_100a", tmp_path, pack)


@no_disassembler
@pytest.mark.sweep
@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize(
    ("features", "dtype", "out_dtype"),
    [
        (Features(), FP16, FP16),
        (Features(window_right=True), BF16, BF16),
        (Features(window_right=True, lse=False, sink=True), BF16, torch.float32),
        (Features(**WINDOW, softcap=True), BF16, BF16),
        (Features(skip=True), BF16, BF16),
        (Features(window_right=True, skip=True, skip_tensor=True, count=True), FP16, FP16),
        (EVERYTHING, BF16, BF16),
        (EVERYTHING, FP16, torch.float32),
    ],
    ids=["plain", "causal", "float32", "softcap", "skip", "counted", "everything", "everything32"],
)
def test_machine_code_of_every_pair(dims, features, dtype, out_dtype, tmp_path):
    check(dims, dtype, out_dtype, features, "sm_100a", tmp_path)


# What has spilled: a softcap over 128 keys, a division, the epilogue warp's order of packed work.
CROWDED = {
    "softcap": (
        (192, 128),
        Features(**WINDOW, sink=True, softcap=True, skip=True, count=True, packed=True),
        1,
    ),
    "relative": (
        (64, 64),
        Features(sink=True, skip=True, skip_relative=True, packed=True, used=True),
        4,
    ),
    "order": (
        (128, 128),
        Features(
            **WINDOW, lse=False, skip=True, skip_tensor=True, skip_relative=True, count=True,
            packed=True, block_mask=(100, 48),
        ),
        8,
    ),
    "blocks": (
        (96, 96),
        Features(**WINDOW, softcap=True, count=True, block_mask=(64, 256)),
        1,
    ),
}  # fmt: skip


@no_disassembler
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.sweep] * (name != "softcap")) for name in CROWDED],
)
def test_machine_code_of_crowded_variants(name, tmp_path):
    dims, features, pack = CROWDED[name]
    out_dtype = BF16 if name == "softcap" else torch.float32
    check(dims, BF16, out_dtype, features, "sm_100a", tmp_path, pack)


NUMBER, ROWS = Kind(torch.float32, 0, False), Kind(torch.bfloat16, 3, True)
SCALES = Kind(torch.float8_e4m3fn, 2, True)


@no_disassembler
@pytest.mark.parametrize(
    "features",
    [
        Features(window_right=True, lse=False),
        pytest.param(Features(**WINDOW, sink=True, skip=True, count=True), marks=pytest.mark.sweep),
    ],
    ids=["causal", "skip"],
)
@pytest.mark.parametrize(
    ("op", "out_dtype", "instruction"),
    [
        (Op("nvfp4", (NUMBER,), SCALES), torch.uint8, "E2M1"),
        pytest.param(Op("fp8", (NUMBER,)), torch.float8_e4m3fn, "E4M3", marks=pytest.mark.sweep),
        pytest.param(Op("gate", (ROWS,)), BF16, "LDG.E.128", marks=pytest.mark.sweep),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_machine_code_of_epilogue_ops(op, out_dtype, instruction, features, tmp_path):
    """Hardware's conversions and vector loads, and no stack either."""
    plan = make_plan(128, 128, BF16, out_dtype, features, op)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(harness.build(plan, "sm_100a").cubin)
    assert re.search(r"STACK:0 .*LOCAL:0 ", tool("cuobjdump", "-res-usage", str(path)))
    code = tool("nvdisasm", "-c", str(path))
    assert "UTCHMMA" in code
    assert instruction in code


OPS = [
    (Op(), None),
    (Op(), torch.float32),
    (Op("nvfp4", (NUMBER,), SCALES), torch.uint8),
    (Op("fp8", (NUMBER,)), torch.float8_e4m3fn),
    (Op("gate", (ROWS,)), None),
]
PER_HEAD = Kind(torch.float32, 1, False)
HEAD_OPS = [
    (Op("scale", (PER_HEAD,)), None),
    (Op("scale", (PER_HEAD,)), torch.float32),
    (Op("fp8", (PER_HEAD,)), torch.float8_e4m3fn),
]


def sample(seed: int, count: int, ops: list[Any] = OPS) -> list[Any]:
    """Plans at random."""
    draw = random.Random(seed)
    variants: list[Any] = []
    names = ("window_left", "window_right", "lse", "sink", "softcap", "skip", "count", "packed")
    while len(variants) < count:
        present: dict[str, Any] = {name: draw.random() < 0.5 for name in (*names, "used")}
        for name in ("skip_tensor", "skip_relative"):
            present[name] = present["skip"] and draw.random() < 0.5
        if draw.random() < 0.35:
            present["block_mask"] = draw.choice([(128, 128), (64, 64), (100, 48), (64, 256)])
        dtype = draw.choice([BF16, FP16])
        op, out_dtype = draw.choice(ops)
        dims, pack = draw.choice(HEAD_DIMS), draw.choice([1, 1, 4, 8])
        try:
            plan = make_plan(*dims, dtype, out_dtype or dtype, Features(**present), op)
        except ValueError:
            continue  # No room in shared memory.
        variants.append(replace(plan, pack=pack))
    return variants


@no_disassembler
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("plan", "arch"),
    [(plan, "sm_100a") for plan in sample(1, 40)]
    + [(plan, "sm_103a") for plan in sample(2, 20, HEAD_OPS)],
    ids=range(60),
)
def test_no_variant_has_a_stack(plan, arch, tmp_path):
    path = tmp_path / "kernel.cubin"
    path.write_bytes(harness.build(plan, arch).cubin)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), (plan, usage)
