"""The refit: of a proposal an annealed dense model, made up for by what is left.

It goes through the model from the front (as in optimal brain surgery, layer by layer): what a site reads is taken from
the model as annealed so far, what it should make from the original. Inside the bodies of Loop and Scan both are taken
from the original: there a refit also changes what its own site, and those before it, read in later iterations.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.gram import MomentAccumulator, Moments
from onnx_decompose.analysis.grid import round_refit
from onnx_decompose.analysis.refit import RefitWeight, refit_weight
from onnx_decompose.calibrated.cell_refits import refit_cell
from onnx_decompose.calibrated.site_statistics import Held
from onnx_decompose.calibrated.views import Rows, comparable
from onnx_decompose.decomposition.refits import Refit
from onnx_decompose.graph.biases import find_biases
from onnx_decompose.graph.closing import restore
from onnx_decompose.passes.recurrent import ReplaceRecurrentWeights
from onnx_decompose.passes.replace_weights import ReplaceWeights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.calibrated.cells import Cell
    from onnx_decompose.calibrated.context import CalibrationContext
    from onnx_decompose.calibrated.proposals import Proposal
    from onnx_decompose.calibrated.views import View
    from onnx_decompose.graph.flat import Flat
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.graph.study import Study
    from onnx_decompose.model.model_io import Model
    from onnx_decompose.runtime.samples import Samples

logger = logging.getLogger(__name__)

__all__ = ["annealed_by", "refitted"]


def refitted(context: CalibrationContext, proposal: Proposal) -> dict[str, Refit]:
    """New weights and biases of the sites that ``proposal`` names, from the front of the model to its end."""
    views: dict[View, list[Site]] = {}
    for site in context.sites:
        if site.name in proposal.masks:
            views.setdefault(context.view(site), []).append(site)
    refits: dict[str, Refit] = {}
    current = context.study.flat
    # What a stage reads is final: later refits are of sites behind it.
    held = {samples: Held(context.held_bytes) for samples in context.held}
    stages: dict[int, _Stage | Cell] = {
        sites[0].node: _Stage(context, proposal, view, sites, held)
        for view, sites in views.items()
    }
    stages |= {
        cell.site.node: cell for cell in context.cells if cell.weights[0].name in proposal.masks
    }

    def with_own(own: Mapping[str, Refit]) -> Flat:
        before = refits if context.sequential else {}
        return _annealed(context.study, {**before, **own})

    for node in sorted(stages):
        stage = stages[node]
        if isinstance(stage, _Stage):
            # What an iteration reads hangs on all that earlier ones made: a loop that is half annealed does not tell.
            iterated = context.inside.is_iterated(stage.view.value)
            refits |= stage.refit(context.study.flat if iterated else current)
        else:
            refits |= refit_cell(context, proposal, stage, with_own)
        if context.sequential:
            current = _annealed(context.study, refits)
    return refits


def annealed_by(study: Study, refits: Mapping[str, Refit]) -> Model:
    """The original graph with refitted weights and biases in it."""
    return restore(study.flat, _annealed(study, refits).model)


def _annealed(study: Study, refits: Mapping[str, Refit]) -> Flat:
    """The same, opened."""
    sites = [site for site in study.sites if site.name in refits]
    places = find_biases(study.model.proto.graph, sites, study.constants)
    weights = {site: refits[site.name].stored for site in sites}
    biases = {
        site: places[site.name].stored(refits[site.name].added)
        for site in sites
        if not places[site.name].is_missing
    }
    changed = ReplaceWeights(weights, biases)(study.model).model
    entries = {
        weight.name: refits[weight.name].stored
        for site in study.recurrent
        for weight in site.all_weights
        if weight.name in refits
    }
    changed = ReplaceRecurrentWeights(study.recurrent, entries)(changed).model
    return dataclasses.replace(study.flat, model=changed)


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
    """The sites that read one view of a value."""

    context: CalibrationContext
    proposal: Proposal
    view: View
    sites: Sequence[Site]
    held: Mapping[Samples, Held]

    def refit(self, current: Flat) -> dict[str, Refit]:
        """New weights, where ``current`` is the model as annealed before this value."""
        starts = {site.name: self._start(site) for site in self.sites}
        masks = {site.name: self._mask(site) for site in self.sites}
        new = {name: np.zeros(start.shape) for name, start in starts.items()}
        added = {site.name: self._constants(site) for site in self.sites}
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
            for site in self.sites:
                columns = job.columns[site.name]
                part = slice(start, start + columns.size)
                weight, constants = found.weight[:, part], found.added[part]
                if site.quantized is not None:
                    moments = fit.of_outputs(part), choose.of_outputs(part)
                    weight, constants = self._rounded(site, job, weight, constants, *moments)
                new[site.name][np.ix_(job.rows, columns)] = weight
                added[site.name][columns] = constants
                start += columns.size
        return {
            site.name: self._refit(
                site, new[site.name], added[site.name] + self._shift(site), jobs, fits
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
                before = self.context.fitted[self.view].mean_x @ original.astype(np.float64)
                added = before - fit.mean_x @ weight[job.rows]
        if self.context.biases[site.name].is_missing:
            added = np.zeros(site.shape[1])
        return Refit(self.context.study.stored_as(site, weight), added)

    def _rounded(
        self,
        site: Site,
        job: _Job,
        weight: NDArray[np.float64],
        added: NDArray[np.float64],
        fit: Moments,
        choose: Moments,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What can be stored of a job's entries and constants of a site whose weight is of integers.

        Where the constant can be any number, it follows the rounded entries. Else it is rounded first, or there is
        none, and the entries are fitted to what it leaves.
        """
        columns, block = job.columns[site.name], np.ix_(job.rows, job.columns[site.name])
        bias, mask, compensation = (
            self.context.biases[site.name],
            self._mask(site)[block],
            self.context.compensation,
        )
        if not bias.is_free:
            shift = self._shift(site)
            wanted = shift.copy()
            wanted[columns] += added
            added = (bias.held(wanted) - shift)[columns]
            fit, choose = fit.around(added), choose.around(added)
            start = self._start(site)[block]
            weight = refit_weight(start, mask, fit, choose, compensation).weight
        grid = self.context.study.grid(site).part(job.rows, columns)
        if compensation != "ridge":
            return np.where(mask, grid.nearest(weight), 0.0), added
        weight = round_refit(weight, mask, grid, fit, choose)
        return weight, fit.mean_y - fit.mean_x @ weight if bias.is_free else added

    def _constants(self, site: Site) -> NDArray[np.float64]:
        """What stands in the place of outputs that keep no input: their means."""
        weight = self._each(site, self.proposal.wanted(site, self.context.study.weight(site)))
        if self.context.compensation == "none":
            return np.zeros(weight.shape[1])
        constants: NDArray[np.float64] = self.context.fitted[self.view].mean_x @ weight
        return constants

    def _start(self, site: Site) -> NDArray[Any]:
        """What the refit begins with."""
        weight = self.context.study.weight(site)
        return self._each(site, self.proposal.starts.get(site.name, weight))

    def _shift(self, site: Site) -> NDArray[np.float64]:
        """What a bias differs by where outputs are made of others: b M in the place of b."""
        if site.name not in self.proposal.remade:
            return np.zeros(self._mask(site).shape[1])
        bias = self.context.biases[site.name]
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

    def _moments(self, jobs: Sequence[_Job], current: Flat, samples: Samples) -> list[Moments]:
        """Of each job: what its inputs are now, and what its outputs should be."""
        study, focus = self.context.study, self.proposal.focus
        wide = {
            site.name: self._each(site, self.proposal.wanted(site, study.weight(site)))
            for site in self.sites
        }
        if focus is None:
            (job,) = jobs
            return [self._alike(job, self._columns(wide, job), current, samples)]
        assert self.view.window is None  # shares are of a value's own rows
        adding = [MomentAccumulator() for _ in jobs]
        values = list(dict.fromkeys((*self.view.values, *focus.entries)))
        for now, before in self._values(values, current, samples):
            shares = focus.shares(before)
            z = self.view.rows(before)
            x = self._recast(z) if now is before else self.view.rows(now)
            for job, accumulator in zip(jobs, adding, strict=True):
                weight = np.ones(len(z)) if job.group is None else shares[:, job.group]
                counts = weight > 0
                counts[:1] |= not counts.any()
                y = z[counts] @ self._columns(wide, job)
                accumulator.update(x[np.ix_(counts, job.rows)], y, weight[counts])
        return [accumulator.result() for accumulator in adding]

    def _recast(self, read: NDArray[Any]) -> NDArray[Any]:
        """What the original reads, (rows, K), in the units that the proposal makes of it."""
        made_of = self.proposal.recast.get(self.sites[0].name)
        return read if made_of is None else read @ made_of

    def _alike(
        self, job: _Job, weight: NDArray[np.float64], current: Flat, samples: Samples
    ) -> Moments:
        """Where all rows count alike: the outputs' own moments are known, the rest follows from those of x with z."""
        context = self.context
        known = context.fitted if samples is context.fitting else context.choose
        wanted = known[self.view].through(weight)
        if current is context.study.flat:
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
        reading = Rows(self.view, samples.count, context.seed)
        for now, before in self._values(self.view.values, current, samples):
            for x, z in reading.each(now, before):
                adding.update(x[:, job.rows], z)
        found = adding.result()
        return dataclasses.replace(
            found, mean_y=found.mean_y @ weight, xy=found.xy @ weight, yy=wanted.yy
        )

    def _values(
        self, values: Sequence[str], current: Flat, samples: Samples
    ) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
        """What the stage reads now, and the named values of the original, batch by batch."""
        context = self.context
        known = context.held[samples]
        if current is context.study.flat:
            yield from ((found, found) for found in context.observe(values, samples, known))
            return
        choices = context.inside.choices(self.view.value)
        ways = [name for name in choices if name not in context.study.constants.names]
        before = context.observe(list(dict.fromkeys((*values, *ways))), samples, known)
        now = context.observe([*self.view.values, *ways], samples, self.held[samples], current)
        for first, second in zip(now, before, strict=True):
            # Rows belong together where both took the same branches and there are as many; elsewhere, and where what
            # was annealed makes no numbers any more, there are the original's alone.
            alike = all(
                np.array_equal(first[name], second[name]) for name in ways
            ) and comparable(first, second, self.view.values)
            yield first if alike else second, second

    def _columns(self, arrays: Mapping[str, NDArray[Any]], job: _Job) -> NDArray[Any]:
        return np.hstack([arrays[name][:, own] for name, own in job.columns.items()])

    def _joined(self, arrays: Mapping[str, NDArray[Any]], job: _Job) -> NDArray[Any]:
        return self._columns(arrays, job)[job.rows]
