"""The error of a candidate on samples that it was not fitted to, and how far the true one may be from it.

Samples come in folds, each with a model of its own: the same proposal, fitted without that fold. What all of them make
of their own folds, side by side, is measured as claim B is. Blocks of samples are left out in turn for the bounds
(``analysis.choice``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.choice import bounded
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME, open_model
from onnx_decompose.verification.claims import rounding_of
from onnx_decompose.verification.metrics import DeviationAccumulator, MetricDrops, disagreements

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.claims import Inputs

__all__ = ["Trial", "Trials"]

BLOCKS = 64
"""Samples are left out in so many blocks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """What the samples say of one candidate: of several errors, of that which has the least room.

    Attributes:
        error: as measured.
        upper: what the true one is at most, but for the risk.
        budget: what it may be.
        measure: what it is.
        hopeless: whether one of the errors is outside its budget, but for the risk.
    """

    error: float
    upper: float
    budget: float
    measure: str
    hopeless: bool

    @property
    def used(self) -> float:
        """The share of the budget that the error takes at most, but for the risk."""
        return self.upper / self.budget if self.budget > 0 else math.inf


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Outputs before and after, of samples that are left out together.

    Attributes:
        deviations: by output.
        drops: of the metric, if there is one.
    """

    deviations: Mapping[str, DeviationAccumulator]
    drops: MetricDrops | None


class Trials:
    """Candidates on the same folds.

    Args:
        original: the model before.
        folds: the samples, in parts.
        inputs: what is measured; its own samples play no part.
        provider: where models run.
        budget: of errors that have none of their own.
    """

    def __init__(
        self,
        original: Model,
        folds: Sequence[Samples],
        inputs: Inputs,
        provider: Provider,
        budget: float,
    ) -> None:
        self._inputs = inputs
        self._provider = provider
        self._budget = budget
        self._folds = folds
        self._reference = open_model(original, provider)
        self._each = max(BLOCKS // len(folds), 1)

    def compare(self, number: int, candidate: Model) -> list[_Block]:
        """What ``candidate`` makes of the fold of that number, block by block."""
        session = open_model(candidate, self._provider)
        found = []
        for part in _blocks(self._folds[number], self._each):
            deviations = {spec.name: DeviationAccumulator() for spec in session.outputs}
            metric = self._inputs.metric
            drops = None if metric is None else MetricDrops(metric)
            for feeds, extras in part.batches(SAMPLES_AT_A_TIME):
                before, after = self._reference.run(feeds), session.run(feeds)
                for name, accumulator in deviations.items():
                    accumulator.update(before[name], after[name])
                if drops is not None:
                    drops.update({**feeds, **extras}, before, after)
            found.append(_Block(deviations, drops))
        return found

    def judge(self, blocks: Sequence[_Block], risk: float) -> Trial:
        """What blocks, of one fold or several, say at that ``risk`` of each bound."""
        errors = self._errors(blocks)
        without = [
            self._errors([*blocks[:left_out], *blocks[left_out + 1 :]])
            for left_out in range(len(blocks))
        ]
        trials = []
        for name, (error, budget) in errors.items():
            # What a metric names only where a certain block is there hangs on that block alone.
            others = np.array([one.get(name, (np.nan, 0.0))[0] for one in without])
            bounds = bounded(error, others, risk)
            trials.append(Trial(error, bounds.upper, budget, name, bounds.lower > budget))
        worst = max(trials, key=lambda trial: trial.used)
        return dataclasses.replace(worst, hopeless=any(trial.hopeless for trial in trials))

    def _errors(self, blocks: Sequence[_Block]) -> dict[str, tuple[float, float]]:
        """Every error and its budget, by what it is; none of nothing."""
        if not blocks:
            return {}
        if self._inputs.metric is not None:
            parts = [block.drops for block in blocks if block.drops is not None]
            drops = MetricDrops.joined(self._inputs.metric, parts).result()
            return {
                _of("drop of the metric", name): (drop, self._budget)
                for name, drop in drops.items()
            }
        outputs = {
            name: DeviationAccumulator.joined([b.deviations[name] for b in blocks]).result()
            for name in blocks[0].deviations
        }
        if self._inputs.agreement:
            worst = max(disagreements(outputs).values())
            return {"share of other top-1 answers": (worst, self._budget)}
        floor = rounding_of(self._reference.outputs)
        allowed = self._inputs.allowed(outputs, self._budget)
        return {
            _of("relative L2 error", f"output '{name}'" if len(outputs) > 1 else ""): (
                outputs[name].relative_l2,
                max(budget, floor),
            )
            for name, budget in allowed.items()
        }


def _of(measure: str, what: str) -> str:
    return f"{measure} of {what}" if what else measure


def _blocks(samples: Samples, most: int) -> Iterator[Samples]:
    """Every n-th sample together, so that a file that is sorted has something of everything in each block."""
    for start in range(min(most, samples.count)):
        yield samples.take(np.arange(start, samples.count, most))
