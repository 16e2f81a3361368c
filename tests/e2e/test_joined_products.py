"""Products of one value become one product in the rewritten model: told of, proved, and undone where it does harm."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.model_io import load_model
from onnx_decompose.options import Options
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.verify import Inputs, structural_claim
from tests.e2e.planted import array_of, decomposition, save, set_array, units, with_heads
from tests.e2e.random_models import NOISE, Recipe, random_model
from tests.e2e.whole_rewrite import EXACT, check_rewrite, rewrite_once
from tests.passes.harness import blocks, parse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Array = NDArray[Any]

pytestmark = pytest.mark.e2e


@pytest.fixture
def rewritten(
    command: Command,
    tmp_path: Path,
    rng: np.random.Generator,
    quick_bench: None,  # noqa: ARG001
) -> tuple[Path, Path, dict[str, Any]]:
    """The original, the rewritten model, and the report."""
    source = save(with_heads(rng), tmp_path / "in.onnx")
    output, report = tmp_path / "out.onnx", tmp_path / "r.json"
    told = command(
        *("rewrite", source, "-o", output, "--report", report, "--html", tmp_path / "r.html"),
        *("--force", "--batch", 1),
    )
    assert told.code == 0, told.err
    assert "products joined: 3 that read the same values are 1 now" in told.out
    assert "head.q, head.k, head.v" in (tmp_path / "r.html").read_text("utf-8")
    return source, output, json.loads(report.read_text("utf-8"))


def test_untouched_products_are_joined_and_told_of(
    command: Command, rewritten: tuple[Path, Path, dict[str, Any]]
) -> None:
    source, output, report = rewritten
    (one,) = report["joined"]
    assert (one["input"], one["products"]) == ("read", [f"head.{n}" for n in "qkv"])
    assert one["widths"] == [4, 4, 3]
    assert one["bias"] is True
    assert one["predicted"] < 1
    assert {s["name"]: s["decision"] for s in report["sites"]}["head.q"] == "dense"
    model = onnx.load(output)
    split = next(node for node in model.graph.node if list(node.output) == ["q", "k", "v"])
    assert split.op_type == "Split"
    recorded = decomposition(model)
    assert recorded["sites"]["head.k"]["annealing"] == "exact"
    assert units(recorded["sites"]["head.k"]["blocks"][0]["stored_columns"]) == (4, 5, 6, 7)
    assert recorded["constants"]["v.b"]["blocks"][0]["stored_columns"] == "8:11"
    assert command("validate", source, output, "--samples", 2).code == 0


@pytest.mark.parametrize(
    ("what", "column", "told"),
    [
        ("w", 0, "site 'head.q'"),
        ("w", 5, "site 'head.k'"),
        ("w", 10, "site 'head.v'"),
        ("b", 5, "'k.b'"),
    ],
)
def test_one_entry_that_was_tampered_with_is_found(
    command: Command,
    rewritten: tuple[Path, Path, dict[str, Any]],
    what: str,
    column: int,
    told: str,
) -> None:
    source, output, _ = rewritten
    model = onnx.load(output)
    values = array_of(model, f"q.{what}.joined").copy()
    values[..., column].flat[0] = np.nextafter(values[..., column].flat[0], np.float32(np.inf))
    set_array(model, f"q.{what}.joined", values)
    onnx.save(model, output)
    result = command("validate", source, output, "--samples", 1)
    assert result.code == 1
    assert told in result.out + result.err


def test_a_split_at_other_places_is_found(
    command: Command, rewritten: tuple[Path, Path, dict[str, Any]]
) -> None:
    """The weights are all there, and the values are not those that they belong to."""
    source, output, _ = rewritten
    model = onnx.load(output)
    split = next(node for node in model.graph.node if "q" in node.output)
    split.output[:] = ["k", "q", "v"]
    onnx.save(model, output)
    assert command("validate", source, output, "--samples", 1).code == 1


def test_another_operator_in_its_place_is_found(
    command: Command, rewritten: tuple[Path, Path, dict[str, Any]]
) -> None:
    source, output, _ = rewritten
    model = onnx.load(output)
    node = next(node for node in model.graph.node if node.name == "head.q.joined")
    assert node.op_type == "MatMul"
    node.op_type = "MatMulInteger"
    onnx.save(model, output)
    assert command("validate", source, output, "--samples", 1).code in {1, 2}


@pytest.mark.usefixtures("quick_bench")
@pytest.mark.parametrize("emit", ["split", "grouped"])
def test_only_where_the_cost_model_chooses(
    command: Command, tmp_path: Path, rng: np.random.Generator, emit: str
) -> None:
    source, output = save(with_heads(rng), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = tmp_path / "r.json"
    told = command(
        *("rewrite", source, "-o", output, "--report", report, "--emit", emit),
        *("--force", "--batch", 1),
    )
    assert told.code == 0
    assert json.loads(report.read_text("utf-8"))["joined"] == []
    assert "joined" not in told.out


@pytest.mark.usefixtures("quick_bench")
def test_a_model_that_is_not_taken_apart_keeps_its_products(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = with_heads(rng)
    for tensor in model.graph.initializer:
        array = rng.normal(size=tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, "--batch", 1).code == 0
    assert output.read_bytes() == source.read_bytes()


def test_parts_of_rewritten_products_are_joined(rng: np.random.Generator) -> None:
    """Two products whose blocks read the same units, with biases, and a dense one that reads all of them."""
    labels = [0] * 4 + [1] * 4
    tensors = {
        "up": blocks(rng, labels, labels),
        "gate": blocks(rng, labels, labels),
        "up.b": rng.normal(size=8),
        "gate.b": rng.normal(size=8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["p"], "up"),
        helper.make_node("Add", ["p", "up.b"], ["u"]),
        helper.make_node("MatMul", ["x", "gate"], ["s"], "gate"),
        helper.make_node("Add", ["s", "gate.b"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["t"]),
        helper.make_node("Mul", ["u", "t"], ["y"]),
    ]
    value = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 8]) for n in "xy")
    graph = helper.make_graph(
        nodes,
        "gated",
        [next(value)],
        [next(value)],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    outcome = check_rewrite(model, "auto")
    assert outcome.decisions == {"split"}
    assert [one.products for one in outcome.joined] == [("up", "gate")] * 2
    assert all(one.bias for one in outcome.joined)


def test_biases_that_constants_were_folded_into(rng: np.random.Generator) -> None:
    """Two heads read hidden units of which some are constant: their biases are others, and lie in one."""
    first, heads = rng.normal(size=(6, 8)), {name: rng.normal(size=(8, 3)) for name in "ab"}
    first[:, [2, 5]] = 0
    tensors = {"w": first, "w.b": rng.normal(size=8), **heads}
    tensors |= {f"{name}.b": rng.normal(size=3) for name in heads}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "w.b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
    ]
    for name in heads:
        nodes.append(helper.make_node("MatMul", ["r", name], [f"{name}.p"], f"head.{name}"))
        nodes.append(helper.make_node("Add", [f"{name}.p", f"{name}.b"], [f"y.{name}"]))
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["b", 6])],
        [helper.make_tensor_value_info(f"y.{n}", TensorProto.DOUBLE, ["b", 3]) for n in heads],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    outcome = check_rewrite(model, "auto")
    assert outcome.decisions == {"shrink"}
    assert [one.products for one in outcome.joined] == [("head.a", "head.b")]
    assert outcome.model is not None
    sites = decomposition(outcome.model)["sites"]
    parts = [sites[f"head.{name}"]["bias"]["blocks"][0] for name in heads]
    assert len({part["initializer"] for part in parts}) == 1
    assert [part["stored_columns"] for part in parts] == ["0:3", "3:6"]
    original = load_model(model)
    for column, told in ((1, "head.a"), (4, "head.b")):
        copy = onnx.ModelProto.FromString(outcome.model.SerializeToString())
        values = array_of(copy, parts[0]["initializer"]).copy()
        values[..., column] += 1
        set_array(copy, parts[0]["initializer"], values)
        claim = structural_claim(
            original, load_model(copy), inputs=Inputs(seeds=1), provider=Provider.CPU
        )
        assert f"site '{told}': the bias rebuilt" in claim.reason


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    free=st.booleans(),
    criterion=st.sampled_from(["", "ksigma:3", "fdr", "shared"]),
)
def test_random_models(seed: int, free: bool, criterion: Any) -> None:
    """With several products wherever others have one: every claim holds, and the rest is as it was."""
    recipe = dataclasses.replace(Recipe.drawn(seed, NOISE if criterion else 0.0), siblings=True)
    options = Options(null=f"normal:{NOISE}", criterion=criterion, provider="cpu")
    check_rewrite(random_model(recipe), "auto", options if criterion else EXACT, free=free)


def test_a_bias_that_something_else_reads_too_is_told_of_at_both_places(
    rng: np.random.Generator,
) -> None:
    """Joined products have it side by side; what reads the part where it was is compared with the original, too."""
    inputs, outputs = [0, 1, 0, 1], [0, 1, 1, 0, 1, 0]
    tensors = {
        "w": blocks(rng, inputs, outputs),
        "v": blocks(rng, inputs, outputs),
        "b": rng.standard_normal(6).astype(np.float32),
        "w2": blocks(rng, outputs, inputs),
    }
    text = """shared (float[B, 4] x) => (float[B, 4] y) {
        h = MatMul(x, w)  a = Add(h, b)  i = MatMul(x, v)  l = Add(i, b)
        q = Sigmoid(l)  r = Mul(a, q)  rr = Mul(r, b)  y = MatMul(rr, w2) }"""
    proto = parse(text, tensors)
    made = rewrite_once(proto, "auto", EXACT, free=True)
    assert made.model is not None
    assert made.joined
    recorded = decomposition(made.model)["constants"]["b"]["blocks"]
    parts = {block["initializer"] for block in recorded}
    alone = {
        node.input[1]
        for node in made.model.graph.node
        if node.op_type == "Mul" and node.input[1] in parts
    }
    assert alone
    for name in alone:
        tampered = onnx.ModelProto()
        tampered.CopyFrom(made.model)
        values = array_of(tampered, name)
        values[..., 0] += 1e-5
        set_array(tampered, name, values)
        claim = structural_claim(
            load_model(proto),
            load_model(tampered),
            inputs=Inputs(seeds=1),
            provider=Provider.CPU,
        )
        assert not claim


def test_joined_products_with_absorbed_scales_are_proved(rng: np.random.Generator) -> None:
    """What a Mul made in the original, a Split makes now."""
    faint = np.where(np.arange(24) < 8, 1.0, 1e-6)
    tensors = {
        "w": rng.standard_normal((16, 24)) * faint,
        "v": rng.standard_normal((16, 24)) * faint,
        "s": rng.uniform(0.5, 2, 24),
        "t": rng.uniform(0.5, 2, 24),
        "w2": rng.standard_normal((24, 16)) / 8,
    }
    text = """scaled (float[B, 16] x) => (float[B, 16] y) {
        h = MatMul(x, w)  z = Mul(h, s)  i = MatMul(x, v)  l = Mul(i, t)
        q = Sigmoid(l)  r = Mul(z, q)  y = MatMul(r, w2) }"""
    proto = parse(text, {name: array.astype(np.float32) for name, array in tensors.items()})
    options = Options(null="normal:1e-6", criterion="ksigma:6", provider="cpu", seeds=1)
    outcome = check_rewrite(proto, "auto", options)
    assert outcome.joined
    assert outcome.model is not None
    recorded = decomposition(outcome.model)["sites"]
    assert all(recorded[name]["absorbed"] == 1 for name in recorded if name != "y")
