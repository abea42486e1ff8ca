"""Training a score: uint8 batch -> dequantize -> perturb -> score -> loss -> optimizer.

    loss = 1/d  mean over the batch of  weight(t) 1/2 w(t) ||sigma s(x_t, t) + z||^2     nats/dim

beside ``training.second_order`` times the second-order loss (``sbml.second_order``), if it is asked
for. That is a way to go on from a checkpoint: the same command with it and more ``num_steps``.

With likelihood weighting its expectation is, up to constants, a bound on -log p(x) / d.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml import bits, bound, discrete, losses, second_order, times
from sbml.evaluation import samples
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.modes import _loop as loop
from sbml.runtime.state import Loss, Observe, Prepare, TrainState, Update
from sbml.runtime.workdir import Workdir
from sbml.sdes import SDE
from sbml.types import Array, Key


def dequantize(pixels: Array, key: Key, kind: str, levels: int) -> Array:
    """What the network is trained on, in [-1, 1].

    ``uniform``: the whole bin; ``centre``: its centre; ``none``: k / (levels - 1), as the authors.
    """
    if kind == "none":
        return 2.0 * pixels / (levels - 1) - 1.0
    u = jax.random.uniform(key, pixels.shape) if kind == "uniform" else 0.5
    return bits.to_model(pixels, u, levels)


class Draws(NamedTuple):
    """A batch's draws: x (n, *s) in [-1, 1]; the others (n,).

    The weight of a loss is ``weight`` times ``inverse``, one over the density of v (see ``times``).
    """

    x: Array
    t: Array
    weight: Array
    keys: Key
    signs: Array
    v: Array
    inverse: Array


def prepare_fn(experiment: Experiment) -> Prepare:
    """The draws of a batch of uint8 images, each once, or twice where noises are antithetic."""
    config, levels = experiment.config, experiment.config.data.levels
    draw, antithetic = times.DRAWS[config.training.times], config.training.antithetic

    def prepare(pixels: Array, key: Key, statistics: Array) -> Draws:
        u_key, time_key, loss_key = jax.random.split(key, 3)
        n = len(pixels)
        x = dequantize(pixels, u_key, config.data.dequantization, levels)
        v, inverse = draw(time_key, n)[:, 0], jnp.ones(n)
        if config.training.adapts:
            scale = jnp.sqrt(statistics[1] / statistics[0])
            v, inverse = times.warp(v, times.with_floor(scale))
        t, weight = experiment.proposal.at(v)
        draws = Draws(x, t, weight, jax.random.split(loss_key, n), jnp.ones(n), v, inverse)
        if not antithetic:
            return draws
        # Row by row, so that every device keeps its own.
        doubled = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), draws)
        return doubled._replace(signs=jnp.tile(jnp.array([1.0, -1.0]), n))

    return prepare


def loss_fn(experiment: Experiment) -> Loss:
    """Per-example losses (n,) in nats/dim."""
    training, learned = experiment.config.training, experiment.config.sde.learned
    dims = math.prod(experiment.shape)

    def loss(params: Any, draws: Draws, frozen: Any) -> Array:
        score, sde = experiment.trained_score(params)
        signs = draws.signs if training.antithetic else None
        given: tuple = (score, sde, draws.x, draws.t, draws.keys)
        how: dict[str, Any] = {"weighting": training.weighting, "signs": signs}
        if training.second_order:
            probes = training.second_order_probes
            first, second = second_order.dsm_batch(*given, **how, probes=probes)
            terms = first + training.second_order * second
        else:
            terms = losses.dsm_batch(*given, **how)
        terms = draws.weight * draws.inverse * terms
        if learned:
            terms = terms + _ends(experiment, sde, draws)
        return terms / dims

    return loss


def _ends(experiment: Experiment, sde: SDE, draws: Draws) -> Array:
    """The bound's prior and reconstruction, nats (n,), by which an SDE learns where to end."""
    noise, eps = discrete.Categorical(experiment.levels), jnp.asarray(experiment.adapter.eps)

    def one(x: Array, key: Key, sign: Array) -> Array:
        # The loss's own draws come from the first three keys of ``split``.
        z = sign * jax.random.normal(jax.random.split(key, 4)[3], x.shape)
        pixels = bits.to_pixels(x, experiment.levels)
        return bound.prior_kl(sde, x) + discrete.reconstruction(sde, noise, pixels, eps, z)

    return jax.vmap(one)(draws.x, draws.keys, draws.signs)


def observe_fn(experiment: Experiment) -> Observe | None:
    """What a step tells the next ones about where its noise is (``times.tally``).

    The half squared difference of a pair's losses, what is left of the noise in their mean; without
    pairs the loss itself, whose root follows the size of the gradient.
    """
    training = experiment.config.training
    if not training.adapts:
        return None

    def observe(statistics: Array, draws: Draws, losses: Array) -> Array:
        values, v = losses / draws.inverse, draws.v
        if training.antithetic:
            values, v = 0.5 * (values[::2] - values[1::2]) ** 2, v[::2]
        return times.tally(statistics, v, values, decay=0.99)

    return observe


def update(experiment: Experiment) -> Update:
    """What one step of the training of ``experiment``'s network computes."""
    return Update(
        prepare_fn(experiment),
        loss_fn(experiment),
        experiment.optimizer,
        ema=experiment.config.optim.ema,
        accumulate=experiment.config.training.accumulate,
        observe=observe_fn(experiment),
    )


def task(experiment: Experiment, workdir: Workdir) -> loop.Task:
    """The training of ``experiment``'s network."""
    config, images = experiment.config, experiment.images("train")

    def picture(state: TrainState) -> np.ndarray:
        now = experiment.with_learned_schedule(state.ema_params)
        return samples.grid(now, samples.preview(now, state.ema_params).images)

    return loop.Task(
        name="train",
        training=config.training,
        field="",
        images=images,
        seed=config.seed,
        flip=config.data.flip,
        init=experiment.init_state,
        update=update(experiment),
        repeats=2 if config.training.antithetic else 1,
        frozen=(),
        provenance=experiment.provenance(images),
        check=lambda metadata: trained.check_score(config, metadata),
        directory=workdir.path,
        picture=picture,
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Train up to ``training.num_steps``, resuming from the newest whole checkpoint of ``workdir``.

    Writes ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``samples/``. Raises what
    ``loop.run`` does.
    """
    experiment, workdir = Experiment(config), Workdir(workdir)
    with workdir.lock("train"):
        loop.run(task(experiment, workdir), experiment.config.training.checkpoints(workdir))
