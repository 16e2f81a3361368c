"""A large model with external data and a planted block structure.

    python -m tools.make_large_model OUT.onnx [--gigabytes 4] [--blocks 8] [--files 2]

Feed-forward blocks (MatMul, bias, ReLU, MatMul, bias, LayerNormalization) whose units fall into ``--blocks``
independent groups behind random permutations, different in every layer. Weights are written one at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_decompose.model.external_data import DataWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["make_large_model"]

WIDTH, HIDDEN = 2048, 8192


def make_large_model(  # noqa: PLR0913 (what a large model can vary in)
    path: Path,
    size: int,
    *,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    blocks: int = 8,
    files: int = 2,
    seed: int = 0,
) -> int:
    """Write the model and its data files ``<path>.0.data``, ...; returns the number of layers.

    Args:
        path: of the model.
        size: bytes of weights, about.
        width: units between layers.
        hidden: units inside a layer.
        blocks: groups of units in every layer.
        files: data files that the layers go to in turn.
        seed: of the weights and permutations.
    """
    rng = np.random.default_rng(seed)
    layers = max(1, round(size / (2 * width * hidden * 4)))
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    streams = [path.with_name(f"{path.name}.{k}.data").open("wb") for k in range(files)]
    writers = [DataWriter(stream, Path(stream.name).name) for stream in streams]
    try:
        for layer in range(layers):
            _add_layer(
                layer, (width, hidden, blocks), rng, nodes, tensors, writers[layer % files]
            )
    finally:
        for stream in streams:
            stream.close()
    nodes.append(helper.make_node("Identity", [f"normal.{layers - 1}"], ["y"], "last"))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("normal.-1", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return layers


def _add_layer(
    layer: int,
    sizes: tuple[int, int, int],
    rng: np.random.Generator,
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto],
    writer: DataWriter,
) -> None:
    width, hidden, blocks = sizes
    before, inside, after = (rng.permutation(n) % blocks for n in (width, hidden, width))
    for name, rows, columns in (("up", before, inside), ("down", inside, after)):
        weight = rng.standard_normal((rows.size, columns.size), np.float32)
        weight *= rows[:, None] == columns
        weight *= np.float32((rows.size / blocks) ** -0.5)
        tensors.append(_declared(f"{name}.weight.{layer}", weight))
        writer.append(tensors[-1], weight.reshape(-1).view(np.uint8).data)
        bias = rng.standard_normal(columns.size, np.float32) * np.float32(0.1)
        tensors.append(numpy_helper.from_array(bias, f"{name}.bias.{layer}"))
    for name in ("scale", "shift"):
        values = np.full(width, name == "scale", np.float32)
        tensors.append(numpy_helper.from_array(values, f"{name}.{layer}"))

    def add(op: str, inputs: list[str], output: str) -> None:
        names = [f"{name}.{layer}" for name in inputs]
        nodes.append(helper.make_node(op, names, [f"{output}.{layer}"], f"{output}.{layer}"))

    nodes.append(
        helper.make_node("Identity", [f"normal.{layer - 1}"], [f"in.{layer}"], f"in.{layer}")
    )
    add("MatMul", ["in", "up.weight"], "up")
    add("Add", ["up", "up.bias"], "up.sum")
    add("Relu", ["up.sum"], "active")
    add("MatMul", ["active", "down.weight"], "down")
    add("Add", ["down", "down.bias"], "down.sum")
    add("LayerNormalization", ["down.sum", "scale", "shift"], "normal")


def _declared(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    """A tensor without its bytes."""
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--files", type=int, default=2)
    options = parser.parse_args()
    layers = make_large_model(
        options.output,
        int(options.gigabytes * 2**30),
        blocks=options.blocks,
        files=options.files,
    )
    print(f"{options.output}: {layers} layers of {WIDTH} x {HIDDEN} x {WIDTH}")


if __name__ == "__main__":
    _main()
