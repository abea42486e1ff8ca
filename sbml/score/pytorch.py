"""A PyTorch module as a network, for :func:`~sbml.score.from_prediction` with ``batched=True``.

    score = from_prediction(pytorch.network(module), "noise", sde, batched=True)

torchax translates the module's operations to JAX. The result is a pytree whose leaves are the
module's parameters and buffers, and has all derivatives. A module that torchax cannot translate can
run in PyTorch itself, by a callback from the compiled program (:func:`callback`).

Both take a copy of the module, in evaluation mode and in float32.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn, TypeAlias
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core.types import Array

if TYPE_CHECKING:  # It needs the extra ``torch``.
    import torch

Module: TypeAlias = "torch.nn.Module"


def network(module: Module) -> Callable[..., Array]:
    """The network ``(x_t (n, *s), t (n,)) -> (n, *s)`` of ``module(x_t, t)``, translated to JAX.

    ``t`` is the time of the SDE. The condition of a conditional module is its third argument.

    Raises:
      ValueError: torchax cannot be imported.
    """
    try:
        with _missing_names():
            import torchax

            torchax.default_env()  # The rest of its modules is imported here.
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"torchax is missing, or does not fit this version of PyTorch ({error}): install the "
            "extra torch (pip install 'sbml[torch]'), or use sbml.pytorch.callback"
        ) from error
    params, function = torchax.extract_jax(_prepared(module))
    return jax.tree_util.Partial(lambda params, *arguments: function(params, arguments), params)


@contextlib.contextmanager
def _missing_names() -> Iterator[None]:
    """A context with names that torchax reads while it is imported, and that some versions of
    PyTorch lack: a type of 4 bits (before 2.8), and operators with named dimensions (from 2.13).
    They stand for an object that nothing is equal to."""
    import torch

    packet = type(torch.ops.aten.prod)
    of_packet = packet.__getattr__

    def overload(self: object, name: str) -> object:
        try:
            return of_packet(self, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return object()

    fp4 = "float4_e2m1fn_x2"
    with (
        mock.patch.object(packet, "__getattr__", overload),
        mock.patch.object(torch, fp4, getattr(torch, fp4, object()), create=True),
    ):
        yield


def callback(module: Module) -> Callable[..., Array]:
    """The network of ``module(x_t, t)``, which PyTorch computes on the host, in batches.

    Its values and its derivative along one direction (``torch.func.jvp``) are enough for log p,
    samples and bounds. It has no further derivatives, and its parameters are constants.
    """
    import torch

    run = _prepared(module)

    def on_host(function: Callable[..., "torch.Tensor"], x: Array, *others: Array) -> Array:
        """``function`` of tensors, with a result like ``x``."""

        def of_batches(*arguments: Array) -> np.ndarray:
            # JAX adds axes before n: these and n are one axis for the module.
            extra = arguments[0].ndim - x.ndim
            arrays = [np.array(a) for a in arguments]
            flat = [torch.from_numpy(a.reshape(-1, *a.shape[extra + 1 :])) for a in arrays]
            with torch.no_grad():
                return function(*flat).numpy().reshape(arguments[0].shape)

        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        found: Array = jax.pure_callback(of_batches, like, x, *others, vmap_method="broadcast_all")
        return found

    @jax.custom_jvp
    def values(x: Array, t: Array) -> Array:
        return on_host(run, x, t)

    @jax.custom_jvp
    def slope(x: Array, t: Array, dx: Array, dt: Array) -> Array:
        return on_host(lambda x, t, *d: torch.func.jvp(run, (x, t), d)[1], x, t, dx, dt)

    @values.defjvp
    def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        x, t = primals
        # The value has its own call, because several directions at one x share it.
        return values(x, t), slope(x, t, *(jnp.asarray(d, x.dtype) for d in tangents))

    @slope.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> NoReturn:
        raise ValueError(
            "a network by sbml.pytorch.callback has no gradient of log p, which needs its second "
            "derivatives: use sbml.pytorch.network"
        )

    return lambda x, t: values(x, jnp.asarray(t, x.dtype))


def _prepared(module: Module) -> Module:
    """A copy of ``module`` for evaluation, in float32."""
    kinds = {p.dtype for p in module.parameters() if p.dtype.itemsize < 4}
    if kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        warnings.warn(f"the module's weights of {names} are evaluated in float32", stacklevel=3)
    return copy.deepcopy(module).eval().float()
