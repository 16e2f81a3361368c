"""Language models of characters, on the docstrings of Python's own library: the text, the training, what it leaves.

The documents are split once, by module, into training (80 %), calibration (10 %) and test (10 %). What text there is
depends on the Python version.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.docstrings import library_docstrings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["CHARACTERS", "Hyperparameters", "docstring_splits", "train_and_write", "windows"]

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPLIT_SEED = 0


class Hyperparameters(Protocol):
    """AdamW with a cosine schedule, on windows of ``time`` characters."""

    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def time(self) -> int: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def batch(self) -> int: ...  # noqa: D102
    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102


def docstring_splits() -> dict[str, NDArray[np.int64]]:
    """The texts of training, calibration and test modules, each one run of character numbers."""
    number = {character: k for k, character in enumerate(CHARACTERS)}
    modules: dict[str, list[str]] = {}
    for module, text in library_docstrings():
        modules.setdefault(module, []).append(text)
    names = sorted(modules)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    cuts = [int(0.8 * len(names)), int(0.9 * len(names))]
    return {
        split: np.array(
            [
                number[character]
                for name in sorted(rows)
                for text in modules[names[name]]
                for character in text + "\n\n"
                if character in number
            ],
            np.int64,
        )
        for split, rows in zip(
            ("train", "calibration", "test"), np.split(order, cuts), strict=True
        )
    }


def windows(text: NDArray[np.int64], length: int, most: int) -> NDArray[np.int64]:
    """Evenly spaced windows of ``text``, (windows, length), that do not overlap."""
    count = min(most, len(text) // length)
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return np.stack([text[start : start + length] for start in starts])


def train(
    make: Callable[[], nn.Module], training: Hyperparameters, text: NDArray[np.int64]
) -> nn.Module:
    """The model that ``make`` gives, trained; (batch, time) character numbers to (batch, time, characters) logits."""
    torch.manual_seed(training.seed)
    model = make()
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
def nats_per_character(model: nn.Module, rows: NDArray[np.int64]) -> float:
    """Mean cross entropy over the windows ``rows``, first characters left out."""
    tokens = torch.from_numpy(rows)
    losses = [
        functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        for part in tokens.split(32)
    ]
    return float(torch.stack(losses).mean())


def train_and_write(
    name: str,
    make: Callable[[], nn.Module],
    training: Hyperparameters,
    example: torch.Tensor,
    dynamic: Mapping[int, Any],
    folder: Path,
) -> None:
    """Train on the text, and write the model, windows of the calibration and the test text, and the provenance.

    Args:
        name: of the files.
        make: the untrained model.
        training: how it is trained.
        example: character numbers to export it with.
        dynamic: axes of the input that are not fixed.
        folder: where to write.
    """
    torch.set_num_threads(1)
    splits = docstring_splits()
    began = time.process_time()
    model = train(make, training, splits["train"])
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
        name,
        training,
        model,
        example,
        "input_ids",
        "logits",
        dynamic,
        {split: {"input_ids": rows} for split, rows in held.items()},
        facts,
        seconds,
    )
    print(write(trained, folder)["nats_per_character"])
