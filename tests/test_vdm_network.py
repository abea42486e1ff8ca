"""VDM's network: parameters, group norm, errors; and the Fourier features."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vdm_reference as reference
from flax.traverse_util import flatten_dict
from linen import normal, random_params, shapes, size

from sbml.core import bits
from sbml.core.types import Array
from sbml.networks import _layers, frequencies, vdm


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def test_parameters_are_named_as_in_their_checkpoints() -> None:
    result = shapes(vdm.Model(**reference.OPTIONS), (1, 8, 8, 3))
    theirs = flatten_dict(reference.wide_params()["score_model"], sep="/")
    assert result == {name: leaf.shape for name, leaf in theirs.items()}
    everywhere = shapes(vdm.Model(**reference.OPTIONS, attention=True), (1, 8, 8, 3))
    added = {name.split("/")[0] for name in set(everywhere) - set(result)}
    assert added == {"down.attn_0", "up.attn_0", "up.attn_1"}
    plain = shapes(vdm.Model(width=64, depth=1), (1, 8, 8, 3))
    assert size(result) - size(plain) == 9 * 12 * 64


@pytest.mark.slow
def test_an_untrained_network_gives_almost_zero() -> None:
    model = vdm.Model(width=8, depth=0)
    x, label = normal(0, 2, 4, 4, 3), np.float32([0.0, 700.0])
    out, _ = model.init_with_output(jax.random.key(1), x, label, train=False)
    assert jnp.abs(out).max() < 1e-3


@pytest.mark.parametrize(("groups", "depends"), [(32, False), (0, True)])
def test_group_norm_of_one_channel_erases_the_condition(groups: int, depends: bool) -> None:
    """With 32 groups for 32 channels, neither the noise level nor the class has any effect."""
    model = vdm.Model(width=32, depth=1, groups=groups, dropout=0.0)
    variables = random_params(model, (1, 4, 4, 3))
    x = normal(0, 1, 4, 4, 3)

    @jax.jit
    def out(label: Array, condition: Array) -> Array:
        return model.apply(variables, x, label[None], train=False, condition=condition[None])

    first, *others = (np.asarray(out(*each)) for each in ((10.0, 0.0), (700.0, 0.0), (10.0, 3.0)))
    for other in others:
        change = np.abs(other - first).max() / np.abs(first).max()
        assert change > 1e-2 if depends else change < 1e-5


def test_default_groups_leave_two_channels_each() -> None:
    result = [vdm.default_groups(width) for width in (4, 32, 48, 64, 80, 128, 256)]
    assert result == [2, 16, 24, 32, 20, 32, 32]


# ---- Fourier features ---------------------------------------------------------------------------

input_features = jax.jit(_layers.input_features, static_argnums=1)


def test_features_are_those_of_vdm() -> None:
    """sin and cos of 2 pi 2^n x for n = 6, 7; x first, then sines, then cosines, by channel."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 3))
    angles = [2 * math.pi * 2**n * x[..., c] for c in range(3) for n in (6, 7)]
    waves = [f(angle)[..., None] for f in (np.sin, np.cos) for angle in angles]
    expected = np.concatenate([x, *waves], axis=-1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(input_features(x, frequencies(256)), expected, atol=1e-11)
        np.testing.assert_array_equal(input_features(x, ()), x)


def test_frequencies_are_aligned_to_the_levels() -> None:
    """Features of frequency L are equal at all bins' centres, those of L / 2 at every second."""
    assert frequencies(256) == (128, 256)
    assert frequencies(17, 3) == (4.25, 8.5, 17)
    assert frequencies(17, 2, scale=0.5) == (4.25, 8.5)
    with jax.enable_x64(True):
        centres = np.asarray(bits.to_model(np.arange(17), 0.5, 17))[:, None]
        result = np.asarray(input_features(centres, frequencies(17)))[:, 1:]
    half, whole = result[:, [0, 2]], result[:, [1, 3]]
    np.testing.assert_allclose(whole - whole[:1], 0, atol=1e-12)
    np.testing.assert_allclose(half[2:] - half[:-2], 0, atol=1e-12)
    assert np.abs(half[1:] - half[:-1]).max(axis=1).min() > 1
    for wrong, message in (((1, 2), "levels is 1"), ((17, 0), "count is 0")):
        with pytest.raises(ValueError, match=message):
            frequencies(*wrong)
