from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model


def constants_of(body: str) -> Constants:
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[B, 2] x) => (float[B, 2] y) {body}'
    )
    return Constants(Model(onnx.parser.parse_model(text)))


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value_float = 2.5", np.float32(2.5)),
        ("value_int = 3", np.int64(3)),
        ("value_floats = [1.0, 2.0]", np.array([1, 2], np.float32)),
        ("value_ints = [4, 5]", np.array([4, 5])),
        ("value = float[2] {1, 2}", np.array([1, 2], np.float32)),
    ],
)
def test_kinds_of_constant_nodes(attribute: str, expected: Any) -> None:
    constants = constants_of(f"{{ c = Constant <{attribute}> () y = Mul(x, c) }}")
    np.testing.assert_array_equal(constants.array("c"), expected, strict=True)
    assert constants["c"].shape == np.shape(expected)


def test_what_is_no_constant() -> None:
    constants = constants_of(
        """<float[1, 2, 3] w = {0, 1, 2, 3, 4, 5}> {
            s = Constant <value_string = "text"> ()
            t = Neg(w)
            u = Identity(x)
            y = Abs(u)
        }"""
    )
    assert [name for name in ("w", "s", "t", "u", "y") if name in constants] == ["w"]
    assert constants.computed == {"t": ("Neg",)}


def test_an_initializer_that_is_also_an_input_can_be_overridden() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {1, 2}> {
        i = Identity(w)
        a = Add(x, i)
        y = Add(a, v)
    }"""
    constants = Constants(Model(onnx.parser.parse_model(text)))
    assert constants.overridable == {"w"}
    assert [name for name in ("w", "i", "v") if name in constants] == ["v"]


def test_a_transposed_constant_says_where_it_is_stored() -> None:
    constants = constants_of(
        """<float[2, 3] w = {0, 1, 2, 3, 4, 5}> {
        i = Identity(w) t = Transpose <perm = [1, 0]> (i) y = Abs(x)
    }"""
    )
    found = constants["t"]
    assert (found.source, found.transposed, found.shape) == ("w", True, (3, 2))
    np.testing.assert_array_equal(constants.array("t"), [[0, 3], [1, 4], [2, 5]])


def test_broken_nodes_make_no_constant() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {
        c = Constant <value_float = 1.0> () i = Identity(c) t = Transpose(i) y = Add(x, t) }"""
    proto = onnx.parser.parse_model(text)
    del (
        proto.graph.node[0].output[:],
        proto.graph.node[1].input[:],
        proto.graph.node[2].input[:],
    )
    constants = Constants(Model(proto))
    assert not any(name in constants for name in ("c", "i", "t", ""))
