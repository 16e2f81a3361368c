"""Random models, rewritten and proved: how many hold what a rewrite promises, and which do not.

    python -m tools.random_rewrites --graphs 10000

Every model is drawn from a number of its own, so a failure is repeated by ``--first NUMBER --graphs 1``. Of each one:

- claim A holds (weights bit for bit, then outputs), the outputs are the annealed model's, and the original's where only
  exact zeros were removed;
- the given model and every proto outside the rewrite keep their bytes, and ``onnx.checker`` accepts the result;
- rewriting again gives the same bytes, in the same process and in one with another hash seed;
- what was rewritten can be rewritten again without a change of function.

Models run in processes of their own: one that dies or hangs is a finding, not the end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, get_args

import numpy as np

from onnx_decompose.options import Options
from onnx_decompose.planning.state_graph import Emit
from onnx_decompose.reporting.report import write_json
from tests.e2e.random_models import NOISE, Recipe, quantize_some, random_model
from tests.e2e.whole_rewrite import (
    EXACT,
    Outcome,
    check_outside,
    check_rewrite,
    rewrite_once,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

_CRITERIA = ("ksigma:3", "ksigma:20", "fdr", "shared")
_PATIENCE = 300.0
"""Seconds after which a model counts as hanging."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A model and how it is rewritten.

    Attributes:
        recipe: the model.
        emit: the emission asked for.
        options: zero null, or one that takes entries away.
        free: kernels and copies cost nothing, so that everything is rewritten.
        integers: about half of the weights of products are stored as integers of 8 bits.
        outside: the same model with all tensors in a file beside it is rewritten, too.
    """

    recipe: Recipe
    emit: Emit
    options: Options
    free: bool
    integers: bool
    outside: bool

    @classmethod
    def drawn(cls, number: int) -> Case:
        """The case of this number."""
        rng = np.random.default_rng([number, 7])
        emits: tuple[Emit, ...] = get_args(Emit)
        emit = emits[int(rng.integers(len(emits)))]
        free, integers, outside = (bool(rng.random() < share) for share in (0.9, 0.1, 0.1))
        options, recipe = EXACT, Recipe.drawn(number)
        if rng.random() < 0.5:
            criterion = str(rng.choice(_CRITERIA))
            options = Options(null=f"normal:{NOISE}", criterion=criterion, provider="cpu")
            recipe = dataclasses.replace(recipe, noise=NOISE)
        if integers:  # one scale per line came with operator set 13
            recipe = dataclasses.replace(
                recipe, opset=max(recipe.opset, 13), dtype="float32", inside=""
            )
        return cls(recipe, emit, options, free, integers, outside)

    def model(self) -> onnx.ModelProto:
        """The model itself."""
        made = random_model(self.recipe)
        if self.integers:
            quantize_some(made, np.random.default_rng([self.recipe.seed, 7]))
        return made


def check(number: int) -> dict[str, Any]:
    """Rewrite and prove one case.

    Returns:
        What the model was, what was made of it, and ``failure``, empty where everything holds.
    """
    case = Case.drawn(number)
    try:
        model = case.model()
        outcome = check_rewrite(model, case.emit, case.options, free=case.free)
        if case.outside:
            check_outside(model, case.emit, case.options, free=case.free)
    except Exception as error:  # whatever it is: the count goes on
        told = " ".join(str(error).split())[:400]
        trace = traceback.format_exc()
        return {"failure": f"{type(error).__name__}: {told}", "trace": trace, **_told(case)}
    made = {"digest": _digest(outcome), "decisions": sorted(outcome.decisions)}
    return {"failure": "", "ops": sorted(_operators(model)), **made, **_told(case)}


def digest_again(number: int) -> dict[str, Any]:
    """The digest of the case's result alone."""
    case = Case.drawn(number)
    outcome = rewrite_once(case.model(), case.emit, case.options, free=case.free)
    return {"digest": _digest(outcome)}


def _told(case: Case) -> dict[str, Any]:
    told = dataclasses.asdict(case.recipe)
    null = "zero" if case.options is EXACT else case.options.criterion
    stored = [name for name in ("integers", "outside") if getattr(case, name)]
    return {
        "recipe": told,
        "emit": case.emit,
        "null": null,
        "free": case.free,
        "stored": stored,
    }


def _digest(outcome: Outcome) -> str:
    if outcome.model is None:
        return ""
    return hashlib.sha256(outcome.model.SerializeToString(deterministic=True)).hexdigest()


def _operators(model: onnx.ModelProto) -> Iterator[str]:
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            yield node.op_type
            pending.extend(a.g for a in node.attribute if a.HasField("g"))


def _work(job: str) -> None:
    """Answer every number on stdin with a line of JSON."""
    function = {"check": check, "digest": digest_again}[job]
    for line in sys.stdin:
        result = function(int(line))
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


class Worker:
    """A process that works on one number after another, and is replaced when it dies or hangs."""

    def __init__(self, job: str, hash_seed: int) -> None:
        self._job = job
        self._hash_seed = hash_seed
        self._process: subprocess.Popen[str] | None = None

    def ask(self, number: int) -> dict[str, Any]:
        """The answer for ``number``."""
        process = self._process = self._process or self._start()
        watch = threading.Timer(_PATIENCE, process.kill)
        watch.start()
        try:
            stdin, stdout = self._pipes(process)
            stdin.write(f"{number}\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process = None
        return {"failure": f"the process ended with {process.wait()}", "digest": "none"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._pipes(self._process)[0].close()
            self._process.wait()

    @staticmethod
    def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
        assert process.stdin is not None
        assert process.stdout is not None
        return process.stdin, process.stdout

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(self._hash_seed),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tools.random_rewrites", "--worker", self._job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )


@dataclasses.dataclass(slots=True)
class Tally:
    """What was counted."""

    graphs: int = 0
    rewritten: int = 0
    decisions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    operators: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def add(self, number: int, result: dict[str, Any], digest: str) -> None:
        """Count one answer; ``digest`` is that of the other process."""
        self.graphs += 1
        failure = result["failure"]
        if not failure and result["digest"] != digest:
            failure = "other bytes in a process with another hash seed"
        if failure:
            self.failures[number] = {**result, "failure": failure}
            return
        self.rewritten += bool(result["digest"])
        self.decisions.update(result["decisions"])
        self.operators.update(set(result["ops"]))
        recipe = result["recipe"]
        self.kinds.update((recipe["dtype"], f"opset {recipe['opset']}", result["null"]))
        self.kinds.update(result["stored"])
        self.kinds.update([f"in a {recipe['inside']}"] if recipe["inside"] else [])

    def to_json(self) -> dict[str, Any]:
        """The counts, and every failure."""
        return {
            "graphs": self.graphs,
            "rewritten": self.rewritten,
            "failed": len(self.failures),
            **{
                name: dict(sorted(getattr(self, name).items()))
                for name in ("decisions", "operators", "kinds")
            },
            "failures": {str(number): told for number, told in sorted(self.failures.items())},
        }


def run(first: int, graphs: int, processes: int, report: Path | None) -> Tally:
    """Check ``graphs`` cases in so many processes; the report is renewed once in a while."""
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(first, first + graphs):
        numbers.put(number)
    tally, lock, begin = Tally(), threading.Lock(), time.monotonic()

    def work() -> None:
        checker, other = Worker("check", 1), Worker("digest", 2)
        with contextlib.suppress(queue.Empty):
            while True:
                number = numbers.get_nowait()
                result, again = checker.ask(number), other.ask(number)
                with lock:
                    tally.add(number, result, again["digest"])
                    if result["failure"] or tally.graphs % 500 == 0:
                        seconds = time.monotonic() - begin
                        told = f"{tally.graphs} graphs, {len(tally.failures)} failed, {seconds:.0f} s"
                        print(told, number, result["failure"], flush=True)
                        if report is not None:
                            write_json(tally.to_json(), report)
        checker.close()
        other.close()

    threads = [threading.Thread(target=work) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if report is not None:
        write_json(tally.to_json(), report)
    return tally


def main() -> None:
    """Check, print the counts; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first graph")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--report", type=Path, help="where to write the counts as JSON")
    parser.add_argument("--worker", choices=("check", "digest"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker)
        return
    tally = run(arguments.first, arguments.graphs, arguments.processes, arguments.report)
    print(json.dumps(tally.to_json() | {"failures": sorted(tally.failures)}, indent=1))
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
