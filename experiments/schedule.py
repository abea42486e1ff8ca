"""Weighting functions and importance densities of times for all SDEs, as in the paper's figure 1.

    python -m experiments.schedule [--out=runs/schedule.png]

Left: the weight of the noise-prediction error at time t, g^2 / sigma^2 for likelihood weighting and
1 for the original weighting. Middle: the importance density of times, which is proportional to
g^2 / sigma^2. Right: the same density as a function of log-SNR, in which it is uniform.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from sbml import losses, sdes
from sbml.sdes import times

NAMES = {"vp": "VP", "subvp": "sub-VP", "ve": "VE", "linear_ve": "linear VE"}


def curves(name: str, points: int = 400) -> dict[str, np.ndarray]:
    """t, both weights, the importance density and log-SNR of the SDE called ``name``."""
    with jax.enable_x64(True):
        sde = sdes.SDES[name]()
        eps = sde.smallest_time
        t = jnp.geomspace(eps, sde.T, points)
        weight = jax.vmap(lambda t: losses.weight(sde, t, "likelihood"))(t)
        density = weight / times.Importance(sde, eps).normaliser
        return {
            "t": np.asarray(t),
            "likelihood": np.asarray(weight),
            "density": np.asarray(density),
            "log_snr": np.asarray(jax.vmap(sde.log_snr)(t)),
        }


def main(out: str) -> None:
    """Draw the figure."""
    figure, (left, middle, right) = figures.axes(3)
    for name, label in NAMES.items():
        c = curves(name)
        mass = np.trapezoid(c["density"], c["t"])
        print(f"{label:10s} t >= {c['t'][0]:.0e}: density integrates to {mass:.4f}")
        left.loglog(c["t"], c["likelihood"], label=label)
        middle.loglog(c["t"], c["density"])
        right.plot(c["log_snr"], c["density"] / c["likelihood"])  # dt = dlambda / rate
    left.axhline(1, color=figures.MUTED, linestyle=":", label="original weighting")
    left.set(xlabel="time t", ylabel="weight of the noise-prediction error")
    left.legend(fontsize=8)
    middle.set(xlabel="time t", ylabel="importance density p(t)")
    right.set(xlabel="log-SNR", ylabel="the density in log-SNR", ylim=(0, 0.065))
    figures.save(figure, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/schedule.png")
    main(parser.parse_args().out)
