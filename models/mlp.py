"""The reference models' definition: a multi-layer perceptron with ReLU and biases."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class MLP(torch.nn.Module):
    """Linear layers with a ReLU between them."""

    def __init__(self, widths: Sequence[int], init_std: float | None = None) -> None:
        """Construct and initialize.

        Args:
            widths: units per layer, from the input to the logits.
            init_std: weights from N(0, init_std) and biases 0; torch's own initialization
                (uniform by fan-in) if None.
        """
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)
        )
        if init_std is not None:
            for layer in self.linear():
                torch.nn.init.normal_(layer.weight, std=init_std)
                torch.nn.init.zeros_(layer.bias)

    def linear(self) -> Iterator[torch.nn.Linear]:
        """The linear layers, first to last."""
        for layer in self.layers:
            assert isinstance(layer, torch.nn.Linear)
            yield layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the graph input's name
        """Logits (samples, classes) of inputs (samples, features)."""
        first, *rest = self.layers
        hidden: torch.Tensor = first(input)
        for layer in rest:
            hidden = layer(torch.relu(hidden))
        return hidden
