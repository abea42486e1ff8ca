"""Bits-back coding of images in the chain of a model (``codec.chain``).

To encode an image x, with a stack of bits:

    pop z_0 by q(z_0 | x)                    push x by p(x | z_0)
    pop z_i by q(z_i | z_{i-1})              push z_{i-1} by p(z_{i-1} | z_i)         i = 1 .. N
                                             push z_N by p(z_N)

The decoder does the opposite of each, in reverse order, and so gives back the bits that were
popped. The stack becomes longer by the bound of the image in N steps, on average, plus the noise of
this path. z_i lies on a grid, whose width is half of the smaller of the two standard deviations
with which z_i is popped and pushed. The width cancels between them.

*The stack.* A push of an integer k of probability P(k) makes the stack longer by -log2 P(k) bits,
and a pop, which decodes the integer that was pushed last, makes it shorter by as much. A pop from
random bits is a draw from P. The coder is that of ``constriction`` (asymmetric numeral systems),
with probabilities that are multiples of 2^-24. The normal distribution N(m, s^2), in units of the
grid's width, gives the integer k the mass of N(m, s^2 - 1/12) in [k - 1/2, k + 1/2], so that k has
the variance s^2.

*Integers.* A model of bin centres codes z_0 around the centre c_k, and p(k | z_0) by its decoder. A
model of data in the whole bins codes the point x in the bin of k too. A bin has M cells, of at most
half a standard deviation of p(x | z_0) = N(x^, rho_0^2):

    pop the cell of x by 1 / M for each cell in the bin of k,  ...,  push the cell by p(x | z_0)

*Lanes.* Several stacks are coded at the same time, so that the network sees batches. Image j is the
image number j // lanes of the stack j % lanes. The first image of each needs bits to pop. These
initial bits are known, so they carry nothing: the file is longer by them than the net length. After
the last image is decoded they are there again, which shows that every bit was decoded.

*Scrambling.* The bits that are popped for z_{i+1} are those that were just pushed for z_{i-1}, so
the noise of one step would be a function of the noise of another. The z_i would not be drawn from
q, and files would be longer than the bound. Therefore pseudorandom numbers, which the decoder
knows, are first added to the bits that a pop uses.

*Exactness.* Both sides must find the same means, to the last bit. The network is called by one
compiled function with batches of one size, and the coefficients of the chain are in float64.

References: Townsend, Bird, Barber, "Practical lossless compression with latent variables using bits
back coding", 2019; Kingma et al., "Variational Diffusion Models", 2021, appendix; Duda, "Asymmetric
numeral systems", 2013; Bamler, "Understanding entropy coding with asymmetric numeral systems",
2022.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbml.codec.chain import Chain
from sbml.core.types import Array, Batch, Score, batch_score, optional
from sbml.likelihood import discrete

CENTRE: Final = "centre"
UNIFORM: Final = "uniform"  # where the data of a model lie in their bins
WIDTH = 0.5  # of a grid, in standard deviations of the narrower distribution
PRECISION = 24  # bits of a probability
REACH = 12.0  # integers up to this many standard deviations from the mean have codes of their own
FAR = 2**22  # number of integers beyond these, on each side, that can be coded

NORMAL_BITS = math.log2(math.sqrt(2 * math.pi * math.e))  # the entropy of N(0, 1)


class CodedFileError(ValueError):
    """A file that is no coded file, is damaged, or was made by another model or machine."""


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
        model = uniform(2**PRECISION)
        for stack in self.stacks:
            upper = stack.decode(model, len(pad)).astype(np.int64)
            stack.encode_reverse(((upper + pad) % 2**PRECISION).astype(np.int32), model)

    def pop(self, by: Normal | Categorical, width: float, mean: np.ndarray) -> np.ndarray:
        """Numbers ``(n, d)`` on a grid, by distributions with ``mean (n, d)``, or by categorical
        ones with these probabilities ``(n, d, L)``."""
        each = [by.pop(stack, m) for stack, m in zip(self.stacks, mean / width, strict=True)]
        return width * np.stack(each)

    def push(self, by: Normal | Categorical, width: float, z: np.ndarray, mean: np.ndarray) -> None:
        """Encode numbers ``z (n, d)`` of the grid."""
        values = np.rint(z / width).astype(np.int64)
        for stack, each, m in zip(self.stacks, values, mean / width, strict=True):
            by.push(stack, each, m)

    def pop_uniform(self, size: int, count: int) -> np.ndarray:
        """Integers of 0 .. size - 1 with equal probabilities, int64 ``(n, count)``."""
        if size == 1:
            return np.zeros((len(self.stacks), count), np.int64)
        found = [stack.decode(uniform(size), count) for stack in self.stacks]
        return np.stack(found).astype(np.int64)

    def push_uniform(self, values: np.ndarray, size: int) -> None:
        """Encode ``values (n, d)`` of 0 .. size - 1."""
        if size > 1:
            for stack, each in zip(self.stacks, values.astype(np.int32), strict=True):
                stack.encode_reverse(each, uniform(size))


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """How images are coded by a score.

    Attributes:
      score: a score of one example, or of batches (``score.batch``).
      chain: the times and their distributions.
      shape: the shape of an image.
      levels: the number of levels of a pixel, L.
      data: ``uniform`` if the score is that of data spread over their bins; ``centre`` for data at
        bin centres. The score may then have a method ``decoder_log_p(y, t)``; without one, the
        decoder is Bayes' rule.
      lanes: the number of stacks.
      model: what identifies the model, by name; a decoder's must be the same.
    """

    score: Score
    chain: Chain
    shape: tuple[int, ...]
    levels: int
    data: Literal["centre", "uniform"] = UNIFORM
    lanes: int = 8
    model: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @cached_property
    def _noise(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """e(z_i, t_i) ``(lanes, d)`` of ``z (lanes, d)`` and i."""

        def noise(score: Score, z: Batch, t: Array) -> Batch:
            return -self.chain.sde.std(t) * batch_score(score)(z, jnp.full(z.shape[:1], t), None)

        return self._compiled(noise, np.float64)

    @cached_property
    def _level_probabilities(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """p(k | z_i) ``(lanes, d, L)`` of ``z (lanes, d)`` and i, for bin centres."""
        sde, levels = self.chain.sde, self.levels

        def probabilities(score: Score, z: Batch, t: Array) -> Array:
            def one(z: Array) -> Array:
                y = z / sde.mean_coef(t)
                if learned := optional(score, "decoder_log_p"):
                    log_p: Array = learned(y, t)
                    return log_p
                return discrete.decoder_log_p(y, levels, sde.std(t) / sde.mean_coef(t))

            return jnp.exp(jax.vmap(one)(z))

        return self._compiled(probabilities, np.float32)

    def _compiled(
        self, function: Callable[[Score, Batch, Array], Array], dtype: type
    ) -> Callable[[np.ndarray, int], np.ndarray]:
        """``function(score, z, t_i)`` of ``z (lanes, d)`` and i, compiled."""
        run, score = jax.jit(function), self.score
        if jax.tree_util.all_leaves([score]):  # An argument of ``jit`` must be a pytree.
            score = jax.tree_util.Partial(score)

        def at(z: np.ndarray, i: int) -> np.ndarray:
            images = jnp.asarray(z.reshape(self.lanes, *self.shape), jnp.float32)
            found = run(score, images, jnp.asarray(self.chain.times[i], jnp.float32))
            return np.asarray(found, dtype).reshape(*z.shape, *found.shape[images.ndim :])

        return at

    @cached_property
    def widths(self) -> np.ndarray:
        """The widths of the grids of z_0 .. z_N, ``(N + 1,)``."""
        return WIDTH * np.minimum(self.chain.forward_std, self.chain.reverse_std)

    @cached_property
    def _forward(self) -> list[Normal]:
        """q(z_i | z_{i-1}) on the grid of level i, first q(z_0 | x)."""
        return [Normal(s, open=False) for s in self.chain.forward_std / self.widths]

    @cached_property
    def _reverse(self) -> list[Normal]:
        """p(z_i | z_{i+1}) on the grid of level i, last p(z_N)."""
        return [Normal(s, open=True) for s in self.chain.reverse_std / self.widths]

    @property
    def _rho(self) -> float:
        return float(self.chain.sigma[0] / self.chain.alpha[0])

    @cached_property
    def cells(self) -> int:
        """M, the number of cells of a bin; 1 for bin centres."""
        if self.data == CENTRE:
            return 1
        return max(1, math.ceil(2 / self.levels / (WIDTH * self._rho)))

    @cached_property
    def _cell(self) -> Normal:
        """p(x | z_0) on the grid of the cells."""
        return Normal(self._rho * self.levels * self.cells / 2, open=True)

    @property
    def dims(self) -> int:
        """d, the number of entries of an image."""
        return math.prod(self.shape)

    @property
    def schedule(self) -> int:
        """The CRC32 of the coefficients: two sides with the same one have the same chain."""
        c = self.chain
        parts = c.times, c.alpha, c.sigma, c.log_snr, self.widths, np.asarray(c.prior_std)
        return zlib.crc32(b"".join(part.tobytes() for part in parts))

    @cached_property
    def arithmetic(self) -> int:
        """The CRC32 of the network's outputs for fixed inputs at the first, middle and last level.
        It depends on the weights, the compiler and the processor."""
        z = np.random.RandomState(0).normal(size=(self.lanes, self.dims))
        outputs = [self._noise(z, i) for i in (0, self.chain.steps // 2, self.chain.steps)]
        if self.data == CENTRE:
            outputs.append(self._level_probabilities(z, 0))
        return zlib.crc32(b"".join(np.ascontiguousarray(each).tobytes() for each in outputs))

    @property
    def made_by(self) -> dict[str, str]:
        """What a decoder must share with the encoder, by name."""
        return {
            **self.model,
            "schedule": f"{self.schedule:08x}",
            "arithmetic": f"{self.arithmetic:08x}",
            **{name: importlib.metadata.version(name) for name in ("jaxlib", "constriction")},
            "device": jax.devices()[0].device_kind,
        }

    @cached_property
    def initial_words(self) -> int:
        """The number of initial words of 32 bits of a stack, of which no pop may need more.

        After z_{i-1} is pushed, the stack is shorter than before the image, on average by at most
        -log2 q(z_i | x), with z_i in widths of the grid. Ten standard deviations of this are added.
        """
        known = np.log2(self.chain.sigma / self.widths) + NORMAL_BITS
        shorter = self.dims * np.array([np.log2(self.cells), *known[:-1], 0.0])
        spread = 10 * math.sqrt(self.dims / 2) / math.log(2)
        needed = np.max(shorter + spread + PRECISION * self._pad_sizes)
        return 2 + math.ceil(needed / 32)

    @cached_property
    def _pad_sizes(self) -> np.ndarray:
        """How many numbers of 24 bits a pop of each level uses, ``(N + 2,)``; the last is that of
        the cells."""
        normal = np.log2(self.chain.forward_std / self.widths) + NORMAL_BITS
        popped = self.dims * np.append(normal, math.log2(self.cells))
        spread = 10 * math.sqrt(self.dims / 2) / math.log(2)
        return 3 + np.ceil((popped + spread) / PRECISION).astype(int)

    def _pads(self, number: int) -> list[np.ndarray]:
        """The pseudorandom numbers for the pops of the image ``number`` of a stack, by level."""
        # The raw stream of Philox is the same in all versions of NumPy.
        raw = np.random.Philox(key=number).random_raw(int(self._pad_sizes.sum()))
        numbers = (raw >> np.uint64(64 - PRECISION)).astype(np.int64)
        return np.split(numbers, np.cumsum(self._pad_sizes)[:-1])

    def start(self, lane: int) -> np.ndarray:
        """The words of the stack ``lane`` before its first image."""
        # The stream of RandomState is the same in all versions of NumPy.
        random = np.random.RandomState(lane)
        return random.randint(1, 2**32, size=self.initial_words, dtype=np.uint32)

    def encode(self, lanes: Lanes, pixels: np.ndarray, number: int) -> None:
        """Encode ``pixels (n, *shape)``, as the image ``number`` of each of the n stacks."""
        chain, n, pads = self.chain, len(pixels), self._pads(number)
        k = pixels.reshape(n, -1).astype(np.int64)
        cell = k  # A bin of data at bin centres is one cell.
        if self.data == UNIFORM:
            lanes.scramble(pads[-1])
            cell = k * self.cells + lanes.pop_uniform(self.cells, self.dims)
        x = self._point(cell)
        lanes.scramble(pads[0])
        z = lanes.pop(self._forward[0], self.widths[0], chain.forward_mean(0, x))
        by, parameters = self._image_given(lanes, z)
        lanes.push(by, 1, cell, parameters)
        for i in range(1, chain.steps + 1):
            lanes.scramble(pads[i])
            above = lanes.pop(self._forward[i], self.widths[i], chain.forward_mean(i, z))
            noise = self._of(self._noise, lanes, above, i)
            mean = chain.reverse_mean(i, above, noise)
            lanes.push(self._reverse[i - 1], self.widths[i - 1], z, mean)
            z = above
        lanes.push(self._reverse[-1], self.widths[-1], z, np.zeros_like(z))

    def decode(self, lanes: Lanes, number: int) -> np.ndarray:
        """The last image of each stack, which is its image ``number``: int64 ``(n, *shape)``. It is
        removed from the stack."""
        chain, n, pads = self.chain, len(lanes.rows), self._pads(number)
        z = lanes.pop(self._reverse[-1], self.widths[-1], np.zeros((n, self.dims)))
        for i in range(chain.steps, 0, -1):
            mean = chain.reverse_mean(i, z, self._of(self._noise, lanes, z, i))
            below = lanes.pop(self._reverse[i - 1], self.widths[i - 1], mean)
            lanes.push(self._forward[i], self.widths[i], z, chain.forward_mean(i, below))
            lanes.scramble(-pads[i])
            z = below
        by, parameters = self._image_given(lanes, z)
        cell = lanes.pop(by, 1, parameters)
        k = cell // self.cells
        mean = chain.forward_mean(0, self._point(cell))
        lanes.push(self._forward[0], self.widths[0], z, mean)
        lanes.scramble(-pads[0])
        if self.data == UNIFORM:
            lanes.push_uniform(cell - k * self.cells, self.cells)
            lanes.scramble(-pads[-1])
        return k.reshape(n, *self.shape)

    def _point(self, cell: np.ndarray) -> np.ndarray:
        """The centres of cells, in the model's scale."""
        return (2 * cell + 1) / (self.levels * self.cells) - 1

    def _image_given(self, lanes: Lanes, z: np.ndarray) -> tuple[Normal | Categorical, np.ndarray]:
        """p(x | z_0) of the cells of x: the distribution and its parameters."""
        if self.data == CENTRE:
            return Categorical(), self._of(self._level_probabilities, lanes, z, 0)
        noise = self._of(self._noise, lanes, z, 0)
        x = (z - self.chain.sigma[0] * noise) / self.chain.alpha[0]
        return self._cell, ((x + 1) * self.levels * self.cells - 1) / 2

    def _of(
        self, function: Callable[..., np.ndarray], lanes: Lanes, z: np.ndarray, i: int
    ) -> np.ndarray:
        """``function`` of the batch of all lanes and i; a lane without an image gets zeros."""
        batch = np.zeros((self.lanes, self.dims))
        batch[lanes.rows] = z
        return function(batch, i)[lanes.rows]


class State(NamedTuple):
    """How far an encoding or a decoding has come; arrays only, so that it can be stored.

    Attributes:
      number: the number of images of each stack that are coded; a decoding counts down to 0.
      words: the words of all stacks, uint32.
      sizes: the number of words of each stack, ``(lanes,)``; 0 for a stack that is missing.
      pixels: of a decoding, the images that are decoded so far, which are the last ones, uint8
        ``(images, *shape)``.
    """

    number: int
    words: np.ndarray
    sizes: np.ndarray
    pixels: np.ndarray

    @classmethod
    def of(cls, number: int, stacks: Sequence[np.ndarray], pixels: np.ndarray) -> "State":
        """The state with the words ``stacks`` of each stack."""
        sizes = np.array([len(words) for words in stacks])
        return cls(number, np.concatenate(stacks), sizes, pixels)

    @property
    def stacks(self) -> list[np.ndarray]:
        """The words of each stack."""
        return np.split(self.words, np.cumsum(self.sizes)[:-1])


def first_state(codec: Codec) -> State:
    """The state of an encoding before the first image."""
    stacks = [codec.start(lane) for lane in range(codec.lanes)]
    return State.of(0, stacks, np.empty((0, *codec.shape), np.uint8))


def encode(codec: Codec, pixels: np.ndarray, state: State) -> Iterator[State]:
    """Encode the images ``pixels (n, *shape)`` that ``state`` lacks: a state after each round of
    one image in each stack. The first round is decoded at once.

    Raises:
      ValueError: this machine does not repeat its own arithmetic.
    """
    coders = [coder(words) for words in state.stacks]
    for number in range(state.number, -(-len(pixels) // codec.lanes)):
        batch = pixels[number * codec.lanes : (number + 1) * codec.lanes]
        rows = np.arange(len(batch))
        codec.encode(Lanes(coders[: len(batch)], rows), batch, number)
        words = [each.get_compressed() for each in coders]
        after = State.of(number + 1, words, state.pixels)
        if number == 0 and not _repeats(codec, batch, after):
            raise ValueError(
                "the first images were encoded, but decoding them gave other images: two calls of "
                "the network with the same input differ on this machine. On a GPU set "
                "XLA_FLAGS=--xla_gpu_deterministic_ops=true"
            )
        yield after


def _repeats(codec: Codec, batch: np.ndarray, state: State) -> bool:
    """Whether the images ``batch``, which were encoded to ``state``, are decoded from it."""
    try:
        return np.array_equal(next(decode(codec, len(batch), state)).pixels, batch)
    except CodedFileError:
        return False


def last_state(codec: Codec, count: int, stacks: Sequence[np.ndarray | None]) -> State:
    """The state of a decoding of ``count`` images before the last image. A stack that is None is
    missing: its images will be zeros."""
    words = [np.empty(0, np.uint32) if each is None else each for each in stacks]
    empty = np.empty((0, *codec.shape), np.uint8)
    return State.of(-(-count // codec.lanes), words, empty)


def decode(codec: Codec, count: int, state: State) -> Iterator[State]:
    """Decode those of ``count`` images that ``state`` lacks, from the last to the first: a state
    after each round.

    Raises:
      CodedFileError: a stack has no further image.
    """
    present = np.flatnonzero(state.sizes)
    words, pixels = state.stacks, state.pixels
    coders = {lane: coder(words[lane]) for lane in present}
    for number in range(state.number - 1, -1, -1):
        active = min(codec.lanes, count - number * codec.lanes)
        rows = present[present < active]
        batch = np.zeros((active, *codec.shape), np.uint8)
        try:
            if len(rows):  # The last round may consist of images of missing stacks only.
                batch[rows] = codec.decode(Lanes([coders[lane] for lane in rows], rows), number)
        except KeyError:  # of constriction: a value has no code
            raise CodedFileError(
                f"the images {number * codec.lanes} to {number * codec.lanes + active - 1} cannot "
                "be decoded: the file fits neither this model nor this machine"
            ) from None
        pixels = np.concatenate([batch, pixels])
        for lane in rows:
            words[lane] = coders[lane].get_compressed()
            if len(words[lane]) < codec.initial_words:
                raise CodedFileError(
                    f"lane {lane} ends before image {number}: the file was changed"
                )
        yield State.of(number, words, pixels)
