"""``digits_mlp``: 64 pixels, two hidden layers of 512, 10 classes.

Some border pixels are blank in every training image, so no gradient from the data ever reaches
their weights. The initialization is small and the penalty (L1, as a term of the loss) starts
once the network has begun to learn: what the data supports grows far beyond the initialization's
scale, everything else shrinks below it, though hardly ever to an exact zero.
"""

from __future__ import annotations

import dataclasses

import torch

from models.data import load_task_data
from models.mlp import MLP
from onnx_decompose.records.init_recorder import InitRecorder


@dataclasses.dataclass(frozen=True, slots=True)
class DigitsTraining:
    """Hyperparameters: SGD with momentum, cosine-annealed.

    Attributes:
        l1: weight of the sum of |w|, reached ``ramp_epochs`` after ``free_epochs`` without it.
    """

    seed: int = 0
    hidden: tuple[int, int] = (512, 512)
    init_std: float = 2e-3
    epochs: int = 300
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    l1: float = 5e-4
    free_epochs: int = 50
    ramp_epochs: int = 100


def train(training: DigitsTraining) -> tuple[MLP, InitRecorder]:
    """The trained model and its initialization."""
    torch.manual_seed(training.seed)
    model = MLP((64, *training.hidden, 10), training.init_std)
    recorder = InitRecorder(model, snapshot=True)
    split = load_task_data("digits").train
    inputs, labels = torch.from_numpy(split.inputs), torch.from_numpy(split.labels)
    batches = len(labels) // training.batch
    optimizer = torch.optim.SGD(
        model.parameters(), lr=training.learning_rate, momentum=training.momentum
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs * batches)
    for epoch in range(training.epochs):
        ramp = (epoch - training.free_epochs) / training.ramp_epochs
        l1 = training.l1 * min(1.0, max(0.0, ramp))
        order = torch.randperm(len(labels))
        for rows in order[: batches * training.batch].split(training.batch):
            size = torch.stack([layer.weight.abs().sum() for layer in model.linear()]).sum()
            loss = torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss + l1 * size)
            optimizer.step()
            schedule.step()
    return model, recorder
