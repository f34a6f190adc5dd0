"""Shared by all tests: where Triton runs, what is skipped, how hypothesis draws."""

from __future__ import annotations

import os

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
