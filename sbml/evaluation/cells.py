"""One cell of an evaluation: bits/dim of every image by one estimator, with error bars.

A row belongs to one (sweep, image id); with the seed these determine its random keys. Each row is
computed once and written to disk. Sweep 0 covers all images.

    bound   every sweep covers all images, with one set of points over them for the times
    ode     sweep 1 covers a subset, which is also solved by ``estimate.reference``

``sbml.estimate`` explains how these rows give the error bars. Batches are padded and the padding is
dropped: every image counts exactly once, and neither the batch size nor the number of devices
changes a result.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import bits, divergence, estimate, estimators, ode, times
from sbml.bound import GaussianControl
from sbml.data import ImageSet, eval_batches, spread
from sbml.dequantizers import has_density
from sbml.estimate import Estimate
from sbml.estimators import Cell, Reduction, Rows, Target
from sbml.estimators.base import Estimator, times_key
from sbml.experiment.build import Experiment
from sbml.ode import Solver
from sbml.report.result import Result
from sbml.runtime import progress, sharding
from sbml.runtime.checkpoint import Restored
from sbml.runtime.parts import Parts
from sbml.runtime.preemption import Preemption
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import Workdir
from sbml.streams import stream

Table = dict[str, np.ndarray]


# The number of sweeps before ``eval.target_se`` may stop an evaluation. With 2 or 3 sweeps the
# standard error is often far too small by chance: in 4,000 trials that stopped there, 90% of the
# 95% intervals contained the true value, but 93% with at least 8 sweeps.
FIRST_SWEEPS = 8


class Unconverged(ValueError):
    """The error of a fixed-step solve exceeds ``eval.solver_budget``, so there is no result."""


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A dequantizer and its parameters."""

    model: Any
    params: Any
    restored: Restored | None = None  # its checkpoint, if it was trained


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The inputs that all cells share.

    Attributes:
      experiment: the objects of the config.
      restored: the checkpoint that is evaluated.
      images: the images of the split.
      control: the Gaussian of the control variate; None for no control variate.
      density: a function from eps to the density of the bound's times, ``(bins,)``; it returns
        None for the proposal's own density.
      workdir: the work directory in which rows are stored.
      preemption: requests to stop; an evaluation stops after the batch in progress.
    """

    experiment: Experiment
    restored: Restored
    images: ImageSet
    control: GaussianControl | None
    density: Callable[[float], np.ndarray | None]
    workdir: Workdir
    preemption: Preemption = dataclasses.field(default_factory=Preemption)

    def ids(self, count: int = 0) -> np.ndarray:
        """The sorted ids of the images to evaluate, a random sample if they are not all.

        There are at most ``eval.max_images`` and, if ``count`` is not 0, at most ``count``. The
        sample comes from one permutation that does not depend on the seed: a larger sample contains
        the smaller ones, so that their rows can be used again. The first images would not be a
        random sample, because files are often sorted by class and crops by photo.
        """
        size, config = len(self.images), self.experiment.config.eval
        number = min(config.max_images or size, count or size, size)
        order = np.arange(size) if config.in_order else np.random.RandomState(0).permutation(size)
        return np.sort(order[:number])


class CellRun:
    """The rows of ``cell``, computed or read from an earlier, interrupted evaluation."""

    def __init__(self, shared: Evaluation, cell: Cell, dequantization: Dequantization) -> None:
        self.shared, self.cell, self.dequantization = shared, cell, dequantization
        experiment = shared.experiment
        self.config = experiment.config.eval
        model = dequantization.model
        eps = experiment.discrete_eps if model.at_noise else experiment.eval_eps
        self.target = Target(experiment.sde, eps, experiment.levels, model)
        self.estimator = estimator(experiment, cell)
        self.reduction = Reduction(proposal=experiment.config.eval.proposal)
        if self.estimator.reducible:
            density: Any = shared.density(eps)
            self.reduction = dataclasses.replace(
                self.reduction, control=shared.control, density=density
            )
        self.ids = shared.ids(self.config.importance_images if cell.num_importance > 1 else 0)
        # Each image costs K solves: the subset is smaller by K, but has at least four images.
        size = self.config.subset or len(self.ids)
        # The subset is evenly spread, without a random draw, so it does not depend on the seed.
        self.subset = self.ids[spread(len(self.ids), max(4, size // cell.num_importance))]
        # Batches are smaller by K too, so that a few images need less padding.
        size = max(1, self.config.batch_size // cell.num_importance)
        if self.estimator.exact:
            exact = divergence.exact_batch(math.prod(experiment.shape))
            size = min(size, exact * jax.device_count())
        self.batch_size = sharding.round_up(size)
        self.score = experiment.exact_adapter(shared.restored.state.ema_params)
        if not cell.is_bound:
            ode.check_precision(self.score, experiment.sde, experiment.shape)
        self._parts_of: dict[Solver, Parts] = {}
        # For the bar: of each sweep of a bound, the sum of its bits/dim and their number.
        self._sums: dict[int, tuple[float, int]] = {}

    def rows(self, ids: np.ndarray, sweep: int, solver: Solver | None = None) -> Table:
        """The rows of ``ids (n,)`` in ``sweep``: the columns ``id``, ``sweep``, ``bits_per_dim``,
        ``nfe`` and the terms in bits/dim, each ``(n,)``. Rows that are not on disk are computed."""
        solver = solver or self.config.solver()
        parts = self._parts(solver)
        stored = parts.read(sweep)
        missing = np.setdiff1d(ids, stored.get("id", []))
        if missing.size:
            if missing.size < ids.size:
                logging.info(
                    "%d of %d images were evaluated before", ids.size - missing.size, ids.size
                )
            known = stored["bits_per_dim"][np.isin(stored["id"], ids)] if stored else np.empty(0)
            self._fill(parts, missing, known, sweep, solver)
            stored = parts.read(sweep)
        chosen = np.isin(stored["id"], ids)
        table = {name: column[chosen] for name, column in stored.items()}
        if self.cell.is_bound:
            self._sums[sweep] = float(table["bits_per_dim"].sum()), ids.size
        return table

    def _fill(
        self, parts: Parts, missing: np.ndarray, known: np.ndarray, sweep: int, solver: Solver
    ) -> None:
        """Compute and store the rows of ``missing``; the bits/dim of the other images of this sweep
        are ``known``. The bar shows the mean of all rows so far, of a bound over all sweeps."""
        label = f"{self.cell.name}" + (f" sweep {sweep + 1}" if sweep else "")
        points = self._points(sweep) if self.cell.is_bound else None
        total = len(known) + len(missing)
        bar = progress.bar(label, "image", total, len(known), leave=sweep == 0)
        earlier = [sums for index, sums in self._sums.items() if index < sweep]
        sums = np.sum([(known.sum(), known.size), *earlier], axis=0)
        with bar:
            for rows, mask in eval_batches(len(missing), self.batch_size):
                ids = missing[rows]
                columns = self._columns(ids, sweep, solver, points)
                columns = {k: v[mask] for k, v in columns.items()}
                if jax.process_index() == 0:
                    parts.write(columns)
                bar.update(int(mask.sum()))
                sums += columns["bits_per_dim"].sum(), mask.sum()
                bar.set_postfix_str(f"{sums[0] / sums[1]:.3f} bits/dim", refresh=False)
                self.shared.preemption.leave_if_requested("the images so far are stored")
        sharding.barrier("evaluated")

    def _points(self, sweep: int) -> np.ndarray:
        """The points u in [0, 1) ``(images, n_times)`` that give the times of one sweep."""
        draw = times.DRAWS[self.config.times]
        key = times_key(self.config.seed, sweep)
        return np.asarray(draw(key, len(self.shared.images), self.config.n_times))

    def _columns(
        self, ids: np.ndarray, sweep: int, solver: Solver, points: np.ndarray | None
    ) -> Table:
        """The rows of one batch. They are in float64, so that the terms add up to the total."""
        images, placement = self.shared.images, sharding.batch_sharding(sharding.data_mesh())
        batch = Rows(
            data=sharding.put(images.images[ids], placement),
            ids=sharding.put(ids.astype(np.int32), placement),
            sweeps=sharding.put(np.full(len(ids), sweep, np.int32), placement),
            seed=np.uint32(self.config.seed),
        )
        u = None if points is None else sharding.put(points[ids], placement)
        options = solver if points is None else self.reduction
        terms = sharding.to_host(
            estimators.rows(
                *(self.estimator, self.target, self.score),
                *(self.dequantization.params, batch, u, options),
            )
        )
        rows = {k: np.asarray(terms[k], np.float64) for k in self.cell.terms if k != "scale"}
        scale = self.estimator.scale_nats(self.target, images.shape)
        rows["scale"] = np.full(len(ids), bits.nats_to_bits(scale, images.shape))
        rows["bits_per_dim"] = estimate.total(rows, self.cell.terms)
        keys = {"id": np.asarray(ids, np.int64), "sweep": np.full(len(ids), sweep, np.int64)}
        return {**keys, **rows, "nfe": np.asarray(terms["nfe"], np.int64)}

    def _parts(self, solver: Solver) -> Parts:
        # Kept, because the identity needs the checksums of all parameters, which take time.
        if solver not in self._parts_of:
            self._parts_of[solver] = self.shared.workdir.parts("eval", self._identity(solver))
        return self._parts_of[solver]

    def _identity(self, solver: Solver) -> dict[str, Any]:
        """Everything that a row depends on, as plain JSON values. The batch size and the numbers of
        images and sweeps do not change a row."""
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
            "score": shared.experiment.score_identity,
            "data": shared.images.fingerprint,
        }

    def finish(self) -> Estimate:
        """The estimate over all images in ``ids``, in bits/dim, with its error bars.

        Raises:
          Unconverged: fixed steps are too coarse.
        """
        return self._bound_estimate() if self.cell.is_bound else self._ode_estimate()

    def _ode_estimate(self) -> Estimate:
        solver, terms = self.config.solver(), self.cell.terms
        # This comes first: if the steps are too coarse, only the subset has been solved.
        gap = estimate.solver_error(self.rows, self.ids, self.subset, solver, terms)
        budget = self.config.solver_budget
        if solver.fixed_steps is not None and not estimate.within(gap, budget):
            method = " and eval.method=tsit5" if solver.method == "euler" else ""
            raise Unconverged(
                f"{solver.fixed_steps} {solver.method} steps are refused: "
                f"{estimate.excess(gap, budget)} (eval.solver_budget), in bits/dim. Set "
                f"eval.fixed_steps=0{method} for adaptive steps, or set eval.fixed_steps much "
                "higher"
            )
        return estimate.ode_estimate(
            *(self.rows, self.ids, self.subset, solver, terms, self.target, gap, budget),
            self.target.prior_error(np.asarray(self.shared.images.images[self.ids])),
        )

    def _bound_estimate(self) -> Estimate:
        tables: list[Table] = []
        for sweeps in self._sweep_counts(tables):
            while len(tables) < sweeps:
                tables.append(self.rows(self.ids, len(tables)))
        tail = self.reduction.tail(self.target.sde, self.target.eps)
        return estimate.bound_estimate(tables, self.cell.terms, self.target, tail)

    def _sweep_counts(self, tables: list[Table]) -> Iterator[int]:
        """The number of sweeps to reach: ``eval.sweeps``, then more while the standard error over
        ``tables`` exceeds ``eval.target_se``, up to ``eval.max_sweeps``."""
        config = self.config
        first = min(FIRST_SWEEPS, config.max_sweeps) if config.target_se else 1
        yield max(config.sweeps, first)
        while config.target_se and len(tables) < config.max_sweeps:
            ratio = estimate.sweep_stderr(tables, self.cell.terms) / config.target_se
            if not ratio > 1:
                return
            # The standard error falls as 1 / sqrt(sweeps).
            needed = max(len(tables) + 1, len(tables) * ratio**2)
            yield math.ceil(min(config.max_sweeps, needed))

    def warnings(self) -> list[str]:
        """Warnings about rows that earlier commands computed with other versions of packages."""
        others = [other for parts in self._parts_of.values() for other in parts.other_versions()]
        return [
            f"{self.cell.name}: an earlier command computed some of the rows with other versions: "
            f"{other} (without the folder eval of the work directory, all rows are computed again)"
            for other in dict.fromkeys(others)
        ]

    def result(self, number: Estimate) -> Result:
        """The result as a report shows it; ``number`` is the estimate from :meth:`finish`."""
        checkpoint, trace = self.dequantization.restored, getattr(self.estimator, "trace", None)
        return Result.of(
            number,
            self.ids,
            estimator=self.cell.estimator,
            dequantizer=self.cell.dequantizer,
            num_importance=self.cell.num_importance,
            data=self.shared.images.name,
            split=self.config.split,
            split_size=len(self.shared.images),
            target_se=self.config.target_se if self.cell.is_bound else None,
            trace=dataclasses.asdict(trace) if trace else None,
            dequantizer_step=checkpoint.step if checkpoint else None,
        )


def estimator(experiment: Experiment, cell: Cell) -> Estimator:
    """The estimator of ``cell``, with those settings of the config that its class has."""
    settings = {
        "trace": experiment.config.eval.divergence(cell.num_importance),
        "num_importance": cell.num_importance,
    }
    fields = {field.name for field in dataclasses.fields(cell.kind)}
    return cell.kind(**{name: value for name, value in settings.items() if name in fields})


def check_first_batch(shared: Evaluation, dequantization: Dequantization) -> None:
    """Check that the dequantizer adds noise to the integers of the first batch.

    Raises:
      ValueError: it does not (``bits.check_dequantized``).
    """
    if not has_density(dequantization.model):
        return
    ids = shared.ids(shared.experiment.config.eval.batch_size)
    size, pixels = len(ids), jax.numpy.asarray(shared.images.images[ids])
    keys = jax.random.split(stream(jax.random.key(0), "first batch"), size)
    draw = jax.jit(jax.vmap(dequantization.model.sample, (None, 0, 0)))
    u, _ = draw(dequantization.params, pixels, keys)
    bits.check_dequantized(bits.to_model(pixels, u, shared.images.levels), shared.images.levels)
