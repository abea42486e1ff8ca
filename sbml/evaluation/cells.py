"""One cell of an evaluation: bits/dim of every image by one estimator, with error bars.

``estimators.driver`` explains the rows of a cell, and how they give the error bars. Each row is
computed once and written to disk. Batches are padded and the padding is dropped: every image counts
exactly once, and neither the batch size nor the number of devices changes a result.
"""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from absl import logging

from sbml import divergence, estimate, ode, streams
from sbml.bound import Reduction
from sbml.data import spread
from sbml.estimate import Columns, Estimate
from sbml.estimators import Cell
from sbml.estimators.base import Estimator, Target, rows
from sbml.estimators.driver import Driver
from sbml.evaluation.inputs import Dequantization, Inputs
from sbml.experiment.build import Experiment
from sbml.ode import Solver
from sbml.progress import Bar
from sbml.report.result import Result
from sbml.runtime import sharding
from sbml.runtime.parts import Parts
from sbml.runtime.trees import tree_crc32
from sbml.types import conditioned


class CellRun(Driver):
    """The rows of ``cell``: those that an earlier evaluation stored are read, others computed."""

    def __init__(self, shared: Inputs, cell: Cell, dequantization: Dequantization) -> None:
        self.shared, self.cell, self.dequantization = shared, cell, dequantization
        experiment, config = shared.experiment, shared.experiment.config.eval
        model, draws = dequantization.model, cell.num_importance
        method = estimator(experiment, cell)
        eps = experiment.discrete_eps if model.at_noise else experiment.eval_eps
        ids = shared.ids(config.importance_images if draws > 1 else 0)
        # Each image costs K solves, so the size of the subset is divided by K, down to four images.
        # It is evenly spread, without a random draw, so it does not depend on the seed.
        subset = ids[spread(len(ids), max(4, (config.subset or len(ids)) // draws))]
        # The batch size is divided by K too, so that a few images need less padding.
        size = max(1, config.batch_size // draws)
        if method.exact:
            exact = divergence.exact_batch(math.prod(experiment.shape))
            size = min(size, exact * jax.device_count())
        self.score = shared.score
        target = Target(experiment.sde, eps, experiment.levels, model)
        of = method, target, self.score, dequantization.params
        labels = shared.labels(shared.images)
        if not cell.kind.is_bound:
            one = conditioned(self.score, None if labels is None else int(labels[0]))
            ode.check_precision(one, experiment.sde, experiment.shape)
            last = ode.last_time(one, experiment.sde)
        super().__init__(
            estimator=method,
            target=target,
            data=shared.images.images,
            condition=labels,
            ids=ids,
            subset=subset,
            compute=lambda batch, u, options: sharding.to_host(rows(*of, batch, u, options)),
            place=sharding.split,
            seed=config.seed,
            # Batches of a few missing images have this size too, so one program serves all.
            batch_size=sharding.round_up(min(size, len(ids))),
            multiple=jax.device_count(),
            solver=config.solver(),
            budget=config.solver_budget,
            last=None if cell.kind.is_bound else last,
            reduction=shared.reduction(eps)
            if method.reducible
            else Reduction(proposal=config.proposal),
            draw=config.times,
            n_times=config.n_times,
            sweeps=config.sweeps,
            target_se=config.target_se,
            max_sweeps=config.max_sweeps,
            # The K solves of an image are one call, so the bar does not move before their end.
            progress=f"{cell.title} solves of each image" if draws > 1 else cell.title,
        )
        self._parts_of: dict[Solver, Parts] = {}

    def rows(
        self, ids: np.ndarray, sweep: int, solver: Solver | None = None, bar: Bar | None = None
    ) -> Columns:
        """The rows of ``ids (n,)`` in ``sweep``: the columns ``id``, ``sweep``, ``bits_per_dim``,
        ``nfe`` and the terms in bits/dim, each ``(n,)``. Rows that are not on disk are computed."""
        bar, entered = bar or self.bar(len(ids), sweep, solver), bar
        solver = solver or self.solver
        parts = self._parts(solver)
        stored = parts.read(sweep)
        if stored:
            bar.add(stored["bits_per_dim"][np.isin(stored["id"], ids)], stored=True)
        missing = np.setdiff1d(ids, stored.get("id", []))
        if missing.size:
            logging.info("%d of %d images were evaluated before", len(ids) - len(missing), len(ids))
            with nullcontext() if entered else bar:
                bar.show()
                for found, columns in self.batches(missing, sweep, solver, self.batch_size):
                    values = self.total(columns)
                    if jax.process_index() == 0:
                        keys = {"id": found, "sweep": np.full(len(found), sweep)}
                        parts.write({**keys, **columns, "bits_per_dim": values})
                    bar.add(values)
                    self.shared.preemption.leave_if_requested("the images so far are stored")
            sharding.barrier("evaluated")
            stored = parts.read(sweep)
        chosen = np.isin(stored["id"], ids)
        return {name: column[chosen] for name, column in stored.items()}

    def _parts(self, solver: Solver) -> Parts:
        # Kept, because the identity needs the checksums of all parameters, which take time.
        if solver not in self._parts_of:
            self._parts_of[solver] = Parts(self.shared.workdir / "eval", self._identity(solver))
        return self._parts_of[solver]

    def _identity(self, solver: Solver) -> dict[str, Any]:
        """Everything that a row depends on, as plain JSON values. The batch size and the numbers of
        images and sweeps do not change a row."""
        shared, config = self.shared, self.shared.experiment.config.eval
        # ``adjoint`` chooses how a solve is differentiated; the values do not depend on it.
        fields = {k: v for k, v in dataclasses.asdict(solver).items() if k != "adjoint"}
        own: dict[str, Any] = {"solver": fields}
        if self.cell.kind.is_bound:
            own = {"n_times": config.n_times, "times": config.times}
            own["proposal"] = self.reduction.proposal
            own["reduction_crc32"] = tree_crc32(self.reduction)
        return {
            "cell": dataclasses.asdict(self.cell),
            "estimator": dataclasses.asdict(self.estimator),
            "terms": self.cell.kind.terms,
            "dequantizer": repr(self.dequantization.model),
            "dequantizer_crc32": tree_crc32(self.dequantization.params),
            "step": shared.restored.step,
            "parameters_crc32": shared.parameters_crc32,
            "seed": config.seed,
            "streams": streams.VERSION,
            "eps": self.target.eps,
            "precision": config.precision,
            **own,
            "score": shared.experiment.score_identity,
            "data": shared.images.fingerprint,
            **({} if self.condition is None else {"labels_crc32": tree_crc32(self.condition)}),
        }

    def finish(self) -> Estimate:
        """The estimate over all images in ``ids``, in bits/dim, with its error bars; fixed steps
        that are too coarse are refused after the subset has been solved."""
        solver = self.solver
        if not self.cell.kind.is_bound and solver.fixed_steps is not None:
            gap = self.solver_error()
            if not estimate.within(gap, self.budget):
                method = " and eval.method=tsit5" if solver.method == "euler" else ""
                raise ValueError(
                    f"{solver.fixed_steps} {solver.method} steps are refused: "
                    f"{estimate.excess(gap, self.budget)} (eval.solver_budget), in bits/dim. Set "
                    f"eval.fixed_steps=0{method} for adaptive steps, or set eval.fixed_steps much "
                    "higher"
                )
        return self.estimate()

    def warnings(self) -> list[str]:
        """Warnings about rows that earlier commands computed with other versions of packages."""
        others = [other for parts in self._parts_of.values() for other in parts.other_versions()]
        return [
            f"{self.cell.title}: an earlier command computed some of the rows with other versions: "
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
            split=self.shared.experiment.config.eval.split,
            split_size=len(self.shared.images),
            target_se=self.target_se if self.cell.kind.is_bound else None,
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
