"""Which nodes are taken together, and where a region begins and ends."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.graph import regions
from onnx_decompose.graph.study import Study, state_graph, study_model
from onnx_decompose.model.model_io import Model

if TYPE_CHECKING:
    from onnx_decompose.graph.regions import Region


def study_of(
    body: str,
    constants: dict[str, tuple[int, ...]],
    head: str = "float[B, 4] x",
    tail: str = "float[B, 4] y",
    opsets: str = '"": 20',
) -> Study:
    proto = onnx.parser.parse_model(
        f"<ir_version: 8, opset_import: [{opsets}]> g ({head}) => ({tail}) {body}"
    )
    for name, shape in constants.items():
        tensor = numpy_helper.from_array(np.ones(shape, np.float32), name)
        proto.graph.initializer.append(tensor)
    return study_model(Model(proto))


def made(study: Study, region: Region) -> list[str]:
    return [study.model.proto.graph.node[index].output[0] for index in region.nodes]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A region in words: what it makes, its borders, its axes."""

    made: list[str]
    entries: list[str]
    exits: list[str]
    axis_sizes: list[int]

    @classmethod
    def of(cls, study: Study, region: Region) -> Shape:
        return cls(
            made(study, region),
            sorted(region.entries),
            sorted(region.exits),
            list(region.axis_sizes),
        )


def only(study: Study) -> Shape:
    (region,) = study.regions
    assert {region.axis_of[name] for name in region.entries} == region.entry_axes
    assert {region.axis_of[name] for name in region.exits} == region.exit_axes
    return Shape.of(study, region)


FFN = {"w1": (4, 8), "b1": (8,), "w2": (8, 4), "b2": (4,)}


def test_a_chain_is_one_region_from_the_first_site_to_the_last_bias() -> None:
    study = study_of(
        """{ n = Tanh(x) h = MatMul(n, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2)
            c = Add(b2, o) y = Sigmoid(c) }""",
        FFN,
    )
    # Elementwise ops before the first site or after the last bias gain nothing from branches.
    assert only(study) == Shape(["h", "a", "r", "o", "c"], ["n"], ["c"], [4, 8, 4])


def test_gelu_in_primitives() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) d = Div(h, root) e = Erf(d) p = Add(e, one) m = Mul(h, p)
            g = Mul(m, half) y = MatMul(g, w2) }""",
        FFN | {"root": (), "one": (1,), "half": (1, 1)},
    )
    assert only(study) == Shape(["h", "d", "e", "p", "m", "g", "y"], ["x"], ["y"], [4, 8, 4])


def test_the_gate_of_a_swiglu_shares_the_axis_of_its_partner() -> None:
    study = study_of(
        """{ g = MatMul(x, wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, wu) m = Mul(a, u)
            y = MatMul(m, w2) }""",
        {"wg": (4, 8), "wu": (4, 8), "w2": (8, 4)},
    )
    assert only(study) == Shape(["g", "s", "a", "u", "m", "y"], ["x"], ["y"], [4, 8, 4])


def test_residual_blocks_share_one_axis() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2) s = Add(x, o)
            i = MatMul(s, w3) q = Relu(i) p = MatMul(q, w4) y = Add(p, s) }""",
        {"w1": (4, 8), "w2": (8, 4), "w3": (4, 6), "w4": (6, 4)},
    )
    # The last Add has no constant and no site after it: it is left outside, so s is read there too.
    assert only(study) == Shape(
        ["h", "r", "o", "s", "i", "q", "p"], ["x"], ["p", "s"], [4, 8, 6, 4]
    )


def test_layer_normalization_couples_units() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2) n = LayerNormalization(o, scale)
            y = MatMul(n, w3) }""",
        {"w1": (4, 8), "w2": (8, 4), "scale": (4,), "w3": (4, 4)},
    )
    assert [Shape.of(study, region) for region in study.regions] == [
        Shape(["h", "r", "o"], ["x"], ["o"], [4, 8, 4]),
        Shape(["y"], ["n"], ["y"], [4, 4]),
    ]


def test_sites_that_read_one_value_are_one_region() -> None:
    study = study_of(
        """{ q = MatMul(x, wq) k = MatMul(x, wk) kb = Add(k, b) v = MatMul(x, wv)
            y = Einsum <equation = "bi,bi,bi->bi"> (q, kb, v) }""",
        {"wq": (4, 4), "wk": (4, 4), "wv": (4, 4), "b": (4,)},
    )
    assert only(study) == Shape(["q", "k", "kb", "v"], ["x"], ["kb", "q", "v"], [4] * 4)


def test_a_broadcast_operand_from_outside_takes_no_part() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) last = Constant <value_ints = [-1]> () m = ReduceMean(h, last)
            d = Sub(h, m)
            y = MatMul(d, w2) } """,
        {"w1": (4, 8), "w2": (8, 4)},
    )
    # The mean needs all units of h, so h is joined for it; the subtraction runs in branches.
    assert only(study) == Shape(["h", "d", "y"], ["x"], ["h", "y"], [4, 8, 4])


def test_a_broadcast_operand_from_inside_is_an_exit() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) g = MatMul(x, wg) s = Sigmoid(g) m = Mul(h, g) y = MatMul(m, w2)
            z = Abs(s) }""",
        {"w1": (4, 8), "wg": (4, 1), "w2": (8, 4)},
        tail="float[B, 4] y, float[B, 1] z",
    )
    # The single unit of g feeds every unit of m, which no edge of the state graph says.
    assert only(study) == Shape(["h", "g", "m", "y"], ["x"], ["g", "y"], [4, 8, 1, 4])


def test_values_captured_by_subgraphs_are_exits() -> None:
    study = study_of(
        """{ h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2)
            y = If (c) <
                then_branch = t () => (float[B, 4] p) { q = ReduceSum(r) p = Add(o, q) },
                else_branch = e () => (float[B, 4] p) {
                    p = If (c) <
                        then_branch = u () => (float[B, 4] d) { d = Abs(o) },
                        else_branch = v () => (float[B, 4] d) { f = ReduceMax(h) d = Sub(o, f) }
                    >
                }
            > }""",
        FFN,
        head="float[B, 4] x, bool c",
    )
    assert only(study) == Shape(["h", "r", "o"], ["x"], ["h", "o", "r"], [4, 8, 4])


def test_a_graph_output_is_an_exit() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }",
        FFN,
        tail="float[B, 4] y, float[B, 8] r",
    )
    assert only(study).exits == ["r", "y"]


@pytest.mark.parametrize("before", ["u = ex.Magic(x)", "u = missing.Magic(x)"])
def test_without_shapes_the_weights_tell_the_sizes(before: str) -> None:
    study = study_of(
        f"{{ {before} h = MatMul(u, w1) a = Add(h, b1) r = Relu(a) y = MatMul(r, w2) }}",
        FFN,
        opsets='"": 20, "ex": 1',
    )
    assert only(study) == Shape(["h", "a", "r", "y"], ["u"], ["y"], [4, 8, 4])


def test_an_operand_of_unknown_size_ends_the_region() -> None:
    study = study_of(
        "{ u = ex.Magic(x) h = MatMul(x, w1) m = Mul(h, u) y = MatMul(m, w2) }",
        FFN,
        opsets='"": 20, "ex": 1',
    )
    assert [made(study, region) for region in study.regions] == [["h"], ["y"]]


def test_ops_of_other_domains_are_not_elementwise() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) r = ex.Relu(h) y = MatMul(r, w2) }", FFN, opsets='"": 20, "ex": 1'
    )
    assert [made(study, region) for region in study.regions] == [["h"], ["y"]]


def test_broadcasting_as_in_operator_set_6_ends_the_region() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) a = Add <broadcast = 1, axis = 1> (h, b1) y = MatMul(a, w2) }",
        FFN,
        opsets='"": 6',
    )
    assert [made(study, region) for region in study.regions] == [["h"], ["y"]]


def test_a_constant_operand_that_widens_the_units_ends_the_region() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) a = Mul(h, b1) y = MatMul(a, w2) }",
        {"w1": (4, 1), "b1": (8,), "w2": (8, 4)},
    )
    assert [made(study, region) for region in study.regions] == [["h"], ["y"]]


def test_an_overridable_bias_is_cut_like_any_value() -> None:
    study = study_of(
        "<float[8] b = {0, 0, 0, 0, 0, 0, 0, 0}>"
        "{ h = MatMul(x, w1) a = Add(h, b) y = MatMul(a, w2) }",
        FFN,
        head="float[B, 4] x, float[8] b",
    )
    assert only(study) == Shape(["h", "a", "y"], ["b", "x"], ["y"], [4, 8, 4])


def test_parts_are_the_sites_alone_with_their_biases() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) a = Add(h, b1) r = Relu(a) o = MatMul(r, w2) y = Add(o, b2) }", FFN
    )
    (region,) = study.regions
    assert [Shape.of(study, part) for part in study.parts(region)] == [
        Shape(["h", "a"], ["x"], ["a"], [4, 8]),
        Shape(["o", "y"], ["r"], ["y"], [8, 4]),
    ]
    assert study.parts(study.parts(region)[0]) == ()


def test_the_state_graph_has_one_edge_per_site() -> None:
    study = study_of(
        "{ h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2) s = Add(o, x) y = MatMul(s, w3) }",
        FFN | {"w3": (4, 4)},
    )
    masks = {site.name: np.ones(site.shape, bool) for site in study.sites}
    graph = state_graph(study, study.regions[0], masks)
    assert graph.axis_sizes == (4, 8, 4)
    assert [(edge.source, edge.target) for edge in graph.edges] == [(0, 1), (1, 0), (0, 2)]
    # The activation after a site is a part of its product.
    assert (graph.fused, graph.elementwise) == ((1,), (0,))
    assert (graph.entries, graph.exits) == ((0,), (2,))
    assert graph.itemsize == 4


@pytest.mark.parametrize(("opset", "kept"), [(9, False), (11, True)])
def test_before_operator_set_11_a_value_of_unknown_rank_cannot_be_cut(
    opset: int, kept: bool
) -> None:
    study = study_of(
        "{ u = ex.Magic(x) h = MatMul(u, w1) r = Relu(h) y = MatMul(r, w2) }",
        FFN,
        opsets=f'"": {opset}, "ex": 1',
    )
    assert [site.name for site in study.sites] == (["h", "y"] if kept else [])
    assert len(study.regions) == kept
    reason = (
        "the rank of 'u' is not known, and operator set 9 cannot count axes from the last; "
        "convert the model to operator set 11 or later"
    )
    assert [refusal.reason for refusal in study.refused] == ([] if kept else [reason] * 2)


def test_ir_version_3_is_refused() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 3, opset_import: ["": 9]> g (float[B, 2] x) => (float[B, 2] y) {
        w = Constant <value = float[2, 2] {1, 0, 0, 1}> () y = MatMul(x, w) }"""
    )
    study = study_model(Model(proto))
    assert (study.sites, study.regions) == ((), ())
    assert study.refused[0].reason.startswith("IR version 3 has no initializers that are not")


def test_a_value_that_makes_itself_leads_to_no_quantizer() -> None:
    graph = onnx.parser.parse_graph(
        "g (float[B, 2] x, float[2, 2] w) => (float[B, 2] b) { a = MatMul(x, w) b = Mul(a, b) }"
    )
    readers = {"x": {0}, "w": {0}, "a": {1}, "b": {1}}
    found = regions._up_to_quantizer(graph, 0, {1: ("b", "a")}, readers)
    assert found == set()
