"""The scripts behind docs/evidence.md, on tiny versions of what they run on."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from onnx_decompose.analysis.record import Prior  # noqa: E402
from tools.corpus_evidence import float_weights, live_widths, relative_error  # noqa: E402
from tools.evidence_truth.accuracy import Network, kept_by, measure_accuracy  # noqa: E402
from tools.evidence_truth.decay_factor import (  # noqa: E402
    false_edges,
    rows_with_stated_factor,
    true_factor,
)
from tools.evidence_truth.null_share import storey  # noqa: E402
from tools.evidence_truth.runs import Layer, Run, load_runs, run_of  # noqa: E402
from tools.evidence_truth.score import Source, tally_entries, tally_rows  # noqa: E402
from tools.evidence_truth.tasks import (  # noqa: E402
    LIBRARY_PACKAGES,
    Task,
    load_task,
    standard_library_documents,
)
from tools.evidence_truth.train import OPTIMIZERS, train  # noqa: E402
from tools.stories15m import (  # noqa: E402
    Shape,
    initial_weights,
    read_checkpoint,
    trained_model,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.torch

DEAD_INPUTS = (1, 4)
PROVEN = {"sgd", "sgd_momentum", "adam", "adamw", "adamw_strong"}
"""Optimizers whose state is exactly zero for an untouched entry (plain SGD has no state)."""


@pytest.fixture(scope="module")
def task() -> Task:
    """Two classes by the sign of the first of six inputs; two inputs are always zero."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((80, 6)).astype(np.float32)
    inputs[:, list(DEAD_INPUTS)] = 0
    labels = (inputs[:, 0] > 0).astype(np.int64)
    allowed = np.ones((80, 2), dtype=bool)
    return Task("tiny", (6, 8, 2), inputs, labels, allowed, inputs, labels, allowed, 30, 16)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_training_records_which_entries_got_a_gradient(task: Task, optimizer: str) -> None:
    arrays = train(task, optimizer, seed=0)
    layer = run_of(arrays).layers[0]
    dead = np.zeros(6, dtype=bool)
    dead[list(DEAD_INPUTS)] = True
    np.testing.assert_array_equal(~layer.touched.any(axis=1), dead)
    # The shadow is what the optimizer makes of an entry without a gradient, to the last bit.
    np.testing.assert_array_equal(layer.final[~layer.touched], layer.shadow[~layer.touched])
    assert np.all(layer.final[layer.touched] != layer.shadow[layer.touched])
    assert np.all((layer.peak > 0) == layer.touched)
    if optimizer in PROVEN and layer.state is not None:
        np.testing.assert_array_equal(layer.state == 0, ~layer.touched)
    if optimizer in {"sgd_decay", "adamw", "adamw_strong"}:
        factor = layer.shadow / layer.initial
        assert np.ptp(factor) < 1e-5 * factor.mean()
        assert factor.mean() < 1


def test_coupled_decay_under_adam_leaves_no_common_factor(task: Task) -> None:
    layer = run_of(train(task, "adam_l2", seed=0)).layers[0]
    factor = layer.shadow / layer.initial
    assert np.ptp(factor) > 0.05


def test_trainings_are_deterministic_and_read_back(task: Task, tmp_path: Path) -> None:
    first, second = (train(task, "sgd_momentum", seed=3) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    saved: Any = first
    np.savez(tmp_path / "tiny-sgd_momentum-3.npz", **saved)
    (run,) = load_runs(tmp_path, "tiny-*")
    assert (run.task, run.optimizer, run.seed, len(run.layers)) == (
        "tiny",
        "sgd_momentum",
        3,
        2,
    )
    np.testing.assert_array_equal(run.layers[1].final, first["final_1"])
    assert run.test_accuracy > 0.5


def hand_made_layer() -> Layer:
    """300 x 40: rows 0-29 untouched, row 30 touched but unmoved, the others moved."""
    rng = np.random.default_rng(1)
    initial = rng.uniform(-0.1, 0.1, (300, 40)).astype(np.float32)
    touched = np.ones(initial.shape, dtype=bool)
    touched[:30] = False
    final = initial.copy()
    final[31:] += rng.uniform(0.05, 0.1, final[31:].shape).astype(np.float32)
    state = touched.astype(np.float32)
    bias = np.zeros(40, np.float32)
    return Layer(0, initial, final, initial, touched, state, state, bias)


def test_tallies_count_what_they_say() -> None:
    run = Run("tiny", "adam", 0, 1.0, (hand_made_layer(),))
    snapshot, optimizer = Source("snapshot", "fdr"), Source("optimizer", "fdr")
    entries = tally_entries([run], [snapshot, optimizer, Source("zero", None)])
    moved = entries[snapshot.name]
    assert (moved.untouched, moved.called, moved.both) == (1200, 1240, 1200)
    assert (moved.unmoved, moved.farthest) == (40, 0.0)
    assert moved.precision == pytest.approx(1200 / 1240)
    assert moved.recall == 1
    assert moved.false_edges == 0
    assert entries[Source("zero", None).name].false_edges > 0.05
    assert entries[optimizer.name].precision == 1
    smallest = entries[Source("zero", None).name]
    assert smallest.called == 1200
    assert smallest.precision < 0.5
    rows = tally_rows([run], [snapshot, optimizer])
    assert (rows[snapshot.name].called, rows[snapshot.name].both) == (31, 30)
    assert rows[optimizer.name].recall == 1


def test_storey_is_the_share_of_large_p_values_doubled() -> None:
    assert storey(np.array([0.1, 0.2, 0.9, 0.3])) == 0.5
    assert storey(np.array([0.9, 0.8])) == 1


def test_equal_sparsity_and_accuracy() -> None:
    weight = np.array([[1.0, 0.2], [0.1, 2.0]], np.float32)
    inputs = np.eye(2, dtype=np.float32)
    network = Network(
        "hand",
        (weight,),
        (np.zeros(2, np.float32),),
        (Prior(2, 2),),
        inputs,
        np.array([0, 1]),
        np.ones((2, 2), dtype=bool),
    )
    assert measure_accuracy(network) == 1
    masks = kept_by([np.abs(weight)], 0.5)
    np.testing.assert_array_equal(masks[0], [[True, False], [False, True]])
    assert measure_accuracy(network, masks) == 1
    assert measure_accuracy(network, [~masks[0]]) == 0


def test_text_has_words_that_training_never_sees() -> None:
    text = load_task("text")
    seen = text.train_inputs.any(axis=0)
    assert 20 < np.count_nonzero(~seen) < 0.2 * seen.size
    assert text.test_inputs[:, ~seen].any()
    assert set(np.unique(text.train_labels)) == set(range(len(LIBRARY_PACKAGES)))
    first = next(standard_library_documents())
    assert first[0] == LIBRARY_PACKAGES[0]


def test_live_widths_follow_the_cascade() -> None:
    first = np.array([[True, True, False], [False, False, False]])
    second = np.array([[True, False], [False, False], [True, True]])
    # Input 1 feeds nothing, unit 1 is read by nobody, unit 2 hears nothing, output 1 only unit 2.
    assert live_widths([first, second]) == [1, 1, 1]


def quantized_model(path: Path) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 255, (70, 9), dtype=np.uint8)
    weight = rng.standard_normal((9, 64)).astype(np.float32)
    constants = {
        "q": stored,
        "scale": np.float32(0.5),
        "zero": np.uint8(7),
        "w": weight,
    }
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("MatMul", ["x", "d"], ["h"]),
            helper.make_node("MatMul", ["h", "w"], ["y"]),
        ],
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 70])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return np.asarray(0.5 * (stored.astype(np.float32) - 7), np.float32)


def test_weights_come_out_of_a_quantized_model(tmp_path: Path) -> None:
    expected = quantized_model(tmp_path / "m.onnx")
    weights = dict(float_weights(tmp_path / "m.onnx"))
    assert set(weights) == {"d", "w"}
    np.testing.assert_array_equal(weights["d"], expected)


def test_removal_changes_the_output_by_what_was_removed(tmp_path: Path) -> None:
    quantized_model(tmp_path / "m.onnx")
    everything = {"y": np.ones((9, 64), dtype=bool)}
    assert relative_error(tmp_path / "m.onnx", everything) == 0
    assert relative_error(tmp_path / "m.onnx", {"y": ~everything["y"]}) == 1


TINY = Shape(width=8, hidden=12, layers=2, heads=2, key_heads=2, vocabulary=400, positions=16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the tiny shape, written field by field as llama2.c does."""
    fields = [TINY.width, TINY.hidden, TINY.layers, TINY.heads, TINY.key_heads]
    weights = initial_weights(TINY)
    order = ["attention_norm", *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo"))]
    order += ["ffn_norm", *(f"feed_forward.{w}" for w in ("w1", "w2", "w3"))]
    with (tmp_path / "tiny.data").open("wb") as file:
        file.write(struct.pack("7i", *fields, TINY.vocabulary, TINY.positions))
        file.write(weights["tok_embeddings.weight"].tobytes())
        for name in order:
            for layer in range(TINY.layers):
                file.write(weights[f"layers.{layer}.{name}.weight"].tobytes())
        file.write(weights["norm.weight"].tobytes())
        file.write(b"cosines, sines and a tokenizer follow")
    return tmp_path / "tiny.data"


def test_checkpoint_reads_back_what_was_written(checkpoint: Path) -> None:
    shape, weights = read_checkpoint(checkpoint)
    assert shape == TINY
    expected = initial_weights(TINY)
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, expected[name])


def test_initial_weights_have_the_scales_of_the_recipe() -> None:
    weights = initial_weights(TINY)
    assert weights["tok_embeddings.weight"].std() == pytest.approx(0.02, rel=0.05)
    projection = np.stack([weights[f"layers.{i}.feed_forward.w3.weight"] for i in range(2)])
    assert projection.std() == pytest.approx(0.02 / 4**0.5, rel=0.15)


def test_the_model_is_causal(checkpoint: Path) -> None:
    model = trained_model(checkpoint)
    tokens = torch.tensor([[1, 5, 9, 200]])
    changed = torch.tensor([[1, 5, 9, 17]])
    with torch.no_grad():
        logits, others = model(tokens), model(changed)
    assert logits.shape == (1, 4, TINY.vocabulary)
    torch.testing.assert_close(logits[:, :3], others[:, :3])
    assert not torch.equal(logits[:, 3], others[:, 3])


def test_decay_is_the_shadow_over_the_initial_value(rng: np.random.Generator) -> None:
    initial = rng.normal(0, 0.1, (60, 200)).astype(np.float32)
    shadow = initial * np.float32(0.5)
    touched = np.zeros(initial.shape, dtype=bool)
    touched[20:] = True
    final = np.where(touched, shadow * rng.uniform(2, 4, (60, 1)), shadow).astype(np.float32)
    layer = Layer(
        0, initial, final, shadow, touched, abs(final), None, np.zeros(200, np.float32)
    )
    assert true_factor(layer) == pytest.approx(0.5)
    assert false_edges(layer, 0.05) <= 0.05
    tally = rows_with_stated_factor(layer)
    assert tally.untouched == 20
    assert tally.precision == 1
    assert tally.recall > 0.9
