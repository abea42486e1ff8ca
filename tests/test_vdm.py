"""VDM's network, schedules, decoder, bound and gradient: numbers of the published code."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vdm_reference as reference
from flax.traverse_util import flatten_dict

from sbml import bits, discrete, samplers, sdes
from sbml.adapters import Adapter, LinenScore
from sbml.bound import Reduction
from sbml.convert import vdm as vdm_checkpoint
from sbml.networks import vdm
from sbml.sdes import SDE
from sbml.types import Array

pytestmark = pytest.mark.usefixtures("x64")

GIVEN = reference.numbers()
IMAGES, CLASSES = GIVEN["images"], GIVEN["conditioning"].astype(float)
DIMS = 8 * 8 * 3
VARIANTS = ("continuous", "continuous_iid", "discrete_10")
close = np.testing.assert_allclose


@pytest.fixture(scope="module", name="params")
def _params(x64: None) -> dict[str, Any]:
    return reference.exact(reference.wide_params())


def score_of(params: dict[str, Any], sde: SDE, condition: Array | float) -> LinenScore:
    model = vdm.Model(**reference.OPTIONS, dtype="float64")
    adapter = Adapter(
        model,
        sde,
        parameterization="residual",
        label="scaled_log_snr",
        eps=0.0,
        log_snr_range=reference.LOG_SNR_RANGE,
    )
    return adapter(params["score_model"], jnp.asarray(condition))


def noises(params: dict[str, Any], sde: SDE, x: Array, t: Array) -> Array:
    """The noise predicted of ``x (4, 8, 8, 3)`` at ``t (4,)``, of classes 0 to 3."""

    def one(x: Array, t: Array, condition: Array) -> Array:
        return -sde.std(t) * score_of(params, sde, condition)(x, t, None)

    return jax.jit(jax.vmap(one))(x, t, jnp.asarray(CLASSES))


# ---- schedules ----------------------------------------------------------------------------------


@pytest.fixture(params=["scalar", "wide"], name="case")
def _case(request: pytest.FixtureRequest, params: dict[str, Any]) -> tuple[str, SDE]:
    w, b = (GIVEN[f"scalar/params/gamma/{name}"] for name in "wb")
    gamma = {"w": w, "b": b} if request.param == "scalar" else params["gamma"]
    return request.param, vdm_checkpoint.schedule(gamma)


def test_gamma_and_its_derivative(case: tuple[str, Any]) -> None:
    name, sde = case
    t = jnp.asarray(GIVEN["gamma/t"])
    close(sde.gamma(t), GIVEN[f"{name}/gamma/gamma"], rtol=1e-12)
    close(sde.rate(t), GIVEN[f"{name}/gamma/dgamma_dt"], rtol=1e-12)


def test_schedules_keep_the_contract_of_an_sde(case: tuple[str, Any]) -> None:
    """From t = 0 on: the moments solve their equations, and time inverts the log-SNR."""
    _, sde = case
    t = jnp.linspace(0, 1, 12)
    alpha, sigma, f, g = sde.mean_coef(t), sde.std(t), sde.drift_coef(t), sde.diffusion(t)
    close(alpha**2 + sigma**2, 1, rtol=1e-13)
    close(sde.log_snr(t), 2 * jnp.log(alpha / sigma), atol=1e-12)
    close(jax.vmap(jax.grad(sde.mean_coef))(t), f * alpha, rtol=1e-9)
    close(jax.vmap(jax.grad(lambda t: sde.std(t) ** 2))(t), 2 * f * sigma**2 + g**2, rtol=1e-9)
    close(-jax.vmap(jax.grad(sde.log_snr))(t), sde.rate(t), rtol=1e-9)
    close(g**2 / sigma**2, sde.rate(t), rtol=1e-12)
    close(sde.time(sde.log_snr(t)), t, atol=1e-14)


def test_times_beyond_the_monotone_network_are_its_ends(params: dict[str, Any]) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])
    np.testing.assert_allclose(sde.time(jnp.asarray([1e3, -1e3])), [0.0, 1.0], atol=1e-300)
    assert sde.time(jnp.asarray(0.0, jnp.float32)).dtype == jnp.float32


def test_a_schedule_in_float32_keeps_its_accuracy() -> None:
    sde, t = sdes.LinearGamma(), jnp.linspace(0, 1, 21, dtype=jnp.float32)
    for f in (sde.mean_coef, sde.std, sde.log_snr, sde.rate, sde.drift_coef, sde.diffusion):
        assert f(t).dtype == jnp.float32
        close(f(t), f(t.astype(float)), rtol=2e-6, atol=2e-6 * (f == sde.log_snr))


def test_time_zero_is_allowed_and_one_is_not() -> None:
    sde = sdes.LinearGamma()
    assert sde.check_time(0.0) == sde.smallest_time == 0.0
    for eps in (-1e-9, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1.0\)"):
            sde.check_time(eps)
    with pytest.raises(ValueError, match=r"gamma_0=5.0, gamma_1=-13.3: need"):
        sdes.LinearGamma(5.0, -13.3)
    assert hash(sde) == hash(sdes.LinearGamma())


# ---- the network --------------------------------------------------------------------------------


def test_network(params: dict[str, Any]) -> None:
    """With its label, its class and the input added to its output, by the adapter."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    t = sde.time(-jnp.asarray(GIVEN["wide/network/gamma_t"]))
    found = noises(params, sde, jnp.asarray(GIVEN["wide/network/z_t"]), t)
    close(found, GIVEN["wide/network/eps_hat"], atol=1e-9)


def test_network_in_float32() -> None:
    """The Fourier features' angles reach thousands, so float32 is as far away as 5e-5."""
    low, high = reference.LOG_SNR_RANGE
    z, gamma = (np.float32(GIVEN[f"wide/network/{name}"]) for name in ("z_t", "gamma_t"))
    label, told = 1000 * (high + gamma) / np.float32(high - low), np.float32(CLASSES)
    model, params = vdm.Model(**reference.OPTIONS), reference.wide_params()["score_model"]
    out = model.apply({"params": params}, z, label, train=False, condition=told)
    assert out.dtype == jnp.float32
    close(z + out, GIVEN["wide/network/eps_hat"], atol=1e-4)


# ---- decoder and bound --------------------------------------------------------------------------


def test_decoder_of_every_value(params: dict[str, Any]) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])
    rho = jnp.exp(-0.5 * sde.log_snr(jnp.zeros(())))
    z = jnp.asarray(GIVEN["wide/decoder/z_of_log_prob"])

    @jax.jit
    @jax.vmap
    @jax.vmap
    def log_prob(z: Array, value: Array) -> Array:
        return -discrete.decoder_nats(z[None], value[None], reference.LEVELS, rho)

    flat = jnp.broadcast_to(z.reshape(-1, 1), (z.size, reference.LEVELS))
    values = jnp.broadcast_to(jnp.arange(reference.LEVELS)[None], flat.shape)
    found = log_prob(flat, values).reshape(GIVEN["wide/decoder/log_prob"].shape)
    close(found, GIVEN["wide/decoder/log_prob"], rtol=1e-10, atol=1e-10)


def test_decoder_of_images(case: tuple[str, Any]) -> None:
    name, sde = case
    rho = jnp.exp(-0.5 * sde.log_snr(jnp.zeros(())))
    for z, image, expected in zip(
        GIVEN[f"{name}/decoder/z_0_rescaled"],
        IMAGES,
        GIVEN[f"{name}/decoder/log_prob_of_images"],
        strict=True,
    ):
        found = discrete.decoder_nats(jnp.asarray(z), jnp.asarray(image), reference.LEVELS, rho)
        assert float(found) == pytest.approx(-expected, rel=1e-10)


def test_prior_and_reconstruction(case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms that see no network, here one that predicts no noise."""
    name, sde = case
    found = bounds(lambda condition: lambda x, t, key: 0 * x, sde, "continuous", monkeypatch)
    close(found.prior, GIVEN[f"{name}/loss/loss_klz"], rtol=1e-9)
    close(found.reconstruction, GIVEN[f"{name}/loss/loss_recon"], rtol=1e-9)


def bounds(score: Any, sde: SDE, variant: str, monkeypatch: pytest.MonkeyPatch) -> discrete.Bound:
    """``discrete.elbo`` of the four images from t = 0 at the stored times and draws.

    ``score`` is a function of the class. The noise at t is a e + b z with a^2 + b^2 = 1: e = a eps
    and z = b eps make it the stored eps.
    """
    first = sde.log_snr(jnp.zeros(()))

    def one(pixels: Array, t: Array, condition: Array, eps: Array, eps_0: Array) -> discrete.Bound:
        gap = sde.log_snr(t) - first
        pair = jnp.stack([jnp.exp(0.5 * gap) * eps, jnp.sqrt(-jnp.expm1(gap)) * eps])
        monkeypatch.setattr(discrete, "_normals", lambda *_: (pair[None], eps_0))
        return discrete.elbo(
            *(score(condition), sde, pixels, jax.random.key(0)),
            noise=discrete.Categorical(reference.LEVELS),
            eps=0.0,
            u=t[None],
            reduction=Reduction(proposal="uniform"),
        )

    t, eps, eps_0 = (GIVEN[f"loss/{name}"] for name in (f"{variant}/t", "eps", "eps_0"))
    return jax.vmap(one)(*map(jnp.asarray, (IMAGES, t, CLASSES, eps, eps_0)))


@pytest.mark.parametrize("variant", ["continuous", "continuous_iid"])
def test_every_term_of_the_bound(
    variant: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sde = vdm_checkpoint.schedule(params["gamma"])

    @jax.jit
    def found() -> discrete.Bound:
        return bounds(lambda c: score_of(params, sde, c), sde, variant, monkeypatch)

    terms = found()
    close(terms.prior, GIVEN["wide/loss/loss_klz"], rtol=1e-9)
    close(terms.reconstruction, GIVEN["wide/loss/loss_recon"], rtol=1e-9)
    close(terms.diffusion, GIVEN[f"wide/loss/{variant}/loss_diff"], rtol=1e-9)
    bpd = bits.nats_to_bits(float(terms.total.mean()), (8, 8, 3))
    assert bpd == pytest.approx(float(GIVEN[f"wide/loss/{variant}/bpd"]), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_at_the_times_of_the_losses(variant: str, params: dict[str, Any]) -> None:
    """Those of the discrete-time loss too, whose weight is that of ten steps."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    t, eps = jnp.asarray(GIVEN[f"loss/{variant}/t"]), jnp.asarray(GIVEN["loss/eps"])
    centres = bits.to_model(jnp.asarray(IMAGES), 0.5, reference.LEVELS)
    z = jax.vmap(lambda x, t, e: sde.mean_coef(t) * x + sde.std(t) * e)(centres, t, eps)
    found = noises(params, sde, z, t)
    close(found, GIVEN[f"wide/loss/{variant}/eps_hat"], atol=1e-8)
    if variant == "discrete_10":
        weight = 10 * np.expm1(sde.gamma(t) - sde.gamma(t - 0.1))
        errors = np.sum((np.asarray(eps) - found) ** 2, axis=(1, 2, 3))
        close(0.5 * weight * errors, GIVEN["wide/loss/discrete_10/loss_diff"], rtol=1e-9)


def test_the_way_between_the_ends_changes_no_bound(params: dict[str, Any]) -> None:
    """At equal log-SNR: the schedule linear between the ends of a network's has its bound."""
    learned = vdm_checkpoint.schedule(params["gamma"])
    ends = [float(learned.gamma(jnp.asarray(t))) for t in (0.0, 1.0)]
    linear = sdes.LinearGamma(*ends)

    def totals(sde: SDE) -> list[Array]:
        score, pixels = score_of(params, sde, 2.0), jnp.asarray(IMAGES[2])
        draws = {"eps": 0.0, "u": jnp.asarray([0.3, 0.8])}
        kinds = discrete.TruncatedNormal, discrete.Categorical
        key = jax.random.key(0)
        return [
            discrete.elbo(score, sde, pixels, key, noise=kind(reference.LEVELS), **draws).total
            for kind in kinds
        ]

    found = jax.jit(lambda: totals(learned))(), jax.jit(lambda: totals(linear))()
    close(*found, rtol=1e-9)
    assert abs(found[0][0] - found[0][1]) > 1e-3


def test_gradient_of_the_bound(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through network, time label, decoder, both ends of the schedule and its derivative."""

    @jax.jit
    @jax.grad
    def gradient(params: dict[str, Any]) -> Array:
        sde = vdm_checkpoint.schedule(params["gamma"])
        found = bounds(lambda c: score_of(params, sde, c), sde, "continuous", monkeypatch)
        return found.total.mean() / (DIMS * math.log(2))

    found = {
        name: np.asarray(leaf) for name, leaf in flatten_dict(gradient(params), sep="/").items()
    }
    tolerance = 1e-9 * math.sqrt(sum(np.sum(leaf**2) for leaf in found.values()))
    for name, leaf in found.items():
        expected = GIVEN[f"wide/gradient/norm/{name}"]
        assert np.linalg.norm(leaf) == pytest.approx(expected, rel=1e-7, abs=tolerance), name
        assert leaf.sum() == pytest.approx(GIVEN[f"wide/gradient/sum/{name}"], abs=100 * tolerance)
        if (full := f"wide/gradient/full/{name}") in GIVEN:
            close(leaf, GIVEN[full], rtol=1e-7, atol=tolerance)
    assert found["score_model/dense0/kernel"].any()  # It is the model whose condition counts.


def test_steps_of_the_sampler(params: dict[str, Any]) -> None:
    """Theirs is ancestral sampling at equal steps in t; the image is each pixel's nearest value."""
    sde = vdm_checkpoint.schedule(params["gamma"])
    states = np.concatenate([GIVEN["wide/sample/z_1"][None], GIVEN["wide/sample/z_s"]])
    sampler, times = samplers.SAMPLERS["ancestral"](steps=5), np.linspace(1, 0, 6)

    def step(x: Array, z: Array, condition: Array, times: Array) -> Array:
        return sampler.step(score_of(params, sde, condition), sde, x, (), times, z)[0]

    batch = jax.jit(jax.vmap(step, (0, 0, 0, None)))
    for i in range(5):
        triple = jnp.asarray([np.nan, times[i], times[i + 1]])
        found = batch(*map(jnp.asarray, (states[i], GIVEN["sample/eps"][i], CLASSES)), triple)
        close(found, states[i + 1], atol=1e-8)
    rescaled = states[-1] / np.asarray(sde.mean_coef(jnp.zeros(())))
    found = bits.to_pixels(jnp.asarray(rescaled), reference.LEVELS)
    np.testing.assert_array_equal(found, GIVEN["wide/sample/images"])
