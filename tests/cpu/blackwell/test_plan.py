"""Plans, TMEM maps and barrier counts: host arithmetic that must fail loudly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fmha.kernels.blackwell.plan import Features, Plan, Role
from cute_fmha.kernels.blackwell.tmem import Region, TmemMap, attention_map

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")


def plan(**changes):
    return replace(Plan(128, 128, torch.bfloat16, torch.bfloat16, Features()), **changes)


def test_tmem_of_two_tiles():
    tmem = attention_map(2, 128, 128)
    assert [(r.name, r.start, r.end) for r in tmem.regions if r.over is None] == [
        ("S0", 0, 128), ("S1", 128, 256), ("O0", 256, 384), ("O1", 384, 512),
    ]  # fmt: skip
    assert (tmem["P1"].start, tmem["P1"].end, tmem["P1"].over) == (192, 256, "S1")
    assert tmem.columns == 512


def test_tmem_refuses_too_much_and_overlaps():
    with pytest.raises(ValueError, match="ends at column 768 of 512"):
        attention_map(2, 128, 256)
    with pytest.raises(ValueError, match="A and B overlap"):
        TmemMap((Region("A", 0, 64), Region("B", 32, 64)))
    with pytest.raises(ValueError, match="P is not inside A"):
        TmemMap((Region("A", 0, 64), Region("P", 32, 64, over="A")))


def test_budgets():
    assert plan().shared_bytes <= 227 << 10
    with pytest.raises(ValueError, match=r"shared memory: .*'K': 98304"):
        plan(k_stages=3)
    assert sum(32 * len(role.warps) * role.registers for role in plan().roles) <= 64 << 10


def test_arrive_counts_follow_from_the_roles():
    from cute_fmha.kernels.blackwell.pipelines import Barrier, Topology, prefill_topology

    topology = prefill_topology(plan())
    counts = {barrier.name: topology.arrivals(barrier.name) for barrier in topology.barriers}
    assert counts == {
        "q_full": 1, "q_empty": 1, "k_full": 1, "k_empty": 1, "v_full": 1, "v_empty": 1,
        "s_full": 1, "p_ready": 8, "p_last": 4, "scale_full": 4, "scale_empty": 4, "o_full": 1,
        "chunk_full": 4, "chunk_empty": 1,
    }  # fmt: skip
    roles = (Role("a", (0, 1), 64), Role("b", (2,), 64))
    with pytest.raises(ValueError, match="a has 2 warps, 'commit' is for one"):
        Topology(roles, (Barrier("x", 1, (("a", "commit"),)),))
    with pytest.raises(ValueError, match="no role c"):
        Topology(roles, (Barrier("x", 1, (("c", "warp"),)),))
    with pytest.raises(ValueError, match="every warp has one role"):
        Topology((Role("a", (0, 2), 64),), ())
