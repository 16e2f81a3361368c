"""Emission ``shared``: which operators, the same outputs, every weight bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from onnx_decompose.model.model_io import Model, read_tensor
from tests.passes import harness
from tests.passes.harness import FREE, check_parity, parse, run

if TYPE_CHECKING:
    import onnx

    from tests.passes.harness import Array, Rewritten

PICKING = dataclasses.replace(FREE, pick_ratio=5.0)
rewrite = functools.partial(harness.rewrite, cost=PICKING)

TAIL = [0, 1, 2, 3, 3, 3, 3]
SCATTERED = [0, 1, 0, 2, 1, 0, 3]


def weight_of(
    rng: np.random.Generator,
    rows: list[int] | None = None,
    columns: list[int] | None = None,
    dtype: Any = np.float32,
) -> Array:
    """A weight whose rows and columns are equal where their numbers are."""
    first, second = rows or list(range(5)), columns or list(range(7))
    values = rng.uniform(0.5, 1.0, (max(first) + 1, max(second) + 1))
    return values[np.ix_(first, second)].astype(dtype)


def stored_shape(result: Rewritten) -> list[int]:
    """Of the site's stored weight."""
    ((block,),) = result.record.values()
    tensors = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    return list(tensors[block.initializer].dims)


def matmul(weight: Array, kind: str = "float", opset: int = 17) -> onnx.ModelProto:
    inputs, outputs = weight.shape
    text = f"""g ({kind}[b, t, {inputs}] x) => ({kind}[b, t, {outputs}] y)
    {{ y = MatMul(x, w) }}"""
    return parse(text, {"w": weight}, opsets=f'"": {opset}')


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 17, 18, 21])
@pytest.mark.parametrize("columns", [TAIL, [0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 2], [0, 0, 0]])
def test_copies_at_the_ends_are_padding(
    opset: int, columns: list[int], rng: np.random.Generator
) -> None:
    result = rewrite(matmul(weight_of(rng, columns=columns), opset=opset), "shared")
    assert result.decisions == [("shared", 1)]
    assert result.ops == ["MatMul", "Pad"]
    check_parity(result, rng)
    assert stored_shape(result) == [5, max(columns) + 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scattered_copies_are_taken_by_type(dtype: Any, rng: np.random.Generator) -> None:
    kind = {"float32": "float", "float64": "double"}[np.dtype(dtype).name]
    model = matmul(weight_of(rng, columns=SCATTERED, dtype=dtype), kind)
    result = rewrite(model, "shared")
    assert result.ops == ["MatMul", "ArrayFeatureExtractor"]
    assert {entry.domain: entry.version for entry in result.proto.opset_import} == {
        "": 17,
        "ai.onnx.ml": 1,
    }
    check_parity(result, rng)


def test_an_imported_domain_is_not_imported_again(rng: np.random.Generator) -> None:
    model = matmul(weight_of(rng, columns=SCATTERED))
    model.opset_import.add(domain="ai.onnx.ml", version=3)
    result = rewrite(model, "shared")
    assert result.ops == ["MatMul", "ArrayFeatureExtractor"]
    assert result.proto.opset_import == model.opset_import


def test_scattered_copies_are_gathered_where_no_operator_takes_them_by_type(
    rng: np.random.Generator,
) -> None:
    weight = weight_of(rng, columns=SCATTERED)
    without = dataclasses.replace(FREE, pick_ratio=0.0)
    result = rewrite(matmul(weight), "shared", cost=without)
    assert result.ops == ["MatMul", "Gather"]
    check_parity(result, rng)
    half = rewrite(matmul(weight.astype(np.float16), "float16"), "shared")
    assert half.ops == ["MatMul", "Gather"]
    check_parity(half, rng)


def test_a_vector_stays_a_vector(rng: np.random.Generator) -> None:
    text = "g (float[5] x) => (float[7] y) { y = MatMul(x, w) }"
    result = rewrite(parse(text, {"w": weight_of(rng, columns=SCATTERED)}), "shared")
    assert result.ops == ["MatMul", "Gather"]
    check_parity(result, rng)


def test_bfloat16_has_no_padding_kernel(rng: np.random.Generator) -> None:
    weight = weight_of(rng, columns=TAIL, dtype=ml_dtypes.bfloat16)
    assert rewrite(matmul(weight, "bfloat16"), "shared").ops == ["MatMul", "Gather"]


def test_half_precision_tail_is_padding(rng: np.random.Generator) -> None:
    weight = weight_of(rng, columns=TAIL, dtype=np.float16)
    result = rewrite(matmul(weight, "float16"), "shared")
    assert result.ops == ["MatMul", "Pad"]
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [9, 12, 17, 18])
@pytest.mark.parametrize(
    ("rows", "ops"),
    [
        ([0, 1, 2, 2, 2], ["Slice", "Slice", "ReduceSum", "Concat", "MatMul"]),
        ([2, 2, 0, 1], ["Slice", "Slice", "ReduceSum", "Concat", "MatMul"]),
        (
            [0, 1, 0, 2, 0],
            ["ArrayFeatureExtractor", "ArrayFeatureExtractor", "ReduceSum", "Concat", "MatMul"],
        ),
        ([0, 0, 1, 1], ["Slice", "ReduceSum", "Slice", "ReduceSum", "Concat", "MatMul"]),
        ([0, 0, 0], ["Slice", "ReduceSum", "MatMul"]),
    ],
)
def test_inputs_of_equal_rows_are_added_first(
    opset: int, rows: list[int], ops: list[str], rng: np.random.Generator
) -> None:
    result = rewrite(matmul(weight_of(rng, rows=rows), opset=opset), "shared")
    assert result.ops == ops
    assert stored_shape(result)[0] == max(rows) + 1
    check_parity(result, rng)


def test_rows_and_columns_at_once(rng: np.random.Generator) -> None:
    result = rewrite(matmul(weight_of(rng, [0, 1, 0, 0, 2], TAIL)), "shared")
    assert result.ops[-2:] == ["MatMul", "Pad"]
    assert result.ops[-3] == "Concat"
    check_parity(result, rng)
    (block,) = result.record["y"]
    assert block.stored_rows is not None
    assert block.stored_columns is not None
    assert block.stored_rows.tolist() == [2, 0, 2, 2, 1]
    assert block.stored_columns.tolist() == TAIL


BIASED = """g (float[b, 5] x) => (float[b, 7] y) { h = MatMul(x, w) y = Add(h, c) }"""


def test_a_bias_that_copies_have_in_common_is_added_before_the_repetition(
    rng: np.random.Generator,
) -> None:
    bias = rng.standard_normal(4).astype(np.float32)[TAIL]
    result = rewrite(parse(BIASED, {"w": weight_of(rng, columns=TAIL), "c": bias}), "shared")
    assert result.ops == ["MatMul", "Add", "Pad"]
    check_parity(result, rng)
    (narrow,) = [t for t in result.proto.graph.initializer if t.name.startswith("c")]
    np.testing.assert_array_equal(read_tensor(Model(result.proto), narrow), bias[:4])


def test_a_bias_that_differs_is_added_after_it(rng: np.random.Generator) -> None:
    bias = rng.standard_normal(7).astype(np.float32)
    result = rewrite(parse(BIASED, {"w": weight_of(rng, columns=TAIL), "c": bias}), "shared")
    assert result.ops == ["MatMul", "Pad", "Add"]
    check_parity(result, rng)


def test_a_product_that_is_read_elsewhere_is_whole_there(rng: np.random.Generator) -> None:
    text = """g (float[b, 5] x) => (float[b, 7] y, float[b, 7] z)
    { h = MatMul(x, w) y = Add(h, c) z = Softmax(h) }"""
    bias = np.array([1, 2, 3, 4, 4, 4, 4], np.float32)
    result = rewrite(parse(text, {"w": weight_of(rng, columns=TAIL), "c": bias}), "shared")
    assert result.ops == ["MatMul", "Pad", "Add", "Softmax"]
    check_parity(result, rng)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("flipped", [0, 1])
@pytest.mark.parametrize("common", [False, True])
def test_gemm_with_its_bias(
    opset: int, flipped: int, common: bool, rng: np.random.Generator
) -> None:
    text = f"""g (float[b, 5] x) => (float[b, 7] y)
    {{ y = Gemm <alpha = 0.5, beta = 2.0, transB = {flipped}> (x, w, c) }}"""
    weight = weight_of(rng, columns=TAIL)
    bias = rng.standard_normal(7).astype(np.float32)
    tensors = {
        "w": np.ascontiguousarray(weight.T) if flipped else weight,
        "c": bias[TAIL] if common else bias,
    }
    result = rewrite(parse(text, tensors, opsets=f'"": {opset}'), "shared")
    assert result.ops == (["Gemm", "Pad"] if common else ["Gemm", "Pad", "Add"])
    check_parity(result, rng)


def test_gemm_with_equal_rows_keeps_its_bias(rng: np.random.Generator) -> None:
    text = "g (float[b, 4] x) => (float[b, 7] y) { y = Gemm(x, w, c) }"
    tensors = {
        "w": weight_of(rng, rows=[0, 1, 1, 1]),
        "c": rng.standard_normal(7).astype(np.float32),
    }
    result = rewrite(parse(text, tensors), "shared")
    assert result.ops == ["Slice", "Slice", "ReduceSum", "Concat", "Gemm"]
    check_parity(result, rng)


def test_a_tied_embedding_is_not_touched(rng: np.random.Generator) -> None:
    text = """g (int64[b, t] ids) => (float[b, t, 7] y)
    { e = Gather(w, ids) wt = Transpose <perm = [1, 0]> (w) y = MatMul(e, wt) }"""
    embedding = np.ascontiguousarray(weight_of(rng, columns=SCATTERED).T)
    result = rewrite(parse(text, {"w": embedding}), "shared")
    assert result.ops == ["Gather", "MatMul", "ArrayFeatureExtractor"]
    kept = result.proto.graph.initializer[0]
    assert kept.name == "w"
    np.testing.assert_array_equal(read_tensor(Model(result.proto), kept), embedding)
    assert stored_shape(result) == [5, 4]
    feeds = {"ids": rng.integers(0, 7, (2, 3))}
    got, expected = (
        run(proto, feeds, reference=False)[0] for proto in (result.proto, result.original)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_random_copies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, rng.integers(1, 9), rng.integers(2, 12)).tolist()
    columns = rng.integers(0, rng.integers(1, 9), rng.integers(2, 12)).tolist()
    result = rewrite(matmul(weight_of(rng, rows, columns)), "shared")
    equal = len(set(rows)) < len(rows) or len(set(columns)) < len(columns)
    assert result.decisions == [("shared", 1) if equal else ("dense", 0)]
    check_parity(result, rng)


RENUMBERED = """g (int64[b] ids) => (float[b, 3] y)
{ e = Gather(table, ids) h = MatMul(e, w) r = Relu(h) n = Add(r, c) m = Softmax <axis = -1> (n) y = MatMul(m, v) }"""


@pytest.mark.parametrize("columns", [SCATTERED, [0, 1, 2, 0, 3, 0, 4], list(range(7))])
@pytest.mark.parametrize("rows", [[0, 1, 0, 2, 0], list(range(5))])
def test_free_spaces_are_renumbered_around_copies(
    rows: list[int], columns: list[int], rng: np.random.Generator
) -> None:
    weight = weight_of(rng, rows, columns)
    tensors = {
        "w": weight,
        "table": rng.standard_normal((9, 5)).astype(np.float32),
        "c": rng.standard_normal(7).astype(np.float32),
        "v": rng.standard_normal((7, 3)).astype(np.float32),
    }
    result = rewrite(parse(RENUMBERED, tensors), "shared")
    first, second = result.ops.index("Gather"), result.ops.index("Relu")
    around = result.ops[first + 1 : second]
    if len(set(rows)) < len(rows):  # one group: what is added lies side by side
        assert around[:4] == ["Slice", "Slice", "ReduceSum", "Concat"]
    if columns == [0, 1, 2, 0, 3, 0, 4]:  # one group: its copies are put at the end
        assert around[-2:] == ["MatMul", "Pad"]
    feeds = {"ids": rng.integers(0, 9, 4)}
    got, expected = (
        run(proto, feeds, reference=False)[0] for proto in (result.proto, result.original)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("form", ["Add", "Gemm"])
@pytest.mark.parametrize("common", [False, True])
def test_biases_in_a_renumbered_space(
    form: str, common: bool, rng: np.random.Generator
) -> None:
    site = {"Add": "p = MatMul(x, w) h = Add(p, c)", "Gemm": "h = Gemm <beta = 3.0> (x, w, c)"}
    text = f"""g (float[b, 5] x) => (float[b, 3] y)
    {{ {site[form]} n = Softmax <axis = -1> (h) y = MatMul(n, v) }}"""
    columns = [0, 1, 2, 0, 3, 0, 4]
    bias = rng.standard_normal(7).astype(np.float32)
    tensors = {
        "w": weight_of(rng, columns=columns),
        "c": bias[columns] if common else bias,
        "v": rng.standard_normal((7, 3)).astype(np.float32),
    }
    result = rewrite(parse(text, tensors), "shared")
    product = {"Add": ["MatMul", "Add"], "Gemm": ["Gemm"]}[form]
    later = {"Add": ["MatMul", "Pad", "Add"], "Gemm": ["Gemm", "Pad", "Add"]}[form]
    assert result.ops[:-2] == ([*product, "Pad"] if common else later)
    check_parity(result, rng)
