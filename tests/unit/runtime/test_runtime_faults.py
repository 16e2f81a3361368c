"""Models that onnxruntime cannot load at full optimization are loaded without what fails; others as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.runtime.runtime_faults import FUSES_HALF_WEIGHTS, unsafe_optimizers
from onnx_decompose.runtime.sessions import Provider, open_session

if TYPE_CHECKING:
    from pathlib import Path


def model(body: str, weight: tuple[int, ...] = (2, 2), kind: str = "float16") -> bytes:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({kind}[B, 3, 2] x) => ({kind}[N, M, 2] y) {{ {body} }}"""
    )
    values = np.ones(weight, np.float16 if kind == "float16" else np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    return bytes(proto.SerializeToString())


MOVED = "a = Transpose <perm = [1, 0, 2]> (x)"
UNSAFE = {
    "a product": f"{MOVED} y = MatMul(a, w)",
    "behind Identity": f"{MOVED} b = Identity(a) y = MatMul(b, w)",
    "a weight through Identity": f"{MOVED} b = Identity(w) y = MatMul(a, b)",
    "behind Relu": f"{MOVED} b = Relu(a) y = MatMul(b, w)",
    "behind a Gather of units": f"{MOVED} i = Constant <value_ints: ints = [0, 1]> () "
    "b = Gather <axis: int = -1> (a, i) y = MatMul(b, w)",
    "inside a body": f"{MOVED} f = Constant <value_int: int = 1> () c = Cast <to: int = 9> (f) "
    "y = If (c) <then_branch: graph = g1 () => (float16[N, M, 2] p) { p = MatMul(a, w) }, "
    "else_branch: graph = g2 () => (float16[N, M, 2] q) { q = Identity(a) }>",
}


@pytest.mark.parametrize("body", UNSAFE.values(), ids=UNSAFE.keys())
def test_a_model_that_would_end_the_process_is_loaded(body: str, tmp_path: Path) -> None:
    content = model(body)
    assert unsafe_optimizers(content) == {FUSES_HALF_WEIGHTS}
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert unsafe_optimizers(path) == {FUSES_HALF_WEIGHTS}
    x = np.arange(12, dtype=np.float16).reshape(2, 3, 2)
    for source in (content, path):
        session = open_session(source, Provider.CPU)
        moved = x.transpose(1, 0, 2)
        np.testing.assert_array_equal(session.run({"x": x})["y"], moved @ np.ones((2, 2)))
        assert session.survives([{"x": x}])


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (UNSAFE["a product"], {"kind": "float"}),
        (UNSAFE["a product"], {"weight": (3, 2, 2)}),
        ("a = Transpose <perm = [0, 1, 2]> (x) y = MatMul(a, w)", {}),
        (f"b = MatMul(x, w) {MOVED.replace('(x)', '(b)')} y = Relu(a)", {}),
    ],
    ids=["float32", "a stack of matrices", "the first axis stays", "a Transpose after"],
)
def test_others_are_loaded_as_ever(body: str, options: dict[str, object]) -> None:
    content = model(body, **options)  # type: ignore[arg-type]
    assert unsafe_optimizers(content) == set()
    assert open_session(content, Provider.CPU).inputs[0].name == "x"


def test_inside_a_branch() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[B, 3, 2] x, bool c) => (float16[N, M, 2] y) {
            y = If (c) <
                then_branch = t () => (float16[N, M, 2] p) {
                    w = Constant <value = float16[2, 2] {15360, 15360, 15360, 15360}> ()
                    a = Transpose <perm = [1, 0, 2]> (x) p = MatMul(a, w) },
                else_branch = e () => (float16[N, M, 2] p) { p = Relu(x) }
            >
        }"""
    )
    assert unsafe_optimizers(proto.SerializeToString()) == {FUSES_HALF_WEIGHTS}


def test_inside_a_function_that_is_given_the_weight() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float16[B, 3, 2] x) => (float16[N, M, 2] y) <float16[2, 2] w = {0, 0, 0, 0}>
        { y = own.layer(x, w) }
        <domain: "own", opset_import: ["": 17]>
        layer (x, w) => (y) { a = Transpose <perm = [1, 0, 2]> (x) y = MatMul(a, w) }"""
    )
    assert unsafe_optimizers(proto.SerializeToString()) == {FUSES_HALF_WEIGHTS}
    assert open_session(proto.SerializeToString(), Provider.CPU).inputs[0].name == "x"


def test_a_product_of_two_inputs_beside_a_constant() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[B, 3, 2] x, float16[2, 2] v) => (float16[N, M, 2] y) <float16 c = {0}>
        { a = Transpose <perm = [1, 0, 2]> (x) b = MatMul(a, v) y = Add(b, c) }"""
    )
    assert unsafe_optimizers(proto.SerializeToString()) == {FUSES_HALF_WEIGHTS}
    assert open_session(proto.SerializeToString(), Provider.CPU).inputs[1].name == "v"


def test_what_is_no_model_is_for_the_runtime_to_tell() -> None:
    assert unsafe_optimizers(b"Transpose MatMul") == set()
