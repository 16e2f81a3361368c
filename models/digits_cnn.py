"""``digits_cnn``: a convolutional network for 8 x 8 digits, with a residual block, densely trained.

    python -m models.digits_cnn OUTPUT_FOLDER [--epochs 40] [--width 64] [--seed 0]

Four 3 x 3 convolutions with batch normalization and ReLU and a linear layer: 1 to 64 channels at 8 x 8; 64 to 128, with
stride 2; a residual block of 128 to 128 to 128 at 4 x 4; 10 classes from all of its 2,048 values. AdamW, no penalty.
Inputs are ``models.data``'s digits as pictures, (samples, 1, 8, 8).

Writes ``digits_cnn.onnx`` (``input`` to ``logits``), its provenance, and the calibration and test samples with
``labels``; ``models.metrics:accuracy`` and ``task_likelihood`` judge them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.data import SPLIT_SEED, load_task_data
from models.metrics import accuracy

if TYPE_CHECKING:
    from models.data import Split

__all__ = ["DigitsCNN", "Training"]


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """Hyperparameters: AdamW with a cosine schedule."""

    seed: int = 0
    width: int = 64
    epochs: int = 40
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1


class DigitsCNN(nn.Module):
    """Convolutions, the last two around a skip connection, then a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.enter = _normalized(1, width, 1)
        self.shrink = _normalized(width, wide, 2)
        self.expand = _normalized(wide, wide, 1)
        self.contract = _normalized(wide, wide, 1)
        self.leave = nn.Linear(wide * 16, 10)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the graph input's name
        """(samples, 1, 8, 8) to (samples, 10)."""
        x = functional.relu(self.enter(input))
        x = functional.relu(self.shrink(x))
        x = functional.relu(x + self.contract(functional.relu(self.expand(x))))
        result: torch.Tensor = self.leave(x.flatten(1))
        return result


def _normalized(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution whose outputs are normalized."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def pictures(split: Split) -> torch.Tensor:
    """(samples, 1, 8, 8)."""
    return torch.from_numpy(split.inputs).reshape(-1, 1, 8, 8)


def train(training: Training) -> DigitsCNN:
    """The trained model."""
    torch.manual_seed(training.seed)
    split = load_task_data("digits").train
    inputs, labels = pictures(split), torch.from_numpy(split.labels)
    batches = len(labels) // training.batch
    model = DigitsCNN(training.width)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * batches)
    for _ in range(training.epochs):
        order = torch.randperm(len(labels))
        for rows in order[: batches * training.batch].split(training.batch):
            loss = functional.cross_entropy(
                model(inputs[rows]), labels[rows], label_smoothing=training.label_smoothing
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=Training().epochs)
    parser.add_argument("--width", type=int, default=Training().width)
    parser.add_argument("--seed", type=int, default=Training().seed)
    arguments = parser.parse_args()
    training = Training(arguments.seed, arguments.width, arguments.epochs)
    torch.set_num_threads(1)  # the order of summation, and so the weights, depend on it
    torch.use_deterministic_algorithms(mode=True)
    began = time.process_time()
    model = train(training)
    seconds = time.process_time() - began
    data = load_task_data("digits")
    held = {
        name: {"input": pictures(split).numpy(), "labels": split.labels}
        for name, split in (("calibration", data.calibration), ("test", data.test))
    }
    scores = {}
    for name, arrays in held.items():
        with torch.no_grad():
            logits = model(torch.from_numpy(arrays["input"])).numpy()
        scores[name] = round(accuracy(arrays, {"logits": logits}), 4)
    facts = {
        "data": {
            "sets": ["sklearn.datasets.load_digits"],
            "samples": {
                part.name: len(getattr(data, part.name).labels)
                for part in dataclasses.fields(data)
            },
            "split_seed": SPLIT_SEED,
        },
        "scores": scores,
    }
    trained = Trained(
        "digits_cnn",
        training,
        model,
        torch.from_numpy(held["test"]["input"][:2]),
        "input",
        "logits",
        {0: torch.export.Dim("batch")},
        held,
        facts,
        seconds,
    )
    print(write(trained, arguments.folder)["scores"])


if __name__ == "__main__":
    _main()
