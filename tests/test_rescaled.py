"""Models of data in other units, and the noise levels of DDPM's schedules."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sbml
from sbml.score import Adapter, from_prediction
from sbml.sdes import VE, VP, BetaSchedule, RectifiedFlow, Rescaled

pytestmark = pytest.mark.usefixtures("x64")

SCALE, SHIFT, MEAN, STD = 256 / 255, 0.3, 0.2, 0.4
X = np.random.default_rng(0).normal(size=(4, 3))


def noise(sde, y, t):
    """E[z | y_t] for y ~ N(MEAN, STD^2)."""
    alpha, sigma = sde.mean_coef(t), sde.std(t)
    return sigma / ((alpha * STD) ** 2 + sigma**2) * (y - alpha * MEAN)


def prediction(kind, sde, y, t):
    alpha, sigma, e = sde.mean_coef(t), sde.std(t), noise(sde, y, t)
    if kind == "noise":
        return e
    # E[y_0 | y_t], without a division by alpha
    y_0 = MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (y - alpha * MEAN)
    return {"x0": y_0, "velocity": alpha * e - sigma * y_0, "flow": e - y_0}[kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sde"),
    [
        ("x0", VE(sigma_max=20.0)),
        ("flow", RectifiedFlow()),
    ],
)
def test_log_p_is_that_of_the_models_data_by_the_change_of_variables(kind, sde) -> None:
    """log p(x) = log p_y(scale x) + d log(scale). With a shift, the prior of x has another mean;
    the score with a shift is tested below."""

    def logp(process, data):
        score = from_prediction(lambda y, t: prediction(kind, sde, y, t), kind, process)
        solver = sbml.ode.Solver("dopri5", rtol=1e-8, atol=1e-8)
        return sbml.Density(score, process, (3,), eps=1e-3, solver=solver).log_prob(data)

    found, expected = logp(Rescaled(sde, SCALE), X), logp(sde, SCALE * X) + 3 * np.log(SCALE)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_coefficients_are_those_that_autodiff_derives() -> None:
    given, t = Rescaled(VP(), SCALE, SHIFT), jnp.linspace(0.01, 1, 7)
    derived = sbml.Schedule(given.mean_coef, given.std)
    for name in ("log_snr", "rate", "drift_coef", "diffusion"):
        one, other = getattr(given, name)(t), getattr(derived, name)(t)
        np.testing.assert_allclose(one, other, rtol=1e-9)
    np.testing.assert_allclose(given.slopes(t), derived.slopes(t), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(given.time(given.log_snr(t)), t, rtol=1e-9)
    assert given.prior_std == 1 / SCALE and given.smallest_time == VP.smallest_time


class Velocity(nn.Module):
    """A network that predicts the velocity. Its input is y / sqrt(v), where v = (alpha STD)^2 +
    sigma^2 is the variance of y, and its label is 100 t."""

    sde: sbml.sdes.SDE

    def __call__(self, u, label, *, train):
        t = label[0] / 100
        v = (self.sde.mean_coef(t) * STD) ** 2 + self.sde.std(t) ** 2
        return prediction("velocity", self.sde, jnp.sqrt(v) * u, t)


@pytest.mark.parametrize("sde", [VP(), RectifiedFlow()])
def test_a_network_of_this_package_has_the_score_of_the_foreign_one(sde) -> None:
    rescaled, x, t = Rescaled(sde, SCALE, SHIFT), jnp.asarray(X[0]), jnp.asarray(0.37)
    options = {"parameterization": "velocity", "data_std": STD, "time_scale": 100.0}
    ours = Adapter(Velocity(sde), rescaled, **options)({})
    foreign = from_prediction(lambda y, t: prediction("velocity", sde, y, t), "velocity", rescaled)
    np.testing.assert_allclose(ours(x, t, None), foreign(x, t), rtol=1e-12)
    seen = SCALE * x + sde.mean_coef(t) * SHIFT
    np.testing.assert_allclose(foreign(x, t), -noise(sde, seen, t) / rescaled.std(t), rtol=1e-12)
    x_0 = (seen - sde.std(t) * noise(sde, seen, t)) / sde.mean_coef(t)
    for score in (ours, foreign):
        if score.predictions is not None:
            denoised, _ = score.predictions(x, t)
            np.testing.assert_allclose(denoised, (x_0 - SHIFT) / SCALE, rtol=1e-12)


def test_betas_are_those_of_ddpm() -> None:
    def of(schedule, **options):
        return np.asarray(BetaSchedule(schedule, **options).alpha_bars)

    n, linear = 1000, of("linear")
    betas = [1e-4 + (0.02 - 1e-4) * i / (n - 1) for i in range(n)]
    np.testing.assert_allclose(linear, np.cumprod(1 - np.array(betas)), rtol=1e-9)
    assert linear[-1] == pytest.approx(4.0358e-5, rel=1e-4)  # DDPM's published value
    ends = {"beta_start": 0.0004, "beta_end": 0.0121}
    roots = [0.02 + (0.11 - 0.02) * i / (n - 1) for i in range(n)]
    scaled = np.cumprod([1 - root**2 for root in roots])
    np.testing.assert_allclose(of("scaled_linear", **ends), scaled, rtol=1e-9)
    cosine = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    found = of("squaredcos_cap_v2")
    # Before the cap acts, the product telescopes.
    np.testing.assert_allclose(found[:-1], (cosine[1:] / cosine[0])[:-1], rtol=1e-9)
    assert found[-1] == pytest.approx(found[-2] * 0.001, rel=1e-9)
    sigmoid = of("sigmoid", beta_start=0.1, beta_end=0.3, steps=20)
    assert 1 - sigmoid[0] == pytest.approx(0.1 + 0.2 / (1 + np.exp(6)))
    assert 1 - sigmoid[-1] / sigmoid[-2] == pytest.approx(0.1 + 0.2 / (1 + np.exp(-6)))
