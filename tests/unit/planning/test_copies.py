from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from onnx_decompose.analysis.structure import Edge
from onnx_decompose.planning.copies import Copies, find_copies
from onnx_decompose.planning.cost import CPU, CUDA
from onnx_decompose.planning.plan import RegionPlan, plan_region, plan_shared
from onnx_decompose.planning.state_graph import StateGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOMY = dataclasses.replace(CPU, kernel=1e-12, copy_rate=1e15, gather_rate=1e15)
"""A provider where nothing costs but the products."""


def copies_of(inputs: list[int], outputs: list[int]) -> Copies:
    return Copies(np.array(inputs), np.array(outputs))


def planned(weight: NDArray[np.float32], **options: object) -> RegionPlan:
    """The plan of one site that keeps all nonzero entries."""
    graph = StateGraph(weight.shape, (Edge(0, 1, weight != 0),), (), (0,), (1,), 4)
    cost = options.get("cost", CPU)
    emit = options.get("emit", "auto")
    other = plan_region(graph, cost, emit)  # type: ignore[arg-type]
    copies = find_copies(weight)
    assert copies is not None
    return plan_shared(graph, other, copies, cost, emit)  # type: ignore[arg-type]


def test_equal_lines_are_numbered(rng: np.random.Generator) -> None:
    rows, columns = [2, 0, 2, 1], [0, 1, 1, 2, 0]
    weight = rng.standard_normal((3, 3))[np.ix_(rows, columns)]
    copies = find_copies(weight)
    assert copies is not None
    # Rows of one input come first, so that what is added is put behind the rest.
    assert copies.inputs.tolist() == [2, 0, 2, 1]
    assert copies.outputs.tolist() == columns
    first, second = copies.computed
    assert (first.tolist(), second.tolist()) == ([1, 3, 0], [0, 1, 3])
    assert copies.alone.tolist() == [1, 3]
    assert [units.tolist() for units in copies.added] == [[0, 2]]
    different = weight[np.ix_(first, second)]
    np.testing.assert_array_equal(different[np.ix_(copies.inputs, copies.outputs)], weight)


def test_lines_of_zeros_are_isolated_nodes_and_no_copies(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 6))
    weight[:, [1, 4]] = 0
    weight[[0, 2]] = 0
    assert find_copies(weight) is None


@pytest.mark.parametrize(
    ("outputs", "edges"),
    [
        ([0, 1, 2, 2, 2], (0, 2)),
        ([0, 0, 1, 2], (1, 0)),
        ([0, 0, 1, 2, 2, 2], (1, 2)),
        ([0, 0, 0], (2, 0)),
        ([0, 1, 1, 2], None),
        ([0, 1, 2, 0], None),
        ([0, 1, 0, 2, 2], None),
    ],
)
def test_copies_at_the_ends(outputs: list[int], edges: tuple[int, int] | None) -> None:
    assert copies_of([0, 1], outputs).edges == edges


def test_a_shared_tail_is_predicted_to_pay(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((256, 4000)).astype(np.float32)
    weight[:, 2000:] = weight[:, 2000:2001]
    plan = planned(weight)
    assert plan.decision == "shared"
    assert plan.relative_cost < 0.75
    assert "2001 different columns of 4000" in plan.reason
    (branch,) = plan.branches
    assert [units.size for units in branch.units] == [256, 2001]
    assert plan.copies is not None
    assert plan.copies.picks


def test_a_few_copies_do_not_pay(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 1000)).astype(np.float32)
    weight[:, 990:] = weight[:, 990:991]
    plan = planned(weight)
    assert plan.decision == "dense"
    assert "991 different columns of 1000" in plan.reason
    assert planned(weight, emit="shared").decision == "shared"


def test_an_axis_that_does_not_pay_is_left_whole(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((256, 4000)).astype(np.float32)
    weight[1] = weight[3]
    weight[:, 1000:] = weight[:, 1000:1001]
    copies = planned(weight).copies
    assert copies is not None
    assert copies.inputs.tolist() == list(range(256))
    both = planned(weight, cost=ROOMY).copies
    assert both is not None
    assert both.computed[0].size == 255


def test_a_better_plan_stays(rng: np.random.Generator) -> None:
    weight = np.zeros((512, 512), np.float32)
    for start in range(0, 512, 64):
        block = slice(start, start + 64)
        weight[block, block] = rng.standard_normal((64, 64))
    weight[:, 1] = weight[:, 0]
    plan = planned(weight, cost=ROOMY)
    assert plan.decision == "split"
    assert plan.copies is None


def test_only_a_provider_with_the_operator_picks() -> None:
    assert [CPU.picks(size) for size in (2, 4, 8)] == [False, True, True]
    assert not CUDA.picks(4)
    assert CUDA.pick(64, 1000, 4) == CUDA.gather(64, 1000, 4)
    assert CPU.pick(64, 1000, 2) == CPU.gather(64, 1000, 2)
