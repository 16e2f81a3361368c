"""Rewritten models with external data are checked from where they lie on disk, and nothing of that is left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decompose.errors import OutputError
from onnx_decompose.model.external_data import external_tensors
from onnx_decompose.model.model_io import Model, load_model, read_tensor
from onnx_decompose.model.staging import staging

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

W = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)


def product(weight: NDArray[np.float32]) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["B", 32])],
        [value("y", onnx.TensorProto.FLOAT, ["B", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def original(folder: Path, location: str = "m.data") -> Model:
    onnx.save(
        product(W),
        folder / "m.onnx",
        save_as_external_data=True,
        location=location,
        size_threshold=0,
    )
    return load_model(folder / "m.onnx")


def rewritten(source: Model) -> Model:
    """``source`` with a new weight in it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    del proto.graph.initializer[:]
    proto.graph.initializer.append(numpy_helper.from_array(-W, "w.new"))
    proto.graph.node[0].input[1] = "w.new"
    return Model(proto, source.path)


def test_weights_are_on_disk_while_the_model_is_checked(tmp_path: Path) -> None:
    source = original(tmp_path)
    output = tmp_path / "out.onnx"
    with staging(source, output) as stage:
        stage.put(rewritten(source), source)
        staged = stage.put(rewritten(source), source)  # in the place of the first
        stage.freed()
        (tensor,) = external_tensors(staged.proto)
        assert isinstance(read_tensor(staged, tensor), np.memmap)
        assert staged.label == source.label
        assert staged.folder is not None
        assert staged.folder.parent.parent == tmp_path
        assert len(list(staged.folder.parent.iterdir())) == 1
        assert not output.exists()
        written = stage.save(staged, source)
    assert {path.name for path in tmp_path.iterdir()} == {
        "m.onnx",
        "m.data",
        "out.onnx",
        "out.onnx.data",
    }
    saved = load_model(output)
    assert saved.proto == written
    np.testing.assert_array_equal(read_tensor(saved, saved.proto.graph.initializer[0]), -W)


def test_the_original_s_data_is_never_overwritten(tmp_path: Path) -> None:
    source = original(tmp_path, "out.onnx.data")
    before = (tmp_path / "out.onnx.data").read_bytes()
    with staging(source, tmp_path / "out.onnx") as stage:
        stage.save(stage.put(rewritten(source), source), source)
    assert (tmp_path / "out.onnx.data").read_bytes() == before
    saved = load_model(tmp_path / "out.onnx")
    np.testing.assert_array_equal(read_tensor(saved, saved.proto.graph.initializer[0]), -W)


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    source = original(tmp_path)

    def fail() -> None:
        with staging(source, tmp_path / "out.onnx") as stage:
            stage.put(rewritten(source), source)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.data"}


@pytest.mark.parametrize("output", [None, "out.onnx"])
def test_other_models_stay_in_memory(tmp_path: Path, output: str | None) -> None:
    path = None if output is None else tmp_path / output
    source = load_model(product(W)) if output else original(tmp_path)
    with staging(source, path) as stage:
        model = rewritten(source)
        assert stage.put(model, source) is model
        if path is not None:
            assert stage.save(model, source) is model.proto
            assert load_model(path).proto == model.proto


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    source = original(tmp_path)
    with (
        pytest.raises(OutputError, match="choose another output path"),
        staging(source, tmp_path / "missing" / "out.onnx"),
    ):
        pass
