"""VDM's network, schedules, decoder, bound and gradient, compared with numbers of its own code."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vdm_reference as reference
from flax.traverse_util import flatten_dict

from sbml import samplers, sdes
from sbml.core import bits
from sbml.core.types import Array
from sbml.likelihood import discrete
from sbml.likelihood.bound import Reduction
from sbml.networks import vdm
from sbml.program.convert import vdm as vdm_checkpoint
from sbml.score import Adapter, NetworkScore
from sbml.sdes import SDE

pytestmark = pytest.mark.usefixtures("x64")

GIVEN = reference.numbers()
IMAGES, CLASSES = GIVEN["images"], GIVEN["conditioning"].astype(float)
DIMS = 8 * 8 * 3
VARIANTS = ("continuous", "continuous_iid", "discrete_10")
close = np.testing.assert_allclose


@pytest.fixture(scope="module", name="params")
def _params(x64: None) -> dict[str, Any]:
    return reference.exact(reference.wide_params())


def score_of(params: dict[str, Any], sde: SDE, condition: Array | float) -> NetworkScore:
    dtype = jax.tree.leaves(params["score_model"])[0].dtype.name
    model = vdm.Model(**reference.OPTIONS, dtype=dtype)
    adapter = Adapter(
        model,
        sde,
        parameterization="residual",
        label="scaled_log_snr",
        eps=0.0,
        log_snr_range=reference.LOG_SNR_RANGE,
    )
    return adapter(params["score_model"], jnp.asarray(condition))


@jax.jit
def noises(params: dict[str, Any], x: Array, t: Array) -> Array:
    """The noise that the network predicts for ``x (4, 8, 8, 3)`` at ``t (4,)``, classes 0 to 3."""
    sde = vdm_checkpoint.schedule(params["gamma"])

    def one(x: Array, t: Array, condition: Array) -> Array:
        return -sde.std(t) * score_of(params, sde, condition)(x, t, None)

    return jax.vmap(one)(x, t, jnp.asarray(CLASSES))


@jax.jit
def noisy_images(params: dict[str, Any], t: Array, eps: Array) -> Array:
    """x_t of the four images at their times ``t``, with noise ``eps``."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    centres = bits.to_model(jnp.asarray(IMAGES), 0.5, reference.LEVELS)
    return jax.vmap(lambda x, t, e: sde.mean_coef(t) * x + sde.std(t) * e)(centres, t, eps)


network = jax.jit(vdm.Model(**reference.OPTIONS).apply, static_argnames="train")


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def decoder_nats(sde: SDE, z: Array, pixels: Array) -> Array:
    """-log P(pixels | z) of VDM's decoder for each row of ``z``."""
    rho = jnp.exp(-0.5 * sde.log_snr(jnp.zeros(())))
    return discrete.decoder_nats(z, pixels, reference.LEVELS, rho)


# ---- schedules ----------------------------------------------------------------------------------


@pytest.fixture(params=["scalar", "wide"], name="case")
def _case(request: pytest.FixtureRequest, params: dict[str, Any]) -> tuple[str, SDE]:
    w, b = (GIVEN[f"scalar/params/gamma/{name}"] for name in "wb")
    gamma = {"w": w, "b": b} if request.param == "scalar" else params["gamma"]
    return request.param, vdm_checkpoint.schedule(gamma)


def test_gamma_and_its_derivative(case: tuple[str, Any]) -> None:
    name, sde = case
    gamma, rate = jax.jit(lambda t: (sde.gamma(t), sde.rate(t)))(GIVEN["gamma/t"])
    close(gamma, GIVEN[f"{name}/gamma/gamma"], rtol=1e-12)
    close(rate, GIVEN[f"{name}/gamma/dgamma_dt"], rtol=1e-12)


def test_schedules_keep_the_contract_of_an_sde(case: tuple[str, Any]) -> None:
    """For t in [0, 1]: the moments solve their equations, and ``time`` inverts the log-SNR."""
    _, sde = case
    t = np.linspace(0, 1, 12)

    @jax.jit
    def values(t: Array) -> tuple[Array, ...]:
        methods = sde.mean_coef, sde.std, sde.drift_coef, sde.diffusion, sde.log_snr, sde.rate
        return *(method(t) for method in methods), sde.time(sde.log_snr(t))

    @jax.jit
    @jax.vmap
    def slopes(t: Array) -> tuple[Array, ...]:
        methods = sde.mean_coef, lambda t: sde.std(t) ** 2, sde.log_snr
        return tuple(jax.grad(method)(t) for method in methods)

    alpha, sigma, f, g, log_snr, rate, time = map(np.asarray, values(t))
    alpha_slope, variance_slope, log_snr_slope = map(np.asarray, slopes(t))
    close(alpha**2 + sigma**2, 1, rtol=1e-13)
    close(log_snr, 2 * np.log(alpha / sigma), atol=1e-12)
    close(alpha_slope, f * alpha, rtol=1e-9)
    close(variance_slope, 2 * f * sigma**2 + g**2, rtol=1e-9)
    close(-log_snr_slope, rate, rtol=1e-9)
    close(g**2 / sigma**2, rate, rtol=1e-12)
    close(time, t, atol=1e-14)


def test_log_snr_outside_the_schedule_gives_its_end_times(params: dict[str, Any]) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])
    close(jax.jit(sde.time)(np.array([1e3, -1e3])), [0.0, 1.0], atol=1e-300)
    assert jax.eval_shape(sde.time, np.float32(0)).dtype == jnp.float32


def test_a_schedule_in_float32_keeps_its_accuracy() -> None:
    sde = sdes.LinearGamma()
    names = ("mean_coef", "std", "log_snr", "rate", "drift_coef", "diffusion")
    values = jax.jit(lambda t: [getattr(sde, name)(t) for name in names])
    t = np.linspace(0, 1, 21, dtype=np.float32)
    for name, single, double in zip(names, values(t), values(t.astype(float)), strict=True):
        assert single.dtype == jnp.float32
        close(single, double, rtol=2e-6, atol=2e-6 * (name == "log_snr"))


def test_time_zero_is_allowed_and_one_is_not() -> None:
    sde = sdes.LinearGamma()
    assert sde.check_time(0.0) == sde.smallest_time == 0.0
    for eps in (-1e-9, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1.0\)"):
            sde.check_time(eps)
    with pytest.raises(ValueError, match=r"gamma_0=5.0, gamma_1=-13.3: give"):
        sdes.LinearGamma(5.0, -13.3)
    assert hash(sde) == hash(sdes.LinearGamma())


# ---- the network --------------------------------------------------------------------------------


def test_network(params: dict[str, Any]) -> None:
    """The adapter computes the label and adds the input to the output; the class is given."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    t = jax.jit(sde.time)(-GIVEN["wide/network/gamma_t"])
    result = noises(params, GIVEN["wide/network/z_t"], t)
    close(result, GIVEN["wide/network/eps_hat"], atol=1e-9)


@pytest.mark.parametrize(
    ("inputs", "result"),
    [("wide/network", "float32/network"), ("float32/loss/continuous", "float32/loss/continuous")],
)
def test_network_in_float32(inputs: str, result: str) -> None:
    """Compared with their float32 numbers, which differ from their float64 numbers by up to 2e-3,
    because the angles of the Fourier features reach thousands."""
    low, high = reference.LOG_SNR_RANGE
    z, gamma = (np.float32(GIVEN[f"{inputs}/{name}"]) for name in ("z_t", "gamma_t"))
    label, classes = 1000 * (high + gamma) / np.float32(high - low), np.float32(CLASSES)
    params = reference.wide_params()["score_model"]
    out = network({"params": params}, z, label, train=False, condition=classes)
    assert out.dtype == jnp.float32
    close(z + out, GIVEN[f"{result}/eps_hat"], rtol=1e-5, atol=1e-5)


# ---- decoder and bound --------------------------------------------------------------------------


def test_decoder_of_every_value(params: dict[str, Any]) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])
    z = GIVEN["wide/decoder/z_of_log_prob"]
    flat = np.repeat(z.reshape(-1, 1), reference.LEVELS, axis=0)
    values = np.tile(np.arange(reference.LEVELS), z.size)[:, None]
    result = -decoder_nats(sde, flat, values).reshape(*z.shape, -1)
    close(result, GIVEN["wide/decoder/log_prob"], rtol=1e-10, atol=1e-10)


def test_decoder_of_images(case: tuple[str, Any]) -> None:
    name, sde = case
    result = decoder_nats(sde, GIVEN[f"{name}/decoder/z_0_rescaled"], IMAGES)
    close(result, -GIVEN[f"{name}/decoder/log_prob_of_images"], rtol=1e-10)


def test_prior_and_reconstruction(case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """These terms do not depend on the network, so the test uses one that predicts zero noise."""
    name, sde = case
    t = GIVEN["loss/continuous/t"]

    @jax.jit
    def compute() -> discrete.Bound:
        return bounds(lambda condition: lambda x, t, key: 0 * x, sde, t, monkeypatch)

    result = compute()
    close(result.prior, GIVEN[f"{name}/loss/loss_klz"], rtol=1e-9)
    close(result.reconstruction, GIVEN[f"{name}/loss/loss_recon"], rtol=1e-9)


def bounds(score: Any, sde: SDE, t: Array, monkeypatch: pytest.MonkeyPatch) -> discrete.Bound:
    """``discrete.elbo`` of the four images from t = 0 at their times ``t`` and the stored draws.

    ``score`` is a function of the class. The noise at t is a e + b z with a^2 + b^2 = 1; with
    e = a eps and z = b eps it is the stored eps.
    """
    first = sde.log_snr(jnp.zeros(()))

    def one(pixels: Array, t: Array, condition: Array, eps: Array, eps_0: Array) -> discrete.Bound:
        gap = sde.log_snr(t) - first
        pair = jnp.stack([jnp.exp(0.5 * gap) * eps, jnp.sqrt(-jnp.expm1(gap)) * eps])
        monkeypatch.setattr(discrete, "_normals", lambda *_: (pair[None], eps_0))
        return discrete.elbo(
            score(condition),
            sde,
            pixels,
            jax.random.key(0),
            noise=discrete.Categorical(reference.LEVELS),
            eps=0.0,
            u=t[None],
            reduction=Reduction(proposal="uniform"),
        )

    draws = GIVEN["loss/eps"], GIVEN["loss/eps_0"]
    return jax.vmap(one)(*map(jnp.asarray, (IMAGES, t, CLASSES, *draws)))


def test_every_term_of_the_bound(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])

    @jax.jit
    def compute(t: Array) -> discrete.Bound:
        return bounds(lambda c: score_of(params, sde, c), sde, t, monkeypatch)

    for variant in ("continuous", "continuous_iid"):
        terms = compute(GIVEN[f"loss/{variant}/t"])
        close(terms.prior, GIVEN["wide/loss/loss_klz"], rtol=1e-9)
        close(terms.reconstruction, GIVEN["wide/loss/loss_recon"], rtol=1e-9)
        close(terms.diffusion, GIVEN[f"wide/loss/{variant}/loss_diff"], rtol=1e-9)
        bpd = bits.nats_to_bits(float(np.mean(terms.total)), (8, 8, 3))
        assert bpd == pytest.approx(float(GIVEN[f"wide/loss/{variant}/bpd"]), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_at_the_times_of_the_losses(variant: str, params: dict[str, Any]) -> None:
    """This includes the discrete-time loss, which is weighted as ten steps require."""
    t, eps = GIVEN[f"loss/{variant}/t"], GIVEN["loss/eps"]
    result = noises(params, noisy_images(params, t, eps), t)
    close(result, GIVEN[f"wide/loss/{variant}/eps_hat"], atol=1e-9)
    if variant == "discrete_10":
        gamma = jax.jit(vdm_checkpoint.schedule(params["gamma"]).gamma)
        weight = 10 * np.expm1(gamma(t) - gamma(t - 0.1))
        errors = np.sum((eps - np.asarray(result)) ** 2, axis=(1, 2, 3))
        close(0.5 * weight * errors, GIVEN["wide/loss/discrete_10/loss_diff"], rtol=1e-9)


@pytest.mark.slow
def test_the_bound_depends_only_on_the_ends_of_a_schedule(params: dict[str, Any]) -> None:
    """A linear schedule with the ends of a learned one has the same bound at equal log-SNR."""
    learned = vdm_checkpoint.schedule(params["gamma"])
    ends = [float(learned.gamma(jnp.asarray(t))) for t in (0.0, 1.0)]
    linear = sdes.LinearGamma(*ends)

    def total(sde: SDE) -> Array:
        score, pixels = score_of(params, sde, 2.0), jnp.asarray(IMAGES[2])
        how = {"noise": discrete.Categorical(reference.LEVELS), "eps": 0.0}
        u = jnp.asarray([0.3, 0.8])
        return discrete.elbo(score, sde, pixels, jax.random.key(0), u=u, **how).total

    result = jax.jit(lambda: total(learned))(), jax.jit(lambda: total(linear))()
    close(*result, rtol=1e-9)
    assert result[0] > 1


@pytest.mark.slow
def test_gradient_of_the_bound(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient goes through the network, the time label, the decoder, both ends of the schedule
    and its derivative."""

    t = GIVEN["loss/continuous/t"]

    @jax.jit
    @jax.grad
    def gradient(params: dict[str, Any]) -> Array:
        sde = vdm_checkpoint.schedule(params["gamma"])
        result = bounds(lambda c: score_of(params, sde, c), sde, t, monkeypatch)
        return result.total.mean() / (DIMS * math.log(2))

    result = {
        name: np.asarray(leaf) for name, leaf in flatten_dict(gradient(params), sep="/").items()
    }
    tolerance = 1e-9 * math.sqrt(sum(np.sum(leaf**2) for leaf in result.values()))
    for name, leaf in result.items():
        expected = GIVEN[f"wide/gradient/norm/{name}"]
        assert np.linalg.norm(leaf) == pytest.approx(expected, rel=1e-9, abs=tolerance), name
        assert leaf.sum() == pytest.approx(GIVEN[f"wide/gradient/sum/{name}"], abs=tolerance)
        if (full := f"wide/gradient/full/{name}") in GIVEN:
            close(leaf, GIVEN[full], rtol=1e-9, atol=tolerance)
    assert result["score_model/dense0/kernel"].any()  # The condition affects this model's output.


@pytest.mark.slow
def test_schedule_decoder_bound_and_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """All agree to 1e-5 except the gradient: its error is that of the Fourier features' angles."""
    with jax.enable_x64(False):
        params = jax.tree.map(jnp.float32, reference.wide_params())
        sde, t = vdm_checkpoint.schedule(params["gamma"]), jnp.asarray(GIVEN["gamma/t"])
        gamma, rate = sde.gamma(t), sde.rate(t)

        def loss(params: dict[str, Any]) -> tuple[Array, discrete.Bound]:
            sde = vdm_checkpoint.schedule(params["gamma"])
            times = GIVEN["loss/continuous/t"]
            terms = bounds(lambda c: score_of(params, sde, c), sde, times, monkeypatch)
            return terms.total.mean() / (DIMS * math.log(2)), terms

        gradient, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert gamma.dtype == result.total.dtype == jnp.float32
    close(gamma, GIVEN["wide/gamma/gamma"], rtol=1e-5)
    close(rate, GIVEN["wide/gamma/dgamma_dt"], rtol=1e-5)
    close(result.prior, GIVEN["wide/loss/loss_klz"], rtol=1e-5)
    close(result.reconstruction, GIVEN["wide/loss/loss_recon"], rtol=1e-5)
    close(result.diffusion, GIVEN["wide/loss/continuous/loss_diff"], rtol=1e-5)
    leaves = flatten_dict(gradient, sep="/")
    norm = math.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves.values()))
    for name, leaf in leaves.items():
        expected = GIVEN[f"wide/gradient/norm/{name}"]
        assert abs(np.linalg.norm(leaf) - expected) < 5e-4 * norm, name


@pytest.mark.slow
def test_steps_of_the_sampler(params: dict[str, Any]) -> None:
    """VDM's sampler is ancestral sampling with equal steps in t; pixels take the nearest value."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    states = np.concatenate([GIVEN["wide/sample/z_1"][None], GIVEN["wide/sample/z_s"]])
    sampler, times = samplers.SAMPLERS["ancestral"](steps=5), np.linspace(1, 0, 6)

    def step(x: Array, z: Array, condition: Array, times: Array) -> Array:
        return sampler.step(score_of(params, sde, condition), sde, x, (), times, z)[0]

    batch = jax.jit(jax.vmap(step, (0, 0, 0, None)))
    for i in range(5):
        triple = jnp.asarray([np.nan, times[i], times[i + 1]])
        result = batch(*map(jnp.asarray, (states[i], GIVEN["sample/eps"][i], CLASSES)), triple)
        close(result, states[i + 1], atol=1e-9)
    rescaled = states[-1] / np.asarray(sde.mean_coef(jnp.zeros(())))
    result = bits.to_pixels(jnp.asarray(rescaled), reference.LEVELS)
    np.testing.assert_array_equal(result, GIVEN["wide/sample/images"])
