"""What computing equal columns once gains, and how much of it the way of repeating them decides.

    python -m tools.bench_shared [--rows 1,16,64,256] [--seconds 4]
    python -m tools.bench_shared --model ORIGINAL.onnx REWRITTEN.onnx TEXTS.npz

Without a model: one product of 512 x 32000 of which half the outputs are equal, at the end or scattered,
rewritten here. With one: a language model, its rewritten form and token numbers (``tools.sample_stories``); rows
are then positions of one text. Each is timed against its original beside the same model with a Gather in place of
what repeats the columns. Prints a table of speed-ups with their 99 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_decompose
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BenchSettings, bench_candidates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

INPUTS, OUTPUTS = 512, 32000


def planted(copies: NDArray[np.intp], rng: np.random.Generator) -> onnx.ModelProto:
    """One MatMul whose columns ``copies`` are equal."""
    weight = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    weight[:, copies] = weight[:, copies[:1]]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "vocabulary",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUTPUTS])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def with_gather(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with every repetition of columns as a Gather along the last axis."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Pad":
            _gather_tail(copy.graph, node)
        if node.op_type in {"ArrayFeatureExtractor", "Pad"}:
            node.op_type, node.domain = "Gather", ""
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", -1))
    return copy


def _gather_tail(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Give a Pad that repeats the last column the inputs of a Gather."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    columns = OUTPUTS - int(tensors[node.input[1]][-1])
    units = np.minimum(np.arange(OUTPUTS), columns - 1)
    graph.initializer.append(numpy_helper.from_array(units, f"{node.name}.units"))
    node.input[:] = [node.input[0], f"{node.name}.units"]


def report(
    title: str,
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    feeds: Mapping[int, Mapping[str, NDArray[Any]]],
    seconds: float,
) -> None:
    """Print a line per number of rows."""
    candidates = {
        "shared": rewritten.SerializeToString(),
        "Gather": with_gather(rewritten).SerializeToString(),
    }
    for rows, inputs in feeds.items():
        found = bench_candidates(
            original.SerializeToString(),
            candidates,
            feeds_by_batch={rows: dict(inputs)},
            provider=Provider.CPU,
            rng=np.random.default_rng(rows),
            settings=BenchSettings(seconds=seconds, max_seconds=2 * seconds),
        )
        entries = [timing.batches[0] for timing in found.values()]
        cells = [f"{e.speedup:.2f}x ({e.low:.2f} to {e.high:.2f})" for e in entries]
        print(
            f"| {title} | {rows} | {entries[0].original_ms:.2f} | {' | '.join(cells)} |",
            flush=True,
        )


def _report_planted(rows: list[int], seconds: float) -> None:
    rng = np.random.default_rng(0)
    half = OUTPUTS // 2
    for title, copies in {
        "tail": np.arange(half, OUTPUTS),
        "scattered": np.sort(rng.choice(OUTPUTS, half, replace=False)),
    }.items():
        original = planted(copies, rng)
        options = onnx_decompose.Options(batch=(1,), force=True)
        rewritten = onnx_decompose.rewrite(original, options=options).model
        feeds = {n: {"x": rng.standard_normal((n, INPUTS)).astype(np.float32)} for n in rows}
        report(title, original, rewritten, feeds, seconds)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Path, nargs=3, metavar=("ORIGINAL", "REWRITTEN", "TEXTS")
    )
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    rows = [int(size) for size in options.rows.split(",")]
    print("| case | rows | original ms | shared | Gather |")
    print("|---|---|---|---|---|")
    if not options.model:
        _report_planted(rows, options.seconds)
        return
    original, rewritten, texts = options.model
    with np.load(texts) as file:
        name = file.files[0]
        tokens = file[name]
    feeds = {n: {name: np.resize(tokens, (1, n))} for n in rows}
    models = onnx.load(original), onnx.load(rewritten)
    report(original.stem, *models, feeds, options.seconds)


if __name__ == "__main__":
    _main()
