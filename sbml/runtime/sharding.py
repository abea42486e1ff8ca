"""Batches split over a one-axis device mesh; the state replicated or, in part, split too.

Under ``jit`` with these shardings a computation means what it says about the *global* batch, on one
device or many, in one process or many; the mathematics knows no axis name.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sbml.platform import compiler_options
from sbml.runtime.state import TrainState


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, ``data``.

    Axis type Auto: with jax's default, Explicit, a vmapped loss over a sharded batch fails. In the
    order of processes, so that their rows, one process after another, make up the batch:
    ``jax.make_mesh`` would order a TPU's devices by its topology.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split along ``axis``, the batch's."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def spread(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Split along the longest axis that the devices divide; replicated if they divide none."""
    divided = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    if not divided:
        return replicated(mesh)
    return batched(mesh, axis=max(divided, key=lambda axis: shape[axis]))


def placement(state: TrainState, mesh: Mesh, *, shard_state: bool = False) -> TrainState:
    """The sharding of every leaf of ``state``: everything is replicated, but with ``shard_state``
    the optimizer's state and the average of the parameters are spread over the devices.

    Each device then updates its part of them and of the parameters, and gathers the parameters
    (ZeRO-1, Rajbhandari et al. 2020).
    """
    same = jax.tree.map(lambda leaf: replicated(mesh), state)
    if not shard_state:
        return same
    parts = {
        name: jax.tree.map(lambda leaf: spread(mesh, leaf.shape), getattr(state, name))
        for name in ("opt_state", "ema_params")
    }
    return same.replace(**parts)


def partitioned(
    optimizer: optax.GradientTransformation, mesh: Mesh
) -> optax.GradientTransformation:
    """``optimizer``, every device computing the part of the updates whose state it holds."""

    def parts(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, spread(mesh, leaf.shape)), tree
        )

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Sum over all devices first: otherwise XLA may gather activations to compute each part.
        grads = jax.lax.with_sharding_constraint(grads, replicated(mesh))
        updates, state = optimizer.update(parts(grads), state, parts(params))
        return parts(updates), state

    return optax.GradientTransformation(optimizer.init, update)


def made(init: Callable[[], TrainState], mesh: Mesh, *, shard_state: bool = False) -> TrainState:
    """The state that ``init()`` returns, placed on the devices by :func:`placement`.

    It runs once: on CPU, optimization by LLVM would not pay for itself.
    """
    where = placement(jax.eval_shape(init), mesh, shard_state=shard_state)
    return jax.jit(init, out_shardings=where, compiler_options=compiler_options(0))()


def abstract(
    init: Callable[[], TrainState], mesh: Mesh, *, shard_state: bool = False
) -> TrainState:
    """The shapes of :func:`made`, with their shardings: what to restore, at no cost."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        placement(shapes, mesh, shard_state=shard_state),
    )


def check_divides(name: str, size: int, parts_each: int = 1) -> None:
    """Refuse a batch that the devices, times ``parts_each`` parts of it on each, do not divide.

    Raises:
      ValueError: naming the sizes on either side that do.
    """
    parts = jax.device_count() * parts_each
    if size < 1 or size % parts:
        lower = size // parts * parts
        choices = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise ValueError(
            f"{name}={size} is not a positive multiple of {parts} "
            f"({jax.device_count()} devices x {parts_each}, micro-batches and pairs); use {choices}"
        )


def to_global(local: Any, sharding: NamedSharding) -> Any:
    """Each process's rows of a batch as one global array per leaf."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), local)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, as a global one."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def round_up(size: int) -> int:
    """The least multiple of the device count that is at least ``size``, for padded batches.

    Raises:
      ValueError: if ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"batch size {size}: must be positive")
    return -(-size // jax.device_count()) * jax.device_count()


def barrier(name: str) -> None:
    """Wait for all processes."""
    multihost_utils.sync_global_devices(name)


def to_host(tree: Any) -> Any:
    """Global arrays as whole numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: Any) -> Any:
        # To gather is a computation, which would wait for all that was dispatched before it.
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def check_shared(folder: epath.Path) -> None:
    """Refuse a folder that some processes do not see: the first of them writes what all read.

    Raises:
      ValueError: naming those processes, in all of them.
    """
    if jax.process_count() == 1:
        return
    stamp = multihost_utils.broadcast_one_to_all(np.asarray(time.time_ns() % 2**31, np.int32))
    token = folder / f".seen_{int(stamp)}"
    if jax.process_index() == 0:
        token.write_text("")
    barrier("written")
    seen = multihost_utils.process_allgather(np.asarray(token.exists()))
    if jax.process_index() == 0:
        token.unlink()
    if not seen.all():
        raise ValueError(
            f"processes {np.flatnonzero(~seen).tolist()} do not see what process 0 writes to "
            f"{folder}: set --workdir to a folder that all share, on a network disk or gs://"
        )
