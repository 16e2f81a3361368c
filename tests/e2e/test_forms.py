"""A planted structure is found whatever form its weights are stored in, and what shares a weight is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.planted import (
    Planted,
    Recipe,
    array_of,
    decomposition,
    found_partition,
    plant,
    run,
    save,
    set_array,
)
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")


def stored_as(
    model: onnx.ModelProto, name: str, values: np.ndarray[Any, Any], *nodes: onnx.NodeProto
) -> None:
    """Store the weight ``name`` as other values under ``stored``, and make it of them by ``nodes``."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.initializer.append(
        numpy_helper.from_array(np.ascontiguousarray(values), "stored")
    )
    _prepend(model, nodes)


def _prepend(model: onnx.ModelProto, nodes: tuple[onnx.NodeProto, ...]) -> None:
    after = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *after])


def integers(name: str, *values: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=list(values))


def constant_node(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight")
    tensor = numpy_helper.from_array(values, "anything")
    stored_as(
        model,
        "up.weight",
        np.zeros(1),
        helper.make_node("Constant", [], ["up.weight"], value=tensor),
    )
    model.graph.initializer.pop()


def constant_node_of_numbers(model: onnx.ModelProto) -> None:
    """The list of floats that a Constant node can hold has one axis."""
    values = array_of(model, "up.weight")
    stored_as(
        model,
        "up.weight",
        np.zeros(1),
        helper.make_node("Constant", [], ["numbers"], value_floats=values.reshape(-1).tolist()),
        integers("shape", *values.shape),
        helper.make_node("Reshape", ["numbers", "shape"], ["up.weight"]),
    )
    model.graph.initializer.pop()


def sliced(model: onnx.ModelProto) -> None:
    """The part of a larger table."""
    values = array_of(model, "up.weight")
    table = np.pad(values, ((2, 3), (1, 0)), constant_values=7.0)
    stored_as(
        model,
        "up.weight",
        table,
        *(integers("starts", 2, 1), integers("ends", -3, 1 << 40), integers("axes", 0, -1)),
        helper.make_node("Slice", ["stored", "starts", "ends", "axes"], ["up.weight"]),
    )


def through_everything(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight").astype(np.float64)
    stored_as(
        model,
        "up.weight",
        values.T.reshape(-1)[None],
        *(integers("first", 0), integers("shape", values.shape[1], -1), integers("last", 2)),
        helper.make_node("Cast", ["stored"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Squeeze", ["a", "first"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("Identity", ["c"], ["d"]),
        helper.make_node("Unsqueeze", ["d", "last"], ["e"]),
        helper.make_node("Transpose", ["e"], ["f"], perm=[1, 0, 2]),
        helper.make_node("Squeeze", ["f", "last"], ["up.weight"]),
    )


def transposed_twice(model: onnx.ModelProto) -> None:
    stored_as(
        model,
        "up.weight",
        array_of(model, "up.weight"),
        helper.make_node("Transpose", ["stored"], ["once"]),
        helper.make_node("Identity", ["once"], ["same"]),
        helper.make_node("Transpose", ["same"], ["up.weight"], perm=[1, 0]),
    )


def cast_from_half(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight").astype(np.float16)
    cast = helper.make_node("Cast", ["stored"], ["up.weight"], to=TensorProto.FLOAT)
    stored_as(model, "up.weight", values, cast)


def cast_from_double(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight").astype(np.float64)
    cast = helper.make_node("Cast", ["stored"], ["up.weight"], to=TensorProto.FLOAT)
    stored_as(model, "up.weight", values, cast)


def reshaped_from_flat(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight")
    stored_as(
        model,
        "up.weight",
        values.reshape(-1),
        integers("shape", values.shape[0], -1),
        helper.make_node("Reshape", ["stored", "shape"], ["up.weight"]),
    )


def reshaped_from_heads(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight")
    stored_as(
        model,
        "up.weight",
        values.reshape(values.shape[0], 8, -1),
        integers("shape", 0, -1),
        helper.make_node("Reshape", ["stored", "shape"], ["up.weight"]),
    )


def squeezed(model: onnx.ModelProto) -> None:
    stored_as(
        model,
        "up.weight",
        array_of(model, "up.weight").T[None],
        integers("axes", 0),
        helper.make_node("Transpose", ["stored"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Squeeze", ["turned", "axes"], ["up.weight"]),
    )


def unsqueezed_and_back(model: onnx.ModelProto) -> None:
    stored_as(
        model,
        "up.weight",
        array_of(model, "up.weight"),
        integers("axes", 0, -1),
        helper.make_node("Unsqueeze", ["stored", "axes"], ["wide"]),
        helper.make_node("Squeeze", ["wide"], ["up.weight"]),
    )


def sparse_initializer(model: onnx.ModelProto) -> None:
    values = array_of(model, "up.weight")
    stored_as(model, "up.weight", values)
    model.graph.initializer.pop()
    places = np.flatnonzero(values)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(values.reshape(-1)[places], "up.weight"),
            numpy_helper.from_array(places.astype(np.int64), "places"),
            list(values.shape),
        )
    )


def sparse_constant_node(model: onnx.ModelProto) -> None:
    sparse_initializer(model)
    sparse = onnx.SparseTensorProto()
    sparse.CopyFrom(model.graph.sparse_initializer.pop())
    indices = np.argwhere(array_like(sparse)).astype(np.int64)
    sparse.indices.CopyFrom(numpy_helper.from_array(indices, "places"))
    _prepend(model, (helper.make_node("Constant", [], ["up.weight"], sparse_value=sparse),))


def array_like(sparse: onnx.SparseTensorProto) -> np.ndarray[Any, Any]:
    dense = np.zeros(tuple(sparse.dims), np.float32)
    dense.reshape(-1)[numpy_helper.to_array(sparse.indices)] = numpy_helper.to_array(
        sparse.values
    )
    return dense


FORMS: list[Callable[[onnx.ModelProto], None]] = [
    *(constant_node, transposed_twice, cast_from_half, cast_from_double, reshaped_from_flat),
    *(reshaped_from_heads, squeezed, unsqueezed_and_back, sparse_initializer),
    *(sparse_constant_node, constant_node_of_numbers, sliced, through_everything),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_a_stored_weight(
    form: Callable[[onnx.ModelProto], None], command: Command, eight: Planted, tmp_path: Path
) -> None:
    form(eight.model)
    onnx.checker.check_model(eight.model)
    source, output = save(eight.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    rewritten = onnx.load(output)
    onnx.checker.check_model(rewritten, full_check=True)
    for site in ("up", "down"):
        assert found_partition(rewritten, site) == eight.partition(site)
    # Nothing of the old form is left.
    assert {node.op_type for node in rewritten.graph.node} == {
        *("Add", "Concat", "Gather", "MatMul", "Relu"),
    }
    assert not rewritten.graph.sparse_initializer
    assert not {"stored", "up.weight"} & {t.name for t in rewritten.graph.initializer}
    assert untouched_faults(source, output) == []
    x = np.random.default_rng(3).normal(size=(4, 48)).astype(np.float32)
    np.testing.assert_allclose(run(output, x), run(source, x), rtol=1e-5, atol=1e-5)
    assert command("validate", source, output, "--samples", "1").code == 0


def test_a_weight_that_two_products_share(command: Command, tmp_path: Path) -> None:
    """An unrolled recurrence: both steps are taken apart, and nothing of the shared weight is left behind."""
    planted = plant(Recipe(blocks=((6, 6, 6),) * 8, shuffle=False), np.random.default_rng(0))
    model = planted.model
    for node in model.graph.node:
        if node.name == "down":
            node.input[1] = "up.weight"
    stale = [t for t in model.graph.initializer if t.name == "down.weight"]
    model.graph.initializer.remove(stale[0])
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith("rewritten: ")
    rewritten = onnx.load(output)
    assert len(found_partition(rewritten, "up")) == len(found_partition(rewritten, "down")) == 8
    # Equal blocks are stored once.
    assert sum(".block" in t.name for t in rewritten.graph.initializer) == 8
    assert command("validate", source, output, "--samples", "1").code == 0


def test_an_unrolled_decoder(command: Command, tmp_path: Path) -> None:
    """One weight in two dozen nodes: every step is taken apart, and the blocks are stored once."""
    planted = plant(Recipe(blocks=((6, 6, 6),) * 8), np.random.default_rng(0))
    model, graph = planted.model, planted.model.graph
    weight = array_of(model, "up.weight")
    weight = weight[:, np.argsort(planted.labels[1], kind="stable")]
    set_array(
        model, "up.weight", weight[:, np.argsort(np.argsort(planted.labels[0], kind="stable"))]
    )
    step = list(graph.node)[:3]
    del graph.node[:]
    steps, value = 24, "x"
    for number in range(steps):
        for node in step:
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{node.name}.{number}"
            copy.input[0] = value
            value = copy.output[0] = f"{node.output[0]}.{number}"
    graph.node[-1].output[0] = "y"
    graph.initializer.remove(next(t for t in graph.initializer if t.name == "down.weight"))
    graph.initializer.remove(next(t for t in graph.initializer if t.name == "down.bias"))
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith("rewritten: ")
    rewritten = onnx.load(output)
    for number in range(steps):
        assert len(found_partition(rewritten, f"up.{number}")) == 8
    assert sum(".block" in tensor.name for tensor in rewritten.graph.initializer) == 8
    assert "up.weight" not in {tensor.name for tensor in rewritten.graph.initializer}
    assert command("validate", source, output, "--samples", "1").code == 0


def test_a_weight_of_which_one_product_stays_dense(command: Command, tmp_path: Path) -> None:
    """Two products share a weight, and one is inside a call that stays closed: the weight stays for it."""
    planted = plant(Recipe(blocks=((6, 6, 6),) * 8, shuffle=False), np.random.default_rng(0))
    model = planted.model
    for node in model.graph.node:
        if node.name == "down":
            node.input[1] = "up.weight"
            node.op_type, node.domain = "MatMul", "foreign"
    model.opset_import.append(helper.make_opsetid("foreign", 1))
    function = helper.make_function(
        *("foreign", "MatMul", ["a", "b"], ["c"]),
        [helper.make_node("MatMul", ["a", "b"], ["c"], "inner")],
        [helper.make_opsetid("", 17), helper.make_opsetid("foreign", 2)],
    )
    model.functions.append(function)
    before = array_of(model, "up.weight")
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = tmp_path / "report.json"
    result = command("rewrite", source, "-o", output, "--report", report, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    rewritten = onnx.load(output)
    assert found_partition(rewritten, "up") == planted.partition("up")
    np.testing.assert_array_equal(array_of(rewritten, "up.weight"), before)
    assert "does not fit into the main graph" in report.read_text("utf-8")


def test_a_weight_that_is_also_an_input_is_no_constant(
    command: Command, eight: Planted, tmp_path: Path
) -> None:
    shape = array_of(eight.model, "up.weight").shape
    eight.model.graph.input.append(
        helper.make_tensor_value_info("up.weight", TensorProto.FLOAT, shape)
    )
    source, output = save(eight.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = tmp_path / "report.json"
    assert command("rewrite", source, "-o", output, "--report", report, *SPLIT).code == 0
    assert "so it can be overridden at run time" in report.read_text("utf-8")
    rewritten = onnx.load(output)
    assert set(decomposition(rewritten)["sites"]) == {"down"}
    assert "up.weight" in {tensor.name for tensor in rewritten.graph.initializer}
    assert untouched_faults(source, output) == []


@pytest.mark.parametrize("transposed", [True, False])
def test_an_embedding_that_is_tied_to_a_product(
    transposed: bool, command: Command, eight: Planted, tmp_path: Path
) -> None:
    """Gather and MatMul read one initializer: the product is taken apart, the table stays as it is."""
    model, graph = eight.model, eight.model.graph
    weight = array_of(model, "up.weight")
    if transposed:
        stored_as(
            model,
            "up.weight",
            weight.T,
            helper.make_node("Transpose", ["stored"], ["up.weight"]),
        )
    table = "stored" if transposed else "up.weight"
    graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]))
    width = weight.shape[0] if transposed else weight.shape[1]
    graph.output.append(
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", width])
    )
    graph.node.append(helper.make_node("Gather", [table, "ids"], ["rows"], "lookup"))
    before = next(t for t in graph.initializer if t.name == table).SerializeToString()
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    rewritten = onnx.load(output)
    assert found_partition(rewritten, "up") == eight.partition("up")
    kept = next(t for t in rewritten.graph.initializer if t.name == table)
    assert kept.SerializeToString() == before
    assert untouched_faults(source, output) == []
    assert command("validate", source, output, "--samples", "1").code == 0


def test_annealing_a_product_does_not_touch_the_table_it_is_tied_to(
    command: Command, tmp_path: Path
) -> None:
    """Where entries are removed, only the product loses them."""
    planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3), np.random.default_rng(0))
    model, graph = planted.model, planted.model.graph
    before = array_of(model, "up.weight")
    graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]))
    shape = ["batch", before.shape[1]]
    graph.output.append(helper.make_tensor_value_info("rows", TensorProto.FLOAT, shape))
    graph.node.append(helper.make_node("Gather", ["up.weight", "ids"], ["rows"], "lookup"))
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    annealed = tmp_path / "annealed.onnx"
    null = ("--null", "normal:0.001", "--criterion", "fwer", "--save-annealed", annealed)
    result = command("rewrite", source, "-o", output, *null, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    for path in (output, annealed):
        np.testing.assert_array_equal(array_of(onnx.load(path), "up.weight"), before)


def test_a_weight_that_a_subgraph_captures_stays(
    command: Command, eight: Planted, tmp_path: Path
) -> None:
    """The main graph's product is taken apart; the branches of an If go on reading the whole weight."""
    graph = eight.model.graph
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["up.weight"], [f"{name}.out"], f"in.{name}")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)],
        )
        for name, op in (("one", "Neg"), ("other", "Abs"))
    ]
    graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph.output.append(
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["inputs", "hidden"])
    )
    graph.node.append(
        helper.make_node(
            "If", ["flag"], ["z"], "choice", then_branch=branches[0], else_branch=branches[1]
        )
    )
    before = array_of(eight.model, "up.weight")
    source, output = save(eight.model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    np.testing.assert_array_equal(array_of(onnx.load(output), "up.weight"), before)
    assert untouched_faults(source, output) == []
    assert command("validate", source, output, "--samples", "1").code == 0
