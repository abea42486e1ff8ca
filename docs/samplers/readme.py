"""The picture of the README: the numbers of a run beside its baselines, and samples of another run.

    cd docs/samplers && python readme.py ../../runs/digits_vp fashion_samples.png

writes readme_light.svg and readme_dark.svg, for pages with a light and with a dark background.
"""

import re
import sys
from importlib import resources
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt

from sbml.program.report import plots
from sbml.program.runtime.workdir import EVALUATION, Workdir

NAMES = {"ode": "sbml, probability-flow ODE", "bound": "sbml, evidence bound"}
# A phone shows the five inches, 360 points, at 358 pixels, so a point of the text is a pixel there.
# Letters are drawn as paths, because the reader's fonts have other widths.
STYLE = {**plots.STYLE, "svg.fonttype": "path", "font.size": 11.5, "svg.hashsalt": "readme"}
SIZE = (5, 6.1)  # inches
SHOWN = 4 / 8  # of the rows of samples


def drawn(source: str, samples: str) -> str:
    """SVG text of the results of the run ``source`` above the picture ``samples``."""
    evaluation = Workdir(source).read(EVALUATION)
    results = [(r, NAMES[r["estimator"]], plots.ACCENT) for r in evaluation["results"]]
    baselines = [(r, r["name"], plots.MUTED) for r in evaluation["baselines"]]
    rows = []
    for result, name, colour in results + baselines:
        mean, (low, high) = result["bits_per_dim"], result["interval"]
        words = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(plots.Row(name, mean, low, high, words, colour))
    with plt.rc_context(STYLE):
        figure, (chart, picture) = plt.subplots(
            2, 1, figsize=SIZE, height_ratios=[19, 18], layout="constrained"
        )
        plots.rows(chart, rows, "bits/dim, lower is better")
        title = {"loc": "left", "color": plots.MUTED, "size": STYLE["font.size"]}
        chart.set_title(f"{results[0][0]['n']} held-out digits, with 95% intervals", **title)
        image = plt.imread(samples)
        shown = image[: round(len(image) * SHOWN)]
        picture.imshow(shown, cmap="gray", interpolation="none")
        picture.set_title("Samples of the Fashion-MNIST model, not selected", **title)
        picture.axis("off")
        figure.get_layout_engine().set(h_pad=0.1)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def main(source: str, samples: str) -> None:
    """Write the picture in the report's colours for light and for dark pages."""
    light = drawn(source, samples)
    Path("readme_light.svg").write_text(light)
    styles = resources.files("sbml.program.report").joinpath("report.css").read_text()
    styles = styles[styles.index("prefers-color-scheme: dark") :]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", styles))
    dark = re.sub(
        "|".join(plots.PALETTE.values()),
        lambda found: colours[{c: name for name, c in plots.PALETTE.items()}[found[0]]],
        light,
    )
    Path("readme_dark.svg").write_text(dark)


if __name__ == "__main__":
    main(*sys.argv[1:])
