"""Barriers: declared once with who signals them, checked on the host, used by name in the kernel.

A barrier is named by the state it announces. Its arrive count is not written down anywhere: it
follows from the roles that signal it and from how they do it.

    how          who arrives
    "warp"       one lane of every warp of the role (of the group), after the warp has synchronised
    "thread"     every thread of the role (of the group), each for what it did itself: the machine
                 makes one arrival of a warp's, and nobody is elected
    "each"       likewise of every warp of the role, of all groups
    "leader"     one lane of one warp of the role
    "commit"     the tensor core, when all MMAs issued before have completed
    "bytes"      one lane of the role; the phase also waits for the announced bytes of TMA loads
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cute_fmha.kernels.blackwell.kernel_plan import Role
from cute_fmha.kernels.blackwell.plan import GROUPS, WORK_STAGES, Plan

How = Literal["warp", "thread", "each", "leader", "commit", "bytes"]
To = Literal["own", "first", "other", "both"]


@dataclass(frozen=True)
class Barrier:
    """``count`` mbarriers that announce the state ``name``, each signalled as ``signals`` says:
    (role, how) pairs.

    In a pair of CTAs each has its own mbarriers. ``to`` says whose a role arrives at: its own
    CTA's, the first CTA's (both CTAs' roles do, and count), the other CTA's, or both (and both
    count).
    """

    name: str
    count: int
    signals: tuple[tuple[str, How], ...]
    to: To = "own"


@dataclass(frozen=True)
class Meeting:
    """Named barriers of the hardware, at each of which a warp of ``teller`` and one of ``hearer``
    meet: warp w of each of the teller's groups, and warp w of the hearer. Only the latter waits.
    They have no phase to keep, and must not be told again before they were heard."""

    name: str
    teller: str
    hearer: str


NAMED_BARRIERS = 16
"""Named barriers of a CTA; the first is that of all its threads."""


@dataclass(frozen=True)
class Topology:
    """All barriers of a kernel of ``ctas`` CTAs to a cluster, one or two. With two, the tensor core
    works for both: its commits arrive in both CTAs."""

    roles: tuple[Role, ...]
    barriers: tuple[Barrier, ...]
    ctas: int = 1
    meetings: tuple[Meeting, ...] = ()

    def __post_init__(self) -> None:
        names = [barrier.name for barrier in self.barriers]
        names += [meeting.name for meeting in self.meetings]
        if len(set(names)) != len(names):
            raise ValueError(f"a barrier is declared twice: {names}")
        roles = {role.name: role for role in self.roles}
        warps = [warp for role in self.roles for warp in role.warps]
        if sorted(warps) != list(range(len(warps))):
            raise ValueError(f"every warp has one role; got {self.roles}")
        for barrier in self.barriers:
            for role, how in barrier.signals:
                if role not in roles:
                    raise ValueError(f"barrier {barrier.name}: no role {role}")
                if how == "commit" and len(roles[role].warps) != 1:
                    raise ValueError(
                        f"barrier {barrier.name}: {role} has {len(roles[role].warps)} warps, "
                        f"{how!r} is for one"
                    )
                if how != "each" and barrier.count % roles[role].groups:
                    raise ValueError(
                        f"barrier {barrier.name}: {barrier.count} of them, but {role} has "
                        f"{roles[role].groups} groups"
                    )
        for meeting in self.meetings:
            teller, hearer = roles[meeting.teller], roles[meeting.hearer]
            if teller.group_warps != len(hearer.warps):
                raise ValueError(
                    f"meeting {meeting.name}: {teller.group_warps} warps of {teller.name} tell "
                    f"{len(hearer.warps)} of {hearer.name}"
                )
        if self.named > NAMED_BARRIERS:
            raise ValueError(f"{self.named} named barriers of {NAMED_BARRIERS}")

    def arrivals(self, name: str) -> int:
        """Arrivals that complete a phase of ``name``."""
        roles = {role.name: role for role in self.roles}
        barrier = self.barrier(name)
        ctas = self.ctas if barrier.to in ("first", "both") else 1

        def of(role: Role, how: How) -> int:
            warps = {
                "warp": role.group_warps, "thread": 32 * role.group_warps,
                "each": len(role.warps), "leader": 1,
            }  # fmt: skip
            return warps[how] * ctas if how in warps else 1

        return sum(of(roles[role], how) for role, how in barrier.signals)

    def barrier(self, name: str) -> Barrier:
        return next(barrier for barrier in self.barriers if barrier.name == name)

    def of_first(self, name: str) -> bool:
        """Whether ``name`` is of a pair, and that of the first CTA."""
        return self.ctas == 2 and self.barrier(name).to == "first"

    def offset(self, name: str) -> int:
        """Index of the first mbarrier of ``name``."""
        total = 0
        for barrier in self.barriers:
            if barrier.name == name:
                return total
            total += barrier.count
        raise KeyError(name)

    @property
    def named(self) -> int:
        """Named barriers in use."""
        tellers = {role.name: len(role.warps) for role in self.roles}
        return 1 + sum(tellers[meeting.teller] for meeting in self.meetings)

    def first_named(self, name: str) -> int:
        """The first named barrier of the meeting ``name``."""
        before = self.meetings[: [meeting.name for meeting in self.meetings].index(name)]
        return Topology(self.roles, (), meetings=before).named

    @property
    def size(self) -> int:
        return sum(barrier.count for barrier in self.barriers)


def prefill_topology(plan: Plan) -> Topology:
    """The barriers of `cute_fmha.kernels.blackwell.prefill`.

        load ── q_full, k_full; v_full ──> mma ── s_full ──> softmax ── fade ───────> correction
             <─ q_empty, k_empty, v_empty ─    <─ p_ready ──         ── stats_full ─>
                                               <─ p_last ───         <─ stats_empty ─
                                               <─ p_ready ───────────────────────────
                                               ── o_full ───────────────────────────>
        correction ── chunk_full ──> epilogue,   correction <── chunk_empty ── epilogue
        softmax ── decided ──> softmax, load_values, mma
                <─ decision_read ── load_values, correction

        epilogue ── work_full ──> all,          epilogue <── work_empty ── all others

    Each barrier between mma, softmax and correction exists once per softmax warpgroup, but that of
    O. A fade passes from a softmax warp to the correction warp that has its rows; the next one
    comes after an S whose MMA has waited for that correction warp, or after its decision_read.

    In a pair mma works on the first CTA; besides

        softmax 0 ── maxima ──> softmax 1,   softmax 1 ── maxima ──> softmax 0
        epilogues of both ── claiming ──> epilogue of the first
    """
    q_tiles = plan.q_tiles
    # In a pair the first CTA's MMA warp works for both, and lanes do not arrive at its barriers.
    way: tuple[How, To] = ("warp", "first") if plan.pair else ("thread", "own")
    how, to = way
    workers = (role.name for role in plan.roles if role.name != "epilogue")
    decided = []
    if plan.features.skip:
        # The MMA needs no say in when the next one may be made: that is on an S which it makes
        # after it has read this one.
        decided = [
            Barrier("decided", GROUPS, (("softmax", how),), "both"),
            Barrier("decision_read", GROUPS, (("load_values", how), ("correction", how)), "both"),
        ]
    more = []
    if len(plan.p_parts) == 3:
        more = [Barrier("p_more", GROUPS, (("softmax", how),), to)]
    over_v = []
    if plan.o_over_v:
        # The output of a work tile is stored, so that V of the next may come; and that is known.
        over_v = [
            Barrier("stored", 1, (("epilogue", "warp"),)),
            Barrier("stored_read", 1, (("load_values", "warp"),)),
        ]
    pair = []
    if plan.pair:
        pair = [
            # Both CTAs await the next answer about work, and have read the last.
            Barrier("claiming", 1, (("epilogue", "warp"),), "first"),
            # The maxima up to a KV tile, for the other warpgroup's next one.
            Barrier("maxima", GROUPS, (("softmax", "thread"),)),
        ]
    return Topology(
        plan.roles,
        (
            # Records of work tiles, and the answer about the next one.
            Barrier("work_full", WORK_STAGES, (("epilogue", "warp"),)),
            Barrier("work_empty", WORK_STAGES, tuple((role, "each") for role in workers)),
            Barrier("claimed", 1, (("epilogue", "bytes"),)),
            Barrier("q_full", q_tiles, (("load", "bytes"),), to),
            Barrier("q_empty", q_tiles, (("mma", "commit"),)),
            Barrier("k_full", plan.k_stages, (("load", "bytes"),), to),
            Barrier("k_empty", plan.k_stages, (("mma", "commit"),)),
            Barrier("v_full", plan.v_stages, (("load_values", "bytes"),), to),
            Barrier("v_empty", plan.v_stages, (("mma", "commit"),)),
            Barrier("s_full", GROUPS, (("mma", "commit"),)),
            # The first part of P is stored, and O may be accumulated into.
            Barrier("p_ready", GROUPS, (("softmax", how), ("correction", how)), to),
            *more,
            Barrier("p_last", GROUPS, (("softmax", how),), to),
            # A work tile's row sums and maxima, where fades were before. They are read, or without
            # a skip all fades are: with one, every KV tile has a fade, and they have decision_read.
            Barrier("stats_full", GROUPS, (("softmax", "thread"),)),
            Barrier("stats_empty", GROUPS, (("correction", "thread"),)),
            Barrier("o_full", q_tiles, (("mma", "commit"),)),
            *decided,
            Barrier("chunk_full", plan.o_stages, (("correction", "warp"),)),
            Barrier("chunk_empty", plan.o_stages, (("epilogue", "warp"),)),
            *over_v,
            *pair,
        ),
        plan.ctas,
        meetings=(Meeting("fade", "softmax", "correction"),),
    )
