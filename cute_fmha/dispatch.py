"""(problem, target) -> backend. `auto` says once per problem class what it chose; an explicit
backend runs or raises."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING

from cute_fmha.problem import Problem, Target, target_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call

logger = logging.getLogger("cute_fmha")

BACKENDS = ("auto", "blackwell", "triton", "reference", "emulator")
"""Names `backend=` takes. ``emulator`` is never chosen by ``auto``."""

_MODULES = {"triton": "cute_fmha.kernels.triton", "reference": "cute_fmha.reference"}
_AUTO_ORDER = ("blackwell", "triton", "reference")


@functools.cache
def _module(backend: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
    if backend not in _MODULES:
        return f"this version of cute_fmha has no {backend} kernels"
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return f"{_MODULES[backend]} cannot be imported ({error})"


@functools.lru_cache(maxsize=4096)
def can_implement(problem: Problem, target: Target, backend: str) -> str | None:
    """Why ``backend`` cannot run ``problem`` on ``target``; None when it can."""
    module = _module(backend)
    if isinstance(module, str):
        return module
    reason: str | None = module.can_implement(problem, target)
    return reason


def _auto_reason(problem: Problem, target: Target, name: str) -> str | None:
    """Why ``auto`` passes ``name`` by. The interpreter is for tests: `auto` leaves it alone."""
    if name == "triton" and target.device_type != "cuda":
        return "auto uses Triton on CUDA devices"
    return can_implement(problem, target, name)


@functools.cache
def _log_choice(problem_class: tuple[object, ...], target: Target, text: str) -> None:
    logger.info("%s on %s (arch %d): %s", problem_class[0], target.device_type, target.arch, text)


@functools.lru_cache(maxsize=4096)
def select(problem: Problem, target: Target, backend: str) -> ModuleType:
    """The module that runs ``problem``.

    Raises:
        NotImplementedError: the named backend cannot run it; the message has its reason.
    """
    if backend != "auto":
        reason = can_implement(problem, target, backend)
        if reason is not None:
            raise NotImplementedError(f"backend={backend!r} cannot run this {problem.op}: {reason}")
        module = _module(backend)
        assert isinstance(module, ModuleType)
        return module
    reasons: list[tuple[str, str]] = []
    for name in _AUTO_ORDER:
        reason = _auto_reason(problem, target, name)
        if reason is None:
            passed = "".join(f"; not {n}: {why}" for n, why in reasons)
            _log_choice(problem.problem_class, target, f"backend {name}{passed}")
            module = _module(name)
            assert isinstance(module, ModuleType)
            return module
        reasons.append((name, reason))
    raise NotImplementedError(
        f"no backend can run this {problem.op}: " + "; ".join(f"{n}: {why}" for n, why in reasons)
    )


def run(call: Call, backend: str) -> None:
    """Run ``call`` on the backend that `select` names."""
    select(call.problem, target_of(call.q.device), backend).run(call)
