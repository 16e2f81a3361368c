"""Exports of small modules; each goes through torch's exporter once per session."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_decompose import exporter
from onnx_decompose.errors import ModelError, OptionError, OutputError
from onnx_decompose.exporter import InitRecorder, export, export_factory
from onnx_decompose.records.init_recorder import parameter_array
from onnx_decompose.records.priors import read_records
from onnx_decompose.records.record_matching import match_records

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.torch


class TiedHead(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.middle = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Any) -> Any:
        return self.head(self.middle(self.embedding(x)))


def chain() -> tuple[Any, tuple[Any, ...]]:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    return module, (torch.randn(2, 6),)


def sequence() -> tuple[Any, tuple[Any, ...]]:
    return nn.Linear(6, 8), (torch.randn(2, 5, 6),)


def tied() -> tuple[Any, tuple[Any, ...]]:
    return TiedHead(), (torch.zeros(2, 5, dtype=torch.long),)


def convolution() -> tuple[Any, tuple[Any, ...]]:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
    return module, (torch.randn(2, 3, 8, 8),)


def normalized() -> tuple[Any, tuple[Any, ...]]:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return module, (torch.randn(2, 6),)


def trained(make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> tuple[Any, Any, Any]:
    """Module, example inputs and recorder; every parameter and statistic moved since recording."""
    torch.manual_seed(0)
    module, example_inputs = make()
    recorder = InitRecorder(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return module, example_inputs, recorder


def torchscript(module: Any, example_inputs: Any, recorder: InitRecorder) -> Any:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), example_inputs, buffer, dynamo=False)
    model = onnx.load_from_string(buffer.getvalue())
    parameters = {name: parameter_array(name, p) for name, p in module.named_parameters()}
    return model, match_records(model, parameters, recorder.records)


def dynamo(module: Any, example_inputs: Any, recorder: InitRecorder) -> Any:
    model = export(module, example_inputs, recorder=recorder)
    return model, read_records(model)


# Parameter, whether it is stored transposed, for every initializer that has one.
EXPECTED = {
    chain: {("0.weight", False), ("0.bias", False), ("3.weight", False), ("3.bias", False)},
    sequence: {("weight", True), ("bias", False)},
    tied: {
        ("embedding.weight", False),
        ("embedding.weight", True),
        ("middle.weight", True),
    },
    convolution: {("0.weight", False), ("0.bias", False), ("2.weight", False)},
}


@pytest.mark.parametrize("through", [dynamo, torchscript])
@pytest.mark.parametrize("make", EXPECTED)
def test_records_reach_the_weights_they_belong_to(make: Any, through: Any) -> None:
    module, example_inputs, recorder = trained(make)
    model, records = through(module, example_inputs, recorder)
    assert {(r.parameter, r.transposed) for r in records.values()} == EXPECTED[make]
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    parameters = dict(module.named_parameters())
    for name, record in records.items():
        values = parameters[record.parameter].detach().numpy()
        np.testing.assert_array_equal(stored[name], values.T if record.transposed else values)
        assert record.scale == recorder.records[record.parameter].scale


@pytest.mark.parametrize("through", [dynamo, torchscript])
def test_a_folded_batch_norm_leaves_its_neighbour_without_a_record(
    through: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_decompose")
    model, records = through(*trained(normalized))
    kept = {r.parameter for r in records.values()}
    assert {"2.weight", "2.bias"} <= kept
    folded = not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert folded == ("0.weight" not in kept)
    assert folded == ("parameter '0.weight' is no weight of the exported model" in caplog.text)


def test_equal_biases_that_torch_merges_keep_the_record_of_their_name() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    for layer in (module[0], module[2]):
        nn.init.constant_(layer.bias, 0.5)
    model = export(module, (torch.randn(2, 6),), recorder=InitRecorder(module))
    records = read_records(model)
    (shared,) = {node.input[2] for node in model.graph.node if node.op_type == "Gemm"}
    assert (records[shared].parameter, records[shared].family) == (shared, "constant")


def test_the_model_computes_what_the_module_does_at_every_batch_size(tmp_path: Path) -> None:
    module, example_inputs, recorder = trained(chain)
    module.train()
    module[3].eval()  # the dropout before it stays in training mode
    path = tmp_path / "model.onnx"
    returned = export(
        module,
        example_inputs,
        path,
        recorder=recorder,
        dynamic_shapes=({0: "batch"},),
        input_names=["features"],
        output_names=["scores"],
        opset=18,
    )
    assert [part.training for part in module.modules()] == [True, True, True, True, False]
    assert list(tmp_path.iterdir()) == [path]
    model = onnx.load(path)
    assert model == returned
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    # Nothing of the machine that exported it: torch notes the source line of each node.
    assert Path(__file__).name.encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
    module.eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 6)
        (scores,) = ReferenceEvaluator(model).run(["scores"], {"features": x.numpy()})
        np.testing.assert_allclose(
            np.asarray(scores), module(x).detach().numpy(), rtol=1e-5, atol=1e-6
        )


def test_names_that_values_inside_have_already() -> None:
    """Torch calls the values inside "linear", "relu" and "linear_1"."""
    module, example_inputs = chain()
    module.eval()
    model = export(
        module, example_inputs, input_names=["linear"], output_names=["relu"], opset=18
    )
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["linear"]
    assert [value.name for value in model.graph.output] == ["relu"]
    x = torch.randn(2, 6)
    (made,) = ReferenceEvaluator(model).run(None, {"linear": x.numpy()})
    np.testing.assert_allclose(
        np.asarray(made), module(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ({"output_names": ["0.weight"]}, "0.weight"),
        ({"output_names": ["input"]}, "input"),
        ({"input_names": ["x"], "output_names": ["x"]}, "x"),
    ],
)
def test_names_that_cannot_be_given(names: Any, taken: str) -> None:
    with pytest.raises(OptionError, match=f"the name '{taken}' was asked for and is also"):
        export(*chain(), **names)


def test_without_a_recorder_there_are_no_records() -> None:
    model = export(*sequence())
    assert not model.metadata_props
    assert read_records(model) == {}


def test_export_is_quiet() -> None:
    """In a process of its own: what torch prints it prints mostly on the first export."""
    code = (
        "import torch; from onnx_decompose.exporter import export\n"
        "export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))\n"
        "import logging; print(logging.getLogger('torch.onnx').level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stderr == ""
    assert done.stdout in {"0\n", f"{logging.WARNING}\n"}


def test_torch_is_imported_for_export_only() -> None:
    code = (
        "import sys, onnx_decompose.exporter, onnx_decompose.records.priors\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "try: onnx_decompose.exporter.export(None, ())\n"
        "except onnx_decompose.OptionError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.startswith("export needs torch (")
    assert done.stdout.endswith('; pip install "onnx-decompose[export]"\n')


class Branching(nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


def test_errors_of_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    x = torch.ones(1, 2)
    with pytest.raises(ModelError, match=r"^torch cannot export Branching: GuardOn.*$"):
        export(Branching(), (x,), path)
    with pytest.raises(
        ModelError, match=r"^torch cannot export Linear: RuntimeError: .*\[1, 2\].*$"
    ):
        export(nn.Linear(3, 3), (x,), path)
    with pytest.raises(OptionError, match=r"^export needs a torch.nn.Module, not str"):
        export("module", (x,), path)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^example_inputs is of type Tensor; give a tuple"):
        export(nn.Linear(2, 3), x, path)
    with pytest.raises(
        OptionError, match=r"^export has no option 'names'; it has input_names, o"
    ):
        export(nn.Linear(2, 3), (x,), path, names=["x"])  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"^recorder is of type dict, not InitRecorder"):
        export(nn.Linear(2, 3), (x,), path, recorder={})  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="cannot be written"):
        export(nn.Linear(2, 3), (x,), tmp_path / "missing" / "model.onnx")
    with pytest.raises((OptionError, ModelError), match="torch cannot export Linear"):
        export(nn.Linear(2, 3), (x,), path, opset=99)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_large_weights_go_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "INLINE_BYTES", 4000)
    module, path = nn.Linear(40, 50), tmp_path / "model.onnx"
    path.write_text("old")
    Path(tmp_path, "model.onnx.data").write_text("old data")
    returned = export(module, (torch.ones(1, 40),), path, recorder=InitRecorder(module))
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.stat().st_size < 8000 <= Path(tmp_path, "model.onnx.data").stat().st_size
    assert len(read_records(onnx.load(path, load_external_data=False))) == 2
    loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for tensor in returned.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), loaded[tensor.name])


FACTORIES = """
import torch
from onnx_decompose.exporter import InitRecorder

X = (torch.ones(2, 3),)

def plain(): return torch.nn.Linear(3, 2), X

def attribute():
    module = torch.nn.Linear(3, 2)
    module.example_inputs = X
    return module

def trained():
    module = torch.nn.Linear(3, 2)
    recorder = InitRecorder(module, snapshot=True)
    with torch.no_grad():
        module.weight += 1
    return module, X, {"recorder": recorder, "dynamic_shapes": ({0: "batch"},)}

def raising(): raise RuntimeError("no data\\nhere")
def leaving(): raise SystemExit("bye")
def number(): return 3
def list_of_inputs(): return torch.nn.Linear(3, 2), list(X)
def bare_module(): return torch.nn.Linear(3, 2)
def unknown_option(): return torch.nn.Linear(3, 2), X, {"batch": 3}
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


@pytest.mark.parametrize("name", ["plain", "attribute"])
def test_export_factory(factories: str, name: str, tmp_path: Path) -> None:
    model = export_factory(f"{factories}:{name}", tmp_path / "out.onnx", opset=18)
    assert onnx.load(tmp_path / "out.onnx") == model
    assert read_records(model) == {}  # whether it is trained already is for the factory to say
    assert model.opset_import[0].version == 18


def test_export_factory_with_training(factories: str, tmp_path: Path) -> None:
    model = export_factory(
        f"{factories}:trained", tmp_path / "out.onnx", snapshot=tmp_path / "init.safetensors"
    )
    assert {r.parameter for r in read_records(model).values()} == {"weight", "bias"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert Path(tmp_path, "init.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "factories.py has no 'missing'; it has plain, attribute"),
        ("raising", "factories.py:raising raised RuntimeError: no data"),
        ("leaving", "factories.py:leaving raised SystemExit: bye"),
        ("number", "factories.py:number returned (int); return (module, example_inputs)"),
        ("list_of_inputs", "factories.py:list_of_inputs returned (Linear, list); return"),
        ("bare_module", "factories.py:bare_module returned (Linear, NoneType); return"),
        ("unknown_option", "export has no option 'batch'; it has input_names"),
        ("plain", "factories.py:plain returned no recorder, so there is no snapshot; return"),
    ],
)
def test_errors_of_export_factory(
    factories: str, name: str, message: str, tmp_path: Path
) -> None:
    output, snapshot = tmp_path / "out.onnx", tmp_path / "init.safetensors"
    with pytest.raises(OptionError) as raised:
        export_factory(
            f"{factories}:{name}", output, snapshot=snapshot if name == "plain" else None
        )
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not output.exists()
    assert not snapshot.exists()


def test_export_factory_checks_the_folder_before_it_trains(
    factories: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"missing/out\.onnx: no such folder"):
        export_factory(f"{factories}:raising", tmp_path / "missing" / "out.onnx")


def test_quiet_restores_what_it_changed() -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level, sys.stdout, sys.stderr, list(warnings.filters)
    with contextlib.suppress(ModelError):
        export(Branching(), (torch.ones(1),))
    assert (logger.level, sys.stdout, sys.stderr, list(warnings.filters)) == before
