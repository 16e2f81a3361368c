"""Scores of ``grouped_residual``, for ``--metric models.grouped_residual_metric:score``; numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["OUTPUT_SLOTS", "score", "task_scores"]

OUTPUT_SLOTS = {
    "digits": slice(0, 10),
    "breast_cancer": slice(10, 12),
    "wine": slice(12, 15),
    "iris": slice(15, 18),
    "diabetes": slice(18, 19),
    "friedman1": slice(19, 20),
    "friedman2": slice(20, 21),
    "friedman3": slice(21, 22),
}
"""Per task its columns of the output, in the order of the array ``task``."""


def score(inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> float:
    """Mean of :func:`task_scores`."""
    return float(np.mean(list(task_scores(inputs, outputs).values())))


def task_scores(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Per task that has samples its accuracy, or 1 - squared error for targets of unit variance, its own outputs alone.

    Args:
        inputs: ``target`` (samples, outputs) and ``task`` (samples,).
        outputs: ``output`` (samples, outputs).
    """
    found = {}
    for number, (name, slot) in enumerate(OUTPUT_SLOTS.items()):
        rows = inputs["task"] == number
        if not rows.any():
            continue
        wanted, made = inputs["target"][rows, slot], outputs["output"][rows, slot]
        if wanted.shape[1] > 1:
            found[name] = float((made.argmax(axis=1) == wanted.argmax(axis=1)).mean())
        else:
            found[name] = 1.0 - float(np.square(made - wanted).mean())
    return found
