"""The mathematics takes any score: one network in four libraries gives the same numbers.

The score is s(x, t) = -F(x, lambda(t)) / sigma(t) with F = W2 tanh(W1 [x, lambda / 10] + b1) + b2,
in plain JAX, Flax Linen, Flax NNX and Equinox, all with the same weights and each under its own
``jit`` and ``grad``. The plain function is the reference: the tests of ``losses``, ``bound`` and
``likelihood`` show that its numbers are right.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sbml import likelihood, losses
from sbml.core.types import Array, Key, Score
from sbml.likelihood import bound
from sbml.program.runtime import sharding
from sbml.score.divergence import Trace
from sbml.sdes import SDES, times

pytestmark = pytest.mark.usefixtures("x64")

SDE, EPS = SDES["vp"](), 1e-3
PROPOSAL = times.Importance(SDE, EPS)
D, WIDTH, N, DEVICES = 2, 16, 16, 8
Shards = Callable[[], dict[str, np.ndarray]]
SHAPES = {"w1": (WIDTH, D + 1), "b1": (WIDTH,), "w2": (D, WIDTH), "b2": (D,)}


def features(x: Array, t: Array) -> Array:
    """[x, lambda(t) / 10], shape ``(d + 1,)``."""
    return jnp.append(x, 0.1 * SDE.log_snr(t))


def plain(weights: dict[str, Array], x: Array, t: Array, key: Key | None) -> Array:
    hidden = jnp.tanh(weights["w1"] @ features(x, t) + weights["b1"])
    return -(weights["w2"] @ hidden + weights["b2"]) / SDE.std(t)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        hidden = jnp.tanh(nn.Dense(WIDTH, name="first")(features(x, t)))
        return -nn.Dense(D, name="last")(hidden) / SDE.std(t)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(D + 1, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, D, rngs=rngs)

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        return -self.last(jnp.tanh(self.first(features(x, t)))) / SDE.std(t)


class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key: Key) -> None:
        first_key, last_key = jax.random.split(key)
        self.first = eqx.nn.Linear(D + 1, WIDTH, key=first_key)
        self.last = eqx.nn.Linear(WIDTH, D, key=last_key)

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        return -self.last(jnp.tanh(self.first(features(x, t)))) / SDE.std(t)


class Library(NamedTuple):
    """The network written in one library.

    Attributes:
      net: a pytree of parameters, or the module that holds them.
      score: from ``net`` to the score.
      jit, value_and_grad: the library's own.
      to_plain: a gradient in the layout of the plain function's weights.
    """

    net: Any
    score: Callable[[Any], Score]
    jit: Callable[..., Any]
    value_and_grad: Callable[..., Any]
    to_plain: Callable[[Any], dict[str, Array]]


def from_flax(tree: Any) -> dict[str, Array]:
    first, last = tree["first"], tree["last"]
    leaves = first["kernel"].T, first["bias"], last["kernel"].T, last["bias"]
    return dict(zip(SHAPES, leaves, strict=True))


def in_plain(weights: dict[str, Array]) -> Library:
    def score(net: dict[str, Array]) -> Score:
        return functools.partial(plain, net)

    return Library(weights, score, jax.jit, jax.value_and_grad, dict)


def in_linen(weights: dict[str, Array]) -> Library:
    def score(net: Any) -> Score:
        return functools.partial(LinenNet().apply, net)

    first = {"kernel": weights["w1"].T, "bias": weights["b1"]}
    last = {"kernel": weights["w2"].T, "bias": weights["b2"]}
    net = {"params": {"first": first, "last": last}}
    return Library(net, score, jax.jit, jax.value_and_grad, lambda g: from_flax(g["params"]))


def in_nnx(weights: dict[str, Array]) -> Library:
    net = NnxNet(nnx.Rngs(0))
    for i, layer in ((1, net.first), (2, net.last)):
        layer.kernel, layer.bias = nnx.Param(weights[f"w{i}"].T), nnx.Param(weights[f"b{i}"])
    return Library(
        net,
        lambda net: net,
        nnx.jit,
        nnx.value_and_grad,
        lambda g: from_flax(nnx.to_pure_dict(g)),
    )


def in_equinox(weights: dict[str, Array]) -> Library:
    def leaves(net: EquinoxNet) -> list[Array]:
        return [net.first.weight, net.first.bias, net.last.weight, net.last.bias]

    net = eqx.tree_at(leaves, EquinoxNet(jax.random.key(0)), [weights[name] for name in SHAPES])
    return Library(
        net,
        lambda net: net,
        eqx.filter_jit,
        eqx.filter_value_and_grad,
        lambda g: dict(zip(SHAPES, leaves(g), strict=True)),
    )


LIBRARIES = {"plain": in_plain, "linen": in_linen, "nnx": in_nnx, "equinox": in_equinox}
OTHERS = [name for name in LIBRARIES if name != "plain"]
SHARDED = ("plain",)  # One is enough: compiled functions are split alike for all libraries.


@functools.cache
def library(name: str) -> Library:
    rng = np.random.default_rng(0)
    return LIBRARIES[name]({k: jnp.asarray(rng.normal(0, 0.5, s)) for k, s in SHAPES.items()})


def batch() -> tuple[Array, Array, Array]:
    """x ``(n, d)``, keys ``(n,)`` and points ``(n, 4)`` in [0, 1)."""
    x_key, u_key, key = jax.random.split(jax.random.key(0), 3)
    x = 0.5 * jax.random.normal(x_key, (N, D))
    return x, jax.random.split(key, N), times.lattice(u_key, N, 4)


def loss(score: Score, x: Array, keys: Array, u: Array) -> Array:
    """Losses ``(n,)`` of a batch, one time each, in nats."""
    t, weight = PROPOSAL.at(u[:, 0])
    return weight * losses.dsm_batch(score, SDE, x, t, keys)


def elbo(score: Score, x: Array, key: Key, u: Array, trace: Trace | None) -> bound.Bound:
    return bound.elbo(score, SDE, x, key, eps=EPS, u=u, trace=trace)


def numbers(score: Score, x: Array, keys: Array, u: Array) -> dict[str, Array]:
    """The losses and the terms of both forms of the bound, ``(n,)`` each, in nats."""
    found = {"loss": loss(score, x, keys, u)}
    for form, trace in {"dsm": None, "ssm": Trace("exact")}.items():
        terms = jax.vmap(functools.partial(elbo, score, trace=trace))(x, keys, u)
        found |= {f"{form}_{name}": term for name, term in terms._asdict().items()}
    return found


def objective(score: Score, x: Array, keys: Array, u: Array) -> tuple[Array, dict[str, Array]]:
    """The mean of the loss plus the means of both forms of the bound, and the numbers."""
    found = numbers(score, x, keys, u)
    return sum(jnp.mean(values) for values in found.values()), found


def logp(score: Score, x: Array, keys: Array) -> dict[str, Array]:
    solve = functools.partial(likelihood.ode_logp, score, SDE, eps=EPS)
    return {"logp": jax.vmap(solve)(x, keys).logp}


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """((objective, numbers), gradient) of a network and a batch."""
    this = library(name)
    return this.jit(
        this.value_and_grad(lambda net, *data: objective(this.score(net), *data), has_aux=True)
    )


def on(name: str, data: tuple[Array, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The numbers, and the objective's gradient in the plain layout."""
    (_, found), gradient = compiled(name)(library(name).net, *data)
    return found, library(name).to_plain(gradient)


def solved(name: str, x: Array, keys: Array) -> dict[str, Array]:
    this = library(name)
    return this.jit(lambda net, *data: logp(this.score(net), *data))(this.net, x, keys)


@functools.cache
def plain_logp() -> dict[str, Array]:
    return solved("plain", *batch()[:2])


@functools.cache
def results(name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    return on(name, batch())


def close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to rounding, each array relative to its largest entry."""
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        assert a.dtype == expected[name].dtype == np.float64
        # The solver's step control amplifies rounding errors, to 1e-4 of its tolerance at most.
        atol = (1e-8 if name == "logp" else 1e-11) * np.max(np.abs(expected[name]))
        np.testing.assert_allclose(a, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    """Results on 8 devices, computed beside the other tests by a process of its own."""
    path = tmp_path_factory.mktemp("shards") / "results.npz"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={DEVICES}",
    }
    command = [sys.executable, "-c", f"import test_library as t; t.save_sharded({str(path)!r})"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:

        @functools.cache
        def finished() -> dict[str, np.ndarray]:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
            with np.load(path) as file:
                return dict(file)

        yield finished
        process.kill()


def save_sharded(path: str) -> None:
    """That process runs this function: it splits the batch along the mesh's axis ``data``, and
    computes and saves all numbers."""
    assert jax.device_count() == DEVICES
    data = jax.device_put(batch(), sharding.batch_sharding(sharding.data_mesh()))
    saved = {}
    for name in SHARDED:
        found, gradient = on(name, data)
        found |= solved(name, *data[:2])
        for key, array in found.items():  # Each device has only its own rows.
            assert array.addressable_shards[0].data.shape == (N // DEVICES,), (name, key)
        saved |= {f"{name}/{key}": array for key, array in (found | gradient).items()}
    np.savez(path, **saved)


@pytest.fixture(autouse=True)
def _start(shards: Shards) -> None:
    """The first test of the module starts the process."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_numbers_are_those_of_the_plain_function(name: str) -> None:
    close(results(name)[0], results("plain")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_gradient_is_that_of_the_plain_function(name: str) -> None:
    close(results(name)[1], results("plain")[1])


@pytest.mark.slow
def test_the_gradient_is_the_derivative_of_the_objective() -> None:
    net, h = library("plain").net, 1e-5
    rng = np.random.default_rng(1)
    direction = {k: jnp.asarray(rng.normal(size=shape)) for k, shape in SHAPES.items()}

    def moved(by: float) -> Array:
        there = jax.tree.map(lambda w, v: w + by * v, net, direction)
        return compiled("plain")(there, *batch())[0][0]

    slope = sum(jnp.vdot(direction[k], g) for k, g in results("plain")[1].items())
    np.testing.assert_allclose((moved(h) - moved(-h)) / (2 * h), slope, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_one_example_without_jit_or_vmap(name: str) -> None:
    score = library(name).score(library(name).net)
    x, key, u = (a[0] for a in batch())
    t, weight = PROPOSAL.at(u[0])
    found = {"loss": weight * losses.dsm(score, SDE, x, t, key)}
    close(found, {"loss": results("plain")[0]["loss"][0]})


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_batch_split_over_devices_changes_nothing(name: str, shards: Shards) -> None:
    found, gradient = results(name)
    close({k: shards()[f"{name}/{k}"] for k in found | gradient}, found | gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_the_likelihood_is_that_of_the_plain_function_on_one_device(
    name: str, shards: Shards
) -> None:
    close({"logp": shards()[f"{name}/logp"]}, plain_logp())


VARIANCES = np.array([0.25, 1.0])  # The data of the training loops are N(0, diag(VARIANCES)).


def true_score(x: Array, t: Array, key: Key | None) -> Array:
    return -x / (SDE.mean_coef(t) ** 2 * VARIANCES + SDE.std(t) ** 2)


def training_loss(score: Score, key: Key, n: int = 256) -> Array:
    """The mean loss of n fresh examples, nats."""
    x_key, time_key, noise_key = jax.random.split(key, 3)
    x = jnp.sqrt(VARIANCES)[None] * jax.random.normal(x_key, (n, D))
    return jnp.mean(loss(score, x, jax.random.split(noise_key, n), times.lattice(time_key, n)))


def train_nnx(steps: Array) -> Score:
    net = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(2e-2), wrt=nnx.Param)

    @nnx.jit
    def step(net: NnxNet, optimizer: nnx.Optimizer, key: Key) -> None:
        optimizer.update(net, nnx.grad(training_loss)(net, key))

    for key in steps:
        step(net, optimizer, key)
    return net


def train_equinox(steps: Array) -> Score:
    net, optimizer = EquinoxNet(jax.random.key(0)), optax.adam(2e-2)
    state = optimizer.init(eqx.filter(net, eqx.is_array))

    @eqx.filter_jit
    def step(net: EquinoxNet, state: Any, key: Key) -> tuple[EquinoxNet, Any]:
        updates, state = optimizer.update(eqx.filter_grad(training_loss)(net, key), state)
        return eqx.apply_updates(net, updates), state

    for key in steps:
        net, state = step(net, state, key)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_nnx, train_equinox])
def test_training_approaches_the_least_loss(train: Callable[[Array], Score]) -> None:
    """The true score of N(0, diag(c)) has the least loss, 1/2 sum log(1 + c alpha^2 / sigma^2) at
    eps minus the same at T. The loss of a trained network of 16 units is at most 5% larger."""
    test_key, train_key = jax.random.split(jax.random.key(3))
    trained = train(jax.random.split(train_key, 300))

    @jax.jit
    def test_loss() -> list[Array]:
        return [training_loss(score, test_key, 16384) for score in (true_score, trained)]

    def information(t: float) -> float:
        snr = np.exp(SDE.log_snr(jnp.asarray(t)))
        return 0.5 * np.sum(np.log1p(VARIANCES * snr))

    least, found = test_loss()
    np.testing.assert_allclose(least, information(EPS) - information(SDE.T), rtol=0.02)
    assert least < found < 1.05 * least
