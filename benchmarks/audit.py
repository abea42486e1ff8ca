"""Audits log p of three other libraries, with uniform dequantization (``sbml.audit``).

    python benchmarks/audit.py table gensbi=PYTHON flow_matching=PYTHON sbgm=PYTHON

The libraries compute log p of real numbers. The estimate of -log P(k) from it is
-log p(x) + d log(L / 2) nats, where x = 2 (k + u) / L - 1 and u is uniform in [0, 1). The library
gets the exact velocity or score of x, as a function in its own framework (``peers.Problem``). Each
library runs in a process of its own environment, which gets examples and returns log p, as lines of
JSON.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import peers

REPETITIONS = 200
# Taylor's series is used for bins narrower than this many standard deviations of the noise.
NARROW = 0.05
LEAST = 1e-3  # Smaller standard deviations of the noise are replaced by this one.


class Row(NamedTuple):
    """A library, the options of its likelihood, and the number of calls for each mean."""

    library: str
    name: str
    options: dict[str, Any]
    calls: int = 16


ROWS = (
    Row("gensbi", "defaults: dopri5 at 1e-5, exact", {"tolerance": 1e-5}),
    Row("gensbi", "one probe", {"tolerance": 1e-5, "exact": False}),
    Row("gensbi", "dopri5 at 1e-2", {"tolerance": 1e-2}, 256),
    Row("flow_matching", "dopri5 at 1e-5, exact", {"method": "dopri5", "exact": True}),
    Row("flow_matching", "dopri5 at 1e-5, one probe", {"method": "dopri5", "exact": False}),
    Row("flow_matching", "euler with 20 steps, exact", {"step_size": 0.05, "exact": True}, 256),
    Row("sbgm", "1000 steps, exact", {"step": 0.001, "exact": True}),
    Row("sbgm", "100 steps, exact", {"step": 0.01, "exact": True}, 64),
    Row("sbgm", "100 steps, one probe", {"step": 0.01, "exact": False}, 64),
)


class Listed(peers.Problem):
    """A list of m images with their probabilities, where each image is spread evenly over its bins.

    The arrays are ``hot (m, d, L)``, which is 1 at the level of each entry of each image, and
    ``log_p (m,)`` of the images. ``log_ndtr`` is a function of the framework ``xp``.
    """

    log_ndtr: Callable[[Any], Any]

    def moments(self, x: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """E[x_0 | x] and E[e | x]."""
        xp, hot = self.xp, self.arrays["hot"]
        levels = hot.shape[-1]
        centre = (2 * xp.arange(levels) + 1) / levels - 1
        sigma = xp.where(sigma < LEAST, LEAST, sigma)
        width = 2 * alpha / (levels * sigma)
        narrow = width < NARROW
        m = (alpha * centre - x[..., None]) / sigma
        # Both ways are computed, so the numbers of the one that is not used must be finite too.
        half = xp.where(narrow, NARROW, width) / 2
        near, far = self.log_ndtr(half - abs(m)), self.log_ndtr(-half - abs(m))
        wide_mass = near + xp.log1p(-xp.exp(far - near))
        low, high = (-0.5 * ((m + s * half) ** 2 + math.log(2 * math.pi)) for s in (-1, 1))
        step = xp.exp(low - wide_mass) - xp.exp(high - wide_mass)
        wide_mean = (x[..., None] + sigma * step) / xp.where(narrow, 1.0, alpha)
        thin = xp.where(narrow, width, NARROW)
        thin_mass = -0.5 * m**2 + xp.log1p(thin**2 / 24 * (m**2 - 1))
        log_mass = xp.where(narrow, thin_mass, wide_mass)
        mean = xp.where(narrow, centre - thin * m / (6 * levels), wide_mean)
        p = self.softmax(self.arrays["log_p"] + (log_mass[..., None, :, :] * hot).sum((-1, -2)), -1)
        x0 = ((p[..., None, None] * hot).sum(-3) * mean).sum(-1)
        return x0, (x - alpha * x0) / sigma


# In the process of a library.


def log_p(library: str, options: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    """A function from x ``(n, d)`` and a seed to log p ``(n,)``."""
    dims = arrays["hot"].shape[1]
    if library == "flow_matching":
        import torch

        torch.set_num_threads(1)
        tensors = {name: torch.tensor(a) for name, a in arrays.items()}
        problem = Listed(torch, torch.softmax, tensors)
        problem.log_ndtr = torch.special.log_ndtr
        f = peers.flow_matching_log_p(problem, dims, **options)

        def of_torch(x: np.ndarray, seed: int) -> np.ndarray:
            torch.manual_seed(seed)
            return f(torch.tensor(x)).numpy()

        return of_torch
    import jax
    import jax.numpy as jnp

    problem = Listed(jnp, jax.nn.softmax, {name: jnp.asarray(a) for name, a in arrays.items()})
    problem.log_ndtr = jax.scipy.special.log_ndtr
    if library == "gensbi":
        key = {} if options.get("exact", True) else {"key": 0}
        g = jax.jit(peers.gensbi_log_p(problem, dims, **options))
        return lambda x, seed: g(x, **{name: jax.random.key(seed) for name in key})
    one = peers.sbgm_log_p(problem, dims, **options)
    each = jax.jit(jax.vmap(lambda x, key: one(x, key=key)))
    return lambda x, seed: each(x, jax.random.split(jax.random.PRNGKey(seed), len(x)))


def work(library: str, options: dict[str, Any]) -> None:
    """Compute log p of the x in each line of the input."""
    made = functools.cache(lambda text: log_p(library, options, arrays_of(text)))

    def arrays_of(text: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(a, np.float32) for name, a in json.loads(text).items()}

    for line in sys.stdin:
        given = json.loads(line)
        found = made(given["arrays"])(np.asarray(given["x"], np.float32), given["seed"])
        print("numbers", json.dumps(np.asarray(found, float).tolist()), flush=True)


# In the process of the audit.


class Peer:
    """An estimator of ``sbml.audit``, whose numbers come from a library's process."""

    def __init__(self, row: Row, python: str) -> None:
        command = [python, __file__, "work", row.library, json.dumps(row.options)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # sbml sets a flag that older versions of XLA refuse.
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.process: Any = subprocess.Popen(command, env=env, **pipes)

    def __call__(self, denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
        world, levels, n = denoiser.world, schedule.levels, len(pixels)
        flat = pixels.reshape(n, -1)
        # The draws of an image do not depend on its batch, so the audit notices if its log p does.
        u = [np.random.default_rng([seed, *k]).random(world.dims) for k in flat.tolist()]
        x = 2 * (flat + np.array(u)) / levels - 1
        images = world.images.reshape(-1, world.dims)
        hot = (images[..., None] == np.arange(levels)).astype(int)
        arrays = {"hot": hot.tolist(), "log_p": world.log_prob(world.images).tolist()}
        given = {"arrays": json.dumps(arrays), "x": x.tolist(), "seed": seed}
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("numbers "):
                nats = -np.array(json.loads(line.removeprefix("numbers ")))
                return nats + world.dims * math.log(levels / 2)
        raise RuntimeError("the process of the library ended: see its error above")


def table(pythons: dict[str, str]) -> None:
    """Print the audits of all rows as Markdown."""
    from sbml.audit import WORLDS, Estimator, audit

    worlds = {name: WORLDS[name] for name in ("gaussian", "random")}
    print("| library | excess in bits/dim, gaussian | random | what fails | unclear |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        if row.library not in pythons:
            continue
        peer = Peer(row, pythons[row.library])
        estimator = Estimator(row.name, peer, "uniform", 0.02)
        report = audit(estimator, worlds, calls=row.calls, repetitions=REPETITIONS)
        peer.process.stdin.close()
        peer.process.wait()
        print(report, file=sys.stderr, flush=True)
        bounds = [f for f in report.findings if f.check == "bound"]
        excess = [f"{f.value:+.4f} ± {f.tolerance:.4f}" for f in bounds]
        unclear = sorted({f.check for f in report.findings if f.verdict == "unclear"})
        cells = [*excess, ", ".join(sorted(report.failed)), ", ".join(unclear)]
        print(f"| {row.library}, {row.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("work", help="the process of a library")
    worker.add_argument("library")
    worker.add_argument("options", type=json.loads)
    all_rows = commands.add_parser("table")
    all_rows.add_argument("pythons", nargs="+", help="LIBRARY=PYTHON for each library")
    args = parser.parse_args()
    if args.command == "work":
        work(args.library, args.options)
    else:
        table(dict(text.split("=", 1) for text in args.pythons))


if __name__ == "__main__":
    main()
