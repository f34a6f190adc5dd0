"""Where work tiles are cut, and what their partial results take: host arithmetic without CuTe DSL.

What a cut means is in `worklist`, what happens to partial results in `splitkv`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

COLUMNS = 16
"""Columns of a row that a thread reduces at a time."""

STARTED, LEFT, WORDS = 0, 1, 2
"""int32 counters: CTAs that have started, CTAs that have left; from there on a word for each work
tile that may be cut."""


class Cut(enum.Enum):
    """WHOLE: nowhere. FIXED: every work tile into the same number of parts. SHARE: where the shares
    of the workers end."""

    WHOLE = "whole"
    FIXED = "fixed"
    SHARE = "share"


@dataclass(frozen=True)
class Cutting:
    """What is known when a kernel is compiled: rows of a work tile, keys of a KV tile, which window
    sides there are; for SHARE the cost of beginning a work tile and the least piece, in KV tiles;
    whether there may be several KV heads.
    """

    cut: Cut
    rows: int
    tile_n: int
    window_left: bool = False
    window_right: bool = False
    overhead: int = 2
    least: int = 2
    kv_heads: bool = False

    def __post_init__(self) -> None:
        if self.overhead < 1 or self.least < 1:
            raise ValueError(
                "places on the line are distinct and pieces are not empty: overhead and least are "
                f"at least 1; got {self.overhead} and {self.least}"
            )


@dataclass(frozen=True)
class Slots:
    """Partial results of ``rows`` rows a CTA, of ``ranks`` CTAs to a worker.

    A slot has O, m ``[rows]``, l ``[rows]``, the number of the stayer, and fills 16 bytes. O is
    ``[Dv / 4, rows, 4]`` with ``row_minor``, for writers whose lanes have a row each, else
    ``[rows, Dv]``; either way the lanes of a warp write and read neighbouring 16 bytes or more.
    ``at_a_time``: pieces whose loads a thread has in flight, `COLUMNS` registers each.
    """

    rows: int
    head_dim_v: int
    row_minor: bool
    ranks: int = 1
    at_a_time: int = 4

    def __post_init__(self) -> None:
        units = self.rows * self.head_dim_v // COLUMNS
        if self.head_dim_v % COLUMNS or units % 32 or self.rows % 4:
            raise ValueError(
                f"{self.rows} rows of {self.head_dim_v} columns are no multiple of 32 units of "
                f"{COLUMNS} columns and 4 rows"
            )

    @property
    def slot_floats(self) -> int:
        return self.rows * (self.head_dim_v + 2) + 4

    def floats(self, cut: Cut, workers: int, work_tiles: int, num_splits: int) -> int:
        """FP32 elements of workspace that a launch needs."""
        slots = {Cut.WHOLE: 0, Cut.FIXED: work_tiles * num_splits, Cut.SHARE: 2 * workers}[cut]
        return slots * self.ranks * self.slot_floats

    def counters(self, cut: Cut, workers: int, work_tiles: int) -> int:
        """int32 counters that a launch needs."""
        if cut is Cut.WHOLE:
            return 0
        return WORDS + self.ranks * (workers if cut is Cut.SHARE else work_tiles)
