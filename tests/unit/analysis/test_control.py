from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.analysis.control import p_structure
from onnx_decompose.analysis.structure import bipartite_components

if TYPE_CHECKING:
    from numpy.typing import NDArray


def components(mask: NDArray[np.bool_]) -> float:
    return float(bipartite_components(mask).count)


def longest_row(mask: NDArray[np.bool_]) -> float:
    return float(mask.sum(axis=1).max())


def blocks(rng: np.random.Generator, count: int, side: int) -> NDArray[Any]:
    mask = np.kron(np.eye(count, dtype=bool), np.ones((side, side), dtype=bool))
    return mask[rng.permutation(count * side)][:, rng.permutation(count * side)]


def test_hidden_blocks_are_more_than_chance(rng: np.random.Generator) -> None:
    control = p_structure(blocks(rng, 4, 8), components, rng=rng)
    assert control.statistic == 4
    assert control.pvalue == pytest.approx(1 / 200)
    assert control.draws == 199


def test_a_random_mask_is_not_and_costs_few_draws(rng: np.random.Generator) -> None:
    control = p_structure(rng.random((40, 40)) < 0.2, components, rng=rng)
    assert control.pvalue > 0.5
    assert control.draws < 20


def test_p_values_are_valid_under_chance() -> None:
    rng = np.random.default_rng(1)
    p = [
        p_structure(
            rng.random((12, 12)) < 0.12, longest_row, rng=rng, most_draws=39, enough=4
        ).pvalue
        for _ in range(200)
    ]
    for level in (0.05, 0.25):
        assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level / 200)


def test_deterministic_by_seed() -> None:
    mask = np.random.default_rng(2).random((30, 30)) < 0.05
    runs = {p_structure(mask, components, rng=np.random.default_rng(3)) for _ in range(2)}
    assert len(runs) == 1


@pytest.mark.parametrize("value", [True, False])
def test_nothing_to_shuffle(value: bool, rng: np.random.Generator) -> None:
    control = p_structure(np.full((5, 5), value), components, rng=rng)
    assert control.pvalue == 1.0
    assert control.draws == 0
