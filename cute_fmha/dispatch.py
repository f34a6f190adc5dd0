"""(problem, target) -> backend. `auto` says once per problem class what it chose; an explicit
backend runs or raises."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from cute_fmha.problem import Problem, Target, target_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call

logger = logging.getLogger("cute_fmha")

BACKENDS = ("auto", "blackwell", "triton", "reference", "emulator")
"""Names `backend=` takes. ``emulator`` is never chosen by ``auto``."""

_MODULES = {
    "blackwell": "cute_fmha.kernels.blackwell.launch",
    "triton": "cute_fmha.kernels.triton",
    "reference": "cute_fmha.reference",
    "emulator": "cute_fmha.emulator.backend",
}
_AUTO_ORDER = ("blackwell", "triton", "reference")


@functools.cache
def _module(backend: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
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
    """Why ``auto`` passes ``name`` by."""
    reason = can_implement(problem, target, name)
    if reason is not None:
        return reason
    if name == "triton" and target.device_type != "cuda":
        return "its interpreter is for tests"
    declines = getattr(_module(name), "declines", None)
    return None if declines is None else declines(problem, target)


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
    return _first(problem, target, _AUTO_ORDER, ())


def _first(
    problem: Problem, target: Target, names: tuple[str, ...], reasons: tuple[tuple[str, str], ...]
) -> ModuleType:
    """The first of ``names`` that ``auto`` takes; ``reasons`` are those against others before."""
    for name in names:
        reason = _auto_reason(problem, target, name)
        if reason is None:
            passed = "".join(f"; not {n}: {why}" for n, why in reasons)
            _log_choice(problem.problem_class, target, f"backend {name}{passed}")
            module = _module(name)
            assert isinstance(module, ModuleType)
            return module
        reasons = (*reasons, (name, reason))
    raise NotImplementedError(
        f"no backend can run this {problem.op}: " + "; ".join(f"{n}: {why}" for n, why in reasons)
    )


def run(call: Call, backend: str) -> None:
    """Run ``call`` on the backend that `select` names, on the device of its tensors.

    A backend may refuse the tensors of a call, by where they lie in memory, with a
    NotImplementedError before anything is launched; ``auto`` then goes on to the next.
    """
    device = call.q.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Kernels are launched on the current device, whatever device their arguments are on.
        with torch.cuda.device(device):
            run(call, backend)
        return
    target = target_of(device)
    module = select(call.problem, target, backend)
    try:
        module.run(call)
    except NotImplementedError as error:
        if backend != "auto":
            raise NotImplementedError(
                f"backend={backend!r} cannot run this {call.problem.op}: {error}"
            ) from error
        _run_next(call, target, module, error)


def _run_next(call: Call, target: Target, refused: ModuleType, error: Exception) -> None:
    """Run ``call`` on a backend after ``refused``, which has refused it with ``error``."""
    names = [_module(name) for name in _AUTO_ORDER]
    at = names.index(refused)
    reasons = ((_AUTO_ORDER[at], str(error)),)
    _first(call.problem, target, _AUTO_ORDER[at + 1 :], reasons).run(call)
