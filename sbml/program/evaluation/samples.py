"""Samples of a trained model: image i depends only on the seed, i and the sampler's settings.

Image 17 is the same for every batch size, number of devices and number of images. Samples are
written to disk batch by batch: a killed run resumes, and a run with a larger
``sampling.num_images`` adds to the stored samples.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sbml.core import bits, fingerprint
from sbml.core.progress import Bar
from sbml.core.pytrees import in_batches
from sbml.core.streams import stream
from sbml.core.types import Array, Key, Score, conditioned
from sbml.density.estimate import Estimate
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.report.pictures import image_grid
from sbml.program.runtime import sharding
from sbml.program.runtime.parts import Parts
from sbml.program.runtime.preemption import Preemption
from sbml.samplers import Sampler, denoise
from sbml.sdes import SDE


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an image is computed from its latent and noise. It is hashable, so it can be static under
    ``jit``."""

    sde: SDE
    shape: tuple[int, ...]
    levels: int
    eps: float
    sampler: Sampler
    denoise_last: bool
    dequantization: str = "uniform"  # ``data.dequantization`` of the training
    classes: int = 0  # Sample i has the class i modulo this number.

    def score(self, score: Score, i: Array) -> Score:
        """``score`` for image ``i``."""
        return conditioned(score, i % self.classes) if self.classes else score

    @classmethod
    def of(cls, experiment: Experiment) -> "Recipe":
        """The recipe that ``config.sampling`` describes."""
        return cls(
            experiment.sde,
            experiment.shape,
            experiment.levels,
            experiment.sampling_eps,
            experiment.config.sampling.build(),
            experiment.config.sampling.denoise_last,
            experiment.config.data.dequantization,
            experiment.adapter.classes,
        )

    def pixels(self, x: Array) -> Array:
        """The uint8 levels of ``x``, of any shape: the level whose bin contains the value or, for
        a model that was trained with ``none``, the nearest level."""
        return bits.to_pixels(x * to_bins(self.levels, self.dequantization), self.levels)


def to_bins(levels: int, dequantization: str) -> float:
    """The factor that moves the data on which a model was trained into the bins of their levels.

    Data with ``none`` are at 2 k / (L - 1) - 1. The factor (L - 1) / L moves them to the middle of
    the bin of k, 2 (k + 1/2) / L - 1. All other data are in their bins, so the factor is 1.
    """
    return (levels - 1) / levels if dequantization == "none" else 1.0


def _latent(seed: Array, i: Array, recipe: Recipe) -> tuple[Array, Key]:
    """The latent of image ``i`` and the key of its noise."""
    key = jax.random.fold_in(stream(jax.random.key(seed), "samples"), i)
    z = recipe.sde.prior_sample(stream(key, "latent"), recipe.shape)
    return z, stream(key, "sampler")


class Samples(NamedTuple):
    """Samples of a model, on the host or on devices."""

    images: Any  # uint8 (n, *shape)
    nfe: Any  # the number of network evaluations for each image, (n,)
    failed: Any  # whether the sampler failed or a pixel is not finite, (n,)


@functools.partial(jax.jit, static_argnames="recipe")
def _sample_batch(score: Score, ids: Array, seed: Array, recipe: Recipe) -> Samples:
    def one(i: Array) -> Samples:
        z, key = _latent(seed, i, recipe)
        given = recipe.score(score, i)
        x, stats = recipe.sampler(given, recipe.sde, z, key, eps=recipe.eps)
        if recipe.denoise_last:
            x = denoise(given, recipe.sde, x, jnp.asarray(recipe.eps, x.dtype))
        failed = ~(stats.success & jnp.all(jnp.isfinite(x)))
        return Samples(recipe.pixels(x), stats.nfe + recipe.denoise_last, failed)

    return jax.vmap(one)(ids)


@functools.partial(jax.jit, static_argnames=("recipe", "frames"))
def paths(score: Score, ids: Array, seed: Array, recipe: Recipe, frames: int) -> Array:
    """uint8 ``(n, frames, *shape)``: the path of each image of ``ids (n,)`` from noise to data.

    A frame shows x_t / hypot(alpha, sigma), so that noise fits into the data's range.
    """

    def one(i: Array) -> Array:
        z, key = _latent(seed, i, recipe)
        given = recipe.score(score, i)
        path, times = recipe.sampler.path(given, recipe.sde, z, key, eps=recipe.eps, frames=frames)
        if recipe.denoise_last:
            last = denoise(given, recipe.sde, path[-1], times[-1].astype(path.dtype))
            path = path.at[-1].set(last)
        size = jax.vmap(lambda t: jnp.hypot(recipe.sde.mean_coef(t), recipe.sde.std(t)))(times)
        return jax.vmap(lambda x, s: recipe.pixels(x / s))(path, size)

    return jax.vmap(one)(ids)


def draw(experiment: Experiment, params: Any, ids: np.ndarray) -> Samples:
    """The samples with ids ``ids (n,)``, computed on all devices."""
    batch = sharding.split(ids.astype(np.int32))
    seed = np.uint32(experiment.config.sampling.seed)
    score = experiment.adapter(params)
    return sharding.to_host(_sample_batch(score, batch, seed, Recipe.of(experiment)))


def preview(experiment: Experiment, params: Any, count: int) -> Samples:
    """Samples 0 .. ``count`` - 1, without writing them to disk."""
    size = sharding.round_up(min(experiment.config.sampling.batch_size, count))
    parts = in_batches(functools.partial(draw, experiment, params), np.arange(count), size)
    return Samples(*map(np.concatenate, zip(*(samples for _, samples in parts), strict=True)))


def identity(trained: Trained) -> dict[str, Any]:
    """Everything that an image depends on, apart from its id, as plain JSON values."""
    experiment = trained.experiment
    return {
        **trained.about,
        "recipe": fingerprint.of(Recipe.of(experiment)),
        "score": fingerprint.of(experiment.adapter),
        "seed": experiment.config.sampling.seed,
        "precision": jax.config.jax_default_matmul_precision,
    }


def stored(trained: Trained, preemption: Preemption) -> Samples:
    """Samples 0 .. ``sampling.num_images`` - 1 of a model.

    Those in its work directory are read, the others are computed and written. If samples have
    failed, a warning gives their number.
    """
    experiment, config = trained.experiment, trained.experiment.config.sampling
    parts = Parts(trained.workdir / "sampling", identity(trained), preemption)
    all_ids = np.arange(config.num_images)
    missing = np.setdiff1d(all_ids, parts.read().get("id", []))
    size = sharding.round_up(min(config.batch_size, config.num_images))
    sample = functools.partial(draw, experiment, trained.params)
    done = len(all_ids) - len(missing)
    with Bar(f"samples by {config.sampler.name}", "sample", len(all_ids), done) as bar:
        for ids, batch in in_batches(sample, missing, size):
            parts.write({"id": ids, "sweep": np.zeros_like(ids), **batch._asdict()})
            bar.update(len(ids))
    parts.flush()
    columns = parts.read()
    for other in parts.other_versions():
        logging.warning("an earlier command drew some samples with other versions: %s", other)
    chosen = np.isin(columns["id"], all_ids)
    samples = Samples(*(columns[name][chosen] for name in Samples._fields))
    if len(failed := np.flatnonzero(samples.failed)):
        logging.warning(
            f"{len(failed)} of {len(samples.failed)} samples are not finite or not solved; the "
            f"first are {failed[:5]}. Try smaller tolerances or more steps, or a network that was "
            "trained longer"
        )
    return samples


def grid(experiment: Experiment, images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A grid of ``images`` as uint8 for a PNG, nearly square unless ``columns`` is given."""
    scale = max(1, 64 // experiment.shape[0])
    square, classes = math.ceil(math.sqrt(len(images))), experiment.adapter.classes
    # A column has the samples of one class, unless there are too many classes for this.
    columns = columns or (classes if 0 < classes <= 2 * square else square)
    return image_grid(images, experiment.levels, columns=columns, scale=scale)


def from_model(found: Estimate, shape: tuple[int, ...]) -> str:
    """A gap in nats (``Density.gap``) of samples of ``shape``, in words and in bits/dim."""
    value, half = (bits.nats_to_bits(v, shape) for v in (found.mean, found.population.ci95))
    return (
        f"{value:z.4f} +- {half:.4f} bits/dim from the model (KL from the ODE's density, before "
        f"rounding, {found.population.n} samples)"
    )
