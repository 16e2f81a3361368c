from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import gather_evidence
from onnx_decompose.analysis.groups import line_p_values
from onnx_decompose.analysis.null import Normal, Null, Uniform
from onnx_decompose.analysis.record import Prior


@pytest.mark.parametrize("null", [Normal(0.5), Uniform(0.7)], ids=lambda n: n.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_line_p_values_are_uniform_or_larger(
    null: Null, dtype: type[np.float32 | np.float16], rng: np.random.Generator
) -> None:
    draw = (
        rng.normal(0, 0.5, (3000, 80))
        if isinstance(null, Normal)
        else rng.uniform(-0.7, 0.7, (3000, 80))
    )
    p = line_p_values(draw.astype(dtype), null, rng=rng)
    for level in (0.01, 0.05, 0.2):
        assert np.mean(p <= level) <= level + 3 * np.sqrt(level / 3000)
    assert np.mean(p <= 0.2) > 0.1


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("spec", ["normal:0.02", "uniform:0.05"])
def test_untouched_rows_are_found_without_a_snapshot(
    spec: str, decay: float, rng: np.random.Generator
) -> None:
    shape = (120, 200)
    initial = rng.normal(0, 0.02, shape) if spec[0] == "n" else rng.uniform(-0.05, 0.05, shape)
    weight = decay * initial
    touched = np.arange(120) >= 40
    weight[touched] += rng.normal(0, 0.02, shape)[touched] * rng.uniform(1.5, 3, (80, 1))
    evidence = gather_evidence(weight.astype(np.float32), spec, Prior(*shape))
    mask = make_criterion("group", 0.05).select(evidence, rng=rng).mask
    rows = mask.any(axis=1)
    assert np.count_nonzero(~rows & touched) == 0
    assert np.count_nonzero(rows & ~touched) <= 4
    assert mask[rows].all()


def test_proven_lines_are_kept_as_a_whole(rng: np.random.Generator) -> None:
    weight = np.ones((3, 3), np.float32)
    moment = np.diag([1.0, 1.0, 0.0]).astype(np.float32)
    evidence = gather_evidence(weight, "optimizer", Prior(3, 3, second_moment=moment))
    mask = make_criterion("group", 0.05).select(evidence, rng=rng).mask
    assert mask.tolist() == [[True, True, False], [True, True, False], [False] * 3]


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_without_any_touched_line_does_not_count(
    axis: int, rng: np.random.Generator
) -> None:
    lines = rng.normal(0, 1, (100, 150))
    lines[:5] *= 1.6
    weight = (lines if axis == 0 else lines.T).astype(np.float32)
    evidence = gather_evidence(weight, "normal:1", Prior(*weight.shape))
    mask = make_criterion("group", 0.05).select(evidence, rng=rng).mask
    mask = mask if axis == 0 else mask.T
    assert mask[:5].all()
    assert mask[5:].any(axis=1).sum() <= 1


def test_false_lines_stay_under_the_level(rng: np.random.Generator) -> None:
    found = 0
    for _ in range(300):
        weight = rng.normal(0, 1, (20, 30)).astype(np.float32)
        evidence = gather_evidence(weight, "normal:1", Prior(20, 30))
        found += int(make_criterion("group", 0.1).select(evidence, rng=rng).mask.any())
    assert found <= 30 + 3 * np.sqrt(27)
