from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Zero
from onnx_decompose.analysis.shared import Shared, equal_lines, shared_lines


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_lines_with_a_common_drift_are_found(
    share: float, axis: int, rng: np.random.Generator
) -> None:
    lines = rng.normal(0, 0.05, (1000, 48))
    members = np.sort(rng.choice(1000, int(share * 1000), replace=False))
    lines[members] = rng.normal(0, 0.05, 48) + rng.normal(0, 1e-6, (members.size, 48))
    weight = lines.astype(np.float32) if axis == 0 else lines.T.astype(np.float32)
    (group,) = shared_lines(weight, axis, rng=rng)
    np.testing.assert_array_equal(group.members, members)
    assert group.axis == axis
    assert group.representative.shape == (48,)
    assert 0 < group.deviation < 1e-5
    if share < 1:  # otherwise the other axis holds constant lines, near each other by chance
        assert shared_lines(weight, 1 - axis, rng=rng) == ()


def test_unrelated_lines_form_no_group(rng: np.random.Generator) -> None:
    for scale in (0.0, 1.0):
        weight = (scale + rng.normal(0, 0.05, (400, 64))).astype(np.float32)
        assert shared_lines(weight, 0, rng=rng) == ()
        assert shared_lines(weight, 1, rng=rng) == ()


def test_exact_duplicates_and_zero_lines(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 1, (60, 20)).astype(np.float32)
    weight[[3, 30, 31]] = weight[3]
    weight[[7, 50]] = weight[7]
    weight[[10, 11]] = 0
    groups = shared_lines(weight, 0, rng=rng)
    assert [g.members.tolist() for g in groups] == [[3, 30, 31], [7, 50]]
    assert all(g.deviation == 0 for g in groups)


def test_two_drifts_are_two_groups(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 1, (500, 32))
    weight[:200] = rng.normal(0, 1, 32) + rng.normal(0, 1e-6, (200, 32))
    weight[200:260] = rng.normal(0, 1, 32) + rng.normal(0, 1e-6, (60, 32))
    groups = shared_lines(weight.astype(np.float32), 0, rng=rng)
    assert [g.members.size for g in groups] == [200, 60]


def test_the_criterion_removes_nothing(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 1, (50, 40)).astype(np.float32)
    weight[:, 5] = weight[:, 9]
    weight[0, 0] = 0
    selection = make_criterion("shared", 0.01).select(
        Evidence(weight, weight, Zero(), "zero"), rng=rng
    )
    np.testing.assert_array_equal(selection.mask, weight != 0)
    (group,) = selection.shared
    assert group.axis == 1
    assert group.members.tolist() == [5, 9]
    assert selection.pi0 == pytest.approx(1 / 40)


@pytest.mark.parametrize("axis", [0, 1])
def test_bitwise_equal_lines_are_classed(axis: int, rng: np.random.Generator) -> None:
    lines = rng.standard_normal((200, 40)).astype(np.float32)
    lines[[5, 100, 199]] = lines[5]
    lines[[3, 4]] = lines[3]
    lines[[7, 8]] = 0
    lines[20] = lines[21]
    lines[20, 1] = np.nextafter(lines[20, 1], np.float32(9))  # an entry that is not sampled
    weight = lines if axis == 0 else lines.T
    assert [c.tolist() for c in equal_lines(weight, axis)] == [[3, 4], [5, 100, 199]]
    assert equal_lines(weight, 1 - axis) == ()


def test_exact_finds_bitwise_equal_lines_only(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.05, (64, 500)).astype(np.float32)
    weight[:, 100:300] = rng.normal(0, 0.05, (64, 1)) + rng.normal(0, 1e-7, (64, 200))
    weight[:, 400:450] = weight[:, 400:401]
    evidence = Evidence(weight, weight, Zero(), "zero")
    near, exact = (Shared(level).select(evidence, rng=rng).shared for level in (1.0, 0.0))
    assert [group.members.size for group in near] == [200, 50]
    assert [group.members.tolist() for group in exact] == [list(range(400, 450))]
    assert exact[0].deviation == 0
    assert Shared(0.0).name == "shared(0)"


def test_the_schedule_drops_loose_groups_first(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.05, (64, 500)).astype(np.float32)
    for start, drift in ((100, 5e-4), (300, 2e-6)):
        noise = rng.normal(0, drift, (64, 100))
        weight[:, start : start + 100] = rng.normal(0, 0.05, (64, 1)) + noise
    evidence = Evidence(weight, weight, Zero(), "zero")
    level: Shared | None = Shared()
    found = {}
    while level is not None:
        found[level.name] = [
            int(group.members[0]) for group in level.select(evidence, rng=rng).shared
        ]
        level = level.looser()
    assert found == {
        "shared": [100, 300],
        "shared(0.01)": [300],
        "shared(0.001)": [300],
        "shared(0.0001)": [],
    }
