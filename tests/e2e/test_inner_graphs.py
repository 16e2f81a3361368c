"""A planted structure is found, rewritten and validated inside bodies and functions too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.e2e.inner_graphs import (
    FORMS,
    SQUARE,
    body_of,
    branch,
    branch_with_its_own_weights,
    call,
    function_with_its_own_weights,
    loop,
    value,
    with_main,
)
from tests.e2e.planted import Planted, decomposition, found_partition, plant, save
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")


@pytest.fixture
def square() -> Planted:
    """As many outputs as inputs, for states."""
    return plant(SQUARE, np.random.default_rng(0))


def feeds_for(model: onnx.ModelProto) -> dict[str, Any]:
    x = np.random.default_rng(3).normal(size=(4, 48)).astype(np.float32)
    names = {i.name for i in model.graph.input}
    return {"x": x, "flag": np.array(True)} if "flag" in names else {"x": x}


def outputs(path: Path, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime  # noqa: PLC0415

    return list(
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
    )


def all_tensors(model: onnx.ModelProto) -> set[str]:
    found = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            found |= {tensor.name for tensor in attribute.g.initializer}
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_place_of_a_site(
    form: Callable[[onnx.ModelProto], onnx.ModelProto],
    command: Command,
    square: Planted,
    tmp_path: Path,
) -> None:
    model = form(square.model)
    onnx.checker.check_model(model, full_check=True)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report, annealed = tmp_path / "report.json", tmp_path / "annealed.onnx"
    result = command(
        "rewrite", source, "-o", output, "--report", report, "--save-annealed", annealed, *SPLIT
    )
    assert result.last_line.startswith("rewritten: "), result
    rewritten = onnx.load(output)
    onnx.checker.check_model(rewritten, full_check=True)
    assert "onnx_decompose.closed" not in str(rewritten)
    for site, planted in zip(FORMS[form], ("up", "down"), strict=True):
        assert found_partition(rewritten, site) == square.partition(planted)
    # The weight as it was is gone, wherever it was.
    assert not {"up.weight", "down.weight"} & all_tensors(rewritten)
    assert untouched_faults(source, output) == []
    feeds = feeds_for(model)
    for path in (output, annealed):
        for got, expected in zip(outputs(path, feeds), outputs(source, feeds), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert command("validate", source, output, "--samples", "1").code == 0
    names = {site["name"] for site in json.loads(report.read_text("utf-8"))["sites"]}
    assert names >= set(FORMS[form])


def test_new_tensors_go_where_the_weight_was(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    """A body's own weight is in blocks of its own, an outer one in blocks of the main graph."""
    for form, inside in ((branch_with_its_own_weights, True), (branch, False)):
        source, output = save(form(square.model), tmp_path / "in.onnx"), tmp_path / "out.onnx"
        assert command("rewrite", source, "-o", output, *SPLIT).code == 0
        graph = onnx.load(output).graph
        body = next(a.g for a in graph.node[0].attribute if a.name == "then_branch")
        blocks = [
            [tensor.name for tensor in one.initializer if ".block" in tensor.name]
            for one in (body, graph)
        ]
        assert [len(names) for names in blocks] == ([16, 0] if inside else [0, 16])
        assert "up.weight.block0" in blocks[not inside]
        assert not any("//" in tensor.name for tensor in body.initializer)


def test_new_tensors_of_a_model_with_external_data_are_external_too(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    source = save(
        branch_with_its_own_weights(square.model), tmp_path / "in.onnx", external=True
    )
    output = tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output, *SPLIT)
    assert result.last_line.startswith("rewritten: "), result
    assert command("validate", source, output, "--samples", "1").code == 0


def test_a_call_without_structure_stays_a_call(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    source, output = save(call(square.model), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).code == 0
    rewritten = onnx.load(output)
    assert [n.name for n in rewritten.graph.node if n.domain == "local"] == ["other"]
    assert len(rewritten.functions) == 1


def test_a_function_that_nothing_calls_any_more_is_gone(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    model = function_with_its_own_weights(square.model)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).code == 0
    assert not onnx.load(output).functions


def test_one_weight_in_both_branches(command: Command, square: Planted, tmp_path: Path) -> None:
    """Its blocks are stored once; a weight that something else reads stays."""
    model = square.model
    branches = [
        body_of(
            model,
            name,
            {n: f"{name}.{n}" for node in model.graph.node for n in node.output},
        )
        for name in ("one", "other")
    ]
    node = helper.make_node(
        "If", ["flag"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]
    )
    shape = helper.make_node("ReduceSum", ["up.weight"], ["z"], keepdims=0)
    flag = value("flag", TensorProto.BOOL, [])
    model = with_main(model, [node, shape], inputs=[flag], outputs=[value("z", shape=[])])
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith("rewritten: ")
    rewritten = onnx.load(output)
    for part in ("then_branch", "else_branch"):
        for site in ("up", "down"):
            found = found_partition(rewritten, f"choice.{part}/{site}")
            assert found == square.partition(site)
    assert sum(".block" in tensor.name for tensor in rewritten.graph.initializer) == 16
    assert "up.weight" in all_tensors(rewritten)
    assert "down.weight" not in all_tensors(rewritten)
    assert untouched_faults(source, output) == []
    assert command("validate", source, output, "--samples", "1").code == 0


def test_a_weight_that_is_a_loop_state_is_left_alone(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    model = loop(square.model)
    body = model.graph.node[0].attribute[0].g
    body.input.append(value("w", shape=[48, 96]))
    body.output.append(value("w2", shape=[48, 96]))
    body.node.append(helper.make_node("Neg", ["w"], ["w2"]))
    for node in body.node:
        if node.name == "up":
            node.input[1] = "w"
    model.graph.node[0].input.append("up.weight")
    model.graph.node[0].output.append("last")
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = tmp_path / "report.json"
    assert command("rewrite", source, "-o", output, "--report", report, *SPLIT).code == 0
    (refused,) = json.loads(report.read_text("utf-8"))["refused"]
    assert refused == {
        "node": "steps.body/up",
        "op_type": "MatMul",
        "reason": "its weight is a state of the loop, which an iteration may change",
    }
    assert set(decomposition(onnx.load(output))["sites"]) == {"steps.body/down"}


def test_a_corrupted_block_of_a_body_is_found(
    command: Command, square: Planted, tmp_path: Path
) -> None:
    source, output = save(loop(square.model), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).code == 0
    rewritten = onnx.load(output)
    tensor = next(t for t in rewritten.graph.initializer if t.name == "up.weight.block3")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[2, 1] += 1e-3
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    result = command("validate", source, save(rewritten, output), "--samples", "1")
    assert result.code == 1
    assert "steps.body/up" in result.out + result.err
