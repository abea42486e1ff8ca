"""Helpers of the tests of networks. They find the shapes of the parameters without computing, and
make parameters without the initialisers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.result_type(float))


@functools.cache
def shapes(model: nn.Module, x_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter.

    This also asserts what holds for every network: the output has the shape of ``x``, with one more
    axis if the network has several ``outputs``, and is float32 like the parameters.
    """
    x, label = np.zeros(x_shape, np.float32), np.ones(x_shape[0], np.float32)
    keys = {"params": KEY, "dropout": KEY}
    out, variables = jax.eval_shape(lambda: model.init_with_output(keys, x, label, train=True))
    assert set(variables) == {"params"}
    several = (model.outputs,) if model.outputs else ()
    assert (out.shape, out.dtype) == ((*x_shape, *several), jnp.dtype("float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    flat = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def size(tree: dict[str, tuple[int, ...]]) -> int:
    """The number of entries of all parameters of these shapes."""
    return sum(int(np.prod(shape)) for shape in tree.values())


def random_params(model: nn.Module, x_shape: tuple[int, ...]) -> dict[str, Any]:
    """Random variables for the model, none of which is 0. Nothing is compiled."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in shapes(model, x_shape).items():
        spread = 1 / np.sqrt(np.prod(shape[:-1]))
        flat[path] = rng.normal(float(path.endswith("scale")), spread, shape).astype("float32")
    return {"params": unflatten_dict(flat, sep="/")}


def same(actual: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=1e-6)
