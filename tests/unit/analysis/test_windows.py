"""Patches in windows: entry by entry as the standard says, and with the weight as a matrix what onnxruntime makes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.analysis.windows import Window
from onnx_decompose.model.model_io import Model
from onnx_decompose.runtime.cases import open_model
from onnx_decompose.runtime.sessions import Provider

if TYPE_CHECKING:
    from numpy.typing import NDArray

CASES = {
    "a line": ((11,), Window((3,))),
    "a line, everything": ((17,), Window((3,), (2,), (3,), (4, 1))),
    "a square": ((6, 5), Window((3, 3), pads=(1, 1, 1, 1))),
    "one entry": ((4, 4), Window((1, 1))),
    "one entry, strides": ((5, 4), Window((1, 1), (2, 3))),
    "unequal": ((9, 8), Window((3, 2), (2, 1), (1, 2), (2, 0, 1, 1))),
    "same, upper": ((7, 8), Window((4, 3), (2, 3), auto_pad="SAME_UPPER")),
    "same, lower": ((7, 8), Window((4, 3), (2, 3), auto_pad="SAME_LOWER")),
    "valid": ((7, 8), Window((2, 3), (1, 2), auto_pad="VALID")),
    "a cube": ((4, 5, 6), Window((2, 3, 2), (1, 2, 2), (2, 1, 1), (0, 1, 2, 1, 0, 0))),
}


def by_hand(window: Window, x: NDArray[Any]) -> NDArray[Any]:
    """One entry at a time: 0 outside of ``x``."""
    sizes, rank = x.shape[2:], len(window.kernel)
    starts = window.edges(sizes)[:rank]
    rows = []
    for sample in x:
        for position in np.ndindex(window.positions(sizes)):
            row = []
            for channel, place in itertools.product(sample, np.ndindex(window.kernel)):
                at = tuple(
                    p * step + k * hole - start
                    for p, step, k, hole, start in zip(
                        position, window.steps, place, window.holes, starts, strict=True
                    )
                )
                inside = all(0 <= i < size for i, size in zip(at, sizes, strict=True))
                row.append(channel[at] if inside else 0.0)
            rows.append(row)
    return np.array(rows, x.dtype)


def in_runtime(window: Window, x: NDArray[Any], w: NDArray[Any]) -> NDArray[Any]:
    """The Conv of onnxruntime."""
    attributes: dict[str, Any] = {"auto_pad": window.auto_pad, "kernel_shape": window.kernel}
    for name in ("strides", "dilations", "pads"):
        if getattr(window, name):
            attributes[name] = getattr(window, name)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    free = [None] * x.ndim
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, free)],
        [numpy_helper.from_array(w, "w")],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return open_model(Model(proto), Provider.CPU).run({"x": x})["y"]


@pytest.mark.parametrize("case", CASES)
def test_patches_are_what_a_convolution_multiplies(case: str, rng: np.random.Generator) -> None:
    sizes, window = CASES[case]
    x = rng.normal(size=(3, 2, *sizes)).astype(np.float32)
    w = rng.normal(size=(5, 2, *window.kernel)).astype(np.float32)
    patches = window.patches(x)
    np.testing.assert_array_equal(patches, by_hand(window, x))
    y = in_runtime(window, x, w)
    assert y.shape[2:] == window.positions(sizes)
    made = np.moveaxis(y, 1, -1).reshape(-1, 5)
    np.testing.assert_allclose(patches @ w.reshape(5, -1).T, made, rtol=1e-4, atol=1e-4)


def test_chosen_positions_are_rows_of_them_all(rng: np.random.Generator) -> None:
    sizes, window = CASES["unequal"]
    x = rng.normal(size=(4, 3, *sizes))
    whole = window.patches(x)
    chosen = rng.permutation(len(whole))[:17]
    np.testing.assert_array_equal(window.patches(x, chosen), whole[chosen])
