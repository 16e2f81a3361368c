"""``bag_of_words``: which part of which package a docstring is from, by the words in it.

    python -m models.bag_of_words OUTPUT_FOLDER [--words 3000]

The docstrings of Python's library and of the packages that training needs anyway, of 80 characters or more. A label is
a package, or a part of it (``torch/nn``) that has 150 documents or more. Documents are split once, by file, into
training (60 %), calibration (30 %) and test (10 %). The input has log(1 + how often) of each of the most frequent words
of the training documents, 0 for a word that is not there. Three linear layers with ReLU and biases, AdamW, no
penalty. Writes ``bag_of_words.onnx`` (``words`` to ``logits``), its provenance, and the calibration and test documents
with their ``label``; ``models.bag_of_words_metric`` judges them. What text there is depends on Python and on the
packages.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.artifacts import Trained, write
from models.bag_of_words_metric import accuracy, log_likelihood
from models.docstrings import library_docstrings, package_docstrings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Documents = list[tuple[str, str]]

__all__ = ["Training", "bags", "label_of", "labels_of", "word_splits"]

PACKAGES = (
    "torch",
    "sympy",
    "scipy",
    "sklearn",
    "networkx",
    "numpy",
    "onnxscript",
    "onnxruntime",
    "mypy",
    "hypothesis",
)
SPLIT_SEED = 0
SHORTEST = 80
"""Characters of the shortest document that is used."""
FEWEST = 150
"""Documents of a part of a package that is a label of its own."""
_WORD = re.compile(r"[a-z]{2,}")


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """Hyperparameters: AdamW with a cosine schedule."""

    seed: int = 0
    words: int = 3000
    widths: tuple[int, ...] = (512, 256)
    epochs: int = 3
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


def label_of(file: str) -> str:
    """The package and the first folder in it, ``torch/nn`` of ``torch/nn/modules/linear.py``."""
    return "/".join(file.split("/")[:-1][:2]) or "python"


def labels_of(files: Sequence[str], fewest: int = FEWEST) -> list[str]:
    """The label of each document: its part of the package, or the package where the part has too few."""
    count = collections.Counter(map(label_of, files))
    return [
        label if count[label] >= fewest else label.split("/")[0]
        for label in map(label_of, files)
    ]


def bags(texts: Iterable[str], words: Sequence[str]) -> NDArray[np.float32]:
    """(documents, words) log(1 + how often) each word occurs."""
    number = {word: k for k, word in enumerate(words)}
    rows = []
    for text in texts:
        row = np.zeros(len(words), np.float32)
        for word, count in collections.Counter(_WORD.findall(text.lower())).items():
            if word in number:
                row[number[word]] = np.log1p(count)
        rows.append(row)
    return np.stack(rows)


def word_splits(
    training: Training,
) -> tuple[dict[str, dict[str, NDArray[Any]]], list[str]]:
    """``train``, ``calibration`` and ``test``: ``words`` (documents, words) and ``label``; and the labels' names."""
    documents: Documents = [
        (f"python/{file}", text) for file, text in library_docstrings(SHORTEST)
    ]
    for package in PACKAGES:
        documents += package_docstrings(package, SHORTEST)
    labels = labels_of([file for file, _ in documents])
    count = collections.Counter(labels)
    names = sorted(label for label in count if count[label] >= FEWEST)
    kept = [k for k, label in enumerate(labels) if label in names]
    files = sorted({documents[k][0] for k in kept})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(files))
    borders = [int(0.6 * len(files)), int(0.9 * len(files))]
    parts = np.split(order, borders)
    split_of = {
        files[row]: split
        for split, rows in zip(("train", "calibration", "test"), parts, strict=True)
        for row in rows
    }
    texts: dict[str, list[int]] = {"train": [], "calibration": [], "test": []}
    for k in kept:
        texts[split_of[documents[k][0]]].append(k)
    used = collections.Counter(
        word for k in texts["train"] for word in set(_WORD.findall(documents[k][1].lower()))
    )
    words = sorted(used, key=lambda word: (-used[word], word))[: training.words]
    return {
        split: {
            "words": bags([documents[k][1] for k in rows], words),
            "label": np.array([names.index(labels[k]) for k in rows]),
        }
        for split, rows in texts.items()
    }, names


def train(
    training: Training, words: NDArray[np.float32], labels: NDArray[np.int64]
) -> nn.Sequential:
    """The trained model."""
    torch.manual_seed(training.seed)
    widths = (words.shape[1], *training.widths, int(labels.max()) + 1)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    steps = training.epochs * (len(words) // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    inputs, targets = torch.from_numpy(words), torch.from_numpy(labels)
    for _ in range(training.epochs):
        order = torch.randperm(len(inputs))[: len(inputs) // training.batch * training.batch]
        for rows in order.split(training.batch):
            loss = functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            if schedule.last_epoch % 100 == 0:
                print(f"step {schedule.last_epoch}: {loss.item():.3f} nats", flush=True)
    return model.eval()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--words", type=int, default=Training().words)
    arguments = parser.parse_args()
    training = Training(words=arguments.words)
    torch.set_num_threads(1)
    splits, names = word_splits(training)
    began = time.process_time()
    model = train(training, splits["train"]["words"], splits["train"]["label"])
    seconds = time.process_time() - began
    held = {split: splits[split] for split in ("calibration", "test")}
    scores = {}
    for split, arrays in held.items():
        with torch.no_grad():
            made = {"logits": model(torch.from_numpy(arrays["words"])).numpy()}
        scores[split] = {
            "accuracy": round(accuracy(arrays, made), 4),
            "log_likelihood": round(log_likelihood(arrays, made), 4),
        }
    facts = {
        "data": {
            "documents": {split: len(arrays["label"]) for split, arrays in splits.items()},
            "labels": names,
            "split_seed": SPLIT_SEED,
        },
        "scores": scores,
    }
    trained = Trained(
        "bag_of_words",
        training,
        model,
        torch.from_numpy(splits["test"]["words"][:2]),
        "words",
        "logits",
        {0: torch.export.Dim("batch")},
        held,
        facts,
        seconds,
    )
    print(write(trained, arguments.folder)["scores"])


if __name__ == "__main__":
    _main()
