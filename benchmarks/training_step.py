"""CPU time of a training step, and how much of it is due to losses that are written per example.

    python benchmarks/training_step.py [--batch=32] [--rounds=5] [--steps=4]

The network is a reduced one for images of 32x32x3: nf 32, ch_mult (1, 2, 2), 2 residual blocks a
level, attention at 16x16. These steps are compared:

    dsm_batch         the loss of training, ``losses.dsm_batch``
    by hand           the same loss, written for the batch by hand
    vmap of dsm       the network is called for one example at a time under ``vmap``
    XLA's gradients   ``dsm_batch`` without the speed-up of ``networks._layers``
    XLA alone         as before, and also without the options of ``platform.compiler_options``: the
                      cost of a plain implementation on this machine

The steps are timed in turns, and each round begins with another step, so that the ratios are
reliable on a machine with other work.

To compare machines, the arithmetic of a step per CPU-second is also printed as a share of that of a
large convolution, which is measured between the rounds.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import losses
from sbml.core.platform import compiler_options, one_cpu
from sbml.core.streams import stream
from sbml.core.types import Array
from sbml.networks import _layers
from sbml.program.config import build, objective
from sbml.program.config.config import default
from sbml.program.runtime import cpu, sharding
from sbml.program.runtime.state import Update, make_step

Loss = Callable[[Any, Any, Any], Array]  # of the parameters, the draws and the frozen arrays


def experiment() -> build.Experiment:
    """The reduced network with the paper's loss and draws."""
    config = default()
    config.training.update(noises="independent", proposal_bins=0)
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(16,))
    return build.Experiment(config)


def by_hand(e: build.Experiment) -> Loss:
    """Z / 2 ||z - e(x_t, t)||^2 / d for a batch, where the network e predicts the noise.

    Only the noise is drawn under ``vmap``.
    """

    def loss(params: Any, draws: Any, frozen: Any) -> Array:
        x, t, weight, keys = draws[:4]
        z = jax.vmap(lambda k: jax.random.normal(stream(k, "noise"), x.shape[1:]))(keys)
        alpha, sigma = e.sde.mean_coef(t), e.sde.std(t)
        x_t = alpha[:, None, None, None] * x + sigma[:, None, None, None] * z
        noise: Any = e.adapter.model.apply(
            {"params": params},
            x_t,
            999.0 * t,
            train=True,
            rngs={"dropout": stream(keys[0], "dropout")},
        )
        scale = weight * (e.sde.diffusion(t) / sigma) ** 2 / x[0].size
        return 0.5 * scale * jnp.sum((z - noise) ** 2, axis=(1, 2, 3))

    return loss


def one_by_one(e: build.Experiment) -> Loss:
    """``vmap(dsm)``: the network is called for one example at a time."""

    def loss(params: Any, draws: Any, frozen: Any) -> Array:
        x, t, weight, keys = draws[:4]
        score = e.adapter(params)
        terms = jax.vmap(lambda x, t, k: losses.dsm(score, e.sde, x, t, k))(x, t, keys)
        return weight * terms / x[0].size

    return loss


def large_convolution() -> tuple[Callable[[], Any], float]:
    """A 3x3 convolution of 32 images of 32x32 with 128 channels, as a function, and its GFLOP."""
    key = jax.random.key(0)
    x, kernel = jax.random.normal(key, (32, 32, 32, 128)), jax.random.normal(key, (3, 3, 128, 128))
    layout = ("NHWC", "HWIO", "NHWC")
    run = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout)
    )
    return lambda: run(x, kernel), 2 * x.size * 9 * 128 / 1e9


def main() -> None:
    """Print CPU-seconds of compilation and per step, and ratios to the step by hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    e, mesh = experiment(), sharding.data_mesh()
    pixels = np.random.default_rng(0).integers(0, 256, (args.batch, *e.shape), np.uint8)
    key = jax.random.key(0)
    initial = jax.block_until_ready(sharding.initial_state(e.init_state, mesh))
    kinds = {
        "dsm_batch": objective.loss_fn(e),
        "by hand": by_hand(e),
        "vmap of dsm": one_by_one(e),
        "XLA's gradients": objective.loss_fn(e),
        "XLA alone": objective.loss_fn(e),
    }
    steps, values = {}, {}
    for name, loss in kinds.items():
        plain = name in ("XLA's gradients", "XLA alone")
        _layers.one_cpu = (lambda: False) if plain else one_cpu
        step = jax.jit(
            make_step(Update(objective.prepare_fn(e), loss, e.optimizer, ema=0.9999)),
            compiler_options={} if name == "XLA alone" else compiler_options(),
        )
        start = time.process_time()
        steps[name] = step.lower(initial, pixels, key, ()).compile()
        print(f"{name:15s} compile {time.process_time() - start:6.1f} CPU-s")
        values[name] = float(steps[name](initial, pixels, key, ())[1]["loss"])
    assert np.isclose(values["dsm_batch"], values["by hand"], rtol=1e-5), values

    measure(steps, lambda step, state: step(state, pixels, key, ())[0], initial, args)


def measure(
    steps: dict[str, Any],
    advance: Callable[[Any, Any], Any],
    initial: Any,
    args: argparse.Namespace,
) -> None:
    """Time the compiled ``steps`` and a large convolution in turns, and print the medians."""
    cost: dict[str, list[float]] = {name: [] for name in steps}
    rates: list[float] = []
    convolve, gflop = large_convolution()
    jax.block_until_ready(convolve())
    for i in range(args.rounds):
        names = list(steps)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            step = steps[name]
            state = initial
            start = time.process_time()
            for _ in range(args.steps):
                state = advance(step, state)
            jax.block_until_ready(state)
            cost[name].append((time.process_time() - start) / args.steps)
        start = time.process_time()
        jax.block_until_ready([convolve() for _ in range(8)])
        rates.append(8 * gflop / (time.process_time() - start))
    print(f"a convolution: {np.median(rates):.0f} GFLOP per CPU-s")
    # XLA counts only the more expensive branch of a conditional, so the count is taken from a step
    # without conditionals.
    work = steps["XLA's gradients"].cost_analysis()["flops"]
    for name, seconds in cost.items():
        ratio = np.median(np.array(seconds) / np.array(cost["by hand"]))
        rate = work / 1e9 / np.median(seconds)
        print(
            f"{name:15s} {np.median(seconds):.3f} CPU-s per step, {ratio:.3f} of by hand, "
            f"{rate / np.median(rates):.2f} of a convolution's rate"
        )


if __name__ == "__main__":
    cpu.settle()
    main()
