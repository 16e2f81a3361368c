"""Outputs that data hardly tells apart get one column and a constant each, inside the budget, and both claims hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.merge_proposals import merged_outputs, softmax_usage
from onnx_decompose.calibrated.refitting import refitted
from onnx_decompose.calibrated.search import context_for
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider
from tests.e2e.planted import run, save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.families import Family
    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

INPUTS, OUTPUTS, GROUPS = 96, 1500, 40

TEXT = f"""
<ir_version: 8, opset_import: ["" : 17]>
scores (float[N, {INPUTS}] x) => (float[N, {OUTPUTS}] y)
{{
    y = MatMul(x, w)
}}
"""


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path, NDArray[np.intp]]:
    """A product whose outputs differ from the mean of their group by little but a constant; inputs; the groups."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, GROUPS, OUTPUTS)
    # Along the first input, which is constant, columns differ freely.
    weight = rng.normal(size=(INPUTS, GROUPS))[:, labels]
    weight += 1e-3 * rng.normal(size=weight.shape)
    weight[0] = rng.normal(size=OUTPUTS)
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    inputs = rng.normal(size=(400, INPUTS)).astype(np.float32)
    inputs[:, 0] = 2.0
    np.savez(tmp_path / "calibration.npz", x=inputs)
    return save(model, tmp_path / "scores.onnx"), tmp_path / "calibration.npz", labels


def test_equal_outputs_are_computed_once_with_constants_of_their_own(
    command: Command, planted: tuple[Path, Path, NDArray[np.intp]], tmp_path: Path
) -> None:
    source, calibration, _ = planted
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    options = ("--budget", "0.01", "--force", "--batch", "1", "--emit", "shared")
    data = ("--calibration", str(calibration), "--report", str(report))
    result = command("rewrite", str(source), "-o", str(output), *data, *options)
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert found["sites"][0]["decision"] == "shared"
    assert found["criterion"].startswith("merge")
    assert found["claims"]["structural"]["passed"]
    assert "held out" in found["claims"]["annealing"]["data"]
    assert found["summary"]["weights_after"] < 0.25 * INPUTS * OUTPUTS
    inputs = np.random.default_rng(7).normal(size=(50, INPUTS)).astype(np.float32)
    inputs[:, 0] = 2.0
    before, after = run(source, inputs), run(output, inputs)
    assert np.linalg.norm(after - before) < 0.01 * np.linalg.norm(before)
    checked = command("validate", str(source), str(output), "--inputs", str(calibration))
    assert checked.code == 0, checked.err


def test_without_compensation_different_constants_keep_outputs_apart(
    planted: tuple[Path, Path, NDArray[np.intp]],
) -> None:
    kept = {}
    for compensation in ("mean", "none"):
        context = _context(planted, compensation)
        kept[compensation] = min(
            next(iter(p.equal.values())).labels.max() + 1
            for p in _family(context, "merge")
            if _error(context, p) < 0.05
        )
    assert kept["mean"] < 3 * GROUPS < kept["none"]


def test_outputs_that_are_hardly_used_may_differ_more(
    planted: tuple[Path, Path, NDArray[np.intp]],
) -> None:
    context = _context(planted, "ridge")
    (site,) = context.sites
    used = softmax_usage(context, site)
    assert used.sum() == pytest.approx(1.0)
    plain, by_use = (list(_family(context, family)) for family in ("merge", "merge by use"))
    often = np.argsort(used)[-30:]

    def alone(proposal: object) -> int:
        labels = next(iter(proposal.equal.values())).labels  # type: ignore[attr-defined]
        return int(np.count_nonzero(np.bincount(labels)[labels[often]] == 1))

    assert len(plain) == len(by_use)
    assert sum(map(alone, by_use)) > sum(map(alone, plain))


def _family(context: CalibrationContext, name: str) -> Family:
    return next(family for family in merged_outputs(context) if family.name == name)


def _context(
    planted: tuple[Path, Path, NDArray[np.intp]], compensation: str
) -> CalibrationContext:
    source, calibration, _ = planted
    study = study_model(load_model(source))
    options = Options(calibration=calibration, compensation=compensation)  # type: ignore[arg-type]
    samples = load_inputs(calibration, graph_inputs(study.model.proto))
    return context_for(study, options, samples, Provider.CPU)


def _error(context: CalibrationContext, proposal: object) -> float:
    (site,) = context.sites
    refit = refitted(context, proposal)[site.name]  # type: ignore[arg-type]
    rows = np.random.default_rng(3).normal(size=(200, INPUTS))
    rows[:, 0] = 2.0
    before = rows @ context.study.weight(site)
    after = rows @ refit.stored + refit.added
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
