"""Do no harm, region by region: what does not pay stays dense, and what does pay is still rewritten.

Called for when a finished model is slower than its original. Every rewritten region is timed alone; those that are
slower there are dropped, and where all of them pay alone, the half that gains least. The model is then made, proved
and timed again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from onnx_decompose.decomposition.decompose import absorbing
from onnx_decompose.timing.bench import BenchSettings, slowdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.timing.bench import Timing
    from onnx_decompose.timing.region_bench import RegionBench

__all__ = [
    "MOST_TRIES",
    "region_timings",
    "short_settings",
    "without_harmful",
    "without_recurrent",
]

MOST_TRIES = 4
"""Models that are made and timed, the first one included."""

_SECONDS = 30.0
"""About how long all regions together are timed alone."""


def short_settings(regions: int, batches: int) -> BenchSettings:
    """Quick measurements, shorter ones where there are many regions."""
    quick = BenchSettings.quick()
    seconds = min(quick.seconds, _SECONDS / max(regions * batches, 1))
    return dataclasses.replace(quick, seconds=seconds, max_seconds=2 * seconds)


def region_timings(tried: Attempt, bench: RegionBench) -> dict[str, Timing]:
    """Every rewritten region, timed alone against the region as it was, by name; those that do not run are left out."""
    found: dict[str, Timing] = {}
    for region, plan in tried.rewrites:
        timings = bench.time(region, (plan,))
        if timings is not None:
            found[region.name] = timings[0]
    return found


def without_harmful(tried: Attempt, timings: Mapping[str, Timing], harm: str) -> Attempt:
    """The attempt with some rewritten regions left dense, each with the cause in its reason.

    Args:
        tried: the attempt whose model is slower.
        timings: of its regions alone; a region without one counts as neither slower nor faster.
        harm: what its model is, as in "slower at batch 1: 0.90x".
    """
    causes = {
        name: f"timed alone it is {cause}"
        for name, timing in timings.items()
        if (cause := slowdown(timing)) is not None
    }
    kept = [region.name for region, _ in tried.rewrites if region.name not in causes]
    if len(kept) == len(tried.rewrites):
        gain = {name: timings[name].speedup if name in timings else 1.0 for name in kept}
        slowest = sorted(kept, key=lambda name: gain[name])[: math.ceil(len(kept) / 2)]
        causes = {
            name: f"the model was {harm}, and this region gains little ({gain[name]:.2f}x timed alone)"
            for name in slowest
        }
    plans = tuple(
        (region, plan.left_dense(f"{plan.reason}; left dense: {causes[region.name]}"))
        if plan.decision != "dense" and region.name in causes
        else (region, plan)
        for region, plan in tried.plans
    )
    return absorbing(dataclasses.replace(tried, plans=plans))


def without_recurrent(tried: Attempt, harm: str) -> Attempt:
    """The attempt with the half of its rewritten recurrent operators left dense that is predicted to gain least.

    They are not timed alone.
    """
    costs = sorted((plan.relative_cost for _, plan in tried.recurrent.rewrites), reverse=True)
    most = costs[math.ceil(len(costs) / 2) - 1]
    cause = f"left dense: the model was {harm}, and this operator is predicted to gain little"
    plans = tuple(
        (site, dataclasses.replace(plan, decision="dense", reason=f"{plan.reason}; {cause}"))
        if plan.decision != "dense" and plan.relative_cost >= most
        else (site, plan)
        for site, plan in tried.recurrent.plans
    )
    recurrent = dataclasses.replace(tried.recurrent, plans=plans)
    return absorbing(dataclasses.replace(tried, recurrent=recurrent))
