"""From evidence to plans: one attempt at taking a model apart, at one level of one criterion."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal, fill
from onnx_decompose.biases import absorbable, find_biases, region_in
from onnx_decompose.folding import fold_region
from onnx_decompose.metadata import Decomposition, FoldedBias, SiteBlocks, digest
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.plan import RegionPlan, plan_region
from onnx_decompose.renumbering import choose_numbering
from onnx_decompose.study import state_graph, study_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion, Selection
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.biases import Bias
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
        added: what folded constant units add to the products of rewritten sites, (N,) float64 by name; see
            ``folding.Folding``.
        absorbed: how many per-unit scales and shifts go into weight and bias of rewritten sites, by name.
    """

    study: Study
    evidence: Mapping[str, Evidence]
    criterion: Criterion
    selections: Mapping[str, Selection]
    plans: tuple[tuple[Region, RegionPlan], ...]
    added: Mapping[str, NDArray[np.float64]]
    absorbed: Mapping[str, int] = dataclasses.field(default_factory=dict)

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
        places = self._biases()
        return {
            site.name: places[site.name].scaled(anneal(self.study.weight(site), mask))
            for region, plan in self.rewrites
            for site, mask in zip(region.sites, plan.masks, strict=True)
        }

    def biases(self) -> dict[Site, NDArray[Any]]:
        """Annealed bias, (N,), of every site that constant units were folded into, or that absorbed a shift.

        Only units that some branch computes get what was folded: of the others no branch says anything.
        """
        places = self._biases()
        found: dict[Site, NDArray[Any]] = {}
        for region, plan in self.rewrites:
            for site in region.sites:
                if site.name not in self.added and site.name not in self.absorbed:
                    continue
                bias, dtype = places[site.name], self.study.weight(site).dtype
                values = bias.stored(0.0, dtype)
                axis = region.axis_of[site.output]
                kept = np.concatenate([branch.units[axis] for branch in plan.branches])
                values[kept] = bias.stored(self.added.get(site.name, 0.0), dtype)[kept]
                if bias.constant is not None or bias.axes or values.any():
                    found[site] = values
        return found

    @property
    def absorbing(self) -> dict[Site, int]:
        """The rewritten sites that absorb what follows them, and how many nodes of it."""
        return {
            site: self.absorbed[site.name]
            for region, _ in self.rewrites
            for site in region.sites
            if site.name in self.absorbed
        }

    def _biases(self) -> dict[str, Bias]:
        sites = [site for region, _ in self.rewrites for site in region.sites]
        graph = self.study.model.proto.graph
        return find_biases(graph, sites, self.study.constants, self.absorbed)


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
    plans = [(region, _filled(region, plan)) for region, plan in plans]
    tried = Attempt(study, evidence, criterion, selections, tuple(plans), added)
    # Scaled weights are rounded anew, so that an attempt that changes no entry absorbs nothing.
    return tried if tried.is_exact else dataclasses.replace(tried, absorbed=_absorbable(tried))


def annealed_model(tried: Attempt) -> Model:
    """The original graph with the unsupported entries of the rewritten sites removed, constants folded and absorbed."""
    weights = tried.annealed()
    changed = {
        site: weights[site.name]
        for region, _ in tried.rewrites
        for site in region.sites
        if not np.array_equal(weights[site.name], tried.study.weight(site))
    }
    return ReplaceWeights(changed, tried.biases(), tried.absorbing)(tried.study.model).model


def rewritten_model(tried: Attempt, budget: float) -> tuple[Model, Decomposition]:
    """The model with every planned region written as branches, and what its metadata will say."""
    weights, biases = tried.annealed(), tried.biases()
    # Biases are a matter of the dense graph: whatever writes the branches finds them in their places.
    folding = ReplaceWeights({}, biases, tried.absorbing)
    folded = folding(tried.study.model).model
    before, after = tried.study.model.proto.graph, folded.proto.graph
    dense = tried.study if folded is tried.study.model else study_model(folded)
    numbering = choose_numbering(dense.spaces, tried.rewrites)
    rewriting = RewriteRegions(
        plans=[
            (
                region_in(region, before, after, folding.outputs),
                numbering.plan(region, plan),
            )
            for region, plan in tried.rewrites
        ],
        weight=lambda site: weights[site.name],
        shapes=dense.shapes,
        orders=numbering.orders,
    )
    model = rewriting(folded).model
    folded_biases = {
        # An emitter that did not note where a bias went fails claim A.
        site.name: FoldedBias(
            digest(values), rewriting.constants.get(folding.record[site.name], ())
        )
        for site, values in biases.items()
    }
    masks = {
        site.name: mask
        for region, plan in tried.rewrites
        for site, mask in zip(region.sites, plan.masks, strict=True)
    }
    sites = {
        site.name: SiteBlocks(
            site=site.name,
            shape=site.shape,
            annealing=_annealing(tried.study.weight(site), masks.get(site.name)),
            sha256=digest(weights.get(site.name, tried.study.weight(site))),
            blocks=rewriting.record[site.name],
            bias=folded_biases.get(site.name),
            absorbed=tried.absorbed.get(site.name),
        )
        for site in tried.study.sites
        if site.name in rewriting.record
    }
    return model, Decomposition(budget, sites, rewriting.reordered)


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


def _filled(region: Region, plan: RegionPlan) -> RegionPlan:
    """The plan with all entries that its dense blocks have room for."""
    if plan.decision not in {"shrink", "split"}:
        return plan
    masks: list[NDArray[np.bool_]] = []
    for site, mask in zip(region.sites, plan.masks, strict=True):
        source, target = region.axis_of[site.input], region.axis_of[site.output]
        blocks = [(branch.units[source], branch.units[target]) for branch in plan.branches]
        masks.append(fill(mask, blocks))
    return dataclasses.replace(plan, masks=tuple(masks))


def _absorbable(tried: Attempt) -> dict[str, int]:
    """The per-unit scales and shifts after each rewritten site that its weight and bias can hold."""
    study = tried.study
    graph, constants = study.model.proto.graph, study.constants
    sites = [site for region, _ in tried.rewrites for site in region.sites]
    nodes = {index for region, _ in tried.rewrites for index in region.nodes}
    counts = absorbable(graph, sites, constants, nodes)
    places = find_biases(graph, sites, constants, counts)
    return {
        site.name: counts[site.name]
        for site in sites
        if site.name in counts
        and np.isfinite(places[site.name].scaled(study.weight(site))).all()
        and np.isfinite(
            places[site.name].stored(tried.added.get(site.name, 0.0), study.weight(site).dtype)
        ).all()
    }


def _annealing(before: NDArray[Any], mask: NDArray[np.bool_] | None) -> Annealing:
    """What became of a weight; one without a mask only has its units in another order."""
    return "exact" if mask is None or not (before[~mask] != 0).any() else "masked"
