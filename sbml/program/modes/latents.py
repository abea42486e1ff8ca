"""Encoding, decoding, interpolating and inpainting with a trained model: ``--mode=latents``.

    encode          the probability-flow ODE from eps to T: a latent z per image, about N(0, S^2 I)
    decode          the ODE from T to eps; the distance to the original image is the solver's error
    interpolate     cos(a) z_1 + sin(a) z_2, a in [0, pi / 2]: N(0, S^2 I) if z_1 and z_2 are
                    independent and N(0, S^2 I)
    complete        a new right half of an image, or new colours (``samplers.known``)

Here S is the standard deviation of the prior, ``sde.prior_std``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core import bits
from sbml.core.progress import Bar
from sbml.core.streams import stream
from sbml.core.types import Array, Score
from sbml.data import spread
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.evaluation.samples import grid, to_bins
from sbml.program.report.pictures import png
from sbml.program.runtime import sharding
from sbml.program.runtime.workdir import LATENTS, Workdir
from sbml.samplers import FixedSteps
from sbml.samplers.known import GREY_FIRST, complete
from sbml.sdes import SDE

COMPLETIONS = 4  # number of completions of each image


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the model has no classes."""
    experiment.refuse_classes("latents")


def interpolate(z: np.ndarray, frames: int) -> np.ndarray:
    """Latents ``(n - 1, frames, *s)`` on arcs from each of ``z (n, *s)`` to the next."""
    angle = np.linspace(0, np.pi / 2, frames).reshape(1, frames, *[1] * (z.ndim - 1))
    return np.cos(angle) * z[:-1, None] + np.sin(angle) * z[1:, None]


@functools.partial(jax.jit, static_argnames=("sde", "eps", "sampler", "colours"))
def completions(
    score: Score, x: Array, *, sde: SDE, eps: float, sampler: FixedSteps, colours: bool
) -> Array:
    """``x (n, h, w, c)`` with new right halves, or with new colours for 3 channels.

    With ``colours`` the mean of the channels is kept, otherwise the left half. The result has the
    shape ``(n, COMPLETIONS, h, w, c)``.
    """
    _, _, w, c = x.shape
    if colours:
        mask, basis = jnp.eye(c)[0][None, None], jnp.asarray(GREY_FIRST, x.dtype)
    else:
        mask, basis = (jnp.arange(w) < w // 2).astype(x.dtype)[None, :, None], None
    keys = jax.random.split(stream(jax.random.key(0), "completions"), (len(x), COMPLETIONS))
    fill = functools.partial(complete, score, sde, eps=eps, sampler=sampler, basis=basis)
    return jax.vmap(lambda x, keys: jax.vmap(lambda key: fill(x, mask, key))(keys))(x, keys)


def run(trained: Trained) -> None:
    """Encode ``latents.count`` images of ``eval.split``, and make a picture of each operation.

    Writes ``latents.npz`` (ids, latents, reconstruction errors), ``reconstruction.png``,
    ``interpolation.png``, ``inpainting.png`` and, for colour images, ``colourisation.png``.
    """
    experiment, workdir, score = trained.experiment, trained.workdir, trained.score
    config, options = experiment.config, experiment.config.latents
    images = experiment.images(config.eval.split)
    factor = to_bins(images.levels, config.data.dequantization)
    if len(images) < 2:
        raise ValueError(
            f"{images.name} {images.split} has one image, but an interpolation needs two: choose "
            "another eval.split"
        )
    if options.count > len(images):
        raise ValueError(
            f"latents.count={options.count}: {images.name} {images.split} has {len(images)} "
            f"images; set --config.latents.count={len(images)}"
        )
    ids = spread(len(images), options.count)
    sde, eps, sampler = experiment.sde, experiment.sampling_eps, options.sampler()
    # The term ``correction`` of a likelihood corrects the error of the solver's path. There is no
    # such term here, so the tolerances are ten times smaller.
    density = dataclasses.replace(trained.density(), solver=config.eval.ode.build().tighter(10))
    in_colour = config.data.shape[-1] == 3
    tasks = {"inpainting": False, **({"colourisation": True} if in_colour else {})}
    with Bar(f"latents of {len(ids)} images", "picture", 2 + len(tasks)) as bar:
        x = bits.to_model(jnp.asarray(images.images[ids]), 0.5, images.levels) / factor
        z = density.latent(x)
        reconstruction = density.decode(z)
        error = np.abs(reconstruction - x).reshape(len(x), -1).max(axis=1)
        # Each picture: images in [-1, 1], and the number of columns of the grid.
        pictures: dict[str, Any] = {"reconstruction": (np.concatenate([x, reconstruction]), len(x))}
        bar.update()
        z_between = interpolate(z, options.frames).reshape(-1, *config.data.shape)
        between = dataclasses.replace(density, eps=eps).decode(z_between)
        pictures["interpolation"] = between, options.frames
        bar.update()
        for name, colours in tasks.items():
            new = completions(score, x, sde=sde, eps=eps, sampler=sampler, colours=colours)
            # The first column shows what is kept, with grey in place of what is replaced.
            kept = x.at[:, :, x.shape[2] // 2 :].set(0)
            if colours:
                kept = jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)
            shown = jnp.concatenate([kept[:, None], new, x[:, None]], axis=1)
            pictures[name] = shown.reshape(-1, *config.data.shape), shown.shape[1]
            jax.block_until_ready(shown)
            bar.update()
    pixels = {
        name: sharding.to_host(bits.to_pixels(values * factor, images.levels))
        for name, (values, _) in pictures.items()
    }
    columns = {"id": ids, "latent": np.float32(z), "reconstruction_error": error}
    workdir.write(LATENTS, {**columns, "step": trained.restored.step})
    for name, picture in pixels.items():
        width = pictures[name][1]
        workdir.write_bytes(f"{name}.png", png(grid(experiment, picture, columns=width)))
        print(f"{name}: {workdir / f'{name}.png'}")
