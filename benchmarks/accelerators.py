"""Memory, arithmetic and traffic of a config's programs on accelerators, without access to one.

    JAX_PLATFORMS=cpu python benchmarks/accelerators.py --config=configs/digits_vp.py \
        --topology=v5e:2x2 [--programs=training,ode,bound,sampling] [--config.model.dtype=bfloat16]

The programs are lowered and compiled from shapes alone, for the devices of a TPU topology (this
needs libtpu, the extra ``tpu``, and no TPU) or, with --topology=local, for the devices of this
machine. No program is run. For each program one line of JSON is printed:

    parameters      number of the network's parameters
    state_gib       size of the parameters, their average and the optimizer's moments, on each chip
    peak_gib        peak size of arguments, results and temporaries on each chip; ``fits`` tells
                    whether they and the code fit into the chip's memory
    tflop, gb       arithmetic and bytes accessed, for each chip and call; XLA counts the body of a
                    loop once, so for ``ode`` and ``sampling`` they are about one solver step
    roofline_ms     max(arithmetic / peak rate, bytes / bandwidth), with the chip's published rates;
                    ``arithmetic`` is the first of the two as a share of this maximum. The peak rate
                    is that of bfloat16: products of float32 at full precision, as in evaluation,
                    take several times as long
    collectives     for each kind, their number and the MB of their results on one chip
    low_precision   number of products of float32 numbers at less than full precision
    operations, bitcasts        instructions of the compiled program, and those that move no data
    code_mib, compile_cpu_s     size of the program; CPU time of lowering and compilation

``batch`` is the number of rows of a training step, or of images of the other programs, and
``dtype`` is that of the network in the program: likelihoods use float32 whatever the config says.
The training program takes one step, whatever ``training.steps_per_dispatch`` is, and
``training.accumulate`` should be 1. Chips that are not in CHIPS have no ``fits`` and no roofline.
"""

import contextlib
import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh

from sbml.density.estimators import Cell
from sbml.density.estimators.base import Rows, Target, rows
from sbml.likelihood.bound import FULL_DIMS, GaussianControl, Reduction
from sbml.program.config import config, objective
from sbml.program.config.build import Experiment
from sbml.program.evaluation import cells, samples
from sbml.program.runtime import sharding
from sbml.program.runtime.state import TrainState


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip: bfloat16 FLOP/s, memory bandwidth (bytes/s), memory (bytes).

    For XLA a chip is one device, but one of TPU v4 is two: its figures are those of half a chip.
    """

    peak: float
    bandwidth: float
    memory: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, nvidia.com/en-us/data-center/h100
CHIPS = {
    "TPU v4": Chip(275e12 / 2, 1228e9 / 2, 16 * 2**30),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * 2**30),
    "TPU v5": Chip(459e12, 2765e9, 95 * 2**30),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * 2**30),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80 * 2**30),
}
PROGRAMS: dict[str, Callable[[Experiment, Mesh], Any]] = {}


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology such as ``v5e:2x2``, or of this machine (``local``)."""
    if topology == "local":
        return jax.devices()
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
    """A context in which programs are traced as on so many ``devices`` of this ``platform``.

    JAX's caches of traced functions do not depend on it, so they are cleared on entry and on exit.
    """
    jax.clear_caches()
    try:
        with (
            mock.patch.object(jax, "default_backend", lambda: platform),
            mock.patch.object(jax, "device_count", lambda: devices),
        ):
            yield
    finally:
        jax.clear_caches()


@contextlib.contextmanager
def target(devices: Sequence[Any]) -> Iterator[Mesh]:
    """A data mesh of ``devices``; in this context, programs are compiled for these devices."""
    platform = devices[0].platform
    with compiling_for(platform, len(devices)):
        yield sharding.data_mesh(devices)


def shaped(tree: Any, where: jax.sharding.Sharding) -> Any:
    """The shapes of the arrays or shapes in ``tree``, with the sharding ``where``."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def program(lower: Callable[[Experiment, Mesh], Any]) -> Callable[[Experiment, Mesh], Any]:
    """A decorator that adds ``lower`` to PROGRAMS under its name."""
    PROGRAMS[lower.__name__] = lower
    return lower


def _state(experiment: Experiment, mesh: Mesh) -> TrainState:
    shard_state = experiment.config.training.shard_state
    return sharding.abstract(experiment.init_state, mesh, shard_state=shard_state)


@program
def training(experiment: Experiment, mesh: Mesh) -> Any:
    """One training step."""
    same, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    update = objective.update(experiment)
    options = experiment.config.training
    size = options.batch_size // options.rows_per_image
    pixels = jax.ShapeDtypeStruct((size, *experiment.shape), jnp.uint8, sharding=split)
    state = _state(experiment, mesh)
    key = shaped(jax.eval_shape(lambda: jax.random.key(0)), same)
    shard_state = experiment.config.training.shard_state
    step = sharding.compiled_step(update, mesh, state, shard_state=shard_state)
    return step.lower(state, pixels, key, ())


def _lowered(experiment: Experiment, mesh: Mesh, name: str, u: Any, reduction: Reduction) -> Any:
    """A batch of the estimator ``name`` with uniform dequantization."""
    same, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    size = -(-experiment.config.eval.batch_size // mesh.size) * mesh.size
    row = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    batch = Rows(
        data=jax.ShapeDtypeStruct((size, *experiment.shape), jnp.uint8, sharding=split),
        ids=row,
        sweeps=row,
        seed=jax.ShapeDtypeStruct((), jnp.uint32, sharding=same),
    )
    if u:
        u = jax.ShapeDtypeStruct((size, u), jnp.float32, sharding=split)
    params = sharding.abstract(experiment.init_state, mesh).ema_params
    uniform = experiment.dequantizer("uniform")
    target = Target(experiment.sde, experiment.eval_eps, experiment.levels, uniform)
    estimator = cells.estimator(experiment, Cell(name, "uniform"), reduction)
    with jax.default_matmul_precision(experiment.config.eval.precision):
        score = experiment.exact_adapter(params)
        compiled = jax.jit(rows, static_argnames="target")
        return compiled.lower(estimator, target, score, {}, batch, u)


@program
def ode(experiment: Experiment, mesh: Mesh) -> Any:
    """A batch of the ODE estimator, with uniform dequantization."""
    return _lowered(experiment, mesh, "ode", None, Reduction())


@program
def bound(experiment: Experiment, mesh: Mesh) -> Any:
    """A batch of the bound with uniform dequantization, control variate and density of times."""
    same, options = sharding.replicated(mesh), experiment.config.eval.bound
    dims = math.prod(experiment.shape)
    vector = jax.ShapeDtypeStruct((dims,), jnp.float32, sharding=same)
    matrix = jax.ShapeDtypeStruct((dims, dims), jnp.float32, sharding=same)
    basis = matrix if dims <= FULL_DIMS else None
    density = jax.ShapeDtypeStruct((options.proposal_bins,), jnp.float32, sharding=same)
    reduction = Reduction(
        GaussianControl(vector, vector, basis) if options.control else None,
        density if options.proposal_bins else None,
        options.proposal_name,
    )
    return _lowered(experiment, mesh, "bound", options.n_times, reduction)


@program
def sampling(experiment: Experiment, mesh: Mesh) -> Any:
    """A batch of the configured sampler."""
    same, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    size = -(-experiment.config.sampling.batch_size // mesh.size) * mesh.size
    params = sharding.abstract(experiment.init_state, mesh).ema_params
    ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=same)
    how = samples.Recipe.of(experiment)
    return samples._sample_batch.lower(experiment.adapter(params), ids, seed, how)


ITEMSIZE = {
    **dict.fromkeys(("pred", "u8", "s8"), 1),
    **dict.fromkeys(("bf16", "f16", "u16", "s16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> dict[str, list[float]]:
    """For each kind of collective in a compiled program: the number, and the MB of the results."""
    table: dict[str, list[float]] = {}
    for shapes, kind, start in COLLECTIVE.findall(text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # The list has the operands, then the results.
        size = sum(
            ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in arrays
        )
        count, total = table.get(kind, [0, 0.0])
        table[kind] = [count + 1, round(total + size / 1e6, 3)]
    return table


def low_precision(lowered: Any) -> int:
    """The number of float32 products that the program requests at less than full precision."""
    products = re.findall(r"stablehlo\.(?:dot_general|convolution|dot)\b.*", lowered.as_text())
    float32 = [p for p in products if re.search(r"-> tensor<[\dx]*f32>", p)]
    return sum(p.count("HIGHEST") < 2 for p in float32)


def measured(name: str, lower: Callable[[], Any], chip: Chip | None) -> dict[str, Any]:
    """Lower and compile one program, and return its line of the table."""
    start = time.process_time()
    lowered = lower()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    flops, traffic = cost["flops"], cost["bytes accessed"]
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = live + memory.temp_size_in_bytes
    row: dict[str, Any] = {
        "program": name,
        "peak_gib": round(peak / 2**30, 3),
        "tflop": round(flops / 1e12, 4),
        "gb": round(traffic / 1e9, 3),
    }
    if chip is not None:
        seconds_of = flops / chip.peak, traffic / chip.bandwidth
        row |= {
            "fits": peak + memory.generated_code_size_in_bytes <= chip.memory,
            "roofline_ms": round(1e3 * max(seconds_of), 3),
            "arithmetic": round(seconds_of[0] / max(seconds_of), 3),
        }
    opcodes = Counter(re.findall(r" = [^=]*? ([a-z][\w-]*)\(", text))
    return row | {
        "collectives": collectives(text),
        "low_precision": low_precision(lowered),
        "operations": sum(opcodes.values()),
        "bitcasts": opcodes["bitcast"],
        "code_mib": round(memory.generated_code_size_in_bytes / 2**20, 1),
        "compile_cpu_s": round(seconds, 1),
    }


def state_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """The size in bytes of the training state on one chip."""
    leaves = jax.tree.leaves(_state(experiment, mesh))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def size_of(program: str, experiment: Experiment) -> dict[str, Any]:
    """The batch of ``program``, and the type in which its network computes."""
    exact = program in ("ode", "bound")
    section = experiment.config.eval if exact else getattr(experiment.config, program)
    adapter = experiment.exact_adapter if exact else experiment.adapter
    return {"batch": section.batch_size, "dtype": adapter.model.dtype}


def main(arguments: Sequence[str]) -> None:
    """Print a line for each program; ``arguments`` are fields of the config."""
    options = flags.FLAGS
    if unknown := sorted(set(options.programs) - set(PROGRAMS)):
        raise app.UsageError(f"unknown programs {unknown}; choose from {', '.join(PROGRAMS)}")
    devices = devices_of(options.topology)
    fields = dict(argument.lstrip("-").split("=", 1) for argument in arguments[1:])
    overrides = {name.removeprefix("config."): value for name, value in fields.items()}
    experiment = Experiment(config.with_overrides(config.load(options.config), overrides))
    chip = CHIPS.get(devices[0].device_kind)
    with target(devices) as mesh:
        head = {
            "config": options.config,
            "topology": options.topology,
            "chip": devices[0].device_kind,
            "devices": len(devices),
            "parameters": experiment.parameter_count(),
            "state_gib": round(state_bytes(experiment, mesh) / 2**30, 3),
        }
        for choice in options.programs:
            row = measured(choice, lambda: PROGRAMS[choice](experiment, mesh), chip)  # noqa: B023
            print(json.dumps(head | size_of(choice, experiment) | row), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config; --config.FIELD=VALUE sets a field of it.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("topology", "v5e:1x1", "A TPU topology, or local.")
    flags.DEFINE_list("programs", list(PROGRAMS), f"A list of {', '.join(PROGRAMS)}.")
    app.run(main, flags_parser=lambda given: flags.FLAGS(given, known_only=True))
