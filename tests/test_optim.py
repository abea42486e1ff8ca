"""The optimizer, compared with formulas of Adam and Muon: clipping, weight decay and schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml import losses
from sbml.program.config import build
from sbml.program.config.config import default
from sbml.program.config.optim import Optim, muon_dimensions
from sbml.program.config.training import loss_unit


def adam(**changes):
    options = {"lr": 1e-2, "warmup": 0, "weight_decay": 0.0, "grad_clip": 0.0}
    return Optim(**{**options, **changes}).transformation(10, unit=1.0)


def rate(lr, warmup, schedule, num_steps):
    return Optim(lr=lr, warmup=warmup, schedule=schedule).rate(num_steps)


@functools.partial(jax.jit, static_argnums=0)
def step(optimizer, params, *grads):
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adam_by_hand_with_clipping():
    """Two steps of Kingma and Ba's algorithm; a gradient of norm 5 is scaled to norm 1."""
    g, m, v, p = np.array([3.0, 4.0]), 0.0, 0.0, np.array([1.0, -1.0])
    for t in (1, 2):
        clipped = g / 5
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        p = p - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    got = step(adam(grad_clip=1.0), np.array([1.0, -1.0]), g, g)
    np.testing.assert_allclose(got, p, rtol=1e-5)


def orthogonalized(g):
    """Five steps of Jordan et al.'s quintic iteration of the singular values of g / |g|:
    s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, which leads near 1."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s /= np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert np.all(abs(s - 1) < 0.5)
    return (u * s) @ v


def test_muon_by_hand():
    """Two steps with Nesterov's momentum. A kernel of a convolution is a matrix of (h w in) x out.
    The other parameters take the steps of Adam with Nesterov's momentum (Dozat 2016)."""
    draw = np.random.default_rng(0).normal
    kernel, first = draw(size=(2, 2, 3, 5)), {"kernel": draw(size=(2, 3)), "bias": draw(size=3)}
    params = {"Block_0": {"Conv_0": {"kernel": kernel, "bias": first["bias"]}}, "Conv_0": first}
    grads = [jax.tree.map(lambda p: draw(size=p.shape), params) for _ in range(2)]
    got = step(adam(name="muon", weight_decay=0.1), params, *grads)
    m, p = 0.0, kernel.reshape(12, 5)
    for t, grad in enumerate(grads, start=1):
        g = grad["Block_0"]["Conv_0"]["kernel"].reshape(12, 5)
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        p = p - 1e-2 * (0.2 * np.sqrt(12) * orthogonalized(ahead) + 0.1 * p)
    np.testing.assert_allclose(got["Block_0"]["Conv_0"]["kernel"].reshape(12, 5), p, rtol=1e-4)
    m, v, p = 0.0, 0.0, first["kernel"]
    for t, grad in enumerate(grads, start=1):
        g = grad["Conv_0"]["kernel"]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        p = p - 1e-2 * (ahead / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(got["Conv_0"]["kernel"], p, rtol=1e-5)


UNET2D = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


@pytest.mark.parametrize(
    ("network", "fields", "outside"),
    [
        ("ncsnpp", SMALL, {"Conv_0", "Conv_1", "Dense_0", "Dense_1"}),
        ("unet2d", UNET2D, {"conv_in", "conv_out"}),
        ("vdm", {"width": 32, "depth": 1}, {"conv_in", "conv_out", "dense0", "dense1"}),
    ],
)
def test_muon_changes_the_kernels_inside_blocks_alone(network, fields, outside):
    """These are all parameters with two axes or more, except for those outside blocks and the
    embedding of the classes."""
    config = tiny.get_config()
    with config.unlocked():
        config.model = default(network).model
    config.model.update(fields, classes=10)
    experiment = build.Experiment(config)
    shapes = jax.eval_shape(lambda key: experiment.adapter.init(key, (8, 8, 1)), jax.random.key(0))
    shapes = flatten_dict(shapes)
    dimensions = flatten_dict(muon_dimensions(unflatten_dict(shapes)))
    adams = set()
    for path, leaf in shapes.items():
        if leaf.ndim >= 2 and dimensions[path] is None:
            adams.add(path[0])
        else:
            last = leaf.ndim - 1
            assert dimensions[path] == ((tuple(range(last)), last) if last else None)
    assert adams == {*outside, "classes"}


def test_muon_needs_blocks():
    with pytest.raises(ValueError, match="optim.name=muon: the network has no kernels inside blo"):
        adam(name="muon").init({"Dense_0": {"kernel": np.ones((2, 2))}})


def test_only_kernels_decay():
    params = {"kernel": np.ones((2, 2)), "W": np.ones(3)}
    zero = {"kernel": np.zeros((2, 2)), "W": np.zeros(3)}
    got = step(adam(weight_decay=0.1), params, zero)
    np.testing.assert_allclose(got["kernel"], 1 - 1e-2 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(got["W"], params["W"])


def test_a_run_may_continue_with_other_settings():
    """The state has the same structure for all settings, so a checkpoint with any of them can be
    restored."""
    params = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}
    states = [
        adam(weight_decay=decay, grad_clip=clip).init(params)
        for decay in (0.0, 0.1)
        for clip in (0.0, 1.0)
    ]
    assert len({jax.tree.structure(state) for state in states}) == 1


def test_scales_biases_and_embeddings_with_several_axes_do_not_decay():
    """Flow++'s elementwise scale and bias, and its embedding of positions, have several axes."""
    params = {name: np.ones((2, 1, 3)) for name in ("scale", "bias", "pos_emb", "pos_emb_dq")}
    got = step(adam(weight_decay=0.1), params, jax.tree.map(np.zeros_like, params))
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_schedules():
    constant = rate(2e-4, 5_000, "constant", 10_000)
    steps = np.array([0, 1, 2_500, 5_000, 9_999])
    np.testing.assert_allclose(jax.jit(constant)(steps), [0, 4e-8, 1e-4, 2e-4, 2e-4], rtol=1e-3)
    cosine = rate(1.0, 100, "cosine", 1_100)
    steps = np.array([50, 100, 600, 1_100])
    np.testing.assert_allclose(jax.jit(cosine)(steps), [0.5, 1, 0.5, 0], atol=1e-6)
    assert rate(1.0, 0, "constant", 10)(0) == 1.0


@pytest.mark.parametrize("warmup", [10, 40])
def test_a_cosine_run_shorter_than_its_warmup_only_rises(warmup):
    rising = rate(1.0, warmup, "cosine", 10)
    steps = np.array([0, 5, 9])
    np.testing.assert_allclose(jax.jit(rising)(steps), steps / warmup, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_short_run_warns_of_its_warmup_and_average(schedule, caplog):
    config = tiny.get_config()
    config.optim.schedule = schedule
    section = build.Experiment(config).config.optim
    section.warn_if_short(config.training.num_steps)
    assert not caplog.records
    section.replace(warmup=5000, ema=0.9999).warn_if_short(1000)
    warmup, average = (record.getMessage() for record in caplog.records)
    assert "optim.warmup=5000 in a run of 1000 steps: the learning rate only rises" in warmup
    assert "weight of 90% in the averaged" in average and "set --config.optim.ema=0.9935" in average


@pytest.mark.parametrize(
    ("flags", "theirs"),
    [
        ((True, True), 1.0),
        ((False, False), 1.0),
        ((True, False), lambda sde, t: (sde.diffusion(t) / sde.std(t)) ** 2),
        ((False, True), None),
    ],
)
def test_gradients_are_clipped_in_the_unit_of_the_papers_loss(flags, theirs):
    """The loss of this package is ``loss_unit`` times the paper's.

    With a score of 0, the paper's loss is the mean of |z|^2. With the likelihood weighting and
    without importance sampling, it is the mean of g^2 / std^2 |z|^2.
    """
    config = tiny.get_config()
    config.training.update(likelihood_weighting=flags[0], importance_sampling=flags[1])
    experiment = build.Experiment(config)
    unit = loss_unit(experiment.sde, experiment.config.training, experiment.adapter.eps)

    @jax.jit
    def ratios(key):
        t, weight = experiment.proposal.at((jnp.arange(64) + 0.5) / 64)
        x, keys = jnp.zeros((64, 4096)), jax.random.split(key, 64)
        zero = jax.tree_util.Partial(lambda x, t, key: 0 * x)
        terms = losses.dsm_batch(
            zero, experiment.sde, x, t, keys, weighting=experiment.config.training.weighting
        )
        # If no paper has this loss, ours is compared with weight |z|^2.
        loss = theirs(experiment.sde, t) if callable(theirs) else theirs or weight
        return weight * terms / 4096 / loss

    found = np.asarray(ratios(jax.random.key(0)))
    np.testing.assert_allclose(found, unit, rtol=0.1)
    np.testing.assert_allclose(np.mean(found), unit, rtol=0.01)
    clipped = jax.jit(experiment.optimizer.update)
    # After one step, Adam's mean is a tenth of its input.
    params, gradient = {"w": np.zeros(4, np.float32)}, {"w": np.full(4, 50, np.float32)}
    _, state = clipped(gradient, experiment.optimizer.init(params), params)
    (mu,) = optax.tree.get_all_with_path(state, "mu")[0][1:]
    assert np.linalg.norm(mu["w"]) == pytest.approx(0.1 * unit, rel=1e-5)
