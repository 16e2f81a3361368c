"""Planted recurrent operators, dense against cut into smaller ones, in onnxruntime.

    python tools/bench_recurrent.py [--steps 32,128] [--batch 1,16,128] [--json OUT.json]

Each case hides its groups of hidden units by random permutations of inputs and units. The operators are written
whatever the cost model or the timing says (``--emit split --force``), both claims are checked, and ``auto`` is what
the cost model alone would do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose import Options, analyze, rewrite

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One model: (inputs, hidden units) of each group, and which group reads which earlier one's state."""

    label: str
    sizes: tuple[tuple[int, int], ...]
    cascade: tuple[tuple[int, int], ...] = ()
    direction: str = "forward"


CASES = (
    Case("4 independent, H 256", ((32, 64),) * 4),
    Case("8 independent, H 512", ((32, 64),) * 8),
    Case("3 in cascade, H 256", ((32, 64), (48, 96), (48, 96)), ((0, 1), (1, 2))),
    Case(
        "3 in cascade, both ways, H 256",
        ((32, 64), (48, 96), (48, 96)),
        ((0, 1), (1, 2)),
        "bidirectional",
    ),
)


def plant(cell: str, case: Case, steps: int, rng: np.random.Generator) -> onnx.ModelProto:
    """The model of one recurrent node; a GRU's cascade leaves its candidate gates alone."""
    count = 2 if case.direction == "bidirectional" else 1
    groups = np.arange(len(case.sizes))
    inputs = rng.permutation(np.repeat(groups, [size for size, _ in case.sizes]))
    w, r = [], []
    for _ in range(count):
        units = rng.permutation(np.repeat(groups, [size for _, size in case.sizes]))
        own = units[:, None] == units
        across = np.zeros_like(own)
        for earlier, later in case.cascade:
            across |= (units == later)[:, None] & (units == earlier)
        gates = [own | across] * GATES[cell]
        if cell == "GRU":
            gates[2] = own
        w.append(_draw(np.vstack([units[:, None] == inputs] * GATES[cell]), rng))
        r.append(_draw(np.vstack(gates), rng))
    hidden, width = r[0].shape[1], w[0].shape[1]
    tensors = {"W": np.stack(w), "R": np.stack(r)}
    tensors["B"] = rng.normal(0, 0.1, (count, 2 * tensors["R"].shape[1])).astype(np.float32)
    node = helper.make_node(
        cell,
        ["x", *tensors],
        ["y", "last"],
        "rnn",
        hidden_size=hidden,
        direction=case.direction,
    )
    graph = helper.make_graph(
        [node],
        "recurrent",
        [helper.make_tensor_value_info("x", 1, [steps, "batch", width])],
        [
            helper.make_tensor_value_info("y", 1, [steps, count, "batch", hidden]),
            helper.make_tensor_value_info("last", 1, [count, "batch", hidden]),
        ],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(cell: str, case: Case, steps: int, batch: tuple[int, ...]) -> dict[str, Any]:
    """One row of the table."""
    model = plant(cell, case, steps, np.random.default_rng(0))
    result = rewrite(model, options=Options(emit="split", force=True, batch=batch))
    report = result.report
    assert report.timing is not None
    assert report.structural is not None
    predicted = analyze(model, Options(batch=batch)).sites[0]
    return {
        "cell": cell,
        "case": case.label,
        "steps": steps,
        "operators": sum(node.op_type == cell for node in result.model.graph.node),
        "weights": report.summary.weights_after / report.summary.weights_before,
        "claim_a": report.structural.passed,
        "auto": predicted.reason.rpartition("; ")[2],
        "times": [dataclasses.asdict(entry) for entry in report.timing.batches],
    }


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", default="32,128")
    parser.add_argument("--batch", default="1,16,128")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    steps = [int(n) for n in arguments.steps.split(",")]
    batch = tuple(int(n) for n in arguments.batch.split(","))
    rows = []
    print(
        "| cell | case | steps | weights kept | "
        + " | ".join(f"batch {b}" for b in batch)
        + " | auto |"
    )
    print("|---|---|---|---|" + "---|" * (len(batch) + 1))
    for cell in GATES:
        for case in CASES:
            for count in steps:
                row = measure(cell, case, count, batch)
                rows.append(row)
                times = " | ".join(
                    f"{t['speedup']:.2f} ({t['low']:.2f} to {t['high']:.2f})"
                    for t in row["times"]
                )
                print(
                    f"| {cell} | {case.label} | {count} | {row['weights']:.0%} | {times} | {row['auto']} |",
                    flush=True,
                )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


def _draw(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(0, 1 / np.sqrt(mask.shape[1]), mask.shape)
    return np.where(mask, values, 0).astype(np.float32)


if __name__ == "__main__":
    main()
