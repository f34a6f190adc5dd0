"""From a `Call` to one launch of a Blackwell kernel.

Everything that does not depend on tensors is decided once per problem: the kernel, its plan, its
binary (`cute_fmha.cache`) and its linked host function. A call then reads a dictionary, makes a
tuple of its tensors and numbers, and enters the host function, which checks shapes, strides and
alignment, builds the tensor maps and launches. Nothing here needs CuTe DSL until a kernel is
compiled or linked.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cute_fmha.cache import Binary, Key, digest, fetch
from cute_fmha.epilogues.base import resolve
from cute_fmha.kernels.blackwell import build, decode_host, mla_host, prefill_host
from cute_fmha.problem import Problem, Target, target_of

if TYPE_CHECKING:
    from cute_fmha.ops import Call


class Host(Protocol):
    """What a kernel's host side has; see `prefill_host`."""

    NAME: str
    OP: str

    def can_implement(self, problem: Problem, target: Target) -> str | None: ...
    def plan_of(self, problem: Problem) -> Any: ...
    def skip_tiles(self, plan: Any) -> dict[str, Any]: ...
    def compile_arguments(self, plan: Any) -> tuple[Any, tuple[Any, ...]]: ...
    def call_arguments(
        self, problem: Problem, target: Target
    ) -> Callable[[Call], tuple[Any, ...]]: ...


KERNELS: tuple[Host, ...] = (prefill_host, decode_host, mla_host)

FEW_ROWS = 64
"""Query rows of a KV head up to which keys may have to be split, and a tile of queries is wasteful.
"""

ARCHITECTURES = {100: "sm_100a", 103: "sm_103a"}
"""What to compile for, by compute capability."""

ROW_BYTES = 16
"""TMA needs addresses and strides that are multiples of this."""


@dataclass(frozen=True)
class Prepared:
    """A compiled kernel and what makes its arguments."""

    plan: Any
    binary: Binary
    arguments: Callable[[Call], tuple[Any, ...]]


def _host(problem: Problem, target: Target) -> Host | str:
    """The kernel that runs ``problem``, or why none can: the first that can, for few rows the
    modelled fastest."""
    hosts = [host for host in KERNELS if problem.op == host.OP]
    reasons = {host.NAME: host.can_implement(problem, target) for host in hosts}
    able = [host for host in hosts if reasons[host.NAME] is None]
    if not able:
        return "; ".join(dict.fromkeys(filter(None, reasons.values())))
    if _few(problem) and prefill_host in able and decode_host in able:
        faster = decode_host.cycles(problem, target) < prefill_host.cycles(problem, target)
        return decode_host if faster else prefill_host
    return able[0]


def _few(problem: Problem) -> bool:
    return problem.seqlen_q * problem.group <= FEW_ROWS


def declines(problem: Problem, target: Target) -> str | None:
    """Why another backend is the better choice, although a kernel can run ``problem``."""
    if problem.op != "attention":
        return None
    few, name = _few(problem), choose(problem, target).NAME
    if few and name == prefill_host.NAME:
        return "few query rows are left to kernels that split the keys"
    if not few and name == decode_host.NAME and prefill_host.can_implement(problem, target):
        return "many query rows are left to kernels that fetch keys once for more than 32 of them"
    return None


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why no Blackwell kernel can run ``problem`` on ``target``; None when one can."""
    found = _host(problem, target)
    return found if isinstance(found, str) else build.missing()


def choose(problem: Problem, target: Target) -> Host:
    """The kernel that runs ``problem``.

    Raises:
        NotImplementedError: none can, or nothing can be compiled here.
    """
    found = _host(problem, target)
    reason = found if isinstance(found, str) else build.missing()
    if reason is not None:
        raise NotImplementedError(reason)
    assert not isinstance(found, str)
    return found


def prepare(problem: Problem, target: Target) -> Prepared:
    """Compile the kernel of ``problem`` or find it compiled; no GPU is needed.

    Raises:
        NotImplementedError: as `choose`.
    """
    host = choose(problem, target)
    plan = host.plan_of(problem)
    binary = binary_of(host, plan, ARCHITECTURES[target.arch], problem.epilogue)
    return Prepared(plan, binary, host.call_arguments(problem, target))


def binary_of(host: Host, plan: Any, arch: str, epilogue: str = "identity") -> Binary:
    """The kernel of ``plan``, from the cache or compiled into it."""
    key = build.key(host.NAME, arch, plan, ("epilogue", _epilogue_source(epilogue)))
    return fetch(key, lambda: build.compile_binary(key, *host.compile_arguments(plan)))


def _epilogue_source(name: str) -> str:
    """An op's key and, for an op that is not ours, a hash of the file that defines it."""
    op = resolve(name)
    if op.__module__.startswith("cute_fmha."):
        return name
    file = inspect.getsourcefile(op)
    source = Path(file).read_bytes() if file else inspect.getsource(op)
    return f"{name} {digest([source])}"


_functions: dict[Key, Callable[..., None]] = {}


def _linked(binary: Binary) -> Callable[..., None]:
    """One function per kernel, however many problems it serves."""
    function = _functions.get(binary.key)
    if function is None:
        function = _functions.setdefault(binary.key, build.link(binary))
    return function


@functools.lru_cache(maxsize=4096)
def _launcher(
    problem: Problem, target: Target
) -> tuple[Callable[..., None], Callable[[Call], tuple[Any, ...]]]:
    prepared = prepare(problem, target)
    return _linked(prepared.binary), prepared.arguments


def run(call: Call) -> None:
    """Launch the planned kernel once; writes ``call.out``, ``call.lse`` and ``call.stats``.

    Raises:
        NotImplementedError: the tensors lie in memory as the kernel cannot take them; nothing was
            launched.
    """
    if call.out.numel() == 0:
        return
    function, arguments = _launcher(call.problem, target_of(call.q.device))
    try:
        function(*arguments(call))
    except ValueError as error:
        reason = misfit(call)
        if reason is None:
            raise
        raise NotImplementedError(reason) from error


def misfit(call: Call) -> str | None:
    """Why TMA cannot take the call's tensors; for messages, the host function does the check."""
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("out", call.out)):
        strides = [stride * x.element_size() for stride in x.stride()[:-1]]
        if x.data_ptr() % ROW_BYTES or any(stride % ROW_BYTES for stride in strides):
            return (
                f"the Blackwell kernels need rows on {ROW_BYTES} bytes; got {name} at "
                f"{x.data_ptr():#x} with strides {tuple(strides)} bytes"
            )
        if x.stride(-1) != 1:
            return f"the Blackwell kernels need a contiguous last dimension; {name} has not"
    return None
