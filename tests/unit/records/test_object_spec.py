import json
import sys
from pathlib import Path

import pytest

from onnx_decompose.errors import OptionError
from onnx_decompose.records.object_spec import imported_callable, one_line

SOURCE = """
import dataclasses
import neighbour_of_spec

@dataclasses.dataclass
class Settings:
    size: int = 3

def make():
    import late_neighbour_of_spec
    return neighbour_of_spec.VALUE, late_neighbour_of_spec.VALUE, Settings()

NUMBER = 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "json.py").write_text(SOURCE)
    (tmp_path / "spec_module.py").write_text(SOURCE)
    (tmp_path / "neighbour_of_spec.py").write_text("VALUE = 1")
    (tmp_path / "late_neighbour_of_spec.py").write_text("VALUE = 2")
    (tmp_path / "raising.py").write_text("raise ValueError('one\\ntwo')")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    (tmp_path / "needing.py").write_text("import not_installed_at_all")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["json.py:make", "spec_module:make", "./spec_module.py:make"])
def test_modules_and_files(folder: Path, spec: str) -> None:
    before = list(sys.path)
    with imported_callable(spec) as make:
        assert make()[:2] == (1, 2)
    assert sys.path == before
    assert sys.modules["json"] is json
    with imported_callable(f"{folder}/json.py:Settings") as settings:
        assert settings().size == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spec_module", "'spec_module' is not MODULE:NAME; write package.module:function"),
        (":make", "':make' is not MODULE:NAME"),
        ("spec_module:", "'spec_module:' is not MODULE:NAME"),
        ("nowhere_to_be_found:make", "no module 'nowhere_to_be_found'; run this where"),
        ("spec_module.inner:make", "no module 'spec_module.inner'"),
        ("nowhere.py:make", "nowhere.py: no such file; check the path"),
        ("spec_module:other", "spec_module has no 'other'; it has Settings, make"),
        ("spec_module:Settings.other", "spec_module has no 'Settings.other'"),
        ("spec_module:NUMBER", "spec_module:NUMBER is of type int, not a function"),
        ("raising.py:make", "importing raising.py raised ValueError: one"),
        ("raising:make", "importing raising raised ValueError: one"),
        ("leaving:make", "importing leaving raised SystemExit: 3"),
        (
            "needing:make",
            "importing needing raised ModuleNotFoundError: No module named 'not_i",
        ),
        ("needing.py:make", "importing needing.py raised ModuleNotFoundError"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_errors_are_one_line(spec: str, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(OptionError) as raised, imported_callable(spec):
        pass
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert sys.path == before


def test_one_line() -> None:
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("\n a \n b")) == "ValueError: a"
