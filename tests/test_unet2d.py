"""diffusers' UNet2DModel: its outputs, its files, errors for what does not fit, and training."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import unet2d_reference as reference
from flax.traverse_util import flatten_dict
from linen import normal, random_params, shapes

from sbml.networks import unet2d
from sbml.runtime.trees import differences

DATA = np.load(Path(__file__).parent / "data" / "unet2d.npz")
SHAPES = json.loads(str(DATA["shapes"]))


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def state(name: str) -> dict[str, np.ndarray]:
    return {key: reference.weight(key, tuple(shape)) for key, shape in SHAPES[name].items()}


def model(name: str, **options: Any) -> unet2d.Model:
    return unet2d.Model(**unet2d.fields(reference.CONFIGS[name]), **options)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: unet2d.Model, params: Any, x: Any, label: Any) -> jax.Array:
    return model.apply({"params": params}, x, label, train=False)


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_outputs_are_those_of_diffusers(name: str) -> None:
    params = unet2d.params(state(name))
    x, label = reference.inputs(reference.CONFIGS[name])
    expected = {
        path: jax.ShapeDtypeStruct(s, float) for path, s in shapes(model(name), x.shape).items()
    }
    assert not differences({"/".join(k): v for k, v in flatten_dict(params).items()}, expected)
    out = apply(model(name), params, x, label)
    print(name, np.abs(reference.pixels(out) - DATA[name]).max())
    np.testing.assert_allclose(reference.pixels(out), DATA[name], rtol=0, atol=1e-5)
