"""``grouped_residual``: one residual network for eight groups of inputs of unequal size, densely trained.

    python -m models.grouped_residual OUTPUT_FOLDER [--steps 1500] [--width 128] [--hidden 256]

The four classification sets of ``models.data``, scikit-learn's diabetes and its three Friedman functions (generated)
have their own inputs (64, 30, 13, 4, 10, 10, 4 and 4) and outputs (10, 2, 3, 3 and one each for the regressions). A
sample leaves the inputs of others at 0. All share a trunk of 128 units: a linear layer in, three blocks
x + W2 gelu(W1 x) with 256 hidden units each, a linear layer out. AdamW, no penalty: nothing knows the groups but the
loss, which looks at a sample's own outputs alone.

Writes ``grouped_residual.onnx`` (``input`` to ``output``), its provenance, and the calibration and test samples with
``target`` and ``task``; ``models.grouped_residual_metric:score`` judges them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.data import TASKS, load_task_data
from models.grouped_residual_metric import OUTPUT_SLOTS, task_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32]]

__all__ = ["Grouped", "Training", "grouped_splits"]

SPLIT_SEED = 0
GENERATED = 1200
"""Samples of each Friedman function."""


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """Hyperparameters: AdamW with a cosine schedule; every batch holds as many samples of each task."""

    seed: int = 0
    width: int = 128
    hidden: int = 256
    blocks: int = 3
    steps: int = 1500
    batch: int = 24
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


class Block(nn.Module):
    """x + W2 gelu(W1 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(samples, width) to the same."""
        result: torch.Tensor = x + self.contract(functional.gelu(self.expand(x)))
        return result


class Grouped(nn.Module):
    """The trunk between two linear layers."""

    def __init__(self, training: Training, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, training.width)
        self.blocks = nn.ModuleList(
            Block(training.width, training.hidden) for _ in range(training.blocks)
        )
        self.leave = nn.Linear(training.width, outputs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the graph input's name
        """(samples, features) to (samples, outputs)."""
        x = self.enter(input)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.leave(x)
        return result


def grouped_splits() -> dict[str, Arrays]:
    """``train``, ``calibration`` and ``test``: ``input``, ``target`` (samples, outputs; NaN elsewhere) and ``task``."""
    tasks = [_classes(name) for name in TASKS]
    tasks += [_values(*arrays) for arrays in _regressions()]
    borders = np.cumsum([0, *(task["train"][0].shape[1] for task in tasks)]).tolist()
    slots = list(OUTPUT_SLOTS.values())
    found: dict[str, Arrays] = {}
    for split in ("train", "calibration", "test"):
        inputs, targets, numbers = [], [], []
        for number, task in enumerate(tasks):
            features, values = task[split]
            wide = np.zeros((len(features), borders[-1]), np.float32)
            wide[:, borders[number] : borders[number + 1]] = features
            target = np.full((len(features), slots[-1].stop), np.nan, np.float32)
            target[:, slots[number]] = values
            inputs.append(wide)
            targets.append(target)
            numbers.append(np.full(len(features), number))
        found[split] = {
            "input": np.concatenate(inputs),
            "target": np.concatenate(targets),
            "task": np.concatenate(numbers),
        }
    return found


def _classes(name: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    data = load_task_data(name)
    count = int(data.train.labels.max()) + 1
    return {
        split: (part.inputs, np.eye(count, dtype=np.float32)[part.labels])
        for split, part in (
            ("train", data.train),
            ("calibration", data.calibration),
            ("test", data.test),
        )
    }


def _regressions() -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    makers = (datasets.make_friedman1, datasets.make_friedman2, datasets.make_friedman3)
    found: list[Any] = [datasets.load_diabetes(return_X_y=True)]
    found += [
        maker(n_samples=GENERATED, noise=0.05, random_state=number)
        for number, maker in enumerate(makers)
    ]
    return found


def _values(
    features: NDArray[np.float64], values: NDArray[np.float64]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(values))
    parts = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    train = parts[0]
    features = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    values = (values - values[train].mean()) / values[train].std()
    return {
        split: (features[rows].astype(np.float32), values[rows, None].astype(np.float32))
        for split, rows in zip(("train", "calibration", "test"), parts, strict=True)
    }


def train(training: Training, data: Arrays) -> Grouped:
    """The trained model."""
    torch.manual_seed(training.seed)
    inputs, targets = torch.from_numpy(data["input"]), torch.from_numpy(data["target"])
    model = Grouped(training, inputs.shape[1], targets.shape[1])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    rows = [
        torch.from_numpy(np.flatnonzero(data["task"] == number))
        for number in range(len(OUTPUT_SLOTS))
    ]
    for _ in range(training.steps):
        batch = [own[torch.randint(len(own), (training.batch,))] for own in rows]
        outputs = model(inputs[torch.cat(batch)]).split(training.batch)
        losses = [
            _loss(part[:, slot], targets[own][:, slot])
            for part, slot, own in zip(outputs, OUTPUT_SLOTS.values(), batch, strict=True)
        ]
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        schedule.step()
    return model.eval()


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.shape[1] == 1:
        return functional.mse_loss(outputs, targets)
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--width", type=int, default=Training().width)
    parser.add_argument("--hidden", type=int, default=Training().hidden)
    arguments = parser.parse_args()
    training = Training(width=arguments.width, hidden=arguments.hidden, steps=arguments.steps)
    torch.set_num_threads(1)
    splits = grouped_splits()
    began = time.process_time()
    model = train(training, splits["train"])
    seconds = time.process_time() - began
    held: dict[str, Arrays] = {}
    scores = {}
    for split in ("calibration", "test"):
        # Other tasks' targets are no one's: 0 in the file, which holds no NaN.
        target = np.nan_to_num(splits[split]["target"])
        held[split] = {**splits[split], "target": target}
        with torch.no_grad():
            made = model(torch.from_numpy(held[split]["input"])).numpy()
        found = task_scores(held[split], {"output": made})
        scores[split] = {name: round(value, 4) for name, value in found.items()}
    slots = itertools.pairwise(
        [0, *np.cumsum([s.stop - s.start for s in OUTPUT_SLOTS.values()]).tolist()]
    )
    facts = {
        "data": {
            "samples": {name: len(part["task"]) for name, part in splits.items()},
            "outputs": dict(zip(OUTPUT_SLOTS, slots, strict=True)),
            "split_seed": SPLIT_SEED,
        },
        "scores": scores,
    }
    trained = Trained(
        "grouped_residual",
        training,
        model,
        torch.from_numpy(splits["test"]["input"][:2]),
        "input",
        "output",
        {0: torch.export.Dim("batch")},
        held,
        facts,
        seconds,
    )
    print(write(trained, arguments.folder)["scores"])


if __name__ == "__main__":
    _main()
