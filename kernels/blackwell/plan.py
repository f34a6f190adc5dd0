"""The plan of a Blackwell prefill launch: frozen, resolved in full before tracing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cute_fmha.kernels.blackwell.tmem import TmemMap, attention_map
from cute_fmha.problem import Problem, Target

SHARED_BYTES = 227 << 10
"""Dynamic shared memory that one CTA may have."""

REGISTERS = 64 << 10
"""32-bit registers of an SM; a CTA of this kernel takes them all."""

CHUNK_BYTES = 128
"""Bytes of an output row that leave together: one 128-byte swizzle atom."""


@dataclass(frozen=True)
class Role:
    """Warps with one task, and the registers each of their threads has.

    The unit of ``setmaxnreg`` is a warpgroup: roles that share one have the same count. With
    ``groups`` the warps form equal groups, one per Q tile; a group signals its own barriers only.
    """

    name: str
    warps: tuple[int, ...]
    registers: int
    groups: int = 1

    @property
    def group_warps(self) -> int:
        return len(self.warps) // self.groups


@dataclass(frozen=True)
class Features:
    """What is compiled in. Presence is compile time; bounds and thresholds are run time."""

    window_left: bool = False
    window_right: bool = False
    lse: bool = True
    skip: bool = False
    count: bool = False


@dataclass(frozen=True)
class Plan:
    """Tiles, stages, warps, registers and memory of one kernel.

    A work tile is ``q_tiles`` × ``tile_m`` rows of one query head: each Q tile has its own softmax
    warpgroup and its own range of KV tiles, the fetched K and V serve all of them.
    """

    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    features: Features
    tile_m: int = 128
    tile_n: int = 128
    q_tiles: int = 2
    k_stages: int = 2
    v_stages: int = 2
    o_stages: int = 2
    rescale_threshold: float = 8.0

    def __post_init__(self) -> None:
        self.tmem  # noqa: B018  (its construction checks the map)
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"shared memory: {self.shared_bytes} bytes of {SHARED_BYTES} ({self.shared_parts})"
            )
        registers = sum(32 * len(role.warps) * role.registers for role in self.roles)
        if registers > REGISTERS:
            raise ValueError(f"registers: {registers} of {REGISTERS}")

    @functools.cached_property
    def tmem(self) -> TmemMap:
        return attention_map(self.q_tiles, self.tile_n, self.head_dim_v)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one role."""
        return (
            Role("softmax", tuple(range(4 * self.q_tiles)), 192, groups=self.q_tiles),
            Role("correction", (8, 9, 10, 11), 80),
            Role("mma", (12,), 48),
            Role("load", (13,), 48),
            Role("epilogue", (14,), 48),
            Role("idle", (15,), 48),
        )

    def role(self, name: str) -> Role:
        return next(role for role in self.roles if role.name == name)

    @property
    def threads(self) -> int:
        return 32 * sum(len(role.warps) for role in self.roles)

    @property
    def work_rows(self) -> int:
        return self.q_tiles * self.tile_m

    @property
    def chunk(self) -> int:
        """Columns of the output that leave together."""
        return CHUNK_BYTES // self.out_dtype.itemsize

    @property
    def chunks(self) -> int:
        return self.head_dim_v // self.chunk

    @property
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""
        element = self.dtype.itemsize
        return {
            "Q": self.q_tiles * self.tile_m * self.head_dim * element,
            "K": self.k_stages * self.tile_n * self.head_dim * element,
            "V": self.v_stages * self.tile_n * self.head_dim_v * element,
            "O": self.o_stages * self.tile_m * CHUNK_BYTES,
            "statistics": self.q_tiles * self.tile_m * 2 * 4,
            "barriers": 512,
        }

    @property
    def shared_bytes(self) -> int:
        return sum(self.shared_parts.values())


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why the prefill kernel cannot run ``problem`` on ``target``; None when it can."""
    if target.device_type != "cuda" or target.arch not in (100, 103):
        return "the Blackwell kernels need compute capability 10.0 or 10.3"
    if problem.op != "attention":
        return f"the prefill kernel has no {problem.op}"
    return None
