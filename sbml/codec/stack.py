"""A stack of bits: ``push`` encodes integers in it, and ``pop`` decodes them in reverse order.

If k is an integer of probability P(k), a push of k makes the stack longer by -log2 P(k) bits, and a
pop makes it shorter by as much. A pop from random bits is a draw from P. The coder is that of
``constriction`` (asymmetric numeral systems), with probabilities that are multiples of 2^-24.

Real numbers lie on a grid. The normal distribution N(m, s^2), in units of the grid's width, gives
the integer k the mass of N(m, s^2 - 1/12) in [k - 1/2, k + 1/2], so that k has the variance s^2.

Reference: Duda, "Asymmetric numeral systems", 2013; Bamler, "Understanding entropy coding with
asymmetric numeral systems", 2022.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

PRECISION = 24  # bits of a probability
REACH = 12.0  # integers up to this many standard deviations from the mean have codes of their own
FAR = 2**22  # number of integers beyond these, on each side, that can be coded


class Coder(Protocol):
    """What is used of ``constriction.stream.stack.AnsCoder``. A model, or a family of models with
    its parameters, is an object of ``constriction.stream.model``."""

    def decode(self, model: object, *parameters: np.ndarray | int) -> np.ndarray:
        """Pop integers."""

    def encode_reverse(self, values: np.ndarray, model: object, *parameters: np.ndarray) -> None:
        """Push integers, int32, so that ``decode`` gives them in this order."""

    def get_compressed(self) -> np.ndarray:
        """The words, uint32."""

    def num_valid_bits(self) -> int:
        """The number of bits."""


def coder(words: np.ndarray) -> Coder:
    """A coder of ``constriction`` with the bits ``words (n,)``, uint32, of which the last is not
    0."""
    found: Coder = _constriction().stack.AnsCoder(np.ascontiguousarray(words, np.uint32))
    return found


def installed() -> bool:
    """Whether ``constriction`` is installed."""
    return importlib.util.find_spec("constriction") is not None


def require() -> None:
    """Raise a ValueError unless ``constriction`` is installed."""
    _constriction()


def _constriction() -> ModuleType:
    try:
        import constriction
    except ImportError:
        raise ValueError("the codec needs constriction: pip install 'sbml[codec]'") from None
    found: ModuleType = constriction.stream
    return found


@functools.lru_cache(maxsize=4096)
def _normals(reach: int) -> object:
    return _constriction().model.QuantizedGaussian(-reach, reach)


@functools.cache
def _uniform(size: int) -> object:
    return _constriction().model.Uniform(size)


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
            more = stack.decode(_uniform(FAR), int(far.sum())).astype(np.int64)
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
            stack.encode_reverse(more.astype(np.int32), _uniform(FAR))
            offsets = np.clip(offsets, -self.reach - 1, self.reach + 1)
        stack.encode_reverse(offsets.astype(np.int32), self.family, *parameters)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Stacks that each code one image at the same time.

    Attributes:
      stacks: n coders.
      rows: the row of each in the batches of the network, ``(n,)``.
    """

    stacks: Sequence[Coder]
    rows: np.ndarray

    def scramble(self, pad: np.ndarray) -> None:
        """Add the integers ``pad (m,)`` to the upper m numbers of 24 bits; ``-pad`` undoes it."""
        model = _uniform(2**PRECISION)
        for stack in self.stacks:
            upper = stack.decode(model, len(pad)).astype(np.int64)
            stack.encode_reverse(((upper + pad) % 2**PRECISION).astype(np.int32), model)

    def pop(self, by: Normal, width: float, mean: np.ndarray) -> np.ndarray:
        """Numbers ``(n, d)`` on a grid, by distributions with ``mean (n, d)``."""
        each = [by.pop(stack, m) for stack, m in zip(self.stacks, mean / width, strict=True)]
        return width * np.stack(each)

    def push(self, by: Normal, width: float, z: np.ndarray, mean: np.ndarray) -> None:
        """Encode numbers ``z (n, d)`` of the grid."""
        values = np.rint(z / width).astype(np.int64)
        for stack, each, m in zip(self.stacks, values, mean / width, strict=True):
            by.push(stack, each, m)

    def pop_uniform(self, size: int, count: int) -> np.ndarray:
        """Integers of 0 .. size - 1 with equal probabilities, int64 ``(n, count)``."""
        if size == 1:
            return np.zeros((len(self.stacks), count), np.int64)
        found = [stack.decode(_uniform(size), count) for stack in self.stacks]
        return np.stack(found).astype(np.int64)

    def push_uniform(self, values: np.ndarray, size: int) -> None:
        """Encode ``values (n, d)`` of 0 .. size - 1."""
        if size > 1:
            for stack, each in zip(self.stacks, values.astype(np.int32), strict=True):
                stack.encode_reverse(each, _uniform(size))

    def pop_levels(self, p: np.ndarray) -> np.ndarray:
        """A level for each row of the probabilities ``p (n, d, L)``, int64 ``(n, d)``."""
        family = _constriction().model.Categorical(perfect=False)
        found = [stack.decode(family, each) for stack, each in zip(self.stacks, p, strict=True)]
        return np.stack(found).astype(np.int64)

    def push_levels(self, levels: np.ndarray, p: np.ndarray) -> None:
        """Encode ``levels (n, d)``, one for each row of ``p (n, d, L)``."""
        family = _constriction().model.Categorical(perfect=False)
        for stack, each, q in zip(self.stacks, levels.astype(np.int32), p, strict=True):
            stack.encode_reverse(each, family, q)
