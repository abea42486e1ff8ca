"""Every sampler on Gaussian data, whose score and moments have closed forms at every time."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from sbml import samplers
from sbml.audit import oracle
from sbml.core.platform import compiler_options
from sbml.core.types import Array
from sbml.likelihood.ode import Solver
from sbml.samplers import _grid
from sbml.samplers.corrector import NoCorrector
from sbml.sdes import SDE, SDES

pytestmark = pytest.mark.usefixtures("x64")

EPS, D, N = 1e-3, 3, 4000
STEPS = [name for name in samplers.SAMPLERS if name != "ode"]
# Samplers of first order, and the spacing in which their moments converge at that order.
ONE_STEP = {
    "euler_maruyama": "time",
    "reverse_diffusion": "time",
    "ancestral": "log_snr",
    "ddim": "log_snr",
}


def moments(data: oracle.Gaussian, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_t."""
    mean = data.sde.mean_coef(jnp.asarray(t)) * data.mean
    cov = data.basis * data.variances(jnp.asarray(t))[None] @ data.basis.T
    return np.asarray(mean), np.asarray(cov)


@partial(jax.jit, static_argnames=("sampler", "sde"), compiler_options=compiler_options())
def draw_samples(sampler: Any, sde: SDE) -> tuple[Array, Any]:
    """N samples from latents of the prior, and the stats."""
    keys = jax.random.split(jax.random.key(0), N)
    score = oracle.gaussian(sde).score

    def one(key: Array) -> tuple[Array, Any]:
        latent_key, key = jax.random.split(key)
        return sampler(score, sde, sde.prior_sample(latent_key, (D,)), key, eps=EPS)

    return jax.vmap(one)(keys)


def check_moments(x: Array, sde: SDE, bias: float) -> None:
    """Compare up to 4 standard errors of N draws plus ``bias`` times the largest variance."""
    mean, cov = moments(oracle.gaussian(sde), EPS)
    variances = np.diag(cov)
    slack = bias * variances.max()
    assert (np.abs(x.mean(0) - mean) < 4 * np.sqrt(variances / N) + slack).all()
    spread = np.sqrt((np.outer(variances, variances) + cov**2) / N)
    assert (np.abs(np.cov(x.T) - cov) < 4 * spread + slack).all()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        *((sampler, "vp") for sampler in samplers.SAMPLERS),
        *(("reverse_diffusion", name) for name in FAMILIES if name != "vp"),
        *(
            pytest.param("reverse_diffusion", name, marks=pytest.mark.slow)
            for name in SDES
            if name not in FAMILIES
        ),
    ],
)
def test_samples_have_the_moments_of_the_data(sampler: str, name: str) -> None:
    """Every sampler is tested for VP, and reverse diffusion for every SDE. The tests of orders
    below compare the steps of the other samplers with closed forms."""
    kind = samplers.SAMPLERS[sampler]
    chosen = kind() if sampler == "ode" else kind(steps=400, spacing="log_snr")
    x, stats = draw_samples(chosen, SDES[name]())
    assert np.all(stats.success)
    check_moments(x, SDES[name](), bias=0.01)


@pytest.mark.slow
@pytest.mark.oracle
def test_a_corrector_keeps_the_moments_of_the_data() -> None:
    """The corrector's steps are small, since their bias is of the order of their size. Correctors
    differ in their size only, see below."""
    follows = samplers.AnnealedLangevin(steps=1, snr=0.05)
    chosen = samplers.ReverseDiffusion(steps=800, spacing="log_snr", corrector=follows)
    x, stats = draw_samples(chosen, SDES["subvp"]())
    assert np.all(stats.nfe == 1600)
    check_moments(x, SDES["subvp"](), bias=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_of_a_correctors_step_by_hand(name: str) -> None:
    """The moments above hardly depend on it: any small step keeps the distribution."""
    sde, s, t = SDES[name](), jnp.asarray(0.7), jnp.asarray(0.6)
    grad, z = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[6.0, 8.0]])
    a = float(sde.mean_coef(s) / sde.mean_coef(t))
    annealed = samplers.AnnealedLangevin(snr=0.1).size(sde, s, t, grad, z)
    assert samplers.Langevin(snr=0.1).size(sde, s, t, grad, z) == pytest.approx(0.08 * a**2)
    assert annealed == pytest.approx(2 * (a * 0.1 * float(sde.std(t))) ** 2)


@partial(jax.jit, static_argnames=("sampler", "sde"))
def exact_moments(sampler: samplers.FixedSteps, sde: SDE) -> tuple[Array, Array]:
    """Mean and covariance of the result for Gaussian x_T, since the steps are affine here.

    T is the largest time."""
    data = oracle.gaussian(sde)
    t = jnp.asarray(sde.largest_time)
    mean, cov = sde.mean_coef(t) * data.mean, data.basis * data.variances(t)[None] @ data.basis.T
    times = _grid.grid(sde, EPS, sampler.steps, sampler.spacing)
    zero = jnp.zeros(D)

    def one(state: Any, pair: Array) -> tuple[Any, None]:
        mean, cov = state
        triple = jnp.concatenate([pair[:1], pair])

        def step(x: Array, z: Array) -> Array:
            return sampler.step(data.score, sde, x, (), triple, z)[0]

        a, b = jax.jacfwd(step, argnums=(0, 1))(mean, zero)
        return (step(mean, zero), a @ cov @ a.T + b @ b.T), None

    pairs = jnp.stack([times[:-1], times[1:]], axis=1)
    return jax.lax.scan(one, (mean, cov), pairs)[0]


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sampler", ONE_STEP)
def test_moments_converge_at_first_order(sampler: str, name: str) -> None:
    """Twice the steps divide the error of mean and covariance by 2, and here by at least 1.9."""
    sde = SDES[name]()
    mean, cov = moments(oracle.gaussian(sde), EPS)
    errors = []
    for steps in (1600, 3200):
        kind = samplers.SAMPLERS[sampler](steps=steps, spacing=ONE_STEP[sampler])
        result = exact_moments(kind, sde)
        errors.append(np.abs(result[0] - mean).max() + np.abs(result[1] - cov).max())
    # The ratio may be larger, because errors of a deterministic linear map can cancel.
    assert errors[0] / errors[1] > 1.9, errors


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", ["ve", "rectified_flow"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver", 2)])
def test_order_of_the_deterministic_maps(sampler: str, order: int, name: str) -> None:
    """The map of every latent is compared with the closed form of the ODE's map."""
    sde = SDES[name]()
    data = oracle.gaussian(sde)
    z = jax.vmap(lambda k: sde.prior_sample(k, (D,)))(jax.random.split(jax.random.key(0), 16))
    first, last = jnp.asarray(EPS), jnp.asarray(sde.largest_time)
    start = sde.std(last) / sde.std(jnp.asarray(sde.T)) * z
    truth = jax.vmap(data.flow, (0, None, None))(start, last, first)
    keys = jax.random.split(jax.random.key(0), 16)  # These samplers do not use them.
    errors = []
    for steps in (100, 200):
        chosen = samplers.SAMPLERS[sampler](steps=steps, spacing="log_snr")
        run = jax.jit(jax.vmap(partial(chosen, data.score, sde, eps=EPS)))
        errors.append(float(jnp.abs(run(z, keys)[0] - truth).max()))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.25)


def test_the_first_and_the_last_step_of_dpm_solver_are_of_first_order() -> None:
    """A step of first order is one of DDIM without noise, so two steps are those of DDIM."""
    sde, z, key = SDES["vp"](), jnp.asarray([0.7, -1.2]), jax.random.key(0)
    score = oracle.Gaussian(sde, jnp.zeros(2), jnp.asarray([0.3, 0.05]), jnp.eye(2)).score
    for steps, equal in ((2, True), (3, False)):
        dpm, ddim = (
            samplers.SAMPLERS[name](steps=steps, spacing="log_snr")(score, sde, z, key, eps=EPS)[0]
            for name in ("dpm_solver", "ddim")
        )
        assert np.allclose(dpm, ddim, rtol=1e-9, atol=0) == equal


@pytest.mark.parametrize("name", SDES)
def test_ancestral_is_the_posterior_of_the_forward_chain(name: str) -> None:
    """Mean and variance of p(x_t | x_s, x_0) by conditioning the joint Gaussian of (x_t, x_s)."""
    sde = SDES[name]()
    t, s, x, x_0 = (jnp.asarray(v) for v in (0.3, 0.5, 0.7, -0.4))
    score = lambda x, s, key: (sde.mean_coef(s) * x_0 - x) / sde.std(s) ** 2  # noqa: E731
    times, step = jnp.stack([s, s, t]), samplers.Ancestral(steps=5).step
    mean = step(score, sde, x, (), times, jnp.asarray(0.0))[0]
    std = step(score, sde, x, (), times, jnp.asarray(1.0))[0] - mean
    a = sde.mean_coef(s) / sde.mean_coef(t)
    gain = a * sde.std(t) ** 2 / sde.std(s) ** 2
    expected = sde.mean_coef(t) * x_0 + gain * (x - sde.mean_coef(s) * x_0)
    np.testing.assert_allclose(mean, expected, rtol=1e-10)
    np.testing.assert_allclose(std**2, sde.std(t) ** 2 - gain * a * sde.std(t) ** 2, rtol=1e-9)


def test_reverse_diffusion_of_vp_is_the_papers() -> None:
    """Song et al. 2021a, appendix E: x <- (2 - sqrt(1 - b)) x + b score + sqrt(b) z."""
    sde, s, x = SDES["vp"](), jnp.asarray(0.5), jnp.asarray([0.3, -1.0])
    t = s - 1e-3
    step = samplers.ReverseDiffusion(steps=1000).step
    result = step(lambda x, s, k: -2 * x, sde, x, (), jnp.stack([s, s, t]), jnp.ones(2))[0]
    integral = 0.1 * 1e-3 + 19.9 * (s**2 - t**2) / 2
    b = -jnp.expm1(-integral)
    expected = (2 - jnp.sqrt(1 - b)) * x - 2 * b * x + jnp.sqrt(b)
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ode", "ode, fixed", "ancestral", "dpm_solver"])
def test_a_path_leads_from_the_latent_to_the_sample(name: str) -> None:
    """The path ends at the sample, also with fixed steps and another number of frames."""
    sde = SDES["subvp"]()
    data, key = oracle.gaussian(sde), jax.random.key(1)
    z = sde.prior_sample(jax.random.key(2), (D,))
    solvers = {"ode": Solver(rtol=1e-9, atol=1e-9), "ode, fixed": Solver("heun", fixed_steps=7)}
    odes = {name: samplers.ODE(solver) for name, solver in solvers.items()}
    chosen = odes[name] if name in odes else samplers.SAMPLERS[name](steps=7)
    x, _ = jax.jit(lambda z: chosen(data.score, sde, z, key, eps=EPS))(z)
    path, times = jax.jit(lambda z: chosen.path(data.score, sde, z, key, eps=EPS, frames=5))(z)
    np.testing.assert_array_equal(path[0], z)
    np.testing.assert_allclose(path[-1], x, atol=1e-7)
    assert times[0] == sde.T and np.isclose(times[-1], EPS) and (np.diff(times) < 0).all()


@pytest.mark.parametrize("name", STEPS)
def test_evaluations_are_counted(name: str) -> None:
    calls = []

    def score(x: Array, t: Array, key: Any) -> Array:
        jax.debug.callback(lambda: calls.append(1))
        return -x

    chosen = samplers.SAMPLERS[name](steps=6, corrector=samplers.Langevin(steps=2))
    draw = jax.jit(lambda x: chosen(score, SDES["vp"](), x, jax.random.key(0), eps=EPS)[1])
    stats = draw(np.ones(2))
    jax.effects_barrier()
    assert len(calls) == stats.nfe == 6 * (chosen.evaluations + 2)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("name", SDES)
def test_grids_fall_from_T_to_eps(spacing: str, name: str) -> None:
    with jax.enable_x64(False):
        times = np.asarray(_grid.grid(SDES[name](), EPS, 1000, spacing))
    assert (
        times[0] == np.float32(SDES[name]().largest_time)
        and times[-1] == np.float32(EPS)
        and (np.diff(times) < 0).all()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_longest_steps_are_finite_in_float32(name: str) -> None:
    """Computed as a difference, sigma_t^2 - c^2 can be negative if log-SNR changes by 15."""
    sde = SDES[name]()
    with jax.enable_x64(False):
        for steps in range(1, 40):
            for kind in (samplers.Ancestral(), samplers.DDIM(eta=0.5)):
                s, t = 1e-5 + (sde.largest_time - 1e-5) / steps, 1e-5
                times = jnp.asarray([1.0, s, t])
                x, _ = kind.step(lambda x, t, k: -x, sde, jnp.ones(2), (), times, jnp.ones(2))
                assert np.isfinite(x).all(), (steps, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ode", "ancestral"])
def test_latents_of_less_precision_are_sampled_in_full_precision(name: str) -> None:
    """In bfloat16, the first time of rectified flow rounds to 1, where there is no signal. All
    samplers with a number of steps begin in the same way."""
    sde, z = SDES["rectified_flow"](), jnp.asarray([1.5, -0.75], jnp.bfloat16)
    sampler = samplers.SAMPLERS[name](**({} if name == "ode" else {"steps": 3}))
    how = {"key": jax.random.key(0), "eps": EPS}

    def drawn(z: Array) -> tuple[Array, Array]:
        def score(x: Array, t: Array, key: Any) -> Array:
            return -x

        return sampler(score, sde, z, **how)[0], sampler.path(score, sde, z, frames=3, **how)[0]

    for found, expected in zip(drawn(z), drawn(z.astype(float)), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == float and np.isfinite(found).all()


def test_langevin_makes_no_step_where_the_score_is_zero() -> None:
    def draw(corrector: Any) -> Array:
        sampler = samplers.DDIM(steps=3, corrector=corrector)
        score, z = (lambda x, t, key: jnp.zeros_like(x)), jnp.asarray([0.5, -0.2])
        return sampler(score, SDES["vp"](), z, jax.random.key(0), eps=EPS)[0]

    np.testing.assert_array_equal(draw(samplers.Langevin()), draw(NoCorrector()))


def test_samplers_are_static_under_jit() -> None:
    for kind in samplers.SAMPLERS.values():
        assert hash(kind()) == hash(kind()) and kind() == kind()
        assert dataclasses.is_dataclass(kind)
    assert hash(NoCorrector()) == hash(NoCorrector())


def test_a_chain_without_a_way_to_draw_is_no_sampler() -> None:
    """Otherwise its samples and its path would be None, without an error."""

    class Unfinished(samplers.Chain):
        nfe = 1

        def times(self, sde: SDE, eps: Any) -> Any:
            return jnp.linspace(1, eps, 2)

    with pytest.raises(TypeError, match="abstract methods '?__call__'?, '?path"):
        Unfinished()  # type: ignore[abstract]
