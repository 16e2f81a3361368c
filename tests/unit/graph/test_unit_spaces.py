"""Which values share their units' numbers, and which of those numbers are nobody else's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from onnx_decompose.graph.unit_spaces import UnitSpace

WEIGHTS = {"w1": (4, 6), "w2": (6, 5)}

NUMBERS = {
    "axis": [-1],
    "rows": [0, 0],
    "flat": [-1, 6],
    "all": [0, 1, 2, 3, 4, 5],
    "wide": [3, 12],
    "square": [6, 6],
    "one": [1],
    "start": [-1],
    "stop": [-99],
    "step": [-1],
}
"""Arguments of operators."""


def spaces(
    body: str,
    tensors: dict[str, tuple[int, ...]] | None = None,
    *,
    head: str = "float[B, 4] x",
    tail: str = "float[B, 5] y",
    opset: int = 20,
) -> tuple[UnitSpace, ...]:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> g ({head}) => ({tail}) {body}'
    )
    for name, shape in (WEIGHTS | (tensors or {})).items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.ones(shape, np.float32), name)
        )
    for name, numbers in NUMBERS.items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.array(numbers, np.int64), name)
        )
    return study_model(Model(proto)).spaces


def only(
    body: str, tensors: dict[str, tuple[int, ...]] | None = None, **texts: str
) -> UnitSpace:
    (space,) = spaces(body, tensors, **texts)  # type: ignore[arg-type]
    return space


def test_inputs_and_outputs_keep_their_order_and_what_lies_between_does_not() -> None:
    space = only("{ h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }")
    assert space.size == 6
    assert space.values == {"h", "r"}
    assert [(use.node, use.input, use.axis) for use in space.constants] == [
        (0, 1, -1),
        (2, 1, -2),
    ]


def test_constants_of_an_axis_go_with_it() -> None:
    body = "{ h = Gemm <transB = 1> (x, w3, b) s = Mul(h, g) t = Add(s, c) y = MatMul(t, w2) }"
    space = only(body, {"w3": (6, 4), "b": (6,), "g": (1, 6), "c": ()})
    assert [(use.node, use.input, use.axis) for use in space.constants] == [
        (0, 1, -2),
        (0, 2, -1),
        (1, 1, -1),
        (3, 1, -2),
    ]


@pytest.mark.parametrize(
    "ops",
    [
        "k = LayerNormalization <axis = -1> (h, g, b)",
        "k = LayerNormalization <axis = 1> (h, g, b)",
        "k = Softmax <axis = 1> (h)",
        "m = ReduceMean <keepdims = 1> (h, axis) k = Sub(h, m)",
        "k = Gather <axis = 0> (h, rows)",
        "k = Reshape(h, flat)",
        "k = Transpose <perm = [0, 1]> (h)",
        "k = Concat <axis = 0> (h, h)",
        "k = Dropout(h)",
        "s = Shape(h) k = Expand(h, s)",
    ],
)
def test_operators_that_do_not_care_for_the_order(ops: str) -> None:
    body = f"{{ h = MatMul(x, w1) {ops} y = MatMul(k, w2) }}"
    (space,) = spaces(body, {"g": (6,), "b": (6,)})
    assert {"h", "k"} <= space.values


@pytest.mark.parametrize(
    "ops",
    [
        "k = LayerNormalization <axis = 0> (h, g2, b2)",
        "k = Softmax(h)",  # of operator set 12: over all axes from 1 on
        "k = Softmax <axis = 0> (h)",
        "k = Gather <axis = 1> (h, all)",
        "v = Reshape(h, wide) k = Reshape(v, square)",
        "k = Transpose <perm = [1, 0]> (h)",
        "k = CumSum(h, one)",
        "k = MatMul(h, h)",
        "k = Slice(h, start, stop, axis, step)",
        "m = ArgMax <axis = 1> (h) k = Relu(h)",
        "k = LayerNormalization <axis = -1> (h, x6, b)",
    ],
)
def test_operators_that_do(ops: str) -> None:
    old = "Softmax(h)" in ops
    body = f"{{ h = MatMul(x, w1) {ops} y = MatMul(k, w2) }}"
    head = "float[6, 4] x, float[6] x6" if "x6" in ops else "float[6, 4] x"
    found = spaces(
        body,
        {"g": (6,), "b": (6,), "g2": (6, 6), "b2": (6, 6)},
        head=head,
        tail="float[M, 5] y",
        opset=12 if old else 20,
    )
    assert found == ()


def test_a_value_that_is_read_in_a_subgraph_keeps_its_order() -> None:
    body = """{ h = MatMul(x, w1) y = MatMul(h, w2)
        z = If (c) <then_branch = t () => (float[B, 6] a) { a = Identity(h) },
                    else_branch = e () => (float[B, 6] b) { b = Relu(h) }> }"""
    assert spaces(body, head="float[B, 4] x, bool c", tail="float[B, 5] y, float[B, 6] z") == ()


def test_an_embedding_makes_units_in_any_order() -> None:
    space = only(
        "{ e = Gather <axis = 0> (table, ids) n = LayerNormalization (e, g, b) y = MatMul(n, w2) }",
        {"table": (9, 6), "g": (6,), "b": (6,)},
        head="int64[B, T] ids",
        tail="float[B, T, 5] y",
    )
    assert [(use.node, use.input, use.axis) for use in space.constants] == [
        (0, 0, -1),
        (1, 1, -1),
        (1, 2, -1),
        (2, 1, -2),
    ]


def test_a_matrix_that_two_nodes_read_stays_shared() -> None:
    """A tied embedding is one tensor before and after."""
    body = "{ e = Gather <axis = 0> (table, ids) t = Transpose <perm = [1, 0]> (table) y = MatMul(e, t) }"
    assert spaces(body, {"table": (9, 6)}, head="int64[B] ids", tail="float[B, 9] y") == ()


def test_spaces_do_not_run_together_by_a_size_of_one() -> None:
    found = spaces(
        "{ h = MatMul(x, w1) s = MatMul(x, v) k = Mul(h, s) y = MatMul(k, w2) }", {"v": (4, 1)}
    )
    assert [space.values for space in found if space.size > 1] == [{"h", "k"}]
