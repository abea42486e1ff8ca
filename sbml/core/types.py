"""The types that all modules share: scores, keys, and arrays with the names of their shapes.

A *score* is any callable s(x, t, key) ~ grad_x log p_t(x) for **one** example: ``x`` has shape
``(*s)``, ``t`` is a scalar, ``key`` is for stochastic layers (``None`` means deterministic), and
the result has shape ``(*s)``. The mathematics needs nothing else, so a score can be a plain
function or a Linen, NNX or Equinox module.

A score may also offer ``score.batch(x, t, key)`` for ``x`` of shape ``(n, *s)`` and ``t`` of shape
``(n,)``: the same function, evaluated on a batch at once. Training uses it, because reverse mode
through a network that is called for one example at a time under ``vmap`` costs 1.2 to 1.4 times the
batched call on CPU.

A score may also offer ``score.predictions(x, t)``, the pair E[x_0 | x_t] and E[z | x_t] for
x_t = alpha x_0 + sigma z, each of shape ``(*s)``, if it computes both without a division by alpha.
The probability-flow ODE of such a score is regular where alpha = 0.

A *conditional* score has a fourth argument, s(x, t, key, condition), which is a pytree of arrays of
one example. It may instead offer ``score.given(condition)``, the score under this condition.

The denoiser of integers also offers its own decoder of a noisy example x_t = alpha y:
``score.decoder_nats(y, t, pixels)``, -log p(pixels | x_t) in nats, and
``score.decoder_log_p(y, t)``, log p of all levels. A score that belongs to one forward process may
name it, ``score.sde``; then ``Density`` checks that it is given the same. Only :func:`optional`
looks for these attributes.

Signatures name the shapes of their arrays (by jaxtyping):

    Scalar        ()          a time, a loss, a term in nats
    Time          ()          a time in [0, 1]
    Example       (*s)        one example of any shape s, or its score
    Vector        (n,)        one number for each of n examples
    Times         (n,)        a time in [0, 1] for each of n examples
    Batch         (n, *s)     n examples
    Elementwise   any         a function of each number by itself: the result has the same shape
    Pixels        (*s)        one example of integers
    PixelBatch    (n, *s)     n examples of integers
    Real          any         numbers that broadcast
    Numbers       any         integers or real numbers

Within one signature, a letter is the same size, or the same shape s, wherever it occurs. A ``Key``
is one typed random key, ``jax.random.key(seed)``, and ``Keys`` are ``(n,)`` of them; arrays of
numbers, such as the older ``jax.random.PRNGKey(seed)``, are not keys. NumPy's arrays are accepted
like JAX's. Public functions check their arguments by these signatures (``sbml.core.door``), and the
tests check all other functions and the results too.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Float, Integer, Num, Shaped

from sbml.core.scalars import between

Array = jax.Array
if TYPE_CHECKING:
    AnyArray = Array
else:
    AnyArray = Array | np.ndarray | np.number  # NumPy's arrays are accepted, as in JAX.

Key = jaxtyping.Key[Array, ""]
Keys = jaxtyping.Key[Array, "n"]

Scalar = Float[AnyArray, ""]
Time = Annotated[Scalar, between(0, 1)]
Example = Float[AnyArray, "*s"]
Vector = Float[AnyArray, "n"]
Times = Annotated[Vector, between(0, 1)]
Batch = Float[AnyArray, "n *s"]
Elementwise = Float[AnyArray, "*any"]
Pixels = Integer[AnyArray, "*s"]
PixelBatch = Integer[AnyArray, "n *s"]

Real = Float[AnyArray, "..."]
Numbers = Num[AnyArray, "..."]
Anything = Shaped[AnyArray, "..."]  # numbers or keys: the function itself checks them

# These can be anything, so mypy checks nothing of them: they tell the reader what they hold.
PyTree = Any  # arrays in dictionaries, lists, tuples and dataclasses, such as a user's parameters
Json = dict[str, Any]  # an object of JSON values
Tree = Mapping[str, PyTree]  # nested dictionaries of arrays

P = ParamSpec("P")
T = TypeVar("T")

Score = Callable[[Example, Scalar, Key | None], Example]
# (t, y) -> dy/dt, h(t, y) and w(t, y). w has y's shape, or is a scalar 0 if it is not known.
Joint = Callable[[Scalar, Example], tuple[Example, Scalar, Example]]
# What a score may offer besides its call.
Optional = Literal["batch", "predictions", "given", "sde", "decoder_nats", "decoder_log_p"]
BatchScore = Callable[[Batch, Vector, Key | None], Batch]

# By default, accelerators compute products with fewer digits.
product = functools.partial(jnp.matmul, precision="highest")


def at_least_float32(x: Elementwise) -> Elementwise:
    """``x`` in float32 or, if it is of float64, unchanged: the variance of noise of half precision
    is not 1."""
    return jnp.asarray(x, jnp.promote_types(_canonical(x), jnp.float32))


def in_full_precision(x: Elementwise) -> Elementwise:
    """``x`` in JAX's default precision, which a solver's times have, or in its own if higher."""
    return jnp.asarray(x, jnp.promote_types(_canonical(x), jnp.result_type(float)))


def full_precision(f: Callable[P, T]) -> Callable[P, T]:
    """``f``, whose products of float32 numbers are computed in float32.

    By default GPUs and TPUs round the factors of these products to TF32 or bfloat16, and no check
    of convergence sees these errors. A precision that the user has set, by
    ``jax.default_matmul_precision``, is kept.
    """

    @functools.wraps(f)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        chosen = jax.config.jax_default_matmul_precision
        with jax.default_matmul_precision(chosen or "highest"):
            return f(*args, **kwargs)

    return inside


def half_precision(f: Callable[..., PyTree], *arguments: PyTree) -> str:
    """The name of a type of less than 32 bits in which ``f`` rounds a number, or "" if there is
    none. ``arguments`` are arrays, or only their shapes and types; ``f`` is traced, and not run.

    Code that reads the bits of a number as an integer can round it too, so it has a name as well.
    Rounding by other functions, such as ``jnp.round``, is not seen.
    """
    for equation in equations(jax.make_jaxpr(f)(*arguments)):
        if equation.primitive is jax.lax.bitcast_convert_type_p:
            given = equation.invars[0].aval.dtype  # type: ignore[attr-defined]
            if jnp.issubdtype(given, jnp.floating):
                return f"the bits of {given}"
        if equation.primitive is jax.lax.reduce_precision_p:
            bits = 1 + equation.params["exponent_bits"] + equation.params["mantissa_bits"]
            if bits < 32:
                return f"{bits} bits"
        for output in equation.outvars:
            dtype = getattr(output.aval, "dtype", None)
            is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
            if is_float and jnp.finfo(dtype).bits < 32:
                return str(dtype)
    return ""


def equations(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    """All operations of a jaxpr, with those inside jit, scan, cond and others."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _canonical(x: Anything) -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(x.dtype)


def of_shape(output: Anything, x: Example) -> Example:
    """``output``, which a user's function returned for ``x``: for a score, of one example or many.

    Raises:
      ValueError: if its shape is not that of ``x``, which broadcasting would hide, or if it is not
        an array of floating-point numbers.
    """
    kind = getattr(output, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(
            f"the score returned {kind or type(output).__name__} for an input of {x.dtype}: return "
            "an array of floating-point numbers, as by score.astype(x.dtype)"
        )
    if output.shape != x.shape:
        raise ValueError(
            f"the score returned shape {output.shape} for an input of {x.shape}: return its shape"
        )
    return output


def deterministic(score: Score, x: Example, t: Scalar) -> Example:
    """``score(x, t, None)``, shape ``(*s)``.

    Raises:
      ValueError: the score draws from its key, or as :func:`of_shape`.
    """
    try:
        output = score(x, t, None)
    except TypeError as error:
        if "PRNG key type <class 'NoneType'>" not in str(error):
            raise
        raise ValueError(
            "the score draws random numbers although key=None: a density needs a deterministic "
            "score, so let it draw only if it is given a key"
        ) from error
    return of_shape(output, x)


def optional(score: Any, name: Optional) -> Any:
    """The attribute ``name`` of a score, which scores may have (see the top of this page), or None.

    That of a ``Partial`` without arguments is the attribute of its function.
    """
    if isinstance(score, jax.tree_util.Partial) and not (score.args or score.keywords):
        score = score.func
    return getattr(score, name, None)


def predictor(score: Score) -> Callable[[Example, Scalar], tuple[Example, Example]] | None:
    """``score.predictions`` with a check of its shapes, or None if the score does not have it."""
    predictions = optional(score, "predictions")
    if predictions is None:
        return None

    def both(x: Example, t: Scalar) -> tuple[Example, Example]:
        x_0, noise = predictions(x, t)
        return of_shape(x_0, x), of_shape(noise, x)

    return both


def conditioned(score: Any, condition: PyTree) -> Score:
    """The score under ``condition``, a pytree of arrays of one example; ``score`` itself if the
    condition is None."""
    if condition is None:
        return score
    if given := optional(score, "given"):
        conditional: Score = given(condition)
        return conditional
    return lambda x, t, key: score(x, t, key, condition)


def check_function(f: Any, name: str, *arguments: str, optional: str | None = None) -> None:
    """Raise a ValueError, which names the function ``f``, if it can be called neither with these
    positional ``arguments`` nor with ``optional`` after them. A function whose signature Python
    does not know passes."""
    if any(kind.__module__.startswith("torch.") for kind in type(f).__mro__):
        raise ValueError(
            f"{name} is a module of PyTorch: make a network of it by sbml.pytorch.network, and a "
            "score by from_prediction(..., batched=True)"
        )
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        with contextlib.suppress(TypeError):
            if optional:
                signature.bind(*arguments, optional)
                return
        call = f"{name}({', '.join(arguments)})"
        raise ValueError(
            f"{name} cannot be called as {call}: {error}; give it these arguments"
        ) from None


def batch_score(score: Score) -> BatchScore:
    """``score`` for a batch: its own ``batch`` form, or ``vmap`` if it has none.

    Returns:
      A function of ``x (n, *s)``, ``t (n,)`` and a key or ``None``, with result ``(n, *s)``.
    """

    def batch(x: Batch, t: Vector, key: Key | None) -> Batch:
        if of_batch := optional(score, "batch"):
            return of_shape(of_batch(x, t, key), x)
        if key is None:
            return of_shape(jax.vmap(lambda x, t: score(x, t, None))(x, t), x)
        return of_shape(jax.vmap(score)(x, t, jax.random.split(key, len(x))), x)

    return batch
