"""Trains a variational dequantizer for a fixed score model: ``--mode=train_dequantizer``.

    loss = 1/d  mean over the batch of  bound(-log p(x)) + log q(u | k),   x = 2 (k + u) / L - 1

Here u is drawn from q, and the bound is the evidence bound of ``sbml.bound`` with all its terms and
factors (such as the range Z of log-SNR). The loss is in nats/dim. Its expectation, in other units,
is the bits/dim of the estimator ``bound`` with this dequantizer, without the constant term
``scale``. The score is not trained: the gradient goes through u and log q.

Reference: Ho et al. 2019 (Flow++); Song et al. 2021, section 6 and appendix.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from sbml.core import bits
from sbml.core.streams import stream
from sbml.core.types import Array, Key
from sbml.likelihood import bound
from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.modes.train import Learner, fit
from sbml.program.runtime.checkpoint import OtherModelError
from sbml.program.runtime.state import Loss, Prepare, Update
from sbml.program.runtime.trees import tree_crc32
from sbml.program.runtime.workdir import Workdir
from sbml.sdes import times


def prepare_fn(experiment: Experiment) -> Prepare:
    """A function that makes the draws of a batch: its pixels ``(n, *s)``, points ``(n, 1)`` in
    [0, 1) for one time each, and keys ``(n,)`` of the flow and of the bound."""
    draw = times.DRAWS[experiment.config.training.times]

    def prepare(pixels: Array, key: Key, statistics: Any) -> tuple[Array, Array, Key, Key]:
        n = len(pixels)
        flow_keys = jax.random.split(stream(key, "dequantization"), n)
        bound_keys = jax.random.split(stream(key, "bound"), n)
        return pixels, draw(stream(key, "times"), n), flow_keys, bound_keys

    return prepare


def loss_fn(experiment: Experiment) -> Loss:
    """A function that gives the loss of each image, ``(n,)``, in nats/dim; its argument ``frozen``
    is the parameters of the score network."""
    sde, data, model = experiment.sde, experiment.config.data, experiment.trained_dequantizer
    levels, dims = data.levels, math.prod(data.shape)

    def loss(params: Any, draws: tuple[Array, Array, Key, Key], frozen: Any) -> Array:
        pixels, u, flow_keys, bound_keys = draws
        score = experiment.adapter(frozen)
        v, log_q = model.sample_batch(params, pixels, flow_keys, train=model.dropout > 0)

        def one(x: Array, u: Array, key: Key) -> Array:
            return bound.elbo(score, sde, x, key, eps=experiment.eval_eps, u=u).total

        nll = jax.vmap(one)(bits.to_model(pixels, v, levels), u, bound_keys)
        return (nll + log_q) / dims

    return loss


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that the dequantizer fits the images and the score, and draws no grids of samples."""
    config = experiment.config
    experiment.refuse_classes("train_dequantizer")
    config.check_dequantizer("dequantizer.name", config.dequantizer.name)
    if every := config.dequantizer.training.sample_every:
        raise ValueError(
            f"dequantizer.training.sample_every={every}: a dequantizer draws no samples; set "
            "--config.dequantizer.training.sample_every=0"
        )


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Train the dequantizer of ``config.dequantizer`` for the newest checkpoint of the score, in
    ``workdir/dequantizer``: ``train.fit``."""
    section = experiment.config.dequantizer
    section.optim.warn_if_short(section.training.num_steps)
    restored = experiment.restore(workdir)
    experiment = experiment.with_learned_schedule(restored.state.ema_params)
    images = experiment.images("train")
    score = {"step": restored.step, "crc32": tree_crc32(restored.state.ema_params)}

    def check_metadata(metadata: dict[str, Any]) -> None:
        if metadata["score"] != score:
            raise OtherModelError(
                f"{workdir / section.training.folder} was trained with score {metadata['score']}, "
                f"but the newest checkpoint is {score}: move the directory away to start again, or "
                "restore that score"
            )
        compatibility.check_dequantizer(experiment.config, metadata)

    learner = Learner(
        section=section.training,
        images=images,
        init=lambda: experiment.init_dequantizer(images),
        update=Update(
            prepare_fn(experiment),
            loss_fn(experiment),
            experiment.dequantizer_optimizer,
            ema=section.optim.ema,
            accumulate=section.training.accumulate,
        ),
        provenance={**experiment.provenance(images), "score": score},
        check=check_metadata,
        frozen=restored.state.ema_params,
    )
    fit(experiment, workdir, learner)
