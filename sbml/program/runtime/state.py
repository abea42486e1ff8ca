"""The training state, and the training step that all trained models share.

    value, g = mean over the batch of loss(params), its gradient
    params  <- params + optimizer(g)
    ema     <- decay ema + (1 - decay) params          in float32

The state holds arrays only. Keys are ``fold_in(base_key, step)`` and the batch of a step is a pure
function of (seed, step), so a run that resumes from a saved state has bitwise the same result as
one without interruption. ``statistics`` are quantities that one step estimates and the next steps
use for their draws. A step draws before it updates them, so its loss stays unbiased.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sbml.core.platform import on_cpu
from sbml.core.types import Array, Key, PyTree

Params = TypeVar("Params")
Draws = TypeVar("Draws")
# The losses of the examples (n,), or a tuple of such arrays whose sum is the loss.
Losses = Array | tuple[Array, ...]
SomeLosses = TypeVar("SomeLosses", bound=Losses)
Metrics = dict[str, Array]
# prepare(batch, key, statistics) -> per-example draws (leading axis n), once for the whole batch
Prepare = Callable[[PyTree, Key, PyTree], PyTree]
# observe(statistics, draws, what the loss gives) -> statistics
Observe = Callable[[PyTree, PyTree, Losses], PyTree]
# loss(params, draws, frozen) -> losses; frozen are arrays that are not trained
Loss = Callable[[PyTree, PyTree, PyTree], Losses]
Step = Callable[["TrainState", PyTree, Key, PyTree], tuple["TrainState", Metrics]]


class TrainState(struct.PyTreeNode):
    """Everything that is needed to continue training.

    Attributes:
      step: (), the number of completed steps.
      params: the parameters.
      ema_params: their exponential moving average.
      opt_state: the optimizer's state.
      statistics: quantities that earlier steps have estimated, see above.
    """

    step: Array
    params: PyTree
    ema_params: PyTree
    opt_state: optax.OptState
    statistics: PyTree = ()

    @classmethod
    def create(
        cls, params: PyTree, optimizer: optax.GradientTransformation, statistics: PyTree = ()
    ) -> "TrainState":
        """The state before the first step; the average starts at the parameters."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            statistics=statistics,
        )


def mean(losses: Losses) -> Array:
    """The mean over the examples of what a ``Loss`` gives, a scalar."""
    return jnp.mean(functools.reduce(jnp.add, jax.tree.leaves(losses)))


def value_and_grad(
    loss: Callable[[Params, Draws], SomeLosses], params: Params, draws: Draws, accumulate: int
) -> tuple[SomeLosses, Params]:
    """What ``loss`` gives, and the gradient of its :func:`mean`, in ``accumulate`` equal
    micro-batches.

    On CPU the loop is unrolled: gradient convolutions inside a while loop are 20 times slower.
    """

    def mean_loss(params: Params, draws: Draws) -> tuple[Array, SomeLosses]:
        losses = loss(params, draws)
        return mean(losses), losses

    grad = jax.grad(mean_loss, has_aux=True)
    if accumulate == 1:
        grads, losses = grad(params, draws)
        return losses, grads

    def add(total: Params, part: Draws) -> tuple[Params, SomeLosses]:
        new, losses = grad(params, part)
        return jax.tree.map(lambda a, b: a + b / accumulate, total, new), losses

    zero = jax.tree.map(jnp.zeros_like, params)
    # (n, ...) -> (accumulate, n / accumulate, ...), interleaved: each device keeps its rows.
    parts = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), draws)
    unroll = accumulate if on_cpu() else 1
    grads, losses = jax.lax.scan(add, zero, parts, unroll=unroll)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1), losses), grads


@dataclasses.dataclass(frozen=True)
class Update:
    """What one training step computes.

    Attributes:
      prepare: the draws of a batch.
      loss: the losses of the draws.
      optimizer: from gradients to updates of the parameters.
      ema: the decay of the parameters' average.
      accumulate: the number of micro-batches whose gradients are averaged.
      observe: the next statistics, from the draws and their losses; None keeps them as they are.
    """

    prepare: Prepare
    loss: Loss
    optimizer: optax.GradientTransformation
    ema: float
    accumulate: int = 1
    observe: Observe | None = None


def make_step(update: Update) -> Step:
    """One update, ``(state, batch, base_key, frozen) -> (state, metrics)``, to be jitted.

    The metrics are ``loss`` and ``grad_norm``, scalars.
    """

    def step(
        state: TrainState, batch: PyTree, base_key: Key, frozen: PyTree
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(base_key, state.step)
        draws = update.prepare(batch, key, state.statistics)
        losses, grads = value_and_grad(
            lambda p, d: update.loss(p, d, frozen), state.params, draws, update.accumulate
        )
        updates, opt_state = update.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        statistics = state.statistics
        if update.observe:
            statistics = update.observe(statistics, draws, losses)
        new = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=optax.incremental_update(params, state.ema_params, 1 - update.ema),
            opt_state=opt_state,
            statistics=statistics,
        )
        return new, {"loss": mean(losses), "grad_norm": optax.tree.norm(grads)}

    return step
