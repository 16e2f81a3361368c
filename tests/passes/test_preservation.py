"""What was not rewritten comes out exactly as it went in."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import set_external_data, uses_external_data

from onnx_decompose.errors import PassError
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.passes.base import GraphPass, PassResult, check_model
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.splice import ORIGIN_KEY
from tests.passes.harness import blocks, check_parity, parse, passes_for, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIXED = [0, 1, 0, 1, 1, 0, 1, 0]
HIDDEN = [0, 1] * 5
OUT = [0, 0, 0, 1, 1, 1]

TEXT = """g (float[B, 8] x) => (float[B, 6] y) {
    s = Sin(x) h = MatMul(s, w1) r = Relu(h) o = MatMul(r, w2) y = Tanh(o)
}"""


def model(
    rng: np.random.Generator, text: str = TEXT, opsets: str = '"": 17'
) -> onnx.ModelProto:
    tensors = {"w1": blocks(rng, MIXED, HIDDEN), "w2": blocks(rng, HIDDEN, OUT)}
    return parse(text, tensors, opsets=opsets, ir_version=10)


def test_model_properties_and_documentation(rng: np.random.Generator) -> None:
    # The harness compares every field of the model and the graph that no pass may change.
    proto = model(rng)
    proto.producer_name, proto.producer_version = "trainer", "3"
    proto.domain, proto.model_version, proto.doc_string = "org.example", 7, "a model"
    proto.metadata_props.add(key="license", value="mine")
    proto.graph.doc_string = "a graph"
    proto.graph.metadata_props.add(key="graph", value="kept")
    proto.graph.input[0].doc_string = "an input"
    proto.graph.node[0].doc_string = "a sine"
    proto.graph.node[0].metadata_props.add(key="node", value="kept")
    assert rewrite(proto).decisions == [("split", 2)]


def test_copies_keep_what_a_node_says_of_itself(rng: np.random.Generator) -> None:
    proto = model(rng, TEXT.replace("Relu(h)", "LeakyRelu <alpha = 0.25> (h)"))
    node = proto.graph.node[2]
    node.name, node.doc_string = "leak", "leaks"
    node.metadata_props.add(key="layer", value="1")
    node.device_configurations.add(configuration_id="d")
    result = rewrite(proto)
    copies = [copy for copy in result.proto.graph.node if copy.op_type == "LeakyRelu"]
    assert [copy.name for copy in copies] == ["leak.branch0", "leak.branch1"]
    for copy in copies:
        restored = onnx.NodeProto()
        restored.CopyFrom(copy)
        assert restored.metadata_props.pop() == onnx.StringStringEntryProto(
            key=ORIGIN_KEY, value="leak"
        )
        restored.name = node.name
        restored.input[:], restored.output[:] = node.input, node.output
        assert restored == node


def test_value_info_and_annotations_of_values_that_are_gone(rng: np.random.Generator) -> None:
    proto = model(rng)
    float32 = onnx.TensorProto.FLOAT
    for name, size in (("s", 8), ("h", 10), ("r", 10), ("o", 6)):
        proto.graph.value_info.append(
            onnx.helper.make_tensor_value_info(name, float32, ["B", size])
        )
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("w1", float32, [8, 10]))
    for name in ("s", "h", "w2", "o"):
        note = proto.graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="one")
    result = rewrite(proto)
    assert [value.name for value in result.proto.graph.value_info] == ["s", "o"]
    notes = [note.tensor_name for note in result.proto.graph.quantization_annotation]
    assert notes == ["s", "o"]


def test_a_single_branch_keeps_names_but_not_stale_shapes(rng: np.random.Generator) -> None:
    proto = model(rng)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[:, 3] = 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["B", 10])
    )
    second = numpy_helper.to_array(proto.graph.initializer[1]).copy()
    second[3] = 0
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(second, "w2"))
    result = rewrite(proto, "shrink")
    assert result.ops == ["Sin", "MatMul", "Relu", "MatMul", "Tanh"]
    assert [list(node.output) for node in result.proto.graph.node] == [
        ["s"],
        ["h"],
        ["r"],
        ["o"],
        ["y"],
    ]
    assert list(result.proto.graph.value_info) == []
    check_parity(result, rng)


def test_new_names_avoid_every_name_in_use(rng: np.random.Generator) -> None:
    text = """g (float[B, 8] x, bool c) => (float[B, 6] y) {
        s = Sin(x) h = MatMul(s, w1) r = Relu(h) o = MatMul(r, w2)
        y = If (c) <
            then_branch = t () => (float[B, 6] h.branch0) { h.branch0 = Abs(o) },
            else_branch = e () => (float[B, 6] w1.block1) { w1.block1 = Neg(o) }
        >
    }"""
    proto = model(rng, text.replace("h.branch0", "taken").replace("w1.block1", "too"))
    inner = proto.graph.node[-1].attribute
    for graph, name in ((inner[0].g, "h.branch0"), (inner[1].g, "w1.block1")):
        graph.output[0].name = graph.node[0].output[0] = name
    proto.graph.node[0].name = "h.branch1"
    result = rewrite(proto)
    outputs = [name for node in result.proto.graph.node for name in node.output]
    assert {"h.branch0_1", "h.branch1_1"} <= set(outputs)
    assert "w1.block1_1" in {tensor.name for tensor in result.proto.graph.initializer}
    check_parity(result, rng)


def test_functions_and_other_domains(rng: np.random.Generator) -> None:
    text = """<ir_version: 10, opset_import: ["": 17, "local": 1]>
    g (float[B, 8] x) => (float[B, 6] y) {
        s = local.twice(x) h = MatMul(s, w1) r = Relu(h) o = MatMul(r, w2) y = local.twice(o)
    }
    <domain: "local", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }"""
    proto = onnx.parser.parse_model(text)
    for name, weight in (("w1", blocks(rng, MIXED, HIDDEN)), ("w2", blocks(rng, HIDDEN, OUT))):
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    result = rewrite(proto)
    assert result.decisions == [("split", 2)]
    check_parity(result, rng)


def test_external_tensors_that_stay_are_neither_read_nor_moved(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    text = TEXT.replace("Tanh(o)", "MatMul(o, v)").replace("B, 6] y", "B, 5] y")
    proto = model(rng, text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((6, 5), np.float32), "v"))
    data = b""
    for tensor in proto.graph.initializer:
        stored = tensor.raw_data
        set_external_data(tensor, "data.bin", offset=len(data), length=len(stored))
        tensor.ClearField("raw_data")
        data += stored
    (tmp_path / "data.bin").write_bytes(data)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    study = study_model(load_model(tmp_path / "model.onnx"))
    mask = np.ones((6, 5), bool)
    parts = [part for region in study.regions for part in study.parts(region)]
    _, weights, rewriting = passes_for(
        dataclasses.replace(study, regions=tuple(parts)), "split", {"y": mask}
    )
    rewritten = rewriting(study.model).model
    annealed = ReplaceWeights(weights)(study.model).model
    for made, old in ((rewritten, {"v"}), (annealed, {"v"})):
        assert made.path == study.model.path
        kept = [t for t in made.proto.graph.initializer if uses_external_data(t)]
        assert {tensor.name for tensor in kept} == old
        assert kept[0] == proto.graph.initializer[2]


def documented(message: onnx.NodeProto | onnx.ValueInfoProto) -> bool:
    message.doc_string = "new"
    return True


class Lying(GraphPass):
    """A pass that does what it is told, whatever it promises."""

    def __init__(self, change: Callable[[onnx.ModelProto], object], *, modified: bool) -> None:
        self.change = change
        self.modified = modified

    def call(self, model: Model) -> PassResult:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        if self.change(proto) is None:
            return PassResult(model, self.modified)
        return PassResult(Model(proto), self.modified)

    def touched(self, model: Model) -> frozenset[int]:
        return frozenset({len(model.proto.graph.node) - 1})


@pytest.mark.parametrize(
    ("change", "modified", "message"),
    [
        (lambda _: None, True, "Lying: 'modified' does not say what happened"),
        (lambda _: True, False, "Lying: 'modified' does not say what happened"),
        (
            lambda p: documented(p.graph.input[0]),
            True,
            "Lying: inputs or outputs of the model were changed",
        ),
        (
            lambda p: p.graph.output.pop(),
            True,
            "Lying: inputs or outputs of the model were changed",
        ),
        (
            lambda p: documented(p.graph.node[0]),
            True,
            "Lying: node 's' was changed",
        ),
    ],
)
def test_a_pass_that_breaks_its_contract_is_caught(
    change: Callable[[onnx.ModelProto], object],
    modified: bool,
    message: str,
    rng: np.random.Generator,
) -> None:
    with pytest.raises(PassError, match=message):
        Lying(change, modified=modified)(Model(model(rng)))


def test_a_pass_may_change_what_it_names(rng: np.random.Generator) -> None:
    given = Model(model(rng))
    done = Lying(lambda p: documented(p.graph.node[-1]), modified=True)(given)
    assert done.model.proto.graph.node[-1].doc_string == "new"
    nothing = Lying(lambda _: None, modified=False)(given)
    assert nothing.model is given


def test_regions_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    study = study_model(Model(model(rng)))
    plans, _, rewriting = passes_for(study, "split")
    (region, plan) = plans[0]
    twice = dataclasses.replace(rewriting, plans=[(region, plan)] * 2)
    with pytest.raises(PassError, match="two regions share a node"):
        twice(study.model)
    foreign = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float x) => (float y) { y = Abs(x) }'
    )
    with pytest.raises(PassError, match="a region is not of this model"):
        rewriting(Model(foreign))


def test_an_invalid_result_is_caught(rng: np.random.Generator) -> None:
    study = study_model(Model(model(rng)))
    _, weights, rewriting = passes_for(study, "split")
    assert check_model(study.model) is None
    # Weights of another type make a model that the checker refuses.
    typed = dataclasses.replace(rewriting, weight=lambda site: weights[site].astype(np.float64))
    with pytest.raises(PassError, match="RewriteRegions: the rewritten model is not valid: "):
        typed(study.model)
