"""The paper's optimizer: Adam, linear warm-up, clipping by global norm."""

from typing import Any

import jax
import optax

SCHEDULES = ("constant", "cosine")


def learning_rate(lr: float, warmup: int, schedule: str, num_steps: int) -> optax.Schedule:
    """lr min(step / warmup, 1), then constant (the paper) or a cosine to zero at ``num_steps``.

    Raises:
      ValueError: for an unknown schedule, or a warm-up longer than a cosine run.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown optim.schedule {schedule!r}; choose from {SCHEDULES}")
    if schedule == "constant":
        return optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)
    if warmup >= num_steps:
        raise ValueError(
            f"optim.warmup={warmup} must be below training.num_steps={num_steps} "
            "for the cosine schedule"
        )
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, num_steps)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


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

    Only matrices and kernels decay: not biases, norms' scales, nor the fixed Fourier frequencies.
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2, eps),
        optax.add_decayed_weights(weight_decay, _kernels) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
