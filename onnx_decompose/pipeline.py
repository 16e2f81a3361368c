"""The method, stage by stage: every function here is a line of its table of contents."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_decompose import calibration
from onnx_decompose.analysis.criteria import Criterion, make_criterion
from onnx_decompose.analysis.shared import Shared
from onnx_decompose.autotune import autotuned
from onnx_decompose.bench import Timing, bench_models, slowdown, timing_feeds
from onnx_decompose.cases import open_model, working_size
from onnx_decompose.cost_cache import cost_model, prepare, store
from onnx_decompose.decompose import Attempt, annealed_model, attempt, rewritten_model
from onnx_decompose.errors import AnnealingError, OptionError, StructuralError
from onnx_decompose.feeds import index_limits
from onnx_decompose.gather import gather_all
from onnx_decompose.metadata import write_decomposition
from onnx_decompose.metrics import load_metric
from onnx_decompose.model_io import (
    Model,
    check_output,
    copy_model,
    load_model,
    model_files,
    save_model,
)
from onnx_decompose.no_harm import (
    MOST_TRIES,
    region_timings,
    short_settings,
    without_harmful,
    without_recurrent,
)
from onnx_decompose.options import Options, ProviderChoice
from onnx_decompose.region_bench import RegionBench
from onnx_decompose.samples import load_inputs
from onnx_decompose.sessions import Provider, resolve_provider
from onnx_decompose.study import Study, study_model
from onnx_decompose.summarize import Measured, alternatives, report_on
from onnx_decompose.tensors import graph_inputs
from onnx_decompose.verify import (
    AnnealingClaim,
    Inputs,
    StructuralClaim,
    Tolerance,
    Validation,
    measure_annealing,
    structural_claim,
    validate_models,
)
from onnx_decompose.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.cost import CostModel
    from onnx_decompose.report import Report


logger = logging.getLogger(__name__)

__all__ = ["Rewrite", "analyze", "bench", "calibrate", "rewrite", "validate"]

Source = str | Path | onnx.ModelProto
"""A model, or where it lies."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rewrite:
    """What ``rewrite`` made.

    Attributes:
        model: the rewritten model, or the given one where it is not decomposable.
        annealed: the dense annealed model that claim A compares with.
        report: everything found, decided, claimed and measured.
    """

    model: onnx.ModelProto
    annealed: onnx.ModelProto
    report: Report


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A rewritten model with its claims and times."""

    tried: Attempt
    model: Model
    structural: StructuralClaim
    annealing: AnnealingClaim
    timing: Timing

    @property
    def measured(self) -> Measured:
        return Measured(self.structural, self.annealing, self.timing)


def analyze(source: Source, options: Options | None = None) -> Report:
    """What ``rewrite`` would find, and what other nulls could give; nothing is run.

    Args:
        source: a model, or its path.
        options: evidence options; the rest is not used.

    Raises:
        InputError: the model or an option cannot be used.
    """
    options = options or Options()
    study = study_model(load_model(source))
    evidence = gather_all(study, options)
    criterion = make_criterion(options.criterion, options.alpha)
    cost = cost_model(Provider.CPU, options.batch)
    tried = _attempt(study, evidence, criterion, options, cost)
    return report_on(
        tried, options, Measured(), others=tuple(alternatives(study, options, cost, tried))
    )


def rewrite(
    source: Source, output: str | Path | None = None, options: Options | None = None
) -> Rewrite:
    """Find the substructures of a model and write it as smaller parallel operators, verified.

    Args:
        source: a model, or its path.
        output: where to write the result; nothing is written without it.
        options: evidence, budget, data, provider.

    Raises:
        ClaimError: a claim does not hold; nothing is written.
        InputError: the model, the data or an option cannot be used.
        ProviderError: the asked provider cannot run here.
    """
    options = options or Options()
    study = study_model(load_model(source))
    output = None if output is None else Path(output)
    if output is not None:
        check_output(output, inputs=model_files(study.model))
    logger.info(
        "%d sites in %d regions, %d recurrent operators",
        len(study.sites),
        len(study.regions),
        len(study.recurrent),
    )
    provider = resolve_provider(options.provider)
    inputs = _inputs(study.model, options)
    tried, refusal = _anneal_within_budget(study, options, inputs, provider)
    if options.autotune and refusal is None:
        tried = _autotune(tried, inputs, provider, options)
    if refusal is not None or not tried.takes_apart:
        return _unchanged(tried, output, options, Measured(), refusal)
    made = _make(tried, inputs, provider, options)
    harm = None if options.force else slowdown(made.timing)
    if harm is not None:
        made, harm = _without_harm(made, harm, inputs, provider, options)
    if harm is not None:
        refusal = f"the rewritten model is {harm}; the original was kept"
        return _unchanged(made.tried, output, options, made.measured, refusal)
    if output is not None:
        save_model(made.model.proto, output, data_from=study.model)
    report = report_on(made.tried, options, made.measured)
    return Rewrite(made.model.proto, annealed_model(made.tried).proto, report)


def validate(  # noqa: PLR0913 (the command's options)
    original: Source,
    rewritten: Source,
    *,
    inputs: str | Path | None = None,
    seeds: int = 10,
    seed: int = 0,
    tolerance: Tolerance | None = None,
    budget: float | None = None,
    provider: ProviderChoice = "auto",
) -> Validation:
    """Check claims A and B of a rewritten model.

    Args:
        original: the model before the rewrite, or its path.
        rewritten: the model to check, or its path.
        inputs: real inputs; made-up ones are tried in any case.
        seeds: random draws at each size.
        seed: of the random draws.
        tolerance: of claim A's outputs; by default their type decides.
        budget: of claim B; by default the one that the rewritten model was accepted with.
        provider: where to run.

    Raises:
        InputError: a model or the inputs cannot be used, or are not versions of one model.
        ProviderError: the asked provider cannot run here.
    """
    if budget is not None and not budget >= 0:
        raise OptionError(f"budget {budget} is negative; give 0 for exact, or a small number")
    before, after = load_model(original), load_model(rewritten)
    samples = None if inputs is None else load_inputs(Path(inputs), graph_inputs(before.proto))
    return validate_models(
        before,
        after,
        inputs=Inputs(samples, seeds=seeds, seed=seed),
        provider=resolve_provider(provider),
        budget=budget,
        tolerance=tolerance,
    )


def bench(
    original: Source,
    rewritten: Source,
    *,
    inputs: str | Path | None = None,
    batch: tuple[int, ...] = (1, 16, 256),
    seed: int = 0,
    provider: ProviderChoice = "auto",
) -> Timing:
    """Time two models side by side: interleaved runs in one process, medians.

    Args:
        original: the model before the rewrite, or its path.
        rewritten: the other one, or its path.
        inputs: real inputs; random ones otherwise.
        batch: batch sizes.
        seed: of the random inputs.
        provider: where to run.

    Raises:
        InputError: a model or the inputs cannot be used.
        ProviderError: the asked provider cannot run here.
    """
    before, after = load_model(original), load_model(rewritten)
    samples = None if inputs is None else load_inputs(Path(inputs), graph_inputs(before.proto))
    options = Options(batch=batch, seed=seed)
    return _time(before, after, Inputs(samples, seed=seed), resolve_provider(provider), options)


def calibrate(*, provider: ProviderChoice = "auto", seed: int = 0) -> tuple[CostModel, Path]:
    """Measure the cost model's coefficients here and keep them for later calls of ``analyze`` and ``rewrite``.

    Args:
        provider: whose coefficients.
        seed: of the weights and inputs that are timed.

    Returns:
        The coefficients, and the file that keeps them.

    Raises:
        OutputError: the cache directory cannot be written.
        ProviderError: the asked provider cannot run here.
    """
    found = resolve_provider(provider)
    prepare(found)
    cost = calibration.calibrate(found, rng=np.random.default_rng(seed))
    return cost, store(cost, found)


def _attempt(
    study: Study,
    evidence: Mapping[str, Evidence],
    criterion: Criterion,
    options: Options,
    cost: CostModel,
) -> Attempt:
    rng = np.random.default_rng(options.seed)
    return attempt(study, evidence, criterion, cost=cost, emit=options.emit, rng=rng)


def _inputs(model: Model, options: Options) -> Inputs:
    samples = None
    if options.calibration is not None:
        samples = load_inputs(options.calibration, graph_inputs(model.proto))
    metric = None if options.metric is None else load_metric(options.metric)
    return Inputs(samples, seeds=options.seeds, seed=options.seed, metric=metric)


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


def _anneal_within_budget(
    study: Study, options: Options, inputs: Inputs, provider: Provider
) -> tuple[Attempt, str | None]:
    """The largest removal whose measured error is inside the budget.

    Returns:
        The attempt to carry out and None; or the attempt that was asked for and what stood against it, None where
        it takes nothing apart.
    """
    cost = cost_model(provider, options.batch)
    asked: Attempt | None = None
    refusal: str | None = None
    for evidence, criterion in _levels(study, options):
        logger.info("%s: testing %d weights", criterion.name, len(study.weights))
        tried = _attempt(study, evidence, criterion, options, cost)
        asked = asked or tried
        if not tried.takes_apart:
            continue
        if tried.is_exact:
            return tried, None
        claim = _measure_annealed(tried, inputs, provider, options)
        if claim:
            return tried, None
        refusal = refusal or (
            f"at {criterion.name} the {claim.measure} would be {claim.error:.2g} against a budget of "
            f"{claim.budget:g} on {claim.data}"
        )
    assert asked is not None
    return asked, refusal


def _measure_annealed(
    tried: Attempt, inputs: Inputs, provider: Provider, options: Options
) -> AnnealingClaim:
    """Claim B on the dense annealed model: before anything is rewritten."""
    claim = measure_annealing(
        tried.study.model,
        annealed_model(tried),
        inputs=inputs,
        provider=provider,
        budget=options.budget,
    )
    logger.info("%s: %s", tried.criterion.name, claim)
    return claim


def _autotune(tried: Attempt, inputs: Inputs, provider: Provider, options: Options) -> Attempt:
    """The fastest way to write every region, as measured, or as predicted where that one would be outside the budget.

    Smaller blocks hold fewer of the unsupported entries, so that the fastest plan may remove more.
    """
    logger.info("timing the candidates of %d regions", len(tried.plans))
    rng = np.random.default_rng(options.seed)
    regions = RegionBench(tried.study, options.batch, provider, rng)
    tuned = autotuned(tried, regions, cost_model(provider, options.batch), options.emit)
    if tuned.is_exact or _measure_annealed(tuned, inputs, provider, options):
        return tuned
    logger.info("the fastest plans would be outside the budget; the predicted ones stand")
    return tried


def _make(tried: Attempt, inputs: Inputs, provider: Provider, options: Options) -> _Made:
    """The rewritten model, proved and timed."""
    original = tried.study.model
    logger.info(
        "writing %d regions as branches, %d recurrent operators as smaller ones",
        len(tried.rewrites),
        len(tried.recurrent.rewrites),
    )
    model = _rewrite(tried, options)
    return _Made(
        tried,
        model,
        structural=_prove(original, model, inputs, provider),
        annealing=_measure(original, model, inputs, provider, options),
        timing=_time(original, model, inputs, provider, options),
    )


def _without_harm(
    made: _Made, harm: str, inputs: Inputs, provider: Provider, options: Options
) -> tuple[_Made, str | None]:
    """A model that leaves dense what does not pay: recurrent operators first, then regions.

    Returns:
        The model, and None; or the last one tried, and what is still against it.
    """
    timings: Mapping[str, Timing] = {}
    for _ in range(MOST_TRIES - 1):
        tried = made.tried
        if len(tried.rewrites) + len(tried.recurrent.rewrites) == 1:
            break
        if tried.recurrent.rewrites:
            smaller = without_recurrent(tried, harm)
        else:
            if not timings:
                logger.info("the model is %s: timing its regions alone", harm)
                timings = _time_regions(tried, provider, options)
            smaller = without_harmful(tried, timings, harm)
        if not smaller.takes_apart:
            return dataclasses.replace(made, tried=smaller), harm
        try:
            made = _make(smaller, inputs, provider, options)
        except AnnealingError as error:  # fewer removals are not always a smaller error
            logger.info("%s", error)
            break
        still = slowdown(made.timing)
        if still is None:
            return made, None
        harm = still
    return made, harm


def _time_regions(tried: Attempt, provider: Provider, options: Options) -> Mapping[str, Timing]:
    rng = np.random.default_rng(options.seed)
    settings = short_settings(len(tried.rewrites), len(options.batch))
    return region_timings(
        tried, RegionBench(tried.study, options.batch, provider, rng, settings)
    )


def _rewrite(tried: Attempt, options: Options) -> Model:
    rewritten, decomposition = rewritten_model(tried, options.budget)
    write_decomposition(rewritten.proto, decomposition, VERSION)
    return rewritten


def _prove(
    original: Model, rewritten: Model, inputs: Inputs, provider: Provider
) -> StructuralClaim:
    """Claim A: on the weights first, then on outputs."""
    logger.info("checking claim A: rewritten against annealed")
    claim = structural_claim(original, rewritten, inputs=inputs, provider=provider)
    if not claim:
        raise StructuralError(
            f"{original.label}: claim A does not hold: {claim.reason}; nothing was written"
        )
    return claim


def _measure(
    original: Model, rewritten: Model, inputs: Inputs, provider: Provider, options: Options
) -> AnnealingClaim:
    """Claim B on the model that would be written."""
    logger.info("checking claim B: rewritten against the original")
    claim = measure_annealing(
        original, rewritten, inputs=inputs, provider=provider, budget=options.budget
    )
    if not claim:
        raise AnnealingError(
            f"{original.label}: claim B does not hold: {claim.measure} {claim.error:.3g} against a budget of "
            f"{claim.budget:g} on {claim.data}; nothing was written"
        )
    return claim


def _time(
    original: Model, rewritten: Model, inputs: Inputs, provider: Provider, options: Options
) -> Timing:
    """Both models side by side, at every asked batch size."""
    logger.info("timing the rewritten model against the original")
    rng = np.random.default_rng(options.seed)
    reference = open_model(original, provider, fast=True)
    feeds = timing_feeds(
        graph_inputs(original.proto),
        options.batch,
        rng=rng,
        other=64 if inputs.samples else working_size(original.proto, reference, rng),
        limits=index_limits(original.proto),
        samples=inputs.samples,
    )
    return bench_models(
        reference,
        open_model(rewritten, provider, fast=True),
        feeds_by_batch=feeds,
        provider=provider,
        rng=rng,
    )


def _unchanged(
    tried: Attempt,
    output: Path | None,
    options: Options,
    measured: Measured,
    refusal: str | None,
) -> Rewrite:
    """Keep the original, byte for byte."""
    model = tried.study.model
    if output is not None and model.path is not None:
        copy_model(model, output)
    elif output is not None:
        save_model(model.proto, output, data_from=model)
    report = report_on(tried, options, measured, refusal=refusal)
    return Rewrite(model.proto, model.proto, report)
