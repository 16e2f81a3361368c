"""Who reads the units of a recurrent operator, through what keeps them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.state_readers import find_state_readers
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from onnx_decompose.graph.state_readers import StateReaders

HIDDEN = 6
HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
reads (float[T, B, 3] x) => (OUTPUT)
<int64[1] one = {1}, int64[1] zero = {0}, int64 last = {-1}, int64[3] flat = {0, 0, 6}>
{
    s, h, c = LSTM <hidden_size = 6> (x, w, r)
"""


def readers(body: str, output: str = "float[P, 2] y") -> StateReaders | None:
    text = HEAD.replace("OUTPUT", output) + body + "\n}"
    if "(c" not in body:
        text = text.replace("s, h, c", "s, h")
    if " h" not in body and "(h" not in body:
        text = text.replace("s, h =", "s =")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    shapes = {
        "w": (1, 4 * HIDDEN, 3),
        "r": (1, 4 * HIDDEN, HIDDEN),
        "w2": (1, 3 * HIDDEN, HIDDEN),
        "r2": (1, 3 * HIDDEN, 3 * HIDDEN),
        "m": (HIDDEN, 2),
    }
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    study = study_model(Model(proto))
    cell = study.recurrent[0]
    known = study.constants, study.shapes
    return find_state_readers(
        study.model.proto.graph, cell, study.sites, study.recurrent, known
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Squeeze(s, one)  y = MatMul(a, m)",
        "a = Squeeze(s, one)  b = Transpose <perm = [1, 0, 2]> (a)  y = MatMul(b, m)",
        "a = Transpose <perm = [0, 2, 1, 3]> (s)  b = Reshape(a, flat)  y = MatMul(b, m)",
        "a = Squeeze(s, one)  b = Gather <axis = 0> (a, last)  y = MatMul(b, m)",
        "a = Squeeze(s, one)  b = ReduceMean <axes = [0], keepdims = 0> (a)  y = MatMul(b, m)",
        "a = Squeeze(h, zero)  b = Relu(a)  y = Gemm(b, m)",
        "a = Squeeze(s, one)  n = Shape(s)  y = MatMul(a, m)",
    ],
)
def test_through_what_keeps_units_apart(body: str) -> None:
    found = readers(body)
    assert found is not None
    assert ([site.name for site in found.sites], found.cells) == (["y"], ())


def test_another_operator_reads_them() -> None:
    found = readers(
        "a = Squeeze(s, one)  t = RNN <hidden_size = 18> (a, w2, r2)  b = Squeeze(t, one)"
        "  y = ReduceMax <axes = [0], keepdims = 0> (b)"
    )
    assert found is not None
    assert (found.sites, [cell.cell for cell in found.cells]) == ((), ["RNN"])


@pytest.mark.parametrize(
    "body",
    [
        "y = Squeeze(s, one)",
        "a = Squeeze(s, one)  b = Softmax(a)  y = MatMul(b, m)",
        "a = Squeeze(s, one)  b = MatMul(a, m)  y = Sub(b, b)  z = ReduceMax(s)",
        "a = Squeeze(s, one)  y = MatMul(a, m)  z = Exp(c)",
        "a = Squeeze(s, one)  b = Add(a, a)  y = MatMul(b, m)",
        "a = Squeeze(s, one)  b = Transpose <perm = [1, 2, 0]> (a)  y = Exp(b)",
    ],
)
def test_what_needs_all_of_them(body: str) -> None:
    output = "float[P, 2] y, float z" if " z = " in body else "float[P, 2] y"
    assert readers(body, output) is None
