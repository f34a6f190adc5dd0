"""The plan of the MLA decode kernel for many heads: frozen, resolved in full before tracing."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from cute_fmha.kernels.blackwell.cutting import Cut, Cutting, Slots
from cute_fmha.kernels.blackwell.epilogue import Leaving, Op, unsuited
from cute_fmha.kernels.blackwell.kernel_plan import REGISTERS, KernelPlan, Role, unsuited_inputs
from cute_fmha.kernels.blackwell.plan import Features
from cute_fmha.kernels.blackwell.tmem import TMEM_COLUMNS, Region, TmemMap
from cute_fmha.kernels.blackwell.topology import Barrier, Topology
from cute_fmha.problem import MLA_HEAD_DIMS, Problem, Target

ROWS = 64
"""Query rows (position × head) of a CTA; the other 64 lanes of TMEM hold other columns of them."""

KEYS = 64
"""Latent rows of a tile that a CTA fetches."""

UNIT = 64
"""Columns of a latent row that lie together: the 128 bytes of a swizzle atom."""

UNIT_BYTES = 64 * 128
"""64 rows of a unit, of the latent, of Q or of P."""

OTHER_BYTES = 3072
"""Shared memory kept for barriers, statistics and alignment."""


@dataclass(frozen=True)
class MlaPlan(KernelPlan):
    """Tiles, stages, warps, registers and memory of one kernel.

    A work tile is up to 64 rows of one sequence on one CTA, or up to 128 on a ``pair``. The latent
    arrives in halves of 256 columns, which are a stage each, and rope columns in a ring of their
    own. ``page_size`` 0: known when the kernel runs, and no tile reaches into two pages.
    """

    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    features: Features
    page_size: int = 64
    pair: bool = False
    cut: Cut = Cut.WHOLE
    stages: int = 5
    rope_stages: int = 2
    p_stages: int = 2
    o_stages: int = 1
    rescale_threshold: float = 8.0
    op: Op = field(default_factory=Op)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 4:
            raise ValueError("S of the next tile is made before P V of this one: 4 halves at least")

    # ------------------------------------------------------------------ tiles

    @property
    def ctas(self) -> int:
        """CTAs to a work tile."""
        return 2 if self.pair else 1

    @property
    def rows(self) -> int:
        """Rows of a work tile."""
        return ROWS * self.ctas

    @property
    def tile_n(self) -> int:
        """Keys of a KV tile; each CTA fetches 64 of them."""
        return KEYS * self.ctas

    @property
    def p_units(self) -> int:
        """Units of a tile of P: 64 rows × 64 keys."""
        return self.tile_n // UNIT

    @property
    def cutting(self) -> Cutting:
        """How work tiles are cut into pieces; a worker is a cluster."""
        features = self.features
        # 128 keys to begin a work tile, and for the least piece.
        few = 128 // self.tile_n
        return Cutting(
            self.cut, self.rows, self.tile_n, features.window_left, features.window_right, few, few
        )

    @property
    def slots(self) -> Slots:
        """Partial results: a thread that writes them has a row."""
        return Slots(ROWS, self.head_dim_v, row_minor=True, ranks=self.ctas)

    @property
    def s_columns(self) -> int:
        """Columns of S: the keys of a tile, folded over both halves of the lanes."""
        return self.tile_n // 2

    @property
    def units(self) -> int:
        """Units of a K row."""
        return self.head_dim // UNIT

    @property
    def half_units(self) -> int:
        """Units of half a V row: one stage."""
        return self.head_dim_v // 2 // UNIT

    @property
    def half_bytes(self) -> int:
        return self.half_units * UNIT_BYTES

    @property
    def rope(self) -> bool:
        """K rows are longer than V rows."""
        return self.head_dim > self.head_dim_v

    @property
    def q_tmem_units(self) -> int:
        """Units of Q that TMEM has columns for, two values to a column."""
        free = TMEM_COLUMNS - self.head_dim_v // 2 - self.s_columns
        return min(self.units, free // (UNIT // 2))

    @property
    def q_shared_units(self) -> int:
        return self.units - self.q_tmem_units

    @functools.cached_property
    def tmem(self) -> TmemMap:
        """O and S fold their columns over both halves of the lanes; Q is there twice.

        At 576/512: O 0–255, S 256–287, Q 288–511 (its first 448 columns); a pair, whose tiles have
        twice the keys: S 256–319, Q 320–511 (384 columns).
        """
        o_end = self.head_dim_v // 2
        s_end = o_end + self.s_columns
        return TmemMap(
            (
                Region("O", 0, o_end),
                Region("S", o_end, self.s_columns),
                Region("Q", s_end, self.q_tmem_units * UNIT // 2),
            )
        )

    def value_column(self, column: int, half: Any) -> Any:
        """The column of a V row that TMEM column ``column`` of O has in a half of the lanes."""
        if self.pair:
            return half * self.head_dim_v // 2 + column
        quarter = self.head_dim_v // 4
        return column // quarter * 2 * quarter + half * quarter + column % quarter

    # ------------------------------------------------------------------ pages and TMA boxes

    @property
    def gather(self) -> bool:
        """Pages of one row are gathered, four with a TMA instruction."""
        return self.page_size == 1

    @property
    def box_rows(self) -> int:
        """Latent rows of a TMA instruction: pages shorter than a tile are fetched one by one."""
        return 4 if self.gather else min(self.page_size or KEYS, KEYS)

    @property
    def boxes(self) -> int:
        """TMA boxes along the rows of a tile."""
        return KEYS // self.box_rows

    @property
    def box_units(self) -> int:
        """Units of a TMA box of latent columns: half a row where a box has all rows of the tile."""
        return self.half_units if self.box_rows == KEYS else 1

    # ------------------------------------------------------------------ warps

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one role."""
        counts = (192, 160, 72) if self.pair else (232, 152, 120)
        swap = (Role("swap", (12, 13), 88), Role("aside", (14, 15), 88)) if self.pair else ()
        return (
            Role("softmax", (0, 1, 2, 3), counts[0]),
            Role("epilogue", (4, 5, 6, 7), counts[1]),
            Role("mma", (8,), counts[2]),
            Role("load", (9,), counts[2]),
            Role("store", (10,), counts[2]),
            Role("idle", (11,), counts[2]),
            *swap,
        )

    @property
    def first_registers(self) -> int:
        """Registers that a thread starts with: as many as all can have, a multiple of 8."""
        return REGISTERS // self.threads // 8 * 8

    # ------------------------------------------------------------------ memory

    @property
    def runs(self) -> int:
        """Runs of neighbouring value columns in a half of the lanes; see `value_column`."""
        return 1 if self.pair else 2

    @property
    def leaving(self) -> Leaving:
        """How a run of a row leaves."""
        return Leaving(self.op, self.out_dtype, self.head_dim_v // 2 // self.runs)

    @property
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""
        return {
            "latent": self.stages * self.half_bytes,
            "rope": self.rope_stages * UNIT_BYTES * self.rope,
            "P": self.p_stages * self.p_units * UNIT_BYTES,
            "Q": self.q_shared_units * UNIT_BYTES,
            "O": self.o_stages * 2 * ROWS * self.leaving.chunk_bytes,
            "other": OTHER_BYTES,
        }


def make_plan(
    head_dim: int, dtype: torch.dtype, out_dtype: torch.dtype, features: Features, page_size: int,
    rows: int, cut: Cut = Cut.WHOLE, op: Op | None = None,
) -> MlaPlan:  # fmt: skip
    """The plan for sequences of ``rows`` rows: a pair of CTAs where there are more than 64."""
    pair = rows > ROWS
    page_size = page_size if page_size in (1, 16, 32, 64, 128) else 0
    return MlaPlan(
        head_dim, 512, dtype, out_dtype, features, page_size, pair, cut,
        rope_stages=1 if pair else 2, p_stages=1 if pair else 2, op=op or Op(),
    )  # fmt: skip


def topology(plan: MlaPlan) -> Topology:
    """The barriers of `mla_decode`; in a pair mma runs on the first CTA.

    load ── k_full, rope_full ──> mma ── s_full ──────────> softmax ── stats_full ──> epilogue
         <─ k_empty, rope_empty ─     <─ s_empty, p_ready ─         <─ stats_empty ──
                                      ── pv_done ─────────>
                                      <─ q_full ───────────
                                      ── o_full ─────────────────────────────────> epilogue
                                      <─ o_empty ─────────────────────────────────
    epilogue ── chunk_full ──> store,   epilogue <── chunk_empty ── store

    and in a pair: mma ── s_full ──> swap ── swapped ──> mma,   swap ── given ──> the other's swap
    ── moved ──> swap,
    with skips: softmax ── voted ──> softmax, swap and mma of both.
    """
    more = []
    if plan.rope:
        more = [
            Barrier("rope_full", plan.rope_stages, (("load", "bytes"),), "first"),
            Barrier("rope_empty", plan.rope_stages, (("mma", "commit"),)),
        ]
    if plan.pair:
        more += [
            # The other CTA has half of what it gives away in registers: one may copy there.
            Barrier("given", 1, (("swap", "warp"),), "other"),
            # The copy has arrived, so that the other CTA's half of it may be overwritten.
            Barrier("moved", 1, (("swap", "bytes"),)),
            # V is where P V expects it, or the tile is skipped. By turns, like all that a warp may
            # signal for a tile when another has not yet done so for the last.
            Barrier("swapped", 2, (("swap", "warp"),), "first"),
        ]
        if plan.features.skip:
            more.append(Barrier("voted", 2, (("softmax", "leader"),), "both"))
    return Topology(
        plan.roles,
        (
            Barrier("k_full", plan.stages, (("load", "bytes"),), "first"),
            Barrier("k_empty", plan.stages, (("mma", "commit"),)),
            *more,
            # Q is in TMEM and shared memory. It is free when the softmax has the last S.
            Barrier("q_full", 1, (("softmax", "warp"),), "first"),
            # By turns: the swap may look at it when S of the next tile is complete, too.
            Barrier("s_full", 2, (("mma", "commit"),)),
            # S is in registers.
            Barrier("s_empty", 1, (("softmax", "warp"),), "first"),
            # The decision on a tile is made; if it is kept, P is stored and O is rescaled. By
            # turns: a warp may be done with the next tile when another one is not with this.
            Barrier("p_ready", 2, (("softmax", "warp"),), "first"),
            # P V of a kept tile is complete: P may be overwritten, O rescaled.
            Barrier("pv_done", plan.p_stages, (("mma", "commit"),)),
            Barrier("stats_full", 1, (("softmax", "warp"),)),
            Barrier("stats_empty", 1, (("epilogue", "warp"),)),
            Barrier("o_full", 1, (("mma", "commit"),)),
            Barrier("o_empty", 1, (("epilogue", "warp"),), "first"),
            Barrier("chunk_full", plan.o_stages, (("epilogue", "warp"),)),
            Barrier("chunk_empty", plan.o_stages, (("store", "warp"),)),
        ),
        plan.ctas,
    )


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why the kernel cannot run ``problem`` on ``target``; None when it can."""
    page, kernel = problem.page_size, "the MLA decode kernel"
    reason = unsuited_inputs(problem, target, kernel, "mla_decode", MLA_HEAD_DIMS)
    if reason is not None:
        return reason
    if page not in (1, 16, 32, problem.seqlen_k) and (page == 0 or page % KEYS):
        return (
            f"{kernel} takes pages of 1, 16, 32 or a multiple of 64 rows, or one page a sequence; "
            f"got {page}"
        )
    if problem.seqlen_q == 0 or problem.batch == 0:
        return f"{kernel} needs at least one sequence and query"
    return unsuited(problem)
