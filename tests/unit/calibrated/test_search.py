"""The calibrated search looks at few proposals of a family, and finds the strictest inside the budget."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_decompose.calibrated import search as calibrated_search
from onnx_decompose.calibrated.families import Family, entries_of
from onnx_decompose.calibrated.journal import Journal
from onnx_decompose.calibrated.proposals import Proposal
from onnx_decompose.calibrated.refitting import refitted
from onnx_decompose.calibrated.search import Calibrated, calibrate_within_budget
from onnx_decompose.decomposition.decompose import Attempt, annealed_model, attempt
from onnx_decompose.errors import DataError
from onnx_decompose.graph.study import Study, study_model
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.tensors import graph_inputs
from onnx_decompose.options import Options
from onnx_decompose.runtime.samples import samples_from_arrays
from onnx_decompose.runtime.sessions import Provider
from onnx_decompose.verification.verify import AnnealingClaim, Inputs

if TYPE_CHECKING:
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.decomposition.refits import Refit

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[N, 64] x) => (float[N, 4] y)
{
    a = MatMul(x, w0)
    b = Relu(a)
    y = MatMul(b, w1)
}
"""
HIDDEN, NEEDED = 256, 70


class Chain:
    """Two products between which 70 of 256 units matter, and a search for how few may stay."""

    def __init__(self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        proto = onnx.parser.parse_model(TEXT)
        sizes = np.where(np.arange(HIDDEN) < NEEDED, 1.0, 1e-6)
        for name, weight in (
            ("w0", rng.normal(size=(64, HIDDEN))),
            ("w1", sizes[:, None] * rng.normal(size=(HIDDEN, 4))),
        ):
            tensor = numpy_helper.from_array(weight.astype(np.float32), name)
            proto.graph.initializer.append(tensor)
        self.study = study_model(Model(proto))
        inputs = {"x": rng.normal(size=(600, 64)).astype(np.float32)}
        self.samples = samples_from_arrays(inputs, graph_inputs(proto))
        self.planned: list[str] = []
        self.refits: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(calibrated_search, "attempt", self._attempt)
        monkeypatch.setattr(calibrated_search, "refitted", self._refitted)

    def best(self, *families: Family, resume: Path | None = None) -> Calibrated | str:
        """What the search finds in the families."""
        generators = {"decay": lambda _: iter(families)}
        self._monkeypatch.setattr(calibrated_search, "GENERATORS", generators)
        options = Options(budget=1e-3, batch=(64,), calibration=Path("x.npz"), resume=resume)
        given = Inputs(samples=self.samples)
        return calibrate_within_budget(self.study, options, given, Provider.CPU, to_beat=np.inf)

    def keep(self, units: int) -> Proposal:
        """The first so many units."""
        first, second = self.study.sites
        live = np.arange(HIDDEN) < units
        masks = {
            first.name: np.broadcast_to(live, first.shape),
            second.name: np.broadcast_to(live[:, None], second.shape),
        }
        return Proposal(f"keep({units})", masks)

    def family(self, name: str, *units: int) -> Family:
        """A level for each number of units."""
        return Family(
            name,
            len(units),
            lambda number: self.keep(units[number]),
            entries_of(self.study.sites),
        )

    def _attempt(self, study: Study, evidence: Any, criterion: Any, **rest: Any) -> Attempt:
        self.planned.append(criterion.name)
        return attempt(study, evidence, criterion, **rest)

    def _refitted(self, context: CalibrationContext, proposal: Proposal) -> dict[str, Refit]:
        self.refits.append(proposal.name)
        return refitted(context, proposal)


@pytest.fixture
def chain(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Chain:
    return Chain(rng, monkeypatch)


def chosen(found: Calibrated | str) -> str:
    assert isinstance(found, Calibrated), found
    return found.tried.criterion.name


def test_the_strictest_inside_the_budget_is_found_with_few_plans_and_refits(
    chain: Chain,
) -> None:
    nested = chain.family("nested", *range(4, HIDDEN, 4))
    made: list[int] = []

    def noted(number: int) -> Proposal | None:
        made.append(number)
        return nested.at(number)

    assert chosen(chain.best(dataclasses.replace(nested, at=noted))) == "keep(72)"
    assert len(set(chain.refits)) <= 7
    assert len(chain.refits) <= 16
    assert len(chain.planned) <= 2 * len(set(chain.refits)) + 2
    assert len(set(made)) <= 8


def test_a_family_that_cannot_be_faster_is_never_made(chain: Chain) -> None:
    def needless(number: int) -> Proposal | None:
        raise AssertionError(number)

    small = Family("small", 9, needless, removes=HIDDEN)
    for families in (
        (small, chain.family("good", 72, 100)),
        (chain.family("good", 72, 100), small),
    ):
        assert chosen(chain.best(*families)) == "keep(72)"


def test_of_a_family_whose_strictest_is_not_faster_nothing_else_is_made(chain: Chain) -> None:
    def only_the_strictest(number: int) -> Proposal | None:
        assert number == 0
        return chain.keep(100)

    wide = Family("wide", 9, only_the_strictest, entries_of(chain.study.sites))
    assert chosen(chain.best(wide, chain.family("good", 72, 200))) == "keep(72)"
    assert "keep(100)" not in chain.refits


def test_levels_that_leave_nothing_or_take_nothing_are_passed_over(chain: Chain) -> None:
    nested = chain.family("nested", 0, 0, 72, 72, 72, 72, 0, 0)

    def at(number: int) -> Proposal | None:
        return nested.at(number) if number < 6 else None

    assert chosen(chain.best(dataclasses.replace(nested, at=at))) == "keep(72)"
    # The same masks are planned once, and once more when they are refitted.
    assert chain.planned.count("keep(72)") - len(chain.refits) == 1
    assert "calibrated: the data lets nothing" in str(
        chain.best(dataclasses.replace(nested, at=lambda _: None))
    )


def test_the_faster_of_two_families_wins_whatever_their_order(chain: Chain) -> None:
    good, better = chain.family("good", 100, 120), chain.family("better", 72, 200)
    assert chosen(chain.best(good, better)) == "keep(72)"
    assert chosen(chain.best(better, good)) == "keep(72)"


def test_the_nearest_is_told_where_none_is_inside_the_budget(chain: Chain) -> None:
    told = chain.best(chain.family("strict", 8, 32, 64))
    assert isinstance(told, str)
    assert told.startswith("calibrated: at keep(64) (1 substructure, 0.")


class TestResumed:
    def test_killed_after_every_answer_it_comes_to_the_same(
        self, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        families = [chain.family("nested", 0, *range(40, 120, 8)), chain.family("other", 8, 76)]
        whole = chain.best(*families)
        refits, planned = chain.refits[:], chain.planned[:]
        chain.refits.clear()
        chain.planned.clear()
        write = Journal._write

        def one_more(self: Journal, entry: dict[str, Any]) -> None:
            write(self, entry)
            raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "_write", one_more)
        runs, again = 0, None
        while again is None:
            with contextlib.suppress(KeyboardInterrupt):
                again = chain.best(*families, resume=tmp_path / "search.jsonl")
            runs += 1
        assert runs > 10
        assert chosen(again) == chosen(whole)
        assert isinstance(whole, Calibrated)
        assert isinstance(again, Calibrated)
        first, second = (annealed_model(found.tried) for found in (whole, again))
        assert first.proto.SerializeToString() == second.proto.SerializeToString()
        # The best is refitted once more: weights are not kept.
        assert set(chain.refits) == set(refits)
        assert set(chain.planned) == set(planned)
        assert len(chain.refits) <= 2 * len(refits) + 1

    def test_the_reason_why_there_is_none_is_the_same(
        self, chain: Chain, tmp_path: Path
    ) -> None:
        strict, journal = chain.family("strict", 8, 32, 64), tmp_path / "search.jsonl"
        told = chain.best(strict, resume=journal)
        chain.refits.clear()
        assert chain.best(strict, resume=journal) == told
        assert not chain.refits

    def test_on_other_samples_it_is_another_search(self, chain: Chain, tmp_path: Path) -> None:
        journal = tmp_path / "search.jsonl"
        chain.best(chain.family("good", 72), resume=journal)
        rows = {"x": chain.samples.rows["x"].copy()}
        rows["x"][-1, -1] += 1
        chain.samples = dataclasses.replace(chain.samples, rows=rows)
        with pytest.raises(DataError, match="of another search"):
            chain.best(chain.family("good", 72), resume=journal)


class TestJudging:
    """What is shown to the samples that are held out, and what comes of it."""

    @pytest.fixture
    def judged(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the proposals that the held-out samples saw; those in ``failing`` do not pass there."""
        seen: list[str] = []
        self.failing: set[str] = set()

        def measured(search: Any, tried: Attempt, inputs: Inputs) -> AnnealingClaim:
            seen.append(tried.criterion.name)
            claim: AnnealingClaim = measure(search, tried, inputs)
            passed = claim.passed and tried.criterion.name not in self.failing
            return dataclasses.replace(claim, passed=passed)

        search: Any = calibrated_search
        measure = search._Search._measured
        monkeypatch.setattr(search._Search, "_measured", measured)
        return seen

    def test_the_safest_comes_first_and_the_fastest_that_passes_wins(
        self, chain: Chain, judged: list[str]
    ) -> None:
        found = chain.best(chain.family("nested", 8, 72, 100, 120, 200))
        assert chosen(found) == judged[-1] == "keep(72)"

    def test_what_fails_there_is_not_followed_by_what_is_next_in_the_family(
        self, chain: Chain, judged: list[str]
    ) -> None:
        """Walking on until one passes would be a choice by the samples that are to judge it."""
        self.failing = {"keep(72)"}
        found = chain.best(chain.family("nested", 8, 72, 73, 74, 75, 76, 77))
        assert judged == ["keep(72)"]
        assert isinstance(found, str)
        assert "is " in found
        assert "1 on the held-out ones" in found

    def test_the_claim_says_how_many_were_compared_and_on_what(
        self, chain: Chain, judged: list[str]
    ) -> None:
        found = chain.best(chain.family("nested", 8, 32, 72, 100))
        assert isinstance(found, Calibrated)
        assert found.inputs.part == (
            "120 samples held out of 600, 360 to fit and 120 to choose, in turns; "
            f"{len(set(chain.refits))} proposals compared on those, {len(judged)} on the held-out ones"
        )
