from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.model.shapes import infer_shapes, opset_of, skeleton

if TYPE_CHECKING:
    from collections.abc import Callable


def parse(text: str, opsets: str = '"": 17') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{opsets}]> {text}")


def test_shapes_go_through_the_graph() -> None:
    model = parse(
        """g (float[B, 4] x) => (float[B, 8] y) <float[4, 8] w> {
        h = MatMul(x, w) s = Shape(h) r = Reshape(h, s) y = Relu(r) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 8), np.float32), "w"))
    shapes = infer_shapes(model)
    assert {name: shapes[name] for name in ("x", "w", "h", "y")} == {
        "x": ("B", 4),
        "w": (4, 8),
        "h": ("B", 8),
        "y": ("B", 8),
    }


def test_a_value_of_unknown_rank_is_left_out() -> None:
    model = parse(
        "g (float[B, 4] x) => (float[B, 4] y) { u = ex.Magic(x) v = Relu(u) y = ex.Magic(v) }",
        '"": 17, "ex": 1',
    )
    shapes = infer_shapes(model)
    assert "x" in shapes
    assert not {"u", "v"} & shapes.keys()


def test_failing_inference_is_only_said(caplog: pytest.LogCaptureFixture) -> None:
    model = parse("g (float[B, 4] x) => (float[B, 4] y) { y = unknown.Relu(x) }")
    with caplog.at_level(logging.INFO):
        shapes = infer_shapes(model)
    assert shapes["x"] == ("B", 4)
    assert "shape inference failed, going on without it" in caplog.text


def test_the_skeleton_holds_no_large_initializer() -> None:
    model = parse("g (float[B, 512] x) => (float[B, 512] y) { a = MatMul(x, w) y = Add(a, b) }")
    for name, shape in (("w", (512, 512)), ("b", (1,))):
        model.graph.initializer.append(
            numpy_helper.from_array(np.zeros(shape, np.float32), name)
        )
    bare = skeleton(model)
    assert [tensor.name for tensor in bare.graph.initializer] == ["b"]
    assert [value.name for value in bare.graph.input] == ["x", "w"]
    assert bare.ByteSize() < 1000
    onnx.checker.check_model(bare, full_check=True)


@pytest.mark.parametrize(
    ("opsets", "version"), [('"": 9', 9), ('"ai.onnx": 12', 12), ('"ex": 3', 1)]
)
def test_version_of_the_standard_operator_set(opsets: str, version: int) -> None:
    assert opset_of(parse("g (float x) => (float y) { y = Abs(x) }", opsets)) == version


def test_sizes_below_zero_are_unknown() -> None:
    """Inference of onnx 1.23 aborts the process on a slice of such a size."""
    model = parse("g (float[N, 3, 5] x) => (int64[k] y) { y = Shape <start = 2, end = 3> (x) }")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -1
    assert infer_shapes(model)["x"] == ("N", 3, None)


def declares_a_long_list() -> onnx.ModelProto:
    return parse("g (float[B, 4] x, float[99999999999] c) => (float[B, n] y) { y = Mul(c, c) }")


def doubles_a_list() -> onnx.ModelProto:
    twice = " ".join(f"v{n + 1} = Concat <axis = 0> (v{n}, v{n})" for n in range(40))
    return parse(f"g (float[B, 4] x) => (int64[n] v40) <int64[2] v0 = {{1, 2}}> {{ {twice} }}")


def doubles_a_list_in_functions() -> onnx.ModelProto:
    model = parse(
        "g (float[B, 4] x, float[8] c) => (float[n] y) { y = own.f9(c) }", '"": 17, "own": 1'
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
    for number in range(10):
        inner = onnx.helper.make_node(f"f{number - 1}", ["x"], ["h"], domain="own")
        first = onnx.helper.make_node("Concat", ["x"] * 8, ["h"], axis=0)
        last = onnx.helper.make_node("Concat", ["h"] * 8, ["y"], axis=0)
        nodes = [inner if number else first, last]
        model.functions.append(
            onnx.helper.make_function("own", f"f{number}", ["x"], ["y"], nodes, opsets)
        )
    return model


@pytest.mark.parametrize(
    "make", [declares_a_long_list, doubles_a_list, doubles_a_list_in_functions]
)
def test_long_lists_are_not_followed(make: Callable[[], onnx.ModelProto]) -> None:
    """Inference of onnx 1.23 would hold every entry of them; without that it is quick."""
    begin = time.process_time()
    assert infer_shapes(make())["x"] == ("B", 4)
    assert time.process_time() - begin < 1
