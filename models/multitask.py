"""``multitask_sparse`` and ``multitask_dense``: one MLP, 111-1024-512-18, for four data sets.

Each task has its own input and output slots; a sample leaves the other tasks' inputs at 0 and its
loss is taken over its own task's classes only. ``multitask_dense`` is that and AdamW.

``multitask_sparse`` adds a proximal step (soft threshold) after each gradient step. A hidden unit's
*affinity* says which tasks it lies on a path of: the share of its incoming weight that leads
back to each task's inputs, times the share of its outgoing weight that leads on to each task's
outputs, normalized to sum 1. An edge between units of affinity a and b is shrunk by

    learning rate * (l1 + exclusive * (1 - <a, b>)),

so the tasks compete for units (as in an exclusive group lasso over the slots) and an edge pays
for the distance that it spans (as in the locality penalty of brain-inspired modular training,
Liu, Gan and Tegmark 2023, with affinities for positions). ``exclusive`` grows from 0. The penalty
knows the slots, and nothing assigns a hidden unit to a task but its own weights. At the end
the zeros are held and the rest is trained without a penalty (as in the relaxed lasso).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from models.data import load_multitask_data, multitask_slots
from models.mlp import MLP
from onnx_decompose.records.init_recorder import InitRecorder

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = 1e-9
"""Against 0 / 0 in a unit without edges."""


@dataclasses.dataclass(frozen=True, slots=True)
class DenseTraining:
    """Hyperparameters: AdamW, cosine-annealed, a fixed number of samples per task in a batch."""

    seed: int = 0
    hidden: tuple[int, int] = (1024, 512)
    steps: int = 600
    batch: tuple[int, ...] = (64, 32, 24, 24)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class SparseTraining:
    """Hyperparameters: as ``DenseTraining``, then the penalty.

    Attributes:
        l1: shrinkage of every weight, in units of the learning rate.
        exclusive: largest additional shrinkage of an edge between units without a common task.
        free_steps: steps before ``exclusive`` begins to grow, quadratically, until the last step.
        relax_steps: steps without a penalty, zeros held, learning rate linearly to 0.
    """

    seed: int = 0
    hidden: tuple[int, int] = (1024, 512)
    steps: int = 1500
    batch: tuple[int, ...] = (64, 32, 24, 24)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    l1: float = 0.1
    exclusive: float = 4.0
    free_steps: int = 100
    relax_steps: int = 300


def train_dense(training: DenseTraining) -> tuple[MLP, InitRecorder]:
    """The trained model and its initialization."""
    model, recorder, optimizer = _start(training)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for loss in _losses(model, training, training.steps):
        _backward(optimizer, loss)
        optimizer.step()
        schedule.step()
    return model, recorder


def train_sparse(training: SparseTraining) -> tuple[MLP, InitRecorder]:
    """The trained model and its initialization."""
    model, recorder, optimizer = _start(training)
    members = _slot_members()
    losses = _losses(model, training, training.steps + training.relax_steps)
    for step in range(training.steps):
        _backward(optimizer, next(losses))
        optimizer.step()
        ramp = max(0.0, (step - training.free_steps) / training.steps)
        _proximal_step(
            model,
            members,
            l1=training.learning_rate * training.l1,
            exclusive=training.learning_rate * training.exclusive * ramp**2,
        )
    masks = [layer.weight != 0 for layer in model.linear()]
    for step in range(training.relax_steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate * (
            1 - step / training.relax_steps
        )
        _backward(optimizer, next(losses))
        optimizer.step()
        with torch.no_grad():
            for layer, mask in zip(model.linear(), masks, strict=True):
                layer.weight.mul_(mask)
    return model, recorder


def affinities(
    weights: list[torch.Tensor], members: tuple[torch.Tensor, torch.Tensor]
) -> list[torch.Tensor]:
    """Affinity of every layer's units to the tasks.

    Args:
        weights: per layer (outputs, inputs).
        members: 0 or 1, (tasks, inputs) and (tasks, outputs).

    Returns:
        Per layer of units, inputs and outputs included, (tasks, units); a unit's column sums to 1.
    """
    forward, backward = [members[0]], [members[1]]
    for weight in weights[:-1]:
        forward.append(_share(forward[-1], weight))
    for weight in weights[:0:-1]:
        backward.append(_share(backward[-1], weight.T))
    hidden = zip(forward[1:], reversed(backward[1:]), strict=True)
    return [members[0], *(_normalized(a * b + TINY) for a, b in hidden), members[1]]


def _share(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Root mean square weight (units, sources) per task, (tasks, units), normalized.

    The mean is over a task's own sources: without it the task with most inputs would win each unit.
    """
    squared = source**2
    mean = squared @ (weight**2).T / (squared.sum(dim=1, keepdim=True) + TINY)
    return _normalized(mean.sqrt())


def _normalized(shares: torch.Tensor) -> torch.Tensor:
    return shares / (shares.sum(dim=0, keepdim=True) + TINY)


@torch.no_grad()
def _proximal_step(
    model: MLP, members: tuple[torch.Tensor, torch.Tensor], *, l1: float, exclusive: float
) -> None:
    weights = [layer.weight for layer in model.linear()]
    affinity = affinities([weight.detach() for weight in weights], members)
    for weight, source, target in zip(weights, affinity, affinity[1:], strict=False):
        threshold = l1 + exclusive * (1 - target.T @ source)
        weight.copy_(weight.sign() * (weight.abs() - threshold).relu())


def _slot_members() -> tuple[torch.Tensor, torch.Tensor]:
    """Which units are whose: 0 or 1, (tasks, inputs) and (tasks, outputs)."""
    slots = multitask_slots()
    found = []
    for width, parts in zip(slots.shape, (slots.inputs, slots.outputs), strict=True):
        member = torch.zeros(len(parts), width)
        for row, part in zip(member, parts, strict=True):
            row[part] = 1
        found.append(member)
    return found[0], found[1]


def _start(
    training: DenseTraining | SparseTraining,
) -> tuple[MLP, InitRecorder, torch.optim.Optimizer]:
    torch.manual_seed(training.seed)
    features, classes = multitask_slots().shape
    model = MLP((features, *training.hidden, classes))
    recorder = InitRecorder(model, snapshot=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    return model, recorder, optimizer


def _backward(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)


def _losses(
    model: MLP, training: DenseTraining | SparseTraining, steps: int
) -> Iterator[torch.Tensor]:
    """Per step the sum of the tasks' cross entropies on a fresh batch, drawn with replacement."""
    split = load_multitask_data().train
    inputs, labels = torch.from_numpy(split.inputs), torch.from_numpy(split.labels)
    task = torch.from_numpy(split.task)
    outputs = multitask_slots().outputs
    rows = [torch.nonzero(task == number).flatten() for number in range(len(outputs))]
    for _ in range(steps):
        batch = [
            own[torch.randint(len(own), (count,))]
            for own, count in zip(rows, training.batch, strict=True)
        ]
        logits = model(inputs[torch.cat(batch)]).split(training.batch)
        losses = [
            torch.nn.functional.cross_entropy(
                part[:, slot], labels[own], label_smoothing=training.label_smoothing
            )
            for part, slot, own in zip(logits, outputs, batch, strict=True)
        ]
        yield torch.stack(losses).sum()
