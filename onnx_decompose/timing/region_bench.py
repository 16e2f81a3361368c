"""Ways of rewriting a region, timed as models of the region alone.

A region's time alone is not quite its time in the model, where other operators use the caches too: it decides between
candidates, and the finished model is timed in any case.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from onnx_decompose.decomposition.renumbering import choose_numbering
from onnx_decompose.errors import DecomposeError
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.passes.recurrent import RewriteRecurrent
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.timing.bench import BenchSettings, bench_candidates, timing_feeds
from onnx_decompose.timing.region_model import RegionModels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from onnx_decompose.decomposition.decompose_recurrent import RecurrentAttempt
    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.timing.bench import Timing

__all__ = ["RegionBench"]

logger = logging.getLogger(__name__)


class RegionBench:
    """Times ways of rewriting a region against the region as it is.

    Args:
        study: the model.
        batches: batch sizes.
        provider: where to run.
        rng: draws inputs, and the order of the models.
        settings: how long to measure.
    """

    def __init__(
        self,
        study: Study,
        batches: Sequence[int],
        provider: Provider,
        rng: np.random.Generator,
        settings: BenchSettings | None = None,
    ) -> None:
        self._study = study
        self._batches = batches
        self._provider = provider
        self._rng = rng
        self._settings = settings or BenchSettings.quick()
        self._models = RegionModels(study)

    def time(self, region: Region, plans: Sequence[RegionPlan]) -> tuple[Timing, ...] | None:
        """One timing per plan, all in one run; None, with a line in the log, where the region does not run alone."""
        try:
            return self._time(region, plans)
        except DecomposeError as error:
            logger.info("region %s is not timed alone: %s", region.name, error)
            return None

    def time_recurrent(
        self, site: RecurrentSite, attempts: Sequence[RecurrentAttempt]
    ) -> tuple[Timing, ...] | None:
        """The same for ways of writing a recurrent operator: one for each of the attempts."""
        try:
            small, inner = self._models.extract_operator(site)
            return self._compare(
                small, [self._smaller(small, site, inner, tried) for tried in attempts]
            )
        except DecomposeError as error:
            logger.info("operator %s is not timed alone: %s", site.name, error)
            return None

    def _time(self, region: Region, plans: Sequence[RegionPlan]) -> tuple[Timing, ...]:
        small, inner = self._models.extract(region)
        return self._compare(small, [self._written(small, inner, plan) for plan in plans])

    def _compare(self, small: Model, written: Sequence[Model]) -> tuple[Timing, ...]:
        timings = bench_candidates(
            open_model(small, self._provider, fast=True),
            {
                str(number): open_model(model, self._provider, fast=True)
                for number, model in enumerate(written)
            },
            feeds_by_batch=timing_feeds(
                graph_inputs(small.proto), self._batches, rng=self._rng
            ),
            provider=self._provider,
            rng=self._rng,
            settings=self._settings,
        )
        return tuple(timings.values())

    def _smaller(
        self, small: Model, site: RecurrentSite, inner: RecurrentSite, tried: RecurrentAttempt
    ) -> Model:
        """The operator as an attempt has it; ``inner`` is the site in the model ``small``."""
        (plan,) = (plan for planned, plan in tried.plans if planned is site)
        whole = dict(zip((w.name for w in inner.all_weights), site.all_weights, strict=True))
        write = RewriteRecurrent(
            ((inner, plan),), lambda weight: tried.annealed_weight(whole[weight.name])
        )
        return write(small).model

    def _written(self, small: Model, region: Region, plan: RegionPlan) -> Model:
        """The region as the plan has it, its border's free spaces renumbered as they would be in the model."""
        numbering = choose_numbering(self._study.spaces, ((region, plan),))
        weights = {
            site.name: self._study.annealed(site, mask)
            for site, mask in zip(region.sites, plan.masks, strict=True)
        }
        write = RewriteRegions(
            plans=((region, numbering.plan(region, plan)),),
            weight=lambda site: weights[site.name],
            shapes=self._study.shapes,
        )
        return write(small).model
