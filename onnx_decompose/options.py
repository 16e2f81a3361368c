"""Everything a user can choose, in one place; the command line's options are these fields."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

from onnx_decompose.analysis.refit import Compensation
from onnx_decompose.errors import OptionError
from onnx_decompose.planning.state_graph import Emit

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Annealing", "Options", "ProposalKind", "ProviderChoice"]

ProviderChoice = Literal["auto", "cpu", "cuda"]
Annealing = Literal["auto", "tested", "calibrated"]
"""What decides over removal: both of the others, the faster one wins; the null; calibration data."""

ProposalKind = Literal[
    "decay", "support", "networks", "removal", "inputs", "merging", "partition"
]
"""What calibrated annealing may propose: see ``calibrated.search.GENERATORS``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """Options of ``analyze`` and ``rewrite``.

    Attributes:
        null: the null distribution, or where it comes from (``auto``, ``zero``, ``recorded``, ``torch``,
            ``normal:S``, ``snapshot:FILE``, ...).
        null_config: TOML file that names a null per weight, by glob.
        criterion: which entries count as supported (``fdr``, ``fwer``, ``ksigma``, ...).
        alpha: level of the criterion.
        calibration: the user's inputs: claim B is measured on them, or on a part of them where something is fitted to
            the rest.
        annealing: ``tested`` removes what the null does not support, ``calibrated`` what the user's inputs do not need,
            ``auto`` takes the faster of the two; where a null is named, that is what is tested and nothing else.
        proposals: the kinds of proposals that calibrated annealing tries; none named tries all.
        compensation: what makes up for what calibrated annealing removes: ``ridge`` (refitted weights), ``mean``
            (biases alone), ``none``.
        resume: file that keeps what the calibrated search finds out; one of an interrupted run goes on from there.
        budget: bound of claim B: relative L2 error of every output, or the metric's drop; 0 removes nothing but
            exact zeros.
        output_budgets: bounds of single outputs in the place of ``budget``, as (name, bound); without a metric.
        metric: ``module:function``, higher is better; or ``top1``, how often an output's largest entry stays at its
            place.
        provider: where to run and to time.
        emit: how regions are rewritten; ``auto`` chooses by cost.
        autotune: time the candidates of every region and take the fastest, not the one predicted to be.
        batch: batch sizes at which the rewritten model is timed.
        axes: sizes of other dynamic axes at which it is timed, as (name, size); those of the user's inputs otherwise.
        seeds: random draws per size when claims are measured.
        seed: of everything random.
        force: keep a rewritten model that is not faster.
    """

    null: str = "auto"
    null_config: Path | None = None
    criterion: str = "fdr"
    alpha: float = 0.01
    calibration: Path | None = None
    annealing: Annealing = "auto"
    proposals: tuple[ProposalKind, ...] = ()
    compensation: Compensation = "ridge"
    resume: Path | None = None
    budget: float = 0.01
    output_budgets: tuple[tuple[str, float], ...] = ()
    metric: str | None = None
    provider: ProviderChoice = "auto"
    emit: Emit = "auto"
    autotune: bool = False
    batch: tuple[int, ...] = (1, 16, 256)
    axes: tuple[tuple[str, int], ...] = ()
    seeds: int = 3
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        """Check the values once, so that nothing inside has to.

        Raises:
            OptionError: a value is out of range.
        """
        if not 0 < self.alpha < 1:
            raise OptionError(
                f"alpha {self.alpha} is not a level; give a number between 0 and 1"
            )
        self._check_budgets()
        self._check_choices()
        if self.annealing == "calibrated" and self.calibration is None:
            raise OptionError("calibrated annealing needs data: give --calibration with inputs")
        if self.resume is not None and not self.calibrates:
            raise OptionError(
                "there is no calibrated search to resume: give --calibration, a budget over 0, and no --null"
            )
        if not self.batch or min(self.batch) < 1:
            raise OptionError(
                f"batch {self.batch} holds no sizes; give numbers from 1 on, as in 1,16,256"
            )
        for name, size in self.axes:
            if size < 1:
                raise OptionError(f"axis {name!r} cannot be timed at {size}; give 1 or more")
        if self.seed < 0:
            raise OptionError(f"seed {self.seed} is negative; give 0 or more")
        if self.seeds < 1:
            raise OptionError(f"seeds {self.seeds} draws nothing; give 1 or more")
        if self.metric is not None and self.calibration is None:
            raise OptionError(
                "a metric needs data: give --calibration with the inputs (and labels) that it reads"
            )

    def _check_budgets(self) -> None:
        if not self.budget >= 0:
            raise OptionError(
                f"budget {self.budget} is negative; give 0 for exact, or a small number"
            )
        for name, bound in self.output_budgets:
            if not bound >= 0:
                raise OptionError(
                    f"output budget {bound} for {name!r} is negative; give 0 or more"
                )
        if self.output_budgets and self.metric is not None:
            raise OptionError(
                "output budgets bound relative errors; give a metric or them, not both"
            )

    @property
    def calibrates(self) -> bool:
        """Whether calibrated annealing is tried."""
        if self.calibration is None or not self.budget or self.annealing == "tested":
            return False
        named = self.null != "auto" or self.null_config is not None
        return self.annealing == "calibrated" or not named

    def _check_choices(self) -> None:
        for name, choices in (
            ("provider", get_args(ProviderChoice)),
            ("emit", get_args(Emit)),
            ("annealing", get_args(Annealing)),
            ("compensation", get_args(Compensation)),
        ):
            self._check_choice(name, getattr(self, name), choices)
        for kind in self.proposals:
            self._check_choice("proposals", kind, get_args(ProposalKind))

    @staticmethod
    def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise OptionError(f"{name} {value!r} is unknown; choose {', '.join(choices)}")
