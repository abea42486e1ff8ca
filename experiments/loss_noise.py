"""How the noise of a training loss depends on the time, under each weighting.

    python -m experiments.loss_noise [--out=runs/loss_noise.png]

For Gaussian data with the variances lambda_i along their principal axes, the best noise prediction
has an error e that is Gaussian too, with the variances

    v_i(t) = alpha^2 lambda_i / (alpha^2 lambda_i + sigma^2),

so the moments of the loss L = 1/2 w(t) / p(t) |e|^2 of one draw of the time, with density p, and
the noise are known without any training:

    E[L | t] = 1/2 w/p sum v_i          E[L^2 | t] = (1/2 w/p)^2 ((sum v_i)^2 + 2 sum v_i^2).

The figure has the root of E[L^2 | t] divided by the mean of L over all times, for the variances of
the digits: a draw where it is 30 counts as much as 30 usual draws. The number in the legend is the
standard deviation of L over its mean. For VE, g^2 / sigma^2 does not depend on t, so that the three
trainings are one.
"""

import argparse
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from sbml import losses
from sbml.program.config.build import Experiment
from sbml.program.config.config import load
from sbml.sdes import SDE, times

NAMES = {"vp": "VP", "subvp": "sub-VP", "ve": "VE"}
# A training: its weighting, and how it draws the times.
TRAININGS = {
    "original": ("original", times.Uniform),
    "weighted": ("likelihood", times.Uniform),
    "importance": ("likelihood", times.Importance),
}


class Noise(NamedTuple):
    """The loss of one draw, in units of its mean.

    Attributes:
      log_snr: the log-SNR of the times, ``(n,)``.
      rms: the root mean square of the loss at these times, ``(n,)``.
      mean: the mean of the loss, in nats.
      relative: its standard deviation over its mean.
    """

    log_snr: np.ndarray
    rms: np.ndarray
    mean: float
    relative: float


def noise(sde: SDE, eps: float, variances: np.ndarray, training: str, points: int = 4_000) -> Noise:
    """The noise of ``training`` from the time ``eps`` on, for Gaussian data with ``variances``."""
    weighting, proposal = TRAININGS[training]
    with jax.enable_x64(True):
        # Points of equal distance in log-SNR, and their quadrature weights dt.
        t, dt = times.Importance(sde, eps).at((jnp.arange(points) + 0.5) / points)
        w = jax.vmap(lambda t: losses.weight(sde, t, weighting))(t)
        if proposal is times.Uniform:
            w_over_p = w * (sde.largest_time - eps)
            p_dt = dt / points / (sde.largest_time - eps)
        else:
            w_over_p = w * dt  # p dt is 1 for the points that the proposal draws.
            p_dt = jnp.full(points, 1 / points)
        signal = sde.mean_coef(t)[:, None] ** 2 * variances
        v = signal / (signal + sde.std(t)[:, None] ** 2)
        first = w_over_p * v.sum(1) / 2
        second = w_over_p**2 * (v.sum(1) ** 2 + 2 * (v**2).sum(1)) / 4
        mean = float(jnp.sum(p_dt * first))
        variance = float(jnp.sum(p_dt * second)) - mean**2
        log_snr, rms = np.asarray(sde.log_snr(t)), np.asarray(jnp.sqrt(second)) / mean
    return Noise(log_snr, rms, mean, variance**0.5 / mean)


def draw(path: str | pathlib.Path) -> None:
    """Draw the figure for the digits and each SDE of NAMES."""
    figure, axes = figures.axes(len(NAMES))
    for axis, (name, label) in zip(axes, NAMES.items(), strict=True):
        config = load("digits_vp:uniform")
        config.sde.name = name
        experiment = Experiment(config)
        train = experiment.images("train")
        pixels = (2 * train.images.reshape(len(train.images), -1) + 1.0) / train.levels - 1
        within = (2 / train.levels) ** 2 / 12  # Uniform dequantization adds this variance.
        variances = np.linalg.eigvalsh(np.cov(pixels.T)).clip(0) + within
        for i, training in enumerate(TRAININGS):
            found = noise(experiment.sde, float(experiment.eval_eps), variances, training)
            text = f"{training}: {found.relative:.2f}"
            style = {"ls": ("-", "--", ":")[i], "color": (figures.MUTED, *figures.COLOURS)[i]}
            axis.semilogy(found.log_snr, found.rms, label=text, **style)
            print(
                f"{label:7s} {training:10s} mean {found.mean:.4g}, sd / mean {found.relative:.3g}"
            )
        axis.set(xlabel="log-SNR (small times: right)", title=label)
        axis.legend(fontsize=7)
    axes[0].set(ylabel="loss of a draw / mean loss")
    figures.save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/loss_noise.png")
    draw(parser.parse_args().out)
