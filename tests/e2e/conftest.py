"""Running the command line inside this process, with timing that does not take long."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest

import onnx_decompose
from onnx_decompose.cli import main
from onnx_decompose.timing import bench
from onnx_decompose.timing.bench import BenchSettings
from tests.e2e.planted import Planted, Recipe, plant, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1] if self.out else ""


class Command(Protocol):
    """Runs ``onnx-decompose`` with the given arguments."""

    def __call__(self, *arguments: object) -> Result: ...


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """The command line as its entry point runs it, without a process of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    asked_to_end = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["onnx-decompose", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in asked_to_end.items():
        signal.signal(number, handler)


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing of a few milliseconds and no shuffled controls, for tests whose verdict hangs on neither."""
    make_quick(monkeypatch)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A planted model of three blocks behind permutations, and what it was rewritten to."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = Recipe(blocks=((6, 12, 5), (5, 9, 6), (7, 10, 4)))
    original = save(plant(recipe, np.random.default_rng(7)).model, folder / "original.onnx")
    rewritten = folder / "rewritten.onnx"
    options = onnx_decompose.Options(emit="split", force=True, batch=(1,))
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        onnx_decompose.rewrite(original, rewritten, options)
    return original, rewritten


@pytest.fixture
def eight(rng: np.random.Generator) -> Planted:
    """Eight blocks hidden by permutations of inputs, hidden units and outputs."""
    return plant(Recipe(), rng)


def make_quick(patch: pytest.MonkeyPatch) -> None:
    quick = BenchSettings(
        seconds=0.005, max_seconds=0.01, precision=1.0, block_seconds=1e-5, warmup=1
    )
    # The package's attribute of this name is the function, so the module is asked for by name.
    patch.setattr(bench, "BenchSettings", lambda: quick)
    patch.setattr("onnx_decompose.reporting.summarize._SHUFFLED_ENTRIES", 0)
