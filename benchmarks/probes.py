"""Noise of ODE likelihoods with k probes of the divergence, and the time that they take.

    python benchmarks/probes.py --config=digits_vp:uniform --workdir=runs/digits_vp_uniform
    python benchmarks/probes.py --config=configs/photos_vp.py --workdir=runs/photos_vp --images=4

The probes are drawn several times for the same images. Each row shows, for one k,

    sd         the standard deviation of one image's bits/dim over the draws (root mean square)
    variance   its square, divided by that of one probe
    1/k        the same ratio for k independent probes
    seconds    the time of the solves, and this time divided by that with one probe

For comparison, scipy's RK45 at 1e-5 solves the whole batch, with the divergence by forward mode.
Only its time is measured; the column of its variance shows 1 / k.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ode_settings import network, ours, rk45

from sbml.likelihood.ode import Solver
from sbml.program.runtime import cpu
from sbml.score.divergence import Trace


def main() -> None:
    """Print a row for each number of probes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py:uniform")
    parser.add_argument(
        "--workdir", default="runs/digits_vp_uniform", help="work directory of the trained model"
    )
    parser.add_argument("--images", type=int, default=32, help="number of test images")
    parser.add_argument("--draws", type=int, default=8, help="draws of the probes for each image")
    parser.add_argument(
        "--probes", type=int, nargs="+", default=(1, 2, 4, 8), help="values of k, 1 first"
    )
    parser.add_argument("--tolerance", type=float, default=2e-4, help="rtol and atol")
    parser.add_argument("--rk45", type=int, nargs="*", default=(1, 4), help="values of k for RK45")
    args = parser.parse_args()
    if args.probes[0] != 1:
        parser.error(
            f"--probes begins with {args.probes[0]}: ratios are to one probe, so put 1 first"
        )
    problem = network(args.config, args.workdir, args.images)
    # Each draw is a copy of the images with its own keys. The noise is far above the solver error.
    n = args.images * args.draws
    repeated = dataclasses.replace(
        problem,
        x=jnp.tile(problem.x, (args.draws, *(1,) * (problem.x.ndim - 1))),
        keys=jax.random.split(jax.random.key(2), n),
    )
    solver = Solver(rtol=args.tolerance, atol=args.tolerance)
    print(f"{problem.name}, {args.images} images, {args.draws} draws")
    print(
        "{:>6s} {:>10s} {:>9s} {:>6s} {:>12s}".format("probes", "sd", "variance", "1/k", "seconds")
    )
    measured: list[tuple[float, float]] = []  # variance and seconds of each number of probes
    for k in args.probes:
        nll, cost = ours(repeated, solver, Trace("rademacher", k))
        draws = problem.nats_to_bits(nll).reshape(args.draws, args.images)
        variance = float(np.mean(np.var(draws, axis=0, ddof=1)))
        measured.append((variance, cost.seconds))
        print(
            f"{k:6d} {np.sqrt(variance):10.4f} {variance / measured[0][0]:9.3f} {1 / k:6.3f} "
            f"{cost.seconds:6.1f} {cost.seconds / measured[0][1]:5.2f}",
            flush=True,
        )
    print("scipy RK45 t, batch, 1e-5")
    for k in args.rk45:  # Independent probes would take the same time as these.
        _, cost = rk45(repeated, 1e-5, False, Trace("rademacher", k))
        seconds = f"{cost.seconds:6.1f} {cost.seconds / measured[0][1]:5.2f}"
        print(f"{k:6d} {'':10s} {1 / k:9.3f} {1 / k:6.3f} {seconds}", flush=True)


if __name__ == "__main__":
    cpu.settle()
    main()
