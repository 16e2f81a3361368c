"""Every form of a weight, and every reason to leave one alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.sites import Refusal, Site, check_finite, find_sites, site_weight
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def parse(body: str, head: str = "float[B, 2] x", tail: str = "float[B, 3] y") -> Model:
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({head}) => ({tail}) {body}'
    return Model(onnx.parser.parse_model(text))


def sites_of(model: Model) -> tuple[tuple[Site, ...], tuple[Refusal, ...], Constants]:
    constants = Constants(model)
    sites, refused = find_sites(model, constants)
    return sites, refused, constants


def only_site(model: Model) -> tuple[Site, Constants]:
    (site,), refused, constants = sites_of(model)
    assert refused == ()
    return site, constants


def refusal(model: Model) -> str:
    sites, (refused,), _ = sites_of(model)
    assert sites == ()
    return refused.reason


INITIALIZER = "<float[2, 3] w = {0, 1, 2, 3, 4, 5}>"
TRANSPOSED = "<float[3, 2] w = {0, 3, 1, 4, 2, 5}>"


@pytest.mark.parametrize(
    ("body", "tensor", "transposed"),
    [
        (INITIALIZER + "{ y = MatMul(x, w) }", "w", False),
        (
            "{ w = Constant <value = float[2, 3] {0, 1, 2, 3, 4, 5}> () y = MatMul(x, w) }",
            "w",
            False,
        ),
        (TRANSPOSED + "{ t = Transpose(w) y = MatMul(x, t) }", "w", True),
        (TRANSPOSED + "{ t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }", "w", True),
        (TRANSPOSED + "{ i = Identity(w) t = Transpose(i) y = MatMul(x, t) }", "w", True),
        (INITIALIZER + "{ t = Transpose(w) u = Transpose(t) y = MatMul(x, u) }", "w", False),
        (INITIALIZER + "{ y = Gemm(x, w) }", "w", False),
        (TRANSPOSED + "{ y = Gemm <transB = 1> (x, w) }", "w", True),
        (INITIALIZER + "{ t = Transpose(w) y = Gemm <transB = 1> (x, t) }", "w", False),
    ],
)
def test_every_form_of_a_weight_is_read_as_inputs_by_outputs(
    body: str, tensor: str, transposed: bool
) -> None:
    site, constants = only_site(parse(body))
    assert (site.tensor, site.transposed, site.shape, site.size) == (
        tensor,
        transposed,
        (2, 3),
        6,
    )
    np.testing.assert_array_equal(site_weight(site, constants), WEIGHT)


@pytest.mark.parametrize(
    "bias", ["float[3] b = {0, 0, 1}", "float[1] b = {1}", "float[1, 3] b = {0, 1, 0}"]
)
def test_gemm_with_a_constant_bias_is_a_site(bias: str) -> None:
    model = parse(
        f"{INITIALIZER[:-1]}, {bias}> {{ y = Gemm <alpha = 2.0, beta = 3.0> (x, w, b) }}"
    )
    assert only_site(model)[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats(dtype: Any) -> None:
    model = parse(INITIALIZER + "{ y = MatMul(x, w) }")
    model.proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(WEIGHT.astype(dtype), "w")
    )
    site, constants = only_site(model)
    weight = site_weight(site, constants)
    assert weight.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(weight.astype(np.float32), WEIGHT)
    check_finite(model, [site], constants)


@pytest.mark.parametrize(
    ("body", "head", "reason"),
    [
        (
            INITIALIZER + "{ y = MatMul(x, w) }",
            "float[B, 2] x, float[2, 3] w",
            "the weight is also a graph input, so it can be overridden at run time",
        ),
        (
            INITIALIZER + "{ y = MatMul(w, x) }",
            "float[3, 3] x",
            "the constant is on the left side, and the rank of the other one is not known",
        ),
        (
            "<float[1, 2, 3] w = {0, 1, 2, 3, 4, 5}> { y = MatMul(x, w) }",
            "float[B, 2] x",
            "the weight has 3 axes, not 2",
        ),
        (
            "<float[2] w = {0, 1}> { y = MatMul(x, w) }",
            "float[B, 2] x",
            "the weight has 1 axes, not 2",
        ),
        (
            "<int32[2, 3] w = {0, 1, 2, 3, 4, 5}> { y = MatMul(x, w) }",
            "int32[B, 2] x",
            "the weight is INT32, not a float of 16 bits or more",
        ),
        (
            "<float[2, 0] w = {}> { y = MatMul(x, w) }",
            "float[B, 2] x",
            "the weight is empty",
        ),
        (
            f"{INITIALIZER[:-1]}, float[1, 2] v = {{1, 2}}> {{ y = MatMul(v, w) }}",
            "float x",
            "both sides are constant",
        ),
        (
            INITIALIZER + "{ y = Gemm <transA = 1> (x, w) }",
            "float[2, B] x",
            "transA is set: the units are on the batch axis",
        ),
        (
            INITIALIZER + "{ b = Abs(c) y = Gemm (x, w, b) }",
            "float[B, 2] x, float[3] c",
            "the bias is not a constant",
        ),
        (
            f"{INITIALIZER[:-1]}, float[3] b = {{0, 0, 0}}> {{ y = Gemm (x, w, b) }}",
            "float[B, 2] x, float[3] b",
            "the bias is not a constant",
        ),
    ],
)
def test_every_refusal_says_why(body: str, head: str, reason: str) -> None:
    assert refusal(parse(body, head)) == reason


def test_nodes_without_a_constant_and_foreign_ops_are_no_refusals() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "com.example": 1]>
    g (float[B, 2] x, float[2, 3] v) => (float[B, 3] y) <float[2, 3] w = {0, 1, 2, 3, 4, 5}> {
        p = MatMul(x, v)
        q = com.example.MatMul(x, w)
        y = Add(p, q)
    }"""
    sites, refused, _ = sites_of(Model(onnx.parser.parse_model(text)))
    assert (sites, refused) == ((), ())


def test_an_overridable_left_operand_is_not_a_constant() -> None:
    sites, refused, constants = sites_of(
        parse(
            "<float[1, 2] x = {1, 2}> { y = MatMul(x, v) }",
            "float[1, 2] x, float[2, 3] v",
        )
    )
    assert (sites, refused) == ((), ())
    assert "x" not in constants
    assert constants.overridable == {"x"}


def test_names_are_unique_whatever_the_nodes_are_called() -> None:
    model = parse(
        """<float[2, 2] w = {1, 2, 3, 4}>
        { fc = MatMul(x, w) b = MatMul(fc, w) c = MatMul(b, w) d = MatMul(c, w) y = MatMul(d, w) }""",
        tail="float[B, 2] y",
    )
    for node, name in zip(
        model.proto.graph.node, ["", "fc", "twice", "twice", "own"], strict=True
    ):
        node.name = name
    # 'fc' is the output of another node; 'twice' is not unique.
    assert [site.name for site in sites_of(model)[0]] == ["fc", "b", "c", "d", "own"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = parse(INITIALIZER + "{ y = MatMul(x, w) }")
    weight = WEIGHT.copy()
    weight[1, 2] = bad
    model.proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    sites, _, constants = sites_of(model)
    with pytest.raises(ModelError, match=r"^model: tensor 'w' of node 'y' holds NaN or infin"):
        check_finite(model, sites, constants)


def test_each_constant_node_is_checked_though_their_tensors_share_a_name() -> None:
    model = parse(
        """{
        v = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
        h = MatMul(x, v)
        w = Constant <value = float[2, 3] {0, 1, 2, 3, 4, 5}> ()
        y = MatMul(h, w)
    }"""
    )
    for index in (0, 2):
        model.proto.graph.node[index].attribute[0].t.name = "value"
    first = model.proto.graph.node[0].attribute[0].t
    first.CopyFrom(numpy_helper.from_array(np.full((2, 2), np.nan, np.float32), "value"))
    sites, _, constants = sites_of(model)
    assert [site.tensor for site in sites] == ["v", "w"]
    with pytest.raises(ModelError, match="tensor 'v' of node 'h'"):
        check_finite(model, sites, constants)


@pytest.mark.parametrize("inputs", [0, 1])
def test_a_product_without_two_inputs_is_bad_input(inputs: int) -> None:
    model = parse(INITIALIZER + "{ y = MatMul(x, w) }")
    del model.proto.graph.node[0].input[inputs:]
    with pytest.raises(ModelError, match=rf"^model: node 'y' \(MatMul\) has {inputs} inputs"):
        sites_of(model)
