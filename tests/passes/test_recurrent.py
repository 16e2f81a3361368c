"""Recurrent operators cut into smaller ones: which operators come out, and that they compute the same."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from onnx_decompose.analysis.recurrence import GATES, CellType, unit_columns, unit_graph
from onnx_decompose.errors import PassError
from onnx_decompose.graph.recurrent import find_recurrent
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model, load_model, read_tensor
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights, RewriteRecurrent
from onnx_decompose.passes.splice import ORIGIN_KEY
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.plan_recurrent import RecurrentGraph, plan_recurrent
from tests.passes.harness import FREE, check_rest, run
from tests.passes.recurrent_models import Planted, Recipe, feeds, network, plant

if TYPE_CHECKING:
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.plan_recurrent import RecurrentPlan
    from onnx_decompose.planning.state_graph import Emit

CELLS: tuple[CellType, ...] = ("RNN", "GRU", "LSTM")
DIRECTIONS = ("forward", "reverse", "bidirectional")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    proto: onnx.ModelProto
    plan: RecurrentPlan

    @property
    def ops(self) -> dict[str, int]:
        return collections.Counter(node.op_type for node in self.proto.graph.node)


def rewrite(source: onnx.ModelProto, emit: Emit = "split", cost: CostModel = CPU) -> Rewritten:
    """Write the one recurrent node as its plan says; the blocks are the weights, bit for bit."""
    model = load_model(source)
    constants = Constants(model)
    (site,), refused = find_recurrent(model, constants)
    assert refused == ()
    weights = {w.name: w.array for w in site.all_weights}
    graphs = tuple(
        unit_graph(weights[w.name] != 0, weights[r.name] != 0, site.cell, cascade=cascade)
        for (w, r), cascade in zip(site.weights, site.cascade, strict=True)
    )
    plan = plan_recurrent(
        RecurrentGraph(
            graphs, None, bool(site.outputs[0]), 4, (np.empty(0, np.intp),) * len(graphs)
        ),
        cost,
        emit,
    )
    if plan.decision == "dense":
        return Rewritten(source, plan)
    rewriting = RewriteRecurrent([(site, plan)], lambda weight: weights[weight.name])
    result = rewriting(model)
    moves = {"Concat", "Expand", "Shape", "Slice", "Split", "Unsqueeze"}
    nodes = enumerate(source.graph.node)
    movers = {index for index, node in nodes if node.op_type in moves}
    check_rest(source, result.model.proto, {site.node} | movers)
    stored = {tensor.name: tensor for tensor in result.model.proto.graph.initializer}
    assert rewriting.record.keys() == weights.keys()
    for name, weight in weights.items():
        rebuilt = np.zeros_like(weight)
        for block in rewriting.record[name]:
            values = read_tensor(Model(result.model.proto), stored[block.initializer])
            rebuilt[np.ix_(block.rows, block.columns)] = block.read(values)
        np.testing.assert_array_equal(rebuilt, weight, strict=True)
    return Rewritten(result.model.proto, plan)


def found(plan: RecurrentPlan, direction: int = 0) -> set[tuple[int, ...]]:
    return {tuple(cell.units.tolist()) for cell in plan.directions[direction].cells}


def check_outputs(
    recipe: Recipe, before: onnx.ModelProto, after: onnx.ModelProto, rng: np.random.Generator
) -> None:
    """The same outputs for one step and several, one sequence and several."""
    for time, batch in ((1, 1), (1, 3), (2, 1), (7, 1), (6, 4)):
        given = feeds(recipe, rng, time, batch)
        expected = run(before, given, reference=False)
        for got, wanted in zip(run(after, given, reference=False), expected, strict=True):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def check(
    recipe: Recipe, rng: np.random.Generator, emit: Emit = "split"
) -> tuple[Planted, Rewritten]:
    planted = plant(recipe, rng)
    rewritten = rewrite(planted.model, emit)
    check_outputs(recipe, planted.model, rewritten.proto, rng)
    return planted, rewritten


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "hidden"])
def test_three_in_cascade(
    cell: CellType, direction: str, initial: bool, shuffle: bool, rng: np.random.Generator
) -> None:
    """The planted groups, each an operator that reads the one before it a step late."""
    outputs = ("Y", "Y_h", "Y_c") if cell == "LSTM" else ("Y", "Y_h")
    recipe = Recipe(
        cell, direction=direction, initial=initial, shuffle=shuffle, outputs=outputs
    )
    planted, rewritten = check(recipe, rng)
    for number in range(recipe.directions):
        assert found(rewritten.plan, number) == planted.groups(number)
        assert rewritten.plan.directions[number].condensation.layers == 3
    assert rewritten.ops[cell] == 3 * recipe.directions
    # Two of three outputs are handed on, shifted by a step.
    shifts = rewritten.ops["Squeeze"]
    assert shifts == 2 * recipe.directions
    assert rewritten.ops["Pad"] == (0 if initial else shifts)
    assert (rewritten.ops["Gather"] > 0) == shuffle


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_independent_groups_never_meet(
    cell: CellType, direction: str, rng: np.random.Generator
) -> None:
    recipe = Recipe(cell, direction=direction, cascade=(), initial=True)
    planted, rewritten = check(recipe, rng)
    assert found(rewritten.plan) == planted.groups()
    assert rewritten.ops["Squeeze"] == 0
    assert rewritten.plan.directions[0].condensation.layers == 1


class TestGatedRecurrentUnit:
    @pytest.mark.parametrize("after", [0, 1], ids=["reset before", "reset after"])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_update_and_reset_gates_cascade(
        self, after: int, direction: str, rng: np.random.Generator
    ) -> None:
        recipe = Recipe(
            "GRU", direction=direction, attributes={"linear_before_reset": after}, initial=True
        )
        planted, rewritten = check(recipe, rng)
        assert found(rewritten.plan) == planted.groups()

    @pytest.mark.parametrize("after", [0, 1], ids=["reset before", "reset after"])
    def test_the_candidate_binds(self, after: int, rng: np.random.Generator) -> None:
        """Groups 0 and 1 are read by the candidate gates of the next; group 3 stands alone."""
        recipe = Recipe(
            "GRU",
            sizes=((2, 4), (2, 4), (2, 4), (2, 5)),
            candidate=True,
            attributes={"linear_before_reset": after},
        )
        planted, rewritten = check(recipe, rng)
        alone = next(group for group in planted.groups() if len(group) == 5)
        rest = tuple(sorted(set(range(recipe.hidden)) - set(alone)))
        assert found(rewritten.plan) == {alone, rest}
        assert rewritten.plan.directions[0].condensation.sccs == 4
        assert "bound into 2 by edges that no cascade can carry" in rewritten.plan.reason


class TestSequenceLengths:
    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
    def test_forward(self, cell: CellType, initial: bool, rng: np.random.Generator) -> None:
        planted, rewritten = check(Recipe(cell, lengths=True, initial=initial), rng)
        assert found(rewritten.plan) == planted.groups()

    @pytest.mark.parametrize("cell", CELLS)
    def test_in_reverse_a_cascade_stays_together(
        self, cell: CellType, rng: np.random.Generator
    ) -> None:
        """Each sequence starts at its own end, so no shift of Y is the state a step before."""
        recipe = Recipe(
            cell, lengths=True, initial=True, direction="bidirectional", cascade=((0, 1),)
        )
        planted, rewritten = check(recipe, rng)
        assert found(rewritten.plan, 0) == planted.groups(0)
        assert len(found(rewritten.plan, 1)) == 2


def test_peepholes_and_clip(rng: np.random.Generator) -> None:
    recipe = Recipe(
        peepholes=True, initial=True, direction="bidirectional", attributes={"clip": 0.5}
    )
    planted, rewritten = check(recipe, rng)
    assert found(rewritten.plan, 1) == planted.groups(1)


@pytest.mark.parametrize("coupled", [0, 1])
def test_activations_of_each_direction_go_with_it(
    coupled: int, rng: np.random.Generator
) -> None:
    names = ["Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softsign", "Tanh"]
    recipe = Recipe(
        direction="bidirectional", attributes={"activations": names, "input_forget": coupled}
    )
    _, rewritten = check(recipe, rng)
    kept = collections.Counter(
        tuple(a.decode() for a in onnx.helper.get_node_attr_value(node, "activations"))
        for node in rewritten.proto.graph.node
        if node.op_type == "LSTM"
    )
    assert kept == {tuple(names[:3]): 3, tuple(names[3:]): 3}


@pytest.mark.parametrize("outputs", [("Y",), ("Y_h",), ("Y_c",), ("Y_h", "Y_c")])
def test_only_what_is_read_is_made(outputs: tuple[str, ...], rng: np.random.Generator) -> None:
    """A cell that others read makes Y all the same."""
    _, rewritten = check(Recipe(outputs=outputs), rng)
    made = [
        [bool(name) for name in (*node.output, "", "")][:3]
        for node in rewritten.proto.graph.node
        if node.op_type == "LSTM"
    ]
    asked = [name in outputs for name in ("Y", "Y_h", "Y_c")]
    assert made[-1] == asked
    assert made[0] == [True, *asked[1:]]


def test_an_output_that_nothing_reads_is_not_made(rng: np.random.Generator) -> None:
    model = plant(Recipe(outputs=("Y", "Y_h")), rng).model
    del model.graph.output[0]
    rewritten = rewrite(model)
    assert len(rewritten.proto.graph.output) == 1
    concatenated = [n for n in rewritten.proto.graph.node if n.op_type == "Concat"]
    assert [n.output[0] for n in concatenated if "parts" in n.output[0]] == ["rnn.Y_h.parts"]


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 17, 21, 22])
def test_every_operator_set(opset: int, rng: np.random.Generator) -> None:
    check(Recipe(opset=opset, direction="bidirectional"), rng)
    check(Recipe("GRU", opset=opset, initial=True), rng)


def test_inputs_that_nothing_reads_are_left_out(rng: np.random.Generator) -> None:
    recipe = Recipe(sizes=((6, 9),), cascade=(), isolated=4)
    _, rewritten = check(recipe, rng, "shrink")
    assert rewritten.plan.decision == "shrink"
    assert rewritten.ops == {"Gather": 1, "LSTM": 1}
    assert {tuple(t.dims) for t in rewritten.proto.graph.initializer} >= {
        (1, 36, 6),
        (1, 36, 9),
    }


def test_a_group_without_inputs_reads_zeros_of_one(rng: np.random.Generator) -> None:
    recipe = Recipe(sizes=((3, 4), (0, 3)), cascade=((0, 1),), initial=True)
    planted, rewritten = check(recipe, rng)
    assert found(rewritten.plan) == planted.groups()


def test_units_without_any_edge(rng: np.random.Generator) -> None:
    """A diagonal R: every unit is alone."""
    recipe = Recipe("RNN", sizes=tuple((1, 1) for _ in range(6)), cascade=())
    planted, rewritten = check(recipe, rng)
    assert found(rewritten.plan) == planted.groups()
    assert len(planted.groups()) == 6


def test_a_cell_that_reads_two_earlier_ones(rng: np.random.Generator) -> None:
    recipe = Recipe(
        sizes=((2, 5), (2, 4), (2, 6), (1, 3)), cascade=((0, 2), (1, 2), (0, 3), (2, 3))
    )
    planted, rewritten = check(recipe, rng)
    assert found(rewritten.plan) == planted.groups()
    assert rewritten.plan.directions[0].condensation.layers == 3


def test_one_unit_of_a_large_cell_is_read(rng: np.random.Generator) -> None:
    """Few units of a cell are picked out of what it made; the rest is not multiplied by zeros."""
    recipe = Recipe(sizes=((3, 12), (2, 4)), cascade=((0, 1),), initial=True)
    planted = plant(recipe, rng)
    read = np.flatnonzero(planted.units[0] == 0)[[3, 7]]
    tensor = next(t for t in planted.model.graph.initializer if t.name == "R")
    values = onnx.numpy_helper.to_array(tensor).copy()
    later = np.tile(planted.units[0] == 1, 4)
    gone = np.setdiff1d(np.flatnonzero(planted.units[0] == 0), read)
    values[0][np.ix_(later, gone)] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, "R"))
    rewritten = rewrite(planted.model)
    check_outputs(recipe, planted.model, rewritten.proto, rng)
    assert [cell.sources.tolist() for cell in rewritten.plan.directions[0].cells] == [
        [],
        read.tolist(),
    ]


def test_dense_stays(rng: np.random.Generator) -> None:
    model = plant(Recipe(sizes=((6, 16),), cascade=()), rng).model
    rewritten = rewrite(model)
    assert rewritten.proto is model
    assert rewritten.plan.reason == (
        "1 strongly connected component over 16 units, the largest with 16 (100%); nothing to take apart"
    )


def test_cells_are_copies_of_the_node(rng: np.random.Generator) -> None:
    model = plant(Recipe("GRU", attributes={"linear_before_reset": 1}), rng).model
    model.graph.node[0].metadata_props.add(key="kept", value="yes")
    cells = [n for n in rewrite(model).proto.graph.node if n.op_type == "GRU"]
    for cell in cells:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in cell.attribute}
        assert attributes["linear_before_reset"] == 1
        props = {entry.key: entry.value for entry in cell.metadata_props}
        assert props == {"kept": "yes", ORIGIN_KEY: "rnn"}
    sizes = [onnx.helper.get_node_attr_value(cell, "hidden_size") for cell in cells]
    assert sorted(sizes) == [5, 6, 7]


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_replaced_weights(direction: str, rng: np.random.Generator) -> None:
    """Only the named weights change, and readers of the old tensor keep it."""
    recipe = Recipe(direction=direction)
    model = load_model(plant(recipe, rng).model)
    constants = Constants(model)
    (site,), _ = find_recurrent(model, constants)
    changed = site.weights[-1][1]
    new = changed.array * np.float32(0.5)
    result = ReplaceRecurrentWeights([site], {changed.name: new})(model)
    assert result.modified
    check_rest(model.proto, result.model.proto, {0})
    (again,), _ = find_recurrent(result.model, Constants(result.model))
    for before, now in zip(site.all_weights, again.all_weights, strict=True):
        expected = new if before is changed else before.array
        np.testing.assert_array_equal(now.array, expected)
    assert not ReplaceRecurrentWeights([site], {})(model).modified


def test_an_invalid_rewrite_is_an_error(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plant(Recipe(), rng).model
    said: list[Any] = ["broken", None]
    monkeypatch.setattr("onnx_decompose.passes.recurrent.check_model", lambda _: said.pop(0))
    with pytest.raises(PassError, match="not valid: broken"):
        rewrite(model)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("seed", range(12))
def test_random_masks(cell: CellType, seed: int) -> None:
    """Whatever the edges are, gate by gate: the operators compute what the dense one does."""
    rng = np.random.default_rng(seed)
    recipe = Recipe(
        cell,
        sizes=((int(rng.integers(1, 6)), int(rng.integers(2, 14))),),
        direction=str(rng.choice(DIRECTIONS)),
        initial=bool(rng.integers(2)),
        lengths=bool(rng.integers(2)),
        bias=bool(rng.integers(2)),
        peepholes=cell == "LSTM" and bool(rng.integers(2)),
        attributes={"linear_before_reset": int(rng.integers(2))} if cell == "GRU" else {},
    )
    dirs, hidden, rows = recipe.directions, recipe.hidden, GATES[cell] * recipe.hidden
    w = rng.normal(0, 0.5, (dirs, rows, recipe.inputs)) * (rng.random((dirs, rows, 1)) < 0.4)
    share = rng.uniform(0.3, 2.5) / hidden / GATES[cell]
    r = rng.normal(0, 0.5, (dirs, rows, hidden)) * (rng.random((dirs, rows, hidden)) < share)
    model = network(recipe, w, r, rng)
    for emit in ("split", "auto", "shrink"):
        rewritten = rewrite(model, emit, cost=FREE)
        check_outputs(recipe, model, rewritten.proto, rng)


class TestTorchForm:
    """R is stored with torch's order of gates, and Slice, Concat and Unsqueeze bring it into the standard's."""

    def model(self, rng: np.random.Generator) -> tuple[Recipe, Planted]:
        recipe = Recipe(initial=True, direction="bidirectional")
        planted = plant(recipe, rng)
        graph = planted.model.graph
        stored = next(tensor for tensor in graph.initializer if tensor.name == "R")
        values = onnx.numpy_helper.to_array(stored)
        graph.initializer.remove(stored)
        cut: list[onnx.NodeProto] = []
        for number, matrix in enumerate(values):
            i, o, f, c = np.split(matrix, 4)
            own = np.concatenate([i, f, c, o])
            graph.initializer.append(onnx.numpy_helper.from_array(own, f"hh{number}"))
            parts = [f"{gate}{number}" for gate in "ifco"]
            cut.append(onnx.helper.make_node("Split", [f"hh{number}", "quarters"], parts))
            order = [f"{gate}{number}" for gate in "iofc"]
            cut.append(onnx.helper.make_node("Concat", order, [f"m{number}"], axis=0))
            cut.append(
                onnx.helper.make_node("Unsqueeze", [f"m{number}", "zero"], [f"u{number}"])
            )
        cut.append(onnx.helper.make_node("Concat", ["u0", "u1"], ["R"], axis=0))
        # What exporters make of initial states that nobody gave.
        shape = onnx.helper.make_node("Concat", ["two", "batch", "hidden"], ["shape"], axis=0)
        batch = onnx.helper.make_node("Shape", ["X"], ["batch"], start=1, end=2)
        cut += [batch, shape, onnx.helper.make_node("Expand", ["none", "shape"], ["initial_h"])]
        for name, numbers in {
            "quarters": [recipe.hidden] * 4,
            "zero": [0],
            "two": [2],
            "hidden": [recipe.hidden],
        }.items():
            graph.initializer.append(
                onnx.numpy_helper.from_array(np.array(numbers, np.int64), name)
            )
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "none"))
        nodes = [*cut, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.input[1]
        return recipe, planted

    def test_the_gates_are_brought_into_order_once(self, rng: np.random.Generator) -> None:
        recipe, planted = self.model(rng)
        onnx.checker.check_model(planted.model, full_check=True)
        rewritten = rewrite(planted.model)
        assert found(rewritten.plan, 0) == planted.groups(0)
        assert found(rewritten.plan, 1) == planted.groups(1)
        given = feeds(recipe, rng, 5, 3)
        del given["initial_h"]
        expected = run(planted.model, given, reference=False)
        for got, wanted in zip(
            run(rewritten.proto, given, reference=False), expected, strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)
        # Nothing is left of how R and the zeros were made.
        names = {tensor.name for tensor in rewritten.proto.graph.initializer}
        assert not names & {"hh0", "hh1", "W", "quarters", "none"}
        assert not {"Unsqueeze", "Split", "Expand", "Shape"} & rewritten.ops.keys()

    def test_other_readers_keep_theirs(self, rng: np.random.Generator) -> None:
        _, planted = self.model(rng)
        graph = planted.model.graph
        graph.node.append(onnx.helper.make_node("Identity", ["u0"], ["kept"]))
        graph.output.append(onnx.helper.make_tensor_value_info("kept", 1, [1, 72, 18]))
        rewritten = rewrite(planted.model)
        assert rewritten.ops["Unsqueeze"] == 1
        assert "hh0" in {tensor.name for tensor in rewritten.proto.graph.initializer}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("outputs", [("Y", "Y_h"), ("Y_h",), ("Y",)], ids="-".join)
def test_units_that_are_gone_are_zeros(
    cell: CellType, direction: str, outputs: tuple[str, ...]
) -> None:
    """Units without an edge, where all that reads them is said to do without."""
    rng = np.random.default_rng(3)
    recipe = Recipe(
        cell, ((3, 9), (2, 4)), (), direction=direction, outputs=outputs, lengths=True
    )
    planted = plant(recipe, rng)
    gone = np.flatnonzero(planted.units[0] == 1)
    live = np.flatnonzero(planted.units[0] == 0)
    model = load_model(planted.model)
    (site,), _ = find_recurrent(model, Constants(model))
    columns = unit_columns(gone, site.hidden, site.gates)
    weights = {w.name: w.array.copy() for w in site.all_weights}
    for weight in weights.values():
        weight[:, columns] = 0
    (w, r) = site.weights[0]
    graph = unit_graph(weights[w.name] != 0, weights[r.name] != 0, cell)
    plan = plan_recurrent(RecurrentGraph((graph,), None, True, 4, (gone,)), CPU, "shrink")
    rewriting = RewriteRecurrent([(site, plan)], lambda weight: weights[weight.name])
    rewritten = rewriting(model).model.proto
    onnx.checker.check_model(rewritten, full_check=True)
    given = feeds(recipe, rng, 7, 3)
    before, after = (run(proto, given, reference=False) for proto in (planted.model, rewritten))
    for first, second in zip(before, after, strict=True):
        np.testing.assert_allclose(second[..., live], first[..., live], atol=1e-6)
        assert (second[..., gone] == 0).all()
