"""What is installed, under which names: editable, wheel and sdist."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The link to passes is followed by some versions of Python.
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "onnx_decompose").rglob("*.py")
    if "passes" not in path.relative_to(ROOT).parts
} | {f"onnx_decompose/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, as an installer does it."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    built = run_python("-m", "build", "--no-isolation", "--outdir", str(out), cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_passes_is_refused_under_its_folder_name() -> None:
    result = run_python("-c", "import passes", cwd=ROOT)
    assert result.returncode == 1
    assert "ImportError: import onnx_decompose.passes instead of 'passes'" in result.stderr


def test_passes_is_installed_inside_the_package_only(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('onnx_decompose.passes').origin); "
    code += "print(u.find_spec('passes'))"
    result = run_python("-I", "-c", code, cwd=tmp_path)
    origin, top_level = result.stdout.splitlines()
    assert Path(origin).name == "__init__.py"
    assert top_level == "None"


def test_every_package_folder_is_listed() -> None:
    """The list in pyproject.toml is explicit: the wheel would lack a forgotten sub-package."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {init.parent for init in (ROOT / "onnx_decompose").glob("**/__init__.py")}
    folders |= {ROOT / "onnx_decompose", ROOT / "onnx_decompose" / "passes"}
    found = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert set(config["tool"]["setuptools"]["packages"]) == found


def test_the_command_is_registered() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="onnx-decompose")
    assert [script.value for script in scripts] == ["onnx_decompose.cli:main"]


def test_onnxruntime_variants_are_never_asked_for_together() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = config["project"]["optional-dependencies"]
    asking = {
        extra: requirement.partition(">")[0].partition("[")[0]
        for extra, requirements in extras.items()
        for requirement in [*requirements, *config["project"]["dependencies"]]
        if requirement.startswith("onnxruntime")
    }
    assert asking == {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}


@pytest.mark.e2e
def test_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == SOURCES | {"onnx_decompose/py.typed"}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"onnx_decompose"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.e2e
def test_sdist_holds_passes_once_and_no_link(distributions: tuple[Path, Path]) -> None:
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members]
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert "passes/__init__.py" in names
    assert not [name for name in names if name.startswith("onnx_decompose/passes")]
    assert {"LICENSE", "README.md", "pyproject.toml"} <= set(names)
    assert len(names) == len(set(names))
