"""What the GPU tests share: both families of kernels, and no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from launches import Launches, recorded


@pytest.fixture(params=["planned", "portable"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Launches]:
    """The launches of a test, by the kernels planned for this GPU or by those that any GPU runs."""
    with recorded(portable=request.param == "portable") as launches:
        yield launches


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield
