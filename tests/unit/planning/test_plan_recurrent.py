"""Which operators a recurrent site is cut into, and when it is left alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.analysis.recurrence import UnitGraph, unit_graph
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.plan_recurrent import (
    RecurrentGraph,
    candidate_recurrent_plans,
    plan_recurrent,
    written_whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx_decompose.planning.plan_recurrent import RecurrentPlan


def block_graph(
    sizes: Sequence[int], inputs: Sequence[int], chain: Sequence[tuple[int, int]] = ()
) -> UnitGraph:
    """An LSTM of dense groups, each with inputs of its own; ``chain`` lists (earlier, later) groups."""
    units = np.repeat(np.arange(len(sizes)), sizes)
    edges = units[:, None] == units
    for earlier, later in chain:
        edges |= (units == earlier)[:, None] & (units == later)
    read = np.repeat(np.arange(len(inputs)), inputs)[:, None] == units
    return unit_graph(np.tile(read, (1, 4)), np.tile(edges, (1, 4)), "LSTM")


def whole(
    *directions: UnitGraph, steps: int | None = None, itemsize: int = 4
) -> RecurrentGraph:
    gone = tuple(np.empty(0, np.intp) for _ in directions)
    return RecurrentGraph(directions, steps, True, itemsize, gone)


def sizes_of(plan: RecurrentPlan, direction: int = 0) -> list[tuple[int, int, int]]:
    """(inputs, sources, units) of every operator."""
    return [
        (cell.inputs.size, cell.sources.size, cell.units.size)
        for cell in plan.directions[direction].cells
    ]


def test_large_independent_groups_are_split() -> None:
    plan = plan_recurrent(whole(block_graph([128] * 4, [32] * 4)), CPU)
    assert plan.decision == "split"
    assert sizes_of(plan) == [(32, 0, 128)] * 4
    assert plan.relative_cost < 0.5
    assert plan.substructures == 4
    assert (
        "4 strongly connected components over 512 units, the largest with 128 (25%)"
        in plan.reason
    )
    assert "in 1 layer;" in plan.reason
    assert plan.blocks(0, "W", 4) == ((32, 512),) * 4
    assert plan.blocks(0, "R", 4) == ((128, 512),) * 4


def test_a_cascade_reads_what_was_made_a_step_before() -> None:
    graph = block_graph([100, 120, 140], [30, 30, 30], [(0, 1), (1, 2)])
    plan = plan_recurrent(whole(graph), CPU, "split")
    assert sizes_of(plan) == [(30, 0, 100), (30, 100, 120), (30, 120, 140)]
    assert plan.blocks(0, "R", 4) == ((100, 400), (220, 480), (260, 560))
    assert "in 3 layers" in plan.reason


def test_tiny_groups_share_an_operator() -> None:
    """Eight groups of 200 units and forty of two: the small ones do not pay for an operator each."""
    plan = plan_recurrent(whole(block_graph([200] * 4 + [2] * 40, [20] * 4 + [1] * 40)), CPU)
    assert plan.decision == "split"
    made = [cell.units.size for cell in plan.directions[0].cells]
    assert sum(made) == 880
    assert 4 < len(made) + 1 < 12
    assert plan.directions[0].atoms == 44


def test_small_operators_stay_as_they_are() -> None:
    plan = plan_recurrent(whole(block_graph([4, 4], [2, 2])), CPU)
    assert plan.decision == "dense"
    assert plan.blocks(0, "W", 4) == ()
    assert "; the best rewrite is predicted to take " in plan.reason


def test_a_giant_component_is_the_reason() -> None:
    plan = plan_recurrent(whole(block_graph([64], [16])), CPU)
    assert plan.decision == "dense"
    assert plan.reason == (
        "1 strongly connected component over 64 units, the largest with 64 (100%); nothing to take apart"
    )


@pytest.mark.parametrize("emit", ["auto", "split", "shrink"])
def test_the_fewest_and_the_most_operators(emit: str) -> None:
    graph = whole(block_graph([6, 7, 8], [2, 2, 2], [(0, 1)]))
    free = dataclasses.replace(CPU, kernel=1e-12, copy_rate=1e15, gather_rate=1e15)
    plan = plan_recurrent(graph, free, emit)  # type: ignore[arg-type]
    assert len(plan.directions[0].cells) == (1 if emit == "shrink" else 3)


def test_shrink_leaves_inputs_out() -> None:
    graph = block_graph([64], [16])
    wider = dataclasses.replace(
        graph, inputs=np.vstack([graph.inputs, np.zeros((100, 64), bool)])
    )
    plan = plan_recurrent(whole(wider), CPU, "shrink")
    assert plan.decision == "shrink"
    assert sizes_of(plan) == [(16, 0, 64)]
    assert plan_recurrent(whole(graph), CPU, "shrink").decision == "dense"


def test_columns_of_zeros_may_be_cheaper_than_a_gather() -> None:
    """One unread input of 256 is not worth a copy of the others."""
    graph = block_graph([256, 256], [128, 128])
    wide = np.ones_like(graph.inputs)
    wide[0] = False
    plan = plan_recurrent(whole(dataclasses.replace(graph, inputs=wide)), CPU)
    assert [inputs for inputs, _, _ in sizes_of(plan)] == [256, 256]


def test_each_direction_on_its_own() -> None:
    apart, together = block_graph([128] * 4, [32] * 4), block_graph([512], [128])
    plan = plan_recurrent(whole(apart, together), CPU)
    assert plan.decision == "split"
    assert [len(direction.cells) for direction in plan.directions] == [4, 1]
    assert plan.reason.count("strongly connected component") == 2
    assert plan.blocks(1, "W", 4) == ((128, 2048),)


def test_thousands_of_single_units_are_planned_quickly() -> None:
    hidden = 2000
    edges = np.zeros((hidden, 4 * hidden), bool)
    inputs = np.tile(np.eye(hidden, dtype=bool), (1, 4))
    plan = plan_recurrent(whole(unit_graph(inputs, edges, "LSTM")), CPU)
    assert plan.directions[0].atoms == hidden
    assert 1 < len(plan.directions[0].cells) < 200


def test_candidates_are_in_cascade_and_in_parallel() -> None:
    """Two cascades of two: an operator for each group, or one for each cascade, are both worth a measurement."""
    graph = whole(block_graph([20, 30, 40, 50], [5] * 4, [(0, 1), (2, 3)]))
    found = candidate_recurrent_plans(graph, CPU)
    assert [plan.relative_cost for plan in found] == sorted(p.relative_cost for p in found)
    assert all(plan.decision == "split" for plan in found)
    sizes = {tuple(units for _, _, units in sizes_of(plan)) for plan in found}
    assert {(20, 30, 40, 50), (50, 90)} <= sizes
    for plan in found:
        count = len(plan.directions[0].cells)
        assert plan.reason.endswith(
            f"; {count} operators, predicted to take {plan.relative_cost:.2f} of the time"
        )
    split = candidate_recurrent_plans(graph, CPU, "split")
    assert [sizes_of(plan) for plan in split] == [sizes_of(plan_recurrent(graph, CPU, "split"))]


def test_a_dense_operator_has_no_candidates() -> None:
    assert candidate_recurrent_plans(whole(block_graph([16], [4])), CPU) == ()


def test_thousands_of_operators_are_no_candidate() -> None:
    graph = whole(block_graph([1] * 300, [1] * 300))
    for plan in candidate_recurrent_plans(graph, CPU):
        assert len(plan.directions[0].cells) <= 64


class TestUnitsThatAreGone:
    @pytest.fixture
    def graph(self) -> RecurrentGraph:
        """Of 256 units, 96 that nothing joins to anything, every third one or so."""
        rng = np.random.default_rng(0)
        gone = np.sort(rng.permutation(256)[:96])
        units = block_graph([256], [32])
        live = np.setdiff1d(np.arange(256), gone)
        masked = UnitGraph(units.inputs.copy(), units.edges.copy(), units.binding, units.gates)
        masked.inputs[:, gone] = False
        masked.edges[gone] = masked.edges[:, gone] = False
        assert live.size == 160
        return RecurrentGraph((masked,), None, True, 4, (gone,))

    def test_no_operator_makes_them(self, graph: RecurrentGraph) -> None:
        plan = plan_recurrent(graph, CPU)
        assert plan.decision == "shrink"
        assert sizes_of(plan) == [(32, 0, 160)]
        assert not np.isin(plan.directions[0].cells[0].units, graph.gone[0]).any()
        assert plan.relative_cost < 0.85
        assert plan.substructures == 1
        assert ", 96 gone; " in plan.reason

    def test_candidates_leave_them_out_too(self, graph: RecurrentGraph) -> None:
        for plan in candidate_recurrent_plans(graph, CPU):
            made = np.concatenate([cell.units for cell in plan.directions[0].cells])
            assert not np.isin(made, graph.gone[0]).any()
            assert made.size == 160

    def test_where_they_are_read_all_are_made(self, graph: RecurrentGraph) -> None:
        none = dataclasses.replace(graph, gone=(np.empty(0, np.intp),))
        plan = plan_recurrent(none, CPU, "shrink")
        assert sizes_of(plan) == [(32, 0, 256)]

    def test_an_operator_that_only_has_other_entries_is_written_whole(self) -> None:
        dense = plan_recurrent(whole(block_graph([64], [32])), CPU)
        assert dense.decision == "dense"
        plan = written_whole(whole(block_graph([64], [32])), dense, "for a reason")
        assert (plan.decision, sizes_of(plan)) == ("shrink", [(32, 0, 64)])
        assert plan.relative_cost == 1.0
