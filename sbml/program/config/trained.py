"""A trained model, which a work directory holds. Modes of the program and ``sbml.load`` use it."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from sbml import data
from sbml.core import fingerprint, registry, streams
from sbml.core.scalars import Number
from sbml.data import ImageSet
from sbml.data.table import Whitening
from sbml.density import Density
from sbml.likelihood import discrete
from sbml.program.config.build import Experiment
from sbml.program.config.compatibility import of_workdir
from sbml.program.config.config import of_checkpoint
from sbml.program.config.fields import errors_of
from sbml.program.runtime import sharding
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.trees import tree_crc32
from sbml.program.runtime.workdir import WHITENING, Workdir
from sbml.score import NetworkScore


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with the averaged parameters of a checkpoint.

    Attributes:
      experiment: the objects of the config; its SDE has the numbers that were trained, and its data
        the dequantization on which the model was trained.
      restored: the checkpoint.
      workdir: the work directory.
    """

    experiment: Experiment
    restored: Restored
    workdir: Workdir

    @classmethod
    def of(cls, experiment: Experiment, workdir: Workdir) -> "Trained":
        """The newest undamaged checkpoint of ``workdir``."""
        restored = experiment.restore(workdir)
        experiment = experiment.with_learned_schedule(restored.state.ema_params)
        return cls(experiment.with_dequantization_of(restored), restored, workdir)

    @property
    def params(self) -> Any:
        """The averaged parameters, a pytree."""
        return self.restored.state.ema_params

    @functools.cached_property
    def parameters_crc32(self) -> int:
        """The checksum of the parameters, which takes time."""
        return tree_crc32(self.params)

    @functools.cached_property
    def score(self) -> NetworkScore:
        """The score in float32, for likelihoods."""
        return self.experiment.exact_adapter(self.params)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers; () for a model without them."""
        return tuple(self.restored.metadata.get("classes", ()))

    def labels(self, images: ImageSet) -> np.ndarray | None:
        """The classes of ``images``, by their numbers in the checkpoint; None for a model without
        classes."""
        return self.experiment.labels(images, self.classes)

    @functools.cached_property
    def knows_centres(self) -> bool:
        """Whether the model was trained on bin centres, and the noise at the smallest time is
        narrower than half a bin.

        Under wider noise the density of bin centres is smooth over the bins: the centres leave a
        ripple of 2 exp(-pi^2 / (2 tau^2)), which is 1.4% if half a bin is tau = 1 standard
        deviations of the noise.
        """
        experiment = self.experiment
        kind = self.restored.metadata["config"]["data"]["dequantization"]
        half_bin = discrete.tau(experiment.sde, experiment.levels, experiment.eval_eps)
        return kind == "centre" and float(half_bin) > 1

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What every number of this model depends on, as plain JSON values."""
        return {
            "parameters_crc32": self.parameters_crc32,
            "score": fingerprint.of(self.score.how),
            "streams": streams.VERSION,
        }

    def density(self, eps: Number | None = None) -> Density:
        """The density at the smallest time ``eps``, None for that of the evaluation, with the
        settings of ``config.eval``."""
        experiment, config = self.experiment, self.experiment.config.eval
        return Density(
            self.score,
            experiment.sde,
            shape=experiment.shape,
            levels=experiment.levels,
            eps=experiment.eval_eps if eps is None else eps,
            trace=config.ode.divergence(),
            solver=dataclasses.replace(config.ode.build(), adjoint="reverse"),
            batch_size=sharding.round_up(config.batch_size),
            seed=config.seed,
            budget=config.ode.solver_budget,
            classes=self.classes,
        )

    def density_of_rows(self, columns: int) -> Density:
        """The density of the whitened rows of a table, as :meth:`density`."""
        config = self.experiment.config.eval
        # Without a setting the trace is exact, which costs little in so few dimensions.
        trace = config.ode.divergence() if config.ode.trace else None
        return dataclasses.replace(self.density(), shape=(columns,), levels=None, trace=trace)


def of_run(folder: Workdir, trust: Iterable[str]) -> Density:
    """The density of the newest checkpoint in ``folder``; see :func:`sbml.load`."""
    with registry.only(trust):
        config = of_workdir(of_checkpoint(folder, trust=trust), folder, quiet=True)
        with errors_of(f"the config of the checkpoint in {folder}"):
            experiment = Experiment(config)
        if "table" in data.source_of(config.data.source)[0].modes:
            return _of_table(experiment, folder)
        return Trained.of(experiment, folder).density()


def _of_table(experiment: Experiment, folder: Workdir) -> Density:
    """The density of the rows of a table in the units of its file."""
    stored = folder.read(WHITENING)
    step, links = int(stored["step"]), tuple(stored["links"].tolist())
    whitening = Whitening(links, stored["mean"], stored["factor"])
    chosen = next((each for each in experiment.restore_each(folder) if each.step == step), None)
    if chosen is None:
        raise ValueError(f"no undamaged checkpoint of step {step} in {folder}: train again")
    of_rows = Trained(experiment, chosen, folder).density_of_rows(len(whitening.mean))
    return dataclasses.replace(of_rows, transform=whitening)
