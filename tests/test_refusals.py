"""Functions refuse arguments that they do not document, so that no wrong number comes back.

The other tests also check shapes and types behind the door (``shapes``). Users do not have these
checks, so the tests of refusals run without them. This file is about SDEs and draws of times.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
from refusals import (
    BAD_KEYS,
    DISCRETE,
    EPS,
    EPSILONS,
    EXAMPLES,
    INFINITY,
    KEY,
    KEYS,
    NAN,
    NOT_A_NUMBER,
    OLD,
    PIXELS,
    UP_TO_END,
    VP,
    Cases,
    T,
    U,
    X,
    Z,
    score,
)

from sbml import losses, samplers, sdes
from sbml.sdes import times

pytestmark = pytest.mark.usefixtures("unchecked")


def tally(counts: Any = None, v: Any = U, values: Any = U, decay: float = 0.9) -> Any:
    return times.tally(jnp.zeros((2, 4)) if counts is None else counts, v, values, decay)


CASES: Cases = {
    "marginal": (VP.marginal, {"x": X, "t": T}, UP_TO_END | EXAMPLES),
    "drift": (VP.drift, {"x": X, "t": T}, UP_TO_END | EXAMPLES),
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
        lambda mean_coefs, stds: sdes.Levels(mean_coefs, stds).std(T),
        {"mean_coefs": (0.9, 0.5), "stds": (0.1, 0.5)},
        {
            "mean_coefs": ((0.9, 0.5, 0.3), (0.9,), (NAN, 0.5), (-0.9, 0.5)),
            "stds": (
                (0.1, 0.5, 0.6),
                (0.0, 0.5),
                (-0.1, 0.5),
                (NAN, 0.5),
                (0.1, INFINITY),
                (1e-320, 0.5),
            ),
        },
    ),
    "schedule": (
        lambda alpha, sigma: sdes.Schedule(alpha, sigma).std(T),
        {"alpha": lambda t: 1 - t, "sigma": lambda t: t},
        {"alpha": (1.0, None), "sigma": (1.0, None)},
    ),
    "smallest time": (
        lambda smallest_time: sdes.Schedule(
            lambda t: 1 - t, lambda t: t, smallest_time=smallest_time
        ).std(T),
        {"smallest_time": 0.01},
        {"smallest_time": EPSILONS["eps"]},
    ),
    "gammas": (
        lambda gamma_0, gamma_1: sdes.LinearGamma(gamma_0, gamma_1).std(T),
        {"gamma_0": -13.0, "gamma_1": 5.0},
        {
            "gamma_0": (INFINITY, NAN, 6.0, *NOT_A_NUMBER),
            "gamma_1": (INFINITY, NAN, -14.0, *NOT_A_NUMBER),
        },
    ),
    **{
        f"{kind.__name__}'s {name}": (
            lambda kind=kind, **ends: kind(**ends).std(T),
            {name: getattr(kind(), name)},
            {name: (INFINITY, -INFINITY, NAN, -1.0, 0.0, *NOT_A_NUMBER)},
        )
        for kind in (sdes.VP, sdes.SubVP, sdes.VE, sdes.LinearVE, sdes.EDM)
        for name in (field.name for field in dataclasses.fields(kind))
    },
    "prior_logp": (VP.prior_logp, {"z": X}, {"z": EXAMPLES["x"]}),
    "prior_sample": (lambda key: VP.prior_sample(key, (3,)), {"key": KEY}, BAD_KEYS),
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
    "proposal's SDE": (
        lambda sde: times.Importance(sde, EPS).at(U),
        {"sde": VP},
        DISCRETE,
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
            "decay": (-0.1, 1.1, NAN, *NOT_A_NUMBER),
        },
    ),
    "floored": (
        times.with_floor,
        {"scale": jnp.ones(4), "floor": 0.1},
        {
            "scale": (jnp.ones((2, 2)), 1.0, [1.0, 2.0], jnp.ones(2) + 0j, jnp.ones(0)),
            "floor": (0.0, 1.1, -1.0, NAN, *NOT_A_NUMBER),
        },
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


test_what_is_documented_is_accepted, test_the_rest_is_refused = refusals.tests_of(CASES)


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
        with pytest.raises(ValueError, match=r"t is 1 \(int\): give floating-point numbers"):
            getattr(Straight(), name)(1)


@pytest.mark.parametrize(
    ("eta", "message"),
    [
        (1.1, "eta is 1.1: give a number in [0, 1]"),
        ("half", "eta is 'half' (str): give a number in [0, 1]"),
        (np.ones(2), "eta is float64 of shape (2,) in [1, 1]: give a number in [0, 1]"),
        (1e-320, "eta is 1e-320: give a number in the range of JAX's default precision, in [0, 1]"),
    ],
)
def test_a_message_has_the_value_and_the_range_and_a_type_only_if_it_is_wrong(
    eta: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        samplers.DDIM(eta=eta)


def test_the_remedy_for_an_old_key_is_named_and_works() -> None:
    with pytest.raises(
        ValueError, match=r"key is uint32 of shape \(2,\): .* \(of jax.random.key, or of"
    ):
        losses.dsm(score, VP, X, T, OLD)
    dsm = jax.jit(lambda key: losses.dsm(score, VP, X, T, key))
    for function, old in ((dsm, OLD), (jax.vmap(dsm), np.stack([OLD, OLD]))):
        with pytest.raises(ValueError, match="key .*jax.random.wrap_key_data"):
            function(old)
    np.testing.assert_array_equal(dsm(jax.random.wrap_key_data(OLD)), dsm(KEY))
    each = jax.vmap(dsm)(KEYS)
    np.testing.assert_allclose(each, [dsm(key) for key in KEYS], rtol=1e-6)
