"""Batches split over a one-axis device mesh, everything else replicated.

Under ``jit`` with these shardings a computation means what it says about the *global* batch, on one
device or many, in one process or many; the mathematics knows no axis name.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sbml.runtime.state import compiler_options


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, ``data``.

    Axis type Auto: with jax's default, Explicit, a vmapped loss over a sharded batch fails.
    """
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split along ``axis``, the batch's."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def made(init: Callable[[], Any], mesh: Mesh) -> Any:
    """What ``init()`` returns, replicated.

    It runs once: on CPU, optimization by LLVM would not pay for itself.
    """
    return jax.jit(init, out_shardings=replicated(mesh), compiler_options=compiler_options(0))()


def abstract(init: Callable[[], Any], mesh: Mesh) -> Any:
    """The shapes of what ``init()`` would return, replicated: what to restore, at no cost."""
    same = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same),
        jax.eval_shape(init),
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
    return multihost_utils.process_allgather(tree, tiled=True)
