"""A recurrent language model on real text: the docstrings of Python's own library, character by character.

    python -m models.docstring_rnn OUTPUT_FOLDER [--cell lstm] [--hidden 256] [--steps 600] [--seed 0]

Embeddings of width 48, one LSTM or GRU, logits from every state; trained as usual, with nothing that would spare units.
Splits and windows are those of ``models.character_training``. Writes ``docstring_lstm.onnx`` or ``docstring_gru.onnx``
(``input_ids`` (batch, 64) to ``logits`` (batch, 64, characters)), its provenance, and windows of the calibration
and the test text as .npz.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from models.character_training import CHARACTERS, train_and_write

__all__ = ["CharacterRNN", "Training"]


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """Hyperparameters: AdamW with a cosine schedule."""

    seed: int = 0
    cell: Literal["lstm", "gru"] = "lstm"
    width: int = 48
    hidden: int = 256
    time: int = 64
    steps: int = 600
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2


class CharacterRNN(nn.Module):
    """Embeddings of characters, states, logits."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        made = {"lstm": nn.LSTM, "gru": nn.GRU}[training.cell]
        self.characters = nn.Embedding(len(CHARACTERS), training.width)
        self.states = made(training.width, training.hidden, batch_first=True)
        self.output = nn.Linear(training.hidden, len(CHARACTERS))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) character numbers to (batch, time, characters) logits."""
        states, _ = self.states(self.characters(input_ids))
        logits: torch.Tensor = self.output(states)
        return logits


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cell", choices=("lstm", "gru"), default=Training().cell)
    parser.add_argument("--hidden", type=int, default=Training().hidden)
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--seed", type=int, default=Training().seed, help="of the training")
    arguments = parser.parse_args()
    training = Training(
        seed=arguments.seed,
        cell=arguments.cell,
        hidden=arguments.hidden,
        steps=arguments.steps,
    )
    train_and_write(
        f"docstring_{training.cell}",
        lambda: CharacterRNN(training),
        training,
        torch.zeros((2, training.time), dtype=torch.int64),
        {0: torch.export.Dim("batch")},
        arguments.folder,
    )


if __name__ == "__main__":
    _main()
