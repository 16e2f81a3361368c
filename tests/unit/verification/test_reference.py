"""A model in float64: the same function with fewer roundings, whatever the model is made of."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.cases import made_up_cases, open_model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.reference import Reference, open_reference
from onnx_decompose.verification.widened import obstacle, widened
from tests.e2e.random_models import Recipe, random_model

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDING = 1e-4
"""Of onnxruntime's float32 against the reference, relative to the output's size."""


def model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    weights: dict[str, Any] | None = None,
    *,
    element: int = TensorProto.FLOAT,
    opset: int = 17,
) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return Model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    )


def opened(source: Model) -> Reference:
    found = open_reference(source)
    assert isinstance(found, Reference), found
    return found


def worst_error(
    source: Model, kinds: Sequence[str] = ("random", "zeros", "large", "tiny", "negative")
) -> float:
    """onnxruntime against the reference over made-up inputs."""
    reference, session = opened(source), open_model(source, Provider.CPU)
    worst = 0.0
    for case in made_up_cases(source.proto, seeds=1, rng=np.random.default_rng(0)):
        if case.kind not in kinds:
            continue
        exact = reference.run(case.feeds)
        for name, value in session.run(case.feeds).items():
            assert exact[name].shape == value.shape
            if value.dtype.kind != "f":
                np.testing.assert_array_equal(value, exact[name])
                continue
            assert exact[name].dtype == np.float64
            size = np.abs(exact[name]).max(initial=0.0) or 1.0
            worst = max(worst, float(np.abs(value - exact[name]).max(initial=0.0) / size))
    return worst


def draw(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> Any:
    return rng.normal(0, 0.5, shape).astype(dtype)


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int) -> None:
    # Of tiny inputs a Softmax and the mean taken from it leave nothing but rounding.
    kinds = ("random", "large", "negative")
    recipe = dataclasses.replace(Recipe.drawn(seed), dtype="float32")
    assert worst_error(Model(random_model(recipe)), kinds) < ROUNDING


def test_it_is_nearer_to_the_truth_than_float32() -> None:
    weight = draw(np.random.default_rng(0), 300, 4)
    source = model([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 300], {"w": weight})
    x = np.random.default_rng(1).normal(size=(5, 300)).astype(np.float32)
    exact = x.astype(np.longdouble) @ weight.astype(np.longdouble)
    found = opened(source)
    assert not found.slow
    assert float(np.abs(found.run({"x": x})["y"] - exact).max()) < 1e-12


def test_float16_and_casts() -> None:
    weight = draw(np.random.default_rng(0), 8, 8, dtype=np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Cast", ["h"], ["s"], to=TensorProto.FLOAT),
        helper.make_node("Tanh", ["s"], ["t"]),
        helper.make_node("Cast", ["t"], ["y"], to=TensorProto.FLOAT16),
    ]
    source = model(nodes, ["n", 8], {"w": weight}, element=TensorProto.FLOAT16)
    assert worst_error(source) < 5e-3
    x = np.ones((1, 8), np.float16)
    exact = np.tanh(x.astype(float) @ weight.astype(float))
    np.testing.assert_allclose(opened(source).run({"x": x})["y"], exact, rtol=1e-13)


@pytest.mark.parametrize("op_type", ["Erf", "Elu", "Softplus", "HardSigmoid", "Selu"])
def test_operators_that_onnxruntime_has_in_float32_alone(op_type: str) -> None:
    source = model([helper.make_node(op_type, ["x"], ["y"])], ["n", 7])
    assert opened(source).slow
    # exp(x) - 1 of tiny numbers loses them in float32.
    assert worst_error(source, ("random", "zeros", "large")) < 1e-6


def test_quantization_stays_in_float32() -> None:
    weights = {"s": np.array(0.03, np.float32), "z": np.array(3, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    assert worst_error(model(nodes, ["n", 6], weights)) < 1e-6


def test_plain_constants() -> None:
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=1.1),
        helper.make_node("Constant", [], ["some"], value_floats=[0.1, 0.2, 0.3]),
        helper.make_node("Constant", [], ["three"], value_ints=[3]),
        helper.make_node("ConstantOfShape", ["three"], ["zeros"]),
        helper.make_node("Add", ["x", "one"], ["a"]),
        helper.make_node("Add", ["a", "zeros"], ["b"]),
        helper.make_node("Mul", ["b", "some"], ["y"]),
    ]
    assert worst_error(model(nodes, ["n", 3])) < 1e-6


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions(auto_pad: str, rank: int) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": draw(rng, 6, 2, *(3, 2)[:rank]), "b": draw(rng, 6)}
    strides = [2, 1][:rank]
    attributes: dict[str, Any] = {"group": 2, "strides": strides, "auto_pad": auto_pad}
    if auto_pad == "NOTSET":
        attributes.update(pads=[1, 0, 2, 1][: 2 * rank], dilations=[2, 1][:rank])
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    assert worst_error(model([node], ["n", 4, *(9, 8)[:rank]], weights)) < 1e-6


CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "RNN with Relu, both ways": (
        "RNN",
        {"activations": ["Relu", "LeakyRelu"], "activation_alpha": [0.3]},
    ),
    "GRU": ("GRU", {}),
    "GRU, linear before reset": ("GRU", {"linear_before_reset": 1}),
    "LSTM": ("LSTM", {}),
    "LSTM, input forget": ("LSTM", {"input_forget": 1}),
    "LSTM, other activations": (
        "LSTM",
        {
            "activations": ["HardSigmoid", "Softsign", "Tanh"] * 2,
            "activation_alpha": [0.3, 0.1],
            "activation_beta": [0.4, 0.6],
        },
    ),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("lengths", [False, True])
def test_recurrent_operators(name: str, lengths: bool) -> None:
    op_type, attributes = CELLS[name]
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op_type]
    rng = np.random.default_rng(0)
    both = 2 if len(attributes.get("activations", "")) in {2, 6} else 1
    weights: dict[str, Any] = {
        "w": draw(rng, both, gates * 5, 3),
        "r": draw(rng, both, gates * 5, 5),
        "b": draw(rng, both, 2 * gates * 5),
        "h": draw(rng, both, 4, 5),
    }
    inputs = ["x", "w", "r", "b", "", "h"]
    if lengths:
        weights["lens"] = np.array([6, 2, 4, 1], np.int32)
        inputs[4] = "lens"
    if op_type == "LSTM":
        weights.update(c=draw(rng, both, 4, 5), p=draw(rng, both, 15))
        inputs += ["c", "p"]
    if both == 2:
        attributes = {**attributes, "direction": "bidirectional"}
    node = helper.make_node(op_type, inputs, ["y"], hidden_size=5, **attributes)
    source = model([node], [6, 4, 3], weights)
    assert opened(source).slow
    assert worst_error(source) < 1e-5


def test_bodies_see_outer_values() -> None:
    element = TensorProto.FLOAT
    body = [
        helper.make_graph(
            [helper.make_node(op, ["x", "w"], [f"{op}.y"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}.y", element, None)],
        )
        for op in ("MatMul", "Add")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["h"], then_branch=body[0], else_branch=body[1]),
        helper.make_node("Erf", ["h"], ["y"]),
    ]
    weights = {"w": draw(np.random.default_rng(0), 4, 4), "zero": np.array(0.0, np.float32)}
    assert worst_error(model(nodes, [4, 4], weights)) < 1e-6


class TestNoReference:
    def test_operators_of_others(self) -> None:
        node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
        told = open_reference(model([node], ["n", 4]))
        assert told == "operator Gelu of domain com.microsoft is not of the ONNX standard"

    def test_random_numbers(self) -> None:
        node = helper.make_node("RandomNormalLike", ["x"], ["y"])
        assert obstacle(model([node], ["n", 4])) == (
            "operator RandomNormalLike draws random numbers"
        )

    def test_a_model_that_is_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("onnx_decompose.verification.reference._MOST_BYTES", 100)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weights = {"w": draw(np.random.default_rng(0), 4, 4)}
        assert "its weights take more than" in str(
            open_reference(model([node], ["n", 4], weights))
        )


def test_nothing_of_the_model_is_changed() -> None:
    source = Model(random_model(Recipe.drawn(3)))
    before = source.proto.SerializeToString(deterministic=True)
    widened(source)
    assert source.proto.SerializeToString(deterministic=True) == before
