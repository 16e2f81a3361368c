"""Calibrated annealing of weights of integers: hidden units go, and what is refitted stays on the stored grid."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.search import context_for
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from tests.e2e import quantized_models as forms
from tests.e2e.planted import Recipe, decomposition, network, run, save
from tests.e2e.quantized_models import Coding, quantized_network

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Array = NDArray[Any]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

INPUTS, OWN, HIDDEN, OUTPUTS = 24, 16, 96, 8

CASES = {
    "qdq": (forms.qdq, Coding()),
    "qdq-outputs": (forms.qdq, Coding(1)),
    "qdq-unsigned": (forms.qdq, Coding(None, np.uint8, 9)),
    "qdq-gemm-outputs": (forms.qdq_gemm, Coding(1)),
    "qdq-codes": (forms.qdq_codes, Coding()),
    "bare": (forms.bare, Coding()),
    "weight-only-outputs": (forms.turned, Coding(1, np.uint8, 7)),
    "cast-outputs": (forms.cast_and_mul, Coding(1, np.uint8, 5)),
    "dynamic": (forms.dynamic, Coding()),
    "dynamic-outputs": (forms.dynamic, Coding(1, np.uint8, 7)),
    "qlinear": (forms.qlinear, Coding()),
    "qlinear-outputs": (forms.qlinear, Coding(1)),
}
APART = {"dynamic", "dynamic-outputs"}
"""Forms whose hidden units take their scale from each other, so that none can go."""


def redundant(rng: np.random.Generator) -> onnx.ModelProto:
    """A network whose hidden units are ``OWN`` different ones, six times each, and less so."""
    up = rng.normal(0, 0.25, (INPUTS, OWN))
    copies = HIDDEN // OWN
    repeated = np.tile(up, copies) + 0.01 * rng.normal(size=(INPUTS, HIDDEN))
    biases = np.tile(rng.normal(0, 0.3, OWN), copies), rng.normal(0, 0.3, OUTPUTS)
    down = rng.normal(0, 0.08, (HIDDEN, OUTPUTS))
    return network([repeated, down], biases, Recipe())


def normal(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    return rng.normal(size=(rows, INPUTS)).astype(np.float32)


def error(before: Array, after: Array) -> float:
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize("case", sorted(CASES.keys() - APART))
def test_units_that_the_others_stand_in_for_go_and_weights_stay_integers(
    case: str, command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    product, coding = CASES[case]
    model = quantized_network(redundant(rng), product, coding, rng)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report, annealed, data = (tmp_path / name for name in ("r.json", "a.onnx", "x.npz"))
    np.savez(data, x=normal(rng, 1500))
    fixed = ("--force", "--batch", "256", "--calibration", data, "--budget", "0.1")
    more = ("--report", report, "--save-annealed", annealed, "--annealing", "calibrated")
    done = command("rewrite", source, "-o", output, *fixed, *more)
    assert done.code == 0, done.err
    assert done.last_line.startswith("rewritten: "), done.last_line
    found = json.loads(report.read_text("utf-8"))
    assert found["claims"]["structural"]["passed"] is True
    assert all(columns < HIDDEN / 2 for (_, columns) in found["sites"][0]["blocks"])
    rewritten = onnx.load(output)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for path in (output, annealed):
        for tensor in onnx.load(path).graph.initializer:
            base = next((name for name in types if tensor.name.startswith(f"{name}.")), None)
            if tensor.name not in types and base is not None and "weight" in base:
                assert tensor.data_type == types[base]
    sites = decomposition(rewritten)["sites"]
    assert (sites["up"]["annealing"], sites["down"]["annealing"]) == ("masked", "refitted")
    x = normal(rng, 400)
    assert error(run(model, x), run(rewritten, x)) < 0.11
    checked = command("validate", source, output, "--inputs", data, "--budget", "0.1")
    assert checked.code == 0, checked.err


@pytest.mark.parametrize("case", CASES)
def test_a_refit_takes_over_on_the_stored_grid(case: str, rng: np.random.Generator) -> None:
    """Of a site's inputs that say the same, half go."""
    product, coding = CASES[case]
    proto = quantized_network(redundant(rng), product, coding, rng)
    x = normal(rng, 1200)
    context = context_for(
        study_model(Model(proto)),
        Options(),
        samples_from_arrays({"x": x}, graph_inputs(proto)),
        Provider.CPU,
    )
    assert [site.name for site in context.sites] == ["up", "down"]
    site = context.sites[1]
    mask = np.ones(site.shape, dtype=bool)
    mask[HIDDEN // 2 :] = False
    new = normal(rng, 300)
    errors = []
    for compensation in ("ridge", "none"):
        proposal = Proposal("half of the hidden units", {"down": mask})
        asked = dataclasses.replace(context, compensation=compensation)
        refit = refitted(asked, proposal)["down"]
        stored = context.study.stored(site)
        assert refit.stored.dtype == stored.dtype
        assert np.issubdtype(stored.dtype, np.integer)
        nothing = np.broadcast_to(
            context.study.annealed(site, np.zeros(site.shape, dtype=bool)), site.shape
        )
        np.testing.assert_array_equal(refit.stored[~mask], nothing[~mask])
        annealed = annealed_by(context.study, {"down": refit}).proto
        assert [node.op_type for node in annealed.graph.node] == [
            node.op_type for node in proto.graph.node
        ]
        errors.append(error(run(proto, new), run(annealed, new)))
    assert errors[0] < 0.1
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("case", ["qdq-codes", "qdq-gemm-outputs", "qlinear", "dynamic"])
def test_a_constant_is_stored_in_the_form_that_the_bias_has(
    case: str, rng: np.random.Generator
) -> None:
    """What is removed and has a mean leaves a constant."""
    product, coding = CASES[case]
    proto = quantized_network(redundant(rng), product, coding, rng)
    x = normal(rng, 1200)
    x[:, -6:] = 1.5  # they never vary
    study = study_model(Model(proto))
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    context = context_for(study, Options(), samples, Provider.CPU)
    mask = np.ones((INPUTS, HIDDEN), dtype=bool)
    mask[-6:] = False
    annealed = annealed_by(
        study, refitted(context, Proposal("constant inputs go", {"up": mask}))
    ).proto
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for graph in (proto.graph, annealed.graph)
    )
    bias = after["up.bias.folded"]
    assert bias.dtype == before["up.bias"].dtype
    assert not np.array_equal(bias, before["up.bias"])
    assert error(run(proto, x[:300]), run(annealed, x[:300])) < 0.05
