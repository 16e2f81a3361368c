"""The calibrated schedule: of all proposals the one that is predicted to be fastest, among those inside the budget.

Within a family, a stricter proposal, one that leaves fewer weights, is both faster and less exact, so that halving
finds the strictest one inside the budget with few plans and few refits. Errors are measured on the part of the samples
to choose on; what is chosen has to pass on the part that is held out for claim B, which nothing else ever sees.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Zero
from onnx_decompose.calibrated.decay_proposals import decayed_units
from onnx_decompose.calibrated.merge_proposals import merged_outputs
from onnx_decompose.calibrated.refitting import (
    CalibrationContext,
    Proposal,
    refitted,
    split_samples,
)
from onnx_decompose.calibrated.removal_proposals import removed_units
from onnx_decompose.calibrated.support_proposals import supported_groups
from onnx_decompose.decomposition.decompose import annealed_model, attempt
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.timing.cost_cache import cost_model
from onnx_decompose.verification.verify import AnnealingClaim, measure_annealing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx_decompose.analysis.selection import Selection
    from onnx_decompose.calibrated.refitting import Generator
    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.graph.study import Study
    from onnx_decompose.options import Options, ProposalKind
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.verify import Inputs

logger = logging.getLogger(__name__)

__all__ = ["GENERATORS", "Calibrated", "calibrate_within_budget", "context_for"]

GENERATORS: Mapping[ProposalKind, Generator] = {
    "decay": decayed_units,
    "support": supported_groups,
    "removal": removed_units,
    "merging": merged_outputs,
}
"""What proposals come from, by kind."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """A calibrated attempt inside the budget, and the samples that were held out for claim B."""

    tried: Attempt
    inputs: Inputs


def calibrate_within_budget(
    study: Study, options: Options, inputs: Inputs, provider: Provider, *, to_beat: float
) -> Calibrated | str:
    """The fastest proposal inside the budget, as predicted.

    Args:
        study: the model.
        options: budget, compensation, seed.
        inputs: all of the user's samples, and the metric.
        provider: where models run.
        to_beat: predicted cost over dense; what is not below it is not tried.

    Returns:
        The attempt; or why there is none, with the figures of the one that came nearest.
    """
    assert inputs.samples is not None
    if inputs.samples.count < 3:
        return f"calibrated annealing needs more samples than {inputs.samples.count}"
    context = context_for(study, options, inputs.samples, provider)
    reason = context.too_few() if context.sites else "no site can be refitted"
    if reason is not None:
        return reason
    search = _Search(context, options, inputs, cost_model(provider, options.batch))
    return search.best(to_beat)


def context_for(
    study: Study, options: Options, samples: Samples, provider: Provider
) -> CalibrationContext:
    """The samples split, and what generators may look at."""
    return CalibrationContext(
        study,
        split_samples(samples, options.seed),
        provider,
        options.seed,
        options.compensation,
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Named:
    """Exactly what a proposal keeps is supported."""

    name: str

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        return dataclasses.replace(
            make_criterion("fdr", 0.5).select(evidence, rng=rng), criterion=self.name
        )

    def looser(self) -> None:
        return None


class _Search:
    """One run over all families of proposals."""

    def __init__(
        self, context: CalibrationContext, options: Options, inputs: Inputs, cost: CostModel
    ) -> None:
        self._context = context
        self._options = options
        self._inputs = inputs
        self._cost = cost
        self._nearest: tuple[float, str] | None = None
        self._costs: dict[Proposal, float] = {}
        parts = context.parts
        total = parts.fit.count + parts.choose.count + parts.judge.count
        told = (
            f"held out of {total}, {parts.fit.count} to fit and {parts.choose.count} to choose"
        )
        self._choosing = dataclasses.replace(inputs, samples=parts.choose, part="to choose on")
        self._judging = dataclasses.replace(
            inputs, samples=parts.judge, part=f"{parts.judge.count} samples {told}"
        )

    def best(self, to_beat: float) -> Calibrated | str:
        """The fastest proposal that passes, or why none does."""
        families: dict[str, list[Proposal]] = {}
        for kind in self._options.proposals or GENERATORS:
            for proposal in GENERATORS[kind](self._context):
                families.setdefault(proposal.family, []).append(proposal)
        fastest: list[tuple[float, list[Proposal]]] = []
        for family in families.values():
            family.sort(key=self._weights_left)
            cost = math.inf
            while family and math.isinf(cost := self._predicted(family[0])):
                del family[0]
            if family:
                fastest.append((cost, family))
        best: Attempt | None = None
        for cost, family in sorted(fastest, key=lambda pair: pair[0]):
            found = self._strictest(family, to_beat) if cost < to_beat else None
            if found is not None:
                best, to_beat = found, found.predicted_cost
        if best is not None:
            return Calibrated(best, self._judging)
        if self._nearest is not None:
            return f"calibrated: {self._nearest[1]}"
        return "calibrated: the data lets nothing be removed that would pay"

    def _strictest(self, family: Sequence[Proposal], to_beat: float) -> Attempt | None:
        """The strictest of a family, sorted so, that passes on both parts and is predicted to beat what was found."""
        found: dict[int, Attempt | None] = {}
        low, high = 0, len(family)
        while low < high:
            middle = (low + high) // 2
            if self._predicted(family[middle]) >= to_beat:
                high = middle
                continue
            found[middle] = self._passing(family[middle])
            if found[middle] is None:
                low = middle + 1
            else:
                high = middle
        for number in range(low, len(family)):
            if self._predicted(family[number]) >= to_beat:
                continue
            tried = found.get(number) or self._passing(family[number])
            if tried is not None and self._inside(tried, self._judging):
                return tried
        return None

    def _passing(self, proposal: Proposal) -> Attempt | None:
        tried = self._attempt(proposal, refitted(self._context, proposal))
        if not tried.takes_apart:
            return None
        return tried if self._inside(tried, self._choosing) else None

    def _inside(self, tried: Attempt, inputs: Inputs) -> bool:
        claim = measure_annealing(
            tried.study.source,
            annealed_model(tried),
            inputs=inputs,
            provider=self._context.provider,
            budget=self._options.budget,
        )
        logger.info(
            "%s: %s %.3g on %s", tried.criterion.name, claim.measure, claim.error, claim.data
        )
        if not claim and (self._nearest is None or claim.error < self._nearest[0]):
            self._nearest = claim.error, _told(tried, claim)
        return bool(claim)

    def _weights_left(self, proposal: Proposal) -> int:
        """Different weights that the masks leave: the order of costs, before anything is planned."""
        left = 0
        for name, mask in proposal.masks.items():
            equal = proposal.equal.get(name)
            left += int((mask if equal is None else mask[:, equal.firsts]).sum())
        return left

    def _predicted(self, proposal: Proposal) -> float:
        """The predicted cost over dense, infinite where nothing is taken apart.

        As it would be without compensation: costs do not depend on it.
        """
        if proposal in self._costs:
            return self._costs[proposal]
        study = self._context.study
        bare: dict[str, Refit] = {}
        for site in self._context.sites:
            if site.name in proposal.masks:
                start = proposal.start(site, study.weight(site))
                bare[site.name] = Refit(start, np.zeros(site.shape[1]))
        tried = self._attempt(proposal, bare)
        cost = tried.predicted_cost if tried.takes_apart else math.inf
        logger.info("%s: predicted %.2f of the time", proposal.name, cost)
        self._costs[proposal] = cost
        return cost

    def _attempt(self, proposal: Proposal, refits: Mapping[str, Refit]) -> Attempt:
        study = self._context.study
        evidence = {
            site.name: Evidence(
                weight, weight, Zero(), "calibration" if name in refits else "zero"
            )
            for site in study.weights
            for name in (site.name,)
            for weight in (refits[name].weight if name in refits else study.weight(site),)
        }
        return attempt(
            study,
            evidence,
            _Named(proposal.name),
            cost=self._cost,
            emit=self._options.emit,
            rng=np.random.default_rng(self._options.seed),
            refits=refits,
        )


def _told(tried: Attempt, claim: AnnealingClaim) -> str:
    count = tried.substructures
    what = f"{count} substructure{'' if count == 1 else 's'}"
    return (
        f"at {tried.criterion.name} ({what}, {tried.predicted_cost:.2f} of the time predicted) the {claim.measure} "
        f"would be {claim.error:.2g} against a budget of {claim.budget:g} on {claim.data}"
    )
