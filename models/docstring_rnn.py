"""A recurrent language model on real text: the docstrings of Python's own library, character by character.

    python -m models.docstring_rnn OUTPUT_FOLDER [--cell lstm] [--hidden 256] [--steps 600] [--seed 0]

Embeddings of width 48, one LSTM or GRU, logits from every state; trained as usual, with nothing that would spare units.
Splits and windows are those of ``models.docstring_lm``. Writes ``docstring_lstm.onnx`` or ``docstring_gru.onnx``
(``input_ids`` (batch, 64) to ``logits`` (batch, 64, characters)), its provenance, and windows of the calibration
and the test text as .npz.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.docstring_lm import CHARACTERS, SPLIT_SEED, docstring_splits, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CharacterRNN", "Training", "train"]


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


def train(training: Training, text: NDArray[np.int64]) -> CharacterRNN:
    """The trained model."""
    torch.manual_seed(training.seed)
    model = CharacterRNN(training)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps
    )
    tokens = torch.from_numpy(text)
    offsets = torch.arange(training.time + 1)
    for step in range(training.steps):
        starts = torch.randint(len(tokens) - training.time - 1, (training.batch, 1))
        rows = tokens[starts + offsets]
        loss = functional.cross_entropy(
            model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} nats per character", flush=True)
    return model.eval()


@torch.no_grad()
def nats_per_character(model: CharacterRNN, rows: NDArray[np.int64]) -> float:
    """Mean cross entropy over the windows ``rows``, first characters left out."""
    tokens = torch.from_numpy(rows)
    losses = [
        functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        for part in tokens.split(32)
    ]
    return float(torch.stack(losses).mean())


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
    torch.set_num_threads(1)
    splits = docstring_splits()
    began = time.process_time()
    model = train(training, splits["train"])
    seconds = time.process_time() - began
    held = {
        split: windows(splits[split], training.time, 512) for split in ("calibration", "test")
    }
    facts = {
        "data": {
            "characters": {split: len(text) for split, text in splits.items()},
            "windows": {split: len(rows) for split, rows in held.items()},
            "split_seed": SPLIT_SEED,
        },
        "nats_per_character": {
            split: round(nats_per_character(model, rows), 4) for split, rows in held.items()
        },
    }
    trained = Trained(
        f"docstring_{training.cell}",
        training,
        model,
        torch.zeros((2, training.time), dtype=torch.int64),
        "input_ids",
        "logits",
        {0: torch.export.Dim("batch")},
        {split: {"input_ids": rows} for split, rows in held.items()},
        facts,
        seconds,
    )
    print(write(trained, arguments.folder)["nats_per_character"])


if __name__ == "__main__":
    _main()
