"""Recipes of training compared: bits/dim at equal network calls, paired by seed.

    python benchmarks/recipes.py --config=configs/digits_vp.py [--steps=650] [--seeds=3]

Every recipe trains from the same initial parameters for the same number of network calls, and is
evaluated by the ODE on the same images with the same draws. Differences are to the paper's recipe
(independent importance-sampled times), with the 95% interval over seeds (Student's t), and with
that over images of the difference averaged over seeds. Seconds are of training, without
compilation where a recipe was compiled before.
"""

import argparse
import pathlib
import runpy
import tempfile

import numpy as np

from sbml.estimators import Cell
from sbml.evaluation import cells
from sbml.experiment import build
from sbml.intervals import mean_interval
from sbml.modes import eval as evaluate
from sbml.modes import train
from sbml.runtime import cpu, metrics
from sbml.runtime.workdir import Workdir

RECIPES = {
    "paper: iid": {"times": "iid", "noises": "independent", "proposal_bins": 0},
    "lattice": {"noises": "independent", "proposal_bins": 0},
    "lattice, density": {"noises": "independent"},
    "lattice, antithetic": {"proposal_bins": 0},
    "lattice, antithetic, density (default)": {},
}


def run(config, recipe: dict, folder: pathlib.Path, images: int) -> tuple[np.ndarray, float]:
    """bits/dim (n,) of the recipe's model, and its training seconds."""
    config.training.update(recipe)
    config.eval.update(max_images=images, estimators=("ode",))
    train.run(config, folder)
    seconds = metrics.read(folder)[-1]["seconds"]
    experiment = build.Experiment(config)
    restored, test = experiment.restore(folder), experiment.images("test")
    shared = cells.Evaluation(experiment, restored, test, None, lambda eps: None, Workdir(folder))
    dequantization = evaluate.dequantization(experiment, "uniform", folder, test)
    cell_run = cells.CellRun(shared, Cell("ode", "uniform"), dequantization)
    return cell_run.rows(cell_run.ids, 0)["bits_per_dim"], seconds


def main() -> None:
    """Print bits/dim, paired differences and seconds for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py")
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument(
        "--nf", type=int, default=0, help="a net of so many channels, one block a level"
    )
    parser.add_argument("--recipes", default=",".join(str(i) for i in range(len(RECIPES))))
    parser.add_argument("--manual_dir", default="")
    args = parser.parse_args()
    chosen = [list(RECIPES)[int(i)] for i in args.recipes.split(",")]

    values = {name: [] for name in chosen}
    times = {name: [] for name in chosen}
    for seed in range(args.seeds):
        for name in chosen:
            config = runpy.run_path(args.config)["get_config"]()
            config.seed = seed
            config.data.manual_dir = args.manual_dir
            config.training.update(
                num_steps=args.steps, sample_every=0, checkpoint_every=args.steps
            )
            config.optim.warmup = min(config.optim.warmup, args.steps // 10)
            # A long average of a short run would be made of its initial parameters.
            config.optim.ema = min(config.optim.ema, 1 - 6.5 / args.steps)
            if args.nf:
                config.model.update(nf=args.nf, num_res_blocks=1)
            with tempfile.TemporaryDirectory() as folder:
                found = run(config, RECIPES[name], pathlib.Path(folder), args.images)
            values[name].append(found[0])
            times[name].append(found[1])
            print(f"seed {seed}, {name}: {found[0].mean():.4f}, {found[1]:.0f} s", flush=True)
    base = np.array(values[chosen[0]])
    print(f"{args.config}, {args.steps} steps, {args.seeds} seeds, {args.images} images")
    print(
        f"{'recipe':34s} {'bits/dim':>9s} {'difference, over seeds':>26s} {'over images':>22s}  s"
    )
    for name in chosen:
        gap = np.array(values[name]) - base
        seeds, over = mean_interval(gap.mean(1)), mean_interval(gap.mean(0))
        print(
            f"{name:34s} {np.mean(values[name]):9.4f} {seeds.mean:12.4f} +- {seeds.ci95:10.4f} "
            f"{over.mean:10.4f} +- {over.ci95:8.4f}  {np.mean(times[name]):.0f}"
        )


if __name__ == "__main__":
    cpu.settle()
    main()
