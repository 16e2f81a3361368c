"""What a long search has found out so far, in a file, so that an interrupted one goes on where it was.

One JSON value a line: first whose journal it is, then what was found, in the order in which it was found. A line that
was not written to its end, the last one of a process that was killed, is as if it were not there.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

from onnx_decompose.errors import DataError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

_HEADER = "onnx-decompose search"


class Journal:
    """Answers to questions, each worked out once: by this process, or by an earlier one on the same search.

    Args:
        path: where they are kept; only in memory if None.
        search: what the answers depend on, as a digest.

    Raises:
        DataError: the file is no journal, or that of another search.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path | None = None, search: str = "") -> None:
        self._path = path
        self._answers: dict[str, Any] = {}
        if path is None:
            return
        header = json.dumps({_HEADER: search}) + "\n"
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if not whole and header.encode().startswith(content):
                path.write_text(header, "utf-8")
                return
            self._read(path, whole, header)
            if whole != content:
                os.truncate(path, len(whole))
        except OSError as error:
            raise OutputError(
                f"{path}: the journal cannot be kept here ({error.strerror}); give another path"
            ) from error
        logger.info("%s: %d answers of an earlier run", path, len(self._answers))

    def recall(self, question: str, answer: Callable[[], Any]) -> Any:
        """The answer, a JSON value: as it was written down, or worked out and written down now."""
        if question not in self._answers:
            found = answer()
            self._answers[question] = found
            self._write({"question": question, "answer": found})
        return self._answers[question]

    def _read(self, path: Path, whole: bytes, header: str) -> None:
        first, *lines = whole.decode("utf-8", "replace").splitlines(keepends=True) or [""]
        if first != header:
            whose = "of another search" if first.startswith(f'{{"{_HEADER}"') else "no journal"
            raise DataError(
                f"{path}: is {whose}; a search goes on with the model, the samples, the options and the versions that "
                "it began with. Give another file to --resume, or delete this one"
            )
        for number, line in enumerate(lines, 2):
            try:
                entry = json.loads(line)
                self._answers[entry["question"]] = entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: line {number} is not what was written; delete the file and search anew"
                ) from error

    def _write(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self._path}: the journal cannot be written ({error.strerror})"
            ) from error
