"""Every sampler at 10, 20 and 50 steps on a trained model: pictures, and distance against cost.

    python -m experiments.samplers --config=configs/digits_vp.py --workdir=runs/digits_vp

writes, into ``--out``, one picture a sampler (a row of samples for each number of steps, the same
latents in every row) and ``distance.png``: the feature distance of ``--images`` samples to the
training images against network evaluations. The extractor is the config's ``eval.features``.
"""

import argparse
import dataclasses
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import figures
from sbml import architecture, distances, quality, sample
from sbml.build import Experiment
from sbml.runtime import report

SAMPLERS = {
    "euler_maruyama": {},
    "reverse_diffusion": {},
    "ancestral": {},
    "reverse_diffusion_corrected": {"sampler": "reverse_diffusion", "corrector": "langevin"},
    "ddim": {},
    "dpm_solver": {},
    "ode_heun": {"sampler": "ode", "method": "heun"},
}
TOLERANCES = (1e-1, 1e-2, 1e-3)
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Point:
    """One sampler at one setting."""

    name: str
    setting: str
    nfe: float
    distance: float


def drawn(config: Any, params: Any, changes: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images and evaluations with ``config.sampling`` changed."""
    config = config.copy_and_resolve_references()
    config.sampling.update(changes)
    experiment = Experiment(config)
    size = config.sampling.batch_size
    parts = [
        sample.draw(experiment, params, np.arange(start, start + size))
        for start in range(0, config.sampling.num_images, size)
    ]
    images, nfe = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images, nfe


def changes(name: str, steps: int) -> dict[str, Any]:
    """The fields of ``config.sampling`` for sampler ``name`` with about ``steps`` evaluations."""
    options: dict[str, Any] = {"sampler": name, **SAMPLERS[name]}
    each = 2 if "corrector" in options or options.get("method") == "heun" else 1
    return {**options, "steps": steps // each, "fixed_steps": steps // each}


def main(path: str, workdir: str, out: str, images: int, steps: Sequence[int]) -> list[Point]:
    """Draw, measure, and write the pictures."""
    config = architecture.of_workdir(runpy.run_path(path)["get_config"](), workdir)
    config.sampling.update(num_images=images, batch_size=min(images, 100))
    experiment, extract = Experiment(config), quality.extractor(config)
    params = experiment.restore(workdir).state.ema_params
    known = quality.reference(experiment, extract, experiment.images("train"))
    folder, points = pathlib.Path(out), []

    def measure(name: str, setting: str, options: dict[str, Any]) -> np.ndarray:
        pictures, nfe = drawn(config, params, options)
        found = distances.Moments.of(extract(pictures)[0])
        points.append(Point(name, setting, nfe.mean(), distances.frechet(found, known.moments)))
        print(f"{name:28s} {setting:10s} {points[-1].nfe:6.1f} {points[-1].distance:10.3f}")
        return pictures[:SHOWN]

    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'sampler':28s} {'setting':10s} {'NFE':>6s} {'distance':>10s}   n={images}")
    for name in SAMPLERS:
        rows = [measure(name, f"{count} steps", changes(name, count)) for count in steps]
        grid = sample.grid(experiment, np.concatenate(rows), columns=len(rows[0]))
        report.write_png(folder / f"{name}.png", grid)
    for tolerance in TOLERANCES:
        options = {"sampler": "ode", "rtol": tolerance, "atol": tolerance}
        measure("ode", f"{tolerance:.0e}", options)
    real = experiment.images("test").images[:images]
    floor = distances.frechet(distances.Moments.of(extract(real)[0]), known.moments)
    print(f"{'test images':28s} {'':10s} {'':6s} {floor:10.3f}   n={len(real)}")
    draw(points, floor, f"{extract.names[0]}, n={images}", folder / "distance.png")
    return points


def draw(points: Sequence[Point], floor: float, label: str, path: pathlib.Path) -> None:
    """Distance against evaluations, a line a sampler."""
    figure, axis = figures.axes(1, width=6.4, height=3.6)
    marks = "osD^vP*X"
    for mark, name in zip(marks, dict.fromkeys(point.name for point in points), strict=True):
        line = [(p.nfe, p.distance) for p in points if p.name == name]
        axis.plot(*zip(*line, strict=True), marker=mark, markersize=4, label=name)
    axis.axhline(floor, color=figures.MUTED, linestyle=":", label="test images")
    axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=label)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
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
