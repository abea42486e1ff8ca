"""Dropout, and its random words where one CPU device draws them.

    word[i] = a xor b,   (a, b) = Threefry-2x32-20(key, (0, i))        (Salmon et al., SC 2011)

These are the words of ``jax.random.bits``, which on CPU goes once through memory for every four of
the twenty rounds. Here all rounds of a word follow each other, on a block of words that stays in
the cache, at less than half of the cost. Blocks are the turns of a loop, since XLA computes again
what it finds cheap, for each use and in the gradient as well, but not across a loop.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from sbml.platform import one_cpu
from sbml.types import Array, Key

BLOCK = 2**14

# Rotations of even and odd groups of four rounds, and the constant of the key schedule.
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA


def dropout(key: Key, x: Array, rate: float) -> Array:
    """``x`` with each element at 0 with probability ``rate``, scaled to keep the mean.

    A random word decides two elements, since on CPU the words were a tenth of a training step: the
    rate is rounded to a multiple of 2^-16, and the scale is that of the rounded rate.
    """
    channels = x.shape[-1]
    kept = max(1, round((1 - rate) * 2**16))
    words = random_words(key, (*x.shape[:-1], -(-channels // 2)))
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :channels]
    return jnp.where(halves < kept, x * (2**16 / kept), 0).astype(x.dtype)


def random_words(key: Key, shape: tuple[int, ...]) -> Array:
    """``jax.random.bits(key, shape, uint32)``, with jax_threefry_partitionable as by default."""
    seed = jax.random.key_data(key)
    if not (one_cpu() and seed.shape == (2,)):  # or another generator's key
        return jax.random.bits(key, shape, jnp.uint32)
    count = math.prod(shape)
    size = min(BLOCK, count)
    place = lax.iota(jnp.uint32, size)
    starts = jnp.arange(0, count, size, dtype=jnp.uint32)
    blocks = lax.map(lambda start: _threefry(seed, start + place), starts)
    return blocks.reshape(-1)[:count].reshape(shape)


def _threefry(key: Array, low: Array) -> Array:
    """The word of each counter ``(0, low)``."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    a, b = jnp.broadcast_to(schedule[0], low.shape), low + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << rotation) | (b >> (32 - rotation)))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return a ^ b
