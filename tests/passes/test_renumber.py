"""Permutations at a region's border go into the constants around it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.model.model_io import Model, read_tensor
from tests.passes.harness import Rewritten, blocks, check_parity, parse, rewrite

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.model.metadata import Block

MIXED = [0, 1, 0, 1, 1, 0, 1, 0]
SWAPPED = [1, 0, 1, 0, 0, 1, 0, 1]
OTHER = [0, 0, 1, 1, 0, 0, 1, 1]
GATHERS = {"Gather"}


def dense(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    values = rng.uniform(0.5, 1, (rows, columns)) * rng.choice([-1, 1], (rows, columns))
    return np.asarray(values, np.float32)


def stored(result: Rewritten, block: Block) -> NDArray[Any]:
    tensors = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    return block.read(read_tensor(Model(result.proto), tensors[block.initializer]))


def around(rng: np.random.Generator, text: str, **more: NDArray[Any]) -> onnx.ModelProto:
    """A dense layer, a layer of two mixed blocks, a dense layer."""
    vector = {name: rng.uniform(0.5, 1, 8).astype(np.float32) for name in ("b0", "g", "b1")}
    weights = {
        "w0": dense(rng, 5, 8),
        "w1": blocks(rng, MIXED, SWAPPED),
        "w2": dense(rng, 8, 3),
    }
    tensors = {**vector, **weights, **more}
    read = {n: t for n, t in tensors.items() if re.search(rf"\b{n}\b", text)}
    return parse(text, read)


PLAIN = """g (float[B, 5] x) => (float[B, 3] y) {
    a = MatMul(x, w0) h = Add(a, b0) n = LayerNormalization (h, g, b1)
    o = MatMul(n, w1) s = Softmax <axis = -1> (o) y = MatMul(s, w2)
}"""


def test_both_borders_cost_nothing(rng: np.random.Generator) -> None:
    model = around(rng, PLAIN)
    result = rewrite(model)
    assert ("split", 2) in result.decisions
    expected = ["MatMul", "Add", "LayerNormalization", "Split", "MatMul", "MatMul", "Concat"]
    assert result.ops == [*expected, "Softmax", "MatMul"]
    check_parity(result, rng)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, (site, kept) in {"w0": ("a", "columns"), "w2": ("y", "rows")}.items():
        (block,) = result.record[site]
        order = getattr(block, kept)
        assert order.tolist() != sorted(order.tolist())
        original = read_tensor(Model(model), weights[name])
        np.testing.assert_array_equal(
            stored(result, block), original[np.ix_(block.rows, block.columns)]
        )
    held = {tensor.name for tensor in result.proto.graph.initializer}
    assert not held & {"w0", "w1", "w2", "b0", "g", "b1"}


def test_an_embedding_in_front(rng: np.random.Generator) -> None:
    text = """g (int64[B] ids) => (float[B, 3] y) {
        e = Gather <axis = 0> (table, ids) o = MatMul(e, w1) s = Softmax <axis = -1> (o) y = MatMul(s, w2) }"""
    result = rewrite(around(rng, text, table=dense(rng, 6, 8)))
    expected = ["Gather", "Split", "MatMul", "MatMul", "Concat", "Softmax", "MatMul"]
    assert result.ops == expected
    (embedding,) = result.reordered.values()
    assert embedding.source == "table"
    assert list(embedding.axes) == [-1]


def test_the_larger_of_two_regions_is_served(rng: np.random.Generator) -> None:
    """Both read the same value, and want its units in different orders."""
    text = """g (float[B, 5] x) => (float[B, 3] y, float[B, 8] z) {
        h = MatMul(x, w0) n = LayerNormalization (h, g, b1) o = MatMul(n, w1) s = Softmax <axis = -1> (o)
        y = MatMul(s, w2) l = LayerNormalization (h, g, b1) z = MatMul(l, w3) }"""
    result = rewrite(around(rng, text, w3=blocks(rng, OTHER, [0, 0, 0, 0, 1, 1, 1, 1])))
    assert result.decisions.count(("split", 2)) == 2
    assert sum(op == "Gather" for op in result.ops) == 2
    assert sum(op == "Split" for op in result.ops) == 1
    check_parity(result, rng)


def test_residual_blocks_share_one_numbering(rng: np.random.Generator) -> None:
    text = """g (float[B, 5] x) => (float[B, 3] y) {
        h = MatMul(x, w0)
        n = LayerNormalization (h, g, b1) o = MatMul(n, w1) t = Softmax <axis = -1> (o) u = MatMul(t, w4) r = Add(h, u)
        m = LayerNormalization (r, g, b1) p = MatMul(m, w5) v = Softmax <axis = -1> (p) y = MatMul(v, w2) }"""
    model = around(rng, text, w4=blocks(rng, SWAPPED, MIXED), w5=blocks(rng, MIXED, OTHER))
    result = rewrite(model)
    assert result.decisions.count(("split", 2)) == 3
    assert GATHERS.isdisjoint(result.ops)
    check_parity(result, rng)


@pytest.mark.parametrize("reader", ["z = Identity(h)", "z = Abs(h)"])
def test_a_value_that_leaves_the_model_keeps_its_order(
    reader: str, rng: np.random.Generator
) -> None:
    text = PLAIN.replace("float[B, 3] y)", "float[B, 3] y, float[B, 8] z)").replace(
        "n = Layer", f"{reader} n = Layer"
    )
    result = rewrite(around(rng, text))
    assert result.ops.count("Gather") == 2
    check_parity(result, rng)


def test_constants_that_others_read_stay(rng: np.random.Generator) -> None:
    """The same bias inside and outside of the space: one copy in each order."""
    text = PLAIN.replace("float[B, 3] y)", "float[B, 3] y, float[8] z)").replace(
        "n = Layer", "z = Neg(b0) n = Layer"
    )
    result = rewrite(around(rng, text))
    assert GATHERS.isdisjoint(result.ops)
    assert "b0" in {tensor.name for tensor in result.proto.graph.initializer}
    check_parity(result, rng)
