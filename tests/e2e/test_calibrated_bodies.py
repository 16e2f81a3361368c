"""Calibrated annealing of sites inside bodies and functions, end to end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from tests.e2e.inner_graphs import FORMS, call, value, with_main
from tests.e2e.planted import Recipe, decomposition, plant, save
from tests.e2e.test_product_forms import (
    einsum,
    einsum_with_the_constant_first,
    gemm_of_a_transposed_value,
    left,
    left_gemm_with_a_bias_of_columns,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Feeds = dict[str, NDArray[Any]]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

HIDDEN, KEPT = 96, 12
"""Hidden units, and how many of them say all."""


def redundant(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Weights, (rows, hidden), of hidden units that are copies of a few, but for a little."""
    kinds = rng.normal(size=(rows, KEPT)) / np.sqrt(rows)
    copies = kinds[:, rng.permutation(np.arange(HIDDEN) % KEPT)]
    noise = 1e-4 * rng.normal(size=(rows, HIDDEN))
    found: NDArray[np.float32] = (copies + noise).astype(np.float32)
    return found


def two_layers(rng: np.random.Generator) -> onnx.ModelProto:
    """48 inputs, hidden units that mostly repeat each other, 48 outputs."""
    model = plant(Recipe(blocks=((48, HIDDEN, 48),)), rng).model
    both = redundant(rng, 49)
    tensors = {
        "up.weight": both[:48],
        "up.bias": both[48],
        "down.weight": (rng.normal(size=(HIDDEN, 48)) / HIDDEN).astype(np.float32),
    }
    for tensor in model.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return model


def twice(model: onnx.ModelProto) -> onnx.ModelProto:
    """One function with the network in it, called twice: one weight with rows of two kinds."""
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    function = helper.make_function(
        "local",
        "Net",
        ["x"],
        ["y"],
        [*constants, *model.graph.node],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Net", ["x"], ["h"], "one", domain="local"),
        helper.make_node("Net", ["h"], ["y"], "two", domain="local"),
    ]
    result = with_main(model, nodes, keep=False)
    result.functions.append(function)
    result.opset_import.append(helper.make_opsetid("local", 1))
    return result


def by_the_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in a branch that some samples take, and nothing in the other."""
    flagged = FORMS_BY_NAME["branch"](model)
    flagged.graph.input.pop()
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    flagged.graph.initializer.append(zero)
    (choice,) = flagged.graph.node
    first = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["flag"]),
    ]
    result = with_main(flagged, [*first, choice])
    result.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return result


FORMS_BY_NAME = {form.__name__: form for form in FORMS}
SITES: dict[Callable[[onnx.ModelProto], onnx.ModelProto], tuple[str, ...]] = {
    **FORMS,
    twice: ("one/up", "one/down", "two/up", "two/down"),
    by_the_data: ("choice.then_branch/up", "choice.then_branch/down"),
}


PRODUCTS = (
    *(left, left_gemm_with_a_bias_of_columns, gemm_of_a_transposed_value),
    *(einsum, einsum_with_the_constant_first),
)
"""Forms in which both products are one region."""


def inputs(model: onnx.ModelProto, rng: np.random.Generator, count: int) -> Feeds:
    """Samples; those with a flag, or a batch of one, are run one at a time."""
    names = {one.name: one.type.tensor_type.shape.dim for one in model.graph.input}
    x = rng.normal(size=(count, 48)).astype(np.float32)
    if "flag" in names:
        return {"x": x, "flag": np.arange(count) % 2 == 0}
    return {"x": x[:, None] if names["x"][0].dim_value == 1 else x}


def outputs(path: Path, feeds: Feeds) -> list[NDArray[Any]]:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if "flag" not in feeds and feeds["x"].ndim == 2:
        return [np.asarray(one) for one in session.run(None, feeds)]
    each = [
        session.run(
            None,
            {
                k: v[i : i + 1] if k == "x" and v.ndim == 2 else v[i, ...]
                for k, v in feeds.items()
            },
        )
        for i in range(len(feeds["x"]))
    ]
    return [np.concatenate(one) for one in zip(*each, strict=True)]


@pytest.mark.parametrize("form", SITES, ids=lambda form: form.__name__)
def test_hidden_units_go_in_every_place(
    form: Callable[[onnx.ModelProto], onnx.ModelProto],
    command: Command,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    model = form(two_layers(rng))
    onnx.checker.check_model(model, full_check=True)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    data, report = tmp_path / "data.npz", tmp_path / "report.json"
    annealed = tmp_path / "annealed.onnx"
    np.savez(data, **inputs(model, rng, 600))  # type: ignore[arg-type]
    result = command(
        "rewrite",
        source,
        *("-o", output, "--report", report, "--save-annealed", annealed),
        *("--calibration", data, "--proposals", "removal", "--budget", "1e-2"),
        *("--force", "--batch", "1"),
    )
    assert result.last_line.startswith("rewritten: "), result
    content = json.loads(report.read_text("utf-8"))
    assert content["claims"]["structural"]["passed"]
    assert content["claims"]["annealing"]["passed"]
    sites = {site["name"]: site for site in content["sites"]}
    for name in SITES[form]:
        assert sites[name]["decision"] == "shrink", sites[name]
        assert sites[name]["null"] == "calibration zero"
        (block,) = sites[name]["blocks"]
        assert sorted(block)[0] <= 2 * KEPT
    assert set(decomposition(onnx.load(output))["sites"]) >= set(SITES[form])
    onnx.checker.check_model(onnx.load(output), full_check=True)
    feeds = inputs(model, rng, 200)
    before, after, dense = (outputs(path, feeds) for path in (source, output, annealed))
    for one, other, third in zip(before, after, dense, strict=True):
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(one)
        np.testing.assert_allclose(other, third, rtol=1e-4, atol=1e-4)
    assert command("validate", source, output, "--samples", "1").code == 0


@pytest.mark.parametrize("form", PRODUCTS, ids=lambda form: form.__name__)
def test_hidden_units_go_in_every_form_of_a_product(
    form: Callable[[onnx.ModelProto], None],
    command: Command,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    model = two_layers(rng)
    form(model)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    data, report = tmp_path / "data.npz", tmp_path / "report.json"
    x = rng.normal(size=(600, 48)).astype(np.float32)
    np.savez(data, x=x)
    result = command(
        "rewrite",
        source,
        *("-o", output, "--report", report, "--calibration", data, "--budget", "1e-2"),
        *("--proposals", "removal", "--force", "--batch", "1"),
    )
    assert result.last_line.startswith("rewritten: "), result
    content = json.loads(report.read_text("utf-8"))
    assert all(content["claims"][name]["passed"] for name in ("structural", "annealing"))
    for site in content["sites"]:
        (block,) = site["blocks"]
        assert sorted(block)[0] <= 2 * KEPT
    assert command("validate", source, output, "--samples", "1").code == 0


RECURRENT = """
<ir_version: 8, opset_import: ["" : 17]>
rnn (float[N, 8, 16] x) => (float[N, 4] y)
{
    xs = Transpose<perm=[1, 0, 2]>(x)
    first = ReduceMean<axes=[1], keepdims=0>(x)
    start = MatMul(first, w_start)
    [rnn] last, all = Scan<num_scan_inputs=1, body = step
        (float[N, 32] h, float[N, 16] e) => (float[N, 32] h2, float[N, 32] h3)
    {
        [state] a = MatMul(h, w_state)
        [input] b = MatMul(e, w_input)
        c = Add(a, b)
        u = Tanh(c)
        [out] v = MatMul(u, w_out)
        h2 = Tanh(v)
        h3 = Identity(h2)
    }>(start, xs)
    [head] y = MatMul(last, w_head)
}
"""


def recurrent(rng: np.random.Generator) -> onnx.ModelProto:
    """A cell with a hidden layer, most of whose units repeat others."""
    model = onnx.parser.parse_model(RECURRENT)
    both = 1.5 * redundant(rng, 48)
    tensors = {
        "w_state": both[:32],
        "w_input": both[32:],
        "w_out": rng.normal(size=(HIDDEN, 32)) / np.sqrt(HIDDEN),
        "w_start": rng.normal(size=(16, 32)) / 4,
        "w_head": rng.normal(size=(32, 4)) / 4,
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in tensors.items()
    )
    return model


def test_a_cell_keeps_what_its_later_steps_need(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Each step reads what a refitted one made before."""
    model = recurrent(rng)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    data, report = tmp_path / "data.npz", tmp_path / "report.json"
    np.savez(data, x=rng.normal(size=(600, 8, 16)).astype(np.float32))
    result = command(
        "rewrite",
        source,
        *("-o", output, "--report", report, "--calibration", data, "--budget", "1e-2"),
        *("--proposals", "removal", "--force", "--batch", "1"),
    )
    assert result.last_line.startswith("rewritten: "), result
    content = json.loads(report.read_text("utf-8"))
    sites = {site["name"]: site for site in content["sites"]}
    assert sites["rnn.body/out"]["blocks"] == [[KEPT, 32]]
    assert content["claims"]["annealing"]["passed"]
    new = tmp_path / "new.npz"
    np.savez(new, x=rng.normal(size=(300, 8, 16)).astype(np.float32))
    assert command("validate", source, output, "--inputs", new).code == 0


def test_a_branch_that_hardly_any_sample_takes_is_left_and_the_report_says_so(
    command: Command, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = FORMS_BY_NAME["branch"](two_layers(rng))
    outer = call(two_layers(rng))
    # Another network in the main graph, which can be refitted.
    names = {n for node in outer.graph.node for n in node.output} - {"z"}
    model.graph.node.extend(
        _renamed(node, {n: f"main.{n}" for n in names}) for node in outer.graph.node[:3]
    )
    model.functions.extend(outer.functions)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.output.append(value("main.y", shape=["batch", 48]))
    source, report = save(model, tmp_path / "in.onnx"), tmp_path / "report.json"
    data = inputs(model, rng, 600)
    data["flag"] = np.arange(600) % 100 == 0
    np.savez(tmp_path / "data.npz", **data)  # type: ignore[arg-type]
    result = command(
        "rewrite",
        source,
        *("-o", tmp_path / "out.onnx", "--report", report, "--force", "--batch", "1"),
        *("--calibration", tmp_path / "data.npz", "--proposals", "removal", "--budget", "1e-2"),
    )
    assert result.last_line.startswith("rewritten: "), result
    sites = {site["name"]: site for site in json.loads(report.read_text("utf-8"))["sites"]}
    assert sites["up/mm"]["decision"] == "shrink"
    for name in ("choice.then_branch/up", "choice.then_branch/down"):
        assert sites[name]["decision"] == "dense"
        assert "left as it is: samples show" in sites[name]["reason"]


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy
