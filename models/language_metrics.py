"""Quality of language models, for ``--metric models.language_metrics:log_likelihood``; numpy only.

The texts are the model's own input ``input_ids``, (texts, tokens); its one output holds the logits of what comes next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["compare", "log_likelihood", "log_softmax"]


def log_likelihood(
    inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> FloatArray:
    """(texts,) mean over all tokens but the first: log probability, in nats, given the tokens before it."""
    tokens, (logits,) = inputs["input_ids"], outputs.values()
    texts = [
        _of_next(log_softmax(text[:-1]), row[1:]).mean()
        for row, text in zip(tokens, logits, strict=True)
    ]
    return np.array(texts)


def compare(
    tokens: NDArray[Any], reference: NDArray[Any], other: NDArray[Any]
) -> dict[str, FloatArray]:
    """How another model's logits differ, position by position, over one batch of texts.

    Args:
        tokens: (texts, tokens).
        reference: (texts, tokens, vocabulary) logits of the original.
        other: the same of the other model.

    Returns:
        ``kl`` (nats), ``top1`` (1 where the likeliest token is the same) and ``nats`` (loss of log probability of the
        token that comes next), each (positions,).
    """
    found: dict[str, list[FloatArray]] = {"kl": [], "top1": [], "nats": []}
    for row, before, after in zip(tokens, reference, other, strict=True):
        first, second = log_softmax(before[:-1]), log_softmax(after[:-1])
        found["kl"].append((np.exp(first) * (first - second)).sum(axis=1))
        found["top1"].append((first.argmax(axis=1) == second.argmax(axis=1)).astype(float))
        found["nats"].append(_of_next(first, row[1:]) - _of_next(second, row[1:]))
    return {name: np.concatenate(values) for name, values in found.items()}


def log_softmax(logits: NDArray[Any]) -> FloatArray:
    """(..., vocabulary), in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _of_next(log_probabilities: FloatArray, following: NDArray[Any]) -> FloatArray:
    return np.take_along_axis(log_probabilities, following[:, None], axis=1)[:, 0]
