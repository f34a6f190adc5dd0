"""Barriers, phases and loop-carried values in a kernel; `topology` declares the barriers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import extract_mlir_values, new_from_mlir_values

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.topology import How, Topology


class Barriers:
    """The mbarriers in shared memory, as one role sees them."""

    def __init__(self, topology: Topology, base: Any, role: str | None = None) -> None:
        self.topology = topology
        self.base = base
        self.role = role

    def __extract_mlir_values__(self) -> list[Any]:
        return extract_mlir_values(self.base)

    def __new_from_mlir_values__(self, values: list[Any]) -> Barriers:
        return Barriers(self.topology, new_from_mlir_values(self.base, values), self.role)

    def of(self, role: str) -> Barriers:
        """As ``role`` sees them, from an address of its own: one for all roles lives from the entry
        of the kernel on and is spilled where one of them is short of registers."""
        address = ptx.opaque(self.base.toint())
        base = cute.make_ptr(Int64, address, cute.AddressSpace.smem, assumed_align=8)
        return Barriers(self.topology, base, role)

    def at(self, name: str, index: Any = 0) -> Any:
        """Pointer to the ``index``-th mbarrier of ``name``."""
        return self.base + self.topology.offset(name) + index

    def initialise(self) -> None:
        """Set every arrive count. One thread; `cute.arch.mbarrier_init_fence` comes after."""
        for barrier in self.topology.barriers:
            for index in range(barrier.count):
                cute.arch.mbarrier_init(
                    self.at(barrier.name, index), self.topology.arrivals(barrier.name)
                )

    def place(self, name: str, index: Any = 0) -> tuple[Int32, int]:
        """The address of an mbarrier, as a register and a number."""
        start = self.topology.offset(name)
        if isinstance(index, int):
            return self.base.toint(), 8 * (start + index)
        return self.base.toint() + index * 8, 8 * start

    def wait(self, name: str, phase: Any, index: Any = 0) -> None:
        """Wait until the phase of that parity is complete."""
        ptx.mbarrier_wait(*self.place(name, index), phase)

    def test(self, name: str, phase: Any, index: Any = 0) -> Any:
        """Whether the phase of that parity is complete."""
        return cute.arch.mbarrier_test_wait(self.at(name, index), phase)

    def _check(self, name: str, how: How) -> None:
        if (self.role, how) not in self.topology.barrier(name).signals:
            raise ValueError(
                f"{self.role} signals {name} by {how!r}, declared are "
                f"{self.topology.barrier(name).signals}"
            )

    def arrive(self, name: str, index: Any = 0) -> None:
        """Arrive for this warp, after all its lanes have got here; or every thread for itself, as
        the barrier is declared."""
        if (self.role, "thread") in self.topology.barrier(name).signals:
            cute.arch.mbarrier_arrive(self.at(name, index))
            return
        self._check(name, "warp")
        self._arrive_warp(name, index)

    def tell(self, name: str, warp: Any) -> None:
        """Tell the hearer of a meeting; ``warp``: of all the teller's. What this warp wrote to
        shared memory is there when it is heard."""
        ptx.barrier_arrive(self.topology.first_named(name) + warp, 64)

    def hear(self, name: str, warp: Any) -> None:
        """Wait for ``warp``, of all the teller's, at a meeting."""
        ptx.barrier_sync(self.topology.first_named(name) + warp, 64)

    def arrive_each(self, name: str, index: Any = 0) -> None:
        """Likewise, at a barrier of all groups."""
        self._check(name, "each")
        self._arrive_warp(name, index)

    def _arrive_warp(self, name: str, index: Any) -> None:
        cute.arch.sync_warp()
        ranks = {"first": (0,), "both": (0, 1)}.get(self.topology.barrier(name).to, ())
        if ranks and self.topology.ctas == 2:
            ptx.mbarrier_arrive_cluster(*self.place(name, index), ranks)
            return
        with cute.arch.elect_one():
            self._arrive(name, index)

    def arrive_elected(self, name: str, index: Any = 0) -> None:
        """Arrive for this warp from one lane, after the caller has synchronised the warp."""
        self._check(name, "warp")
        self._arrive(name, index)

    def arrive_leader(self, name: str, index: Any = 0) -> None:
        """Arrive for the whole group. One warp calls it."""
        self._check(name, "leader")
        with cute.arch.elect_one():
            self._arrive(name, index)

    def _arrive(self, name: str, index: Any) -> None:
        """Arrive where the barrier's ``to`` says. One thread."""
        to, bar = self.topology.barrier(name).to, self.at(name, index)
        if self.topology.ctas == 1 or to == "own":
            cute.arch.mbarrier_arrive(bar)
            return
        rank = cute.arch.block_idx_in_cluster()
        targets = {"first": (Int32(0),), "other": (rank ^ 1,), "both": (rank, rank ^ 1)}[to]
        for target in targets:
            cute.arch.mbarrier_arrive(bar, target, scope=nvvm.MemScopeKind.CLUSTER)

    def arrive_tmem(self, name: str, index: Any = 0) -> None:
        """`arrive`, ordered after this warp's completed TMEM loads and stores."""
        ptx.tcgen05_fence_before()
        self.arrive(name, index)

    def wait_tmem(self, name: str, phase: Any, index: Any = 0) -> None:
        """`wait`, with later TMEM accesses and MMAs ordered after it."""
        self.wait(name, phase, index)
        ptx.tcgen05_fence_after()

    def commit(self, name: str, index: Any = 0) -> None:
        """Have the tensor core arrive when all MMAs issued so far are complete."""
        self._check(name, "commit")
        ptx.tcgen05_commit(*self.place(name, index), self.topology.ctas == 2)

    def committing(self, name: str, index: Any = 0) -> tuple[Int32, int]:
        """`place`, for MMAs that commit themselves."""
        self._check(name, "commit")
        return self.place(name, index)

    def expect(self, name: str, size: int, index: Any = 0) -> Any:
        """Arrive and announce ``size`` bytes, in a pair those of both CTAs where the barrier is the
        first one's; returns the mbarrier for the copies."""
        self._check(name, "bytes")
        ptx.mbarrier_expect(*self.place(name, index), size, self.topology.of_first(name))
        return self.at(name, index)

    def expect_elected(self, name: str, size: int, index: Any = 0) -> Any:
        """`expect`, by the lane that the caller has elected."""
        self._check(name, "bytes")
        cute.arch.mbarrier_arrive_and_expect_tx(self.at(name, index), size)
        return self.at(name, index)


def meet(ctas: int) -> None:
    """Wait for all threads of the cluster."""
    if ctas == 2:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


def _number(value: Any) -> Any:
    """``value``, possibly a bare IR value, as the CuTe number of its type."""
    if isinstance(value, Int32 | Float32):
        return value
    return Float32(value) if str(value.type) == "f32" else Int32(value)


class Carried:
    """A dataclass of run-time numbers that loops and branches of a kernel carry along."""

    def __extract_mlir_values__(self) -> list[Any]:
        numbers = (_number(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return [number.ir_value() for number in numbers]

    def __new_from_mlir_values__(self, values: list[Any]) -> Any:
        return type(self)(*map(_number, values))


class Fixed:
    """An object that loops and branches of a kernel use, and in which they change nothing."""

    def __extract_mlir_values__(self) -> list[Any]:
        return []

    def __new_from_mlir_values__(self, values: list[Any]) -> Any:
        return self


class Cursor:
    """A place in a ring of ``stages`` buffers: ``index``, and the parity of its next full phase."""

    def __init__(self, stages: int, index: Any = None, phase: Any = None) -> None:
        self.stages = stages
        self.index = Int32(0) if index is None else index
        self.phase = Int32(0) if phase is None else phase

    @property
    def empty_phase(self) -> Any:
        """Parity a producer waits for: the first pass finds every buffer empty."""
        return self.phase ^ 1

    def next(self) -> Cursor:
        if self.stages == 1:
            return Cursor(1, self.index, self.phase ^ 1)
        if self.stages == 2:
            return Cursor(2, self.index ^ 1, self.phase ^ self.index)
        following = self.index + 1
        if self.stages == 4:
            return Cursor(4, following & 3, self.phase ^ (following >> 2))
        wraps = following == self.stages
        index = cutlass.select_(wraps, Int32(0), following)
        return Cursor(self.stages, index, self.phase ^ Int32(wraps))

    def __extract_mlir_values__(self) -> list[Any]:
        return [self.index.ir_value(), self.phase.ir_value()]

    def __new_from_mlir_values__(self, values: list[Any]) -> Cursor:
        return Cursor(self.stages, Int32(values[0]), Int32(values[1]))
