"""The plan of a recurrent site: into which smaller operators each direction is cut, by predicted cost, with a reason.

The atoms of a direction stand in an order in which none reads a later one (``analysis.recurrence``). Any cut of that
order into runs is exact: each run is an operator that reads some inputs and what earlier ones made a step before.
Dynamic programming finds the cheapest cut.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnx_decompose.analysis.recurrence import atoms_in_order, parts_in_order
from onnx_decompose.planning.region_cost import WORTH, relative_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.recurrence import UnitGraph
    from onnx_decompose.analysis.structure import Condensation
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.state_graph import Emit

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.intp]

__all__ = [
    "Cell",
    "DirectionPlan",
    "RecurrentGraph",
    "RecurrentPlan",
    "candidate_recurrent_plans",
    "plan_recurrent",
    "written_whole",
]

_MOST_CELLS = 64
"""About how many runs are compared by cost: more never pay for their operators, and atoms may be thousands."""

_STEP_PER_KERNEL = 1 / 12
"""Seconds to start a time step within an operator, over those to start an operator: 0.25 to 3 us on CPU."""

_FAST, _SLOW = 0.25, 5.0
"""Time of a gate's activation over that of an element in a Gather: onnxruntime's GRU and LSTM compute vectors, its RNN
entry by entry (0.5 and 8 to 13 ns on CPU)."""

_STEPS = 32
"""Time steps to assume where their number is not fixed."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecurrentGraph:
    """What the plan knows of a recurrent site.

    Attributes:
        directions: the state graph of each direction.
        steps: time steps; None where they are not fixed.
        whole_output: whether Y is read, the output of every step.
        itemsize: bytes per element.
        gone: per direction, ascending units that nobody reads and that read nothing: no operator makes them.
    """

    directions: tuple[UnitGraph, ...]
    steps: int | None
    whole_output: bool
    itemsize: int
    gone: tuple[IntArray, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One smaller operator.

    Attributes:
        units: ascending hidden units that it computes.
        inputs: ascending inputs that it reads, at least one.
        sources: ascending units of earlier cells whose previous output it reads.
    """

    units: IntArray
    inputs: IntArray
    sources: IntArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DirectionPlan:
    """One direction.

    Attributes:
        condensation: strongly connected components of its units.
        atoms: number of smallest sets of units that can have an operator of their own.
        cells: the operators, each reading earlier ones only.
    """

    condensation: Condensation
    atoms: int
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecurrentPlan:
    """What happens to one recurrent site.

    Attributes:
        decision: ``dense`` (left alone), ``shrink`` (one operator per direction, without the inputs that nothing
            reads) or ``split``.
        reason: why, with figures, for the report.
        directions: one per direction of the site.
        relative_cost: predicted cost over dense, geometric mean over batches.
    """

    decision: Literal["dense", "shrink", "split"]
    reason: str
    directions: tuple[DirectionPlan, ...]
    relative_cost: float = 1.0

    @property
    def substructures(self) -> int:
        """Smallest sets of units over all directions."""
        return sum(direction.atoms for direction in self.directions)

    def blocks(
        self, direction: int, operand: Literal["W", "R"], gates: int
    ) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every part of a direction's W or R; none where the site stays dense."""
        if self.decision == "dense":
            return ()
        return tuple(
            (
                cell.inputs.size if operand == "W" else cell.sources.size + cell.units.size,
                gates * cell.units.size,
            )
            for cell in self.directions[direction].cells
        )


def plan_recurrent(
    graph: RecurrentGraph, cost: CostModel, emit: Emit = "auto"
) -> RecurrentPlan:
    """Choose the operators of a recurrent site.

    Args:
        graph: the site's state graphs.
        cost: the provider's coefficients.
        emit: ``split`` asks for one operator per atom; ``shrink`` for one per direction; any other chooses by cost.
    """
    emit = emit if emit in {"split", "shrink"} else "auto"
    directions: list[DirectionPlan] = []
    others: list[float] = []
    before = after = np.zeros(len(cost.batches))
    for units, gone in zip(graph.directions, graph.gone, strict=True):
        pricing = _Pricing(units, graph, cost, narrow=emit != "auto")
        order = atoms_in_order(units, gone)
        cuts = _candidates(order, pricing, emit)
        cells = min(cuts, key=pricing.relative)
        others += [pricing.relative(cut) for cut in cuts if not _is_dense(units, cut)]
        before, after = before + pricing.dense, after + pricing.total(cells)
        directions.append(DirectionPlan(units.condensation(), len(order), cells))
    found = "; ".join(map(_found, graph.directions, directions, graph.gone))
    relative = relative_cost(after, before)
    count = sum(len(direction.cells) for direction in directions)
    plan = RecurrentPlan("dense", found, tuple(directions), relative)
    is_dense = all(
        _is_dense(units, direction.cells)
        for units, direction in zip(graph.directions, directions, strict=True)
    )
    if not others:
        return dataclasses.replace(plan, reason=f"{found}; nothing to take apart")
    predicted = f"predicted to take {min(others) if is_dense else relative:.2f} of the time"
    if is_dense or (relative > WORTH and emit == "auto"):
        return dataclasses.replace(plan, reason=f"{found}; the best rewrite is {predicted}")
    return dataclasses.replace(
        plan,
        decision="split" if count > len(directions) else "shrink",
        reason=_predicted(found, count, relative),
    )


def written_whole(graph: RecurrentGraph, plan: RecurrentPlan, why: str) -> RecurrentPlan:
    """``plan`` as one operator per direction that has all units and reads all inputs, where only entries change."""
    directions = []
    for units, old in zip(graph.directions, plan.directions, strict=True):
        every = np.arange(units.hidden)
        cell = Cell(every, np.arange(units.inputs.shape[0]), np.empty(0, np.intp))
        directions.append(dataclasses.replace(old, cells=(cell,)))
    reason = f"{plan.reason}; {why}"
    return RecurrentPlan("shrink", reason, tuple(directions))


def candidate_recurrent_plans(
    graph: RecurrentGraph, cost: CostModel, emit: Emit = "auto"
) -> tuple[RecurrentPlan, ...]:
    """Ways of writing a recurrent site that are worth being timed, none of them dense, the cheapest first.

    One operator per atom (in cascade where they read each other), one per set of units that no edge joins to others
    (all of them in parallel), the cut that is predicted to be the cheapest, and one operator per direction without
    the inputs that nothing reads. Arguments as of :func:`plan_recurrent`.
    """
    ways = {"split": ("atoms",), "shrink": ("whole",)}.get(
        emit, ("atoms", "apart", "cheapest", "whole")
    )
    found: list[RecurrentPlan] = []
    seen: set[tuple[tuple[bytes, ...], ...]] = set()
    for way in ways:
        plan = _cut_by(graph, cost, way, narrow=emit in {"split", "shrink"})
        cuts = tuple(
            tuple(part.tobytes() for c in d.cells for part in (c.units, c.inputs))
            for d in plan.directions
        )
        if plan.decision != "dense" and cuts not in seen:
            seen.add(cuts)
            found.append(plan)
    return tuple(sorted(found, key=lambda plan: plan.relative_cost))


def _cut_by(graph: RecurrentGraph, cost: CostModel, way: str, *, narrow: bool) -> RecurrentPlan:
    """Every direction cut in one way; dense where that changes nothing, or makes more operators than ever pay."""
    directions: list[DirectionPlan] = []
    before = after = np.zeros(len(cost.batches))
    for units, gone in zip(graph.directions, graph.gone, strict=True):
        pricing = _Pricing(units, graph, cost, narrow=narrow)
        order = atoms_in_order(units, gone)
        atoms = [pricing.run(atom) for atom in order]
        if way == "atoms":
            runs = atoms
        elif way == "apart":
            runs = [
                _joined(atoms[a:b]) for a, b in itertools.pairwise(parts_in_order(units, gone))
            ]
        elif way == "cheapest":
            most = max(pricing.hidden // _MOST_CELLS, 1)
            runs = pricing.cheapest_cut(_chunks(atoms, most=most))
        else:
            runs = [_joined(atoms)]
        cells = pricing.cells(runs)
        before, after = before + pricing.dense, after + pricing.total(cells)
        directions.append(DirectionPlan(units.condensation(), len(order), cells))
    count = sum(len(direction.cells) for direction in directions)
    is_dense = all(
        _is_dense(units, direction.cells)
        for units, direction in zip(graph.directions, directions, strict=True)
    )
    found = "; ".join(map(_found, graph.directions, directions, graph.gone))
    relative = relative_cost(after, before)
    plan = RecurrentPlan("dense", found, tuple(directions), relative)
    if is_dense or count > _MOST_CELLS * len(directions):
        return plan
    return dataclasses.replace(
        plan,
        decision="split" if count > len(directions) else "shrink",
        reason=_predicted(found, count, relative),
    )


def _predicted(found: str, count: int, relative: float) -> str:
    return (
        f"{found}; {count} operator{'s' if count > 1 else ''}, "
        f"predicted to take {relative:.2f} of the time"
    )


def _found(graph: UnitGraph, plan: DirectionPlan, gone: IntArray) -> str:
    """The structure of one direction in words."""
    condensation = plan.condensation
    giant = int(np.bincount(condensation.labels).max())
    many = condensation.sccs > 1
    text = (
        f"{condensation.sccs} strongly connected component{'s' if many else ''} over {graph.hidden} units, the "
        f"largest with {giant} ({giant / graph.hidden:.0%})"
    )
    if many:
        text += f", in {condensation.layers} layer{'s' if condensation.layers > 1 else ''}"
    if plan.atoms != condensation.sccs - gone.size:
        text += f", bound into {plan.atoms} by edges that no cascade can carry"
    return f"{text}, {gone.size} gone" if gone.size else text


def _is_dense(graph: UnitGraph, cells: tuple[Cell, ...]) -> bool:
    whole = len(cells) == 1 and cells[0].units.size == graph.hidden
    return whole and cells[0].inputs.size == graph.inputs.shape[0]


def _candidates(
    order: Sequence[IntArray], pricing: _Pricing, emit: Emit
) -> list[tuple[Cell, ...]]:
    """Cuts of ``order`` to compare."""
    atoms = [pricing.run(atom) for atom in order]
    whole = pricing.cells([_joined(atoms)])
    if emit == "shrink":
        return [whole]
    if emit == "split":
        return [pricing.cells(atoms)]
    runs = _chunks(atoms, most=max(pricing.hidden // _MOST_CELLS, 1))
    cuts = [whole, pricing.cells(pricing.cheapest_cut(runs))]
    return cuts if len(atoms) > _MOST_CELLS else [*cuts, pricing.cells(atoms)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Units of consecutive atoms, and what they read: (I,) and (H,) bool."""

    units: IntArray
    inputs: BoolArray
    reads: BoolArray


def _joined(runs: Sequence[_Run]) -> _Run:
    return _Run(
        np.sort(np.concatenate([run.units for run in runs])),
        np.any([run.inputs for run in runs], axis=0),
        np.any([run.reads for run in runs], axis=0),
    )


def _chunks(atoms: Sequence[_Run], most: int) -> list[_Run]:
    """Consecutive small atoms put together as long as they have ``most`` units at most."""
    chunks: list[list[_Run]] = []
    size = most
    for atom in atoms:
        size += atom.units.size
        if size <= most:
            chunks[-1].append(atom)
        else:
            chunks.append([atom])
            size = atom.units.size
    return [_joined(chunk) for chunk in chunks]


class _Pricing:
    """Predicted seconds of the operators of one direction, at each of the cost model's batches."""

    def __init__(
        self, units: UnitGraph, graph: RecurrentGraph, cost: CostModel, *, narrow: bool
    ) -> None:
        self._units = units
        self._cost = cost
        self._narrow = narrow
        self._steps = graph.steps or _STEPS
        self._whole_output = graph.whole_output
        self._itemsize = graph.itemsize
        self.hidden = units.hidden
        self.dense = self._seconds(units.hidden, units.inputs.shape[0], 0)

    def run(self, units: IntArray) -> _Run:
        """Some units, and what they read."""
        return _Run(
            units,
            np.asarray(self._units.inputs[:, units].any(axis=1)),
            np.asarray(self._units.edges[:, units].any(axis=1)),
        )

    def cells(self, runs: Sequence[_Run]) -> tuple[Cell, ...]:
        """The operators of a cut: each run is one."""
        cells: list[Cell] = []
        for run in runs:
            sources = [
                earlier.units if np.count_nonzero(used) * 2 > used.size else earlier.units[used]
                for earlier in cells
                if (used := run.reads[earlier.units]).any()
            ]
            everything = np.arange(run.inputs.size)
            # An operator reads one input at least, if only to multiply it by zero.
            inputs = np.flatnonzero(run.inputs) if run.inputs.any() else everything[:1]
            if not self._is_worth_gathering(run, inputs.size):
                inputs = everything
            cells.append(
                Cell(run.units, inputs, np.sort(np.concatenate([[], *sources]).astype(np.intp)))
            )
        return tuple(cells)

    def relative(self, cells: tuple[Cell, ...]) -> float:
        """Cost of a cut over dense, geometric mean over the batches."""
        return relative_cost(self.total(cells), self.dense)

    def total(self, cells: tuple[Cell, ...]) -> NDArray[np.float64]:
        """Seconds of the operators and of what stands between them."""
        seconds = np.zeros(len(self._cost.batches))
        for cell in cells:
            seconds += self._seconds(cell.units.size, cell.inputs.size, cell.sources.size)
        if len(cells) == 1 and cells[0].units.size == self.hidden:
            return seconds
        return seconds + self._each_batch(lambda batch: self._join_seconds(cells, batch))

    def _join_seconds(self, cells: tuple[Cell, ...], batch: int) -> float:
        """The outputs' parts side by side, and a Gather where that is not the original order."""
        rows = batch * (self._steps if self._whole_output else 1)
        first = sorted(cells, key=lambda cell: int(cell.units[0]))
        order = np.concatenate([cell.units for cell in first])
        joined = self._cost.copy(rows, order.size, self._itemsize)
        if (np.diff(order) == 1).all() and order.size == self.hidden:
            return joined
        return joined + self._cost.gather(rows, self.hidden, self._itemsize)

    def cheapest_cut(self, runs: Sequence[_Run]) -> list[_Run]:
        """The cut of consecutive ``runs`` whose operators cost least, as a mean over the batches."""
        best: list[tuple[float, list[_Run]]] = [(0.0, [])]
        for stop in range(1, len(runs) + 1):
            choices: list[tuple[float, list[_Run]]] = []
            run: _Run | None = None
            for start in reversed(range(stop)):
                run = runs[start] if run is None else _joined([runs[start], run])
                price, cut = best[start]
                choices.append((price + self._price(run), [*cut, run]))
            best.append(min(choices, key=lambda choice: choice[0]))
        return best[-1][1]

    def _price(self, run: _Run) -> float:
        inputs = int(np.count_nonzero(run.inputs))
        if not self._is_worth_gathering(run, inputs):
            inputs = run.inputs.size
        sources = int(np.count_nonzero(run.reads) - np.count_nonzero(run.reads[run.units]))
        return float(np.mean(self._seconds(run.units.size, inputs, sources) / self.dense))

    def _is_worth_gathering(self, run: _Run, inputs: int) -> bool:
        """Whether the Gather that leaves columns of zeros out of W costs less than they do."""
        everything = run.inputs.size
        if self._narrow or inputs == everything:
            return True
        narrow, wide = (self._seconds(run.units.size, n, 0) for n in (inputs, everything))
        return float(np.mean(narrow / wide)) < 1

    def _seconds(self, hidden: int, inputs: int, sources: int) -> NDArray[np.float64]:
        """One operator, with the Gather of its inputs and the shift of its sources."""
        cost, size = self._cost, self._itemsize
        columns, width = self._units.gates * hidden, inputs + sources
        activation = size / cost.gather_rate * (_SLOW if self._units.gates == 1 else _FAST)

        def at(batch: int) -> float:
            rows = batch * self._steps
            # W and R are read at every step, from a cache where they fit: flops count, not bytes.
            step = cost.kernel * _STEP_PER_KERNEL + batch * columns * activation
            step += 2 * batch * columns * (width + hidden) / cost.flop_rate
            seconds = cost.kernel + self._steps * step
            if inputs < self._units.inputs.shape[0]:
                seconds += cost.gather(rows, inputs, size)
            if sources:  # shifted by a step, and put beside the inputs
                seconds += cost.copy(rows, sources, size) + cost.copy(rows, width, size)
            return seconds

        return self._each_batch(at)

    def _each_batch(self, seconds: Callable[[int], float]) -> NDArray[np.float64]:
        return np.array([seconds(batch) for batch in self._cost.batches])
