"""Placement of arrays on devices: batches are split along one mesh axis, the state is replicated.

Parts of the state may be split too (:func:`abstract`). Under ``jit`` with these shardings a
computation is written for the *global* batch and gives the same result on one device or many, in
one process or many; the mathematics contains no axis name.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sbml.core.platform import compiler_options
from sbml.core.types import Key, PyTree
from sbml.program.runtime.state import TrainState, Update, make_step

Tree = TypeVar("Tree")  # a pytree of arrays


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """``devices`` along one axis, ``data``; by default all devices of all processes.

    The axis type is Auto, because with jax's default, Explicit, a vmapped loss over a sharded batch
    fails. Devices are in the order of their processes, so that the batch consists of the rows of
    process 0, then those of process 1 and so on; ``jax.make_mesh`` would order the devices of a TPU
    by its topology.
    """
    chosen = jax.devices() if devices is None else devices
    order = sorted(chosen, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(order), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Devices hold equal parts of the array, split along ``axis``, the axis of the batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def longest_axis_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The shardings that give devices equal parts of every leaf, split along its longest divisible
    axis.

    An axis is divisible if its size is a multiple of the number of devices. A leaf without such an
    axis is replicated.
    """

    def of(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not divisible:
            return replicated(mesh)
        return batch_sharding(mesh, axis=max(divisible, key=lambda axis: leaf.shape[axis]))

    return jax.tree.map(of, tree)


def partitioned(
    optimizer: optax.GradientTransformation, mesh: Mesh
) -> optax.GradientTransformation:
    """``optimizer`` in parts: each device updates the parameters whose optimizer state it holds."""

    def parts(tree: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(tree, longest_axis_shardings(tree, mesh))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        # Sum the gradients over all devices first: otherwise XLA may gather activations instead.
        grads = jax.lax.with_sharding_constraint(grads, replicated(mesh))
        updates, state = optimizer.update(parts(grads), state, parts(params))
        return parts(updates), state

    return optax.GradientTransformation(optimizer.init, update)


def abstract(
    init: Callable[[], TrainState], mesh: Mesh, *, shard_state: bool = False
) -> TrainState:
    """The shapes and shardings of the state that ``init()`` returns, without computing it.

    Every leaf is replicated, but with ``shard_state`` the optimizer's state and the average of the
    parameters are spread over the devices. Each device then updates its part of these and of the
    parameters, and the parameters are gathered (ZeRO-1, Rajbhandari et al. 2020).
    """
    shapes = jax.eval_shape(init)
    where = jax.tree.map(lambda leaf: replicated(mesh), shapes)
    if shard_state:
        where = where.replace(
            opt_state=longest_axis_shardings(shapes.opt_state, mesh),
            ema_params=longest_axis_shardings(shapes.ema_params, mesh),
        )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        where,
    )


def initial_state(
    init: Callable[[], TrainState], mesh: Mesh, *, shard_state: bool = False
) -> TrainState:
    """The state that ``init()`` returns, placed on the devices as :func:`abstract` says.

    ``init`` runs only once, so on CPU it is compiled without LLVM's optimization, which would take
    longer than it saves.
    """
    like = abstract(init, mesh, shard_state=shard_state)
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(init, out_shardings=where, compiler_options=compiler_options(0))()


def split(tree: PyTree) -> PyTree:
    """Global arrays from ``tree``, of which every process holds a whole copy, with equal parts on
    all devices."""
    where = batch_sharding(data_mesh())

    def placed(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(placed, tree)


def round_up(size: int) -> int:
    """The smallest multiple of the number of devices that is at least ``size``."""
    devices = jax.device_count()
    return -(-size // devices) * devices


def barrier(name: str) -> None:
    """Wait until all processes have called this with the same ``name``."""
    multihost_utils.sync_global_devices(name)


def to_host(tree: PyTree) -> PyTree:
    """Global arrays as whole numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: jax.Array | np.ndarray) -> np.ndarray:
        # Gathering would wait for all computations that were dispatched before; this does not.
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def check_same(what: str, digest: str) -> None:
    """Check that all processes have the same ``digest``, a hash of ``what`` in hexadecimal digits.
    If not, every process raises a ValueError."""
    digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
    if differ := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise ValueError(
            f"processes {differ} have other {what} than process 0: copy the same files to all "
            "hosts, and install the same versions of Pillow and scikit-image"
        )


def check_shared(folder: epath.Path) -> None:
    """Check that all processes see ``folder``, in which process 0 writes files that all read. If
    not, every process raises a ValueError that names those that do not."""
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


def compiled_step(
    update: Update,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    *,
    steps_per_dispatch: int = 1,
    shard_state: bool = False,
) -> jax.stages.Wrapped:
    """``update`` as a function ``(state, batch, key, frozen) -> (state, metrics)``, compiled for
    the devices of ``mesh``. The memory of the old state is used for the new one (donated).

    Args:
      update: what a step computes.
      mesh: the devices.
      state: the state or its shapes, with shardings; the new state has the same shardings.
      steps_per_dispatch: the number of steps in one call; if it is more than 1, the batches and
        the metrics are stacked along a leading axis.
      shard_state: whether ``state`` is split over the devices (:func:`abstract`).
    """
    if shard_state:
        optimizer = partitioned(update.optimizer, mesh)
        update = dataclasses.replace(update, optimizer=optimizer)
    one, stacked = make_step(update), steps_per_dispatch > 1

    def several(state: TrainState, batches: PyTree, key: Key, frozen: PyTree) -> PyTree:
        return jax.lax.scan(lambda state, batch: one(state, batch, key, frozen), state, batches)

    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole, split = replicated(mesh), batch_sharding(mesh, axis=int(stacked))
    return jax.jit(
        several if stacked else one,
        in_shardings=(placement, split, whole, whole),
        out_shardings=(placement, whole),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
