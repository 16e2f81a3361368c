"""Planted structure over channels, through the command line: found, rewritten, proved, or left alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from onnx_decompose.model.metadata import read_decomposition
from tests.e2e.rewriting import rewrite
from tests.passes.harness import parse
from tests.passes.test_convolutions import kernels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.e2e.conftest import Command

    Labels = NDArray[np.intp]

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

NETWORK = """g (float[B, {0}, 8, 8] x) => (float[B, {3}, 4, 4] y) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) n = BatchNormalization(a, s, t, m, v) r = Relu(n)
    c = Conv(r, w2, b2) d = Add(c, x) e = Relu(d) p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
    y = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (p, w3)
}}"""
"""A residual block of a 3x3 and a 1x1 convolution, pooling, and a dilated convolution."""


def network(
    rng: np.random.Generator, blocks: tuple[tuple[int, int, int], ...], *, hidden: bool = True
) -> tuple[onnx.ModelProto, list[Labels]]:
    """Blocks of (inputs, inner channels, outputs) each, and the block of every channel."""
    labels = [np.repeat(np.arange(len(blocks)), sizes) for sizes in zip(*blocks, strict=True)]
    if hidden:
        labels = [rng.permutation(held) for held in labels]
    first, inner, last = labels
    tensors = {
        "w1": kernels(rng, first, inner, (3, 3)),
        "w2": kernels(rng, inner, first, (1, 1)),
        "w3": kernels(rng, first, last, (3, 3)),
        "b2": rng.standard_normal(first.size).astype(np.float32),
        **{n: rng.uniform(0.5, 1.5, inner.size).astype(np.float32) for n in ("b1", *"stmv")},
    }
    text = NETWORK.format(first.size, inner.size, first.size, last.size)
    return parse(text, tensors), labels


@pytest.mark.parametrize(
    "blocks",
    [((6, 8, 4),) * 4, ((4, 8, 2), (8, 4, 6), (6, 10, 3))],
    ids=["equal", "unequal"],
)
@pytest.mark.parametrize("emit", ["grouped", "split"])
def test_hidden_blocks(
    command: Command, tmp_path: Path, blocks: tuple[tuple[int, int, int], ...], emit: str
) -> None:
    model, labels = network(np.random.default_rng(0), blocks)
    options = ("--emit", emit, "--force", "--batch", "1", "--budget", "0")
    rewritten, report = rewrite(command, model, tmp_path, *options)
    count = len(blocks)
    sites = report["sites"]
    assert [site["components"] for site in sites] == [count] * 3
    assert [site["kernel"] for site in sites] == [[3, 3], [1, 1], [3, 3]]
    shapes = [labels[0].size, labels[1].size], [labels[1].size, labels[0].size]
    assert [site["shape"] for site in sites[:2]] == [*map(list, shapes)]
    assert report["claims"]["structural"]["passed"]
    assert report["claims"]["annealing"]["error"] < 1e-5
    assert [site["decision"] for site in sites] == [emit] * 3
    found = read_decomposition(rewritten, "m")
    assert found is not None
    for name, taps, inputs, outputs in (("a", 9, 0, 1), ("c", 1, 1, 0), ("y", 9, 0, 2)):
        owners = []
        for block in found.sites[name].blocks:
            rows, columns = np.unique(block.rows // taps), block.columns
            assert block.rows.size == taps * rows.size
            owners.append(set(labels[inputs][rows].tolist()))
            assert owners[-1] == set(labels[outputs][columns].tolist())
        # Every planted block is in one of the branches: small ones may share one.
        assert sorted(itertools.chain(*owners)) == list(range(count))
        assert emit != "split" or len(owners) == count
    assert report["summary"]["weights_after"] < report["summary"]["weights_before"]


def test_channels_in_order_cost_nothing(command: Command, tmp_path: Path) -> None:
    model, _ = network(np.random.default_rng(1), ((8, 8, 8),) * 4, hidden=False)
    options = ("--emit", "grouped", "--force", "--batch", "1")
    rewritten, _ = rewrite(command, model, tmp_path, *options)
    assert [n.op_type for n in rewritten.graph.node] == [n.op_type for n in model.graph.node]
    kept = {n.name: n for n in rewritten.graph.node}
    for before in model.graph.node:
        after = kept.get(before.name)
        if after is not None and before.op_type == "Conv":
            others = [a for a in after.attribute if a.name != "group"]
            assert others == list(before.attribute)


@pytest.mark.parametrize(("spatial", "kernel"), [(1, 5), (1, 1), (3, 3)])
def test_one_and_three_dimensions(
    command: Command, tmp_path: Path, spatial: int, kernel: int
) -> None:
    rng = np.random.default_rng(2)
    labels = [rng.permutation(np.arange(12) % 3) for _ in range(3)]
    grid = ", ".join(["7"] * spatial)
    strides = f"strides = [{', '.join(['2'] * spatial)}]"
    half = f"pads = [{', '.join([str(kernel // 2)] * 2 * spatial)}]"
    made = ", ".join(["4"] * spatial)
    text = (
        f"g (float[B, 12, {grid}] x) => (float[B, 12, {made}] y) {{ "
        f'a = Conv <{half}, {strides}> (x, w1) r = Sigmoid(a) y = Conv <auto_pad = "SAME_UPPER"> (r, w2) }}'
    )
    tensors = {
        f"w{layer}": kernels(rng, *pair, (kernel,) * spatial)
        for layer, pair in enumerate(itertools.pairwise(labels), start=1)
    }
    options = ("--emit", "grouped", "--force", "--batch", "1")
    _, report = rewrite(command, parse(text, tensors), tmp_path, *options)
    assert [site["decision"] for site in report["sites"]] == ["grouped"] * 2


DEAD = """g (float[B, 10, 8, 8] x) => (float[B, 6, 8, 8] y) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) n = BatchNormalization(a, s, t, m, v) r = Relu(n)
    y = Conv <{}strides = [1, 1]> (r, w2, b2)
}}"""


def with_dead_channels(rng: np.random.Generator, pads: str, below: float) -> onnx.ModelProto:
    """12 of 40 channels have no inputs: they are ``below`` after normalization, and so 0 or 1 after Relu."""
    first = rng.standard_normal((40, 10, 3, 3)) / 10
    dead = rng.permutation(40)[:12]
    first[dead] = 0
    tensors = {
        "w1": first,
        "b1": rng.standard_normal(40),
        "s": rng.uniform(0.5, 1.5, 40),
        "t": rng.standard_normal(40),
        "m": rng.standard_normal(40),
        "v": rng.uniform(0.5, 1.5, 40),
        "w2": rng.standard_normal((6, 40, 3, 3) if pads else (6, 40, 1, 1)),
        "b2": rng.standard_normal(6),
    }
    tensors["b1"][dead] = tensors["m"][dead]
    tensors["t"][dead] = below
    given = {name: values.astype(np.float32) for name, values in tensors.items()}
    return parse(DEAD.format(pads), given)


@pytest.mark.parametrize(
    ("pads", "below", "kept"),
    [("pads = [1, 1, 1, 1], ", -1.0, 28), ("", 1.0, 28), ("pads = [1, 1, 1, 1], ", 1.0, 40)],
    ids=["zero", "constant", "constant with padding around it"],
)
def test_dead_channels(
    command: Command, tmp_path: Path, pads: str, below: float, kept: int
) -> None:
    """A constant channel goes into biases, but not where a border of zeros makes it vary."""
    model = with_dead_channels(np.random.default_rng(3), pads, below)
    rewritten, report = rewrite(
        command, model, tmp_path, "--emit", "shrink", "--force", "--batch", "1"
    )
    decision = "shrink" if kept < 40 else "dense"
    assert [site["decision"] for site in report["sites"]] == [decision] * 2
    weights = {t.name: list(t.dims) for t in rewritten.graph.initializer}
    if kept < 40:
        assert [kept, 10, 3, 3] in weights.values()


def test_a_shuffled_weight_is_left_alone(command: Command, tmp_path: Path) -> None:
    """The same entries, placed at random: nothing to find, and the file stays as it is."""
    rng = np.random.default_rng(4)
    model, _ = network(rng, ((6, 8, 4),) * 4)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            shuffled = rng.permutation(values.ravel()).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    rewritten, report = rewrite(command, model, tmp_path, "--batch", "1")
    assert not report["summary"]["decomposable"]
    assert rewritten == model
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_another_null_keeps_whole_kernels(command: Command, tmp_path: Path) -> None:
    """An edge is supported if any entry of its kernel is, and then keeps all of them."""
    rng = np.random.default_rng(5)
    model, labels = network(rng, ((6, 8, 4),) * 4)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.ndim == 4:
            values += np.where(values == 0, 1e-4 * rng.standard_normal(values.shape), 0)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    options = ("--null", "normal:1e-4", "--criterion", "ksigma:8", "--budget", "1e-2")
    force = ("--emit", "split", "--force", "--batch", "1")
    saved = ("--save-annealed", tmp_path / "a.onnx")
    _, report = rewrite(command, model, tmp_path, *options, *force, *map(str, saved))
    assert [site["decision"] for site in report["sites"]] == ["split"] * 3
    assert report["claims"]["annealing"]["passed"]
    annealed = onnx.load(tmp_path / "a.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in annealed.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    inside = labels[1][:, None] == labels[0]
    np.testing.assert_array_equal(stored["w1.annealed"][inside], before["w1"][inside])
    assert not stored["w1.annealed"][~inside].any()


def test_a_corrupted_block_is_caught(command: Command, tmp_path: Path) -> None:
    model, _ = network(np.random.default_rng(6), ((6, 8, 4),) * 4)
    rewritten, _ = rewrite(
        command, model, tmp_path, "--emit", "grouped", "--force", "--batch", "1"
    )
    names = {n.input[1] for n in rewritten.graph.node if n.op_type == "Conv"}
    for tensor in rewritten.graph.initializer:
        if tensor.name in names:
            values = numpy_helper.to_array(tensor).copy()
            values.flat[0] += 1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            break
    onnx.save(rewritten, tmp_path / "broken.onnx")
    checked = command("validate", tmp_path / "in.onnx", tmp_path / "broken.onnx")
    assert checked.code == 1


def test_other_attributes_are_caught(command: Command, tmp_path: Path) -> None:
    """Only the number of groups may differ from the original's."""
    model, _ = network(np.random.default_rng(7), ((6, 8, 4),) * 4)
    rewritten, _ = rewrite(
        command, model, tmp_path, "--emit", "grouped", "--force", "--batch", "1"
    )
    last = [n for n in rewritten.graph.node if n.op_type == "Conv"][-1]
    for attribute in last.attribute:
        if attribute.name == "dilations":
            attribute.ints[:] = [1, 1]
        if attribute.name == "pads":
            attribute.ints[:] = [1, 1, 1, 1]
    onnx.save(rewritten, tmp_path / "broken.onnx")
    checked = command("validate", tmp_path / "in.onnx", tmp_path / "broken.onnx")
    assert checked.code == 1


def test_groups_run_in_onnxruntime(command: Command, tmp_path: Path) -> None:
    model, _ = network(np.random.default_rng(8), ((16, 16, 16),) * 2)
    rewritten, _ = rewrite(
        command, model, tmp_path, "--emit", "grouped", "--force", "--batch", "1"
    )
    x = np.random.default_rng(9).standard_normal((3, 32, 8, 8)).astype(np.float32)
    first, second = (run(proto, x) for proto in (model, rewritten))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


def run(proto: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)
