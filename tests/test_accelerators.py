"""What is traced for an accelerator: no path of the CPU, full precision, equal blocks as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen import normal, random_params
from ml_collections import ConfigDict

from benchmarks import accelerators, hlo_cost
from sbml import convolution
from sbml.build import Experiment
from sbml.config import default
from sbml.networks import _dropout, _pixel_sums, ncsnpp
from sbml.platform import compiling_for, platform
from sbml.runtime import sharding

CPU_ONLY = [
    (convolution, "_convolve"),
    (convolution, "_add_bias"),
    (_pixel_sums, "_moments"),
    (_pixel_sums, "_spread"),
    (_dropout, "_threefry"),
    (ncsnpp, "materialise"),
]


def config() -> ConfigDict:
    """As large as the CPU's paths need, and as small as that."""
    config = default()
    config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(32,))
    config.training.batch_size = 2
    config.eval.update(batch_size=1, control=False)
    config.sampling.batch_size = 1
    return config


@pytest.mark.parametrize("place", CPU_ONLY, ids=lambda place: place[1])
def test_no_path_of_the_cpu_is_in_an_accelerators_program(
    place: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    original = getattr(*place)
    monkeypatch.setattr(*place, lambda *arguments: used.append(place) or original(*arguments))
    experiment, mesh = Experiment(config()), sharding.data_mesh()
    accelerators.training(experiment, mesh)
    assert used  # The CPU's own step has it.
    used.clear()
    with compiling_for("tpu", 1):
        accelerators.training(experiment, mesh)
    assert not used


@pytest.mark.parametrize("name", ["ode", "bound"])
def test_evaluation_multiplies_at_full_precision(name: str) -> None:
    """By default TPUs and GPUs multiply float32 numbers at less; training and sampling may."""
    experiment, mesh = Experiment(config()), sharding.data_mesh()
    with compiling_for("tpu", 1):
        lowered = accelerators.PROGRAMS[name](experiment, mesh)
        assert "dot_general" in lowered.as_text() and "convolution" in lowered.as_text()
        assert accelerators.low_precision(lowered) == 0
        assert accelerators.low_precision(accelerators.sampling(experiment, mesh)) > 10


def test_the_declared_platform_ends_with_its_context() -> None:
    assert platform().name == "cpu"
    with compiling_for("tpu", 4):
        assert platform() == ("tpu", 4)
    assert platform().name == "cpu"


@pytest.mark.parametrize(
    ("options", "remat"),
    [({"resblock_type": "ddpm", "progressive": "residual"}, False), ({}, True)],
    ids=str,
)
def test_loops_over_equal_blocks_and_recomputation_change_nothing(
    options: dict, remat: bool
) -> None:
    """Outputs and gradients, with the same dropout."""
    sizes = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 2, "attn_resolutions": (4,)}
    model = ncsnpp.Model(**{**sizes, "dropout": 0.3, "init_scale": 1.0, **options})
    x, label = normal(1, 2, 8, 8, 3), jnp.array([1.0, 30.0])
    params = random_params(model, x.shape)

    def loss(model: ncsnpp.Model, params: dict) -> tuple[jax.Array, jax.Array]:
        key = {"dropout": jax.random.key(2)}
        out = model.apply(params, x, label, train=True, rngs=key)
        return jnp.sum(jnp.sin(out)), out

    def results(model: ncsnpp.Model) -> tuple[list, list, str]:
        gradient = jax.jit(jax.grad(lambda p: loss(model, p), has_aux=True))
        lowered = gradient.lower(params)
        grads, out = lowered.compile()(params)
        return jax.tree.leaves(grads), [out], lowered.as_text()

    *expected, unrolled = results(model)
    with compiling_for("tpu", 1):
        *found, looped = results(model.clone(remat=remat))
    convolutions = [text.count("stablehlo.convolution") for text in (looped, unrolled)]
    assert convolutions[0] < (1.2 if remat else 0.9) * convolutions[1]
    largest = max(float(jnp.abs(g).max()) for g in expected[0])
    for ours, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)
    np.testing.assert_allclose(found[1][0], expected[1][0], rtol=1e-5, atol=1e-5)


def test_loops_are_counted_with_their_turns() -> None:
    """A product repeated by a loop of five turns, outside of which there is another."""
    x, w = jnp.ones((64, 64)), jnp.ones((5, 64, 64))

    def repeated(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x @ x, w)[0]

    text = jax.jit(repeated).lower(x, w).compile().as_text()
    flops, traffic = hlo_cost.Program(text).loop_factors
    assert flops == pytest.approx(6 / 2)
    assert 1.5 < traffic < 5
    plain = jax.jit(lambda x: jnp.tanh(x) @ x).lower(x).compile().as_text()
    assert hlo_cost.Program(plain).loop_factors == (1, 1)


def test_collectives_are_read_from_a_program() -> None:
    text = """
      %all-reduce.1 = (f32[128,4]{1,0}, f32[8]{0}) all-reduce(%a, %b), channel_id=1
      %ag = bf16[1000]{0} all-gather(%c), channel_id=2
      %x = f32[3]{0} add(%all-reduce.1, %ag)
    """
    assert accelerators.collectives(text) == {
        "all-reduce": [1, 0.002],
        "all-gather": [1, 0.002],
    }
