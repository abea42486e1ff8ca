"""SDEs derived from alpha and sigma, compared with closed forms; SDEs as pytrees; the table."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.special
from families import EVERY_SDE

import sbml
from sbml import likelihood, losses
from sbml.audit import oracle
from sbml.core.types import Array, Key
from sbml.likelihood import bound, discrete, ode
from sbml.score.divergence import Trace
from sbml.sdes import EDM, SDE, SDES, VE, VP, AlphaBarTable, LinearVE, Schedule, times
from sbml.sdes.vdm import MonotoneGamma

pytestmark = pytest.mark.usefixtures("x64")

TIMES = np.array([1e-5, 1e-4, 1e-3, 0.03, 0.2, 0.5, 0.9])
DERIVED = ("drift_coef", "diffusion", "log_snr", "rate")


@dataclasses.dataclass(frozen=True)
class Derived(SDE):
    """An SDE that has only alpha and sigma of another SDE."""

    original: SDE

    def mean_coef(self, t: Array) -> Array:
        return self.original.mean_coef(t)

    def std(self, t: Array) -> Array:
        return self.original.std(t)


@functools.partial(jax.jit, static_argnums=0)
def coefficients(sde: SDE, t: Array) -> dict[str, Array]:
    return {name: getattr(sde, name)(t) for name in (*DERIVED, "mean_coef", "std")}


@pytest.fixture(params=EVERY_SDE, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


@pytest.mark.parametrize("name", DERIVED)
def test_derived_coefficients_equal_the_closed_forms(name: str, sde: SDE) -> None:
    t = np.append(TIMES, sde.largest_time)
    expected = np.asarray(coefficients(sde, t)[name])
    scale = np.abs(expected) + 1e-14 * np.abs(expected).max()
    error = np.abs(coefficients(Derived(sde), t)[name] - expected)
    assert (error <= 2e-12 * scale + 1e-15).all()  # alpha itself has a rounding error of 1e-16.
    t = t.astype(np.float32)
    single = coefficients(Derived(sde), t)[name]
    assert single.dtype == jnp.float32
    exact = coefficients(sde, t.astype(float))[name]
    np.testing.assert_allclose(single, exact, rtol=3e-5, atol=2e-6)


@pytest.mark.slow
def test_the_inverse_is_exact_at_every_scale_and_of_every_shape(sde: SDE) -> None:
    derived = Derived(sde)
    t = jnp.asarray(np.append(np.geomspace(1e-9, 0.9, 14), sde.largest_time)).reshape(3, 5)
    inverse = derived.time(derived.log_snr(t))
    # An error of one unit in lambda's last place changes t by this fraction.
    unit = 4e-16 * (1 + np.abs(derived.log_snr(t)) / (t * derived.rate(t)))
    assert inverse.shape == (3, 5) and (np.abs(inverse - t) <= 2 * unit * t).all()
    assert derived.time(jnp.asarray(1.0)).shape == ()
    # Outside the range of the log-SNR, the result is an end of the interval.
    assert 1 - 2e-16 < derived.time(jnp.asarray(-1e4)) <= 1
    assert derived.time(jnp.asarray(1e4)) < 1e-300
    assert np.isnan(derived.time(jnp.asarray(np.nan)))


def test_the_inverse_in_float32(sde: SDE) -> None:
    @jax.jit
    def inverted(t: Array) -> tuple[Array, Array, Array]:
        log_snr = Derived(sde).log_snr(t)
        inverse = Derived(sde).time(log_snr)
        return log_snr, inverse, sde.log_snr(inverse.astype(float))

    log_snr, inverse, again = inverted(np.geomspace(1e-5, 0.9, 50).astype(np.float32))
    assert inverse.dtype == jnp.float32
    np.testing.assert_allclose(again, np.asarray(log_snr, float), rtol=4e-7, atol=4e-6)


def test_the_ends_of_derived_sdes(sde: SDE) -> None:
    derived = Derived(sde)
    assert derived.largest_time == pytest.approx(sde.largest_time, rel=1e-14)
    assert derived.prior_std == pytest.approx(float(sde.std(jnp.asarray(1.0))), rel=1e-14)
    last = jnp.asarray(sde.largest_time)
    ratio = float(sde.std(jnp.asarray(1.0)) / sde.std(last))
    assert derived.stretch == pytest.approx(ratio, rel=1e-12)
    assert sde.stretch == pytest.approx(ratio, rel=1e-12)
    if sde.largest_time < 1:
        assert float(sde.mean_coef(last) / sde.std(last)) == pytest.approx(1e-3, rel=1e-10)
    with jax.enable_x64(False):
        assert derived.largest_time == pytest.approx(sde.largest_time, rel=1e-6)
        assert derived.stretch == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("alpha_1", [0.0, 1e-9, -4e-8, math.nan])
def test_a_signal_below_rounding_counts_as_vanished(alpha_1: float) -> None:
    """In float32 cos(pi / 2) is -4e-8, which has no logarithm."""
    sde = Schedule(lambda t: jnp.where(t == 1, alpha_1, 1 - t), lambda t: t)
    assert sde.largest_time == pytest.approx(1 / 1.001, rel=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_a_schedule_may_have_constant_functions() -> None:
    sde, t = Schedule(lambda t: 1.0, lambda t: 80.0 * t, smallest_time=2e-3), jnp.asarray(TIMES)
    expected = LinearVE(80.0)
    for name, values in coefficients(expected, t).items():
        np.testing.assert_allclose(coefficients(sde, t)[name], values, rtol=1e-12)
    assert (sde.largest_time, sde.prior_std, sde.smallest_time) == (1.0, 80.0, 2e-3)
    of_integers = Schedule(lambda t: 1, lambda t: 80 * t)
    np.testing.assert_allclose(of_integers.slopes(t), expected.slopes(t), rtol=1e-12)
    assert of_integers.mean_coef(t).dtype == t.dtype
    with pytest.raises(ValueError, match=r"smallest_time is 0.0:.* in \(0, 1\)"):
        Schedule(lambda t: 1.0, lambda t: t, smallest_time=0.0)


def test_edm_runs_from_its_least_to_its_largest_noise() -> None:
    sde = EDM(sigma_min=0.01, sigma_max=50.0)
    assert float(sde.std(jnp.asarray(sde.smallest_time))) == pytest.approx(0.01)
    assert float(sde.std(jnp.asarray(1.0))) == sde.prior_std == 50.0
    with pytest.raises(ValueError, match="sigma_min=2.0, sigma_max=1.0: give"):
        EDM(sigma_min=2.0, sigma_max=1.0)


# SDEs as pytrees.


def test_numbers_are_leaves_and_all_else_is_static() -> None:
    assert jax.tree.leaves(VP(0.2, 10)) == [0.2, 10]
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(VE())]
    assert keys == [".sigma_max", ".sigma_min"]
    sde = Schedule(jnp.cos, jax.tree_util.Partial(jnp.multiply, jnp.asarray(2.0)))
    assert jax.tree.leaves(sde) == [2.0]
    doubled = jax.tree.map(lambda a: 2 * a, sde)
    assert doubled.std(jnp.asarray(0.1)) == 0.4 and doubled.alpha is jnp.cos
    assert jax.tree.leaves(VP().levels(100)) == []
    # Other objects in the place of leaves do not change the structure.
    empty = jax.tree.map(lambda _: object(), VP())
    assert jax.tree.structure(empty) == jax.tree.structure(VP())
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), VP(), VP(beta_max=5.0))
    stds = jax.vmap(lambda sde, t: sde.std(t), in_axes=(0, None))(many, jnp.asarray(0.5))
    each = [float(sde.std(jnp.asarray(0.5))) for sde in (VP(), VP(beta_max=5.0))]
    np.testing.assert_allclose(stds, each, rtol=1e-14)


def _score(x: Array, t: Array, key: Key | None) -> Array:
    return -x / (0.3 + t) + 0.2 * jnp.sin(x + t)


def _solved(sde: SDE, x: Array) -> dict[str, Array]:
    """A log-likelihood and its terms, the prior's divergence, and the inverse of log-SNR."""
    how = {"trace": Trace("exact"), "solver": ode.Solver("heun", fixed_steps=6)}
    result = likelihood.ode_logp(_score, sde, x, None, eps=1e-2, **how)
    found = {name: getattr(result, name) for name in ("logp", "divergence", "correction")}
    return {**found, "prior_kl": bound.prior_kl(sde, x), "time": sde.time(jnp.asarray(0.5))}


def _sampled(sde: SDE, x: Array) -> dict[str, Array]:
    """The bounds, a loss and the prior, each a smooth function of the SDE's leaves."""
    key, eps, u = jax.random.key(0), 1e-2, times.lattice(jax.random.key(1), 1, 4)[0]
    control = bound.GaussianControl(jnp.zeros(2), jnp.ones(2), None)
    elbo = functools.partial(bound.elbo, _score, sde, x, key, eps=eps, u=u)
    pixels = jnp.asarray([1, 2])
    how = {"noise": discrete.Categorical(4), "eps": eps, "u": u}
    return {
        "importance": elbo(reduction=bound.Reduction(control)).total,
        "uniform": elbo(reduction=bound.Reduction(proposal="uniform")).total,
        "integers": discrete.elbo(_score, sde, pixels, key, **how).total,
        "loss": losses.dsm(_score, sde, x, jnp.asarray(0.3), key),
        "prior": sde.prior_logp(x),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (VE(1.0, 0.1), _sampled),
        (Derived(VP(0.1, 8.0)), _solved),
    ],
)
def test_traced_sdes_give_the_numbers_of_static_ones_and_their_derivatives(
    kind: SDE, numbers: Callable[[SDE, Array], dict[str, Array]]
) -> None:
    x = jnp.asarray([0.3, -0.5])
    static = jax.jit(numbers, static_argnums=0)(kind, x)

    leaves, tree = jax.tree.flatten(kind)

    def along(h: Array) -> SDE:
        # Each leaf has another factor: some numbers do not change if all leaves have the same.
        return jax.tree.unflatten(tree, [(1 + i * h) * leaf for i, leaf in enumerate(leaves, 1)])

    @jax.jit
    def at(h: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        return jax.jvp(lambda h: numbers(along(h), x), (h,), (jnp.ones(()),))

    traced, slopes = at(jnp.zeros(()))
    for name, value in static.items():
        np.testing.assert_allclose(traced[name], value, rtol=1e-9, err_msg=name)
    h = 1e-5
    up, down = (at(jnp.asarray(step))[0] for step in (h, -h))
    for name in static:
        expected = (up[name] - down[name]) / (2 * h)
        np.testing.assert_allclose(slopes[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_the_gradient_of_the_bound_with_respect_to_beta_max() -> None:
    x, u = jnp.asarray([0.3, -0.5]), times.lattice(jax.random.key(1), 1, 4)[0]

    @jax.jit
    def total(sde: SDE) -> Array:
        return bound.elbo(_score, sde, x, jax.random.key(0), eps=1e-2, u=u).total

    gradient = jax.jit(jax.grad(total))(VP(0.1, 8.0))
    h = 1e-5
    expected = (total(VP(0.1, 8.0 + h)) - total(VP(0.1, 8.0 - h))) / (2 * h)
    assert float(gradient.beta_max) == pytest.approx(float(expected), rel=1e-7)


# The table of a discrete-time model.

BETAS = np.linspace(1e-4, 0.02, 1000)
TABLE = AlphaBarTable(np.cumprod(1 - BETAS))


def test_the_table_has_its_levels_at_their_times() -> None:
    @jax.jit
    def values(t: Array) -> tuple[Array, ...]:
        return TABLE.step(t), TABLE.mean_coef(t), TABLE.std(t), TABLE.time(TABLE.log_snr(t[1:]))

    i = np.arange(1000)
    step, mean_coef, std, time = values(i / 999)
    np.testing.assert_allclose(step, i, rtol=1e-14)
    np.testing.assert_allclose(np.square(mean_coef), TABLE.alpha_bars, rtol=1e-11)
    np.testing.assert_allclose(np.square(std), 1 - np.asarray(TABLE.alpha_bars), rtol=1e-11)
    np.testing.assert_allclose(time, i[1:] / 999, rtol=1e-12)
    assert TABLE.prior_std == TABLE.largest_time == 1.0
    assert hash(TABLE) == hash(AlphaBarTable(list(TABLE.alpha_bars)))


def test_between_its_levels_the_table_is_the_monotone_cubic() -> None:
    few = AlphaBarTable([0.99, 0.9, 0.899, 0.2, 0.01])
    t = np.linspace(0, 1, 401)
    cubic = scipy.interpolate.PchipInterpolator(
        np.arange(5) / 4, scipy.special.logit(few.alpha_bars)
    )
    inside = t[1:-1] + 1e-4
    single, double, rate = jax.jit(
        lambda t, inside: (few.log_snr(t.astype(jnp.float32)), few.log_snr(t), few.rate(inside))
    )(t, inside)
    np.testing.assert_allclose(double, cubic(t), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(rate, -cubic(inside, 1), rtol=1e-9)
    assert (np.diff(double) < 0).all()
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, cubic(t), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    "levels",
    [
        [0.9, 0.1, 0.05],
        pytest.param([0.9, 0.1, 0.0999, 0.0998], marks=pytest.mark.slow),
        [0.99, 0.985, 0.5, 0.4],
        [0.9, 0.4],
    ],
)
def test_a_table_that_flattens_at_an_end_has_noise_there(levels: list[float]) -> None:
    """SciPy's monotone cubic has the slope 0 at the last level of the first two, and at the first
    level of the third."""
    table = AlphaBarTable(levels)
    log_snr = np.asarray(jax.jit(table.log_snr)(np.linspace(0, 1, len(levels))))
    np.testing.assert_allclose(scipy.special.expit(log_snr), levels, rtol=1e-12)
    fine = np.linspace(0, 1, 4001)
    found = jax.jit(lambda t: (table.log_snr(t), table.rate(t), table.diffusion(t)))
    assert np.all(np.diff(found(fine)[0]) < 0)
    for t in (fine, fine.astype(np.float32)):
        _, rate, diffusion = map(np.asarray, found(t))
        chords = -np.diff(log_snr) * (len(levels) - 1)
        assert np.all(rate[[0, -1]] > 0.09 * chords[[0, -1]])
        assert np.all(rate > 0) and np.all(np.isfinite(diffusion))


def test_the_table_of_ddpm_is_near_its_limit() -> None:
    @jax.jit
    def difference(t: Array) -> Array:
        return TABLE.log_snr(t) - VP().log_snr((TABLE.step(t) + 1) / 1000)

    assert 1e-3 < np.abs(difference(np.linspace(0.05, 1, 50))).max() < 0.2


def test_a_table_is_printed_without_its_levels() -> None:
    text = "AlphaBarTable(3 levels, alpha_bars 0.9 .. 0.25)"
    assert repr(AlphaBarTable([0.9, 0.5, 0.25])) == text


# A user's own SDE in ``Density``.


@dataclasses.dataclass(frozen=True)
class Mine(SDE):
    """An SDE with the two required methods only, and alpha(1) = 0."""

    power: float = 2.0

    def mean_coef(self, t: Array) -> Array:
        return 1 - t**self.power

    def std(self, t: Array) -> Array:
        return t


def _data(sde: SDE) -> oracle.Gaussian:
    basis = np.array([[0.6, -0.8], [0.8, 0.6]])
    return oracle.Gaussian(sde, jnp.array([0.3, -0.2]), jnp.array([0.5, 0.1]), jnp.asarray(basis))


@pytest.mark.slow
def test_density_accepts_an_sde_of_two_methods() -> None:
    sde, eps = Mine(), 1e-2
    data = _data(sde)
    x = np.asarray(data.mean) + np.random.default_rng(1).normal(size=(6, 2)) * 0.5
    solver = ode.Solver(rtol=1e-6, atol=1e-6)
    density = sbml.Density(data.score, sde, (2,), eps=eps, solver=solver)
    exact = np.asarray([data.logp(jnp.asarray(row), jnp.asarray(eps)) for row in x])
    logp = density.logp(x)
    # The neglected signal at the largest time is 1e-3 |m| |z|, see ``sbml.score``.
    np.testing.assert_allclose(logp.values, exact, atol=2e-3)
    assert logp.converged
    at = [jnp.asarray(t) for t in (eps, sde.largest_time)]
    expected = [sde.stretch * data.flow(jnp.asarray(row), *at) for row in x]
    np.testing.assert_allclose(logp.latent, expected, atol=1e-4)


def test_density_refuses_an_sde_of_arrays() -> None:
    sde = jax.tree.map(jnp.asarray, VP())
    with pytest.raises(ValueError, match=r"jax.tree.map\(float, sde\)"):
        sbml.Density(_score, sde, (2,), eps=1e-3)
    assert hash(jax.tree.map(float, sde)) == hash(VP())


def test_density_compares_its_sde_with_that_of_the_score_only() -> None:
    """A score of other code may have an attribute of this name for something else."""

    def score(x: Array, t: Array, key: Key | None) -> Array:
        return -x

    for sde in ("vp", VP(), jax.tree.map(jnp.asarray, VP())):
        score.sde = sde
        sbml.Density(score, VP(), (2,))
    gamma = MonotoneGamma(5.0, -10.0, (1.0, 2.0), (0.0, 0.0), (1.0, 1.0))
    score.sde = dataclasses.replace(gamma, k3=jnp.ones(2))
    with pytest.raises(ValueError, match="of the score contains arrays.*tuples of floats"):
        sbml.Density(score, gamma, (2,))


@dataclasses.dataclass(frozen=True)
class Listed(SDE):
    """``VP`` with its coefficients in a list, so that it cannot be hashed."""

    beta: list[float]

    def mean_coef(self, t: Array) -> Array:
        return jnp.exp(-0.5 * (self.beta[0] * t + self.beta[1] * t**2))

    def std(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-(self.beta[0] * t + self.beta[1] * t**2)))


def test_an_sde_that_cannot_be_hashed_has_its_ends_and_is_checked() -> None:
    sde, x = Listed([0.1, 9.95]), jnp.array([0.3, -0.2])
    # The prior has the standard deviation sigma(1), so only the mean alpha(1) x is left.
    expected = 0.5 * (0.3**2 + 0.2**2) * math.exp(-10.05) / -math.expm1(-10.05)
    np.testing.assert_allclose(bound.prior_kl(sde, x), expected, rtol=1e-9)
    assert (sde.largest_time, sde.last_regular_time) == (1, 1)
    with pytest.raises(ValueError, match="its log-SNR"):
        Listed([5.0, -4.0]).check_time(0.5)
