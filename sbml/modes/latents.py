"""What the latents of a model are good for: mode ``latents``, pictures and ``latents.npz``.

    encode          the ODE from eps to T: one latent an image, about N(0, s^2 I)
    decode          back; how far the image comes back from where it was is the solver's error
    interpolate     cos(a) z_1 + sin(a) z_2, a in [0, pi / 2]: as normal as its ends
    complete        the right half of an image, or its colours, by the score (``samplers.known``)

All are maps of one model; nothing is trained.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, report
from sbml.data import spread
from sbml.evaluation.samples import grid
from sbml.experiment.build import Experiment
from sbml.ode import Solver, transport
from sbml.runtime import sharding
from sbml.runtime.parts import write_npz
from sbml.samplers import FixedSteps
from sbml.samplers.known import GREY_FIRST, complete
from sbml.sdes import SDE
from sbml.types import Array, Score

COMPLETIONS = 4  # of each image
STATIC = ("sde", "eps", "solver")


@functools.partial(jax.jit, static_argnames=STATIC)
def encode(score: Score, x: Array, *, sde: SDE, eps: float, solver: Solver) -> Array:
    """The latents ``(n, *s)`` at T of ``x (n, *s)`` at eps."""
    return jax.vmap(lambda x: transport(score, sde, x, eps, sde.T, solver)[0])(x)


@functools.partial(jax.jit, static_argnames=STATIC)
def decode(score: Score, z: Array, *, sde: SDE, eps: float, solver: Solver) -> Array:
    """The images ``(n, *s)`` at eps of latents ``z (n, *s)`` at T."""
    return jax.vmap(lambda z: transport(score, sde, z, sde.T, eps, solver)[0])(z)


def interpolate(z: Array, frames: int) -> Array:
    """``(n - 1, frames, *s)`` latents from each of ``z (n, *s)`` to the next."""
    angle = jnp.linspace(0, jnp.pi / 2, frames).reshape(1, frames, *[1] * (z.ndim - 1))
    return jnp.cos(angle) * z[:-1, None] + jnp.sin(angle) * z[1:, None]


@functools.partial(jax.jit, static_argnames=("sde", "eps", "sampler", "colours"))
def completed(
    score: Score, x: Array, *, sde: SDE, eps: float, sampler: FixedSteps, colours: bool
) -> Array:
    """``(n, COMPLETIONS, h, w, c)``: ``x (n, h, w, c)`` with new right halves, or new colours."""
    _, _, w, c = x.shape
    if colours:
        mask, basis = jnp.eye(c)[0][None, None], jnp.asarray(GREY_FIRST, x.dtype)
    else:
        mask, basis = (jnp.arange(w) < w // 2).astype(x.dtype)[None, :, None], None
    keys = jax.random.split(jax.random.key(0), (len(x), COMPLETIONS))
    fill = functools.partial(complete, score, sde, eps=eps, sampler=sampler, basis=basis)
    return jax.vmap(lambda x, keys: jax.vmap(lambda key: fill(x, mask, key))(keys))(x, keys)


def _shown(x: Array, colours: bool) -> Array:
    """What a completion was shown of ``x (n, h, w, c)``; the rest mid-grey."""
    if colours:
        return jnp.broadcast_to(jnp.mean(x, axis=-1, keepdims=True), x.shape)
    half = x.shape[2] // 2
    return x.at[:, :, half:].set(0)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Encode ``latents.count`` test images, and make a picture of each use.

    Writes ``latents.npz`` (ids, latents, reconstruction errors), ``reconstruction.png``,
    ``interpolation.png``, ``inpainting.png`` and, for colour images, ``colourisation.png``.

    Raises:
      ValueError: without a checkpoint, or for fewer than two images.
    """
    experiment = Experiment(config)
    with jax.default_matmul_precision(config.eval.precision):
        _run(experiment, epath.Path(workdir))


def _run(experiment: Experiment, workdir: epath.Path) -> None:
    config = experiment.config
    options = config.latents
    restored, images = experiment.restore(workdir), experiment.images(config.eval.split)
    experiment = experiment.scheduled(restored.state.ema_params)
    score = experiment.exact_adapter(restored.state.ema_params)
    if len(images) < 2:
        raise ValueError(f"{images.name} {images.split} has one image: an interpolation needs two")
    ids = spread(len(images), options.count)
    x = bits.to_model(jnp.asarray(images.images[ids]), 0.5, images.levels)
    # Ten times as strict as for likelihoods: no score takes the error of a path alone out.
    solver = experiment.eval_solver.tighter(10)
    exact = {"sde": experiment.sde, "eps": experiment.eval_eps, "solver": solver}
    z = encode(score, x, **exact)
    back = decode(score, z, **exact)
    error = sharding.to_host(jnp.abs(back - x).reshape(len(x), -1).max(axis=1))
    loose = {**exact, "eps": experiment.sampling_eps}
    between = interpolate(z, options.frames).reshape(-1, *config.data.shape)
    pictures = {
        "reconstruction": (jnp.concatenate([x, back]), len(x)),
        "interpolation": (decode(score, between, **loose), options.frames),
    }
    how = {"sde": experiment.sde, "eps": experiment.sampling_eps, "sampler": options.sampler()}
    tasks = {"inpainting": False, **({"colourisation": True} if x.shape[-1] == 3 else {})}
    for name, colours in tasks.items():
        filled = completed(score, x, **how, colours=colours)
        rows = jnp.concatenate([_shown(x, colours)[:, None], filled, x[:, None]], axis=1)
        pictures[name] = rows.reshape(-1, *config.data.shape), rows.shape[1]
    shown = {name: bits.to_pixels(values, images.levels) for name, (values, _) in pictures.items()}
    shown, z = sharding.to_host((shown, z))
    if jax.process_index() > 0:  # From here on no process computes.
        return
    columns = {"id": ids, "latent": z, "reconstruction_error": error}
    write_npz(workdir / "latents.npz", {**columns, "step": np.asarray(restored.step)})
    for name, pixels in shown.items():
        width = pictures[name][1]
        report.write_png(workdir / f"{name}.png", grid(experiment, pixels, columns=width))
        print(f"{name}: {workdir / f'{name}.png'}")
    print(
        f"{len(x)} latents: mean {z.mean():.3f}, standard deviation {z.std():.3f} (the prior's "
        f"{experiment.sde.prior_std:g}); largest reconstruction error {error.max():.1e}, "
        "pixels in [-1, 1]"
    )
