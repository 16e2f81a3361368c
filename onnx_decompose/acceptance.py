"""What a rewritten model goes through before it is accepted: both claims, and the clock against the original."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.decomposition.decompose import Attempt, rewritten_model
from onnx_decompose.decomposition.joining import join_siblings
from onnx_decompose.errors import AnnealingError, StructuralError
from onnx_decompose.model.metadata import write_decomposition
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.reporting.summarize import Measured
from onnx_decompose.runtime.cases import is_large, open_model, working_size
from onnx_decompose.runtime.feeds import (
    batch_dims,
    check_axes,
    dim_symbols,
    index_limits,
    other_dims,
    resized,
)
from onnx_decompose.timing.bench import Timing, bench_models, slowdown, timing_feeds
from onnx_decompose.timing.cost_cache import cost_model
from onnx_decompose.timing.no_harm import (
    MOST_TRIES,
    region_timings,
    short_settings,
    without_harmful,
    without_recurrent,
)
from onnx_decompose.timing.region_bench import RegionBench
from onnx_decompose.verification.verify import (
    AnnealingClaim,
    StructuralClaim,
    measure_annealing,
    structural_claim,
)
from onnx_decompose.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.model.staging import Stage
    from onnx_decompose.options import Options
    from onnx_decompose.passes.join_siblings import Joined
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.verify import Inputs

logger = logging.getLogger(__name__)

_OTHER = 64
"""Size of dynamic axes but the batch, where nothing says another."""

__all__ = ["Made", "NotEquivalentError", "make", "time_models"]


class NotEquivalentError(StructuralError):
    """Claim A failed; with what shows where.

    Attributes:
        rewritten: the model that was not accepted.
        claim: how it failed.
    """

    def __init__(self, message: str, rewritten: Model, claim: StructuralClaim) -> None:
        super().__init__(message)
        self.rewritten = rewritten
        self.claim = claim


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A rewritten model with its claims and times.

    Attributes:
        tried: the attempt that it carries out.
        model: the rewritten model, with its decomposition in it.
        structural: claim A.
        annealing: claim B.
        timing: against the original.
        joined: products of one value that became one.
    """

    tried: Attempt
    model: Model
    structural: StructuralClaim
    annealing: AnnealingClaim
    timing: Timing
    joined: tuple[Joined, ...] = ()

    @property
    def measured(self) -> Measured:
        """The figures, for the report."""
        return Measured(self.structural, self.annealing, self.timing, self.joined)


def make(
    tried: Attempt, inputs: Inputs, provider: Provider, options: Options, stage: Stage
) -> tuple[Made, str | None]:
    """The rewritten model, proved and timed; where it is slower, one that leaves dense what does not pay.

    Args:
        tried: what to carry out.
        inputs: what to measure on.
        provider: where to run.
        options: budget, batch sizes, seed.
        stage: where the model lies meanwhile.

    Returns:
        The model, and None; or the last one tried, and what is against it.

    Raises:
        ClaimError: a claim does not hold.
    """
    cost = cost_model(provider, options.batch) if options.emit == "auto" else None
    made = _proved(tried, inputs, provider, options, stage, cost)
    harm = None if options.force else slowdown(made.timing)
    if harm is not None and made.joined:
        logger.info("the model is %s: making it without joined products", harm)
        made = _proved(tried, inputs, provider, options, stage)
        harm = slowdown(made.timing)
    if harm is None:
        return made, None
    return _without_harm(made, harm, inputs, provider, options, stage)


def time_models(
    original: Model, rewritten: Model, inputs: Inputs, provider: Provider, options: Options
) -> Timing:
    """Both models side by side, at every asked batch size."""
    logger.info("timing the rewritten model against the original")
    rng = np.random.default_rng(options.seed)
    large = is_large(original)
    reference = open_model(original, provider, fast=True, large=large)
    specs = graph_inputs(original.proto)
    feeds = timing_feeds(
        specs,
        options.batch,
        rng=rng,
        other=_OTHER if inputs.samples else working_size(original.proto, reference, rng),
        limits=index_limits(original.proto),
        samples=inputs.samples,
    )
    axes = dict(options.axes)
    check_axes(specs, axes)
    feeds = {size: resized(specs, one, axes) for size, one in feeds.items()}
    timing = bench_models(
        reference,
        open_model(rewritten, provider, fast=True, large=large),
        feeds_by_batch=feeds,
        provider=provider,
        rng=rng,
    )
    timed = other_dims(specs, next(iter(feeds.values())))
    return dataclasses.replace(timing, mapped=large, axes=timed)


def _proved(
    tried: Attempt,
    inputs: Inputs,
    provider: Provider,
    options: Options,
    stage: Stage,
    cost: CostModel | None = None,
) -> Made:
    """The rewritten model, proved and timed; with products of one value joined where ``cost`` says that it pays."""
    original = tried.study.source
    logger.info(
        "writing %d regions as branches, %d recurrent operators as smaller ones",
        len(tried.rewrites),
        len(tried.recurrent.rewrites),
    )
    rewritten, joined = _rewrite(tried, options, cost, _timed_sizes(original, inputs, options))
    model = stage.put(rewritten, original)
    stage.freed()
    structural = _prove(original, model, inputs, provider)
    stage.freed()
    annealing = _measure(original, model, inputs, provider, options)
    stage.freed()
    timing = time_models(original, model, inputs, provider, options)
    return Made(tried, model, structural, annealing, timing, joined)


def _without_harm(
    made: Made,
    harm: str,
    inputs: Inputs,
    provider: Provider,
    options: Options,
    stage: Stage,
) -> tuple[Made, str | None]:
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
            made = _proved(smaller, inputs, provider, options, stage)
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


def _timed_sizes(original: Model, inputs: Inputs, options: Options) -> dict[str, int]:
    """About what :func:`time_models` gives the dynamic axes but the batch, by symbol, before any model is opened."""
    specs = graph_inputs(original.proto)
    batch = batch_dims(specs)
    sizes = {symbol: _OTHER for symbol in dim_symbols(specs) if symbol not in batch}
    if inputs.samples is not None:
        sizes |= other_dims(specs, next(inputs.samples.batches(1))[0])
    return sizes | dict(options.axes)


def _rewrite(
    tried: Attempt, options: Options, cost: CostModel | None, sizes: Mapping[str, int]
) -> tuple[Model, tuple[Joined, ...]]:
    rewritten, decomposition = rewritten_model(tried, options.budget)
    joined: tuple[Joined, ...] = ()
    if cost is not None:
        rewritten, decomposition, joined = join_siblings(
            rewritten, decomposition, tried.study, cost, sizes
        )
    decomposition = dataclasses.replace(decomposition, budgets=dict(options.output_budgets))
    write_decomposition(rewritten.proto, decomposition, VERSION)
    return rewritten, joined


def _prove(
    original: Model, rewritten: Model, inputs: Inputs, provider: Provider
) -> StructuralClaim:
    """Claim A: on the weights first, then on outputs."""
    logger.info("checking claim A: rewritten against annealed")
    claim = structural_claim(original, rewritten, inputs=inputs, provider=provider)
    if not claim:
        reason = f"{original.label}: claim A does not hold: {claim.reason}; nothing was written"
        raise NotEquivalentError(reason, rewritten, claim)
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
