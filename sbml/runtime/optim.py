"""The paper's optimizer: Adam, linear warm-up, clipping by global norm."""

from typing import Any

import jax
import optax
from absl import logging

from sbml.types import Array

SCHEDULES = ("constant", "cosine")


def learning_rate(lr: float, warmup: int, schedule: str, num_steps: int) -> optax.Schedule:
    """lr min(step / warmup, 1), then constant (the paper) or a cosine to zero at ``num_steps``.

    A run that is over before its warm-up never comes to the cosine: a warning says so.

    Raises:
      ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown optim.schedule {schedule!r}; choose from {SCHEDULES}")
    if schedule == "cosine":
        if warmup < num_steps:
            return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, num_steps)
        logging.warning(
            "a warm-up of %d steps in a run of %d: the learning rate only rises, to %g",
            *(warmup, num_steps, lr * num_steps / warmup),
        )
    return optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)


def _kernels(params: Any) -> Any:
    """Which leaves decay: by shape, and by name where a scale, bias or embedding is an image."""

    def is_kernel(path: Any, leaf: Array) -> bool:
        name = str(getattr(path[-1], "key", ""))
        return leaf.ndim > 1 and not name.startswith(("scale", "bias", "pos_emb"))

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def adam(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_clip: float,
) -> optax.GradientTransformation:
    """Clip to global norm ``grad_clip`` (0: off), Adam, decoupled weight decay (0: off).

    Only matrices and kernels decay: not biases, norms' scales, embeddings of positions, nor the
    fixed Fourier frequencies.
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2, eps),
        optax.add_decayed_weights(weight_decay, _kernels) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
