"""Training a score: uint8 batch -> dequantize -> perturb -> score -> loss -> optimizer.

    loss = 1/d  mean over the batch of  weight(t) 1/2 w(t) ||sigma s(x_t, t) + z||^2     nats/dim

With likelihood weighting its expectation is, up to constants, a bound on -log p(x) / d.
"""

import math
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, loop, losses, sample, times
from sbml.build import Experiment
from sbml.runtime.state import Loss, Prepare, TrainState
from sbml.types import Array, Key


def dequantized(pixels: Array, key: Key, kind: str, levels: int) -> Array:
    """What the network is trained on, in [-1, 1].

    ``uniform``: the whole bin; ``centre``: its centre; ``none``: k / (levels - 1), as the authors.
    """
    if kind == "none":
        return 2.0 * pixels / (levels - 1) - 1.0
    u = jax.random.uniform(key, pixels.shape) if kind == "uniform" else 0.5
    return bits.to_model(pixels, u, levels)


def prepare_fn(experiment: Experiment) -> Prepare:
    """The draws of a batch of uint8 images: x (n, *s) in [-1, 1]; times, weights, keys (n,)."""
    config, levels = experiment.config, experiment.levels
    draw = times.DRAWS[config.training.times]

    def prepare(pixels: Array, key: Key) -> tuple[Array, Array, Array, Key]:
        u_key, time_key, loss_key = jax.random.split(key, 3)
        x = dequantized(pixels, u_key, config.data.dequantization, levels)
        t, weight = experiment.proposal.at(draw(time_key, len(pixels))[:, 0])
        return x, t, weight, jax.random.split(loss_key, len(pixels))

    return prepare


def loss_fn(experiment: Experiment) -> Loss:
    """Per-example losses (n,) in nats/dim."""
    sde, dims = experiment.sde, math.prod(experiment.shape)

    def loss(params: Any, draws: tuple[Array, Array, Array, Key], frozen: Any) -> Array:
        x, t, weight, keys = draws
        score = experiment.adapter(params)
        terms = losses.dsm_batch(score, sde, x, t, keys, weighting=experiment.weighting)
        return weight * terms / dims

    return loss


def task(experiment: Experiment, workdir: epath.Path) -> loop.Task:
    """The training of ``experiment``'s network."""
    config, images = experiment.config, experiment.images("train")

    def picture(state: TrainState) -> np.ndarray:
        count = config.sampling.num_images
        drawn, _ = sample.generate(experiment, state.ema_params, count, quiet=True)
        return sample.grid(experiment, drawn)

    return loop.Task(
        name="train",
        section=config,
        field="",
        images=images,
        seed=config.seed,
        flip=config.data.flip,
        init=experiment.init_state,
        prepare=prepare_fn(experiment),
        loss=loss_fn(experiment),
        optimizer=experiment.optimizer,
        frozen=(),
        provenance=experiment.provenance(images),
        directory=workdir,
        picture=picture,
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Train up to ``training.num_steps``, resuming from the newest whole checkpoint of ``workdir``.

    Writes ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``samples/``. Raises what
    ``loop.run`` does.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    loop.run(task(experiment, workdir), experiment.checkpoints(workdir))
