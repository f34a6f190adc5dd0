"""The plan of `decode_transposed`: tiles, rings, warps, TMEM, all before tracing."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from cute_fmha.kernels.blackwell.cutting import Cut, Cutting, Slots
from cute_fmha.kernels.blackwell.epilogue import Leaving, Op
from cute_fmha.kernels.blackwell.kernel_plan import KernelPlan, Role
from cute_fmha.kernels.blackwell.plan import OTHER_BYTES, Features
from cute_fmha.kernels.blackwell.tmem import Region, TmemMap

BLOCK = 64
"""Columns of a block: 128 bytes of a row, the swizzle atom's width."""

PART_BLOCKS = 2
"""Blocks of a part of 128 columns."""

COLUMNS = BLOCK * PART_BLOCKS
"""Value columns of a part: the rows of one P V product, and one for each thread of a warpgroup."""

MOST_ROWS = 32
"""Above that Q and O would take the room that latents need."""

BOXES = (128, 64, 32, 16, 8)
"""Tokens of a TMA box: a page is a multiple of it, unless a sequence is one page."""

GATHERED = 4
"""Tokens of a TMA gather: for pages of one token."""


@dataclass(frozen=True)
class TransposedPlan(KernelPlan):
    """Everything about one kernel.

    A tile is ``tile_n`` tokens, and comes in parts: the value columns in parts of 128, then the
    columns that only the keys have (rope). Parts are the stages of two rings.

    With ``k_stages`` keys and values are two tensors of equal width, with any number of KV heads:
    the parts of the keys have a ring of their own, and no rope.
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
    k_stages: int = 0
    tile_n: int = 64
    depth: int = 2  # buffers of S and of P; S is made up to one tile less ahead of P V
    paged: bool = True
    cut: Cut = Cut.WHOLE
    rescale_threshold: float = 8.0
    op: Op = field(default_factory=Op)

    def __post_init__(self) -> None:
        if self.box not in (*BOXES, GATHERED):
            raise ValueError(f"a box has {BOXES} tokens, or {GATHERED}; got {self.box}")
        if self.rows not in (16, MOST_ROWS):
            raise ValueError(f"rows must be 16 or {MOST_ROWS}; got {self.rows}")
        super().__post_init__()
        if self.latent and self.v_stages < 2 * self.parts:
            raise ValueError(f"{self.v_stages} stages hold no two tiles of {self.parts} parts")

    @property
    def cutting(self) -> Cutting:
        """How work tiles are cut into pieces: a worker is a CTA."""
        features = self.features
        return Cutting(
            self.cut, self.rows, self.tile_n, features.window_left, features.window_right,
            overhead=128 // self.tile_n, least=128 // self.tile_n, kv_heads=not self.latent,
        )  # fmt: skip

    @property
    def slots(self) -> Slots:
        """Partial results: a thread writes neighbouring columns of a row."""
        return Slots(self.rows, self.head_dim_v, row_minor=False)

    @property
    def leaving(self) -> Leaving:
        """What is stored of a row."""
        return Leaving(self.op, self.out_dtype, self.head_dim_v)

    @property
    def latent(self) -> bool:
        """The first columns of the keys are the values."""
        return self.k_stages == 0

    @property
    def columns(self) -> int:
        """Value columns of a part: rows of a P V product, 128 or 64."""
        return min(COLUMNS, self.head_dim_v)

    @property
    def part_blocks(self) -> int:
        return self.columns // BLOCK

    @property
    def parts(self) -> int:
        """Parts of the value columns, and of keys that are a tensor of their own."""
        return self.head_dim_v // self.columns

    @property
    def s_ring(self) -> str:
        """The ring of what S is made from first: the values, too, or keys alone."""
        return "v" if self.latent else "k"

    @property
    def s_stages(self) -> int:
        return self.v_stages if self.latent else self.k_stages

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
        return self.part_blocks * self.block_bytes

    @property
    def p_bytes(self) -> int:
        """Bytes of the probabilities of a tile."""
        return self.tile_n * self.rows * self.dtype.itemsize

    @functools.cached_property
    def tmem(self) -> TmemMap:
        """Oᵀ of every part (128 lanes), then buffers of Sᵀ. Of 64 rows every warp has 16 in its
        first 16 lanes.

        MLA with 16 rows: O0 0–15, O1 16–31, O2 32–47, O3 48–63, S0 64–79, S1 80–95.
        """
        n = self.rows
        regions = [Region(f"O{p}", p * n, n) for p in range(self.parts)]
        regions += [Region(f"S{i}", (self.parts + i) * n, n) for i in range(self.depth)]
        return TmemMap(tuple(regions))

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one role. Eight warps may have all the registers they like."""
        rest: tuple[Role, ...] = (Role("query", (6, 7), 255),)
        if not self.latent:
            rest = (Role("query", (6,), 255), Role("load_values", (7,), 255))
        return (
            Role("softmax", (0, 1, 2, 3), 255),
            Role("mma", (4,), 255),
            Role("load", (5,), 255),
            *rest,
        )

    @property
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""
        element = self.dtype.itemsize
        return {
            "Q": self.rows * self.head_dim * element,
            "V": self.v_stages * self.part_bytes,
            "K": self.k_stages * self.part_bytes,
            "rope": self.r_stages * self.rope_blocks * self.block_bytes,
            "P": self.depth * self.p_bytes,
            "O": self.rows * self.columns * 4,
            "statistics": 4 * (4 + 4 + 1 + 4 * self.features.max_logits) * self.rows,
            "other": OTHER_BYTES,
        }


def box_of(page_size: int, one_page: bool = False, tile_n: int = 64) -> int:
    """Tokens of a TMA box for pages of that size; 0 when there is no plan. ``one_page``: every
    sequence is one page, whatever its size."""
    if one_page:
        return tile_n
    if page_size == 1:
        return GATHERED
    return next((b for b in BOXES if b <= tile_n and page_size > 0 and page_size % b == 0), 0)
