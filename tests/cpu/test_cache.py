"""The kernel cache: what it keeps, what it refuses, and several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import time
import zipfile
from dataclasses import dataclass

import pytest

from cute_fmha import cache
from cute_fmha.cache import Binary, Key

KEY = Key("prefill", "sm_100a", (("plan", "Plan(128)"), ("sources", "abc")))


class Compiler:
    """Makes a binary of random bytes, and counts."""

    def __init__(self, key: Key = KEY) -> None:
        self.key, self.calls = key, 0

    def __call__(self) -> Binary:
        self.calls += 1
        return Binary(self.key, "entry", os.urandom(5000), "// PTX ü", os.urandom(3000))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_FMHA_CACHE", str(tmp_path / "cache"))
    cache.forget()
    yield tmp_path / "cache"
    cache.forget()


def contents(binary: Binary) -> tuple[object, ...]:
    return binary.key, binary.entry, binary.object_code, binary.ptx, binary.cubin


def test_kept_in_the_process_and_on_disk(caplog):
    compiler = Compiler()
    with caplog.at_level("INFO", logger="cute_fmha"):
        first = cache.fetch(KEY, compiler)
        assert cache.fetch(KEY, compiler) is first
        said = [record.getMessage() for record in caplog.records]
        cache.forget()
        loaded = cache.fetch(KEY, compiler)
    assert loaded is not first
    assert contents(loaded) == contents(first)
    assert compiler.calls == 1
    assert said[0] == "compiling prefill for sm_100a: Plan(128)"
    assert f"kept in {cache.path_of(KEY)}" in said[1]
    assert len(caplog.records) == 2  # loading is not worth a line


@pytest.mark.parametrize(
    "other",
    [
        Key("decode", "sm_100a", KEY.parts),
        Key("prefill", "sm_103a", KEY.parts),
        Key("prefill", "sm_100a", (("plan", "Plan(64)"), ("sources", "abc"))),
        Key("prefill", "sm_100a", (("plan", "Plan(128)"), ("sources", "abd"))),
        Key("prefill", "sm_100a", (*KEY.parts, ("epilogue", "x"))),
        Key("prefill", "sm_100a", (("plan", "Plan(128)s"), ("ources", "abc"))),
    ],
)
def test_everything_in_the_key_counts(other):
    mine, theirs = Compiler(), Compiler(other)
    a, b = cache.fetch(KEY, mine), cache.fetch(other, theirs)
    cache.forget()
    assert contents(cache.fetch(KEY, mine)) == contents(a)
    assert contents(cache.fetch(other, theirs)) == contents(b)
    assert (mine.calls, theirs.calls) == (1, 1)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def damage_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("about.json", "{}")


def damage_about(path):
    """A file of another key under this name."""
    other = Key("prefill", "sm_100a", (("plan", "Plan(128)"), ("sources", "old")))
    cache._store(path, Compiler(other)())


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_byte, damage_member, damage_about, damage_empty]
)
def test_a_damaged_entry_is_compiled_again(damage, caplog):
    compiler = Compiler()
    cache.fetch(KEY, compiler)
    cache.forget()
    damage(cache.path_of(KEY))
    again = cache.fetch(KEY, compiler)
    assert compiler.calls == 2
    assert any("is damaged" in record.getMessage() for record in caplog.records)
    cache.forget()
    caplog.clear()
    assert contents(cache.fetch(KEY, compiler)) == contents(again)
    assert compiler.calls == 2
    assert not caplog.records


def test_a_folder_that_cannot_be_written(folder, caplog):
    folder.write_text("a file, not a folder")
    compiler = Compiler()
    first = cache.fetch(KEY, compiler)
    assert cache.fetch(KEY, compiler) is first
    assert compiler.calls == 1
    assert "this kernel is not kept" in caplog.text


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTE_FMHA_CACHE", "~/kernels")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("CUTE_FMHA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "cute_fmha"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / ".cache" / "cute_fmha"


def _compile_slowly(log, die):
    def compile_():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        if die:
            os._exit(1)
        return Compiler()()

    cache.forget()
    cache.fetch(KEY, compile_)


@pytest.mark.parametrize("die", [False, True])
def test_processes_compile_once(tmp_path, die):
    """Also when the one that compiles is killed: another takes over."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_compile_slowly, args=(log, die and i == 0)) for i in range(4)
    ]
    children[0].start()
    while not log.exists():
        time.sleep(0.01)
    for child in children[1:]:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [int(die), 0, 0, 0]
    assert len(log.read_text().split()) == 1 + die
    assert len(list(cache.path_of(KEY).parent.glob("*.zip"))) == 1
    assert not list(cache.path_of(KEY).parent.glob(".*.zip"))


def test_old_entries_go_first(monkeypatch):
    keys = [Key("prefill", "sm_100a", (("plan", str(i)),)) for i in range(6)]
    size = 8000
    for i, key in enumerate(keys[:5]):
        cache.fetch(key, Compiler(key))
        old = time.time() - 7200 + i if i < 4 else time.time()
        os.utime(cache.path_of(key), (old, old))
    cache.forget()
    cache.fetch(keys[0], Compiler(keys[0]))  # used again
    monkeypatch.setattr(cache, "LIMIT", 3 * size + size // 2)
    cache.fetch(keys[5], Compiler(keys[5]))
    left = [key.parts[0][1] for key in keys if cache.path_of(key).exists()]
    assert left == ["0", "4", "5"]


@dataclass(frozen=True)
class Inner:
    flag: bool
    kind: type


@dataclass(frozen=True)
class Outer:
    number: float
    inner: Inner
    words: tuple[str, ...]


def test_texts_of_plans():
    value = Outer(0.1, Inner(True, Compiler), ("a", "b"))
    name = f"{Compiler.__module__}.Compiler"
    assert cache.describe(value) == f"Outer(number=0.1, inner=Inner(flag=True, kind={name}), " + (
        "words=('a', 'b'))"
    )
    with pytest.raises(ValueError, match="no stable text"):
        cache.describe(object())


def test_sources_count_by_name_and_content(tmp_path):
    """And not by where they are: a wheel's folders sort otherwise than the repository's."""
    digests = []
    for first, second in (("x/kernels", "x/tiles"), ("z/kernels", "y/tiles")):
        files = [tmp_path / first / "a.py", tmp_path / second / "b.py"]
        for file, text in zip(files, ("one", "two"), strict=True):
            file.parent.mkdir(parents=True)
            file.write_text(text)
        digests += [cache.source_digest(files), cache.source_digest(files[::-1])]
    assert len(set(digests)) == 1
    files[1].write_text("three")
    assert cache.source_digest(files) != digests[0]
