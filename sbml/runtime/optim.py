"""The paper's optimizer: Adam with linear warm-up and clipping by the global norm.

learning rate at step n = lr min(n / warmup, 1)
"""

from typing import Any

import jax
import optax

from sbml.types import Array

SCHEDULES = ("constant", "cosine")


def learning_rate(lr: float, warmup: int, schedule: str, num_steps: int) -> optax.Schedule:
    """lr min(step / warmup, 1), then constant (the paper) or a cosine to zero at ``num_steps``.

    If ``num_steps`` is not above ``warmup``, the run ends before the cosine begins.
    """
    if schedule == "cosine" and warmup < num_steps:
        return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, num_steps)
    return optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)


def _kernels(params: Any) -> Any:
    """Whether each leaf decays.

    It does if it has two or more axes, and its name is not that of a scale, bias or position
    embedding (these may have as many axes as an image).
    """

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
    """Clipping to the global norm ``grad_clip``, Adam, then decoupled weight decay.

    ``grad_clip=0`` and ``weight_decay=0`` turn these off. Only matrices and kernels decay; biases,
    scales of norms, position embeddings and the fixed Fourier frequencies do not.
    """

    def decay(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return jax.tree.map(
            lambda update, param, decays: update + weight_decay * param if decays else update,
            *(updates, params, _kernels(params)),
        )

    # The structure of the state does not depend on the settings, so a run may go on with others.
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2, eps),
        optax.stateless(decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
