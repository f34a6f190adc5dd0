"""Order of tcgen05 accesses between threads: tcgen05.fence, and what does without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from outcomes import clean, kinds, text

from cute_fmha.emulator.machine import Policy, run_ptx

MODES = [Policy("eager"), Policy("lazy")] + [Policy("random", seed=s) for s in (1, 2, 3)]
STRICT = [
    Policy(p.mode, seed=p.seed, strict_tcgen05_fence=True, strict_tmem_load=True) for p in MODES
]
BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"

# Warps 0, 4 and 8 use the same lanes of tensor memory, warp 0 also the tensor core.
KERNEL = """
.version 8.8
.target sm_100a
.address_size 64
.visible .entry kernel(.param .u64 flag, .param .u64 out)
{
    .reg .b32 %r<40>, %t, %warp, %tmem, %a, %b;
    .reg .b64 %rd<20>, %flag, %out, %tile;
    .reg .pred %p<20>, %first;
    .shared .align 1024 .b8 tiles[8192];
    .shared .align 16 .b8 slot[16];
    .shared .align 8 .b8 bars[32];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    shr.u32 %warp, %t, 5;
    and.b32 %r0, %t, 31;
    setp.eq.u32 %first, %r0, 0;
    setp.eq.u32 %p10, %t, 0;
    mul.wide.u32 %rd0, %r0, 4;
    add.s64 %out, %out, %rd0;
    shl.b32 %r1, %t, 4;
    mov.u32 %r2, tiles;
    add.u32 %r1, %r1, %r2;
    mov.b32 %r3, 0x3c003c00; // 1.0 in f16
    st.shared.v4.b32 [%r1], {%r3, %r3, %r3, %r3};
    fence.proxy.async.shared::cta;
    shr.u32 %r2, %r2, 4;
    cvt.u64.u32 %tile, %r2;
    or.b64 %tile, %tile, 0x0000401000080000; // LBO 128, SBO 256 bytes, version 1
    setp.eq.u32 %p0, %warp, 0;
    @%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 64;
    @%p10 mbarrier.init.shared.b64 [bars], 1;
    @%p10 mbarrier.init.shared.b64 [bars+8], 1;
    @%p10 mbarrier.init.shared.b64 [bars+16], 1;
    bar.sync 0;
    ld.shared.b32 %tmem, [slot];
    mov.u32 %a, 5;
    mov.u32 %b, 6;
    setp.eq.u32 %p1, %warp, 4;
    setp.eq.u32 %p2, %warp, 8;
    @%p0 bra WARP0;
    @%p1 bra WARP4;
    @%p2 bra WARP8;
    bra END;
WARP0:
    {zero}
    bra END;
WARP4:
    {four}
    bra END;
WARP8:
    {eight}
END:
    bar.sync 0;
    @%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %tmem, 64;
    ret;
}
"""
STORE = "tcgen05.st.sync.aligned.32x32b.x2.b32 [%tmem], {%a, %b}; tcgen05.wait::st.sync.aligned;"
LOAD = """
    tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r10, %r11}, [%tmem];
    tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%out], %r10;
"""
MMA = """
    mov.u32 %r20, 0x08100010; // M = 128, N = 64, f16 inputs, f32 accumulator
    setp.ne.u32 %p4, %r20, %r20;
    @%first tcgen05.mma.cta_group::1.kind::f16 [%tmem], %tile, %tile, %r20, %p4;
"""
COMMIT = "@%first tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bars];"
COPY = "@%first tcgen05.cp.cta_group::1.128x128b [%tmem], %tile;"


def arrive(bar: int = 0, how: str = "") -> str:
    return f"bar.warp.sync -1; @%first mbarrier.arrive{how}.shared::cta.b64 _, [bars+{8 * bar}];"


def await_(bar: int = 0, how: str = "", label: str = "W") -> str:
    return f"""
{label}{bar}:
    mbarrier.try_wait.parity{how}.shared::cta.b64 %p5, [bars+{8 * bar}], 0;
    @!%p5 bra {label}{bar};
"""


RELAXED = ".relaxed.cta"
SIGNALS = {  # how warp 0 tells warp 4, and whether that orders memory, too
    "mbarrier": (arrive(), await_(), True),
    "relaxed mbarrier": (arrive(0, RELAXED), await_(0, RELAXED), False),
    "named barrier": ("bar.arrive 1, 64;", "bar.sync 1, 64;", True),
    "flag": (
        "bar.warp.sync -1; @%first st.relaxed.cta.global.b32 [%flag], 1;",
        "W0: ld.relaxed.cta.global.b32 %r9, [%flag]; setp.eq.u32 %p5, %r9, 0; @%p5 bra W0;",
        False,
    ),
    "released flag": (
        "bar.warp.sync -1; @%first st.release.cta.global.b32 [%flag], 1;",
        "W0: ld.acquire.cta.global.b32 %r9, [%flag]; setp.eq.u32 %p5, %r9, 0; @%p5 bra W0;",
        True,
    ),
    "atomic": (
        "bar.warp.sync -1; @%first red.relaxed.cta.global.add.u32 [%flag], 1;",
        "W0: atom.relaxed.cta.global.or.b32 %r9, [%flag], 0; setp.eq.u32 %p5, %r9, 0; @%p5 bra W0;",
        False,
    ),
}
PAIRS = {
    "load of what was stored": (STORE, LOAD),
    "store to what was loaded": (STORE + LOAD, STORE),
}


def run(policy: Policy, zero: str, four: str, eight: str = "") -> tuple[Any, np.ndarray]:
    flag, out = np.zeros(4, np.int32), np.zeros(32, np.int32)
    body = KERNEL.replace("{zero}", zero).replace("{four}", four).replace("{eight}", eight)
    options: dict[str, Any] = {"block": (288, 1, 1), "policy": policy, "check": False}
    return run_ptx(body, flag, out, **options), out


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("pair", PAIRS)
def test_both_fences_are_enough(pair: str, signal: str) -> None:
    (first, second), (send, receive, _) = PAIRS[pair], SIGNALS[signal]
    for policy in MODES + STRICT:
        result, out = run(policy, first + BEFORE + send, receive + AFTER + second)
        clean(result)
        assert out.tolist() == [5] * 32


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("missing", ["before", "after", "both"])
def test_without_fences(pair: str, signal: str, missing: str) -> None:
    """What orders memory will do, unless fences are asked for; what does not is a race."""
    (first, second), (send, receive, orders_memory) = PAIRS[pair], SIGNALS[signal]
    before = BEFORE if missing == "after" else ""
    after = AFTER if missing == "before" else ""
    for policy in MODES:
        result, _ = run(policy, first + before + send, receive + after + second)
        assert kinds(result) == (set() if orders_memory else {"race"}), result.report()
    for policy in STRICT:
        result, _ = run(policy, first + before + send, receive + after + second)
        assert kinds(result) == ({"tcgen05 fence"} if orders_memory else {"race"}), result.report()
        if orders_memory:
            which = "after" if missing == "after" else "before"
            assert f"missing tcgen05.fence::{which}_thread_sync" in text(result)
            (finding,) = result.findings
            assert "tcgen05" in finding.where
            assert "tcgen05" in finding.other


@pytest.mark.parametrize("work", [MMA, COPY])
def test_a_commit_is_the_first_fence(work: str) -> None:
    for policy in STRICT:
        result, _ = run(policy, work + COMMIT, await_() + AFTER + LOAD)
        clean(result)
        result, _ = run(policy, work + COMMIT, await_() + LOAD)
        assert kinds(result) == {"tcgen05 fence"}, result.report()
        assert "::after_thread_sync" in text(result)


def test_the_committing_thread_needs_the_second_fence() -> None:
    """The canonical pattern of one thread: the load behind the wait is asynchronous."""
    for policy in STRICT:
        clean(run(policy, MMA + COMMIT + await_() + AFTER + LOAD, "")[0])
        assert kinds(run(policy, MMA + COMMIT + await_() + LOAD, "")[0]) == {"tcgen05 fence"}
    for policy in MODES:
        clean(run(policy, MMA + COMMIT + await_() + LOAD, "")[0])


def test_one_thread_needs_waits_alone() -> None:
    for policy in STRICT:
        clean(run(policy, STORE + LOAD + STORE + LOAD + MMA + COMMIT + await_(), "")[0])


def test_a_commit_passes_on_the_loads_of_its_thread() -> None:
    for policy in STRICT:
        clean(run(policy, STORE + LOAD + MMA + COMMIT, await_() + AFTER + STORE)[0])


def test_order_goes_through_a_third_thread() -> None:
    """It needs no fence of its own between its wait and its arrival."""
    middle = await_(0, RELAXED) + arrive(1, RELAXED)
    last = await_(1, RELAXED)
    for policy in MODES + STRICT:
        clean(run(policy, STORE + BEFORE + arrive(0, RELAXED), middle, last + AFTER + LOAD)[0])
        result, _ = run(policy, STORE + arrive(0, RELAXED), middle, last + AFTER + LOAD)
        assert kinds(result) == {"race"}
        result, _ = run(policy, STORE + BEFORE + arrive(0, RELAXED), middle, last + LOAD)
        assert kinds(result) == {"race"}


def test_a_fence_covers_what_came_before_it() -> None:
    """The second store follows the fence, so the load of it is not in order."""
    late = STORE + BEFORE + STORE + arrive()
    for policy in STRICT:
        result, _ = run(policy, late, await_() + AFTER + LOAD)
        assert kinds(result) == {"tcgen05 fence"}, result.report()
        early = await_() + AFTER + await_(1, label="V") + LOAD
        result, _ = run(policy, arrive() + STORE + BEFORE + arrive(1), early)
        assert kinds(result) == {"tcgen05 fence"}, result.report()


def test_fences_do_not_wait() -> None:
    """They order what is over: a store or load has to be waited for."""
    store = STORE.partition(";")[0] + ";"
    for policy in MODES + STRICT:
        result, _ = run(policy, store + BEFORE + arrive(), await_() + AFTER + LOAD)
        assert kinds(result) & {"race", "uninitialised"}, result.report()


def test_fences_are_for_tensor_memory_alone() -> None:
    """Relaxed operations and tcgen05.fence order no access to shared memory."""
    write, read = "@%first st.shared.b32 [slot+4], 7;", "ld.shared.b32 %r9, [slot+4];"
    for policy in MODES:
        result, _ = run(
            policy, write + BEFORE + arrive(0, RELAXED), await_(0, RELAXED) + AFTER + read
        )
        assert kinds(result) == {"race"}
        clean(run(policy, write + BEFORE + arrive(), await_() + AFTER + read)[0])
