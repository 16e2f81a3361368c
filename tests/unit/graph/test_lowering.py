"""Products in other forms come to products x @ W that make the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.closing import restore
from onnx_decompose.graph.einsum import Contraction, parse_contraction
from onnx_decompose.graph.flat import flatten, marker
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model

RNG = np.random.default_rng(0)


def model_of(body: str, x: str, y: str, *, opset: int = 17, **shapes: tuple[int, ...]) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({x}) => ({y}) {{ {body} }}'
    )
    for name, shape in shapes.items():
        values = RNG.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto)


def check(model: Model, *shapes: tuple[int, ...]) -> list[str]:
    """Check the flat model against the model; the weights found, by name and shape."""
    flat = flatten(model)
    onnx.checker.check_model(flat.model.proto, full_check=True)
    feeds = {
        value.name: RNG.normal(size=shape).astype(np.float32)
        for value, shape in zip(model.proto.graph.input, shapes, strict=True)
    }
    expected: Any = onnx.reference.ReferenceEvaluator(model.proto).run(None, feeds)
    got: Any = onnx.reference.ReferenceEvaluator(flat.model.proto).run(None, feeds)
    for first, second in zip(got, expected, strict=True):
        assert first.shape == second.shape
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    copy = onnx.ModelProto()
    copy.CopyFrom(flat.model.proto)
    assert restore(flat, Model(copy)).proto == model.proto
    study = study_model(model)
    assert study.refused == ()
    return [f"{site.name} {'x'.join(map(str, site.shape))}" for site in study.sites]


def test_a_constant_on_the_left_of_a_matrix() -> None:
    model = model_of("y = MatMul(w, x)", "float[K, B] x", "float[4, B] y", w=(4, 3))
    assert check(model, (3, 5)) == ["y//MatMul 3x4"]


def test_a_constant_on_the_left_of_a_stack_and_of_a_vector() -> None:
    model = model_of("y = MatMul(w, x)", "float[S, 2, 3, B] x", "float[S, 2, 4, B] y", w=(4, 3))
    assert check(model, (6, 2, 3, 5)) == ["y//MatMul 3x4"]
    model = model_of("y = MatMul(w, x)", "float[3] x", "float[4] y", w=(4, 3))
    assert check(model, (3,)) == ["y//MatMul 3x4"]


BIASES = [None, (), (1,), (6,), (1, 6), (4, 6), (4, 1)]


@pytest.mark.parametrize(
    ("bias", "trans_a", "trans_b", "is_constant"),
    [
        (bias, a, b, constant)
        for bias, a, b, constant in itertools.product(BIASES, (0, 1), (0, 1), (True, False))
        if constant or bias is not None
    ],
)
def test_every_gemm(
    bias: tuple[int, ...] | None, trans_a: int, trans_b: int, is_constant: bool
) -> None:
    """With its constant on the right and on the left, every bias, constant or not, alpha and beta."""
    attributes = f"alpha = 0.5, beta = -2.0, transA = {trans_a}, transB = {trans_b}"
    left, right = ((3, 4) if trans_a else (4, 3)), ((6, 3) if trans_b else (3, 6))
    for constant in ("left", "right"):
        value = right if constant == "left" else left
        weights: dict[str, tuple[int, ...]] = {constant: left if constant == "left" else right}
        inputs = f"float[{','.join(map(str, value))}] x"
        shapes: list[tuple[int, ...]] = [value]
        names = ("left, x" if constant == "left" else "x, right") + (
            "" if bias is None else ", b"
        )
        if bias is not None and is_constant:
            weights["b"] = bias
        elif bias is not None:
            inputs += f", float[{','.join(map(str, bias))}] b" if bias else ", float b"
            shapes.append(bias)
        model = model_of(
            f"[fc] y = Gemm <{attributes}> ({names})",
            inputs,
            "float[4, 6] y",
            opset=17,
            **weights,
        )
        assert check(model, *shapes) == ["fc 3x4" if constant == "left" else "fc 3x6"]


def test_a_plain_gemm_stays_as_it_is() -> None:
    model = model_of("y = Gemm(x, w, b)", "float[B, 3] x", "float[B, 6] y", w=(3, 6), b=(6,))
    assert flatten(model).model is model


@pytest.mark.parametrize(
    ("equation", "x", "w", "y", "site"),
    [
        ("bi,ij->bj", (2, 3), (3, 4), (2, 4), "3x4"),
        ("bi,ji->bj", (2, 3), (4, 3), (2, 4), "3x4"),
        ("bi,ij", (2, 3), (3, 4), (2, 4), "3x4"),
        ("bsd,dhk->bshk", (2, 5, 6), (6, 2, 3), (2, 5, 2, 3), "6x6"),
        ("bsd,dhk->bhsk", (2, 5, 6), (6, 2, 3), (2, 2, 5, 3), "6x6"),
        ("bshk,hkd->bsd", (2, 5, 2, 3), (2, 3, 7), (2, 5, 7), "6x7"),
        ("bhsk,dhk->bsd", (2, 2, 5, 3), (7, 2, 3), (2, 5, 7), "6x7"),
        ("bis,ij->bjs", (2, 3, 5), (3, 4), (2, 4, 5), "3x4"),
        ("...i,ij->...j", (2, 5, 3), (3, 4), (2, 5, 4), "3x4"),
        ("i,ij->j", (3,), (3, 4), (4,), "3x4"),
    ],
)
def test_einsum(
    equation: str, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], site: str
) -> None:
    for swapped in (False, True):
        asked, names = equation, "x, w"
        if swapped:
            left, arrow, result = equation.partition("->")
            if not arrow:
                continue
            asked, names = ",".join(reversed(left.split(","))) + arrow + result, "w, x"
        model = model_of(
            f'y = Einsum <equation = "{asked}"> ({names})',
            declared("x", x),
            declared("y", y),
            w=w,
        )
        assert check(model, x) == [f"y//MatMul {site}"]


def declared(name: str, shape: tuple[int, ...]) -> str:
    return f"float[{','.join(map(str, shape))}] {name}"


@pytest.mark.parametrize(
    "equation",
    [
        *("bi,bi->bi", "bi,ij,jk->bk", "bi,ij->b", "bi,jk->bijk", "bii,ij->bj", "bi,bij->bj"),
        *("bi->b", "...i,...ij->...j", "bi,ij->bji", "bi,i->b"),
    ],
)
def test_equations_that_are_no_product_with_a_matrix(equation: str) -> None:
    assert parse_contraction(equation, 2) is None


def test_an_ellipsis_needs_the_rank() -> None:
    assert parse_contraction("...i,ij->...j") is None
    assert parse_contraction("...i,ij->...j", 3) == Contraction("abi", "ij", "abj")


@pytest.mark.parametrize(
    ("x", "y", "sites"),
    [
        ((3, 2, 4), (3, 2, 5), ["y.0 4x5", "y.1 4x5", "y.2 4x5"]),
        ((1, 2, 4), (3, 2, 5), ["y//MatMul 4x15"]),
        ((2, 4), (3, 2, 5), ["y//MatMul 4x15"]),
    ],
)
@pytest.mark.parametrize("opset", [13, 18])
def test_a_stack_of_matrices(
    x: tuple[int, ...], y: tuple[int, ...], sites: list[str], opset: int
) -> None:
    model = model_of(
        "y = MatMul(x, w)", declared("x", x), declared("y", y), opset=opset, w=(3, 4, 5)
    )
    assert check(model, x) == sites


@pytest.mark.parametrize("rank", [2, 3])
def test_a_stack_of_one_matrix(rank: int) -> None:
    x = (3, 2, 4)[-rank:]
    y = (x[0] if rank == 3 else 1, 2, 5)
    model = model_of("y = MatMul(x, w)", declared("x", x), declared("y", y), w=(1, 4, 5))
    assert check(model, x) == ["y//MatMul 4x5"]


@pytest.mark.parametrize(
    ("body", "x", "y", "reason"),
    [
        (
            "z = Squeeze(x) y = MatMul(w, z)",
            "float[K, B, 1] x",
            "float[A, B] y",
            "the constant is on the left side, and the rank of the other one is not known",
        ),
        (
            "y = MatMul(s, x)",
            "float[3, B] x",
            "float[2, 4, B] y",
            "the weight has 3 axes, not 2",
        ),
        (
            "y = MatMul(x, s)",
            "float[B, 5, 4] x",
            "float[B, 5, 3] y",
            "the weight has 3 axes, not 2",
        ),
        (
            'y = Einsum <equation = "bi,bij->bj"> (x, s)',
            "float[2, 4] x",
            "float[2, 3] y",
            "Einsum (bi,bij->bj) is not taken apart; export it as a MatMul",
        ),
    ],
)
def test_what_stays_says_why(body: str, x: str, y: str, reason: str) -> None:
    model = model_of(body, x, y, w=(4, 3), s=(2, 4, 3))
    study = study_model(model)
    assert study.sites == ()
    assert [refusal.reason for refusal in study.refused] == [reason]
    assert flatten(model).model is model


def test_both_operands_constant_stay() -> None:
    model = model_of(
        "z = MatMul(v, w) y = Add(x, z)", "float[4, 3] x", "float[4, 3] y", v=(4, 2), w=(2, 3)
    )
    assert flatten(model).model is model


COLUMNS = """
    t = Transpose <perm = [1, 0]> (x)
    p = MatMul(w, t)
    q = Transpose <perm = [1, 0]> (p)
    r = Relu(q)
    s = Transpose <perm = [1, 0]> (r)
    a = MatMul(v, s)
    y = Transpose <perm = [1, 0]> (a)
"""


def test_products_of_columns_that_are_turned_and_turned_back_are_one_region() -> None:
    """y = (V @ relu((W @ x^T)^T)^T)^T, as hand-written code has it."""
    model = model_of(COLUMNS, "float[B, 3] x", "float[B, 2] y", w=(4, 3), v=(2, 4))
    assert check(model, (5, 3)) == ["p//MatMul 3x4", "a//MatMul 4x2"]
    (region,) = study_model(model).regions
    assert len(region.sites) == 2


@pytest.mark.parametrize("changed", [0, 1])
def test_what_reads_inside_another_form_is_closed_with_it_or_not_at_all(changed: int) -> None:
    model = model_of(COLUMNS, "float[B, 3] x", "float[B, 2] y", w=(4, 3), v=(2, 4))
    flat = flatten(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(flat.model.proto)
    products = [node for node in copy.graph.node if node.op_type == "MatMul"]
    products[changed].doc_string = "changed"
    found = restore(flat, Model(copy)).proto
    onnx.checker.check_model(found, full_check=True)
    # The other product is closed again, between its own two; the open one's matrix is turned, and no value.
    ops = [node.op_type for node in found.graph.node]
    assert (ops.count("Transpose"), ops.count("Identity")) == (3, 1)
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    expected: Any = onnx.reference.ReferenceEvaluator(model.proto).run(None, {"x": x})
    got: Any = onnx.reference.ReferenceEvaluator(found).run(None, {"x": x})
    for first, second in zip(got, expected, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5)


def test_an_einsum_without_an_equation_stays() -> None:
    model = model_of(
        'y = Einsum <equation = "bi,ij->bj"> (x, w)', "float[B, 4] x", "float[B, 3] y", w=(4, 3)
    )
    model.proto.graph.node[0].attribute[0].CopyFrom(
        onnx.helper.make_attribute("equation", [1, 2])
    )
    assert flatten(model).model is model


def test_forms_inside_a_body_are_lowered_between_its_markers() -> None:
    branches: Any = (
        "y = If (c) <then_branch = a () => (float[4, B] z) { z = MatMul(w, x) }, "
        "else_branch = b () => (float[4, B] z) { z = MatMul(w, x) }>"
    )
    model = model_of(branches, "float[3, B] x, bool c", "float[4, B] y", w=(4, 3))
    flat = flatten(model)
    marks = [marker(node) for node in flat.model.proto.graph.node]
    assert [mark for mark in marks if mark] == [
        *((0, False), (2, False), (2, True), (0, True)),
        *((1, False), (3, False), (3, True), (1, True)),
    ]
    copy = onnx.ModelProto()
    copy.CopyFrom(flat.model.proto)
    assert restore(flat, Model(copy)).proto == model.proto
