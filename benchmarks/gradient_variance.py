"""Variance of the training gradient for ways of drawing times and noises, at equal network calls.

    python benchmarks/gradient_variance.py [--workdir=FOLDER] [--batches=50] [--quick]

Let g be the gradient of the mean loss over a batch of 64 network calls. Two variances, summed over
the parameters, are estimated from two draws g, g' for each batch of images:

    fixed images:   E over batches of  Var(g | images)      by 1/2 ||g - g'||^2
    random images:  Var(g)                                  by E ||g||^2 - ||E g||^2

Each is divided by its value for independent importance times; the standard deviation of this ratio
is estimated by the bootstrap over batches. All ways use the same batches of uniformly dequantized
images. Times are uniform in the log-SNR (``times.Importance``), which is scaled to v in [0, 1),
independent or on a lattice. A config that trains on other data, times or losses is refused. Noises
are

    independent   one for each image
    neighbours    z and -z for the images 2i and 2i + 1, which share a time
    antithetic    z and -z for one image and time: half the images, each used in two calls

Times may also have a density q in v (``times.warp``, ``times.with_floor``) that is proportional to
a statistic in bins of v, apart from a uniform part:

    gradient      the standard deviation of the gradient of an example, or of a pair (z, -z)
    residual      the root of the mean loss
    difference    the root mean square of the difference of two losses, those of a pair if the
                  noises are in pairs

The last two need only losses, which training computes anyway.

Independent times uniform on [eps, T] are not drawn: their variance comes from times near eps, which
occur in one of 10^4 draws or fewer. It is computed from the gradient's variance in bins, with an
error of up to a factor of two.
"""

import argparse
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from sbml import losses
from sbml.core import bits
from sbml.core.types import Array, Key, batch_score
from sbml.program.config import config
from sbml.program.config.build import Experiment
from sbml.program.runtime import cpu
from sbml.sdes import times

BATCH, BINS = 64, 32


class Way(NamedTuple):
    """How a batch of times and noises is drawn."""

    draw: str = "lattice"  # a key of times.DRAWS
    noises: str = "independent"  # one of NOISES
    statistic: str = ""  # the density of times is proportional to it; "" for a uniform density

    def __str__(self) -> str:
        return f"{self.draw}, {self.noises}" + f", q ~ {self.statistic}" * bool(self.statistic)


NOISES = ("independent", "neighbours", "antithetic")
REFERENCE = Way("iid")
WAYS = [
    REFERENCE,
    *(Way("lattice", noises, s) for noises in NOISES for s in ("", "gradient", "difference")),
    Way(statistic="residual"),
    Way(noises="antithetic", statistic="residual"),
]


class Problem:
    """A model's gradients on its training images, without dropout."""

    def __init__(self, e: Experiment, params: Any) -> None:
        self.proposal = times.Importance(e.sde, e.adapter.eps)
        self.levels = e.levels
        self.images = e.images("train").images
        self.params = params
        weighting = e.config.training.weighting

        def loss(params: Any, x: Array, t: Array, weight: Array, z: Array) -> tuple[Array, Array]:
            x_t = jax.vmap(lambda x, t, z: losses.perturb(e.sde, x, t, z))(x, t, z)
            scores = batch_score(e.adapter(params))(x_t, t, None)
            residual = functools.partial(losses.residual, e.sde, weighting=weighting)
            terms = jax.vmap(residual)(scores, t, z)
            each = weight * terms / x[0].size
            return jnp.mean(each), each

        def gradient(params: Any, *draws: Array) -> tuple[Array, Array]:
            tree, each = jax.grad(loss, has_aux=True)(params, *draws)
            return ravel_pytree(tree)[0], each

        self._gradient = jax.jit(gradient)

    def gradient(self, x: Array, t: Array, weight: Array, z: Array) -> tuple[Array, Array]:
        """The flat gradient of the mean loss in nats/dim, and each example's loss ``(n,)``."""
        return self._gradient(self.params, x, t, weight, z)

    def batch(self, *seed: int) -> Array:
        """Distinct images, dequantized uniformly, ``(BATCH, h, w, c)``."""
        rng = np.random.default_rng(seed)
        pixels = self.images[rng.choice(len(self.images), BATCH, replace=False)]
        return bits.to_model(
            jnp.asarray(pixels), jnp.asarray(rng.random(pixels.shape)), self.levels
        )


def check_training(e: Experiment) -> None:
    """Check that the config trains on the data, times and loss that :class:`Problem` has.

    Raises:
      ValueError: if it has others; the message names the fields, their values and the remedy.
    """
    training = e.config.training
    expected = {
        "data.dequantization": (e.config.data.dequantization, "uniform"),
        "training.discrete_levels": (training.discrete_levels, 0),
        "training.importance_sampling": (training.importance_sampling, True),
        "sde.learned": (e.config.sde.learned, False),
    }
    if wrong := {name: pair for name, pair in expected.items() if pair[0] != pair[1]}:
        actual = ", ".join(f"{name}={value}" for name, (value, _) in wrong.items())
        needed = ", ".join(f"{name}={value}" for name, (_, value) in wrong.items())
        raise ValueError(
            f"the config has {actual}, but this benchmark measures training with {needed}: give "
            "--config a config with these values"
        )


def paired(x: Array, u: Array, key: Key, noises: str) -> tuple[Array, Array, Array]:
    """Images, points u and noises of n network calls, from n images ``x``.

    ``u`` has n points for independent noises, and n / 2 points for pairs of noises.
    """
    z = jax.random.normal(key, (len(u), *x.shape[1:]))
    if noises != "independent":
        u, z = jnp.repeat(u, 2), jnp.stack([z, -z], axis=1).reshape(x.shape)
    return jnp.repeat(x[: len(x) // 2], 2, axis=0) if noises == "antithetic" else x, u, z


def draws(way: Way, x: Array, key: Key) -> tuple[Array, Array, Array]:
    """Images ``(n, h, w, c)``, points u ``(n,)`` in [0, 1) and noises of a batch from ``x``."""
    u_key, z_key = jax.random.split(key)
    n = len(x) if way.noises == "independent" else len(x) // 2
    return paired(x, times.DRAWS[way.draw](u_key, n)[:, 0], z_key, way.noises)


def statistics(problem: Problem, repeats: int = 2) -> dict[tuple[str, str], Array]:
    """The values ``(BINS,)`` in bins of the log-SNR, by (noises, statistic).

    They are estimated from batches whose times lie in one bin. The variance of the gradient in a
    bin is the variance of the batches' mean gradients, up to a factor that does not change a
    density.
    """
    rows: dict[tuple[str, str], list[float]] = {}
    for noises in NOISES:
        for k in range(BINS):
            gradients, values = [], []
            for r in range(repeats):
                key = jax.random.fold_in(jax.random.key(1), repeats * k + r)
                x, u, z = draws(Way(noises=noises), problem.batch(1, k, r), key)
                flat, each = problem.gradient(x, *problem.proposal.at((k + u) / BINS), z)
                gradients.append(flat)
                values.append(each.reshape(-1, 2))
            plus, minus = np.concatenate(values).T
            squares = {
                "gradient": jnp.sum(jnp.var(jnp.stack(gradients), axis=0)),
                "residual": np.mean(plus + minus),
                "difference": np.mean((plus - minus) ** 2),
                "": 1.0,
            }
            for name, square in squares.items():
                rows.setdefault((noises, name), []).append(float(square))
    return {name: jnp.sqrt(jnp.asarray(row)) for name, row in rows.items()}


def uniform_times(problem: Problem, deviation: Array) -> float:
    """Variance with independent uniform t, divided by the variance with importance times.

    It is the mean over v of sd(v)^2 / q(v), divided by the mean of sd(v)^2, where q(v) is the
    density of v for uniform t.
    """
    v = (jnp.arange(100 * BINS) + 0.5) / (100 * BINS)
    uniform = times.Uniform(problem.proposal.sde, problem.proposal.eps)
    ratio = uniform.at(v)[1] / problem.proposal.at(v)[1]
    inverse = ratio.reshape(BINS, -1).mean(axis=1)
    return float(jnp.sum(deviation**2 * inverse) / jnp.sum(deviation**2))


def measure(problem: Problem, way: Way, density: Array, batches: int) -> tuple[np.ndarray, float]:
    """1/2 ||g - g'||^2 and the mean of ||g||^2 and ||g'||^2 for each batch, ``(batches, 2)``.

    The second result is an unbiased estimate of ||E g||^2 over all batches.
    """

    def gradient(x: Array, key: Key) -> Array:
        x, u, z = draws(way, x, key)
        v, inverse = times.warp(u, density)
        t, weight = problem.proposal.at(v)
        return problem.gradient(x, t, inverse * weight, z)[0]

    rows, total = [], jnp.zeros(())
    for b in range(batches):
        x, keys = problem.batch(0, b), jax.random.split(jax.random.key(b))
        g, other = (gradient(x, key) for key in keys)
        mean, half = (g + other) / 2, (g - other) / 2
        rows.append((2 * half @ half, mean @ mean + half @ half, mean @ mean))
        total += mean
    table = np.asarray(rows, np.float64)
    # The diagonal of the double sum over batches is left out, so the squared mean is unbiased.
    square = (float(total @ total) - table[:, 2].sum()) / (batches * (batches - 1))
    return table[:, :2], square


def ratios(table: dict[Way, tuple[np.ndarray, float]]) -> dict[Way, tuple[np.ndarray, np.ndarray]]:
    """The ratios of the variances to those of ``REFERENCE``, and their standard deviations.

    Each is an array ``(2,)``, for fixed and for random images. The noise of the estimated squared
    mean is not resampled: the standard deviations for random images may be too large.
    """
    n = len(table[REFERENCE][0])
    resample = np.random.default_rng(0).integers(0, n, (1000, n))

    def variances(way: Way) -> tuple[np.ndarray, np.ndarray]:
        rows, square = table[way]
        offset = np.asarray([0, square])
        return rows.mean(0) - offset, rows[resample].mean(1) - offset

    reference, references = variances(REFERENCE)
    result = {}
    for way in table:
        variance, resampled = variances(way)
        result[way] = (variance / reference, np.std(resampled / references, axis=0))
    return result


def load(args: argparse.Namespace) -> tuple[Experiment, Any]:
    """The trained model, or with ``--quick`` a small untrained one.

    Raises:
      ValueError: as in :func:`check_training`.
    """
    if args.quick:
        small = config.default("mlp")
        small.data.update(source="digits", shape=(8, 8, 1), levels=17, flip=False)
        small.model.update(width=32, depth=1)
        e = Experiment(small)
        return e, e.adapter.init(jax.random.key(0), e.shape)
    e = Experiment(config.load(args.config))
    check_training(e)
    try:
        return e, e.restore(args.workdir).state.params
    except ValueError as error:
        command = f"python -m sbml.main --config={args.config} --mode=train"
        sys.exit(f"{error}\nTrain the model with: {command} --workdir={args.workdir}")


def main() -> None:
    """Print the table of ratios."""
    configs = pathlib.Path(__file__).parents[1] / "configs"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=f"{configs}/digits_vp.py:uniform")
    parser.add_argument("--workdir", default="runs/digits_vp_uniform", help="of the trained model")
    parser.add_argument("--batches", type=int, default=50, help="batches, two gradients each")
    parser.add_argument("--quick", action="store_true", help="use an untrained MLP and 4 batches")
    args = parser.parse_args()

    e, params = load(args)
    problem = Problem(e, params)
    deviations, table = statistics(problem), {}
    for way in WAYS:
        density = times.with_floor(deviations[way.noises, way.statistic])
        table[way] = measure(problem, way, density, 4 if args.quick else args.batches)
        print(".", end="", flush=True)
    print(f"\n{'variance of the gradient, relative':45s} fixed images    random images")
    uniform = uniform_times(problem, deviations["independent", "gradient"])
    print(f"{'iid, independent, uniform t':45s}   about {uniform:.0f}          about {uniform:.0f}")
    for way, (ratio, error) in ratios(table).items():
        columns = (f"{r:8.3f} +- {s:.3f}" for r, s in zip(ratio, error, strict=True))
        print(f"{way!s:45s}{'  '.join(columns)}")


if __name__ == "__main__":
    cpu.settle()
    main()
