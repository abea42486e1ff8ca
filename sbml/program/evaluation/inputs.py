"""What all cells of an evaluation share: the model, the images, and what is made from these once.

The dequantizers are made when they are asked for. So are the control variate and the densities of
times, which reduce the noise of a bound's random times; these two are stored in the work directory.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from sbml import dequantizers
from sbml.core import bits
from sbml.core.scalars import Number
from sbml.core.streams import stream
from sbml.data import ImageSet, spread
from sbml.density import PILOT, Density
from sbml.density.estimators.base import Estimator, Target
from sbml.density.measurement import Measurement
from sbml.likelihood.bound import GaussianControl, Reduction
from sbml.program.config.trained import Trained
from sbml.program.runtime import sharding
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.parts import compute_once
from sbml.program.runtime.preemption import Preemption
from sbml.program.runtime.trees import tree_crc32


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """A dequantizer and its parameters."""

    model: Any
    params: Any
    restored: Restored | None = None  # its checkpoint, if it was trained


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs(Trained):
    """A trained model with the images of an evaluation, whose rows are stored in ``workdir``.

    Attributes:
      images: the images of the split.
      train: the training images.
      preemption: an evaluation that is asked to stop does so after the batch in progress.
    """

    images: ImageSet
    train: ImageSet
    preemption: Preemption = dataclasses.field(default_factory=Preemption)

    @classmethod
    def of_split(cls, model: Trained, split: str, preemption: Preemption | None = None) -> "Inputs":
        """``model`` with the images of ``split``."""
        images, train = (model.experiment.images(name) for name in (split, "train"))
        asked = preemption or Preemption()
        return cls(model.experiment, model.restored, model.workdir, images, train, asked)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What every stored number of this evaluation depends on, as plain JSON values."""
        seed = self.experiment.config.eval.seed
        return {**super().about, "data": self.images.fingerprint, "seed": seed}

    @functools.cached_property
    def control(self) -> GaussianControl | None:
        """The Gaussian of the control variate, fitted to the dequantized training images; None
        without ``eval.bound.control``."""
        if not self.experiment.config.eval.bound.control:
            return None

        arrays = compute_once(self.workdir / "eval", "control", _control, self.train)
        return GaussianControl(**{"basis": None, **arrays})

    def reduction(self, eps: Number) -> Reduction:
        """How the variance of the bound from ``eps`` on is reduced. With ``eval.bound.control`` or
        ``eval.bound.proposal_bins``, a pilot on at most 256 images of the split decides it."""
        experiment, config, control = self.experiment, self.experiment.config.eval, self.control
        bins, name = config.bound.proposal_bins, config.bound.proposal_name
        if not (control or bins):
            return Reduction(proposal=name)
        # Only what a bound depends on: the settings of the ODE do not change the pilot.
        of_bound = Density(self.score, experiment.sde, experiment.shape, eps=eps, seed=config.seed)
        given = of_bound, self.images, self.labels(self.images), control, bins or 32
        stored = compute_once(self.workdir / "eval", "pilot", _pilot, *given)
        times = stored.pop("density")
        return Reduction(
            control and dataclasses.replace(control, **stored),
            times if bins else None,
            name,
        )

    def measurement(
        self,
        estimator: Estimator,
        target: Target,
        data: np.ndarray,
        dequantization: Dequantization,
        condition: np.ndarray | None = None,
    ) -> Measurement:
        """The measurement of the integers ``data (n, *s)`` by ``estimator`` on all devices."""
        density, params = self.density(target.eps), dequantization.params
        return dataclasses.replace(
            density.measurement(estimator, target, data, condition, params),
            place=sharding.split,
            gather=sharding.to_host,
            multiple=jax.device_count(),
            about={**self.about, "dequantizer_crc32": tree_crc32(params)},
        )

    def dequantization(self, name: str) -> Dequantization:
        """The dequantizer called ``name``, with the averaged parameters of its training if it has
        parameters.
        """
        model = self.experiment.dequantizer(name)
        if not dequantizers.is_trained(model):
            return Dequantization(model, model.init(jax.random.key(0), self.train.images[:1]))
        restored = self.experiment.restore_dequantizer(self.workdir, self.train)
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


def check_first_batch(inputs: Inputs, dequantization: Dequantization) -> None:
    """Check that the dequantizer adds noise to the integers of the first batch."""
    if not dequantizers.has_density(dequantization.model):
        return
    ids, levels = inputs.ids(inputs.experiment.config.eval.batch_size), inputs.images.levels
    pixels = jax.numpy.asarray(inputs.images.images[ids])
    keys = jax.random.split(stream(jax.random.key(0), "first batch"), len(ids))
    draw = jax.jit(jax.vmap(dequantization.model.sample, (None, 0, 0)))
    u, _ = draw(dequantization.params, pixels, keys)
    bits.check_dequantized(bits.to_model(pixels, u, levels), levels)
