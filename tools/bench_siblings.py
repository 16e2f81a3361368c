"""What one wider product and a Split take in the place of products that read the same value, measured and predicted.

    python -m tools.bench_siblings [--rows 1,16,64,256] [--runs 600] [--shape 288,288,288,288 ...]
    python -m tools.bench_siblings --join MODEL.onnx JOINED.onnx [--rows 1] [--axis time=1]

The second form writes MODEL with nothing but its products joined, as ``rewrite`` does it in a model that it takes
apart (and in no other), to be timed with ``onnx-decompose bench``: what of a speed-up is due to that alone.

A shape is the inputs, then the outputs of each product. Every model has eight such sets, one after another. Times are
those of the kernels, by onnxruntime's own profiler, 2 threads: of each the 5 % quantile of its runs, so that what else
the machine does is hardly in them, and neither is what lies between kernels. Prints for each shape and number of rows
the microseconds of one set apart, joined and cut, and the time left as measured and as predicted by the built-in costs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.decomposition.joining import join_siblings
from onnx_decompose.graph.study import study_model
from onnx_decompose.model.metadata import Decomposition
from onnx_decompose.model.model_io import load_model
from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.siblings import Siblings, apart_seconds, joined_seconds

SETS = 8
SHAPES = (
    *("288,288,288,288", "288,768,768", "245,3,3,3,3,3,3", "768,768,768,768"),
    *("128,128,128,128", "256,1024,1024,1024"),
)
_MOST = 1.5e11
"""Multiply-adds that one model computes in all."""


def model(sizes: tuple[int, ...], rng: np.random.Generator, *, joined: bool) -> bytes:
    """Sets of products of one value, apart or joined; each set reads a little of what the one before made."""
    inputs, *widths = sizes
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    if joined:
        tensors.append(numpy_helper.from_array(np.asarray(widths, np.int64), "sizes"))
    value = "x"
    for number in range(SETS):
        weights = [
            (rng.standard_normal((inputs, width)) / np.sqrt(inputs)).astype(np.float32)
            for width in widths
        ]
        made = [f"y{number}_{place}" for place in range(len(widths))]
        if joined:
            tensors.append(numpy_helper.from_array(np.hstack(weights), f"w{number}"))
            nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [f"p{number}"]))
            nodes.append(helper.make_node("Split", [f"p{number}", "sizes"], made, axis=-1))
        else:
            for name, weight in zip(made, weights, strict=True):
                tensors.append(numpy_helper.from_array(weight, f"{name}_w"))
                nodes.append(helper.make_node("MatMul", [value, f"{name}_w"], [name]))
        nodes += [
            helper.make_node("Slice", [name, "zero", "one", "last"], [f"{name}_s"])
            for name in made
        ]
        nodes.append(helper.make_node("Sum", [f"{name}_s" for name in made], [f"s{number}"]))
        nodes.append(helper.make_node("Add", ["x", f"s{number}"], [f"x{number}"]))
        value = f"x{number}"
    for name, entry in (("zero", 0), ("one", 1), ("last", -1)):
        tensors.append(numpy_helper.from_array(np.asarray([entry], np.int64), name))
    graph = helper.make_graph(
        nodes,
        "siblings",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", inputs])],
        tensors,
    )
    opset = helper.make_opsetid("", 18)
    return bytes(
        helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    )


def kernel_times(content: bytes, rows: int, inputs: int, runs: int) -> dict[str, float]:
    """Microseconds of one set by operator."""
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.intra_op_num_threads = 2
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    feeds = {"x": np.random.default_rng(0).standard_normal((rows, inputs)).astype(np.float32)}
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            content, settings, providers=["CPUExecutionProvider"]
        )
        for _ in range(runs):
            session.run(None, feeds)
        for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found[event["args"]["op_name"], event["name"]].append(event["dur"])
    total: dict[str, float] = collections.defaultdict(float)
    for (operator, _), times in found.items():
        total[operator] += float(np.quantile(times, 0.05)) / SETS
    return total


def join(source: Path, output: Path, batches: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Write the model at ``source`` with its products joined, where that pays at these sizes."""
    study = study_model(load_model(source))
    cost = dataclasses.replace(CPU, batches=batches)
    joined, _, sets = join_siblings(study.source, Decomposition(0.0, {}), study, cost, sizes)
    onnx.save(joined.proto, output)
    for one in sets:
        print(f"{', '.join(one.products)}: {one.shape[0]} x {one.widths}, {one.predicted:.2f}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--join", type=Path, nargs=2, metavar=("MODEL", "JOINED"))
    parser.add_argument("--axis", action="append", default=[], metavar="NAME=SIZE")
    options = parser.parse_args()
    if options.join:
        sizes = {name: int(size) for name, _, size in (a.partition("=") for a in options.axis)}
        source, output = options.join
        join(source, output, tuple(map(int, options.rows.split(","))), sizes)
        return
    print(
        "| inputs, outputs | rows | apart us | joined us | Split us | time left | predicted |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        inputs, *widths = (int(size) for size in shape.split(","))
        first, second = (
            model((inputs, *widths), np.random.default_rng(0), joined=joined)
            for joined in (False, True)
        )
        siblings = Siblings(inputs, tuple(widths), 4)
        for rows in map(int, options.rows.split(",")):
            most = int(_MOST / (SETS * rows * inputs * sum(widths)))
            runs = min(options.runs, max(most, 30))
            apart = kernel_times(first, rows, inputs, runs)["MatMul"]
            joined = kernel_times(second, rows, inputs, runs)
            left = (joined["MatMul"] + joined["Split"]) / apart
            said = joined_seconds(siblings, rows, CPU) / apart_seconds(siblings, rows, CPU)
            print(
                f"| {shape} | {rows} | {apart:.1f} | {joined['MatMul']:.1f} "
                f"| {joined['Split']:.1f} | {left:.2f} | {said:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    _main()
