"""The calibrated schedule: of all proposals the one that is predicted to be fastest, among those inside the budget.

Within a family, a stricter proposal is both faster and less exact, so that halving finds the strictest one inside the
budget with few plans and few refits. Families come in the order of how fast they may be; one that cannot be faster than
what was found is not made at all.

Inside the budget is what has an upper bound of its error there (``trials``), on samples that it was not fitted to:
those to choose on, and where these are few, those to fit on in turn as well. What is chosen, and at most two safer ones
before it, have to pass on the part that is held out for claim B, which nothing else ever sees: the safest first, and
none behind the first that fails (``analysis.choice``).

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

from onnx_decompose.analysis.choice import last_in_a_row, risk_of_turn, steps
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.evidence import Evidence
from onnx_decompose.analysis.null import Zero
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.decay_proposals import decayed_units
from onnx_decompose.calibrated.group_proposals import group_networks
from onnx_decompose.calibrated.identity import search_digest
from onnx_decompose.calibrated.inner_sites import rare_sites, unshown_sites
from onnx_decompose.calibrated.input_proposals import spare_inputs
from onnx_decompose.calibrated.journal import Journal
from onnx_decompose.calibrated.merge_proposals import merged_outputs
from onnx_decompose.calibrated.partition_proposals import partitioned_regions
from onnx_decompose.calibrated.parts import rotated_samples, split_samples
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import removed_units
from onnx_decompose.calibrated.site_statistics import HELD_BYTES, in_batches
from onnx_decompose.calibrated.support_proposals import supported_groups
from onnx_decompose.calibrated.trials import Trials
from onnx_decompose.decomposition.decompose import annealed_model, attempt
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.errors import ClaimError
from onnx_decompose.timing.cost_cache import cost_model
from onnx_decompose.verification.verify import AnnealingClaim, measure_annealing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_decompose.analysis.selection import Selection
    from onnx_decompose.calibrated.families import Family, Generator
    from onnx_decompose.calibrated.proposals import Proposal
    from onnx_decompose.decomposition.decompose import Attempt
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.options import Options, ProposalKind
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Metric
    from onnx_decompose.verification.verify import Inputs

logger = logging.getLogger(__name__)

_Place = tuple[int, int]
"""The number of a family, and a level of it."""

__all__ = ["GENERATORS", "RISK", "Calibrated", "calibrate_within_budget", "context_for"]

RISK = 0.1
"""Probability that a proposal counts as inside the budget that is not, before the held-out samples are asked."""

EARLY = 0.1
"""Share of a risk that is spent on accepting a proposal after the first of several turns."""

_MANY = 1000
"""Samples to choose on that are enough, so that no others take turns."""

_MOST_MOMENTS = 1 << 25
"""Bytes of second moments of all sites; with more, turns would take too much memory and time."""

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
    context, *others = _contexts(study, options, inputs, provider)
    reason = context.too_few() if context.sites else "no site can be refitted"
    if reason is not None:
        return reason
    cost = cost_model(provider, options.batch)
    journal = Journal()
    if options.resume is not None:
        which = search_digest(study.source, options, inputs, cost, provider)
        journal = Journal(options.resume, which)
    return _Search((context, *others), options, inputs, cost, journal).best(to_beat)


def context_for(
    study: Study,
    options: Options,
    samples: Samples,
    provider: Provider,
    metric: Metric | None = None,
) -> CalibrationContext:
    """The samples split, and what generators may look at."""
    context = CalibrationContext(
        study,
        split_samples(samples, options.seed),
        provider,
        options.seed,
        options.compensation,
        metric=metric,
    )
    context = dataclasses.replace(context, unseen=unshown_sites(context))
    read = list(dict.fromkeys(site.input for site in context.sites))
    sized = in_batches(context.observe, read, samples)
    return dataclasses.replace(context, parts=split_samples(sized, options.seed))


def _contexts(
    study: Study, options: Options, inputs: Inputs, provider: Provider
) -> list[CalibrationContext]:
    """The same, and where samples are few, one for each other turn of those to choose on."""
    samples = inputs.samples
    assert samples is not None
    context = context_for(study, options, samples, provider, inputs.metric)
    read = {context.view(site): site.shape[0] for site in context.sites}
    moments = sum(8 * units**2 for units in read.values())
    if context.parts.choose.count >= _MANY or moments > _MOST_MOMENTS:
        contexts = [context]
    else:
        sized = dataclasses.replace(samples, at_a_time=context.parts.fit.at_a_time)
        turns = rotated_samples(sized, options.seed)
        contexts = [
            dataclasses.replace(
                context, parts=parts, turn=turn, held_bytes=HELD_BYTES // len(turns)
            )
            for turn, parts in enumerate(turns)
        ]
    unseen = {**context.unseen, **rare_sites(contexts)}
    return [dataclasses.replace(one, unseen=unseen) for one in contexts]


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
    """What a proposal came to on the samples to choose on.

    Attributes:
        error: as measured.
        used: the share of the budget that the error takes at most, but for the risk; inside it up to 1.
        cost: predicted, over dense, once it was refitted.
        told: all of it, for the report.
    """

    error: float
    used: float
    cost: float
    told: str

    @property
    def passed(self) -> bool:
        """Whether the error is inside the budget."""
        return self.used <= 1


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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """The proposals that come of one part of the samples."""

    context: CalibrationContext
    families: Mapping[str, Family]

    def annealed(self, name: str, level: int) -> Model | None:
        """The model of a level, or of the next looser one that is not the same; None where this part has none."""
        family = self.families.get(name)
        for looser in range(level, 0 if family is None else family.size):
            proposal = None if family is None else family.at(looser)
            if proposal is not None:
                return annealed_by(self.context.study, refitted(self.context, proposal))
        return None


class _Search:
    """One run over all families of proposals."""

    def __init__(
        self,
        contexts: tuple[CalibrationContext, ...],
        options: Options,
        inputs: Inputs,
        cost: CostModel,
        journal: Journal,
    ) -> None:
        self._context = context = contexts[0]
        self._options = options
        self._cost = cost
        self._journal = journal
        self._inputs = inputs
        study = context.study
        self._nonzero = sum(
            int(np.count_nonzero(study.weight(weight))) for weight in study.weights
        )
        self._nearest: tuple[float, str] | None = None
        self._costs: dict[tuple[str, bytes], float] = {}
        self._refitted: dict[_Place, Attempt] = {}
        self._looks: dict[_Place, _Look] = {}
        kinds = options.proposals or GENERATORS
        self._turns = [
            _Turn(
                one,
                {family.name: family for kind in kinds for family in GENERATORS[kind](one)},
            )
            for one in contexts
        ]
        self._families = list(self._turns[0].families.values())
        folds = [one.parts.choose for one in contexts]
        self._trials = Trials(study.source, folds, inputs, context.provider, options.budget)

    def best(self, to_beat: float) -> Calibrated | str:
        """The fastest proposal that passes, or why none does.

        The family that may have the fastest proposal of all always comes next: first nothing but a bound is known of
        it, then what its strictest proposal is predicted to cost, and then it is searched.
        """
        waiting = [
            _Waiting(self._least(family), number)
            for number, family in enumerate(self._families)
        ]
        heapq.heapify(waiting)
        searched = 0
        best: _Place | None = None
        while waiting and waiting[0].cost < to_beat:
            first = heapq.heappop(waiting)
            if first.strictest is None:
                strictest = self._strictest_alive(first.number)
                if strictest is not None:
                    cost = self._predicted((first.number, strictest))
                    heapq.heappush(waiting, _Waiting(cost, first.number, strictest))
                continue
            risk = risk_of_turn(RISK, searched)
            found = self._strictest(first.number, first.strictest, to_beat, risk)
            searched += 1
            if found is not None:
                best, to_beat = found, min(to_beat, self._looks[found].cost)
            self._forget(best)
        return self._judged()

    def _judged(self) -> Calibrated | str:
        """What passes on the samples that are held out, of the fastest proposal and those that are safer."""
        inside = [place for place, look in self._looks.items() if look.passed]
        order = steps(
            [self._looks[place].cost for place in inside],
            [self._looks[place].used for place in inside],
        )
        refused: list[int] = []
        judging = self._judging(len(order))

        def passes(candidate: int) -> bool:
            tried = self._tried(inside[candidate])
            try:
                claim = self._measured(tried, judging)
            except ClaimError as error:
                refused.append(candidate)
                self._nearest = math.inf, f"{_what(tried)} {error}"
                return False
            if not claim:
                refused.append(candidate)
                self._nearest = claim.error, _told(tried, claim)
            return bool(claim)

        last = last_in_a_row(order, passes)
        if last is not None:
            tried = self._tried(inside[last])
            looks = order.index(last) + 1 + len(refused)
            return Calibrated(tried, self._judging(looks))
        if self._nearest is not None:
            return f"calibrated: {self._nearest[1]}"
        return "calibrated: the data lets nothing be removed that would pay"

    def _judging(self, looks: int) -> Inputs:
        """The samples that are held out, with what was done to the others, and how many proposals saw these."""
        parts = self._context.parts
        total = parts.fit.count + parts.choose.count + parts.judge.count
        told = (
            f"{parts.judge.count} samples held out of {total}, {parts.fit.count} to fit and {parts.choose.count} to "
            f"choose{', in turns' if len(self._turns) > 1 else ''}; {len(self._looks)} proposals compared on those, "
            f"{looks} on the held-out ones"
        )
        return dataclasses.replace(self._inputs, samples=parts.judge, part=told)

    def _least(self, family: Family) -> float:
        """The share of the weights that a family leaves at least: none of its proposals is predicted to be faster."""
        whole = sum(weight.size for weight in self._context.study.weights)
        return max(self._nonzero - family.removes, 0) / max(whole, 1)

    def _strictest_alive(self, number: int) -> int | None:
        """The strictest level that takes the model apart and leaves something of it."""
        for level in range(self._families[number].size):
            if not math.isinf(self._predicted((number, level))):
                return level
        return None

    def _strictest(self, number: int, first: int, to_beat: float, risk: float) -> _Place | None:
        """The strictest level, from ``first`` on, that passes and is predicted to beat what was found."""
        size = self._families[number].size
        low, high = first, size
        while low < high:
            middle = (low + high) // 2
            place = number, middle
            if self._predicted(place) >= to_beat or self._look(place, risk).passed:
                high = middle
            else:
                low = middle + 1
        place = number, low
        beats = low < size and self._predicted(place) < to_beat
        return place if beats and self._look(place, risk).passed else None

    def _look(self, place: _Place, risk: float) -> _Look:
        if place not in self._looks:
            number, level = place
            question = f"{self._families[number].name} / {level}: error at a risk of {risk:g}"
            answer = self._journal.recall(
                question, lambda: dataclasses.asdict(self._compared(place, risk))
            )
            look = self._looks[place] = _Look(**answer)
            if not look.passed:
                self._refitted.pop(place, None)
                nearer = self._nearest is None or look.error < self._nearest[0]
                if math.isfinite(look.cost) and nearer:
                    self._nearest = look.error, look.told
        return self._looks[place]

    def _compared(self, place: _Place, risk: float) -> _Look:
        """The error on the samples to choose on, in all turns unless the first is enough to accept it or to give up."""
        tried = self._tried(place)
        name = tried.criterion.name
        if not tried.takes_apart:
            return _Look(math.inf, math.inf, math.inf, f"{name} takes nothing apart")
        try:
            return self._judged_in_turns(place, tried, risk)
        except ClaimError as error:  # how many rows an output has may hang on what was annealed
            return _Look(math.inf, math.inf, math.inf, f"{_what(tried)} {error}")

    def _judged_in_turns(self, place: _Place, tried: Attempt, risk: float) -> _Look:
        """As :meth:`_compared`, of an attempt that takes something apart."""
        name = tried.criterion.name
        blocks = self._trials.compare(0, annealed_model(tried))
        turns = 1
        trial = self._trials.judge(blocks, risk)
        if len(self._turns) > 1:
            early = self._trials.judge(blocks, EARLY * risk)
            if early.used <= 1:
                trial = early
            elif not trial.hopeless:
                for turns, turn in enumerate(self._turns[1:], 2):
                    found = turn.annealed(self._families[place[0]].name, place[1])
                    if found is None:
                        told = f"{name} is not there in all samples"
                        return _Look(math.inf, math.inf, math.inf, told)
                    blocks += self._trials.compare(turns - 1, found)
                trial = self._trials.judge(blocks, (1 - EARLY) * risk)
        samples = sum(turn.context.parts.choose.count for turn in self._turns[:turns])
        logger.info(
            "%s: error %.3g, %.3g at most, on %d samples to choose on",
            name,
            trial.error,
            trial.upper,
            samples,
        )
        told = (
            f"{_what(tried)} the {trial.measure} would be {trial.error:.2g}, {trial.upper:.2g} at most, against a "
            f"budget of {trial.budget:g} on {samples} samples to choose on"
        )
        return _Look(trial.error, trial.used, tried.predicted_cost, told)

    def _measured(self, tried: Attempt, inputs: Inputs) -> AnnealingClaim:
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
        return claim

    def _tried(self, place: _Place) -> Attempt:
        """The proposal refitted."""
        if place not in self._refitted:
            number, level = place
            proposal = self._families[number].at(level)
            assert proposal is not None
            self._refitted[place] = self._attempt(proposal, refitted(self._context, proposal))
        return self._refitted[place]

    def _forget(self, kept: _Place | None) -> None:
        """Free all refitted weights but those of the best."""
        self._refitted = {k: tried for k, tried in self._refitted.items() if k == kept}

    def _predicted(self, place: _Place) -> float:
        """The predicted cost over dense, infinite where nothing is taken apart or nothing is left."""
        family, level = self._families[place[0]], place[1]
        cost: float = self._journal.recall(
            f"{family.name} / {level}: predicted cost", lambda: self._planned(family, level)
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
            for site in study.weights:
                if site.name in proposal.masks:
                    start = proposal.start(site, study.weight(site))
                    bare[site.name] = Refit(
                        study.stored_as(site, start), np.zeros(site.shape[1])
                    )
            tried = self._attempt(proposal, bare)
            self._costs[key] = tried.predicted_cost if tried.takes_apart else math.inf
            logger.info("%s: predicted %.2f of the time", proposal.name, self._costs[key])
        return self._costs[key]

    def _attempt(self, proposal: Proposal, refits: Mapping[str, Refit]) -> Attempt:
        study, left = self._context.study, self._context.left
        weights = {weight.name: study.weight(weight) for weight in study.weights}
        weights |= {
            site.name: study.values(site, refits[site.name].stored)
            for site in study.weights
            if site.name in refits
        }
        evidence = {
            name: Evidence(
                weight,
                weight,
                Zero(),
                "calibration" if name in refits else "zero",
                note=f"left as it is: {left[name]}" if name in left else "",
            )
            for name, weight in weights.items()
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


def _what(tried: Attempt) -> str:
    count = tried.substructures
    what = f"{count} substructure{'' if count == 1 else 's'}"
    return (
        f"at {tried.criterion.name} ({what}, {tried.predicted_cost:.2f} of the time predicted)"
    )


def _told(tried: Attempt, claim: AnnealingClaim) -> str:
    return (
        f"{_what(tried)} the {claim.measure} is {claim.error:.2g} against a budget of {claim.budget:g} "
        f"on {claim.data}"
    )
