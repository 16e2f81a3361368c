"""The constant that is added to a product of integers, and what it is in terms of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.biases import Bias, find_biases
from onnx_decompose.graph.sites import find_sites
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
product (float[N, 4] x) => (float[N, 3] y)
<float s = {0.05}, uint8 z = {100}, uint8 low = {0}, float ws = {0.01}, float bs = {0.02}, uint8 bz = {10}>
"""

DYNAMIC = """
{
    q, qs, qz = DynamicQuantizeLinear(x)
    m = MatMulInteger(q, w, qz)
    f = Cast <to = 1> (m)
    k = Mul(qs, scales)
    p = Mul(f, k)
    y = Add(b, p)
}
"""
BEHIND_QUANTIZERS = """
{
    d = DequantizeLinear(w, ws)
    m = MatMul(x, d)
    q = QuantizeLinear(m, s, ZERO)
    p = DequantizeLinear(q, s, ZERO)
    y = Add(p, b)
}
"""
OF_INTEGERS = """
{
    d = DequantizeLinear(w, ws)
    m = MatMul(x, d)
    c = DequantizeLinear(codes, bs, bz)
    y = Add(m, c)
}
"""
SHARED = OF_INTEGERS.replace("y = Add(m, c)", "t = Add(m, c)\n    y = Mul(t, c)")
NONE = """
{
    d = DequantizeLinear(w, ws)
    y = MatMul(x, d)
}
"""
INSIDE = """
{
    d = DequantizeLinear(w, ws)
    y = Gemm <alpha = 2.0, beta = 4.0> (x, d, b)
}
"""


def found(body: str) -> tuple[onnx.GraphProto, Bias]:
    proto = onnx.parser.parse_model(HEAD + body)
    arrays: dict[str, NDArray[Any]] = {
        "w": np.arange(12, dtype=np.int8).reshape(4, 3),
        "b": np.array([1.0, 2.0, 3.0], np.float32),
        "scales": np.array([0.5, 0.25, 2.0], np.float32),
        "codes": np.array([10, 12, 0], np.uint8),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    constants = Constants(Model(proto))
    (site,), _ = find_sites(Model(proto), constants)
    return proto.graph, find_biases(proto.graph, [site], constants)[site.name]


def test_the_scales_behind_a_product_of_integers_are_factors_of_what_is_added() -> None:
    graph, bias = found(DYNAMIC)
    assert [graph.node[index].op_type for index in bias.nodes] == ["Add"]
    assert (bias.position, bias.constant) == (0, "b")
    np.testing.assert_allclose(bias.alpha, [0.5, 0.25, 2.0])
    np.testing.assert_allclose(bias.stored(np.ones(3)), [1.5, 2.25, 5.0])
    np.testing.assert_allclose(bias.held(np.ones(3)), 1.0)


@pytest.mark.parametrize(("zero", "there"), [("z", True), ("low", False)])
def test_a_quantizer_that_is_a_relu_too_ends_the_search(zero: str, there: bool) -> None:
    _, bias = found(BEHIND_QUANTIZERS.replace("ZERO", zero))
    assert bias.is_missing is not there
    if there:
        np.testing.assert_allclose(bias.stored(np.ones(3)), [2.0, 3.0, 4.0])


def test_a_bias_of_integers_is_rounded_to_them_and_says_what_is_held() -> None:
    graph, bias = found(OF_INTEGERS)
    assert [graph.node[index].op_type for index in bias.nodes] == ["DequantizeLinear", "Add"]
    assert not bias.is_free
    np.testing.assert_allclose(bias.shift, [0.0, 0.04, -0.2], atol=1e-7)
    stored = bias.stored(np.array([0.005, 0.031, -7.0]))
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, [10, 14, 0])
    np.testing.assert_allclose(
        bias.held(np.array([0.005, 0.031, -7.0])), [0.0, 0.04, 0.0], atol=1e-7
    )
    np.testing.assert_array_equal(bias.stored(0.0), [10, 12, 0])


@pytest.mark.parametrize("body", [SHARED, NONE])
def test_no_constant_is_put_where_there_is_none_of_its_own(body: str) -> None:
    _, bias = found(body)
    assert bias.is_missing
    np.testing.assert_array_equal(bias.held(np.ones(3)), 0.0)


def test_inside_a_product_of_floats() -> None:
    graph, bias = found(INSIDE)
    assert [graph.node[index].op_type for index in bias.nodes] == ["Gemm"]
    np.testing.assert_allclose(bias.stored(np.array([2.0, 0.0, 0.0])), [2.0, 2.0, 3.0])
    assert bias.is_free
