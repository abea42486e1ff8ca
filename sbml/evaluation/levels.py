"""The loss of the network at each noise level, for training images and for images of the split.

    L(lambda) = E 1/2 |z - e(x_t, t)|^2 / (d log 2),      lambda = log SNR(t)

in bits/dim per unit of lambda, so that the integral of L is the term ``diffusion`` of the bound. It
is estimated in equal bins of lambda. With a Gaussian control (``sbml.bound``) the draws are
differences from the error of the control, whose own mean in a bin has a closed form.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, bound, dequantizers, fingerprint
from sbml.data import ImageSet, spread
from sbml.estimators.bound import Estimator
from sbml.evaluation.cells import CellRun
from sbml.evaluation.inputs import Inputs
from sbml.runtime.parts import compute_once
from sbml.runtime.trees import tree_crc32
from sbml.streams import stream
from sbml.times import Importance

BINS = 16  # at most


def measure(inputs: Inputs, run: CellRun) -> dict[str, list[float]]:
    """L of at most ``eval.bound.level_images`` images of each kind, for the bound ``run``.

    Returns:
      The ``edges (bins + 1,)`` of the bins in lambda, beginning at the smallest time; L ``(bins,)``
      of the images of the ``split`` and of those of ``train``, each with its standard error; and
      with a control also its error ``linear``, for the images of the split.
    """
    measured, config = run.measurement, inputs.experiment.config.eval
    target, ids = measured.target, measured.ids
    assert isinstance(measured.estimator, Estimator)
    control = measured.estimator.reduction.control
    dims = int(np.prod(inputs.experiment.shape))
    # Both kinds have the same number of images, so that one program is compiled. Each image has 8
    # draws, and each bin at least 2.
    count = min(config.bound.level_images, len(inputs.train), len(ids))
    bins = min(BINS, 4 * count)

    def curves(score: Any, pixels: Any, condition: Any, key: Any) -> dict[str, Any]:
        x = bits.to_model(pixels, 0.5, inputs.images.levels)
        if not dequantizers.has_bound(target.dequantizer):
            keys = jax.random.split(stream(key, "dequantization"), len(pixels))
            draw = jax.vmap(target.sample, (None, 0, 0))
            x, _ = draw(run.dequantization.params, pixels, keys)
        t, _ = Importance(target.sde, target.eps).at(jnp.arange(bins + 1) / bins)
        edges = target.sde.log_snr(t)
        options: Any = {"eps": target.eps, "control": control, "bins": bins}
        found = bound.profile(score, target.sde, x, key, condition=condition, **options)

        def mean_error(control: Any) -> Any:
            """The mean of the control's error in each bin, in closed form."""
            if control is None:
                return jnp.zeros(bins)
            each = jax.vmap(lambda x: jax.vmap(lambda t: control.integral(target.sde, x, t))(t))(x)
            return jnp.diff(each.mean(0)) / jnp.diff(edges)

        unit = bits.nats_to_bits(1.0, (dims,))
        return {
            "edges": edges,
            "mean": unit * (found.mean + mean_error(control)),
            "stderr": unit * jnp.sqrt(found.variance / found.draws),
            "linear": unit * mean_error(inputs.control),
        }

    def compute() -> dict[str, np.ndarray]:
        run_curves = jax.jit(curves)
        keys = jax.random.split(stream(jax.random.key(config.seed), "noise levels"))

        def of(images: ImageSet, ids: np.ndarray, key: Any) -> dict[str, Any]:
            chosen, labels = ids[spread(len(ids), count)], inputs.labels(images)
            condition = None if labels is None else labels[chosen]
            return run_curves(inputs.score, jnp.asarray(images.images[chosen]), condition, key)

        train = of(inputs.train, np.arange(len(inputs.train)), keys[0])
        split = of(inputs.images, ids, keys[1])
        found = {"edges": split["edges"], "train": train["mean"], "train_stderr": train["stderr"]}
        found |= {"split": split["mean"], "split_stderr": split["stderr"]}
        found |= {} if control is None else {"linear": split["linear"]}
        return {name: np.asarray(value, np.float64) for name, value in found.items()}

    identity = {
        **inputs.about,
        "target": fingerprint.of(target),
        "dequantizer_crc32": tree_crc32(run.dequantization.params),
        "train": inputs.train.fingerprint,
        "ids": ids.tolist(),
        "images": config.bound.level_images,
        "control": fingerprint.of(control),
    }
    stored = compute_once(inputs.workdir / "eval", "levels", identity, compute)
    return {name: value.tolist() for name, value in stored.items()}
