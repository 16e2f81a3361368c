"""What was found out is found in the file again, whole lines only, and never that of another search."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING

import pytest

from onnx_decompose.calibrated.journal import Journal
from onnx_decompose.errors import DataError, OutputError

if TYPE_CHECKING:
    from pathlib import Path


def never() -> None:
    raise AssertionError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search.jsonl"


class TestAnswers:
    def test_each_question_is_answered_once(self) -> None:
        journal = Journal()
        assert journal.recall("cost", lambda: 0.5) == 0.5
        assert journal.recall("cost", never) == 0.5
        assert journal.recall("error", lambda: None) is None
        assert journal.recall("error", never) is None

    def test_another_process_has_them(self, path: Path) -> None:
        first = Journal(path, "a")
        first.recall("cost", lambda: math.inf)
        first.recall("error", lambda: {"error": 0.1 + 0.2, "told": "möglich\n"})
        second = Journal(path, "a")
        assert second.recall("cost", never) == math.inf
        assert second.recall("error", never) == {"error": 0.1 + 0.2, "told": "möglich\n"}
        second.recall("more", lambda: 1)
        assert Journal(path, "a").recall("more", never) == 1

    def test_one_json_value_a_line(self, path: Path) -> None:
        Journal(path, "a").recall("cost", lambda: 2)
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert lines == [
            {"onnx-decompose search": "a"},
            {"question": "cost", "answer": 2},
        ]

    def test_nothing_is_kept_of_an_answer_that_fails(self, path: Path) -> None:
        journal = Journal(path, "a")
        with pytest.raises(AssertionError):
            journal.recall("cost", never)
        assert journal.recall("cost", lambda: 3) == 3


class TestInterrupted:
    def test_wherever_it_ends_whole_lines_count(self, path: Path) -> None:
        journal = Journal(path, "a")
        for number in range(3):
            journal.recall(str(number), partial(int, number))
        content = path.read_bytes()
        for size in range(len(content) + 1):
            path.write_bytes(content[:size])
            again = Journal(path, "a")
            whole = content[:size].count(b"\n") - 1
            for number in range(3):
                if number < whole:
                    assert again.recall(str(number), never) == number
                else:
                    assert again.recall(str(number), partial(int, number)) == number
            assert path.read_bytes() == content


class TestRefused:
    def test_that_of_another_search(self, path: Path) -> None:
        Journal(path, "a").recall("cost", lambda: 1)
        before = path.read_bytes()
        with pytest.raises(DataError, match=r"search\.jsonl: is of another search"):
            Journal(path, "b")
        assert path.read_bytes() == before

    @pytest.mark.parametrize("content", [b"some notes\n", b"\x00\xff", b"{}\n", b"\n"])
    def test_a_file_that_is_none(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no journal"):
            Journal(path, "a")
        assert path.read_bytes() == content

    @pytest.mark.parametrize("line", ["{", "3", '{"question": "cost"}', '["question"]'])
    def test_a_broken_line_that_is_not_the_last(self, path: Path, line: str) -> None:
        Journal(path, "a")
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" + '{"question": "cost", "answer": 1}\n')
        with pytest.raises(DataError, match="line 2 is not what was written"):
            Journal(path, "a")

    def test_where_nothing_can_be_written(self, path: Path) -> None:
        with pytest.raises(OutputError, match="cannot be kept here"):
            Journal(path / "missing" / "journal", "a")
        path.mkdir()
        with pytest.raises(OutputError, match="cannot be kept here"):
            Journal(path, "a")
