"""Operators in float64, one node at a time: onnxruntime's kernel where it has one, numpy elsewhere.

They extend the standard's own reference implementation (onnx.reference). Of it come control flow and what
onnxruntime has no float64 kernel for; not its recurrent operators, which ignore some attributes, nor its Erf, which
computes in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op
from scipy.special import erf

from onnx_decompose.analysis.cells import CellInputs, cell_activations, run_cell
from onnx_decompose.analysis.convolution import convolution
from onnx_decompose.errors import ModelError
from onnx_decompose.runtime.sessions import Provider, Session, SessionSettings, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["float64_operators"]

_CONTROL = {"If", "Loop", "Scan", "SequenceMap", "Constant"}


def float64_operators(nodes: Iterable[onnx.NodeProto], opset: int) -> list[type[OpRun]]:
    """Implementations for every operator among ``nodes`` that the standard's own one is not taken for."""
    names = {node.op_type for node in nodes if node.domain in {"", "ai.onnx"}}
    own: dict[str, type[OpRun]] = {"Erf": _Erf, "RNN": _Recurrent, "GRU": _Recurrent}
    own.update(LSTM=_Recurrent, GlobalMaxPool=_GlobalMaxPool, Conv=_Conv)
    made: list[type[OpRun]] = []
    for name in sorted(names - _CONTROL):
        base = own.get(name, _InRuntime)
        made.append(type(name, (base,), {"op_domain": "", "opset": opset}))
    return made


class _Erf(OpRun):
    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (np.asarray(erf(x)),)


class _GlobalMaxPool(OpRun):
    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (np.asarray(x.max(axis=tuple(range(2, x.ndim)), keepdims=True)),)


class _Conv(OpRun):
    def _run(
        self, x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None = None, **attributes: Any
    ) -> tuple[NDArray[Any]]:
        y = convolution(
            x,
            w,
            strides=attributes.get("strides"),
            dilations=attributes.get("dilations"),
            pads=attributes.get("pads"),
            auto_pad=attributes.get("auto_pad") or "NOTSET",
        )
        return (y if b is None else y + b.reshape(-1, *(1,) * (x.ndim - 2)),)


class _InRuntime(OpRun):
    """A node as a model of its own in onnxruntime; by the standard's implementation where that has no kernel."""

    opset = 1

    def __init__(self, onnx_node: onnx.NodeProto, run_params: dict[str, Any]) -> None:
        super().__init__(onnx_node, run_params)
        self._params = run_params
        self._sessions: dict[tuple[Any, ...], Session | None] = {}
        self._standard: OpRun | None = None

    def _run(self, *inputs: Any, **_: Any) -> tuple[Any, ...]:
        if all(isinstance(value, np.ndarray) or value is None for value in inputs):
            kinds = tuple(
                (value.dtype.name, value.ndim) if value is not None else None
                for value in inputs
            )
            if kinds not in self._sessions:
                self._sessions[kinds] = self._open(inputs)
            session = self._sessions[kinds]
            if session is not None:
                given = {f"x{n}": value for n, value in enumerate(inputs) if value is not None}
                return tuple(session.run(given).values())
        standard: Any = self._standard
        if standard is None:
            kind = load_op("", self.onnx_node.op_type, self.opset)
            standard = self._standard = kind(self.onnx_node, self._params)
        found: tuple[Any, ...] = standard.run(*inputs)
        return found

    def _open(self, inputs: tuple[Any, ...]) -> Session | None:
        node = onnx.NodeProto()
        node.CopyFrom(self.onnx_node)
        names = [f"x{n}" if value is not None else "" for n, value in enumerate(inputs)]
        node.input[:] = names
        node.output[:] = [f"y{n}" if name else "" for n, name in enumerate(node.output)]
        graph = helper.make_graph(
            [node],
            "node",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
                )
                for name, value in zip(names, inputs, strict=True)
                if value is not None
            ],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        try:
            return open_session(
                model.SerializeToString(), Provider.CPU, SessionSettings(optimize=False)
            )
        except ModelError:
            return None


class _Recurrent(OpRun):
    def _run(  # noqa: PLR0913, PLR0917 (the operators' attributes)
        self,
        x: NDArray[Any],
        w: NDArray[Any],
        r: NDArray[Any],
        b: NDArray[Any] | None = None,
        sequence_lens: NDArray[Any] | None = None,
        initial_h: NDArray[Any] | None = None,
        initial_c: NDArray[Any] | None = None,
        p: NDArray[Any] | None = None,
        **attributes: Any,
    ) -> tuple[Any, ...]:
        kind: Any = self.onnx_node.op_type
        if attributes.get("clip") is not None:
            raise ValueError("clipped gates")
        batch_first = bool(attributes.get("layout"))
        x = x.swapaxes(0, 1) if batch_first else x
        count, hidden = w.shape[0], r.shape[2]
        state = (count, x.shape[1], hidden)

        def initial(values: NDArray[Any] | None) -> NDArray[Any]:
            if values is None:
                return np.zeros(state)
            return values.swapaxes(0, 1) if batch_first else values

        direction = attributes.get("direction") or "forward"
        reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        y, h, c = run_cell(
            kind,
            CellInputs(
                x,
                w,
                r,
                np.zeros((count, 2 * w.shape[1])) if b is None else b,
                sequence_lens,
                initial(initial_h),
                initial(initial_c),
                np.zeros((count, 3 * hidden)) if p is None else p,
            ),
            cell_activations(
                kind,
                count,
                attributes.get("activations"),
                attributes.get("activation_alpha"),
                attributes.get("activation_beta"),
            ),
            reverse=reverse[direction],
            linear_before_reset=bool(attributes.get("linear_before_reset")),
            input_forget=bool(attributes.get("input_forget")),
        )
        if batch_first:
            y, h, c = y.transpose(2, 0, 1, 3), h.swapaxes(0, 1), c.swapaxes(0, 1)
        return (y, h, c)[: max(len(self.onnx_node.output), 1)]
