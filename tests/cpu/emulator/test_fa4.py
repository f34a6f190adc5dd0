"""FlashAttention-4's sm_100 kernels against float64, under every policy."""

from __future__ import annotations

from typing import Any

import peers_fa4
import pytest

from cute_fmha.emulator import capture as cap
from cute_fmha.emulator.machine import Policy

pytestmark = pytest.mark.skipif(
    not peers_fa4.available, reason="flash-attn-4 (and CuTe DSL) are not installed"
)

POLICIES = {
    "eager": Policy("eager"),
    "lazy": Policy("lazy"),
    "random": Policy("random", seed=20, slice=64),
}

QUICK = ("d128_causal", "varlen", "split", "d256", "mla_2cta_paged64", "mla_1cta_paged64")
"""One of every kernel: each case is a compilation, and most of the time is theirs."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep)
        for name in peers_fa4.CASES
    ],
)
def test_right_under_every_policy(name: str) -> None:
    """One compilation; right numbers whatever the timing, and nothing new found."""
    case = peers_fa4.CASES[name]
    for mode, policy in POLICIES.items():
        reports: list[cap.Report] = []

        def run(
            compiled: Any,
            *args: Any,
            _policy: Policy = policy,
            _reports: list[cap.Report] = reports,
            **kwargs: Any,
        ) -> None:
            _reports.append(cap.emulate(compiled, *args, policy=_policy, check=False, **kwargs))

        outcome = peers_fa4.run_case(case, run, seed=3)
        assert reports
        unexpected = [
            str(finding)
            for report in reports
            for finding in report.findings
            if not any(finding.kind == kind and text in finding.text for kind, text in case.known)
        ]
        assert not unexpected, (mode, unexpected[:5])
        assert outcome.cosine > 0.99999, mode
        assert outcome.error < 0.02, mode
        assert outcome.lse_error < 1e-3, mode
