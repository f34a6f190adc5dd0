"""What the public calls pass to their `torch.library` ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cute_fmha import repeat


def op_call(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(op, its positional arguments) of the one op that ``call`` would run; it runs none."""
    seen: list[tuple[Any, Any]] = []
    with monkeypatch.context() as patch:
        # A call like one before would go straight to its backend.
        patch.setattr(repeat, "is_eager", lambda: False)
        for name in ("attention", "mla_decode"):
            op = getattr(torch.ops.cute_fmha, name).default
            patch.setattr(torch.ops.cute_fmha, name, lambda *given, op=op: seen.append((op, given)))
        call()
    ((op, arguments),) = seen
    return op, arguments
