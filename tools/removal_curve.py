"""Hidden units removed from a model's feed-forward regions: error against share removed, for several orders and refits.

    python -m tools.removal_curve MODEL.onnx CALIBRATION.npz TEST.npz [--shares 0.05,0.1,0.2,0.3,0.5] [--methods ...]
                                  [--samples N]

Every method removes the same number of units from every set of hidden units (equal cost), but for ``greedy, spread``,
which removes as many in all and spreads them by the predicted loss. Fitted on CALIBRATION.npz, 3 of 4 samples to fit
and the rest to choose the ridge; the error, relative L2 of the first output, is that on TEST.npz.

| method | a unit's score | what makes up for it |
|---|---|---|
| magnitude | norms of its columns times norm of its row | nothing |
| wanda | norm of its row times its root mean square (Sun et al. 2023, summed over a row) | nothing |
| obs | norm of its row squared over the inverse second moment's diagonal, all at once | least squares, no bias |
| greedy | the same one unit at a time, on covariances | ridge chosen on other samples, biases, site after site |
| greedy, mean / parallel | the same order | biases alone / the same refit, on the original's moments |
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.removal import removal_order
from onnx_decompose.calibrated.refitting import (
    CalibrationContext,
    Parts,
    Proposal,
    annealed_by,
    refitted,
)
from onnx_decompose.calibrated.removal_proposals import hidden_axes, readers_of, without_units
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.samples import load_inputs
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.removal_proposals import HiddenAxis
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples

    Gone = Mapping[HiddenAxis, NDArray[np.intp]]

METHODS = (
    *("magnitude", "wanda", "obs"),
    *("greedy", "greedy, spread", "greedy, mean", "greedy, parallel"),
)


class Curve:
    """A model's hidden units, in the orders of the methods."""

    def __init__(self, context: CalibrationContext) -> None:
        self.context = context
        self.axes = [
            a for region in context.study.regions for a in hidden_axes(context, region)
        ]
        assert context.choose
        self.greedy = {
            axis: removal_order(readers_of(context, axis), most=1.0) for axis in self.axes
        }
        self.second = {
            axis: [self._second(site.input) for site in axis.readers] for axis in self.axes
        }

    def annealed(self, method: str, share: float) -> Model:
        """The model without ``share`` of every set of hidden units."""
        gone = (
            self._spread(share) if method == "greedy, spread" else self._evenly(method, share)
        )
        masks = without_units(gone)
        compensation, sequential = {
            "greedy": ("ridge", True),
            "greedy, spread": ("ridge", True),
            "greedy, mean": ("mean", True),
            "greedy, parallel": ("ridge", False),
        }.get(method, ("none", False))
        context = dataclasses.replace(
            self.context,
            compensation=compensation,  # type: ignore[arg-type]
            sequential=sequential,
        )
        context.__dict__.update(_moments(self.context))
        refits = refitted(context, Proposal(method, masks))
        if method == "obs":
            refits |= self._least_squares(gone)
        return annealed_by(self.context.study, refits)

    def _evenly(self, method: str, share: float) -> Gone:
        return {
            axis: self._order(method, axis)[: round(share * axis.size)] for axis in self.axes
        }

    def _spread(self, share: float) -> Gone:
        total = round(share * sum(axis.size for axis in self.axes))
        losses = np.sort(np.concatenate([order.lost for order in self.greedy.values()]))
        level = losses[total - 1] if total else 0.0
        return {axis: order.within(level) for axis, order in self.greedy.items()}

    def _order(self, method: str, axis: HiddenAxis) -> NDArray[np.intp]:
        if method.startswith("greedy"):
            order = self.greedy[axis].order
            left = np.setdiff1d(np.arange(axis.size), order)
            return np.concatenate([order, left])
        weight = self.context.study.weight
        rows = [
            np.linalg.norm(weight(site).astype(np.float64), axis=1) for site in axis.readers
        ]
        if method == "magnitude":
            columns = [
                np.linalg.norm(weight(site).astype(np.float64), axis=0) for site in axis.makers
            ]
            score = np.prod(columns, axis=0) * np.sum(rows, axis=0)
        elif method == "wanda":
            score = np.sum(
                [
                    row * np.sqrt(np.diagonal(second))
                    for row, second in zip(rows, self.second[axis], strict=True)
                ],
                axis=0,
            )
        else:
            score = np.sum(
                [
                    row**2 / np.diagonal(np.linalg.inv(_ridged(second)))
                    for row, second in zip(rows, self.second[axis], strict=True)
                ],
                axis=0,
            )
        return np.argsort(score, kind="stable")

    def _second(self, value: str) -> NDArray[np.float64]:
        moments = self.context.fit[value]
        return moments.xx + np.outer(moments.mean_x, moments.mean_x)

    def _least_squares(self, gone: Gone) -> dict[str, Refit]:
        found = {}
        for axis, units in gone.items():
            kept = np.setdiff1d(np.arange(axis.size), units)
            for site, second in zip(axis.readers, self.second[axis], strict=True):
                weight = self.context.study.weight(site)
                left = np.zeros(site.shape)
                left[kept] = np.linalg.solve(
                    _ridged(second)[np.ix_(kept, kept)], second[kept] @ weight
                )
                found[site.name] = Refit(left.astype(weight.dtype), np.zeros(site.shape[1]))
        return found


def _moments(context: CalibrationContext) -> dict[str, object]:
    """What was computed of a context that another one with the same samples need not compute again."""
    return {
        name: context.__dict__[name]
        for name in ("fit", "choose", "sites")
        if name in context.__dict__
    }


def relative_error(original: Model, other: Model, samples: Samples) -> float:
    """Relative L2 error of the first output."""
    sessions = [open_model(model, Provider.CPU) for model in (original, other)]
    output = original.proto.graph.output[0].name
    apart = size = 0.0
    for feeds, _ in samples.batches(64):
        before, after = (session.run(feeds)[output] for session in sessions)
        apart += float(np.square(after - before, dtype=np.float64).sum())
        size += float(np.square(before, dtype=np.float64).sum())
    return float(np.sqrt(apart / size))


def _ridged(second: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = float(np.diagonal(second).mean())
    ridged: NDArray[np.float64] = second + 1e-6 * mean * np.eye(len(second))
    return ridged


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--shares", default="0.05,0.1,0.2,0.3,0.5")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--samples", type=int, help="fit and choose on that many")
    parser.add_argument("--judged", type=int, help="judge on that many")
    options = parser.parse_args()
    study = study_model(load_model(options.model))
    specs = graph_inputs(study.source.proto)
    samples, test = load_inputs(options.calibration, specs), load_inputs(options.test, specs)
    rng = np.random.default_rng(0)
    if options.samples:
        samples, _ = samples.split(rng, options.samples / samples.count)
    if options.judged:
        test, _ = test.split(rng, options.judged / test.count)
    fit, choose = samples.split(rng, 0.75)
    curve = Curve(
        CalibrationContext(study, Parts(fit, choose, choose), Provider.CPU, neighbours=False)
    )
    shares = [float(share) for share in options.shares.split(",")]
    sizes = ", ".join(str(axis.size) for axis in curve.axes)
    print(
        f"hidden units: {sizes}; fitted on {fit.count}, chosen on {choose.count}, judged on {test.count}"
    )
    print("| method |" + "".join(f" {share:.0%} |" for share in shares))
    print("|---|" + "---|" * len(shares))
    for method in options.methods.split(";"):
        cells = []
        for share in shares:
            model = curve.annealed(method, share)
            cells.append(f"{relative_error(study.source, model, test):.2g}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    _main()
