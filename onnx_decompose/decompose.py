"""From evidence to plans: one attempt at taking a model apart, at one level of one criterion."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal, unify
from onnx_decompose.copies import find_copies
from onnx_decompose.metadata import Decomposition, SiteBlocks, digest
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.plan import RegionPlan, plan_region, plan_shared
from onnx_decompose.renumbering import choose_numbering
from onnx_decompose.study import state_graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion, Selection
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.cost import CostModel
    from onnx_decompose.metadata import Annealing, Block
    from onnx_decompose.model_io import Model
    from onnx_decompose.plan import Emit
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
        """Whether every rewritten site keeps its weight: nothing but exact zeros is unsupported."""
        weights = self.annealed()
        return all(
            np.array_equal(weights[site.name], self.study.weight(site))
            for region, _ in self.rewrites
            for site in region.sites
        )

    def annealed(self) -> dict[str, NDArray[Any]]:
        """Annealed weight, (K, N), of every site that is rewritten, by name."""
        return {
            site.name: _annealed(
                self.study.weight(site), mask, self.selections[site.name], plan
            )
            for region, plan in self.rewrites
            for site, mask in zip(region.sites, plan.masks, strict=True)
        }


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
        whole = _plan(study, region, selections, cost, emit)
        logger.debug("region %s: %s: %s", region.name, whole.decision, whole.reason)
        parts = [
            (part, _plan(study, part, selections, cost, emit))
            for part in (study.parts(region) if whole.decision == "dense" else ())
        ]
        apart = any(plan.decision != "dense" for _, plan in parts)
        plans.extend(parts if apart else [(region, whole)])
    return Attempt(study, evidence, criterion, selections, tuple(plans))


def _plan(
    study: Study,
    region: Region,
    selections: Mapping[str, Selection],
    cost: CostModel,
    emit: Emit,
) -> RegionPlan:
    """The plan of one region; equal rows and columns of a single site compete with taking it apart."""
    masks = {name: selection.mask for name, selection in selections.items()}
    graph = state_graph(study, region, masks)
    plan = plan_region(graph, cost, emit)
    if len(region.sites) != 1 or len(graph.axis_sizes) != 2 or emit not in {"auto", "shared"}:
        return plan
    site, mask = region.sites[0], plan.masks[0]
    weight = unify(anneal(study.weight(site), mask), selections[site.name].shared)
    copies = find_copies(weight)
    return plan if copies is None else plan_shared(graph, plan, copies, cost, emit)


def _annealed(
    weight: NDArray[Any], mask: NDArray[np.bool_], selection: Selection, plan: RegionPlan
) -> NDArray[Any]:
    kept = anneal(weight, mask)
    return unify(kept, selection.shared) if plan.decision == "shared" else kept


def annealed_model(tried: Attempt) -> Model:
    """The original graph with the unsupported entries of the rewritten sites removed."""
    weights = tried.annealed()
    changed = {
        site: weights[site.name]
        for region, _ in tried.rewrites
        for site in region.sites
        if not np.array_equal(weights[site.name], tried.study.weight(site))
    }
    return ReplaceWeights(changed)(tried.study.model).model


def rewritten_model(tried: Attempt, budget: float) -> tuple[Model, Decomposition]:
    """The model with every planned region written as branches, and what its metadata will say."""
    weights = tried.annealed()
    numbering = choose_numbering(tried.study.spaces, tried.rewrites)
    rewriting = RewriteRegions(
        plans=[(region, numbering.plan(region, plan)) for region, plan in tried.rewrites],
        weight=lambda site: weights[site.name],
        shapes=tried.study.shapes,
        orders=numbering.orders,
    )
    model = rewriting(tried.study.model).model
    sites = {
        site.name: _site_blocks(site, tried.study.weight(site), weights, rewriting.record)
        for site in tried.study.sites
        if site.name in rewriting.record
    }
    return model, Decomposition(budget, sites, rewriting.reordered)


def _site_blocks(
    site: Site,
    before: NDArray[Any],
    annealed: Mapping[str, NDArray[Any]],
    record: Mapping[str, tuple[Block, ...]],
) -> SiteBlocks:
    after = annealed.get(site.name, before)
    return SiteBlocks(
        site=site.name,
        shape=site.shape,
        annealing=_annealing(before, after),
        sha256=digest(after),
        blocks=record[site.name],
    )


def _annealing(before: NDArray[Any], after: NDArray[Any]) -> Annealing:
    changed = before != after
    if not changed.any():
        return "exact"
    return "refitted" if after[changed].any() else "masked"
