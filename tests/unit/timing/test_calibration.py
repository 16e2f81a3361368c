"""No time is measured here: what the fit is given was made up from known coefficients."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from onnx_decompose.planning.cost import CPU, CUDA, CostModel
from onnx_decompose.runtime.sessions import Provider, open_session
from onnx_decompose.timing import calibration
from onnx_decompose.timing.bench import BatchTiming, Timing
from onnx_decompose.timing.calibration import Sample, calibrate, fit, measure
from onnx_decompose.timing.cost_cache import COEFFICIENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

TRUTH = CostModel(
    kernel=5e-6,
    flop_rate=4e10,
    half_flop_rate=9e10,
    integer_flop_rate=2e11,
    byte_rate=9e9,
    block=2e-6,
    batched_flop_rate=2e10,
    grouped_flop_rate=6e10,
    copy_rate=5e9,
    elementwise_rate=2e10,
    gather_rate=3e8,
    row_gather_rate=2e10,
    transpose_rate=2e9,
)


def samples(provider: Provider) -> list[Sample]:
    """What :func:`measure` would give if the machine were ``TRUTH``."""
    found = []
    for probe in calibration._probes(provider):
        for rows in calibration._ROWS[provider]:
            sample = Sample(probe.operator, (rows, *probe.sizes, probe.itemsize), 1.0)
            found.append(dataclasses.replace(sample, seconds=sample.predicted(TRUTH)))
    return found


def assert_close(found: CostModel, but: tuple[str, ...] = (), rel: float = 0.1) -> None:
    for name in COEFFICIENTS:
        if name not in but:
            assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=rel), name


@pytest.mark.parametrize(("provider", "start"), [(Provider.CPU, CPU), (Provider.CUDA, CUDA)])
def test_the_probes_determine_every_coefficient(provider: Provider, start: CostModel) -> None:
    found = fit(samples(provider), start)
    # Neither provider has probes of the other's narrow types.
    unmeasured = "half_flop_rate" if provider is Provider.CPU else "integer_flop_rate"
    assert_close(found, (unmeasured,))


def test_a_few_wild_times_do_not_move_the_fit() -> None:
    given = samples(Provider.CPU)
    for number in range(0, len(given), 9):
        given[number] = dataclasses.replace(given[number], seconds=30 * given[number].seconds)
    assert_close(fit(given, CPU), ("half_flop_rate", "block"), rel=0.5)


def test_a_coefficient_that_no_sample_depends_on_stays() -> None:
    moving = [sample for sample in samples(Provider.CPU) if sample.operator == "transpose"]
    found = fit(moving, CPU)
    assert found.transpose_rate == pytest.approx(TRUTH.transpose_rate, rel=0.1)
    assert found.flop_rate == pytest.approx(CPU.flop_rate)
    assert found.batches == CPU.batches


def run_probes(monkeypatch: pytest.MonkeyPatch, probes: list[Any], spent: float) -> None:
    """Copies of an operator take what ``TRUTH`` says, and every run ``spent`` seconds more."""
    current = iter(probes)
    monkeypatch.setattr(calibration, "_probes", lambda _provider: probes)

    def bench_candidates(
        _original: object, _made: object, *, feeds_by_batch: Mapping[int, Any], **_: object
    ) -> dict[str, Timing]:
        probe = next(current)
        entries = []
        for rows in feeds_by_batch:
            once = Sample(probe.operator, (rows, *probe.sizes, probe.itemsize), 0).predicted(
                TRUTH
            )
            times = [1e3 * (spent + copies * once) for copies in (1, calibration._COPIES)]
            entries.append(BatchTiming(rows, times[0], times[1], 1.0, 1.0, 1.0, 8))
        return {"several": Timing(Provider.CPU, tuple(entries))}

    monkeypatch.setattr(calibration, "bench_candidates", bench_candidates)


def test_a_runs_own_time_is_not_the_operators(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    probes = list(calibration._probes(Provider.CPU))
    run_probes(monkeypatch, probes, spent=1e-3)
    assert {s.operator for s in measure(Provider.CPU, rng=rng)} == {p.operator for p in probes}
    run_probes(monkeypatch, probes, spent=1e-3)
    found = calibrate(Provider.CPU, rng=rng)
    assert_close(found, ("half_flop_rate",))
    assert found.half_flop_rate == found.flop_rate  # float16 is computed in float32 there


def test_times_that_drown_in_noise_are_left_out(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    timing = Timing(Provider.CPU, (BatchTiming(1, 2.0, 1.9, 1, 1, 1, 8),))
    monkeypatch.setattr(calibration, "bench_candidates", lambda *_, **__: {"several": timing})
    assert measure(Provider.CPU, rng=rng) == []


def test_every_probe_runs_and_is_the_operator_that_it_stands_for(
    rng: np.random.Generator,
) -> None:
    ops = {
        "matmul": "MatMul",
        "batched_matmul": "MatMul",
        "grouped_conv": "Conv",
        "gather": "Gather",
        "row_gather": "Gather",
        "transpose": "Transpose",
        "elementwise": "Relu",
        "copy": "Split",
    }
    small = [p for p in calibration._probes(Provider.CPU) if max(p.sizes) <= 256]
    assert {probe.operator for probe in small} == set(ops)
    for probe in small:
        for copies in (1, 3):
            content = probe.model(copies, rng)
            model = onnx.load_from_string(content)
            onnx.checker.check_model(model)
            integer = probe.dtype.kind == "u"
            op = "MatMulInteger" if integer else ops[probe.operator]
            assert [node.op_type for node in model.graph.node] == copies * [op]
            session = open_session(content, Provider.CPU)
            session.run(probe.feeds(2, rng))
        sample = Sample(probe.operator, (2, *probe.sizes, probe.itemsize), 1.0)
        assert sample.predicted(TRUTH) > 0
