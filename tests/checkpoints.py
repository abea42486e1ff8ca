"""What the tests of checkpoints share: a state with every kind of leaf, saved and compared."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbml.program.runtime.checkpoint import Checkpoints, Restored


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any


@jax.jit
def make_state(seed: int) -> State:
    kernel = jax.random.normal(jax.random.key(seed), (5, 33))
    odd = jnp.array([jnp.nan, -0.0, 1e-42, jnp.inf], jnp.float32)
    params = {
        "kernel": kernel,
        "noise": jax.random.bits(jax.random.key(seed), (64, 33)),  # stored as is: incompressible
        "odd": odd,
        "half": kernel[0].astype(jnp.bfloat16),
        "bytes": jnp.arange(256, dtype=jnp.uint8),
        "mask": kernel[0] > 0,
    }
    floats = {name: params[name] for name in ("kernel", "half")}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    _, opt_state = optimiser.update(floats, optimiser.init(floats))
    return State(jnp.asarray(seed, jnp.int32), params, opt_state)


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def restore(checkpoints: Checkpoints, tree: Any) -> Restored | None:
    """The newest checkpoint, with the shardings of ``tree``: by default, on the first device."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return checkpoints.restore(lambda metadata: jax.tree.map(place, tree))


def same_bits(left: Any, right: Any) -> bool:
    def bits(leaf: jax.Array) -> tuple[str, tuple[int, ...], bytes]:
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(bits, left) == jax.tree.map(bits, right)


def save_steps(directory: Path, *steps: int, **choices: Any) -> None:
    with Checkpoints(directory, **choices) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seed": step})


def data_files(checkpoint: Path) -> list[Path]:
    return [f for f in checkpoint.rglob("d/*") if f.is_file()]


def truncate_data(checkpoint: Path) -> None:
    for file in data_files(checkpoint):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN_READS = (
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited",
)
