"""An evaluation: a trained model, the images of a split, and the cells of their table.

    bits/dim of every image by one estimator with one dequantizer and K draws of it: a cell

``sbml.measurement`` explains the rows of a cell, and how they give the error bars. Each row is
computed once and written to disk. Batches are padded and the padding is dropped: every image counts
exactly once, and neither the batch size nor the number of devices changes a result.

The dequantizers are made when they are asked for. So are the control variate and the densities of
times, which reduce the noise of a bound's random times; these two are stored in the work directory.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from sbml import dequantizers
from sbml.core import bits
from sbml.core.scalars import Number
from sbml.core.streams import stream
from sbml.core.types import conditioned
from sbml.data import ImageSet, spread
from sbml.density import PILOT, Density, estimate
from sbml.density.estimate import Estimate
from sbml.density.estimators import Cell
from sbml.density.estimators.base import Estimator, Target
from sbml.density.measurement import Measurement
from sbml.likelihood import ode
from sbml.likelihood.bound import GaussianControl, Reduction
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.runtime import sharding
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.parts import Parts, compute_once
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.trees import tree_crc32
from sbml.score import divergence


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A dequantizer and its parameters."""

    model: Any
    params: Any
    restored: Restored | None = None  # its checkpoint, if it was trained


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A trained model and the images of its evaluation.

    Attributes:
      trained: the model; the rows are stored in its work directory.
      images: the images of the split.
      train: the training images.
      preemption: an evaluation that is asked to stop does so after the batch in progress.
    """

    trained: Trained
    images: ImageSet
    train: ImageSet
    preemption: Preemption = dataclasses.field(default_factory=Preemption)

    @classmethod
    def of_split(
        cls, trained: Trained, split: str, preemption: Preemption | None = None
    ) -> "Evaluation":
        """The evaluation on the images of ``split``."""
        images, train = (trained.experiment.images(name) for name in (split, "train"))
        return cls(trained, images, train, preemption or Preemption())

    @property
    def experiment(self) -> Experiment:
        """The objects of the config."""
        return self.trained.experiment

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What every stored number of this evaluation depends on, as plain JSON values."""
        seed = self.experiment.config.eval.seed
        return {**self.trained.about, "data": self.images.fingerprint, "seed": seed}

    @functools.cached_property
    def control(self) -> GaussianControl | None:
        """The Gaussian of the control variate, fitted to the dequantized training images; None
        without ``eval.bound.control``."""
        if not self.experiment.config.eval.bound.control:
            return None
        arrays = self.once("control", _control, self.train)
        return GaussianControl(**{"basis": None, **arrays})

    def once(self, name: str, compute: Any, *arguments: Any) -> dict[str, np.ndarray]:
        """``compute(*arguments)``, which is stored in the work directory (``compute_once``)."""
        return compute_once(self.trained.workdir / "eval", name, compute, *arguments)

    def reduction(self, eps: Number) -> Reduction:
        """How the variance of the bound from ``eps`` on is reduced. With ``eval.bound.control`` or
        ``eval.bound.proposal_bins``, a pilot on at most 256 images of the split decides it."""
        experiment, config, control = self.experiment, self.experiment.config.eval, self.control
        bins, name = config.bound.proposal_bins, config.bound.proposal_name
        if not (control or bins):
            return Reduction(proposal=name)
        # Only what a bound depends on: the settings of the ODE do not change the pilot.
        score, labels = self.trained.score, self.trained.labels(self.images)
        of_bound = Density(score, experiment.sde, experiment.shape, eps=eps, seed=config.seed)
        stored = self.once("pilot", _pilot, of_bound, self.images, labels, control, bins or 32)
        times = stored.pop("density")
        return Reduction(
            control and dataclasses.replace(control, **stored), times if bins else None, name
        )

    def measurement(
        self,
        estimator: Estimator,
        target: Target,
        data: np.ndarray,
        params: Any,
        condition: np.ndarray | None = None,
    ) -> Measurement:
        """The measurement of the integers ``data (n, *s)`` by ``estimator`` on all devices, with
        the parameters ``params`` of the target's dequantizer."""
        density = self.trained.density(target.eps)
        return dataclasses.replace(
            density.measurement(estimator, target, data, condition, params),
            place=sharding.split,
            gather=sharding.to_host,
            multiple=jax.device_count(),
            about={**self.about, "dequantizer_crc32": tree_crc32(params)},
        )

    def dequantization(self, name: str) -> Dequantization:
        """The dequantizer called ``name``, with the averaged parameters if it was trained."""
        model = self.experiment.dequantizer(name)
        if not dequantizers.is_trained(model):
            return Dequantization(model, model.init(jax.random.key(0), self.train.images[:1]))
        restored = self.experiment.restore_dequantizer(self.trained.workdir, self.train)
        return Dequantization(model, restored.state.ema_params, restored)

    def ids(self, count: int = 0) -> np.ndarray:
        """The sorted ids of the images to evaluate. If they are not all, they are a random sample;
        with ``eval.in_order`` they are the first ones.

        There are at most ``eval.max_images`` and, if ``count`` is not 0, at most ``count``. The
        sample comes from one permutation that does not depend on the seed: a larger sample contains
        the smaller ones, so that their rows can be used again. The first images would not be a
        random sample, because files are often sorted by class and crops by photo.
        """
        size, config = len(self.images), self.experiment.config.eval
        number = min(config.max_images or size, count or size, size)
        order = np.arange(size) if config.in_order else np.random.RandomState(0).permutation(size)
        return np.sort(order[:number])


def _control(train: ImageSet) -> dict[str, np.ndarray]:
    """The fields of a Gaussian with the mean and the covariance of ``train``."""
    # The fit is to the integers k; then k is mapped to the scale of the model, [-1, 1].
    gaussian = GaussianControl.fit(train.images, noise_variance=1 / 12)
    arrays = {
        "mean": bits.to_model(gaussian.mean, 0.5, train.levels),
        "variances": (2 / train.levels) ** 2 * gaussian.variances,
        **({} if gaussian.basis is None else {"basis": gaussian.basis}),
    }
    return {name: np.asarray(value, np.float32) for name, value in arrays.items()}


def _pilot(
    density: Density,
    images: ImageSet,
    labels: np.ndarray | None,
    control: GaussianControl | None,
    bins: int,
) -> dict[str, Any]:
    """The density of a bound's times for ``images`` of the classes ``labels``, and the
    coefficients of the ``control`` with their ``edges`` if there is one."""
    chosen = spread(len(images), PILOT)
    pixels = jax.numpy.asarray(images.images[chosen])
    x = np.asarray(bits.to_model(pixels, 0.5, images.levels))
    found = density.reduction(x, None if labels is None else labels[chosen], control, bins)
    arrays = {"density": found.density}
    if found.control is not None:
        arrays |= {"coefficients": found.control.coefficients, "edges": found.control.edges}
    return arrays


def check_first_batch(evaluation: Evaluation, dequantization: Dequantization) -> None:
    """Check that the dequantizer adds noise to the integers of the first batch."""
    if not dequantizers.has_density(dequantization.model):
        return
    ids = evaluation.ids(evaluation.experiment.config.eval.batch_size)
    pixels, levels = jax.numpy.asarray(evaluation.images.images[ids]), evaluation.images.levels
    keys = jax.random.split(stream(jax.random.key(0), "first batch"), len(ids))
    draw = jax.jit(jax.vmap(dequantization.model.sample, (None, 0, 0)))
    u, _ = draw(dequantization.params, pixels, keys)
    bits.check_dequantized(bits.to_model(pixels, u, levels), levels)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A cell of an evaluation, and its measurement.

    Attributes:
      parts: the stores that the measurement has opened.
    """

    evaluation: Evaluation
    cell: Cell
    dequantization: Dequantization
    measurement: Measurement
    parts: list[Parts]

    @functools.cached_property
    def number(self) -> Estimate:
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

    @property
    def warnings(self) -> list[str]:
        """Warnings about the ``number``, and about rows that earlier commands computed with other
        versions of packages."""
        files, ids, number = self.evaluation.images.ids, self.measurement.ids, self.number
        names = [files[i] for i in ids] if files else [str(i) for i in ids]
        section = "eval.bound." if number.solver is None else "eval.ode."
        others = [other for parts in self.parts for other in parts.other_versions()]
        found = number.warnings(section, names) + [
            f"an earlier command computed some of the rows with other versions: {other} (without "
            "the folder eval of the work directory, all rows are computed again)"
            for other in dict.fromkeys(others)
        ]
        return [f"{self.cell.title}: {each}" for each in found]

    @functools.cached_property
    def row(self) -> dict[str, Any]:
        """The row of ``report.json``."""
        run, checkpoint = self.measurement, self.dequantization.restored
        trace = getattr(run.estimator, "trace", None)
        return {
            **dataclasses.asdict(self.cell),
            "data": self.evaluation.images.name,
            "split": self.evaluation.experiment.config.eval.split,
            "split_size": len(self.evaluation.images),
            "trace": dataclasses.asdict(trace) if trace else None,
            "dequantizer_step": checkpoint.step if checkpoint else None,
            **self.number.row(run.ids, "eval.ode."),
        }


def run_of(
    evaluation: Evaluation,
    cell: Cell,
    dequantization: Dequantization,
    *,
    stored: bool = True,
    progress: bool = True,
) -> Run:
    """The measurement of ``cell``. If it is ``stored``, rows of earlier evaluations are read, and
    others are written."""
    trained, experiment, model = evaluation.trained, evaluation.experiment, dequantization.model
    config, draws, images = experiment.config.eval, cell.num_importance, evaluation.images
    eps = experiment.discrete_eps if model.at_noise else experiment.eval_eps
    reduction = Reduction(proposal=config.bound.proposal_name)
    if cell.kind.reducible:
        reduction = evaluation.reduction(eps)
    method = estimator(experiment, cell, reduction)
    target, labels = Target(experiment.sde, eps, experiment.levels, model), trained.labels(images)
    run = evaluation.measurement(method, target, images.images, dequantization.params, labels)
    ids = evaluation.ids(config.importance_images if draws > 1 else 0)
    # Each image costs K solves, so the size of the subset is divided by K, down to four images. It
    # is evenly spread, without a random draw, so it does not depend on the seed.
    subset = ids[spread(len(ids), max(4, (config.ode.subset or len(ids)) // draws))]
    # The batch size is divided by K too, so that a few images need less padding.
    size = max(1, config.batch_size // draws)
    if method.exact:
        exact = divergence.exact_batch(math.prod(experiment.shape))
        size = min(size, exact * jax.device_count())
    # Batches of a few missing images have this size too, so one program serves all.
    size = sharding.round_up(min(size, len(ids)))
    one = conditioned(trained.score, None if labels is None else int(labels[0]))
    method.check(one, experiment.sde, experiment.shape)
    # The K solves of an image are one call, so the bar does not move before their end.
    title = f"{cell.title} solves of each image" if draws > 1 else cell.title
    parts: list[Parts] = []

    def store(identity: dict[str, Any]) -> Parts:
        parts.append(Parts(trained.workdir / "eval", identity, evaluation.preemption))
        return parts[-1]

    measurement = dataclasses.replace(
        run,
        ids=ids,
        subset=subset,
        store=store if stored else None,
        batch_size=size,
        multiple=size,
        budget=config.ode.solver_budget,
        last=ode.last_time(one, experiment.sde),
        sweeps=config.bound.sweeps,
        target_se=config.bound.target_se,
        max_sweeps=config.bound.max_sweeps,
        progress=title if progress else "",
    )
    return Run(evaluation, cell, dequantization, measurement, parts)


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
