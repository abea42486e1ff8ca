"""An integer denoiser of bin centres, from training to the evaluation with its own decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from scipy import special, stats

import sbml
from sbml.program.config import build
from sbml.program.modes import eval as evaluate
from sbml.program.modes import train
from sbml.score import integers

LEVELS, IMAGES, SWEEPS = 17, 24, 4


def config():
    """The tiny config as an integer denoiser, evaluated by the bound with either decoder."""
    config = tiny.get_config()
    config.data.dequantization = "centre"
    config.score.parameterization = "levels"
    # At tau=1, a decoder that takes the nearest level is wrong for every third pixel.
    config.eval.update(
        estimators=("bound",), dequantizers=("learned", "categorical"), max_images=IMAGES, tau=1.0
    )
    config.eval.bound.sweeps = SWEEPS
    return config


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The experiment, the trained parameters and the columns of the evaluation."""
    workdir = tmp_path_factory.mktemp("levels")
    runs.mode(train.run, config(), workdir)
    runs.mode(evaluate.run, config(), workdir)
    experiment = build.Experiment(config())
    columns = dict(np.load(workdir / "per_image.npz"))
    return experiment, experiment.restore(workdir).state.ema_params, columns


def decoder_bits(experiment, params, pixels, z):
    """-log p(k | x_eps) ``(draws,)`` in bits/dim by NumPy for noises ``z (draws, *s)``: Bayes' rule
    with the network's weights of the levels."""
    adapter, sde = experiment.exact_adapter, experiment.sde
    eps = jnp.asarray(experiment.discrete_eps)
    alpha, sigma = float(sde.mean_coef(eps)), float(sde.std(eps))
    centres = (2 * np.arange(LEVELS) + 1) / LEVELS - 1
    x = alpha * centres[pixels] + sigma * z
    t = jnp.full(len(x), eps)
    network_input = adapter.network_input(jnp.asarray(x, jnp.float32), t)
    model = adapter.model
    apply = jax.jit(functools.partial(model.apply, train=False))
    out = apply({"params": params}, network_input, adapter.time_label(t))
    log_p = special.log_softmax(
        np.asarray(out, float) + stats.norm.logpdf(x[..., None], alpha * centres, sigma), axis=-1
    )
    chosen = np.take_along_axis(log_p, np.broadcast_to(pixels[..., None], (*x.shape, 1)), -1)
    return -chosen.sum((1, 2, 3, 4)) / (pixels.size * np.log(2))


@pytest.mark.slow
def test_the_decoder_of_an_evaluation_is_bayes_rule(evaluated):
    """Its mean over images is compared with NumPy's sums over other draws of the noise."""
    experiment, params, columns = evaluated
    rng, images = np.random.default_rng(0), experiment.images("test").images[columns["id"]]
    draws = np.array(
        [decoder_bits(experiment, params, k, rng.normal(size=(200, *k.shape))) for k in images]
    )
    found = columns["bound_learned_reconstruction"]
    one_draw = draws.std(axis=1)  # of each image
    error = np.sqrt(np.sum(one_draw**2 * (1 / SWEEPS + 1 / 200))) / IMAGES
    difference = np.mean(found) - np.mean(draws)
    assert error < 0.01 < 0.1 < np.mean(draws)
    assert abs(difference) < 4 * error


@pytest.mark.slow
def test_the_bound_of_integers_in_python_is_that_of_the_evaluation(evaluated):
    """Both have the learned decoder, and other draws."""
    experiment, params, columns = evaluated
    images, eps = experiment.images("test").images[columns["id"]], experiment.discrete_eps
    shape, levels, score = experiment.shape, experiment.levels, experiment.adapter(params)
    found = sbml.Density(score, experiment.sde, shape, levels, eps).bound(images, sweeps=SWEEPS)
    expected = columns["bound_learned_bits_per_dim"].mean()
    assert abs(found.mean - expected) < 2 * found.this_set.ci95 < 0.1 * expected
    assert "by its decoder" in str(found)


@pytest.mark.slow
def test_bits_per_dim_of_a_model_of_bin_centres_has_truncated_normal_noise() -> None:
    """An untrained network gives all levels the same probability, so p_eps of a pixel is a mixture
    of normals around the bin centres. The integral over the noise in a bin is SciPy's."""
    settings = config()
    settings.eval.tau = 3.0
    experiment = build.Experiment(settings)
    sde, eps = experiment.sde, experiment.discrete_eps
    rho = float(sde.std(jnp.asarray(eps)) / sde.mean_coef(jnp.asarray(eps)))
    centres = (2 * np.arange(LEVELS) + 1) / LEVELS - 1

    def nats(k: int) -> float:
        q = stats.truncnorm(-1 / LEVELS / rho, 1 / LEVELS / rho, centres[k], rho)
        return q.expect(lambda x: q.logpdf(x) - np.log(stats.norm.pdf(x, centres, rho).mean()))

    images = experiment.images("test").images[:64]
    score = experiment.exact_adapter(experiment.init_state().params)
    found = sbml.Density(score, sde, experiment.shape, LEVELS).bits_per_dim(images)
    expected = np.array([nats(k) for k in range(LEVELS)])[images].mean() / np.log(2)
    assert "by truncated-normal dequantization at t=0.00297" in str(found)
    # Noise near the edge of a bin is rare and counts much, so the mean has a heavy tail.
    assert expected - np.log2(LEVELS) == pytest.approx(0.0014, abs=2e-4)
    assert found.mean == pytest.approx(expected, abs=0.0016)


@pytest.mark.slow
def test_the_decoders_bound_differs_from_the_categorical_one_by_the_decoder(evaluated):
    """The draws are the same. The network's weights of the levels make the decoder better."""
    _, _, columns = evaluated
    for term in ("prior", "diffusion"):
        learned, plain = columns[f"bound_learned_{term}"], columns[f"bound_categorical_{term}"]
        np.testing.assert_allclose(learned, plain, rtol=1e-5)
    names = [f"bound_{name}_reconstruction" for name in ("learned", "categorical")]
    learned, plain = (columns[name] for name in names)
    assert np.mean(learned) < 0.9 * np.mean(plain)


@pytest.mark.parametrize("levels", [17, 256])
def test_the_probabilities_of_all_levels_agree_with_that_of_a_given_level(levels: int) -> None:
    rng = np.random.default_rng(0)
    out = rng.normal(size=(2, 3, integers.outputs(levels))).astype(np.float32)
    y, rho = rng.uniform(-1, 1, (2, 3)).astype(np.float32), np.float32(1.5 / levels)
    log_p = np.asarray(jax.jit(integers.decoder_log_p, static_argnums=3)(out, y, rho, levels))
    assert log_p.shape == (2, 3, levels)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    decoder_nats = jax.jit(integers.decoder_nats, static_argnums=4)
    for _ in range(3):
        pixels = rng.integers(levels, size=(2, 3))
        chosen = np.take_along_axis(log_p, pixels[..., None], -1)
        nats = decoder_nats(out, y, rho, pixels, levels)
        np.testing.assert_allclose(-chosen.sum(), nats, rtol=1e-4)
