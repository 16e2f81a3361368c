"""The method, stage by stage: every function here is a line of its table of contents."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_decompose.acceptance import NotEquivalentError, make, time_models
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.decompose import Attempt, annealed_model
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.errors import OptionError, StructuralError
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.metadata import rewritten_before
from onnx_decompose.model.model_io import (
    Model,
    check_output,
    copy_model,
    load_model,
    model_files,
    save_model,
)
from onnx_decompose.model.staging import staging
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.model.validity import blaming
from onnx_decompose.options import Options, ProviderChoice
from onnx_decompose.reporting.summarize import Measured, alternatives, report_on
from onnx_decompose.runtime.feeds import check_axes
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider, resolve_provider
from onnx_decompose.schedule import anneal_within_budget, attempt_with, measure_annealed
from onnx_decompose.timing import calibration
from onnx_decompose.timing.autotune import autotuned
from onnx_decompose.timing.cost_cache import cost_model, prepare, store
from onnx_decompose.timing.region_bench import RegionBench
from onnx_decompose.verification.metrics import TOP1, load_metric
from onnx_decompose.verification.reproducer import reproduce, write_reproducer
from onnx_decompose.verification.second_opinion import second_opinion
from onnx_decompose.verification.verify import (
    Inputs,
    Tolerance,
    Validation,
    validate_models,
)

if TYPE_CHECKING:
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.reporting.report import Report
    from onnx_decompose.timing.bench import Timing


logger = logging.getLogger(__name__)

__all__ = ["Rewrite", "analyze", "bench", "calibrate", "rewrite", "validate"]

Source = str | Path | onnx.ModelProto
"""A model, or where it lies."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rewrite:
    """What ``rewrite`` made.

    Attributes:
        model: the rewritten model, or the given one where it is not decomposable; with the external data of the
            output where one was written.
        annealed: the dense annealed model that claim A compares with.
        report: everything found, decided, claimed and measured.
    """

    model: onnx.ModelProto
    annealed: onnx.ModelProto
    report: Report


def analyze(source: Source, options: Options | None = None) -> Report:
    """What ``rewrite`` would find, and what other nulls and criteria could give; nothing is run.

    Args:
        source: a model, or its path.
        options: evidence options; the rest is not used.

    Raises:
        InputError: the model or an option cannot be used.
    """
    options = options or Options()
    model = load_model(source)
    with blaming(model):
        study = study_model(model)
        evidence = gather_all(study, options)
        criterion = make_criterion(options.criterion, options.alpha)
        cost = cost_model(Provider.CPU, options.batch)
        tried = attempt_with(study, evidence, criterion, options, cost)
        refusal = rewritten_before(model.proto)
        others = () if refusal else tuple(alternatives(study, options, cost, tried))
        return report_on(tried, options, Measured(), others=others, refusal=refusal)


def rewrite(
    source: Source,
    output: str | Path | None = None,
    options: Options | None = None,
    *,
    reproducer: Path | None = None,
) -> Rewrite:
    """Find the substructures of a model and write it as smaller parallel operators, verified.

    Args:
        source: a model, or its path.
        output: where to write the result; nothing is written without it.
        options: evidence, budget, data, provider.
        reproducer: folder to write, where claim A fails: the smallest parts of both models that show it, and inputs.

    Raises:
        ClaimError: a claim does not hold; nothing else is written.
        InputError: the model, the data or an option cannot be used.
        ProviderError: the asked provider cannot run here.
    """
    model = load_model(source)
    with blaming(model):
        where = None if output is None else Path(output)
        return _rewrite(model, where, options or Options(), reproducer)


def _rewrite(
    model: Model, output: Path | None, options: Options, reproducer: Path | None
) -> Rewrite:
    """As ``rewrite``, of a model that was read."""
    study = study_model(model)
    check_axes(graph_inputs(model.proto), dict(options.axes))
    if output is not None:
        check_output(output, inputs=model_files(study.source))
    logger.info(
        "%d sites in %d regions, %d recurrent operators",
        len(study.sites),
        len(study.regions),
        len(study.recurrent),
    )
    provider = resolve_provider(options.provider)
    found = anneal_within_budget(study, options, _inputs(study.source, options), provider)
    tried, refusal, inputs = found.tried, found.refusal, found.inputs
    if options.autotune and refusal is None:
        tried = _autotune(tried, inputs, provider, options)
    if refusal is not None or not tried.takes_apart:
        return _unchanged(tried, output, options, Measured(), refusal)
    with staging(study.source, output) as stage:
        try:
            made, harm = make(tried, inputs, provider, options, stage)
        except NotEquivalentError as failed:
            shown = _shown(failed, study.source, provider, reproducer)
            raise StructuralError(f"{failed}; {shown}") from failed
        if harm is not None:
            refusal = f"the rewritten model is {harm}; the original was kept"
            return _unchanged(made.tried, output, options, made.measured, refusal)
        proto = made.model.proto
        if output is not None:
            proto = stage.save(made.model, study.source)
    report = report_on(made.tried, options, made.measured)
    return Rewrite(proto, annealed_model(made.tried).proto, report)


def _shown(
    failed: NotEquivalentError, original: Model, provider: Provider, folder: Path | None
) -> str:
    """Write what shows a broken claim A, and say where; or how to have it written."""
    if folder is None:
        return "with --report, models that show it are written, to be reported as a defect"
    found = reproduce(original, failed.rewritten, failed.claim, provider)
    if found is None:
        return "no part of the models shows it; report it as a defect, with the model"
    write_reproducer(found, folder)
    return f"report it as a defect, with {folder}"


def validate(  # noqa: PLR0913 (the command's options)
    original: Source,
    rewritten: Source,
    *,
    inputs: str | Path | None = None,
    seeds: int = 10,
    seed: int = 0,
    tolerance: Tolerance | None = None,
    budget: float | None = None,
    metric: str | None = None,
    provider: ProviderChoice = "auto",
    reproducer: Path | None = None,
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
        metric: what claim B measures, as in ``Options``: a budget means nothing without it.
        provider: where to run.
        reproducer: folder to write, where claim A fails: the smallest parts of both models that show it, and inputs.
            Where it holds, the bounds of the rewritten sites are worked out.

    Raises:
        InputError: a model or the inputs cannot be used, or are not versions of one model.
        OutputError: ``reproducer`` cannot be written.
        ProviderError: the asked provider cannot run here.
    """
    if budget is not None and not budget >= 0:
        raise OptionError(f"budget {budget} is negative; give 0 for exact, or a small number")
    if metric is not None and inputs is None:
        raise OptionError("a metric needs data: give --inputs with all that it reads")
    before, after = load_model(original), load_model(rewritten)
    samples = None if inputs is None else load_inputs(Path(inputs), graph_inputs(before.proto))
    with blaming(before, after):
        where = resolve_provider(provider)
        validation = validate_models(
            before,
            after,
            inputs=_measured_by(metric, Inputs(samples, seeds=seeds, seed=seed)),
            provider=where,
            budget=budget,
            tolerance=tolerance,
        )
        claim = validation.structural
        if reproducer is None or claim is None:
            return validation
        if claim:
            bounds = second_opinion(before, after, where)
            return dataclasses.replace(validation, bounds=bounds)
        found = reproduce(before, after, claim, where)
    if found is None:
        return validation
    write_reproducer(found, reproducer)
    return dataclasses.replace(validation, reproducer=reproducer)


def bench(  # noqa: PLR0913 (the command's options)
    original: Source,
    rewritten: Source,
    *,
    inputs: str | Path | None = None,
    batch: tuple[int, ...] = (1, 16, 256),
    axes: tuple[tuple[str, int], ...] = (),
    seed: int = 0,
    provider: ProviderChoice = "auto",
) -> Timing:
    """Time two models side by side: interleaved runs in one process, medians.

    Args:
        original: the model before the rewrite, or its path.
        rewritten: the other one, or its path.
        inputs: real inputs; random ones otherwise.
        batch: batch sizes.
        axes: sizes of other dynamic axes, as (name, size).
        seed: of the random inputs.
        provider: where to run.

    Raises:
        InputError: a model or the inputs cannot be used.
        ProviderError: the asked provider cannot run here.
    """
    before, after = load_model(original), load_model(rewritten)
    samples = None if inputs is None else load_inputs(Path(inputs), graph_inputs(before.proto))
    options = Options(batch=batch, axes=axes, seed=seed)
    with blaming(before, after):
        return time_models(
            before, after, Inputs(samples, seed=seed), resolve_provider(provider), options
        )


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


def _inputs(model: Model, options: Options) -> Inputs:
    samples = None
    if options.calibration is not None:
        samples = load_inputs(options.calibration, graph_inputs(model.proto))
    inputs = Inputs(
        samples, seeds=options.seeds, seed=options.seed, budgets=dict(options.output_budgets)
    )
    return _measured_by(options.metric, inputs)


def _measured_by(metric: str | None, inputs: Inputs) -> Inputs:
    if metric == TOP1:
        return dataclasses.replace(inputs, agreement=True)
    return inputs if metric is None else dataclasses.replace(inputs, metric=load_metric(metric))


def _autotune(tried: Attempt, inputs: Inputs, provider: Provider, options: Options) -> Attempt:
    """The fastest way to write every region, as measured, or as predicted where that one would be outside the budget.

    Smaller blocks hold fewer of the unsupported entries, so that the fastest plan may remove more.
    """
    logger.info("timing the candidates of %d regions", len(tried.plans))
    rng = np.random.default_rng(options.seed)
    regions = RegionBench(tried.study, options.batch, provider, rng)
    tuned = autotuned(tried, regions, cost_model(provider, options.batch), options.emit)
    if tuned.is_exact or measure_annealed(tuned, inputs, provider, options):
        return tuned
    logger.info("the fastest plans would be outside the budget; the predicted ones stand")
    return tried


def _unchanged(
    tried: Attempt,
    output: Path | None,
    options: Options,
    measured: Measured,
    refusal: str | None,
) -> Rewrite:
    """Keep the original, byte for byte."""
    model = tried.study.source
    if output is not None and model.path is not None:
        copy_model(model, output)
    elif output is not None:
        save_model(model.proto, output, data_from=model)
    report = report_on(tried, options, measured, refusal=refusal)
    return Rewrite(model.proto, model.proto, report)
