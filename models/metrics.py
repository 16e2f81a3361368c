"""Quality of the reference models, for ``--metric models.metrics:accuracy`` and the like; numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

OUTPUT_SLOTS = {
    "digits": slice(0, 10),
    "breast_cancer": slice(10, 12),
    "wine": slice(12, 15),
    "iris": slice(15, 18),
}
"""Per task its columns of the multi-task logits, in the order of the array ``task``."""


def accuracy(inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> float:
    """Share of samples whose largest logit is their label; the mean over tasks where there are several.

    Args:
        inputs: ``labels`` (samples,), and ``task`` (samples,) for a multi-task model.
        outputs: ``logits`` (samples, classes).
    """
    return float(np.mean(list(task_accuracy(inputs, outputs).values())))


def task_accuracy(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Accuracy per task among the task's own classes; arguments as in :func:`accuracy`.

    Returns:
        Per task that has samples its accuracy; without an array ``task`` there is one, ``all``.
    """
    logits, labels = outputs["logits"], inputs["labels"]
    if "task" not in inputs:
        return {"all": float((logits.argmax(axis=1) == labels).mean())}
    found = {}
    for number, (name, slot) in enumerate(OUTPUT_SLOTS.items()):
        rows = inputs["task"] == number
        if rows.any():
            found[name] = float((logits[rows, slot].argmax(axis=1) == labels[rows]).mean())
    return found


def task_likelihood(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Mean log-likelihood of the label per task, in nats; arguments and tasks as in :func:`task_accuracy`.

    Of a few samples it tells more than accuracy: each counts by how sure the model is.
    """
    logits, labels = outputs["logits"].astype(np.float64), inputs["labels"]
    if "task" not in inputs:
        return {"all": _likelihood(logits, labels)}
    found = {}
    for number, (name, slot) in enumerate(OUTPUT_SLOTS.items()):
        rows = inputs["task"] == number
        if rows.any():
            found[name] = _likelihood(logits[rows, slot], labels[rows])
    return found


def _likelihood(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return float((chosen - np.log(np.exp(shifted).sum(axis=1))).mean())
