"""Compiled kernels, kept in this process and on disk.

An entry is one zip file, ``FOLDER/kernels/KERNEL-ARCH-DIGEST.zip``, with the host function's object
code, PTX, cubin, and what the digest was made of (``about.json``). The digest covers everything
that the code depends on, so nothing goes stale and the folder may be deleted at any time. FOLDER is
``$CUTE_FMHA_CACHE``, else ``$XDG_CACHE_HOME/cute_fmha``, else ``~/.cache/cute_fmha``.

Several processes may share a folder: entries appear by an atomic rename, and whoever compiles an
entry holds a file lock, so that the others wait and load instead of compiling the same. An entry
that cannot be read (zip has checksums) is compiled again, with a warning; a folder that cannot be
written is left alone, with a warning. Beyond `LIMIT` bytes the entries used least recently go.

What CuTe DSL can store, and why this form: notes/design.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system: processes may then compile the same kernel twice
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("cute_fmha")

LIMIT = 1 << 30
"""Bytes of kernels that stay on disk."""

_LOCKS = 256
_OBJECT, _PTX, _CUBIN, _ABOUT = "host.o", "kernel.ptx", "kernel.cubin", "about.json"
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError,
)  # fmt: skip


def cache_folder() -> Path:
    """Where compiled code is kept; see the module."""
    named = os.environ.get("CUTE_FMHA_CACHE")
    if named:
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cute_fmha"


@dataclass(frozen=True)
class Key:
    """A kernel's name, its architecture, and by name all else that its code depends on."""

    kernel: str
    arch: str
    parts: tuple[tuple[str, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        return digest((self.kernel, self.arch, *(text for part in self.parts for text in part)))


@dataclass
class Binary:
    """A compiled kernel: an object file whose host function ``entry`` launches it."""

    key: Key
    entry: str
    object_code: bytes
    ptx: str
    cubin: bytes

    @property
    def function_name(self) -> str:
        """For messages."""
        return f"{self.key.kernel} ({self.key.arch})"


def digest(parts: Iterable[str | bytes]) -> str:
    """Of the sequence: parts cannot run into one another."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:32]


def source_digest(files: Iterable[Path]) -> str:
    """Of Python sources by name and content, wherever they are installed."""
    contents = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
    return digest(part for name in sorted(contents) for part in (name, contents[name]))


def describe(value: object) -> str:
    """A text that is the same for equal values in every process; for plans.

    Raises:
        ValueError: the value's text would differ from process to process.
    """
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        fields = (
            f"{field.name}={describe(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
        )
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    text = repr(value)
    if " at 0x" in text:
        raise ValueError(f"no stable text: {text}")
    return text


_binaries: dict[Key, Binary] = {}
_compiling = threading.RLock()


def fetch(key: Key, compile_: Callable[[], Binary]) -> Binary:
    """The binary of ``key``: of this process, else from disk, else compiled and stored."""
    found = _binaries.get(key)
    if found is None:
        with _compiling:  # one thread compiles; another that wants the same finds it afterwards
            found = _binaries.get(key) or _from_disk(key, compile_)
            _binaries[key] = found
    return found


def forget() -> None:
    """Empty the part of the cache that is in this process."""
    _binaries.clear()


def path_of(key: Key) -> Path:
    return cache_folder() / "kernels" / f"{key.kernel}-{key.arch}-{key.digest}.zip"


def _from_disk(key: Key, compile_: Callable[[], Binary]) -> Binary:
    path = path_of(key)
    found = _load(path, key)
    if found is not None:
        return found
    with _locked(path.parent, key):
        found = _load(path, key)  # another process may have compiled it meanwhile
        if found is not None:
            return found
        logger.info("compiling %s for %s: %s", key.kernel, key.arch, dict(key.parts).get("plan"))
        start = time.monotonic()
        found = compile_()
        stored = _store(path, found)
        seconds = time.monotonic() - start
        where = f"kept in {path}" if stored else "not kept on disk"
        logger.info("compiled %s for %s in %.1f s, %s", key.kernel, key.arch, seconds, where)
        return found


def _load(path: Path, key: Key) -> Binary | None:
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read(_ABOUT))
            if [tuple(part) for part in about["parts"]] != list(key.parts):
                raise ValueError("it was made of other sources")
            binary = Binary(
                key,
                about["entry"],
                archive.read(_OBJECT),
                archive.read(_PTX).decode(),
                archive.read(_CUBIN),
            )
    except _UNREADABLE as error:
        logger.warning(
            "%s is damaged (%s: %s); compiling %s again",
            path, type(error).__name__, error, key.kernel,
        )  # fmt: skip
        return None
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            logger.warning("%s cannot be read (%s)", path, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the most recently used now
    logger.debug("loaded %s for %s from %s", key.kernel, key.arch, path)
    return binary


def _store(path: Path, binary: Binary) -> bool:
    about = {"entry": binary.entry, "arch": binary.key.arch, "parts": binary.key.parts}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".zip")
        temporary = Path(name)
        with (
            os.fdopen(handle, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            archive.writestr(_OBJECT, binary.object_code)
            archive.writestr(_PTX, binary.ptx)
            archive.writestr(_CUBIN, binary.cubin)
            archive.writestr(_ABOUT, json.dumps(about, indent=1))
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): this kernel is not kept", path, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return False
    _prune(path.parent)
    return True


def _prune(folder: Path) -> None:
    """Down to `LIMIT` bytes, the least recently used first, but nothing of the last hour."""
    entries = []
    for path in folder.glob("*.zip"):
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    left = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if left <= LIMIT or used > time.time() - 3600:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            left -= size


@contextlib.contextmanager
def _locked(folder: Path, key: Key) -> Iterator[None]:
    """Hold the lock of ``key``; without one where the folder or the system has none.

    Lock files are never deleted (that would be a race), so there is a fixed number of them.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                name = f".lock-{int(key.digest[:8], 16) % _LOCKS:03}"
                file = stack.enter_context(open(folder / name, "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info("another process is compiling; waiting for %s", key.kernel)
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                logger.debug("no lock in %s (%s)", folder, error)
        yield
