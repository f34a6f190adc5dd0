"""``backend="emulator"``: the Blackwell kernels on CPU tensors, executed by the machine.

A call compiles (or finds compiled) exactly what ``backend="blackwell"`` would launch, runs its host
function against the shim, and executes the launch. A finding is an `EmulationError`. How time
passes is chosen by, first of all, the context `emulated_calls`::

    with emulated_calls(Policy("random", seed=7)) as reports:
        out = attention(q, k, v, backend="emulator")

else by the environment: ``CUTE_FMHA_EMULATOR_POLICY`` is ``eager`` (the default), ``lazy``,
``random`` or ``random:SEED``. Inside `emulating()` calls are part of that program: its policy
counts and its reports have them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from cute_fmha.cache import Binary
from cute_fmha.kernels.blackwell import launch
from cute_fmha.problem import Problem, Target

from . import capture as cap
from .build import BuildError, compiler
from .device import Device, DeviceTensor, Memory, find_memory
from .machine import Policy

if TYPE_CHECKING:
    from cute_fmha.ops import Call

__all__ = ["POLICY_VARIABLE", "can_implement", "emulated_calls", "policy_from", "run"]

POLICY_VARIABLE = "CUTE_FMHA_EMULATOR_POLICY"


class _Ambient(threading.local):
    """What this thread's contexts have set."""

    device = Device()
    use: Callable[[cap.Capture], None] | None = None


_ambient = _Ambient()


def policy_from(text: str) -> Policy:
    """A policy as the environment names it.

    Raises:
        ValueError: it is none of ``eager``, ``lazy``, ``random`` and ``random:SEED``.
    """
    mode, _, seed = text.partition(":")
    if mode not in ("eager", "lazy", "random") or (
        seed and (mode != "random" or not seed.isdigit())
    ):
        raise ValueError(
            f"{POLICY_VARIABLE}: got {text!r}; allowed: eager, lazy, random, random:SEED"
        )
    return Policy(mode, seed=int(seed or 0), strict_tmem_load=True)


@contextlib.contextmanager
def calls_go_to(use: Callable[[cap.Capture], None], device: Device) -> Iterator[None]:
    """Calls in this block are captured on ``device`` and given to ``use``."""
    before = _ambient.use, _ambient.device
    _ambient.use, _ambient.device = use, device
    try:
        yield
    finally:
        _ambient.use, _ambient.device = before


@contextlib.contextmanager
def emulated_calls(
    policy: Policy | None = None, device: Device | None = None, check: bool = True
) -> Iterator[list[cap.Report]]:
    """Calls in this block run under ``policy`` on ``device``; yields the list of their reports.

    With ``check`` a finding is an `EmulationError`.
    """
    reports: list[cap.Report] = []

    def use(captured: cap.Capture) -> None:
        reports.append(cap.execute(captured, policy or _policy(), check=check))

    with calls_go_to(use, device or Device()):
        yield reports


def _policy() -> Policy:
    return policy_from(os.environ.get(POLICY_VARIABLE, "") or "eager")


def _execute(captured: cap.Capture) -> None:
    cap.execute(captured, _policy())


def target(device: Device) -> Target:
    major, minor = device.capability
    return Target("cuda", 10 * major + minor, device.sms)


def can_implement(problem: Problem, target_: Target) -> str | None:
    """Why the Blackwell kernels cannot be emulated for ``problem``; None when they can."""
    if target_.device_type != "cpu":
        return f"the emulator works on CPU tensors; got {target_.device_type}"
    reason = launch.can_implement(problem, target(_ambient.device))
    if reason is not None:
        return reason
    try:
        compiler()
    except BuildError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def _prepared(problem: Problem, target_: Target) -> launch.Prepared:
    return launch.prepare(problem, target_)


def capture(
    call: Call, binary: Binary, arguments: Callable[[Call], tuple[Any, ...]], device: Device
) -> cap.Capture:
    """What ``call`` launches with ``binary`` on ``device``."""
    memory = [
        Memory.of(name, value)
        for name, value in call._asdict().items()
        if isinstance(value, torch.Tensor)
    ]
    memory += [
        Memory.of(f"epilogue parameter {i}", value)
        for i, value in enumerate(call.parameters)
        if isinstance(value, torch.Tensor)
    ]
    values = arguments(call)
    # Also what is not the caller's: a workspace of the library's own.
    find_memory("arguments", values, memory)
    given = [_device_argument(value) for value in values]
    return cap.collect(binary, lambda function: function(*given), memory, device)


def _device_argument(value: Any) -> Any:
    """``value`` with every CPU tensor in it as a device tensor."""
    import tvm_ffi

    if isinstance(value, tuple):
        return tuple(map(_device_argument, value))
    if isinstance(value, torch.Tensor):
        return tvm_ffi.from_dlpack(DeviceTensor(value))
    return value


def run(call: Call) -> None:
    """Emulate the launch that ``call`` would be on a Blackwell GPU.

    Raises:
        NotImplementedError: the tensors lie in memory as the kernel cannot take them.
        EmulationError: something was found; the message says what and where.
    """
    if call.out.numel() == 0:
        return
    try:
        prepared = _prepared(call.problem, target(_ambient.device))
        captured = capture(call, prepared.binary, prepared.arguments, _ambient.device)
    except ValueError as error:
        reason = launch.misfit(call)
        if reason is None:
            raise
        raise NotImplementedError(reason) from error
    (_ambient.use or _execute)(captured)
