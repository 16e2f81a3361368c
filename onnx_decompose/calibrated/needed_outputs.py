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
from onnx_decompose.graph.per_unit import is_elementwise
from onnx_decompose.graph.regions import value_readers
from onnx_decompose.runtime.cases import SAMPLES_AT_A_TIME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.graph.study import Study
    from onnx_decompose.runtime.feeds import Feeds
    from onnx_decompose.verification.metrics import Metric

    FloatArray = NDArray[np.float64]

logger = logging.getLogger(__name__)

__all__ = ["needed_outputs"]

_MOST_QUESTIONS = 4096
"""Times that a metric is asked; beyond that nothing is known."""


def needed_outputs(
    context: CalibrationContext,
    made: str,
    entries: Sequence[str],
    shares: Callable[[Mapping[str, NDArray[Any]]], FloatArray],
) -> FloatArray | None:
    """(N, groups) how much the metric changes where an output is wrong in a group's rows; 0 where it does not look.

    On the part of the samples to fit on.

    Args:
        context: the model, and the metric.
        made: a value with units, (..., N): an output of the model, or what one is made of unit by unit.
        entries: values that tell which groups are active.
        shares: from them the (rows, groups) share of each group in each row.

    Returns:
        None where nothing can be said: there is no metric, or it has no number for such outputs; no output of the
        model shows ``made``, or it has other rows than the entries; or there are too many questions.
    """
    source, metric = context.study.source, context.metric
    output = _shown(context.study, made)
    if metric is None or output is None:
        return None
    fit = context.parts.fit
    names = [value.name for value in source.proto.graph.output]
    batches = fit.batches(SAMPLES_AT_A_TIME)
    asked = list(dict.fromkeys((*names, *entries)))
    shared: list[FloatArray] = []
    given: list[Feeds] = []
    found: list[Feeds] = []
    observed = context.observe(asked, fit)
    for (feeds, extras), seen in zip(batches, observed, strict=True):
        shared.append(shares(seen))
        given.append({**feeds, **extras})
        found.append({name: seen[name] for name in names})
    inputs, outputs, share = _joined(given), _joined(found), np.concatenate(shared)
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


def _shown(study: Study, made: str) -> str | None:
    """The output of the model that has the units of ``made``; None where there is none, or others read it too."""
    graph = study.model.proto.graph
    readers = value_readers(graph)
    outputs = {value.name for value in study.source.proto.graph.output}
    name = made
    while name not in outputs:
        (index, *others) = readers.get(name, {-1})
        if index < 0 or others or not is_elementwise(graph.node[index]):
            return None
        node = graph.node[index]
        # What has one axis at most is the same in all rows.
        if any(
            other != name and len(study.shapes.get(other, (None, None))) > 1
            for other in node.input
            if other
        ):
            return None
        name = node.output[0]
    return name


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
