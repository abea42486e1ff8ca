"""Coded images come back exactly, and their length is the bound of the chain that codes them."""

import dataclasses
import functools
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import sbml
from sbml.codec import Chain, Codec, CodedFileError, bits_back, chain, compress, decompress, file
from sbml.codec.file import DamagedStacksError
from sbml.likelihood import bound, discrete
from sbml.score import from_prediction
from sbml.sdes import VP

LEVELS, SHAPE = 16, (2, 3, 1)
MEAN, STD = np.linspace(-0.3, 0.3, 6), np.linspace(0.15, 0.4, 6)


def score(x: jax.Array, t: jax.Array, key: Any) -> jax.Array:
    """The score of independent normal pixels."""
    a, s = VP().mean_coef(t), VP().std(t)
    mean, std = (jnp.asarray(v, x.dtype).reshape(SHAPE) for v in (MEAN, STD))
    return -(x - a * mean) / (a**2 * std**2 + s**2)


def images(n: int) -> np.ndarray:
    x = MEAN + STD * np.random.default_rng(0).normal(size=(n, 6))
    return np.clip((x + 1) * LEVELS / 2, 0, LEVELS - 1).astype(np.uint8).reshape(n, *SHAPE)


def codec(data: Any = "uniform", steps: int = 30, lanes: int = 4) -> Codec:
    errors = (0.95, 0.6, 0.2, 0.02)
    c = Chain(VP(), 1e-3 if data == "uniform" else 0.02, steps, errors)
    return Codec(score, c, SHAPE, LEVELS, data, lanes)


def random_stack(words: int = 4000) -> Any:
    return bits_back.coder(np.random.RandomState(0).randint(1, 2**32, words, dtype=np.uint32))


# The stack.


def test_popped_integers_have_the_mean_and_the_variance_of_the_normal() -> None:
    mean = np.random.default_rng(1).uniform(-50, 50, 20_000)
    for std in (2.0, 3.7):
        k = bits_back.Normal(std, open=False).pop(random_stack(20_000), mean)
        assert abs(np.mean(k - mean)) < 4 * std / math.sqrt(20_000)
        assert np.var(k - mean) == pytest.approx(std**2, rel=4 * math.sqrt(2 / 20_000))


@pytest.mark.parametrize("open", [False, True])
def test_a_push_adds_the_information_of_its_values(open: bool) -> None:
    rng, std = np.random.default_rng(2), 2.5
    mean = rng.uniform(-50, 50, 5000)
    k = np.rint(mean + std * rng.normal(size=5000)).astype(np.int64)
    if open:  # Integers that are too far away for a short code take about 24 + 22 bits.
        k[:7] += np.array([31, 32, -31, -32, 400, -60_000, 2_000_000])
    normal, stack = bits_back.Normal(std, open=open), random_stack()
    before, words = stack.num_valid_bits(), stack.get_compressed()
    normal.push(stack, k, mean)
    # N(m, s^2 - 1/12) in the bin around the integer.
    edges = (np.stack([k - 0.5, k + 0.5]) - mean) / math.sqrt(std**2 - 1 / 12)
    mass = np.diff(stats.norm.cdf(edges), axis=0)[0]
    expected = -np.log2(mass[7:]).sum() + (7 * 46 if open else -np.log2(mass[:7]).sum())
    assert stack.num_valid_bits() - before == pytest.approx(expected, abs=40 if open else 2)
    np.testing.assert_array_equal(normal.pop(stack, mean), k)
    np.testing.assert_array_equal(stack.get_compressed(), words)


def test_scrambled_bits_are_independent_of_what_was_pushed() -> None:
    """Without the pads, the noise of a pop is a function of the value that was just pushed."""
    normal, mean = bits_back.Normal(4.0, open=False), np.zeros(1)
    correlations = []
    for scrambled in (False, True):
        pairs = []
        for i in range(300):
            stack = random_stack(50)
            pushed = np.array([i % 17 - 8])
            normal.push(stack, pushed, mean)
            if scrambled:
                raw = np.random.Philox(key=i).random_raw(3)
                pad = (raw >> np.uint64(40)).astype(np.int64)
                bits_back.Lanes([stack], np.zeros(1, int)).scramble(pad)
            pairs.append((pushed[0], normal.pop(stack, mean)[0]))
        correlations.append(abs(np.corrcoef(np.array(pairs).T)[0, 1]))
    assert correlations[0] > 0.9 and correlations[1] < 4 / math.sqrt(300)


# The chain.


def kl(mean: Any, std: float, other: Any, other_std: float) -> np.ndarray:
    """KL(N(mean, std^2) || N(other, other_std^2)), ``(n,)``, of means ``(n, d)``."""
    square = (std**2 + (mean - other) ** 2) / other_std**2
    return np.sum(np.log(other_std / std) + (square - 1) / 2, axis=1)


def step(c: Chain, i: int, x: Any, z: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """KL(q(z_{i-1} | z_i, x) || p(z_{i-1} | z_i)), ``(n,)``."""
    known = c.reverse_mean(i, z, (z - c.alpha[i] * x) / c.sigma[i])
    std = c.sigma[i - 1] * math.sqrt(-math.expm1(c.log_snr[i] - c.log_snr[i - 1]))
    return kl(known, std, c.reverse_mean(i, z, noise), c.reverse_std[i - 1])


def test_the_reverse_step_is_the_true_one_where_the_noise_is_known() -> None:
    """The mean and variance of z_{i-1} given x and z_i, by conditioning their joint normal."""
    c, x, i = Chain(VP(), 1e-3, 6), np.array([[0.4]]), 4
    a, s = c.alpha, c.sigma
    z = np.array([[0.7]])
    # Given x: z_{i-1} = a x + s n, z_i = ratio z_{i-1} + noise.
    ratio, first = a[i] / a[i - 1], s[i - 1] ** 2
    gain = ratio * first / s[i] ** 2
    mean = a[i - 1] * x + gain * (z - a[i] * x)
    noise = (z - a[i] * x) / s[i]
    np.testing.assert_allclose(c.reverse_mean(i, z, noise), mean, rtol=1e-10)
    assert c.reverse_std[i - 1] ** 2 == pytest.approx(first - gain * ratio * first, rel=1e-9)
    assert c.forward_std[i] ** 2 == pytest.approx(s[i] ** 2 - ratio**2 * first, rel=1e-9)


def test_with_the_best_variances_few_steps_lose_nothing_on_isotropic_normal_data() -> None:
    """There p(z_{i-1} | z_i) is normal, so the bound is the entropy of x_eps, however few steps."""
    v, bins, eps = 0.3, 4096, 1e-3
    plain = Chain(VP(), eps, 6)  # Its steps are even in log-SNR, as the bins are.
    even = np.linspace(*plain.log_snr[[0, -1]], bins + 1)
    rho2 = np.exp(-(even[:-1] + even[1:]) / 2)
    c = Chain(VP(), eps, 6, tuple((v / (v + rho2)).tolist()))
    variances = c.alpha**2 * v + c.sigma**2  # of z_i
    kept = (c.alpha[1:] / c.alpha[:-1]) ** 2 * variances[:-1] / variances[1:]
    np.testing.assert_allclose(c.reverse_std[:-1] ** 2, variances[:-1] * (1 - kept), rtol=1e-3)
    m = v / (v + np.exp(-c.log_snr[1:]))
    noises = np.sqrt(m)[:, None]  # |n - e|^2 = m for each
    steps = [
        step(c, i, np.zeros((1, 1)), c.sigma[i] * np.array([[noises[i - 1, 0]]]), np.zeros((1, 1)))
        for i in range(1, 7)
    ]
    second = c.alpha[-1] ** 2 * v
    prior = 0.5 * (second + c.sigma[-1] ** 2 - 1 - np.log(c.sigma[-1] ** 2))
    entropy = 0.5 * np.log(2 * np.pi * np.e * (v * c.alpha[0] ** 2 + c.sigma[0] ** 2))
    of_noise = 0.5 * np.log(2 * np.pi * np.e * c.sigma[0] ** 2)
    # E prior + E diffusion: the cross entropy of x_eps minus the entropy of its noise.
    assert np.sum(steps) + prior == pytest.approx(entropy - of_noise, abs=2e-4)
    assert np.sum(np.expm1(-np.diff(plain.log_snr)) / 2 * v / (v + np.exp(-plain.log_snr[1:]))) > 9


@functools.cache
def evaluation(data: Any) -> Callable[..., bound.Bound]:
    """The compiled bound in the steps of the chain, of points or, with "centre", of pixels."""
    c = codec(data).chain
    u = np.float32((np.arange(500) + 0.5) / 500)
    options: dict[str, Any] = {"eps": c.eps, "u": u, "steps": c.as_steps}

    def one(x: jax.Array, key: jax.Array) -> bound.Bound:
        if data == "uniform":
            return bound.elbo(score, c.sde, x, key, **options)
        return discrete.elbo(score, c.sde, x, key, noise=discrete.Categorical(LEVELS), **options)

    return jax.jit(jax.vmap(one))


@pytest.mark.parametrize("data", ["uniform", "centre"])
def test_the_bound_of_an_evaluation_is_that_of_the_chain_in_the_same_steps(data: Any) -> None:
    """``bound.elbo`` and ``discrete.elbo`` have the expectation of the chain's divergences. These
    are quadratic in the noise n, so their mean is that over n = 1 and n = -1 in every entry."""
    c, k = codec(data).chain, images(1)[0]
    x = (2 * k.reshape(1, 6) + 1) / LEVELS - 1
    expected = kl(c.alpha[-1] * x, c.sigma[-1], 0, c.reverse_std[-1])[0]
    for i in range(1, c.steps + 1):
        z = c.alpha[i] * x + c.sigma[i] * np.array([[1.0], [-1.0]])
        noise = c.sigma[i] * (z - c.alpha[i] * MEAN) / (c.alpha[i] ** 2 * STD**2 + c.sigma[i] ** 2)
        expected += step(c, i, x, z, noise).mean()
    one = np.float32(x.reshape(SHAPE)) if data == "uniform" else k
    keys = jax.random.split(jax.random.key(0), 640)
    found = jax.device_get(evaluation(data)(np.stack([one] * 640), keys))
    values = np.asarray(found.prior + found.diffusion, float)
    stderr = values.std(ddof=1) / math.sqrt(640)
    assert abs(values.mean() - expected) < 4 * stderr < 0.5


# Images.


@pytest.mark.parametrize("data", ["uniform", "centre"])
def test_images_come_back_and_their_length_is_the_bound(data: Any) -> None:
    """Two-sided: the file is neither longer nor shorter than the bound by the functions of an
    evaluation; a bound that lacks a quarter of its diffusion is caught."""
    c, pixels, rows = codec(data, lanes=64), images(64 * 10), np.arange(64)
    coders = [bits_back.coder(c.start(lane)) for lane in rows]
    nets = []
    for number, batch in enumerate(np.split(pixels, 10)):
        before = np.array([coder.num_valid_bits() for coder in coders])
        c.encode(bits_back.Lanes(coders, rows), batch, number)
        nets.append(np.array([coder.num_valid_bits() for coder in coders]) - before)
    x, keys = pixels, jax.random.split(jax.random.key(1), len(pixels))
    if data == "uniform":
        u = np.random.default_rng(1).uniform(size=pixels.shape)
        x = np.float32(2 * (pixels + u) / LEVELS - 1)
    found = jax.device_get(evaluation(data)(x, keys))
    if data == "uniform":  # A density of x becomes one of integers.
        found = found._replace(reconstruction=found.reconstruction + 6 * math.log(LEVELS / 2))
    wrong = found.total - found.diffusion / 4

    def differs(length: Any) -> float:
        gaps = np.concatenate(nets) - np.asarray(length)
        return abs(gaps.mean()) / gaps.std(ddof=1) * math.sqrt(len(gaps))

    assert differs(found.total / math.log(2)) < 4
    assert differs(wrong / math.log(2)) > 10


@pytest.mark.parametrize(("data", "n"), [("uniform", 3), ("centre", 11)])
def test_files_are_exact_for_any_number_of_images(data: Any, n: int) -> None:
    c, pixels = codec(data, steps=6), images(n)
    pixels[0] = LEVELS - 1 - pixels[0][::-1]  # far from the model's mean
    content = compress(c, pixels)
    np.testing.assert_array_equal(decompress(c, content), pixels)
    assert compress(c, pixels) == content


def test_a_network_without_a_decoder_of_its_own_has_that_of_bayes_rule() -> None:
    plain = codec("centre", lanes=2)
    noise = from_prediction(lambda x, t: -VP().std(t) * score(x, t, None), "noise", VP())
    network = dataclasses.replace(plain, score=noise)
    z = np.random.default_rng(0).normal(size=(2, 6))
    found, expected = (each._level_probabilities(z, 0) for each in (network, plain))
    np.testing.assert_array_equal(found, expected)


def test_an_image_that_the_model_finds_impossible_is_coded_too() -> None:
    tight = Codec(
        lambda x, t, key: -(x - 0.9 * VP().mean_coef(t)) / VP().std(t) ** 2,
        Chain(VP(), 1e-3, 6),
        SHAPE,
        LEVELS,
        "uniform",
        2,
    )
    pixels = images(4)
    np.testing.assert_array_equal(decompress(tight, compress(tight, pixels)), pixels)


def test_a_stopped_encoding_and_decoding_continue_to_the_same_bytes() -> None:
    c, pixels = codec("centre", steps=6), images(11)
    states = list(bits_back.encode(c, pixels, bits_back.first_state(c)))
    arrays = {name: np.asarray(value) for name, value in states[0]._asdict().items()}
    stored = bits_back.first_state(c)._replace(**arrays)
    *_, last = bits_back.encode(c, pixels, stored)
    np.testing.assert_array_equal(last.words, states[-1].words)
    first, *_ = bits_back.decode(c, 11, bits_back.last_state(c, 11, last.stacks))
    *_, end = bits_back.decode(c, 11, first)
    np.testing.assert_array_equal(end.pixels, pixels)


# Files.


@pytest.fixture(scope="module")
def coded() -> tuple[Codec, np.ndarray, bytes]:
    c, pixels = codec("centre", steps=6), images(9)
    return c, pixels, compress(c, pixels)


def test_a_damaged_lane_costs_its_own_images_only(coded: Any) -> None:
    """The lane 0 alone has an image in the last round."""
    c, pixels, content = coded
    payload = file.HEAD.size + file.HEAD.unpack_from(content)[1]
    first, last = bytearray(content), bytearray(content)
    first[payload] ^= 4
    last[-2] ^= 4
    for damaged, lost in ((first, [0, 4, 8]), (last, [3, 7]), (content[:-4], [3, 7])):
        said = rf"lanes {lost[0]} of 4.* {9 - len(lost)} of 9 images"
        with pytest.raises(DamagedStacksError, match=said) as caught:
            decompress(c, bytes(damaged))
        assert caught.value.lost.tolist() == lost
        whole = np.setdiff1d(np.arange(9), lost)
        np.testing.assert_array_equal(caught.value.pixels[whole], pixels[whole])
    with pytest.raises(CodedFileError, match="all 4 lanes are damaged or missing"):
        decompress(c, content[:payload])


def test_another_model_or_chain_is_refused_by_name(coded: Any) -> None:
    c, _, content = coded
    other = Codec(lambda *of: 1.01 * score(*of), c.chain, SHAPE, LEVELS, "centre", 4)
    with pytest.raises(CodedFileError, match=r"arithmetic \w+, here \w+: it can only"):
        decompress(other, content)
    with pytest.raises(CodedFileError, match="steps 6, here 30"):
        decompress(codec("centre", steps=30), content)
    with pytest.raises(CodedFileError, match="lanes 4, here 5"):
        decompress(codec("centre", steps=6, lanes=5), content)


def test_no_mutation_goes_unnoticed(coded: Any) -> None:
    """10,000 files with flipped bits, or with parts that are cut out or repeated: each is refused,
    or is read without at least one stack."""
    content, rng = coded[2], np.random.default_rng(4)
    for _ in range(10_000):
        changed = bytearray(content)
        start, size = rng.integers(len(content)), rng.integers(1, 40)
        kind = rng.integers(3)
        if kind == 0:
            for place in rng.integers(len(content), size=rng.integers(1, 4)):
                changed[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del changed[start : start + size]
        else:
            changed[start:start] = changed[start : start + size]
        if bytes(changed) == content:
            continue
        try:
            _, found = file.from_bytes(bytes(changed))
        except CodedFileError:
            continue
        assert any(words is None for words in found)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"count":9', '"count":2147483647'),
        ('"count":9', '"count":99999999999'),
        ('"steps":6', '"steps":2147483647'),
        ('"shape":[2,3,1]', '"shape":[2000,3000,1]'),
        ('"levels":16', '"levels":1e9'),
        ('"format":1', '"format":2'),
        ('"words":[', '"words":[2147483647,'),
        ('"eps":0.02', '"eps":NaN'),
        ('"errors":[', '"errors":[300,'),
    ],
)
def test_an_impossible_header_with_a_right_checksum_is_refused(
    coded: Any, old: str, new: str
) -> None:
    c, _, content = coded
    _, length, _ = file.HEAD.unpack_from(content)
    start = file.HEAD.size
    header = content[start : start + length]
    assert old.encode() in header
    header = header.replace(old.encode(), new.encode())
    changed = file.HEAD.pack(file.MAGIC, len(header), zlib.crc32(header)) + header
    with pytest.raises(CodedFileError):
        decompress(c, changed + content[start + length :])


def test_other_files_and_longer_ones_are_refused(coded: Any) -> None:
    for content in (b"", b"SBML", b"PNG" * 9, struct.pack("<4sII", b"SBML", 2**32 - 1, 0)):
        with pytest.raises(CodedFileError):
            decompress(coded[0], content)
    with pytest.raises(CodedFileError, match="3 bytes after its last stack"):
        decompress(coded[0], coded[2] + b"abc")


def test_arithmetic_that_does_not_repeat_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    c = codec("centre", steps=6)
    exact: Callable[..., np.ndarray] = c._noise

    def unstable(z: np.ndarray, i: int) -> np.ndarray:
        calls.append(i)
        return exact(z, i) * (1 + 1e-4 * len(calls))

    monkeypatch.setitem(vars(c), "_noise", unstable)
    with pytest.raises(ValueError, match="differ on this machine"):
        compress(c, images(4))


@pytest.mark.slow
def test_the_pilot_measures_the_errors_of_the_noise_prediction() -> None:
    x = jnp.asarray(MEAN + STD * np.random.default_rng(5).normal(size=(500, 6)), jnp.float32)
    x = x.reshape(-1, *SHAPE)
    found = np.asarray(chain.pilot(score, VP(), x, jax.random.key(0), eps=1e-3, bins=4))
    even = Chain(VP(), 1e-3, 400)
    rho2 = np.exp(-(even.log_snr[1:] + even.log_snr[:-1]) / 2)[:, None]
    truth = (STD**2 / (STD**2 + rho2)).mean(axis=1).reshape(4, 100).mean(axis=1)
    np.testing.assert_allclose(found, np.clip(truth, 1 / 512, 511 / 512), rtol=0.05)


def test_the_codec_is_a_module_of_sbml() -> None:
    assert sbml.codec.compress is compress
