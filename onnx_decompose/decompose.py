"""From evidence to plans: one attempt at taking a model apart, at one level of one criterion."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal
from onnx_decompose.metadata import Decomposition, SiteBlocks, digest
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.plan import RegionPlan, plan_region
from onnx_decompose.study import state_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion, Selection
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.cost import CostModel
    from onnx_decompose.metadata import Annealing
    from onnx_decompose.model_io import Model
    from onnx_decompose.plan import Emit, StateGraph
    from onnx_decompose.regions import Region
    from onnx_decompose.sites import Site
    from onnx_decompose.study import Study

logger = logging.getLogger(__name__)

__all__ = ["Attempt", "attempt", "annealed_model", "rewritten_model"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """What one level of one criterion gives.

    Attributes:
        study: the model.
        evidence: of each site by name.
        criterion: the criterion at its level.
        selections: supported entries of each site by name.
        plans: each region, or the parts it was cut into, with its plan.
    """

    study: Study
    evidence: Mapping[str, Evidence]
    criterion: Criterion
    selections: Mapping[str, Selection]
    plans: tuple[tuple[Region, RegionPlan], ...]

    @property
    def rewrites(self) -> tuple[tuple[Region, RegionPlan], ...]:
        """The regions that are not left dense."""
        return tuple((region, plan) for region, plan in self.plans if plan.decision != "dense")

    @property
    def substructures(self) -> int:
        """Components of the regions that are rewritten."""
        return sum(plan.components.count for _, plan in self.rewrites)

    @property
    def weights_after(self) -> int:
        """Entries that all sites together store after the rewrite."""
        after = sum(site.size for site in self.study.sites)
        for region, plan in self.rewrites:
            for site in region.sites:
                source, target = region.axis_of[site.input], region.axis_of[site.output]
                after -= site.size
                after += sum(b.units[source].size * b.units[target].size for b in plan.branches)
        return after

    @property
    def is_exact(self) -> bool:
        """Whether no rewritten site has anything but exact zeros unsupported."""
        return not any(
            (self.study.weight(site)[~self.selections[site.name].mask] != 0).any()
            for region, _ in self.rewrites
            for site in region.sites
        )

    def annealed(self) -> Iterator[tuple[Site, NDArray[Any]]]:
        """Every site that is rewritten and its annealed weight, (K, N), one after another."""
        for region, plan in self.rewrites:
            for site, mask in zip(region.sites, plan.masks, strict=True):
                yield site, anneal(self.study.weight(site), mask)


def attempt(
    study: Study,
    evidence: Mapping[str, Evidence],
    criterion: Criterion,
    *,
    cost: CostModel,
    emit: Emit,
    rng: np.random.Generator,
) -> Attempt:
    """Select the supported entries of every site and plan every region.

    A maximal region that stays whole is tried again site by site: one dense site hides the structure of the others.
    """
    selections = {
        site.name: criterion.select(evidence[site.name], rng=rng) for site in study.sites
    }
    plans: list[tuple[Region, RegionPlan]] = []
    for region in study.regions:
        whole = plan_region(_graph(study, region, selections), cost, emit)
        logger.debug("region %s: %s: %s", region.name, whole.decision, whole.reason)
        parts = [
            (part, plan_region(_graph(study, part, selections), cost, emit))
            for part in (study.parts(region) if whole.decision == "dense" else ())
        ]
        apart = any(plan.decision != "dense" for _, plan in parts)
        plans.extend(parts if apart else [(region, whole)])
    return Attempt(study, evidence, criterion, selections, tuple(plans))


def annealed_model(tried: Attempt) -> Model:
    """The original graph with the unsupported entries of the rewritten sites removed."""
    changed = {
        site: weight
        for site, weight in tried.annealed()
        if not np.array_equal(weight, tried.study.weight(site))
    }
    return ReplaceWeights(changed)(tried.study.model).model


def rewritten_model(tried: Attempt, budget: float) -> tuple[Model, Decomposition]:
    """The model with every planned region written as branches, and what its metadata will say."""
    position = {
        site.name: (plan, number)
        for region, plan in tried.rewrites
        for number, site in enumerate(region.sites)
    }

    def annealed(site: Site) -> NDArray[Any]:
        plan, number = position[site.name]
        return anneal(tried.study.weight(site), plan.masks[number])

    rewriting = RewriteRegions(
        plans=[(region, plan.branches) for region, plan in tried.rewrites],
        weight=annealed,
        shapes=tried.study.shapes,
    )
    model = rewriting(tried.study.model).model
    sites = {
        site.name: SiteBlocks(
            site=site.name,
            shape=site.shape,
            annealing=_annealing(tried.study.weight(site), weight),
            sha256=digest(weight),
            blocks=rewriting.record[site.name],
        )
        for site, weight in tried.annealed()
    }
    return model, Decomposition(budget, sites)


def _graph(study: Study, region: Region, selections: Mapping[str, Selection]) -> StateGraph:
    """The state graph of a region with the selected masks."""
    masks = {site.name: selections[site.name].mask for site in region.sites}
    return state_graph(study, region, masks)


def _annealing(before: NDArray[Any], after: NDArray[Any]) -> Annealing:
    return "exact" if np.array_equal(before, after) else "masked"
