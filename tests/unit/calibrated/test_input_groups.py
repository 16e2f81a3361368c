"""Groups of inputs, and the second moments over their own rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.input_groups import InputGroups, input_groups, survey_inputs
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.search import GENERATORS
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[N, 8] x) => (float[N, 4] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""


@pytest.fixture
def context(rng: np.random.Generator) -> CalibrationContext:
    """Inputs 0 to 4 are active in every other row, 5 to 7 in the others."""
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in (("w0", (8, 16)), ("w1", (16, 4))):
        weight = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    x = rng.normal(size=(600, 8)).astype(np.float32)
    x[::2, 5:] = 0
    x[1::2, :5] = 0
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    study = study_model(Model(proto))
    return CalibrationContext(study, split_samples(samples, 0), Provider.CPU, neighbours=False)


def groups_of(context: CalibrationContext) -> InputGroups | None:
    (region,) = context.study.regions
    return input_groups(context, survey_inputs(context, region), 0.0)


def test_moments_of_a_group_are_over_its_own_rows(context: CalibrationContext) -> None:
    groups = groups_of(context)
    assert groups is not None
    assert groups.labels.tolist() == [groups.labels[0]] * 5 + [1 - groups.labels[0]] * 3
    x = np.concatenate([feeds["x"] for feeds, _ in context.parts.fit.batches(10_000)])
    weight = context.study.weight(context.sites[0])
    hidden = np.maximum(x @ weight, 0).astype(np.float64)
    assert groups.between == ["b"]
    for group, own in enumerate(groups.moments(context)):
        rows = x[:, groups.labels == group].any(axis=1)
        assert own["b"].count == pytest.approx(rows.sum())
        assert np.allclose(own["b"].xx, np.cov(hidden[rows].T, bias=True), rtol=1e-4, atol=1e-6)


def test_without_room_for_their_moments_there_are_no_groups(
    context: CalibrationContext,
) -> None:
    needed = 2 * 8 * 16**2
    enough, short = (
        dataclasses.replace(context, moment_bytes=most) for most in (needed, needed - 1)
    )
    assert groups_of(enough) is not None
    assert groups_of(short) is None
    for kind in ("support", "networks"):
        assert any(proposal for family in GENERATORS[kind](enough) for proposal in family)
        assert not any(proposal for family in GENERATORS[kind](short) for proposal in family)


def test_a_site_that_reads_too_much_for_its_moments_is_left_as_it_is(
    context: CalibrationContext,
) -> None:
    names = [site.input for site in context.sites]
    assert names == ["x", "b"]
    short = dataclasses.replace(context, moment_bytes=8 * 16**2 - 1)
    assert [site.input for site in short.sites] == ["x"]
