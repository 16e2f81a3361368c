"""Calibrated annealing: what data supports, and what is left of a weight refitted to what the original made of it.

The user's samples are split once, by the seed, into three parts:

    fit      moments of what every site reads: support, and the refit itself
    choose   the strength of the refit, and which proposal is inside the budget
    judge    claim B

Where samples are few, those to fit and to choose on take turns, each time with another model, so that a proposal is
told by all of them and still by none that its model was fitted to. What is judged never trades places.

A *proposal* is a set of masks with a name: which entries of which sites may stay. Generators make proposals, by any
evidence; here each becomes an annealed dense model. The refit goes through the model from the front
(as in optimal brain surgery, layer by layer): what a site reads is taken from the model as annealed so far, what it
should make from the original.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.analysis.refit import (
    Compensation,
    Groups,
    RefitWeight,
    degrees_of_freedom,
    refit_weight,
)
from onnx_decompose.calibrated.neighbours import with_neighbours
from onnx_decompose.calibrated.site_statistics import HELD_BYTES, Held, input_moments, observe
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.errors import DataError
from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.closing import restore
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.passes.replace_weights import ReplaceWeights
from onnx_decompose.runtime.samples import split_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.pooling import Pools
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples
    from onnx_decompose.runtime.sessions import Provider
    from onnx_decompose.verification.metrics import Metric

    Masks = Mapping[str, NDArray[np.bool_]]

logger = logging.getLogger(__name__)

__all__ = [
    "CalibrationContext",
    "Focus",
    "Parts",
    "Proposal",
    "annealed_by",
    "refitted",
    "rotated_samples",
    "split_samples",
]

FIT, CHOOSE = 0.6, 0.2
"""Shares of the samples; the rest is for claim B."""

_SURE = 1e-3
"""Ridge that tells the directions that vary from those that hardly do."""

_ROWS_PER_DIRECTION = 2.0
_FEWEST_ROWS = 32
_ADD_BROADCASTS_FROM = 7


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The three parts of the user's samples."""

    fit: Samples
    choose: Samples
    judge: Samples


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Focus:
    """Rows that count for some outputs and not for others: a group's outputs are fitted where the group is active.

    Attributes:
        count: number of groups.
        entries: values of the original that tell.
        shares: from those values by name, (rows, groups): the weight of each row for each group.
        groups: by site name, the group of each output, (N,); negative for none.
    """

    count: int
    entries: tuple[str, ...]
    shares: Callable[[Mapping[str, NDArray[Any]]], NDArray[np.float64]]
    groups: Mapping[str, NDArray[np.intp]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Which entries may stay.

    Attributes:
        name: for the report, such as ``support(4 components)``.
        masks: by site name, (K, N) bool; sites that are not named stay as they are.
        starts: entries to begin with in the place of the original's, (K, N) by site name.
        focus: which rows count for which outputs; None for all alike.
        equal: outputs that get one column, the mean of theirs, by site name; without a focus.
        remade: what each output is to be made of, (N, N) by site name: of the original's outputs y, biases included,
            it becomes y M. ``starts`` says so too, and what reads them. Not where outputs are ``equal``.
        pools: inputs that get one row, the mean of theirs, by the name of a site that alone reads its input and keeps
            all of it; without a focus.
    """

    name: str
    masks: Masks
    starts: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    focus: Focus | None = None
    equal: Mapping[str, Groups] = dataclasses.field(default_factory=dict)
    remade: Mapping[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)
    pools: Mapping[str, Pools] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """The same for another proposal of the same family with the same masks, equal outputs and pools."""
        found = hashlib.sha256()
        for name, mask in self.masks.items():
            found.update(name.encode())
            # A mask that only repeats a line is read as that line.
            lines = mask[tuple(slice(None if step else 1) for step in mask.strides)]
            found.update(np.packbits(lines).tobytes())
        for name, groups in self.equal.items():
            found.update(name.encode())
            found.update(np.ascontiguousarray(groups.labels).tobytes())
        for name, pools in self.pools.items():
            found.update(name.encode())
            found.update(pools.labels.tobytes())
        return found.digest()

    @property
    def keeps_nothing(self) -> bool:
        """Whether no entry may stay."""
        return not any(mask.any() for mask in self.masks.values())

    def wanted(self, site: Site, weight: NDArray[Any]) -> NDArray[np.float64]:
        """(K, N) what a refit of ``site`` should make of the original's input, given the original's weight."""
        wide = weight.astype(np.float64)
        return wide @ self.remade[site.name] if site.name in self.remade else wide

    def start(self, site: Site, weight: NDArray[Any]) -> NDArray[Any]:
        """The entries of ``site`` before any refit, (K, N), given the original's."""
        start = np.where(
            self.masks[site.name],
            self.starts.get(site.name, weight),
            np.zeros((), weight.dtype),
        )
        if site.name in self.pools:
            pools = self.pools[site.name]
            start = pools.mean(start)[pools.labels].astype(weight.dtype)
        if site.name not in self.equal:
            return start
        groups = self.equal[site.name]
        return groups.mean(start)[:, groups.labels].astype(weight.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationContext:
    """What generators may look at.

    Attributes:
        study: the model.
        parts: the samples.
        provider: where models run.
        seed: of everything random.
        compensation: what makes up for what goes.
        neighbours: whether a few samples to fit on are joined by others made up around them.
        sequential: whether the refit of a site sees what was annealed before it.
        metric: the user's measure of quality, if there is one.
        held_bytes: of a model's values on one set of samples.
        turn: whose turn it is to choose on, where samples take turns; the model of turn 0 is what is kept.
    """

    study: Study
    parts: Parts
    provider: Provider
    seed: int = 0
    compensation: Compensation = "ridge"
    neighbours: bool = True
    sequential: bool = True
    metric: Metric | None = None
    held_bytes: int = HELD_BYTES
    turn: int = 0

    @property
    def rng(self) -> np.random.Generator:
        """A fresh source of randomness, the same every time."""
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose weight and bias can be refitted: products whose rows can be seen from the main graph."""
        study = self.study
        graph = study.source.proto.graph
        seen = {value.name for value in graph.input}
        seen.update(name for node in graph.node for name in node.output)
        places = find_biases(study.model.proto.graph, study.sites, study.constants)
        broadcasts = opset_of(study.model.proto) >= _ADD_BROADCASTS_FROM
        return tuple(
            site
            for site in study.sites
            if not site.kernel  # the moments are of rows
            and {site.input, site.output} <= seen
            and site.quantized is None  # a refit is a float
            and (broadcasts or places[site.name].inside or places[site.name].nodes)
        )

    @functools.cached_property
    def fit(self) -> Mapping[str, Moments]:
        """Moments of what the original's sites read, by value, on the part to fit on."""
        return self._moments(self.parts.fit)

    @functools.cached_property
    def choose(self) -> Mapping[str, Moments]:
        """The same on the part to choose on."""
        return self._moments(self.parts.choose)

    @functools.cached_property
    def fitting(self) -> Samples:
        """What refits are fitted on: the part to fit on, and neighbours where it is small."""
        fit = self.parts.fit
        return with_neighbours(fit, self.rng) if self.neighbours else fit

    @functools.cached_property
    def fitted(self) -> Mapping[str, Moments]:
        """Moments of what the original's sites read, by value, on what refits are fitted on."""
        return self.fit if self.fitting is self.parts.fit else self._moments(self.fitting)

    @functools.cached_property
    def held(self) -> Mapping[Samples, Held]:
        """The original's own values, as far as they are held, on what refits are fitted and chosen on."""
        return {part: Held(self.held_bytes) for part in (self.fitting, self.parts.choose)}

    def _moments(self, samples: Samples) -> Mapping[str, Moments]:
        values = list(dict.fromkeys(site.input for site in self.sites))
        return input_moments(self.study.source, values, samples, self.provider)

    def power(self, site: Site, moments: Mapping[str, Moments]) -> NDArray[np.float64]:
        """(N,) variance of what the original's site makes."""
        return moments[site.input].through(self.study.weight(site)).yy

    def too_few(self) -> str | None:
        """Why there are too few samples to refit on, with the number that would do; None if there are enough.

        Twice as many rows as there are directions in which the model's inputs vary: of fewer, a covariance shows some
        as constant that are not. How many more the refit can use, the part to choose on tells.
        """
        entries = {value.name for value in self.study.source.proto.graph.input}
        worst = 0
        for name, moments in self.fit.items():
            seen = wanted = 0.0
            if name in entries:  # what is computed from them varies no more than they do
                seen = degrees_of_freedom(moments.xx, _SURE)
                wanted = float(np.count_nonzero(moments.spread > 0))
            if moments.count < max(_FEWEST_ROWS, _ROWS_PER_DIRECTION * seen):
                rows = max(_FEWEST_ROWS, _ROWS_PER_DIRECTION * wanted)
                worst = max(worst, math.ceil(rows * self.parts.fit.count / moments.count / FIT))
        if not worst:
            return None
        total = sum(
            part.count for part in (self.parts.fit, self.parts.choose, self.parts.judge)
        )
        return f"calibrated annealing needs {worst} samples, and there are {total}"


def split_samples(samples: Samples, seed: int) -> Parts:
    """The three parts.

    Raises:
        DataError: there are not three samples.
    """
    return rotated_samples(samples, seed)[0]


def rotated_samples(samples: Samples, seed: int) -> tuple[Parts, ...]:
    """The three parts, and those with other samples to choose on, so that each that is not judged has its turn once.

    Raises:
        DataError: there are not three samples.
    """
    if samples.count < 3:
        raise DataError(
            f"{samples.source}: holds {samples.count} samples; at least 3 are needed to fit, choose and judge"
        )
    rng = np.random.default_rng(seed)
    fit, rest = split_indices(np.arange(samples.count), rng, FIT)
    choose, judge = split_indices(rest, rng, CHOOSE / (1 - FIT))
    turns = [choose]
    others = round(FIT / CHOOSE)
    if fit.size > others:
        turns += [np.sort(part) for part in np.array_split(rng.permutation(fit), others)]
    seen = np.union1d(fit, choose)
    return tuple(
        Parts(samples.take(np.setdiff1d(seen, turn)), samples.take(turn), samples.take(judge))
        for turn in turns
    )


def refitted(context: CalibrationContext, proposal: Proposal) -> dict[str, Refit]:
    """New weights and biases of the sites that ``proposal`` names, from the front of the model to its end."""
    stages: dict[str, list[Site]] = {}
    for site in context.sites:
        if site.name in proposal.masks:
            stages.setdefault(site.input, []).append(site)
    refits: dict[str, Refit] = {}
    current = context.study.source
    # What a stage reads is final: later refits are of sites behind it.
    held = {samples: Held(context.held_bytes) for samples in context.held}
    for value, sites in stages.items():
        refits |= _Stage(context, proposal, value, sites, held).refit(current)
        if context.sequential:
            current = annealed_by(context.study, refits)
    return refits


def annealed_by(study: Study, refits: Mapping[str, Refit]) -> Model:
    """The original graph with refitted weights and biases in it."""
    sites = [site for site in study.sites if site.name in refits]
    places = find_biases(study.model.proto.graph, sites, study.constants)
    weights = {site: refits[site.name].weight for site in sites}
    biases = {
        site: places[site.name].stored(refits[site.name].added, study.weight(site).dtype)
        for site in sites
    }
    return restore(study.flat, ReplaceWeights(weights, biases)(study.model).model)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Sites, or parts of them, that are refitted to the same rows.

    Attributes:
        rows: the inputs that any of the outputs may use.
        columns: outputs by site name, in the order in which they stand side by side.
        group: whose rows they are; None for all alike.
    """

    rows: NDArray[np.intp]
    columns: Mapping[str, NDArray[np.intp]]
    group: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """The sites that read one value."""

    context: CalibrationContext
    proposal: Proposal
    value: str
    sites: Sequence[Site]
    held: Mapping[Samples, Held]

    def refit(self, current: Model) -> dict[str, Refit]:
        """New weights, where ``current`` is the model as annealed before this value."""
        starts = {
            site.name: self._each(
                site,
                self.proposal.starts.get(site.name, self.context.study.weight(site)),
            )
            for site in self.sites
        }
        masks = {site.name: self._mask(site) for site in self.sites}
        new = {name: np.zeros(start.shape) for name, start in starts.items()}
        added = {site.name: self._constants(site) for site in self.sites}
        shifts = {site.name: self._shift(site) for site in self.sites}
        jobs = list(self._jobs())
        fits, choices = (
            self._moments(jobs, current, samples)
            for samples in (self.context.fitting, self.context.parts.choose)
        )
        for job, fit, choose in zip(jobs, fits, choices, strict=True):
            found = self._fitted(
                self._joined(starts, job), self._joined(masks, job), fit, choose
            )
            logger.debug(
                "%s: %s: left %.2g of the spread, ridges %s",
                self.proposal.name,
                ", ".join(job.columns),
                found.relative_error,
                sorted(set(found.ridges)),
            )
            start = 0
            for name, columns in job.columns.items():
                part = slice(start, start + columns.size)
                new[name][np.ix_(job.rows, columns)] = found.weight[:, part]
                added[name][columns] = found.added[part]
                start += columns.size
        return {
            site.name: self._refit(
                site, new[site.name], added[site.name] + shifts[site.name], jobs, fits
            )
            for site in self.sites
        }

    def _fitted(
        self, start: NDArray[Any], mask: NDArray[np.bool_], fit: Moments, choose: Moments
    ) -> RefitWeight:
        """One job's new entries; those of pooled inputs are fitted to what the inputs add up to."""
        pools = self.proposal.pools.get(self.sites[0].name)
        if pools is None:
            return refit_weight(start, mask, fit, choose, self.context.compensation)
        assert len(self.sites) == 1
        assert mask.shape[0] == pools.labels.size
        assert mask.all()
        mean = pools.mean(start)
        found = refit_weight(
            mean,
            np.ones(mean.shape, dtype=bool),
            fit.added_up(pools.labels),
            choose.added_up(pools.labels),
            self.context.compensation,
        )
        return dataclasses.replace(found, weight=found.weight[pools.labels])

    def _refit(
        self,
        site: Site,
        weight: NDArray[np.float64],
        added: NDArray[np.float64],
        jobs: Sequence[_Job],
        fits: Sequence[Moments],
    ) -> Refit:
        """A column for every output; those of a group have one, and the constant that their own mean asks for."""
        groups, original = self.proposal.equal.get(site.name), self.context.study.weight(site)
        if groups is not None:
            (job,), (fit,) = jobs, fits
            weight = weight[:, groups.labels]
            added = np.zeros(site.shape[1])
            if self.context.compensation != "none":
                before = self.context.fitted[self.value].mean_x @ original.astype(np.float64)
                added = before - fit.mean_x @ weight[job.rows]
        return Refit(weight.astype(original.dtype), added)

    def _constants(self, site: Site) -> NDArray[np.float64]:
        """What stands in the place of outputs that keep no input: their means."""
        weight = self._each(site, self.proposal.wanted(site, self.context.study.weight(site)))
        if self.context.compensation == "none":
            return np.zeros(weight.shape[1])
        constants: NDArray[np.float64] = self.context.fitted[self.value].mean_x @ weight
        return constants

    def _shift(self, site: Site) -> NDArray[np.float64] | float:
        """What a bias differs by where outputs are made of others: b M in the place of b."""
        study = self.context.study
        if site.name not in self.proposal.remade:
            return 0.0
        bias = find_biases(study.model.proto.graph, [site], study.constants)[site.name]
        moved = bias.shift @ self.proposal.remade[site.name] - bias.shift
        shift: NDArray[np.float64] = moved / bias.alpha
        return shift

    def _each(self, site: Site, weight: NDArray[Any]) -> NDArray[Any]:
        """One column for each output or group of outputs."""
        groups = self.proposal.equal.get(site.name)
        return weight if groups is None else groups.mean(weight)

    def _mask(self, site: Site) -> NDArray[np.bool_]:
        mask, groups = self.proposal.masks[site.name], self.proposal.equal.get(site.name)
        return mask if groups is None else mask[:, groups.firsts]

    def _jobs(self) -> Iterator[_Job]:
        focus = self.proposal.focus
        if focus is None:
            masks = {site.name: self._mask(site) for site in self.sites}
            kept = {name: np.flatnonzero(mask.any(axis=0)) for name, mask in masks.items()}
            used = np.any([mask.any(axis=1) for mask in masks.values()], axis=0)
            # Also where nothing is kept: an empty job has the means that equal outputs ask for.
            yield _Job(np.flatnonzero(used), kept)
            return
        for group in (*range(focus.count), None):
            # Outputs that keep no input are constants.
            columns = {
                site.name: np.flatnonzero(
                    self.proposal.masks[site.name].any(axis=0)
                    & (
                        focus.groups[site.name] < 0
                        if group is None
                        else focus.groups[site.name] == group
                    )
                )
                for site in self.sites
            }
            used = [
                self.proposal.masks[name][:, own].any(axis=1) for name, own in columns.items()
            ]
            if any(own.size for own in columns.values()):
                yield _Job(np.flatnonzero(np.any(used, axis=0)), columns, group)

    def _moments(self, jobs: Sequence[_Job], current: Model, samples: Samples) -> list[Moments]:
        """Of each job: what its inputs are now, and what its outputs should be."""
        study, focus = self.context.study, self.proposal.focus
        wide = {
            site.name: self._each(site, self.proposal.wanted(site, study.weight(site)))
            for site in self.sites
        }
        if focus is None:
            (job,) = jobs
            return [self._alike(job, self._columns(wide, job), current, samples)]
        adding = [MomentAccumulator() for _ in jobs]
        values = list(dict.fromkeys((self.value, *focus.entries)))
        for now, before in self._values(values, current, samples):
            shares = focus.shares(before)
            z, x = _rows(before[self.value]), _rows(now[self.value])
            for job, accumulator in zip(jobs, adding, strict=True):
                weight = np.ones(len(z)) if job.group is None else shares[:, job.group]
                counts = weight > 0
                counts[0] |= not counts.any()
                y = z[counts] @ self._columns(wide, job)
                accumulator.update(x[np.ix_(counts, job.rows)], y, weight[counts])
        return [accumulator.result() for accumulator in adding]

    def _alike(
        self, job: _Job, weight: NDArray[np.float64], current: Model, samples: Samples
    ) -> Moments:
        """Where all rows count alike: the outputs' own moments are known, the rest follows from those of x with z."""
        context = self.context
        known = context.fitted if samples is context.fitting else context.choose
        wanted = known[self.value].through(weight)
        if current is context.study.source:
            rows = job.rows
            return Moments(
                wanted.count,
                wanted.mean_x[rows],
                wanted.mean_y,
                wanted.xx[np.ix_(rows, rows)],
                wanted.xy[rows],
                wanted.yy,
            )
        adding = MomentAccumulator()
        for now, before in self._values([self.value], current, samples):
            adding.update(_rows(now[self.value])[:, job.rows], _rows(before[self.value]))
        found = adding.result()
        return dataclasses.replace(
            found, mean_y=found.mean_y @ weight, xy=found.xy @ weight, yy=wanted.yy
        )

    def _values(
        self, values: Sequence[str], current: Model, samples: Samples
    ) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
        """What the stage reads now, and the named values of the original, batch by batch."""
        context = self.context
        source, provider = context.study.source, context.provider
        before = observe(source, values, samples, provider, context.held[samples])
        if current is source:
            yield from ((found, found) for found in before)
            return
        now = observe(current, [self.value], samples, provider, self.held[samples])
        yield from zip(now, before, strict=True)

    def _columns(self, arrays: Mapping[str, NDArray[Any]], job: _Job) -> NDArray[Any]:
        return np.hstack([arrays[name][:, own] for name, own in job.columns.items()])

    def _joined(self, arrays: Mapping[str, NDArray[Any]], job: _Job) -> NDArray[Any]:
        return self._columns(arrays, job)[job.rows]


def _rows(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(-1, values.shape[-1])
