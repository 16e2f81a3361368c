"""bfloat16, which has no kernels in onnxruntime on the CPU: such models are analysed, and rewritten where they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.planted import SITES, Recipe, plant, save
from tests.e2e.rewriting import SPLIT, rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]


@pytest.fixture
def stored() -> onnx.ModelProto:
    """The planted network with its tensors in bfloat16; everything else is as it was."""
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    for tensor in model.graph.initializer:
        narrow = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    return model


def test_a_model_that_computes_in_it(
    command: Command, stored: onnx.ModelProto, tmp_path: Path
) -> None:
    for value in (*stored.graph.input, *stored.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    source, output = save(stored, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    found = command("analyze", source)
    assert found.code == 0, found.err
    assert SITES[0] in found.out
    refused = command("rewrite", source, "-o", output, *SPLIT)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert "in.onnx: " in line
    assert "no such kernel on this provider: use another one, or convert the model" in line
    assert not output.exists()


def test_weights_that_are_stored_in_it(
    command: Command, stored: onnx.ModelProto, tmp_path: Path
) -> None:
    """Cast to float32 before they are used: such a model runs, and its parts are what the products read."""
    names = [tensor.name for tensor in stored.graph.initializer]
    for node in stored.graph.node:
        node.input[:] = [f"{name}.wide" if name in names else name for name in node.input]
    for name in reversed(names):
        cast = helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT)
        stored.graph.node.insert(0, cast)
    made, report = rewrite(command, stored, tmp_path, *SPLIT)
    assert report["summary"]["substructures"] == 3
    parts = [t for t in made.graph.initializer if len(t.dims) == 2]
    assert len(parts) == 6
    assert {part.data_type for part in parts} == {TensorProto.FLOAT}
