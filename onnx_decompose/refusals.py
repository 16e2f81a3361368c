"""Nodes that hold weights and are left alone for what or where they are, each with the reason a user should see.

MatMul and Gemm of the main graph are the business of ``sites``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.sites import Refusal, attribute_values, is_standard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx

    from onnx_decompose.constants import Constants
    from onnx_decompose.model_io import Model

__all__ = ["find_refusals"]

_PRODUCTS = {"MatMul", "Gemm"}
_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_RECURRENT = {"GRU", "LSTM", "RNN"}
_QUANTIZED = {
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4"),
    *(
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
    ),
    *("QGemm", "QMoE", "QOrderedAttention", "QOrderedMatMul"),
}
_FUSED = {
    *(
        "Attention",
        "BiasGelu",
        "DecoderAttention",
        "DecoderMaskedMultiHeadAttention",
        "FusedConv",
    ),
    *(
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "GemmFastGelu",
        "GroupQueryAttention",
    ),
    *(
        "LongformerAttention",
        "MoE",
        "MultiHeadAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
    ),
    *("TransposeMatMul",),
}
_QUANTIZED_REASON = (
    "the weight is quantized; its scales and zero points would have to be cut with it, "
    "which is not written"
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Scope:
    """What is known where a node stands.

    Attributes:
        known: values that no input of the model can change, and initializers that a caller may override.
        states: inputs of a loop's body that begin as such a value.
        functions: the model's own, by domain and name.
        owner: the node and attribute whose subgraph this is; empty in the main graph.
    """

    known: frozenset[str]
    functions: Mapping[tuple[str, str], onnx.FunctionProto]
    states: frozenset[str] = frozenset()
    owner: str = ""

    def label(self, node: onnx.NodeProto) -> str:
        """What messages call ``node``."""
        name = node.name or next(iter(node.output), "")
        return f"{self.owner}/{name}" if self.owner else name

    def inside(self, node: onnx.NodeProto, attribute: str, graph: onnx.GraphProto) -> _Scope:
        """The scope of a subgraph of ``node``; names of its inputs hide outer ones."""
        inputs = [value.name for value in graph.input]
        # The inputs of a Loop's body and of a Scan's are those of the node, in order, Loop's condition
        # and iteration number included.
        states = {
            inner
            for inner, outer in zip(inputs, node.input, strict=False)
            if outer in self.known or outer in self.states
        }
        known = set(self.known - set(inputs))
        known |= {tensor.name for tensor in graph.initializer}
        known |= {sparse.values.name for sparse in graph.sparse_initializer}
        for inner in graph.node:
            # What a body computes from constants alone is the same in every run of it.
            if inner.op_type == "Constant" or (
                inner.input and known.issuperset(filter(None, inner.input))
            ):
                known.update(inner.output)
        return _Scope(
            frozenset(known),
            self.functions,
            frozenset(states),
            f"{self.label(node)}.{attribute}",
        )


def find_refusals(model: Model, constants: Constants) -> tuple[Refusal, ...]:
    """Weight-holding nodes that no other module looks at, in graph order, and why each is left alone.

    Others look at MatMul, Gemm and the recurrent operators of the main graph.

    Args:
        model: the model.
        constants: of its main graph.
    """
    functions = {(f.domain, f.name): f for f in model.proto.functions}
    scope = _Scope(constants.names | constants.overridable, functions)
    return tuple(_in_graph(model.proto.graph, scope))


def _in_graph(graph: onnx.GraphProto, scope: _Scope) -> Iterator[Refusal]:
    for node in graph.node:
        reason = _reason(node, scope)
        if reason is not None:
            yield Refusal(scope.label(node), node.op_type, reason)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _in_graph(inner, scope.inside(node, attribute.name, inner))


def _reason(node: onnx.NodeProto, scope: _Scope) -> str | None:
    """Why ``node`` is left alone; None where it holds no weight, or others decide."""
    function = scope.functions.get((node.domain, node.op_type))
    if function is not None:
        return _call_reason(node, function, scope)
    if is_standard(node) and node.op_type in _PRODUCTS | _RECURRENT:
        return _product_reason(node, scope) if scope.owner else None
    if not scope.known.intersection(node.input):
        return None
    if node.op_type in _QUANTIZED:
        return _QUANTIZED_REASON
    return _standard_reason(node, scope.known) if is_standard(node) else _fused_reason(node)


def _fused_reason(node: onnx.NodeProto) -> str | None:
    """Why an operator of onnxruntime's own is left alone; what those of other domains hold is not known."""
    if node.domain != "com.microsoft" or node.op_type not in _FUSED:
        return None
    return f"a fused operator of onnxruntime ({node.domain}); export the model without fusions"


def _product_reason(node: onnx.NodeProto, scope: _Scope) -> str | None:
    """Why a product or a recurrent operator in a subgraph is left alone."""
    if any(name in scope.known for name in node.input[:2]):
        return "it is inside a subgraph; only the main graph is rewritten"
    if scope.states.intersection(node.input[1:2]):
        return "its weight is a state of the loop, which an iteration may change"
    return None


def _standard_reason(node: onnx.NodeProto, known: frozenset[str]) -> str | None:
    weight = node.input[1] if len(node.input) > 1 else ""
    if node.op_type == "Einsum":
        equation = attribute_values(node).get("equation", b"").decode()
        return f"Einsum ({equation}) is not taken apart; export it as a MatMul"
    if weight not in known:
        return None
    if node.op_type in _CONVOLUTIONS:
        if set(attribute_values(node).get("kernel_shape", (0,))) == {1}:
            return "a 1x1 convolution; it is not written as a grouped one"
        return "a convolution; channels are not taken apart"
    return None


def _call_reason(
    node: onnx.NodeProto, function: onnx.FunctionProto, scope: _Scope
) -> str | None:
    """Why a call of a model-local function is left alone; None where no weight is at stake."""
    ops = {inner.op_type for inner in function.node}
    held = ops & (_PRODUCTS | _CONVOLUTIONS | _RECURRENT | _QUANTIZED | {"Einsum"})
    if not held or not (scope.known.intersection(node.input) or "Constant" in ops):
        return None
    return (
        f"a call of the model-local function {function.domain}.{function.name}, which holds "
        f"{', '.join(sorted(held))}; functions are not opened, inline them first"
    )
