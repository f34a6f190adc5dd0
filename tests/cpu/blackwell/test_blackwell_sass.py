"""Machine code of the Blackwell prefill kernel: tensor-core instructions, no stack, no spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from cute_fmha.kernels.blackwell.plan import Features, make_plan

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")
harness = pytest.importorskip("prefill_harness")
triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WINDOW = {"window_left": True, "window_right": True}
BF16 = torch.bfloat16


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="no nvdisasm beside Triton")
@pytest.mark.parametrize(
    ("dims", "features", "arch"),
    [
        ((128, 128), Features(**WINDOW), "sm_100a"),
        ((128, 128), Features(**WINDOW, sink=True, skip=True, count=True), "sm_100a"),
        ((192, 128), Features(window_right=True), "sm_103a"),
        ((256, 256), Features(window_right=True, softcap=True), "sm_100a"),
    ],
    ids=["window", "skip", "192-sm103", "256-softcap"],
)
def test_machine_code(dims, features, arch, tmp_path):
    plan = make_plan(*dims, BF16, BF16, features)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(harness.build(plan, arch).cubin)
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    code = tool("nvdisasm", "-c", str(path))
    # Four products a KV tile: two Q tiles, Q Kᵀ over D and P V over the keys, 16 at a time.
    assert code.count("UTCHMMA") == plan.q_tiles * (plan.head_dim + plan.tile_n) // 16
    for instruction in ("LDTM", "STTM", "UTMALDG", "UTMASTG", "UTCBAR", "FFMA2", "FMNMX3"):
        assert instruction in code, instruction
    assert not re.search(r"\b(STL|LDL)\b", code)
