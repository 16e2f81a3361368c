"""Small files that ask for a lot: refused in a line, with bounded memory and nothing left behind."""

from __future__ import annotations

import io
import resource
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.forked import Run
from tests.e2e.planted import Recipe, plant, save

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")
MOST = 2**30
"""Bytes that a process may take on top of what it has when it begins."""
SECONDS = 60
"""Of processor time."""


def limit() -> None:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + MOST
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def refuse(folder: Path, *arguments: object) -> str:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, told = Run(*arguments, prepare=limit).wait()
    assert code == 2, told
    (line,) = told.splitlines()
    assert line.startswith("onnx-decompose: error: ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return line


@pytest.fixture
def model() -> onnx.ModelProto:
    return plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model


def huge_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1 << 40


def huge_constant(model: onnx.ModelProto) -> None:
    size = numpy_helper.from_array(np.array([1 << 35]), "size")
    model.graph.initializer.append(size)
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["size"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))


@pytest.mark.parametrize("bomb", [huge_input, huge_constant])
def test_what_a_run_would_take(
    model: onnx.ModelProto, tmp_path: Path, bomb: Callable[[onnx.ModelProto], None]
) -> None:
    bomb(model)
    path = save(model, tmp_path / "bomb.onnx")
    line = refuse(tmp_path, "rewrite", path, "-o", tmp_path / "out.onnx", *SPLIT)
    assert "bomb.onnx" in line


def test_functions_that_call_each_other_twice(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Forty of them are a thousand billion nodes."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    identity = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("f", "f0", ["x"], ["y"], [identity], opsets))
    for number in range(1, 41):
        inner = f"f{number - 1}"
        nodes = [
            helper.make_node(inner, ["x"], ["h"], domain="f"),
            helper.make_node(inner, ["h"], ["y"], domain="f"),
        ]
        model.functions.append(
            helper.make_function("f", f"f{number}", ["x"], ["y"], nodes, opsets)
        )
    model.opset_import.append(helper.make_opsetid("f", 1))
    first = model.graph.node[0]
    first.input[0] = "unfolded"
    model.graph.node.insert(0, helper.make_node("f40", ["x"], ["unfolded"], domain="f"))
    path = save(model, tmp_path / "bomb.onnx")
    assert "1.1e+12 nodes" in refuse(tmp_path, "analyze", path)


def long_input(graph: onnx.GraphProto) -> str:
    graph.input.append(helper.make_tensor_value_info("long", TensorProto.FLOAT, [1 << 62]))
    return "long"


def doubled_list(graph: onnx.GraphProto) -> str:
    graph.initializer.append(numpy_helper.from_array(np.ones(2, np.int64), "d0"))
    graph.node.extend(
        helper.make_node("Concat", [f"d{n}"] * 2, [f"d{n + 1}"], axis=0) for n in range(34)
    )
    return "d34"


@pytest.mark.parametrize("bomb", [long_input, doubled_list])
def test_values_that_shape_inference_would_list(
    model: onnx.ModelProto, tmp_path: Path, bomb: Callable[[onnx.GraphProto], str]
) -> None:
    """onnx follows the values of one axis entry by entry, once they go into a sum or a product."""
    name = bomb(model.graph)
    model.graph.node.append(helper.make_node("Mul", [name, name], ["unused"]))
    path = save(model, tmp_path / "long.onnx")
    code, told = Run("analyze", path, "--quiet", prepare=limit).wait()
    assert (code, len(told.splitlines())) == (0, 1), told


@pytest.mark.parametrize("size", [1 << 14, 1 << 31])
def test_a_sparse_tensor_of_one_entry_is_not_made_dense(
    model: onnx.ModelProto, tmp_path: Path, size: int
) -> None:
    sparse = onnx.SparseTensorProto(dims=[size, 1 << 14])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "places"))
    model.graph.sparse_initializer.append(sparse)
    path = save(model, tmp_path / "sparse.onnx")
    code, told = Run("analyze", path, "--quiet", prepare=limit).wait()
    assert (code, len(told.splitlines())) == (0, 1)


class TestInputs:
    """Calibration data that unpacks to more than it should."""

    @pytest.fixture
    def refuse(self, model: onnx.ModelProto, tmp_path: Path) -> Callable[[Path], str]:
        path = save(model, tmp_path / "model.onnx")
        output = ("-o", tmp_path / "out.onnx")

        def check(data: Path) -> str:
            return refuse(tmp_path, "rewrite", path, *output, "--calibration", data, *SPLIT)

        return check

    def test_decompression(self, refuse: Callable[[Path], str], tmp_path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 22, 18)}
        )
        content = header.getvalue() + bytes((1 << 22) * 18 * 4)
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content)
        line = refuse(tmp_path / "bomb.npz")
        assert "bomb.npz" in line
        assert "times its size" in line

    def test_declared_size(self, refuse: Callable[[Path], str], tmp_path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 18)}
        )
        with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
            archive.writestr("x.npy", header.getvalue() + bytes(8))
        assert "huge.npz" in refuse(tmp_path / "huge.npz")
