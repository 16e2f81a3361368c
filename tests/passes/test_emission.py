"""Which nodes a region is written as, and that they compute what the dense region computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnx_decompose.passes.splice import ORIGIN_KEY
from tests.passes.harness import blocks, check_parity, parse, rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx_decompose.planning.state_graph import Emit

FFN = """g (float[B, 8] x) => (float[B, 6] y) {
    h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
}"""

IN_ORDER = [0, 0, 0, 0, 1, 1, 1, 1]
MIXED = [0, 1, 0, 1, 1, 0, 1, 0]
HIDDEN = [0, 1] * 5
OUT = [0, 0, 0, 1, 1, 1]


def ffn(
    rng: np.random.Generator,
    rows: Sequence[int] = IN_ORDER,
    hidden: Sequence[int] = HIDDEN,
    columns: Sequence[int] = OUT,
    text: str = FFN,
    dtype: Any = np.float32,
    **options: Any,
) -> onnx.ModelProto:
    tensors = {
        "w1": blocks(rng, rows, hidden, dtype),
        "b1": rng.standard_normal(len(hidden)).astype(dtype),
        "w2": blocks(rng, hidden, columns, dtype),
        "b2": rng.standard_normal(len(columns)).astype(dtype),
    }
    return parse(text, {n: t for n, t in tensors.items() if f"{n})" in text}, **options)


TWICE = [op for op in ("MatMul", "Add", "Relu", "MatMul", "Add") for _ in range(2)]


@pytest.mark.parametrize(
    ("rows", "columns", "before", "after"),
    [
        (IN_ORDER, OUT, ["Split"], ["Concat"]),
        (MIXED, OUT, ["Gather", "Gather"], ["Concat"]),
        (IN_ORDER, [0, 1, 0, 1, 0, 1], ["Split"], ["Concat", "Gather"]),
        # The first branch is the one with the first input; its outputs come last.
        (IN_ORDER, OUT[::-1], ["Split"], ["Concat"]),
        # Two inputs that nothing reads: what is left lies in runs.
        ([-1, 0, 0, 0, 1, 1, 1, -1], OUT, ["Slice", "Slice"], ["Concat"]),
        ([0, 0, -1, 0, 1, 1, 1, 1], OUT, ["Gather", "Slice"], ["Concat"]),
        (IN_ORDER, [0, 0, -1, 1, 1, 1], ["Split"], ["Concat"]),
    ],
)
def test_split_cuts_once_and_joins_once(
    rows: list[int],
    columns: list[int],
    before: list[str],
    after: list[str],
    rng: np.random.Generator,
) -> None:
    result = rewrite(ffn(rng, rows=rows, columns=columns))
    assert result.decisions == [("split", 2)]
    assert result.ops == before + TWICE + after
    check_parity(result, rng)


def test_shrink_is_one_narrower_chain(rng: np.random.Generator) -> None:
    rows = [0, -1, 0, 0, 0, 0, 0, 0]
    result = rewrite(ffn(rng, rows=rows, hidden=[0, 0, -1, 0], columns=[0] * 6), "shrink")
    assert result.decisions == [("shrink", 1)]
    assert result.ops == ["Gather", "MatMul", "Add", "Relu", "MatMul", "Add"]
    shapes = {tensor.name: list(tensor.dims) for tensor in result.proto.graph.initializer}
    assert shapes == {
        "b2": [6],
        "x.branch0.units": [7],
        "w1.block0": [7, 3],
        "b1.branch0": [3],
        "w2.block0": [3, 6],
    }
    check_parity(result, rng)


def test_auto_takes_what_is_cheapest(rng: np.random.Generator) -> None:
    assert rewrite(ffn(rng), "auto").decisions == [("split", 2)]


def test_a_dense_region_is_left_alone(rng: np.random.Generator) -> None:
    model = ffn(rng, rows=[0] * 8, hidden=[0] * 4, columns=[0] * 6)
    result = rewrite(model)
    assert result.proto is model
    assert result.annealed is model


@pytest.mark.parametrize(
    "opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
)
@pytest.mark.parametrize("rows", [IN_ORDER, MIXED, [-1, 0, 0, 0, 1, 1, 1, -1]])
def test_every_operator_set(rows: list[int], opset: int, rng: np.random.Generator) -> None:
    model = ffn(rng, rows=rows, columns=[0, 1] * 3, opsets=f'"": {opset}', ir_version=10)
    result = rewrite(model)
    split = [node for node in result.proto.graph.node if node.op_type == "Split"]
    assert all((len(node.input) == 2) == (opset >= 13) for node in split)
    cut = [node for node in result.proto.graph.node if node.op_type == "Slice"]
    assert all((len(node.input) > 1) == (opset >= 10) for node in cut)
    axes = {
        attribute.i
        for node in result.proto.graph.node
        for attribute in node.attribute
        if attribute.name == "axis"
    }
    assert axes == {-1 if opset >= 11 else 1}
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("axes", ["8", "T, 8", "B, T, 8", "2, B, T, 8"])
def test_inputs_of_any_rank(axes: str, opset: int, rng: np.random.Generator) -> None:
    text = FFN.replace("B, 8", axes).replace("B, 6", axes[:-1] + "6")
    result = rewrite(ffn(rng, rows=MIXED, columns=[1, 0] * 3, text=text, opsets=f'"": {opset}'))
    assert result.decisions == [("split", 2)]
    check_parity(result, rng)


@pytest.mark.parametrize(
    ("dtype", "name", "reference"),
    [
        (np.float64, "double", False),
        (np.float16, "float16", False),
        (ml_dtypes.bfloat16, "bfloat16", True),
    ],
)
def test_other_floats(dtype: Any, name: str, reference: bool, rng: np.random.Generator) -> None:
    text = FFN.replace("float[", f"{name}[")
    result = rewrite(ffn(rng, rows=MIXED, text=text, dtype=dtype))
    assert result.decisions == [("split", 2)]
    check_parity(result, rng, reference=reference)


@pytest.mark.parametrize("flipped", [0, 1])
@pytest.mark.parametrize(
    "bias", [None, (10,), (1, 10), (1,), (), (3, 10), (3, 1), (1, 1)], ids=str
)
def test_gemm_keeps_its_form(
    flipped: int, bias: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    weight = blocks(rng, MIXED, HIDDEN)
    tensors = {"w": weight.T.copy() if flipped else weight, "v": blocks(rng, HIDDEN, OUT)}
    if bias is not None:
        tensors["c"] = rng.standard_normal(bias).astype(np.float32)
    text = f"""g (float[3, 8] x) => (float[3, 6] y) {{
        h = Gemm <alpha = 0.5, beta = 3.0, transB = {flipped}> (x, w{", c" if bias is not None else ""})
        t = Tanh(h)
        y = MatMul(t, v)
    }}"""
    result = rewrite(parse(text, tensors))
    assert result.ops == ["Gather"] * 2 + ["Gemm"] * 2 + ["Tanh"] * 2 + ["MatMul"] * 2 + [
        "Concat"
    ]
    original = result.original.graph.node[0]
    for node in result.proto.graph.node:
        if node.op_type == "Gemm":
            assert list(node.attribute) == list(original.attribute)
    check_parity(result, rng)


def test_a_transposed_constant_goes_with_its_readers(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 10] y) <float[1] one = {1}> {
        i = Identity(w) t = Transpose(i) h = MatMul(x, t)
        c = Constant <value_float = 2.0> () y = Add(h, c)
    }"""
    weight = blocks(rng, MIXED, HIDDEN)
    result = rewrite(parse(text, {"w": weight.T.copy()}))
    # The unused initializer was unused before: it is not ours to remove.
    assert [t.name for t in result.proto.graph.initializer if ".b" not in t.name] == [
        "one",
        "y.units",
    ]
    assert result.ops == ["Gather"] * 2 + ["MatMul"] * 2 + ["Constant"] + ["Add"] * 2 + [
        "Concat",
        "Gather",
    ]
    check_parity(result, rng)


@pytest.mark.parametrize("emit", ["split", "shrink"])
def test_exits_are_also_read_inside(emit: Emit, rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 6] y, float[B, 10] r, float[B, 10] n) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2) n = Neg(h)
    }"""
    result = rewrite(ffn(rng, rows=[-1, *MIXED[1:]], text=text), emit)
    assert result.decisions == [("split", 2) if emit == "split" else ("shrink", 1)]
    check_parity(result, rng)


def test_residual_blocks_run_in_branches(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 8] y) {
        h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2) s = Add(x, o)
        i = MatMul(s, w3) q = Tanh(i) p = MatMul(q, w4) z = Add(p, s) y = MatMul(z, w5)
    }"""
    tensors = {
        "w1": blocks(rng, MIXED, HIDDEN),
        "w2": blocks(rng, HIDDEN, MIXED),
        "w3": blocks(rng, MIXED, [1, 1, 0]),
        "w4": blocks(rng, [1, 1, 0], MIXED),
        "w5": blocks(rng, MIXED, MIXED),
    }
    result = rewrite(parse(text, tensors))
    assert result.decisions == [("split", 2)]
    assert result.ops.count("Gather") == 3
    check_parity(result, rng)


def test_gates_run_in_branches(rng: np.random.Generator) -> None:
    text = """g (float[B, T, 8] x) => (float[B, T, 6] y) {
        g = MatMul(x, wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, wu) m = Mul(a, u)
        k = Clip(m, low, high) y = MatMul(k, w2)
    }"""
    tensors = {
        "wg": blocks(rng, MIXED, HIDDEN),
        "wu": blocks(rng, MIXED, HIDDEN),
        "w2": blocks(rng, HIDDEN, OUT),
        "low": np.array(-0.5, np.float32),
        "high": np.array(0.5, np.float32),
    }
    result = rewrite(parse(text, tensors))
    assert result.decisions == [("split", 2)]
    check_parity(result, rng)


def test_a_later_entry_is_split_in_its_own_order(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x, float[B, 10] z) => (float[B, 6] y) {
        h = MatMul(x, w1) a = Mul(h, z) y = MatMul(a, w2) }"""
    result = rewrite(ffn(rng, hidden=[1] * 4 + [0] * 6, text=text))
    splits = [node for node in result.proto.graph.node if node.op_type == "Split"]
    assert [list(node.output) for node in splits] == [
        ["x.branch0", "x.branch1"],
        ["z.branch1", "z.branch0"],
    ]
    check_parity(result, rng)


def test_an_operand_broadcast_to_all_units_is_read_whole(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x, float[B, 1] z) => (float[B, 6] y) {
        h = MatMul(x, w1) g = MatMul(x, wg) m = Mul(h, g) n = Add(m, z) y = MatMul(n, w2)
    }"""
    tensors = {
        "w1": blocks(rng, MIXED, HIDDEN),
        "wg": blocks(rng, [-1, 0, 0, 0, 0, 0, 0, 0], [0]),
        "w2": blocks(rng, HIDDEN, OUT),
    }
    tensors["w1"][0] = 0
    result = rewrite(parse(text, tensors), "shrink")
    assert result.decisions == [("shrink", 1)]
    assert [node.input[1] for node in result.proto.graph.node if node.op_type == "Mul"] == ["g"]
    check_parity(result, rng)


def test_an_overridable_bias_is_cut_at_run_time(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x, float[10] b1) => (float[B, 6] y) {
        h = MatMul(x, w1) a = Add(h, b1) y = MatMul(a, w2)
    }"""
    result = rewrite(ffn(rng, text=text))
    assert result.decisions == [("split", 2)]
    check_parity(result, rng)


def test_values_captured_by_subgraphs_stay(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x, bool c) => (float[B, 6] y) {
        h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2)
        y = If (c) <
            then_branch = t () => (float[B, 6] p) { d = Tanh(r) q = MatMul(d, w2) p = Add(o, q) },
            else_branch = e () => (float[B, 6] p) { p = Identity(o) }
        >
    }"""
    tensors = {"w1": blocks(rng, MIXED, HIDDEN), "w2": blocks(rng, HIDDEN, OUT)}
    result = rewrite(parse(text, tensors))
    # The body's own product comes apart by itself: a region of the main graph does not reach into it.
    assert result.decisions == [("split", 2)] * 2
    body = next(node for node in result.proto.graph.node if node.op_type == "If").attribute[0].g
    assert {"r", "o"} <= {name for node in body.node for name in node.input}
    check_parity(result, rng)


def test_a_weight_of_several_sites_is_stored_once_where_the_blocks_are_equal(
    rng: np.random.Generator,
) -> None:
    text = """g (float[B, 8] x) => (float[B, 8] y, float[B, 8] z) {
        a = MatMul(x, w) b = Add(a, c) r = Softmax(b) d = MatMul(r, w) e = Add(d, c)
        y = Softmax(e) f = MatMul(y, w) z = Sub(f, one)
    }"""
    tensors = {
        "w": blocks(rng, MIXED, MIXED),
        "c": rng.standard_normal(8).astype(np.float32),
        "one": np.array(1, np.float32),
    }
    result = rewrite(parse(text, tensors))
    assert result.decisions == [("split", 2)] * 3
    names = [tensor.name for tensor in result.proto.graph.initializer]
    assert [name for name in names if name.startswith(("w.", "c."))] == [
        "w.block0",
        "w.block1",
        "c.branch0",
        "c.branch1",
    ]
    assert "w" not in names
    check_parity(result, rng)


def test_a_shared_weight_with_other_supported_entries_is_stored_apart(
    rng: np.random.Generator,
) -> None:
    text = """g (float[B, 8] x) => (float[B, 8] y) {
        a = MatMul(x, w) r = Softmax(a) y = MatMul(r, w) }"""
    weight = blocks(rng, MIXED, MIXED)
    mask = weight != 0
    mask[0, 2] = False
    result = rewrite(parse(text, {"w": weight}), masks={"y": mask})
    assert {t.name: list(t.dims) for t in result.annealed.graph.initializer} == {
        "w.annealed": [8, 8],
        "w.annealed_1": [8, 8],
    }
    check_parity(result, rng, exact=False)


def test_an_initializer_that_others_read_is_kept(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 6] y, float[8, 10] copy) {
        h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2)
        copy = Abs(w1)
    }"""
    result = rewrite(ffn(rng, text=text))
    for proto in (result.proto, result.annealed):
        assert {"w1", "w2"} & {t.name for t in proto.graph.initializer} == {"w1"}
    check_parity(result, rng)


def test_annealing_that_removes_more_than_zeros(rng: np.random.Generator) -> None:
    model = ffn(rng, rows=MIXED)
    dense = rng.standard_normal((8, 10)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(dense, "w1"))
    mask = blocks(rng, MIXED, HIDDEN) != 0
    result = rewrite(model, masks={"h": mask})
    assert result.decisions == [("split", 2)]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.annealed.graph.initializer}
    np.testing.assert_array_equal(stored["w1.annealed"], np.where(mask, dense, 0))
    assert "w1" not in stored
    check_parity(result, rng, exact=False)


def test_a_rewritten_model_has_nothing_more_to_take_apart(rng: np.random.Generator) -> None:
    once = rewrite(ffn(rng, rows=MIXED, columns=[0, 1] * 3))
    twice = rewrite(once.proto)
    assert {decision for decision, _ in twice.decisions} == {"dense"}
    assert twice.proto is once.proto


def test_a_rewritten_model_can_be_rewritten_again(rng: np.random.Generator) -> None:
    # Shrunk only the first time, split the second.
    rows = [-1, *MIXED[1:]]
    once = rewrite(ffn(rng, rows=rows), "shrink")
    twice = rewrite(once.proto)
    assert (once.decisions, twice.decisions) == ([("shrink", 1)], [("split", 2)])
    check_parity(once, rng)
    check_parity(twice, rng)
    origins = [
        [entry.value for entry in node.metadata_props if entry.key == ORIGIN_KEY]
        for node in twice.proto.graph.node
        if node.op_type == "MatMul"
    ]
    assert origins == [["h"], ["h"], ["o"], ["o"]]


def test_two_regions_at_once(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x) => (float[B, 6] y) {
        h = MatMul(x, w1) a = Add(h, b1) n = Softmax(a) o = MatMul(n, w2) y = Add(o, b2)
    }"""
    result = rewrite(ffn(rng, rows=MIXED, text=text))
    assert result.decisions == [("split", 2), ("split", 2)]
    check_parity(result, rng)
