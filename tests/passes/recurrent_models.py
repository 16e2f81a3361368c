"""Recurrent models whose structure is known because it was planted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose.analysis.recurrence import GATES, CellType

if TYPE_CHECKING:
    from numpy.typing import NDArray

CASCADE = ((0, 1), (1, 2))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What to plant.

    Attributes:
        cell: the operator.
        sizes: (inputs, hidden units) of each group.
        cascade: (earlier, later) groups where the later one reads the earlier one's state.
        candidate: whether the candidate gate of a GRU reads earlier groups too.
        direction: as in the standard.
        shuffle: hide the groups by permutations of inputs and units, another one for each direction's units.
        bias: with B.
        initial: with initial states as inputs.
        lengths: with sequence_lens as an input.
        peepholes: with P (LSTM).
        outputs: which outputs the model has.
        attributes: more of the node's.
        opset: operator set version.
        isolated: inputs that nothing reads.
    """

    cell: CellType = "LSTM"
    sizes: tuple[tuple[int, int], ...] = ((3, 6), (2, 5), (4, 7))
    cascade: tuple[tuple[int, int], ...] = CASCADE
    candidate: bool = False
    direction: str = "forward"
    shuffle: bool = True
    bias: bool = True
    initial: bool = False
    lengths: bool = False
    peepholes: bool = False
    outputs: tuple[str, ...] = ("Y", "Y_h")
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    opset: int = 17
    isolated: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    @property
    def hidden(self) -> int:
        return sum(size for _, size in self.sizes)

    @property
    def inputs(self) -> int:
        return sum(size for size, _ in self.sizes) + self.isolated


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """A model of one recurrent node, named ``rnn``.

    Attributes:
        model: the model.
        inputs: group of each input, -1 where nothing reads it.
        units: per direction, the group of each hidden unit.
    """

    model: onnx.ModelProto
    inputs: NDArray[np.intp]
    units: tuple[NDArray[np.intp], ...]

    def groups(self, direction: int = 0) -> set[tuple[int, ...]]:
        """The units of every group of a direction."""
        labels = self.units[direction]
        return {tuple(np.flatnonzero(labels == group).tolist()) for group in np.unique(labels)}


def plant(recipe: Recipe, rng: np.random.Generator) -> Planted:
    """Make the model that ``recipe`` describes."""
    read = np.repeat(np.arange(len(recipe.sizes)), [size for size, _ in recipe.sizes])
    inputs = np.concatenate([read, np.full(recipe.isolated, -1)])
    made = np.repeat(np.arange(len(recipe.sizes)), [size for _, size in recipe.sizes])
    units = [made] * recipe.directions
    if recipe.shuffle:
        inputs = rng.permutation(inputs)
        units = [rng.permutation(labels) for labels in units]
    w = np.stack([_rows(inputs[:, None] == labels, recipe.cell, rng) for labels in units])
    r = np.stack([_recurrent(labels, recipe, rng) for labels in units])
    return Planted(network(recipe, w, r, rng), inputs, tuple(units))


def network(
    recipe: Recipe, w: NDArray[Any], r: NDArray[Any], rng: np.random.Generator
) -> onnx.ModelProto:
    """The model with these weights: W (directions, gates * H, I), R (directions, gates * H, H)."""
    dirs, rows, hidden = r.shape
    tensors = {"W": w, "R": r}
    if recipe.bias:
        tensors["B"] = rng.normal(0, 0.2, (dirs, 2 * rows))
    if recipe.peepholes:
        tensors["P"] = rng.normal(0, 0.3, (dirs, 3 * hidden))
    state = [dirs, "batch", hidden]
    given: dict[str, tuple[int, list[Any]]] = {"X": (1, ["time", "batch", w.shape[2]])}
    if recipe.lengths:
        given["sequence_lens"] = (onnx.TensorProto.INT32, ["batch"])
    if recipe.initial:
        given["initial_h"] = (1, state)
        if recipe.cell == "LSTM":
            given["initial_c"] = (1, state)
    made = {"Y": ["time", dirs, "batch", hidden], "Y_h": state, "Y_c": state}
    names = [n if n in recipe.outputs else "" for n in ("Y", "Y_h", "Y_c")]
    operands = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    inputs = [n if n in tensors or n in given else "" for n in operands]
    node = helper.make_node(
        recipe.cell,
        _without_tail(inputs),
        _without_tail(names),
        "rnn",
        hidden_size=hidden,
        direction=recipe.direction,
        **recipe.attributes,
    )
    graph = helper.make_graph(
        [node],
        "recurrent",
        [helper.make_tensor_value_info(n, *given[n]) for n in given],
        [helper.make_tensor_value_info(n, 1, made[n]) for n in recipe.outputs],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in tensors.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", recipe.opset)], ir_version=8
    )


def feeds(
    recipe: Recipe, rng: np.random.Generator, time: int, batch: int
) -> dict[str, NDArray[Any]]:
    """Random inputs; one sequence has full length, the others any."""
    state = (recipe.directions, batch, recipe.hidden)
    made: dict[str, NDArray[Any]] = {"X": rng.normal(size=(time, batch, recipe.inputs))}
    if recipe.initial:
        made["initial_h"] = rng.uniform(-1, 1, state)
        if recipe.cell == "LSTM":
            made["initial_c"] = rng.uniform(-1, 1, state)
    made = {name: values.astype(np.float32) for name, values in made.items()}
    if recipe.lengths:
        lengths = rng.integers(1, time + 1, batch)
        lengths[0] = time
        made["sequence_lens"] = lengths.astype(np.int32)
    return made


def _rows(
    mask: NDArray[np.bool_], cell: CellType, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(gates * H, K) with entries in every gate where ``mask``, (K, H), is set."""
    full = np.tile(mask, (1, GATES[cell])).T
    values = rng.uniform(0.2, 0.6, full.shape) * rng.choice([-1.0, 1.0], full.shape)
    return np.where(full, values, 0.0)


def _recurrent(
    labels: NDArray[np.intp], recipe: Recipe, rng: np.random.Generator
) -> NDArray[np.float64]:
    own = labels[:, None] == labels
    across = np.zeros_like(own)
    for earlier, later in recipe.cascade:
        across |= (labels == earlier)[:, None] & (labels == later)
    values = _rows(own | across, recipe.cell, rng)
    if recipe.cell == "GRU" and not recipe.candidate:
        values[2 * labels.size :][across.T] = 0.0
    return values


def _without_tail(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names = names[:-1]
    return names
