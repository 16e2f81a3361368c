"""What a pass promises, and the proof: requires before, ensures after, a truthful ``modified``."""

from __future__ import annotations

import abc
import dataclasses
import logging
from typing import TYPE_CHECKING

import onnx

from onnx_decompose.errors import PassError
from onnx_decompose.model.shapes import skeleton

if TYPE_CHECKING:
    from onnx_decompose.model.model_io import Model

logger = logging.getLogger(__name__)

__all__ = ["GraphPass", "PassResult", "check_model"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """What a pass made.

    Attributes:
        model: a new model, or the given one if nothing was modified.
        modified: whether it differs from the given one.
    """

    model: Model
    modified: bool


class GraphPass(abc.ABC):
    """A transformation of a model that never changes the model it is given."""

    def __call__(self, model: Model) -> PassResult:
        """Run the pass and check its contract.

        Raises:
            PassError: the contract is broken.
        """
        self.requires(model)
        result = self.call(model)
        if result.modified != (result.model is not model):
            raise PassError(f"{type(self).__name__}: 'modified' does not say what happened")
        if result.modified:
            self.ensures(model, result.model)
        logger.info(
            "%s: %s", type(self).__name__, "done" if result.modified else "nothing to do"
        )
        return result

    @abc.abstractmethod
    def call(self, model: Model) -> PassResult:
        """The transformation."""

    def requires(self, model: Model) -> None:  # noqa: B027 (most passes ask for nothing)
        """What has to hold before; raises ``PassError``."""

    def ensures(self, before: Model, after: Model) -> None:
        """What holds after: the same interface, and no node touched but the ones named by :meth:`touched`.

        Raises:
            PassError: it does not.
        """
        old, new = before.proto.graph, after.proto.graph
        if _serialized(old.input) != _serialized(new.input) or _serialized(
            old.output
        ) != _serialized(new.output):
            raise PassError(
                f"{type(self).__name__}: inputs or outputs of the model were changed"
            )
        touched = self.touched(before)
        kept = {node.SerializeToString(deterministic=True) for node in new.node}
        for index, node in enumerate(old.node):
            if index not in touched and node.SerializeToString(deterministic=True) not in kept:
                raise PassError(
                    f"{type(self).__name__}: node '{node.name or node.output[0]}' was changed"
                )

    @abc.abstractmethod
    def touched(self, model: Model) -> frozenset[int]:
        """Indices of the nodes that the pass may change or remove."""


def _serialized(values: object) -> list[bytes]:
    return [value.SerializeToString(deterministic=True) for value in values]  # type: ignore[attr-defined]


def check_model(model: Model) -> str | None:
    """What ``onnx.checker`` with full shape inference says against ``model``; None if it is clean."""
    try:
        onnx.checker.check_model(skeleton(model.proto), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).splitlines()[0]
    return None
