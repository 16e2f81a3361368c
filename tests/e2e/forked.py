"""The command line in a copy of this process: killed, interrupted or kept short of something, without a new start."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING

import onnxruntime  # noqa: F401 (loaded here, so that no copy is interrupted while it loads)

from onnx_decompose import cli

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

__all__ = ["Run"]


class Run:
    """``onnx-decompose`` with the given arguments, started at once.

    Args:
        arguments: of the command line.
        prepare: called in the new process first.
        afterwards: called in it last.
    """

    def __init__(
        self,
        *arguments: object,
        prepare: Callable[[], None] | None = None,
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        self._afterwards = afterwards
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if not self._pid:
            self._run([str(argument) for argument in arguments], prepare)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self._pid, number)

    def is_over(self) -> bool:
        """Whether the process has ended; it still has to be waited for."""
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> tuple[int, str]:
        """The exit code, and what was printed on both streams."""
        _, status = os.waitpid(self._pid, 0)
        self._told.seek(0)
        told = self._told.read().decode()
        self._told.close()
        return os.waitstatus_to_exitcode(status), told

    def _run(self, arguments: list[str], prepare: Callable[[], None] | None) -> None:
        code: object = 99
        try:
            os.dup2(self._told.fileno(), 1)
            os.dup2(self._told.fileno(), 2)
            # Whoever captures output holds the old streams.
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["onnx-decompose", *arguments]
            if prepare is not None:
                prepare()
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            if self._afterwards is not None:
                self._afterwards()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 99)
