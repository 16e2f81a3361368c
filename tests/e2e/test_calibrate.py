"""What ``calibrate`` keeps decides what ``analyze`` and ``rewrite`` plan. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from onnx_decompose.planning.cost import CPU
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.cost_cache import cost_model
from tests.e2e.planted import Planted, save

if TYPE_CHECKING:
    from pathlib import Path

    from onnx_decompose.planning.cost import CostModel
    from tests.e2e.conftest import Command

pytestmark = pytest.mark.e2e

FREE = dataclasses.replace(
    CPU, kernel=1e-12, copy_rate=1e15, elementwise_rate=1e15, gather_rate=1e15, block=1e-15
)
DEAR = dataclasses.replace(CPU, kernel=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx-decompose" / "cost-cpu.json"


def measured(cost: CostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every calibration comes to ``cost``."""
    monkeypatch.setattr("onnx_decompose.timing.calibration.calibrate", lambda *_, **__: cost)


def test_it_writes_shows_and_names_the_file(
    command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(FREE, monkeypatch)
    result = command("calibrate", "--provider", "cpu")
    assert result.code == 0
    assert result.last_line == f"calibrated: {cache}"
    assert "grouped_flop_rate" in result.out
    assert json.loads(cache.read_text("utf-8"))["cost"]["kernel"] == 1e-12
    assert cost_model(Provider.CPU, CPU.batches) == FREE


@pytest.mark.parametrize(("cost", "decision"), [(FREE, "split"), (DEAR, "dense")])
def test_plans_follow_the_measured_coefficients(
    command: Command,
    eight: Planted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cost: CostModel,
    decision: str,
) -> None:
    measured(cost, monkeypatch)
    model = save(eight.model, tmp_path / "model.onnx")
    report = tmp_path / "report.json"
    command("calibrate", "--provider", "cpu")
    command("analyze", model, "--report", report)
    sites = json.loads(report.read_text("utf-8"))["sites"]
    assert {site["decision"] for site in sites} == {decision}


def test_a_cache_that_cannot_be_written_is_one_line_before_anything_is_measured(
    command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.parent.write_text("a file in the way", "utf-8")

    def never(*_: object, **__: object) -> CostModel:
        raise AssertionError

    monkeypatch.setattr("onnx_decompose.timing.calibration.calibrate", never)
    result = command("calibrate", "--provider", "cpu")
    assert result.code == 2
    assert "cost-cpu.json: its folder is missing or cannot be written" in result.err
