"""Weights of integers in parts: what is sliced with them, and where values are cut and joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import numpy_helper

from tests.passes.harness import Rewritten, blocks, check_parity, parse, rewrite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MIXED = [0, 1, 0, 1, 1, 0, 1, 0]
SWAPPED = [1, 0, 1, 0, 0, 1, 0, 1]


def number(value: float, dtype: Any) -> Array:
    return np.asarray(value, dtype)


PAIR = {"xs": number(0.05, np.float32), "xz": number(120, np.uint8)}


def codes(
    rng: np.random.Generator,
    rows: list[int],
    columns: list[int],
    zero: Array | int = 0,
    dtype: Any = np.int8,
) -> Array:
    """Integers away from their zero point where the labels of input and output are equal."""
    inside = blocks(rng, rows, columns) != 0
    steps = rng.integers(3, 60, inside.shape) * rng.choice([-1, 1], inside.shape)
    return np.where(inside, steps + zero, zero).astype(dtype)


def dense(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return codes(rng, [0] * rows, [0] * columns)


def tensors_of(result: Rewritten) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in result.proto.graph.initializer}


def test_scales_and_zero_points_are_sliced_with_the_integers(rng: np.random.Generator) -> None:
    zero = np.arange(-4, 4, dtype=np.int8)
    scale = np.linspace(0.01, 0.02, 8, dtype=np.float32)
    weight = codes(rng, MIXED, SWAPPED, zero)
    model = parse(
        "g (float[B, 8] x) => (float[B, 8] y) { d = DequantizeLinear(w, s, z) y = MatMul(x, d) }",
        {"w": weight, "s": scale, "z": zero},
    )
    result = rewrite(model)
    assert result.decisions == [("split", 2)]
    held = tensors_of(result)
    assert not {"w", "s", "z"} & held.keys()
    for number, block in enumerate(result.record["y"]):
        columns = block.columns
        np.testing.assert_array_equal(
            held[block.initializer], weight[np.ix_(block.rows, columns)]
        )
        assert held[block.initializer].dtype == np.int8
        np.testing.assert_array_equal(held[f"s.block{number}"], scale[columns])
        np.testing.assert_array_equal(held[f"z.block{number}"], zero[columns])
    check_parity(result, rng)


def test_a_scale_for_the_whole_tensor_is_not_copied(rng: np.random.Generator) -> None:
    model = parse(
        "g (float[B, 8] x) => (float[B, 8] y) { d = DequantizeLinear(w, s, z) y = MatMul(x, d) }",
        {
            "w": codes(rng, MIXED, SWAPPED, 5),
            "s": number(0.5, np.float32),
            "z": number(5, np.int8),
        },
    )
    result = rewrite(model)
    makers = [node for node in result.proto.graph.node if node.op_type == "DequantizeLinear"]
    assert [list(node.input[1:]) for node in makers] == 2 * [["s", "z"]]
    check_parity(result, rng)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_integers_of_16_bits(dtype: Any, rng: np.random.Generator) -> None:
    zero = number(300, dtype)
    model = parse(
        "g (float[B, 8] x) => (float[B, 8] y) { d = DequantizeLinear(w, s, z) y = MatMul(x, d) }",
        {"w": codes(rng, MIXED, SWAPPED, zero, dtype), "s": number(0.5, np.float32), "z": zero},
        opsets='"": 21',
        ir_version=10,
    )
    result = rewrite(model)
    assert result.decisions == [("split", 2)]
    check_parity(result, rng, reference=True)


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_scales_of_other_floats(name: str, dtype: Any, rng: np.random.Generator) -> None:
    """Cast and Mul take any float."""
    element = {"float16": 10, "double": 11}[name]
    model = parse(
        f"""g ({name}[B, 8] x) => ({name}[B, 8] y) {{
            f = Cast <to = {element}> (w) d = Mul(f, s) y = MatMul(x, d) }}""",
        {
            "w": codes(rng, MIXED, SWAPPED),
            "s": np.linspace(0.01, 0.02, 8, dtype=dtype)[None],
        },
    )
    result = rewrite(model)
    assert result.decisions == [("split", 2)]
    check_parity(result, rng)


PERMUTED = """g (float[B, 5] x) => (float[B, 3] y) {
    d0 = DequantizeLinear(w0, s0, z0) a = MatMul(x, d0) h = Softmax <axis = -1> (a)
    d1 = DequantizeLinear(w1, s1) o = MatMul(h, d1) t = Softmax <axis = -1> (o)
    d2 = DequantizeLinear <axis = 0> (w2, s2, z2) y = MatMul(t, d2)
}"""


def test_permutations_go_into_integers_scales_and_zero_points(rng: np.random.Generator) -> None:
    """The dense neighbours are stored in the new order of the units between them."""
    zero = np.arange(8, dtype=np.int8)
    model = parse(
        PERMUTED,
        {
            "w0": dense(rng, 5, 8),
            "s0": np.linspace(0.01, 0.02, 8, dtype=np.float32),
            "z0": zero,
            "w1": codes(rng, MIXED, SWAPPED),
            "s1": np.linspace(0.01, 0.02, 8, dtype=np.float32),
            "w2": dense(rng, 8, 3),
            "s2": np.linspace(0.01, 0.03, 8, dtype=np.float32),
            "z2": zero,
        },
    )
    result = rewrite(model)
    assert result.decisions == [("dense", 0), ("split", 2), ("dense", 0)]
    assert "Gather" not in result.ops
    sources = {constant.source: constant for constant in result.reordered.values()}
    assert set(sources) == {"w0", "s0", "z0", "w2", "s2", "z2"}
    assert {name: list(constant.axes) for name, constant in sources.items()} == {
        **{key: [-1] for key in ("w0", "s0", "z0", "s2", "z2")},
        "w2": [-2],
    }
    order = sources["w0"].axes[-1]
    assert order.tolist() != sorted(order.tolist())
    held = tensors_of(result)
    np.testing.assert_array_equal(held["z0.renumbered"], zero[order])
    # No reordered form of the weight that is cut is left behind.
    read = {name for node in result.proto.graph.node for name in node.input}
    assert held.keys() <= read
    check_parity(result, rng)


@pytest.mark.parametrize("made", [False, True])
def test_permutations_go_into_biases_too(made: bool, rng: np.random.Generator) -> None:
    """A Gemm's bias, of floats or of integers, has the units of what it makes."""
    bias = "c = DequantizeLinear <axis = 0> (cq, s0)" if made else ""
    text = f"""g (float[B, 5] x) => (float[B, 8] y) {{
        {bias} d0 = DequantizeLinear(w0, s0) a = Gemm(x, d0, c) h = Softmax <axis = -1> (a)
        d1 = DequantizeLinear(w1, s1) y = MatMul(h, d1) }}"""
    stored = {"cq": np.arange(8, dtype=np.int32)} if made else {"c": np.arange(8.0)}
    model = parse(
        text,
        {
            "w0": dense(rng, 5, 8),
            "s0": np.linspace(0.01, 0.02, 8, dtype=np.float32),
            "w1": codes(rng, MIXED, SWAPPED),
            "s1": number(0.01, np.float32),
            **{name: v.astype(np.int32 if made else np.float32) for name, v in stored.items()},
        },
    )
    result = rewrite(model)
    assert result.decisions == [("dense", 0), ("split", 2)]
    assert "cq" in {c.source for c in result.reordered.values()} or not made
    assert {c.source for c in result.reordered.values()} >= {"w0", "s0"}
    check_parity(result, rng)


def test_a_dequantized_weight_that_two_read_keeps_its_order(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 8] y, float[B, 8] z) {
        d0 = DequantizeLinear(w0, s) a = MatMul(x, d0) h = Softmax <axis = -1> (a)
        d1 = DequantizeLinear(w1, s) o = MatMul(h, d1) y = Softmax <axis = -1> (o) z = MatMul(x, d0) }"""
    model = parse(
        text,
        {
            "w0": dense(rng, 8, 8),
            "w1": codes(rng, MIXED, SWAPPED),
            "s": number(0.01, np.float32),
        },
    )
    result = rewrite(model)
    assert ("split", 2) in result.decisions
    assert not result.reordered
    check_parity(result, rng)


ATTENTION = """g (float[B, 8] x) => (float[B, 8] y, float[B, 8] v) {
    n = LayerNormalization(x, g0, b0)
    q = QuantizeLinear(n, xs, xz) d = DequantizeLinear(q, xs, xz)
    a0 = DequantizeLinear(wa, s) a = MatMul(d, a0) b0_ = DequantizeLinear(wb, s) b = MatMul(d, b0_)
    m = Mul(a, b) o = QuantizeLinear(m, xs, xz) y = DequantizeLinear(o, xs, xz)
    k = Relu(a) l = QuantizeLinear(k, xs, xz) v = DequantizeLinear(l, xs, xz)
}"""


def test_borders_lie_at_the_integers(rng: np.random.Generator) -> None:
    """Both products read one dequantized value: it is cut once, before it is dequantized."""
    model = parse(
        ATTENTION,
        {
            **PAIR,
            "g0": np.ones(8, np.float32),
            "b0": np.zeros(8, np.float32),
            "s": number(0.01, np.float32),
            "wa": codes(rng, MIXED, SWAPPED),
            "wb": codes(rng, MIXED, SWAPPED),
        },
    )
    result = rewrite(model)
    # Two products that meet only after them are two regions, or one: either way both are cut.
    assert {decision for decision, _ in result.decisions} == {"split"}
    makers = {name: node for node in result.proto.graph.node for name in node.output}
    for node in result.proto.graph.node:
        if node.op_type == "MatMul":
            source = makers[node.input[0]]
            assert source.op_type == "DequantizeLinear"
            assert makers[source.input[0]].op_type in {"Gather", "Split", "Slice"}
    check_parity(result, rng, tolerance=0.05)


def test_an_input_that_is_dequantized_for_others_too(rng: np.random.Generator) -> None:
    """The branches then cut the floats, and nothing breaks."""
    text = """g (float[B, 8] x) => (float[B, 8] y) {
        q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
        w0 = DequantizeLinear(w, s) a = MatMul(d, w0) y = Softmax <axis = -1> (a) r = Softmax <axis = -1> (d) }"""
    model = parse(
        text.replace("(float[B, 8] y)", "(float[B, 8] y, float[B, 8] r)"),
        {**PAIR, "s": number(0.01, np.float32), "w": codes(rng, MIXED, SWAPPED)},
    )
    result = rewrite(model)
    assert result.decisions == [("split", 2)]
    check_parity(result, rng, tolerance=0.02)


def test_quantizers_per_unit(rng: np.random.Generator) -> None:
    """One scale per unit keeps them apart, along the last axis; along another one nothing is known of units."""
    text = """g (float[B, 8] x) => (float[B, 8] y) {
        d0 = DequantizeLinear(w0, s) a = MatMul(x, d0)
        q = QuantizeLinear <axis = AXIS> (a, u, v) d = DequantizeLinear <axis = AXIS> (q, u, v)
        d1 = DequantizeLinear(w1, s) y = MatMul(d, d1) }"""
    tensors = {
        "s": number(0.01, np.float32),
        "w0": codes(rng, MIXED, SWAPPED),
        "w1": codes(rng, SWAPPED, MIXED),
        "u": np.linspace(0.01, 0.02, 8, dtype=np.float32),
        "v": np.arange(100, 108, dtype=np.uint8),
    }
    result = rewrite(parse(text.replace("AXIS", "1"), tensors))
    assert result.decisions == [("split", 2)]
    held = tensors_of(result)
    for branch in range(2):
        units = result.record["a"][branch].columns
        np.testing.assert_array_equal(held[f"v.branch{branch}"], tensors["v"][units])
    check_parity(result, rng, tolerance=0.02)
    other = parse(text.replace("AXIS", "0").replace("B, 8", "8, 8"), tensors)
    result = rewrite(other)
    assert result.decisions == [("split", 2), ("split", 2)]
    check_parity(result, rng, tolerance=0.02)
