"""Reading the instrumented trainings of ``train.py`` back."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Layer", "Run", "load_runs", "run_of"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One weight's history; every array is (K inputs, N outputs).

    Attributes:
        index: position in the network, from 0.
        initial: right after construction.
        final: after training.
        shadow: what the same optimizer steps make of ``initial`` when every gradient is zero.
        touched: a gradient was nonzero at least once. The truth.
        peak: largest absolute gradient.
        state: Adam's second moment, or the magnitude of SGD's momentum; None for plain SGD.
        bias: (N,) after training.
    """

    index: int
    initial: NDArray[np.float32]
    final: NDArray[np.float32]
    shadow: NDArray[np.float32]
    touched: NDArray[np.bool_]
    peak: NDArray[np.float32]
    state: NDArray[np.float32] | None
    bias: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One training.

    Attributes:
        task: its data set.
        optimizer: a name in ``train.OPTIMIZERS``.
        seed: of the initialization and of the batches.
        test_accuracy: after training.
        layers: first to last.
    """

    task: str
    optimizer: str
    seed: int
    test_accuracy: float
    layers: tuple[Layer, ...]


def run_of(arrays: Mapping[str, NDArray[Any]]) -> Run:
    """The training that ``train.train`` returned, or saved, as ``arrays``."""
    layers = []
    for index in range(sum(name.startswith("final_") for name in arrays)):
        state = arrays.get(f"second_moment_{index}")
        momentum = arrays.get(f"momentum_{index}")
        if state is None and momentum is not None:
            state = np.abs(momentum)
        layers.append(
            Layer(
                index,
                initial=arrays[f"initial_{index}"],
                final=arrays[f"final_{index}"],
                shadow=arrays[f"shadow_{index}"],
                touched=arrays[f"touched_{index}"],
                peak=arrays[f"peak_{index}"],
                state=state,
                bias=arrays[f"bias_{index}"],
            )
        )
    return Run(**json.loads(str(arrays["facts"])), layers=tuple(layers))


def load_runs(cache: Path, pattern: str = "*") -> Iterator[Run]:
    """The saved trainings whose name ``TASK-OPTIMIZER-SEED`` matches ``pattern``, by name."""
    for path in sorted(cache.glob(f"{pattern}.npz")):
        with np.load(path) as arrays:
            yield run_of(dict(arrays))
