"""Programs for accelerators: no code for CPUs, full precision, remat, and their collectives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from linen import normal, random_params, shapes
from ml_collections import ConfigDict

from benchmarks import accelerators
from sbml.core.platform import compiler_options, on_cpu, one_cpu
from sbml.networks import _layers, ncsnpp
from sbml.program.config.build import Experiment
from sbml.program.config.config import default
from sbml.program.runtime import sharding


def config() -> ConfigDict:
    """A network with each kind of layer, as small as possible."""
    config = default()
    config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(32,))
    config.training.batch_size = 2
    config.eval.batch_size = 1
    config.eval.bound.control = False
    config.sampling.batch_size = 1
    return config


@pytest.mark.slow
def test_nothing_of_the_cpu_is_in_an_accelerators_program(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = _layers._materialise
    monkeypatch.setattr(_layers, "_materialise", lambda x: used.append(x.shape) or original(x))
    experiment, mesh = Experiment(config()), sharding.data_mesh()
    accelerators.training(experiment, mesh)
    assert used  # The step for one CPU device uses it.
    for target in (("tpu", 1), ("gpu", 1), ("cpu", 8)):
        with accelerators.compiling_for(*target):
            used.clear()
            accelerators.training(experiment, mesh)
            assert not used


def integer_denoiser() -> ConfigDict:
    """VDM's network as a mixture over 256 levels, which is evaluated with its own decoder."""
    config = default("vdm")
    config.model.update(width=8, depth=1, fourier=(1.0,))
    config.data.update(dequantization="centre")
    config.score.update(parameterization="levels", label="log_snr")
    config.training.batch_size = 2
    config.eval.update(batch_size=1, dequantizers=("learned", "truncated_normal"))
    config.eval.bound.control = False
    config.sampling.batch_size = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), [(config, "ode"), (integer_denoiser, "bound")])
def test_evaluation_multiplies_at_full_precision(config: Callable, name: str) -> None:
    """By default, TPUs and GPUs multiply float32 numbers at lower precision, as sampling does."""
    experiment, mesh = Experiment(config()), sharding.data_mesh()
    with accelerators.compiling_for("tpu", 1):
        lowered = accelerators.PROGRAMS[name](experiment, mesh)
        assert "dot_general" in lowered.as_text() and "convolution" in lowered.as_text()
        assert accelerators.low_precision(lowered) == 0
        if name == "bound":
            assert accelerators.low_precision(accelerators.sampling(experiment, mesh)) > 10


def test_the_declared_platform_ends_with_its_context() -> None:
    with accelerators.compiling_for("tpu", 4):
        assert not on_cpu() and not one_cpu() and compiler_options() == {}
    with accelerators.compiling_for("cpu", 4):
        assert on_cpu() and not one_cpu() and compiler_options(1)
    assert jax.default_backend() == "cpu" and jax.device_count() == len(jax.devices())


SIZES = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def rematerialised(kind: str) -> tuple[ncsnpp.Model, dict, Callable]:
    """A network with dropout and residual blocks of this kind, its parameters, and a loss."""
    model = ncsnpp.Model(**SIZES, dropout=0.3, init_scale=1.0, resblock_type=kind)
    x, label, keys = normal(1, 2, 8, 8, 3), jnp.array([1.0, 30.0]), {"dropout": jax.random.key(2)}

    def loss(model: ncsnpp.Model, params: dict) -> jax.Array:
        return jnp.sum(jnp.sin(model.apply(params, x, label, train=True, rngs=keys)))

    assert shapes(model, x.shape) == shapes(model.clone(remat=True), x.shape)
    return model, random_params(model, x.shape), loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["biggan", "ddpm"])
def test_remat_stores_less_for_the_gradient(kind: str) -> None:
    model, params, loss = rematerialised(kind)

    def stored(model: ncsnpp.Model) -> int:
        """How many numbers are kept from the forward to the backward pass."""
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(model, p), p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert stored(model.clone(remat=True)) < 0.5 * stored(model)


def test_collectives_are_read_from_a_program() -> None:
    text = """
      %all-reduce.1 = (f32[128,4]{1,0}, f32[8]{0}) all-reduce(%a, %b), channel_id=1
      %ag = (bf16[125]{0}, bf16[1000]{0}) all-gather-start(%c), channel_id=2
      %done = bf16[1000]{0} all-gather-done(%ag)
      %x = f32[3]{0} add(%all-reduce.1, %ag)
    """
    assert accelerators.collectives(text) == {
        "all-reduce": [1, 0.002],
        "all-gather": [1, 0.002],
    }
