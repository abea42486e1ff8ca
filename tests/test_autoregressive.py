"""The autoregressive models beside the model: their probabilities sum to one."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import autoregressive, grid
from sbml.core.types import Array
from sbml.data import ImageSet

SHAPE, LEVELS = (2, 1, 2), 3
WORLD = np.array(list(itertools.product(range(LEVELS), repeat=4))).reshape(-1, *SHAPE)


def images(n: int) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 2, (n, *SHAPE)).astype(np.uint8)
    return ImageSet("made up", "made up", "train", pixels, levels=LEVELS)


def test_the_transformers_probabilities_sum_to_one() -> None:
    """Over all images of a tiny world, with random parameters; and no pixel sees a later one."""
    model = autoregressive.Transformer(LEVELS, width=8, depth=1, heads=2)
    k = jnp.asarray(WORLD)

    @jax.jit
    def found() -> tuple[Array, Array]:
        params = model.init(jax.random.key(0), k[:1])
        keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
        keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
        params = jax.tree.map(lambda p, key: p + jax.random.normal(key, p.shape), params, keys)
        return autoregressive.log_p(model, params, k), model.apply(params, k)

    log_p, logits = map(np.asarray, found())
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    assert p.max() > 3 * p.min()
    logits = logits.reshape(3, 3, 3, 3, 4, LEVELS)
    for i in range(4):  # The logits of pixel i are the same for all values of the pixels from i on.
        first = logits[(slice(None),) * i + (slice(0, 1),) * (4 - i)][..., i, :]
        expected = np.broadcast_to(first, logits.shape[:4] + (LEVELS,))
        np.testing.assert_allclose(logits[..., i, :], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["forest", pytest.param("transformer", marks=pytest.mark.slow)])
def test_the_probabilities_of_a_trained_model_sum_to_one(name: str) -> None:
    """In the images of the training the last level does not occur; it has a probability too."""
    settings = {"steps": 3, "width": 8, "depth": 1} if name == "transformer" else {"trees": 3}
    bits = autoregressive.MODELS[name](images(64), WORLD, 0, **settings)
    np.testing.assert_allclose(np.sum(2.0 ** (-4 * bits)), 1, rtol=1e-5)
    assert np.isfinite(bits).all()


def test_differences_are_paired_over_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(2, 1, 50)
    about = {"data": "digits", "split": "test", "process": "vp", "training": "levels", "steps": 9}
    lines: list[grid.Line] = [
        {**about, "network": "forest", "measure": "exact", "values": theirs.tolist()},
        {**about, "network": "DDPM++", "measure": "ode", "values": (theirs - 0.25).tolist()},
    ]
    _, alone, both = autoregressive.table(lines, "digits")
    assert alone[0] == "forest" and both[4] == "-0.250 ± 0.000" and both[5] == "50"
