"""What a refit inside a Loop should read: the original's values, or those of the loop as annealed so far.

    python -m tools.loop_refits MODEL.onnx CALIBRATION.npz TEST.npz [--losses 1e-6,1e-5,1e-4,1e-3]

Hidden units go in the order of ``rewrite --proposals removal``, up to a share of the variance that their readers lose.
Printed for each share is the relative L2 error of the first output on TEST.npz: refitted to the original's values in
one pass over the sites (*original*, what ``rewrite`` does), to those of the model as annealed so far (*sequential*),
with biases alone (*mean*), and with nothing (*none*).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from onnx_decompose.analysis.removal import removal_order
from onnx_decompose.calibrated.context import CalibrationContext
from onnx_decompose.calibrated.parts import split_samples
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import hidden_axes, readers_of, without_units
from onnx_decompose.graph.exposing import Inside
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME, open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Refits inside a Loop.")
    for name in ("model", "calibration", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--losses", default="1e-6,1e-5,1e-4,1e-3,1e-2")
    options = parser.parse_args()
    model = load_model(options.model)
    specs = graph_inputs(model.proto)
    samples, test = (load_inputs(path, specs) for path in (options.calibration, options.test))
    context = CalibrationContext(study_model(model), split_samples(samples, 0), Provider.CPU)
    wanted = _output(model, test)
    orders = {
        axis: removal_order(readers_of(context, axis))
        for region in context.study.regions
        for axis in hidden_axes(context, region)
    }
    print("| share lost | units that go | original | sequential | mean | none |")
    print("|---|---|---|---|---|---|")
    for loss in map(float, options.losses.split(",")):
        gone = {axis: order.within(loss) for axis, order in orders.items()}
        proposal = Proposal("removal", without_units(gone))
        errors = [
            np.linalg.norm(_output(annealed, test) - wanted) / np.linalg.norm(wanted)
            for annealed in _annealed(context, proposal)
        ]
        count = sum(units.size for units in gone.values())
        print(f"| {loss:g} | {count} | {' | '.join(f'{error:.2g}' for error in errors)} |")


def _annealed(context: CalibrationContext, proposal: Proposal) -> Iterator[Model]:
    study = context.study
    yield annealed_by(study, refitted(context, proposal))
    with mock.patch.object(Inside, "is_iterated", return_value=False):
        yield annealed_by(study, refitted(context, proposal))
    for compensation in ("mean", "none"):
        other = dataclasses.replace(context, compensation=compensation)
        yield annealed_by(study, refitted(other, proposal))


def _output(model: Model, samples: Samples) -> NDArray[np.float32]:
    session = open_model(model, Provider.CPU)
    name = session.outputs[0].name
    return np.concatenate(
        [session.run(feeds)[name] for feeds, _ in samples.batches(SAMPLES_AT_A_TIME)]
    )


if __name__ == "__main__":
    main()
