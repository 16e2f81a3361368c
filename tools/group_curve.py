"""What groups of inputs need of a network that they share, and what each of them scores when it has its own.

    python -m tools.group_curve MODEL.onnx CALIBRATION.npz TEST.npz --metric MODULE:FUNCTION

prints two tables: the directions of every stream that carry 99 and 99.9 % of what a group's readers see, and the
metric's values on the test samples, by how the units between inputs and outputs are given to groups: dealt out
(``support``), or in networks of their own (``networks``); with outputs where they vary, or where the metric looks.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.group_proposals import group_needs, group_networks
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.support_proposals import supported_groups
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.metrics import load_metric

if TYPE_CHECKING:
    from onnx_decompose.calibrated.proposals import Proposal
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.verification.metrics import Metric

SHARES = (0.01, 0.001)


def report_directions(context: CalibrationContext) -> None:
    """How many directions of each stream groups need."""
    told = (f"{1 - share:.1%} of the variance" for share in SHARES)
    print(f"| stream, units | {' | '.join(told)} |")
    print("|---|" + "---|" * len(SHARES))
    for stream, needs in group_needs(context):
        counts = [[need.within(share) for need in needs] for share in SHARES]
        sums = (f"{' + '.join(map(str, own))} = {sum(own)}" for own in counts)
        print(f"| {stream} | {' | '.join(sums)} |")


def report_scores(
    context: CalibrationContext, test: Samples, metric: Metric, every: int
) -> None:
    """The test scores of every few proposals of both kinds."""
    before = scores(context.study.source, test, metric)
    print(f"\n| units | outputs | weights left | {' | '.join(before)} |")
    print("|---|---|---|" + "---|" * len(before))
    print(_line("as it is", "", 1.0, before), flush=True)
    for outputs, asked, generator in (
        ("where they vary", None, supported_groups),
        ("where they vary", None, group_networks),
        ("where the metric looks", metric, supported_groups),
        ("where the metric looks", metric, group_networks),
    ):
        seen = dataclasses.replace(context, metric=asked)
        for family in generator(seen):
            proposals = [p for p in family if not p.keeps_nothing][::-every]
            for proposal in proposals:
                after = annealed_by(seen.study, refitted(seen, proposal))
                found = scores(after, test, metric)
                print(_line(proposal.name, outputs, _left(proposal), found), flush=True)


def _line(what: str, outputs: str, left: float, scores: dict[str, float]) -> str:
    values = " | ".join(f"{value:.3f}" for value in scores.values())
    return f"| {what} | {outputs} | {left:.1%} | {values} |"


def _left(proposal: Proposal) -> float:
    masks = proposal.masks.values()
    return sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)


def scores(model: Model, samples: Samples, metric: Metric) -> dict[str, float]:
    """The metric's values on all samples at once."""
    ((feeds, extras),) = samples.batches(samples.count)
    return metric.values({**feeds, **extras}, open_model(model, Provider.CPU).run(feeds))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--metric", required=True)
    parser.add_argument(
        "--every", type=int, default=4, help="of the levels of each family, from the loosest"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model, metric = load_model(options.model), load_metric(options.metric)
    specs = graph_inputs(model.proto)
    parts = split_samples(load_inputs(options.calibration, specs), options.seed)
    context = CalibrationContext(
        study_model(model), parts, Provider.CPU, options.seed, metric=metric
    )
    report_directions(context)
    report_scores(context, load_inputs(options.test, specs), metric, options.every)


if __name__ == "__main__":
    _main()
