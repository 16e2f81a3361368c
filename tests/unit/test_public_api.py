"""The names that a user may rely on; a change here is a change of the interface."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest

import onnx_decompose
from onnx_decompose import errors

PUBLIC = {
    "analyze",
    "bench",
    "export",
    "rewrite",
    "validate",
    "InitRecorder",
    "Options",
    "Tolerance",
    "Report",
    "Rewrite",
    "Timing",
    "Validation",
    "AnnealingError",
    "ClaimError",
    "DataError",
    "DecomposeError",
    "InputError",
    "ModelError",
    "OptionError",
    "OutputError",
    "PassError",
    "ProviderError",
    "StructuralError",
    "__version__",
}
LAZY = {"export", "InitRecorder"}

PARAMETERS = {
    "analyze": ["source", "options"],
    "rewrite": ["source", "output", "options", "reproducer"],
    "validate": [
        "original",
        "rewritten",
        "inputs",
        "seeds",
        "seed",
        "tolerance",
        "budget",
        "metric",
        "provider",
        "reproducer",
    ],
    "bench": ["original", "rewritten", "inputs", "batch", "axes", "seed", "provider"],
}

EXIT_CODES = {
    "DecomposeError": 1,
    "InputError": 2,
    "OptionError": 2,
    "ModelError": 2,
    "DataError": 2,
    "OutputError": 2,
    "ClaimError": 1,
    "StructuralError": 1,
    "AnnealingError": 1,
    "ProviderError": 3,
    "PassError": 1,
}
PARENTS = {
    "InputError": "DecomposeError",
    "OptionError": "InputError",
    "ModelError": "InputError",
    "DataError": "InputError",
    "OutputError": "InputError",
    "ClaimError": "DecomposeError",
    "StructuralError": "ClaimError",
    "AnnealingError": "ClaimError",
    "ProviderError": "DecomposeError",
    "PassError": "DecomposeError",
}


def test_exactly_these_names_are_public() -> None:
    assert set(onnx_decompose.__all__) == PUBLIC
    assert len(onnx_decompose.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - LAZY))
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(onnx_decompose, name)
    assert name == "__version__" or inspect.getdoc(found)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(LAZY))
def test_names_that_need_torch_come_when_asked_for(name: str) -> None:
    pytest.importorskip("torch")
    assert callable(getattr(onnx_decompose, name))


@pytest.mark.parametrize("verb", PARAMETERS)
def test_parameters(verb: str) -> None:
    function = getattr(onnx_decompose, verb)
    assert list(inspect.signature(function).parameters) == PARAMETERS[verb]


def test_what_follows_the_two_models_is_given_by_name() -> None:
    for verb in ("validate", "bench"):
        parameters = list(inspect.signature(getattr(onnx_decompose, verb)).parameters.values())
        assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
        assert all(p.default is not inspect.Parameter.empty for p in parameters[2:])


@pytest.mark.parametrize("name", ["Options", "Tolerance", "Report", "Rewrite", "Timing"])
def test_what_passes_between_stages_is_frozen_and_slotted(name: str) -> None:
    made = getattr(onnx_decompose, name)
    assert dataclasses.is_dataclass(made)
    assert vars(made)["__dataclass_params__"].frozen
    assert "__slots__" in vars(made)


def test_unknown_names_are_told() -> None:
    with pytest.raises(AttributeError, match="'onnx_decompose' has no attribute 'nothing'"):
        _ = onnx_decompose.nothing


def test_version_is_the_installed_one() -> None:
    assert onnx_decompose.__version__ == importlib.metadata.version("onnx-decompose")


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("onnx_decompose").joinpath("py.typed").is_file()


def test_importing_it_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, onnx_decompose, onnx_decompose.cli\n"
        "print([m for m in ('torch', 'onnxruntime', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


class TestErrors:
    def test_the_tree(self) -> None:
        classes = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
        assert classes == set(EXIT_CODES)
        for name, parent in PARENTS.items():
            assert getattr(errors, name).__bases__ == (getattr(errors, parent),)

    @pytest.mark.parametrize("name", EXIT_CODES)
    def test_exit_codes(self, name: str) -> None:
        assert getattr(errors, name).exit_code == EXIT_CODES[name]

    @pytest.mark.parametrize("name", EXIT_CODES)
    def test_the_same_classes_everywhere_and_drawn(self, name: str) -> None:
        assert getattr(onnx_decompose, name) is getattr(errors, name)
        assert errors.__doc__ is not None
        assert name in errors.__doc__
