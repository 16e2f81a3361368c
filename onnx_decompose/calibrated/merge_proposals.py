"""Proposals from outputs that data hardly tells apart: one column for a group of them, a constant for each.

Sites with many outputs, such as a language model's vocabulary or a classifier's labels; hidden units are for
``removal_proposals``. How far each goes is set by one
level for all of them: the share of the outputs' spread that merging may lose, as the covariance predicts it.

Where outputs are the model's own, they may be the scores of a softmax. To second order the divergence of two softmaxes
is half the variance of the difference of their scores, each output with its probability as its weight, so that outputs
that are hardly ever probable may differ more. A family of proposals of its own takes them for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.special

from onnx_decompose.analysis.merging import Merging, coordinates, merge_levels
from onnx_decompose.analysis.refit import Groups
from onnx_decompose.calibrated.refitting import Proposal
from onnx_decompose.calibrated.removal_proposals import hidden_axes
from onnx_decompose.calibrated.site_statistics import observe
from onnx_decompose.graph.biases import find_biases

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.refitting import CalibrationContext
    from onnx_decompose.graph.sites import Site

    FloatArray = NDArray[np.float64]

__all__ = ["merged_outputs", "softmax_usage"]

_FEWEST_OUTPUTS = 256
"""Of fewer, repeating columns costs more than is saved."""
_LEAST_USE = 0.03
"""Of an even share of the probability: what data that is not there may still show."""
_ROWS_AT_A_TIME = 256


def merged_outputs(context: CalibrationContext) -> Iterator[Proposal]:
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
        if site.shape[1] >= max(_FEWEST_OUTPUTS, site.shape[0] + 1) and site.name not in hidden
    ]
    yield from _family(context, sites, {}, "merge")
    scores = [site for site in sites if _is_output(context, site)]
    usage = {site.name: softmax_usage(context, site) for site in scores}
    yield from _family(context, scores, usage, "merge by use")


def softmax_usage(context: CalibrationContext, site: Site) -> FloatArray:
    """(N,) mean probability of each output of ``site`` on the part to fit on, were they the scores of a softmax."""
    study = context.study
    weight = study.weight(site).astype(np.float32)
    bias = find_biases(study.model.proto.graph, [site], study.constants)[site.name]
    constant = bias.stored(0.0, weight.dtype)
    total, rows = np.zeros(site.shape[1]), 0
    for found in observe(study.source, [site.input], context.parts.fit, context.provider):
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


def _family(
    context: CalibrationContext,
    sites: Sequence[Site],
    usage: Mapping[str, FloatArray],
    family: str,
) -> Iterator[Proposal]:
    weights = {name: used + _LEAST_USE * used.sum() / used.size for name, used in usage.items()}
    paths = {site.name: tuple(_levels(context, site, weights.get(site.name))) for site in sites}
    shapes = {site.name: site.shape for site in sites}
    seen: set[tuple[tuple[str, int], ...]] = set()
    for level in sorted({level for path in paths.values() for level, _ in path}):
        merged = {
            name: max(
                (found for found in path if found[0] <= level), key=lambda found: found[0]
            )[1]
            for name, path in paths.items()
            if path[0][0] <= level
        }
        key = tuple((name, merging.groups) for name, merging in merged.items())
        if key in seen:
            continue
        seen.add(key)
        told = "+".join(str(merging.groups) for merging in merged.values())
        yield Proposal(
            f"{family}({told} different outputs)",
            {name: np.broadcast_to(np.True_, shapes[name]) for name in merged},
            equal={
                name: Groups(merging.labels, weights.get(name))
                for name, merging in merged.items()
            },
            family=family,
        )


def _levels(
    context: CalibrationContext, site: Site, weights: FloatArray | None
) -> Iterator[tuple[float, Merging]]:
    """Mergings of the outputs, and the share of their (weighted) spread that each is predicted to lose."""
    weight, moments = context.study.weight(site), context.fit[site.input]
    second = moments.xx
    if context.compensation == "none":  # what differs in the mean is lost as well
        second = second + np.outer(moments.mean_x, moments.mean_x)
    points = coordinates(weight, second)
    powers = np.einsum("ij,ij->i", points, points, dtype=np.float64)
    total = float(powers.sum() if weights is None else powers @ weights)
    for merging in merge_levels(points, context.rng, weights):
        yield float(np.sqrt(merging.cost / total)) if total > 0 else 0.0, merging
