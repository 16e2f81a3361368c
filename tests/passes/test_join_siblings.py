"""Products of one value as one wider product and a Split: which, in what form, and with the same function."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.regions import value_readers
from onnx_decompose.model.model_io import load_model
from onnx_decompose.passes.join_siblings import JoinSiblings, Place
from onnx_decompose.passes.splice import origins_of
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.siblings import Siblings, joined_cost, pays
from tests.passes.harness import TOLERANCE, check_names, feeds_for, parse, run

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    Array = NDArray[Any]

ALWAYS = dataclasses.replace(CPU, lanes=10**6)
"""A provider where every product that is saved pays."""


def weights(rng: np.random.Generator, *names: str, dtype: Any = np.float32) -> dict[str, Array]:
    """Weights of 4 inputs, as wide as the number in their names says."""
    return {name: rng.standard_normal((4, int(name[1:]))).astype(dtype) for name in names}


def join(
    proto: onnx.ModelProto,
    *,
    products: Collection[str] | None = None,
    biases: Collection[str] | None = None,
) -> tuple[onnx.ModelProto, JoinSiblings]:
    """Join all that can be joined, and check that it is the same model."""
    graph = proto.graph
    passing = JoinSiblings(
        ALWAYS,
        {name: f"site {name}" for name in products or makers(graph)},
        value_readers(graph).keys() if biases is None else biases,
    )
    before = proto.SerializeToString(deterministic=True)
    result = passing(load_model(proto))
    assert proto.SerializeToString(deterministic=True) == before
    after = result.model.proto
    assert result.modified == bool(passing.joined)
    check_names(proto, after)
    rng = np.random.default_rng(0)
    for size in (1, 3):
        feeds = feeds_for(proto, rng, size)
        for got, wanted in zip(
            *(run(model, feeds, reference=False) for model in (after, proto)), strict=True
        ):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_allclose(
                got.astype(np.float64),
                wanted.astype(np.float64),
                atol=TOLERANCE[wanted.dtype.name] * 10,
            )
    return after, passing


def makers(graph: onnx.GraphProto) -> list[str]:
    return [node.output[0] for node in graph.node]


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def stored(proto: onnx.ModelProto, name: str) -> Array:
    return next(
        numpy_helper.to_array(tensor)
        for tensor in proto.graph.initializer
        if tensor.name == name
    )


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 21])
def test_products_in_every_operator_set(rng: np.random.Generator, opset: int) -> None:
    text = "m (float[B,3,4] x) => (float[B,3,6] y) {"
    text += "[q] q = MatMul (x, a2) [k] k = MatMul (x, b3) r = Relu (q) [v] v = MatMul (x, c1)"
    text += "y = Concat <axis = 2> (r, k, v) }"
    tensors = weights(rng, "a2", "b3", "c1")
    made, passing = join(parse(text, tensors, opsets=f'"": {opset}'))
    assert ops(made) == ["MatMul", "Split", "Relu", "Concat"]
    product, split, *_ = made.graph.node
    assert origins_of(product) == ["q", "k", "v"]
    assert list(split.output) == ["q", "k", "v"]
    np.testing.assert_array_equal(
        stored(made, product.input[1]), np.hstack([tensors[n] for n in ("a2", "b3", "c1")])
    )
    tensor = product.input[1]
    assert passing.weights == {
        "a2": Place(tensor, 0, 2),
        "b3": Place(tensor, 2, 3),
        "c1": Place(tensor, 5, 1),
    }
    (one,) = passing.joined
    assert (one.input, one.products) == ("x", ("site q", "site k", "site v"))
    assert (one.shape, one.widths, one.bias) == ((4, 6), (2, 3, 1), False)
    assert 0 < one.predicted < 0.97


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_biases_behind_them(rng: np.random.Generator, dtype: Any) -> None:
    kind = {"float32": "float", "float64": "double"}.get(np.dtype(dtype).name, "float16")
    text = f"m ({kind}[B,4] x) => ({kind}[B,2] q, {kind}[B,3] k) {{"
    text += (
        "p = MatMul (x, a2) [first] q = Add (p, d) s = MatMul (x, b3) [second] k = Add (e, s) }"
    )
    tensors = weights(rng, "a2", "b3", dtype=dtype)
    tensors |= {"d": rng.standard_normal(2).astype(dtype), "e": np.ones(3, dtype)}
    made, passing = join(parse(text, tensors))
    assert ops(made) == ["MatMul", "Add", "Split"]
    assert origins_of(made.graph.node[1]) == ["first", "second"]
    assert origins_of(made.graph.node[0]) == ["p", "s"]  # that have no names
    assert passing.rows["e"] == [Place(passing.rows["d"][0].tensor, 2, 3)]
    assert passing.joined[0].bias


@pytest.mark.parametrize("flipped", [0, 1])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_gemm(rng: np.random.Generator, flipped: int, shape: tuple[int, ...]) -> None:
    text = "m (float[B,4] x) => (float[B,3] q, float[B,3] k) {"
    for name, read in (("q", "a, d"), ("k", "b, e")):
        text += f"{name} = Gemm <alpha = 0.5, beta = 2.0, transB = {flipped}> (x, {read})"
    tensors = {name: rng.standard_normal((3, 4) if flipped else (4, 3)) for name in "ab"}
    tensors |= {name: rng.standard_normal(shape) for name in "de"}
    model = parse(text + "}", {name: t.astype(np.float32) for name, t in tensors.items()})
    made, _ = join(model)
    assert ops(made) == ["Gemm", "Split"]
    assert stored(made, made.graph.node[0].input[1]).shape == ((6, 4) if flipped else (4, 6))
    assert stored(made, made.graph.node[0].input[2]).shape == (*shape[:-1], 6)


def test_a_bias_of_several_lies_at_several_places(rng: np.random.Generator) -> None:
    text = "m (float[B,4] x) => (float[B,2] q, float[B,2] k, float[2] z) {"
    text += "p = MatMul (x, a2) q = Add (p, d) s = MatMul (x, b2) k = Add (s, d) z = Neg (d) }"
    tensors = weights(rng, "a2", "b2") | {"d": rng.standard_normal(2).astype(np.float32)}
    made, passing = join(parse(text, tensors))
    assert [place.first for place in passing.rows["d"]] == [0, 2]
    assert "d" in {tensor.name for tensor in made.graph.initializer}


def test_only_products_of_one_form_are_joined(rng: np.random.Generator) -> None:
    """Two with a bias, two without, and one of another kind."""
    text = "m (float[B,4] x) => (float[B,2] q, float[B,2] k, float[B,2] u, float[B,2] v, float[B,2] g) {"
    text += "p = MatMul (x, a2) q = Add (p, e) s = MatMul (x, b2) k = Add (s, f)"
    text += "u = MatMul (x, c2) v = MatMul (x, d2) g = Gemm (x, g2) }"
    tensors = weights(rng, "a2", "b2", "c2", "d2", "g2")
    tensors |= {name: rng.standard_normal(2).astype(np.float32) for name in "ef"}
    made, passing = join(parse(text, tensors))
    assert sorted(ops(made)) == sorted(["MatMul", "Add", "Split", "MatMul", "Split", "Gemm"])
    assert [one.products for one in passing.joined] == [
        ("site p", "site s"),
        ("site u", "site v"),
    ]


def test_a_product_that_others_read_keeps_its_bias_behind(rng: np.random.Generator) -> None:
    text = "m (float[B,4] x) => (float[B,2] q, float[B,2] k, float[B,2] r) {"
    text += "p = MatMul (x, a2) q = Add (p, e) s = MatMul (x, b2) k = Add (s, f)"
    text += "r = Sub (p, s) }"
    tensors = weights(rng, "a2", "b2")
    tensors |= {name: rng.standard_normal(2).astype(np.float32) for name in "ef"}
    made, _ = join(parse(text, tensors))
    assert ops(made) == ["MatMul", "Split", "Add", "Add", "Sub"]


def test_a_stored_matrix_that_an_operator_turns(rng: np.random.Generator) -> None:
    text = "m (float[B,4] x) => (float[B,2] q, float[B,3] k) {"
    text += "t = Transpose <perm = [1, 0]> (w) q = MatMul (x, t) k = MatMul (x, b3) }"
    tensors = weights(rng, "b3") | {"w": rng.standard_normal((2, 4)).astype(np.float32)}
    made, passing = join(parse(text, tensors))
    assert ops(made) == ["MatMul", "Split"]
    assert passing.weights.keys() == {"t", "b3"}
    assert {tensor.name for tensor in made.graph.initializer}.isdisjoint({"w", "b3"})


def test_what_a_body_reads_is_made(rng: np.random.Generator) -> None:
    text = """m (float[B,4] x, bool c) => (float[B,2] y) {
        p = MatMul (x, a2) q = Add (p, e) s = MatMul (x, b2) k = Add (s, f)
        z = If (c) <then_branch = t () => (t0) { t0 = Sub (p, s) },
                    else_branch = u () => (u0) { u0 = Sub (k, q) }>
        y = Neg (z) }"""
    tensors = weights(rng, "a2", "b2")
    tensors |= {name: rng.standard_normal(2).astype(np.float32) for name in "ef"}
    made, _ = join(parse(text, tensors))
    # The products are values of their own, too.
    assert ops(made) == ["MatMul", "Split", "Add", "Add", "If", "Neg"]


ONE_FORM = "m (float[B,4] x) => (float[B,2] q, float[B,2] k) {"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ONE_FORM + "q = MatMul (x, a2) k = MatMul (x, a2) }", "one weight"),
        (
            ONE_FORM + "q = MatMul (x, a2) r = MatMul (x, b2) s = Neg (b2) k = Add (r, z) }",
            "read",
        ),
        (ONE_FORM + "r = Neg (x) q = MatMul (x, a2) k = MatMul (r, b2) }", "two values"),
        (
            ONE_FORM + "q = Gemm <alpha = 0.5> (x, a2) k = Gemm (x, b2) }",
            "attributes",
        ),
        (ONE_FORM + "q = Gemm (x, a2, z) k = Gemm (x, b2) }", "one bias"),
        (ONE_FORM + "q = Gemm (x, a2, z) k = Gemm (x, b2, n) }", "a bias for all outputs"),
        (
            ONE_FORM + "q = MatMul (x, a2) t = Neg (b2) k = MatMul (x, t) }",
            "a computed weight",
        ),
        (
            ONE_FORM.replace(" x)", " x, float[4,2] b2)")
            + "q = MatMul (x, a2) k = MatMul (x, b2) }",
            "overridable",
        ),
    ],
)
def test_others_stay_apart(rng: np.random.Generator, text: str, why: str) -> None:
    tensors = weights(rng, "a2", "b2")
    tensors |= {"z": np.zeros(2, np.float32), "n": np.ones(1, np.float32)}
    proto = parse(text, {})
    read = value_readers(proto.graph)
    proto = parse(text, {name: tensor for name, tensor in tensors.items() if name in read})
    made, _ = join(proto)
    assert "Split" not in ops(made), why


def test_only_what_can_be_told_of_is_moved(rng: np.random.Generator) -> None:
    text = "m (float[B,4] x) => (float[B,2] q, float[B,2] k, float[B,2] v) {"
    text += "p = MatMul (x, a2) q = Add (p, e) s = MatMul (x, b2) k = Add (s, f)"
    text += "v = MatMul (x, c2) }"
    tensors = weights(rng, "a2", "b2", "c2")
    tensors |= {name: rng.standard_normal(2).astype(np.float32) for name in "ef"}
    proto = parse(text, tensors)
    made, _ = join(proto, products={"p", "s"}, biases=())
    assert ops(made) == ["MatMul", "Split", "Add", "Add", "MatMul"]
    made, _ = join(proto, products={"p"})
    assert "Split" not in ops(made)


def test_names_of_the_original_are_not_given_again(rng: np.random.Generator) -> None:
    text = ONE_FORM + "q = MatMul (x, a2) k = MatMul (x, b2) }"
    proto = parse(text, weights(rng, "a2", "b2"))
    reserved = onnx.GraphProto(initializer=[onnx.TensorProto(name="a2.joined")])
    passing = JoinSiblings(ALWAYS, {"q": "q", "k": "k"}, (), {}, reserved)
    passing(load_model(proto))
    assert passing.weights["a2"].tensor == "a2.joined_1"


@pytest.mark.parametrize(
    ("shape", "sizes", "positions", "has_batch"),
    [
        ("B,T", {"T": 1}, 1, True),
        ("B,T", {"T": 4096}, 4096, True),
        ("B,3", {}, 3, True),
        ("2,3", {}, 6, False),
        ("T,B", {"T": 5}, 5, True),
        ("T,2", {"T": 5}, 10, False),
        ("B", {"T": 5}, 1, True),
    ],
)
def test_it_has_to_pay_at_the_rows_that_there_are(
    rng: np.random.Generator, shape: str, sizes: dict[str, int], positions: int, has_batch: bool
) -> None:
    text = f"m (float[{shape},288] x) => (float[{shape},288] q, float[{shape},288] k) {{"
    text += "q = MatMul (x, a) k = MatMul (x, b) }"
    tensors = {name: rng.standard_normal((288, 288)).astype(np.float32) for name in "ab"}
    cost = dataclasses.replace(CPU, batches=(1,))
    passing = JoinSiblings(cost, {"q": "q", "k": "k"}, (), sizes)
    made = passing(load_model(parse(text, tensors)))
    siblings = Siblings(288, (288, 288), 4, positions, has_batch)
    assert made.modified == pays(siblings, cost) == (positions < 100)
    assert [one.predicted for one in passing.joined] == [joined_cost(siblings, cost)] * len(
        passing.joined
    )


@pytest.mark.parametrize("opset", [8, 10, 13])
def test_a_bias_that_adds_an_axis_moves_the_one_that_is_cut(
    rng: np.random.Generator, opset: int
) -> None:
    text = "m (float[B,4] x) => (float[1,B,2] q, float[1,B,3] k) {"
    text += "h = MatMul (x, a2) q = Add (h, d) i = MatMul (x, b3) k = Add (i, e) }"
    tensors = weights(rng, "a2", "b3")
    tensors |= {
        name: rng.standard_normal((1, 1, width)).astype(np.float32)
        for name, width in (("d", 2), ("e", 3))
    }
    made, _ = join(parse(text, tensors, opsets=f'"": {opset}'), products=["h", "i"])
    assert ops(made) == ["MatMul", "Add", "Split"]
