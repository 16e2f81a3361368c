"""Which outputs are needed where a group of inputs is active, as far as the user's metric tells.

A network that was trained on several tasks may do anything on the outputs of one task for the inputs of another: no
loss ever looked at them, and they may vary more there than where they are needed. Data cannot tell that, the metric
can: one output is put above and below all others in the rows of one group, and the metric changes, or it does not. A
metric that never looks at the output there gives the very same number.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.errors import DataError
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME, open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.verification.metrics import Metric

    FloatArray = NDArray[np.float64]

logger = logging.getLogger(__name__)

__all__ = ["needed_outputs"]

_MOST_QUESTIONS = 4096
"""Times that a metric is asked; beyond that nothing is known."""


def needed_outputs(
    context: CalibrationContext,
    output: str,
    entries: Sequence[str],
    shares: Callable[[Mapping[str, NDArray[Any]]], FloatArray],
) -> FloatArray | None:
    """(N, groups) how much the metric changes where an output is wrong in a group's rows; 0 where it does not look.

    On the part of the samples to fit on.

    Args:
        context: the model, and the metric.
        output: an output of the model, (..., N).
        entries: values that tell which groups are active: inputs of the model.
        shares: from them the (rows, groups) share of each group in each row.

    Returns:
        None where nothing can be said: there is no metric, or it has no number for such outputs; ``output`` is none of
        the model's outputs or has other rows than the entries, the entries are no inputs, or there are too many
        questions.
    """
    graph, metric = context.study.source.proto.graph, context.metric
    if (
        metric is None
        or output not in {value.name for value in graph.output}
        or not set(entries) <= {value.name for value in graph.input}
    ):
        return None
    fit = context.parts.fit
    session = open_model(context.study.source, context.provider)
    parts = [
        (feeds, extras, session.run(feeds)) for feeds, extras in fit.batches(SAMPLES_AT_A_TIME)
    ]
    inputs = _joined([{**feeds, **extras} for feeds, extras, _ in parts])
    outputs = _joined([made for _, _, made in parts])
    share = shares(inputs)
    values = outputs[output]
    units = values.shape[-1]
    if share.shape[0] != values.size // units or 2 * units * share.shape[1] > _MOST_QUESTIONS:
        return None
    group = np.where(share.max(axis=1) > 0, share.argmax(axis=1), -1)
    try:
        needed = _asked(
            metric, inputs, outputs, output, group[:, None] == np.arange(share.shape[1])
        )
    except DataError as error:
        logger.info("the metric does not tell which outputs are needed: %s", error)
        return None
    logger.info("the metric looks at %d of %d outputs", int(needed.any(axis=1).sum()), units)
    return needed


def _asked(
    metric: Metric,
    inputs: Feeds,
    outputs: Feeds,
    output: str,
    rows_of: NDArray[np.bool_],
) -> FloatArray:
    """(N, groups) the metric's changes; ``rows_of`` is (rows, groups)."""
    values = outputs[output]
    units = values.shape[-1]
    before = metric.values(inputs, outputs)
    needed = np.zeros((units, rows_of.shape[1]))
    low, high = values.min(), values.max()
    for number, unit, far in itertools.product(
        range(needed.shape[1]), range(units), (2 * high - low, 2 * low - high)
    ):
        wrong = values.copy()
        wrong.reshape(-1, units)[rows_of[:, number], unit] = far
        after = metric.values(inputs, {**outputs, output: wrong})
        needed[unit, number] += sum(
            abs(value - after.get(name, value)) for name, value in before.items()
        )
    return needed


def _joined(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {
        name: np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim and len(parts) > 1
        else parts[0][name]
        for name in parts[0]
    }
