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
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from models.character_training import CHARACTERS, train_and_write

__all__ = ["CharacterTransformer", "Training"]


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


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--seed", type=int, default=Training().seed, help="of the training")
    arguments = parser.parse_args()
    training = Training(seed=arguments.seed, steps=arguments.steps)
    train_and_write(
        "docstring_lm",
        lambda: CharacterTransformer(training),
        training,
        torch.zeros((2, 7), dtype=torch.int64),
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=128)},
        arguments.folder,
    )


if __name__ == "__main__":
    _main()
