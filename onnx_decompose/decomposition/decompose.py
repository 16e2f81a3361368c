"""From evidence to plans: one attempt at taking a model apart, at one level of one criterion."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal, fill, unify
from onnx_decompose.decomposition.decompose_recurrent import (
    RecurrentAttempt,
    attempt_recurrent,
    recurrent_masks,
)
from onnx_decompose.decomposition.folding import fold_region
from onnx_decompose.decomposition.refits import weight_of
from onnx_decompose.decomposition.renumbering import choose_numbering
from onnx_decompose.errors import PassError
from onnx_decompose.graph.biases import absorbable, find_biases, region_in
from onnx_decompose.graph.closing import restore
from onnx_decompose.graph.flat import Flat
from onnx_decompose.graph.gates import find_gates, reading_sites, with_slopes
from onnx_decompose.graph.sites import stored_nothing
from onnx_decompose.graph.study import state_graph, study_model
from onnx_decompose.model.metadata import (
    Block,
    Decomposition,
    FoldedBias,
    SiteBlocks,
    SlicedConstant,
    digest,
)
from onnx_decompose.passes.base import check_model
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.passes.rewrite_regions import RewriteRegions
from onnx_decompose.planning.copies import find_copies
from onnx_decompose.planning.plan import RegionPlan, plan_region, plan_shared
from onnx_decompose.planning.state_graph import Branch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Criterion, Selection
    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.decomposition.refits import Refit
    from onnx_decompose.graph.biases import Bias
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.metadata import Annealing
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.state_graph import Emit

logger = logging.getLogger(__name__)

__all__ = [
    "Attempt",
    "absorbing",
    "annealed_model",
    "attempt",
    "rewritten_model",
    "with_readers",
]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """What one level of one criterion gives.

    Attributes:
        study: the model.
        evidence: of each site by name.
        criterion: the criterion at its level.
        selections: supported entries of each site and recurrent weight by name.
        plans: each region, or the parts it was cut into, with its plan.
        recurrent: the recurrent sites and their plans.
        added: what folded constant units add to the products of rewritten sites, (N,) float64 by name; see
            ``folding.Folding``.
        absorbed: how many per-unit scales and shifts go into weight and bias of rewritten sites, by name.
        slopes: names of the rewritten sites that hold the slope of the gate after them as well (``graph.gates``).
        refits: what stands in the place of a site's original entries before anything is removed, by name; what it adds
            is in ``added`` as well.
    """

    study: Study
    evidence: Mapping[str, Evidence]
    criterion: Criterion
    selections: Mapping[str, Selection]
    plans: tuple[tuple[Region, RegionPlan], ...]
    recurrent: RecurrentAttempt
    added: Mapping[str, NDArray[np.float64]]
    absorbed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    slopes: frozenset[str] = frozenset()
    refits: Mapping[str, Refit] = dataclasses.field(default_factory=dict)

    @property
    def takes_apart(self) -> bool:
        """Whether anything is rewritten."""
        return bool(self.rewrites or self.recurrent.rewrites)

    @property
    def rewrites(self) -> tuple[tuple[Region, RegionPlan], ...]:
        """The regions that are not left dense."""
        return tuple((region, plan) for region, plan in self.plans if plan.decision != "dense")

    @property
    def substructures(self) -> int:
        """Components of the regions, and sets of units of the recurrent sites, that are rewritten."""
        regions = sum(plan.components.count for _, plan in self.rewrites)
        return regions + self.recurrent.substructures

    @property
    def weights_after(self) -> int:
        """Entries that all sites together store after the rewrite."""
        after = sum(site.size for site in self.study.sites) + self.recurrent.weights_after
        for region, plan in self.rewrites:
            for site in region.sites:
                source, target = region.axis_of[site.input], region.axis_of[site.output]
                after -= site.size
                after += plan.entries(source, target) * site.taps
        return after

    @property
    def predicted_cost(self) -> float:
        """Predicted time over that of the original, each region by its weights."""
        parts = [
            (sum(s.size for s in region.sites), plan.relative_cost)
            for region, plan in self.rewrites
        ]
        parts += [
            (sum(w.size for w in site.all_weights), plan.relative_cost)
            for site, plan in self.recurrent.rewrites
        ]
        whole = sum(weight.size for weight in self.study.weights)
        return 1.0 - sum(size * (1.0 - cost) for size, cost in parts) / max(whole, 1)

    def weight(self, site: Site) -> NDArray[Any]:
        """The stored entries that some are removed from, (K, N): refitted, or the original's."""
        return weight_of(self.study, site, self.refits)

    @property
    def is_exact(self) -> bool:
        """Whether rewritten sites lose nothing but exact zeros, and no row or column is put in another's place."""
        regions = all(self.keeps_weights(region, plan) for region, plan in self.rewrites)
        return regions and self.recurrent.is_exact

    def keeps_weights(self, region: Region, plan: RegionPlan) -> bool:
        """Whether ``region`` loses nothing but exact zeros, and no row or column is put in another's place."""
        for site in region.sites:
            selection = self.selections[site.name]
            if site.name in self.refits:
                return False
            if (self.study.weight(site)[~selection.mask] != 0).any():
                return False
            if plan.decision == "shared" and any(g.deviation > 0 for g in selection.shared):
                return False
        return True

    def annealed(self) -> Iterator[tuple[Site, NDArray[Any]]]:
        """Every site that is rewritten and its annealed weight, (K, N), one after another."""
        scaled = self.annealer()
        for region, _ in self.rewrites:
            for site in region.sites:
                yield site, scaled(site)

    def annealer(self, *, scaled: bool = True) -> Callable[[Site], NDArray[Any]]:
        """Gives the annealed weight, (K, N), of a site that is rewritten; before any scale is absorbed, if asked."""
        places = self._biases()
        position = {
            site.name: (region, plan, number)
            for region, plan in self.rewrites
            for number, site in enumerate(region.sites)
        }

        def annealed(site: Site) -> NDArray[Any]:
            region, plan, number = position[site.name]
            kept = anneal(
                self.weight(site),
                _filled(region, plan, number),
                stored_nothing(site, self.study.constants),
            )
            if plan.decision == "shared":
                kept = unify(kept, self.selections[site.name].shared)
            return places[site.name].scaled(kept) if scaled else kept

        return annealed

    def biases(self) -> dict[Site, NDArray[Any]]:
        """Annealed bias, (N,), of every site that constant units were folded into, or that absorbed a shift.

        Only units that some branch computes get what was folded: of the others no branch says anything.
        """
        places = self._biases()
        found: dict[Site, NDArray[Any]] = {}
        for region, plan in self.rewrites:
            for site in region.sites:
                if site.name not in {*self.added, *self.absorbed, *self.slopes}:
                    continue
                bias = places[site.name]
                values = bias.stored(0.0)
                axis = region.axis_of[site.output]
                kept = np.concatenate([branch.units[axis] for branch in plan.branches])
                if plan.decision == "shared":  # copies are made of what a branch computes
                    kept = np.arange(values.size)
                values[kept] = bias.stored(self.added.get(site.name, 0.0))[kept]
                if bias.constant is not None or bias.axes or values.any():
                    found[site] = values
        return found

    def biases_outside(self) -> set[str]:
        """Names of the rewritten sites whose bias something reads that is not in their region."""
        places = self._biases()
        return {
            site.name
            for region, _ in self.rewrites
            for site in region.sites
            if not set(region.nodes).issuperset(places[site.name].nodes[:1])
        }

    @property
    def absorbing(self) -> dict[Site, int]:
        """The rewritten sites that absorb what follows them, and how many nodes of it."""
        return {
            site: self.absorbed[site.name]
            for region, _ in self.rewrites
            for site in region.sites
            if site.name in self.absorbed
        }

    @property
    def sloping(self) -> tuple[Site, ...]:
        """The rewritten sites that hold the slope of the gate after them."""
        return tuple(
            site
            for region, _ in self.rewrites
            for site in region.sites
            if site.name in self.slopes
        )

    def _biases(self) -> dict[str, Bias]:
        sites = [site for region, _ in self.rewrites for site in region.sites]
        graph, constants = self.study.model.proto.graph, self.study.constants
        places = find_biases(graph, sites, constants, self.absorbed)
        return with_slopes(graph, sites, constants, places, self.slopes)


def attempt(  # noqa: PLR0913 (what is known, what is asked for, and what was refitted)
    study: Study,
    evidence: Mapping[str, Evidence],
    criterion: Criterion,
    *,
    cost: CostModel,
    emit: Emit,
    rng: np.random.Generator,
    refits: Mapping[str, Refit] | None = None,
) -> Attempt:
    """Select the supported entries of every site and plan every region.

    A maximal region that stays whole is tried again site by site: one dense site hides the structure of the others.

    Args:
        study: the model.
        evidence: of each site by name; of a refitted one, on its new weight.
        criterion: decides which entries are supported.
        cost: the provider's coefficients.
        emit: how regions are written.
        rng: source of randomness, for the criterion.
        refits: weights that stand in the place of the original's, by site name.
    """
    refits = refits or {}
    selections = {
        site.name: criterion.select(evidence[site.name], rng=rng) for site in study.weights
    }
    plans: list[tuple[Region, RegionPlan]] = []
    added: dict[str, NDArray[np.float64]] = {}
    for region in study.regions:
        whole, contributions = _plan_whole(study, region, selections, cost, emit, refits)
        added |= contributions
        logger.debug("region %s: %s: %s", region.name, whole.decision, whole.reason)
        parts = [
            (part, _plan(study, part, selections, cost, emit, refits))
            for part in (study.parts(region) if whole.decision == "dense" else ())
        ]
        apart = any(plan.decision != "dense" for _, plan in parts)
        plans.extend(parts if apart else [(region, whole)])
    masks = recurrent_masks(study, selections)
    recurrent = attempt_recurrent(study, masks, cost, emit, refits)
    tried = Attempt(
        study,
        evidence,
        criterion,
        selections,
        tuple(plans),
        recurrent,
        added,
        refits=refits,
    )
    return absorbing(with_readers(tried))


def with_readers(tried: Attempt) -> Attempt:
    """The attempt with everything written that was refitted to do without the units of a recurrent operator.

    Where it is not worth taking apart, it is written whole, with its new entries.
    """
    sites, cells = tried.recurrent.readers_of_gone()
    names = {site.name for site in sites if site.name in tried.refits}
    why = "its entries do without units that are gone"
    plans = tuple(
        (
            region,
            dataclasses.replace(
                plan,
                decision="shrink",
                reason=f"{plan.reason}; {why}",
                branches=(Branch(tuple(map(np.arange, region.axis_sizes))),),
                relative_cost=1.0,
            )
            if plan.decision == "dense" and names & {site.name for site in region.sites}
            else plan,
        )
        for region, plan in tried.plans
    )
    refitted = [cell for cell in cells if any(w.name in tried.refits for w in cell.all_weights)]
    recurrent = tried.recurrent.written_whole(refitted, why)
    return dataclasses.replace(tried, plans=plans, recurrent=recurrent)


def absorbing(tried: Attempt) -> Attempt:
    """The attempt with the scales, shifts and slopes that its rewritten sites can take in.

    Scaled weights are rounded anew, so that an attempt that changes no entry takes in none.
    """
    if tried.is_exact:
        return dataclasses.replace(tried, absorbed={}, slopes=frozenset())
    absorbed = _absorbable(tried)
    return dataclasses.replace(tried, absorbed=absorbed, slopes=_slopes(tried, absorbed))


def _plan(
    study: Study,
    region: Region,
    selections: Mapping[str, Selection],
    cost: CostModel,
    emit: Emit,
    refits: Mapping[str, Refit],
) -> RegionPlan:
    """The plan of one region; equal rows and columns of a single site compete with taking it apart."""
    graph = state_graph(study, region, _masks(region, selections))
    plan = plan_region(graph, cost, emit)
    if len(region.sites) != 1 or len(graph.axis_sizes) != 2 or emit not in {"auto", "shared"}:
        return plan
    if graph.has_channels:  # equal channels are not computed once
        return plan
    site, mask = region.sites[0], plan.masks[0]
    if site.quantized is not None:
        return plan
    weight = unify(anneal(weight_of(study, site, refits), mask), selections[site.name].shared)
    copies = find_copies(weight)
    return plan if copies is None else plan_shared(graph, plan, copies, cost, emit)


def annealed_model(tried: Attempt) -> Model:
    """The original graph with the unsupported entries of the rewritten sites removed, constants folded and absorbed."""
    changed = {
        site: weight
        for site, weight in tried.annealed()
        if not np.array_equal(weight, tried.study.stored(site))
    }
    replacing = ReplaceWeights(changed, tried.biases(), tried.absorbing, tried.sloping)
    annealed = tried.recurrent.annealed(replacing(tried.study.model).model)
    return restore(tried.study.flat, annealed)


def rewritten_model(tried: Attempt, budget: float) -> tuple[Model, Decomposition]:
    """The model with every planned region written as branches, and what its metadata will say."""
    biases, kept, scaled = tried.biases(), tried.annealer(scaled=False), tried.annealer()
    # Biases are a matter of the dense graph: whatever writes the branches finds them in their places.
    folding = ReplaceWeights({}, biases, tried.absorbing, tried.sloping)
    folded = folding(tried.study.model).model
    before, after = tried.study.model.proto.graph, folded.proto.graph
    dense = tried.study if folded is tried.study.model else study_model(Flat(folded, folded))
    numbering = choose_numbering(dense.spaces, tried.rewrites)
    rewriting = RewriteRegions(
        plans=[
            (
                region_in(region, before, after, folding.outputs),
                numbering.plan(region, plan),
            )
            for region, plan in tried.rewrites
        ],
        weight=scaled,
        shapes=dense.shapes,
        orders=numbering.orders,
    )
    model, recurrent, rows = tried.recurrent.rewritten(rewriting(folded).model)
    constants = _sliced(
        rewriting.constants, rewriting.unit_axes, dense, folding.record.values()
    )
    outside = tried.biases_outside()
    folded_biases = {
        # An emitter that did not note where a bias went fails claim A.
        site.name: FoldedBias(
            digest(values),
            _whole(folding.record[site.name], values)
            if site.name in outside
            else rewriting.constants.get(folding.record[site.name], ()),
        )
        for site, values in biases.items()
    }
    sites = {
        site.name: SiteBlocks(
            site=site.name,
            shape=site.shape,
            annealing=_annealing(
                tried.study.stored(site),
                kept(site),
                stored_nothing(site, tried.study.constants),
            ),
            sha256=digest(scaled(site)),
            blocks=rewriting.record[site.name],
            bias=folded_biases.get(site.name),
            absorbed=tried.absorbed.get(site.name),
            slope=site.name in tried.slopes,
        )
        for region, _ in tried.rewrites
        for site in region.sites
    }
    sites |= {
        site.name: SiteBlocks(
            site=site.name,
            shape=site.shape,
            annealing="exact",
            sha256=digest(tried.study.stored(site)),
            blocks=rewriting.record[site.name],
        )
        for site in tried.study.sites
        if site.name in rewriting.record and site.name not in sites
    }
    found = Decomposition(budget, sites | recurrent, rewriting.reordered, constants | rows)
    return _restored(tried.study, model), found


def _whole(name: str, values: NDArray[Any]) -> tuple[Block, ...]:
    """A row of units that is stored as it is."""
    return (Block(np.arange(1), np.arange(values.size), name, transposed=False),)


def _restored(study: Study, flat: Model) -> Model:
    """The rewritten model in the original's form; valid if that is."""
    model = restore(study.flat, flat)
    fault = check_model(model) if study.flat.opened else None
    if fault is not None and check_model(study.source) is None:
        raise PassError(f"the rewritten model is not valid: {fault}")
    return model


def _sliced(
    noted: Mapping[str, tuple[Block, ...]],
    axes: Mapping[str, int],
    dense: Study,
    folded: Collection[str],
) -> dict[str, SlicedConstant]:
    """The original's per-unit constants that are stored in parts; folded biases are recorded with their sites."""
    found: dict[str, SlicedConstant] = {}
    for name, blocks in noted.items():
        parts = tuple(block for block in blocks if block.initializer != name)
        if parts and name not in folded:
            axis = axes[name]
            shape = list(dense.constants[name].shape or (1,))
            units = shape.pop(axis)
            # One number for all units may be stored for each of them.
            units = max(units, *(int(block.columns.max()) + 1 for block in parts))
            found[name] = SlicedConstant((math.prod(shape), units), parts, axis)
    return found


def _plan_whole(
    study: Study,
    region: Region,
    selections: Mapping[str, Selection],
    cost: CostModel,
    emit: Emit,
    refits: Mapping[str, Refit],
) -> tuple[RegionPlan, Mapping[str, NDArray[np.float64]]]:
    """The plan of a maximal region, with its constant units folded where that lets something be dropped.

    Returns:
        The plan, and what folded units add to sites by name.
    """
    plain = _plan(study, region, selections, cost, emit, refits)
    added = {site.name: refits[site.name].added for site in region.sites if site.name in refits}
    folding = fold_region(study, region, _masks(region, selections), refits)
    if folding is None:
        return plain, added
    plan = plan_region(state_graph(study, region, folding.masks), cost, emit)
    if plan.decision == "dense" or plan.relative_cost >= plain.relative_cost:
        return plain, added
    reason = f"{plan.reason}; {folding.rows} rows of constant units folded into biases"
    return dataclasses.replace(plan, reason=reason), {**added, **folding.added}


def _filled(region: Region, plan: RegionPlan, number: int) -> NDArray[np.bool_]:
    """The mask of one of the region's sites with all entries that its dense blocks have room for."""
    mask, site = plan.masks[number], region.sites[number]
    if plan.decision in {"shrink", "split", "grouped", "triangular"}:
        source, target = region.axis_of[site.input], region.axis_of[site.output]
        blocks = [(branch.inputs(source), branch.units[target]) for branch in plan.branches]
        mask = fill(mask, blocks)
    return site.entries(mask)


def _absorbable(tried: Attempt) -> dict[str, int]:
    """The per-unit scales and shifts after each rewritten site that its weight and bias can hold."""
    study = tried.study
    graph, constants = study.model.proto.graph, study.constants
    regions, sites = _scalable(tried)
    nodes = {index for region in regions for index in region.nodes}
    counts = absorbable(graph, sites, constants, nodes)
    places = find_biases(graph, sites, constants, counts)
    return {
        site.name: counts[site.name]
        for site in sites
        if site.name in counts and _holds(tried, site, places[site.name])
    }


def _slopes(tried: Attempt, absorbed: Mapping[str, int]) -> frozenset[str]:
    """The rewritten sites that can hold the slope of the gate after them, which rewritten sites alone read."""
    study = tried.study
    graph, constants = study.model.proto.graph, study.constants
    _, sites = _scalable(tried)
    places = find_biases(graph, sites, constants, absorbed)
    gates = find_gates(graph, sites, constants, places)
    touched = {
        site.name: {site, *reading}
        for site in sites
        if site.name in gates
        and (reading := reading_sites(graph, gates[site.name], site, sites))
    }
    while touched:
        scaled = with_slopes(graph, sites, constants, places, touched.keys())
        lost = {
            site
            for site in set().union(*touched.values())
            if not _holds(tried, site, scaled[site.name])
        }
        if not lost:
            break
        touched = {name: held for name, held in touched.items() if held.isdisjoint(lost)}
    return frozenset(touched)


def _scalable(tried: Attempt) -> tuple[list[Region], list[Site]]:
    """The rewritten regions and sites whose entries may be scaled: no equal lines, and no integers."""
    regions = [region for region, plan in tried.rewrites if plan.decision != "shared"]
    sites = [site for region in regions for site in region.sites if site.quantized is None]
    return regions, sites


def _holds(tried: Attempt, site: Site, place: Bias) -> bool:
    """Whether the scaled weight and bias of a site are numbers that its type has."""
    bias = place.stored(tried.added.get(site.name, 0.0))
    return bool(np.isfinite(place.scaled(tried.weight(site))).all() and np.isfinite(bias).all())


def _masks(region: Region, selections: Mapping[str, Selection]) -> dict[str, NDArray[np.bool_]]:
    """The selected masks of a region's sites: of all sites, only the bits are held."""
    return {site.name: selections[site.name].mask for site in region.sites}


def _annealing(before: NDArray[Any], after: NDArray[Any], nothing: NDArray[Any]) -> Annealing:
    changed = before != after
    if not changed.any():
        return "exact"
    return "refitted" if (changed & (after != nothing)).any() else "masked"
