"""From an attempt to the report's figures."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.control import p_structure
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.analysis.recurrence import unit_edges
from onnx_decompose.analysis.structure import (
    Edge,
    bipartite_components,
    condense,
    state_components,
)
from onnx_decompose.decomposition.decompose import Attempt, attempt
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.reporting.report import (
    Alternative,
    RefusedNode,
    Report,
    SiteReport,
    Summary,
)
from onnx_decompose.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.graph.recurrent import RecurrentSite, RecurrentWeight
    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.options import Options
    from onnx_decompose.passes.join_siblings import Joined
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.plan_recurrent import RecurrentPlan
    from onnx_decompose.timing.bench import Timing
    from onnx_decompose.verification.verify import AnnealingClaim, StructuralClaim

__all__ = ["Measured", "alternatives", "reason_of", "report_on", "summary_of"]

_ALTERNATIVE_NULLS = ("zero", "recorded", "torch", "empirical")
_ALTERNATIVE_CRITERIA = ("fdr", "fwer", "ksigma", "group", "shared")
_SHUFFLED_ENTRIES = 100_000_000
"""Entries that a permutation control may place: a few seconds per site at most."""

_FEWEST_DRAWS = 19
"""Under this many permutations no p-value of 0.05 can come out."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What was measured on a rewritten model; None where it did not come to that."""

    structural: StructuralClaim | None = None
    annealing: AnnealingClaim | None = None
    timing: Timing | None = None
    joined: tuple[Joined, ...] = ()


def report_on(
    tried: Attempt,
    options: Options,
    measured: Measured,
    *,
    others: tuple[Alternative, ...] = (),
    refusal: str | None = None,
) -> Report:
    """The report on an attempt.

    Args:
        tried: the attempt.
        options: what was asked for.
        measured: claims and times, as far as they were measured.
        others: what other nulls and criteria would give.
        refusal: why the attempt was not carried out after all; every site stays dense then.
    """
    sites = (
        *(
            _site_report(tried, region, plan, position, refusal, options.seed)
            for region, plan in tried.plans
            for position in range(len(region.sites))
        ),
        *(
            _recurrent_report(tried, site, plan, weight, refusal, options.seed)
            for site, plan in tried.recurrent.plans
            for weight in site.all_weights
        ),
    )
    order = {weight.name: number for number, weight in enumerate(tried.study.weights)}
    sites = tuple(sorted(sites, key=lambda site: order[site.name]))
    return Report(
        version=VERSION,
        model=tried.study.source.label,
        null=options.null,
        criterion=tried.criterion.name,
        summary=summary_of(tried, sites, refusal),
        sites=sites,
        refused=tuple(RefusedNode(r.node, r.op_type, r.reason) for r in tried.study.refused),
        alternatives=others,
        structural=measured.structural,
        annealing=measured.annealing,
        timing=measured.timing,
        joined=measured.joined,
    )


def summary_of(
    tried: Attempt, sites: tuple[SiteReport, ...], refusal: str | None = None
) -> Summary:
    """The whole model in a few numbers."""
    before = sum(site.weights for site in sites)
    after = sum(site.weights_after for site in sites)
    return Summary(
        sites=len(sites),
        rewritten=sum(site.decision != "dense" for site in sites),
        substructures=0 if refusal else tried.substructures,
        weights_before=before,
        weights_after=after,
        flops_before=2 * before,
        flops_after=2 * after,
        decomposable=tried.takes_apart and not refusal,
        reason=refusal or reason_of(tried),
    )


def alternatives(
    study: Study, options: Options, cost: CostModel, asked: Attempt
) -> Iterator[Alternative]:
    """What other nulls would give at the same criterion, and other criteria with the same null.

    Predicted from the weights, nothing is run. Left out is what can only give the same as ``zero``.
    """
    if not study.weights:
        return
    for null in _ALTERNATIVE_NULLS:
        if null == options.null:
            continue
        evidence = gather_all(study, options, null)
        if null != "zero" and _only_zeros(evidence):
            continue
        yield _alternative(study, options, cost, evidence, null, options.criterion)
    for criterion in _ALTERNATIVE_CRITERIA:
        told = criterion == options.criterion.partition(":")[0]
        # Lines are compared with each other, not with a null.
        if not told and (criterion == "shared" or not _only_zeros(asked.evidence)):
            yield _alternative(study, options, cost, asked.evidence, options.null, criterion)


def _only_zeros(evidence: Mapping[str, Evidence]) -> bool:
    return all(one.source == "zero" for one in evidence.values())


def _alternative(
    study: Study,
    options: Options,
    cost: CostModel,
    evidence: Mapping[str, Evidence],
    null: str,
    criterion: str,
) -> Alternative:
    rule = make_criterion(criterion, options.alpha)
    rng = np.random.default_rng(options.seed)
    tried = attempt(study, evidence, rule, cost=cost, emit=options.emit, rng=rng)
    entries = sum(site.size for site in study.weights)
    supported = sum(np.count_nonzero(one.mask) for one in tried.selections.values())
    return Alternative(
        null=null,
        criterion=rule.name,
        density=supported / entries,
        substructures=tried.substructures,
        flops_after=2 * tried.weights_after,
    )


def _site_report(
    tried: Attempt,
    region: Region,
    plan: RegionPlan,
    position: int,
    refusal: str | None,
    seed: int,
) -> SiteReport:
    site: Site = region.sites[position]
    selection = tried.selections[site.name]
    mask = selection.mask  # unpacked anew at every reading
    edges = site.edges(mask)
    alone = bipartite_components(edges)
    square = condense(edges) if len(set(site.units)) == 1 else None
    source, target = region.axis_of[site.input], region.axis_of[site.output]
    report = SiteReport(
        name=site.name,
        op_type=site.op_type,
        shape=site.units,
        kernel=site.kernel,
        region=region.name,
        null=_null_of(tried.evidence[site.name]),
        pi0=selection.pi0,
        pi0_interval=selection.pi0_interval,
        density=float(mask.mean()),
        components=alone.count,
        isolated=alone.isolated,
        sccs=None if square is None else square.sccs,
        layers=None if square is None else square.layers,
        decision=plan.decision,
        reason=plan.reason + (f" ({selection.note})" if selection.note else ""),
        blocks=plan.blocks(source, target),
        p_structure=_p_structure(edges, np.random.default_rng(seed)),
    )
    return _unless(refusal, report)


def _recurrent_report(
    tried: Attempt,
    site: RecurrentSite,
    plan: RecurrentPlan,
    weight: RecurrentWeight,
    refusal: str | None,
    seed: int,
) -> SiteReport:
    """W or R of one direction; its edges are those between units, over all gates."""
    selection = tried.selections[weight.name]
    mask = selection.mask
    edges = unit_edges(mask, weight.gates)
    is_state = weight.operand == "R"
    alone = (
        state_components([weight.hidden], [Edge(0, 0, edges)])
        if is_state
        else bipartite_components(edges)
    )
    square = condense(edges) if is_state else None
    return _unless(
        refusal,
        SiteReport(
            name=weight.name,
            op_type=site.cell,
            shape=weight.shape,
            region=site.name,
            null=_null_of(tried.evidence[weight.name]),
            pi0=selection.pi0,
            pi0_interval=selection.pi0_interval,
            density=float(mask.mean()),
            components=alone.count,
            isolated=alone.isolated,
            sccs=None if square is None else square.sccs,
            layers=None if square is None else square.layers,
            decision=plan.decision,
            reason=plan.reason + (f" ({selection.note})" if selection.note else ""),
            blocks=plan.blocks(weight.direction, weight.operand, weight.gates),
            p_structure=_p_structure(
                edges, np.random.default_rng(seed), _sccs if is_state else _pieces
            ),
        ),
    )


def _unless(refusal: str | None, report: SiteReport) -> SiteReport:
    """The report on a site that stays dense after all where there is a refusal."""
    if refusal is None or report.decision == "dense":
        return report
    return dataclasses.replace(
        report, decision="dense", blocks=(), reason=f"{report.reason}; {refusal}"
    )


def _null_of(evidence: Evidence) -> str:
    if evidence.source == "zero":
        return evidence.null.name
    return f"{evidence.source} {evidence.null.name}"


def _p_structure(
    mask: NDArray[np.bool_],
    rng: np.random.Generator,
    statistic: Callable[[NDArray[np.bool_]], float] | None = None,
) -> float | None:
    """How often the same number of entries, placed at random, falls into as many pieces; None for a huge mask."""
    draws = min(199, _SHUFFLED_ENTRIES // mask.size)
    if draws < _FEWEST_DRAWS:
        return None
    return p_structure(mask, statistic or _pieces, rng=rng, most_draws=draws).pvalue


def _sccs(mask: NDArray[np.bool_]) -> float:
    return float(condense(mask).sccs)


def _pieces(mask: NDArray[np.bool_]) -> float:
    found = bipartite_components(mask)
    return float(found.count + found.isolated)


def reason_of(tried: Attempt) -> str:
    """One sentence on the whole model."""
    if not tried.study.weights:
        return "the model has no MatMul, Gemm or Conv with a constant weight, and no such recurrent operator"
    if tried.takes_apart:
        return (
            f"{_count(tried.substructures, 'substructure')} in {' and '.join(_places(tried))}"
        )
    sizes = [
        *((sum(region.axis_sizes), region.name, plan.reason) for region, plan in tried.plans),
        *((site.hidden, site.name, plan.reason) for site, plan in tried.recurrent.plans),
    ]
    _, name, reason = max(sizes, key=operator.itemgetter(0))
    return f"no region can be taken apart; the largest ({name}): {reason}"


def _places(tried: Attempt) -> Iterator[str]:
    if tried.rewrites:
        branches = sum(len(plan.branches) for _, plan in tried.rewrites)
        yield (
            f"{_count(len(tried.rewrites), 'region')}, run as {_count(branches, 'branch', 'branches')}"
        )
    if recurrent := tried.recurrent.rewrites:
        cells = sum(len(one.cells) for _, plan in recurrent for one in plan.directions)
        yield f"{_count(len(recurrent), 'recurrent operator')}, run as {cells} smaller ones"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
