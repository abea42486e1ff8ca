"""A stack of bits: ``push`` encodes integers in it, and ``pop`` decodes them in reverse order.

If k is an integer of probability P(k), a push of k makes the stack longer by -log2 P(k) bits, and a
pop makes it shorter by as much. A pop from random bits is a draw from P. The coder is that of
``constriction`` (asymmetric numeral systems), with probabilities that are multiples of 2^-24.

Real numbers lie on a grid. The normal distribution N(m, s^2), in units of the grid's width, gives
the integer k the mass of N(m, s^2 - 1/12) in [k - 1/2, k + 1/2], so that k has the variance s^2.

Reference: Duda, "Asymmetric numeral systems", 2013; Bamler, "Understanding entropy coding with
asymmetric numeral systems", 2022.
"""

import functools
import importlib.util
import math
from typing import Any

import numpy as np

PRECISION = 24  # bits of a probability
REACH = 12.0  # integers up to this many standard deviations from the mean have codes of their own
FAR = 2**22  # number of integers beyond these, on each side, that can be coded


# A coder of ``constriction``, which has no types. Its ``decode`` pops integers, ``encode_reverse``
# pushes integers, int32, so that ``decode`` gives them in this order, and ``get_compressed`` gives
# the words. Both take a model, or a family of models with its parameters.
Coder = Any


def coder(words: np.ndarray) -> Coder:
    """A coder of ``constriction`` with the bits ``words (n,)``, uint32, of which the last is not
    0."""
    return constriction().stack.AnsCoder(np.ascontiguousarray(words, np.uint32))


def installed() -> bool:
    """Whether ``constriction`` is installed."""
    return importlib.util.find_spec("constriction") is not None


def constriction() -> Any:
    """The module ``constriction.stream``; a ValueError says that it is not installed."""
    try:
        from constriction import stream
    except ImportError:
        raise ValueError("the codec needs constriction: pip install 'sbml[codec]'") from None
    return stream


@functools.lru_cache(maxsize=4096)
def _normals(reach: int) -> object:
    return constriction().model.QuantizedGaussian(-reach, reach)


@functools.cache
def uniform(size: int) -> object:
    """The model of 0 .. size - 1 with equal probabilities."""
    return constriction().model.Uniform(size)


class Normal:
    """N(m, s^2) on integers, with s = ``std`` of at least 1, and a mean m for each integer.

    Integers farther than ``REACH`` standard deviations have no code, unless ``open`` is True. Such
    integers then have codes of about 24 + 22 bits: the code of an image that the model finds
    impossible becomes long, but it exists. A distribution that is popped by the encoder must not be
    open, because a pop from random bits would find such an integer about once in 2^24 times.
    """

    def __init__(self, std: float, *, open: bool) -> None:
        self.std, self.open = math.sqrt(std**2 - 1 / 12), open
        self.reach = math.ceil(REACH * std)
        self.family = _normals(self.reach + open)

    def _split(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest integers to ``mean (d,)``, the rest, and the standard deviations."""
        nearest = np.rint(mean)
        return nearest.astype(np.int64), mean - nearest, np.full(mean.shape, self.std)

    def pop(self, stack: Coder, mean: np.ndarray) -> np.ndarray:
        """int64 ``(d,)`` for the means ``mean (d,)``."""
        nearest, *parameters = self._split(mean)
        offsets = stack.decode(self.family, *parameters).astype(np.int64)
        if self.open and np.any(far := np.abs(offsets) > self.reach):
            more = stack.decode(uniform(FAR), int(far.sum())).astype(np.int64)
            offsets[far] += np.sign(offsets[far]) * more
        return nearest + offsets

    def push(self, stack: Coder, values: np.ndarray, mean: np.ndarray) -> None:
        """Encode ``values (d,)``, int64."""
        nearest, *parameters = self._split(mean)
        offsets = values - nearest
        if self.open and np.any(far := np.abs(offsets) > self.reach):
            more = np.abs(offsets[far]) - self.reach - 1
            if np.any(more >= FAR):
                raise ValueError(
                    f"a value is {more.max():.3g} grid widths from the model's mean: the network "
                    "is not finite, or the image is not of its kind"
                )
            stack.encode_reverse(more.astype(np.int32), uniform(FAR))
            offsets = np.clip(offsets, -self.reach - 1, self.reach + 1)
        stack.encode_reverse(offsets.astype(np.int32), self.family, *parameters)


class Categorical:
    """Integers by their probabilities ``p (d, L)``."""

    def __init__(self) -> None:
        self.family = constriction().model.Categorical(perfect=False)

    def pop(self, stack: Coder, p: np.ndarray) -> np.ndarray:
        """int64 ``(d,)``, one for each row of ``p``."""
        return stack.decode(self.family, p).astype(np.int64)

    def push(self, stack: Coder, values: np.ndarray, p: np.ndarray) -> None:
        """Encode ``values (d,)``, int64."""
        stack.encode_reverse(values.astype(np.int32), self.family, p)
