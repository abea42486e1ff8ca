"""Samples of a trained model: image i depends only on the seed, i and the sampler's settings.

Image 17 is the same for every batch size, number of devices and number of images. Samples are
written to disk batch by batch: a killed run resumes, and a run with a larger
``sampling.num_images`` adds to the stored samples.
"""

import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sbml import bits, streams
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.pytrees import in_batches
from sbml.report.plots import image_grid, write_png
from sbml.runtime import progress, sharding
from sbml.runtime.checkpoint import Restored
from sbml.runtime.parts import Parts
from sbml.runtime.preemption import Preemption
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import SAMPLES, Workdir
from sbml.samplers import Sampler, denoise
from sbml.sdes import SDE
from sbml.streams import stream
from sbml.types import Array, Key, Score


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
    # ``data.dequantization`` of the training. ``repr``, which identifies stored samples, leaves it
    # out; ``Drawing.identity`` adds it if it is "none".
    dequantization: str = dataclasses.field(default="uniform", repr=False)

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
    """Samples of a model, on the host or on devices.

    Attributes:
      images: uint8 ``(n, *shape)``.
      nfe: the number of network evaluations for each image, ``(n,)``.
      failed: whether the sampler failed or a pixel is not finite, ``(n,)``.
    """

    images: Any
    nfe: Any
    failed: Any


@functools.partial(jax.jit, static_argnames="recipe")
def _sample_batch(score: Score, ids: Array, seed: Array, recipe: Recipe) -> Samples:
    def one(i: Array) -> Samples:
        z, key = _latent(seed, i, recipe)
        x, stats = recipe.sampler(score, recipe.sde, z, key, eps=recipe.eps)
        if recipe.denoise_last:
            x = denoise(score, recipe.sde, x, jnp.asarray(recipe.eps, x.dtype))
        failed = ~(stats.success & jnp.all(jnp.isfinite(x)))
        return Samples(recipe.pixels(x), stats.nfe + recipe.denoise_last, failed)

    return jax.vmap(one)(ids)


@functools.partial(jax.jit, static_argnames=("recipe", "frames"))
def _path_batch(score: Score, ids: Array, seed: Array, recipe: Recipe, frames: int) -> Array:
    """uint8 ``(n, frames, *shape)``: the path of each image of ``ids (n,)`` from noise to data.

    A frame shows x_t / hypot(alpha, sigma), so that noise fits into the data's range.
    """

    def one(i: Array) -> Array:
        z, key = _latent(seed, i, recipe)
        path, times = recipe.sampler.path(score, recipe.sde, z, key, eps=recipe.eps, frames=frames)
        if recipe.denoise_last:
            last = denoise(score, recipe.sde, path[-1], times[-1].astype(path.dtype))
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


def memory_needed(config: Config) -> int:
    """Bytes that the samples of ``config`` need at most: the columns of their table, four times.

    They are read from parts, joined, sorted by their ids, and written to one file.
    """
    row = math.prod(config.data.shape) + 21  # nfe, failed, id and sweep have 4, 1, 8 and 8 bytes
    return 4 * row * config.sampling.num_images


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """The samples of a run: drawn once, stored in parts, and written to files.

    Attributes:
      experiment: the objects of the config, with the SDE and the data of the training.
      restored: the checkpoint whose averaged parameters are taken.
      workdir: the work directory of the samples.
    """

    experiment: Experiment
    restored: Restored
    workdir: Workdir

    @classmethod
    def of(cls, experiment: Experiment, workdir: Workdir) -> "Drawing":
        """That of the newest undamaged checkpoint of ``workdir``, with a warning if the samples end
        at a time on which it was not trained.
        """
        experiment, restored = experiment.restored(workdir)
        experiment = experiment.with_dequantization_of(restored)
        for warning in trained.unseen_times(restored.metadata, experiment.sampling_eps, "sampling"):
            logging.warning(warning)
        return cls(experiment, restored, workdir)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that an image depends on, apart from its id."""
        experiment, kind = self.experiment, self.experiment.config.data.dequantization
        return {
            "step": self.restored.step,
            "parameters_crc32": tree_crc32(self.restored.state.ema_params),
            "seed": experiment.config.sampling.seed,
            "streams": streams.VERSION,
            "recipe": repr(Recipe.of(experiment)),
            "score": experiment.score_identity,
            "dtype": getattr(experiment.adapter.model, "dtype", "float32"),
            **({"dequantization": kind} if kind == "none" else {}),
        }

    def samples(self) -> Samples:
        """Samples 0 .. ``sampling.num_images`` - 1. Those on disk are read, the others are computed
        and written. If samples have failed, a warning gives their number."""
        config = self.experiment.config.sampling
        parts = Parts(self.workdir / "sampling", self.identity)
        stored = parts.read()
        all_ids = np.arange(config.num_images)
        missing = np.setdiff1d(all_ids, stored.get("id", []))
        size = sharding.round_up(min(config.batch_size, config.num_images))
        sample = functools.partial(draw, self.experiment, self.restored.state.ema_params)
        bar = progress.bar("sample", "image", len(all_ids), len(all_ids) - len(missing))
        with bar, Preemption() as preemption:
            for ids, batch in in_batches(sample, missing, size):
                if jax.process_index() == 0:
                    parts.write({"id": ids, "sweep": np.zeros_like(ids), **batch._asdict()})
                bar.update(len(ids))
                preemption.leave_if_requested("the samples so far are stored")
        sharding.barrier("sampled")
        stored = parts.read()
        for other in parts.other_versions():
            logging.warning("an earlier command drew some samples with other versions: %s", other)
        chosen = np.isin(stored["id"], all_ids)
        samples = Samples(*(stored[name][chosen] for name in Samples._fields))
        if samples.failed.any():
            logging.warning(
                "%d of %d samples are not finite or not solved; the first are %s. Try smaller "
                "tolerances or more steps, or a network that was trained longer",
                *(samples.failed.sum(), len(samples.failed), np.flatnonzero(samples.failed)[:5]),
            )
        return samples

    def strip(self) -> np.ndarray | None:
        """Up to four rows of images, each from noise on the left to a sample on the right; None
        without ``sampling.frames``. All processes compute it, because their devices hold the
        parameters together."""
        experiment, config = self.experiment, self.experiment.config.sampling
        if config.frames <= 1:
            return None
        ids = np.arange(min(4, config.num_images), dtype=np.int32)
        score, seed = experiment.adapter(self.restored.state.ema_params), np.uint32(config.seed)
        paths = np.asarray(_path_batch(score, ids, seed, Recipe.of(experiment), config.frames))
        return grid(experiment, paths.reshape(-1, *experiment.shape), columns=config.frames)

    def write(self, samples: Samples, strip: np.ndarray | None) -> None:
        """Write ``samples.npz``, ``samples.png`` and ``samples_strip.png``."""
        origin = {
            "step": self.restored.step,
            "parameters_crc32": tree_crc32(self.restored.state.ema_params),
            "sampler": repr(self.experiment.config.sampling.build()),
        }
        arrays = {name: np.asarray(value) for name, value in origin.items()}
        self.workdir.write(SAMPLES, {**samples._asdict(), **arrays})
        shown = samples.images[:256]  # A picture of more images would be too large.
        write_png(self.workdir / "samples.png", grid(self.experiment, shown))
        if strip is not None:
            write_png(self.workdir / "samples_strip.png", strip)
        else:  # A strip that is there shows samples of an earlier run.
            (self.workdir / "samples_strip.png").unlink(missing_ok=True)


def grid(experiment: Experiment, images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A grid of ``images`` as uint8 for a PNG, nearly square unless ``columns`` is given."""
    scale = max(1, 64 // experiment.shape[0])
    columns = columns or math.ceil(math.sqrt(len(images)))
    return image_grid(images, experiment.levels, columns=columns, scale=scale)
