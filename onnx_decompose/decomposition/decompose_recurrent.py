"""The recurrent part of an attempt: state graphs, plans, and both models' recurrent operators."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.anneal import anneal, fill
from onnx_decompose.analysis.recurrence import (
    carried_columns,
    unit_columns,
    unit_edges,
    unit_graph,
)
from onnx_decompose.decomposition.refits import weight_of
from onnx_decompose.graph.recurrent import steps_of
from onnx_decompose.graph.state_readers import find_state_readers
from onnx_decompose.model.metadata import Annealing, SiteBlocks, SlicedConstant, digest
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights, RewriteRecurrent
from onnx_decompose.planning.plan_recurrent import (
    RecurrentGraph,
    RecurrentPlan,
    plan_recurrent,
    written_whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Selection
    from onnx_decompose.decomposition.refits import Refit
    from onnx_decompose.graph.recurrent import RecurrentSite, RecurrentWeight
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.state_readers import StateReaders
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.state_graph import Emit

__all__ = [
    "RecurrentAttempt",
    "attempt_recurrent",
    "recurrent_graph",
    "recurrent_masks",
    "with_plans",
]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecurrentAttempt:
    """What one level of one criterion gives for the recurrent sites.

    Attributes:
        study: the model.
        masks: the entries of each weight of theirs that stay, by name, (K, gates * H).
        plans: each site with its plan.
        refits: what stands in the place of original entries before anything is removed, by name.
    """

    study: Study
    masks: Mapping[str, NDArray[np.bool_]]
    plans: tuple[tuple[RecurrentSite, RecurrentPlan], ...]
    refits: Mapping[str, Refit]

    @property
    def rewrites(self) -> tuple[tuple[RecurrentSite, RecurrentPlan], ...]:
        """The sites that are not left dense."""
        return tuple((site, plan) for site, plan in self.plans if plan.decision != "dense")

    def readers_of_gone(self) -> tuple[list[Site], list[RecurrentSite]]:
        """The sites, and the recurrent sites, that read an operator some of whose units are not made any more."""
        sites: list[Site] = []
        cells: list[RecurrentSite] = []
        for site, plan in self.rewrites:
            made = sum(cell.units.size for one in plan.directions for cell in one.cells)
            readers = _readers(self.study, site)
            if made < site.hidden * len(site.directions) and readers is not None:
                sites.extend(readers.sites)
                cells.extend(readers.cells)
        return sites, cells

    def written_whole(self, sites: Sequence[RecurrentSite], why: str) -> RecurrentAttempt:
        """The attempt with those of ``sites`` that are left dense written as they are, with their new entries."""
        names = {site.name for site in sites}
        plans = [
            (
                site,
                written_whole(
                    recurrent_graph(self.study, site, self.masks, self.refits), plan, why
                )
                if site.name in names and plan.decision == "dense"
                else plan,
            )
            for site, plan in self.plans
        ]
        return with_plans(self.study, self.masks, plans, self.refits)

    @property
    def substructures(self) -> int:
        """Smallest sets of units of the sites that are rewritten."""
        return sum(plan.substructures for _, plan in self.rewrites)

    @property
    def weights_after(self) -> int:
        """Entries that all recurrent weights together store after the rewrite."""
        return sum(
            sum(rows * columns for rows, columns in blocks)
            if (blocks := plan.blocks(number, weight.operand, site.gates))
            else weight.size
            for site, plan in self.plans
            for number, pair in enumerate(site.weights)
            for weight in pair
        )

    @property
    def is_exact(self) -> bool:
        """Whether no rewritten site has anything but exact zeros unsupported."""
        return not self._changed()

    def annealed(self, model: Model) -> Model:
        """``model`` with the unsupported entries of the rewritten sites removed."""
        sites = [site for site, _ in self.rewrites]
        return ReplaceRecurrentWeights(sites, self._changed())(model).model

    def rewritten(
        self, model: Model
    ) -> tuple[Model, dict[str, SiteBlocks], dict[str, SlicedConstant]]:
        """``model`` with every planned site as smaller operators, and where the parts of weights and biases are."""
        rewriting = RewriteRecurrent(self.rewrites, self.annealed_weight)
        model = rewriting(model).model
        changed = self._changed()
        blocks = {
            weight.name: SiteBlocks(
                site=weight.name,
                shape=weight.shape,
                annealing=self._annealing(weight) if weight.name in changed else "exact",
                sha256=digest(self.annealed_weight(weight)),
                blocks=rewriting.record[weight.name],
            )
            for site, _ in self.rewrites
            for weight in site.all_weights
        }
        return model, blocks, rewriting.constants

    def annealed_weight(self, weight: RecurrentWeight) -> NDArray[Any]:
        """A weight without its unsupported entries, (K, gates * H)."""
        kept = weight_of(self.study, weight, self.refits)
        return anneal(kept, self.masks[weight.name])

    def _annealing(self, weight: RecurrentWeight) -> Annealing:
        new = self.annealed_weight(weight)
        other = (new != 0) & (new != self.study.weight(weight))
        return "refitted" if other.any() else "masked"

    def _changed(self) -> dict[str, NDArray[Any]]:
        """The weights of rewritten sites that annealing changes."""
        found = {
            weight.name: (weight, self.annealed_weight(weight))
            for site, _ in self.rewrites
            for weight in site.all_weights
            if weight.name in self.refits
            or (self.study.weight(weight)[~self.masks[weight.name]] != 0).any()
        }
        return {
            name: new
            for name, (weight, new) in found.items()
            if not np.array_equal(new, self.study.weight(weight))
        }


def attempt_recurrent(
    study: Study,
    masks: Mapping[str, NDArray[np.bool_]],
    cost: CostModel,
    emit: Emit,
    refits: Mapping[str, Refit] | None = None,
) -> RecurrentAttempt:
    """Plan every recurrent site.

    Args:
        study: the model.
        masks: supported entries of each recurrent weight by name, (K, gates * H).
        cost: the provider's coefficients.
        emit: as of :func:`plan_recurrent`.
        refits: weights that stand in the place of the original's, by name, those of other sites too.
    """
    refits = refits or {}
    plans = [
        (site, plan_recurrent(recurrent_graph(study, site, masks, refits), cost, emit))
        for site in study.recurrent
    ]
    return with_plans(study, masks, plans, refits)


def recurrent_masks(
    study: Study, selections: Mapping[str, Selection]
) -> dict[str, NDArray[np.bool_]]:
    """The selected masks of the recurrent weights: those of all sites would take a quarter of the model's memory."""
    weights = [weight for site in study.recurrent for weight in site.all_weights]
    return {weight.name: selections[weight.name].mask for weight in weights}


def recurrent_graph(
    study: Study,
    site: RecurrentSite,
    masks: Mapping[str, NDArray[np.bool_]],
    refits: Mapping[str, Refit],
) -> RecurrentGraph:
    """The state graphs of a site; arguments as of :func:`attempt_recurrent`."""
    graphs = tuple(
        unit_graph(masks[w.name], masks[r.name], site.cell, cascade=cascade)
        for (w, r), cascade in zip(site.weights, site.cascade, strict=True)
    )
    return RecurrentGraph(
        graphs,
        steps=steps_of(site, study.shapes),
        whole_output=bool(site.outputs[0]),
        itemsize=study.weight(site.all_weights[0]).itemsize,
        gone=_gone(study, site, masks, refits),
    )


def _gone(
    study: Study,
    site: RecurrentSite,
    masks: Mapping[str, NDArray[np.bool_]],
    refits: Mapping[str, Refit],
) -> tuple[NDArray[np.intp], ...]:
    """Per direction, the units without a supported entry that all readers multiply with zeros."""
    none = np.empty(0, np.intp)
    idle = [
        ~(
            unit_edges(masks[w.name], w.gates).any(axis=0)
            | unit_edges(masks[r.name], r.gates).any(axis=0)
            | masks[r.name].any(axis=1)
        )
        for w, r in site.weights
    ]
    readers = None
    if any(units.any() and not units.all() for units in idle):
        readers = _readers(study, site)
    if readers is None:
        return tuple(none for _ in site.weights)
    used = np.zeros(site.hidden, dtype=bool)
    for reader in readers.sites:
        values = study.values(reader, weight_of(study, reader, refits))
        used |= reader.edges(values != 0).any(axis=1)
    for cell in readers.cells:
        for w, _ in cell.weights:
            used |= (weight_of(study, w, refits) != 0).any(axis=1)
    return tuple(np.flatnonzero(units & ~used) for units in idle)


def _readers(study: Study, site: RecurrentSite) -> StateReaders | None:
    known, graph = (study.constants, study.shapes), study.model.proto.graph
    return find_state_readers(graph, site, study.sites, study.recurrent, known)


def with_plans(
    study: Study,
    masks: Mapping[str, NDArray[np.bool_]],
    plans: Iterable[tuple[RecurrentSite, RecurrentPlan]],
    refits: Mapping[str, Refit],
) -> RecurrentAttempt:
    """An attempt with these plans: entries that the operators have room for stay."""
    chosen = tuple(plans)
    kept = dict(masks)
    for site, plan in chosen:
        if plan.decision != "dense":
            kept |= _filled(site, plan, masks)
    return RecurrentAttempt(study, kept, chosen, refits)


def _filled(
    site: RecurrentSite, plan: RecurrentPlan, masks: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """The masks of a site's weights with all entries that its operators have room for."""
    filled: dict[str, NDArray[np.bool_]] = {}
    for (w, r), direction in zip(site.weights, plan.directions, strict=True):
        own = [
            (cell, unit_columns(cell.units, site.hidden, site.gates))
            for cell in direction.cells
        ]
        carried = [
            (cell.sources, carried_columns(cell.units, site.hidden, site.cell))
            for cell in direction.cells
        ]
        filled[w.name] = fill(masks[w.name], [(cell.inputs, columns) for cell, columns in own])
        blocks = [*((cell.units, columns) for cell, columns in own), *carried]
        filled[r.name] = fill(masks[r.name], blocks)
    return filled
