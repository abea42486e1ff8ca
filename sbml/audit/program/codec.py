"""The length of a file compared with the bound on its images: a row of ``--mode=verify``.

A formula of the bound may lack a term, but a file that lacked these bits could not be decoded. The
images are drawn from a diagonal Gaussian, and coded in a chain with its exact score. ``bound.elbo``
computes the bound in the same steps. The two agree up to the noise of the paths, from which the
tolerance follows.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, bound
from sbml.audit.program import oracle
from sbml.audit.program.table import Row, row
from sbml.codec import Chain, Codec, bits_back, stack
from sbml.sdes import SDE
from sbml.types import Array, Key

LEVELS, SHAPE, LANES, ROUNDS, STEPS = 16, (3,), 128, 4, 24


def codec_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The mean number of bits of an image in a file and its bound; no row without the coder."""
    if not stack.installed():
        return
    data, d = oracle.diagonal(sde), math.prod(SHAPE)
    rng = np.random.default_rng(0)
    x = np.asarray(data.mean) + np.sqrt(data.eigenvalues) * rng.normal(size=(LANES * ROUNDS, d))
    pixels = np.clip((x + 1) * LEVELS / 2, 0, LEVELS - 1).astype(np.uint8)
    chain = Chain(sde, 1e-2, STEPS, (0.9, 0.5, 0.1, 0.01))
    codec = Codec(data.score, chain, SHAPE, LEVELS, "uniform", LANES)
    coders, nets = [stack.coder(codec.start(lane)) for lane in range(LANES)], []
    for number, batch in enumerate(np.split(pixels, ROUNDS)):
        before = np.array([coder.num_valid_bits() for coder in coders])
        codec.encode(bits_back.Lanes(coders, np.arange(LANES)), batch, number)
        nets.append(np.array([coder.num_valid_bits() for coder in coders]) - before)
    u = (jnp.arange(96) + 0.5) / 96

    @jax.jit
    @jax.vmap
    def bounds(k: Array, key: Key) -> Array:
        x = bits.to_model(k, jax.random.uniform(jax.random.fold_in(key, 0), SHAPE), LEVELS)
        terms = bound.elbo(data.score, sde, x, key, eps=chain.eps, u=u, steps=chain.as_steps)
        return (terms.total + d * math.log(LEVELS / 2)) / math.log(2)

    found = bounds(jnp.asarray(pixels), jax.random.split(jax.random.key(0), len(pixels)))
    gaps = np.concatenate(nets) - np.asarray(found)
    truth = float(found.mean())
    tolerance = float(5 * gaps.std(ddof=1) / math.sqrt(len(gaps)) / max(1.0, truth))
    net = np.concatenate(nets).mean()
    yield row("bits of a coded image, and its bound", name, net, truth, tolerance)
