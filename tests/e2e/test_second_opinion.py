"""Errors of rewritten sites against a bound from theory, in the report of ``validate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.second_opinion import second_opinion
from tests.e2e.planted import Recipe, plant, save
from tests.e2e.random_models import Recipe as RandomRecipe
from tests.e2e.random_models import random_model
from tests.e2e.whole_rewrite import rewrite_once
from tools.planted_models import Blocks, block_triangular, gated_ffn, matmul

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from onnx_decompose.planning.state_graph import Emit
    from tests.e2e.conftest import Command

pytestmark = pytest.mark.e2e


def planted(name: str) -> onnx.ModelProto:
    rng, blocks = np.random.default_rng(0), Blocks(3)
    made: dict[str, Any] = {
        "ffn": lambda: plant(Recipe(form="gemm"), rng),
        "gated": lambda: gated_ffn((24, 48), blocks, np.float32, rng),
        "matmul": lambda: matmul((48, 60), blocks, np.float16, rng),
        "triangular": lambda: block_triangular(48, blocks, np.float32, rng),
    }
    model: onnx.ModelProto = made[name]().model
    return model


@pytest.mark.parametrize(
    ("name", "emit"),
    [("ffn", "split"), ("gated", "grouped"), ("matmul", "split"), ("triangular", "triangular")],
)
def test_errors_are_within_the_bound(name: str, emit: Emit) -> None:
    model = planted(name)
    rewritten = rewrite_once(model, emit).model
    assert rewritten is not None
    checks = second_opinion(Model(model), Model(rewritten), Provider.CPU)
    assert checks
    for check in checks:
        assert check.sites
        assert 0 < check.bound < (0.2 if name == "matmul" else 1e-3)
        assert check.annealed <= 1
        assert check.rewritten <= 1


def test_the_report_has_it(command: Command, tmp_path: Path) -> None:
    model = planted("ffn")
    rewritten = rewrite_once(model, "split").model
    assert rewritten is not None
    paths = save(model, tmp_path / "in.onnx"), save(rewritten, tmp_path / "out.onnx")
    report = tmp_path / "r.json"
    assert command("validate", *paths, "--samples", "1", "--report", report).code == 0
    (check,) = json.loads(report.read_text("utf-8"))["bounds"]
    assert check["sites"] == ["up", "down"]
    assert check["value"] == "y"
    assert 0 < check["rewritten"] <= 1


@pytest.mark.parametrize("seed", range(12))
def test_random_rewrites_are_within_it(seed: int) -> None:
    """Renumbered values and narrower ones are not mistaken for errors."""
    model = random_model(RandomRecipe.drawn(seed))
    rewritten = rewrite_once(model, "auto").model
    if rewritten is None:
        return
    for check in second_opinion(Model(model), Model(rewritten), Provider.CPU):
        assert check.annealed <= 1
        assert check.rewritten <= 1
