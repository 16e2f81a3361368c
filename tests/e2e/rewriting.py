"""One rewrite through the command line, proved, as the end-to-end tests ask for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx

from tests.e2e.planted import save

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Command

SPLIT = ("--emit", "split", "--force", "--batch", "1")


def rewrite(
    command: Command, model: onnx.ModelProto, folder: Path, *options: str
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The rewritten model, proved by ``validate``, and the report."""
    source, output, report = folder / "in.onnx", folder / "out.onnx", folder / "r.json"
    save(model, source)
    result = command("rewrite", source, "-o", output, "--report", report, *options)
    assert result.code == 0, result.err
    checked = command("validate", source, output, "--samples", "2")
    assert checked.code == 0, checked.err
    return onnx.load(output), json.loads(report.read_text("utf-8"))
