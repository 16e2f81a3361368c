"""Coverage-guided fuzzing of everything that reads a model before it is run.

    python -m venv fuzz && fuzz/bin/pip install atheris -c constraints.txt -e '.[cpu,test]'
    fuzz/bin/python -m tools.fuzz_loader FOLDER -max_total_time=3600 -rss_limit_mb=4096 -timeout=60

``FOLDER/corpus`` is filled with small random models where it is empty. Arguments behind it are libFuzzer's. A model may
be refused with an ``InputError`` of one line. Any other exception, or a file opened outside the model's folder, is a
finding: the input goes to ``FOLDER/findings``, once for each place in the code, and fuzzing goes on. A crash, a hang or
too much memory ends the run, and libFuzzer writes the input.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingModuleSource]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["onnx_decompose"]
):
    from onnx_decompose.analysis.criteria import make_criterion
    from onnx_decompose.decomposition.gather import gather_all
    from onnx_decompose.errors import InputError
    from onnx_decompose.graph.study import study_model
    from onnx_decompose.model.metadata import read_decomposition
    from onnx_decompose.model.model_io import load_model
    from onnx_decompose.model.validity import blaming
    from onnx_decompose.options import Options
    from onnx_decompose.schedule import attempt_with

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from tests.e2e.damage import damage
from tests.e2e.random_models import Recipe, random_model
from tests.e2e.whole_rewrite import rewrite_once
from tests.passes.harness import FREE

OPTIONS = Options(null="zero", provider="cpu")
_PARTS = 0.7
"""Share of the mutations that change fields; the others change bytes."""

_MODULES = {".py", ".pyc", ".so"}
"""What Python itself may open at any time."""


class Target:
    """Reads one input as a model in a folder of its own.

    Args:
        folder: a folder that holds the model, and a data file that it may refer to.
        findings: where inputs go that lead to something else than a refusal.
    """

    def __init__(self, folder: Path, findings: Path) -> None:
        self._folder = folder
        self._findings = findings
        self._model = folder / "model.onnx"
        self._opened: list[str] = []
        self._watching = False
        self._seen: set[str] = set()
        (folder / "data.bin").write_bytes(bytes(range(256)) * 16)
        sys.addaudithook(self._audit)

    def __call__(self, content: bytes) -> None:
        """Read ``content``, and keep it where that leads to what it should not."""
        self._model.write_bytes(content)
        self._opened.clear()
        caught: Exception | None = None
        self._watching = True
        try:
            self._read()
        except Exception as error:
            caught = error
        self._watching = False
        self._judge(content, caught)

    def _judge(self, content: bytes, error: Exception | None) -> None:
        """Keep ``content`` unless what came of it is a refusal in a line, or nothing."""
        if isinstance(error, InputError):
            if "\n" in str(error):
                self._keep(content, "more than a line", str(error))
        elif error is not None:
            places = traceback.extract_tb(error.__traceback__)
            own = [
                p for p in places if {"onnx_decompose", "passes"} & set(Path(p.filename).parts)
            ]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            self._keep(content, f"{type(error).__name__} at {where}", str(error))
        for path in self._opened:
            if not self._is_inside(path):
                self._keep(content, "a file outside the folder", path)

    def _read(self) -> None:
        model = load_model(self._model)
        with blaming(model):
            read_decomposition(model.proto, model.label)
            study = study_model(model)
            criterion = make_criterion(OPTIONS.criterion, OPTIONS.alpha)
            attempt_with(study, gather_all(study, OPTIONS), criterion, OPTIONS, FREE)

    def _keep(self, content: bytes, kind: str, told: str) -> None:
        if kind in self._seen:
            return
        self._seen.add(kind)
        name = hashlib.sha256(kind.encode()).hexdigest()[:12]
        (self._findings / f"{name}.onnx").write_bytes(content)
        (self._findings / f"{name}.txt").write_text(f"{kind}\n{told}\n", "utf-8")
        print(f"finding: {kind}: {' '.join(told.split())[:200]}", flush=True)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._watching and event == "open" and isinstance(arguments[0], str | bytes):
            self._opened.append(os.fsdecode(arguments[0]))

    def _is_inside(self, path: str) -> bool:
        """Whether a model may lead to this file: in its folder, or Python's own modules."""
        resolved = Path(path).resolve()
        return resolved.is_relative_to(self._folder.resolve()) or resolved.suffix in _MODULES


def mutated(content: bytes, largest: int, seed: int) -> bytes:
    """Another input: fields changed where ``content`` is a model, else bytes."""
    rng = np.random.default_rng(seed)
    if rng.random() < _PARTS:
        model = onnx.ModelProto()
        try:
            model.ParseFromString(content)
            damage(model, rng, int(rng.integers(1, 4)))
            made: bytes = model.SerializeToString()
        except (DecodeError, ValueError, UnicodeError):
            made = b""
        if 0 < len(made) <= largest:
            return made
    changed: bytes = atheris.Mutate(content, largest)
    return changed


def seed_corpus(folder: Path, count: int) -> None:
    """Small random models, some of them rewritten ones with metadata, some with external data."""
    for number in range(count):
        recipe = dataclasses.replace(Recipe.drawn(number), steps=1 + number % 6)
        model = random_model(recipe)
        if number % 3 == 0:
            model = rewrite_once(model, "auto").model or model
        if number % 4 == 1:
            _put_outside(model)
        (folder / f"seed{number}").write_bytes(model.SerializeToString())


def _put_outside(model: onnx.ModelProto) -> None:
    end = 0
    for tensor in model.graph.initializer:
        if tensor.HasField("raw_data") and tensor.data_type == onnx.TensorProto.FLOAT:
            length = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entries = {"location": "data.bin", "offset": str(end), "length": str(length)}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
            end += length


def main() -> None:
    """Fill the corpus where it is empty, and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments, others = parser.parse_known_args()
    corpus, findings = (arguments.folder / name for name in ("corpus", "findings"))
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    if not any(corpus.iterdir()):
        seed_corpus(corpus, 120)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), findings)
        atheris.Setup([sys.argv[0], *others, str(corpus)], target, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
