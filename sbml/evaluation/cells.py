"""One cell of an evaluation: every image's row, made once, streamed to disk, with its error bars.

A row is of (sweep, image id), and every draw in it is keyed by the two. Sweep 0 covers all images.

    bound   every sweep covers all images, its times one lattice over them; a row of the result is
            the mean over sweeps, and the sweeps' means tell the noise
    ode     sweep 1 covers a subset, whose two draws tell the noise; the subset solved again by
            ``estimate.reference`` tells the solver's error

Batches are padded and the padding dropped: every image counts exactly once, and neither the batch
size nor the number of devices changes a result.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import bits, divergence, estimate, estimators, times
from sbml.bound import GaussianControl
from sbml.data import ImageSet, eval_batches, spread
from sbml.dequantizers import has_density
from sbml.estimate import Estimate
from sbml.estimators import Cell, Reduction, Rows, Target
from sbml.estimators.base import Estimator
from sbml.experiment.build import Experiment
from sbml.ode import Solver
from sbml.report.result import Result
from sbml.runtime import progress, sharding
from sbml.runtime.checkpoint import Restored, tree_crc32
from sbml.runtime.parts import Parts
from sbml.runtime.preemption import Preemption
from sbml.runtime.workdir import Workdir

Table = dict[str, np.ndarray]


# Before a standard error is believed enough to stop by. Of 2 or 3 sweeps it is often far too small
# by chance: stopping there, a 95% interval held the truth in 90% of 4,000 trials, of 8 in 93%.
FIRST_SWEEPS = 8


class Unconverged(ValueError):
    """A fixed-step solve too coarse for the budget: no number is made of it."""


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A dequantizer and its parameters."""

    model: Any
    params: Any
    restored: Restored | None = None  # its checkpoint, where it was trained


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all cells share: one checkpoint, one split."""

    experiment: Experiment
    restored: Restored
    images: ImageSet
    control: GaussianControl | None
    density: Callable[[float], np.ndarray | None]  # of the bound's times, by their eps
    workdir: Workdir

    def ids(self, count: int = 0) -> np.ndarray:
        """The images wanted, of these ``count`` at most if it is not 0: a sorted random sample.

        One permutation decides, the same for every seed: a larger sample holds the smaller ones, so
        their rows serve for it. Files lie by class, crops by photo: the first are no sample.
        """
        size, config = len(self.images), self.experiment.config.eval
        wanted = min(config.max_images or size, count or size, size)
        order = np.arange(size) if config.in_order else np.random.RandomState(0).permutation(size)
        return np.sort(order[:wanted])


class CellRun:
    """The rows of ``cell``, made or read back from an earlier, interrupted evaluation."""

    def __init__(self, shared: Evaluation, cell: Cell, dequantization: Dequantization) -> None:
        self.shared, self.cell, self.dequantization = shared, cell, dequantization
        experiment = shared.experiment
        self.config = experiment.config.eval
        model = dequantization.model
        eps = experiment.discrete_eps if model.at_noise else experiment.eval_eps
        self.target = Target(experiment.sde, eps, experiment.levels, model)
        self.estimator = estimator(experiment, cell)
        self.reduction = Reduction(proposal=experiment.eval_proposal)
        if self.estimator.reducible:
            density: Any = shared.density(eps)
            self.reduction = dataclasses.replace(
                self.reduction, control=shared.control, density=density
            )
        self.ids = shared.ids(self.config.importance_images if cell.num_importance > 1 else 0)
        # Where K > 1 an image costs K solves: about as many in all, but four images at least.
        size = self.config.subset or len(self.ids)
        # Evenly spread: no random draw, and the same whatever the seed.
        self.subset = self.ids[spread(len(self.ids), max(4, size // cell.num_importance))]
        # With K solves an image, smaller batches: less padding where few images are wanted.
        size = max(1, self.config.batch_size // cell.num_importance)
        if self.estimator.exact:
            exact = divergence.exact_batch(math.prod(experiment.shape))
            size = min(size, exact * jax.device_count())
        self.batch_size = sharding.round_up(size)
        self.score = experiment.exact_adapter(shared.restored.state.ema_params)
        self._known: dict[Solver, Parts] = {}

    def rows(self, ids: np.ndarray, sweep: int, solver: Solver | None = None) -> Table:
        """The rows of ``ids`` in ``sweep``, those not on disk computed now."""
        solver = solver or self.shared.experiment.eval_solver
        parts = self._parts(solver)
        done = parts.read(sweep)
        missing = np.setdiff1d(ids, done.get("id", []))
        if missing.size:
            if missing.size < ids.size:
                logging.info(
                    "%d of %d images were evaluated before", ids.size - missing.size, ids.size
                )
            self._fill(parts, missing, ids.size, sweep, solver)
            done = parts.read(sweep)
        chosen = np.isin(done["id"], ids)
        return {name: column[chosen] for name, column in done.items()}

    def _fill(
        self, parts: Parts, missing: np.ndarray, total: int, sweep: int, solver: Solver
    ) -> None:
        label = f"{self.cell.name}" + (f" sweep {sweep + 1}" if sweep else "")
        lattice = self._lattice(sweep) if self.cell.is_bound else None
        bar = progress.bar(label, "image", total, total - len(missing), leave=sweep == 0)
        preemption = Preemption()
        with bar:
            for rows, mask in eval_batches(len(missing), self.batch_size):
                ids = missing[rows]
                columns = self._columns(ids, sweep, solver, lattice)
                columns = {k: v[mask] for k, v in columns.items()}
                if jax.process_index() == 0:
                    parts.write(columns)
                bar.update(int(mask.sum()))
                mean = np.mean(columns["bits_per_dim"])
                bar.set_postfix_str(f"{mean:.3f} bits/dim", refresh=False)
                preemption.leave_if_requested("the images so far are stored")
        sharding.barrier("evaluated")

    def _lattice(self, sweep: int) -> np.ndarray:
        """The times' u ``(images, n_times)`` of one sweep over the whole split."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), len(self.shared.images))
        draw = times.DRAWS[self.config.times]
        key = jax.random.fold_in(key, sweep)
        return np.asarray(draw(key, len(self.shared.images), self.config.n_times))

    def _columns(
        self, ids: np.ndarray, sweep: int, solver: Solver, lattice: np.ndarray | None
    ) -> Table:
        """The rows on the host; totals in float64 so that the terms add up."""
        images, split = self.shared.images, sharding.batched(sharding.data_mesh())
        batch = Rows(
            data=sharding.put(images.images[ids], split),
            ids=sharding.put(ids.astype(np.int32), split),
            sweeps=sharding.put(np.full(len(ids), sweep, np.int32), split),
            seed=np.uint32(self.config.seed),
        )
        u = None if lattice is None else sharding.put(lattice[ids], split)
        given = solver if lattice is None else self.reduction
        found = sharding.to_host(
            estimators.rows(
                *(self.estimator, self.target, self.score),
                *(self.dequantization.params, batch, u, given),
            )
        )
        rows = {k: np.asarray(found[k], np.float64) for k in self.cell.terms if k != "scale"}
        scale = self.estimator.scale_nats(self.target, images.shape)
        rows["scale"] = np.full(len(ids), bits.nats_to_bits(scale, images.shape))
        rows["bits_per_dim"] = estimate.total(rows, self.cell.terms)
        where = {"id": np.asarray(ids, np.int64), "sweep": np.full(len(ids), sweep, np.int64)}
        return {**where, **rows, "nfe": np.asarray(found["nfe"], np.int64)}

    def _parts(self, solver: Solver) -> Parts:
        if solver not in self._known:  # A sum over all parameters: once.
            self._known[solver] = self.shared.workdir.parts("eval", self._identity(solver))
        return self._known[solver]

    def _identity(self, solver: Solver) -> dict[str, Any]:
        """What a row depends on: not the batch size, nor how many images or sweeps are wanted."""
        shared, config = self.shared, self.config
        own: dict[str, Any] = {"solver": dataclasses.asdict(solver)}
        if self.cell.is_bound:
            own = {"n_times": config.n_times, "times": config.times}
            own["proposal"] = self.reduction.proposal
            own["reduction_crc32"] = tree_crc32(self.reduction)
        return {
            "cell": dataclasses.asdict(self.cell),
            "estimator": dataclasses.asdict(self.estimator),
            "terms": self.cell.terms,
            "dequantizer": repr(self.dequantization.model),
            "dequantizer_crc32": tree_crc32(self.dequantization.params),
            "step": shared.restored.step,
            "parameters_crc32": tree_crc32(shared.restored.state.ema_params),
            "seed": config.seed,
            "eps": self.target.eps,
            "precision": config.precision,
            **own,
            **shared.experiment.score_identity,
            "data": shared.images.fingerprint,
        }

    def finish(self) -> Estimate:
        """The number of every image in ``ids``, with its error bars."""
        return self._swept() if self.cell.is_bound else self._solved()

    def _solved(self) -> Estimate:
        solver, terms = self.shared.experiment.eval_solver, self.cell.terms
        # First: a solve too coarse costs a subset, not the split.
        gap = estimate.solver_error(self.rows, self.subset, solver, terms)
        budget = self.config.solver_budget
        if solver.fixed_steps is not None and not estimate.within(gap, budget):
            method = " and eval.method=tsit5" if solver.method == "euler" else ""
            raise Unconverged(
                f"{solver.fixed_steps} {solver.method} steps are off by {gap.mean:.4f} +- "
                f"{gap.ci95:.4f} bits/dim on {gap.n} images, more than eval.solver_budget="
                f"{budget}: refused. Set eval.fixed_steps=0{method} for step control, or take many "
                "more steps"
            )
        return estimate.solved(
            self.rows, self.ids, self.subset, solver, terms, "bits/dim", gap, budget
        )

    def _swept(self) -> Estimate:
        tables: list[Table] = []
        for sweeps in self._wanted(tables):
            while len(tables) < sweeps:
                tables.append(self.rows(self.ids, len(tables)))
        return estimate.swept(tables, self.cell.terms, "bits/dim")

    def _wanted(self, tables: list[Table]) -> Iterator[int]:
        """How many sweeps to have: ``eval.sweeps``, then what ``eval.target_se`` still needs."""
        config = self.config
        first = min(FIRST_SWEEPS, config.max_sweeps) if config.target_se else 1
        yield max(config.sweeps, first)
        while config.target_se and len(tables) < config.max_sweeps:
            ratio = estimate.sweep_stderr(tables, self.cell.terms) / config.target_se
            if not ratio > 1:
                return
            wanted = max(len(tables) + 1, len(tables) * ratio**2)
            yield math.ceil(min(config.max_sweeps, wanted))

    def result(self, found: Estimate) -> Result:
        """The number as a report shows it; ``found`` is what :meth:`finish` returned."""
        trained, trace = self.dequantization.restored, getattr(self.estimator, "trace", None)
        if self.cell.is_bound:
            trace = None
        return Result.of(
            found,
            self.ids,
            estimator=self.cell.estimator,
            dequantizer=self.cell.dequantizer,
            num_importance=self.cell.num_importance,
            data=self.shared.images.name,
            split=self.config.split,
            split_size=len(self.shared.images),
            target_se=self.config.target_se if self.cell.is_bound else None,
            smallest_time=self.target.eps,
            trace=dataclasses.asdict(trace) if trace else None,
            dequantizer_step=trained.step if trained else None,
        )


def estimator(experiment: Experiment, cell: Cell) -> Estimator:
    """The estimator of ``cell``, with those settings of the config that it has a field for."""
    settings = {
        "trace": experiment.trace(cell.num_importance),
        "num_importance": cell.num_importance,
    }
    known = {field.name for field in dataclasses.fields(cell.kind)}
    return cell.kind(**{name: value for name, value in settings.items() if name in known})


def check_first_batch(shared: Evaluation, dequantization: Dequantization) -> None:
    """Refuse a dequantizer that leaves the integers where they are (``bits.check_dequantized``)."""
    if not has_density(dequantization.model):
        return
    ids = shared.ids(shared.experiment.config.eval.batch_size)
    size, pixels = len(ids), jax.numpy.asarray(shared.images.images[ids])
    keys = jax.random.split(jax.random.key(0), size)
    draw = jax.jit(jax.vmap(dequantization.model.sample, (None, 0, 0)))
    u, _ = draw(dequantization.params, pixels, keys)
    bits.check_dequantized(bits.to_model(pixels, u, shared.images.levels), shared.images.levels)
