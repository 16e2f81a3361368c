"""Calibrated annealing: what data supports, and what is left of a weight refitted to what the original made of it.

The user's samples are split once, by the seed, into three parts that never trade places:

    fit      moments of what every site reads: support, and the refit itself
    choose   the strength of the refit, and which proposal is inside the budget
    judge    claim B

A *proposal* is a set of masks with a name: which entries of which sites may stay. Generators make proposals, by any
evidence; here each becomes an annealed dense model. The refit goes through the model from the front
(as in optimal brain surgery, layer by layer): what a site reads is taken from the model as annealed so far, what it
should make from the original.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.refit import (
    Compensation,
    Observed,
    degrees_of_freedom,
    refit_weight,
)
from onnx_decompose.biases import find_biases
from onnx_decompose.closing import restore
from onnx_decompose.errors import DataError
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.refits import Refit
from onnx_decompose.shapes import opset_of
from onnx_decompose.site_statistics import input_moments, joint_moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments
    from onnx_decompose.model_io import Model
    from onnx_decompose.samples import Samples
    from onnx_decompose.sessions import Provider
    from onnx_decompose.sites import Site
    from onnx_decompose.study import Study

    Masks = Mapping[str, NDArray[np.bool_]]

logger = logging.getLogger(__name__)

__all__ = [
    "CalibrationContext",
    "Generator",
    "Parts",
    "Proposal",
    "annealed_by",
    "refitted",
    "split_samples",
]

FIT, CHOOSE = 0.6, 0.2
"""Shares of the samples; the rest is for claim B."""

_SURE = 1e-3
"""Ridge that tells the directions that vary from those that hardly do."""

_ROWS_PER_DIRECTION = 2.0
_FEWEST_ROWS = 32
_ADD_BROADCASTS_FROM = 7


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The three parts of the user's samples."""

    fit: Samples
    choose: Samples
    judge: Samples


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Which entries may stay.

    Attributes:
        name: for the report, such as ``support(4 components)``.
        masks: by site name, (K, N) bool; sites that are not named stay as they are.
        starts: entries to begin with in the place of the original's, (K, N) by site name.
        family: proposals of one family are nested, or nearly so: a faster one is a less exact one.
    """

    name: str
    masks: Masks
    starts: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    family: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationContext:
    """What generators may look at.

    Attributes:
        study: the model.
        parts: the samples.
        provider: where models run.
        seed: of everything random.
        compensation: what makes up for what goes.
        sequential: whether the refit of a site sees what was annealed before it.
    """

    study: Study
    parts: Parts
    provider: Provider
    seed: int = 0
    compensation: Compensation = "ridge"
    sequential: bool = True

    @property
    def rng(self) -> np.random.Generator:
        """A fresh source of randomness, the same every time."""
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose weight and bias can be refitted: products whose rows can be seen from the main graph."""
        study = self.study
        graph = study.source.proto.graph
        seen = {value.name for value in graph.input}
        seen.update(name for node in graph.node for name in node.output)
        places = find_biases(study.model.proto.graph, study.sites, study.constants)
        broadcasts = opset_of(study.model.proto) >= _ADD_BROADCASTS_FROM
        return tuple(
            site
            for site in study.sites
            if not site.kernel  # the moments are of rows
            and {site.input, site.output} <= seen
            and site.quantized is None  # a refit is a float
            and (broadcasts or places[site.name].inside or places[site.name].nodes)
        )

    @functools.cached_property
    def fit(self) -> Mapping[str, Moments]:
        """Moments of what the original's sites read, by value, on the part to fit on."""
        return self._moments(self.parts.fit)

    @functools.cached_property
    def choose(self) -> Mapping[str, Moments]:
        """The same on the part to choose on."""
        return self._moments(self.parts.choose)

    def _moments(self, samples: Samples) -> Mapping[str, Moments]:
        values = list(dict.fromkeys(site.input for site in self.sites))
        return input_moments(self.study.source, values, samples, self.provider)

    def power(self, site: Site, moments: Mapping[str, Moments]) -> NDArray[np.float64]:
        """(N,) variance of what the original's site makes."""
        weight = self.study.weight(site).astype(np.float64)
        covariance = moments[site.input].xx
        power: NDArray[np.float64] = ((covariance @ weight) * weight).sum(axis=0)
        return np.maximum(power, 0.0)

    def too_few(self) -> str | None:
        """Why there are too few samples to refit on, with the number that would do; None if there are enough.

        Twice as many rows as there are directions in which the model's inputs vary: of fewer, a covariance shows some
        as constant that are not. How many more the refit can use, the part to choose on tells.
        """
        entries = {value.name for value in self.study.source.proto.graph.input}
        worst = 0
        for name, moments in self.fit.items():
            seen = wanted = 0.0
            if name in entries:  # what is computed from them varies no more than they do
                seen = degrees_of_freedom(moments.xx, _SURE)
                wanted = float(np.count_nonzero(moments.spread > 0))
            if moments.count < max(_FEWEST_ROWS, _ROWS_PER_DIRECTION * seen):
                rows = max(_FEWEST_ROWS, _ROWS_PER_DIRECTION * wanted)
                worst = max(worst, math.ceil(rows * self.parts.fit.count / moments.count / FIT))
        if not worst:
            return None
        total = sum(
            part.count for part in (self.parts.fit, self.parts.choose, self.parts.judge)
        )
        return f"calibrated annealing needs {worst} samples, and there are {total}"


Generator = Callable[[CalibrationContext], Iterator[Proposal]]
"""Makes proposals from what the context holds, in any order."""


def split_samples(samples: Samples, seed: int) -> Parts:
    """The three parts.

    Raises:
        DataError: there are not three samples.
    """
    if samples.count < 3:
        raise DataError(
            f"{samples.source}: holds {samples.count} samples; at least 3 are needed to fit, choose and judge"
        )
    rng = np.random.default_rng(seed)
    fit, rest = samples.split(rng, FIT)
    choose, judge = rest.split(rng, CHOOSE / (1 - FIT))
    return Parts(fit, choose, judge)


def refitted(context: CalibrationContext, proposal: Proposal) -> dict[str, Refit]:
    """New weights and biases of the sites that ``proposal`` names, from the front of the model to its end."""
    study = context.study
    sites = [site for site in context.sites if site.name in proposal.masks]
    stages: dict[str, list[Site]] = {}
    for site in sites:
        stages.setdefault(site.input, []).append(site)
    refits: dict[str, Refit] = {}
    for value, stage in stages.items():
        fit, choose = _moments_of(context, value, refits)
        for site in stage:
            weight = study.weight(site)
            found = refit_weight(
                weight,
                proposal.starts.get(site.name, weight),
                proposal.masks[site.name],
                Observed(fit, choose, context.power(site, context.choose)),
                context.compensation,
            )
            logger.debug(
                "%s: %s: left %.2g of the product's spread, ridges %s",
                proposal.name,
                site.name,
                found.relative_error,
                sorted(set(found.ridges)),
            )
            refits[site.name] = Refit(found.weight.astype(weight.dtype), found.added)
    return refits


def annealed_by(study: Study, refits: Mapping[str, Refit]) -> Model:
    """The original graph with refitted weights and biases in it."""
    sites = [site for site in study.sites if site.name in refits]
    places = find_biases(study.model.proto.graph, sites, study.constants)
    weights = {site: refits[site.name].weight for site in sites}
    biases = {
        site: places[site.name].stored(refits[site.name].added, study.weight(site).dtype)
        for site in sites
    }
    return restore(study.flat, ReplaceWeights(weights, biases)(study.model).model)


def _moments_of(
    context: CalibrationContext, value: str, refits: Mapping[str, Refit]
) -> tuple[Moments, Moments]:
    """Moments of ``value`` in the model annealed so far with the same value of the original."""
    if not refits or not context.sequential:
        return context.fit[value], context.choose[value]
    current = annealed_by(context.study, refits)
    original = context.study.source
    fit, choose = (
        joint_moments(current, original, [value], samples, context.provider)[value]
        for samples in (context.parts.fit, context.parts.choose)
    )
    return fit, choose
