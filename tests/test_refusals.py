"""What the library's functions do not document, they refuse: no wrong number comes back.

Users have no checks of shapes and types as these tests do (``shapes``), so they are off here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import (
    bits,
    bound,
    dequantizers,
    discrete,
    distances,
    divergence,
    integers,
    intervals,
    likelihood,
    losses,
    ode,
    predictions,
    samplers,
    sampling,
    scalars,
    sdes,
    second_order,
    times,
)
from sbml.density import Density
from sbml.divergence import Trace
from sbml.samplers import known

pytestmark = pytest.mark.usefixtures("unchecked")

VP, EPS, KEY = sdes.VP(), 1e-3, jax.random.key(0)
FAST = ode.Solver(fixed_steps=3)
X, Z, T = np.full(3, 0.3, np.float32), np.full(3, -0.2, np.float32), np.float32(0.5)
U, PIXELS = np.array([0.1, 0.6], np.float32), np.array([1, 2, 3])
BATCH, SPREAD = np.stack([X, Z]), np.array([0.3, 0.7], np.float32)
KEYS, PROBES = jax.random.split(KEY, 2), np.ones((2, 3), np.float32)
IMAGE = np.full((4, 4, 3), 0.1, np.float32)
NAN, INFINITY = float("nan"), float("inf")
FEATURES = np.random.default_rng(0).normal(size=(9, 3))


def score(x: Any, t: Any, key: Any = None) -> Any:
    return -x


def control(size: int) -> bound.GaussianControl:
    return bound.GaussianControl(jnp.zeros(size), jnp.ones(size), None)


def elbo(x: Any = X, u: Any = U, size: int = 3, density: Any = None, key: Any = KEY) -> Any:
    reduction = bound.Reduction(control(size), density)
    return bound.elbo(score, VP, x, key, eps=EPS, u=u, reduction=reduction)


def decoded(
    pixels: Any = PIXELS, u: Any = U, levels: Any = 16, eps: float = EPS, key: Any = KEY
) -> Any:
    noise = discrete.Categorical(levels)
    return discrete.elbo(score, VP, pixels, key, eps=eps, u=u, noise=noise)


def tally(counts: Any = None, v: Any = U, values: Any = U, decay: float = 0.9) -> Any:
    return times.tally(jnp.zeros((2, 4)) if counts is None else counts, v, values, decay)


def denoiser(y: Any = X, out: Any = None, pixels: Any = PIXELS) -> Any:
    out = np.zeros((3, 16), np.float32) if out is None else out
    return integers.decoder_nats(out, y, np.float32(0.1), pixels, 16)


def density(**choices: Any) -> Density:
    return Density(**{"score": score, "sde": VP, "shape": (3,), "solver": FAST, **choices})


def dsm_batch(
    x: Any = BATCH, t: Any = SPREAD, keys: Any = KEYS, signs: Any = None, probes: Any = None
) -> Any:
    if probes is not None:
        return second_order.dsm_batch(score, VP, x, t, keys, signs=signs, probes=probes)
    return losses.dsm_batch(score, VP, x, t, keys, signs=signs)


def path(sampler: Any, z: Any = X, key: Any = KEY, eps: Any = EPS, frames: Any = 3) -> Any:
    return sampler.path(score, VP, z, key, eps=eps, frames=frames)


# A function, its good arguments, and by name what each must not be. A refusal names the argument.
TIMES: dict[str, Any] = {
    "t": (T[None], np.full(3, T), np.int32(1), np.array(True), "0.5", 1, -T, T * NAN)
}
UP_TO_END: dict[str, Any] = {"t": (*TIMES["t"], T + 1)}
EXAMPLES: dict[str, Any] = {"x": (X.astype(int), X > 0, X.tolist(), 0.3, None)}
LIKE_X: dict[str, Any] = {"z": (Z[None], Z[:1], Z[0], Z.astype(int), Z.tolist(), 0.1)}
OLD = jax.random.PRNGKey(0)
BAD_KEYS: dict[str, Any] = {"key": (OLD, np.asarray(OLD), KEYS, 0, None)}
MAYBE_KEYS: dict[str, Any] = {"key": BAD_KEYS["key"][:-1]}  # None is documented.
EPSILONS: dict[str, Any] = {"eps": (0.0, 1.0, -1.0, NAN, INFINITY)}
COUNTS = (0, -1, 2.5, NAN, True)
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "perturb": (
        lambda x, t, z: losses.perturb(VP, x, t, z),
        {"x": X, "t": T, "z": Z},
        UP_TO_END | EXAMPLES | LIKE_X,
    ),
    "residual": (
        lambda s, t, z: losses.residual(VP, s, t, z, "original"),
        {"s": jnp.asarray(X), "t": T, "z": jnp.asarray(Z)},
        UP_TO_END | {"s": (jnp.asarray(X[:1]), jnp.asarray(X.astype(int)))},
    ),
    "dsm": (
        lambda x, t, key: losses.dsm(score, VP, x, t, key),
        {"x": X, "t": T, "key": KEY},
        UP_TO_END | EXAMPLES | BAD_KEYS,
    ),
    "noise_error": (
        lambda x, t, z: bound.noise_error(score, VP, x, t, z),
        {"x": X, "t": T, "z": Z},
        TIMES | EXAMPLES | LIKE_X,
    ),
    "denoise": (
        lambda x, t: sampling.denoise(score, VP, x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "marginal": (VP.marginal, {"x": X, "t": T}, UP_TO_END | EXAMPLES),
    "drift": (VP.drift, {"x": X, "t": T}, UP_TO_END | EXAMPLES),
    "prediction": (
        lambda x, t: predictions.from_prediction(lambda x, t: x, "velocity", VP)(x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "prior_kl": (lambda x: bound.prior_kl(VP, x), {"x": X}, EXAMPLES),
    "logp": (
        lambda x, key, eps: likelihood.ode_logp(score, VP, x, key, eps=eps, solver=FAST),
        {"x": X, "key": KEY, "eps": EPS},
        EXAMPLES | BAD_KEYS | EPSILONS,
    ),
    "logp's choices": (
        lambda **choices: likelihood.ode_logp(
            score, VP, X, KEY, eps=EPS, **{"solver": FAST, **choices}
        ),
        {},
        {"trace": ("exact", None), "solver": ("tsit5", None)},
    ),
    "elbo's choices": (
        lambda **choices: bound.elbo(score, VP, X, KEY, eps=EPS, u=U, **choices),
        {"trace": None},
        {"trace": ("exact",), "reduction": (None, control(3))},
    ),
    "exact logp": (
        lambda key: likelihood.ode_logp(
            score, VP, X, key, eps=EPS, solver=FAST, trace=Trace("exact")
        ),
        {"key": None},
        MAYBE_KEYS,
    ),
    "elbo": (
        elbo,
        {"x": X, "u": U, "size": 3, "density": jnp.ones(4), "key": KEY},
        EXAMPLES
        | BAD_KEYS
        | {
            "u": (U[None], U[0], U + 1, PIXELS, U.tolist(), U[:0]),
            "size": (1, 4),
            "density": (jnp.ones((2, 2)), jnp.array([1.0, 0.0]), -jnp.ones(4), jnp.ones(0)),
        },
    ),
    "discrete": (
        decoded,
        {"pixels": PIXELS, "u": U, "levels": 16, "eps": EPS, "key": KEY},
        BAD_KEYS
        | {
            "pixels": (PIXELS - 2, PIXELS + 13, PIXELS.astype(float), PIXELS.tolist(), 1),
            "u": (U[None], U - 1, U.tolist()),
            "levels": (0, -16, 1, 16.5, 3),
            "eps": (0.0, 2.0),
        },
    ),
    "decoder": (
        lambda x, pixels, rho: discrete.decoder_nats(x, pixels, 16, rho),
        {"x": X, "pixels": PIXELS, "rho": jnp.asarray(0.1)},
        EXAMPLES
        | {
            "pixels": (PIXELS[:1], PIXELS[None], PIXELS - 2, PIXELS * 9, PIXELS.astype(float)),
            "rho": (0.0, -0.1, NAN),
        },
    ),
    "reconstruction": (
        lambda pixels, eps, z: discrete.reconstruction(
            VP, discrete.Categorical(16), pixels, eps, z
        ),
        {"pixels": PIXELS, "eps": jnp.asarray(EPS), "z": Z},
        LIKE_X | {"pixels": (PIXELS - 2, PIXELS.tolist()), "eps": (1, -1.0, NAN)},
    ),
    "denoised": (
        lambda out, y, rho, levels: integers.posterior_mean(out, y, rho, levels, "uniform"),
        {"out": np.zeros((3, 16), np.float32), "y": X, "rho": np.float32(0.1), "levels": 16},
        {
            "out": (np.zeros((3, 15), np.float32), [[0.0] * 16] * 3),
            "y": EXAMPLES["x"],
            "rho": (0.0, -0.1, NAN, np.float32([0.1, 0.0, 0.1])),
            "levels": (0, -1, 1, 16.5),
        },
    ),
    "outputs": (integers.outputs, {"levels": 16}, {"levels": (0, -1, 1, 16.5, NAN)}),
    "edge": (
        lambda eps, tau: discrete.edge_constant(VP, eps, tau),
        {"eps": EPS, "tau": 3.0},
        EPSILONS | {"tau": (0.0, -1.0, NAN)},
    ),
    "edge score": (
        lambda tau: discrete.edge_score(X, np.float32(0.5), np.float32(0.8), tau),
        {"tau": 3.0},
        {"tau": (0.0, -1.0, NAN)},
    ),
    "bin_log_snr": (
        discrete.bin_log_snr,
        {"levels": 16, "tau": 3.0},
        {"levels": (0, 1, 16.5, NAN), "tau": (0.0, -1.0, NAN)},
    ),
    "denoiser": (
        denoiser,
        {"y": X, "pixels": PIXELS, "out": np.zeros((3, 16), np.float32)},
        {
            "y": (X.astype(int), X[:1], X.tolist()),
            "out": (np.zeros((3, 15), np.float32), [[0.0] * 16] * 3),
            "pixels": (PIXELS[:1], PIXELS - 2, PIXELS + 13, PIXELS.astype(float)),
        },
    ),
    "smallest_time": (
        lambda levels, eps, tau: discrete.smallest_time(VP, levels, eps, tau),
        {"levels": 16, "eps": EPS, "tau": 3.0},
        {"levels": (0, -1, 16.5), "eps": (0.0, 1.0, -1.0), "tau": (0.0, -1.0, NAN)},
    ),
    "truncated_normal": (
        discrete.truncated_normal,
        {"e": X, "tau": 3.0},
        {"tau": (0.0, -3.0, NAN)},
    ),
    "transport": (
        lambda x, t0, t1: ode.transport(score, VP, x, t0, t1, FAST),
        {"x": X, "t0": EPS, "t1": 1.0},
        EXAMPLES | {"t0": (-1.0, 2.0, NAN), "t1": (-1.0, 2.0, INFINITY)},
    ),
    "solve": (
        lambda y, t0, field: ode.solve(field, y, t0, 1.0, FAST),
        {"y": X, "t0": EPS, "field": lambda t, y: -y},
        {
            "y": EXAMPLES["x"],
            "t0": (-1.0, NAN, INFINITY),
            "field": (lambda t, y: -jnp.sum(y), lambda t, y: -y[:1]),
        },
    ),
    "sampler": (
        lambda z, key, eps: samplers.ReverseDiffusion(3)(score, VP, z, key, eps=eps),
        {"z": X, "key": KEY, "eps": EPS},
        {"z": EXAMPLES["x"]} | BAD_KEYS | EPSILONS,
    ),
    "ode sampler": (
        lambda z, key, eps: samplers.ODE(FAST)(score, VP, z, key, eps=eps),
        {"z": X, "key": None, "eps": EPS},
        {"z": EXAMPLES["x"]} | MAYBE_KEYS | EPSILONS,
    ),
    "path": (
        lambda z, key, eps, frames: path(samplers.DDIM(3), z, key, eps, frames),
        {"z": X, "key": KEY, "eps": EPS, "frames": 3},
        {"z": EXAMPLES["x"], "frames": COUNTS} | BAD_KEYS | EPSILONS,
    ),
    "ode path": (
        lambda z, key, eps, frames: path(samplers.ODE(FAST), z, key, eps, frames),
        {"z": X, "key": None, "eps": EPS, "frames": 3},
        {"z": EXAMPLES["x"], "frames": COUNTS} | MAYBE_KEYS | EPSILONS,
    ),
    "sampler's choices": (
        lambda steps, snr: samplers.DDIM(steps, corrector=samplers.Langevin(steps, snr)).nfe,
        {"steps": 3, "snr": 0.1},
        {"steps": COUNTS, "snr": (0.0, -0.1, NAN, INFINITY)},
    ),
    "complete": (
        lambda x, mask, key, eps: known.complete(
            score, VP, x, mask, key, eps=eps, sampler=samplers.DDIM(2)
        ),
        {"x": IMAGE, "mask": np.ones((4, 4, 1)), "key": KEY, "eps": EPS},
        {"x": EXAMPLES["x"][:3], "mask": (0.5, 2.0, -1, NAN), **BAD_KEYS, **EPSILONS},
    ),
    "ode_sample": (
        lambda key, eps: sampling.ode_sample(score, VP, (3,), key, eps=eps, solver=FAST),
        {"key": KEY, "eps": EPS},
        BAD_KEYS | EPSILONS,
    ),
    "lattice": (
        times.lattice,
        {"key": KEY, "n": 4, "draws": 2},
        BAD_KEYS | {"n": (0, -1, 4.5, np.array([2, 2])), "draws": (0, -1, 2.5)},
    ),
    "iid": (
        times.iid,
        {"key": KEY, "n": 4, "draws": 2},
        BAD_KEYS | {"n": (0, -1, 4.5), "draws": (0, -1)},
    ),
    "grid": (
        lambda n, u: times.Grid(n).at(u),
        {"n": 5, "u": U},
        {"n": (0, 1, -5, 5.5, np.array([2, 2])), "u": (U + 1, PIXELS, U.tolist(), 0.5)},
    ),
    "proposal": (
        lambda eps, u: times.Importance(VP, eps).at(u),
        {"eps": EPS, "u": U},
        EPSILONS | {"u": (U + 1, -U, PIXELS, U.tolist(), 0.5)},
    ),
    "warp": (
        times.warp,
        {"u": U, "density": jnp.ones(4)},
        {"u": (U + 1, PIXELS, U.tolist(), 0.5), "density": ([1.0, 2.0], jnp.ones((2, 2)), None)},
    ),
    "tally": (
        tally,
        {"decay": 0.9},
        {
            "counts": (jnp.zeros((1, 4)), jnp.zeros(4), jnp.zeros(()), jnp.zeros((2, 0))),
            "v": (U[None], U + 1, U[:1], U.tolist()),
            "values": (U[None], U[:1], U * 1j),
            "decay": (-0.1, 1.1, NAN),
        },
    ),
    "floored": (
        times.with_floor,
        {"scale": jnp.ones(4), "floor": 0.1},
        {
            "scale": (jnp.ones((2, 2)), 1.0, [1.0, 2.0], jnp.ones(2) + 0j, jnp.ones(0)),
            "floor": (0.0, 1.1, -1.0, NAN),
        },
    ),
    "levels": (
        lambda t: VP.levels(30).std(t),
        {"t": jnp.asarray(0.5)},
        {"t": (jnp.asarray(1), jnp.asarray(True))},
    ),
    "number of levels": (
        lambda n: [sde.levels(n).std(T) for sde in (VP, sdes.VE())],
        {"n": 30},
        {"n": (0, 1, -5, 30.5)},
    ),
    "lists of levels": (
        lambda alphas, sigmas: sdes.Levels(alphas, sigmas).std(T),
        {"alphas": (0.9, 0.5), "sigmas": (0.1, 0.5)},
        {
            "alphas": ((0.9, 0.5, 0.3), (0.9,), (NAN, 0.5), (-0.9, 0.5)),
            "sigmas": ((0.1, 0.5, 0.6), (0.0, 0.5), (-0.1, 0.5), (NAN, 0.5), (0.1, INFINITY)),
        },
    ),
    "schedule": (
        lambda alpha, sigma: sdes.Schedule(alpha, sigma).std(T),
        {"alpha": lambda t: 1 - t, "sigma": lambda t: t},
        {"alpha": (1.0, None), "sigma": (1.0, None)},
    ),
    "largest noise": (
        lambda largest: [
            sde.std(T) for sde in (sdes.VP(0.1, largest), sdes.VE(largest), sdes.LinearVE(largest))
        ],
        {"largest": 50.0},
        {"largest": (INFINITY, -INFINITY, NAN, -1.0, 0.0)},
    ),
    "largest gamma": (
        lambda largest: sdes.LinearGamma(-13.0, largest).std(T),
        {"largest": 5.0},
        {"largest": (INFINITY, NAN, -14.0)},
    ),
    "prior_logp": (VP.prior_logp, {"z": X}, {"z": EXAMPLES["x"]}),
    "prior_sample": (lambda key: VP.prior_sample(key, (3,)), {"key": KEY}, BAD_KEYS),
    "control": (
        lambda noise_variance, x: bound.GaussianControl.fit(x, noise_variance=noise_variance),
        {"noise_variance": 0.1, "x": FEATURES},
        {
            "noise_variance": (-0.1, NAN, INFINITY),
            "x": (FEATURES + 0j, FEATURES * NAN, FEATURES[0, 0]),
        },
    ),
    "control's noise": (
        lambda x, t: control(3).noise(VP, x, t),
        {"x": X, "t": T},
        TIMES | {"x": (*EXAMPLES["x"], X[:1])},
    ),
    "control's integral": (
        lambda x, eps: control(3).integral(VP, x, eps),
        {"x": X, "eps": EPS},
        EPSILONS | {"x": (*EXAMPLES["x"], X[:1])},
    ),
    "control's size": (
        lambda size: bound.diffusion_dsm(score, VP, X, T, Z, control(size)),
        {"size": 3},
        {"size": (1, 4)},
    ),
    "variance": (
        lambda variance: bound.prior_kl(VP, X, variance),
        {"variance": 0.5},
        {"variance": (0.0, -1.0, NAN, X)},
    ),
    "pilot": (
        lambda x, key, eps, bins: bound.pilot(score, VP, x, key, eps=eps, bins=bins),
        {"x": BATCH, "key": KEY, "eps": EPS, "bins": 2},
        BAD_KEYS | EPSILONS | {"x": (BATCH.astype(int), BATCH.tolist(), X[0]), "bins": COUNTS},
    ),
    "weight": (
        lambda t: losses.weight(VP, t, "original"),
        {"t": T},
        {"t": (1, True, np.int32(1), [0.5])},
    ),
    "dsm_batch": (
        dsm_batch,
        {"x": BATCH, "t": SPREAD, "keys": KEYS, "signs": np.array([1.0, -1.0])},
        {
            "x": (X, BATCH.astype(int), BATCH.tolist(), 0.3, None),
            "t": (T, SPREAD[:1], SPREAD.astype(int), SPREAD.tolist(), 0.5, -SPREAD, SPREAD + 1),
            "keys": (KEY, jax.random.split(OLD, 2), KEYS[:1], None),
            "signs": (np.array([2.0, 3.0]), np.array([True, False]), SPREAD[:1], 1.0),
        },
    ),
    "second_order": (
        lambda x, t, key, vs: second_order.loss(score, VP, x, t, key, vs),
        {"x": X, "t": T, "key": KEY, "vs": PROBES},
        TIMES | EXAMPLES | BAD_KEYS | {"vs": (X, PROBES[:, :1], PROBES[:0], PROBES.tolist())},
    ),
    "second_order batch": (dsm_batch, {"probes": 2}, {"probes": COUNTS, "keys": (KEY, OLD)}),
    "residuals": (
        lambda forms, t, z: second_order.residuals(VP, jnp.asarray(X), forms, t, z),
        {"forms": jnp.ones(2), "t": T, "z": Z},
        TIMES | {"z": (Z.astype(int), Z > 0, Z + 0j, Z[:1]), "forms": (1.0, jnp.ones((2, 2)))},
    ),
    "squared": (
        second_order.squared_residual,
        {"r": jnp.ones(2)},
        {"r": (jnp.ones((2, 2)), jnp.ones(()), jnp.ones(0))},
    ),
    "velocity": (
        lambda x, t: ode.velocity(score, VP, x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "score_of": (
        lambda v, x, t: ode.score_of(v, score, VP, x, t),
        {"v": X, "x": X, "t": T},
        TIMES | EXAMPLES | {"v": LIKE_X["z"]},
    ),
    "solver": (
        lambda **choices: ode.Solver(**choices).tighter(10).rtol,
        {"fixed_steps": 3},
        {
            "fixed_steps": COUNTS,
            "max_steps": (*COUNTS, None),
            "rtol": (0.0, -1.0, INFINITY, "a", 1.1),
            "atol": (0.0, NAN, "a"),
            "pcoeff": (NAN, INFINITY, -0.1),
            "icoeff": (NAN, INFINITY, -1.0, 0.0),
        },
    ),
    "to_model": (
        bits.to_model,
        {"pixels": PIXELS, "u": 0.5, "levels": 16},
        {
            "pixels": (PIXELS + 13, PIXELS - 2),
            "u": (2.0, -1.0, U[:1] - 1),
            "levels": (0, -1, 1.5),
        },
    ),
    "to_pixels": (
        bits.to_pixels,
        {"x": X, "levels": 16},
        {"x": (X * NAN, X * 1j, PIXELS), "levels": (0, -16, 257, 16.5)},
    ),
    "bits_per_dim": (
        bits.bits_per_dim,
        {"nll": 1.0, "shape": (3,), "levels": 16},
        {"levels": (0, -16, 16.5), "shape": ((0,), (-1,), (2.5,))},
    ),
    "nats_to_bits": (
        bits.nats_to_bits,
        {"nats": 1.0, "shape": (3,)},
        {"shape": ((0,), (-1,), (2.5,))},
    ),
    "directions": (
        lambda x, vs: divergence.quadratic_forms(lambda x: -x, x, vs),
        {"x": X, "vs": PROBES},
        EXAMPLES
        | {"vs": (X, PROBES[:, :1], PROBES[:0], PROBES.astype(int), PROBES.tolist(), None)},
    ),
    "exact": (lambda x: divergence.exact(lambda x: -x, x), {"x": X}, EXAMPLES),
    "probes": (
        lambda key, count: divergence.probes(key, (3,), count),
        {"key": KEY, "count": 2},
        BAD_KEYS | {"count": COUNTS},
    ),
    "hadamard": (
        lambda rows: divergence.hadamard(rows, np.arange(3)),
        {"rows": 2},
        {"rows": COUNTS},
    ),
    "exact_batch": (divergence.exact_batch, {"dims": 3}, {"dims": COUNTS}),
    "dequantizer": (
        lambda pixels, key: [
            dequantizers.get(name)().sample({}, pixels, key)
            for name in ("uniform", "truncated_normal")
        ],
        {"pixels": PIXELS, "key": KEY},
        BAD_KEYS | {"pixels": (PIXELS.astype(float), PIXELS > 0, PIXELS.tolist())},
    ),
    "density": (
        lambda **choices: density(**choices).dims,
        {"levels": 16},
        {
            "shape": ((0,), (-1,), (2.5,)),
            "levels": (1, 16.5, NAN),
            "batch_size": COUNTS,
            "seed": (-1, 2.5, NAN, 2**32),
            "solver": ("tsit5", None),
            "budget": (-1.0, NAN),
            "trace": ("exact",),
            "eps": EPSILONS["eps"],
        },
    ),
    "density's samples": (
        lambda key, n: density(levels=16).sample(key, n),
        {"key": KEY, "n": 2},
        BAD_KEYS | {"n": COUNTS},
    ),
    "density's bound": (
        lambda sweeps, times_each: (
            density().bound(BATCH, sweeps=sweeps, times_each=times_each).values
        ),
        {"sweeps": 2, "times_each": 1},
        {"sweeps": (*COUNTS, 1), "times_each": COUNTS},
    ),
    "moments": (
        distances.Moments.of,
        {"features": FEATURES},
        {"features": (FEATURES[0], FEATURES[..., None], FEATURES + 0j, FEATURES[:1])},
    ),
    "kernel": (
        distances.kernel,
        {"x": FEATURES, "y": FEATURES, "chunk": 5},
        {
            "x": (FEATURES[:, :1], FEATURES[0], FEATURES[None]),
            "y": (FEATURES[:1], FEATURES + 0j),
            "chunk": COUNTS,
        },
    ),
    "frechet": (
        lambda y: distances.frechet(distances.Moments.of(FEATURES), distances.Moments.of(y)),
        {"y": FEATURES},
        {"y": (FEATURES[:, :1], FEATURES[:, :2])},
    ),
    "inception_score": (
        distances.inception_score,
        {"probabilities": np.full((4, 2), 0.5)},
        {
            "probabilities": (
                np.full((4, 2), 0.4),
                np.full((4, 2, 1), 0.5),
                FEATURES,
                np.ones((0, 2)),
            )
        },
    ),
    "nearest": (
        distances.nearest,
        {"x": FEATURES, "others": FEATURES, "chunk": 5},
        {
            "x": (FEATURES[:, :1], FEATURES + 0j),
            "others": (FEATURES[..., None], FEATURES[:0], FEATURES + 0j),
            "chunk": COUNTS,
        },
    ),
    "mean_interval": (
        intervals.mean_interval,
        {"values": X},
        {"values": (X[None], X[0], X + 0j, X[:0])},
    ),
    "repeated_stderr": (
        intervals.repeated_stderr,
        {"first": X, "second": Z, "n": 3},
        {"first": (X[:1], X[None]), "second": (Z[:1], 0.1), "n": COUNTS},
    ),
    "half_width": (
        intervals.half_width,
        {"stderr": 0.1, "freedom": 3},
        {"stderr": (-0.1,), "freedom": (-1,)},
    ),
    "outliers": (
        intervals.outliers,
        {"values": X, "width": 6.0},
        {"values": (X[None], 0.3), "width": (-1.0, NAN, INFINITY)},
    ),
}
OF_TIMES = ("mean_coef", "std", "log_snr", "rate", "drift_coef", "diffusion", "slopes")
PROCESSES: list[sdes.SDE] = [
    *(kind() for kind in sdes.SDES.values()),
    sdes.AlphaBarTable([0.9, 0.5, 0.1]),
    sdes.MonotoneGamma(18.0, -13.0, (1.0,), (0.0,), (1.0,)),
    sdes.Schedule(lambda t: 1 - t**2, lambda t: t),
]
CASES |= {
    f"{type(sde).__name__}.{name}": (
        getattr(sde, name),
        {"t": T},
        {"t": (1, True, np.int32(1), np.array([0, 1]), np.array(True), "0.5", [0.5], None)},
    )
    for sde in PROCESSES
    for name in OF_TIMES
}
WRONG = [
    pytest.param(*(function, good, name, bad), id=f"{case}-{name}-{i}")
    for case, (function, good, wrong) in CASES.items()
    for name, values in wrong.items()
    for i, bad in enumerate(values)
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_documented_is_taken(case: str) -> None:
    function, good, _ = CASES[case]
    found = jax.tree.leaves(function(**good))
    assert all(np.all(np.isfinite(np.asarray(leaf))) for leaf in found)


@pytest.mark.parametrize(("function", "good", "name", "bad"), WRONG)
def test_what_is_not_is_refused(
    function: Callable[..., Any], good: dict[str, Any], name: str, bad: Any
) -> None:
    with pytest.raises((ValueError, TypeError)):
        function(**{**good, name: bad})


def test_a_python_number_is_a_time() -> None:
    found, same = (losses.perturb(VP, X, t, Z) for t in (0.5, jnp.asarray(0.5)))
    np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_a_python_float_is_a_time_of_every_process(sde: sdes.SDE) -> None:
    for name in OF_TIMES:
        found, same = (getattr(sde, name)(t) for t in (0.5, jnp.asarray(0.5)))
        np.testing.assert_allclose(found, same, rtol=1e-5)


def test_a_process_of_the_user_refuses_integer_times_without_code_for_it() -> None:
    class Straight(sdes.SDE):
        def mean_coef(self, t: Any) -> Any:
            return 1 - t

        def std(self, t: Any) -> Any:
            """The docstring of the user."""
            return t

    assert Straight().std(t=T) == T and Straight.std.__doc__ == "The docstring of the user."
    for name in OF_TIMES:
        with pytest.raises(ValueError, match="t is int: give floating-point numbers"):
            getattr(Straight(), name)(1)


def test_the_remedy_for_an_old_key_is_named_and_works() -> None:
    with pytest.raises(ValueError, match=r"key is uint32 of shape \(2,\): give one jax.random.key"):
        losses.dsm(score, VP, X, T, OLD)
    with pytest.raises(ValueError, match="jax.random.wrap_key_data makes keys"):
        jax.jit(lambda key: losses.dsm(score, VP, X, T, key))(OLD)
    with pytest.raises(ValueError, match="jax.random.wrap_key_data makes keys"):
        jax.vmap(lambda key: losses.dsm(score, VP, X, T, key))(jax.random.split(OLD, 2))
    found = losses.dsm(score, VP, X, T, jax.random.wrap_key_data(OLD))
    assert found == losses.dsm(score, VP, X, T, KEY)
    each = jax.vmap(lambda key: losses.dsm(score, VP, X, T, key))(KEYS)
    np.testing.assert_allclose(each[0], losses.dsm(score, VP, X, T, KEYS[0]), rtol=1e-6)


def test_unknown_values_are_not_checked_and_nan_is_not_hidden() -> None:
    x = jax.jit(lambda pixels, u: bits.to_model(pixels, u, 16))(PIXELS, jnp.asarray(0.5))
    np.testing.assert_array_equal(x, bits.to_model(PIXELS, 0.5, 16))
    assert np.isnan(bits.to_model(PIXELS, NAN, 16)).all()
    moments = [distances.Moments.of(features) for features in (FEATURES, FEATURES * NAN)]
    assert np.isnan(distances.frechet(*moments))
    scalars.check_positive(jnp.asarray([0.1, 0.2]), "rho")
