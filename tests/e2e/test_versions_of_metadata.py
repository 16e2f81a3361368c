"""What an older version rewrote validates with this one; what a newer one wrote is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.conftest import Command

pytestmark = pytest.mark.e2e

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metadata"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/rewritten.onnx"))
FEATURES = {
    "first": "sites",
    "folded-bias": '"bias"',
    "stacks": '"stored_rows"',
    "cells": '"constants"',
}


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The model with other metadata."""
    model = onnx.load(source)
    entry = next(p for p in model.metadata_props if p.key == "onnx_decompose.decomposition")
    content = json.loads(entry.value)
    change(content)
    entry.value = json.dumps(content)
    onnx.save(model, target)
    return target


def test_every_earlier_version_is_there() -> None:
    assert set(FEATURES) <= set(NAMES)
    for name, feature in FEATURES.items():
        model = onnx.load(FIXTURES / name / "rewritten.onnx")
        texts = {p.key: p.value for p in model.metadata_props}
        assert feature in texts["onnx_decompose.decomposition"]


@pytest.mark.parametrize("name", NAMES)
def test_it_validates(command: Command, name: str, tmp_path: Path) -> None:
    folder, report = FIXTURES / name, tmp_path / "r.json"
    result = command(
        *("validate", folder / "original.onnx", folder / "rewritten.onnx"),
        *("--samples", "1", "--report", report),
    )
    assert result.code == 0, result.err
    claim = json.loads(report.read_text("utf-8"))["claims"]["structural"]
    assert claim["passed"]
    assert claim["sites"] >= 2


@pytest.mark.parametrize("name", NAMES)
def test_it_is_not_waved_through(command: Command, name: str, tmp_path: Path) -> None:
    """One entry of the first block is a thousandth larger, or one step in integers."""
    folder, target = FIXTURES / name, tmp_path / "corrupted.onnx"
    model = onnx.load(folder / "rewritten.onnx")
    content = json.loads(
        next(p.value for p in model.metadata_props if "decomposition" in p.key)
    )
    block = next(iter(content["sites"].values()))["blocks"][0]["initializer"]
    tensor = next(t for t in model.graph.initializer if t.name == block)
    values = numpy_helper.to_array(tensor).copy()
    place = np.flatnonzero(values)[0]
    values.flat[place] = values.flat[place] * 1.001 if values.dtype.kind == "f" else 77
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    result = command("validate", folder / "original.onnx", target, "--samples", "1")
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert "claim A does not hold: site '" in line


def test_a_newer_format_is_one_clear_line(command: Command, tmp_path: Path) -> None:
    folder = FIXTURES / "first"
    newer = edited(
        folder / "rewritten.onnx",
        tmp_path / "newer.onnx",
        lambda content: content.update(format=2, unheard_of={}),
    )
    result = command("validate", folder / "original.onnx", newer)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line == (
        f"onnx-decompose: error: {newer}: was rewritten by a newer onnx-decompose; "
        "update this one to validate it"
    )


def test_what_a_newer_version_adds_to_this_format_is_passed_over(
    command: Command, tmp_path: Path
) -> None:
    folder = FIXTURES / "first"
    noted = edited(
        folder / "rewritten.onnx",
        tmp_path / "noted.onnx",
        lambda content: content.update(note="for people"),
    )
    assert command("validate", folder / "original.onnx", noted, "--samples", "1").code == 0


def test_without_metadata_it_is_a_plain_comparison(command: Command, tmp_path: Path) -> None:
    folder, plain = FIXTURES / "first", tmp_path / "plain.onnx"
    model = onnx.load(folder / "rewritten.onnx")
    del model.metadata_props[:]
    onnx.save(model, plain)
    result = command("validate", folder / "original.onnx", plain, "--samples", "1")
    assert result.code == 0, result.err
    assert "claim A: not checked, the model carries no onnx-decompose metadata" in result.out
    tensor = next(t for t in model.graph.initializer if t.name.startswith("down"))
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(2 * values, tensor.name))
    onnx.save(model, plain)
    result = command("validate", folder / "original.onnx", plain, "--samples", "1")
    assert result.code == 1
    assert "claim B does not hold" in result.err
