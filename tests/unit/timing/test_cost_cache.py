from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onnx_decompose.errors import OutputError
from onnx_decompose.planning.cost import CPU, CUDA
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing import cost_cache
from onnx_decompose.timing.cost_cache import (
    COEFFICIENTS,
    Machine,
    cache_path,
    cost_model,
    store,
    this_machine,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MEASURED = dataclasses.replace(CPU, kernel=7e-6, transpose_rate=3.5e9)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx-decompose"


def spoil(change: Callable[[dict[str, Any]], object]) -> None:
    """Store, then change what is in the file."""
    path = store(MEASURED, Provider.CPU)
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def test_what_was_stored_is_used_at_the_asked_batch_sizes(folder: Path) -> None:
    assert store(MEASURED, Provider.CPU) == folder / "cost-cpu.json"
    assert cost_model(Provider.CPU, (2, 3)) == dataclasses.replace(MEASURED, batches=(2, 3))


def test_each_provider_has_its_own() -> None:
    store(MEASURED, Provider.CPU)
    assert cost_model(Provider.CUDA, (1,)) == dataclasses.replace(CUDA, batches=(1,))


def test_without_a_cache_the_built_in_coefficients_are_used(folder: Path) -> None:
    assert cost_model(Provider.CPU, (5,)) == dataclasses.replace(CPU, batches=(5,))
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"cost": 3}', b"null"])
def test_a_broken_cache_is_a_line_in_the_log(
    content: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(MEASURED, Provider.CPU).write_bytes(content)
    with caplog.at_level(logging.INFO, "onnx_decompose"):
        assert cost_model(Provider.CPU, CPU.batches) == CPU
    assert f"{folder / 'cost-cpu.json'}: " in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("onnxruntime", "onnxruntime 0.1"), ("device", "Another CPU"), ("threads", 99)],
)
def test_another_machine_is_not_this_one(
    field: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(lambda content: content["machine"].update({field: value}))
    with caplog.at_level(logging.INFO, "onnx_decompose"):
        assert cost_model(Provider.CPU, CPU.batches) == CPU
    assert "another machine" in caplog.text


@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), float("inf"), True, "3e9", None], ids=str
)
def test_coefficients_that_are_no_positive_numbers_are_not_used(
    value: object, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(lambda content: content["cost"].update(kernel=value))
    with caplog.at_level(logging.INFO, "onnx_decompose"):
        assert cost_model(Provider.CPU, CPU.batches) == CPU
    assert "no positive numbers" in caplog.text


def test_coefficients_of_another_version_are_not_used() -> None:
    spoil(lambda content: content["cost"].pop("block"))
    assert cost_model(Provider.CPU, CPU.batches) == CPU
    spoil(lambda content: content["cost"].update(more=1.0))
    assert cost_model(Provider.CPU, CPU.batches) == CPU


def test_a_cache_that_cannot_be_written_says_so(folder: Path) -> None:
    folder.parent.write_text("a file where the folder should be", "utf-8")
    with pytest.raises(OutputError, match=r"cost-cpu\.json: its folder is missing"):
        store(MEASURED, Provider.CPU)


def test_the_folder_without_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = Path("/home/somebody/.cache/onnx-decompose/cost-cuda.json")
    assert cache_path(Provider.CUDA) == expected


def test_this_machine_is_named() -> None:
    here = this_machine(Provider.CPU)
    assert here == this_machine(Provider.CPU)
    assert here.threads >= 1
    assert here.device
    assert here.onnxruntime.startswith("onnxruntime")


def test_names_are_read_from_what_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n",
        "information": "Model: \t\t Some GPU\nIRQ: 1\n",
    }
    monkeypatch.setattr(
        cost_cache, "_lines", lambda path: (told.get(str(path)) or told[path.name]).splitlines()
    )
    monkeypatch.setattr(Path, "glob", lambda *_: [tmp_path / "gpu0"])
    assert this_machine(Provider.CPU).device == "Some CPU @ 2 GHz"
    assert this_machine(Provider.CUDA) == Machine(
        this_machine(Provider.CPU).onnxruntime, "Some GPU", 0
    )


def test_every_coefficient_is_kept() -> None:
    names = {field.name for field in dataclasses.fields(CPU)}
    built_in = {"batches", "lanes", "pick_ratio", "waking"}
    assert set(COEFFICIENTS) == names - built_in
