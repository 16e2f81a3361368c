"""Every operator set from 7 and every IR version from 3 to the newest that the onnx package knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from tests.passes.harness import blocks, check_parity, parse, rewrite

if TYPE_CHECKING:
    from tests.passes.harness import Rewritten

NEWEST_OPSET = onnx.defs.onnx_opset_version()
NEWEST_IR = int(onnx.IR_VERSION)
RUNTIME_OPSET, RUNTIME_IR = 25, 11
"""What onnxruntime certainly runs; newer versions run in the standard's reference implementation."""

TEXT = """g (float[B, 8] x) => (float[B, 6] y) {
    h = MatMul(x, up) b = Add(h, bias) a = Relu(b) y = MatMul(a, down)
}"""


def planted(rng: np.random.Generator, opset: int, ir_version: int) -> onnx.ModelProto:
    """Two interleaved blocks, and beside them what a rewrite must not touch."""
    inside = [0, 1] * 4
    proto = parse(
        TEXT,
        {
            "up": blocks(rng, [0, 1] * 4, inside),
            "bias": rng.normal(size=8).astype(np.float32),
            "down": blocks(rng, inside, [0, 1] * 3),
        },
        opsets=f'"": {opset}',
        ir_version=ir_version,
    )
    proto.metadata_props.add(key="author", value="nobody")
    proto.graph.doc_string = "a graph"
    annotation = proto.graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="bias")
    return proto


def check(result: Rewritten, rng: np.random.Generator, *, reference: bool) -> None:
    assert result.decisions == [("split", 2)]
    check_parity(result, rng, reference=reference)
    assert result.proto.ir_version == result.original.ir_version
    assert result.proto.opset_import == result.original.opset_import
    assert result.proto.graph.doc_string == "a graph"
    assert {p.key: p.value for p in result.proto.metadata_props}["author"] == "nobody"


@pytest.mark.parametrize("opset", range(7, NEWEST_OPSET + 1))
def test_every_operator_set(opset: int, rng: np.random.Generator) -> None:
    result = rewrite(planted(rng, opset, ir_version=10))
    check(result, rng, reference=opset > RUNTIME_OPSET)


@pytest.mark.parametrize("ir_version", range(4, NEWEST_IR + 1))
def test_every_ir_version(ir_version: int, rng: np.random.Generator) -> None:
    result = rewrite(planted(rng, 13, ir_version))
    check(result, rng, reference=ir_version > RUNTIME_IR)


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_ir_version_3_whose_weights_are_inputs(opset: int, rng: np.random.Generator) -> None:
    proto = planted(rng, opset, ir_version=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims))
        )
    study = study_model(load_model(proto))
    assert study.sites == ()
    assert {refusal.reason for refusal in study.refused} == {
        "the weight is also a graph input, so it can be overridden at run time"
    }


def test_ir_version_3_whose_weights_are_constant_nodes(rng: np.random.Generator) -> None:
    proto = parse(TEXT, {}, opsets='"": 9', ir_version=3)
    tensors = {"up": [0, 1] * 4, "down": [0, 1] * 3, "bias": None}
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for name, columns in tensors.items():
        values = (
            np.zeros(8, np.float32) if columns is None else blocks(rng, [0, 1] * 4, columns)
        )
        tensor = numpy_helper.from_array(values, name)
        proto.graph.node.append(helper.make_node("Constant", [], [name], value=tensor))
    proto.graph.node.extend(nodes)
    study = study_model(load_model(proto))
    assert study.sites == ()
    assert {refusal.reason for refusal in study.refused} == {
        "IR version 3 has no initializers that are not inputs too; convert the model to version 4 or later"
    }
