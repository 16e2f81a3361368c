"""``rewrite`` killed at random moments: its output is there whole, or is what it was before.

    python -m tools.kill_rewrites --kills 100

Half of the kills come at any moment of a run, half once the folder of the output shows a first new file, when something
is being written. Models have their weights in themselves or outside, in turn, and every second output replaces an
earlier one of other content. After each kill the output and its data must be those of a run that nobody disturbed, or
the earlier ones, byte for byte; and the next run must succeed in the same folder.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import shutil
import signal
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import onnx

from onnx_decompose.model.model_io import external_files, load_model
from onnx_decompose.timing import bench
from tests.e2e.forked import Run
from tests.e2e.planted import Recipe, plant, save

RECIPE = Recipe(blocks=((24, 96, 24),) * 6)
_OPTIONS = ("--force", "--batch", "1", "--quiet")
_PATIENCE = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A model as it lies in a folder, with all its data; empty where there is none."""

    content: bytes = b""
    data: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, path: Path) -> State:
        """The state of the model at ``path``; raises where that is not whole."""
        if not path.exists():
            return cls()
        model = load_model(path)
        onnx.checker.check_model(str(path), full_check=True)
        files = sorted(external_files(model))
        return cls(path.read_bytes(), tuple(file.read_bytes() for file in files))


def rewriting(source: Path, output: Path, emit: str) -> Run:
    """``rewrite`` in a copy of this process, so that every moment of its life is one of the rewrite."""
    return Run("rewrite", source, "-o", output, "--emit", emit, *_OPTIONS)


def finish(source: Path, output: Path, emit: str) -> None:
    """An undisturbed run."""
    code, told = rewriting(source, output, emit).wait()
    assert code == 0, told


def shorten_timing() -> None:
    """Time a model for milliseconds: what is measured does not matter here."""
    quick = bench.BenchSettings(
        seconds=0.005, max_seconds=0.01, precision=1.0, block_seconds=1e-5, warmup=1
    )
    unittest.mock.patch.object(bench, "BenchSettings", return_value=quick).start()


class Scene:
    """A model, and what undisturbed runs make of it with two emissions.

    Args:
        folder: for everything.
        external: the weights lie outside the model.
    """

    def __init__(self, folder: Path, *, external: bool) -> None:
        folder.mkdir()
        self.folder = folder
        self.source = folder / "model.onnx"
        save(plant(RECIPE, np.random.default_rng(0)).model, self.source, external=external)
        self.expected: dict[str, State] = {}
        self.seconds = 0.0
        for emit in ("split", "shrink"):
            output = folder / emit / "out.onnx"
            output.parent.mkdir()
            begin = time.monotonic()
            finish(self.source, output, emit)
            self.seconds = time.monotonic() - begin
            self.expected[emit] = State.of(output)
        assert self.expected["split"] != self.expected["shrink"]

    def kill_once(self, rng: np.random.Generator, *, replacing: bool, writing: bool) -> str:
        """Kill one run; what its output was found as: "absent", "earlier" or "new"."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        output = folder / "out.onnx"
        if replacing:
            for file in (self.folder / "shrink").iterdir():
                shutil.copyfile(file, folder / file.name)
        before = State.of(output)
        run = rewriting(self.source, output, "split")
        self._wait(run, folder, rng, writing=writing)
        run.send(signal.SIGKILL)
        run.wait()
        after = State.of(output)
        finish(self.source, output, "split")
        again = State.of(output)
        assert (again.data, len(again.content) > 0) == (self.expected["split"].data, True)
        shutil.rmtree(folder)
        if after == before:
            return "earlier" if replacing else "absent"
        assert self._is_new(after), "the output is neither the earlier one nor a whole new one"
        return "new"

    def _wait(self, run: Run, folder: Path, rng: np.random.Generator, *, writing: bool) -> None:
        """Until the moment of the kill."""
        if not writing:
            time.sleep(rng.uniform(0, 1.1 * self.seconds))
            return
        there = set(os.listdir(folder))
        end = time.monotonic() + _PATIENCE
        while not run.is_over() and set(os.listdir(folder)) <= there:
            assert time.monotonic() < end
        time.sleep(rng.exponential(0.003))

    def _is_new(self, found: State) -> bool:
        """Whether a state is that of an undisturbed run, whatever its data file is called."""
        expected = self.expected["split"]
        if found.data != expected.data:
            return False
        if found == expected:
            return True
        return _without_locations(found.content) == _without_locations(expected.content)


def _without_locations(content: bytes) -> bytes:
    model = onnx.ModelProto.FromString(content)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "" if entry.key == "location" else entry.value
    stored: bytes = model.SerializeToString(deterministic=True)
    return stored


def main() -> None:
    """Kill, and count what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shorten_timing()
    rng = np.random.default_rng(arguments.seed)
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        scenes = [
            Scene(Path(folder) / name, external=name == "outside")
            for name in ("inside", "outside")
        ]
        for number in range(arguments.kills):
            scene = scenes[number % 2]
            kind = {"replacing": bool(number & 2), "writing": bool(number & 4)}
            result = scene.kill_once(rng, **kind)
            moment = "while writing" if kind["writing"] else "at any moment"
            place = "outside" if number % 2 else "inside"
            found[f"weights {place}, killed {moment}: {result}"] += 1
            print(number, kind, result, flush=True)
    for what, count in sorted(found.items()):
        print(f"{count:4} {what}")


if __name__ == "__main__":
    main()
