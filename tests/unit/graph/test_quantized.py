"""How weights of integers are read, whatever makes floats of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from onnx import numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.quantized import Operand, dequantized, integers, nothing
from onnx_decompose.graph.sites import (
    Site,
    check_finite,
    find_sites,
    site_weight,
    stored_weight,
)
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

K, N = 3, 5
CODES = np.arange(-7, 8, dtype=np.int8).reshape(K, N)
PER_INPUT = np.array([0.5, 1.5, 2.5], np.float32)
PER_OUTPUT = np.array([0.5, 1.0, 1.5, 2.0, 2.5], np.float32)
ZERO_OUTPUTS = np.array([0, 1, -2, 3, -4], np.int8)
ZERO_INPUTS = np.array([0, 1, -2], np.int8)

FORMS: dict[str, tuple[str, dict[str, NDArray[Any]]]] = {
    "per tensor": (
        "d = DequantizeLinear(q, s, z) y = MatMul(x, d)",
        {"q": CODES, "s": np.asarray(0.5, np.float32), "z": np.asarray(2, np.int8)},
    ),
    "no zero point": (
        "d = DequantizeLinear(q, s) y = MatMul(x, d)",
        {"q": CODES, "s": np.full(1, 0.5, np.float32)},
    ),
    "per output": (
        "d = DequantizeLinear(q, s, z) y = MatMul(x, d)",
        {"q": CODES, "s": PER_OUTPUT, "z": ZERO_OUTPUTS},
    ),
    "per input": (
        "d = DequantizeLinear <axis = -2> (q, s, z) y = MatMul(x, d)",
        {"q": CODES, "s": PER_INPUT, "z": ZERO_INPUTS},
    ),
    "transposed before": (
        "t = Transpose(q) d = DequantizeLinear <axis = 1> (t, s, z) y = MatMul(x, d)",
        {"q": CODES.T, "s": PER_OUTPUT, "z": ZERO_OUTPUTS},
    ),
    "transposed after": (
        "d = DequantizeLinear <axis = 0> (q, s, z) t = Transpose <perm = [1, 0]> (d) y = MatMul(x, t)",
        {"q": CODES.T, "s": PER_OUTPUT, "z": ZERO_OUTPUTS},
    ),
    "transposed twice": (
        "d = DequantizeLinear <axis = 0> (q, s, z) t = Transpose(d) i = Identity(t) u = Transpose(i) y = MatMul(x, u)",
        {"q": CODES, "s": PER_INPUT, "z": ZERO_INPUTS},
    ),
    "gemm": (
        "d = DequantizeLinear <axis = 0> (q, s, z) y = Gemm <transB = 1> (x, d)",
        {"q": CODES.T, "s": PER_OUTPUT, "z": ZERO_OUTPUTS},
    ),
    "gemm after a transpose": (
        "d = DequantizeLinear <axis = 1> (q, s, z) t = Transpose(d) y = Gemm <transB = 1> (x, t)",
        {"q": CODES, "s": PER_OUTPUT, "z": ZERO_OUTPUTS},
    ),
    "cast": (
        "f = Cast <to = 1> (q) y = MatMul(x, f)",
        {"q": CODES},
    ),
    "cast and multiplied": (
        "f = Cast <to = 1> (q) d = Mul(f, s) y = MatMul(x, d)",
        {"q": CODES, "s": PER_OUTPUT[None]},
    ),
    "all of it": (
        """f = Cast <to = 10> (q) c = Sub(f, z) d = Mul(s, c) h = Cast <to = 1> (d) e = Div(h, v)
           t = Transpose(e) y = MatMul(x, t)""",
        {
            "q": CODES.T,
            "z": ZERO_OUTPUTS[:, None].astype(np.float16),
            "s": PER_INPUT.astype(np.float16),
            "v": np.asarray(4, np.float32),
        },
    ),
}


def study(body: str, tensors: Mapping[str, Any]) -> tuple[Site, Constants, Model]:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[B, {K}] x) => (float[B, {N}] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, values in tensors.items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    model = Model(proto)
    constants = Constants(model)
    (site,), refused = find_sites(model, constants)
    assert refused == ()
    return site, constants, model


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_inputs_by_outputs(form: str) -> None:
    body, tensors = FORMS[form]
    site, constants, model = study(body, tensors)
    assert site.quantized is not None
    assert (site.shape, site.tensor) == ((K, N), "q")
    np.testing.assert_array_equal(integers(site.quantized, constants), CODES)
    np.testing.assert_array_equal(stored_weight(site, constants), CODES)
    # The identity makes the weight itself.
    evaluator = onnx.reference.ReferenceEvaluator(model.proto)
    (weight,) = evaluator.run(None, {"x": np.eye(K, dtype=np.float32)})
    np.testing.assert_array_equal(dequantized(site.quantized, constants), weight)
    np.testing.assert_array_equal(site_weight(site, constants), weight)
    zero = nothing(site.quantized, constants)
    assert zero.dtype == np.int8
    np.testing.assert_array_equal(zero == CODES, weight == 0)
    assert site.transposed == (tensors["q"].shape != (K, N))


def test_products_of_integers() -> None:
    body = (
        "a, b, c = DynamicQuantizeLinear(x) i = MatMulInteger(a, q, c, z) y = Cast <to = 1> (i)"
    )
    site, constants, _ = study(body, {"q": CODES, "z": ZERO_OUTPUTS})
    assert site.quantized is not None
    assert (site.op_type, site.input, site.quantized.meets_integers) == (
        "MatMulInteger",
        "a",
        True,
    )
    np.testing.assert_array_equal(
        site_weight(site, constants), CODES - ZERO_OUTPUTS.astype(np.float32)
    )
    body = """a = QuantizeLinear(x, u, v) b = QLinearMatMul(a, u, v, q, s, z, u, v)
              y = DequantizeLinear(b, u, v)"""
    tensors = {"q": CODES, "s": PER_OUTPUT, "z": ZERO_OUTPUTS}
    site, constants, _ = study(
        body, tensors | {"u": np.asarray(0.5, np.float32), "v": np.asarray(0, np.int8)}
    )
    assert (site.op_type, site.weight) == ("QLinearMatMul", "q")
    np.testing.assert_array_equal(
        site_weight(site, constants), (CODES - ZERO_OUTPUTS.astype(np.float32)) * PER_OUTPUT
    )


def test_whether_integers_meet_integers() -> None:
    """A runtime multiplies integers where the input was dequantized as well."""
    body, tensors = FORMS["per output"]
    assert not study(body, tensors)[0].quantized.meets_integers  # type: ignore[union-attr]
    pair = "a = QuantizeLinear(x, u, v) b = DequantizeLinear(a, u, v) "
    quantizers = {"u": np.asarray(0.5, np.float32), "v": np.asarray(0, np.int8)}
    site, _, _ = study(pair + body.replace("(x, d)", "(b, d)"), tensors | quantizers)
    assert site.quantized is not None
    assert site.quantized.meets_integers


def test_scales_must_be_finite() -> None:
    body, tensors = FORMS["per output"]
    site, constants, model = study(body, tensors | {"s": np.full(N, np.inf, np.float32)})
    with pytest.raises(ModelError, match="tensor 's' of node 'y' holds NaN or infinite"):
        check_finite(model, [site], constants)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((), None, None),
        ((1, 1), None, None),
        ((N,), None, -1),
        ((1, N), None, -1),
        ((N, 1), None, -2),
        ((K,), -1, None),
        ((K, 1), -2, None),
        ((K, N), -2, -1),
        ((N, K), -1, -2),
    ],
)
def test_operands_and_their_parts(
    shape: tuple[int, ...], rows: int | None, columns: int | None
) -> None:
    operand = Operand("", 1, "c", rows, columns)
    values = np.arange(max(1, int(np.prod(shape)))).reshape(shape)
    matrix = operand.matrix(values)
    assert matrix.shape == (1 if rows is None else K, 1 if columns is None else N)
    np.testing.assert_array_equal(operand.stored(matrix, values.ndim), values)
    units = np.array([2, 0]), np.array([4, 1, 3])
    part = matrix[np.ix_(*operand.units(*units))]
    kept = operand.stored(part, values.ndim)
    expected = values
    for axis, chosen in zip((rows, columns), units, strict=True):
        if axis is not None:
            expected = np.take(expected, chosen, axis)
    np.testing.assert_array_equal(kept, expected)
