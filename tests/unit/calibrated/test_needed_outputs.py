"""Which outputs the metric looks at in the rows of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.needed_outputs import needed_outputs
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
heads (float[N, 4] x) => (float[N, 3] y)
{
    y = MatMul(x, w)
}
"""


def own_heads(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, float]:
    """Outputs 0 and 1 in the rows of group 0, output 2 in those of group 1."""
    first = inputs["task"] == 0
    wanted, made = inputs["wanted"], outputs["y"]
    return {
        "first": -float(np.square(made[first, :2] - wanted[first, :2]).sum()),
        "second": -float(np.square(made[~first, 2] - wanted[~first, 2]).sum()),
    }


def context(
    rng: np.random.Generator, metric: Metric | None, text: str = TEXT
) -> CalibrationContext:
    model = onnx.parser.parse_model(text)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    task = np.arange(60) % 2
    x = rng.normal(size=(60, 4)).astype(np.float32)
    x[task == 0, 2:] = 0
    x[task == 1, :2] = 0
    arrays: dict[str, NDArray[Any]] = {"x": x, "task": task, "wanted": x @ weight}
    samples = samples_from_arrays(arrays, graph_inputs(model))
    return CalibrationContext(
        study_model(Model(model)), split_samples(samples, 0), Provider.CPU, metric=metric
    )


def shares(values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    active = values["x"] != 0
    return np.stack([active[:, :2].any(axis=1), active[:, 2:].any(axis=1)], axis=1).astype(
        float
    )


def test_an_output_is_needed_where_the_metric_looks_at_it(rng: np.random.Generator) -> None:
    found = needed_outputs(context(rng, Metric("own", own_heads)), "y", ["x"], shares)
    assert found is not None
    assert np.array_equal(found > 0, [[True, False], [True, False], [False, True]])


def test_without_a_metric_nothing_is_said(rng: np.random.Generator) -> None:
    assert needed_outputs(context(rng, None), "y", ["x"], shares) is None


def test_of_values_that_are_no_outputs_nothing_is_said(rng: np.random.Generator) -> None:
    asked = context(rng, Metric("own", own_heads))
    assert needed_outputs(asked, "w", ["x"], shares) is None


QUANTIZED = """
<ir_version: 8, opset_import: ["" : 17]>
heads (float[N, 4] x) => (float[N, 3] y)
<float s = {0.05}, uint8 z = {128}>
{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    m = MatMul(d, w)
    r = QuantizeLinear(m, s, z)
    y = DequantizeLinear(r, s, z)
}
"""


def test_an_output_shows_the_integers_that_it_is_made_of(rng: np.random.Generator) -> None:
    def of_integers(values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        return shares({"x": values["q"] != 128})

    found = needed_outputs(
        context(rng, Metric("own", own_heads), QUANTIZED), "r", ["q"], of_integers
    )
    assert found is not None
    assert np.array_equal(found > 0, [[True, False], [True, False], [False, True]])


def test_a_constant_metric_needs_nothing(rng: np.random.Generator) -> None:
    found = needed_outputs(context(rng, Metric("one", lambda *_: 1.0)), "y", ["x"], shares)
    assert found is not None
    assert not found.any()


def picky(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> float:
    """Defined within the range of what the model makes."""
    if np.abs(outputs["y"]).max() > np.abs(inputs["wanted"]).max() + 1e-3:
        raise ValueError("out of range")
    return 1.0


def test_a_metric_without_a_number_for_wrong_outputs_says_nothing(
    rng: np.random.Generator,
) -> None:
    assert needed_outputs(context(rng, Metric("picky", picky)), "y", ["x"], shares) is None
