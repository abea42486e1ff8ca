"""A sequence of equal blocks, unrolled or as a loop, with or without stored intermediate results.

    h_1 = block(h_0, a_1),  h_2 = block(h_1, a_2), ...      a_i: parameters, skip, key of block i

A loop holds the program of one block, the unrolled sequence the program of all. Accelerators
compile a loop sooner, and its code is smaller. On CPU a convolution's gradient inside of a loop is
20 times slower, so there the sequence is unrolled.

For the gradient, accelerators store the results of a block's products only, and compute again what
lies between them: memory and its traffic cost more than elementwise arithmetic.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sbml.platform import platform
from sbml.types import Array

Block = Callable[[Array, Any], Array]


def repeat(block: Block, h: Array, each: Sequence[Any], *, remat: bool = False) -> list[Array]:
    """The outputs ``[h_1, h_2, ...]`` of ``block(h, a)`` for every ``a`` of ``each`` in turn.

    Neighbours whose ``a`` have equal shapes are one loop on accelerators.

    Args:
      block: from ``h`` and a pytree of arrays to the next ``h``.
      h: the first block's input.
      each: a pytree of arrays for each block.
      remat: compute the block again for its gradient, instead of storing what is inside of it.
    """
    if remat:
        block = jax.checkpoint(block)
    elif platform().name != "cpu":
        block = jax.checkpoint(block, policy=_is_product)
    outputs: list[Array] = []
    for _, neighbours in itertools.groupby(each, key=_shapes):
        equal = list(neighbours)
        if len(equal) == 1 or platform().name == "cpu":
            for a in equal:
                h = block(h, a)
                outputs.append(h)
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *equal)
            h, all_of_them = lax.scan(lambda h, a: (block(h, a),) * 2, h, stacked)
            outputs += list(all_of_them)
    return outputs


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")


def _shapes(tree: Any) -> list[Any]:
    return [(path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)]
