from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decompose.analysis.structure import Edge
from onnx_decompose.planning import candidates
from onnx_decompose.planning.borders import common_order, gathered_order, layout_of
from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.planning.plan import RegionPlan, plan_region
from onnx_decompose.planning.stacks import Grouping, Stack, StackLayout
from onnx_decompose.planning.state_graph import Emit, StateGraph, is_cascade

if TYPE_CHECKING:
    from numpy.typing import NDArray

FREE = dataclasses.replace(
    CPU, kernel=1e-12, copy_rate=1e15, elementwise_rate=1e15, gather_rate=1e15
)
"""A provider where nothing costs but the products: every component is worth a branch."""

DEAR = dataclasses.replace(CPU, kernel=1.0)
"""A provider where one more operator costs more than all products."""


def graph_of(
    sizes: tuple[int, ...],
    *edges: tuple[int, int, NDArray[Any]],
    entries: tuple[int, ...] = (0,),
    exits: tuple[int, ...] = (),
) -> StateGraph:
    return StateGraph(
        axis_sizes=sizes,
        edges=tuple(Edge(source, target, mask.astype(bool)) for source, target, mask in edges),
        elementwise=(1,),
        entries=entries,
        exits=exits or (len(sizes) - 1,),
        itemsize=4,
    )


def blocks(
    labels: NDArray[np.intp], others: NDArray[np.intp], isolated: int = -1
) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = (labels[:, None] == others) & (labels[:, None] != isolated)
    return mask


def planted(
    rng: np.random.Generator, count: int, *, shuffled: bool = True
) -> tuple[StateGraph, list[NDArray[np.intp]]]:
    """K -> hidden -> N with ``count`` blocks."""
    labels = [np.arange(size * count) // size for size in (8, 16, 6)]
    if shuffled:
        labels = [rng.permutation(axis) for axis in labels]
    first, second = blocks(labels[0], labels[1]), blocks(labels[1], labels[2])
    sizes = tuple(axis.size for axis in labels)
    return graph_of(sizes, (0, 1, first), (1, 2, second)), labels


def check_axis(plan: RegionPlan, axis: int) -> NDArray[np.intp]:
    """The units of all branches on an axis, side by side."""
    units = [branch.units[axis] for branch in plan.branches]
    assert all(part.size > 0 for part in units)
    owned = np.concatenate(units)
    if is_cascade(plan.branches, axis):
        assert plan.decision == "triangular"
        assert np.unique(owned).size == owned.size
        for branch in plan.branches:  # a run of all branches' units, side by side
            places = [owned.tolist().index(unit) for unit in branch.inputs(axis)]
            assert (np.diff(places) == 1).all()
    else:
        assert all((np.diff(part) > 0).all() for part in units)
    return owned


def check(graph: StateGraph, plan: RegionPlan) -> None:
    """What makes a plan exact, whatever its branches are."""
    for axis, size in enumerate(graph.axis_sizes):
        owned = check_axis(plan, axis)
        if plan.decision != "triangular" or axis not in graph.entries:
            assert np.unique(owned).size == owned.size
        if axis in graph.exits:
            assert owned.size == size
    assert (plan.grouping is None) == (plan.decision != "grouped")
    if plan.grouping is not None:
        stacks = [stack for stack in plan.grouping.stacks for _ in range(stack.count)]
        for branch, stack in zip(plan.branches, stacks, strict=True):
            for axis, (part, size) in enumerate(zip(branch.units, stack.sizes, strict=True)):
                assert part.size <= size
                assert part.size == size or axis not in graph.unpadded
    for edge, mask in zip(graph.edges, plan.masks, strict=True):
        inside = np.zeros_like(mask)
        for branch in plan.branches:
            inside[np.ix_(branch.inputs(edge.source), branch.units[edge.target])] = True
        assert not (mask & ~inside).any()
        assert not (mask & ~edge.mask).any()


@pytest.mark.parametrize("emit", ["auto", "split"])
def test_planted_components_become_the_branches(emit: Emit, rng: np.random.Generator) -> None:
    graph, labels = planted(rng, 5)
    plan = plan_region(graph, FREE, emit)
    check(graph, plan)
    assert (plan.decision, plan.components.count, len(plan.branches)) == ("split", 5, 5)
    for branch in plan.branches:
        assert (
            len(
                {
                    int(axis[u])
                    for axis, us in zip(labels, branch.units, strict=True)
                    for u in us
                }
            )
            == 1
        )
    assert plan.relative_cost < 1
    assert plan.reason == (
        "5 components over 150 nodes, the largest with 30 (20%), 0 isolated; "
        f"5 branches, predicted to take {plan.relative_cost:.2f} of the time"
    )


def test_where_kernels_are_dear_components_are_merged(rng: np.random.Generator) -> None:
    graph, _ = planted(rng, 6, shuffled=False)
    costly = dataclasses.replace(FREE, kernel=2e-7)
    plan = plan_region(graph, costly)
    check(graph, plan)
    assert 1 < len(plan.branches) < 6
    assert len(plan_region(graph, costly, "split").branches) == 6


def test_a_rewrite_that_would_be_slower_is_not_planned(rng: np.random.Generator) -> None:
    graph, _ = planted(rng, 4)
    plan = plan_region(graph, DEAR)
    assert (plan.decision, plan.branches, plan.relative_cost) == ("dense", (), 1.0)
    assert plan.reason.startswith(
        "4 components over 120 nodes, the largest with 30 (25%), 0 iso"
    )
    assert "; the best rewrite is predicted to take " in plan.reason
    assert plan_region(graph, DEAR, "split").decision == "split"


def test_a_dense_region_names_its_giant_component() -> None:
    graph = graph_of((4, 6, 2), (0, 1, np.ones((4, 6))), (1, 2, np.ones((6, 2))))
    plan = plan_region(graph, FREE)
    assert plan.decision == "dense"
    assert plan.reason == (
        "1 component over 12 nodes, the largest with 12 (100%), 0 isolated; nothing to take apart"
    )


def test_no_supported_entry() -> None:
    plan = plan_region(graph_of((3, 2), (0, 1, np.zeros((3, 2)))), FREE)
    assert plan.decision == "dense"
    assert plan.reason == "no entry is supported: the region's outputs are constant"


def test_dead_units_are_shrunk_away_in_cascade() -> None:
    first, second = np.ones((6, 8), bool), np.ones((8, 4), bool)
    first[4:] = False  # inputs 4 and 5 feed nothing
    second[5:] = False  # hidden units 5 to 7 are read by nothing
    graph = graph_of((6, 8, 4), (0, 1, first), (1, 2, second))
    plan = plan_region(graph, FREE)
    check(graph, plan)
    assert plan.decision == "shrink"
    assert [units.tolist() for units in plan.branches[0].units] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
    ]
    # What only leads to dead units is not in the annealed weight any more.
    assert not plan.masks[0][:, 5:].any()


def test_shrink_asks_for_one_branch(rng: np.random.Generator) -> None:
    graph, _ = planted(rng, 3)
    mask = graph.edges[0].mask.copy()
    mask[0] = False
    graph = dataclasses.replace(
        graph, edges=(dataclasses.replace(graph.edges[0], mask=mask), graph.edges[1])
    )
    plan = plan_region(graph, DEAR, "shrink")
    check(graph, plan)
    assert plan.decision == "shrink"
    assert plan.branches[0].units[0].size == graph.axis_sizes[0] - 1


def test_a_unit_without_inputs_is_a_constant_that_some_branch_keeps() -> None:
    # Hidden unit 4 reads nothing but output 3 reads it: its bias goes through its activation.
    first = blocks(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1, 2]))
    second = blocks(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2]))
    graph = graph_of((4, 5, 4), (0, 1, first), (1, 2, second))
    plan = plan_region(graph, FREE, "split")
    check(graph, plan)
    assert plan.components.count == 3
    assert [branch.units[1].tolist() for branch in plan.branches] == [[0, 1], [2, 3, 4]]
    assert [branch.units[2].tolist() for branch in plan.branches] == [[0], [1, 2, 3]]


def test_an_output_without_edges_is_still_made() -> None:
    mask = blocks(np.array([0, 0, 1, 1]), np.array([-1, 0, -1, 1, 1, -1]))
    plan = plan_region(graph_of((4, 6), (0, 1, mask)), FREE, "split")
    assert plan.components.isolated == 3
    assert [branch.units[1].tolist() for branch in plan.branches] == [[0, 1, 2], [3, 4, 5]]


def test_isolated_inputs_between_runs_are_kept_where_a_gather_is_dear() -> None:
    labels = np.repeat([0, 1], 32)
    with_gaps = labels.copy()
    with_gaps[[5, 40]] = -1  # two inputs that nothing reads
    graph = graph_of((64, 64), (0, 1, blocks(with_gaps, labels)))
    gather_is_dear = dataclasses.replace(FREE, gather_rate=1e6)
    plan = plan_region(graph, gather_is_dear)
    check(graph, plan)
    assert layout_of(plan.positions(0), 64) == "whole"
    gather_is_free = dataclasses.replace(FREE, gather_rate=1e18)
    plan = plan_region(graph, gather_is_free)
    check(graph, plan)
    assert layout_of(plan.positions(0), 64) == "scattered"


def test_an_axis_without_edges_is_carried_along() -> None:
    # Axis 1 has a site that nothing supports: the exit that reads it is constant.
    graph = graph_of(
        (4, 3, 4),
        (0, 1, np.zeros((4, 3))),
        (0, 2, np.eye(4)),
        exits=(1, 2),
    )
    plan = plan_region(graph, FREE, "split")
    assert plan.decision == "dense"
    assert plan.reason.endswith("3 isolated; not two of them have units on every axis")
    # With an input that nothing reads there is something to drop; the axis keeps its units.
    mask = np.eye(4)
    mask[1, 1] = 0
    graph = graph_of(
        (4, 3, 4), (0, 1, np.zeros((4, 3))), (0, 2, mask), entries=(0,), exits=(1, 2)
    )
    plan = plan_region(graph, FREE, "split")
    check(graph, plan)
    assert [units.tolist() for units in plan.branches[0].units] == [
        [0, 2, 3],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_thousands_of_components_are_planned_quickly(rng: np.random.Generator) -> None:
    mask = np.eye(3000, dtype=bool)[rng.permutation(3000)]
    graph = graph_of((3000, 3000), (0, 1, mask))
    start = time.perf_counter()
    plan = plan_region(graph, CPU)
    assert time.perf_counter() - start < 20
    assert plan.components.count == 3000
    check(graph, plan)
    assert 1 < len(plan.branches) <= 64
    assert len(plan_region(graph, CPU, "split").branches) == 3000


@pytest.mark.parametrize(
    ("parts", "size", "layout"),
    [
        ([[0, 1], [2, 3]], 4, "whole"),
        ([[0, 1, 2, 3]], 4, "whole"),
        ([[0, 1]], 4, "runs"),
        ([[2, 3], [0, 1]], 4, "whole"),
        ([[0, 1], [3]], 4, "runs"),
        ([[0, 2], [1, 3]], 4, "scattered"),
        ([[0, 1, 3]], 4, "scattered"),
        ([[0, 1, 2], [2, 3]], 4, "runs"),
        ([[0, 1], [1, 2]], 4, "runs"),  # as many as the axis has, and not all of it
        ([[0, 1, 2, 3], [0, 1]], 4, "runs"),
    ],
)
def test_layouts(parts: list[list[int]], size: int, layout: str) -> None:
    assert layout_of([np.array(part) for part in parts], size) == layout


@pytest.mark.parametrize(
    ("parts", "order"),
    [
        (
            [[0, 2], [0, 2, 5], [0, 2, 3, 5]],
            [0, 2, 5, 3],
        ),  # each reads what the one before does
        ([[1, 3, 5, 7], [3, 5, 7], [3, 7]], [1, 5, 3, 7]),
        ([[0, 2], [0, 2, 3, 5], [0, 2, 5]], [0, 2, 5, 3]),
        (
            [[0, 2, 4], [0, 2, 6], [2, 4, 6], [0, 4, 6]],
            None,
        ),  # no order has all of them in runs
        ([[0, 1, 2], [1, 2], [2, 3], [0, 1]], None),  # runs as they are
    ],
)
def test_common_orders(parts: list[list[int]], order: list[int] | None) -> None:
    positions = [np.array(part) for part in parts]
    for find in (common_order, gathered_order):
        found = find(positions)
        assert (None if found is None else found.tolist()) == order


@pytest.mark.parametrize("parts", [[[0, 2], [2, 4]], [[0, 2], [4, 6]]])
def test_what_overlaps_little_is_not_gathered_at_once(parts: list[list[int]]) -> None:
    positions = [np.array(part) for part in parts]
    assert common_order(positions) is not None
    assert gathered_order(positions) is None


def band(size: int, width: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = abs(np.arange(size)[:, None] - np.arange(size)) < width
    return mask


@pytest.mark.parametrize("emit", ["auto", "triangular"])
def test_a_band_is_cut_into_groups_that_read_overlapping_runs(emit: Emit) -> None:
    graph = graph_of((64, 64), (0, 1, band(64, 4)))
    plan = plan_region(graph, dataclasses.replace(FREE, kernel=1e-9), emit)
    check(graph, plan)
    assert plan.decision == "triangular"
    assert layout_of(plan.positions(0), 64) == "runs"
    assert layout_of(plan.positions(1), 64) == "whole"
    shared = np.intersect1d(plan.branches[0].units[0], plan.branches[1].units[0])
    assert shared.size > 0
    held = sum(branch.units[0].size * branch.units[1].size for branch in plan.branches)
    assert held < 0.3 * 64 * 64
    assert plan.reason == (
        "1 component over 128 nodes, the largest with 128 (100%), 0 isolated; cut in the given order: "
        f"{len(plan.branches)} groups of outputs read {held / 4096:.0%} of the entries, predicted to take "
        f"{plan.relative_cost:.2f} of the time"
    )


def test_a_hidden_triangular_form_is_cut_between_its_blocks(rng: np.random.Generator) -> None:
    label = np.repeat(np.arange(4), 16)
    first, second = rng.permutation(64), rng.permutation(64)
    mask = (label[:, None] <= label)[np.ix_(first, second)]
    graph = graph_of((64, 64), (0, 1, mask))
    plan = plan_region(graph, FREE)
    check(graph, plan)
    assert plan.decision == "triangular"
    # Each output in the group of its block, and it reads its own block and the earlier ones.
    assert {
        (frozenset(label[first][b.units[0]]), frozenset(label[second][b.units[1]]))
        for b in plan.branches
    } == {(frozenset(range(n + 1)), frozenset([n])) for n in range(4)}
    assert gathered_order(plan.positions(0)) is not None


def test_a_band_through_two_sites_is_one_cascade(rng: np.random.Generator) -> None:
    hidden = rng.permutation(64)
    first, second = band(64, 4)[:, hidden], band(64, 4)[hidden]
    graph = graph_of((64, 64, 64), (0, 1, first), (1, 2, second))
    plan = plan_region(graph, dataclasses.replace(FREE, kernel=1e-9))
    check(graph, plan)
    assert plan.decision == "triangular"
    assert is_cascade(plan.branches, 1)
    assert not is_cascade(plan.branches, 0)
    assert layout_of(plan.positions(2), 64) == "whole"
    assert plan.entries(0, 1) + plan.entries(1, 2) < 0.4 * 2 * 64 * 64
    assert f"cut in the given order: {len(plan.branches)} groups of units read " in plan.reason


@pytest.mark.parametrize("emit", ["auto", "triangular"])
def test_an_input_that_is_read_outside_too_is_not_cut(emit: Emit) -> None:
    graph = graph_of((16, 16), (0, 1, band(16, 2)), exits=(0, 1))
    assert plan_region(graph, FREE, emit).decision == "dense"


def residual(
    rng: np.random.Generator, count: int, *, size: int = 24, depth: int = 2
) -> tuple[StateGraph, list[NDArray[np.intp]]]:
    """State -> hidden -> state, ``depth`` times: ``count`` strongly connected components in cascade, hidden."""
    labels = [rng.permutation(np.arange(size) % count) for _ in range(depth + 1)]
    edges = []
    for axis in range(1, depth + 1):
        edges.append((0, axis, labels[0][:, None] <= labels[axis]))
        edges.append((axis, 0, labels[axis][:, None] <= labels[0]))
    graph = graph_of((size,) * (depth + 1), *edges, entries=(0,), exits=(0,))
    return dataclasses.replace(graph, inner=(0, *range(1, depth + 1))), labels


def test_a_residual_stack_is_cut_by_its_strongly_connected_components(
    rng: np.random.Generator,
) -> None:
    graph, labels = residual(rng, 3)
    plan = plan_region(graph, dataclasses.replace(FREE, batches=(1,)))
    check(graph, plan)
    assert (plan.decision, len(plan.branches)) == ("triangular", 3)
    for number, branch in enumerate(plan.branches):
        for axis, label in enumerate(labels):
            assert set(label[branch.units[axis]]) == {number}
            assert set(label[branch.inputs(axis)]) == set(range(number + 1))
    assert plan.blocks(0, 1) == ((8, 8), (16, 8), (24, 8))
    assert (
        "3 strongly connected components of more than one unit, 3 layers: 3 groups of units read 67% of the entries"
        in plan.reason
    )


def test_what_groups_exchange_has_its_price(rng: np.random.Generator) -> None:
    graph, _ = residual(rng, 3)
    slow = dataclasses.replace(FREE, batches=(1,), copy_rate=1e6)
    assert plan_region(graph, slow).decision == "dense"
    plan = plan_region(graph, slow, "triangular")
    check(graph, plan)
    assert plan.decision == "triangular"
    assert plan.relative_cost > 1


def test_a_cover_that_is_asked_for_may_cost_more() -> None:
    graph = graph_of((16, 16), (0, 1, band(16, 2)))
    assert plan_region(graph, DEAR).decision == "dense"
    plan = plan_region(graph, DEAR, "triangular")
    check(graph, plan)
    assert (plan.decision, len(plan.branches)) == ("triangular", 2)
    plan = plan_region(graph_of((4, 4), (0, 1, np.ones((4, 4)))), FREE, "triangular")
    assert plan.decision == "dense"
    assert plan.reason.endswith("no two groups of units read less than everything")


LAYOUTS: frozenset[StackLayout] = frozenset({"columns", "rows"})


def stackable(
    rng: np.random.Generator, sizes: list[int], *, shuffled: bool = True, **fields: Any
) -> StateGraph:
    """K -> 4 K -> K with blocks of the given sizes."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    axes = [labels, np.repeat(labels, 4), labels]
    if shuffled:
        axes = [rng.permutation(axis) for axis in axes]
    graph = graph_of(
        tuple(axis.size for axis in axes),
        (0, 1, blocks(axes[0], axes[1])),
        (1, 2, blocks(axes[1], axes[2])),
    )
    return dataclasses.replace(graph, layouts=LAYOUTS, **fields)


class TestStacks:
    def test_equal_blocks_in_columns_on_a_cpu(self, rng: np.random.Generator) -> None:
        plan = plan_region(stackable(rng, [128] * 8), CPU)
        assert plan.decision == "grouped"
        assert plan.grouping == Grouping("columns", (Stack(8, (128, 512, 128)),))
        assert plan.reason.endswith(
            f"; 8 branches in 1 stack in columns, predicted to take {plan.relative_cost:.2f} of the time"
        )
        assert plan.entries(0, 1) == 8 * 128 * 512

    def test_in_rows_on_a_gpu(self, rng: np.random.Generator) -> None:
        plan = plan_region(stackable(rng, [512] * 8), CUDA)
        assert plan.grouping == Grouping("rows", (Stack(8, (512, 2048, 512)),))

    def test_small_layers_stay_dense(self, rng: np.random.Generator) -> None:
        assert plan_region(stackable(rng, [16] * 4), CPU).decision == "dense"

    def test_blocks_of_odd_sizes_are_padded(self, rng: np.random.Generator) -> None:
        plan = plan_region(stackable(rng, [125] * 8), CPU, "grouped")
        assert plan.grouping == Grouping("columns", (Stack(8, (128, 512, 128)),))
        assert "in columns, 5% padding, " in plan.reason
        assert plan.entries(0, 1) == 8 * 128 * 512

    def test_an_axis_that_cannot_be_padded(self, rng: np.random.Generator) -> None:
        unpadded = frozenset({1})
        plan = plan_region(stackable(rng, [125] * 8, unpadded=unpadded), CPU, "grouped")
        assert plan.grouping == Grouping("rows", (Stack(8, (125, 500, 125)),))

    def test_unequal_blocks_have_stacks_of_their_own(self, rng: np.random.Generator) -> None:
        plan = plan_region(stackable(rng, [512, 128, 512, 128, 128]), CPU)
        assert plan.grouping == Grouping(
            "columns", (Stack(2, (512, 2048, 512)), Stack(3, (128, 512, 128)))
        )
        assert [branch.units[0].size for branch in plan.branches] == [512] * 2 + [128] * 3

    def test_blocks_in_turn_are_cheaper(self, rng: np.random.Generator) -> None:
        mixed = plan_region(stackable(rng, [128] * 8), CPU)
        in_turn = plan_region(stackable(rng, [128] * 8, shuffled=False), CPU)
        free = plan_region(stackable(rng, [128] * 8, free=frozenset({0, 2})), CPU)
        assert in_turn.relative_cost == free.relative_cost < mixed.relative_cost

    def test_why_there_are_none(self, rng: np.random.Generator) -> None:
        graph = dataclasses.replace(
            stackable(rng, [8] * 4), layouts=frozenset(), unstacked="for a reason"
        )
        plan = plan_region(graph, CPU, "grouped")
        assert plan.decision == "dense"
        assert plan.reason.endswith("; no stacks: for a reason")


@st.composite
def graphs(draw: st.DrawFn) -> StateGraph:
    """Random chains with a residual and a gate, at random densities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    ends = [(axis, axis + 1) for axis in range(len(sizes) - 1)]
    ends += draw(st.lists(st.tuples(*[st.integers(0, len(sizes) - 1)] * 2), max_size=2))
    density = draw(st.sampled_from([0.05, 0.2, 0.5, 1.0]))
    edges = [(a, b, rng.random((sizes[a], sizes[b])) < density) for a, b in ends]
    exits = tuple(sorted({len(sizes) - 1, *draw(st.sets(st.integers(1, len(sizes) - 1)))}))
    entries = tuple(sorted({0, *draw(st.sets(st.integers(0, len(sizes) - 1)))}))
    return graph_of(sizes, *edges, entries=entries, exits=exits)


@settings(max_examples=60)
@given(
    graphs(),
    st.sampled_from(get_args(Emit)),
    st.sampled_from([FREE, CPU, CUDA]),
    st.sets(st.integers(0, 1)),
)
def test_every_plan_is_exact(
    graph: StateGraph, emit: Emit, cost: CostModel, unpadded: set[int]
) -> None:
    graph = dataclasses.replace(graph, layouts=LAYOUTS, unpadded=frozenset(unpadded))
    plan = plan_region(graph, cost, emit)
    assert plan.reason
    if plan.decision == "dense":
        assert plan.branches == ()
    else:
        check(graph, plan)
        assert (plan.decision == "shrink") == (len(plan.branches) == 1)
        assert emit in {"auto", plan.decision} or {emit, plan.decision} == {"split", "shrink"}


def test_cascades_are_not_looked_for_in_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every supported entry is read whatever the order, and the search takes long on them."""
    looked: list[int] = []

    def find(*_: object, **__: object) -> tuple[()]:
        looked.append(1)
        return ()

    monkeypatch.setattr(candidates, "find_cascades", find)
    for holes, expected in ((1, 0), (40, 1)):
        mask = np.ones((16, 16), bool)
        mask.ravel()[:holes] = False
        graph = StateGraph((16, 16), (Edge(0, 1, mask),), (), (0,), (1,), 4)
        plan_region(graph, CPU)
        assert len(looked) == expected
