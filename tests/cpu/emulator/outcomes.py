"""What a launch found, as tests ask for it."""

from __future__ import annotations

from cute_fmha.emulator.machine import Result


def kinds(result: Result) -> set[str]:
    return {finding.kind for finding in result.findings}


def text(result: Result) -> str:
    return "\n".join(finding.text for finding in result.findings)


def clean(result: Result) -> None:
    assert not result.findings, "\n".join(map(str, result.findings))
