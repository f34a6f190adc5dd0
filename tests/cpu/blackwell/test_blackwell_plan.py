"""Plans, TMEM maps and barrier counts: host arithmetic that must fail loudly."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fmha.epilogues.base import Kind
from cute_fmha.kernels.blackwell.kernel_plan import Role
from cute_fmha.kernels.blackwell.plan import (
    HEAD_DIMS,
    Features,
    Plan,
    can_implement,
    make_plan,
    packed_heads,
)
from cute_fmha.kernels.blackwell.tmem import Region, TmemMap, attention_map
from cute_fmha.problem import Problem, Target

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")


def plan(**changes):
    return replace(Plan(128, 128, torch.bfloat16, torch.bfloat16, Features()), **changes)


def test_tmem_of_two_tiles():
    tmem = attention_map(2, 2, 128, 128)
    assert [(r.name, r.start, r.end) for r in tmem.regions if r.over is None] == [
        ("S0", 0, 128), ("S1", 128, 256), ("O0", 256, 384), ("O1", 384, 512),
    ]  # fmt: skip
    assert (tmem["P1"].start, tmem["P1"].end, tmem["P1"].over) == (192, 256, "S1")
    assert tmem.columns == 512


def test_tmem_refuses_too_much_and_overlaps():
    with pytest.raises(ValueError, match="ends at column 768 of 512"):
        attention_map(2, 2, 128, 256)
    with pytest.raises(ValueError, match="A and B overlap"):
        TmemMap((Region("A", 0, 64), Region("B", 32, 64)))
    with pytest.raises(ValueError, match="P is not inside A"):
        TmemMap((Region("A", 0, 64), Region("P", 32, 64, over="A")))


def test_budgets():
    assert plan().shared_bytes <= 227 << 10
    with pytest.raises(ValueError, match=r"shared memory: .*'K': 98304"):
        plan(k_stages=3)
    assert sum(32 * len(role.warps) * role.registers for role in plan().roles) <= 64 << 10
    with pytest.raises(ValueError, match=r"parts of P end in a K step: \(5, 8\) of 8, 64 keys"):
        plan(tile_n=64, p_parts=(5, 8))


def test_arrive_counts_follow_from_the_roles():
    from cute_fmha.kernels.blackwell.topology import Barrier, Meeting, Topology, prefill_topology

    topology = prefill_topology(plan())
    counts = {barrier.name: topology.arrivals(barrier.name) for barrier in topology.barriers}
    assert counts == {
        "work_full": 1, "work_empty": 15, "claimed": 1,
        "q_full": 1, "q_empty": 1, "k_full": 1, "k_empty": 1, "v_full": 1, "v_empty": 1,
        "s_full": 1, "p_ready": 256, "p_last": 128, "stats_full": 128, "stats_empty": 128,
        "o_full": 1,
        "chunk_full": 4, "chunk_empty": 1,
    }  # fmt: skip
    thirds = prefill_topology(plan(p_parts=(5, 7, 8)))
    assert thirds.size == topology.size + 2
    assert thirds.arrivals("p_more") == thirds.arrivals("p_last") == 128
    assert topology.first_named("fade") == 1
    assert topology.named == 9, "eight softmax warps, each with a barrier of its own"
    roles = (Role("a", (0, 1), 64), Role("b", (2,), 64))
    with pytest.raises(ValueError, match="a has 2 warps, 'commit' is for one"):
        Topology(roles, (Barrier("x", 1, (("a", "commit"),)),))
    with pytest.raises(ValueError, match="no role c"):
        Topology(roles, (Barrier("x", 1, (("c", "warp"),)),))
    with pytest.raises(ValueError, match="2 warps of a tell 1 of b"):
        Topology(roles, (), meetings=(Meeting("x", "a", "b"),))
    with pytest.raises(ValueError, match="17 named barriers of 16"):
        Topology(
            (Role("a", tuple(range(16)), 64, groups=16), Role("b", (16,), 64)), (),
            meetings=(Meeting("x", "a", "b"),),
        )  # fmt: skip
    with pytest.raises(ValueError, match="every warp has one role"):
        Topology((Role("a", (0, 2), 64),), ())


B200 = Target("cuda", 100, 148)


def problem(**changes):
    plain = Problem(
        "attention", "dense", False, torch.bfloat16, torch.bfloat16, 2, 512, 512, 8, 2, 128, 128
    )
    return replace(plain, **changes)


def test_what_can_be_implemented():
    assert can_implement(problem(), B200) is None
    assert can_implement(problem(layout="packed", packed_q=True, seqlen_k=0), B200) is None
    assert can_implement(problem(seqused=True), B200) is None
    assert can_implement(problem(block_mask=(7, 300)), B200) is None
    assert can_implement(problem(epilogue="nvfp4", out_dtype=torch.uint8), B200) is None
    assert can_implement(problem(head_dim=192, window_right=0, skip=True, sink=True), B200) is None
    refused: dict[str, dict[str, Any]] = {
        "got paged": {"layout": "paged"},
        "got torch.float32": {"dtype": torch.float32},
        r"got \(64, 128\)": {"head_dim": 64},
        "at least one": {"seqlen_k": 0},
        "up to 1048576 keys with a block mask": {"block_mask": (9, 9), "seqlen_k": 1 << 20 | 1},
        "num_splits=2": {"num_splits": 2},
        "read and write no torch.int8": {"parameters": (Kind(torch.int8, 1, False),)},
    }
    for reason, changes in refused.items():
        assert re.search(reason, can_implement(problem(**changes), B200) or "")
    assert "10.0 or 10.3" in (can_implement(problem(), Target("cuda", 90, 132)) or "")


def test_when_heads_are_packed():
    rows = 256
    assert packed_heads(problem(), rows) == 4
    assert packed_heads(problem(heads_q=2), rows) == 1
    assert packed_heads(problem(heads_q=6), rows) == 1, "3 heads do not divide 128 rows"
    for decides in ({"skip": True}, {"block_mask": (64, 64)}):
        assert packed_heads(problem(**decides), rows) == 1, "full tiles without packing"
        assert packed_heads(problem(seqlen_q=70, **decides), rows) == 4, "2 work tiles for 4"


@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_pair_has_a_plan_within_budget(dims, out_dtype):
    made = make_plan(*dims, torch.bfloat16, out_dtype, Features())
    assert made.shared_bytes <= 227 << 10
    assert made.k_stages >= 2
    assert made.v_stages >= (1 if made.o_over_v else 2)
    assert made.tmem.columns <= 512


def test_asking_needs_no_dsl():
    """Plans and constraints of every kernel are found without CuTe DSL."""
    code = (
        "import sys; sys.modules['cutlass'] = sys.modules['tvm_ffi'] = None\n"
        "from cute_fmha.kernels.blackwell import launch, mla_plan, plan, topology\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
