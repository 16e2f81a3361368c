"""The user's samples in three parts, split once by the seed.

    fit      moments of what every site reads: support, and the refit itself
    choose   the strength of the refit, and which proposal is inside the budget
    judge    claim B

Where samples are few, those to fit and to choose on take turns, each time with another model, so that a proposal is
told by all of them and still by none that its model was fitted to. What is judged never trades places.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.errors import DataError
from onnx_decompose.runtime.samples import split_indices

if TYPE_CHECKING:
    from onnx_decompose.runtime.samples import Samples

__all__ = ["CHOOSE", "FIT", "Parts", "rotated_samples", "split_samples"]

FIT, CHOOSE = 0.6, 0.2
"""Shares of the samples; the rest is for claim B."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The three parts of the user's samples."""

    fit: Samples
    choose: Samples
    judge: Samples


def split_samples(samples: Samples, seed: int) -> Parts:
    """The three parts.

    Raises:
        DataError: there are not three samples.
    """
    return rotated_samples(samples, seed)[0]


def rotated_samples(samples: Samples, seed: int) -> tuple[Parts, ...]:
    """The three parts, and those with other samples to choose on, so that each that is not judged has its turn once.

    Raises:
        DataError: there are not three samples.
    """
    if samples.count < 3:
        raise DataError(
            f"{samples.source}: holds {samples.count} samples; at least 3 are needed to fit, choose and judge"
        )
    rng = np.random.default_rng(seed)
    fit, rest = split_indices(np.arange(samples.count), rng, FIT)
    choose, judge = split_indices(rest, rng, CHOOSE / (1 - FIT))
    turns = [choose]
    others = round(FIT / CHOOSE)
    if fit.size > others:
        turns += [np.sort(part) for part in np.array_split(rng.permutation(fit), others)]
    seen = np.union1d(fit, choose)
    return tuple(
        Parts(samples.take(np.setdiff1d(seen, turn)), samples.take(turn), samples.take(judge))
        for turn in turns
    )
