"""Shared by all tests: where Triton runs, what is skipped, how hypothesis draws."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, so it must be set before any kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run: a red test is then a change in the code. The sweeps draw anew.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    # The shapes are small: threads would only contend with each other and with other jobs.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture
def rng() -> np.random.Generator:
    """Other numbers on every run; the seed is printed where a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def _not_skipped_in_ci(report: Any) -> None:
    """What has to run in CI fails where it would be skipped: a missing package, or a module that
    cannot be imported any more, must not hide tests."""
    if report.skipped and os.environ.get("CUTE_FMHA_CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI only what needs a GPU may be: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        _not_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _not_skipped_in_ci(report)
    return report
