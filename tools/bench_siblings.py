"""What one wider product and a Split take in the place of products that read the same value, measured and predicted.

    python -m tools.bench_siblings [--rows 1,16,64,256] [--seconds 1] [--shape 288,288,288,288 ...]

A shape is the inputs, then the outputs of each product. Every model has eight such sets of products one after another:
each reads the sum of what the set before made, so that starting a run weighs little. Prints for each shape and number
of rows the time of one set apart and joined, and what the cost model says (its own coefficients, not measured ones).
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.planning.cost import CPU
from onnx_decompose.planning.siblings import Siblings, apart_seconds, joined_seconds
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.timing.bench import BenchSettings, bench_candidates

SETS = 8
SHAPES = (
    *("288,288,288,288", "288,768,768", "245,3,3,3,3,3,3", "384,384,384,384"),
    *("768,768,768,768", "256,1024,1024,1024", "64,64,64,64"),
)


def model(sizes: tuple[int, ...], rng: np.random.Generator, *, joined: bool) -> bytes:
    """Sets of products of one value, apart or joined."""
    inputs, *widths = sizes
    nodes: list[onnx.NodeProto] = []
    tensors = [numpy_helper.from_array(np.asarray(widths, np.int64), "sizes")]
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
        # One number of each row: a node per product that reads it, and the same in both models.
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
    made_of = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    return bytes(made_of.SerializeToString())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    settings = BenchSettings(seconds=options.seconds, max_seconds=2 * options.seconds)
    print("| inputs, outputs | rows | apart us | speed-up | saved us | predicted |")
    print("|---|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        sizes = tuple(int(size) for size in shape.split(","))
        first, second = (
            model(sizes, np.random.default_rng(0), joined=j) for j in (False, True)
        )
        for rows in map(int, options.rows.split(",")):
            rng = np.random.default_rng(rows)
            feeds = {rows: {"x": rng.standard_normal((rows, sizes[0])).astype(np.float32)}}
            (entry,) = bench_candidates(
                first,
                {"joined": second},
                feeds_by_batch=feeds,
                provider=Provider.CPU,
                rng=rng,
                settings=settings,
            )["joined"].batches
            apart = entry.original_ms * 1e3 / SETS
            siblings = Siblings(sizes[0], sizes[1:], 4)
            one, other = (f(siblings, rows, CPU) for f in (apart_seconds, joined_seconds))
            print(
                f"| {shape} | {rows} | {apart:.1f} | {entry.speedup:.2f}x ({entry.low:.2f} to {entry.high:.2f}) "
                f"| {apart - apart / entry.speedup:.1f} | {(one - other) * 1e6:.1f} of {one * 1e6:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    _main()
