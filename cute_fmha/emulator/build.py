"""Compiles the engine's C sources with the system's C compiler, once, into a cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cute_fmha.cache import cache_folder

ENGINE = Path(__file__).parent / "engine"
# Products and sums stay separate (-ffp-contract=off): fma happens only where PTX asks for it.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=default",
)
LINK_FLAGS = ("-shared", "-lm")
_KEPT = 4  # versions of an object or a library that stay in the cache


class BuildError(RuntimeError):
    """The C compiler is missing or failed."""


@functools.lru_cache(maxsize=1)
def compiler() -> tuple[str, ...]:
    """The C compiler's command: $CC, else cc, gcc or clang."""
    named = os.environ.get("CC")
    if named:
        command = tuple(shlex.split(named))
        if not shutil.which(command[0]):
            raise BuildError(f"CC names the C compiler {command[0]!r}, which is not installed")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return (name,)
    raise BuildError(
        "the emulator needs a C compiler and found none: install gcc or clang "
        "(Debian and Ubuntu: `apt install gcc libc6-dev`; Fedora: `dnf install gcc`; "
        "macOS: `xcode-select --install`), or name one in the environment variable CC"
    )


@functools.lru_cache(maxsize=1)
def _identity() -> tuple[str, tuple[str, ...]]:
    """What the compiler and this CPU are, and the flags that select the CPU's instructions."""
    for native in (("-march=native",), ("-mcpu=native",), ()):
        probe = [*compiler(), *native, "-dM", "-E", "-x", "c", os.devnull]
        result = subprocess.run(probe, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return platform.machine() + sys.platform + result.stdout, native
    raise BuildError(f"the C compiler {shlex.join(compiler())} does not work:\n{result.stderr}")


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{shlex.join(command)}\n{result.stderr or result.stdout}")


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _make(target: Path, command: Sequence[str]) -> Path:
    """Run `command -o target`, unless it is there; concurrent processes may do the same."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        _run([*command, "-o", str(temporary)])
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _prune(folder: Path, stem: str, suffix: str) -> None:
    """Forget all but the newest versions of an object or a library, but none of the last hour."""
    aged = []
    for path in folder.glob(f"{stem}-{'?' * 32}{suffix}"):
        with contextlib.suppress(OSError):
            aged.append((path.stat().st_mtime, path))
    for modified, path in sorted(aged, reverse=True)[_KEPT:]:
        if modified < time.time() - 3600:
            with contextlib.suppress(OSError):
                path.unlink()


def build_library(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = FLAGS,
    headers: Sequence[Path] = (),
) -> Path:
    """The shared library of C `sources`, compiled if no equal one is in the cache.

    Every source is compiled on its own, from a copy of it and of the headers, so that what is kept
    under a hash was made from what was hashed even if files change meanwhile.
    """
    identity, native = _identity()
    flags = (*flags, *native)
    contents = {path.name: path.read_bytes() for path in (*headers, *sources)}
    common: list[str | bytes] = [identity, *flags]
    common += [contents[path.name] for path in headers]
    folder = cache_folder() / name
    objects = {
        source.name: folder
        / f"{source.stem}-{_digest([*common, source.name, contents[source.name]])}.o"
        for source in sources
    }
    key = _digest([identity, *LINK_FLAGS, *(path.name for path in objects.values())])
    library = folder / f"{name}-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as copies:
        for path in contents:
            Path(copies, path).write_bytes(contents[path])
        for file, target in objects.items():
            _make(target, [*compiler(), *flags, "-c", os.path.join(copies, file)])
    _make(library, [*compiler(), *map(str, objects.values()), *LINK_FLAGS])
    for source in sources:
        _prune(folder, source.stem, ".o")
    _prune(folder, name, ".so")
    return library


def engine_library() -> Path:
    """The emulator's engine as a shared library."""
    sources, headers = sorted(ENGINE.glob("*.c")), sorted(ENGINE.glob("*.h"))
    return build_library("engine", sources, FLAGS, headers)
