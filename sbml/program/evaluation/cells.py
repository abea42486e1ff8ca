"""One cell of an evaluation: bits/dim of every image by one estimator, with error bars.

``sbml.measurement`` explains the rows of a cell, and how they give the error bars. Each row is
computed once and written to disk. Batches are padded and the padding is dropped: every image counts
exactly once, and neither the batch size nor the number of devices changes a result.
"""

import dataclasses
import math
from typing import Any

import jax

from sbml.core.types import conditioned
from sbml.data import spread
from sbml.density import estimate
from sbml.density.estimate import Columns, Estimate
from sbml.density.estimators import Cell
from sbml.density.estimators.base import Estimator, Target
from sbml.likelihood import ode
from sbml.likelihood.bound import Reduction
from sbml.program.config.build import Experiment
from sbml.program.evaluation.inputs import Dequantization, Inputs
from sbml.program.report.result import Result
from sbml.program.runtime import sharding
from sbml.program.runtime.parts import Parts
from sbml.program.runtime.preemption import Preemption
from sbml.score import divergence


@dataclasses.dataclass(frozen=True)
class Stored:
    """A store of rows on disk, which other processes and later runs read.

    A computation that is asked to stop does so after it has written a batch.
    """

    parts: Parts
    preemption: Preemption

    def read(self, sweep: int) -> Columns:
        """See ``measurement.Store``."""
        return self.parts.read(sweep)

    def write(self, columns: Columns) -> None:
        """See ``measurement.Store``."""
        if jax.process_index() == 0:
            self.parts.write(columns)
        self.preemption.leave_if_requested("the images so far are stored")

    def flush(self) -> None:
        """See ``measurement.Store``."""
        sharding.barrier("evaluated")


class CellRun:
    """The measurement of ``cell``: stored rows of earlier evaluations are read, others computed.

    Attributes:
      measurement: the measurement.
    """

    def __init__(
        self,
        shared: Inputs,
        cell: Cell,
        dequantization: Dequantization,
        *,
        stored: bool = True,
        progress: bool = True,
    ) -> None:
        self.shared, self.cell, self.dequantization = shared, cell, dequantization
        self.parts: list[Parts] = []
        experiment, config = shared.experiment, shared.experiment.config.eval
        model, draws = dequantization.model, cell.num_importance
        eps = experiment.discrete_eps if model.at_noise else experiment.eval_eps
        reduction = Reduction(proposal=config.bound.proposal_name)
        if cell.kind.reducible:
            reduction = shared.reduction(eps)
        method = estimator(experiment, cell, reduction)
        ids = shared.ids(config.importance_images if draws > 1 else 0)
        # Each image costs K solves, so the size of the subset is divided by K, down to four images.
        # It is evenly spread, without a random draw, so it does not depend on the seed.
        subset = ids[spread(len(ids), max(4, (config.ode.subset or len(ids)) // draws))]
        # The batch size is divided by K too, so that a few images need less padding.
        size = max(1, config.batch_size // draws)
        if method.exact:
            exact = divergence.exact_batch(math.prod(experiment.shape))
            size = min(size, exact * jax.device_count())
        # Batches of a few missing images have this size too, so one program serves all.
        size = sharding.round_up(min(size, len(ids)))
        labels = shared.labels(shared.images)
        one = conditioned(shared.score, None if labels is None else int(labels[0]))
        method.check(one, experiment.sde, experiment.shape)
        # The K solves of an image are one call, so the bar does not move before their end.
        title = f"{cell.title} solves of each image" if draws > 1 else cell.title
        target = Target(experiment.sde, eps, experiment.levels, model)
        self.measurement = dataclasses.replace(
            shared.measurement(method, target, shared.images.images, dequantization, labels),
            ids=ids,
            subset=subset,
            store=self._store if stored else None,
            batch_size=size,
            multiple=size,
            budget=config.ode.solver_budget,
            last=ode.last_time(one, experiment.sde),
            sweeps=config.bound.sweeps,
            target_se=config.bound.target_se,
            max_sweeps=config.bound.max_sweeps,
            progress=title if progress else "",
        )

    def _store(self, identity: dict[str, Any]) -> Stored:
        self.parts.append(Parts(self.shared.workdir / "eval", identity))
        return Stored(self.parts[-1], self.shared.preemption)

    def finish(self) -> Estimate:
        """The estimate over all images in ``ids``, in bits/dim, with its error bars; fixed steps
        that are too coarse are refused after the subset has been solved."""
        run, solver = self.measurement, self.measurement.solver
        if solver is not None and solver.fixed_steps is not None:
            gap = run.solver_error()
            if not estimate.within(gap, run.budget):
                method = " and eval.ode.method=tsit5" if solver.method == "euler" else ""
                raise ValueError(
                    f"{solver.fixed_steps} {solver.method} steps are refused: "
                    f"{estimate.excess(gap, run.budget)} (eval.ode.solver_budget), in bits/dim. "
                    f"Set eval.ode.fixed_steps=0{method} for adaptive steps, or set "
                    "eval.ode.fixed_steps much higher"
                )
        return run.estimate()

    def warnings(self, number: Estimate) -> list[str]:
        """Warnings about the ``number`` of :meth:`finish`, and about rows that earlier commands
        computed with other versions of packages."""
        files, ids = self.shared.images.ids, self.measurement.ids
        names = [files[i] for i in ids] if files else [str(i) for i in ids]
        section = "eval.bound." if number.solver is None else "eval.ode."
        found = [f"{self.cell.title}: {each}" for each in number.warnings(section, names)]
        others = [other for parts in self.parts for other in parts.other_versions()]
        return found + [
            f"{self.cell.title}: an earlier command computed some of the rows with other versions: "
            f"{other} (without the folder eval of the work directory, all rows are computed again)"
            for other in dict.fromkeys(others)
        ]

    def result(self, number: Estimate) -> Result:
        """The result as a report shows it; ``number`` is the estimate from :meth:`finish`."""
        run, checkpoint = self.measurement, self.dequantization.restored
        trace = getattr(run.estimator, "trace", None)
        return Result.of(
            number,
            run.ids,
            estimator=self.cell.estimator,
            dequantizer=self.cell.dequantizer,
            num_importance=self.cell.num_importance,
            data=self.shared.images.name,
            split=self.shared.experiment.config.eval.split,
            split_size=len(self.shared.images),
            trace=dataclasses.asdict(trace) if trace else None,
            dequantizer_step=checkpoint.step if checkpoint else None,
        )


def estimator(experiment: Experiment, cell: Cell, reduction: Reduction) -> Estimator:
    """The estimator of ``cell``, with those settings of the config that its class has."""
    config, fields = experiment.config.eval, {f.name for f in dataclasses.fields(cell.kind)}
    settings = {
        "trace": config.ode.divergence(cell.num_importance),
        "num_importance": cell.num_importance,
        "solver": config.ode.build(),
        "n_times": config.bound.n_times,
        "draw": config.bound.times,
        "reduction": reduction,
    }
    return cell.kind(**{name: value for name, value in settings.items() if name in fields})
