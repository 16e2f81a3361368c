"""What every test shares: one thread per process, a seeded generator, hypothesis profiles."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Read once, when the numerical libraries are loaded: so before anything imports numpy or torch.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests tell nobody what they run

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# A commit is tested on the same examples every time; HYPOTHESIS_PROFILE=explore and tools.random_rewrites draw others.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True, scope="session")
def _no_measured_costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans must not depend on whether somebody has calibrated this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, fresh for every test."""
    return np.random.default_rng(0)
