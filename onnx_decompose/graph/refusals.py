"""Nodes that hold weights and are left alone for what or where they are, each with the reason a user should see.

MatMul, Gemm and Conv of the main graph are the business of ``sites``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_decompose.graph.quantized import INTEGER_PRODUCTS, weight_position
from onnx_decompose.graph.sites import SITES, Refusal, is_standard, node_names
from onnx_decompose.model.renames import all_nodes, function_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.model_io import Model

__all__ = ["equation_of", "find_refusals", "holds_weights"]

_PRODUCTS = SITES | INTEGER_PRODUCTS
_RECURRENT = {"GRU", "LSTM", "RNN"}
_QUANTIZED = {
    *("ConvInteger", "QLinearConv"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4"),
    *(
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
    ),
    *("QGemm", "QMoE", "QOrderedAttention", "QOrderedLongformerAttention", "QOrderedMatMul"),
    *("GemmFloat8", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"),
    "MatMulNBitsQLoRA",
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
    *("AttnLSTM", "CausalConvWithState", "ConvTransposeWithDynamicPads"),
    *("DecoderMaskedSelfAttention", "GatedAdd", "GatedRelativePositionBias"),
    *("HyperConnectionLowRankMix", "Mamba2Verify", "MatMulPacked", "MoEGroupRouter"),
    *("MoEPacked", "NhwcConv", "NhwcFusedConv", "RouterGateUpProj", "SparseToDenseMatMul"),
    *("TransposeMatMul", "VarlenCausalConvWithState", "WordConvEmbedding"),
}
_QUANTIZED_REASON = (
    "the weight is quantized; its scales and zero points would have to be cut with it, "
    "which is not written"
)


def holds_weights(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is an operator that may hold a weight, whatever it reads."""
    if is_standard(node):
        return node.op_type in _PRODUCTS | _RECURRENT | _QUANTIZED | {"ConvTranspose", "Einsum"}
    return node.domain == "com.microsoft" and node.op_type in _QUANTIZED | _FUSED


def equation_of(node: onnx.NodeProto) -> str:
    """The equation of an Einsum; empty where it has none."""
    found = next((a.s for a in node.attribute if a.name == "equation"), b"")
    return found.decode(errors="replace")


def find_refusals(
    model: Model, constants: Constants, hidden: Mapping[str, str] | None = None
) -> tuple[Refusal, ...]:
    """Weight-holding nodes that no other module looks at, in graph order, and why each is left alone.

    Others look at MatMul, Gemm, Conv and the recurrent operators, where they know what these read to be a constant.

    Args:
        model: the model.
        constants: of its main graph.
        hidden: values that begin as a constant, and why they are none; see ``flat.Flat``.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.proto.functions}
    known = constants.names | constants.overridable
    refusals: list[Refusal] = []
    for node, name in zip(model.proto.graph.node, node_names(model.proto.graph), strict=True):
        function = functions.get(function_key(node))
        reason = (
            _reason(node, known, hidden or {})
            if function is None
            else _call_reason(node, function, known)
        )
        if reason is not None:
            refusals.append(Refusal(name, node.op_type, reason))
    return tuple(refusals)


def _reason(
    node: onnx.NodeProto, known: frozenset[str], hidden: Mapping[str, str]
) -> str | None:
    """Why ``node`` is left alone; None where it holds no weight, or others decide."""
    if is_standard(node) and node.op_type in _PRODUCTS | _RECURRENT:
        position = weight_position(node.op_type)
        weight = node.input[position : position + 1]
        return next((hidden[name] for name in weight if name in hidden), None)
    if not known.intersection(node.input):
        return None
    if node.op_type in _QUANTIZED:
        return _QUANTIZED_REASON
    return _standard_reason(node, known) if is_standard(node) else _fused_reason(node)


def _fused_reason(node: onnx.NodeProto) -> str | None:
    """Why an operator of onnxruntime's own is left alone; what those of other domains hold is not known."""
    if node.domain != "com.microsoft" or node.op_type not in _FUSED:
        return None
    return f"a fused operator of onnxruntime ({node.domain}); export the model without fusions"


def _standard_reason(node: onnx.NodeProto, known: frozenset[str]) -> str | None:
    weight = node.input[1] if len(node.input) > 1 else ""
    if node.op_type == "Einsum":
        return f"Einsum ({equation_of(node)}) is not taken apart; export it as a MatMul"
    if weight not in known:
        return None
    if node.op_type == "ConvTranspose":
        return "a transposed convolution; its channels are not taken apart"
    return None


def _call_reason(
    node: onnx.NodeProto, function: onnx.FunctionProto, known: frozenset[str]
) -> str | None:
    """Why a call of a model-local function is left alone; None where no weight is at stake.

    Other calls were opened (``flat``).
    """
    inside = list(all_nodes(function.node))
    held = sorted({inner.op_type for inner in inside if holds_weights(inner)})
    if not held or not (
        known.intersection(node.input) or any(inner.op_type == "Constant" for inner in inside)
    ):
        return None
    return (
        f"a call of the model-local function {function.domain}.{function.name}, which holds {', '.join(held)} "
        "and does not fit into the main graph: it imports other operator sets, calls itself or hands on an input"
    )
