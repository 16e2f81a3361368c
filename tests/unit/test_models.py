"""The reference models' parts: data, metric, structure and the sparse training's penalty."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn import datasets

from models.bag_of_words_metric import accuracy as word_accuracy
from models.bag_of_words_metric import log_likelihood
from models.data import TASKS, load_multitask_data, load_task_data, multitask_slots
from models.docstrings import docstrings
from models.metrics import OUTPUT_SLOTS, accuracy, task_accuracy
from models.provenance import nonzero_structure

if TYPE_CHECKING:
    import torch

MODELS = Path(__file__).parents[2] / "models"


def test_splits_share_no_sample_and_cover_all() -> None:
    data = load_task_data("digits")
    parts = [data.train, data.calibration, data.test]
    assert [len(part.labels) for part in parts] == [1078, 359, 360]
    rows, _ = datasets.load_digits(return_X_y=True)
    found = np.concatenate([part.inputs for part in parts]) * 16
    assert np.array_equal(np.unique(found, axis=0), np.unique(rows, axis=0))


def test_scaling_is_fitted_on_the_training_split_alone() -> None:
    data = load_task_data("wine")
    assert np.allclose(data.train.inputs.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(data.train.inputs.std(axis=0), 1, atol=1e-6)
    assert np.abs(data.test.inputs.mean(axis=0)).max() > 0.01


def test_a_multitask_sample_fills_its_own_slots_only() -> None:
    split, slots = load_multitask_data().test, multitask_slots()
    assert slots.shape == (111, 18)
    for number, own in enumerate(slots.inputs):
        others = np.delete(split.inputs[split.task == number], np.r_[own], axis=1)
        assert not others.any()
    wine = TASKS.index("wine")
    shared = split.inputs[split.task == wine, slots.inputs[wine]]
    assert np.array_equal(shared, load_task_data("wine").test.inputs)


def test_the_metric_knows_the_slots() -> None:
    assert dict(zip(TASKS, multitask_slots().outputs, strict=True)) == OUTPUT_SLOTS


def test_accuracy_is_judged_in_the_own_slots_and_averaged_over_tasks() -> None:
    logits = np.zeros((4, 18))
    logits[:, 17] = 9.0  # class 2 of iris; elsewhere it must not count
    logits[0, 3] = logits[1, 5] = 1.0
    logits[2, 11] = 1.0
    inputs = {"labels": np.array([3, 4, 1, 2]), "task": np.array([0, 0, 1, 3])}
    outputs = {"logits": logits}
    assert task_accuracy(inputs, outputs) == {"digits": 0.5, "breast_cancer": 1.0, "iris": 1.0}
    assert accuracy(inputs, outputs) == pytest.approx(2.5 / 3)
    assert accuracy({"labels": np.array([17, 17, 17, 0])}, outputs) == 0.75


@pytest.mark.parametrize("name", ["digits_mlp", "multitask_sparse", "multitask_dense"])
def test_the_committed_samples_are_the_splits(name: str) -> None:
    data = load_task_data("digits") if name == "digits_mlp" else load_multitask_data()
    for suffix, split in (("calibration", data.calibration), ("inputs", data.test)):
        with np.load(MODELS / f"{name}_{suffix}.npz") as arrays:
            assert np.allclose(arrays["input"], split.inputs, atol=1e-6)
            assert np.array_equal(arrays["labels"], split.labels)
            assert ("task" in arrays) == (name != "digits_mlp")
            assert np.array_equal(arrays.get("task", split.task), split.task)


def test_structure_counts_components_over_all_layers() -> None:
    first, second = np.zeros((3, 4)), np.zeros((4, 2))
    first[0, 1] = first[2, 3] = second[1, 0] = second[3, 1] = 1.0
    found = nonzero_structure([first, second])
    assert found == {
        "nonzero": [2, 2],
        "density": 0.2,
        "components": [[1, 1, 1], [1, 1, 1]],
    }
    second[1, 1] = -1e-30
    assert nonzero_structure([first, second])["components"] == [[2, 2, 2]]


def weights_of(model: torch.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in model.parameters()]


@pytest.mark.torch
def test_affinity_is_one_task_where_paths_are() -> None:
    torch = pytest.importorskip("torch")
    multitask = pytest.importorskip("models.multitask")

    # Two tasks, of two inputs and one output and of one and one; hidden unit 2 is on both's paths.
    members = (
        torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    )
    first = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.3], [1.0, 1.0, 1.0]])
    second = torch.tensor([[0.5, 0.0, 1.0], [0.0, -2.0, 1.0]])
    inputs, hidden, outputs = multitask.affinities([first, second], members)
    assert torch.equal(inputs, members[0])
    assert torch.equal(outputs, members[1])
    expected = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    assert torch.allclose(hidden, expected, atol=1e-4)


@pytest.mark.torch
def test_sparse_training_repeats_itself_and_holds_its_zeros() -> None:
    torch = pytest.importorskip("torch")
    multitask = pytest.importorskip("models.multitask")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        short = multitask.SparseTraining(
            hidden=(24, 16), steps=30, free_steps=2, l1=2.0, relax_steps=0
        )
        penalized, again, relaxed = (
            weights_of(multitask.train_sparse(training)[0])
            for training in (short, short, dataclasses.replace(short, relax_steps=5))
        )
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(a, b) for a, b in zip(penalized, again, strict=True))
    zeros = [weight == 0 for weight in penalized if weight.ndim == 2]
    assert all(zero.any() for zero in zeros)
    assert not all(zero.all() for zero in zeros)
    held = [weight == 0 for weight in relaxed if weight.ndim == 2]
    assert all(np.array_equal(a, b) for a, b in zip(zeros, held, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(penalized, relaxed, strict=True))


def test_labels_are_parts_of_packages_that_have_enough_documents() -> None:
    words = pytest.importorskip("models.bag_of_words")
    files = ["torch/nn/a.py"] * 3 + ["torch/fx/b/c.py"] + ["python/ast.py"] * 2
    assert words.labels_of(files, fewest=2) == ["torch/nn"] * 3 + ["torch"] + ["python"] * 2


def test_a_bag_holds_how_often_words_occur() -> None:
    words = pytest.importorskip("models.bag_of_words")
    found = words.bags(
        ["A graph of Nodes, and a graph.", "nothing"], ["graph", "nodes", "edge"]
    )
    assert np.allclose(found, np.log1p([[2, 1, 0], [0, 0, 0]]))


def test_docstrings_are_read_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    source = '"""What it is."""\nraise SystemExit\ndef f():\n    """Short."""\n'
    (tmp_path / "m.py").write_text(source, encoding="utf-8")
    (tmp_path / "tests" / "t.py").write_text(source, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    assert list(docstrings(tmp_path, shortest=8)) == [("m.py", "What it is.")]


def test_scores_of_words_are_those_of_the_label() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    inputs = {"label": np.array([0, 2])}
    assert word_accuracy(inputs, {"logits": logits}) == 0.5
    expected = (np.log(0.5) + np.log(0.1)) / 2
    assert log_likelihood(inputs, {"logits": logits}) == pytest.approx(expected)


@pytest.mark.torch
def test_a_convolutional_network_is_the_same_every_time() -> None:
    torch = pytest.importorskip("torch")
    digits_cnn = pytest.importorskip("models.digits_cnn")
    training = digits_cnn.Training(width=4, epochs=1)
    x = digits_cnn.pictures(load_task_data("digits").test)
    assert x.shape == (360, 1, 8, 8)
    first, second = (digits_cnn.train(training)(x).detach() for _ in range(2))
    assert first.shape == (360, 10)
    assert torch.equal(first, second)
