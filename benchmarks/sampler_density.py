"""How many steps of a sampler are enough? The table of docs/benchmarks/sampler_density.md.

python benchmarks/sampler_density.py [--workdir=runs/digits_vp_uniform]
python benchmarks/sampler_density.py --gaps
python benchmarks/sampler_density.py --folds
python benchmarks/sampler_density.py --coverage
python benchmarks/sampler_density.py --forecast

For mixtures of four Gaussians of standard deviation .5 with their exact score, and with --workdir
for the model of a run: the effective sample size of the weights p / p_N, the KL divergence of the
sampler's density p_N from that of the ODE, and the time for samples with their log p, divided by
that of the ODE at the default of ``Density``.

With --gaps: by how much does the control variate of ``Density.gap`` shorten the interval, and does
the interval contain the true KL? ``RUNS`` runs of ``OF_GAP`` samples are computed at once. The true
KL is that of two Gaussians, or a sum over a grid.

With --folds: how many samples of Euler's method have a step that turns a direction by 90 degrees or
more, which needs no fold, and how many have one whose determinant is not positive, which folds?

With --coverage: can the mark HEAVY TAILS of importance weights be trusted? For the model N(0, I) by
ten steps of DDIM, whose density is N(0, .787^2 I), and by the ODE, and for targets N(0, s^2 I), it
prints in how many of ``RUNS`` runs the result is marked, and how often log Z's interval contains
log Z = 0. The steps of a run are those of ``Density.importance``; all runs are computed at once.

With --forecast: how often does the interval of ``Importance.forecast`` from 1,000 weights contain
the effective sample size of 100,000? The samples are of Student's t with some degrees of freedom,
and the target is Student's t with fewer of them, so its tails are heavier.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import sbml
from sbml.core.bits import LOG2
from sbml.core.types import Array
from sbml.density.density import _walk
from sbml.density.estimate import Estimate
from sbml.density.posterior import Importance, effective_size
from sbml.likelihood.ode import Solver
from sbml.samplers import DDIM, ODE, Chain, Midpoint
from sbml.statistics.intervals import mean_interval

SAMPLES = 1000  # of a mixture
OF_MODEL, TIMED = 64, 16  # of the model of a run, which takes longer
EVALUATIONS = (10, 20, 40)
RUNS, EACH, TARGETS = 200, 200, 128  # runs, their samples, and draws of the target for each
OF_GAP = 256  # samples of a run of a gap
WIDTHS = (0.5, 0.7, 1.0, 1.2, 1.6, 2.0, 3.0)  # standard deviations of the target
SAMPLERS: dict[str, Callable[[int], Chain]] = {
    "DDIM": lambda n: DDIM(n),
    "midpoint": lambda n: Midpoint(n // 2),
    "ODE, Heun": lambda n: ODE(Solver("heun", fixed_steps=n // 2)),
}


def mixture(d: int) -> sbml.Density:
    """Four Gaussians with random means."""
    means = (2 if d == 2 else 1) * np.random.default_rng(0).normal(size=(4, d)).astype(np.float32)
    return of_gaussians(means)


def of_gaussians(means: np.ndarray, std: float = 0.5) -> sbml.Density:
    """Gaussians of standard deviation ``std`` around ``means (k, d)``, with their exact score."""
    sde, d = sbml.VP(), means.shape[1]

    def logp(x: Array, t: Array) -> Array:
        a, v = sde.mean_coef(t), (std * sde.mean_coef(t)) ** 2 + sde.std(t) ** 2
        return jax.scipy.special.logsumexp(-0.5 * jnp.sum((x[None] - a * means) ** 2, -1) / v)

    return sbml.Density(lambda x, t, key: jax.grad(logp)(x, t), sde, (d,), eps=1e-3)


def seconds(f: Callable[[], Any]) -> float:
    """The best of two times, after a first call that compiles."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def table(name: str, density: sbml.Density, n: int, timed: int, unit: float) -> None:
    """Print the rows of one density, by ``n`` samples, of which ``timed`` are timed; KL is in nats,
    divided by ``unit``."""
    key = jax.random.key(0)
    usual = seconds(lambda: density.sample_and_log_prob(key, timed))
    for label, make in SAMPLERS.items():
        for count in EVALUATIONS:
            sampler = make(count)
            try:
                found = density.gap(key, n, sampler=sampler)
            except ValueError as error:  # A step folds space.
                print(f"| {name} | {label} | {count} | {str(error).partition(':')[0]} | | |")
                continue
            effective = effective_size(-found.values) / len(found.values)
            draw = functools.partial(density.sample_and_log_prob, key, timed, sampler=sampler)
            took = seconds(draw)
            print(
                f"| {name} | {label} | {count} | {effective:.3f} | {found.mean / unit:.4f} +- "
                f"{found.population.ci95 / unit:.4f} | {took / usual:.2f} |",
                flush=True,
            )


def coverage(d: int, sampler: Chain | None) -> None:
    """Print the rows of a sampler, or of the ODE, in ``d`` dimensions."""
    density = sbml.Density(lambda x, t, key: -x, sbml.VP(), (d,), eps=1e-3, batch_size=4096)
    keys = jax.random.split(jax.random.key(d), 3)
    x, logp = density.sample_and_log_prob(keys[0], RUNS * EACH, sampler=sampler)
    step = 2.4 / d**0.5 * jnp.std(x, axis=0)
    first = x.reshape(RUNS, EACH, d)[:, :TARGETS].reshape(-1, d)
    walks = jax.random.split(keys[1], len(first))

    @jax.jit
    def drawn(std: Array) -> tuple[Array, Array, Array]:
        def u(x: Array) -> Array:
            return jax.scipy.stats.norm.logpdf(x, 0, std).sum()

        return jax.vmap(u)(x), *jax.vmap(lambda *start: _walk(u, step, start))(first, walks)

    for std in WIDTHS:
        u, y, u_y = drawn(jnp.asarray(std))
        weights = np.asarray(u - logp, float).reshape(RUNS, EACH)
        of_target = np.asarray(u_y - density._log_prob(y, None, None, sampler), float)
        none = np.zeros((RUNS, 1))  # The solver's error has no part in the mark.
        found = [
            Importance.of(np.zeros((EACH, d)), *row)
            for row in zip(weights, none, of_target.reshape(RUNS, TARGETS), strict=True)
        ]
        marked = np.array([each.heavy_tailed for each in found])
        right = np.array([abs(each.log_z.mean) <= each.log_z.ci95 for each in found])
        unmarked = f"{right[~marked].mean():.2f}" if not marked.all() else ""
        name = "ODE" if sampler is None else "DDIM, 10 steps"
        print(
            f"| {d} | {name} | {std:g} | {marked.mean():.0%} | {unmarked} | {right.mean():.2f} |",
            flush=True,
        )


def gaussian(d: int) -> sbml.Density:
    """The model N(0, I)."""
    return sbml.Density(lambda x, t, key: -x, sbml.VP(), (d,), eps=1e-3)


def mixture_of(d: int) -> sbml.Density:
    """Four Gaussians in one or two dimensions, farther from each other than their width."""
    means = np.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5], [-1.5, -1.0]], np.float32)[:, :d]
    return of_gaussians(means)


def true_gap(density: sbml.Density, sampler: Chain) -> float:
    """KL of the sampler's density from that of the ODE: of two Gaussians, or by a sum over a grid
    in at most two dimensions."""
    d = density.dims
    if d > 2:  # N(0, v I) of the sampler, and N(0, I) of the model.
        at = density._log_prob(jnp.zeros((1, d)), None, None, sampler)
        v = np.exp(-2 * float(at[0]) / d) / (2 * np.pi)
        return 0.5 * d * (v - 1 - np.log(v))
    side = np.linspace(-5, 5, 4001 if d == 1 else 201, dtype=np.float32)
    x = np.stack(np.meshgrid(*[side] * d), axis=-1).reshape(-1, d)
    log_p_n, log_p = (
        np.asarray(density._log_prob(jnp.asarray(x), None, None, s), float) for s in (sampler, None)
    )
    # Where no latent leads, log p_N is NaN and p_N is 0: the sums show that nothing else was NaN.
    reached, cell = ~np.isnan(log_p_n), float(side[1] - side[0]) ** d
    p_n, p = np.exp(log_p_n, where=reached, out=np.zeros(len(x))), np.exp(log_p)
    for name, total in (("p_N", p_n.sum() * cell), ("p", p.sum() * cell)):
        if not abs(total - 1) < 0.01:
            raise ValueError(f"{name} of {sampler} adds up to {total:.4f}: give a finer grid")
    # The sum of p - p_N is 0. With it the small errors of log p have no effect to first order.
    terms = p_n * np.where(reached, log_p_n - log_p, 0.0) + p - p_n
    return float(terms.sum()) * cell


def gaps(name: str, density: sbml.Density) -> None:
    """Print the rows of one density."""
    density = dataclasses.replace(density, batch_size=4096)
    for label, make in SAMPLERS.items():
        for count in EVALUATIONS:
            sampler = make(count)
            try:
                x, logp = density.sample_and_log_prob(
                    jax.random.key(0), RUNS * OF_GAP, sampler=sampler
                )
            except ValueError as error:  # A step folds space.
                print(f"| {name} | {label} | {count} | {str(error).partition(':')[0]} | | | |")
                continue
            if (truth := true_gap(density, sampler)) < 1e-10:
                continue  # Only rounding is left, as by Heun's method for N(0, I).
            values = np.asarray(logp, float) - np.asarray(density.log_prob(x), float)
            found = []
            for row in values.reshape(RUNS, OF_GAP):
                plain = mean_interval(row)
                zero = np.zeros(OF_GAP)
                of_run = Estimate(row, {}, "nats", density._eps, zero, plain, plain)
                found.append((plain, of_run.with_control(np.expm1(-row)).population))
            widths = np.median([[each.ci95 for each in pair] for pair in found], axis=0)
            right = np.mean([[abs(e.mean - truth) <= e.ci95 for e in pair] for pair in found], 0)
            used = np.mean([pair[0] is not pair[1] for pair in found])
            print(
                f"| {name} | {label} | {count} | {truth:.2g} | {widths[0]:.2g} | {widths[1]:.2g} | "
                f"{used:.0%} | {right[0]:.2f} | {right[1]:.2f} |",
                flush=True,
            )


def folds(std: float, steps: int) -> None:
    """Print the row of Euler's method for two Gaussians of standard deviation ``std``."""
    sampler, n = ODE(Solver("euler", fixed_steps=steps)), 20_000
    density = of_gaussians(np.array([[1.0, 1.0], [-1.0, -1.0]], np.float32), std)
    z = jax.random.normal(jax.random.key(0), (n, 2))

    @jax.jit
    @jax.vmap
    def each(z: Array) -> tuple[Array, Array]:
        found = sampler.sample_logp(density.score, density.sde, z, eps=density._eps)[1]
        return ~found.positive.all(), (found.signs <= 0).any()

    turned, folded = (float(jnp.mean(found)) for found in each(z))
    print(f"| {std:g} | {steps} | {turned:.2%} | {folded:.3%} |", flush=True)


def forecasts(proposal: float, target: float) -> None:
    """Print the row of a target with ``target`` degrees of freedom."""
    draws, zero, rows, marked = np.random.default_rng(0), np.zeros(1), [], 0

    def result(n: int) -> Importance:
        x = draws.standard_t(proposal, size=n)
        weights = stats.t.logpdf(x, target) - stats.t.logpdf(x, proposal)
        return Importance.of(x[:, None], weights, zero, zero - np.inf)

    for _ in range(RUNS):
        pilot, truth = result(1000), result(100_000).effective
        if pilot.heavy_tailed:
            marked += 1
            continue
        low, high = pilot.forecast(100_000)
        rows.append((low <= truth <= high, 100 * pilot.effective / truth, high / low))
    held, naive, width = np.array(rows).T
    print(
        f"| {proposal:g} | {target:g} | {marked / RUNS:.0%} | {held.mean():.2f} | "
        f"{np.median(naive):.2f} | {naive.max():.1f} | {np.median(width):.2f} |",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coverage", action="store_true", help="the table of importance weights")
    parser.add_argument("--workdir", help="folder of a run whose model has at most 100 dimensions")
    parser.add_argument("--gaps", action="store_true", help="the table of intervals of gaps")
    parser.add_argument("--folds", action="store_true", help="the table of Euler's method")
    parser.add_argument("--forecast", action="store_true", help="the table of forecasts of the ESS")
    args = parser.parse_args()
    if args.forecast:
        print(
            "| samples | target | refused | interval holds | share / truth, median | "
            "largest | high / low, median |\n|---:|---:|---:|---:|---:|---:|---:|"
        )
        for proposal, target in ((10, 8), (10, 6), (10, 5), (10, 4), (4, 2.5), (100, 30)):
            forecasts(proposal, target)
        return
    if args.gaps:
        print(
            "| density | sampler | evaluations | KL | +- without | +- with control | used | "
            "coverage without | coverage |\n|---|---|---:|---:|---:|---:|---:|---:|---:|"
        )
        for d in (1, 2):
            gaps(f"mixture, d = {d}", mixture_of(d))
        gaps("Gaussian, d = 16", gaussian(16))
        return
    if args.folds:
        print("| sd | steps | turned | det <= 0 |\n|---:|---:|---:|---:|")
        for std in (0.03, 0.05, 0.1):
            for steps in (7, 10):
                folds(std, steps)
        return
    if args.coverage:
        print(
            "| d | samples by | target's sd | marked | coverage, unmarked | coverage, all |\n"
            "|---:|---|---:|---:|---:|---:|"
        )
        for d in (2, 16):
            for sampler in (DDIM(10), None):
                coverage(d, sampler)
        return
    print(
        "| density | sampler | evaluations | ESS / n | KL | time |\n|---|---|---:|---:|---:|---:|"
    )
    for d in (2, 16, 64):
        table(f"mixture, d = {d}", mixture(d), SAMPLES, SAMPLES, 1.0)
    if args.workdir:
        # With the exact trace, which is Density's default in 64 dimensions, and not the run's.
        density = dataclasses.replace(sbml.load(args.workdir), eps=1e-3, trace=None)
        table("digits, bits/dim", density, OF_MODEL, TIMED, density.dims * LOG2)


if __name__ == "__main__":
    main()
