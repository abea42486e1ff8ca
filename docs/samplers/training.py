"""The training curve of a run.

python docs/samplers/training.py runs/fashion_mnist_vp docs/samplers/fashion_training.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from sbml.report.plots import training
from sbml.runtime.metrics import read


def main(source: str, target: str) -> None:
    """Draw the loss of the run ``source`` against the step into the file ``target``."""
    rows = [row for row in read(epath.Path(source)) if "loss" in row]
    step, loss = (np.array([row[name] for row in rows]) for name in ("step", "loss"))
    figure, axes = plt.subplots(figsize=(9, 2.6), dpi=120)
    training(axes, step, loss, window=9)
    axes.set_ylim(top=np.quantile(loss, 0.98))
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
