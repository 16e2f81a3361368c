"""How far to trust a measured speed-up: a model timed against a copy of itself.

    python tools/bench_null.py --pairs 10

The true speed-up is 1, so the spread of the estimates is the error of one measurement, and the
share of intervals that hold 1 is their real coverage. Both depend on the machine's other work.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.runtime.sessions import resolve_provider
from onnx_decompose.timing.bench import BenchSettings, bench_models, slowdown, timing_feeds

SHAPES = ((64, 64), (256, 512), (512, 2048))
BATCHES = (1, 16, 128)


def ffn(width: int, hidden: int) -> onnx.ModelProto:
    """MatMul, ReLU, MatMul with random weights."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("up", (width, hidden)), ("down", (hidden, width)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "down"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", width]) for n in "xy"]
    graph = helper.make_graph(nodes, "ffn", values[:1], values[1:], weights)
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="measurements per shape")
    parser.add_argument("--seconds", type=float, default=BenchSettings().seconds)
    parser.add_argument("--max-seconds", type=float, default=BenchSettings().max_seconds)
    arguments = parser.parse_args()
    settings = BenchSettings(seconds=arguments.seconds, max_seconds=arguments.max_seconds)
    provider = resolve_provider("auto")
    print("| FFN | batch | ms | spread (sd) | worst | half width | intervals that hold 1 |")
    print("|---|---|---|---|---|---|---|")
    for width, hidden in SHAPES:
        model = ffn(width, hidden)
        content = model.SerializeToString()
        timings = []
        for pair in range(arguments.pairs):
            rng = np.random.default_rng(pair)
            feeds = timing_feeds(graph_inputs(model), BATCHES, rng=rng)
            timings.append(
                bench_models(
                    content,
                    content,
                    feeds_by_batch=feeds,
                    provider=provider,
                    rng=rng,
                    settings=settings,
                )
            )
        for column, batch in enumerate(BATCHES):
            entries = [timing.batches[column] for timing in timings]
            logs = np.log([entry.speedup for entry in entries])
            half = np.mean([np.log(entry.high / entry.low) / 2 for entry in entries])
            held = sum(entry.low <= 1 <= entry.high for entry in entries)
            median_ms = np.median([entry.original_ms for entry in entries])
            print(
                f"| {width}-{hidden}-{width} | {batch} | {median_ms:.3f} | {logs.std():.3f} | "
                f"{np.abs(logs).max():.3f} | {half:.3f} | {held} of {len(entries)} |",
                flush=True,
            )
        blocked = [told for timing in timings if (told := slowdown(timing))]
        slower = sum(told.startswith("slower") for told in blocked)
        print(f"\n{width}-{hidden}: not faster {len(blocked) - slower}, slower {slower}\n")


if __name__ == "__main__":
    main()
