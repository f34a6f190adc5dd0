"""Ahead-of-time compilation, its cache seen from another process, and `emulate --kernel`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cute_fmha import cache, emulate, machine_code
from cute_fmha import compile as command
from cute_fmha.kernels.blackwell import build, launch
from cute_fmha.problem import Target
from cute_fmha.problem_text import parse

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

PROBLEM = "b2,sq150,sk200,hq4,hkv2,d128,causal,bf16,lse"


def has_tools() -> bool:
    try:
        return bool(machine_code.tool("nvdisasm") and machine_code.tool("cuobjdump"))
    except machine_code.ToolError:
        return False


tools = pytest.mark.skipif(not has_tools(), reason="no nvdisasm and cuobjdump")


@tools
def test_compile_for_both_architectures(capsys):
    assert command.main(["--arch", "all", "--json", "--problem", PROBLEM]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["arch"] for record in records] == ["sm_100a", "sm_103a"]
    for record in records:
        assert record["kernel"] == "prefill"
        assert (record["stack"], record["local"]) == (0, 0)
        assert record["counts"]["spills"] == {"STL": 0, "LDL": 0}
        assert record["counts"]["tensor core"]["UTCHMMA"] == 32
        assert record["tmem_columns"] == 512
        assert sum(record["shared"]["parts"].values()) == record["shared"]["bytes"]
        assert record["registers"]["softmax"] > record["registers"]["entry"] == 128
        assert record["plan"]["features"] == ["window_right", "lse"]
    text = command.text_of(records[0], 1.0)
    for pattern in (
        r"registers +128 per thread at entry, 512 threads; then softmax \d+, correction",
        r"stack, local +0, 0 bytes",
        r"shared memory +\d+ bytes of 232448: Q 65536",
        r"TMEM columns +512: S0 0–127",
        r"tensor core +UTCHMMA 32, UTCBAR \d+",
    ):
        assert re.search(pattern, text), (pattern, text)


def test_architectures_are_what_the_cubins_are_for():
    problem = parse(PROBLEM).problem
    for capability, arch in ((100, "sm_100a"), (103, "sm_103a")):
        binary = launch.prepare(problem, Target("cuda", capability, 148)).binary
        assert f".target {arch}" in binary.ptx
        assert binary.key.arch == arch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "d128,x3"], "'x3' in 'd128,x3' is not a word"),
        (["--problem", "d80"], "the prefill kernel has"),
    ],
)
def test_compile_refuses(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


_CHILD = """
import logging, torch
from cute_fmha.kernels.blackwell import build
def refuse(*a): raise AssertionError("compiled again")
build.compile_binary = refuse
from cute_fmha import attention
g = torch.Generator().manual_seed(1)
q, k, v = (torch.randn(2, n, h, 128, generator=g).bfloat16() for n, h in
           ((150, 4), (200, 2), (200, 2)))
out, lse = attention(q, k, v, causal=True, return_lse=True, backend="emulator")
print(out.double().sum().item(), lse.double().sum().item())
"""


def test_another_process_loads_and_does_not_compile():
    """Its function is linked from the file, and launches what this process' does."""
    launch.prepare(parse(PROBLEM).problem, Target("cuda", 100, 148))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    from cute_fmha import attention

    g = torch.Generator().manual_seed(1)
    shapes = ((150, 4), (200, 2), (200, 2))
    q, k, v = (torch.randn(2, n, h, 128, generator=g).bfloat16() for n, h in shapes)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="emulator")
    sums = f"{out.double().sum().item()} {lse.double().sum().item()}"
    assert done.stdout.strip() == sums


def test_a_damaged_entry_costs_a_compilation(tmp_path, monkeypatch, caplog):
    """Of a file in the middle of its object code; the result is that of an undamaged one."""
    problem = parse(PROBLEM).problem
    target = Target("cuda", 100, 148)
    binary = launch.prepare(problem, target).binary
    path = cache.path_of(binary.key)
    monkeypatch.setenv("CUTE_FMHA_CACHE", str(tmp_path))
    copy = cache.path_of(binary.key)
    copy.parent.mkdir(parents=True)
    data = bytearray(path.read_bytes())
    data[5000] ^= 0xFF
    copy.write_bytes(data)
    cache.forget()
    compiled = []

    def compile_binary(key, *arguments):
        compiled.append(key)
        return binary

    monkeypatch.setattr(build, "compile_binary", compile_binary)
    launch.prepare(problem, target)
    assert len(compiled) == 1
    assert "is damaged" in caplog.text
    cache.forget()
    assert launch.prepare(problem, target).binary.object_code == binary.object_code
    assert len(compiled) == 1


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_host_code_runs_on_other_processors(tmp_path):
    """It is not compiled for this one: no vectors wider than every x86-64 server has."""
    problem = parse(PROBLEM).problem
    binary = launch.prepare(problem, Target("cuda", 100, 148)).binary
    path = tmp_path / "host.o"
    path.write_bytes(binary.object_code)
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "%xmm" in text
    assert not re.search(r"%[yz]mm", text)


def emulated(*arguments: str) -> list[str]:
    return ["--kernel", "prefill", "--quiet", *arguments]


def test_emulate_a_kernel(capsys):
    problem = "sq150,sk900,hq2,hkv1,d128,causal,fp16,skip,stats"
    assert emulate.main(emulated("--problem", problem, "--policy", "all", "--sms", "2")) == 0
    text = capsys.readouterr().out
    assert text.count("kernel fmha_prefill") == 3
    assert text.count("findings: none") == 3
    assert len(re.findall(r"output: cosine 0\.99999\d+", text)) == 3
    assert text.count("error against expected: LSE: cosine 1.000000") == 3
    skipped, total = map(int, re.findall(r"\(skipped, all\): \((\d+), (\d+)\), expected", text)[0])
    assert 0 < skipped < total
    assert "nothing was found" in text


def test_emulate_decode(capsys):
    arguments = ["--kernel", "decode", "--quiet", "--sms", "4", "--policy", "random", "--problem"]
    problem = "b2,sq2,sk300,hq8,hkv2,d64,causal,paged64"
    assert emulate.main([*arguments, problem]) == 0
    assert "nothing was found" in capsys.readouterr().out
    assert emulate.main([*arguments, problem + ",skip"]) == 2
    assert "name their number, as in splits1" in capsys.readouterr().err


def test_emulate_fails_on_wrong_numbers(capsys, monkeypatch):
    """A gate that is missed and counters that are wrong are both reported."""
    host = launch.KERNELS[0]
    right = host.call_arguments

    def wrong(problem, target):
        arguments = right(problem, target)

        def of(call):
            *tensors, scalars = arguments(call)
            return (*tensors, (scalars[0] * 1.05, *scalars[1:]))

        return of

    monkeypatch.setattr(host, "call_arguments", wrong)
    problem = "sq140,sk200,h3,d128,fp16,lse"  # prepared for no other test
    assert emulate.main(emulated("--problem", problem)) == 1
    assert "a quality gate is missed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "d80"], "the prefill kernel has"),
        (["--problem", "d128,x"], "is not a word of a problem"),
    ],
)
def test_emulate_refuses(arguments, message, capsys):
    assert emulate.main(emulated(*arguments)) == 2
    assert message in capsys.readouterr().err


def test_emulate_needs_a_target_or_a_kernel(capsys):
    for arguments in (
        [],
        ["x.py:f", "--kernel", "prefill", "--problem", "d128"],
        ["--problem", "d128"],
    ):
        with pytest.raises(SystemExit):
            emulate.main(arguments)
        assert "give TARGET or --kernel" in capsys.readouterr().err
