"""The loss of the network at each noise level, for training images and for images of the split.

    L(lambda) = E 1/2 |z - e(x_t, t)|^2 / (d log 2),      lambda = log SNR(t)

in bits/dim per unit of lambda, so that the integral of L is the term ``diffusion`` of the bound. It
is estimated in equal bins of lambda. With a Gaussian control (``sbml.bound``) the draws are
differences from the error of the control, whose own mean in a bin has a closed form.

The loss of training images has a floor: that of the best prediction for n equally likely images,

    E[x | y] = sum_k w_k E[x | y, k] / sum_k w_k,    w_k = p(y | k) = prod_i p(y_i | k_i),

with y = x_t / alpha and ``integers.bin_moments``. A network that reaches it has learned the
training images by heart.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import dequantizers
from sbml.core import bits
from sbml.core.streams import stream
from sbml.core.types import Array, Example, Key, Scalar, Score
from sbml.data import ImageSet, spread
from sbml.density.estimators.base import Target
from sbml.density.estimators.bound import Estimator
from sbml.likelihood import bound
from sbml.likelihood.bound import GaussianControl
from sbml.program.evaluation.cells import Run
from sbml.score import NetworkScore, integers
from sbml.sdes import SDE
from sbml.sdes.times import Importance

BINS = 16  # at most
MOST = 2**22  # pixels of the training images, for their floor


def measure(run: Run) -> dict[str, Any]:
    """L of at most ``eval.bound.level_images`` images of each kind, for the bound ``run``.

    Returns:
      The ``edges (bins + 1,)`` of the bins in lambda, beginning at the smallest time; L ``(bins,)``
      of the images of the ``split`` and of those of ``train``, each with its standard error; with
      a control also its error ``linear``, for the images of the split; the ``floor`` of training
      images, if they have at most ``MOST`` pixels; and the number of ``images`` of each kind.
    """
    measured, evaluation = run.measurement, run.evaluation
    config = evaluation.experiment.config.eval
    assert isinstance(measured.estimator, Estimator)
    # Both kinds have the same number of images, so that one program is compiled.
    count = min(config.bound.level_images, len(evaluation.train), len(measured.ids))

    def chosen(images: ImageSet, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        ids, labels = ids[spread(len(ids), count)], evaluation.trained.labels(images)
        return images.images[ids], None if labels is None else labels[ids]

    images = {
        "train": chosen(evaluation.train, np.arange(len(evaluation.train))),
        "split": chosen(evaluation.images, measured.ids),
    }
    control, linear = measured.estimator.reduction.control, evaluation.control
    bounded = evaluation.trained.score, measured.target, run.dequantization.params
    known = evaluation.train.images
    given = *bounded, images, known if known.size <= MOST else None, control, linear, config.seed
    stored = evaluation.once("levels", _curves, *given)
    return {name: value.tolist() for name, value in stored.items()} | {"images": count}


def _curves(
    score: NetworkScore,
    target: Target,
    params: Any,
    images: dict[str, tuple[np.ndarray, np.ndarray | None]],
    known: np.ndarray | None,
    control: GaussianControl | None,
    linear: GaussianControl | None,
    seed: int,
) -> dict[str, np.ndarray]:
    """The numbers of :func:`measure` for the ``images`` and classes of ``train`` and of ``split``.

    ``params`` are those of the target's dequantizer. ``known`` are all training images, or None.
    ``control`` has the coefficients of the pilot, and ``linear`` is the Gaussian without them.
    """
    assert target.levels is not None  # The images are integers.
    sde, levels, (count, *shape) = target.sde, target.levels, images["train"][0].shape
    unit = bits.nats_to_bits(1.0, (math.prod(shape),))
    bins = min(BINS, 4 * count)  # Each image has 8 draws, and each bin at least 2.

    centres = dequantizers.has_bound(target.dequantizer)

    def curve(score: Score, pixels: Any, condition: Any, key: Any) -> dict[str, Any]:
        x = bits.to_model(pixels, 0.5, levels)
        if not centres:
            keys = jax.random.split(stream(key, "dequantization"), count)
            x, _ = jax.vmap(target.sample, (None, 0, 0))(params, pixels, keys)
        t, _ = Importance(sde, target.eps).at(jnp.arange(bins + 1) / bins)
        edges = sde.log_snr(t)
        options: Any = {"eps": target.eps, "control": control, "bins": bins}
        found = bound.profile(score, sde, x, key, condition=condition, **options)

        def mean_error(control: Any) -> Any:
            """The mean of the control's error in each bin, in closed form."""
            if control is None:
                return jnp.zeros(bins)
            each = jax.vmap(lambda x: jax.vmap(lambda t: control.integral(sde, x, t))(t))(x)
            return jnp.diff(each.mean(0)) / jnp.diff(edges)

        return {
            "edges": edges,
            "mean": unit * (found.mean + mean_error(control)),
            "stderr": unit * jnp.sqrt(found.variance / found.draws),
            "linear": unit * mean_error(linear),
        }

    run, key = jax.jit(curve), stream(jax.random.key(seed), "noise levels")
    both = zip(("train", "split"), jax.random.split(key), strict=True)
    of = {kind: run(score, *images[kind], key) for kind, key in both}
    found = {"edges": of["split"]["edges"]}
    for kind, curves in of.items():
        found |= {kind: curves["mean"], f"{kind}_stderr": curves["stderr"]}
    found |= {} if control is None else {"linear": of["split"]["linear"]}
    if known is not None:
        best = _best_score(known, levels, sde, "centre" if centres else "uniform")
        pixels, _ = images["train"]
        found |= {"floor": run(best, pixels, None, jax.random.split(key)[0])["mean"]}
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def _best_score(known: np.ndarray, levels: int, sde: SDE, data: str) -> Score:
    """The score of the images ``known (n, *s)``, each of which has the probability 1 / n."""
    n, *shape = known.shape
    places = jnp.arange(math.prod(shape))[None], jnp.asarray(known.reshape(n, -1), int)
    centre = bits.to_model(jnp.arange(levels)[None], 0.5, levels)

    def score(places: tuple[Array, Array], x: Example, t: Scalar, key: Key | None) -> Example:
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        y = x.reshape(-1, 1) / alpha
        log_p, mean = integers.bin_moments(centre, y, sigma / alpha, levels, data)
        share = jax.nn.softmax(jnp.sum(log_p[places], axis=1))
        return (alpha * (share @ mean[places]).reshape(x.shape) - x) / sigma**2

    return jax.tree_util.Partial(score, places)
