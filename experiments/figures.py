"""The common style of the experiments' figures, and the function that saves them."""

import pathlib
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

# All colours are readable on white and on black, so the background is transparent.
COLOURS = ("#2f8fd8", "#e0662b", "#3aa876", "#a06fc9")
MUTED = "#7d838c"
STYLE: Any = {
    "font.size": 9,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": MUTED,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.transparent": True,
}


def axes(columns: int, width: float = 3.4, height: float = 2.8) -> tuple[Figure, Any]:
    """A row of ``columns`` axes in the common style, each about width x height inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, height), layout="constrained")
        return figure, figure.subplots(1, columns)


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Write the figure to ``path``, a PNG, and print the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
    print(f"figure: {path}")
