"""What a recurrent operator reads at each step, against the operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onnx_decompose.analysis.cells import CellInputs, cell_activations, run_cell
from onnx_decompose.analysis.states import steps_read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

STEPS, BATCH, INPUTS, HIDDEN = 6, 4, 3, 5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, np.array([6, 1, 4, 3], np.int32)])
@pytest.mark.parametrize("initial", [False, True])
def test_the_outputs_follow_from_what_is_read(
    rng: np.random.Generator, reverse: bool, lengths: Array | None, initial: bool
) -> None:
    x = rng.normal(size=(STEPS, BATCH, INPUTS))
    w, r = rng.normal(size=(1, HIDDEN, INPUTS)), 0.5 * rng.normal(size=(1, HIDDEN, HIDDEN))
    first = rng.uniform(-1, 1, (1, BATCH, HIDDEN)) * initial
    cell = CellInputs(
        x,
        w,
        r,
        np.zeros((1, 2 * HIDDEN)),
        lengths,
        first,
        np.zeros((1, BATCH, HIDDEN)),
        np.zeros((1, 3 * HIDDEN)),
    )
    activations = cell_activations("RNN", 1, None, None, None)
    y, _, _ = run_cell("RNN", cell, activations, reverse=[reverse])
    read, states = steps_read(
        x, y[:, 0], first[0] if initial else None, lengths, reverse=reverse
    )
    counts = np.full(BATCH, STEPS) if lengths is None else lengths
    made = y[:, 0][np.arange(STEPS)[:, None] < counts]
    assert len(read) == len(states) == counts.sum()
    np.testing.assert_allclose(np.tanh(read @ w[0].T + states @ r[0].T), made, atol=1e-12)
