"""Small trainings that record which weights ever received a gradient.

    python -m tools.evidence_truth.train CACHE [--tasks T,...] [--optimizers O,...] [--seeds S,...]

One file per training, ``CACHE/TASK-OPTIMIZER-SEED.npz``: see ``runs.py`` beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tools.evidence_truth.tasks import TASKS, Task, load_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["OPTIMIZERS", "train"]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    # Coupled decay enters the gradient and so the momentum, which is then nonzero everywhere;
    # untouched entries still shrink by one common factor, because the recurrence is linear.
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    # Coupled decay under Adam is divided by its own root mean square: an untouched entry loses
    # about lr each step whatever its size, so there is no common factor.
    "adam_l2": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "adamw_strong": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=2.0),
}


def build_mlp(widths: tuple[int, ...], seed: int) -> torch.nn.Sequential:
    """Linear layers with torch's default initialization, ReLU between them."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def train(task: Task, optimizer: str, seed: int) -> dict[str, NDArray[Any]]:
    """Train on ``task`` and record every weight's history.

    A shadow of every weight starts from the same values and goes through the same optimizer
    steps with a gradient of zero: what the weight would be had training never touched it,
    rounding included.

    Returns:
        Per layer i, oriented (K inputs, N outputs): ``initial_i``, ``final_i``, ``shadow_i``;
        ``touched_i``, whether a gradient was ever nonzero; ``peak_i``, the largest absolute
        gradient; ``second_moment_i`` (Adam family) or ``momentum_i`` where the optimizer keeps
        one; and ``bias_i`` (N,). Besides them ``facts``, a JSON text.
    """
    network = build_mlp(task.widths, seed)
    linears = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    initial = [layer.weight.detach().clone() for layer in linears]
    peaks = [torch.zeros_like(weight) for weight in initial]
    shadows = [torch.nn.Parameter(weight.clone()) for weight in initial]
    solver = OPTIMIZERS[optimizer]([*network.parameters(), *shadows])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, task.steps)
    inputs, labels = torch.from_numpy(task.train_inputs), torch.from_numpy(task.train_labels)
    allowed = torch.from_numpy(task.train_allowed)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        rows = torch.randint(len(labels), (task.batch,), generator=draws)
        logits = network(inputs[rows]).masked_fill(~allowed[rows], float("-inf"))
        solver.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        for peak, layer in zip(peaks, linears, strict=True):
            assert layer.weight.grad is not None
            torch.maximum(peak, layer.weight.grad.abs(), out=peak)
        for shadow in shadows:
            shadow.grad = torch.zeros_like(shadow)
        solver.step()
        schedule.step()

    arrays: dict[str, NDArray[Any]] = {}
    for i, layer in enumerate(linears):
        state = solver.state[layer.weight]
        recorded = {
            "initial": initial[i],
            "final": layer.weight.detach(),
            "shadow": shadows[i].detach(),
            "peak": peaks[i],
            "touched": peaks[i] > 0,
            "second_moment": state.get("exp_avg_sq"),
            "momentum": state.get("momentum_buffer"),
        }
        for name, values in recorded.items():
            if values is not None:
                arrays[f"{name}_{i}"] = np.ascontiguousarray(values.numpy().T)
        arrays[f"bias_{i}"] = layer.bias.detach().numpy()
    facts = {
        "task": task.name,
        "optimizer": optimizer,
        "seed": seed,
        "test_accuracy": _accuracy(network, task),
    }
    return {**arrays, "facts": np.array(json.dumps(facts))}


def _accuracy(network: torch.nn.Module, task: Task) -> float:
    with torch.no_grad():
        logits = network(torch.from_numpy(task.test_inputs)).numpy()
    predicted = np.where(task.test_allowed, logits, -np.inf).argmax(axis=1)
    return float((predicted == task.test_labels).mean())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.tasks.split(","):
        task = load_task(name)
        print(f"{name}: widths {task.widths}, {len(task.train_labels)} training samples")
        for optimizer in options.optimizers.split(","):
            for seed in map(int, options.seeds.split(",")):
                start = time.perf_counter()
                arrays = train(task, optimizer, seed)
                path = options.cache / f"{name}-{optimizer}-{seed}.npz"
                np.savez(path, **arrays)  # type: ignore[arg-type]
                print(f"{path.stem}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    _main()
