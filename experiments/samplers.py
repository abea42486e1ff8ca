"""Every sampler at 10, 20 and 50 network evaluations: pictures, and distance against cost.

    python -m experiments.samplers --config=configs/digits_vp.py --workdir=runs/digits_vp

In ``--out`` this writes one picture for each sampler, with a row of samples for each number of
evaluations and the same latents in every row, and the plot ``distance.png``. It shows the Frechet
distance of ``--images`` samples to the training images against the number of network evaluations,
in the config's ``eval.quality.features`` and in pixels. The features of a classifier depend on the
content of an image, and hardly on the noise that remains after few steps.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from experiments import figures
from sbml.data import spread
from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config, load
from sbml.program.config.sampling import Solving
from sbml.program.evaluation import samples
from sbml.program.modes import quality
from sbml.program.report.pictures import png
from sbml.program.runtime.checkpoint import Restored
from sbml.program.runtime.workdir import Workdir
from sbml.statistics import distances

SAMPLERS = {
    "euler_maruyama": {},
    "reverse_diffusion": {},
    "ancestral": {},
    "reverse_diffusion_corrected": {
        "sampler": {"name": "reverse_diffusion"},
        "corrector": {"name": "langevin"},
    },
    "ddim": {},
    "dpm_solver": {},
    "ode_heun": {"sampler": {"name": "ode"}, "solver": {"method": "heun"}},
}
TOLERANCES = (1e-1, 1e-2, 1e-3)
SHOWN, TEST = 12, "test images"
MARKS = "osD^vP*X"
TICKS = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 50, 100, 200)


@dataclasses.dataclass(frozen=True)
class Point:
    """One sampler at one setting."""

    name: str
    setting: str
    nfe: float
    feature: float
    pixel: float


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """``config`` with the sampler of ``changes``, and defaults where they set nothing."""
    own = {"method": Solving().method, "fixed_steps": 0}
    solver = config.sampling.solver.replace(**{**own, **changes.get("solver", {})})
    sections = {"sampler": {}, "corrector": {}, **changes, "solver": solver}
    return config.replace(sampling=config.sampling.replace(**sections))


def draw_samples(config: Config, restored: Restored, changes: dict[str, Any]) -> samples.Samples:
    """Samples with ``config.sampling`` changed."""
    config = with_changes(config, changes)
    params = restored.state.ema_params
    experiment = Experiment(config).with_learned_schedule(params)
    experiment = experiment.with_dequantization_of(restored)
    return samples.preview(experiment, params, config.sampling.num_images)


def changes(name: str, steps: int) -> dict[str, Any]:
    """The sections of ``config.sampling`` for ``name`` with about ``steps`` evaluations."""
    options: dict[str, Any] = {"sampler": {"name": name}, **SAMPLERS[name]}
    solver = options.get("solver")
    count = steps // 2 if solver or "corrector" in options else steps
    if solver:
        return {**options, "solver": {**solver, "fixed_steps": count}}
    return {**options, "sampler": {**options["sampler"], "steps": count}}


def main(path: str, workdir: str, out: str, images: int, steps: Sequence[int]) -> list[Point]:
    """Draw, measure, and write the pictures."""
    config = compatibility.of_workdir(Config(**load(path).to_dict()), Workdir(workdir))
    sampling = config.sampling.replace(num_images=images, batch_size=min(images, 100))
    config = config.replace(sampling=sampling)
    experiment, extract = Experiment(config), quality.extractor(config)
    restored = experiment.restore(workdir)
    train = experiment.images("train")
    training = quality.reference(experiment, extract, train)[0]
    training_pixels = pixel_moments(train.images, train.levels)
    folder, points = pathlib.Path(out), []

    def measure(name: str, setting: str, pictures: np.ndarray, nfe: float) -> None:
        feature = distances.frechet(distances.Moments.of(extract(pictures)[0]), training)
        pixel = distances.frechet(pixel_moments(pictures, train.levels), training_pixels)
        points.append(Point(name, setting, nfe, feature, pixel))
        print(f"{name:28s} {setting:10s} {nfe:6.1f} {feature:9.3f} {pixel:9.3f}", flush=True)

    def run(name: str, setting: str, options: dict[str, Any]) -> np.ndarray:
        result = draw_samples(config, restored, options)
        if failed := int(result.failed.sum()):
            print(f"{name:28s} {setting:10s} no distance: {failed} of {images} samples failed")
        else:
            measure(name, setting, result.images, result.nfe.mean())
        return result.images[:SHOWN]

    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'sampler':28s} {'setting':10s} {'NFE':>6s} {'feature':>9s} {'pixel':>9s}   n={images}")
    for name in SAMPLERS:
        rows = [run(name, f"NFE {count}", changes(name, count)) for count in steps]
        grid = samples.grid(experiment, np.concatenate(rows), columns=len(rows[0]))
        (folder / f"{name}.png").write_bytes(png(grid))
    for tolerance in TOLERANCES:
        solver = {"rtol": tolerance, "atol": tolerance}
        run("ode", f"{tolerance:.0e}", {"sampler": {"name": "ode"}, "solver": solver})
    test = experiment.images("test").images
    # A Frechet distance depends on n, so as many test images as samples are used, if possible.
    chosen = test[spread(len(test), images)]
    measure(TEST, f"n={len(chosen)}", chosen, 0)
    draw(points, f"{extract.names[0]}, n={images}", f"pixels, n={images}", folder / "distance.png")
    return points


def pixel_moments(images: np.ndarray, levels: int) -> distances.Moments:
    """Moments of the images' pixels in [0, 1]."""
    return distances.Moments.of(images.reshape(len(images), -1) / (levels - 1))


def draw(points: Sequence[Point], feature: str, pixel: str, path: pathlib.Path) -> None:
    """Plot both distances against the number of evaluations, with one line for each sampler."""
    figure, (left, right) = figures.axes(2, width=4.2, height=3.4)
    names = list(dict.fromkeys(point.name for point in points if point.name != TEST))
    floor = points[-1]
    for axis, kind, label in ((left, "feature", feature), (right, "pixel", pixel)):
        for i, name in enumerate(names):
            line = [(p.nfe, getattr(p, kind)) for p in points if p.name == name]
            colour = figures.COLOURS[i % len(figures.COLOURS)]
            dash = "-" if i < len(figures.COLOURS) else "--"
            axis.plot(
                *zip(*line, strict=True), dash, color=colour, marker=MARKS[i], ms=4, label=name
            )
        axis.axhline(
            getattr(floor, kind),
            color=figures.MUTED,
            linestyle=":",
            label=f"{TEST}, {floor.setting}",
        )
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", title=label)
        axis.title.set_fontsize(8)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(FixedLocator(TICKS))
            side.set_major_formatter(ScalarFormatter())
            side.set_minor_locator(NullLocator())
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figures.save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py")
    parser.add_argument("--workdir", default="runs/digits_vp")
    parser.add_argument("--out", default="runs/samplers")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    a = parser.parse_args()
    main(a.config, a.workdir, a.out, a.images, a.steps)
