"""Decoded latents give back their images; completions keep the known part and fit it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from ml_collections import ConfigDict
from PIL import Image

from sbml.audit import oracle
from sbml.core import bits
from sbml.core.files import read_npz
from sbml.core.platform import compiler_options
from sbml.density import Density
from sbml.program.config.build import Experiment
from sbml.program.config.trained import Trained
from sbml.program.modes import latents
from sbml.samplers import AnnealedLangevin, ReverseDiffusion
from sbml.samplers.known import GREY_FIRST, complete
from sbml.sdes import SDES, VP

EPS = 1e-3


def test_interpolations_keep_the_priors_variance() -> None:
    z = np.random.default_rng(0).normal(size=(3, 4000)).astype(np.float32)
    between = latents.interpolate(z, 5)
    np.testing.assert_allclose(between[0, 0], z[0])
    np.testing.assert_allclose(between[1, -1], z[2], atol=1e-6)
    np.testing.assert_allclose(between.std(axis=-1), 1, atol=0.06)


def test_the_unknown_part_may_be_nan() -> None:
    image = np.full((2, 2, 1), 0.3, np.float32)
    mask = np.zeros((2, 2, 1), np.float32)
    mask[0] = 1
    sampler = ReverseDiffusion(steps=3, corrector=AnnealedLangevin())

    @jax.jit
    def completed(x: jax.Array, key: jax.Array) -> jax.Array:
        return complete(lambda x, t, key: -x, VP(), x, mask, key, eps=EPS, sampler=sampler)

    zero, nan = (
        np.asarray(completed(np.where(mask == 1, image, np.float32(unknown)), jax.random.key(0)))
        for unknown in (0.0, np.nan)
    )
    np.testing.assert_array_equal(zero, nan)
    assert np.isfinite(zero).all() and (zero[0] == image[0]).all() and (zero[1] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp"])
def test_the_unknown_follows_the_known(name: str) -> None:
    """One of two correlated pixels is given. The other has the mean and variance of the conditional
    distribution, up to the bias of replacement that remains after 40 corrector steps at each
    time."""
    sde, rho, n = SDES[name](), 0.8, 1500
    values, vectors = np.linalg.eigh(np.array([[1.0, rho], [rho, 1.0]]) * 0.25)
    data = oracle.Gaussian(sde, jnp.zeros(2), jnp.asarray(values), jnp.asarray(vectors))
    x_0, mask = jnp.asarray([0.6, 0.0]).reshape(1, 2, 1), jnp.asarray([1.0, 0]).reshape(1, 2, 1)
    corrector = AnnealedLangevin(steps=40, snr=0.3)
    sampler = ReverseDiffusion(steps=100, spacing="log_snr", corrector=corrector)

    def one(key: jax.Array) -> jax.Array:
        return complete(data.score, sde, x_0, mask, key, eps=EPS, sampler=sampler)

    draw = jax.jit(jax.vmap(one), compiler_options=compiler_options())
    x = np.asarray(draw(jax.random.split(jax.random.key(0), n)))[:, 0, :, 0]
    np.testing.assert_array_equal(x[:, 0], np.float32(0.6))
    conditional_std = 0.5 * np.sqrt(1 - rho**2)
    assert abs(x[:, 1].mean() - rho * 0.6) < 4 * conditional_std / np.sqrt(n) + 0.03
    np.testing.assert_allclose(x[:, 1].std(), conditional_std, rtol=0.15)


@pytest.mark.slow
def test_colours_change_and_grey_stays() -> None:
    np.testing.assert_allclose(GREY_FIRST.T @ GREY_FIRST, np.eye(3), atol=1e-12)
    assert np.ptp(GREY_FIRST[:, 0]) < 1e-12
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3), minval=-1)
    how = {"sde": VP(), "eps": EPS, "sampler": ReverseDiffusion(steps=20)}
    score = jax.tree_util.Partial(lambda x, t, key: -x)
    drawn = latents.completions(score, x, **how, colours=True)
    np.testing.assert_allclose(drawn.mean(-1), jnp.repeat(x.mean(-1)[:, None], 4, 1), atol=1e-5)
    assert (jnp.abs(drawn - x[:, None]).max((2, 3, 4)) > 0.1).all()
    halves = latents.completions(score, x, **how, colours=False)
    np.testing.assert_allclose(halves[:, :, :, :2], jnp.repeat(x[:, None, :, :2], 4, 1), atol=1e-6)


def tiny_with(**fields: int) -> ConfigDict:
    config = tiny.get_config()
    config.latents.update(fields)
    return config


def test_the_operations_with_a_score_in_closed_form(
    digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the score -x / 2 the ODE multiplies x by the root of alpha. The levels k of a model that
    was trained with ``none`` are the data 2 k / (L - 1) - 1. An interpolation in two frames has no
    other latents than the two images."""
    config = tiny_with(count=2, frames=2, steps=2)
    config.eval.ode.update(method="heun", fixed_steps=4)
    experiment = Experiment(config)
    config.sampling.smallest_time = eps = experiment.eval_eps
    restored = experiment.restore(digits_model)
    restored.metadata["config"]["data"]["dequantization"] = "none"
    monkeypatch.setattr(Experiment, "restore", lambda self, workdir: restored)
    score = jax.tree_util.Partial(lambda x, t, key: -x / 2)
    monkeypatch.setattr(Trained, "score", property(lambda self: score))
    runs.mode(latents.run, config, tmp_path)
    stored = read_npz(tmp_path / "latents.npz")
    assert stored["id"].tolist() == [0, 359]
    x, sde = np.float32(experiment.images("test").images[stored["id"]] / 8 - 1), experiment.sde
    z = x * np.sqrt(sde.mean_coef(jnp.asarray(1.0)))
    np.testing.assert_allclose(stored["latent"], z, atol=1e-3)
    solver = experiment.config.eval.ode.build().tighter(10)
    density = Density(score, sde, x.shape[1:], eps=eps, solver=solver)
    error = np.abs(density.decode(stored["latent"]) - x).max(axis=(1, 2, 3))
    np.testing.assert_allclose(stored["reconstruction_error"], error, rtol=1e-3)
    assert solver.fixed_steps == 40 and error.min() > 1e-5 and error.max() < 1e-2
    grids = {
        name: np.asarray(Image.open(tmp_path / f"{name}.png"))
        for name in ("reconstruction", "interpolation", "inpainting")
    }
    assert [grid.shape for grid in grids.values()] == [(130, 130), (64, 130), (130, 394)]
    np.testing.assert_array_equal(grids["interpolation"], grids["reconstruction"][66:])
    assert not (tmp_path / "colourisation.png").exists()


@pytest.mark.slow
def test_a_model_of_digits_reconstructs(digits_model: Path, tmp_path: Path) -> None:
    config = tiny.get_config()
    config.latents.update(count=3, frames=4, steps=10)
    (tmp_path / "checkpoints").symlink_to(digits_model / "checkpoints")
    runs.mode(latents.run, config, tmp_path)
    stored = read_npz(tmp_path / "latents.npz")
    assert stored["latent"].shape == (3, 8, 8, 1) and stored["id"].tolist() == [0, 179, 359]
    assert stored["reconstruction_error"].max() < 1e-2
    experiment = Experiment(config)  # Latents use a ten times smaller tolerance.
    solver = experiment.config.eval.ode.build().tighter(10)
    assert solver.rtol == pytest.approx(config.eval.ode.rtol / 10)
    score = experiment.adapter(experiment.restore(tmp_path).state.ema_params)
    images = experiment.images("test")
    x = bits.to_model(jnp.asarray(images.images[stored["id"]]), 0.5, images.levels)
    how = {"eps": experiment.eval_eps, "solver": solver}
    z = Density(score, experiment.sde, experiment.shape, **how).latent(x)
    np.testing.assert_array_equal(stored["latent"], z)
