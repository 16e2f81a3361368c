"""What proposals of one kind come to on test samples, level by level, whatever the budget.

    python -m tools.proposal_curve MODEL.onnx CALIBRATION.npz TEST.npz --kind inputs --metric MODULE:FUNCTION

Every few levels of each family are refitted (``--compensation mean`` is quick: biases alone), to the given samples
without made-up neighbours, and scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from onnx_decompose.analysis.refit import Compensation
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.search import GENERATORS
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.metrics import load_metric
from tools.group_curve import scores

if TYPE_CHECKING:
    from onnx_decompose.calibrated.proposals import Proposal


def _left(context: CalibrationContext, proposal: Proposal) -> float:
    """Share of the refittable sites' entries that stay: different ones, where rows are equal."""
    left = whole = 0
    for site in context.sites:
        whole += site.size
        kept = site.size
        if site.name in proposal.pools:
            kept = proposal.pools[site.name].rows * site.shape[1]
        elif site.name in proposal.masks:
            kept = int(proposal.masks[site.name].sum())
        left += kept
    return left / whole


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--kind", choices=tuple(GENERATORS), required=True)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--every", type=int, default=4, help="of the levels of each family")
    parser.add_argument("--compensation", choices=get_args(Compensation), default="ridge")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, metric = load_model(options.model), load_metric(options.metric)
    specs = graph_inputs(model.proto)
    parts = split_samples(load_inputs(options.calibration, specs), options.seed)
    test = load_inputs(options.test, specs)
    context = CalibrationContext(
        study_model(model),
        parts,
        Provider.CPU,
        options.seed,
        options.compensation,
        neighbours=False,
        metric=metric,
    )
    before = scores(model, test, metric)
    print(f"| proposal | weights left | {' | '.join(name or 'metric' for name in before)} |")
    print("|---|---|" + "---|" * len(before))
    print(f"| none | 100.0% | {' | '.join(f'{value:.4f}' for value in before.values())} |")
    for family in GENERATORS[options.kind](context):
        for proposal in list(family)[:: -options.every]:
            after = annealed_by(context.study, refitted(context, proposal))
            found = scores(after, test, metric).values()
            told = " | ".join(f"{value:.4f}" for value in found)
            print(f"| {proposal.name} | {_left(context, proposal):.1%} | {told} |", flush=True)


if __name__ == "__main__":
    _main()
