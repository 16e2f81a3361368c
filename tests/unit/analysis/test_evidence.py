from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.decay import bulk_decay, sorted_magnitudes
from onnx_decompose.analysis.evidence import Evidence, gather_evidence
from onnx_decompose.analysis.null import Normal, Null, Uniform, Zero
from onnx_decompose.analysis.record import QUANTILE_LEVELS, InitRecord, Prior
from onnx_decompose.analysis.sketch import Sketch
from onnx_decompose.errors import OptionError

FloatArray = NDArray[np.floating[Any]]


def record(initial: FloatArray, family: str) -> InitRecord:
    scale = float(np.abs(initial).max() if family == "uniform" else initial.std())
    quantiles = tuple(np.quantile(initial, QUANTILE_LEVELS).tolist())
    return InitRecord("w", initial.shape, family, 0.0, scale, quantiles, *initial.shape)


def trained(rng: np.random.Generator, decay: float, steps: int) -> tuple[Any, Any, Any]:
    """Initial and trained weight, and the truth: decay applied as an optimizer does, in float32."""
    initial = rng.normal(0, 0.02, (150, 200)).astype(np.float32)
    weight = initial.copy()
    for _ in range(steps):
        weight *= np.float32(1 - decay)
    touched = rng.random(weight.shape) < 0.7
    moved = rng.normal(0, 0.01, weight.shape).astype(np.float32)
    return initial, np.where(touched, weight + moved, weight), touched


@pytest.mark.parametrize(
    ("decay", "steps"), [(0.0, 1), (1e-4, 3000), (1e-5, 8000), (1e-6, 3000)]
)
def test_snapshot_tells_untouched_entries_through_decay(
    decay: float, steps: int, rng: np.random.Generator
) -> None:
    initial, weight, touched = trained(rng, decay, steps)
    evidence = gather_evidence(weight, "auto", Prior(150, 200, snapshot=initial))
    assert evidence.source == "snapshot"
    assert evidence.untouched is not None
    assert evidence.decay is not None
    assert evidence.decay.factor == pytest.approx((1 - decay) ** steps, rel=1e-3)
    assert (~touched)[evidence.untouched].mean() > 0.9995
    assert evidence.untouched[~touched].mean() > 0.997


def test_snapshot_where_everything_moved(rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.02, (100, 120)).astype(np.float32)
    weight = initial + rng.normal(0, 0.01, initial.shape).astype(np.float32)
    evidence = gather_evidence(weight, "snapshot", Prior(100, 120, snapshot=initial))
    assert evidence.decay is None
    assert evidence.untouched is not None
    assert evidence.untouched.mean() < 1e-3
    assert "touched" in evidence.note


def test_entries_that_moved_a_little_are_not_taken_for_untouched(
    rng: np.random.Generator,
) -> None:
    initial = rng.normal(0, 0.02, (64, 128)).astype(np.float32)
    weight = initial * rng.uniform(1.01, 2, initial.shape).astype(np.float32)
    weight[0, :40] = initial[0, :40] * rng.uniform(0.9999, 1.0001, 40).astype(np.float32)
    weight[1, :3] = initial[1, :3]
    evidence = gather_evidence(weight, "snapshot", Prior(64, 128, snapshot=initial))
    assert evidence.untouched is not None
    assert evidence.untouched[1, :3].all()
    assert evidence.untouched.sum() == 3 + np.count_nonzero(weight[0, :40] == initial[0, :40])


def test_snapshot_of_a_weight_saved_in_half_precision(rng: np.random.Generator) -> None:
    initial, weight, touched = trained(rng, 0.0, 1)
    half = weight.astype(np.float16)
    evidence = gather_evidence(half, "snapshot", Prior(150, 200, snapshot=initial))
    assert evidence.untouched is not None
    assert evidence.untouched[~touched].all()
    # A moved entry may round to the same float16: chance alone, about one in a hundred.
    assert evidence.untouched[touched].mean() < 0.02


def test_optimizer_state_of_zero_means_untouched() -> None:
    weight = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    moment = np.array([[0.0, 1e-12], [1.0, 1.0]], np.float32)
    evidence = gather_evidence(weight, "optimizer", Prior(2, 2, second_moment=moment))
    selection = make_criterion("fdr", 0.01).select(evidence, rng=np.random.default_rng(0))
    assert selection.mask.tolist() == [[False, True], [True, False]]
    assert selection.pi0 == pytest.approx(0.25)


def test_auto_takes_the_strongest_source(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 1, (20, 20)).astype(np.float32)
    kept = record(weight, "normal")
    everything = Prior(20, 20, kept, weight, np.ones_like(weight))
    assert gather_evidence(weight, "auto", everything).source == "snapshot"
    assert (
        gather_evidence(weight, "auto", Prior(20, 20, kept, None, weight)).source == "optimizer"
    )
    assert gather_evidence(weight, "auto", Prior(20, 20, kept)).source == "recorded"
    assert gather_evidence(weight, "auto", Prior(20, 20)).source == "zero"


@pytest.mark.parametrize("spec", ["snapshot", "optimizer", "recorded"])
def test_missing_data_falls_back_to_zero_and_says_so(spec: str) -> None:
    evidence = gather_evidence(np.ones((3, 3), np.float32), spec, Prior(3, 3))
    assert evidence.source == "zero"
    assert isinstance(evidence.null, Zero)
    assert "only exact zeros" in evidence.note


def test_recorded_families(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.02, (200, 100)).astype(np.float32)
    for family, kind in (("normal", Normal), ("uniform", Uniform), ("other", Sketch)):
        evidence = gather_evidence(weight, "recorded", Prior(1, 1, record(weight, family)))
        assert isinstance(evidence.null, kind)
    assert (
        gather_evidence(weight, "recorded", Prior(1, 1, record(0 * weight, "constant"))).source
        == "zero"
    )


def test_unknown_null_is_refused() -> None:
    with pytest.raises(OptionError, match="gauss"):
        gather_evidence(np.ones((3, 3), np.float32), "gauss:1", Prior(3, 3))


@pytest.mark.parametrize(
    ("null", "draw"),
    [
        (Normal(0.02), lambda rng: rng.normal(0, 0.02, (200, 200))),
        (Uniform(0.05), lambda rng: rng.uniform(-0.05, 0.05, (200, 200))),
    ],
    ids=["normal", "uniform"],
)
def test_bulk_decay_errs_on_the_wide_side(
    null: Null, draw: Any, rng: np.random.Generator
) -> None:
    weight = (0.5 * draw(rng)).astype(np.float32)
    weight[:10] *= 6
    estimate = bulk_decay(sorted_magnitudes(weight), null)
    assert estimate.factor == pytest.approx(0.5, rel=0.05)
    assert estimate.interval[1] > 0.5
    assert bulk_decay(sorted_magnitudes(draw(rng).astype(np.float32)), null).factor == 1.0


@pytest.mark.parametrize("spec", ["normal:0.02", "recorded"])
def test_a_crowd_of_decayed_lines_shrinks_the_null(spec: str, rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.02, (200, 300)).astype(np.float32)
    weight = np.float32(0.6) * initial
    weight[:80] *= rng.uniform(2, 4, (80, 1)).astype(np.float32)
    evidence = gather_evidence(weight, spec, Prior(200, 300, record(initial, "normal")))
    assert evidence.decay is not None
    assert evidence.decay.basis == "lines"
    low, high = evidence.decay.interval
    assert 0.58 < low < 0.6 < high < 0.62
    assert evidence.null.std == pytest.approx(0.02 * high, rel=0.01)
    assert evidence.error == pytest.approx(high / evidence.decay.factor - 1)
    assert "lines of one scale" in evidence.note
    mask = make_criterion("fdr", 0.05).select(evidence, rng=rng).mask
    assert mask[80:].sum() <= 0.05 * mask.sum()
    wider = Evidence(weight, weight, Normal(0.02), "test")
    assert mask.sum() > 1.5 * make_criterion("fdr", 0.05).select(wider, rng=rng).mask.sum()


def test_a_crowd_beside_lines_of_the_null_is_no_decay(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.02, (100, 300)).astype(np.float32)
    weight[20:] *= np.float32(0.7)
    evidence = gather_evidence(weight, "normal:0.02", Prior(100, 300))
    assert evidence.null == Normal(0.02)
    # Touched lines that only have the null's scale do not stand against a crowd.
    weight[:20] *= np.where(rng.random((20, 300)) < 0.1, 2.5, 0.6).astype(np.float32)
    evidence = gather_evidence(weight, "normal:0.02", Prior(100, 300))
    assert evidence.decay is not None
    assert evidence.decay.interval[0] < 0.7 < evidence.decay.interval[1]


def test_a_bulk_that_training_shrank_does_not_shrink_the_null(rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.02, (200, 300)).astype(np.float32)
    weight = initial * rng.uniform(0.2, 1, (200, 1)).astype(np.float32)
    weight *= rng.uniform(0.5, 1, (1, 300)).astype(np.float32)
    weight[:20] = initial[:20]
    evidence = gather_evidence(weight, "normal:0.02", Prior(200, 300))
    assert evidence.null == Normal(0.02)
    assert evidence.decay is not None
    assert evidence.decay.basis == "bulk"
    assert evidence.decay.interval[1] < 0.8
    assert "not used" in evidence.note


@pytest.mark.parametrize(
    "spec", ["normal:0.02,decay=0.5", "normal(0, 0.02, decay=0.5)", "recorded:decay=0.5"]
)
def test_a_stated_decay_is_taken_as_it_is(spec: str, rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.02, (50, 60)).astype(np.float32)
    evidence = gather_evidence(initial, spec, Prior(50, 60, record(initial, "normal")))
    assert evidence.null.std == pytest.approx(0.01, rel=0.05)
    assert evidence.decay is not None
    assert evidence.decay.basis == "stated"
    assert evidence.decay.interval == (0.5, 0.5)
    assert evidence.error == 0


@pytest.mark.parametrize("spec", ["torch:decay=0", "torch:decay=1.5", "recorded:gain=2"])
def test_a_stated_decay_out_of_range_is_refused(spec: str) -> None:
    kept = record(np.ones((3, 3), np.float32) * [[1], [2], [3]], "normal")
    with pytest.raises(OptionError, match=spec):
        gather_evidence(np.ones((3, 3), np.float32), spec, Prior(3, 3, kept))


def test_empirical_null_is_the_central_bulk(rng: np.random.Generator) -> None:
    weight = rng.normal(0, 0.013, (200, 200)).astype(np.float32)
    weight[:10] += 0.2
    evidence = gather_evidence(weight, "empirical", Prior(200, 200))
    assert evidence.null.std == pytest.approx(0.013, rel=0.05)
    mask = make_criterion("fdr", 0.01).select(evidence, rng=rng).mask
    assert mask[:10].all()
    assert mask[10:].mean() < 0.001


def test_empirical_null_of_weights_spread_over_decades(rng: np.random.Generator) -> None:
    logs = rng.normal(-7, 1.0, (200, 200))
    large = rng.random(logs.shape) < 0.05
    logs[large] = rng.normal(-2, 0.25, np.count_nonzero(large))
    weight = (10**logs * rng.choice([-1, 1], logs.shape)).astype(np.float32)
    evidence = gather_evidence(weight, "empirical", Prior(200, 200))
    assert "decades" in evidence.note
    assert "valley" in evidence.note or "gap" in evidence.note
    selection = make_criterion("fdr", 0.01).select(evidence, rng=rng)
    assert (selection.mask == large).mean() > 0.998
    assert selection.pi0 == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(0, 0.02, (128, 128)),
        lambda rng: rng.uniform(-0.02, 0.02, (128, 128)),
        lambda rng: rng.laplace(0, 0.02, (128, 128)),
        lambda rng: rng.standard_t(3, (128, 128)),
        lambda rng: 10 ** rng.normal(-7, 1.5, (128, 128)),
        lambda rng: rng.normal(0, 1, (128, 128)) * np.exp(rng.normal(0, 0.5, (128, 1))),
    ],
    ids=["normal", "uniform", "laplace", "t", "decades", "rows"],
)
def test_no_edge_means_no_null(draw: Any, rng: np.random.Generator) -> None:
    weight = draw(rng).astype(np.float32)
    evidence = gather_evidence(weight, "empirical", Prior(128, 128))
    assert evidence.source == "zero"
    assert "no empirical null" in evidence.note
    assert make_criterion("fdr", 0.01).select(evidence, rng=rng).mask.all()


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (np.ones((3, 3)), "too few nonzero"),
        (np.tile(np.arange(1.0, 65.0), (64, 1)), "too few distinct"),
        (
            np.geomspace(1, 2, 400).reshape(20, 20) * np.repeat([1e-6, 1, 1, 1], 5)[:, None],
            "only 25",
        ),
    ],
)
def test_why_there_is_no_empirical_null(weight: Any, why: str) -> None:
    evidence = gather_evidence(weight.astype(np.float32), "empirical", Prior(*weight.shape))
    assert evidence.source == "zero"
    assert why in evidence.note


def test_displacement_without_a_walk_removes_the_untouched_alone(
    rng: np.random.Generator,
) -> None:
    initial = rng.normal(0, 0.02, (150, 150)).astype(np.float32)
    step = rng.uniform(-0.01, 0.01, initial.shape).astype(np.float32)
    step[:30] = 0
    evidence = gather_evidence(initial + step, "snapshot", Prior(150, 150, snapshot=initial))
    selection = make_criterion("displacement", 0.01).select(evidence, rng=rng)
    assert not selection.mask[:30].any()
    assert selection.mask[30:].mean() > 0.999
    assert "no empirical null" in selection.note


def test_displacement_keeps_what_moved_beyond_the_walk(rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.02, (150, 150)).astype(np.float32)
    step = rng.normal(0, 0.001, initial.shape).astype(np.float32)
    step[:30] = 0
    step[100:110] = 0.01
    evidence = gather_evidence(initial + step, "snapshot", Prior(150, 150, snapshot=initial))
    mask = make_criterion("displacement", 0.01).select(evidence, rng=rng).mask
    assert mask[100:110].all()
    assert not mask[:30].any()
    assert mask[30:100].mean() < 0.01
    assert make_criterion("fdr", 0.01).select(evidence, rng=rng).mask[30:100].mean() > 0.99


@pytest.mark.parametrize(
    "spec", ["normal:1", "torch", "recorded", "empirical", "snapshot", "zero"]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (20, 30)])
@pytest.mark.parametrize("value", [0.0, 1e-45, -0.5])
def test_degenerate_weights_have_evidence(
    spec: str, shape: tuple[int, int], value: float, rng: np.random.Generator
) -> None:
    weight = np.full(shape, value, np.float32)
    initial = rng.normal(0, 1, shape).astype(np.float32)
    prior = Prior(*shape, record=record(initial, "other"), snapshot=initial)
    evidence = gather_evidence(weight, spec, prior)
    assert evidence.values.shape == shape
    assert np.isfinite(evidence.null.std)
    for name in ("fdr", "group"):
        mask = make_criterion(name, 0.05).select(evidence, rng=rng).mask
        assert mask.shape == shape
        assert not mask[weight == 0].any()
