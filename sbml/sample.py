"""Samples of a trained model, each a function of (seed, id): the batch size changes nothing."""

import functools
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, sampling, summary
from sbml.build import Experiment
from sbml.data import eval_batches
from sbml.ode import Solver
from sbml.runtime import progress, report, sharding
from sbml.runtime.parts import write_npz
from sbml.sdes import SDE
from sbml.types import Array, Score


@functools.partial(
    jax.jit, static_argnames=("sde", "shape", "levels", "eps", "solver", "denoise_last")
)
def _sample_batch(
    score: Score,
    ids: Array,
    seed: Array,
    *,
    sde: SDE,
    shape: tuple[int, ...],
    levels: int,
    eps: float,
    solver: Solver,
    denoise_last: bool,
) -> tuple[Array, Array]:
    """uint8 images ``(n, *shape)`` of ``ids (n,)``, and each one's network evaluations."""

    key = jax.random.key(seed)

    def one(i: Array) -> tuple[Array, Array]:
        x, stats = sampling.ode_sample(
            score,
            sde,
            shape,
            jax.random.fold_in(key, i),
            eps=eps,
            solver=solver,
            denoise_last=denoise_last,
        )
        return bits.to_pixels(x, levels), stats.nfe

    return jax.vmap(one)(ids)


def generate(
    experiment: Experiment, params: Any, count: int, *, quiet: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Samples 0 .. count - 1 over all devices: uint8 ``(count, *shape)`` and evaluations."""
    config, mesh = experiment.config.sampling, sharding.data_mesh()
    size = sharding.round_up(min(config.batch_size, count))
    score = experiment.adapter(params)
    images = np.zeros((count, *experiment.shape), np.uint8)
    nfe = np.zeros(count, np.int32)
    with progress.bar("sample", "image", count, quiet=quiet) as bar:
        for ids, mask in eval_batches(count, size):
            batch = _sample_batch(
                score,
                sharding.put(ids.astype(np.int32), sharding.batched(mesh)),
                np.uint32(config.seed),
                sde=experiment.sde,
                shape=experiment.shape,
                levels=experiment.levels,
                eps=experiment.sampling_eps,
                solver=experiment.sampling_solver,
                denoise_last=config.denoise_last,
            )
            x, evaluations = sharding.to_host(batch)
            images[ids[mask]], nfe[ids[mask]] = x[mask], evaluations[mask]
            bar.update(int(mask.sum()))
    return images, nfe


def grid(experiment: Experiment, images: np.ndarray) -> np.ndarray:
    """A near-square grid of ``images``, small ones enlarged, as uint8 for a PNG."""
    scale = max(1, 64 // experiment.shape[0])
    columns = math.ceil(math.sqrt(len(images)))
    return report.image_grid(images, experiment.levels, columns=columns, scale=scale)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draw ``sampling.num_images`` from the newest checkpoint's averaged parameters.

    Writes ``samples.npz`` and ``samples.png``, and the report anew where there is an evaluation.

    Raises:
      ValueError: without a checkpoint, or with one of another model.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    restored = experiment.restore(workdir)
    images, nfe = generate(experiment, restored.state.ema_params, config.sampling.num_images)
    if jax.process_index() > 0:
        return
    step = np.asarray(restored.step)
    write_npz(workdir / summary.SAMPLES, {"images": images, "nfe": nfe, "step": step})
    report.write_png(workdir / "samples.png", grid(experiment, images))
    if (workdir / summary.EVALUATION).exists():
        summary.write(workdir, experiment.images(config.eval.split))
    print(f"{len(images)} samples, {nfe.mean():.0f} evaluations each: {workdir / 'samples.png'}")
