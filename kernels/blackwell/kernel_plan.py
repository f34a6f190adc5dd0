"""What the plans of all kernels have: warps with their roles, and memory, within what an SM has;
and what all kernels ask of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from cute_fmha.kernels.blackwell.tmem import TmemMap
from cute_fmha.problem import Problem, Target

SHARED_BYTES = 227 << 10
"""Dynamic shared memory that one CTA may have."""

REGISTERS = 64 << 10
"""32-bit registers of an SM; a CTA of these kernels may take them all."""


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


class KernelPlan(ABC):
    """The base of a plan, which is a frozen dataclass and checked when it is made."""

    def __post_init__(self) -> None:
        self.tmem  # noqa: B018  (its construction checks the map)
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"shared memory: {self.shared_bytes} bytes of {SHARED_BYTES} ({self.shared_parts})"
            )
        registers = sum(32 * len(role.warps) * role.registers for role in self.roles)
        if registers > REGISTERS:
            raise ValueError(f"registers: {registers} of {REGISTERS}")

    @property
    @abstractmethod
    def tmem(self) -> TmemMap:
        """Named columns of TMEM."""

    @property
    @abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one."""

    @property
    @abstractmethod
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""

    def role(self, name: str) -> Role:
        return next(role for role in self.roles if role.name == name)

    @property
    def threads(self) -> int:
        return 32 * sum(len(role.warps) for role in self.roles)

    @property
    def shared_bytes(self) -> int:
        return sum(self.shared_parts.values())


def unsuited_target(target: Target) -> str | None:
    """Why no Blackwell kernel runs on ``target``; None when they do."""
    cuda = target.device_type == "cuda"
    if cuda and target.arch in (100, 103):
        return None
    got = target.arch / 10 if cuda else target.device_type
    return f"the Blackwell kernels need compute capability 10.0 or 10.3; got {got}"


def unsuited_inputs(
    problem: Problem, target: Target, kernel: str, op: str, head_dims: tuple[tuple[int, int], ...]
) -> str | None:
    """Why ``kernel``, which computes ``op`` for such (D, Dv), cannot take the problem's inputs on
    ``target``; None when nothing of that stands against it."""
    dims = (problem.head_dim, problem.head_dim_v)
    if (reason := unsuited_target(target)) is not None:
        return reason
    if problem.op != op:
        return f"{kernel} has no {problem.op}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"{kernel} takes bfloat16 and float16; got {problem.dtype}"
    if dims not in head_dims:
        return f"{kernel} has (D, Dv) in {head_dims}; got {dims}"
    return None
