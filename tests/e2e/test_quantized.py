"""Weights of integers: a planted structure is found, written as integers, proved, and exact; a shuffled one stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.e2e import quantized_models as forms
from tests.e2e.inner_graphs import (
    SQUARE,
    branch_with_its_own_weights,
    function_with_its_own_weights,
    loop,
)
from tests.e2e.planted import (
    Planted,
    Recipe,
    array_of,
    decomposition,
    dense_ffn,
    found_partition,
    plant,
    run,
    save,
    units,
)
from tests.e2e.quantized_models import Coding, quantized_network
from tests.e2e.rewriting import SPLIT, rewrite
from tools.bench_quantized import quantized
from tools.quantize_model import FORMS
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

CASES = {
    "qdq": (forms.qdq, Coding()),
    "qdq-outputs": (forms.qdq, Coding(1)),
    "qdq-inputs": (forms.qdq, Coding(0)),
    "qdq-unsigned": (forms.qdq, Coding(None, np.uint8, 9)),
    "qdq-gemm": (forms.qdq_gemm, Coding()),
    "qdq-gemm-outputs": (forms.qdq_gemm, Coding(1)),
    "weight-only": (forms.turned, Coding()),
    "weight-only-outputs": (forms.turned, Coding(1, np.uint8, 7)),
    "weight-only-inputs": (forms.turned, Coding(0, np.uint8, 7)),
    "cast": (forms.cast_and_mul, Coding()),
    "cast-outputs": (forms.cast_and_mul, Coding(1, np.uint8, 5)),
    "cast-inputs": (forms.cast_and_mul, Coding(0, np.uint8, 5)),
    "dynamic": (forms.dynamic, Coding()),
    "dynamic-outputs": (forms.dynamic, Coding(1, np.uint8, 7)),
    "qlinear": (forms.qlinear, Coding()),
    "qlinear-outputs": (forms.qlinear, Coding(1)),
}
ROUNDED = {name for name in CASES if name.startswith("weight-only")}
"""Forms whose activations onnxruntime rounds to 8 bits by itself, in blocks of the weight's rows."""


def rebuilt(model: onnx.ModelProto, site: str, rest: np.ndarray[Any, Any]) -> Any:
    """A weight from its blocks, by the documented rule alone, and the floats that every block stands for."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weight = rest.copy()
    for block in decomposition(model)["sites"][site]["blocks"]:
        part = stored[block["initializer"]]
        place = np.ix_(units(block["rows"]), units(block["columns"]))
        weight[place] = part.T if block["transposed"] else part
    return weight


@pytest.mark.parametrize("case", CASES)
def test_a_planted_structure_is_found_and_written_as_integers(
    case: str, command: Command, eight: Planted, tmp_path: Path, rng: np.random.Generator
) -> None:
    product, coding = CASES[case]
    model = quantized_network(eight.model, product, coding, rng)
    onnx.checker.check_model(model, full_check=True)
    rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
    onnx.checker.check_model(rewritten, full_check=True)
    for site in ("up", "down"):
        assert found_partition(rewritten, site) == eight.partition(site)
        codes = array_of(model, f"{site}.weight")
        if decomposition(rewritten)["sites"][site]["blocks"][0]["transposed"]:
            codes = codes.T
        blocks = [
            t for t in rewritten.graph.initializer if t.name.startswith(f"{site}.weight.")
        ]
        assert {numpy_helper.to_array(t).dtype for t in blocks} == {codes.dtype}
        assert len(blocks) == 8
        # All that is left out is the zero point.
        zero = array_of(model, f"{site}.zero").astype(codes.dtype)
        line = zero.reshape(-1, 1) if coding.lines == 0 else zero
        np.testing.assert_array_equal(
            rebuilt(rewritten, site, np.zeros_like(codes) + line), codes
        )
        assert f"{site}.weight" not in {t.name for t in rewritten.graph.initializer}
        assert decomposition(rewritten)["sites"][site]["annealing"] == "exact"
    assert [site["decision"] for site in report["sites"]] == ["split", "split"]
    assert untouched_faults(tmp_path / "in.onnx", tmp_path / "out.onnx") == []
    x = 2 * np.random.default_rng(3).normal(size=(9, 48)).astype(np.float32)
    got, expected = run(rewritten, x), run(model, x)
    if case in ROUNDED:
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    elif "cast" in case:  # a product of floats in the end
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_dense_weight_stays_as_it_is(
    case: str, command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    product, coding = CASES[case]
    model = quantized_network(dense_ffn(rng), product, coding, rng)
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output)
    assert (result.code, result.err) == (0, "")
    assert output.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("case", ["qdq-outputs", "dynamic-outputs", "qlinear", "cast-inputs"])
def test_the_shuffled_weights_are_left_alone(
    case: str, command: Command, eight: Planted, tmp_path: Path, rng: np.random.Generator
) -> None:
    """As many zero points in other places: one component, and nothing to take apart."""
    product, coding = CASES[case]
    model = quantized_network(eight.model, product, coding, rng)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight"):
            values = rng.permuted(numpy_helper.to_array(tensor).ravel())
            shuffled = values.reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = command("rewrite", source, "-o", output)
    assert (result.code, result.err) == (0, "")
    assert output.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("case", ["qdq-unsigned", "weight-only-outputs", "cast-outputs"])
def test_what_another_null_removes_becomes_the_zero_point(
    case: str, command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Evidence is taken on the floats that the integers stand for."""
    planted = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=0.01), rng)
    product, coding = CASES[case]
    model = quantized_network(planted.model, product, coding, rng)
    annealed = tmp_path / "annealed.onnx"
    null = ("--null", "normal:0.011", "--criterion", "fwer", "--budget", "0.5")
    keep = ("--save-annealed", str(annealed))
    rewritten, _ = rewrite(command, model, tmp_path, *SPLIT, *null, *keep)
    dense = onnx.load(annealed)
    for site in ("up", "down"):
        assert found_partition(rewritten, site) == planted.partition(site)
        assert decomposition(rewritten)["sites"][site]["annealing"] == "masked"
        before = array_of(model, f"{site}.weight")
        after = array_of(dense, f"{site}.weight.annealed")
        assert after.dtype == before.dtype
        zero = array_of(model, f"{site}.zero").astype(before.dtype)
        if "weight-only" in case:  # the stored weight is (outputs, inputs)
            zero = zero.reshape(-1, 1)
        removed = after != before
        assert 0.5 < removed.mean() < 0.8
        assert (after == zero)[removed].all()
    if case == "qdq-unsigned":
        x = 2 * rng.normal(size=(5, 32)).astype(np.float32)
        np.testing.assert_array_equal(run(rewritten, x), run(dense, x))


def test_quantizers_stay_around_every_product(
    command: Command, eight: Planted, tmp_path: Path, rng: np.random.Generator
) -> None:
    """onnxruntime sees one product of integers in each branch; values are cut and joined as integers."""
    model = quantized_network(eight.model, forms.qdq, Coding(1), rng)
    rewritten, _ = rewrite(command, model, tmp_path, *SPLIT)
    makers = {name: node for node in rewritten.graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in rewritten.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    products = [node for node in rewritten.graph.node if node.op_type == "MatMul"]
    assert len(products) == 16
    for node in products:
        assert [makers[name].op_type for name in node.input] == 2 * ["DequantizeLinear"]
        assert readers[node.output[0]] == ["QuantizeLinear"]
    for node in rewritten.graph.node:
        if node.op_type in {"Gather", "Split", "Concat"}:
            assert {makers[name].op_type for name in node.input if name in makers} <= {
                *("Concat", "Gather", "QuantizeLinear"),
            }


def test_a_shared_weight_of_integers(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Two products that read one dequantized weight."""
    planted = plant(Recipe(blocks=((6, 6, 6),) * 8, shuffle=False), rng)
    model = quantized_network(planted.model, forms.turned, Coding(1), rng)
    for node in model.graph.node:
        if node.name == "down":
            node.input[1] = "up.t"
    nodes = [node for node in model.graph.node if node.name not in {"down.w", "down.t"}]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    rewritten, _ = rewrite(command, model, tmp_path, *SPLIT)
    assert len(found_partition(rewritten, "up")) == len(found_partition(rewritten, "down")) == 8
    # Equal blocks are stored once.
    assert sum(t.name.startswith("up.weight.") for t in rewritten.graph.initializer) == 8


@pytest.mark.parametrize("form", FORMS)
def test_what_onnxruntimes_own_quantizers_make(
    form: str, command: Command, eight: Planted, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = quantized(eight.model, form, tmp_path, rng)
    rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
    assert [site["components"] for site in report["sites"]] == [8, 8]
    assert [site["decision"] for site in report["sites"]] == ["split", "split"]
    for site in decomposition(rewritten)["sites"].values():
        assert site["annealing"] == "exact"
        assert len(site["blocks"]) == 8
    x = rng.normal(size=(40, 48)).astype(np.float32)
    np.testing.assert_array_equal(run(rewritten, x), run(model, x))


def test_fused_operators_that_quantizers_make_are_left_alone(
    command: Command, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A Gemm becomes QGemm, an operator of onnxruntime's own."""
    planted = plant(Recipe(form="gemm"), rng)
    model = quantized(planted.model, "qoperator", tmp_path, rng)
    assert "QGemm" in {node.op_type for node in model.graph.node}
    _, report = rewrite(command, model, tmp_path)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    reasons = {node["reason"] for node in report["refused"] if node["op_type"] == "QGemm"}
    assert len(reasons) == 1
    assert reasons.pop().startswith("the weight is quantized")


@pytest.mark.parametrize(
    "around", [branch_with_its_own_weights, loop, function_with_its_own_weights]
)
@pytest.mark.parametrize("case", ["qdq-gemm-outputs", "cast-outputs", "dynamic-outputs"])
def test_inside_bodies_and_functions(
    case: str,
    around: Callable[[onnx.ModelProto], onnx.ModelProto],
    command: Command,
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    planted = plant(SQUARE, rng)
    product, coding = CASES[case]
    model = around(quantized_network(planted.model, product, coding, rng))
    onnx.checker.check_model(model, full_check=True)
    rewritten, report = rewrite(command, model, tmp_path, *SPLIT)
    assert [site["decision"] for site in report["sites"]] == ["split", "split"]
    for site, name in zip(("up", "down"), decomposition(rewritten)["sites"], strict=True):
        assert found_partition(rewritten, name) == planted.partition(site)


def test_external_data(
    command: Command, eight: Planted, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = quantized_network(eight.model, forms.qdq, Coding(1), rng)
    source, output = save(model, tmp_path / "in.onnx", external=True), tmp_path / "out.onnx"
    assert command("rewrite", source, "-o", output, *SPLIT).last_line.startswith("rewritten: ")
    rewritten = onnx.load(output)
    assert found_partition(rewritten, "up") == eight.partition("up")
    assert command("validate", source, output, "--samples", "1").code == 0
    x = rng.normal(size=(5, 48)).astype(np.float32)
    np.testing.assert_array_equal(run(output, x), run(source, x))
