"""The bound approaches the exact likelihood in training, for a mixture of Gaussians in the plane.

    python -m experiments.toy2d [--steps=4000] [--out=runs/toy2d.png]

A small network is trained with likelihood weighting. At several steps, three means over the same
test points are computed:

    exact     -log p of the model, by the probability-flow ODE with an exact trace
    bound     the evidence bound of the same model (it bounds the SDE's likelihood, not the ODE's)
    data      -log p of the mixture itself, which no model can beat in the mean

The first two decrease towards the third. At the optimum the bound is tight. Before it, the two
models that share the network (SDE and ODE) differ, and the gap is caused by the network's error.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import figures
from sbml import likelihood, losses, sdes
from sbml.audit import oracle
from sbml.core.progress import over
from sbml.core.types import Array, Key
from sbml.likelihood import bound
from sbml.networks import mlp
from sbml.score import Adapter
from sbml.score.divergence import Trace
from sbml.sdes import times

SDE, EPS = sdes.VP(), 1e-4
CENTRES = 0.9 * np.array([[np.cos(a), np.sin(a)] for a in 2 * np.pi * np.arange(5) / 5])
SPREAD = 0.12
ADAPTER = Adapter(
    mlp.Model(width=128, depth=3), SDE, "preconditioned", "log_snr", data_std=0.7, eps=EPS
)
BATCH = 256
DRAWS, TIMES = 16, 32  # For each point the bound is the mean of 16 draws with 32 times each.


def data() -> oracle.Mixture:
    """A mixture of five isotropic Gaussians with equal weights, whose centres lie on a circle."""
    parts = [
        oracle.Gaussian(SDE, jnp.asarray(c), jnp.full(2, SPREAD**2), jnp.eye(2)) for c in CENTRES
    ]
    return oracle.Mixture(jnp.full(5, 0.2), jax.tree.map(lambda *a: jnp.stack(a), *parts))


def sample(key: Key, n: int) -> Array:
    """``n`` points of the mixture."""
    which, noise = jax.random.split(key)
    centres = jnp.asarray(CENTRES, jnp.float32)[jax.random.randint(which, (n,), 0, 5)]
    return centres + SPREAD * jax.random.normal(noise, (n, 2))


class Row(NamedTuple):
    """Means over the test points in nats, and the standard error of bound - exact."""

    step: int
    exact: float
    bound: float
    data: float
    gap_se: float


@jax.jit
def exact_logp(params: Any, x: Array) -> Array:
    """log p ``(n,)`` of the model at ``x (n, 2)`` by the ODE, in nats."""
    score, trace = ADAPTER(params), Trace("exact")
    return jax.vmap(lambda x: likelihood.ode_logp(score, SDE, x, None, eps=EPS, trace=trace).logp)(
        x
    )


@jax.jit
def bounds(params: Any, x: Array, key: Key) -> tuple[Array, Array]:
    """The bound ``(n,)`` on -log p at ``x (n, 2)``, and -log p ``(n,)`` of the data, in nats."""
    score = ADAPTER(params)

    def upper_bound(x: Array, key: Key, u: Array) -> Array:
        return bound.elbo(score, SDE, x, key, eps=EPS, u=u).total

    def draw(key: Key) -> Array:
        u = times.lattice(jax.random.fold_in(key, 0), len(x), TIMES)
        return jax.vmap(upper_bound)(x, jax.random.split(key, len(x)), u)

    upper = jnp.mean(jax.lax.map(draw, jax.random.split(key, DRAWS)), axis=0)
    truth = -jax.vmap(lambda x: data().logp(x, jnp.asarray(EPS)))(x)
    return upper, truth


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a learning rate that falls to zero by a cosine."""
    return optax.adam(optax.cosine_decay_schedule(3e-3, steps))


@partial(jax.jit, static_argnames="steps")
def update(params: Any, state: Any, key: Key, steps: int) -> tuple[Any, Any]:
    """One step on fresh points: likelihood weighting, times uniform in log-SNR, on a lattice."""
    x_key, t_key, z_key = jax.random.split(key, 3)
    x = sample(x_key, BATCH)
    t, weight = times.Importance(SDE, EPS).at(times.lattice(t_key, BATCH)[:, 0])

    def loss(params: Any) -> Array:
        keys = jax.random.split(z_key, BATCH)
        return jnp.mean(weight * losses.dsm_batch(ADAPTER(params), SDE, x, t, keys))

    updates, state = optimizer(steps).update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def train(steps: int, points: int) -> tuple[Any, list[Row]]:
    """The trained parameters, and a row for each of about a dozen steps, which are evenly spaced in
    their logarithm."""
    test, key = sample(jax.random.key(1), points), jax.random.key(0)
    params = ADAPTER.init(key, (2,))
    state = optimizer(steps).init(params)
    evaluated = {0, *np.unique(np.geomspace(10, steps, 12).round().astype(int)).tolist()}
    rows = []
    for step in over(range(steps + 1), "train", "step", steps + 1):
        if step in evaluated:
            values = (-exact_logp(params, test), *bounds(params, test, jax.random.key(2)))
            exact, upper, truth = (np.asarray(v, float) for v in values)
            se = (upper - exact).std(ddof=1) / np.sqrt(points)
            rows.append(Row(step, exact.mean(), upper.mean(), truth.mean(), se))
        if step < steps:
            params, state = update(params, state, jax.random.fold_in(key, step), steps)
    return params, rows


def draw(params: Any, rows: list[Row], out: str, resolution: int) -> None:
    """Plot the densities of the model and the data, and the curves of the rows."""
    figure, (left, middle, right) = figures.axes(3)
    side = jnp.linspace(-1.5, 1.5, resolution)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    truth = jnp.exp(jax.vmap(lambda x: data().logp(x, jnp.asarray(EPS)))(grid))
    top = float(truth.max())
    for axis, values, name in (
        (left, truth, "data"),
        (middle, jnp.exp(exact_logp(params, grid)), "model"),
    ):
        picture = np.asarray(values).reshape(resolution, resolution)
        axis.imshow(picture, origin="lower", extent=(-1.5, 1.5) * 2, cmap="Blues", vmin=0, vmax=top)
        axis.set(title=f"density of the {name}")
        axis.grid(visible=False)
    steps = [max(row.step, 1) for row in rows]
    right.plot(steps, [row.bound for row in rows], marker="o", markersize=3, label="bound")
    right.plot(steps, [row.exact for row in rows], marker="o", markersize=3, label="exact (ODE)")
    right.axhline(rows[0].data, color=figures.MUTED, linestyle=":", label="the data's own")
    low = min(min(r.exact, r.bound, r.data) for r in rows)
    high = max(r.bound for r in rows[1:])  # Before training the bound is far above.
    margin = 0.08 * (high - low)
    right.set(
        xscale="log", xlabel="step", ylabel="-log p, nats", ylim=(low - margin, high + margin)
    )
    right.legend()
    figures.save(figure, out)


def main(steps: int, points: int, resolution: int, out: str) -> list[Row]:
    """Train, print the table, draw the figure."""
    params, rows = train(steps, points)
    print(f"{'step':>6s} {'exact':>8s} {'bound':>8s} {'gap':>8s} +-SE     {'data':>8s}   nats")
    for row in rows:
        gap = row.bound - row.exact
        print(
            f"{row.step:6d} {row.exact:8.4f} {row.bound:8.4f} {gap:8.4f} +-{row.gap_se:.4f} "
            f"{row.data:8.4f}"
        )
    draw(params, rows, out, resolution)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--resolution", type=int, default=80)
    parser.add_argument("--out", default="runs/toy2d.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.points, arguments.resolution, arguments.out)
