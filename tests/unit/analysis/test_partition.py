"""Units in a given number of balanced groups."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.partition import Energy, balanced, kept_share, partition

GROUPS = 4


def _planted(
    rng: np.random.Generator, sizes: tuple[int, ...], noise: float, groups: int = GROUPS
) -> tuple[list[np.ndarray], list[Energy]]:
    """Layers in a chain; energy within hidden groups, and ``noise`` of it between."""
    truth = [rng.permutation(np.arange(size) % groups) for size in sizes]
    edges = [
        Energy(
            layer,
            layer + 1,
            rng.chisquare(1, size=(sizes[layer], sizes[layer + 1]))
            * np.where(truth[layer][:, None] == truth[layer + 1], 1.0, noise),
        )
        for layer in range(len(sizes) - 1)
    ]
    return truth, edges


def _same(found: tuple[np.ndarray, ...], truth: list[np.ndarray]) -> bool:
    """Whether the groups are the same but for their numbers, across all layers."""
    pairs = set(
        zip(np.concatenate(found).tolist(), np.concatenate(truth).tolist(), strict=True)
    )
    return len(pairs) == len(set(np.concatenate(truth).tolist()))


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, edges = _planted(rng, (24, 64, 40, 16), noise)
    found = partition((24, 64, 40, 16), edges, GROUPS, rng=rng)
    assert _same(found.labels, truth)
    assert found.kept == pytest.approx(kept_share(truth, edges))


def test_units_on_another_scale_change_nothing() -> None:
    rng = np.random.default_rng(3)
    truth, (edge,) = _planted(rng, (32, 32), 0.05)
    scales = 10.0 ** rng.uniform(-2, 2, size=(32, 1))
    found = partition((32, 32), [Energy(0, 1, edge.entries * scales)], GROUPS, rng=rng)
    assert _same(found.labels[1:], truth[1:])


def test_of_chance_little_more_than_a_share_is_kept() -> None:
    rng = np.random.default_rng(4)
    edges = [Energy(0, 1, rng.chisquare(1, size=(64, 128)))]
    kept = partition((64, 128), edges, GROUPS, rng=rng).kept
    assert 1 / GROUPS < kept < 0.5


@pytest.mark.parametrize("sizes", [(30, 41, 17), (3, 50, 2)])
def test_no_group_has_more_than_its_share(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    _, edges = _planted(rng, sizes, 0.5)
    found = partition(sizes, edges, GROUPS, rng=rng)
    for size, labels in zip(sizes, found.labels, strict=True):
        assert np.bincount(labels, minlength=GROUPS).max() <= -(-size // GROUPS)


def test_the_same_source_of_randomness_gives_the_same_groups() -> None:
    _, edges = _planted(np.random.default_rng(6), (20, 30), 0.9)
    first, second = (
        partition((20, 30), edges, 2, rng=np.random.default_rng(7)) for _ in range(2)
    )
    for one, other in zip(first.labels, second.labels, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_layer_that_feeds_itself() -> None:
    rng = np.random.default_rng(8)
    truth = rng.permutation(np.arange(40) % 2)
    entries = rng.chisquare(1, size=(40, 40)) * np.where(truth[:, None] == truth, 1, 0.05)
    found = partition((40,), [Energy(0, 0, entries)], 2, rng=rng)
    assert _same(found.labels, [truth])


def test_units_without_energy_fill_up_the_groups() -> None:
    rng = np.random.default_rng(9)
    entries = np.zeros((8, 8))
    found = partition((8, 8), [Energy(0, 1, entries)], 2, rng=rng)
    assert found.kept == 1
    assert all(np.bincount(labels).tolist() == [4, 4] for labels in found.labels)


def test_the_balanced_assignment_is_the_best_one() -> None:
    scores = np.array([[5.0, 4.0], [4.0, 1.0], [3.0, 3.0], [9.0, 0.0]])
    # Unit 2 loses nothing by group 1, unit 0 the least of the others.
    assert balanced(scores).tolist() == [1, 0, 1, 0]


def test_many_units_are_assigned_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    for units, groups in ((300, 4), (301, 8), (64, 3)):
        scores = rng.exponential(size=(units, groups)) * np.geomspace(1, 3, groups)
        best = balanced(scores)
        monkeypatch.setattr("onnx_decompose.analysis.partition._MOST_EXACT", 10)
        found = balanced(scores)
        monkeypatch.undo()
        assert np.bincount(found, minlength=groups).max() <= -(-units // groups)
        rows = np.arange(units)
        assert scores[rows, found].sum() > 0.97 * scores[rows, best].sum()


def test_a_vocabulary_in_eight_groups_takes_no_square_of_it() -> None:
    scores = np.random.default_rng(9).exponential(size=(100_000, 8))
    found = balanced(scores)
    assert np.bincount(found).tolist() == [12_500] * 8
