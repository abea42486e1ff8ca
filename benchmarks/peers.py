"""Time and evaluations of log p at equal accuracy, compared with three other libraries.

    python benchmarks/peers.py prepare problems.npz
    python benchmarks/peers.py measure problems.npz results.json --rounds=7 sbml=PYTHON \
      gensbi=PYTHON flow_matching=PYTHON sbgm=PYTHON
    python benchmarks/peers.py table results.json
    python benchmarks/peers.py inside problems.npz
    python benchmarks/peers.py costs

The problems are two mixtures of Gaussians and a small network of digits. One function of the sample
and the time, u = E[e - x_0 | x_t] on the path x_t = (1 - t) x_0 + t e, is given to all libraries,
in the framework and with the direction of time that each of them has. The three solve the ODE of

    gensbi, flow_matching    the straight path: dx/dt = u
    sbgm                     VP: the score -E[e | x] / sigma, from the same function

and sbml solves both. The errors of log p are differences to its exact value at the time where the
library's solve begins: the closed form of a mixture, and for the network a solve by scipy's DOP853
in float64 at 1e-10.

``prepare`` trains the network and computes the exact values. ``measure`` starts one process for
each library, by the Python of its own environment (``LIBRARY=PYTHON``). Each process walks through
the settings of its library, from coarse to fine, and keeps, for each of ``TARGETS``, the first with
which the largest error over the examples is at most the target. Then the processes time these
settings in turns, in ``--rounds`` rounds. Each process is bound to one core. Times are CPU-seconds
of compiled calls, the smallest of several in a round. ``table`` shows the medians of their ratios
to sbml's time of the same round. ``inside`` compares ``log_prob`` inside jit with ``logp``.
``costs`` counts the evaluations of ways to solve in two dimensions, where a divergence is cheap. It
needs no problems and no other library.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

EXAMPLES = 64
EPS = 1e-5  # where the solves of sbml and sbgm begin; those of the straight path's peers begin at 0
TARGETS = 1e-2, 1e-3  # nats
BETA = 0.1, 50.0  # of VP: the prior then differs from p_T by less than 1e-4 nats
STRAIGHT, VP = "straight", "VP"
PROBLEMS = "mixture, 2 dims", "network, 2 dims", "mixture, 64 dims", "digits, 64 dims"
TOLERANCES = 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7
STEPS = 0.1, 0.07, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.005, 0.002, 0.001
LONGEST = 20.0  # CPU-seconds of one compiled call of 64 examples; a walk ends there

Arrays = dict[str, Any]


def integral_of_beta(t: Any) -> Any:
    """B(t) of VP: alpha = exp(-B / 2), sigma^2 = 1 - exp(-B)."""
    return BETA[0] * t + 0.5 * (BETA[1] - BETA[0]) * t * t


class Problem:
    """E[e - x_0 | x_t] and the score of VP, for examples x (..., d) and a scalar t.

    ``xp`` is ``jax.numpy`` or ``torch``; ``arrays`` and ``softmax`` are of the same framework. A
    subclass can have other ``moments``.
    """

    def __init__(self, xp: Any, softmax: Callable[..., Any], arrays: Arrays) -> None:
        self.xp, self.softmax, self.arrays = xp, softmax, arrays

    def moments(self, x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """E[x_0 | x] and E[e | x] of a mixture of Gaussians with diagonal covariances."""
        log_weights, mean, variance = (self.arrays[k] for k in ("log_weights", "mean", "variance"))
        v = alpha**2 * variance + sigma**2
        r = x[..., None, :] - alpha * mean
        logits = log_weights - 0.5 * (self.xp.log(v) + r * r / v).sum(-1)
        p = self.softmax(logits, -1)[..., None]
        return (p * (mean + alpha * variance * r / v)).sum(-2), (p * (sigma * r / v)).sum(-2)

    def _network(self, x: Any, t: Any) -> Any:
        a, exp = self.arrays, self.xp.exp
        phases = math.pi * t * a["frequencies"]
        h = x @ a["w0"] + self.xp.cos(phases) @ a["c"] + self.xp.sin(phases) @ a["s"] + a["b0"]
        h = h / (1 + exp(-h))
        h = h @ a["w1"] + a["b1"]
        return (h / (1 + exp(-h))) @ a["w2"] + a["b2"]

    def velocity(self, x: Any, t: Any) -> Any:
        """u(x, t) = E[e - x_0 | x] at alpha = 1 - t, sigma = t."""
        if "w0" in self.arrays:
            return self._network(x, t)
        x0, e = self.moments(x, 1 - t, t)
        return e - x0

    def score(self, x: Any, t: Any) -> Any:
        """-E[e | x] / sigma of VP. With c = alpha + sigma, x / c lies on the straight path at the
        time sigma / c."""
        b = integral_of_beta(t)
        alpha, sigma = self.xp.exp(-0.5 * b), self.xp.sqrt(-self.xp.expm1(-b))
        if "w0" not in self.arrays:
            e = self.moments(x, alpha, sigma)[1]
        else:
            c = alpha + sigma
            e = x / c + (1 - sigma / c) * self._network(x / c, sigma / c)
        return -e / sigma


class Way(NamedTuple):
    """A way of a library to compute log p of all examples.

    Attributes:
      name: the method or the solver.
      exact: whether the divergence is exact; otherwise one random probe estimates it.
      settings: the values of its knob, from coarse to fine.
      made: a function from a setting to a compiled function of no arguments that returns log p.
      evaluations: from a setting to the evaluations of the velocity for an example, and how many
        of them also have a divergence.
      compiles: whether the first call compiles the function.
    """

    name: str
    exact: bool
    settings: tuple[float, ...]
    made: Callable[[float], Callable[[], np.ndarray]]
    evaluations: Callable[[float], tuple[float, float]]
    compiles: bool = True


# Problems.


def mixture(dims: int, examples: int = EXAMPLES, seed: int | None = None) -> Arrays:
    """Four Gaussians with standard deviations from 0.1 to 1, different in each direction."""
    random = np.random.default_rng(dims if seed is None else (dims, seed))
    deviations = np.exp(random.uniform(np.log(0.1), 0, (4, dims)))
    mean = random.normal(size=(4, dims)) * (1.5 if dims == 2 else 0.5)
    log_weights = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    which = random.choice(4, examples, p=np.exp(log_weights))
    x = mean[which] + deviations[which] * random.normal(size=(examples, dims))
    return {"log_weights": log_weights, "mean": mean, "variance": deviations**2, "x": x}


def log_density(arrays: Arrays, alpha: float, sigma: float) -> np.ndarray:
    """log p_t(x) of a mixture, in float64."""
    x = arrays["x"].astype(np.float32).astype(np.float64)  # what the libraries get
    v = alpha**2 * arrays["variance"] + sigma**2
    r = x[:, None] - alpha * arrays["mean"]
    terms = arrays["log_weights"] - 0.5 * (np.log(2 * np.pi * v) + r**2 / v).sum(-1)
    return np.logaddexp.reduce(terms, axis=-1)


def digits() -> Arrays:
    """A network of digits, and test images."""
    import jax
    import jax.numpy as jnp

    from sbml import data

    def dequantized(split: str, key: Any) -> Any:
        images = jnp.asarray(data.load("digits", split, data.Options()).images[:])
        k = images.reshape(len(images), -1).astype(jnp.float32)
        return 2 * (k + jax.random.uniform(key, k.shape, jnp.float32)) / 17 - 1

    test = dequantized("test", jax.random.key(2))[:EXAMPLES]
    return network("digits", dequantized("train", jax.random.key(1)), test)


def network_of_mixture() -> Arrays:
    """A network of the mixture in two dimensions, and the examples of the mixture."""
    return network("mixture", mixture(2, 2**15)["x"], mixture(2)["x"])


def network(name: str, x: Any, test: Any) -> Arrays:
    """A network of two layers that is trained on ``x (n, d)`` for some seconds, and ``test``."""
    import jax
    import jax.numpy as jnp
    import optax

    x, test = (jnp.asarray(a, jnp.float32) for a in (x, test))
    key, width, frequencies = jax.random.key(0), 256, jnp.arange(1.0, 9.0, dtype=jnp.float32)
    dims, steps = x.shape[1], 3000
    shapes: dict[str, tuple[int, ...]] = {
        "w0": (dims, width),
        "c": (8, width),
        "s": (8, width),
        "w1": (width, width),
    }
    shapes |= {"w2": (width, dims), "b0": (width,), "b1": (width,), "b2": (dims,)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape, jnp.float32) / math.sqrt(shape[0]) * (len(shape) == 2)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss(params: Arrays, key: Any) -> Any:
        index, times, noises = jax.random.split(key, 3)
        x0 = x[jax.random.randint(index, (256,), 0, len(x))]
        t = jax.random.uniform(times, (256,), jnp.float32)
        e = jax.random.normal(noises, x0.shape, jnp.float32)
        net = Problem(jnp, jax.nn.softmax, params | {"frequencies": frequencies})
        u = jax.vmap(net.velocity)((1 - t[:, None]) * x0 + t[:, None] * e, t)
        return jnp.mean((u - (e - x0)) ** 2)

    @jax.jit
    def step(params: Arrays, state: Any, i: int) -> tuple[Any, ...]:
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, i)
        values.append(float(value))
    print(f"network of {name}: the loss of the last 100 steps is {np.mean(values[-100:]):.4f}")
    return jax.tree.map(np.asarray, params | {"frequencies": frequencies, "x": test})


def solved(arrays: Arrays, path: str, start: float) -> np.ndarray:
    """log p (n,) of the examples by scipy's DOP853 in float64, from the time ``start`` on."""
    import jax
    import jax.numpy as jnp
    from scipy import integrate

    exact = {k: jnp.asarray(np.asarray(a, np.float32), jnp.float64) for k, a in arrays.items()}
    problem = Problem(jnp, jax.nn.softmax, exact)

    def rate(x: Any, t: Any) -> Any:
        if path == STRAIGHT:
            return problem.velocity(x, t)
        beta = BETA[0] + (BETA[1] - BETA[0]) * t
        return -0.5 * beta * (x + problem.score(x, t))

    @jax.jit
    def field(t: Any, y: Any) -> Any:
        x = y[:, :-1]
        divergence = jax.vmap(lambda x: jnp.trace(jax.jacfwd(rate)(x, t)))(x)
        return jnp.concatenate([rate(x, t), divergence[:, None]], axis=1)

    x = np.asarray(exact["x"])
    y = np.concatenate([x, np.zeros((len(x), 1))], axis=1)
    options: Any = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-10}
    f: Any = lambda t, y: np.asarray(field(t, y.reshape(len(x), -1))).ravel()  # noqa: E731
    end = integrate.solve_ivp(f, (start, 1.0), y.ravel(), **options).y[:, -1].reshape(y.shape)
    return -0.5 * (end[:, :-1] ** 2 + np.log(2 * np.pi)).sum(1) + end[:, -1]


def prepare(file: str) -> None:
    """Write the problems and the exact values of log p."""
    import jax

    import sbml  # noqa: F401  It sets XLA's flag, without which sums may be wrong.

    jax.config.update("jax_enable_x64", True)
    b = integral_of_beta(EPS)
    starts = {
        "straight 0": (STRAIGHT, 0.0, 1.0, 0.0),
        "straight eps": (STRAIGHT, EPS, 1 - EPS, EPS),
        "VP eps": (VP, EPS, math.exp(-0.5 * b), math.sqrt(-math.expm1(-b))),
    }
    everything: Arrays = {}
    problems = mixture(2), network_of_mixture(), mixture(64), digits()
    for name, arrays in zip(PROBLEMS, problems, strict=True):
        for start, (path, t, alpha, sigma) in starts.items():
            logp = solved(arrays, path, t)
            if "mean" in arrays:
                closed = log_density(arrays, alpha, sigma)
                gap = np.abs(logp - closed).max()
                print(f"{name}, {start}: the solve differs by {gap:.1e} from the closed form")
                logp = closed
            everything[f"{name}/exact {start}"] = logp
        everything |= {f"{name}/{key}": value for key, value in arrays.items()}
    np.savez(file, **everything)


def load(file: str, name: str) -> Arrays:
    """The arrays of a problem: the exact values in float64, and all others in float32."""
    with np.load(file) as arrays:
        mine = {k.partition("/")[2]: a for k, a in arrays.items() if k.startswith(name + "/")}
    return {k: a if k.startswith("exact") else a.astype(np.float32) for k, a in mine.items()}


# Libraries: each function yields a path, the name of the exact values, and the ways for a problem.

Ways = Iterator[tuple[str, str, list[Way]]]


def jax_problem(arrays: Arrays) -> tuple[Any, Problem]:
    """x (n, d) and the functions of it in JAX."""
    import jax
    import jax.numpy as jnp

    mine = {k: jnp.asarray(a) for k, a in arrays.items() if not k.startswith("exact")}
    return mine.pop("x"), Problem(jnp, jax.nn.softmax, mine)


def densities(arrays: Arrays) -> dict[str, Callable[..., Any]]:
    """For each path, a function from a tolerance and further fields to its ``Density``."""
    from sbml import sdes
    from sbml.density import Density
    from sbml.likelihood.ode import Solver
    from sbml.score import from_prediction

    x, problem = jax_problem(arrays)
    flow, vp = sdes.RectifiedFlow(), sdes.VP(*BETA)

    def score(x: Any, t: Any, key: Any) -> Any:
        return problem.score(x, t)

    straight = from_prediction(problem.velocity, "flow", flow)
    made: dict[str, tuple[Any, Any]] = {STRAIGHT: (straight, flow), VP: (score, vp)}

    def density(path: str, tolerance: float | None, **fields: Any) -> Any:
        if tolerance is not None:
            # The velocity of the straight path is smooth in t, that of VP in sqrt(t).
            how: Any = {"power": 1.0 if path == STRAIGHT else 2.0, "adjoint": "reverse"}
            fields["solver"] = Solver(rtol=tolerance, atol=tolerance, **how)
        return Density(*made[path], shape=x.shape[1:], eps=EPS, **fields)

    return {path: (lambda *a, path=path, **k: density(path, *a, **k)) for path in made}


def with_divergence(nfe: float) -> float:
    """How many of sbml's ``nfe`` evaluations by tsit5 also have a divergence."""
    from sbml.likelihood.quadrature import ONCE, PER_STEP

    per_step = 5 + PER_STEP  # of tsit5 with an integral
    return ONCE + PER_STEP * (nfe - ONCE) / per_step


def sbml(arrays: Arrays) -> Ways:
    import jax

    from sbml.score.divergence import Trace

    x = jax_problem(arrays)[0]
    for path, density in densities(arrays).items():

        def way(name: str, density: Callable[..., Any] = density, **fields: Any) -> Way:
            key = jax.random.key(0) if fields else None

            def made(tolerance: float) -> Callable[[], np.ndarray]:
                f = jax.jit(density(tolerance, **fields).log_prob)
                return lambda: np.asarray(f(x, key))

            def evaluations(tolerance: float) -> tuple[float, float]:
                nfe = density(tolerance, **fields).logp(np.asarray(x), check=False).nfe.mean()
                return nfe, with_divergence(nfe)

            return Way(name, not fields, TOLERANCES[:-1], made, evaluations)

        ways = [way("tsit5")]
        if x.shape[1] > 2:
            ways.append(way("tsit5", trace=Trace("rademacher", 1)))
        yield path, f"exact {path} eps", ways


def gensbi_log_p(
    problem: Problem, dims: int, tolerance: float, exact: bool = True, called: Any = None
) -> Callable[..., Any]:
    """log p of ``x (n, d)`` by gensbi, as a function of x and, if the divergence is not exact, of
    ``key``. ``called`` is called with the x of each call of the velocity."""
    from gensbi.core.prior import make_gaussian_prior
    from gensbi.flow_matching.solver.fm_ode_solver import FMODESolver
    from gensbi.utils.model_wrapping import ModelWrapper

    # Its time runs from noise, at 0, to the data, and it has a channel axis.
    def velocity(obs: Any, t: Any) -> Any:
        if called:
            called(obs)
        return -problem.velocity(obs[..., 0], 1 - problem.xp.ravel(t)[0])[..., None]

    prior = make_gaussian_prior(dims, 1)
    how: Any = {"method": "Dopri5", "rtol": tolerance, "atol": tolerance}
    solver = FMODESolver(ModelWrapper(velocity))
    f = solver.get_log_prob(prior.log_prob, exact_divergence=exact, **how)
    return lambda x, **key: f(x[..., None], **key)


def gensbi(arrays: Arrays) -> Ways:
    import jax

    x, problem = jax_problem(arrays)
    calls: list[int] = []

    def count(obs: Any) -> None:
        if len(obs) == len(x):  # The divergence calls the velocity for one example.
            jax.debug.callback(lambda: calls.append(1))

    def made(tolerance: float) -> Callable[[], np.ndarray]:
        f = jax.jit(gensbi_log_p(problem, x.shape[1], tolerance))
        return lambda: np.asarray(f(x))

    def evaluations(tolerance: float) -> tuple[float, float]:
        calls.clear()
        f = gensbi_log_p(problem, x.shape[1], tolerance, called=count)
        jax.block_until_ready(jax.jit(f)(x))
        jax.effects_barrier()
        return len(calls), len(calls)

    yield STRAIGHT, "exact straight 0", [Way("dopri5", True, TOLERANCES, made, evaluations)]


def flow_matching_log_p(
    problem: Problem, dims: int, exact: bool, called: Any = None, **options: Any
) -> Callable[[Any], Any]:
    """log p of ``x (n, d)`` by flow_matching, whose solver has these ``options``."""
    import torch
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Velocity(ModelWrapper):
        # Its time runs from noise, at 0, to the data.
        def forward(self, x: Any, t: Any, **extras: Any) -> Any:
            if called:
                called()
            return -problem.velocity(x, 1 - t)

    solver = ODESolver(Velocity(None))
    gaussian = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(dims), torch.ones(dims)), 1
    )
    options = {"step_size": None, "exact_divergence": exact} | options
    return lambda x: solver.compute_likelihood(x, gaussian.log_prob, **options)[1]


def flow_matching(arrays: Arrays) -> Ways:
    import torch

    mine = {k: torch.tensor(a) for k, a in arrays.items() if not k.startswith("exact")}
    x, problem, calls = mine.pop("x"), Problem(torch, torch.softmax, mine), []

    def way(exact: bool) -> Way:
        def made(tolerance: float) -> Callable[[], np.ndarray]:
            options: Any = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
            count = lambda: calls.append(1)  # noqa: E731
            f = flow_matching_log_p(problem, x.shape[1], exact, count, **options)

            def call() -> np.ndarray:
                calls.clear()
                torch.manual_seed(0)
                return f(x).numpy()

            return call

        # ``calls`` has the evaluations of the latest call, which was with this setting.
        return Way("dopri5", exact, TOLERANCES[2:], made, lambda _: (len(calls), len(calls)), False)

    yield STRAIGHT, "exact straight 0", [way(True), way(False)][: 1 if x.shape[1] == 2 else 2]


def sbgm_log_p(
    problem: Problem, dims: int, step: float, exact: bool, called: Any = None
) -> Callable[..., Any]:
    """log p of one ``x (d,)`` by sbgm, as a function of x and ``key``."""
    import types

    # Its data sets need torchvision, and its likelihood does not.
    sys.modules["sbgm.data"] = types.ModuleType("sbgm.data")
    import equinox as eqx
    import sbgm as package

    class Model(eqx.Module):
        def __call__(self, t: Any, x: Any, q: Any = None, a: Any = None) -> Any:
            if called:
                called()
            return problem.score(x, t)

    sde = package.sde.VPSDE(integral_of_beta, dt=step, t0=EPS, t1=1.0)
    more: Any = {"data_shape": (dims,), "exact_log_prob": exact}
    f: Callable[..., Any] = package.ode.get_log_likelihood_fn(Model(), sde, **more)
    return f


def sbgm(arrays: Arrays) -> Ways:
    import jax
    import jax.random as jr

    x, problem = jax_problem(arrays)
    calls: list[int] = []

    def way(exact: bool) -> Way:
        def made(step: float) -> Callable[[], np.ndarray]:
            f, keys = sbgm_log_p(problem, x.shape[1], step, exact), jr.split(jr.PRNGKey(0), len(x))
            each = jax.jit(jax.vmap(lambda x, key: f(x, key=key)))
            return lambda: np.asarray(each(x, keys))

        def evaluations(step: float) -> tuple[float, float]:
            calls.clear()
            count = lambda: jax.debug.callback(lambda: calls.append(1))  # noqa: E731
            f = sbgm_log_p(problem, x.shape[1], step, exact, count)
            jax.block_until_ready(f(x[0], key=jr.PRNGKey(0)))
            jax.effects_barrier()
            return len(calls), len(calls)

        return Way("tsit5, equal steps", exact, STEPS, made, evaluations)

    yield VP, "exact VP eps", [way(True), way(False)][: 1 if x.shape[1] == 2 else 2]


LIBRARIES = {"sbml": sbml, "gensbi": gensbi, "flow_matching": flow_matching, "sbgm": sbgm}


# Measurement.


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``run`` and its CPU-seconds."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def walk(way: Way, exact: np.ndarray) -> Iterator[tuple[Any, dict[str, Any]]]:
    """For each target, the function and the row of the first setting that reaches it.

    If none does, the function is None, and the row is that of the setting with the smallest error.
    """
    targets, best = list(TARGETS), None
    for setting in way.settings:
        run = way.made(setting)
        try:
            logp, first = timed(run)
            again = timed(run)[1] if way.compiles else first
        except AssertionError as failure:  # of torchdiffeq: its step is too small for float32
            print(f"    {setting:g}: {failure}", file=sys.stderr)
            break
        error = np.abs(logp - exact)
        row = {"method": way.name, "setting": setting, "largest": float(error.max())}
        row |= {"mean": float(error.mean()), "first": first - again}
        print(
            f"    {setting:g}: {row['largest']:.1e} in {again:.3f} s", file=sys.stderr, flush=True
        )
        if best is None or error.max() < best["largest"]:
            best = row
        while targets and error.max() <= targets[0]:
            nfe, divergences = way.evaluations(setting)
            yield run, row | {"target": targets.pop(0), "nfe": nfe, "divergences": divergences}
        if not targets or way.compiles and again > LONGEST:
            break
    for target in targets:
        yield None, (best or {}) | {"target": target}


def rows(library: str, file: str) -> list[tuple[Any, dict[str, Any]]]:
    """A function to time, or None, and a row for each problem, path, method and target.

    A random divergence is measured at the setting that the exact one needs for the first target.
    Its error is then that of its noise.
    """
    found = []
    for name in PROBLEMS:
        arrays = load(file, name)
        for path, key, ways in LIBRARIES[library](arrays):
            settings: dict[str, float] = {}
            for way in ways:
                print(f"  {name}, {path}, {way.name}, exact={way.exact}", file=sys.stderr)
                common = {"library": library, "problem": name, "path": path}
                if way.exact:
                    for run, row in walk(way, arrays[key]):
                        if run is not None:
                            settings.setdefault(way.name, row["setting"])
                        found.append((run, common | row))
                elif way.name in settings:
                    setting = settings[way.name]
                    run = way.made(setting)
                    logp, first = timed(run)
                    again = timed(run)[1] if way.compiles else first
                    error = logp - arrays[key]
                    nfe, divergences = way.evaluations(setting)
                    row = {"method": way.name, "setting": setting, "target": "one probe"}
                    row |= {"largest": float(np.abs(error).max()), "first": first - again}
                    row |= {"rms": float(np.sqrt(np.mean(error**2)))}
                    row |= {"nfe": nfe, "divergences": divergences}
                    found.append((run, common | row))
    return found


def work(library: str, file: str) -> None:
    """Find the settings; then, for each line of the input, time them and print the rows as JSON."""
    found = rows(library, file)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        for run, row in found:
            seconds: list[float] = []
            while run and len(seconds) < 5 and sum(seconds) < 1:
                seconds.append(timed(run)[1])
            print(json.dumps(row | {"round": number, "seconds": min(seconds, default=None)}))
        print("end of the round", flush=True)


def lines_until(stream: Any, last: str) -> Iterator[str]:
    """The lines of ``stream`` before the line ``last``."""
    for line in stream:
        if line.strip() == last:
            return
        yield line
    raise RuntimeError(f"a process ended before it printed {last!r}: see its error above")


def measure(file: str, results: str, rounds: int, pythons: list[str]) -> None:
    """Start a process for each library, and time them in turns."""
    workers: list[Any] = []
    for library, python in (text.split("=", 1) for text in pythons):
        print(library, file=sys.stderr)
        command = [python, __file__, "work", library, file]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(command, **pipes))
        list(lines_until(workers[-1].stdout, "ready"))
    with open(results, "w") as output:
        for number in range(rounds):
            for worker in workers:
                worker.stdin.write("\n")
                worker.stdin.flush()
                output.writelines(lines_until(worker.stdout, "end of the round"))
            output.flush()
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for worker in workers:
        worker.stdin.close()
        worker.wait()


def table(results: str) -> None:
    """Print the rows of ``results`` as Markdown."""
    with open(results) as file:
        everything = [json.loads(line) for line in file]
    print(
        "| problem, path | target | library | method, setting | evaluations (with divergence) | "
        "largest error | mean error | ms an example | relative to sbml | first call, s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    order = [*TARGETS, "one probe"]

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return PROBLEMS.index(row["problem"]), row["path"] == VP, order.index(row["target"])

    for _, of_target in itertools.groupby(sorted(everything, key=group), group):
        same = list(of_target)
        ours = {r["round"]: r["seconds"] for r in same if r["library"] == "sbml"}
        for library in LIBRARIES:
            for method in dict.fromkeys(r["method"] for r in same if r["library"] == library):
                mine = [r for r in same if (r["library"], r["method"]) == (library, method)]
                row = mine[0]
                left = f"| {row['problem']}, {row['path']} | {row['target']} | {library} "
                left += f"| {method}, {row['setting']:g} "
                errors = f"| {row['largest']:.1e} | "
                errors += f"rms {row['rms']:.1e} " if "rms" in row else f"{row['mean']:.1e} "
                if row["seconds"] is None:
                    print(f"{left}| not reached {errors}| | | |")
                    continue
                ratios = [r["seconds"] / ours[r["round"]] for r in mine if ours[r["round"]]]
                ratio = f"{np.median(ratios):.2f}" if ratios else ""
                ms = 1e3 * np.median([r["seconds"] for r in mine]) / EXAMPLES
                counts = f"{row['nfe']:.0f} ({row['divergences']:.0f})"
                print(f"{left}| {counts} {errors}| {ms:.3g} | {ratio} | {row['first']:.1f} |")


def inside(file: str, rounds: int, counts: list[int]) -> None:
    """Print the time of ``log_prob`` inside jit, relative to ``logp``, in turns."""
    import jax

    print(
        "| problem, path | examples | logp, ms an example | log_prob inside jit / logp |\n"
        "|---|---|---|---|"
    )
    for name, count in itertools.product(PROBLEMS, counts):
        arrays = load(file, name)
        x = np.resize(arrays["x"], (count, arrays["x"].shape[1]))
        for path, of in densities(arrays).items():
            density = of(None)
            f = jax.jit(density.log_prob)
            ways = [
                lambda x=x, d=density: d.logp(x, check=False).values,
                lambda x=x, f=f: np.asarray(f(x)),
            ]
            # Rounding changes the steps, and so log p, but only within the solver's error.
            np.testing.assert_allclose(ways[0](), ways[1](), atol=1e-2)
            seconds = np.array(
                [[min(timed(w)[1] for _ in range(3)) for w in ways] for _ in range(rounds)]
            )
            ratio = np.median(seconds[:, 1] / seconds[:, 0])
            ms = 1e3 * np.median(seconds[:, 0]) / count
            print(f"| {name}, {path} | {count} | {ms:.3f} | {ratio:.3f} |", flush=True)


def together(arrays: Arrays, batched: bool, tolerance: float) -> tuple[np.ndarray, float]:
    """log p (n,), and the evaluations for an example, if x and log p are solved together.

    Every evaluation of dopri5 in t then has a divergence. ``batched``: the batch has one sequence
    of steps, as in gensbi, whose error norm is over all examples.
    """
    import diffrax
    import jax
    import jax.numpy as jnp

    x, problem = jax_problem(arrays)

    def rate(t: Any, y: Any, _: Any) -> Any:
        f: Callable[[Any], Any] = lambda x: problem.velocity(x, t)  # noqa: E731
        divergence = lambda x: jnp.trace(jax.jacfwd(f)(x))  # noqa: E731
        return (f(y[0]), (jax.vmap(divergence) if batched else divergence)(y[0]))

    def solve(x: Any) -> Any:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        how: Any = {"stepsize_controller": controller, "max_steps": 4096}
        start = x, jnp.zeros(x.shape[:-1])
        term = diffrax.ODETerm(rate)
        end = diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, 1.0, None, start, **how)
        (latent,), (change,) = end.ys
        log_prior = -0.5 * (latent**2 + math.log(2 * math.pi)).sum(-1)
        return log_prior + change, 1 + 6 * end.stats["num_steps"]  # the last one is used again

    logp, evaluations = jax.jit(solve if batched else jax.vmap(solve))(x)
    return np.asarray(logp), float(np.mean(evaluations))


def costs(mixtures: int) -> None:
    """Print the cost of log p in two dimensions: evaluations + 2 evaluations with a divergence.

    A divergence takes two tangents, each of which is counted like an evaluation. The largest errors
    (geometric) and the costs are means over the mixtures, and interpolated between tolerances.
    """
    from sbml.likelihood.ode import Solver

    dims = 2

    def ours(power: float) -> Callable[..., tuple[np.ndarray, float]]:
        def solve(arrays: Arrays, tolerance: float) -> tuple[np.ndarray, float]:
            solver = Solver(rtol=tolerance, atol=tolerance, power=power)
            density = densities(arrays)[STRAIGHT](None, solver=solver)
            found = density.logp(arrays["x"], check=False)
            nfe = found.nfe.mean()
            return found.values, nfe + dims * with_divergence(nfe)

        return solve

    def theirs(batched: bool) -> Callable[..., tuple[np.ndarray, float]]:
        def solve(arrays: Arrays, tolerance: float) -> tuple[np.ndarray, float]:
            logp, nfe = together(arrays, batched, tolerance)
            return logp, nfe * (1 + dims)

        return solve

    ways = {
        "sbml, in t": (ours(1.0), (1 - EPS, EPS)),
        "sbml, in sqrt(t)": (ours(2.0), (1 - EPS, EPS)),
        "together, a sequence of steps for each example": (theirs(batched=False), (1.0, 0.0)),
        "together, one sequence of steps (gensbi's settings)": (theirs(batched=True), (1.0, 0.0)),
    }
    targets = np.log(TARGETS)
    problems = [mixture(dims, seed=seed) for seed in range(mixtures)]
    print(f"| straight path, {dims} dimensions | {' | '.join(f'{t:g}' for t in TARGETS)} |")
    print("|---|" + "---|" * len(TARGETS))
    for name, (solve, (alpha, sigma)) in ways.items():
        points = []
        for tolerance in (0.1, 0.03, *TOLERANCES[:7]):
            logs, of_each = [], []
            for arrays in problems:
                single = {key: a.astype(np.float32) for key, a in arrays.items()}
                logp, cost = solve(single, tolerance)
                logs.append(np.log(np.abs(logp - log_density(arrays, alpha, sigma)).max()))
                of_each.append(cost)
            points.append((np.mean(logs), np.mean(of_each)))
        errors, cost = np.array(sorted(points)).T
        low, high = errors[0], errors[-1]
        marks = ["more than " if e < low else "less than " if e > high else "" for e in targets]
        at = np.interp(targets, errors, cost)
        cells = [f"{mark}{value:.0f}" for mark, value in zip(marks, at, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("problems")
    worker = commands.add_parser("work", help="one process of measure")
    worker.add_argument("library", choices=LIBRARIES)
    worker.add_argument("problems")
    run = commands.add_parser("measure")
    run.add_argument("problems")
    run.add_argument("results")
    run.add_argument("--rounds", type=int, default=7)
    run.add_argument("pythons", nargs="+", help="LIBRARY=PYTHON for each library")
    commands.add_parser("table").add_argument("results")
    within = commands.add_parser("inside")
    within.add_argument("problems")
    within.add_argument("--rounds", type=int, default=9)
    within.add_argument("--examples", type=int, nargs="+", default=[64, 512])
    commands.add_parser("costs").add_argument("--mixtures", type=int, default=12)
    args = parser.parse_args()
    if args.command in ("work", "inside"):
        # One thread for each framework. It is set before they are imported.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.command == "prepare":
        prepare(args.problems)
    elif args.command == "work":
        work(args.library, args.problems)
    elif args.command == "measure":
        measure(args.problems, args.results, args.rounds, args.pythons)
    elif args.command == "table":
        table(args.results)
    elif args.command == "costs":
        costs(args.mixtures)
    else:
        inside(args.problems, args.rounds, args.examples)


if __name__ == "__main__":
    main()
