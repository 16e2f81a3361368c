"""The calibrated schedule: of all proposals the one that is predicted to be fastest, among those inside the budget.

Within a family, a stricter proposal is both faster and less exact, so that halving finds the strictest one inside the
budget with few plans and few refits. Families come in the order of how fast they may be; one that cannot be faster than
what was found is not made at all. Errors are measured on the part of the samples to choose on; what is chosen has to
pass on the part that is held out for claim B, which nothing else ever sees.

What is predicted and measured goes through a journal, so that a search that was interrupted goes on where it was: it
asks the same questions in the same order, and the answers that are there cost nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Zero
from onnx_decompose.calibrated.decay_proposals import decayed_units
from onnx_decompose.calibrated.group_proposals import group_networks
from onnx_decompose.calibrated.identity import search_digest
from onnx_decompose.calibrated.input_proposals import spare_inputs
from onnx_decompose.calibrated.journal import Journal
from onnx_decompose.calibrated.merge_proposals import merged_outputs
from onnx_decompose.calibrated.partition_proposals import partitioned_regions
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
    from collections.abc import Mapping

    from onnx_decompose.analysis.selection import Selection
    from onnx_decompose.calibrated.families import Family, Generator
    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.graph.study import Study
    from onnx_decompose.options import Options, ProposalKind
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Metric
    from onnx_decompose.verification.verify import Inputs

logger = logging.getLogger(__name__)

__all__ = ["GENERATORS", "Calibrated", "calibrate_within_budget", "context_for"]

GENERATORS: Mapping[ProposalKind, Generator] = {
    "decay": decayed_units,
    "support": supported_groups,
    "networks": group_networks,
    "inputs": spare_inputs,
    "removal": removed_units,
    "merging": merged_outputs,
    "partition": partitioned_regions,
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

    Raises:
        DataError: the journal to go on with is that of another search.
        OutputError: it cannot be written.
    """
    assert inputs.samples is not None
    if inputs.samples.count < 3:
        return f"calibrated annealing needs more samples than {inputs.samples.count}"
    context = context_for(study, options, inputs.samples, provider, inputs.metric)
    reason = context.too_few() if context.sites else "no site can be refitted"
    if reason is not None:
        return reason
    cost = cost_model(provider, options.batch)
    journal = Journal()
    if options.resume is not None:
        which = search_digest(study.source, options, inputs, cost, provider)
        journal = Journal(options.resume, which)
    return _Search(context, options, inputs, cost, journal).best(to_beat)


def context_for(
    study: Study,
    options: Options,
    samples: Samples,
    provider: Provider,
    metric: Metric | None = None,
) -> CalibrationContext:
    """The samples split, and what generators may look at."""
    return CalibrationContext(
        study,
        split_samples(samples, options.seed),
        provider,
        options.seed,
        options.compensation,
        metric=metric,
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Look:
    """What a proposal came to on one part of the samples.

    Attributes:
        passed: whether its error is inside the budget.
        error: as measured.
        cost: predicted, over dense, once it was refitted.
        told: all of it, for the report.
    """

    passed: bool
    error: float
    cost: float
    told: str


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class _Waiting:
    """A family that was not searched yet.

    Attributes:
        cost: none of its proposals costs less: as its weights bound it, or as predicted for the strictest.
        number: its place in the order of generators.
        strictest: the first level that is worth a look; None while nothing of the family was made.
    """

    cost: float
    number: int
    strictest: int | None = None


class _Search:
    """One run over all families of proposals."""

    def __init__(
        self,
        context: CalibrationContext,
        options: Options,
        inputs: Inputs,
        cost: CostModel,
        journal: Journal,
    ) -> None:
        self._context = context
        self._options = options
        self._cost = cost
        self._journal = journal
        study = context.study
        self._nonzero = sum(int(np.count_nonzero(study.weight(site))) for site in study.sites)
        self._nearest: tuple[float, str] | None = None
        self._costs: dict[tuple[str, bytes], float] = {}
        self._refitted: dict[tuple[str, int], Attempt] = {}
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
        """The fastest proposal that passes, or why none does.

        The family that may have the fastest proposal of all always comes next: first nothing but a bound is known of
        it, then what its strictest proposal is predicted to cost, and then it is searched.
        """
        kinds = self._options.proposals or GENERATORS
        families = [family for kind in kinds for family in GENERATORS[kind](self._context)]
        waiting = [
            _Waiting(self._least(family), number) for number, family in enumerate(families)
        ]
        heapq.heapify(waiting)
        best: tuple[Family, int] | None = None
        while waiting and waiting[0].cost < to_beat:
            first = heapq.heappop(waiting)
            family = families[first.number]
            if first.strictest is None:
                strictest = self._strictest_alive(family)
                if strictest is not None:
                    cost = self._predicted(family, strictest)
                    heapq.heappush(waiting, _Waiting(cost, first.number, strictest))
                continue
            found = self._strictest(family, first.strictest, to_beat)
            if found is not None:
                best = family, found
                to_beat = self._look(family, found, self._judging).cost
            self._forget(best)
        if best is not None:
            return Calibrated(self._tried(*best), self._judging)
        if self._nearest is not None:
            return f"calibrated: {self._nearest[1]}"
        return "calibrated: the data lets nothing be removed that would pay"

    def _least(self, family: Family) -> float:
        """The share of the weights that a family leaves at least: none of its proposals is predicted to be faster."""
        whole = sum(site.size for site in self._context.study.sites)
        return max(self._nonzero - family.removes, 0) / max(whole, 1)

    def _strictest_alive(self, family: Family) -> int | None:
        """The strictest level that takes the model apart and leaves something of it."""
        for number in range(family.size):
            if not math.isinf(self._predicted(family, number)):
                return number
        return None

    def _strictest(self, family: Family, first: int, to_beat: float) -> int | None:
        """The strictest level, from ``first`` on, that passes on both parts and is predicted to beat what was found."""
        low, high = first, family.size
        while low < high:
            middle = (low + high) // 2
            if self._predicted(family, middle) >= to_beat or self._passing(family, middle):
                high = middle
            else:
                low = middle + 1
        for number in range(low, family.size):
            if self._predicted(family, number) >= to_beat:
                break
            if self._passing(family, number) and self._inside(family, number, self._judging):
                return number
        return None

    def _passing(self, family: Family, number: int) -> bool:
        return self._inside(family, number, self._choosing)

    def _inside(self, family: Family, number: int, inputs: Inputs) -> bool:
        look = self._look(family, number, inputs)
        if not look.passed:
            self._refitted.pop((family.name, number), None)
            if math.isfinite(look.cost) and (
                self._nearest is None or look.error < self._nearest[0]
            ):
                self._nearest = look.error, look.told
        return look.passed

    def _look(self, family: Family, number: int, inputs: Inputs) -> _Look:
        question = f"{family.name} / {number}: error on {inputs.part}"
        answer = self._journal.recall(
            question, lambda: dataclasses.asdict(self._measured(family, number, inputs))
        )
        return _Look(**answer)

    def _measured(self, family: Family, number: int, inputs: Inputs) -> _Look:
        tried = self._tried(family, number)
        if not tried.takes_apart:
            return _Look(
                False, math.inf, math.inf, f"{tried.criterion.name} takes nothing apart"
            )
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
        return _Look(claim.passed, claim.error, tried.predicted_cost, _told(tried, claim))

    def _tried(self, family: Family, number: int) -> Attempt:
        """The proposal refitted."""
        key = family.name, number
        if key not in self._refitted:
            proposal = family.at(number)
            assert proposal is not None
            self._refitted[key] = self._attempt(proposal, refitted(self._context, proposal))
        return self._refitted[key]

    def _forget(self, kept: tuple[Family, int] | None) -> None:
        """Free all refitted weights but those of the best."""
        key = None if kept is None else (kept[0].name, kept[1])
        self._refitted = {k: tried for k, tried in self._refitted.items() if k == key}

    def _predicted(self, family: Family, number: int) -> float:
        """The predicted cost over dense, infinite where nothing is taken apart or nothing is left."""
        cost: float = self._journal.recall(
            f"{family.name} / {number}: predicted cost", lambda: self._planned(family, number)
        )
        return cost

    def _planned(self, family: Family, number: int) -> float:
        """The cost of the proposal as it would be without compensation: costs do not depend on it."""
        proposal = family.at(number)
        if proposal is None or proposal.keeps_nothing:
            return math.inf
        key = family.name, proposal.digest
        if key not in self._costs:
            study = self._context.study
            bare: dict[str, Refit] = {}
            for site in self._context.sites:
                if site.name in proposal.masks:
                    start = proposal.start(site, study.weight(site))
                    bare[site.name] = Refit(start, np.zeros(site.shape[1]))
            tried = self._attempt(proposal, bare)
            self._costs[key] = tried.predicted_cost if tried.takes_apart else math.inf
            logger.info("%s: predicted %.2f of the time", proposal.name, self._costs[key])
        return self._costs[key]

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
