"""A planted structure is found, rewritten and validated whatever form the product has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.planted import Planted, Recipe, array_of, found_partition, plant, save, set_array
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Array = NDArray[Any]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")


def in_place_of_up(model: onnx.ModelProto, *nodes: onnx.NodeProto, gone: int = 1) -> None:
    """Let ``nodes`` make ``up.product``, or what follows it."""
    rest = list(model.graph.node)[gone:]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def store(model: onnx.ModelProto, name: str, values: Array) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))


def transposed_weight(model: onnx.ModelProto) -> None:
    set_array(model, "up.weight", np.ascontiguousarray(array_of(model, "up.weight").T))


def left(model: onnx.ModelProto) -> None:
    """(W^T @ x^T)^T."""
    transposed_weight(model)
    in_place_of_up(
        model,
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["up.weight", "turned"], ["columns"], "up"),
        helper.make_node("Transpose", ["columns"], ["up.product"], perm=[1, 0]),
    )


def left_gemm_with_a_bias_of_columns(model: onnx.ModelProto) -> None:
    set_array(model, "up.bias", array_of(model, "up.bias")[:, None])
    in_place_of_up(
        model,
        helper.make_node(
            "Gemm", ["up.weight", "x", "up.bias"], ["columns"], "up", transA=1, transB=1
        ),
        helper.make_node("Transpose", ["columns"], ["up.sum"], perm=[1, 0]),
        gone=2,
    )


def gemm_of_a_transposed_value(model: onnx.ModelProto) -> None:
    in_place_of_up(
        model,
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node(
            "Gemm", ["turned", "up.weight", "up.bias"], ["up.sum"], "up", transA=1
        ),
        gone=2,
    )


def gemm_with_a_bias_from_outside(model: onnx.ModelProto) -> None:
    in_place_of_up(
        model,
        helper.make_node(
            "Gemm", ["x", "up.weight", "c"], ["up.product"], "up", alpha=0.5, beta=3.0
        ),
    )
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [96]))


def gemm_with_a_bias_that_is_computed(model: onnx.ModelProto) -> None:
    in_place_of_up(
        model,
        helper.make_node("Neg", ["up.bias"], ["c"]),
        helper.make_node("Gemm", ["x", "up.weight", "c"], ["up.product"], "up"),
    )


def einsum(model: onnx.ModelProto) -> None:
    in_place_of_up(
        model,
        helper.make_node(
            "Einsum", ["x", "up.weight"], ["up.product"], "up", equation="bi,ij->bj"
        ),
    )


def einsum_with_the_constant_first(model: onnx.ModelProto) -> None:
    transposed_weight(model)
    in_place_of_up(
        model,
        helper.make_node(
            "Einsum", ["up.weight", "x"], ["up.product"], "up", equation="ji,bi->bj"
        ),
    )


def einsum_of_heads(model: onnx.ModelProto) -> None:
    set_array(model, "up.weight", array_of(model, "up.weight").reshape(48, 4, 24))
    store(model, "rows", np.array([0, 96]))
    in_place_of_up(
        model,
        helper.make_node("Einsum", ["x", "up.weight"], ["heads"], "up", equation="bi,ihk->bhk"),
        helper.make_node("Reshape", ["heads", "rows"], ["up.product"]),
    )


def one_matrix_of_three_axes(model: onnx.ModelProto) -> None:
    set_array(model, "up.weight", array_of(model, "up.weight")[None])
    store(model, "rows", np.array([-1, 96]))
    in_place_of_up(
        model,
        helper.make_node("MatMul", ["x", "up.weight"], ["stack"], "up"),
        helper.make_node("Reshape", ["stack", "rows"], ["up.product"]),
    )


FORMS: list[Callable[[onnx.ModelProto], None]] = [
    *(left, left_gemm_with_a_bias_of_columns, gemm_of_a_transposed_value),
    *(gemm_with_a_bias_from_outside, gemm_with_a_bias_that_is_computed, einsum),
    *(einsum_with_the_constant_first, einsum_of_heads, one_matrix_of_three_axes),
]


def outputs(path: Path, feeds: dict[str, Array]) -> list[Array]:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def check(
    command: Command, model: onnx.ModelProto, folder: Path, *options: object
) -> onnx.ModelProto:
    """Rewrite a model and check the result; the rewritten model."""
    onnx.checker.check_model(model, full_check=True)
    source, output = save(model, folder / "in.onnx"), folder / "out.onnx"
    annealed = folder / "annealed.onnx"
    result = command(
        "rewrite", source, "-o", output, "--save-annealed", annealed, *SPLIT, *options
    )
    assert result.last_line.startswith("rewritten: "), result
    rewritten = onnx.load(output)
    onnx.checker.check_model(rewritten, full_check=True)
    assert untouched_faults(source, output) == []
    rng = np.random.default_rng(3)
    feeds = {
        value.name: rng.normal(
            size=[d.dim_value or 4 for d in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in model.graph.input
    }
    for path in (output, annealed):
        for got, expected in zip(outputs(path, feeds), outputs(source, feeds), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert command("validate", source, output, "--samples", "1").code == 0
    return rewritten


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_a_product(
    form: Callable[[onnx.ModelProto], None], command: Command, eight: Planted, tmp_path: Path
) -> None:
    form(eight.model)
    rewritten = check(command, eight.model, tmp_path)
    assert found_partition(rewritten, "up") == eight.partition("up")
    assert "up.weight" not in {tensor.name for tensor in rewritten.graph.initializer}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_form_without_structure_stays_as_it_is(
    form: Callable[[onnx.ModelProto], None], command: Command, tmp_path: Path
) -> None:
    """The other site is rewritten; this one's node comes out byte for byte."""
    planted = plant(Recipe(shuffle=False), np.random.default_rng(0))
    form(planted.model)
    weight = array_of(planted.model, "up.weight")
    dense = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    set_array(planted.model, "up.weight", dense)
    before = next(node for node in planted.model.graph.node if node.name == "up")
    rewritten = check(command, planted.model, tmp_path)
    assert before in list(rewritten.graph.node)
    assert found_partition(rewritten, "down") == planted.partition("down")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_form_takes_the_permutation_of_what_follows(
    form: Callable[[onnx.ModelProto], None], command: Command, eight: Planted, tmp_path: Path
) -> None:
    """Dense itself, but its outputs stand in the order in which the next site wants them where nothing ties it."""
    form(eight.model)
    weight = array_of(eight.model, "up.weight")
    dense = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    set_array(eight.model, "up.weight", dense)
    rewritten = check(command, eight.model, tmp_path)
    assert found_partition(rewritten, "down") == eight.partition("down")


def columns(model: onnx.ModelProto) -> None:
    """The whole network on columns: (W^T @ x^T)^T each time."""
    for site, value, made in (("up", "x", "up.product"), ("down", "up.active", "down.product")):
        set_array(
            model, f"{site}.weight", np.ascontiguousarray(array_of(model, f"{site}.weight").T)
        )
        place = next(n for n, node in enumerate(model.graph.node) if node.name == site)
        nodes = list(model.graph.node)
        nodes[place : place + 1] = [
            helper.make_node("Transpose", [value], [f"{site}.turned"], perm=[1, 0]),
            helper.make_node(
                "MatMul", [f"{site}.weight", f"{site}.turned"], [f"{site}.columns"], site
            ),
            helper.make_node("Transpose", [f"{site}.columns"], [made], perm=[1, 0]),
        ]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def test_a_network_on_columns_is_one_region(
    command: Command, eight: Planted, tmp_path: Path
) -> None:
    columns(eight.model)
    rewritten = check(command, eight.model, tmp_path)
    for site in ("up", "down"):
        assert found_partition(rewritten, site) == eight.partition(site)
    # One cut, one join, and nothing is turned on the way.
    ops = [node.op_type for node in rewritten.graph.node]
    assert ops.count("Transpose") == 0
    assert ops.count("Concat") == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_stack_of_weights(shared: bool, command: Command, tmp_path: Path) -> None:
    """Experts: a matrix for each, on rows of their own or on the same rows."""
    experts = [
        plant(Recipe(blocks=((6, 12, 5),) * 4), np.random.default_rng(seed))
        for seed in range(3)
    ]
    if shared:  # they have their inputs in common
        first = experts[0].model
        weights = [array_of(first, "up.weight") * scale for scale in (1.0, -2.0, 0.5)]
    else:
        weights = [array_of(expert.model, "up.weight") for expert in experts]
    stack = np.stack(weights).astype(np.float32)
    shape: list[Any] = ["rows", 24] if shared else [3, "rows", 24]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "up"),
            helper.make_node("Relu", ["h"], ["y"]),
        ],
        "experts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, "rows", 48])],
        [numpy_helper.from_array(stack, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    rewritten = check(command, model, tmp_path)
    if shared:
        blocks = experts[0].partition("up")
        assert found_partition(rewritten, "up") == {
            (rows, tuple(column + 48 * number for number in range(3) for column in columns))
            for rows, columns in blocks
        }
    else:
        for number, expert in enumerate(experts):
            assert found_partition(rewritten, f"up.{number}") == expert.partition("up")
    assert "w" not in {tensor.name for tensor in rewritten.graph.initializer}


def test_reports_name_the_node(command: Command, eight: Planted, tmp_path: Path) -> None:
    left(eight.model)
    report = tmp_path / "report.json"
    source = save(eight.model, tmp_path / "in.onnx")
    assert command("analyze", source, "--report", report).code == 0
    content = json.loads(report.read_text("utf-8"))
    assert [site["name"] for site in content["sites"]] == ["up", "down"]
