"""The command line's own part: parsing, exit codes, one line per error. The commands are tested end to end."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from onnx_decompose import cli as module
from onnx_decompose import errors
from onnx_decompose.cli import cli, main

if TYPE_CHECKING:
    from collections.abc import Iterator

VERBS = {"analyze", "bench", "calibrate", "demo", "export", "rewrite", "validate"}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command fails with ``error``."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, "cli", fail)


def run_main(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "name", [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
)
def test_every_error_gives_its_exit_code_and_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(errors, name)
    raising(kind("m.onnx: tensor 'w' is\n  broken;\texport it again"), monkeypatch)
    code, out, err = run_main(capsys)
    assert code == kind.exit_code
    assert out == ""
    assert err == "onnx-decompose: error: m.onnx: tensor 'w' is broken; export it again\n"


def test_usage_errors_are_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(click.UsageError("no such\noption"), monkeypatch)
    assert run_main(capsys) == (2, "", "onnx-decompose: error: no such option\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_exit_code_130(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    code, _, err = run_main(capsys)
    assert code == 130
    assert err.count("\n") == 1


def test_a_defect_is_one_line_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ZeroDivisionError("division\nby zero"), monkeypatch)
    code, _, err = run_main(capsys)
    assert code == 1
    assert err.count("\n") == 1
    assert "internal error (ZeroDivisionError: division by zero)" in err
    assert "--verbose" in err


def test_a_defect_shows_its_traceback_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def analyze(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("onnx_decompose.pipeline.analyze", analyze)
    monkeypatch.setattr(sys, "argv", ["onnx-decompose", "analyze", "m.onnx", "--verbose"])
    code, _, err = run_main(capsys)
    assert code == 1
    assert "Traceback" in err
    monkeypatch.setattr(sys, "argv", ["onnx-decompose", "analyze", "m.onnx"])
    assert "Traceback" not in run_main(capsys)[2]


def test_exactly_these_commands() -> None:
    assert set(cli.commands) == VERBS


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_command_has_the_common_options(verb: str) -> None:
    options = {name for parameter in cli.commands[verb].params for name in parameter.opts}
    assert {"--quiet", "--verbose", "--version"} <= options
    shown = CliRunner().invoke(cli, [verb, "-h"])
    assert shown.exit_code == 0
    assert "--help" in shown.output


def test_every_option_says_what_it_is() -> None:
    for verb, command in cli.commands.items():
        assert command.help, verb
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (verb, parameter.name)


@pytest.mark.parametrize(
    ("text", "sizes"), [("1", (1,)), ("1,16,256", (1, 16, 256)), (" 2 , 3 ", (2, 3))]
)
def test_batch_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert module._Batches().convert(text, None, None) == sizes


@pytest.mark.parametrize("text", ["", "x", "1,", "1;2", "1.5"])
def test_what_is_no_list_of_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="such as 1,16,256"):
        module._Batches().convert(text, None, None)


def test_quiet_and_verbose_set_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []

    def analyze(*_: object, **__: object) -> None:
        levels.append(logging.getLogger().getEffectiveLevel())
        raise errors.OptionError("enough")

    monkeypatch.setattr("onnx_decompose.pipeline.analyze", analyze)
    for flags in ((), ("--verbose",), ("--quiet",)):
        CliRunner().invoke(cli, ["analyze", "m.onnx", *flags])
    assert levels == [logging.WARNING, logging.DEBUG, logging.WARNING]
