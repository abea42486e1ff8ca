"""The picture of the README: samples of a run beside the headline of its report.

python docs/samplers/readme.py runs/digits_vp docs/samplers/readme.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from sbml.report.plots import ACCENT, INK, MUTED, image_grid
from sbml.runtime.workdir import EVALUATION, SAMPLES, Workdir


def main(source: str, target: str) -> None:
    """Draw the picture of the run ``source`` into the file ``target``."""
    workdir = Workdir(source)
    evaluation, samples = workdir.read(EVALUATION), workdir.read(SAMPLES)["images"]
    result = evaluation["results"][0]
    levels = evaluation["data"][result["split"]]["levels"]
    grid = image_grid(samples[:48], levels, columns=12, scale=4)
    figure, (text, picture) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[4, 5], dpi=150)
    low, high = result["interval"]
    lines = [
        (0.80, f"{result['bits_per_dim']:.3f}", 40, ACCENT, "bold"),
        (0.52, "bits/dim", 15, ACCENT, "normal"),
        (0.36, f"95% interval {low:.3f} to {high:.3f}", 12, INK, "normal"),
        (0.22, f"{result['n']} test images, probability-flow ODE", 10, MUTED, "normal"),
        (0.10, f"error of the solver {abs(result['solver_error']):.0e}", 10, MUTED, "normal"),
    ]
    for height, words, size, colour, weight in lines:
        text.text(0.02, height, words, size=size, color=colour, weight=weight, va="center")
    picture.imshow(np.squeeze(grid), cmap="gray", interpolation="nearest")
    picture.set_title("samples, not selected", size=10, color=MUTED)
    for axes in (text, picture):
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
