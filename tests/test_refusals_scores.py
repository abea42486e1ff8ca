"""Losses, likelihoods and samplers refuse arguments that they do not document."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
from refusals import (
    BAD_KEYS,
    COUNTS,
    DISCRETE,
    EPS,
    EPSILONS,
    EXAMPLES,
    FAST,
    FEATURES,
    INFINITY,
    KEY,
    KEYS,
    LIKE_X,
    MAYBE_KEYS,
    NAN,
    NOT_A_NUMBER,
    OLD,
    PIXELS,
    TIMES,
    UP_TO_END,
    VP,
    Cases,
    T,
    U,
    X,
    Z,
    score,
)

from sbml import likelihood, losses, samplers
from sbml.density import Density
from sbml.likelihood import bound, ode
from sbml.networks import mlp
from sbml.samplers import known
from sbml.score import Adapter, from_prediction
from sbml.score.divergence import Trace

pytestmark = pytest.mark.usefixtures("unchecked")

BATCH, SPREAD = np.stack([X, Z]), np.array([0.3, 0.7], np.float32)
IMAGE = np.full((4, 4, 3), 0.1, np.float32)


def control(size: int) -> bound.GaussianControl:
    return bound.GaussianControl(jnp.zeros(size), jnp.ones(size), None)


def elbo(x: Any = X, u: Any = U, size: int = 3, density: Any = None, key: Any = KEY) -> Any:
    reduction = bound.Reduction(control(size), density)
    return bound.elbo(score, VP, x, key, eps=EPS, u=u, reduction=reduction)


def density(**choices: Any) -> Density:
    return Density(**{"score": score, "sde": VP, "shape": (3,), "solver": FAST, **choices})


def dsm_batch(x: Any = BATCH, t: Any = SPREAD, keys: Any = KEYS, signs: Any = None) -> Any:
    return losses.dsm_batch(score, VP, x, t, keys, signs=signs)


def path(sampler: Any, z: Any, key: Any, eps: Any, frames: Any, sde: Any) -> Any:
    return sampler.path(score, sde, z, key, eps=eps, frames=frames)


CASES: Cases = {
    "perturb": (
        lambda x, t, z: losses.perturb(VP, x, t, z),
        {"x": X, "t": T, "z": Z},
        UP_TO_END | EXAMPLES | LIKE_X,
    ),
    "residual": (
        lambda s, t, z: losses.residual(VP, s, t, z, "original"),
        {"s": jnp.asarray(X), "t": T, "z": jnp.asarray(Z)},
        UP_TO_END | {"s|score": (jnp.asarray(X[:1]), jnp.asarray(X.astype(int)))},
    ),
    "dsm": (
        lambda x, t, key: losses.dsm(score, VP, x, t, key),
        {"x": X, "t": T, "key": KEY},
        UP_TO_END | EXAMPLES | BAD_KEYS,
    ),
    "dsm_batch": (
        dsm_batch,
        {"x": BATCH, "t": SPREAD, "keys": KEYS, "signs": np.array([1.0, -1.0])},
        {
            "x": (X, BATCH.astype(int), BATCH.tolist(), 0.3, None),
            "t": (T, SPREAD[:1], SPREAD.astype(int), SPREAD.tolist(), 0.5, -SPREAD, SPREAD + 1),
            "keys": (KEY, jax.random.split(OLD, 2), KEYS[:1], None),
            "signs": (
                np.array([2.0, 3.0]),
                np.array([True, False]),
                SPREAD[:1],
                1.0,
                [1.0, -1.0],
                "+-",
            ),
        },
    ),
    "weight": (
        lambda t: losses.weight(VP, t, "original"),
        {"t": T},
        {"t": (1, True, np.int32(1), [0.5])},
    ),
    "noise_error": (
        lambda x, t, z: bound.noise_error(score, VP, x, t, z),
        {"x": X, "t": T, "z": Z},
        TIMES | EXAMPLES | LIKE_X,
    ),
    "prior_kl": (lambda x: bound.prior_kl(VP, x), {"x": X}, EXAMPLES),
    "variance": (
        lambda variance: bound.prior_kl(VP, X, variance),
        {"variance": 0.5},
        {"variance": (0.0, -1.0, NAN, X, *NOT_A_NUMBER)},
    ),
    "elbo": (
        elbo,
        {"x": X, "u": U, "size": 3, "density": jnp.ones(4), "key": KEY},
        EXAMPLES
        | BAD_KEYS
        | {
            "u": (U[None], U[0], U + 1, PIXELS, U.tolist(), U[:0]),
            "size|control": (1, 4),
            "density": (jnp.ones((2, 2)), jnp.array([1.0, 0.0]), -jnp.ones(4), jnp.ones(0)),
        },
    ),
    "elbo's choices": (
        lambda **choices: bound.elbo(score, VP, X, KEY, eps=EPS, u=U, **choices),
        {"trace": None},
        {"trace": ("exact",), "reduction": (None, control(3))},
    ),
    "pilot": (
        lambda x, key, eps, bins: bound.pilot(score, VP, x, key, eps=eps, bins=bins),
        {"x": BATCH, "key": KEY, "eps": EPS, "bins": 2},
        BAD_KEYS
        | EPSILONS
        | {"x": (BATCH.astype(int), BATCH.tolist(), X[0]), "bins": (*COUNTS, 2**40)},
    ),
    "control": (
        lambda noise_variance, x: bound.GaussianControl.fit(x, noise_variance=noise_variance),
        {"noise_variance": 0.1, "x": FEATURES},
        {
            "noise_variance": (-0.1, NAN, INFINITY, *NOT_A_NUMBER),
            "x": (FEATURES + 0j, FEATURES * NAN, FEATURES[0, 0]),
        },
    ),
    "control's noise": (
        lambda x_t, t: control(3).noise(VP, x_t, t),
        {"x_t": X, "t": T},
        TIMES | {"x_t|control": (*EXAMPLES["x"], X[:1])},
    ),
    "control's integral": (
        lambda x, eps: control(3).integral(VP, x, eps),
        {"x": X, "eps": EPS},
        EPSILONS | {"x": (*EXAMPLES["x"], X[:1])},
    ),
    "control's size": (
        lambda size: bound.diffusion_dsm(score, VP, X, T, Z, control(size)),
        {"size": 3},
        {"size|control": (1, 4)},
    ),
    "logp": (
        lambda x, key, eps, sde: likelihood.ode_logp(score, sde, x, key, eps=eps, solver=FAST),
        {"x": X, "key": KEY, "eps": EPS, "sde": VP},
        EXAMPLES | BAD_KEYS | EPSILONS | DISCRETE,
    ),
    "logp's choices": (
        lambda **choices: likelihood.ode_logp(
            score, VP, X, KEY, eps=EPS, **{"solver": FAST, **choices}
        ),
        {},
        {"trace": ("exact", None), "solver": ("tsit5", None)},
    ),
    "exact logp": (
        lambda key: likelihood.ode_logp(
            score, VP, X, key, eps=EPS, solver=FAST, trace=Trace("exact")
        ),
        {"key": None},
        MAYBE_KEYS,
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
    "prediction": (
        lambda x, t: from_prediction(lambda x, t: x, "velocity", VP)(x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "flow": (
        lambda x, t0, t1: ode.flow(score, VP, x, t0, t1, FAST),
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
    "adapter": (
        lambda **choices: Adapter(mlp.Model(), VP, **choices).time_label(T[None]),
        {"data_std": 0.5},
        {"data_std": (0.0, NAN, "a", 1e-320), "time_scale": (0.0, INFINITY, "a", 1e-320)},
    ),
    "solver": (
        lambda **choices: ode.Solver(**choices).tighter(10).rtol,
        {"fixed_steps": 3},
        {
            "fixed_steps": (*COUNTS, 10_001),
            "max_steps": (*COUNTS, None, 2**31 - 1),
            "rtol": (0.0, -1.0, INFINITY, "a", 1.1),
            "atol": (0.0, NAN, "a"),
            "pcoeff": (NAN, INFINITY, -0.1, "a", 1e-320),
            "icoeff": (NAN, INFINITY, -1.0, 0.0, "a", 1e-320),
            "first_step": (1e-320, 1e39),
        },
    ),
    "denoise": (
        lambda x, t: samplers.denoise(score, VP, x, t),
        {"x": X, "t": T},
        TIMES | EXAMPLES,
    ),
    "sampler": (
        lambda z, key, eps, sde: samplers.ReverseDiffusion(3)(score, sde, z, key, eps=eps),
        {"z": X, "key": KEY, "eps": EPS, "sde": VP},
        {"z": EXAMPLES["x"]} | BAD_KEYS | EPSILONS | DISCRETE,
    ),
    "ode sampler": (
        lambda z, key, eps, sde, solver: samplers.ODE(solver)(score, sde, z, key, eps=eps),
        {"z": X, "key": None, "eps": EPS, "sde": VP, "solver": FAST},
        {"z|x": EXAMPLES["x"], "solver": ("tsit5", None)} | MAYBE_KEYS | EPSILONS | DISCRETE,
    ),
    "path": (
        lambda z, key, eps, frames, sde: path(samplers.DDIM(3), z, key, eps, frames, sde),
        {"z": X, "key": KEY, "eps": EPS, "frames": 3, "sde": VP},
        {"z": EXAMPLES["x"], "frames": (*COUNTS, 2**40)} | BAD_KEYS | EPSILONS | DISCRETE,
    ),
    "ode path": (
        lambda z, key, eps, frames, sde: path(samplers.ODE(FAST), z, key, eps, frames, sde),
        {"z": X, "key": None, "eps": EPS, "frames": 3, "sde": VP},
        {"z": EXAMPLES["x"], "frames": (*COUNTS, 2**40)} | MAYBE_KEYS | EPSILONS | DISCRETE,
    ),
    "sampler's choices": (
        lambda steps, snr, eta: (
            samplers.DDIM(steps, eta=eta, corrector=samplers.Langevin(steps, snr)).nfe
        ),
        {"steps": 3, "snr": 0.1, "eta": 0.5},
        {
            "steps": (*COUNTS, 2**40),
            "snr": (0.0, -0.1, NAN, INFINITY, "a", 1e-320),
            "eta": (-0.1, 1.1, NAN, *NOT_A_NUMBER),
        },
    ),
    "corrector": (
        lambda corrector: samplers.ReverseDiffusion(5, corrector=corrector).nfe,
        {"corrector": samplers.Langevin()},
        {"corrector": ("langevin", samplers.Langevin, type(samplers.DDIM().corrector), None)},
    ),
    "complete": (
        lambda x, mask, key, eps: known.complete(
            score, VP, x, mask, key, eps=eps, sampler=samplers.DDIM(2)
        ),
        {"x": IMAGE, "mask": np.ones((4, 4, 1)), "key": KEY, "eps": EPS},
        {"x|x_0": EXAMPLES["x"][:3], "mask": (0.5, 2.0, -1, NAN), **BAD_KEYS, **EPSILONS},
    ),
    "ode_sample": (
        lambda key, eps, sde: samplers.ode_sample(score, sde, (3,), key, eps=eps, solver=FAST),
        {"key": KEY, "eps": EPS, "sde": VP},
        BAD_KEYS | EPSILONS | DISCRETE,
    ),
    "number of steps of the samplers": (
        lambda steps: [kind(steps).nfe for kind in (samplers.DPMSolver, samplers.Midpoint)],
        {"steps": 10_000},
        {"steps": (*COUNTS, 10_001)},
    ),
    "trace": (
        lambda probes: Trace("gaussian", probes).probes,
        {"probes": 4_096},
        {"probes": (*COUNTS, 4_097)},
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
            "budget": (-1.0, NAN, INFINITY),
            "subset": COUNTS,
            "trace": ("exact",),
            "eps": [eps for eps in EPSILONS["eps"] if eps is not None],
            **DISCRETE,
        },
    ),
    "density's samples": (
        lambda key, n: density(levels=16).sample(key, n),
        {"key": KEY, "n": 2},
        BAD_KEYS | {"n": COUNTS},
    ),
    "density's bound": (
        lambda **choices: density().bound(BATCH, **choices).values,
        {"sweeps": 2, "times_each": 1},
        {
            "sweeps": (*COUNTS, 1, 2**40),
            "times_each": (*COUNTS, 2**40),
            "steps": (*COUNTS, 2**40),
        },
    ),
}


documented, test_the_rest_is_refused = refusals.tests_of(CASES)
test_what_is_documented_is_accepted = pytest.mark.slow(documented)
