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
    sdes,
    times,
)

pytestmark = pytest.mark.usefixtures("unchecked")

VP, EPS, KEY = sdes.VP(), 1e-3, jax.random.key(0)
FAST = ode.Solver(fixed_steps=3)
X, Z, T = np.full(3, 0.3, np.float32), np.full(3, -0.2, np.float32), np.float32(0.5)
U, PIXELS = np.array([0.1, 0.6], np.float32), np.array([1, 2, 3])
FEATURES = np.random.default_rng(0).normal(size=(9, 3))


def score(x: Any, t: Any, key: Any = None) -> Any:
    return -x


def control(size: int) -> bound.GaussianControl:
    return bound.GaussianControl(jnp.zeros(size), jnp.ones(size), None)


def elbo(x: Any = X, u: Any = U, size: int = 3, density: Any = None) -> Any:
    reduction = bound.Reduction(control(size), density)
    return bound.elbo(score, VP, x, KEY, eps=EPS, u=u, reduction=reduction)


def decoded(pixels: Any = PIXELS, u: Any = U, levels: Any = 16, eps: float = EPS) -> Any:
    noise = discrete.Categorical(levels)
    return discrete.elbo(score, VP, pixels, KEY, eps=eps, u=u, noise=noise)


def tally(counts: Any = None, v: Any = U, values: Any = U, decay: float = 0.9) -> Any:
    return times.tally(jnp.zeros((2, 4)) if counts is None else counts, v, values, decay)


def denoiser(y: Any = X, out: Any = None, pixels: Any = PIXELS) -> Any:
    out = np.zeros((3, 16), np.float32) if out is None else out
    return integers.decoder_nats(out, y, np.float32(0.1), pixels, 16)


# A function, its good arguments, and by name what each must not be. A refusal names the argument.
TIMES: dict[str, Any] = {"t": (T[None], np.full(3, T), np.int32(1), np.array(True), "0.5", 1)}
EXAMPLES: dict[str, Any] = {"x": (X.astype(int), X > 0, X.tolist(), 0.3, None)}
LIKE_X: dict[str, Any] = {"z": (Z[None], Z[:1], Z[0], Z.astype(int), Z.tolist(), 0.1)}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "perturb": (
        lambda x, t, z: losses.perturb(VP, x, t, z),
        {"x": X, "t": T, "z": Z},
        TIMES | EXAMPLES | LIKE_X,
    ),
    "residual": (
        lambda s, t, z: losses.residual(VP, s, t, z, "original"),
        {"s": jnp.asarray(X), "t": T, "z": jnp.asarray(Z)},
        TIMES | {"s": (jnp.asarray(X[:1]), jnp.asarray(X.astype(int)))},
    ),
    "dsm": (
        lambda x, t: losses.dsm(score, VP, x, t, KEY),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
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
    "marginal": (VP.marginal, {"x": X, "t": T}, TIMES | EXAMPLES),
    "drift": (VP.drift, {"x": X, "t": T}, TIMES | EXAMPLES),
    "prediction": (
        lambda x, t: predictions.from_prediction(lambda x, t: x, "velocity", VP)(x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "prior_kl": (lambda x: bound.prior_kl(VP, x), {"x": X}, EXAMPLES),
    "logp": (
        lambda x, eps: likelihood.ode_logp(score, VP, x, KEY, eps=eps, solver=FAST),
        {"x": X, "eps": EPS},
        EXAMPLES | {"eps": (0.0, 1.0, -1.0, float("nan"))},
    ),
    "elbo": (
        elbo,
        {"x": X, "u": U, "size": 3, "density": jnp.ones(4)},
        EXAMPLES
        | {
            "u": (U[None], U[0], U + 1, PIXELS),
            "size": (1, 4),
            "density": (jnp.ones((2, 2)), jnp.array([1.0, 0.0]), -jnp.ones(4), jnp.ones(0)),
        },
    ),
    "discrete": (
        decoded,
        {"pixels": PIXELS, "u": U, "levels": 16, "eps": EPS},
        {
            "pixels": (PIXELS - 2, PIXELS + 13, PIXELS.astype(float), PIXELS.tolist(), 1),
            "u": (U[None], U - 1),
            "levels": (0, -16, 1, 16.5, 3),
            "eps": (0.0, 2.0),
        },
    ),
    "decoder": (
        lambda x, pixels: discrete.decoder_nats(x, pixels, 16, jnp.asarray(0.1)),
        {"x": X, "pixels": PIXELS},
        {"pixels": (PIXELS[:1], PIXELS[None], PIXELS - 2, PIXELS * 9, PIXELS.astype(float))},
    ),
    "denoiser": (
        denoiser,
        {"y": X, "pixels": PIXELS},
        {
            "y": (X.astype(int), X[:1]),
            "pixels": (PIXELS[:1], PIXELS - 2, PIXELS + 13, PIXELS.astype(float)),
        },
    ),
    "smallest_time": (
        lambda levels, eps, tau: discrete.smallest_time(VP, levels, eps, tau),
        {"levels": 16, "eps": EPS, "tau": 3.0},
        {"levels": (0, -1, 16.5), "eps": (0.0, 1.0, -1.0), "tau": (0.0, -1.0, float("nan"))},
    ),
    "truncated_normal": (
        discrete.truncated_normal,
        {"e": X, "tau": 3.0},
        {"tau": (0.0, -3.0, float("nan"))},
    ),
    "transport": (
        lambda x, t0, t1: ode.transport(score, VP, x, t0, t1, FAST),
        {"x": X, "t0": EPS, "t1": 1.0},
        EXAMPLES | {"t0": (-1.0, 2.0, float("nan")), "t1": (-1.0, 2.0, float("inf"))},
    ),
    "solve": (
        lambda y, t0: ode.solve(lambda t, y: -y, y, t0, 1.0, FAST),
        {"y": X, "t0": EPS},
        {"y": (X.astype(int), X > 0), "t0": (-1.0, float("nan"), float("inf"))},
    ),
    "sampler": (
        lambda z: samplers.ReverseDiffusion(3)(score, VP, z, KEY, eps=EPS),
        {"z": X},
        {"z": (X.astype(int), X > 0)},
    ),
    "lattice": (
        times.lattice,
        {"key": KEY, "n": 4, "draws": 2},
        {"n": (0, -1, 4.5, np.array([2, 2])), "draws": (0, -1, 2.5)},
    ),
    "iid": (times.iid, {"key": KEY, "n": 4, "draws": 2}, {"n": (0, -1, 4.5), "draws": (0, -1)}),
    "grid": (lambda n: times.Grid(n).at(U), {"n": 5}, {"n": (0, 1, -5, 5.5, np.array([2, 2]))}),
    "tally": (
        tally,
        {"decay": 0.9},
        {
            "counts": (jnp.zeros((1, 4)), jnp.zeros(4), jnp.zeros(())),
            "v": (U[None], U + 1, U[:1]),
            "values": (U[None], U[:1]),
            "decay": (-0.1, 1.1, float("nan")),
        },
    ),
    "floored": (
        times.with_floor,
        {"scale": jnp.ones(4), "floor": 0.1},
        {"scale": (jnp.ones((2, 2)), 1.0), "floor": (0.0, 1.1, -1.0, float("nan"))},
    ),
    "levels": (
        lambda t: VP.levels(30).std(t),
        {"t": jnp.asarray(0.5)},
        {"t": (jnp.asarray(1), jnp.asarray(True))},
    ),
    "control": (
        lambda noise_variance: bound.GaussianControl.fit(FEATURES, noise_variance=noise_variance),
        {"noise_variance": 0.1},
        {"noise_variance": (-0.1, float("nan"), float("inf"))},
    ),
    "to_model": (
        bits.to_model,
        {"pixels": PIXELS, "u": 0.5, "levels": 16},
        {"levels": (0, -1, 1.5)},
    ),
    "to_pixels": (bits.to_pixels, {"x": X, "levels": 16}, {"levels": (0, -16, 257, 16.5)}),
    "bits_per_dim": (
        bits.bits_per_dim,
        {"nll": 1.0, "shape": (3,), "levels": 16},
        {"levels": (0, -16, 16.5)},
    ),
    "directions": (
        lambda vs: divergence.quadratic_forms(lambda x: -x, X, vs),
        {"vs": np.ones((2, 3), np.float32)},
        {"vs": (X, np.ones((2, 1), np.float32))},
    ),
    "moments": (
        distances.Moments.of,
        {"features": FEATURES},
        {"features": (FEATURES[0], FEATURES[..., None], FEATURES + 0j, FEATURES[:1])},
    ),
    "kernel": (
        distances.kernel,
        {"x": FEATURES, "y": FEATURES},
        {"x": (FEATURES[:, :1], FEATURES[0], FEATURES[None]), "y": (FEATURES[:1], FEATURES + 0j)},
    ),
    "frechet": (
        lambda y: distances.frechet(distances.Moments.of(FEATURES), distances.Moments.of(y)),
        {"y": FEATURES},
        {"y": (FEATURES[:, :1], FEATURES[:, :2])},
    ),
    "inception_score": (
        distances.inception_score,
        {"probabilities": np.full((4, 2), 0.5)},
        {"probabilities": (np.full((4, 2), 0.4), np.full((4, 2, 1), 0.5), FEATURES)},
    ),
    "nearest": (
        distances.nearest,
        {"x": FEATURES, "others": FEATURES},
        {"x": (FEATURES[:, :1],), "others": (FEATURES[..., None], FEATURES[:0])},
    ),
    "mean_interval": (
        intervals.mean_interval,
        {"values": X},
        {"values": (X[None], X[0], X + 0j, X[:0])},
    ),
    "repeated_stderr": (
        intervals.repeated_stderr,
        {"first": X, "second": Z, "n": 3},
        {"first": (X[:1], X[None]), "second": (Z[:1], 0.1), "n": (0, -1)},
    ),
    "outliers": (intervals.outliers, {"values": X}, {"values": (X[None], 0.3)}),
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
