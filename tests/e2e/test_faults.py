"""Killed, interrupted, short of space, without permission, two at a time: outputs are whole or absent."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.e2e.forked import Run
from tests.e2e.planted import Recipe, plant, save
from tools.kill_rewrites import Scene, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Command

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_bench")]

SPLIT = ("--emit", "split", "--force", "--batch", "1")
NOBODY = 65534
IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module", params=["inside", "outside"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene") / "here"
    return Scene(folder, external=request.param == "outside")


@pytest.fixture
def source(scene: Scene, tmp_path: Path) -> Path:
    """The model of the scene, in a folder of its own."""
    (tmp_path / "in").mkdir()
    for file in scene.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, tmp_path / "in" / file.name)
    (tmp_path / "out").mkdir()
    return tmp_path / "in" / scene.source.name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("replacing", [False, True])
def test_killed(scene: Scene, *, replacing: bool) -> None:
    rng = np.random.default_rng(replacing)
    for writing in (True, True, False):
        found = scene.kill_once(rng, replacing=replacing, writing=writing)
        assert found in {"new", "earlier" if replacing else "absent"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out" / "out.onnx"
    interrupted = 0
    # Until it is done before the signal comes: how long that takes hangs on the machine.
    for delay in (0.1 * 1.4**step for step in range(16)):
        run = Run("rewrite", source, "-o", output, *SPLIT, "--quiet")
        time.sleep(delay)
        run.send(number)
        code, told = run.wait()
        if code == 0:
            State.of(output)
            break
        if names(output.parent):  # it had just been written
            written = State.of(output)
            assert names(output.parent) == {output.name} | (
                {f"{output.name}.data"} if written.data else set()
            )
        if code == -number:  # before the command line was there to take it
            continue
        interrupted += 1
        assert code == 130, told
        assert told == (
            "onnx-decompose: error: interrupted; every file that is there is whole\n"
        )
    assert interrupted


@pytest.mark.parametrize("size", [1000, 8192])
def test_no_space(source: Path, tmp_path: Path, size: int) -> None:
    """No file may grow beyond a size, as on a disk that is full."""
    output = tmp_path / "out" / "out.onnx"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    run = Run("rewrite", source, "-o", output, *SPLIT, "--quiet", prepare=limit)
    assert run.wait()[0] == 2
    assert names(output.parent) == set()


def test_two_at_a_time(scene: Scene, source: Path, tmp_path: Path) -> None:
    """Whichever is last: the model is whole, with its own data."""
    output = tmp_path / "out" / "out.onnx"
    runs = [
        Run("rewrite", source, "-o", output, "--emit", emit, "--force", "--batch", "1", "-q")
        for emit in ("split", "shrink", "split")
    ]
    assert [run.wait()[0] for run in runs] == [0, 0, 0]
    data = {state.data for state in scene.expected.values()}
    assert State.of(output).data in data


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody() -> None:
    if IS_ROOT:
        os.setuid(NOBODY)


def test_a_folder_that_may_only_be_read(open_folder: Path) -> None:
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    source = save(model, open_folder / "model.onnx")
    source.chmod(0o444)
    (open_folder / "out").mkdir(mode=0o555)
    output = open_folder / "out" / "out.onnx"
    code, told = Run("rewrite", source, "-o", output, *SPLIT, prepare=as_nobody).wait()
    assert (code, len(told.splitlines())) == (2, 1)
    assert str(output) in told
    assert names(output.parent) == set()


def test_an_input_that_may_only_be_read(
    command: Command, open_folder: Path, tmp_path: Path
) -> None:
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    (open_folder / "in").mkdir()
    source = save(model, open_folder / "in" / "model.onnx", external=True)
    # Once here: what Python imports late may lie where only this user may read.
    assert command("rewrite", source, "-o", tmp_path / "out.onnx", *SPLIT).code == 0
    before = source.read_bytes()
    for file in source.parent.iterdir():
        file.chmod(0o444)
    source.parent.chmod(0o555)
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o777)
    output = open_folder / "out" / "out.onnx"
    code, told = Run("rewrite", source, "-o", output, *SPLIT, prepare=as_nobody).wait()
    assert code == 0, told
    State.of(output)
    assert source.read_bytes() == before
    assert names(source.parent) == {"model.onnx", "model.onnx.data"}


def test_data_that_may_not_be_read(open_folder: Path) -> None:
    model = plant(Recipe(blocks=((6, 12, 5),) * 3), np.random.default_rng(0)).model
    source = save(model, open_folder / "model.onnx", external=True)
    (open_folder / "model.onnx.data").chmod(0)
    code, told = Run("analyze", source, prepare=as_nobody).wait()
    assert (code, len(told.splitlines())) == (2, 1)
    assert "Permission denied" in told


def test_a_model_that_may_not_be_read(open_folder: Path) -> None:
    source = open_folder / "secret.onnx"
    source.write_bytes(b"secret")
    source.chmod(0)
    code, told = Run("analyze", source, prepare=as_nobody).wait()
    assert (code, len(told.splitlines())) == (2, 1)
    assert "secret.onnx" in told
