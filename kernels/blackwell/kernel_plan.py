"""What the plans of all kernels have: warps with their roles, and memory, within what an SM has."""

from __future__ import annotations

from abc import ABC, abstractmethod

from cute_fmha.kernels.blackwell.plan import REGISTERS, SHARED_BYTES, Role
from cute_fmha.kernels.blackwell.tmem import TmemMap


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
