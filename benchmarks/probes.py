"""Noise of ODE likelihoods with k probes of the divergence, and the time that they take.

    python benchmarks/probes.py --config=configs/digits_vp.py --workdir=runs/digits_vp
    python benchmarks/probes.py --config=configs/photos_vp.py --workdir=runs/photos_vp --images=4

The probes are drawn several times for the same images. For each k are printed: the standard
deviation of one image's bits/dim (for 256 levels; 17 for digits), its variance relative to one
probe's, the value 1 / k which independent probes would give, and the time of the solves relative to
one probe's. For comparison, scipy's RK45 at 1e-5 solves the whole batch, with k independent probes
and the divergence by forward mode.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ode_settings import network, ours, rk45

from sbml.likelihood import Trace
from sbml.ode import Solver
from sbml.runtime import cpu


def main() -> None:
    """Print a row for each number of probes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits_vp.py")
    parser.add_argument("--workdir", default="runs/digits_vp")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--probes", type=int, nargs="+", default=(1, 2, 4, 8))
    parser.add_argument("--tolerance", type=float, default=2e-4)
    parser.add_argument("--rk45", type=int, nargs="*", default=(1, 4), help="numbers of its probes")
    args = parser.parse_args()
    one = network(args.config, args.workdir, args.images)
    # Each draw is a copy of the images with its own keys. The noise is far above the solver error.
    n = args.images * args.draws
    repeated = dataclasses.replace(
        one,
        x=jnp.tile(one.x, (args.draws, *(1,) * (one.x.ndim - 1))),
        keys=jax.random.split(jax.random.key(2), n),
    )
    solver = Solver(rtol=args.tolerance, atol=args.tolerance)
    print(f"{one.name}, {args.images} images, {args.draws} draws")
    print(
        "{:>6s} {:>10s} {:>9s} {:>6s} {:>12s}".format("probes", "sd", "variance", "1/k", "seconds")
    )
    base = None
    for k in args.probes:
        nll, cost = ours(repeated, solver, Trace("rademacher", k))
        draws = one.nats_to_bits(nll).reshape(args.draws, args.images)
        variance = np.mean(np.var(draws, axis=0, ddof=1))
        base = base or (variance, cost.seconds)
        print(
            f"{k:6d} {np.sqrt(variance):10.4f} {variance / base[0]:9.3f} {1 / k:6.3f} "
            f"{cost.seconds:6.1f} {cost.seconds / base[1]:5.2f}",
            flush=True,
        )
    print("scipy RK45 t, batch, 1e-5")
    for k in args.rk45:  # Only the time is measured, which is the same for independent probes.
        _, cost = rk45(repeated, 1e-5, False, Trace("rademacher", k))
        seconds = f"{cost.seconds:6.1f} {cost.seconds / base[1]:5.2f}"
        print(f"{k:6d} {'':10s} {1 / k:9.3f} {1 / k:6.3f} {seconds}", flush=True)


if __name__ == "__main__":
    cpu.settle()
    main()
