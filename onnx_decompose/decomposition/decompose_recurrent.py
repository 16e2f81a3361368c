"""The recurrent part of an attempt: state graphs, plans, and both models' recurrent operators."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from onnx_decompose.analysis.anneal import anneal, fill
from onnx_decompose.analysis.recurrence import carried_columns, unit_columns, unit_graph
from onnx_decompose.graph.recurrent import steps_of
from onnx_decompose.model.metadata import SiteBlocks, SlicedConstant, digest
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights, RewriteRecurrent
from onnx_decompose.planning.plan_recurrent import RecurrentGraph, RecurrentPlan, plan_recurrent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from onnx_decompose.analysis.criteria import Selection
    from onnx_decompose.graph.recurrent import RecurrentSite, RecurrentWeight
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
    """

    study: Study
    masks: Mapping[str, NDArray[np.bool_]]
    plans: tuple[tuple[RecurrentSite, RecurrentPlan], ...]

    @property
    def rewrites(self) -> tuple[tuple[RecurrentSite, RecurrentPlan], ...]:
        """The sites that are not left dense."""
        return tuple((site, plan) for site, plan in self.plans if plan.decision != "dense")

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
                annealing="masked" if weight.name in changed else "exact",
                sha256=digest(self.annealed_weight(weight)),
                blocks=rewriting.record[weight.name],
            )
            for site, _ in self.rewrites
            for weight in site.all_weights
        }
        return model, blocks, rewriting.constants

    def annealed_weight(self, weight: RecurrentWeight) -> NDArray[Any]:
        """A weight without its unsupported entries, (K, gates * H)."""
        return anneal(self.study.weight(weight), self.masks[weight.name])

    def _changed(self) -> dict[str, NDArray[Any]]:
        """The weights of rewritten sites that annealing changes."""
        return {
            weight.name: self.annealed_weight(weight)
            for site, _ in self.rewrites
            for weight in site.all_weights
            if (self.study.weight(weight)[~self.masks[weight.name]] != 0).any()
        }


def attempt_recurrent(
    study: Study, masks: Mapping[str, NDArray[np.bool_]], cost: CostModel, emit: Emit
) -> RecurrentAttempt:
    """Plan every recurrent site.

    Args:
        study: the model.
        masks: supported entries of each recurrent weight by name, (K, gates * H).
        cost: the provider's coefficients.
        emit: as of :func:`plan_recurrent`.
    """
    plans = [
        (site, plan_recurrent(recurrent_graph(study, site, masks), cost, emit))
        for site in study.recurrent
    ]
    return with_plans(study, masks, plans)


def recurrent_masks(
    study: Study, selections: Mapping[str, Selection]
) -> dict[str, NDArray[np.bool_]]:
    """The selected masks of the recurrent weights: those of all sites would take a quarter of the model's memory."""
    weights = [weight for site in study.recurrent for weight in site.all_weights]
    return {weight.name: selections[weight.name].mask for weight in weights}


def recurrent_graph(
    study: Study, site: RecurrentSite, masks: Mapping[str, NDArray[np.bool_]]
) -> RecurrentGraph:
    """The state graphs of a site; ``masks`` as of :func:`attempt_recurrent`."""
    graphs = tuple(
        unit_graph(masks[w.name], masks[r.name], site.cell, cascade=cascade)
        for (w, r), cascade in zip(site.weights, site.cascade, strict=True)
    )
    return RecurrentGraph(
        graphs,
        steps=steps_of(site, study.shapes),
        whole_output=bool(site.outputs[0]),
        itemsize=study.weight(site.all_weights[0]).itemsize,
    )


def with_plans(
    study: Study,
    masks: Mapping[str, NDArray[np.bool_]],
    plans: Iterable[tuple[RecurrentSite, RecurrentPlan]],
) -> RecurrentAttempt:
    """An attempt with these plans: entries that the operators have room for stay."""
    chosen = tuple(plans)
    kept = dict(masks)
    for site, plan in chosen:
        if plan.decision != "dense":
            kept |= _filled(site, plan, masks)
    return RecurrentAttempt(study, kept, chosen)


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
