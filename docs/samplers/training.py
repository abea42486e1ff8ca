"""The training curve of a run.

python docs/samplers/training.py runs/fashion_mnist_vp docs/samplers/fashion_training.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from sbml.program.report.plots import training
from sbml.program.runtime.metrics import read

INK, LINE = "#7d838c", "#2f8fd8"  # readable on white and on black


def main(source: str, target: str) -> None:
    """Draw the loss of the run ``source`` against the step into the file ``target``."""
    rows = [row for row in read(epath.Path(source)) if "loss" in row]
    step, loss = (np.array([row[name] for row in rows]) for name in ("step", "loss"))
    plt.rc("axes", edgecolor=INK, labelcolor=INK)
    plt.rc("text", color=INK)
    plt.rc("xtick", color=INK)
    plt.rc("ytick", color=INK)
    figure, axes = plt.subplots(figsize=(9, 2.6), dpi=120)
    training(axes, step, loss, window=9)
    for line in axes.lines:
        line.set_color(LINE)
    axes.set_ylim(top=np.quantile(loss, 0.98))
    figure.tight_layout()
    figure.savefig(target, transparent=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
