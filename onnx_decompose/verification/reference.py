"""What a model computes but for rounding: its float64 form, run in onnxruntime or node by node."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator

from onnx_decompose.analysis.recurrence import CELLS
from onnx_decompose.errors import ModelError
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.model.tensors import is_float
from onnx_decompose.runtime.sessions import Provider, Session, open_session
from onnx_decompose.verification.reference_ops import float64_operators
from onnx_decompose.verification.widened import float_bytes, nodes_of, obstacle, widened

if TYPE_CHECKING:
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.feeds import Feeds

__all__ = ["Reference", "open_reference"]

logger = logging.getLogger(__name__)

_MOST_BYTES = 1 << 30
"""Of float64 weights; a larger model is not copied into float64."""


@dataclasses.dataclass(slots=True, eq=False)
class Reference:
    """A model in float64; made by :func:`open_reference`.

    Attributes:
        how: what runs it, for reports.
        slow: whether it runs node by node.
    """

    how: str
    slow: bool
    _runner: Session | ReferenceEvaluator
    _outputs: tuple[str, ...]

    def run(self, feeds: Feeds) -> Feeds:
        """The outputs, floats as float64.

        Raises:
            ModelError: an operator cannot be run in float64.
        """
        wide = {
            name: array.astype(np.float64) if is_float(array.dtype) else array
            for name, array in feeds.items()
        }
        if isinstance(self._runner, Session):
            return self._runner.run(wide)
        try:
            with np.errstate(all="ignore"):
                found: Any = self._runner.run(list(self._outputs), wide)
        except Exception as error:  # the operators' implementations raise whatever they like
            raise ModelError(f"not in float64: {_first_line(error)}") from error
        return dict(zip(self._outputs, found, strict=True))


def open_reference(model: Model) -> Reference | str:
    """The model in float64, or why there is none, in a few words."""
    if float_bytes(model) > _MOST_BYTES:
        return f"its weights take more than {_MOST_BYTES >> 30} GiB in float64"
    reason = obstacle(model)
    if reason is not None:
        return reason
    proto = widened(model)
    outputs = tuple(value.name for value in proto.graph.output)
    if not any(node.op_type in CELLS for node in nodes_of(proto)):
        try:
            session = open_session(proto.SerializeToString(), Provider.CPU, label="float64")
            return Reference("onnxruntime in float64", False, session, outputs)
        except (ModelError, ValueError) as error:
            logger.debug("%s: node by node in float64, because %s", model.label, error)
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        operators = float64_operators(nodes_of(proto), opset_of(proto))
        runner = ReferenceEvaluator(proto, new_ops=operators)
    except Exception as error:  # as in run
        return f"not in float64: {_first_line(error)}"
    return Reference("float64, node by node", True, runner, outputs)


def _first_line(error: BaseException) -> str:
    """Of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
