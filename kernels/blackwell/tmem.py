"""The TMEM map: named column ranges and their aliases, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

TMEM_COLUMNS = 512
"""32-bit columns of tensor memory per SM; each has 128 lanes."""


@dataclass(frozen=True)
class Region:
    """``columns`` 32-bit columns from ``start``; inside the region named ``over``, if any."""

    name: str
    start: int
    columns: int
    over: str | None = None

    @property
    def end(self) -> int:
        return self.start + self.columns


@dataclass(frozen=True)
class TmemMap:
    """Regions that do not overlap, except those declared to lie over another one."""

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        owners = [region for region in self.regions if region.over is None]
        for region in self.regions:
            if region.end > TMEM_COLUMNS:
                raise ValueError(
                    f"TMEM region {region.name} ends at column {region.end} of {TMEM_COLUMNS}"
                )
            if region.over is not None:
                owner = self[region.over]
                if region.start < owner.start or region.end > owner.end:
                    raise ValueError(f"TMEM region {region.name} is not inside {region.over}")
        for first, second in zip(
            sorted(owners, key=lambda r: r.start),
            sorted(owners, key=lambda r: r.start)[1:],
            strict=False,
        ):
            if first.end > second.start:
                raise ValueError(f"TMEM regions {first.name} and {second.name} overlap")

    def __getitem__(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    @property
    def columns(self) -> int:
        """Columns to allocate: a power of two, at least 32."""
        used = max(region.end for region in self.regions)
        return max(32, 1 << (used - 1).bit_length())


def attention_map(scores: int, q_tiles: int, tile_n: int, head_dim_v: int) -> TmemMap:
    """``scores`` times S, and O of every Q tile, in FP32; P in 16 bits over the upper half of its
    own S.

    With two Q tiles of 128 keys and Dv 128: S0 0–127, S1 128–255, O0 256–383, O1 384–511.
    """
    regions = [Region(f"S{i}", i * tile_n, tile_n) for i in range(scores)]
    regions += [
        Region(f"P{i}", i * tile_n + tile_n // 2, tile_n // 2, over=f"S{i}") for i in range(scores)
    ]
    first_o = scores * tile_n
    regions += [Region(f"O{i}", first_o + i * head_dim_v, head_dim_v) for i in range(q_tiles)]
    return TmemMap(tuple(regions))
