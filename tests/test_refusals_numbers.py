"""Functions of pixels, bits and features refuse arguments that they do not document."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
from refusals import (
    BAD_KEYS,
    COUNTS,
    EPS,
    EPSILONS,
    EXAMPLES,
    FEATURES,
    KEY,
    LIKE_X,
    NAN,
    PIXELS,
    PROBES,
    VP,
    Cases,
    U,
    X,
    Z,
    score,
)

from sbml import dequantizers
from sbml.core import bits
from sbml.likelihood import discrete
from sbml.score import divergence, integers
from sbml.statistics import distances, intervals

pytestmark = pytest.mark.usefixtures("unchecked")


def decoded(
    pixels: Any = PIXELS, u: Any = U, levels: Any = 16, eps: float = EPS, key: Any = KEY
) -> Any:
    noise = discrete.Categorical(levels)
    return discrete.elbo(score, VP, pixels, key, eps=eps, u=u, noise=noise)


def denoiser(y: Any = X, out: Any = None, pixels: Any = PIXELS) -> Any:
    out = np.zeros((3, 16), np.float32) if out is None else out
    return integers.decoder_nats(out, y, np.float32(0.1), pixels, 16)


CASES: Cases = {
    "discrete": (
        decoded,
        {"pixels": PIXELS, "u": U, "levels": 16, "eps": EPS, "key": KEY},
        BAD_KEYS
        | {
            "pixels": (PIXELS - 2, PIXELS + 13, PIXELS.astype(float), PIXELS.tolist(), 1),
            "u": (U[None], U - 1, U.tolist()),
            "levels|pixels": (0, -16, 1, 16.5, 3),
            "eps": (0.0, 2.0),
        },
    ),
    "decoder": (
        lambda x, pixels, rho: discrete.decoder_nats(x, pixels, 16, rho),
        {"x": X, "pixels": PIXELS, "rho": jnp.asarray(0.1)},
        EXAMPLES
        | {
            "pixels": (PIXELS[:1], PIXELS[None], PIXELS - 2, PIXELS * 9, PIXELS.astype(float)),
            "rho": (0.0, -0.1, NAN),
        },
    ),
    "reconstruction": (
        lambda pixels, eps, z: discrete.reconstruction(
            VP, discrete.Categorical(16), pixels, eps, z
        ),
        {"pixels": PIXELS, "eps": jnp.asarray(EPS), "z": Z},
        {
            "z|pixels": LIKE_X["z"],
            "pixels": (PIXELS - 2, PIXELS.tolist()),
            "eps|t": (1, -1.0, NAN),
        },
    ),
    "denoised": (
        lambda out, y, rho, levels: integers.posterior_mean(out, y, rho, levels, "uniform"),
        {"out": np.zeros((3, 16), np.float32), "y": X, "rho": np.float32(0.1), "levels": 16},
        {
            "out|network": (np.zeros((3, 15), np.float32), [[0.0] * 16] * 3),
            "y": EXAMPLES["x"],
            "rho": (0.0, -0.1, NAN, np.float32([0.1, 0.0, 0.1])),
            "levels": (0, -1, 1, 16.5),
        },
    ),
    "outputs": (integers.outputs, {"levels": 16}, {"levels": (0, -1, 1, 16.5, NAN)}),
    "edge": (
        lambda eps, tau: discrete.edge_constant(VP, eps, tau),
        {"eps": EPS, "tau": 3.0},
        EPSILONS | {"tau": (0.0, -1.0, NAN)},
    ),
    "edge score": (
        lambda tau: discrete.edge_score(X, np.float32(0.5), np.float32(0.8), tau),
        {"tau": 3.0},
        {"tau": (0.0, -1.0, NAN)},
    ),
    "bin_log_snr": (
        discrete.bin_log_snr,
        {"levels": 16, "tau": 3.0},
        {"levels": (0, 1, 16.5, NAN), "tau": (0.0, -1.0, NAN)},
    ),
    "denoiser": (
        denoiser,
        {"y": X, "pixels": PIXELS, "out": np.zeros((3, 16), np.float32)},
        {
            "y|network": (X.astype(int), X[:1], X.tolist()),
            "out|network": (np.zeros((3, 15), np.float32), [[0.0] * 16] * 3),
            "pixels": (PIXELS[:1], PIXELS - 2, PIXELS + 13, PIXELS.astype(float)),
        },
    ),
    "smallest_time": (
        lambda levels, eps, tau: discrete.smallest_time(VP, levels, eps, tau),
        {"levels": 16, "eps": EPS, "tau": 3.0},
        {"levels": (0, -1, 16.5), "eps": (0.0, 1.0, -1.0), "tau": (0.0, -1.0, NAN)},
    ),
    "truncated_normal": (
        discrete.truncated_normal,
        {"e": X, "tau": 3.0},
        {"tau": (0.0, -3.0, NAN)},
    ),
    "to_model": (
        bits.to_model,
        {"pixels": PIXELS, "u": 0.5, "levels": 16},
        {
            "pixels": (PIXELS + 13, PIXELS - 2),
            "u": (2.0, -1.0, U[:1] - 1),
            "levels": (0, -1, 1.5),
        },
    ),
    "to_pixels": (
        bits.to_pixels,
        {"x": X, "levels": 16},
        {"x": (X * NAN, X * 1j, PIXELS), "levels": (0, -16, 257, 16.5)},
    ),
    "bits_per_dim": (
        bits.bits_per_dim,
        {"nll": 1.0, "shape": (3,), "levels": 16},
        {"levels": (0, -16, 16.5), "shape": ((0,), (-1,), (2.5,))},
    ),
    "nats_to_bits": (
        bits.nats_to_bits,
        {"nats": 1.0, "shape": (3,)},
        {"shape": ((0,), (-1,), (2.5,))},
    ),
    "directions": (
        lambda x, vs: divergence.quadratic_forms(lambda x: -x, x, vs),
        {"x": X, "vs": PROBES},
        EXAMPLES
        | {
            "vs": (
                X,
                PROBES[:, :1],
                PROBES[:0],
                PROBES.astype(int),
                PROBES.tolist(),
                None,
            )
        },
    ),
    "exact": (lambda x: divergence.exact(lambda x: -x, x), {"x": X}, EXAMPLES),
    "probes": (
        lambda key, count: divergence.probes(key, (3,), count),
        {"key": KEY, "count": 2},
        BAD_KEYS | {"count": COUNTS},
    ),
    "hadamard": (
        lambda rows: divergence.hadamard(rows, np.arange(3)),
        {"rows": 2},
        {"rows": COUNTS},
    ),
    "exact_batch": (divergence.exact_batch, {"dims": 3}, {"dims": COUNTS}),
    "dequantizer": (
        lambda pixels, key: [
            dequantizers.DEQUANTIZERS[name]().sample({}, pixels, key)
            for name in ("uniform", "truncated_normal")
        ],
        {"pixels": PIXELS, "key": KEY},
        BAD_KEYS | {"pixels": (PIXELS.astype(float), PIXELS > 0, PIXELS.tolist())},
    ),
    "moments": (
        distances.Moments.of,
        {"features": FEATURES},
        {"features": (FEATURES[0], FEATURES[..., None], FEATURES + 0j, FEATURES[:1])},
    ),
    "kernel": (
        distances.kernel,
        {"x": FEATURES, "y": FEATURES, "chunk": 5},
        {
            "x|features": (FEATURES[:, :1], FEATURES[0], FEATURES[None]),
            "y|features": (FEATURES[:1], FEATURES + 0j),
            "chunk": COUNTS,
        },
    ),
    "frechet": (
        lambda y: distances.frechet(distances.Moments.of(FEATURES), distances.Moments.of(y)),
        {"y": FEATURES},
        {"y|features": (FEATURES[:, :1], FEATURES[:, :2])},
    ),
    "inception_score": (
        distances.inception_score,
        {"probabilities": np.full((4, 2), 0.5)},
        {
            "probabilities|features": (
                np.full((4, 2), 0.4),
                np.full((4, 2, 1), 0.5),
                FEATURES,
                np.ones((0, 2)),
            )
        },
    ),
    "nearest": (
        distances.nearest,
        {"x": FEATURES, "others": FEATURES, "chunk": 5},
        {
            "x|images": (FEATURES[:, :1], FEATURES + 0j),
            "others|images": (FEATURES[..., None], FEATURES[:0], FEATURES + 0j),
            "chunk": COUNTS,
        },
    ),
    "mean_interval": (
        intervals.mean_interval,
        {"values": X},
        {"values": (X[None], X[0], X + 0j, X[:0]), "skewed": ("yes", 1)},
    ),
    "repeated_stderr": (
        intervals.repeated_stderr,
        {"first": X, "second": Z, "n": 3},
        {"first|draws|values": (X[:1], X[None]), "second|draws|values": (Z[:1], 0.1), "n": COUNTS},
    ),
    "half_width": (
        intervals.half_width,
        {"stderr": 0.1, "freedom": 3},
        {"stderr": (-0.1,), "freedom": (-1,)},
    ),
    "outliers": (
        intervals.outliers,
        {"values": X},
        {"values": (X[None], 0.3)},
    ),
}


documented, test_the_rest_is_refused = refusals.tests_of(CASES)
test_what_is_documented_is_accepted = pytest.mark.slow(documented)


def test_traced_values_are_not_checked_and_nan_is_not_hidden() -> None:
    x = jax.jit(lambda pixels, u: bits.to_model(pixels, u, 16))(PIXELS, jnp.asarray(0.5))
    np.testing.assert_array_equal(x, bits.to_model(PIXELS, 0.5, 16))
    assert np.isnan(bits.to_model(PIXELS, NAN, 16)).all()
    moments = [distances.Moments.of(features) for features in (FEATURES, FEATURES * NAN)]
    assert np.isnan(distances.frechet(*moments))
