"""Finding recurrent sites; every refusal has its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.recurrent import RecurrentSite, find_recurrent, steps_of
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.shapes import infer_shapes
from tests.passes.recurrent_models import Recipe, plant

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnx_decompose.graph.sites import Refusal


def find(proto: onnx.ModelProto) -> tuple[tuple[RecurrentSite, ...], tuple[Refusal, ...]]:
    model = load_model(proto)
    return find_recurrent(model, Constants(model))


def tensor(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in proto.graph.initializer if t.name == name)
    return found


def test_an_lstm_of_two_directions(rng: np.random.Generator) -> None:
    recipe = Recipe(direction="bidirectional", peepholes=True, initial=True)
    model = plant(recipe, rng).model
    (site,), refused = find(model)
    assert refused == ()
    assert (site.name, site.cell, site.hidden, site.gates) == ("rnn", "LSTM", 18, 4)
    assert site.directions == ("forward", "reverse")
    assert site.cascade == (True, True)
    assert [weight.name for weight in site.all_weights] == [
        *("rnn.forward.W", "rnn.forward.R", "rnn.reverse.W", "rnn.reverse.R"),
    ]
    stored = numpy_helper.to_array(tensor(model, "W"))
    weight = site.weights[1][0]
    np.testing.assert_array_equal(weight.array, stored[1].T)
    assert (weight.shape, weight.size, weight.hidden) == ((9, 72), 648, 18)
    assert (weight.tensor, weight.operand, weight.direction) == ("W", "W", 1)
    bias = numpy_helper.to_array(tensor(model, "B"))
    np.testing.assert_array_equal(site.biases["B"][1, 5], bias[1, 5 * 18 : 6 * 18])
    assert site.biases["P"].shape == (2, 3, 18)
    assert site.outputs == ("Y", "Y_h")


def test_one_direction_needs_no_side(rng: np.random.Generator) -> None:
    (site,), _ = find(plant(Recipe("GRU", direction="reverse", lengths=True), rng).model)
    assert [weight.name for weight in site.all_weights] == ["rnn.W", "rnn.R"]
    assert site.cascade == (False,)


def test_the_output_names_a_node_whose_name_does_not(rng: np.random.Generator) -> None:
    model = plant(Recipe(), rng).model
    model.graph.node[0].name = ""
    (site,), _ = find(model)
    assert site.name == "Y"


@pytest.mark.parametrize("zeros", ["stored", "expanded", "sliced", "given"])
def test_zero_initial_states_are_none(zeros: str, rng: np.random.Generator) -> None:
    model = plant(Recipe(initial=True), rng).model
    if zeros != "given":
        del model.graph.input[1]
        values = np.zeros((1, 3, 18) if zeros == "stored" else (), np.float32)
        name = "initial_h" if zeros == "stored" else "zero"
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    if zeros in {"expanded", "sliced"}:
        made = "initial_h" if zeros == "expanded" else "more"
        shape = numpy_helper.from_array(np.array([2, 3, 18]), "shape")
        nodes = [helper.make_node("Expand", ["zero", "shape"], [made])]
        if zeros == "sliced":
            model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
            model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "start"))
            operands = ["more", "start", "one", "start"]
            nodes.append(helper.make_node("Slice", operands, ["initial_h"]))
        model.graph.initializer.append(shape)
        nodes.extend(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    (site,), _ = find(model)
    assert ("initial_h" in site.operands) == (zeros == "given")
    assert "initial_c" in site.operands


def test_an_initial_state_that_is_not_zero_stays(rng: np.random.Generator) -> None:
    model = plant(Recipe(initial=True), rng).model
    del model.graph.input[1]
    values = np.full((1, 3, 18), 0.5, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "initial_h"))
    (site,), _ = find(model)
    assert "initial_h" in site.operands


@pytest.mark.parametrize("steps", [None, 7])
def test_steps_where_they_are_fixed(steps: int | None, rng: np.random.Generator) -> None:
    model = plant(Recipe(), rng).model
    if steps is not None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = steps
    (site,), _ = find(model)
    assert steps_of(site, infer_shapes(model)) == steps


def no_bias(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(tensor(model, "B"))
    model.graph.input.append(helper.make_tensor_value_info("B", 1, [1, 144]))


def overridable(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("R", 1, [1, 72, 18]))


def computed(model: onnx.ModelProto) -> None:
    tensor(model, "R").name = "half"
    model.graph.node.insert(0, helper.make_node("Add", ["half", "half"], ["R"]))


def integers(model: onnx.ModelProto) -> None:
    tensor(model, "W").CopyFrom(numpy_helper.from_array(np.ones((1, 72, 9), np.int8), "W"))


def other_shape(model: onnx.ModelProto) -> None:
    tensor(model, "W").CopyFrom(numpy_helper.from_array(np.ones((1, 70, 9), np.float32), "W"))


def no_readers(model: onnx.ModelProto) -> None:
    del model.graph.output[:]
    model.graph.node.append(helper.make_node("Identity", ["X"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", 1, None))


def missing(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[2] = ""


def attribute(name: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def add(model: onnx.ModelProto) -> None:
        model.graph.node[0].attribute.append(helper.make_attribute(name, value))

    return add


def version(model: onnx.ModelProto) -> None:
    model.ir_version = 3


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_bias, "B is not a constant"),
        (overridable, "R is also a graph input"),
        (computed, "R is not a constant"),
        (integers, "W is int8, not a float"),
        (other_shape, "not of the standard's shape"),
        (no_readers, "nothing reads what it makes"),
        (missing, "X, W or R is missing"),
        (attribute("layout", 1), "layout is 1"),
        (version, "IR version 3"),
        (opset, "from operator set 11 on"),
    ],
)
def test_refused(
    change: Callable[[onnx.ModelProto], None], reason: str, rng: np.random.Generator
) -> None:
    model = plant(Recipe(), rng).model
    change(model)
    sites, (refusal,) = find(model)
    assert sites == ()
    assert (refusal.node, refusal.op_type) == ("rnn", "LSTM")
    assert reason in refusal.reason


def test_parameters_of_two_directions_activations_are_refused(rng: np.random.Generator) -> None:
    model = plant(
        Recipe(direction="bidirectional", attributes={"activation_alpha": [0.1, 0.2]}), rng
    ).model
    sites, (refusal,) = find(model)
    assert sites == ()
    assert "cannot be told apart by direction" in refusal.reason


@pytest.mark.parametrize("operand", ["W", "R"])
def test_not_finite(operand: str, rng: np.random.Generator) -> None:
    model = plant(Recipe(), rng).model
    values = numpy_helper.to_array(tensor(model, operand)).copy()
    values[0, 3, 2] = np.nan
    tensor(model, operand).CopyFrom(numpy_helper.from_array(values, operand))
    with pytest.raises(ModelError, match=f"tensor '{operand}' of node 'rnn' holds NaN"):
        find(model)


def test_a_study_lists_all_weights_in_graph_order(rng: np.random.Generator) -> None:
    model = plant(Recipe("GRU", outputs=("Y",)), rng).model
    matrix = rng.normal(size=(18, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(matrix, "head"))
    model.graph.node.append(helper.make_node("MatMul", ["Y", "head"], ["z"], "head"))
    model.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    study = study_model(load_model(model))
    assert [weight.name for weight in study.weights] == ["rnn.W", "rnn.R", "head"]
    np.testing.assert_array_equal(study.weight(study.weights[2]), matrix)
    assert study.weight(study.weights[0]) is study.recurrent[0].all_weights[0].array
