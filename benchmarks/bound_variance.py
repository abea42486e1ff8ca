"""Variance of the evidence bound for ways of drawing its times, at equal network calls.

    python benchmarks/bound_variance.py [--config=CONFIG] [--workdir=FOLDER]

The model is a trained one, on its test images. Two variances over independent sweeps are printed:
that of the diffusion term of one image, averaged over images, and that of its mean over the data
set. Each is divided by its value for independent importance-sampled times; the standard deviation
of this ratio is over bootstrapped sweeps. The images are dequantized uniformly, with the same noise
for all sweeps, so only the draws of the bound vary.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sbml import data
from sbml.core import bits
from sbml.core.types import Array, Key, Score
from sbml.likelihood import bound
from sbml.program.config import build
from sbml.program.config.config import load
from sbml.program.config.trained import Trained
from sbml.program.evaluation.cells import Evaluation
from sbml.program.runtime import cpu
from sbml.program.runtime.workdir import Workdir
from sbml.sdes import times

# name: (times, proposal, control variate, density)
WAYS = {
    "iid, importance": ("iid", "importance", False, False),
    "iid, uniform t": ("iid", "uniform", False, False),
    "lattice": ("lattice", "importance", False, False),
    "lattice + control": ("lattice", "importance", True, False),
    "lattice + control + density": ("lattice", "importance", True, True),
}


def ratios(values: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Variances of ``values (sweeps, images)`` divided by those of ``base``: per image, and of the
    mean over images."""
    per_image = values.var(0, ddof=1).mean() / base.var(0, ddof=1).mean()
    # The draws of ``base`` are independent, so the variance of its mean follows from the images'.
    expected = base.var(0, ddof=1).mean() / base.shape[1]
    return per_image, values.mean(1).var(ddof=1) / expected


def report(values: dict[str, np.ndarray]) -> None:
    """Print the ratios of every way, with their standard deviations over bootstrapped sweeps."""
    base, rng = values["iid, importance"], np.random.default_rng(0)
    sweeps = len(base)
    print(f"{'variance, relative':32s} {'per image':>20s} {'data set':>20s}")
    for way, table in values.items():
        picks = rng.integers(0, sweeps, (400, 2, sweeps))
        spread = np.std([ratios(table[i], base[j]) for i, j in picks], axis=0)
        image, data_set = ratios(table, base)
        print(f"{way:32s} {image:10.4f} +- {spread[0]:.4f} {data_set:10.4f} +- {spread[1]:.4f}")


def main() -> None:
    """Print the table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py:uniform")
    parser.add_argument("--workdir", default="runs/digits_vp_uniform")
    parser.add_argument("--images", type=int, default=180)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--sweeps", type=int, default=16)
    args = parser.parse_args()

    config = load(args.config)
    config.eval.bound.proposal_bins = 32
    workdir = Workdir(args.workdir)
    shared = Evaluation.of_split(Trained.of(build.Experiment(config), workdir), "test")
    e, images = shared.experiment, shared.images
    reduction = shared.reduction(e.eval_eps)
    pixels = jnp.asarray(images.images[data.spread(len(images), args.images)])
    count = len(pixels)
    x = bits.to_model(pixels, jax.random.uniform(jax.random.key(9), pixels.shape), images.levels)
    score = e.exact_adapter(shared.trained.restored.state.ema_params)

    @functools.partial(jax.jit, static_argnames=("way",))
    def sweep(score: Score, key: Key, way: str) -> Array:
        draw, proposal, controlled, dense = WAYS[way]
        u_key, z_key = jax.random.split(key)
        u = times.DRAWS[draw](u_key, count, args.draws)
        where = times.PROPOSALS[proposal](e.sde, e.eval_eps)
        t, weight = where.over_log_snr(u, jnp.asarray(reduction.density) if dense else None)
        control = reduction.control if controlled else None

        def one(x: Array, t: Array, w: Array, key: Key) -> Array:
            z = jax.random.normal(key, x.shape)
            return w * bound.diffusion_dsm(score, e.sde, x, t, z, control)

        keys = jax.random.split(z_key, (count, args.draws))
        each = jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(x, t, weight, keys)
        return bits.nats_to_bits(jnp.mean(each, axis=1), x.shape[1:])

    values = {}
    for way in WAYS:
        rows = [np.asarray(sweep(score, jax.random.key(r), way)) for r in range(args.sweeps)]
        values[way] = np.asarray(rows, np.float64)
    print(f"{count} images, {args.draws} draws per image, {args.sweeps} sweeps")
    report(values)


if __name__ == "__main__":
    cpu.settle()
    main()
