"""Choosing by measurement: a region's candidates timed against each other, each as a model of the region alone.

The cost model ranks the candidates; here the best ranked of them run.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from onnx_decompose.decomposition.decompose import absorbing, with_readers
from onnx_decompose.decomposition.decompose_recurrent import (
    recurrent_graph,
    recurrent_masks,
    with_plans,
)
from onnx_decompose.graph.study import state_graph
from onnx_decompose.planning.plan import candidate_plans
from onnx_decompose.planning.plan_recurrent import candidate_recurrent_plans
from onnx_decompose.timing.bench import slowdown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.decomposition.decompose_recurrent import RecurrentAttempt
    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.plan_recurrent import RecurrentPlan
    from onnx_decompose.planning.state_graph import Emit
    from onnx_decompose.timing.bench import Timing
    from onnx_decompose.timing.region_bench import RegionBench

__all__ = ["autotuned"]

logger = logging.getLogger(__name__)

_MOST_CANDIDATES = 6


def autotuned(tried: Attempt, bench: RegionBench, cost: CostModel, emit: Emit) -> Attempt:
    """The attempt with every region and recurrent operator in the way that is fastest over the batch sizes, or dense.

    Args:
        tried: the attempt.
        bench: times the candidates.
        cost: ranks them; the best ranked few are timed.
        emit: what was asked for; other than ``auto`` never leaves a region dense.
    """
    plans: list[tuple[Region, RegionPlan]] = []
    for region, plan in tried.plans:
        # Where more than exact zeros would go, a region that was left dense is not in claim B.
        if plan.decision == "dense" and not tried.keeps_weights(region, plan):
            plans.append((region, plan))
            continue
        # Its own masks: constant units may be folded out of them.
        masks = {site.name: mask for site, mask in zip(region.sites, plan.masks, strict=True)}
        candidates = candidate_plans(state_graph(tried.study, region, masks), cost, emit)
        if plan.decision == "shared":  # which is planned from the weight, not from the masks
            candidates = (plan, *candidates)
        plans.append((region, _fastest(region, plan, candidates, bench, emit)))
    recurrent = _tuned_recurrent(tried, bench, cost, emit)
    return absorbing(
        with_readers(dataclasses.replace(tried, plans=tuple(plans), recurrent=recurrent))
    )


def _tuned_recurrent(
    tried: Attempt, bench: RegionBench, cost: CostModel, emit: Emit
) -> RecurrentAttempt:
    """Every recurrent operator in the way that is fastest, or dense."""
    study = tried.study
    masks = recurrent_masks(study, tried.selections)
    plans: list[tuple[RecurrentSite, RecurrentPlan]] = []
    for site, predicted in tried.recurrent.plans:
        keeps = all(not (w.array[~masks[w.name]] != 0).any() for w in site.all_weights)
        if predicted.decision == "dense" and not keeps:
            plans.append((site, predicted))
            continue
        candidates = candidate_recurrent_plans(
            recurrent_graph(study, site, masks, tried.refits), cost, emit
        )
        attempts = [
            with_plans(study, masks, ((site, plan),), tried.refits) for plan in candidates
        ]
        timings = bench.time_recurrent(site, attempts) if attempts else None
        chosen = predicted if timings is None else _of_timed(candidates, timings, emit)
        logger.info("operator %s: %s: %s", site.name, chosen.decision, chosen.reason)
        plans.append((site, chosen))
    return with_plans(study, masks, plans, tried.refits)


def _of_timed(
    candidates: Sequence[RecurrentPlan], timings: Sequence[Timing], emit: Emit
) -> RecurrentPlan:
    """The fastest of the plans of a recurrent operator, left dense if that is slower and was not asked for."""
    best = max(range(len(candidates)), key=lambda number: timings[number].speedup)
    plan, timing = candidates[best], timings[best]
    rank = f"the fastest of {len(candidates)} candidate{'s' if len(candidates) > 1 else ''}"
    harm = slowdown(timing)
    if harm is not None and emit not in {"split", "shrink"}:
        reason = f"{plan.reason}; {rank}, timed alone, is {harm}"
        return dataclasses.replace(plan, decision="dense", reason=reason)
    reason = f"{plan.reason}; {rank}, {timing.speedup:.2f}x timed alone"
    return dataclasses.replace(plan, reason=reason)


def _fastest(
    region: Region,
    predicted: RegionPlan,
    candidates: Sequence[RegionPlan],
    bench: RegionBench,
    emit: Emit,
) -> RegionPlan:
    """The fastest candidate; ``predicted`` where nothing can be timed."""
    chosen = tuple(_shortlist(candidates))
    timings = bench.time(region, chosen) if chosen else None
    if timings is None:
        return predicted
    for plan, timing in zip(chosen, timings, strict=True):
        logger.info("region %s: %.2fx alone: %s", region.name, timing.speedup, plan.reason)
    best = max(range(len(chosen)), key=lambda number: timings[number].speedup)
    plan, timing = chosen[best], timings[best]
    rank = f"the fastest of {len(chosen)} candidates"
    harm = slowdown(timing)
    if harm is not None and emit == "auto":
        return plan.left_dense(f"{plan.reason}; {rank}, timed alone, is {harm}")
    reason = f"{plan.reason}; {rank}, {timing.speedup:.2f}x timed alone"
    return dataclasses.replace(plan, reason=reason)


def _shortlist(candidates: Sequence[RegionPlan]) -> Iterator[RegionPlan]:
    """The best ranked candidate of every decision, then the next best, up to a few; ``candidates`` are sorted."""
    first: dict[str, int] = {}
    for number, plan in enumerate(candidates):
        first.setdefault(plan.decision, number)
    others = [number for number in range(len(candidates)) if number not in first.values()]
    for number in [*first.values(), *others][:_MOST_CANDIDATES]:
        yield candidates[number]
