"""What is shipped, and that no file is exempt from the style gates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("cute_fmha", "kernels", "epilogues", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel built from a copy of the sources, so that no build folder appears among them."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in (ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")):
        shutil.copy(path, source)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = target.iterdir()
    return zipfile.ZipFile(path)


def modules_beneath(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_wheel_holds_nothing_but_the_package(wheel):
    roots = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = roots - {"cute_fmha"}
    assert re.fullmatch(r"cute_fmha-[\d.]+\.dist-info", info)
    top_level = wheel.read(f"{info}/top_level.txt").decode().split()
    assert top_level == ["cute_fmha"], "a top-level `kernels` would hide the PyPI package"


def test_wheel_holds_every_module(wheel):
    shipped = {name for name in wheel.namelist() if name.endswith(".py")}
    expected = {f"cute_fmha/{name}" for name in modules_beneath(ROOT / "cute_fmha")}
    expected |= {f"cute_fmha/kernels/{name}" for name in modules_beneath(ROOT / "kernels")}
    expected |= {f"cute_fmha/epilogues/{name}" for name in modules_beneath(ROOT / "epilogues")}
    assert shipped == expected
    assert "cute_fmha/kernels/triton/prefill.py" in shipped
    assert "cute_fmha/epilogues/base.py" in shipped
    assert "cute_fmha/py.typed" in wheel.namelist()


def test_wheel_imports_on_its_own(wheel, tmp_path):
    """Only the wheel's files: the checkout and its editable hook are out of reach."""
    wheel.extractall(tmp_path)
    program = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import cute_fmha, cute_fmha.reference, cute_fmha.epilogues.base, cute_fmha.kernels\n"
        f"assert cute_fmha.kernels.__file__.startswith({str(tmp_path)!r}), cute_fmha.kernels\n"
        "assert not any(m == 'kernels' or m.startswith('kernels.') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_every_folder_is_a_listed_package():
    """A subpackage that pyproject.toml does not list is missing from every installation."""
    folders = {"cute_fmha": "cute_fmha", "kernels": "cute_fmha.kernels"}
    folders["epilogues"] = "cute_fmha.epilogues"
    found = set()
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
            assert (path.parent / "__init__.py").exists(), path
    assert found == set(CONFIG["tool"]["setuptools"]["packages"])


def test_public_names_exist():
    import cute_fmha

    assert sorted(cute_fmha.__all__) == cute_fmha.__all__
    for name in cute_fmha.__all__:
        assert getattr(cute_fmha, name).__doc__, name
    assert cute_fmha.__version__ == CONFIG["project"]["version"]


def keys_of(table: object) -> set[str]:
    if isinstance(table, dict):
        return set(table).union(*map(keys_of, table.values()))
    if isinstance(table, list):
        return set().union(*map(keys_of, table))
    return set()


def test_configuration_exempts_no_file():
    ruff = {
        "exclude", "extend-exclude", "force-exclude", "per-file-ignores", "extend-per-file-ignores"
    }  # fmt: skip
    assert not keys_of(CONFIG["tool"]["ruff"]) & ruff
    mypy = {"exclude", "ignore_errors", "follow_imports"}
    assert not set(CONFIG["tool"]["mypy"]) & mypy
    for override in CONFIG["tool"]["mypy"].get("overrides", []):
        # Packages of others only: how their imports are followed exempts no file of ours.
        assert set(override) <= {
            "module", "ignore_missing_imports", "follow_imports", "follow_imports_for_stubs"
        }  # fmt: skip
        owners = {module.split(".")[0] for module in override["module"]}
        assert not owners & {"*", "cute_fmha", "kernels", "epilogues", "tests"}
    assert {"E", "F", "I", "B"} <= set(CONFIG["tool"]["ruff"]["lint"]["select"])
    for name in ("ruff.toml", ".ruff.toml", "mypy.ini", ".mypy.ini", "setup.cfg", "tox.ini"):
        for folder in (ROOT, *(ROOT / folder for folder in FOLDERS)):
            found = folder.glob(name) if folder == ROOT else folder.rglob(name)
            assert not list(found), "a second configuration would override this one"


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


EXEMPTION = re.compile(r"#\s*(ruff:\s*noqa|flake8:\s*noqa|mypy:|type:\s*ignore\s*$|noqa\s*$)", re.M)


def test_no_file_exempts_itself():
    """Neither a whole file nor, without naming the rule, a line."""
    found = {str(path): EXEMPTION.findall(path.read_text()) for path in sources()}
    assert not {path: marks for path, marks in found.items() if marks}


def test_exemptions_are_recognised():
    for text in ("ruff: noqa", "ruff: noqa: E501", "mypy: ignore-errors", "noqa", "type: ignore"):
        assert EXEMPTION.search("x # " + text), text
    for text in ("noqa: E501", "type: ignore[arg-type]", "why"):
        assert not EXEMPTION.search("x # " + text), text


def test_no_file_names_a_machine_path():
    pattern = re.compile("/" + r"(work|home|root|Users)/\w")
    assert not [str(path) for path in sources() if pattern.search(path.read_text())]
