"""A resource model: what a CTA asks of each unit of an SM, in cycles. A model, never a measurement.

The machine counts what a kernel does: FLOP of the tensor core, special-function operations, bytes
of shared memory and so on. Each count over the rate of its unit is the time that this unit alone
would need. No kernel is faster than the largest of them; how close it comes depends on overlap and
latencies, which are not in here. Rates are those of one SM of a B200 in one clock:

| unit | rate | source |
| --- | --- | --- |
| tensor core, 16-bit inputs | 8192 FLOP | FlashAttention-4 (arXiv 2603.05451), section 2.2: \
2.25 PFLOP/s over 148 SMs at 1.85 GHz |
| tensor core, 8-, 6- and 4-bit inputs of kind::f8f6f4 | 16384 FLOP | 4.5 PFLOP/s dense (NVIDIA, \
HGX B200), likewise |
| special functions (ex2, lg2, rcp, ...) | 16 | FlashAttention-4, section 2.2 (32 on a B300) |
| shared memory | 128 bytes | FlashAttention-4, section 2.2, measured there for reads |
| FP32 multiply-add (add, mul, fma) | 128 | 128 FP32 units an SM: 148 x 128 of them make the \
published 75 TFLOP/s at 1.98 GHz |
| device memory | 4324 bytes for all SMs | 8 TB/s (NVIDIA, HGX B200) at 1.85 GHz |
| issue | 4 warp instructions | one for each of the four schedulers |

The tensor core's and shared memory's shares of a tile agree with FlashAttention-4's own analysis
(its equations 1 to 3 and table 1), which the tests check.

The paper was read in a transcription. NVIDIA's figures for the B200 (8-bit rate, device memory,
clock and FP32) were taken from pages that repeat its datasheets, not from the datasheets.

Assumptions, all of which make the model rougher than a unit's real limit:

- Reads and writes of shared memory count alike, and bank conflicts do not count.
- An operand of the tensor core is read once by each instruction.
- `issue` counts PTX instructions but for register moves, most of which vanish in SASS; other
  instructions fuse or split there, too.
- Packed halves count as two FP32 operations.
- Device memory moves every distinct byte once, if the caller says how many there are; without
  that it takes no part, because what L2 absorbs is not modelled. Its time is that of the launch,
  over the waves of CTAs, one CTA on each of 148 SMs.
- Tensor memory takes no part: it has no published rate. Its bytes are among the counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cute_fmha.emulator.machine import Counters

CLOCK_HZ = 1.85e9
SMS = 148
ENGINE_TENSOR_FLOPS = 8192.0
"""The rate that the engine's `tensor_cycles` assume for 16-bit inputs (MACS_PER_CYCLE in mma.c)."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations or bytes per clock of one SM; the module's table has the sources."""

    tensor_flops: float = 8192.0  # 16-bit inputs; twice that for narrower ones
    special_functions: float = 16.0
    fp32: float = 128.0
    shared_bytes: float = 128.0
    memory_bytes: float = 8e12 / CLOCK_HZ  # of all SMs together
    issue: float = 4.0


B200 = Rates()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Modelled cycles of each unit for one CTA (or, after `per_tile`, one tile) on average."""

    cycles: Mapping[str, float]
    of: str = "CTA"

    @property
    def bottleneck(self) -> str:
        """The unit that needs the most cycles."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])

    @property
    def bound(self) -> float:
        """Its cycles: the model's lower bound."""
        return self.cycles[self.bottleneck]

    def per_tile(self, tiles: float) -> Estimate:
        """The same for each of a CTA's `tiles` KV tiles."""
        if tiles <= 0:
            raise ValueError(f"tiles must be positive; got {tiles}")
        return Estimate({unit: value / tiles for unit, value in self.cycles.items()}, "tile")

    def __str__(self) -> str:
        order = sorted(self.cycles.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{unit} {value:,.0f}" for unit, value in order)
        return f"modelled cycles per {self.of}: {parts}; bottleneck: {self.bottleneck}"


def estimate(
    counters: Counters,
    ctas: int,
    *,
    distinct_bytes: int | None = None,
    rates: Rates = B200,
) -> Estimate:
    """The model's verdict on a launch of `ctas` CTAs that together did what `counters` say.

    distinct_bytes: how many bytes of global memory the launch works on, for the time of the device
    memory; each counts once, unless the kernel asked for fewer.
    """
    if ctas < 1:
        raise ValueError(f"ctas must be at least 1; got {ctas}")
    c = counters
    issued = sum(count for name, count in c.by_class.items() if name != "move")
    shared = c.shared_read_bytes + c.shared_write_bytes + c.mma_shared_bytes  # TMA is among them
    cycles = {
        "tensor core": c.tensor_cycles * ENGINE_TENSOR_FLOPS / rates.tensor_flops,
        "special functions": c.mufu_ops / rates.special_functions,
        "FP32": c.fma_ops / rates.fp32,
        "shared memory": shared / rates.shared_bytes,
        "issue": issued / rates.issue,
    }
    cycles = {unit: value / ctas for unit, value in cycles.items()}
    if distinct_bytes is not None:
        moved = min(c.global_read_bytes + c.global_write_bytes, distinct_bytes)
        cycles["device memory"] = moved / rates.memory_bytes / max(1.0, ctas / SMS)
    return Estimate(cycles)
