"""One cell of an evaluation: every image's row, made once, streamed to disk, with its error bars.

A row is of (sweep, image id), and every draw in it is keyed by the two. Sweep 0 covers all images.

    bound   every sweep covers all images, its times one lattice over them; a row of the result is
            the mean over sweeps, and the sweeps' means tell the noise
    ode     sweep 1 covers a subset, whose two draws tell the noise; the subset solved again at a
            tenth of the tolerance tells the solver's error

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
from etils import epath

from sbml import bits, divergence, estimators, intervals, times
from sbml.bound import GaussianControl
from sbml.data import ImageSet, eval_batches, spread
from sbml.estimators import Cell
from sbml.experiment.build import Experiment
from sbml.ode import Solver
from sbml.runtime import progress, sharding
from sbml.runtime.checkpoint import Restored, tree_crc32
from sbml.runtime.parts import Parts
from sbml.runtime.preemption import Preemption

Table = dict[str, np.ndarray]


# Before a standard error is believed enough to stop by. Of 2 or 3 sweeps it is often far too small
# by chance: stopping there, a 95% interval held the truth in 90% of 4,000 trials, of 8 in 93%.
FIRST_SWEEPS = 8


class Unconverged(ValueError):
    """A fixed-step solve too coarse for the budget: no number is made of it."""


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A dequantizer and its parameters; ``model`` is None for the categorical decoder."""

    model: Any
    params: Any
    restored: Restored | None = None  # its checkpoint, where it was trained

    @property
    def at_noise(self) -> bool:
        return self.model is None or self.model.at_noise


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all cells share: one checkpoint, one split."""

    experiment: Experiment
    restored: Restored
    images: ImageSet
    control: GaussianControl | None
    density: Callable[[float], np.ndarray | None]  # of the bound's times, by their eps
    workdir: epath.Path

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
        self.config = shared.experiment.config.eval
        experiment = shared.experiment
        self.eps = experiment.eval_eps
        if dequantization.at_noise:
            self.eps = experiment.discrete_eps
        self.trace = experiment.trace(cell.num_importance)
        # The density is of the dsm form's noise.
        self.density = shared.density(self.eps) if cell.estimator == "bound" else None
        self.ids = shared.ids(self.config.importance_images if cell.num_importance > 1 else 0)
        # Where K > 1 an image costs K solves: about as many in all, but four images at least.
        size = self.config.subset or len(self.ids)
        # Evenly spread: no random draw, and the same whatever the seed.
        self.subset = self.ids[spread(len(self.ids), max(4, size // cell.num_importance))]
        # With K solves an image, smaller batches: less padding where few images are wanted.
        size = max(1, self.config.batch_size // cell.num_importance)
        if self.trace.kind == "exact" and cell.estimator != "bound":
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
        experiment, images = self.shared.experiment, self.shared.images
        split = sharding.batched(sharding.data_mesh())
        batch = (
            self.score,
            self.dequantization.params,
            sharding.put(images.images[ids], split),
            sharding.put(ids.astype(np.int32), split),
            sharding.put(np.full(len(ids), sweep, np.int32), split),
            np.uint32(self.config.seed),
        )
        common = {
            "dequantizer": self.dequantization.model,
            "sde": experiment.sde,
            "levels": experiment.levels,
            "eps": self.eps,
        }
        if lattice is None:
            draws = {"trace": self.trace, "num_importance": self.cell.num_importance}
            found = estimators.ode(*batch, solver, **common, **draws)
        else:
            u = sharding.put(lattice[ids], split)
            form = estimators.FORMS[self.cell.estimator]
            control = self.shared.control if form == "dsm" else None
            reduced = (u, control, self.density)
            draws = {
                "form": form,
                "proposal": self.shared.experiment.eval_proposal,
                "trace": self.trace,
            }
            found = estimators.evidence_bound(*batch, *reduced, **common, **draws)
        found = sharding.to_host(found)
        rows = {k: np.asarray(found[k], np.float64) for k in self.cell.terms if k != "scale"}
        rows["scale"] = np.full(len(ids), self._scale())
        rows["bits_per_dim"] = np.sum([rows[name] for name in self.cell.terms], axis=0)
        where = {"id": np.asarray(ids, np.int64), "sweep": np.full(len(ids), sweep, np.int64)}
        return {**where, **rows, "nfe": np.asarray(found["nfe"], np.int64)}

    def _scale(self) -> float:
        experiment, images = self.shared.experiment, self.shared.images
        at_noise = self.dequantization.at_noise
        return estimators.scale(
            self.cell, experiment.sde, self.eps, at_noise, images.shape, images.levels
        )

    def _parts(self, solver: Solver) -> Parts:
        if solver not in self._known:  # A sum over all parameters: once.
            where = self.shared.workdir / "eval"
            self._known[solver] = Parts.addressed(where, self._identity(solver))
        return self._known[solver]

    def _identity(self, solver: Solver) -> dict[str, Any]:
        """What a row depends on: not the batch size, nor how many images or sweeps are wanted."""
        shared, config = self.shared, self.shared.experiment.to_plain()
        own: dict[str, Any]
        if self.cell.estimator == "ode":
            own = {"solver": dataclasses.asdict(solver), "trace": dataclasses.asdict(self.trace)}
        else:
            own = {k: config["eval"][k] for k in ("n_times", "times", "importance_sampling")}
            own["control_crc32"] = tree_crc32(shared.control)
            own["density_crc32"] = tree_crc32(self.density)
            if self.cell.estimator == "bound_ssm":
                own["trace"] = dataclasses.asdict(self.trace)
        return {
            "cell": dataclasses.asdict(self.cell),
            "terms": estimators.TERMS[self.cell.estimator],
            "dequantizer": repr(self.dequantization.model),
            "dequantizer_crc32": tree_crc32(self.dequantization.params),
            "step": shared.restored.step,
            "parameters_crc32": tree_crc32(shared.restored.state.ema_params),
            "seed": self.config.seed,
            "eps": self.eps,
            "precision": self.config.precision,
            **own,
            **shared.experiment.score_identity,
            "data": shared.images.fingerprint,
        }

    def finish(self) -> tuple[Table, dict[str, Any]]:
        """One row an image, and what the report says of the cell beside it."""
        if self.cell.is_bound:
            return self._swept()
        return self._solved()

    def _solved(self) -> tuple[Table, dict[str, Any]]:
        solver = self.shared.experiment.eval_solver
        guard = self._guard(solver)  # First: a solve too coarse costs a subset, not the split.
        table = self.rows(self.ids, 0)
        again = self.rows(self.subset, 1)
        first = table["bits_per_dim"][np.isin(table["id"], self.subset)]
        stderr, freedom = intervals.repeated_stderr(first, again["bits_per_dim"], len(self.ids))
        return table, {**self._this_set(table, stderr, freedom), **guard}

    def _guard(self, solver: Solver) -> dict[str, Any]:
        """b(tol) - b(tol / 10) on the subset, by the same draws; fixed steps against control."""
        reference = solver.tighter(10) if solver.fixed_steps is None else Solver().tighter(10)
        ours = self.rows(self.subset, 0, solver)["bits_per_dim"]
        gap = intervals.mean_interval(ours - self.rows(self.subset, 0, reference)["bits_per_dim"])
        # With its error: large errors of either sign must not pass for none. False if not finite.
        converged = abs(gap.mean) + gap.ci95 <= self.config.solver_budget
        if solver.fixed_steps is not None and not converged:
            method = " and eval.method=tsit5" if solver.method == "euler" else ""
            raise Unconverged(
                f"{solver.fixed_steps} {solver.method} steps are off by {gap.mean:.4f} +- "
                f"{gap.ci95:.4f} bits/dim on {gap.n} images, more than eval.solver_budget="
                f"{self.config.solver_budget}: refused. Set eval.fixed_steps=0{method} for step "
                "control, or take many more steps"
            )
        return {
            "converged": converged,
            "solver_error": gap.mean,
            "solver_error_ci95": gap.ci95,
            "solver_images": gap.n,
        }

    def _swept(self) -> tuple[Table, dict[str, Any]]:
        tables: list[Table] = []
        for sweeps in self._wanted(tables):
            while len(tables) < sweeps:
                tables.append(self.rows(self.ids, len(tables)))
        stderr = _sweep_stderr(tables)
        averaged = {k: np.mean([t[k] for t in tables], axis=0) for k in tables[0]}
        averaged["id"], averaged["sweep"] = tables[0]["id"], tables[0]["sweep"]
        averaged["nfe"] = np.sum([t["nfe"] for t in tables], axis=0)
        this_set = self._this_set(averaged, stderr, len(tables) - 1)
        return averaged, {**this_set, "sweeps": len(tables), "target_se": self.config.target_se}

    def _wanted(self, tables: list[Table]) -> Iterator[int]:
        """How many sweeps to have: ``eval.sweeps``, then what ``eval.target_se`` still needs."""
        config = self.config
        first = min(FIRST_SWEEPS, config.max_sweeps) if config.target_se else 1
        yield max(config.sweeps, first)
        while config.target_se and len(tables) < config.max_sweeps:
            ratio = _sweep_stderr(tables) / config.target_se
            if not ratio > 1:
                return
            wanted = max(len(tables) + 1, len(tables) * ratio**2)
            yield math.ceil(min(config.max_sweeps, wanted))

    def _this_set(self, table: Table, stderr: float, freedom: float) -> dict[str, Any]:
        mean, half = float(np.mean(table["bits_per_dim"])), intervals.half_width(stderr, freedom)
        return {
            "this_set_stderr": stderr,
            "this_set_ci95": half,
            "this_set_interval": [mean - half, mean + half],
        }

    def result(self, table: Table, noise: dict[str, Any]) -> dict[str, Any]:
        """The cell in the report; ``noise`` is what :meth:`finish` found beside the table."""
        values = table["bits_per_dim"]
        interval = intervals.mean_interval(values)
        trained = self.dequantization.restored
        far = intervals.outliers(values)
        far = far[np.argsort(-values[far])]
        return {
            "estimator": self.cell.estimator,
            "dequantizer": self.cell.dequantizer,
            "num_importance": self.cell.num_importance,
            "data": self.shared.images.name,
            "split": self.config.split,
            "n": interval.n,
            "split_size": len(self.shared.images),
            "bits_per_dim": interval.mean,
            "stderr": interval.stderr,
            "ci95": interval.ci95,
            "interval": list(interval.bounds),
            **noise,
            "nonfinite": interval.nonfinite,
            "min": float(values.min()),
            "max": float(values.max()),
            "outliers": [[int(table["id"][i]), float(values[i])] for i in far],
            "terms": {name: float(table[name].mean()) for name in self.cell.terms},
            "smallest_time": self.eps,
            "trace": dataclasses.asdict(self.trace) if self.cell.estimator == "ode" else None,
            "dequantizer_step": trained.step if trained else None,
            "nfe_mean": float(table["nfe"].mean()),
            "nfe_max": int(table["nfe"].max()),
        }


def _sweep_stderr(tables: list[Table]) -> float:
    """Of the mean over sweeps of the data set's mean."""
    if len(tables) < 2:
        return math.inf
    means = [float(np.mean(t["bits_per_dim"])) for t in tables]
    return float(np.std(means, ddof=1)) / math.sqrt(len(means))


def check_first_batch(shared: Evaluation, dequantization: Dequantization) -> None:
    """Refuse a dequantizer that leaves the integers where they are (``bits.check_dequantized``)."""
    if dequantization.model is None:
        return
    ids = shared.ids(shared.experiment.config.eval.batch_size)
    size, pixels = len(ids), jax.numpy.asarray(shared.images.images[ids])
    keys = jax.random.split(jax.random.key(0), size)
    draw = jax.jit(jax.vmap(dequantization.model.sample, (None, 0, 0)))
    u, _ = draw(dequantization.params, pixels, keys)
    bits.check_dequantized(bits.to_model(pixels, u, shared.images.levels), shared.images.levels)
