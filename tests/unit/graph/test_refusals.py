"""Every node that holds a weight and is left alone says why."""

from __future__ import annotations

import importlib
from typing import Any

import onnx
import onnx.parser
import pytest

from onnx_decompose.graph.flat import flatten
from onnx_decompose.graph.refusals import find_refusals, holds_weights
from onnx_decompose.graph.sites import find_sites
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1, "local": 1, "other": 1]>'
MATRIX = "float[2, 2] w = {1, 0, 0, 1}"
BYTES = "int8[2, 2] q = {1, 0, 0, 1}, float s = {0.5}, int8 z = {0}"

QUANTIZED = (
    "the weight is quantized; its scales and zero points would have to be cut with it, "
    "which is not written"
)
FUSED = "a fused operator of onnxruntime (com.microsoft); export the model without fusions"
COMPUTED = "the weight is not stored as floats but computed from constants"


def refused(text: str) -> dict[str, str]:
    """Reasons by node name, those of ``sites`` included; no node of the model may be a site."""
    flat = flatten(Model(onnx.parser.parse_model(f"{HEAD} {text}")))
    constants = Constants(flat.model)
    sites, refusals = find_sites(flat.model, constants)
    assert sites == ()
    others = find_refusals(flat.model, constants, flat.hidden)
    return {r.node: r.reason for r in (*refusals, *others)}


def graph(body: str, tensors: str = MATRIX, head: str = "float[B, 2] x") -> str:
    return f"g ({head}) => (float[B, 2] y) <{tensors}> {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "tensors", "reason"),
    [
        ("d = Neg(w) y = MatMul(x, d)", MATRIX, f"{COMPUTED} (Neg)"),
        ("t = Transpose(d) y = MatMul(x, t) d = Neg(w)", MATRIX, None),
        (
            "d = ConstantOfShape(n) y = MatMul(x, d)",
            "int64[2] n = {2, 2}",
            f"{COMPUTED} (INT64, ConstantOfShape)",
        ),
        (
            "d = DequantizeLinear <axis = 0, block_size = 1> (q, c, k) y = MatMul(x, d)",
            f"{BYTES}, float[2, 2] c = {{1, 2, 3, 4}}, int8[2, 2] k = {{0, 0, 0, 0}}",
            "the weight is quantized in blocks: its scales are no lines of it",
        ),
        (
            "d = DequantizeLinear(q, s) y = MatMul(x, d)",
            "int4[2, 2] q = {1, 0, 0, 1}, float s = {0.5}",
            "the weight is stored as INT4, several numbers to a byte",
        ),
        (
            "f = Cast <to = 1> (q) c = Sub(f, h) d = Mul(c, s) y = MatMul(x, d)",
            f"{BYTES}, float h = {{0.5}}",
            "the weight's zero point is not one of the numbers that are stored",
        ),
        (
            "f = Cast <to = 1> (q) d = Add(f, s) y = MatMul(x, d)",
            BYTES,
            f"{COMPUTED} (INT8, Cast, Add)",
        ),
        (
            "m = Mul(s, v) d = DequantizeLinear(q, m, z) y = MatMul(x, d)",
            f"{BYTES}, float v = {{2}}",
            f"{COMPUTED} (INT8, Mul, DequantizeLinear)",
        ),
        (
            "a, b, c = DynamicQuantizeLinear(x) i = MatMulInteger(q, a, z, c) y = Cast <to = 1> (i)",
            BYTES,
            "the constant is on the left side",
        ),
        (
            "a, b, c = DynamicQuantizeLinear(x) i = MatMulInteger(a, q, c, c) y = Cast <to = 1> (i)",
            BYTES,
            "the weight's scale or zero point 'c' is not a constant",
        ),
        (
            "a = QuantizeLinear(x, s, z) b = QLinearMatMul(a, s, z, q, s, z, c, z) y = Cast <to = 1> (b)",
            f"{BYTES}, float[2] c = {{1, 2}}",
            "'c' is not one number for the whole tensor",
        ),
        (
            "a = QuantizeLinear(x, s, z) b = ConvInteger(a, q, z) y = Cast <to = 1> (b)",
            BYTES,
            QUANTIZED,
        ),
        *(
            (f"y = com.microsoft.{op}(x, q, s)", BYTES, QUANTIZED)
            for op in (
                *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4"),
                *("MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QAttention"),
                *("QEmbedLayerNormalization", "QGemm", "QMoE", "QOrderedAttention"),
                "QOrderedMatMul",
            )
        ),
        ("y = com.microsoft.FusedMatMul(x, w)", MATRIX, FUSED),
        ("y = com.microsoft.FusedGemm(x, w)", MATRIX, FUSED),
        ("y = com.microsoft.Attention(x, w)", MATRIX, FUSED),
        ("y = com.microsoft.MultiHeadAttention(x, x, x, w)", MATRIX, FUSED),
        (
            'y = Einsum <equation = "bi,ij->bji"> (x, w)',
            MATRIX,
            "Einsum (bi,ij->bji) is not taken apart; export it as a MatMul",
        ),
        (
            "y = ConvTranspose <kernel_shape = [1]> (x, k)",
            "float[2, 2, 1] k = {0, 0, 0, 0}",
            "a transposed convolution; its channels are not taken apart",
        ),
        (
            "y = Conv <group = 2> (x, k)",
            "float[2, 1, 1] k = {0, 0}",
            "the convolution has 2 groups already",
        ),
        ("y = Conv (x, k, x)", "float[2, 2, 1] k = {0, 0, 0, 0}", "the bias is not a constant"),
        *(
            (f"y = {op} <hidden_size = 1> (x, r, r)", "float[1, 1, 2] r = {0, 0}", None)
            for op in ("GRU", "LSTM", "RNN")
        ),  # recurrent.find_recurrent decides
    ],
)
def test_every_operator_that_is_left_alone(body: str, tensors: str, reason: str | None) -> None:
    reasons = refused(graph(body, tensors))
    assert list(reasons.values()) == ([] if reason is None else [reason])


@pytest.mark.parametrize(
    "body",
    [
        "y = other.Attention(x, w)",  # what a foreign operator holds is not known
        "y = com.microsoft.FusedMatMul(x, x)",
        "y = Conv <kernel_shape = [1]> (x, x)",
        "y = Add(x, w)",
        'y = Einsum <equation = "bi,bi->bi"> (x, x)',
    ],
)
def test_nodes_without_a_weight_are_no_refusals(body: str) -> None:
    assert refused(graph(body)) == {}


def test_random_values_are_not_constants() -> None:
    text = graph("r = RandomNormalLike(w) y = MatMul(x, r)")
    assert refused(text) == {}


def loop(body: str, states: str = "float[B, 2] h", extra: str = "") -> str:
    """A Loop whose body reads ``w`` of the outer scope."""
    return (
        f"g (float[B, 2] x) => (float[B, 2] y) <{MATRIX}, int64 n = {{3}}, bool c = {{1}}> {{ "
        f"y{extra} = Loop (n, c, x{', w' if extra else ''}) <body = inner (int64 i, bool k, {states}) => "
        f"(bool j, float[B, 2] o{', float[2, 2] v' if extra else ''}) {{ j = Identity(k) {body} }}> }}"
    )


def test_a_weight_that_is_a_state_of_a_loop() -> None:
    text = loop(
        "v = Identity(u) o = MatMul(h, u)", "float[B, 2] h, float[2, 2] u", extra=", last"
    )
    assert refused(text) == {
        "y.body/o": "its weight is a state of the loop, which an iteration may change"
    }


def test_a_state_hides_an_outer_weight_of_its_name() -> None:
    text = loop("o = MatMul(h, q) q = Neg(h)")
    assert refused(text) == {}
    text = loop("o = MatMul(w, h)", "float[B, 2] w").replace("MatMul(w, h)", "MatMul(w, w)")
    assert refused(text) == {}


def test_weights_that_a_subgraph_stores_itself() -> None:
    text = loop(
        "c2 = Constant <value = float[2, 2] {1, 2, 3, 4}> () d = Neg(c2) o = MatMul(h, d)"
    )
    assert refused(text) == {"y.body/o": f"{COMPUTED} (Neg)"}


def test_a_weight_that_the_outer_scope_computes() -> None:
    text = loop("o = MatMul(h, d)").replace("{ y = Loop", "{ d = Neg(w) y = Loop")
    assert refused(text) == {"y.body/o": f"{COMPUTED} (Neg)"}


def test_an_outer_weight_that_can_be_overridden() -> None:
    text = loop("o = MatMul(h, w)").replace("(float[B, 2] x)", "(float[B, 2] x, float[2, 2] w)")
    assert refused(text) == {
        "y.body/o": "the weight is also a graph input, so it can be overridden at run time"
    }


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (20, "(a, b) => (o) { o = MatMul(a, b) }"),
        (21, "(a, b) => (a) { o = MatMul(a, b) }"),
        (21, "(a, b) => (o) { p = MatMul(a, b) o = local.Linear(p, b) }"),
    ],
)
def test_a_call_that_cannot_be_opened(opset: int, body: str) -> None:
    text = (
        f"{graph('y = local.Linear(x, w)')} "
        f'<domain: "local", opset_import: ["": {opset}, "local": 1]> Linear {body}'
    )
    assert refused(text) == {
        "y": "a call of the model-local function local.Linear, which holds MatMul and does not fit into the main "
        "graph: it imports other operator sets, calls itself or hands on an input"
    }


def test_a_call_of_a_function_without_weights_is_no_refusal() -> None:
    function = '<domain: "local", opset_import: ["": 21]> Twice (a) => (o) { o = Add(a, a) }'
    text = f"{graph('y = local.Twice(x)')} {function}"
    assert refused(text) == {}


NO_MATRIX = {
    *("CDist", "ComplexMul", "ComplexMulConj", "MulInteger", "QLinearAdd", "QLinearMul"),
    *("DynamicSparseAttention", "PackedSparseAttentionIndexer", "PagedAttention"),
    *("SparseAttentionIndexer", "SparsePagedAttention", "QOrderedLayerNormalization"),
    "TorchEmbedding",
}
"""Operators of onnxruntime with an input of such a name that is a table, a norm's scale or no weight at all."""


def test_every_operator_of_onnxruntime_that_holds_a_weight_is_known() -> None:
    """By the names of its inputs; a newer onnxruntime may bring more."""
    runtime: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")

    holders = {
        schema.name
        for schema in runtime.get_all_operator_schema()
        if schema.domain == "com.microsoft"
        and any(
            one.name in {"B", "R", "W"} or "weight" in one.name.lower() for one in schema.inputs
        )
    }
    assert len(holders) > 40
    unknown = {
        name
        for name in holders - NO_MATRIX
        if not holds_weights(onnx.NodeProto(op_type=name, domain="com.microsoft"))
    }
    assert unknown == set()
