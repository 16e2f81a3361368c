"""Random corruptions of random rewrites: what ``validate`` does not catch is no other model."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_decompose.errors import DecomposeError
from onnx_decompose.model.model_io import Model, load_model
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.verify import Inputs, validate_models
from tests.e2e.mutants import (
    KINDS,
    MUTATIONS,
    Subject,
    judge,
    last_bit,
    mutated,
    sign,
    stored_float,
    subjects,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def rewrites() -> dict[str, Subject]:
    """One rewrite of every kind; ``python -m tools.mutation`` corrupts many."""
    return {subject.kind: subject for subject in subjects(dict.fromkeys(KINDS, 1))}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_caught_changes_nothing(kind: str, rewrites: dict[str, Subject]) -> None:
    subject = rewrites[kind]
    verdict = validate_models(
        Model(subject.original),
        load_model(subject.rewritten),
        inputs=Inputs(seeds=1),
        provider=Provider.CPU,
        budget=1e9,
    )
    assert verdict, verdict.failure
    tried = 0
    for position, mutation in enumerate(MUTATIONS):
        mutant = mutated(subject, mutation, np.random.default_rng([1, position]))
        if mutant is None:
            continue
        tried += 1
        found = judge(subject, mutant, seeds=1)
        assert found.caught or found.equivalent, mutation.__name__
        if mutation in {stored_float, last_bit, sign}:
            assert found.proof == "caught", mutation.__name__
    assert tried >= 6


def test_the_whole_command_catches_what_its_parts_do(rewrites: dict[str, Subject]) -> None:
    subject = rewrites["split"]
    for position, mutation in enumerate(MUTATIONS):
        mutant = mutated(subject, mutation, np.random.default_rng([2, position]))
        if mutant is None:
            continue
        try:
            valid = bool(
                validate_models(
                    Model(subject.original),
                    load_model(mutant),
                    inputs=Inputs(seeds=1),
                    provider=Provider.CPU,
                    budget=1e9,
                )
            )
        except DecomposeError:
            valid = False
        assert valid is not judge(subject, mutant, seeds=1).caught, mutation.__name__
