from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_decompose.errors import ModelError
from onnx_decompose.model.tensors import (
    BFLOAT16,
    TensorSpec,
    graph_inputs,
    graph_outputs,
    is_float,
    smallest_normal,
)


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text}')


def test_inputs_leave_initializers_out_and_keep_symbols() -> None:
    model = parse(
        "g (bfloat16[batch, 3] x, float[3] w, int64[] n) => (float[batch, M] y)"
        "<float[3] w = {1.0, 2.0, 3.0}> { c = Cast<to = 1>(x) y = Add(c, w) }"
    )
    model.graph.input[-1].type.tensor_type.shape.SetInParent()  # a scalar
    assert graph_inputs(model) == (
        TensorSpec("x", BFLOAT16, ("batch", 3)),
        TensorSpec("n", np.dtype(np.int64), ()),
    )
    assert [str(spec) for spec in graph_outputs(model)] == ["y: float32[batch, M]"]


def test_unnamed_negative_and_unknown_dimensions() -> None:
    model = parse("g (float[N, 2] x, float[2] r) => (float[2] y) { y = Add(x, r) }")
    first, second = model.graph.input
    first.type.tensor_type.shape.dim[0].Clear()
    first.type.tensor_type.shape.dim[1].dim_value = -1
    second.type.tensor_type.ClearField("shape")
    x, r = graph_inputs(model)
    assert x.shape == (None, None)
    assert (x.axis_symbol(0), x.axis_symbol(1)) == ("x.0", "x.1")
    assert r.shape is None
    assert str(r) == "r: float32[...]"


def test_fixed_axes_have_no_symbol_and_named_ones_keep_theirs() -> None:
    spec = TensorSpec("x", np.dtype(np.float32), ("N", 4))
    assert (spec.axis_symbol(0), spec.axis_symbol(1)) == ("N", None)


def test_a_sequence_input_is_refused_by_name() -> None:
    model = parse("g (seq(float[N]) s) => (float[N] y) { y = ConcatFromSequence<axis = 0>(s) }")
    with pytest.raises(ModelError, match=r"^s: its type is sequence_type; only tensors"):
        graph_inputs(model)


def test_an_element_type_without_numpy_dtype_is_refused_by_name() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Identity(x) }")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT8E4M3FN
    with pytest.raises(ModelError, match=r"^x: element type float8e4m3fn"):
        graph_inputs(model)


def test_is_float_counts_bfloat16() -> None:
    assert is_float(BFLOAT16)
    assert is_float(np.dtype(np.float16))
    assert not is_float(np.dtype(np.int8))
    assert not is_float(np.dtype(np.complex64))


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(np.float16, -14), (np.float32, -126), (BFLOAT16, -126), (np.float64, -1022)],
)
def test_the_smallest_number_with_all_digits(dtype: np.dtype[Any], exponent: int) -> None:
    assert smallest_normal(np.dtype(dtype)) == 2.0**exponent
