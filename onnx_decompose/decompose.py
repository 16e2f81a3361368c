"""From evidence to plans: one attempt at taking a model apart, at one level of one criterion."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal
from onnx_decompose.biases import bias_of, find_biases, region_with_biases
from onnx_decompose.folding import fold_region
from onnx_decompose.metadata import Decomposition, FoldedBias, SiteBlocks, digest
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.plan import RegionPlan, plan_region
from onnx_decompose.study import state_graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion, Selection
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.cost import CostModel
    from onnx_decompose.metadata import Annealing
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
        added: what folded constant units add to the outputs of rewritten sites, (N,) float64 by name; see
            ``folding.Folding``.
    """

    study: Study
    evidence: Mapping[str, Evidence]
    criterion: Criterion
    selections: Mapping[str, Selection]
    plans: tuple[tuple[Region, RegionPlan], ...]
    added: Mapping[str, NDArray[np.float64]]

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

    def annealed(self) -> dict[str, NDArray[Any]]:
        """Annealed weight, (K, N), of every site that is rewritten, by name."""
        return {
            site.name: anneal(self.study.weight(site), mask)
            for region, plan in self.rewrites
            for site, mask in zip(region.sites, plan.masks, strict=True)
        }

    def biases(self) -> dict[Site, NDArray[Any]]:
        """Annealed bias, (N,), of every site that constant units were folded into.

        Only units that some branch computes get another bias: what is dropped says nothing, so it stays as it was.
        """
        graph, constants = self.study.model.proto.graph, self.study.constants
        places = find_biases(graph, self.study.sites, constants) if self.added else {}
        found: dict[Site, NDArray[Any]] = {}
        for region, plan in self.rewrites:
            for site in region.sites:
                if site.name not in self.added:
                    continue
                dtype = self.study.weight(site).dtype
                values = bias_of(site, places[site.name], constants, dtype)
                axis = region.axis_of[site.output]
                kept = np.concatenate([branch.units[axis] for branch in plan.branches])
                total = values[kept].astype(np.float64) + self.added[site.name][kept]
                values[kept] = total.astype(dtype)
                found[site] = values
        return found


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
    masks = {name: selection.mask for name, selection in selections.items()}
    plans: list[tuple[Region, RegionPlan]] = []
    added: dict[str, NDArray[np.float64]] = {}
    for region in study.regions:
        whole, contributions = _plan_whole(study, region, masks, cost, emit)
        added |= contributions
        logger.debug("region %s: %s: %s", region.name, whole.decision, whole.reason)
        parts = [
            (part, plan_region(state_graph(study, part, masks), cost, emit))
            for part in (study.parts(region) if whole.decision == "dense" else ())
        ]
        apart = any(plan.decision != "dense" for _, plan in parts)
        plans.extend(parts if apart else [(region, whole)])
    return Attempt(study, evidence, criterion, selections, tuple(plans), added)


def annealed_model(tried: Attempt) -> Model:
    """The original graph with the unsupported entries of the rewritten sites removed, constant units folded."""
    weights = tried.annealed()
    changed = {
        site: weights[site.name]
        for region, _ in tried.rewrites
        for site in region.sites
        if not np.array_equal(weights[site.name], tried.study.weight(site))
    }
    return ReplaceWeights(changed, tried.biases())(tried.study.model).model


def rewritten_model(tried: Attempt, budget: float) -> tuple[Model, Decomposition]:
    """The model with every planned region written as branches, and what its metadata will say."""
    weights, biases = tried.annealed(), tried.biases()
    # Folded biases are a matter of the dense graph: whatever writes the branches finds them in their places.
    folding = ReplaceWeights({}, biases)
    folded = folding(tried.study.model).model
    rewriting = RewriteRegions(
        plans=_plans_in(folded, tried, biases),
        weight=lambda site: weights[site.name],
        shapes=tried.study.shapes,
    )
    model = rewriting(folded).model
    folded_biases = {
        # An emitter that did not note where a bias went fails claim A.
        site.name: FoldedBias(
            digest(values), rewriting.constants.get(folding.record[site.name], ())
        )
        for site, values in biases.items()
    }
    sites = {
        site.name: SiteBlocks(
            site=site.name,
            shape=site.shape,
            annealing=_annealing(tried.study.weight(site), weights[site.name]),
            sha256=digest(weights[site.name]),
            blocks=rewriting.record[site.name],
            bias=folded_biases.get(site.name),
        )
        for region, _ in tried.rewrites
        for site in region.sites
    }
    return model, Decomposition(budget, sites)


def _plan_whole(
    study: Study,
    region: Region,
    masks: Mapping[str, NDArray[np.bool_]],
    cost: CostModel,
    emit: Emit,
) -> tuple[RegionPlan, Mapping[str, NDArray[np.float64]]]:
    """The plan of a maximal region, with its constant units folded where that lets something be dropped.

    Returns:
        The plan, and what folded units add to sites by name.
    """
    plain = plan_region(state_graph(study, region, masks), cost, emit)
    folding = fold_region(study, region, masks)
    if folding is None:
        return plain, {}
    plan = plan_region(state_graph(study, region, folding.masks), cost, emit)
    if plan.decision == "dense" or plan.relative_cost >= plain.relative_cost:
        return plain, {}
    reason = f"{plan.reason}; {folding.rows} rows of constant units folded into biases"
    return dataclasses.replace(plan, reason=reason), folding.added


def _plans_in(
    folded: Model, tried: Attempt, biases: Mapping[Site, NDArray[Any]]
) -> tuple[tuple[Region, RegionPlan], ...]:
    """The rewrites of an attempt, with their regions as they lie in the model with folded biases."""
    study = tried.study
    places = find_biases(study.model.proto.graph, biases, study.constants) if biases else {}
    inserted = [site for site in biases if places[site.name].node is None]
    if not inserted:
        return tried.rewrites
    graph = folded.proto.graph
    return tuple(
        (region_with_biases(region, inserted, graph), plan) for region, plan in tried.rewrites
    )


def _annealing(before: NDArray[Any], after: NDArray[Any]) -> Annealing:
    return "exact" if np.array_equal(before, after) else "masked"
