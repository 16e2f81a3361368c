"""How far two sets of outputs are apart, and the user's own measure of a model's quality."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.errors import ClaimError, DataError, OptionError
from onnx_decompose.model.tensors import is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.runtime.feeds import Feeds

__all__ = [
    "TOP1",
    "Deviation",
    "DeviationAccumulator",
    "Metric",
    "MetricDrops",
    "disagreements",
    "load_metric",
]


TOP1 = "top1"
"""The metric that needs no function: agreement with the original on the largest entry of each row."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deviation:
    """How one output deviates from its reference, over everything compared.

    Elements of outputs that are not floats (integers, booleans, strings) are only equal or not:
    ``relative_l2`` and ``mean_abs`` are then the share of unequal elements.

    Attributes:
        elements: number of elements compared.
        max_abs: largest absolute difference; infinite where one side alone is NaN or infinite.
        mean_abs: mean absolute difference.
        relative_l2: norm of the difference over the norm of the reference.
        cosine: cosine of the angle between the two, each taken as one long vector.
        sqnr_db: signal-to-quantization-noise ratio, -20 log10(relative_l2); infinite if equal.
        top1_agreement: share of rows (all axes but the last) whose largest entry is at the same
            place; None where the output has no rows of two or more floats.
        mismatch_share: share of elements that are not exactly equal.
        non_finite: elements that are NaN or infinite on one side and not the same on the other.
    """

    elements: int
    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    sqnr_db: float
    top1_agreement: float | None
    mismatch_share: float
    non_finite: int


class DeviationAccumulator:
    """Compares an output with its reference batch by batch, with float64 sums.

    Positions where both are the same non-finite value agree and add nothing; a position where
    only one is, or where they differ, makes the error infinite.
    """

    def __init__(self) -> None:
        self._elements = 0
        self._unequal = 0
        self._non_finite = 0
        self._max_abs = 0.0
        self._sum_abs = 0.0
        # Squared norms of the reference, the other and the difference, and the inner product.
        self._reference2 = self._other2 = self._difference2 = self._inner = 0.0
        self._rows = 0
        self._same_top = 0
        self._discrete = False

    def update(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Add one batch.

        Raises:
            ClaimError: the two differ in shape or dtype.
        """
        if reference.shape != other.shape or reference.dtype != other.dtype:
            raise ClaimError(
                f"an output is {other.dtype}{list(other.shape)} where the reference is "
                f"{reference.dtype}{list(reference.shape)}; compare two versions of one model"
            )
        self._elements += reference.size
        if not is_float(reference.dtype):
            self._discrete = True
            self._unequal += int(np.count_nonzero(reference != other))
            return
        if reference.size == 0:
            return
        reference, other = reference.astype(np.float64), other.astype(np.float64)
        self._add_floats(reference, other)
        if reference.ndim > 1 and reference.shape[-1] > 1:
            same = reference.argmax(axis=-1) == other.argmax(axis=-1)
            self._rows += same.size
            self._same_top += int(np.count_nonzero(same))

    @classmethod
    def joined(cls, parts: Iterable[DeviationAccumulator]) -> DeviationAccumulator:
        """Everything that ``parts`` compared."""
        found = cls()
        for part in parts:
            for name, value in vars(part).items():
                before = getattr(found, name)
                joint = (
                    max(before, value) if name in {"_max_abs", "_discrete"} else before + value
                )
                setattr(found, name, joint)
        return found

    def result(self) -> Deviation:
        """The deviation over everything so far; all zero before the first batch."""
        total = max(self._elements, 1)
        mismatch = self._unequal / total
        relative, cosine = mismatch, 1.0 - mismatch
        max_abs, mean_abs = float(self._unequal > 0), mismatch
        if not self._discrete:
            max_abs, mean_abs = self._max_abs, self._sum_abs / total
            relative = _ratio(math.sqrt(self._difference2), math.sqrt(self._reference2))
            cosine = self._cosine()
        if self._non_finite:
            max_abs = mean_abs = relative = math.inf
        return Deviation(
            elements=self._elements,
            max_abs=max_abs,
            mean_abs=mean_abs,
            relative_l2=relative,
            cosine=cosine,
            sqnr_db=-20.0 * math.log10(relative) if relative else math.inf,
            top1_agreement=self._same_top / self._rows if self._rows else None,
            mismatch_share=mismatch,
            non_finite=self._non_finite,
        )

    def _add_floats(self, reference: NDArray[np.float64], other: NDArray[np.float64]) -> None:
        finite = np.isfinite(reference) & np.isfinite(other)
        if not finite.all():
            agree = (reference == other) | (np.isnan(reference) & np.isnan(other))
            differ = int(np.count_nonzero(~finite & ~agree))
            self._non_finite += differ
            self._unequal += differ
            reference, other = reference[finite], other[finite]
        reference, other = reference.ravel(), other.ravel()
        with np.errstate(over="ignore"):
            difference = np.abs(reference - other)
            self._unequal += int(np.count_nonzero(difference))
            self._max_abs = max(self._max_abs, float(difference.max(initial=0.0)))
            self._sum_abs += float(difference.sum())
            self._difference2 += float(difference @ difference)
            self._reference2 += float(reference @ reference)
            self._other2 += float(other @ other)
            self._inner += float(reference @ other)

    def _cosine(self) -> float:
        if self._non_finite:
            return math.nan
        if not self._reference2 or not self._other2:
            return float(self._reference2 == self._other2)
        return self._inner / math.sqrt(self._reference2) / math.sqrt(self._other2)


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The user's ``metric(inputs, outputs)``: a number, higher is better, or several of them by name.

    In the place of a number, an array with one for every sample stands for their mean: then samples need not be seen
    all at once.

    Attributes:
        name: ``module:function``, for messages.
        function: takes the model inputs and extras by name, and the outputs by name.
    """

    name: str
    function: Callable[[Feeds, Feeds], Any]

    def __call__(self, inputs: Feeds, outputs: Feeds) -> float:
        """The metric's value; the mean of several.

        Raises:
            DataError: the function fails, or gives no finite number.
        """
        return float(np.mean(list(self.values(inputs, outputs).values())))

    def values(self, inputs: Feeds, outputs: Feeds) -> dict[str, float]:
        """The metric's values by name; a single one has none.

        Raises:
            DataError: the function fails, or gives no finite number.
        """
        each = self._each(inputs, outputs)
        return {
            name: self._number(one.mean() if _per_sample(one, inputs) else one)
            for name, one in each.items()
        }

    def per_sample(
        self, inputs: Feeds, outputs: Feeds
    ) -> dict[str, NDArray[np.float64]] | None:
        """One value for every sample, by name; None where the metric says something of all together, or nothing."""
        try:
            each = self._each(inputs, outputs)
        except DataError:  # it may need samples that are not among these
            return None
        if not all(_per_sample(one, inputs) for one in each.values()):
            return None
        for one in each.values():
            self._number(one.mean())
        return {name: one.astype(np.float64) for name, one in each.items()}

    def _each(self, inputs: Feeds, outputs: Feeds) -> dict[str, Any]:
        try:
            value = self.function(inputs, outputs)
        except Exception as error:  # whatever the user's code raises
            told = next(iter(str(error).splitlines()), "")
            raise DataError(
                f"metric {self.name}: failed with {type(error).__name__}: {told}; it was given "
                f"inputs {sorted(inputs)} and outputs {sorted(outputs)}"
            ) from error
        found = value if isinstance(value, Mapping) and value else {"": value}
        return {str(name): one for name, one in found.items()}

    def _number(self, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"metric {self.name}: gave {value!r:.60}; return one finite number, or several by name"
            )
        return number


def _per_sample(value: object, inputs: Feeds) -> bool:
    """Whether ``value`` is an array of numbers, one for every sample."""
    counts = {array.shape[0] for array in inputs.values() if array.ndim}
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 1
        and value.dtype.kind in "biuf"
        and value.size in counts
    )


class MetricDrops:
    """How much lower a metric is for other outputs than for the original's, batch by batch.

    Of a metric that says something of each sample, that is all that is kept; for any other, inputs and outputs are.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._each: list[tuple[Mapping[str, NDArray[np.float64]], ...]] = []
        self._whole: list[tuple[Feeds, Feeds, Feeds]] = []

    def update(self, inputs: Feeds, before: Feeds, after: Feeds) -> None:
        """Add a batch: the samples, and what both models make of them.

        Raises:
            DataError: the metric says something of each sample of one batch, and not of another.
        """
        metric = self._metric
        first = None if self._whole else metric.per_sample(inputs, before)
        if first is None and not self._each:
            self._whole.append((inputs, before, after))
            return
        second = metric.per_sample(inputs, after)
        if first is None or second is None:
            raise DataError(
                f"metric {metric.name}: gave one value per sample for some samples only; always do, or never"
            )
        self._each.append((first, second))

    @classmethod
    def joined(cls, metric: Metric, parts: Iterable[MetricDrops]) -> MetricDrops:
        """All that ``parts`` were given."""
        found = cls(metric)
        for part in parts:
            found._each += part._each  # noqa: SLF001 (another one of the same class)
            found._whole += part._whole  # noqa: SLF001
        return found

    def result(self) -> dict[str, float]:
        """The drop of each of the metric's values, by name.

        Raises:
            DataError: the metric fails, or gives other names for the second model.
        """
        before, after = self._means() if self._each else self._together()
        if before.keys() != after.keys():
            raise DataError(
                f"metric {self._metric.name}: gave {sorted(before)} and then {sorted(after)} on the same inputs; "
                "give the same names"
            )
        return {name: before[name] - after[name] for name in before}

    def _means(self) -> list[dict[str, float]]:
        found = []
        for model in range(2):
            each = [batch[model] for batch in self._each]
            names = dict.fromkeys(name for one in each for name in one)
            found.append(
                {
                    name: float(
                        np.concatenate([one[name] for one in each if name in one]).mean()
                    )
                    for name in names
                }
            )
        return found

    def _together(self) -> list[dict[str, float]]:
        inputs, before, after = (_joined([one[k] for one in self._whole]) for k in range(3))
        return [self._metric.values(inputs, outputs) for outputs in (before, after)]


def disagreements(outputs: Mapping[str, Deviation]) -> dict[str, float]:
    """The share of rows whose largest entry is at another place, of each output that has such rows.

    Raises:
        DataError: none has.
    """
    found = {
        name: 1.0 - deviation.top1_agreement
        for name, deviation in outputs.items()
        if deviation.top1_agreement is not None
    }
    if not found:
        raise DataError(
            "metric top1: no output has rows of two or more numbers; name a metric of your own"
        )
    return found


def _joined(parts: Sequence[Feeds]) -> Feeds:
    if len(parts) == 1:
        return parts[0]
    return {
        name: np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim
        else parts[0][name]
        for name in parts[0]
    }


def load_metric(name: str) -> Metric:
    """Find ``module:function``, in the current folder too.

    Raises:
        OptionError: there is no such module or function, or importing it fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise OptionError(f"metric {name!r}: give module:function, as in my_metrics:accuracy")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise OptionError(f"metric {name}: cannot import {module_name} ({told})") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise OptionError(f"metric {name}: module {module_name} has no {attribute}")
    if not callable(found):
        raise OptionError(
            f"metric {name}: {attribute} is a {type(found).__name__}; name a function"
        )
    return Metric(name, found)


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0
