"""The plan of `mla_decode_small`: tiles, rings, warps, TMEM, barriers, all before tracing."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from cute_fmha.kernels.blackwell.pipelines import Barrier, Topology
from cute_fmha.kernels.blackwell.plan import OTHER_BYTES, SHARED_BYTES, Features, Role
from cute_fmha.kernels.blackwell.tmem import Region, TmemMap

BLOCK = 64
"""Columns of a block: 128 bytes of a row, the swizzle atom's width."""

PART_BLOCKS = 2
"""Blocks of a part."""

COLUMNS = BLOCK * PART_BLOCKS
"""Value columns of a part: the rows of one P V product, and one for each thread of a warpgroup."""

MOST_ROWS = 32
"""Above that Q and O would take the room that latents need."""

BOXES = (64, 32, 16, 8)
"""Tokens of a TMA box: a page is a multiple of it, unless a sequence is one page."""

GATHERED = 4
"""Tokens of a TMA gather: for pages of one token."""


@dataclass(frozen=True)
class SmallPlan:
    """Everything about one kernel.

    A tile is ``tile_n`` tokens, and comes in parts: the value columns in parts of 128, then the
    columns that only the keys have (rope). Parts are the stages of two rings.
    """

    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    features: Features
    rows: int = 16
    box: int = 64
    v_stages: int = 11
    r_stages: int = 2
    tile_n: int = 64
    rescale_threshold: float = 8.0

    def __post_init__(self) -> None:
        self.tmem  # noqa: B018  (its construction checks the map)
        if self.box not in (*BOXES, GATHERED):
            raise ValueError(f"a box has {BOXES} tokens, or {GATHERED}; got {self.box}")
        if self.rows not in (16, MOST_ROWS):
            raise ValueError(f"rows must be 16 or {MOST_ROWS}; got {self.rows}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"shared memory: {self.shared_bytes} bytes of {SHARED_BYTES} ({self.shared_parts})"
            )
        if self.v_stages < 2 * self.parts:
            raise ValueError(f"{self.v_stages} stages hold no two tiles of {self.parts} parts")

    @property
    def parts(self) -> int:
        """Parts of the value columns."""
        return self.head_dim_v // COLUMNS

    @property
    def boxes(self) -> int:
        """TMA boxes along the tokens of a tile."""
        return self.tile_n // self.box

    @property
    def gather(self) -> bool:
        """Tokens are fetched one by one, from a page each."""
        return self.box == GATHERED

    @property
    def rope_blocks(self) -> int:
        """Blocks of the columns that are no values: 1, or 0."""
        return (self.head_dim - self.head_dim_v) // BLOCK

    @property
    def block_bytes(self) -> int:
        """Bytes of the tokens of a tile in one block."""
        return self.tile_n * BLOCK * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        return PART_BLOCKS * self.block_bytes

    @property
    def p_bytes(self) -> int:
        """Bytes of the probabilities of a tile."""
        return self.tile_n * self.rows * self.dtype.itemsize

    @functools.cached_property
    def tmem(self) -> TmemMap:
        """Oᵀ of every part (128 lanes), then two buffers of Sᵀ (64 tokens in 16 lanes a warp).

        With 16 rows: O0 0–15, O1 16–31, O2 32–47, O3 48–63, S0 64–79, S1 80–95.
        """
        n = self.rows
        regions = [Region(f"O{p}", p * n, n) for p in range(self.parts)]
        regions += [Region(f"S{i}", (self.parts + i) * n, n) for i in range(2)]
        return TmemMap(tuple(regions))

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one role. Eight warps may have all the registers they like."""
        return (
            Role("softmax", (0, 1, 2, 3), 255),
            Role("mma", (4,), 255),
            Role("load", (5,), 255),
            Role("query", (6, 7), 255),
        )

    def role(self, name: str) -> Role:
        return next(role for role in self.roles if role.name == name)

    @property
    def threads(self) -> int:
        return 32 * sum(len(role.warps) for role in self.roles)

    @property
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""
        element = self.dtype.itemsize
        return {
            "Q": self.rows * self.head_dim * element,
            "V": self.v_stages * self.part_bytes,
            "rope": self.r_stages * self.rope_blocks * self.block_bytes,
            "P": 2 * self.p_bytes,
            "O": self.rows * COLUMNS * 4,
            "statistics": 4 * (4 + 4 + 1) * self.rows,
            "other": OTHER_BYTES,
        }

    @property
    def shared_bytes(self) -> int:
        return sum(self.shared_parts.values())


def topology(plan: SmallPlan) -> Topology:
    """The barriers of `mla_decode_small`.

        load  ── v_full, r_full ──> mma ── s_full ──> softmax
              <─ v_empty, r_empty ─     <─ p_full ───
        query ── q_full ──────────>     ── o_full ──>
              <─ q_empty ──────────

    s_full, p_full and o_full exist once per buffer. That the two S and the two P are free again
    needs no barrier: S(n + 2) is issued after P(n) was handed over, and complete after P V (n) is.
    """
    rope: tuple[Any, ...] = ()
    if plan.rope_blocks:
        rope = (
            Barrier("r_full", plan.r_stages, (("load", "bytes"),)),
            Barrier("r_empty", plan.r_stages, (("mma", "commit"),)),
        )
    return Topology(
        plan.roles,
        (
            Barrier("q_full", 1, (("query", "warp"),)),
            Barrier("q_empty", 1, (("mma", "commit"),)),
            Barrier("v_full", plan.v_stages, (("load", "bytes"),)),
            Barrier("v_empty", plan.v_stages, (("mma", "commit"),)),
            *rope,
            Barrier("s_full", 2, (("mma", "commit"),)),
            Barrier("p_full", 2, (("softmax", "warp"),)),
            Barrier("o_full", 2, (("mma", "commit"),)),
        ),
    )


@functools.cache
def make_small_plan(
    head_dim: int, head_dim_v: int, dtype: torch.dtype, out_dtype: torch.dtype,
    features: Features, rows: int, box: int = 64,
) -> SmallPlan:  # fmt: skip
    """As many stages as shared memory takes."""
    plan = SmallPlan(
        head_dim, head_dim_v, dtype, out_dtype, features, 16 if rows <= 16 else MOST_ROWS, box,
        v_stages=2 * head_dim_v // COLUMNS,
    )  # fmt: skip
    while True:
        try:
            plan = replace(plan, v_stages=plan.v_stages + 1)
        except ValueError:
            return plan
