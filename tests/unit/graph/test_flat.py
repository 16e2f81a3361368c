"""Graphs inside graphs as one flat graph, and back again."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.errors import ModelError
from onnx_decompose.graph.closing import restore
from onnx_decompose.graph.flat import CLOSED_DOMAIN, flatten
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model

HEAD = '<ir_version: 10, opset_import: ["": 21, "local": 1, "other": 1]>'
TENSORS = "<float[2, 2] w = {1, 0, 0, 1}, float[2] b = {1, 2}, int64 n = {3}, bool t = {1}>"

BRANCHES = """g (float[B, 2] x, bool c) => (float[B, 2] y) TENSORS {
    h = Abs(x)
    [choice] y = If (c) <
        then_branch = one () => (float[B, 2] o) { [fc] p = MatMul(h, w) o = Add(p, b) },
        else_branch = other () => (float[B, 2] o) <float[2, 2] v = {1, 2, 3, 4}> { [fc] o = MatMul(h, v) }
    >
}"""
LOOP = """g (float[B, 2] x) => (float[B, 2] y, float[K, B, 2] all) TENSORS {
    [steps] y, all = Loop (n, t, x) <
        body = step (int64 i, bool k, float[B, 2] h) => (bool k2, float[B, 2] o, float[B, 2] s) {
            k2 = Identity(k)
            [linear] m = MatMul(h, w)
            q = Less(i, n)
            o = If (q) <
                then_branch = a () => (float[B, 2] z) { l = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
                    z = MatMul(m, l) },
                else_branch = e () => (float[B, 2] z) { z = Identity(m) }
            >
            s = Relu(o)
        }
    >
}"""
SCAN = """g (float[3, 2] x, float[2] s) => (float[2] f, float[3, 2] y) TENSORS {
    f, y = Scan <num_scan_inputs = 1,
        body = step (float[2] h, float[2] e) => (float[2] o, float[2] r) {
            u = Unsqueeze(e, axis0) m = MatMul(u, w) v = Squeeze(m, axis0) o = Add(h, v) r = Identity(o)
        }> (s, x)
}""".replace("TENSORS", TENSORS[:-1] + ", int64[1] axis0 = {0}>")
CALLS = """g (float[B, 2] x) => (float[B, 2] y) TENSORS {
    [first] h = local.Layer <f = 1.5> (x, w, b)
    r = Relu(h)
    y = local.Layer(r, w)
}
<domain: "local", opset_import: ["": 21, "local": 1]>
Layer <f: float = 2.0> (i, k, c) => (o) {
    p = local.Product(i, k)
    s = Constant <value_float: float = @f> ()
    o = Mul(p, s)
}
<domain: "local", opset_import: ["": 21]>
Product (i, k) => (o) { [mm] o = MatMul(i, k) }"""
NAMED = {
    "branches": (BRANCHES, ["choice.then_branch/fc", "choice.else_branch/fc"]),
    "loop": (LOOP, ["steps.body/linear", "steps.body/o.then_branch/z"]),
    "scan": (SCAN, ["f.body/m"]),
    "calls": (CALLS, ["first/p/mm", "y/p/mm"]),
}


def parse(text: str) -> Model:
    proto = onnx.parser.parse_model(f"{HEAD} {text.replace('TENSORS', TENSORS)}")
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto)


def content(model: Model) -> Any:
    return model.proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", NAMED)
def test_sites_inside_are_found_and_named_by_where_they_are(name: str) -> None:
    text, names = NAMED[name]
    study = study_model(parse(text))
    assert [site.name for site in study.sites] == names
    assert study.refused == ()
    onnx.checker.check_model(study.model.proto, full_check=True)


@pytest.mark.parametrize("name", NAMED)
def test_an_unchanged_flat_graph_closes_to_the_model_itself(name: str) -> None:
    model = parse(NAMED[name][0])
    before = content(model)
    flat = flatten(model)
    assert restore(flat, flat.model) is model
    copy = onnx.ModelProto()
    copy.CopyFrom(flat.model.proto)
    assert content(restore(flat, Model(copy))) == content(model) == before


@pytest.mark.parametrize("name", NAMED)
def test_a_changed_node_changes_its_body_alone(name: str) -> None:
    """Another name for one node: everything else comes back as it was."""
    model = parse(NAMED[name][0])
    flat = flatten(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(flat.model.proto)
    node = next(n for n in changed.graph.node if n.op_type == "MatMul")
    node.doc_string = "changed"
    found = restore(flat, Model(changed)).proto
    onnx.checker.check_model(found, full_check=True)
    text = onnx.printer.to_text(found)
    assert str(found).count("changed") == 1
    feeds = feeds_of(model.proto)
    for first, second in zip(run(model.proto, feeds), run(found, feeds), strict=True):
        np.testing.assert_array_equal(first, second)
    assert CLOSED_DOMAIN not in text
    assert "onnx_decompose" not in text


def feeds_of(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        value.name: np.array(True)
        if value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        else rng.normal(
            size=[d.dim_value or 4 for d in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in proto.graph.input
    }


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found: Any = session.run(None, feeds)
    return list(found)


def test_regions_join_over_calls_and_never_over_the_edge_of_a_body() -> None:
    (region,) = study_model(parse(CALLS)).regions
    assert [site.name for site in region.sites] == NAMED["calls"][1]
    study = study_model(
        parse(
            """g (float[B, 2] x, bool c) => (float[B, 2] y) TENSORS {
                h = MatMul(x, w)
                y = If (c) <
                    then_branch = one () => (float[B, 2] o) { o = MatMul(h, w) },
                    else_branch = other () => (float[B, 2] o) { o = Identity(h) }
                >
            }"""
        )
    )
    assert [[site.name for site in region.sites] for region in study.regions] == [
        ["h"],
        ["y.then_branch/o"],
    ]
    # What a body reads must be there in full.
    assert study.regions[0].exits == ("h",)


def test_a_model_without_weights_inside_is_its_own_flat_model() -> None:
    text = """g (float[B, 2] x, bool c) => (float[B, 2] y) TENSORS {
        h = MatMul(x, w)
        y = If (c) <
            then_branch = one () => (float[B, 2] o) { o = Relu(h) },
            else_branch = other () => (float[B, 2] o) { o = Identity(h) }
        >
    }"""
    model = parse(text)
    assert flatten(model).model is model


def test_names_that_would_meet_outer_ones_stay_inside() -> None:
    """A value of the main graph has the name that a body's would get."""
    model = parse(BRANCHES)
    for node in model.proto.graph.node:
        if node.op_type == "Abs":
            node.output[0] = "choice.then_branch//p"
    for branch in model.proto.graph.node[-1].attribute:
        branch.g.node[0].input[0] = "choice.then_branch//p"
    assert flatten(model).model is model


def test_tensors_of_a_body_are_those_of_the_flat_graph() -> None:
    flat = flatten(parse(BRANCHES))
    (tensor,) = (t for t in flat.model.proto.graph.initializer if t.name.endswith("//v"))
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), [[1, 2], [3, 4]])


@pytest.mark.parametrize("op", ["MatMul", "Transpose"])
def test_a_node_of_a_body_that_makes_nothing_is_bad_input_or_left_alone(op: str) -> None:
    """The checks at the border look at the main graph alone."""
    model = parse(BRANCHES)
    body = model.proto.graph.node[-1].attribute[0].g
    body.node.append(onnx.helper.make_node(op, ["h", "w"] if op == "MatMul" else [], []))
    if op == "MatMul":
        with pytest.raises(ModelError, match="a node of type MatMul makes nothing"):
            study_model(model)
    else:
        assert len(study_model(model).sites) == 2
