"""The command line. Exit codes: 0 done, 1 a claim failed, 2 usage or bad input, 3 provider not available."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

import click
from rich.console import Console
from rich.logging import RichHandler

from onnx_decompose.analysis.refit import Compensation
from onnx_decompose.console import (
    progress,
    show_claims,
    show_cost,
    show_report,
    show_timing,
)
from onnx_decompose.errors import ClaimError, DecomposeError, OptionError
from onnx_decompose.model.model_io import check_output, remove_temporaries, save_model
from onnx_decompose.options import Annealing, Options, ProposalKind, ProviderChoice
from onnx_decompose.planning.state_graph import Emit
from onnx_decompose.reporting.report import validation_json, write_json
from onnx_decompose.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cli", "main"]

P = ParamSpec("P")
R = TypeVar("R")

_PATH = click.Path(path_type=Path)
_EXIT_INTERRUPTED = 130
_PIPE_WIDTH = 120


class _Batches(click.ParamType[tuple[int, ...]]):
    """Comma-separated batch sizes."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of sizes such as 1,16,256", param, ctx)


class _Axis(click.ParamType[tuple[str, int]]):
    """An axis' name and a size."""

    name = "name=size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if isinstance(value, tuple):
            return value
        name, _, size = str(value).rpartition("=")
        try:
            return name, int(size if name else "")
        except ValueError:
            self.fail(f"{value!r} is not NAME=SIZE, such as time=1", param, ctx)


class _OutputBudget(click.ParamType[tuple[str, float]]):
    """An output's name and a bound."""

    name = "name=bound"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if isinstance(value, tuple):
            return value
        name, _, bound = str(value).rpartition("=")
        try:
            return name, float(bound if name else "")
        except ValueError:
            self.fail(f"{value!r} is not NAME=BOUND, such as logits=0.001", param, ctx)


def _evidence_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that decide which entries count as supported."""
    for option in reversed(
        [
            click.option(
                "--null",
                default="auto",
                show_default=True,
                help=(
                    "auto, zero, recorded, empirical, torch, keras, bert, kaiming_*, xavier_*, normal:S, "
                    "uniform:A, trunc_normal:S, snapshot:F.safetensors or optimizer:F.pt"
                ),
            ),
            click.option(
                "--null-config", type=_PATH, help="TOML file with a null per weight, by glob."
            ),
            click.option(
                "--criterion",
                default="fdr",
                show_default=True,
                help="fdr, fwer, ksigma, displacement, group, channel[:C], shared, magnitude or a plug-in.",
            ),
            click.option(
                "--alpha",
                type=float,
                default=0.01,
                show_default=True,
                help="Level of the criterion: smaller removes more; of magnitude the share to remove.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0),
                default=0,
                show_default=True,
                help="Of everything random.",
            ),
        ]
    ):
        command = option(command)
    return command


def _report_options(command: Callable[P, R]) -> Callable[P, R]:
    """Where the report goes."""
    command = click.option("--html", type=_PATH, help="Write the report as a page.")(command)
    return click.option("--report", type=_PATH, help="Write the report as JSON.")(command)


_PROVIDER = click.option(
    "--provider",
    type=click.Choice(get_args(ProviderChoice)),
    default="auto",
    show_default=True,
    help="Where to run; never silently elsewhere.",
)
_BATCH = click.option(
    "--batch",
    type=_Batches(),
    default=(1, 16, 256),
    help="Batch sizes to time at; by default 1,16,256.",
)

_AXES = click.option(
    "--axis",
    "axes",
    type=_Axis(),
    multiple=True,
    help=(
        "NAME=SIZE: size of a dynamic axis but the batch to time at, as time=1 for one token; your inputs are cut "
        "along it. Repeatable."
    ),
)


def _common_options(command: Callable[..., R]) -> Callable[..., R]:
    """--quiet and --verbose on every command."""

    @click.option("--quiet", "-q", is_flag=True, help="Only the last line, and errors.")
    @click.option("--verbose", "-v", is_flag=True, help="Log what is done.")
    @click.version_option(VERSION, prog_name="onnx-decompose")
    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> R:
        logging.basicConfig(
            level=logging.DEBUG if verbose else logging.WARNING,
            handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
            format="%(message)s",
            force=True,
        )
        with progress(Console(stderr=True), enabled=not (quiet or verbose)):
            return command(*args, console=_console(quiet=quiet), **kwargs)

    return wrapped


def _console(*, quiet: bool) -> Console:
    """Plain text on stdout; a file or a pipe is wide enough for the tables."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(quiet=quiet, highlight=False, markup=False, width=width)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="onnx-decompose")
def cli() -> None:
    """Rewrite a trained ONNX model into the smaller parallel operators that its weights allow, verified."""


@cli.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("-o", "--output", type=_PATH, required=True, help="Where to write the model.")
@click.option(
    "--snapshot", type=_PATH, help="Also write the recorded initial weights (safetensors)."
)
@click.option("--opset", type=int, help="Operator set version.")
@_common_options
def export(
    factory: str, output: Path, snapshot: Path | None, opset: int | None, console: Console
) -> None:
    """Export a torch module, with records of its initialization."""
    from onnx_decompose.exporter import export_factory

    model = export_factory(factory, output, snapshot=snapshot, opset=opset)
    console.print(f"{len(model.graph.node)} nodes, {len(model.graph.initializer)} weights")
    _last_line(f"exported: {output}")


@cli.command()
@click.argument("model", type=_PATH)
@_report_options
@_evidence_options
@_common_options
def analyze(
    model: Path, report: Path | None, html: Path | None, console: Console, **evidence: Any
) -> None:
    """Show what a model's weights support, and what other nulls and criteria would give; writes no model."""
    from onnx_decompose.pipeline import analyze as run

    _check_outputs([report, html], [model])
    found = run(model, Options(**evidence))
    show_report(found, console)
    _write_reports(found, report, html)
    _last_line(
        ("decomposable: " if found.summary.decomposable else "not decomposable: ")
        + found.summary.reason
    )


@cli.command()
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="Where to write the rewritten model.")
@_report_options
@_evidence_options
@click.option(
    "--calibration",
    type=_PATH,
    help=(
        "Your inputs: calibrated annealing fits to a part of them, claim B is measured on the rest. "
        "INPUTS.npz or a folder."
    ),
)
@click.option(
    "--annealing",
    type=click.Choice(get_args(Annealing)),
    default="auto",
    show_default=True,
    help="What decides: the null (tested), the inputs (calibrated), or the faster of both unless --null names one.",
)
@click.option(
    "--proposals",
    type=click.Choice(get_args(ProposalKind)),
    multiple=True,
    help="A kind of proposals that calibrated annealing tries; may be given several times. [default: all]",
)
@click.option(
    "--compensation",
    type=click.Choice(get_args(Compensation)),
    default="ridge",
    show_default=True,
    help="What makes up for what calibrated annealing removes.",
)
@click.option(
    "--resume",
    type=_PATH,
    help="Keep what calibrated annealing finds out in this file, and go on where an interrupted run left it.",
)
@click.option(
    "--budget",
    type=float,
    default=0.01,
    show_default=True,
    help="Allowed relative L2 error of every output, or drop of the metric; 0 is exact.",
)
@click.option(
    "--output-budget",
    "output_budgets",
    type=_OutputBudget(),
    multiple=True,
    help="NAME=BOUND: relative L2 error allowed of one output, in the place of --budget; repeatable.",
)
@click.option(
    "--metric",
    help="MODULE:FUNCTION, higher is better; or top1, agreement on the largest entry of each row.",
)
@_PROVIDER
@click.option(
    "--emit",
    type=click.Choice(get_args(Emit)),
    default="auto",
    show_default=True,
    help="How regions are rewritten.",
)
@click.option(
    "--autotune",
    is_flag=True,
    help="Time the candidates of every region and take the fastest, not the one predicted to be.",
)
@_BATCH
@_AXES
@click.option("--save-annealed", type=_PATH, help="Also write the dense annealed model.")
@click.option("--force", is_flag=True, help="Keep a rewritten model that is not faster.")
@click.option("--dry-run", is_flag=True, help="Do everything but write models.")
@_common_options
def rewrite(
    model: Path,
    output: Path | None,
    report: Path | None,
    html: Path | None,
    save_annealed: Path | None,
    dry_run: bool,
    console: Console,
    **options: Any,
) -> None:
    """Decompose, verify, time; write only what passes."""
    from onnx_decompose.model.model_io import load_model
    from onnx_decompose.pipeline import rewrite as run

    if output is None and not dry_run:
        raise OptionError("rewrite: give -o OUT.onnx, or --dry-run to write nothing")
    _check_outputs([output, save_annealed, report, html, options["resume"]], [model])
    result = run(
        model, None if dry_run else output, Options(**options), reproducer=_reproducer(report)
    )
    if save_annealed is not None and not dry_run:
        save_model(result.annealed, save_annealed, data_from=load_model(model))
    show_report(result.report, console)
    _write_reports(result.report, report, html)
    summary = result.report.summary
    if summary.decomposable:
        written = "not written (dry run)" if dry_run else output
        _last_line(f"rewritten: {written}: {summary.reason}")
    else:
        _last_line(f"nothing to do: {summary.reason}")


@cli.command()
@click.argument("original", type=_PATH)
@click.argument("rewritten", type=_PATH)
@click.option("--inputs", type=_PATH, help="Your inputs: INPUTS.npz or a folder.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Random draws at each size.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random draws."
)
@click.option(
    "--rtol",
    type=float,
    help="Claim A: allowed deviation relative to an output's largest entry.",
)
@click.option("--atol", type=float, help="Claim A: allowed absolute deviation on top.")
@click.option(
    "--budget", type=float, help="Claim B: by default what the model was rewritten with."
)
@click.option("--metric", help="Claim B: MODULE:FUNCTION or top1, as it was rewritten with.")
@_PROVIDER
@click.option("--report", type=_PATH, help="Write the result as JSON.")
@_common_options
def validate(
    original: Path,
    rewritten: Path,
    samples: int,
    rtol: float | None,
    atol: float | None,
    report: Path | None,
    console: Console,
    **options: Any,
) -> None:
    """Check claims A and B from the two files alone."""
    from onnx_decompose.pipeline import validate as run
    from onnx_decompose.verification.verify import Tolerance

    _check_outputs([report], [original, rewritten])
    tolerance = None if rtol is None and atol is None else Tolerance(rtol or 0.0, atol or 0.0)
    validation = run(
        original,
        rewritten,
        seeds=samples,
        tolerance=tolerance,
        reproducer=_reproducer(report),
        **options,
    )
    if validation.structural is None:
        console.print("claim A: not checked, the model carries no onnx-decompose metadata")
    show_claims(validation.structural, validation.annealing, console)
    if report is not None:
        write_json(validation_json(VERSION, str(rewritten), validation), report)
    if not validation:
        raise ClaimError(f"{rewritten}: {validation.failure}")
    _last_line(f"valid: {rewritten}")


@cli.command()
@click.argument("original", type=_PATH)
@click.argument("rewritten", type=_PATH)
@click.option("--inputs", type=_PATH, help="Your inputs: INPUTS.npz or a folder.")
@_BATCH
@_AXES
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."
)
@_PROVIDER
@click.option("--report", type=_PATH, help="Write the times as JSON.")
@_common_options
def bench(
    original: Path, rewritten: Path, report: Path | None, console: Console, **options: Any
) -> None:
    """Time two models side by side: interleaved medians in one process."""
    from onnx_decompose.pipeline import bench as run

    _check_outputs([report], [original, rewritten])
    timing = run(original, rewritten, **options)
    show_timing(timing, console)
    if report is not None:
        write_json(
            {"version": VERSION, "model": str(rewritten), "timing": timing.to_json()}, report
        )
    _last_line(f"speed-up {timing.speedup:.2f}x over all batch sizes")


@cli.command()
@_PROVIDER
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the probes."
)
@_common_options
def calibrate(provider: ProviderChoice, seed: int, console: Console) -> None:
    """Measure what operators take on this machine, for the choice between rewrites; takes a minute or so."""
    from onnx_decompose.pipeline import calibrate as run

    cost, path = run(provider=provider, seed=seed)
    show_cost(cost, console)
    _last_line(f"calibrated: {path}")


@cli.command()
@click.option(
    "--models",
    type=_PATH,
    default=Path("models"),
    show_default=True,
    help="Folder of the bundled models.",
)
@click.option(
    "--output",
    type=_PATH,
    default=Path("out"),
    show_default=True,
    help="Folder for models and reports.",
)
@_common_options
def demo(models: Path, output: Path, console: Console) -> None:
    """Run the whole job on the bundled models."""
    from onnx_decompose.demo import run_demo

    run_demo(models, output, console)
    _last_line(f"done: models and reports are in {output}")


def main() -> None:
    """Entry point: errors are one line on stderr, and decide the exit code."""
    try:
        _end_when_asked()
        cli(standalone_mode=False, prog_name="onnx-decompose")
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt, _AskedToEnd):
        remove_temporaries()
        _fail("interrupted; every file that is there is whole", _EXIT_INTERRUPTED)
    except DecomposeError as error:
        _fail(str(error), error.exit_code)
    except (
        Exception
    ) as error:  # a defect: still one line, and the traceback where it was asked for
        logging.getLogger("onnx_decompose").debug("internal error", exc_info=True)
        _fail(
            f"internal error ({type(error).__name__}: {error}); run again with --verbose and report it "
            "with the traceback",
            1,
        )


class _AskedToEnd(BaseException):
    """Ctrl-C, or a request to end as a job scheduler sends it: what is half done goes, and then the process.

    Not a ``KeyboardInterrupt``, for which click prints an empty line of its own.
    """


def _end_when_asked() -> None:
    def end(*_: object) -> None:
        raise _AskedToEnd

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)


def _fail(message: str, code: int) -> None:
    click.echo(f"onnx-decompose: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _last_line(text: str) -> None:
    click.echo(text)


def _check_outputs(outputs: list[Path | None], inputs: list[Path]) -> None:
    """Refuse, before any work is done, outputs that cannot be written, or that would take each other's place."""
    given = [path for path in outputs if path is not None]
    for path in given:
        check_output(path, inputs=inputs)
    for number, path in enumerate(given):
        if path.resolve() in {other.resolve() for other in given[:number]}:
            raise OptionError(
                f"{path}: is asked for by two options; give each output its own path"
            )


def _reproducer(report: Path | None) -> Path | None:
    """Where to leave what shows that claim A fails: beside the report, if one was asked for."""
    return None if report is None else report.with_suffix(".reproducer")


def _write_reports(report: Any, as_json: Path | None, as_html: Path | None) -> None:
    if as_json is not None:
        write_json(report.to_json(), as_json)
    if as_html is not None:
        from onnx_decompose.reporting.html import write_html

        write_html(report, as_html)
