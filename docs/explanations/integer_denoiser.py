"""The figure of the page about the integer denoiser.

    python docs/explanations/integer_denoiser.py        writes integer_denoiser.svg beside this file

One pixel of eight levels, at bin centres. The network's outputs are the same for all levels (left),
or prefer the third and the sixth level (right). The curves are E[x | y] for three sizes of the
noise.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from sbml.score import integers

LEVELS = 8
CENTRES = (2 * np.arange(LEVELS) + 1) / LEVELS - 1
PREFERRED = 3.0 * np.isin(np.arange(LEVELS), (2, 5))
INK = "#7d838c"
NOISE = {"#2f8fd8": 0.03, "#3aa876": 0.12, "#e0662b": 0.5}  # colour: rho


def mean(logits: np.ndarray, y: np.ndarray, rho: float) -> np.ndarray:
    """E[x | y] for every y."""
    outputs = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(y), LEVELS))
    y, noise = jnp.asarray(y, jnp.float32), jnp.float32(rho)
    return np.asarray(integers.posterior_mean(outputs, y, noise, LEVELS, "centre"))


def main() -> None:
    """Write the figure."""
    matplotlib.rcParams.update(
        {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
            **dict.fromkeys(("xtick.color", "ytick.color"), INK),
            **{"font.size": 10, "axes.spines.top": False, "axes.spines.right": False},
            **{"svg.hashsalt": "levels", "legend.frameon": False, "lines.linewidth": 1.8},
        }
    )
    figure = matplotlib.figure.Figure(figsize=(7.4, 3.3), layout="constrained")
    y = np.linspace(-1.4, 1.4, 1401)
    titles = ("no level preferred", "third and sixth level preferred")
    logits = (np.zeros(LEVELS), PREFERRED)
    for axes, title, each in zip(figure.subplots(1, 2, sharey=True), titles, logits, strict=True):
        for colour, rho in NOISE.items():
            axes.plot(y, mean(each, y, rho), color=colour, label=rf"$\rho$ = {rho:g}")
        axes.set(title=title, xlabel="y", xticks=(-1, 0, 1), yticks=CENTRES)
        axes.set_yticklabels([f"{k}" for k in range(LEVELS)])
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    figure.axes[0].set(ylabel="E[x | y], in levels")
    figure.axes[0].legend(loc="upper left")
    figure.savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
