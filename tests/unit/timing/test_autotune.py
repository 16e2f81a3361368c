"""Which plan is chosen, and what the report says of it; the times are made up."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.decompose import Attempt, attempt
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.graph.study import state_graph, study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.options import Options
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.plan import candidate_plans
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.autotune import _shortlist, autotuned
from onnx_decompose.timing.bench import BatchTiming, Timing
from onnx_decompose.timing.no_harm import region_timings, short_settings, without_harmful
from tests.e2e.planted import Recipe, dense_ffn, plant
from tests.passes import recurrent_models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx

    from onnx_decompose.decomposition.decompose_recurrent import RecurrentAttempt
    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.state_graph import Emit

DEAR = dataclasses.replace(CPU, kernel=1.0)
"""A provider where one more operator costs more than all products: everything is predicted to be slower."""


def timing(speedup: float) -> Timing:
    entry = BatchTiming(1, 1.0, 1 / speedup, speedup, 0.99 * speedup, 1.01 * speedup, 9)
    return Timing(Provider.CPU, (entry,))


class Times:
    """Stands in for a RegionBench: a plan takes what ``speedup`` says."""

    def __init__(self, speedup: Callable[[Any, Any], float | None]) -> None:
        self.speedup = speedup
        self.timed: list[tuple[str, int]] = []

    def time(self, region: Region, plans: Sequence[RegionPlan]) -> tuple[Timing, ...] | None:
        self.timed.append((region.name, len(plans)))
        found = [self.speedup(region, plan) for plan in plans]
        return None if None in found else tuple(timing(value) for value in found if value)

    def time_recurrent(
        self, site: RecurrentSite, attempts: Sequence[RecurrentAttempt]
    ) -> tuple[Timing, ...] | None:
        plans = [dict(entry.plans)[site] for entry in attempts]
        self.timed.append((site.name, len(plans)))
        found = [self.speedup(site, plan) for plan in plans]
        return None if None in found else tuple(timing(value) for value in found if value)


def tried(
    model: onnx.ModelProto, cost: CostModel = CPU, emit: Emit = "auto", **options: Any
) -> Attempt:
    study = study_model(load_model(model))
    chosen = Options(**options)
    return attempt(
        study,
        gather_all(study, chosen),
        make_criterion("fwer", 0.01),
        cost=cost,
        emit=emit,
        rng=np.random.default_rng(0),
    )


def tune(asked: Attempt, times: Times, cost: CostModel = CPU, emit: Emit = "auto") -> Attempt:
    return autotuned(asked, times, cost, emit)  # type: ignore[arg-type]


@pytest.fixture
def planted(rng: np.random.Generator) -> onnx.ModelProto:
    return plant(Recipe(), rng).model


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_the_fastest_candidate_is_taken_whatever_was_predicted(
    planted: onnx.ModelProto, rank: int
) -> None:
    asked = tried(planted)
    ((region, _),) = asked.plans
    masks = {name: selection.mask for name, selection in asked.selections.items()}
    ranked = candidate_plans(state_graph(asked.study, region, masks), CPU)
    shortlist = list(_shortlist(ranked))
    assert len(ranked) > len(shortlist) == 6
    assert {plan.decision for plan in shortlist} == {plan.decision for plan in ranked}
    wanted = shortlist[rank]
    times = Times(lambda _, plan: 3.0 if plan.reason == wanted.reason else 2.0)
    ((_, plan),) = tune(asked, times).plans
    assert times.timed == [("up", 6)]
    assert (plan.decision, len(plan.branches)) == (wanted.decision, len(wanted.branches))
    assert plan.reason == f"{wanted.reason}; the fastest of 6 candidates, 3.00x timed alone"


def test_what_is_not_faster_stays_dense(planted: onnx.ModelProto) -> None:
    found = tune(tried(planted, emit="split"), Times(lambda *_: 0.9))
    ((_, plan),) = found.plans
    assert (plan.decision, plan.branches) == ("dense", ())
    assert "timed alone, is slower at batch 1: 0.90x" in plan.reason
    assert found.rewrites == ()


def test_an_asked_emission_is_kept_even_if_it_is_slower(planted: onnx.ModelProto) -> None:
    found = tune(tried(planted, emit="split"), Times(lambda *_: 0.9), emit="split")
    ((_, plan),) = found.plans
    assert (plan.decision, len(plan.branches)) == ("split", 8)
    assert "0.90x timed alone" in plan.reason


def test_where_nothing_can_be_timed_the_prediction_stands(planted: onnx.ModelProto) -> None:
    asked = tried(planted, emit="split")
    assert tune(asked, Times(lambda *_: None)).plans == asked.plans


def test_a_region_without_candidates_is_not_timed(rng: np.random.Generator) -> None:
    times = Times(lambda *_: 2.0)
    asked = tried(dense_ffn(rng))
    assert tune(asked, times).plans == asked.plans
    assert times.timed == []


def test_a_region_predicted_to_be_slower_is_timed_if_nothing_but_zeros_goes(
    rng: np.random.Generator,
) -> None:
    exact = tried(plant(Recipe(), rng).model, DEAR)
    assert exact.rewrites == ()
    assert len(tune(exact, Times(lambda *_: 2.0), DEAR).rewrites) == 1
    # Here more than zeros would go, and claim B was not measured on that.
    noisy = plant(Recipe(blocks=((8, 16, 8),) * 4, noise=1e-3), rng).model
    lossy = tried(noisy, DEAR, null="normal:0.001")
    assert lossy.plans[0][1].components.count == 4
    assert tune(lossy, Times(lambda *_: 2.0), DEAR).rewrites == ()


class TestDoNoHarm:
    @pytest.fixture
    def three(self, rng: np.random.Generator) -> Attempt:
        """One region with a plan of its own, seen three times under different names."""
        asked = tried(plant(Recipe(), rng).model, emit="split")
        ((region, plan),) = asked.plans
        named = [dataclasses.replace(region, name=name) for name in ("a", "b", "c")]
        return dataclasses.replace(asked, plans=tuple((one, plan) for one in named))

    def names(self, found: Attempt) -> list[str]:
        return [region.name for region, _ in found.rewrites]

    def test_what_is_slower_alone_is_dropped_with_its_cause(self, three: Attempt) -> None:
        timings = {"a": timing(0.8), "b": timing(2.0), "c": timing(0.9)}
        found = without_harmful(three, timings, "slower at batch 1: 0.90x")
        assert self.names(found) == ["b"]
        reasons = {region.name: plan.reason for region, plan in found.plans}
        assert reasons["a"].endswith(
            "; left dense: timed alone it is slower at batch 1: 0.80x (99 % interval 0.79 to 0.81)"
        )
        assert "left dense" not in reasons["b"]
        assert all(plan.branches == () for _, plan in found.plans if plan.decision == "dense")

    def test_where_all_pay_alone_those_that_gain_least_go(self, three: Attempt) -> None:
        timings = {"a": timing(1.5), "b": timing(1.01), "c": timing(1.2)}
        found = without_harmful(three, timings, "not faster: 0.99x over all batch sizes")
        assert self.names(found) == ["a"]
        reason = found.plans[1][1].reason
        assert "left dense: the model was not faster: 0.99x over all batch sizes" in reason
        assert reason.endswith("this region gains little (1.01x timed alone)")

    def test_a_region_that_could_not_be_timed_counts_as_neutral(self, three: Attempt) -> None:
        timings = {"a": timing(1.5), "c": timing(1.2)}
        assert self.names(without_harmful(three, timings, "not faster")) == ["a"]

    def test_it_ends(self, three: Attempt) -> None:
        found, rounds = three, 0
        while found.rewrites:
            found, rounds = without_harmful(found, {}, "not faster"), rounds + 1
        assert rounds == 2

    def test_only_rewritten_regions_are_timed(self, three: Attempt) -> None:
        dropped = without_harmful(three, {"a": timing(0.5)}, "not faster")
        times = Times(lambda region, _: None if region.name == "b" else 2.0)
        found = region_timings(dropped, times)  # type: ignore[arg-type]
        assert [name for name, _ in times.timed] == ["b", "c"]
        assert list(found) == ["c"]

    def test_many_regions_are_timed_shorter(self) -> None:
        few, many = short_settings(2, 3), short_settings(200, 3)
        assert few.seconds == 0.25
        assert many.seconds == pytest.approx(30 / 600)
        assert many.max_seconds == 2 * many.seconds


class TestRecurrent:
    """Three groups in cascade, which prediction leaves in one operator."""

    @pytest.fixture
    def asked(self, rng: np.random.Generator) -> Attempt:
        found = tried(recurrent_models.plant(recurrent_models.Recipe(), rng).model)
        ((_, plan),) = found.recurrent.plans
        assert plan.decision == "dense"
        return found

    def test_the_fastest_way_is_taken_and_proved(self, asked: Attempt) -> None:
        times = Times(lambda _, plan: float(len(plan.directions[0].cells)))
        found = tune(asked, times)
        ((site, plan),) = found.recurrent.plans
        assert times.timed == [("rnn", 1)]  # no set of units is apart from the others
        assert (plan.decision, len(plan.directions[0].cells)) == ("split", 3)
        assert plan.reason.endswith("; the fastest of 1 candidate, 3.00x timed alone")
        assert found.recurrent.is_exact
        assert found.weights_after < asked.weights_after
        assert site is asked.recurrent.plans[0][0]

    def test_what_is_not_faster_stays_dense(self, asked: Attempt) -> None:
        ((_, plan),) = tune(asked, Times(lambda *_: 0.9)).recurrent.plans
        assert plan.decision == "dense"
        assert "timed alone, is slower at batch 1: 0.90x" in plan.reason

    def test_an_asked_emission_is_kept_even_if_it_is_slower(self, asked: Attempt) -> None:
        ((_, plan),) = tune(asked, Times(lambda *_: 0.9), emit="split").recurrent.plans
        assert (plan.decision, len(plan.directions[0].cells)) == ("split", 3)

    def test_where_nothing_can_be_timed_the_prediction_stands(self, asked: Attempt) -> None:
        assert tune(asked, Times(lambda *_: None)).recurrent.plans == asked.recurrent.plans

    def test_what_was_left_dense_and_loses_more_than_zeros_is_not_timed(
        self, rng: np.random.Generator
    ) -> None:
        model = recurrent_models.plant(recurrent_models.Recipe(), rng).model
        times = Times(lambda *_: 3.0)
        found = tune(tried(model, DEAR, null="normal:0.3"), times)
        ((_, plan),) = found.recurrent.plans
        assert plan.decision == "dense"
        assert times.timed == []
