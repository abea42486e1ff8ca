"""The Flow++ dequantizer: closed forms, its inverse, its initialisation, and reference numbers.

``data/flowpp_small.npz`` holds a flow with the names and the layout of Song et al. For each array
of parameters it stores small integers and the number by which they are multiplied. For two images
it also holds the logits of u and log q, computed by a separate implementation in NumPy and float64,
which was compared with float32 numbers of Song et al.'s code. ``flowpp_numpy`` is another such
implementation, for both designs (that of CIFAR-10 and that of ImageNet 32x32).
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flowpp_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import special, stats

from sbml.core.types import Array
from sbml.dequantizers import _flowpp_flow as flow
from sbml.dequantizers import _flowpp_layers as layers
from sbml.dequantizers import _mixture_logistic as mixture_logistic
from sbml.dequantizers import variational as flowpp

FILE = Path(__file__).parent / "data" / "flowpp_small.npz"
TINY = flowpp.Model(filters=8, components=3, blocks=1, heads=2, levels=17)
SHAPE = (4, 4, 2)
FORWARD = jax.jit(flowpp.Model.forward, static_argnums=0)
# The designs differ in the order and the inside of their layers, for both of which NumPy finds the
# same numbers. The other tests are for one of them.
ONE = pytest.mark.parametrize("tiny", ["imagenet32"], indirect=True)


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", params=["cifar10", "imagenet32"])
def tiny(request: pytest.FixtureRequest, small_designs: None) -> flowpp.Model:
    """A small flow of each design."""
    return dataclasses.replace(TINY, design=f"small {request.param}")


def pixels(n: int, seed: int = 0) -> Array:
    k = np.random.default_rng(seed).integers(0, TINY.levels, (n, *SHAPE))
    return jnp.asarray(k, jnp.uint8)


@pytest.fixture(scope="module")
def params(tiny: flowpp.Model) -> Any:
    """Random parameters for which no layer is near the identity map. They are used instead of the
    initialisers, which are slow to compile."""
    rng = np.random.default_rng(7)

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape).astype(np.float32)
        match path[-1]:
            case "kernel":
                gain = 0.3 if path[-2].endswith("proj_out") else 1.0
                return noise * np.float32(gain / np.sqrt(np.prod(shape[:-1])))
            case "scale":
                gain = 0.3 if path[-2].endswith("proj_out") else 1.0
                return np.float32(gain) * (1.0 + np.float32(0.2) * noise)
            case "W0" | "W1":
                return np.eye(len(noise), dtype=np.float32) + np.float32(0.3) * noise
            case "direction":
                return noise
        return np.float32(0.2) * noise

    shapes = jax.eval_shape(tiny.init, jax.random.key(0), pixels(2))
    return unflatten_dict({k: draw(k, x.shape) for k, x in flatten_dict(shapes).items()})


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The parameters of the file under Song et al.'s names, and all arrays of the file."""
    with np.load(FILE) as file:
        arrays = {name: file[name] for name in file}
    shapes = json.loads(str(arrays["names"]))
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    theirs: dict[str, Any] = {}
    pieces = np.split(arrays["integers"], ends[:-1])
    for (name, shape), piece, step in zip(shapes.items(), pieces, arrays["steps"], strict=True):
        module, leaf = name.split("/")
        theirs.setdefault(module, {})[leaf] = piece.reshape(shape) * step
    return theirs, arrays


def mixture(seed: int, shape: tuple[int, ...], components: int) -> mixture_logistic.Mixture:
    arrays = np.random.default_rng(seed).normal(size=(3, *shape, components))
    return mixture_logistic.Mixture(*arrays)


# The map by a mixture of logistic distributions: the logit of its distribution function

logit_cdf = jax.jit(mixture_logistic.logit_cdf, static_argnames="clipped")


def test_the_map_is_the_logit_of_the_mixtures_cdf_and_its_slope() -> None:
    with jax.enable_x64(True):
        m = mixture(0, (40,), 5)
        x = np.linspace(-3, 3, 40)
        y, log_slope = logit_cdf(x, m)
        w = special.softmax(m.logits, axis=-1)
        cdf = (w * stats.logistic.cdf(x[:, None], m.means, np.exp(m.log_scales))).sum(-1)
        np.testing.assert_allclose(y, np.log(cdf) - np.log1p(-cdf), rtol=1e-10, atol=1e-12)
        scalar = jax.jit(jax.vmap(jax.grad(lambda x, m: mixture_logistic.logit_cdf(x, m)[0])))
        np.testing.assert_allclose(log_slope, np.log(scalar(x, m)), rtol=1e-9, atol=1e-11)


def test_one_component_is_affine_however_far_out() -> None:
    x = np.float32([-3e3, -50.0, 0.3, 50.0, 3e3])
    one = mixture_logistic.Mixture(*(np.full((5, 1), v) for v in (4.0, 0.5, -1.0)))
    y, log_slope = logit_cdf(x, one)
    np.testing.assert_allclose(y, (x - 0.5) * np.exp(1.0), rtol=1e-6)
    np.testing.assert_allclose(log_slope, 1.0, rtol=2e-5)


def test_the_clipped_map_is_the_same_between_its_clips_and_constant_beyond() -> None:
    m = mixture_logistic.Mixture(*np.zeros((3, 3, 2)))
    x = np.float32([-5.0, 5.0, 40.0])
    exact, exact_slope = jax.device_get(logit_cdf(x, m))
    y, log_slope = jax.device_get(logit_cdf(x, m, clipped=True))
    np.testing.assert_allclose(y[:2], exact[:2], atol=1e-4)
    np.testing.assert_allclose(log_slope[:2], exact_slope[:2], atol=1e-4)
    np.testing.assert_allclose(y[2], -np.log(1e-7), rtol=1e-6)
    np.testing.assert_allclose(log_slope[2], -40.0 - np.log(1e-7), rtol=1e-6)


# Initialisation


@pytest.mark.parametrize(
    ("kernel_size", "weight_norm"), [((), False), ((3, 3), False), ((3, 3), True)]
)
def test_an_affine_layer_starts_with_mean_0_and_the_chosen_deviation(
    kernel_size: tuple[int, ...], weight_norm: bool
) -> None:
    x = np.random.default_rng(0).normal(3, 5, (8, 4, 4, 6))
    layer = layers.Affine(10, kernel_size, 0.1, weight_norm)
    y, variables = jax.device_get(jax.jit(layer.init_with_output)(jax.random.key(1), x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=1e-6)
    np.testing.assert_allclose(y.std((0, 1, 2)), 0.1, rtol=1e-4)
    names = {"direction", "scale", "bias"} if weight_norm else {"kernel", "bias"}
    assert set(variables["params"]) == names


def test_the_length_of_a_weight_normalised_kernel_is_its_scale() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 6))
    layer = layers.Affine(10, (3, 3), weight_norm=True)
    apply = jax.jit(layer.apply)
    p = jax.device_get(jax.jit(layer.init)(jax.random.key(1), x)["params"])
    longer, wider = {"direction": 7 * p["direction"]}, {"scale": 2 * p["scale"]}
    y, same, twice = (np.asarray(apply({"params": {**p, **q}}, x)) for q in ({}, longer, wider))
    np.testing.assert_allclose(same, y, atol=1e-5)
    np.testing.assert_allclose(twice - p["bias"], 2 * (y - p["bias"]), atol=1e-5)


@pytest.mark.slow
@ONE
def test_channels_have_mean_0_and_variance_1_after_each_activation_norm(
    tiny: flowpp.Model,
) -> None:
    image = tiny.image(pixels(32))
    noise = 2.0 + 3.0 * jax.random.normal(jax.random.key(0), image.shape)
    network = flow.Flow(tiny)
    # The rbg generator compiles in half the time of the default one.
    variables = jax.jit(network.init)(jax.random.key(1, impl="rbg"), image, noise)
    norms = {
        "capture_intermediates": lambda module, _: isinstance(module, flow.Norm),
        "mutable": ["intermediates"],
    }
    _, seen = jax.jit(partial(network.apply, **norms))(variables, image, noise)
    for i in range(2):
        halves, _ = seen["intermediates"][f"Norm_{i}"]["__call__"][0]
        for half in halves:
            np.testing.assert_allclose(half.mean((0, 1, 2)), 0.0, atol=1e-4)
            np.testing.assert_allclose(half.var((0, 1, 2)), 1.0, rtol=1e-3)


def test_initialisation_refuses_one_example_and_odd_widths() -> None:
    for shape in ((4, 4, 3), (2, 4, 5, 3)):
        with pytest.raises(ValueError, match="^pixels"):
            TINY.init(jax.random.key(0), np.zeros(shape, np.uint8))


# The flow


def test_halves_are_even_and_odd_columns_and_merge_undoes_split() -> None:
    x = np.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    even, odd = jax.jit(flow.split)(x)
    np.testing.assert_array_equal(even, x[:, :, [0, 2]])
    np.testing.assert_array_equal(odd, x[:, :, [1, 3]])
    np.testing.assert_array_equal(jax.jit(flow.merge)((even, odd)), x)


@pytest.mark.slow
@ONE
def test_log_q_is_the_change_of_variables_by_the_full_jacobian(
    tiny: flowpp.Model, params: Any
) -> None:
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        k, eps = pixels(1, 2), np.random.default_rng(0).normal(size=(1, *SHAPE))

        def flat(eps: Array) -> tuple[Array, Array]:
            u, log_q = tiny.forward(double, k, eps.reshape(1, *SHAPE))
            return u.ravel(), log_q

        derivative = jax.jit(jax.jacfwd(flat, has_aux=True))
        jacobian, log_q = derivative(jnp.asarray(eps.ravel()))
        log_det = np.linalg.slogdet(jacobian)[1]
        log_normal = stats.norm.logpdf(eps).sum()
        np.testing.assert_allclose(log_q[0], log_normal - log_det, rtol=1e-9, atol=1e-8)


@pytest.mark.slow
@ONE
def test_one_example_alone_and_in_a_batch_have_the_same_noise(
    tiny: flowpp.Model, params: Any
) -> None:
    k, keys = pixels(3, 3), jax.random.split(jax.random.key(5), 3)
    u, log_q = jax.jit(tiny.sample_batch)(params, k, keys)
    one, log_q_one = jax.jit(tiny.sample)(params, k[1], keys[1])
    assert one.shape == SHAPE and log_q_one.shape == ()
    np.testing.assert_allclose(one, u[1], atol=1e-6)
    np.testing.assert_allclose(log_q_one, log_q[1], atol=1e-4)


@pytest.mark.slow
@ONE
def test_u_is_below_1_even_where_the_sigmoid_rounds_to_it(tiny: flowpp.Model, params: Any) -> None:
    u, log_q = FORWARD(tiny, params, pixels(8), jnp.full((8, *SHAPE), 1e4, jnp.float32))
    assert float(u.max()) < 1.0
    assert float(jax.nn.sigmoid(jnp.float32(1e4))) == 1.0
    assert bool(jnp.isfinite(log_q).all())


@pytest.mark.slow
@ONE
def test_dropout_changes_the_noise_only_in_training(tiny: flowpp.Model, params: Any) -> None:
    model = dataclasses.replace(tiny, dropout=0.5)
    k, key = pixels(1)[0], jax.random.key(6)
    evaluation, _ = jax.jit(model.sample)(params, k, key)
    np.testing.assert_array_equal(evaluation, jax.jit(tiny.sample)(params, k, key)[0])
    training, _ = jax.jit(partial(model.sample_batch, train=True))(params, k[None], key[None])
    assert float(jnp.abs(training[0] - evaluation).max()) > 1e-3


# Numbers and names of parameters, and results of other implementations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "count"),
    [
        (flowpp.Model(), 3_466_976),
        (flowpp.Model("imagenet32", filters=128, blocks=8), 35_482_720),
    ],
    ids=["cifar10", "imagenet32"],
)
def test_the_models_have_the_published_numbers_of_parameters(
    model: flowpp.Model, count: int
) -> None:
    batch = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


# With -9 some log-scales are below -7, and the model replaces these by -7.
@pytest.mark.slow
@pytest.mark.parametrize("log_scale", [0.0, -9.0])
def test_numpy_finds_the_same_logits_and_log_q(
    log_scale: float, tiny: flowpp.Model, params: Any
) -> None:
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        last = double[f"MixLogisticAttnCoupling_{layers.DESIGNS[tiny.design].couplings - 1}"]
        bias = last["block0_proj_out"]["bias"].reshape(-1, 2 + 3 * tiny.components)
        last["block0_proj_out"]["bias"] = bias.at[:, -tiny.components :].add(log_scale).ravel()
        k, eps = pixels(8, 4), np.random.default_rng(2).normal(size=(8, *SHAPE))
        u, log_q = (a[:3] for a in FORWARD(tiny, double, k, jnp.asarray(eps)))
    foreign = flowpp_numpy.foreign(double)
    logits, expected = flowpp_numpy.flow(foreign, np.asarray(k[:3]) / 16 - 0.5, eps[:3], 1, 2)
    # jax.nn.dot_product_attention has a softmax in float32; narrow logistics magnify its error.
    np.testing.assert_allclose(u, special.expit(logits), atol=1e-6 if log_scale else 1e-7)
    np.testing.assert_allclose(log_q, expected, rtol=1e-8, atol=1e-6)
    again = flowpp.from_reference(foreign)
    jax.tree.map(np.testing.assert_array_equal, again, double)
    options = {"filters": 8, "components": 3, "blocks": 1, "heads": 2}
    design = tiny.design.removeprefix("small ")
    assert flowpp.read_options(again, {"heads": 2}) == {"design": design, **options}


def test_foreign_parameters_become_exactly_the_models_tree(reference: Any) -> None:
    theirs, arrays = reference
    ours = flatten_dict(flowpp.from_reference(theirs))
    model = flowpp.Model(filters=16, components=4)
    expected = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), arrays["pixels"]))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.slow
def test_logits_and_log_q_of_a_foreign_flow(reference: Any) -> None:
    theirs, arrays = reference
    model = flowpp.Model(filters=16, components=4)
    u, log_q = jax.jit(model.forward)(
        flowpp.from_reference(theirs), arrays["pixels"], arrays["eps"]
    )
    np.testing.assert_allclose(u, jax.nn.sigmoid(arrays["logits"]), atol=1e-5)
    np.testing.assert_allclose(log_q, arrays["log_q"], atol=1e-3)


# Options
