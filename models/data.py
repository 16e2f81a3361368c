"""The reference models' data: four data sets that ship with scikit-learn.

Every data set is split once, stratified by class, into training (60 %), calibration (20 %) and test (20 %).
Scaling happens here and not in the models: digits are divided by their maximum of 16, so that a constant pixel is
exactly 0; the tabular features are standardized with the training split's mean and standard deviation.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SPLIT_SEED = 0

_LOADERS: dict[str, Callable[..., Any]] = {
    "digits": datasets.load_digits,
    "breast_cancer": datasets.load_breast_cancer,
    "wine": datasets.load_wine,
    "iris": datasets.load_iris,
}
TASKS = tuple(_LOADERS)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Samples of one task, or of several in a shared layout.

    Attributes:
        inputs: float32 (samples, features).
        labels: int64 (samples,), an index among the task's own classes.
        task: int64 (samples,), an index into ``TASKS``.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    task: NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskData:
    """The three splits of one task, or of several in a shared layout."""

    train: Split
    calibration: Split
    test: Split


def load_task_data(name: str) -> TaskData:
    """Load, split and scale one data set.

    Args:
        name: one of ``TASKS``.

    Returns:
        Splits whose ``inputs`` are (samples, the task's features).
    """
    inputs: NDArray[Any]
    labels: NDArray[Any]
    inputs, labels = _LOADERS[name](return_X_y=True)
    train, rest = train_test_split(
        np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=SPLIT_SEED
    )
    calibration, test = train_test_split(
        rest, test_size=0.5, stratify=labels[rest], random_state=SPLIT_SEED
    )
    if name == "digits":
        scaled = inputs / 16
    else:
        scaled = (inputs - inputs[train].mean(axis=0)) / inputs[train].std(axis=0)
    number = TASKS.index(name)

    def split(rows: NDArray[np.int64]) -> Split:
        return Split(
            inputs=scaled[rows].astype(np.float32),
            labels=labels[rows].astype(np.int64),
            task=np.full(len(rows), number, dtype=np.int64),
        )

    return TaskData(*(split(np.asarray(rows)) for rows in (train, calibration, test)))


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """Where each task's features and classes lie in the shared input and output."""

    inputs: tuple[slice, ...]
    outputs: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Widths of the shared (input, output)."""
        return self.inputs[-1].stop, self.outputs[-1].stop


def multitask_slots() -> Slots:
    """Contiguous slots in the order of ``TASKS``: 111 inputs and 18 outputs."""
    trains = [load_task_data(name).train for name in TASKS]
    features = np.cumsum([0, *(split.inputs.shape[1] for split in trains)]).tolist()
    classes = np.cumsum([0, *(int(split.labels.max()) + 1 for split in trains)]).tolist()
    return Slots(
        inputs=tuple(slice(a, b) for a, b in itertools.pairwise(features)),
        outputs=tuple(slice(a, b) for a, b in itertools.pairwise(classes)),
    )


def load_multitask_data() -> TaskData:
    """All tasks in one layout: a sample fills its own input slots, every other input is 0."""
    slots = multitask_slots()
    tasks = [load_task_data(name) for name in TASKS]

    def join(parts: list[Split]) -> Split:
        joined = np.zeros((sum(len(p.labels) for p in parts), slots.shape[0]), np.float32)
        start = 0
        for part, columns in zip(parts, slots.inputs, strict=True):
            joined[start : start + len(part.labels), columns] = part.inputs
            start += len(part.labels)
        return Split(
            inputs=joined,
            labels=np.concatenate([p.labels for p in parts]),
            task=np.concatenate([p.task for p in parts]),
        )

    return TaskData(
        train=join([t.train for t in tasks]),
        calibration=join([t.calibration for t in tasks]),
        test=join([t.test for t in tasks]),
    )
