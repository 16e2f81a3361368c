"""The annealing schedule: from the largest removal to none, the first level whose measured error is in the budget.

Two schedules compete. One tests weights against a null, level by level. The other, where there is calibration data,
refits what it keeps (``calibrated``). The one that is predicted to be faster wins.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.criteria import Criterion, make_criterion
from onnx_decompose.analysis.shared import Shared
from onnx_decompose.calibrated.search import Calibrated, calibrate_within_budget
from onnx_decompose.decomposition.decompose import Attempt, annealed_model, attempt
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.model.metadata import rewritten_before
from onnx_decompose.reporting.summarize import reason_of
from onnx_decompose.timing.cost_cache import cost_model
from onnx_decompose.verification.verify import AnnealingClaim, measure_annealing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.graph.study import Study
    from onnx_decompose.options import Options
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.verify import Inputs

logger = logging.getLogger(__name__)

__all__ = ["Annealed", "anneal_within_budget", "attempt_with", "measure_annealed"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Annealed:
    """What the schedule came to.

    Attributes:
        tried: the attempt to carry out; or the one that was asked for.
        refusal: what stood against it; None where it is to be carried out, or takes nothing apart.
        inputs: what claim B is measured on: of samples that something was fitted to, the part that was held out.
    """

    tried: Attempt
    refusal: str | None
    inputs: Inputs


def anneal_within_budget(
    study: Study, options: Options, inputs: Inputs, provider: Provider
) -> Annealed:
    """The fastest attempt, as predicted, whose measured error is inside the budget."""
    cost = cost_model(provider, options.batch)
    before = rewritten_before(study.source.proto)
    if before is not None:
        *_, (evidence, criterion) = _levels(study, options)
        return Annealed(attempt_with(study, evidence, criterion, options, cost), before, inputs)
    tried, refusal = _tested(study, options, inputs, provider, cost)
    if not options.calibrates:
        return Annealed(tried, refusal, inputs)
    stands = tried.takes_apart and refusal is None and options.annealing == "auto"
    to_beat = math.inf if options.force or options.emit != "auto" else 1.0
    found = calibrate_within_budget(
        study, options, inputs, provider, to_beat=tried.predicted_cost if stands else to_beat
    )
    if isinstance(found, Calibrated):
        return Annealed(found.tried, None, found.inputs)
    if stands:
        logger.info("the null's removal stands: %s", found)
        return Annealed(tried, None, inputs)
    return Annealed(tried, f"{refusal or reason_of(tried)}; {found}", inputs)


def _tested(
    study: Study, options: Options, inputs: Inputs, provider: Provider, cost: CostModel
) -> tuple[Attempt, str | None]:
    """The largest removal of what a null does not support whose measured error is inside the budget.

    Returns:
        The attempt to carry out and None; or the attempt that was asked for and what stood against it, None where
        it takes nothing apart.
    """
    asked: Attempt | None = None
    refusal: str | None = None
    for evidence, criterion in _levels(study, options):
        logger.info("%s: testing %d weights", criterion.name, len(study.weights))
        tried = attempt_with(study, evidence, criterion, options, cost)
        asked = asked or tried
        if not tried.takes_apart:
            continue
        if tried.is_exact:
            return tried, None
        claim = measure_annealed(tried, inputs, provider, options)
        if claim:
            return tried, None
        refusal = refusal or (
            f"at {criterion.name} the {claim.measure} would be {claim.error:.2g} against a budget of "
            f"{claim.budget:g} on {claim.data}"
        )
    assert asked is not None
    return asked, refusal


def measure_annealed(
    tried: Attempt, inputs: Inputs, provider: Provider, options: Options
) -> AnnealingClaim:
    """Claim B on the dense annealed model: before anything is rewritten."""
    claim = measure_annealing(
        tried.study.source,
        annealed_model(tried),
        inputs=inputs,
        provider=provider,
        budget=options.budget,
    )
    logger.info("%s: %s", tried.criterion.name, claim)
    return claim


def attempt_with(
    study: Study,
    evidence: Mapping[str, Evidence],
    criterion: Criterion,
    options: Options,
    cost: CostModel,
) -> Attempt:
    """The attempt at one level, with the emission and the seed that were asked for."""
    rng = np.random.default_rng(options.seed)
    return attempt(study, evidence, criterion, cost=cost, emit=options.emit, rng=rng)


def _levels(
    study: Study, options: Options
) -> Iterator[tuple[Mapping[str, Evidence], Criterion]]:
    """The annealing schedule, from the largest removal to none but exact zeros."""
    asked = make_criterion(options.criterion, options.alpha)
    evidence = gather_all(study, options)
    # Lines are compared with each other, not with a null.
    shared = isinstance(asked, Shared)
    if options.budget > 0 and (
        shared or any(one.source != "zero" for one in evidence.values())
    ):
        criterion: Criterion | None = asked
        while criterion is not None:
            yield evidence, criterion
            criterion = criterion.looser()
    yield gather_all(study, options, "zero"), Shared(within=0.0) if shared else asked
