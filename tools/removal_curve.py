"""Hidden units removed from a model's feed-forward regions: error against share removed, for several orders and refits.

    python -m tools.removal_curve MODEL.onnx CALIBRATION.npz TEST.npz [--shares 0.05,0.1,0.2,0.3,0.5] [--methods ...]
                                  [--samples N] [--judged N] [--draws 0,1,2] [--rows FILE.jsonl] [--save FOLDER]

Every method removes the same number of units from every set of hidden units (equal cost), but for ``greedy, spread``,
which removes as many in all and spreads them by the predicted loss, one level for all sets, and ``greedy, priced``,
which does so by one price, as ``rewrite`` does. Fitted on CALIBRATION.npz, 3 of 4 samples to fit
and the rest to choose the ridge; judged on TEST.npz. A draw is a seed of which samples these are (those to judge on
are always the same). Printed is the relative L2 error of the first output, the mean over the draws; ``--rows`` adds
one JSON object per draw, method and share to a file, for ``tools.removal_table``: that error, the mean cosine between
the outputs before and after, and for a language model (``input_ids`` to logits) the loss of log probability in nats.

| method | a unit's score | what makes up for it |
|---|---|---|
| magnitude | norms of its columns times norm of its row | nothing |
| wanda | norm of its row times its root mean square (Sun et al. 2023, summed over a row) | nothing |
| obs | norm of its row squared over the inverse second moment's diagonal, all at once | least squares, no bias |
| greedy | the same one unit at a time, on covariances | ridge chosen on other samples, biases, site after site |
| greedy, mean / parallel | the same order | biases alone / the same refit, on the original's moments |
| magnitude / wanda / obs, refit | the order of the first column | the refit of greedy |
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.removal import removal_order
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import annealed_by, refitted
from onnx_decompose.calibrated.removal_proposals import (
    hidden_axes,
    priced_units,
    readers_of,
    without_units,
)
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.model_io import load_model, save_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.samples import load_inputs
from tools.judge import Judge, drawn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnx_decompose.analysis.removal import Removal
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.removal_proposals import HiddenAxis
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.model_io import Model

    Gone = Mapping[HiddenAxis, NDArray[np.intp]]

METHODS = (
    *("magnitude", "wanda", "obs"),
    *("greedy", "greedy, spread", "greedy, priced", "greedy, mean", "greedy, parallel"),
    *("magnitude, refit", "wanda, refit", "obs, refit"),
)

_RIDGE = ("ridge", True)
_COMPENSATIONS = {
    "greedy": _RIDGE,
    "greedy, spread": _RIDGE,
    "greedy, priced": _RIDGE,
    "greedy, mean": ("mean", True),
    "greedy, parallel": ("ridge", False),
    "magnitude, refit": _RIDGE,
    "wanda, refit": _RIDGE,
    "obs, refit": _RIDGE,
}
"""What makes up for the units, and whether site after site; nothing for the others."""


class Curve:
    """A model's hidden units, in the orders of the methods."""

    def __init__(self, context: CalibrationContext) -> None:
        self.context = context
        self.axes = [
            a for region in context.study.regions for a in hidden_axes(context, region)
        ]

    @functools.cached_property
    def greedy(self) -> Mapping[HiddenAxis, Removal]:
        """The order of every set of units, one at a time."""
        return {
            axis: removal_order(readers_of(self.context, axis), most=1.0) for axis in self.axes
        }

    @functools.cached_property
    def second(self) -> Mapping[HiddenAxis, list[NDArray[np.float64]]]:
        """Second moments of what every reader reads."""
        return {axis: [self._second(site) for site in axis.readers] for axis in self.axes}

    @property
    def samples(self) -> int:
        """How many samples are used, to fit and to choose."""
        return self.context.parts.fit.count + self.context.parts.choose.count

    @property
    def told(self) -> str:
        """How many units and samples there are."""
        sizes = ", ".join(str(axis.size) for axis in self.axes)
        parts = self.context.parts
        return (
            f"hidden units {sizes}; fitted on {parts.fit.count}, chosen on {parts.choose.count}"
        )

    def annealed(self, method: str, share: float) -> Model:
        """The model without ``share`` of every set of hidden units."""
        dealt = {"greedy, spread": self._spread, "greedy, priced": self._priced}
        gone = dealt[method](share) if method in dealt else self._evenly(method, share)
        masks = without_units(gone)
        compensation, sequential = _COMPENSATIONS.get(method, ("none", False))
        context = dataclasses.replace(
            self.context,
            compensation=compensation,  # type: ignore[arg-type]
            sequential=sequential,
        )
        context.__dict__.update(_computed(self.context))
        proposal = Proposal(method, masks)
        if compensation == "none":
            refits = self._bare(proposal)
        else:
            refits = refitted(context, proposal)
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

    def _priced(self, share: float) -> Gone:
        """The price that takes the nearest to as many units."""
        total = share * sum(axis.size for axis in self.axes)
        orders = list(self.greedy.items())
        low, high = -16.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            gone = priced_units(orders, 10.0**middle)
            if sum(units.size for units in gone.values()) > total:
                high = middle
            else:
                low = middle
        return priced_units(orders, 10.0**low)

    def _order(self, method: str, axis: HiddenAxis) -> NDArray[np.intp]:
        score, _, _ = method.partition(",")
        if score == "greedy":
            order = self.greedy[axis].order
            left = np.setdiff1d(np.arange(axis.size), order)
            return np.concatenate([order, left])
        return np.argsort(self._scores(score, axis), kind="stable")

    @functools.cache  # noqa: B019 - as long as the curve
    def _scores(self, score: str, axis: HiddenAxis) -> NDArray[np.float64]:
        weight = self.context.study.weight
        rows = [
            np.linalg.norm(weight(site).astype(np.float64), axis=1) for site in axis.readers
        ]
        second = self.second[axis]
        if score == "magnitude":
            columns = [
                np.linalg.norm(weight(site).astype(np.float64), axis=0) for site in axis.makers
            ]
            found = [np.prod(columns, axis=0) * row for row in rows]
        elif score == "wanda":
            found = [
                row * np.sqrt(np.diagonal(seen)) for row, seen in zip(rows, second, strict=True)
            ]
        else:
            found = [
                row**2 / np.diagonal(np.linalg.inv(_ridged(seen)))
                for row, seen in zip(rows, second, strict=True)
            ]
        total: NDArray[np.float64] = np.sum(found, axis=0)
        return total

    def _second(self, site: Site) -> NDArray[np.float64]:
        moments = self.context.read(site)
        return moments.xx + np.outer(moments.mean_x, moments.mean_x)

    def _bare(self, proposal: Proposal) -> dict[str, Refit]:
        """What the masks leave, and nothing to make up for the rest."""
        weight = self.context.study.weight
        return {
            site.name: Refit(proposal.start(site, weight(site)), np.zeros(site.shape[1]))
            for site in self.context.sites
            if site.name in proposal.masks
        }

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


def _computed(context: CalibrationContext) -> dict[str, object]:
    """What was computed of a context that another one with the same samples need not compute again."""
    names = ("fit", "choose", "sites", "fitting", "fitted", "held")
    return {name: getattr(context, name) for name in names}


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
    parser.add_argument("--draws", default="0", help="seeds of the samples that are used")
    parser.add_argument("--rows", type=Path, help="add what was measured to this file")
    parser.add_argument("--save", type=Path, help="write the dense models into this folder")
    options = parser.parse_args()
    study = study_model(load_model(options.model))
    specs = graph_inputs(study.source.proto)
    samples, test = load_inputs(options.calibration, specs), load_inputs(options.test, specs)
    if options.judged:
        test, _ = test.split(np.random.default_rng(0), options.judged / test.count)
    judge = Judge(study.source, test)
    shares = [float(share) for share in options.shares.split(",")]
    errors: dict[str, list[list[float]]] = {}
    for draw in map(int, options.draws.split(",")):
        curve = Curve(drawn(study, samples, options.samples, draw))
        print(f"draw {draw}: {curve.told}, judged on {judge.count}", flush=True)
        for method in options.methods.split(";"):
            errors.setdefault(method, []).append([])
            for share in shares:
                model = curve.annealed(method, share)
                row = {
                    "model": str(options.model),
                    "samples": curve.samples,
                    "draw": draw,
                    "method": method,
                    "share": share,
                    **judge(model),
                }
                errors[method][-1].append(row["error"])
                if options.rows:
                    with options.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                if options.save:
                    options.save.mkdir(parents=True, exist_ok=True)
                    name = f"{method.replace(', ', '_')}_{share:g}_{draw}.onnx"
                    save_model(model.proto, options.save / name, data_from=model)
    print("| method |" + "".join(f" {share:.0%} |" for share in shares))
    print("|---|" + "---|" * len(shares))
    for method, rows in errors.items():
        cells = " | ".join(f"{mean:.2g}" for mean in np.mean(rows, axis=0))
        print(f"| {method} | {cells} |")


if __name__ == "__main__":
    _main()
