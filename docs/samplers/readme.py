"""The picture of the README: the numbers of a run beside its baselines, and samples of another run.

cd docs/samplers && python readme.py ../../runs/digits_vp fashion_samples.png readme.png
"""

import sys

import matplotlib.pyplot as plt

from sbml.report.plots import ACCENT, INK, MUTED
from sbml.runtime.workdir import EVALUATION, Workdir

NAMES = {"ode": "sbml, probability-flow ODE", "bound": "sbml, evidence bound"}


def main(source: str, samples: str, target: str) -> None:
    """Draw the results of the run ``source`` and the picture ``samples`` into ``target``."""
    evaluation = Workdir(source).read(EVALUATION)
    results = evaluation["results"]
    rows = [(NAMES[r["estimator"]], r["bits_per_dim"], r["interval"], ACCENT) for r in results]
    for each in evaluation["baselines"]:
        rows.append((each["name"], each["bits_per_dim"], each["interval"], MUTED))
    figure, (chart, picture) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[5, 4], dpi=150)
    for height, (name, mean, (low, high), colour) in enumerate(reversed(rows)):
        chart.plot([low, high], [height, height], color=colour, linewidth=2)
        chart.plot(mean, height, "o", color=colour)
        words = f"{name}   {mean:.3f} [{low:.3f}, {high:.3f}]"
        chart.text(1.6, height + 0.22, words, color=INK, size=9.5)
    chart.set(xlim=(1.6, 3.1), ylim=(-0.5, len(rows) - 0.3), yticks=[])
    chart.set_xlabel("bits/dim, lower is better", color=MUTED)
    title = f"{results[0]['n']} held-out digits, with 95% intervals"
    chart.set_title(title, size=10, color=MUTED, loc="left")
    chart.tick_params(colors=MUTED)
    for side in ("top", "left", "right"):
        chart.spines[side].set_visible(False)
    image = plt.imread(samples)
    picture.imshow(image[: image.shape[0] * 6 // 8], cmap="gray", interpolation="nearest")
    picture.set_title("samples of the Fashion-MNIST model, not selected", size=10, color=MUTED)
    picture.axis("off")
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
