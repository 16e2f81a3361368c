"""Timing that does not take long."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import make_quick


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing of a few milliseconds and no shuffled controls, for tests whose verdict hangs on neither."""
    make_quick(monkeypatch)
