"""Ward's tree on weighted points, and levels of merged columns."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster import hierarchy

from onnx_decompose.analysis.merging import coordinates, merge_levels, ward_merges


def test_distances_in_coordinates_are_variances_of_differences_of_outputs() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3
    weight = rng.normal(size=(6, 4))
    points = coordinates(weight, np.cov(inputs.T, bias=True))
    outputs = inputs @ weight
    for one in range(4):
        for other in range(4):
            apart = np.square(points[one] - points[other]).sum()
            assert apart == pytest.approx(
                np.var(outputs[:, one] - outputs[:, other]), rel=1e-4, abs=1e-9
            )


def test_coordinates_leave_out_directions_without_variance() -> None:
    covariance = np.diag([1.0, 0.0, 2.0])
    assert coordinates(np.ones((3, 5)), covariance).shape == (5, 2)
    assert coordinates(np.ones((3, 5)), np.zeros((3, 3))).shape == (5, 0)


def test_ward_is_that_of_scipy() -> None:
    points = np.random.default_rng(1).normal(size=(60, 3))
    merges = ward_merges(points, np.ones(60))
    # scipy's height h is the distance whose square is twice the growth of the sum of squares.
    heights = hierarchy.linkage(points, "ward")[:, 2]
    np.testing.assert_allclose(np.sort(merges[:, 2]), heights**2 / 2, rtol=1e-9)


def test_a_weighted_point_counts_as_that_many_equal_ones() -> None:
    rng = np.random.default_rng(2)
    points, sizes = rng.normal(size=(12, 2)), rng.integers(1, 4, 12)
    weighted = ward_merges(points, sizes.astype(float))
    repeated = ward_merges(np.repeat(points, sizes, axis=0), np.ones(sizes.sum()))
    np.testing.assert_allclose(
        np.sort(repeated[:, 2])[-11:], np.sort(weighted[:, 2]), rtol=1e-9
    )


def test_levels_are_nested_and_tell_what_they_cost() -> None:
    rng = np.random.default_rng(3)
    points = rng.normal(size=(400, 4)).astype(np.float32)
    last, groups = np.arange(400), 400
    for level in merge_levels(points, rng):
        assert level.groups < groups
        # Nested: whoever was together stays together.
        assert len(set(zip(last.tolist(), level.labels.tolist(), strict=True))) == groups
        centres = np.stack(
            [points[level.labels == k].mean(axis=0) for k in range(level.groups)]
        )
        spread = np.square(points - centres[level.labels]).sum()
        assert level.cost == pytest.approx(spread, rel=1e-3)
        last, groups = level.labels, level.groups
    assert groups < 400 / 12


def test_planted_groups_come_first_and_cost_little() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 60, 600)
    points = (rng.normal(size=(60, 8))[labels] + 1e-4 * rng.normal(size=(600, 8))).astype(
        np.float32
    )
    costs = {level.groups: level.cost for level in merge_levels(points, rng)}
    assert max(cost for groups, cost in costs.items() if groups > 100) < 1e-3


def test_what_counts_little_is_merged_first() -> None:
    rng = np.random.default_rng(5)
    points = rng.normal(size=(200, 3)).astype(np.float32)
    weights = np.where(np.arange(200) < 100, 1.0, 1e-6)
    *_, level = (level for level in merge_levels(points, rng, weights) if level.groups >= 110)
    assert np.unique(level.labels[:100]).size == 100
    assert np.unique(level.labels[100:]).size < 100
