"""The committed reference models are what their provenance files say, and decompose as the demo promises."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from models import metrics
from models.data import load_task_data
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.structure import Edge, state_components
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.support_proposals import LOSSES, supported_groups
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.pipeline import rewrite, validate
from onnx_decompose.records.priors import read_records
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BatchTiming, Timing

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("digits_mlp", "multitask_dense", "multitask_sparse")

pytestmark = pytest.mark.e2e


def provenance(name: str) -> dict[str, Any]:
    """What the training wrote beside the model."""
    content: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text("utf-8"))
    return content


def accuracies(name: str, path: Path) -> dict[str, float]:
    """Test accuracy per task of the model at ``path``, on the inputs of ``name``."""
    with np.load(MODELS / f"{name}_inputs.npz") as arrays:
        inputs = dict(arrays)
    session = open_model(load_model(path), Provider.CPU)
    return metrics.task_accuracy(inputs, session.run({"input": inputs["input"]}))


def masks(name: str) -> list[NDArray[np.bool_]]:
    """Nonzero entries of each layer, in order."""
    study = study_model(load_model(MODELS / f"{name}.onnx"))
    return [study.weight(site) != 0 for site in study.sites]


@pytest.fixture
def never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a rewrite pays is measured by the demo, not by a test."""
    timing = Timing(Provider.CPU, (BatchTiming(1, 2.0, 1.0, 2.0, 1.9, 2.1, 8),))
    monkeypatch.setattr("onnx_decompose.acceptance.bench_models", lambda *_, **__: timing)


@pytest.mark.parametrize("name", NAMES)
def test_provenance_is_true(name: str) -> None:
    told = provenance(name)
    path = MODELS / f"{name}.onnx"
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    measured = {task: round(value, 4) for task, value in accuracies(name, path).items()}
    assert measured == told["accuracy"]["test"]


@pytest.mark.parametrize("name", NAMES)
def test_initialization_is_recorded(name: str) -> None:
    records = read_records(onnx.load(MODELS / f"{name}.onnx"))
    weights = [record for record in records.values() if len(record.shape) == 2]
    assert len(weights) == 3
    assert {record.family for record in weights} == {
        "normal" if name == "digits_mlp" else "uniform"
    }


def test_multitask_sparse_falls_apart_into_its_tasks() -> None:
    found_masks = masks("multitask_sparse")
    found = state_components(
        (111, 1024, 512, 18), [Edge(i, i + 1, m) for i, m in enumerate(found_masks)]
    )
    with_input_and_output = [
        units for c in range(found.count) if (units := found.units(c))[0].size and units[3].size
    ]
    outputs = sorted(tuple(units[3].tolist()) for units in with_input_and_output)
    assert outputs == [tuple(range(s.start, s.stop)) for s in metrics.OUTPUT_SLOTS.values()]


def test_multitask_sparse_is_rewritten_exactly(tmp_path: Path, never_slower: None) -> None:
    del never_slower
    original, output = MODELS / "multitask_sparse.onnx", tmp_path / "out.onnx"
    report = rewrite(original, output, Options(null="zero", batch=(1,))).report
    assert report.summary.decomposable
    assert report.summary.substructures == 4
    assert report.summary.weights_after < 0.6 * report.summary.weights_before
    assert report.annealing is not None
    assert report.annealing.error < 1e-5
    assert validate(original, output, seeds=2)
    assert accuracies("multitask_sparse", output) == accuracies("multitask_sparse", original)


def test_digits_mlp_loses_what_is_still_its_initialization(
    tmp_path: Path, never_slower: None
) -> None:
    del never_slower
    original, output = MODELS / "digits_mlp.onnx", tmp_path / "out.onnx"
    inputs = MODELS / "digits_mlp_inputs.npz"
    options = Options(null="recorded", calibration=inputs, batch=(1,))
    report = rewrite(original, output, options).report
    assert report.summary.decomposable
    assert report.sites[0].null.startswith("recorded normal")
    assert report.summary.weights_after < 0.6 * report.summary.weights_before
    assert validate(original, output, inputs=inputs, seeds=2)
    assert accuracies("digits_mlp", output) == accuracies("digits_mlp", original)


def test_the_constant_pixels_of_digits_mlp_are_isolated() -> None:
    pixels = load_task_data("digits").train.inputs
    constant = np.flatnonzero((pixels == pixels[0]).all(axis=0))
    study = study_model(load_model(MODELS / "digits_mlp.onnx"))
    evidence = gather_all(study, Options(null="recorded"))
    first = study.sites[0]
    selection = make_criterion("fdr", 0.01).select(
        evidence[first.name], rng=np.random.default_rng(0)
    )
    supported = np.asarray(selection.mask.any(axis=1))
    assert constant.size == 4
    assert not supported[constant].any()
    assert supported.mean() > 0.5


def test_sparse_is_as_accurate_as_dense() -> None:
    sparse, dense = (
        provenance(f"multitask_{kind}")["accuracy"]["test"] for kind in ("sparse", "dense")
    )
    assert all(sparse[task] >= dense[task] - 0.01 for task in metrics.OUTPUT_SLOTS)


def test_multitask_dense_loses_dead_units_and_nothing_else(
    tmp_path: Path, never_slower: None
) -> None:
    """One component at every level; what the recorded initialization lets go are units that do nothing."""
    del never_slower
    original, output = MODELS / "multitask_dense.onnx", tmp_path / "out.onnx"
    report = rewrite(original, output, Options(batch=(1,))).report
    assert report.summary.substructures == 1
    assert [site.blocks for site in report.sites] == [
        ((111, 1024),),
        ((1024, 491),),
        ((491, 18),),
    ]
    assert report.annealing is not None
    assert report.annealing.error < 1e-6
    assert accuracies("multitask_dense", output) == accuracies("multitask_dense", original)


def test_multitask_dense_is_exactly_as_it_was_under_zero(tmp_path: Path) -> None:
    original, output = MODELS / "multitask_dense.onnx", tmp_path / "out.onnx"
    report = rewrite(original, output, Options(null="zero", batch=(1,))).report
    assert not report.summary.decomposable
    assert output.read_bytes() == original.read_bytes()


def test_multitask_dense_falls_apart_by_what_is_active_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but its calibration inputs is known: no label, no word on which output is whose."""
    monkeypatch.setattr("onnx_decompose.calibrated.neighbours.COPIES", 8)
    model = load_model(MODELS / "multitask_dense.onnx")
    samples = load_inputs(MODELS / "multitask_dense_calibration.npz", graph_inputs(model.proto))
    context = CalibrationContext(study_model(model), split_samples(samples, 0), Provider.CPU)
    family = next(supported_groups(context))
    proposal = family.at(LOSSES.index(1e-3))
    assert proposal is not None
    found = state_components(
        (111, 1024, 512, 18),
        [Edge(number, number + 1, mask) for number, mask in enumerate(proposal.masks.values())],
    )
    assert found.count == 4
    outputs = sorted(tuple(found.units(number)[3].tolist()) for number in range(4))
    assert outputs == [tuple(range(s.start, s.stop)) for s in metrics.OUTPUT_SLOTS.values()]
    after = annealed_by(context.study, refitted(context, proposal))
    with np.load(MODELS / "multitask_dense_inputs.npz") as arrays:
        inputs = dict(arrays)
    # Of a task with 30 samples accuracy goes by 3.3 points; what every sample adds to the likelihood tells more.
    before, reached = (
        metrics.task_likelihood(
            inputs, open_model(one, Provider.CPU).run({"input": inputs["input"]})
        )
        for one in (model, after)
    )
    assert all(reached[task] > before[task] - 0.04 for task in before)
