"""Recurrent sites: RNN, GRU and LSTM nodes with constant weights, each direction oriented (K inputs, gates * H)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from onnx_decompose.analysis.recurrence import CELLS, GATES, CellType
from onnx_decompose.errors import ModelError
from onnx_decompose.graph.rearranged import Rearranged
from onnx_decompose.graph.regions import value_readers
from onnx_decompose.graph.sites import Refusal, attribute_values
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.model.shapes import Dim

__all__ = [
    "RecurrentSite",
    "RecurrentWeight",
    "find_recurrent",
    "steps_of",
]

Direction = Literal["forward", "reverse"]

_OPERANDS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_DIRECTIONS: Mapping[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "reverse": ("reverse",),
    "bidirectional": ("forward", "reverse"),
}
_STORED = ("W", "R", "B", "P")
_LOWEST_OPSET = 11
_LOWEST_IR_VERSION = 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecurrentWeight:
    """W or R of one direction, oriented.

    Attributes:
        name: unique in the model.
        tensor: the stored tensor behind it; its gates may stand in another order.
        operand: ``W`` or ``R``.
        direction: index along the operand's first axis.
        gates: columns per hidden unit; column ``gate * H + i`` is of unit i.
        array: (K, gates * H), a view where the stored form allows it.
    """

    name: str
    tensor: str
    operand: Literal["W", "R"]
    direction: int
    gates: int
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, gates * H)."""
        inputs, columns = self.array.shape
        return inputs, columns

    @property
    def hidden(self) -> int:
        """H, the number of hidden units."""
        return self.shape[1] // self.gates

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.array.size


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecurrentSite:
    """A recurrent node with constant weights.

    Attributes:
        name: unique in the model: the node's name, or else its first output's.
        node: index of the node in the graph.
        cell: its operator.
        operands: name of the value read as each operand of the standard; what is not given is missing, and so are
            initial states that are known to be zero.
        outputs: names of Y, Y_h and Y_c, empty where nothing reads them.
        directions: what each index of the first axis of W stands for.
        hidden: H.
        cascade: per direction, whether an operator may read what another made a step before.
        weights: per direction, W and R.
        biases: B and P as far as they are given, (directions, parts, H): one part per gate; B has first those that
            are added with W, then those with R.
    """

    name: str
    node: int
    cell: CellType
    operands: Mapping[str, str]
    outputs: tuple[str, ...]
    directions: tuple[Direction, ...]
    hidden: int
    cascade: tuple[bool, ...]
    weights: tuple[tuple[RecurrentWeight, RecurrentWeight], ...]
    biases: Mapping[str, NDArray[Any]]

    @property
    def gates(self) -> int:
        """Rows of W per hidden unit."""
        return GATES[self.cell]

    @property
    def all_weights(self) -> tuple[RecurrentWeight, ...]:
        """W and R of every direction, in order."""
        return tuple(weight for pair in self.weights for weight in pair)

    def find(self, graph: onnx.GraphProto) -> int:
        """Index of the node in a graph where others may have come or gone since."""
        made = next(filter(None, self.outputs))
        return next(index for index, node in enumerate(graph.node) if made in node.output)


def find_recurrent(
    model: Model, constants: Constants
) -> tuple[tuple[RecurrentSite, ...], tuple[Refusal, ...]]:
    """All recurrent sites of the main graph, in graph order, and the nodes refused.

    Raises:
        ModelError: a weight is not finite.
    """
    sites: list[RecurrentSite] = []
    refusals: list[Refusal] = []
    names = [node.name for node in model.proto.graph.node]
    read = value_readers(model.proto.graph).keys()
    values = Rearranged(model, constants)
    for index, node in enumerate(model.proto.graph.node):
        if node.domain not in {"", "ai.onnx"} or node.op_type not in CELLS:
            continue
        unique = node.name and names.count(node.name) == 1
        name = node.name if unique else next(filter(None, node.output), "")
        outputs = tuple(value if value in read else "" for value in node.output)
        reason = next(_objections(model, node, values, constants.overridable), None)
        if reason is None and not any(outputs):
            reason = "nothing reads what it makes"
        if reason is not None:
            refusals.append(Refusal(name, node.op_type, reason))
            continue
        site = _site(index, node, name, outputs, values)
        _check_finite(model, site)
        sites.append(site)
    return tuple(sites), tuple(refusals)


def steps_of(site: RecurrentSite, shapes: Mapping[str, tuple[Dim, ...]]) -> int | None:
    """The number of time steps, where it is fixed."""
    shape = shapes.get(site.operands["X"], ())
    return shape[0] if shape and isinstance(shape[0], int) else None


def _operands(node: onnx.NodeProto) -> dict[str, str]:
    return {operand: name for operand, name in zip(_OPERANDS, node.input, strict=False) if name}


def _objections(
    model: Model, node: onnx.NodeProto, values: Rearranged, overridable: frozenset[str]
) -> Iterator[str]:
    """Why a recurrent node is not a site; the first reason is the plainest."""
    if model.proto.ir_version < _LOWEST_IR_VERSION:
        yield (
            f"IR version {model.proto.ir_version} has no initializers that are not inputs too; convert the "
            "model to version 4 or later"
        )
    if opset_of(model.proto) < _LOWEST_OPSET:
        yield (
            f"recurrent operators are rewritten from operator set {_LOWEST_OPSET} on; convert the model"
        )
    yield from _operand_objections(_operands(node), values, overridable)
    attributes = attribute_values(node)
    if attributes.get("layout", 0):
        yield "layout is 1 (batch first), which onnxruntime does not run on CPU"
    directions = _DIRECTIONS.get(attributes.get("direction", b"forward").decode(), ())
    if not _fits(node, values, len(directions)):
        yield "W, R, B or P is not of the standard's shape"
    if len(directions) > 1 and (
        {"activation_alpha", "activation_beta"} & attributes.keys()
        or len(attributes.get("activations", ())) % 2
    ):
        yield "the parameters of the activations cannot be told apart by direction"


def _operand_objections(
    operands: Mapping[str, str], values: Rearranged, overridable: frozenset[str]
) -> Iterator[str]:
    if not {"X", "W", "R"} <= operands.keys():
        yield "X, W or R is missing"
    stored = [operand for operand in _STORED if operand in operands]
    for operand in stored:
        if operands[operand] in overridable:
            yield f"{operand} is also a graph input, so it can be overridden at run time"
        elif operands[operand] not in values:
            yield f"{operand} is not a constant"
    for operand in stored:
        dtype = values.array(operands[operand]).dtype
        if not is_float(dtype):
            yield f"{operand} is {dtype}, not a float of 16 bits or more"


def _fits(node: onnx.NodeProto, values: Rearranged, directions: int) -> bool:
    """Whether the constants have the shapes that the standard asks for."""
    operands = _operands(node)
    shapes = {o: values.array(operands[o]).shape for o in _STORED if o in operands}
    w, r = shapes["W"], shapes["R"]
    if len(w) != 3 or len(r) != 3 or 0 in {*w, *r}:
        return False
    hidden = attribute_values(node).get("hidden_size", r[2])
    rows = GATES[cast("CellType", node.op_type)] * hidden
    return (
        w[:2] == (directions, rows)
        and r == (directions, rows, hidden)
        and shapes.get("B", (directions, 2 * rows)) == (directions, 2 * rows)
        and shapes.get("P", (directions, 3 * hidden)) == (directions, 3 * hidden)
    )


def _site(
    index: int, node: onnx.NodeProto, name: str, outputs: tuple[str, ...], values: Rearranged
) -> RecurrentSite:
    cell = cast("CellType", node.op_type)
    directions = _DIRECTIONS[attribute_values(node).get("direction", b"forward").decode()]
    operands = {
        operand: value
        for operand, value in _operands(node).items()
        if not (operand.startswith("initial") and values.is_zero(value))
    }
    arrays = {o: values.array(operands[o]) for o in _STORED if o in operands}
    hidden = arrays["R"].shape[2]

    def weight(operand: Literal["W", "R"], number: int) -> RecurrentWeight:
        side = f".{directions[number]}" if len(directions) > 1 else ""
        return RecurrentWeight(
            name=f"{name}{side}.{operand}",
            tensor=values.source(operands[operand]) or operands[operand],
            operand=operand,
            direction=number,
            gates=GATES[cell],
            array=arrays[operand][number].T,
        )

    return RecurrentSite(
        name=name,
        node=index,
        cell=cell,
        operands=operands,
        outputs=outputs,
        directions=directions,
        hidden=hidden,
        # Sequences of different lengths are reversed each on its own: what one of them made "a step before" its
        # first step does not lie at one place of Y.
        cascade=tuple(
            direction == "forward" or "sequence_lens" not in operands
            for direction in directions
        ),
        weights=tuple((weight("W", n), weight("R", n)) for n in range(len(directions))),
        biases={
            operand: arrays[operand].reshape(len(directions), -1, hidden)
            for operand in ("B", "P")
            if operand in arrays
        },
    )


def _check_finite(model: Model, site: RecurrentSite) -> None:
    """Refuse NaN and infinite weights: no test of a weight means anything then."""
    for weight in site.all_weights:
        if not np.isfinite(weight.array).all():
            raise ModelError(
                f"{model.label}: tensor '{weight.tensor}' of node '{site.name}' holds NaN or infinite weights; "
                "train or export the model again"
            )
