"""A language model's outputs merged: how many stay against what that does to text that nothing was fitted to.

    python -m tools.merge_curve MODEL.onnx CALIBRATION.npz TEST.npz [--family "merge by use"] [--compensation mean]
                                [--fewest 2000] [--most 12000] [--samples N] [--save FOLDER]

Prints a table: different outputs, divergence from the original (nats), top-1 agreement, loss of log probability of the
token that really follows (nats), relative L2 error of the logits. All of it on TEST.npz. ``--samples`` fits to
N of the texts only. ``--save`` writes the dense models: ``rewrite --null zero --emit shared`` makes the equal columns
one, exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from models.language_metrics import compare
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.merge_proposals import merged_outputs
from onnx_decompose.calibrated.parts import Parts
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import Model, load_model, save_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider

_TEXTS_AT_A_TIME = 4


def judged(original: Model, other: Model, tokens: np.ndarray) -> tuple[float, ...]:
    """Mean divergence, agreement, loss of log probability, and the relative error of the logits."""
    sessions = [open_model(model, Provider.CPU) for model in (original, other)]
    output = original.proto.graph.output[0].name
    found: dict[str, list[np.ndarray]] = {}
    apart = size = 0.0
    for start in range(0, len(tokens), _TEXTS_AT_A_TIME):
        rows = tokens[start : start + _TEXTS_AT_A_TIME]
        before, after = (session.run({"input_ids": rows})[output] for session in sessions)
        for name, values in compare(rows, before, after).items():
            found.setdefault(name, []).append(values)
        apart += float(np.square(after - before, dtype=np.float64).sum())
        size += float(np.square(before, dtype=np.float64).sum())
    means = (float(np.concatenate(values).mean()) for values in found.values())
    return (*means, (apart / size) ** 0.5)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--family", default="merge by use")
    parser.add_argument("--compensation", default="mean", choices=("mean", "none"))
    parser.add_argument("--fewest", type=int, default=2000)
    parser.add_argument("--most", type=int, default=12000)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--save", type=Path, help="write the dense models into this folder")
    options = parser.parse_args()
    study = study_model(load_model(options.model))
    samples = load_inputs(options.calibration, graph_inputs(study.source.proto))
    if options.samples:
        samples, _ = samples.split(np.random.default_rng(0), options.samples / samples.count)
    context = CalibrationContext(
        study,
        Parts(samples, samples, samples),  # nothing is chosen here, so that all is there to fit
        Provider.CPU,
        compensation=options.compensation,
        neighbours=False,
    )
    with np.load(options.test) as file:
        tokens = file["input_ids"]
    print(
        "| different outputs | KL | top-1 agreement | loss, nats | relative L2 of the logits |"
    )
    print("|---|---|---|---|---|")
    (family,) = (found for found in merged_outputs(context) if found.name == options.family)
    for proposal in reversed(list(family)):
        groups = int(next(iter(proposal.equal.values())).labels.max()) + 1
        if not options.fewest <= groups <= options.most:
            continue
        model = annealed_by(study, refitted(context, proposal))
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            save_model(model.proto, options.save / f"merged_{groups}.onnx", data_from=model)
        kl, top1, nats, error = judged(study.source, model, tokens)
        print(f"| {groups} | {kl:.2g} | {top1:.4f} | {nats:.5f} | {error:.2g} |", flush=True)


if __name__ == "__main__":
    _main()
