"""The permutation control: structure that shuffled weights do not have, and structure that they do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.e2e.planted import Recipe, network, plant, save

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = pytest.mark.e2e


def p_values(command: Command, model: Path, *options: str) -> list[float]:
    report = model.with_suffix(".json")
    assert command("analyze", model, "--report", report, *options).code == 0
    return [site["p_structure"] for site in json.loads(report.read_text("utf-8"))["sites"]]


def test_planted_blocks_are_more_than_chance(command: Command, tmp_path: Path) -> None:
    planted = plant(Recipe(blocks=((6, 12, 5),) * 4), np.random.default_rng(0))
    assert max(p_values(command, save(planted.model, tmp_path / "m.onnx"))) <= 0.01


def test_scattered_entries_are_not(command: Command, tmp_path: Path) -> None:
    """So few entries that chance alone leaves many components and isolated units."""
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=s) * (rng.random(s) < 0.01) for s in ((24, 50), (50, 12))]
    model = network(weights, [np.zeros(50), np.zeros(12)], Recipe())
    assert min(p_values(command, save(model, tmp_path / "m.onnx"))) > 0.05


def test_deterministic_by_the_seed(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s) * (rng.random(s) < 0.06) for s in ((24, 50), (50, 12))]
    model = save(network(weights, [np.zeros(50), np.zeros(12)], Recipe()), tmp_path / "m.onnx")
    assert p_values(command, model) == p_values(command, model)
    seeds = [p_values(command, model, "--seed", str(seed)) for seed in range(4)]
    assert len({tuple(values) for values in seeds}) > 1
