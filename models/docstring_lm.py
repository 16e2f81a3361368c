"""A small causal transformer on real text: the docstrings of Python's own library, character by character.

    python -m models.docstring_lm OUTPUT_FOLDER [--steps 1000] [--seed 0]

Pre-norm blocks with LayerNorm, biases and a GELU feed-forward: 4 blocks of width 128, 512 hidden units each. The
documents are split once, by module, into training (80 %), calibration (10 %) and test (10 %). Writes
``docstring_lm.onnx`` (``input_ids`` (batch, time) to ``logits`` (batch, time, characters)), its provenance, and
windows of the calibration and the test text as .npz. What text there is depends on the Python version.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.docstrings import library_docstrings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "CharacterTransformer",
    "Training",
    "docstring_splits",
    "windows",
]

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """Hyperparameters: AdamW with a cosine schedule."""

    seed: int = 0
    width: int = 128
    hidden: int = 512
    blocks: int = 4
    heads: int = 4
    time: int = 128
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2


class Block(nn.Module):
    """Causal self-attention and feed-forward, each on the normalized residual stream."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        width = training.width
        self.heads = training.heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.expand = nn.Linear(width, training.hidden)
        self.contract = nn.Linear(training.hidden, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` (batch, time, width); ``mask`` (time, time)."""
        batch, steps, width = x.shape
        split = (batch, steps, self.heads, width // self.heads)
        normed = self.attention_norm(x)
        query, key, value = (
            project(normed).reshape(split).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(split[-1]) + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, steps, width)
        x = x + self.mix(mixed)
        result: torch.Tensor = x + self.contract(
            functional.gelu(self.expand(self.feed_norm(x)))
        )
        return result


class CharacterTransformer(nn.Module):
    """Embeddings of characters and positions, blocks, a norm, logits."""

    mask: torch.Tensor

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), training.width)
        self.places = nn.Embedding(training.time, training.width)
        self.blocks = nn.ModuleList(Block(training) for _ in range(training.blocks))
        self.norm = nn.LayerNorm(training.width)
        self.output = nn.Linear(training.width, len(CHARACTERS))
        ahead = torch.full((training.time, training.time), -math.inf).triu(1)
        self.register_buffer("mask", ahead, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) character numbers to (batch, time, characters) logits."""
        steps = input_ids.shape[1]
        x = self.characters(input_ids) + self.places.weight[:steps]
        for block in self.blocks:
            x = block(x, self.mask[:steps, :steps])
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


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


def train(training: Training, text: NDArray[np.int64]) -> CharacterTransformer:
    """The trained model."""
    torch.manual_seed(training.seed)
    model = CharacterTransformer(training)
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
def nats_per_character(model: CharacterTransformer, rows: NDArray[np.int64]) -> float:
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
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--seed", type=int, default=Training().seed, help="of the training")
    arguments = parser.parse_args()
    training = Training(seed=arguments.seed, steps=arguments.steps)
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
        "docstring_lm",
        training,
        model,
        torch.zeros((2, 7), dtype=torch.int64),
        "input_ids",
        "logits",
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=128)},
        {split: {"input_ids": rows} for split, rows in held.items()},
        facts,
        seconds,
    )
    print(write(trained, arguments.folder)["nats_per_character"])


if __name__ == "__main__":
    _main()
