"""The three data sets of the instrumented trainings; all of them ship with a package."""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.data import Split, load_multitask_data, load_task_data, multitask_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

__all__ = ["TASKS", "Task", "load_task", "standard_library_documents"]

LIBRARY_PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)
"""Classes of the text task: packages that every CPython from 3.11 on has."""

TEXT_TRAINING_SHARE = 0.6


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One classification problem in one layout of inputs and outputs.

    Attributes:
        name: ``digits``, ``multitask`` or ``text``.
        widths: units of the MLP's input, hidden layers and output.
        train_inputs: float32 (samples, inputs).
        train_labels: int64 (samples,), an output index.
        train_allowed: bool (samples, outputs): the sample's own output slot, its softmax's range.
        test_inputs: as ``train_inputs``.
        test_labels: as ``train_labels``.
        test_allowed: as ``train_allowed``.
        steps: gradient steps of one training.
        batch: samples of one step.
    """

    name: str
    widths: tuple[int, ...]
    train_inputs: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    train_allowed: NDArray[np.bool_]
    test_inputs: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    test_allowed: NDArray[np.bool_]
    steps: int
    batch: int


def load_task(name: str) -> Task:
    """The task called ``name``."""
    return TASKS[name]()


def _digits() -> Task:
    data = load_task_data("digits")
    return _plain("digits", data.train, data.test, hidden=(128, 64), steps=600)


def _multitask() -> Task:
    data, slots = load_multitask_data(), multitask_slots()
    starts = np.array([outputs.start for outputs in slots.outputs])
    allowed = np.zeros((len(starts), slots.shape[1]), dtype=bool)
    for task, outputs in enumerate(slots.outputs):
        allowed[task, outputs] = True

    def shared(split: Split) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return split.labels + starts[split.task], allowed[split.task]

    return Task(
        "multitask",
        (slots.shape[0], 128, 64, slots.shape[1]),
        data.train.inputs,
        *shared(data.train),
        data.test.inputs,
        *shared(data.test),
        steps=800,
        batch=64,
    )


def _text() -> Task:
    documents = list(standard_library_documents())
    counts = collections.Counter(word for _, words in documents for word in set(words))
    # Words of a single document teach nothing; the vocabulary comes from all the text, so that some of it is
    # never seen in training, as the rare tokens of a language model's vocabulary are.
    vocabulary = {
        word: k for k, word in enumerate(sorted(w for w, c in counts.items() if c >= 2))
    }
    inputs = np.zeros((len(documents), len(vocabulary)), np.float32)
    labels = np.array([LIBRARY_PACKAGES.index(package) for package, _ in documents])
    for row, (_, words) in zip(inputs, documents, strict=True):
        row[[vocabulary[word] for word in words if word in vocabulary]] = 1
    order = np.random.default_rng(0).permutation(len(documents))
    cut = int(TEXT_TRAINING_SHARE * len(documents))
    train, test = (
        Split(inputs[rows], labels[rows], np.zeros(len(rows), np.int64))
        for rows in (order[:cut], order[cut:])
    )
    return _plain("text", train, test, hidden=(64,), steps=400)


def _plain(
    name: str, train: Split, test: Split, *, hidden: tuple[int, ...], steps: int
) -> Task:
    classes = int(train.labels.max()) + 1

    def everywhere(split: Split) -> NDArray[np.bool_]:
        return np.ones((len(split.labels), classes), dtype=bool)

    return Task(
        name,
        (train.inputs.shape[1], *hidden, classes),
        train.inputs,
        train.labels,
        everywhere(train),
        test.inputs,
        test.labels,
        everywhere(test),
        steps=steps,
        batch=64,
    )


def standard_library_documents() -> Iterator[tuple[str, list[str]]]:
    """(package, words) of every docstring in ``LIBRARY_PACKAGES``, in a fixed order.

    The sources are parsed, never imported. Which documents there are depends on the Python
    version.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in LIBRARY_PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            if "test" in path.relative_to(library / package).parts:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                text = _docstring(node)
                words = re.findall(r"[a-z]{3,}", text.lower())
                if len(words) >= 5:
                    yield package, words


def _docstring(node: ast.AST) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""


TASKS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "multitask": _multitask,
    "text": _text,
}
