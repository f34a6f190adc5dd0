"""``python -m cute_fmha.emulate``: targets, policies, reports, exit codes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fmha import emulate
from cute_fmha.emulator.report import short_name

needs_cutlass = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="CuTe DSL (nvidia-cutlass-dsl) is missing"
)

PROGRAM = """
import sys
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import from_dlpack


@cute.kernel
def add_kernel(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    c[i] = a[i] + b[i]


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    add_kernel(a, b, c).launch(grid=(4, 1, 1), block=(128, 1, 1))


def tensors(n=512):
    a, b = torch.randn(2, 512, device="cuda")
    return a, b, torch.empty(n, device="cuda")


def right():
    a, b, c = tensors()
    add(*(from_dlpack(x) for x in (a, b, c)))
    return {"sum": (c, a.double() + b.double())}


def outside():
    a, b, c = tensors(500)
    add(*(from_dlpack(x) for x in (a, b, c)))


def unwritten():
    a, b, c = tensors()
    add(*(from_dlpack(x) for x in (a, b, c)))
    c[3] = float("nan")
    return c, a.double() + b.double()


def fails():
    right()
    raise RuntimeError("a fault of its own")


def launches_nothing():
    return torch.zeros(3), torch.zeros(3)


if __name__ == "__main__":
    print("arguments", sys.argv[1:])
    right()
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "adding.py"
    path.write_text(PROGRAM)
    modules = set(sys.modules)
    yield path
    for name in set(sys.modules) - modules:
        if "adding" in name:
            del sys.modules[name]


# ---------------------------------------------------------------- whole runs


@needs_cutlass
def test_a_right_kernel(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emulate.main([f"{program}:right", "--policy", "all", "--seed", "5", "--tiles", "2"]) == 0
    text = capsys.readouterr().out
    for policy in ("policy eager", "policy lazy", "policy random, seed 5"):
        assert text.count(policy) == 1
    assert text.count("findings: none") == 3
    assert text.count("grid (4, 1, 1), cluster (1, 1, 1), block (128, 1, 1)") == 3
    assert text.count("modelled cycles per CTA: ") == 3
    assert text.count("modelled cycles per tile: ") == 3
    errors = re.findall(r"error against expected: sum: cosine ([\d.]+), max abs error (\S+),", text)
    assert len(errors) == 3
    for cosine, largest in errors:
        assert float(cosine) == pytest.approx(1)
        assert 0 < float(largest) < 1e-6
    assert text.endswith("nothing was found\n")


@needs_cutlass
def test_a_finding(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emulate.main([f"{program}:outside"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"\bbounds\b.*4 bytes written", text)
    assert "PTX line" in text
    line = 1 + PROGRAM[: PROGRAM.index("c[i] = ")].count("\n")
    assert f"adding.py:{line})" in text
    assert text.endswith("something was found\n")


@needs_cutlass
def test_json_and_timeline(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    options = ["--json", "--policy", "random", "--slice", "3", "--no-races", "--strict-tmem-load"]
    options += ["--strict-cp-async", "--benign-races"]
    assert emulate.main([f"{program}:right", *options, "--trace", "2", "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record["found"] is False
    (run,) = record["runs"]
    policy = run["policy"]
    assert (policy["mode"], policy["slice"], policy["races"]) == ("random", 3, False)
    assert all(policy[f] for f in ("strict_tmem_load", "strict_cp_async", "benign_races"))
    (launch,) = run["launches"]
    assert launch["grid"] == [4, 1, 1]
    assert launch["findings"] == []
    counters = launch["counters"]
    assert counters["global_read_bytes"] == 2 * 512 * 4
    assert counters["global_write_bytes"] == 512 * 4
    assert set(counters["by_warp"]) == {"0", "1", "2", "3"}
    assert sum(counters["by_class"].values()) == counters["steps"]
    assert launch["model"]["bottleneck"] in launch["model"]["cycles_per_cta"]
    assert [error["name"] for error in run["errors"]] == ["sum"]
    assert json.loads((out / "0-add_kernel-random.json").read_text())["traceEvents"]
    assert str(out / "0-add_kernel-random.json") in run["files"]


@needs_cutlass
def test_numbers_that_are_not_finite_are_found(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emulate.main([f"{program}:unwritten"]) == 1
    text = capsys.readouterr().out
    assert "findings: none" in text
    assert "NOT FINITE" in text


@needs_cutlass
def test_code_that_fails(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emulate.main([f"{program}:fails"]) == 1
    text = capsys.readouterr().out
    assert "findings: none" in text  # of what ran before
    assert "RuntimeError: a fault of its own" in text


@needs_cutlass
@pytest.mark.parametrize("code", [0, 3])
def test_a_program_with_arguments(
    program: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    before = list(sys.argv), list(sys.path)
    assert emulate.main([str(program), "--", str(code), "--policy", "x"]) == (code != 0)
    text = capsys.readouterr().out
    assert f"arguments ['{code}', '--policy', 'x']" in text
    assert ("the program exited with 3" in text) == (code == 3)
    assert before == (list(sys.argv), list(sys.path))


@needs_cutlass
def test_as_a_command_with_a_module(program: Path) -> None:
    command = [sys.executable, "-m", "cute_fmha.emulate", "adding:right", "--policy", "lazy"]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "policy lazy" in done.stdout
    assert "Cache is disabled" not in done.stderr


@needs_cutlass
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("adding", "give MODULE:FUNCTION"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("nowhere.py", "there is no such file"),
        ("nowhere.py:f", "there is no such file"),
        ("{program}:f", "has no function 'f'"),
        ("{program}:launches_nothing", "launched no CuTe DSL kernel"),
    ],
)
def test_what_cannot_be_run(
    program: Path, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    assert emulate.main([target.format(program=program)]) == 2
    assert message in capsys.readouterr().err


def test_without_cutlass(program: Path) -> None:
    code = (
        "import sys; sys.modules['cutlass'] = None\n"
        "from cute_fmha import emulate\n"
        f"sys.exit(emulate.main([{str(program)!r}]))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: CuTe DSL is not installed")


@needs_cutlass
def test_the_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = Path(__file__).parents[3] / "README.md"
    section = readme.read_text().split("\n## Emulator\n", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    (line,) = re.findall(r"^python -m cute_fmha.emulate (\w+\.py:.*)$", section, re.M)
    target, *options = line.split("#")[0].split()
    (tmp_path / target.split(":")[0]).write_text(code)
    monkeypatch.chdir(tmp_path)
    assert emulate.main([target, *options]) == 0
    assert "nothing was found" in capsys.readouterr().out


# ---------------------------------------------------------------- parts


def test_errors_are_computed_in_float64() -> None:
    expected = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    error = emulate.compare("x", torch.tensor([3.0, -4.0, 0.0, 2.0]), expected)
    assert error.cosine == pytest.approx(25 / (5 * 29**0.5))
    assert (error.max_abs, error.rms, error.expected_rms) == (2, 1, 2.5)
    assert error.finite


def test_errors_of_values_that_are_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    same = torch.tensor([1.0, inf, -inf, nan])
    assert emulate.compare("x", same, same.double()).finite
    assert emulate.compare("x", same, same.double()).cosine == pytest.approx(1)
    for got, expected in ((inf, 1.0), (1.0, inf), (inf, -inf), (nan, 1.0), (1.0, nan)):
        pair = torch.tensor([got, 1.0]), torch.tensor([expected, 1.0])
        assert not emulate.compare("x", *pair).finite
    zero = torch.zeros(4)
    assert emulate.compare("x", zero, zero).cosine == 1
    assert emulate.compare("x", zero, zero + 1).cosine == 0
    assert emulate.compare("x", torch.zeros(0), torch.zeros(0)).finite
    with pytest.raises(emulate.CommandError, match="shape"):
        emulate.compare("x", zero, torch.zeros(5))


def test_what_targets_return() -> None:
    x = torch.ones(2)
    assert [e.name for e in emulate.comparisons((x, x))] == ["result"]
    assert [e.name for e in emulate.comparisons([(x, x), (x, x)])] == ["result 0", "result 1"]
    assert [e.name for e in emulate.comparisons({"a": (x, x), "b": 3})] == ["a"]
    others: list[Any] = [None, 3, x, (x, x, x), [], "text"]
    for other in others:
        assert emulate.comparisons(other) == []


def test_names_of_kernels() -> None:
    long = "kernel_cutlass_kernel_flash_Forward_object_at__tensor0000o11_tensorptrf32_gmem__0"
    assert short_name(long) == "kernel_flash_Forward"
    assert short_name("kernel_cutlass_add_kernel_tensorptrf32_0") == "add_kernel"
    assert short_name("mine") == "mine"
    assert short_name("tensor") == "tensor"


def test_options() -> None:
    parse = emulate.make_parser().parse_args
    assert [p.mode for p in emulate._policies(parse(["x"]))] == ["eager"]
    twice = parse(["x", "--policy", "random", "--policy", "lazy", "--policy", "random"])
    assert [p.mode for p in emulate._policies(twice)] == ["random", "lazy"]
    with pytest.raises(SystemExit):
        parse(["x", "--slice", "0"])
