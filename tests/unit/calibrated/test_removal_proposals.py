"""Which hidden units a level of removal takes, down to small losses."""

from __future__ import annotations

import numpy as np
import onnx.parser
from onnx import numpy_helper

from onnx_decompose.analysis.removal import Removal
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import HiddenAxis, priced_units, removed_units
from onnx_decompose.graph.sites import Site
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[N, 12] x) => (float[N, 4] y)
{
    a = MatMul(x, w0)
    b = Tanh(a)
    y = MatMul(b, w1)
}
"""


def test_units_that_others_nearly_repeat_can_go_within_a_small_budget(
    rng: np.random.Generator,
) -> None:
    """Eight of 24 units are others but for 1e-4, four but for 3e-3: without the eight, the model is right to 1e-4."""
    first = rng.normal(size=(12, 24)) / 4
    first[:, 12:16] = first[:, 8:12] + 3e-3 * rng.normal(size=(12, 4))
    first[:, 16:] = first[:, :8] + 1e-4 * rng.normal(size=(12, 8))
    proto = onnx.parser.parse_model(TEXT)
    for name, weight in (("w0", first), ("w1", rng.normal(size=(24, 4)))):
        tensor = numpy_helper.from_array(weight.astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    x = rng.normal(size=(1000, 12)).astype(np.float32)
    samples = samples_from_arrays({"x": x}, graph_inputs(proto))
    context = CalibrationContext(
        study_model(Model(proto)), split_samples(samples, 0), Provider.CPU
    )
    (family,) = removed_units(context)
    proposal = next(p for p in family if p.name == "remove(8 of 24 hidden units)")
    gone = np.flatnonzero(~proposal.masks[context.sites[0].name].any(axis=0))
    assert set(gone % 16) == set(range(8))  # one of each pair
    after = annealed_by(context.study, refitted(context, proposal))
    before, now = (
        open_model(m, Provider.CPU).run({"x": x})["y"] for m in (Model(proto), after)
    )
    assert np.linalg.norm(now - before) < 3e-4 * np.linalg.norm(before)


def test_units_that_are_worked_with_more_often_go_first() -> None:
    """Two hidden layers alike, of which the first is worked out at 100 positions, by itself or as channels."""

    def site(number: int, kernel: tuple[int, ...]) -> Site:
        weight = f"w{number}"
        shape = (16, 16)
        return Site(
            *(weight, number, "MatMul", f"v{number}", f"v{number + 1}", weight, weight),
            transposed=False,
            shape=shape,
            kernel=kernel,
        )

    removal = Removal(np.arange(16), np.cumsum(10.0 ** np.linspace(-6, 0, 16)))
    for kernel, lanes in (((), 1), ((1, 1), 8)):
        first, second, third = (site(number, kernel) for number in range(3))
        axes = [
            HiddenAxis("w1", 16, (first,), (second,)),
            HiddenAxis("w2", 16, (second,), (third,)),
        ]
        orders = [(axis, removal) for axis in axes]
        alike = priced_units(orders, 0.3)
        other = priced_units(orders, 0.3, {"w0": 100, "w1": 1, "w2": 1})
        assert alike[axes[0]].size == alike[axes[1]].size > 0
        assert other[axes[0]].size > other[axes[1]].size
        assert {(16 - units.size) % lanes for units in other.values()} == {0}
