"""SDEs with any functions alpha and sigma: where their ODE ends, and which of them are refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml import likelihood
from sbml.core.types import Array
from sbml.likelihood import ode
from sbml.score import from_prediction
from sbml.score.divergence import Trace
from sbml.sdes import SDE, VP, LinearVE, Schedule

pytestmark = pytest.mark.usefixtures("x64")


# alpha(1) = 0. The slope of alpha there is infinite in the first two cases, and 0 in the others. In
# the last one, rounding makes alpha(1) larger than 0.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [
        (lambda t: jnp.sqrt(1 - t**2), lambda t: t),
        (lambda t: jnp.sqrt(1 - t), jnp.sqrt),
        (lambda t: (1 - t) ** 2, lambda t: jnp.sqrt(1 - (1 - t) ** 4)),
        (
            lambda t: jnp.cos(jnp.pi / 2 * t) ** 2,
            lambda t: jnp.sqrt(1 - jnp.cos(jnp.pi / 2 * t) ** 4),
        ),
    ],
)
def test_the_ode_ends_before_T_if_x_T_does_not_determine_the_data(
    alpha: Callable[[Array], Array], sigma: Callable[[Array], Array]
) -> None:
    """The score is exact for data N(0, 1/4), whose log-likelihood is known."""
    sde = Schedule(alpha, sigma, smallest_time=1e-2)
    assert sde.last_regular_time == sde.largest_time < sde.T

    def denoised(x: Array, t: Array) -> Array:
        return 0.25 * alpha(t) / (0.25 * alpha(t) ** 2 + sigma(t) ** 2) * x

    x, eps = jnp.asarray([0.3, -0.5]), jnp.asarray(sde.smallest_time)
    score = from_prediction(denoised, "x0", sde)
    how = {"eps": sde.smallest_time, "trace": Trace("exact"), "solver": ode.Solver()}
    found = jax.jit(lambda x: likelihood.ode_logp(score, sde, x, None, **how).logp)(x)
    variance = 0.25 * alpha(eps) ** 2 + sigma(eps) ** 2
    exact = -0.5 * jnp.sum(x**2) / variance - jnp.log(2 * jnp.pi * variance)
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_the_ode_ends_before_T_also_if_alpha_at_T_is_NaN_by_rounding() -> None:
    """In float32 cos(pi / 2) is negative, so alpha(1) is NaN."""

    def square(t: Array) -> Array:
        return jnp.cos(jnp.pi / 2 * t)

    sde = Schedule(lambda t: jnp.sqrt(square(t)), lambda t: jnp.sqrt(1 - square(t)))
    with jax.enable_x64(False):
        assert sde.last_regular_time == sde.largest_time < sde.T
    for regular in (sbml.RectifiedFlow(), sbml.Cosine(), VP(), LinearVE(80.0)):
        with jax.enable_x64(False):
            assert regular.last_regular_time == regular.T
        assert regular.last_regular_time == regular.T


@pytest.mark.slow
def test_a_traced_schedule_with_alpha_0_at_T_has_the_likelihood_of_the_static_one() -> None:
    def alpha(power: Array, t: Array) -> Array:
        return 1 - t**power

    sde = Schedule(jax.tree_util.Partial(alpha, 3.0), lambda t: t, smallest_time=1e-2)

    def logp(sde: SDE, x: Array) -> Array:
        def denoised(x: Array, t: Array) -> Array:
            variance = 0.25 * sde.mean_coef(t) ** 2 + sde.std(t) ** 2
            return 0.25 * sde.mean_coef(t) / variance * x

        how = {"trace": Trace("exact"), "solver": ode.Solver("heun", fixed_steps=6)}
        score = from_prediction(denoised, "x0", sde)
        return likelihood.ode_logp(score, sde, x, None, eps=1e-2, **how).logp

    x = jnp.asarray([0.3, -0.5])
    static = jax.jit(lambda x: logp(sde, x))(x)
    assert sde.last_regular_time == sde.T > sde.largest_time
    np.testing.assert_allclose(jax.jit(logp)(sde, x), static, rtol=1e-9)


def test_a_coefficient_may_be_a_constant() -> None:
    class Constant(SDE):
        def mean_coef(self, t: Array) -> float:  # type: ignore[override]
            return 1.0

        def std(self, t: Array) -> Array:
            return 10 * t

    t = jnp.asarray([0.1, 0.5])
    np.testing.assert_allclose(Constant().log_snr(t), LinearVE(10.0).log_snr(t), rtol=1e-12)
    np.testing.assert_array_equal(Constant().mean_coef(t), np.ones(2))


def test_a_smallest_time_at_which_sigma_rounds_to_zero_is_refused() -> None:
    def alpha(t: Array) -> Array:
        return jnp.cos(jnp.pi / 2 * t)

    cancelling = Schedule(alpha, lambda t: jnp.sqrt(1 - alpha(t) ** 2))
    with jax.enable_x64(False), pytest.raises(ValueError, match="its log-SNR is inf at t=1e-05"):
        cancelling.check_time(1e-5)
    assert cancelling.check_time(1e-5) == 1e-5  # In float64, sigma is not 0.
