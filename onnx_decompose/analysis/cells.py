"""The recurrent operators of the ONNX standard in numpy, in whatever precision the arrays have.

onnxruntime has no float64 kernels for them, and the standard's own reference implementation takes no activations other
than the default ones, and no lengths of sequences.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]
    Activation = Callable[[Array], Array]

__all__ = ["CellInputs", "cell_activations", "run_cell"]

_DEFAULTS = {
    "RNN": ("Tanh",),
    "GRU": ("Sigmoid", "Tanh"),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
}
_SLOPES = {
    "Affine": (1.0, 0.0),
    "Elu": (1.0, 0.0),
    "HardSigmoid": (0.2, 0.5),
    "LeakyRelu": (0.01, 0.0),
    "ScaledTanh": (1.0, 1.0),
    "ThresholdedRelu": (1.0, 0.0),
}
"""Default alpha and beta."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CellInputs:
    """What a recurrent operator reads.

    Attributes:
        x: (steps, batch, inputs).
        w: (directions, gates * H, inputs).
        r: (directions, gates * H, H).
        b: (directions, 2 * gates * H).
        lengths: (batch,), steps of each sequence; None for all.
        h: (directions, batch, H), the initial state.
        c: the same of an LSTM's cell state.
        p: (directions, 3 * H), an LSTM's peepholes.
    """

    x: Array
    w: Array
    r: Array
    b: Array
    lengths: NDArray[np.integer[Any]] | None
    h: Array
    c: Array
    p: Array


def _activation(name: str, alpha: float | None = None, beta: float | None = None) -> Activation:
    """An activation of the standard by its name (any case).

    Raises:
        ValueError: another name.
    """
    known = {key.lower(): value for key, value in _SLOPES.items()}
    default = known.get(name.lower(), (0.0, 0.0))
    a = default[0] if alpha is None else alpha
    b = default[1] if beta is None else beta
    found: dict[str, Activation] = {
        "affine": lambda x: a * x + b,
        "elu": lambda x: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))),
        "hardsigmoid": lambda x: np.clip(a * x + b, 0, 1),
        "leakyrelu": lambda x: np.where(x >= 0, x, a * x),
        "relu": lambda x: np.maximum(x, 0),
        "scaledtanh": lambda x: a * np.tanh(b * x),
        "sigmoid": _sigmoid,
        "softplus": lambda x: np.logaddexp(0, x),
        "softsign": lambda x: x / (1 + np.abs(x)),
        "tanh": np.tanh,
        "thresholdedrelu": lambda x: np.where(x >= a, x, 0),
    }
    if name.lower() not in found:
        raise ValueError(f"activation {name}")
    return found[name.lower()]


def run_cell(
    kind: Literal["RNN", "GRU", "LSTM"],
    inputs: CellInputs,
    activations: Sequence[Sequence[Activation]],
    *,
    reverse: Sequence[bool],
    linear_before_reset: bool = False,
    input_forget: bool = False,
) -> tuple[Array, Array, Array]:
    """All steps of one operator.

    Args:
        kind: which operator.
        inputs: what it reads.
        activations: those of each direction.
        reverse: whether each direction runs backwards.
        linear_before_reset: of a GRU.
        input_forget: of an LSTM: the forget gate is what the input gate leaves.

    Returns:
        Y, (steps, directions, batch, H); Y_h and Y_c, (directions, batch, H).
    """
    steps, batch, _ = inputs.x.shape
    lengths = np.full(batch, steps) if inputs.lengths is None else inputs.lengths
    y = np.zeros((steps, len(reverse), *inputs.h.shape[1:]), inputs.x.dtype)
    last_h, last_c = np.array(inputs.h), np.array(inputs.c)
    for d, backwards in enumerate(reverse):
        step = _Step(kind, inputs, d, activations[d], linear_before_reset, input_forget)
        h, c = inputs.h[d], inputs.c[d]
        for time in reversed(range(steps)) if backwards else range(steps):
            running = (time < lengths)[:, None]
            new_h, new_c = step(inputs.x[time], h, c)
            h, c = np.where(running, new_h, h), np.where(running, new_c, c)
            y[time, d] = np.where(running, new_h, 0)
        last_h[d], last_c[d] = h, c
    return y, last_h, last_c


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One step of one direction: (x, h, c) -> (h, c)."""

    kind: Literal["RNN", "GRU", "LSTM"]
    inputs: CellInputs
    direction: int
    activations: Sequence[Activation]
    linear_before_reset: bool
    input_forget: bool

    def __call__(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        if self.kind == "RNN":
            (gate,) = self._sums(x, h, 1)
            return self.activations[0](gate), c
        return self._gru(x, h, c) if self.kind == "GRU" else self._lstm(x, h, c)

    def _parts(self, values: Array, count: int) -> list[Array]:
        return np.split(values[self.direction], count)

    def _sums(self, x: Array, h: Array, gates: int) -> list[Array]:
        """W x + R h + both biases, per gate."""
        w, r = self._parts(self.inputs.w, gates), self._parts(self.inputs.r, gates)
        b = self._parts(self.inputs.b, 2 * gates)
        return [x @ w[g].T + h @ r[g].T + (b[g] + b[g + gates]) for g in range(gates)]

    def _gru(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        f, g = self.activations
        update, reset, _ = self._sums(x, h, 3)
        z, r = f(update), f(reset)
        w, rec = self._parts(self.inputs.w, 3)[2], self._parts(self.inputs.r, 3)[2]
        b = self._parts(self.inputs.b, 6)
        if self.linear_before_reset:
            candidate = x @ w.T + r * (h @ rec.T + b[5]) + b[2]
        else:
            candidate = x @ w.T + (r * h) @ rec.T + b[5] + b[2]
        return (1 - z) * g(candidate) + z * h, c

    def _lstm(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        f, g, last = self.activations
        i, o, forget, cell = self._sums(x, h, 4)
        p_i, p_o, p_f = self._parts(self.inputs.p, 3)
        i = f(i + p_i * c)
        forget = 1 - i if self.input_forget else f(forget + p_f * c)
        c = forget * c + i * g(cell)
        return f(o + p_o * c) * last(c), c


def _sigmoid(x: Array) -> Array:
    """Without overflow on either side."""
    small = np.exp(-np.abs(x))
    positive: Array = np.where(x >= 0, 1, small) / (1 + small)
    return positive


def cell_activations(
    kind: str,
    directions: int,
    names: Sequence[str] | None,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
) -> list[list[Activation]]:
    """The activations of each direction; alphas and betas go to those that take them, in order.

    Raises:
        ValueError: an activation that the standard does not name.
    """
    each = len(_DEFAULTS[kind])
    listed = list(names or _DEFAULTS[kind] * directions)
    takes_alpha = {name.lower() for name in _SLOPES}
    takes_beta = {"affine", "hardsigmoid", "scaledtanh"}
    alpha, beta = iter(alphas or ()), iter(betas or ())
    made = [
        _activation(
            name,
            next(alpha, None) if name.lower() in takes_alpha else None,
            next(beta, None) if name.lower() in takes_beta else None,
        )
        for name in listed
    ]
    return [made[d * each : (d + 1) * each] for d in range(directions)]
