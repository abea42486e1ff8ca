"""Bits/dim of a config's training for several seeds, beside those of an earlier version.

    python benchmarks/seeds.py --seeds=1,2,3 --before=CHECKOUT

Each version trains every seed in a process of its own. This version evaluates all of them by the
ODE, with the same random draws, so the difference of two trainings is paired over the test images.
Its spread over the seeds is what luck does; the error of the mean comes from this spread. A run
whose numbers are in ``--out`` is not repeated.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import numpy as np

from sbml.statistics import intervals

ROOT = pathlib.Path(__file__).parents[1]


def bits_per_dim(checkout: pathlib.Path, config: str, seed: int, workdir: pathlib.Path) -> str:
    """The file with the bits/dim of every test image, of a training by the version ``checkout``."""

    def run(version: pathlib.Path, *flags: str) -> None:
        command = [sys.executable, "-m", "sbml.main", f"--workdir={workdir}", *flags]
        environment = {**os.environ, "PYTHONPATH": str(version)}
        subprocess.run(command, cwd=version, env=environment, check=True, stdout=sys.stderr)

    if not (workdir / "per_image.npz").exists():
        run(checkout, f"--config={config}", f"--config.seed={seed}", "--mode=train")
        run(ROOT, "--mode=eval", "--config.eval.estimators=ode")
    return str(workdir / "per_image.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py:uniform")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--before", type=pathlib.Path, help="folder of a checkout of that version")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/seeds"))
    args = parser.parse_args()

    versions = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    found: dict[str, list[np.ndarray]] = {name: [] for name in versions}
    for seed in map(int, args.seeds.split(",")):
        for name, checkout in versions.items():
            workdir = (args.out / f"{name}_{seed}").resolve()
            with np.load(bits_per_dim(checkout, args.config, seed, workdir)) as arrays:
                found[name].append(np.asarray(arrays["ode_uniform_bits_per_dim"], float))
        row = "  ".join(f"{name} {found[name][-1].mean():.4f}" for name in versions)
        if args.before:
            gap = intervals.mean_interval(found["now"][-1] - found["before"][-1])
            row += f"  now - before {gap.mean:+.4f} +- {gap.ci95:.4f} over the images"
        print(f"seed {seed}: {row}", flush=True)
    if args.before:
        found["now - before"] = [
            now - before for now, before in zip(found["now"], found["before"], strict=True)
        ]
    for name, each in found.items():
        mean = intervals.mean_interval([float(values.mean()) for values in each])
        print(f"{name}: {mean.mean:.4f} +- {mean.ci95:.4f} over {mean.n} seeds (95%)")


if __name__ == "__main__":
    main()
