"""Scores of ``grouped_residual``, for ``--metric models.grouped_residual_metric:score``; numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["OUTPUT_SLOTS", "score", "task_likelihood", "task_scores"]

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
    return {
        name: float((made.argmax(axis=1) == wanted.argmax(axis=1)).mean())
        if wanted.shape[1] > 1
        else 1.0 - float(np.square(made - wanted).mean())
        for name, wanted, made in _tasks(inputs, outputs)
    }


def task_likelihood(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Per task that has samples the mean log-likelihood, in nats; arguments as in :func:`task_scores`.

    Of the label, or of a target around the output with a variance of 1, but for a constant. Of a few samples it tells
    more than accuracy: each counts by how sure the model is.
    """
    return {
        name: float((wanted * _log_softmax(made.astype(np.float64))).sum(axis=1).mean())
        if wanted.shape[1] > 1
        else -float(np.square(made - wanted).mean()) / 2
        for name, wanted, made in _tasks(inputs, outputs)
    }


def _tasks(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Each task that has samples: what was wanted of it, and what its own outputs are."""
    for number, (name, slot) in enumerate(OUTPUT_SLOTS.items()):
        rows = inputs["task"] == number
        if rows.any():
            yield name, inputs["target"][rows, slot], outputs["output"][rows, slot]


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    shares: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shares
