"""Cost and error of ODE likelihoods, compared with scipy's RK45 on the whole batch.

    python benchmarks/ode_settings.py gaussian
    python benchmarks/ode_settings.py network --config=digits_vp:uniform --workdir=FOLDER
    python benchmarks/ode_settings.py network --config=configs/photos_vp.py --workdir=runs/photos_vp

There are two kinds of problems. One is a Gaussian with the spectrum of 32x32 photo crops
(d = 3,072): its likelihood has a closed form, and one Rademacher probe gives its exact trace. The
others are trained networks, whose solve at a tolerance of 1e-6 with the same probes is taken as the
truth. Errors are differences to the truth in bits/dim; the largest over images is printed first.
The paper's authors solve with RK45 in t at 1e-5, with one step control and one flat error norm for
all images, and compute the divergence in reverse mode ("backwards").

The table shows the number of network evaluations, and how many of them also compute the divergence,
which about doubles their cost (in RK45 all do). ``--trace=exact`` compares exact traces, for which
such an evaluation costs about d times as much.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate

from sbml import data, likelihood, sdes
from sbml.core import bits
from sbml.core.types import Score
from sbml.likelihood.ode import Solver, velocity
from sbml.likelihood.quadrature import ONCE, PER_STEP
from sbml.program.config import build
from sbml.program.config.config import load
from sbml.program.config.trained import Trained
from sbml.program.runtime import cpu
from sbml.program.runtime.workdir import Workdir
from sbml.score import divergence
from sbml.score.divergence import Trace


def _solver(tolerance: float, **fields: Any) -> Solver:
    return Solver(rtol=tolerance, atol=tolerance, **fields)


THIRD = {"power": 3.0, "first_step": 0.02}
SETTINGS = {
    "tsit5 t^(1/3) 1e-2": _solver(1e-2, **THIRD),
    "tsit5 t^(1/3) 1e-3": _solver(1e-3, **THIRD),
    "tsit5 t^(1/3) 2e-4": _solver(2e-4, **THIRD),
    "tsit5 t^(1/2) 1e-3": _solver(1e-3),
    "tsit5 t^(1/2) 2e-4 (default)": _solver(2e-4),
    "tsit5 t^(1/2) 1e-4": _solver(1e-4),
    "tsit5 t^(1/2) 1e-5": _solver(1e-5),
    "tsit5 t^(1/2) 1e-4, I control": _solver(1e-4, pcoeff=0.0, icoeff=1.0),
    "dopri5 t^(1/2) 1e-4": _solver(1e-4, method="dopri5"),
}
# name: (tolerance, whether the divergence is computed in reverse mode)
RK45 = {
    "scipy RK45 t, batch, 1e-5": (1e-5, False),
    "scipy RK45 t, batch, 1e-4": (1e-4, False),
    "scipy RK45 ..., 1e-5, backwards": (1e-5, True),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A score, images x (n, *s), and what the solvers and the unit bits/dim need."""

    name: str
    score: Score
    sde: sdes.SDE
    eps: float
    x: jax.Array
    keys: jax.Array
    truth: np.ndarray | None  # -log p in nats, (n,)

    def nats_to_bits(self, nats: np.ndarray) -> np.ndarray:
        """``nats`` per image as bits/dim."""
        return np.asarray(nats * bits.nats_to_bits(1.0, self.x.shape[1:]))


def gaussian(n: int) -> Problem:
    """N(0, diag(v)), with the eigenvalues v of the covariance of the photos' crops.

    A rotation to the eigenvectors would not change the error of a solver.
    """
    crops = data.load("photos", "train", data.Options()).images[:]
    flat = bits.to_model(jnp.asarray(crops.reshape(len(crops), -1), jnp.float32), 0.5, 256)
    spectrum = np.linalg.eigvalsh(np.cov(np.asarray(flat, np.float64), rowvar=False))
    values = jnp.asarray(np.maximum(spectrum, 0) + (2 / 256) ** 2 / 12, jnp.float32)
    sde, eps = sdes.VP(), 1e-5
    x = jnp.sqrt(values) * jax.random.normal(jax.random.key(0), (n, values.size))

    def score(x: jax.Array, t: jax.Array, key: object) -> jax.Array:
        return -x / (sde.mean_coef(t) ** 2 * values + sde.std(t) ** 2)

    # Like the solver's log p, the truth is that of x at eps with the prior in place of p_T.
    at, last = (
        np.asarray(sde.mean_coef(t) ** 2 * values + sde.std(t) ** 2, np.float64)
        for t in (jnp.asarray(eps), jnp.asarray(1.0))
    )
    z2 = np.asarray(x, np.float64) ** 2 / at
    truth = 0.5 * np.sum(z2 * last + np.log(2 * np.pi) + np.log(at / last), axis=1)
    return Problem(
        "photo Gaussian", score, sde, eps, x, jax.random.split(jax.random.key(1), n), truth
    )


def network(config: str, workdir: str, n: int) -> Problem:
    """A trained network on its test images with uniform dequantization."""
    experiment = build.Experiment(load(config))
    trained = Trained.of(experiment, Workdir(workdir))
    experiment = trained.experiment
    images = experiment.images("test")
    pixels = jnp.asarray(images.images[data.spread(len(images), n)])
    x = bits.to_model(pixels, jax.random.uniform(jax.random.key(0), pixels.shape), images.levels)
    keys = jax.random.split(jax.random.key(1), n)
    return Problem(config, trained.score, experiment.sde, experiment.eval_eps, x, keys, None)


class Cost(NamedTuple):
    """Mean number of evaluations per image, the number of those with a divergence, and the seconds
    of a compiled solve."""

    nfe: float
    divergences: float
    seconds: float


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``run`` and its shortest time in seconds, of three runs or of as many as start
    within ten seconds."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 10:
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def ours(problem: Problem, solver: Solver, trace: Trace) -> tuple[np.ndarray, Cost]:
    """-log p (n,) in nats by this package's solver, and its cost."""

    @jax.jit
    @jax.vmap
    def solve(x: jax.Array, key: jax.Array) -> likelihood.Likelihood:
        p = problem
        return likelihood.ode_logp(p.score, p.sde, x, key, eps=p.eps, trace=trace, solver=solver)

    jax.block_until_ready(solve(problem.x, problem.keys))
    result, seconds = timed(lambda: solve(problem.x, problem.keys))
    stats = result.stats
    divergences = ONCE + PER_STEP * float(np.mean(stats.accepted + stats.rejected))
    return -np.asarray(result.logp, np.float64), Cost(
        float(np.mean(stats.nfe)), divergences, seconds
    )


def rk45(
    problem: Problem, tolerance: float, backwards: bool, trace: Trace
) -> tuple[np.ndarray, Cost]:
    """-log p (n,) in nats by scipy, and its cost: one solve in t, whose state is a flat vector of
    all images and log-determinants.

    The divergence is computed with the velocity in one forward-mode pass, as in ``ours``, or, if
    ``backwards``, separately by the gradient of velocity . probe, as the paper's authors do with
    one probe.
    """
    p, shape = problem, problem.x.shape
    vs = jax.vmap(lambda key: trace.directions(key, shape[1:]))(p.keys)

    def at(t: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda x: velocity(p.score, p.sde, x, t)

    @jax.jit
    def both(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(x: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            f, forms = divergence.quadratic_forms(at(t), x, v)
            return f, trace.combined(forms)

        return jax.vmap(one)(x, vs)

    @jax.jit
    def alone(t: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(at(t))(x)

    @jax.jit
    def gradient(t: jax.Array, x: jax.Array) -> jax.Array:
        def one(x: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jax.grad(lambda x: jnp.sum(at(t)(x) * v))(x) * v)

        forms = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(x, vs)
        return jax.vmap(trace.combined)(forms)

    def field(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (alone(t, x), gradient(t, x)) if backwards else both(t, x)

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        x = jnp.asarray(y[: -len(vs)].reshape(shape), jnp.float32)
        v, div = field(jnp.asarray(t, jnp.float32), x)
        return np.concatenate([np.asarray(v).ravel(), np.asarray(div)])

    start = np.concatenate([np.asarray(p.x).ravel(), np.zeros(len(vs))])
    flat(0.5, start)
    options = {"rtol": tolerance, "atol": tolerance, "method": "RK45"}
    solution, seconds = timed(lambda: integrate.solve_ivp(flat, (p.eps, 1.0), start, **options))
    end = solution.y[:, -1]
    z = jnp.asarray(end[: -len(vs)].reshape(shape), jnp.float32)
    logp = np.asarray(jax.vmap(p.sde.prior_logp)(z), np.float64) + end[-len(vs) :]
    return -logp, Cost(solution.nfev, solution.nfev, seconds)


def main() -> None:
    """Print evaluations, errors and times, with ratios to those of RK45 at 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=("gaussian", "network"))
    parser.add_argument("--config", default="configs/digits_vp.py:uniform")
    parser.add_argument("--workdir", default="runs/digits_vp_uniform")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--trace", choices=("rademacher", "exact"), default="rademacher")
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--settings", type=int, nargs="*", help="numbers of SETTINGS; default: all")
    args = parser.parse_args()
    if args.problem == "gaussian":
        problem = gaussian(args.images)
    else:
        problem = network(args.config, args.workdir, args.images)
    trace, truth = Trace(args.trace, args.probes), problem.truth
    if truth is None:
        truth, _ = ours(problem, Solver(rtol=1e-6, atol=1e-6), trace)
    print(f"{problem.name}, {len(problem.x)} images, {args.trace} trace, {args.probes} probes")
    head = ("", "nfe", "ratio", "with div", "max error", "rms", "mean", "s", "ratio")
    print("{:33s} {:>6s} {:>6s} {:>8s} {:>10s} {:>8s} {:>9s} {:>7s} {:>6s}".format(*head))
    names = list(SETTINGS)
    chosen = names if args.settings is None else [names[i] for i in args.settings]
    base: Cost | None = None
    one_probe = trace.kind != "exact"
    ways = [name for name, (_, backwards) in RK45.items() if one_probe or not backwards]
    for name in (*ways, *chosen):
        if name in RK45:
            nll, cost = rk45(problem, *RK45[name], trace)
        else:
            nll, cost = ours(problem, SETTINGS[name], trace)
        base = base or cost
        error = problem.nats_to_bits(nll - truth)
        print(
            f"{name:33s} {cost.nfe:6.1f} {cost.nfe / base.nfe:6.2f} {cost.divergences:8.1f} "
            f"{np.abs(error).max():10.1e} {np.sqrt(np.mean(error**2)):8.1e} {error.mean():9.1e} "
            f"{cost.seconds:7.2f} {cost.seconds / base.seconds:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    cpu.settle()
    main()
