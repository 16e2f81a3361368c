"""Proposals from outputs that data hardly tells apart: one column for a group of them, a constant for each.

Sites with many outputs, such as a language model's vocabulary or a classifier's labels; hidden units are for
``removal_proposals``, and so are channels of convolutions. How far each goes is set by one
level for all of them: the share of the outputs' spread that merging may lose, as the covariance predicts it.

Where outputs are the model's own, they may be the scores of a softmax. To second order the divergence of two softmaxes
is half the variance of the difference of their scores, each output with its probability as its weight, so that outputs
that are hardly ever probable may differ more. A family of proposals of its own takes them for that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import scipy.special

from onnx_decompose.analysis.merging import (
    Merging,
    coordinates,
    group_counts,
    merge_levels,
)
from onnx_decompose.analysis.refit import Groups
from onnx_decompose.calibrated.families import Family
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.removal_proposals import hidden_axes
from onnx_decompose.graph.biases import find_biases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.sites import Site

    FloatArray = NDArray[np.float64]

__all__ = ["merged_outputs", "softmax_usage"]

_FEWEST_OUTPUTS = 256
"""Of fewer, repeating columns costs more than is saved."""
_LEAST_USE = 0.03
"""Of an even share of the probability: what data that is not there may still show."""
_ROWS_AT_A_TIME = 256


def merged_outputs(context: CalibrationContext) -> Iterator[Family]:
    """One proposal per level at which some site has fewer different columns."""
    hidden = {
        site.name
        for region in context.study.regions
        for axis in hidden_axes(context, region)
        for site in axis.makers
    }
    sites = [
        site
        for site in context.sites
        if site.shape[1] >= max(_FEWEST_OUTPUTS, site.shape[0] + 1)
        and site.name not in hidden
        # Equal columns of integers and equal channels are not computed once.
        and site.quantized is None
        and not site.kernel
    ]
    scores = [site for site in sites if _is_output(context, site)]
    for name, merged, weigh in (("merge", sites, _alike), ("merge by use", scores, _by_use)):
        if merged:
            paths = functools.cache(functools.partial(_paths, context, merged, weigh))
            yield Family(
                name,
                sum(len(group_counts(site.shape[1])) for site in merged),
                functools.partial(_proposal, name, merged, paths),
                sum(
                    site.size - site.shape[0] * group_counts(site.shape[1])[-1]
                    for site in merged
                ),
            )


def softmax_usage(context: CalibrationContext, site: Site) -> FloatArray:
    """(N,) mean probability of each output of ``site`` on the part to fit on, were they the scores of a softmax."""
    study = context.study
    weight = study.weight(site).astype(np.float32)
    bias = find_biases(study.model.proto.graph, [site], study.constants)[site.name]
    constant = bias.stored(0.0)
    total, rows = np.zeros(site.shape[1]), 0
    for found in context.observe([site.input], context.parts.fit):
        values = found[site.input].reshape(-1, site.shape[0]).astype(np.float32)
        rows += values.shape[0]
        for start in range(0, values.shape[0], _ROWS_AT_A_TIME):
            scores = values[start : start + _ROWS_AT_A_TIME] @ weight + constant
            total += scipy.special.softmax(scores, axis=1).sum(axis=0, dtype=np.float64)
    return total / rows


def _is_output(context: CalibrationContext, site: Site) -> bool:
    """Whether the model gives what ``site`` makes, with its bias, as it is."""
    outputs = {value.name for value in context.study.source.proto.graph.output}
    graph = context.study.model.proto.graph
    bias = find_biases(graph, [site], context.study.constants)[site.name]
    made = {graph.node[node].output[0] for node in bias.nodes} | {site.output}
    return bool(made & outputs)


def _alike(context: CalibrationContext, site: Site) -> None:
    """All outputs count the same."""
    del context, site


def _by_use(context: CalibrationContext, site: Site) -> FloatArray:
    """(N,) how much each output counts: its probability, and a little more."""
    used = softmax_usage(context, site)
    weights: FloatArray = used + _LEAST_USE * used.sum() / used.size
    return weights


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Path:
    """The mergings of one site.

    Attributes:
        levels: from loose to strict, the share of the outputs' (weighted) spread that is lost, and the merging.
        weights: (N,) how much each output counts; all the same if None.
    """

    levels: tuple[tuple[float, Merging], ...]
    weights: FloatArray | None

    def within(self, level: float) -> Merging | None:
        """The merging that loses most, but no more than ``level``."""
        inside = [found for found in self.levels if found[0] <= level]
        return max(inside, key=lambda found: found[0])[1] if inside else None


def _paths(
    context: CalibrationContext,
    sites: Sequence[Site],
    weigh: Callable[[CalibrationContext, Site], FloatArray | None],
) -> dict[str, _Path]:
    paths = {}
    for site in sites:
        weights = weigh(context, site)
        paths[site.name] = _Path(tuple(_levels(context, site, weights)), weights)
    return paths


def _proposal(
    family: str, sites: Sequence[Site], paths: Callable[[], dict[str, _Path]], number: int
) -> Proposal | None:
    """One level for all sites."""
    found = paths()
    levels = sorted({level for path in found.values() for level, _ in path.levels})
    if number >= len(levels):
        return None
    merged = {
        site: merging
        for site in sites
        if (merging := found[site.name].within(levels[-1 - number])) is not None
    }
    told = "+".join(str(merging.groups) for merging in merged.values())
    return Proposal(
        f"{family}({told} different outputs)",
        {site.name: np.broadcast_to(np.True_, site.shape) for site in merged},
        equal={
            site.name: Groups(merging.labels, found[site.name].weights)
            for site, merging in merged.items()
        },
    )


def _levels(
    context: CalibrationContext, site: Site, weights: FloatArray | None
) -> Iterator[tuple[float, Merging]]:
    """Mergings of the outputs, and the share of their (weighted) spread that each is predicted to lose."""
    weight, moments = context.study.weight(site), context.read(site)
    second = moments.xx
    if context.compensation == "none":  # what differs in the mean is lost as well
        second = second + np.outer(moments.mean_x, moments.mean_x)
    points = coordinates(weight, second)
    powers = np.einsum("ij,ij->i", points, points, dtype=np.float64)
    total = float(powers.sum() if weights is None else powers @ weights)
    for merging in merge_levels(points, context.rng, weights):
        yield float(np.sqrt(merging.cost / total)) if total > 0 else 0.0, merging
