"""Scores of ``bag_of_words``, for ``--metric models.bag_of_words_metric:log_likelihood``; numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

__all__ = ["accuracy", "log_likelihood"]


def accuracy(inputs: Arrays, outputs: Arrays) -> float:
    """Share of documents whose ``label`` has the largest of the ``logits``."""
    return float((outputs["logits"].argmax(axis=1) == inputs["label"]).mean())


def log_likelihood(inputs: Arrays, outputs: Arrays) -> float:
    """Mean log probability of the ``label``, in nats."""
    scores = scipy.special.log_softmax(outputs["logits"].astype(np.float64), axis=1)
    return float(scores[np.arange(len(scores)), inputs["label"]].mean())
