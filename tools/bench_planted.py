"""The planted suite: models with a known structure, dense against rewritten against other tools, in one run.

    python tools/bench_planted.py --json planted.json --markdown planted.md     everything
    python tools/bench_planted.py --quick                                       small sizes, a minute or two
    python tools/bench_planted.py --cases 'ffn-8*' --provider cuda --cuda-graph --dtype fp16

Every case is rewritten with default options (so do no harm applies), its claims are checked, the components found are
compared with the truth, and all versions of it are timed taking turns. onnxsim, OnnxSlim and the transformer optimizer
of onnxruntime take part where they are installed (``pip install onnxsim onnxslim``). Exit code 1 if a planted
structure was not found, a claim failed or a control was touched; speed alone never fails the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import json
import logging
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# As a script the folder tools/ is searched for modules, and the repository that it is in is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx_decompose
from onnx_decompose.analysis.cascades import States, condense_states, find_cascades
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.decomposition.decompose import attempt
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.errors import DecomposeError
from onnx_decompose.graph.study import state_graph, study_model
from onnx_decompose.model.model_io import load_model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.planning.cost import CPU
from onnx_decompose.runtime.sessions import (
    Provider,
    SessionSettings,
    open_session,
    resolve_provider,
)
from onnx_decompose.timing.bench import BenchSettings, Timing, bench_candidates, timing_feeds
from onnx_decompose.timing.cost_cache import this_machine
from tools.planted_models import (
    Blocks,
    PlantedModel,
    banded,
    block_triangular,
    bottleneck,
    control,
    ffn,
    gated_ffn,
    matmul,
    recurrent,
    residual_stack,
    square,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.planning.state_graph import StateGraph
    from onnx_decompose.reporting.report import Report

    Build = Callable[[type[np.floating[Any]], np.random.Generator], PlantedModel]

DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
BATCHES = (1, 16, 128, 512)
QUICK_BATCHES = (1, 16)
SETTINGS = BenchSettings(seconds=0.4, max_seconds=0.8, precision=0.02, warmup=2)
OURS = "ours"


def cases(*, quick: bool) -> dict[str, Build]:
    """Every case by name; quick ones are smaller, and fewer."""
    made: dict[str, Build] = {}
    wide = (256, 512, 256) if quick else (1024, 4096, 1024)
    state = (128, 256) if quick else (512, 1024)
    for count in (2, 8) if quick else (2, 4, 8, 16, 32, 64):
        made[f"ffn-{count}"] = _of(ffn, wide, Blocks(count))
    made["ffn-8-unequal"] = _of(ffn, wide, Blocks(8, equal=False))
    made["ffn-8-in-order"] = _of(ffn, wide, Blocks(8, shuffle=False))
    made["gated-8"] = _of(gated_ffn, wide[:2], Blocks(8))
    made["gated-4-unequal"] = _of(gated_ffn, wide[:2], Blocks(4, equal=False))
    grid = (64, 64, 8) if quick else (256, 256, 14)
    made["bottleneck-8"] = _of(bottleneck, grid, Blocks(8))
    made["bottleneck-4-unequal"] = _of(bottleneck, grid, Blocks(4, equal=False))
    made["residual-4"] = _of(residual_stack, state, Blocks(4))
    made["residual-cascade-3"] = _of(residual_stack, state, Blocks(3, cascade=True))
    made["ffn-cascade-3"] = _of(ffn, wide, Blocks(3, cascade=True))
    made["square-cascade-3"] = _of(square, wide[0], Blocks(3, cascade=True))
    made["matmul-8"] = _of(matmul, (128, 512) if quick else (768, 3072), Blocks(8))
    made["lstm-3"] = _of(_lstm, (32, 48) if quick else (128, 192), Blocks(3))
    made["gru-3"] = _of(_gru, (32, 48) if quick else (128, 192), Blocks(3))
    made["banded"] = _of(banded, wide[0], wide[0] // 32)
    made["triangular-4"] = _of(block_triangular, wide[0], Blocks(4))
    made["control-dense"] = _of(control, wide, 1.0)
    made["control-shuffled"] = _of(control, wide, 1 / 8)
    if not quick:
        made["matmul-8-large"] = _of(matmul, (4096, 4096), Blocks(8))
        made["ffn-64-large"] = _of(ffn, (2048, 8192, 2048), Blocks(64))
    return made


def _of(builder: Callable[..., PlantedModel], *arguments: Any) -> Build:
    return lambda dtype, rng: builder(*arguments, dtype, rng)


def _lstm(*arguments: Any) -> PlantedModel:
    return recurrent("LSTM", *arguments)


def _gru(*arguments: Any) -> PlantedModel:
    return recurrent("GRU", *arguments)


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for every case.

    Attributes:
        provider: where models run.
        dtype: ``fp32`` or ``fp16``.
        cuda_graph: launch captured graphs.
        batches: batch sizes.
        settings: how long to measure.
        seed: of weights, inputs and order.
    """

    provider: Provider
    dtype: str
    cuda_graph: bool
    batches: tuple[int, ...]
    settings: BenchSettings
    seed: int

    @property
    def options(self) -> Options:
        """What cases are rewritten with."""
        return Options(
            provider="cuda" if self.provider is Provider.CUDA else "cpu",
            batch=self.batches,
            seeds=1,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One case.

    Attributes:
        name: of the case.
        structure: what was planted.
        ideal: weights before over weights planted.
        weights_after: entries that the rewritten sites store, over those before; 1 where nothing was done.
        recovered: whether the components are those planted; None where the model's graph does not show them.
        valid: whether both claims hold on the rewritten model; True where the original was kept.
        decision: decisions of the sites, joined.
        reason: the report's summary.
        timings: by tool its timing against the dense model; without ``ours`` where the original was kept.
        notes: by other tool why it has no timing; and why nothing has, where the model does not run.
        failure: why the case failed; None if it did not.
    """

    name: str
    structure: str
    ideal: float
    weights_after: float
    recovered: bool | None
    valid: bool
    decision: str
    reason: str
    timings: Mapping[str, Timing]
    notes: Mapping[str, str]
    failure: str | None

    @property
    def realized(self) -> float | None:
        """Realized over ideal speed-up; 1 over ideal where the original was kept."""
        if self.structure == "none":
            return None
        ours = self.timings.get(OURS)
        return (1.0 if ours is None else ours.speedup) / self.ideal

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "timings"
        }
        timings = {name: timing.to_json() for name, timing in self.timings.items()}
        return {**fields, "timings": timings, "realized": self.realized}


def run_case(name: str, build: Build, setup: Setup) -> Result:
    """Rewrite, check and time one case."""
    rng = np.random.default_rng([setup.seed, *name.encode()])
    planted = build(DTYPES[setup.dtype], rng)
    recovered = is_recovered(planted)
    try:
        rewrite = onnx_decompose.rewrite(planted.model, None, setup.options)
        valid = not rewrite.report.summary.decomposable or bool(
            onnx_decompose.validate(planted.model, rewrite.model, seeds=1, provider="cpu")
        )
    except DecomposeError as error:
        return Result(
            name=name,
            structure=planted.structure,
            ideal=planted.ideal,
            weights_after=1.0,
            recovered=recovered,
            valid=False,
            decision="failed",
            reason=str(error),
            timings={},
            notes={},
            failure=str(error),
        )
    summary = rewrite.report.summary
    made, notes = peers(planted.model)
    if summary.decomposable:
        made = {OURS: rewrite.model, **made}
    after = summary.weights_after / summary.weights_before if summary.weights_before else 1.0
    try:
        timings = time_models(planted.model, made, setup, rng)
    except DecomposeError as error:  # a provider may lack a kernel for an operator
        timings, notes = {}, {**notes, f"{name}, not timed": str(error)}
    return Result(
        name=name,
        structure=planted.structure,
        ideal=planted.ideal,
        weights_after=after,
        recovered=recovered,
        valid=valid,
        decision=_decision(rewrite.report),
        reason=summary.reason,
        timings=timings,
        notes=notes,
        failure=_failure(planted, recovered, valid, summary.decomposable),
    )


def _decision(report: Report) -> str:
    found = dict.fromkeys(site.decision for site in report.sites)
    return ", ".join(found) if found else "left dense"


def _failure(
    planted: PlantedModel, recovered: bool | None, valid: bool, rewritten: bool
) -> str | None:
    if recovered is False:
        return "the components found are not those planted"
    if not valid:
        return "a claim does not hold"
    if planted.structure == "none" and rewritten:
        return "a control was rewritten"
    return None


def is_recovered(planted: PlantedModel) -> bool | None:
    """Whether what was planted is found exactly, all axes of a region taken together.

    That is the components of the model's state graphs, or, of a cascade, the groups of units that the region is cut
    into: each group those of one strongly connected component, in their order.
    """
    if not planted.truth:
        return None
    study = study_model(load_model(planted.model))
    options = Options()
    tried = attempt(
        study,
        gather_all(study, options),
        make_criterion(options.criterion, options.alpha),
        cost=CPU,
        emit="auto",
        rng=np.random.default_rng(0),
    )
    seen: set[str] = set()
    for region, plan in tried.plans:
        names = [name for name in planted.truth if name in region.axis_of]
        axes = [region.axis_of[name] for name in names]
        if planted.structure == "cascade":
            graph = state_graph(
                study,
                region,
                dict(zip((site.name for site in region.sites), plan.masks, strict=True)),
            )
            labels = _cascade_labels(graph)
        else:
            labels = plan.components.labels
        found = [labels[axis] for axis in axes]
        truth = [planted.truth[name] for name in names]
        if names and not same_partition(np.concatenate(found), np.concatenate(truth)):
            return False
        seen.update(names)
    return seen == set(planted.truth)


def _cascade_labels(graph: StateGraph) -> tuple[NDArray[np.intp], ...]:
    """Per axis, the strongly connected component of each unit.

    Where none can lead back to itself (a chain of rectangular sites), the group of each unit in a cascade, entries
    being all that costs.
    """
    states = States(graph.axis_sizes, graph.edges, set(graph.entries), set(graph.exits))
    condensed = condense_states(states)
    if condensed is not None:
        return condensed.labels

    def entries(owned: Any, read: Any, apart: Any) -> Any:
        del apart
        return 1.0 + sum(read[edge.source] * owned[edge.target] for edge in graph.edges)

    labels = tuple(np.full(size, -1) for size in graph.axis_sizes)
    best = min(
        find_cascades(states, entries, most_runs=64),
        key=lambda cascade: cascade.entries(graph.edges),
        default=None,
    )
    runs = () if best is None else best.owned
    for number, run in enumerate(runs):
        for axis, units in enumerate(run):
            fresh = units[
                labels[axis][units] < 0
            ]  # earlier runs may read the same units of what comes in
            labels[axis][fresh] = number
    return labels


def same_partition(some: NDArray[Any], others: NDArray[Any]) -> bool:
    """Whether two labelings divide their units alike, whatever the labels are called."""
    pairs = np.unique(np.stack([some, others]), axis=1).shape[1]
    return bool(pairs == np.unique(some).size == np.unique(others).size)


def time_models(
    dense: onnx.ModelProto,
    made: Mapping[str, onnx.ModelProto],
    setup: Setup,
    rng: np.random.Generator,
) -> dict[str, Timing]:
    """Every version of a model against the dense one, all taking turns."""
    if not made:
        return {}
    settings = SessionSettings(cuda_graph=setup.cuda_graph)
    original, *others = (
        open_session(model.SerializeToString(), setup.provider, settings)
        for model in (dense, *made.values())
    )
    return bench_candidates(
        original,
        dict(zip(made, others, strict=True)),
        feeds_by_batch=timing_feeds(graph_inputs(dense), setup.batches, rng=rng),
        provider=setup.provider,
        rng=rng,
        settings=setup.settings,
    )


def peers(model: onnx.ModelProto) -> tuple[dict[str, onnx.ModelProto], dict[str, str]]:
    """What other tools make of a model, and why others make nothing of it."""
    made: dict[str, onnx.ModelProto] = {}
    notes: dict[str, str] = {}
    for name, optimize in PEERS.items():
        copy = type(model)()
        copy.CopyFrom(model)
        try:
            made[name] = optimize(copy)
        except ImportError as error:
            notes[name] = f"not installed ({error})"
        except Exception as error:  # whatever another tool raises is its result
            notes[name] = f"failed: {type(error).__name__}: {error}"
    return made, notes


def _onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    simplified, checked = importlib.import_module("onnxsim").simplify(model)
    if not checked:
        raise ValueError("its own check failed")
    result: onnx.ModelProto = simplified
    return result


def _onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    result: onnx.ModelProto = importlib.import_module("onnxslim").slim(model)
    return result


def _ort_optimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Its fusions; what onnxruntime does on loading happens to every model here."""
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    result: onnx.ModelProto = optimizer.optimize_model(
        model, model_type="bert", opt_level=0
    ).model
    return result


PEERS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "ort-transformers": _ort_optimizer,
}


def table(results: Sequence[Result], batches: Sequence[int]) -> str:
    """The results as a markdown table."""
    others = [name for name in PEERS if any(name in result.timings for result in results)]
    head = ["case", "recovered", "claims", "decision", "weights", "ideal"]
    head += [f"batch {batch}" for batch in batches] + ["realized/ideal", *others]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        recovered = {None: "-", True: "exactly", False: "NO"}[result.recovered]
        row = [
            result.name,
            recovered,
            "hold" if result.valid else "FAIL",
            result.decision,
            f"{result.weights_after:.1%}",
            f"{result.ideal:.2f}",
            *_speedups(result, batches),
            "-" if result.realized is None else f"{result.realized:.2f}",
            *(
                f"{result.timings[name].speedup:.2f}" if name in result.timings else "-"
                for name in others
            ),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _speedups(result: Result, batches: Sequence[int]) -> list[str]:
    ours = result.timings.get(OURS)
    if ours is None:
        return ["kept"] * len(batches)
    return [f"{entry.speedup:.2f}" for entry in ours.batches]


def median_realized(results: Sequence[Result]) -> float | None:
    """Median over the cases of realized over ideal speed-up; controls do not count."""
    values = [result.realized for result in results if result.realized is not None]
    return statistics.median(values) if values else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="*", help="names or globs, comma-separated")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--cuda-graph", action="store_true", help="launch captured graphs")
    parser.add_argument("--batch", help="batch sizes, comma-separated")
    parser.add_argument("--quick", action="store_true", help="small sizes, short measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def _setup(options: argparse.Namespace) -> Setup:
    provider = resolve_provider(options.provider)
    if options.cuda_graph and provider is not Provider.CUDA:
        raise SystemExit("bench_planted: --cuda-graph needs the CUDA provider")
    usual = QUICK_BATCHES if options.quick else BATCHES
    return Setup(
        provider=provider,
        dtype=options.dtype,
        cuda_graph=options.cuda_graph,
        batches=tuple(map(int, options.batch.split(","))) if options.batch else usual,
        settings=BenchSettings(0.05, 0.1, 0.1) if options.quick else SETTINGS,
        seed=options.seed,
    )


def main() -> int:
    """Run the cases asked for; see the module."""
    options = _arguments()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR)
    globs = options.cases.split(",")
    chosen = {
        name: build
        for name, build in cases(quick=options.quick).items()
        if any(fnmatch.fnmatch(name, glob) for glob in globs)
    }
    if not chosen:
        raise SystemExit(f"bench_planted: no case is called {options.cases}")
    try:
        setup = _setup(options)
    except DecomposeError as error:
        raise SystemExit(f"bench_planted: {error}") from error
    results: list[Result] = []
    for name, build in chosen.items():
        results.append(run_case(name, build, setup))
        print(f"{name}: {results[-1].reason}", file=sys.stderr, flush=True)
        _save(results, setup, options)
    _show(results, setup)
    return int(any(result.failure is not None for result in results))


def _show(results: Sequence[Result], setup: Setup) -> None:
    machine = this_machine(setup.provider)
    median = median_realized(results)
    print(table(results, setup.batches))
    print(f"\nmedian realized/ideal: {'-' if median is None else f'{median:.2f}'}")
    print(
        f"{setup.provider}{', CUDA graphs' if setup.cuda_graph else ''}, {setup.dtype}, TF32 off; "
        f"{machine.device}, {machine.threads} threads, {machine.onnxruntime}"
    )
    for name, note in _all_notes(results).items():
        print(f"{name}: {note}")
    for result in results:
        if result.failure is not None:
            print(f"FAILED {result.name}: {result.failure}")


def _save(results: Sequence[Result], setup: Setup, options: argparse.Namespace) -> None:
    """What there is so far; the next case may take minutes."""
    if options.markdown is not None:
        options.markdown.write_text(table(results, setup.batches) + "\n", "utf-8")
    if options.json is not None:
        content = {
            "command": " ".join(["python", "tools/bench_planted.py", *sys.argv[1:]]),
            "machine": dataclasses.asdict(this_machine(setup.provider)),
            "python": platform.python_version(),
            "provider": setup.provider.value,
            "cuda_graph": setup.cuda_graph,
            "dtype": setup.dtype,
            "median_realized": median_realized(results),
            "cases": [result.to_json() for result in results],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _all_notes(results: Sequence[Result]) -> dict[str, str]:
    """One line per other tool that has no timing somewhere."""
    found: dict[str, str] = {}
    for result in results:
        for name, note in result.notes.items():
            found.setdefault(name, note)
    return found


if __name__ == "__main__":
    sys.exit(main())
