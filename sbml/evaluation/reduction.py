"""What reduces the noise of a bound's random times: a control variate and a density of times.

Both are made from training images, once, and then read from the work directory.
"""

from typing import Any

import jax
import numpy as np

from sbml import bits, bound, streams
from sbml.bound import GaussianControl
from sbml.data import ImageSet, spread
from sbml.experiment.build import Experiment
from sbml.runtime.checkpoint import Restored
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import Workdir
from sbml.streams import stream


def control_variate(train: ImageSet, workdir: Workdir) -> GaussianControl:
    """The Gaussian of the control variate, fitted to the dequantized images ``train``."""

    def fit() -> dict[str, np.ndarray]:
        # The fit is to the integers k; then k is mapped to the scale of the model, [-1, 1].
        gaussian = GaussianControl.fit(train.images, noise_variance=1 / 12)
        arrays = {
            "mean": bits.to_model(gaussian.mean, 0.5, train.levels),
            "variances": (2 / train.levels) ** 2 * gaussian.variances,
            **({} if gaussian.basis is None else {"basis": gaussian.basis}),
        }
        return {name: np.asarray(value, np.float32) for name, value in arrays.items()}

    arrays: dict[str, Any] = workdir.compute_once("control", train.fingerprint, fit)
    return GaussianControl(**{"basis": None, **arrays})


def time_density(
    experiment: Experiment,
    restored: Restored,
    train: ImageSet,
    control: GaussianControl | None,
    workdir: Workdir,
    eps: float,
) -> np.ndarray:
    """The density of the bound's times from ``eps`` on, ``(bins,)``, from 256 of ``train``."""
    config = experiment.config.eval
    identity = {
        "eps": eps,
        "data": train.fingerprint,
        "parameters_crc32": tree_crc32(restored.state.ema_params),
        "control_crc32": tree_crc32(control),
        "seed": config.seed,
        "streams": streams.VERSION,
        "bins": config.proposal_bins,
        "score": experiment.score_identity,
    }

    def pilot() -> dict[str, np.ndarray]:
        pixels = jax.numpy.asarray(train.images[spread(len(train), 256)])
        x = bits.to_model(pixels, 0.5, train.levels)
        options: dict[str, Any] = {"eps": eps, "control": control, "bins": config.proposal_bins}
        run = jax.jit(lambda score, x, key: bound.pilot(score, experiment.sde, x, key, **options))
        score = experiment.exact_adapter(restored.state.ema_params)
        return {"density": np.asarray(run(score, x, stream(jax.random.key(config.seed), "pilot")))}

    return workdir.compute_once("density", identity, pilot)["density"]
