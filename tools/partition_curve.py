"""What it costs to put a model's units into a given number of balanced groups, against groups at random.

    python -m tools.partition_curve MODEL.onnx CALIBRATION.npz TEST.npz [--samples N] [--judged N] [--draw 0]
                                    [--groups 2,4,8] [--hidden]

Every region is cut into G groups (``partition_proposals``), fitted on CALIBRATION.npz and judged on TEST.npz: the
relative L2 error of the first output, and for a language model the loss in nats. ``--hidden`` takes only the regions
that have hidden units, such as feed-forward blocks. ``at random`` deals the units to as large groups by chance and
refits them alike; ``no refit`` cuts and does nothing more.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.calibrated.partition_proposals import cut_region
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import hidden_axes
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import load_inputs
from tools.judge import Judge, drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.calibrated.partition_proposals import Cut
    from onnx_decompose.graph.regions import Region


def dealt(region: Region, cut: Cut, rng: np.random.Generator) -> dict[str, NDArray[np.bool_]]:
    """Masks of groups as large as those of ``cut``, of units at random."""
    labels = [rng.permutation(axis) for axis in cut.labels]
    return {
        site.name: labels[region.axis_of[site.input]][:, None]
        == labels[region.axis_of[site.output]]
        for site in region.sites
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--samples", type=int, help="fit and choose on that many")
    parser.add_argument("--judged", type=int, help="judge on that many")
    parser.add_argument("--draw", type=int, default=0, help="seed of the samples that are used")
    parser.add_argument("--groups", default="2,4,8")
    parser.add_argument("--hidden", action="store_true", help="only regions with hidden units")
    options = parser.parse_args()
    study = study_model(load_model(options.model))
    specs = graph_inputs(study.source.proto)
    samples, test = load_inputs(options.calibration, specs), load_inputs(options.test, specs)
    if options.judged:
        test, _ = test.split(np.random.default_rng(0), options.judged / test.count)
    context = drawn(study, samples, options.samples, options.draw)
    names = {site.name for site in context.sites}
    regions = [
        region
        for region in study.regions
        if {site.name for site in region.sites} <= names
        and (not options.hidden or any(hidden_axes(context, region)))
    ]
    judge = Judge(study.source, test)
    bare = dataclasses.replace(context, compensation="none")
    print(f"{len(regions)} of {len(study.regions)} regions, judged on {judge.count} samples")
    print("| groups | energy kept | predicted loss, worst site | groups are | error | |")
    print("|---|---|---|---|---|---|")
    for groups in map(int, options.groups.split(",")):
        cuts = [cut_region(context, region, groups) for region in regions]
        kept = f"{min(c.kept for c in cuts):.2f} to {max(c.kept for c in cuts):.2f}"
        loss = f"{min(c.loss for c in cuts):.2g} to {max(c.loss for c in cuts):.2g}"
        found = {name: mask for cut in cuts for name, mask in cut.masks.items()}
        chance: dict[str, NDArray[np.bool_]] = {}
        for region, cut in zip(regions, cuts, strict=True):
            chance |= dealt(region, cut, context.rng)
        for told, where, masks in (
            ("cut where least is lost", context, found),
            ("the same, no refit", bare, found),
            ("at random", context, chance),
        ):
            model = annealed_by(study, refitted(where, Proposal(told, masks)))
            cells = judge(model)
            nats = (
                f"{cells['nats']:.3f} nats"
                if "nats" in cells
                else f"cosine {cells['cosine']:.3f}"
            )
            print(
                f"| {groups} | {kept} | {loss} | {told} | {cells['error']:.2g} | {nats} |",
                flush=True,
            )


if __name__ == "__main__":
    _main()
