"""Nothing that the commands do asks the network, and nothing is loaded that could run code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import onnx_decompose
from tests.e2e.forked import Run
from tests.e2e.planted import Recipe, plant, save

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(onnx_decompose.__file__).parent
LOADERS = {"eval", "exec", "compile", "__import__"}
"""Builtins that run what they are given."""


def forbid_sockets() -> None:
    def audit(event: str, _: tuple[object, ...]) -> None:
        if event.startswith("socket."):
            sys.stderr.write(f"opened: {event}\n")
            raise RuntimeError(event)

    sys.addaudithook(audit)


@pytest.mark.e2e
@pytest.mark.usefixtures("quick_bench")
def test_no_command_opens_a_socket(tmp_path: Path) -> None:
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    source, output = save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    for arguments in (
        ("analyze", source, "--html", tmp_path / "r.html"),
        ("rewrite", source, "-o", output, "--emit", "split", "--force", "--batch", "1"),
        ("validate", source, output, "--samples", "1"),
        ("bench", source, output, "--batch", "1"),
    ):
        code, told = Run(*arguments, prepare=forbid_sockets).wait()
        assert (code, "opened: " in told) == (0, False), told


def test_onnxruntime_tells_nobody(tmp_path: Path) -> None:
    """It keeps what it would send in a data base in the user's cache: none is made where sending is turned off."""
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    source = save(model, tmp_path / "in.onnx")
    code = (
        "import sys; from onnx_decompose.runtime.sessions import *\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "open_session(sys.argv[1], Provider.CPU)"
    )
    places = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    (tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", code, str(source)], env={**environment, **places}, check=True
    )
    assert list((tmp_path / "home").rglob("*")) == []


def test_a_report_page_loads_nothing(tmp_path: Path) -> None:
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    page = tmp_path / "r.html"
    source = save(model, tmp_path / "in.onnx")
    assert Run("analyze", source, "--html", page).wait()[0] == 0
    text = page.read_text("utf-8")
    assert "<script src" not in text
    assert "<link" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def calls() -> Iterator[tuple[str, ast.Call]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.name}:{node.lineno}", node


def test_nothing_unpickles() -> None:
    """``numpy.load`` and ``torch.load`` only with what forbids pickles; no pickle module, no eval."""
    found = []
    for place, call in calls():
        name = ast.unparse(call.func)
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        allowed = not (
            (name == "np.load" and words.get("allow_pickle") != "False")
            or (name == "torch.load" and words.get("weights_only") != "True")
            or name in LOADERS
            or name.split(".")[0] in {"pickle", "joblib", "marshal", "shelve"}
        )
        if not allowed:
            found.append((place, name))
    assert found == []
    assert any(ast.unparse(call.func) == "np.load" for _, call in calls())
    assert any(ast.unparse(call.func).endswith(".load") for _, call in calls())


def test_no_client_of_the_network_is_imported() -> None:
    """Importing everything but the exporter brings no HTTP client of ours."""
    code = (
        "import sys, onnx_decompose.cli, onnx_decompose.pipeline, onnx_decompose.reporting.html;"
        "print(*sorted({'requests', 'httpx', 'urllib3', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_versions_are_pinned() -> None:
    """Every line of the constraints is one exact version, and every requirement of the project is among them."""
    root = Path(__file__).parents[2]
    lines = [
        line
        for line in (root / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(line.count("==") == 1 for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    assert {"numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "safetensors"} <= pinned
