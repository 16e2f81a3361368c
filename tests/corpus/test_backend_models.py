"""The standard's own test models, which ship in the onnx package, against their own recorded inputs and outputs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx.backend.test
import onnx.reference
import pytest
from onnx import numpy_helper

import onnx_decompose
from onnx_decompose.errors import DecomposeError
from tools.untouched import untouched_faults

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.corpus

DATA = Path(onnx.backend.test.__file__).parent / "data"
RECORDED = sorted(
    path.parent
    for kind in ("simple", "pytorch-operator", "pytorch-converted")
    for path in (DATA / kind).glob("*/model.onnx")
)
LIGHT = sorted((DATA / "light").glob("*.onnx"))
TRAINING = {"test_gradient_of_add", "test_gradient_of_add_and_mul"}
"""Models of the preview training operators, which onnxruntime does not have."""

EXACT = onnx_decompose.Options(null="zero", budget=0.0, batch=(1,), seeds=1)


def test_the_package_ships_all_kinds() -> None:
    assert len(RECORDED) >= 100
    assert len(LIGHT) >= 5


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_outputs(folder: Path, tmp_path: Path) -> None:
    output = rewritten(folder / "model.onnx", tmp_path)
    if folder.name in TRAINING:
        with pytest.raises(DecomposeError, match="Gradient"):
            onnx_decompose.validate(folder / "model.onnx", output)
        return
    sets = sorted(folder.glob("test_data_set_*"))
    assert sets
    for data in sets:
        feeds, expected = recorded(folder / "model.onnx", data)
        check(run(output, feeds), expected)


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_outputs_where_weights_are_constants(folder: Path, tmp_path: Path) -> None:
    """Most of the models are of IR version 3, where every weight can be overridden: here they cannot."""
    model = onnx.load(folder / "model.onnx")
    names = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in names]
    model.ir_version = max(model.ir_version, 4)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    source = tmp_path / "model.onnx"
    source.write_bytes(model.SerializeToString())
    (tmp_path / "out").mkdir()
    output = rewritten(source, tmp_path / "out")
    if folder.name in TRAINING:
        return
    for data in sorted(folder.glob("test_data_set_*")):
        feeds, expected = recorded(source, data)
        check(run(output, feeds), expected)


@pytest.mark.parametrize("model", LIGHT, ids=lambda path: path.stem)
def test_light_models(model: Path, tmp_path: Path) -> None:
    """Whole networks whose weights are all made by ConstantOfShape at run time; their recorded input is a ramp."""
    output = rewritten(model, tmp_path)
    proto = onnx.load(model)
    names = {tensor.name for tensor in proto.graph.initializer}
    (value,) = (value for value in proto.graph.input if value.name not in names)
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    ramp = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)
    stored = onnx.TensorProto()
    stored.ParseFromString(model.with_name(f"{model.stem}_output_0.pb").read_bytes())
    check(run(output, {value.name: ramp}), [numpy_helper.to_array(stored)])


def rewritten(model: Path, folder: Path) -> Path:
    """The rewritten file; where nothing was rewritten it is the same, byte for byte."""
    output = folder / "rewritten.onnx"
    report = onnx_decompose.rewrite(model, output, EXACT).report
    assert report.summary.decomposable == (output.read_bytes() != model.read_bytes())
    assert untouched_faults(model, output) == []
    assert onnx_decompose.analyze(model).summary.sites == report.summary.sites
    return output


def recorded(model: Path, data: Path) -> tuple[dict[str, Any], list[Any]]:
    """The inputs and outputs in one of the package's folders."""
    graph = onnx.load(model).graph
    names = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in names]
    files = [data / f"input_{number}.pb" for number in range(len(given))]
    feeds = {v.name: load(path, v) for v, path in zip(given, files, strict=True)}
    expected = [load(data / f"output_{n}.pb", value) for n, value in enumerate(graph.output)]
    return feeds, expected


def load(path: Path, value: onnx.ValueInfoProto) -> Any:
    if value.type.HasField("sequence_type"):
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def run(model: Path, feeds: dict[str, Any]) -> Sequence[Any]:
    """The outputs in onnxruntime; in the standard's reference implementation where it has no kernel so old.

    (Or no such locale, for the operator on strings.)
    """
    import onnxruntime  # noqa: PLC0415  (only the tests that run something wait for it)

    errors: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    outputs: Any
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, feeds)
    except (errors.NotImplemented, errors.Fail) as error:
        if "implementation for" not in str(error) and "locale" not in str(error):
            raise
        outputs = onnx.reference.ReferenceEvaluator(str(model)).run(None, feeds)
    return cast("Sequence[Any]", outputs)


def check(outputs: Sequence[Any], expected: Sequence[Any]) -> None:
    """The standard's own tolerances (``onnx.backend.test.loader``)."""
    assert len(outputs) == len(expected)
    for got, wanted in zip(outputs, expected, strict=True):
        if isinstance(wanted, list):
            check(got, wanted)
        elif wanted.dtype.kind in "OSU":
            assert np.asarray(got).astype(str).tolist() == wanted.astype(str).tolist()
        else:
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-7)
