"""Posteriors of two simulators, compared with two libraries of simulation-based inference.

    python benchmarks/posteriors.py measure results.jsonl --seeds=2 gensbi=PYTHON sbi=PYTHON
    python benchmarks/posteriors.py table results.jsonl

The simulators, and the network and training of sbml, are those of
``experiments/posterior_of_a_simulator.ipynb``, whose cells are executed here. Run ``measure`` with
the Python of an environment that has sbml. For each seed it draws the simulations once, and all
libraries train on them, one after the other. Each training is a process of its own on one core,
with the Python of the library's environment (``LIBRARY=PYTHON``). The methods are those of
``METHODS``; the budget is either the number of steps of sbml or its training time, or else the
method stops by itself.

For new pairs of parameters and observations, the mean of log p(theta | x) - log q(theta | x), where
p is the exact posterior and q the density of the library's own function, is KL(p || q), averaged
over x. For the coverage, ``DRAWS`` samples of q are drawn for each x. Let s be the share of them
whose exact density p is larger than that of the true parameters. If q = p, then s is uniform, so
s <= l holds for about a share l of the pairs. If it holds for fewer, q is usually too narrow.
Unlike the coverage of q's own regions, this test notices a q that ignores a part of x. Training
times are CPU-seconds without compilation, which is measured by a training of 20 steps.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "posterior_of_a_simulator.ipynb"
PAIRS, CHUNK = 1000, 100  # new pairs for the divergence, and how many are evaluated at once
COVERED, DRAWS = 200, 19  # new pairs for the coverage, and samples for each
LEVELS = 0.5, 0.9
STEPS, SECONDS, OWN = "equal steps", "equal time", "its own"
METHODS = {  # (method, budget, number of pairs); fewer pairs where log p is slow
    "sbml": [("notebook", STEPS, PAIRS)],
    "gensbi": [
        ("sbml's network", STEPS, PAIRS),
        ("sbml's network", SECONDS, PAIRS),
        ("Flux1", SECONDS, 200),
    ],
    "sbi": [("NPE", OWN, PAIRS), ("FMPE", OWN, 200)],
}

Arrays = dict[str, Any]


class Fitted(NamedTuple):
    """A trained posterior.

    Attributes:
      parameters: number of the network's parameters.
      steps: number of training steps.
      seconds: CPU-seconds of the training.
      log_prob: from theta (n, d) and x (n, k) to log q(theta | x) (n,).
      sample: from x (n, k) to samples (n, DRAWS, d).
    """

    parameters: int
    steps: int
    seconds: float
    log_prob: Callable[[Any, Any], Any]
    sample: Callable[[Any], Any]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``run`` and its CPU-seconds."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def notebook() -> Arrays:
    """The names that the notebook's cells of the parameters, simulators and model define."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: Arrays = {}
    for cell in [c for c in cells if c["cell_type"] == "code"][1:4]:
        exec("".join(cell["source"]), names)
    return names


# Libraries: each function trains one of its methods.


def sbml(arrays: Arrays, method: str, seed: int, steps: int, batch: int) -> Fitted:
    import jax
    import jax.numpy as jnp

    names = notebook()
    names.update(STEPS=steps, BATCH=batch)
    theta, x = (jax.numpy.asarray(arrays[name]) for name in ("theta", "x"))
    (condition, density), seconds = timed(lambda: names["train"](theta, x, seed))

    def sample(x: Any) -> Any:
        each = jnp.repeat(condition(x), DRAWS, axis=0)
        return density.sample(jax.random.key(seed), len(each), each).reshape(len(x), DRAWS, -1)

    def log_prob(theta: Any, x: Any) -> Any:
        return density.logp(theta, condition(x), check=False).values

    count = sum(a.size for a in jax.tree.leaves(density.score.how.network.args[0]))
    return Fitted(count, steps, seconds, log_prob, sample)


def gensbi(arrays: Arrays, method: str, seed: int, steps: int, batch: int) -> Fitted:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from gensbi.core import FlowMatchingMethod
    from gensbi.models import Flux1Params
    from gensbi.recipes import ConditionalPipeline, Flux1FlowPipeline

    scales = {name: (arrays[name].mean(0), arrays[name].std(0)) for name in ("theta", "x")}

    def standardised(name: str, values: Any) -> Any:
        return ((values - scales[name][0]) / scales[name][1])[..., None]  # a channel axis

    theta, x = (standardised(name, arrays[name]) for name in ("theta", "x"))
    (n, d, _), k = theta.shape, x.shape[1]

    class Network(nnx.Module):
        """The notebook's network."""

        def __init__(self, rngs: Any, width: int = 128) -> None:
            self.first = nnx.Linear(d + k + 32, width, rngs=rngs)
            self.last = nnx.Linear(width, d, rngs=rngs)
            self.blocks = nnx.List(
                nnx.Sequential(
                    nnx.LayerNorm(width, rngs=rngs),
                    nnx.Linear(width, width, rngs=rngs),
                    nnx.silu,
                    nnx.Linear(width, width, rngs=rngs),
                )
                for _ in range(4)
            )

        def __call__(self, t: Any, obs: Any, cond: Any, **_: Any) -> Any:
            theta, x = obs[..., 0], jnp.broadcast_to(cond[..., 0], (len(obs), k))
            angle = jnp.broadcast_to(t.reshape(-1, 1), (len(obs), 1)) * jnp.geomspace(1, 100, 16)
            h = self.first(jnp.concatenate([theta, x, jnp.sin(angle), jnp.cos(angle)], axis=1))
            for block in self.blocks:
                h = h + block(h)
            return self.last(h)[..., None]

    def batches() -> Iterator[Any]:
        random = np.random.default_rng(seed)
        while True:
            ids = random.integers(n, size=batch)
            yield theta[ids], x[ids]

    config = ConditionalPipeline.get_default_training_config() | {
        "nsteps": steps,
        # The defaults are for 50,000 steps: a warm-up of 500 steps and an average over 1,000.
        "warmup_steps": steps // 100,
        "ema_decay": 1 - 50 / max(steps, 100),
        "max_lr": 1e-3,
        "min_lr": 1e-6,
        "early_stopping": False,
        "val_every": steps + 1,
        "checkpoint_dir": tempfile.mkdtemp(),
    }
    common: Arrays = {"training_config": config, "dim_obs": d, "dim_cond": k}
    data = batches(), batches()
    if method == "Flux1":
        small: Arrays = {"num_heads": 4, "axes_dim": [10], "depth": 2, "depth_single_blocks": 4}
        fixed: Arrays = {"in_channels": 1, "context_in_dim": 1, "vec_in_dim": None, "mlp_ratio": 4}
        fixed |= {"qkv_bias": True, "dtype": jnp.float32, "dim_obs": d, "dim_cond": k}
        params = Flux1Params(rngs=nnx.Rngs(seed), **small, **fixed)
        pipeline = Flux1FlowPipeline(*data, params=params, **common)
    else:
        network = Network(nnx.Rngs(seed))
        pipeline = ConditionalPipeline(network, *data, method=FlowMatchingMethod(), **common)
    _, seconds = timed(lambda: pipeline.train(nnx.Rngs(seed), save_model=False))

    ids = {"obs_ids": pipeline.obs_ids, "cond_ids": pipeline.cond_ids}
    of_one = pipeline.get_log_prob_fn(x[:1])
    # Its function takes one x, so ``vmap`` maps it over the pairs.
    each = jax.jit(jax.vmap(lambda z, c: of_one(z[None], ids | {"cond": c[None]})[0]))

    def log_prob(theta: Any, x: Any) -> Any:
        z, c = standardised("theta", theta), standardised("x", x)
        return np.asarray(each(z, c)) - np.log(scales["theta"][1]).sum()

    def sample(x: Any) -> Any:
        key, c = jax.random.key(seed), standardised("x", x)
        z = pipeline.sample_batched(key, c, DRAWS, show_progress_bars=False)
        return scales["theta"][0] + scales["theta"][1] * np.swapaxes(z[..., 0], 0, 1)

    count = sum(a.size for a in jax.tree.leaves(nnx.state(pipeline.model, nnx.Param)))
    return Fitted(count, steps, seconds, log_prob, sample)


def sbi(arrays: Arrays, method: str, seed: int, steps: int, batch: int) -> Fitted:
    import torch
    from sbi import inference

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    trainer = getattr(inference, method)(show_progress_bars=False)
    trainer.append_simulations(*[torch.tensor(arrays[name]) for name in ("theta", "x")])
    estimator, seconds = timed(trainer.train)
    steps = trainer.summary["epochs_trained"][-1] * int(0.9 * len(arrays["x"]) / 200)
    posterior = trainer.build_posterior(estimator)

    def log_prob(theta: Any, x: Any) -> Any:
        theta, x = torch.tensor(theta), torch.tensor(x)
        if method == "NPE":
            return posterior.log_prob_batched(theta[None], x, norm_posterior=False)[0].numpy()
        pairs = zip(theta, x, strict=True)
        return np.concatenate([posterior.log_prob(a[None], b).numpy() for a, b in pairs])

    def sample(x: Any) -> Any:
        found = posterior.sample_batched((DRAWS,), torch.tensor(x), show_progress_bars=False)
        return np.swapaxes(found.numpy(), 0, 1)

    count = sum(p.numel() for p in estimator.parameters())
    return Fitted(count, steps, seconds, log_prob, sample)


LIBRARIES = {"sbml": sbml, "gensbi": gensbi, "sbi": sbi}


# Measurement.


def work(task: dict[str, Any]) -> None:
    """Train a method on the arrays of a file, and write its log p, samples and times to another."""
    with np.load(task["arrays"]) as stored:
        arrays = dict(stored)

    def fit(steps: int) -> Fitted:
        library = LIBRARIES[task["library"]]
        return library(arrays, task["method"], task["seed"], steps, task["batch"])

    steps, compilation = task["steps"], 0.0
    if task["budget"] != OWN:
        compilation = fit(20).seconds
    if task["budget"] == SECONDS:
        steps = int(task["seconds"] / (fit(120).seconds - compilation) * 100)
    fitted = fit(steps)
    theta, x = arrays["new theta"][: task["pairs"]], arrays["new x"][: task["pairs"]]
    parts, seconds = [], []
    for i in range(0, len(x), CHUNK):
        part = functools.partial(fitted.log_prob, theta[i : i + CHUNK], x[i : i + CHUNK])
        logp, of_part = timed(part)
        parts.append(np.asarray(logp))
        seconds.append(of_part)
    row: Arrays = {"parameters": fitted.parameters, "steps": fitted.steps}
    row |= {"seconds": fitted.seconds - compilation}
    row |= {"ms": 1e3 * np.mean(seconds[1:]) / CHUNK}  # The first call compiles.
    samples = np.asarray(fitted.sample(x[:COVERED]))
    np.savez(task["found"], logp=np.concatenate(parts), samples=samples, **row)


def measured(simulator: Any, arrays: Arrays, found: Arrays) -> Arrays:
    """The row of a trained method: its divergence and coverage."""
    theta, x = (arrays[f"new {name}"][: len(found["logp"])] for name in ("theta", "x"))
    exact = np.asarray(simulator.log_posterior(theta, x))
    gap = exact - found["logp"]
    samples = np.swapaxes(found["samples"], 0, 1)  # one for each x
    of_samples = np.stack([simulator.log_posterior(s, x[: len(s)]) for s in samples])
    higher = np.mean(of_samples > exact[: of_samples.shape[1]], axis=0)
    numbers = {key: found[key].item() for key in ("parameters", "steps", "seconds", "ms")}
    numbers |= {"kl": gap.mean(), "error": gap.std() / len(gap) ** 0.5, "largest": gap.max()}
    coverage = [np.mean(higher <= level) for level in LEVELS]
    return {k: float(v) for k, v in numbers.items()} | {"coverage": [float(c) for c in coverage]}


def measure(results: str, seeds: int, pythons: dict[str, str]) -> None:
    """Draw the simulations, and train all methods on them, in turns."""
    import jax

    names = notebook()
    simulators = {"linear Gaussian": names["Linear"](), "two moons": names["TwoMoons"]()}
    for seed, (problem, simulator) in itertools.product(range(seeds), simulators.items()):
        keys = jax.random.split(jax.random.key(seed))
        draws = [simulator.draw(keys[0], names["SIMULATIONS"]), simulator.draw(keys[1], PAIRS)]
        arrays = dict(zip(("theta", "x", "new theta", "new x"), sum(draws, ()), strict=True))
        arrays = {name: np.asarray(a) for name, a in arrays.items()}
        seconds = 0.0
        for library, python in pythons.items():
            for method, budget, pairs in METHODS[library]:
                if method == "Flux1" and problem != "two moons":
                    continue  # A log p in ten dimensions takes seconds.
                with tempfile.TemporaryDirectory() as folder:
                    files = {name: f"{folder}/{name}.npz" for name in ("arrays", "found")}
                    np.savez(files["arrays"], **arrays)
                    task = {"library": library, "method": method, "budget": budget, "seed": seed}
                    task |= {"problem": problem}
                    more = {"steps": names["STEPS"], "batch": names["BATCH"], "seconds": seconds}
                    more["pairs"] = pairs
                    argument = json.dumps(task | more | files)
                    command = [python, os.path.abspath(__file__), "work", argument]
                    subprocess.run(command, check=True, cwd=folder)  # Some libraries write logs.
                    with np.load(files["found"]) as found:
                        row = task | measured(simulator, arrays, dict(found))
                if library == "sbml":
                    seconds = row["seconds"]
                print(row, file=sys.stderr)
                with open(results, "a") as output:
                    output.write(json.dumps(row) + "\n")


def table(results: str) -> None:
    """Print the means over the seeds as Markdown."""
    with open(results) as file:
        rows = [json.loads(line) for line in file]
    levels = " and ".join(f"{level:g}" for level in LEVELS)
    print(
        "| simulator | library, method | budget | parameters | steps | training, s | KL, nats | "
        f"ms a log p | coverage at {levels} |\n|---|---|---|---|---|---|---|---|---|"
    )

    def group(row: dict[str, Any]) -> tuple[str, ...]:
        return row["problem"], row["library"], row["method"], row["budget"]

    for key in dict.fromkeys(map(group, rows)):
        same = [row for row in rows if group(row) == key]

        def column(name: str, same: list[Any] = same) -> np.ndarray:
            return np.array([row[name] for row in same])

        kls, coverages = column("kl"), column("coverage").mean(0)
        # The larger of the error over the pairs and that over the seeds.
        error = np.sqrt(np.mean(column("error") ** 2) / len(same))
        if len(same) > 1:
            error = max(error, kls.std(ddof=1) / len(same) ** 0.5)
        cells = [key[0], f"{key[1]}, {key[2]}", key[3]]
        cells += [f"{column(name).mean():,.0f}" for name in ("parameters", "steps", "seconds")]
        cells += [f"{kls.mean():.3f} ± {1.96 * error:.3f}", f"{column('ms').mean():.2f}"]
        print("| " + " | ".join([*cells, ", ".join(f"{c:.3f}" for c in coverages)]) + " |")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("results")
    run.add_argument("--seeds", type=int, default=2)
    run.add_argument("pythons", nargs="*", help="LIBRARY=PYTHON for each other library")
    commands.add_parser("table").add_argument("results")
    commands.add_parser("work", help="one process of measure").add_argument("task")
    args = parser.parse_args()
    # One core. It is set before the frameworks are imported.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.command == "work":
        work(json.loads(args.task))
    elif args.command == "table":
        table(args.results)
    else:
        others = {
            name: os.path.abspath(python)
            for name, python in (text.split("=", 1) for text in args.pythons)
        }
        measure(args.results, args.seeds, {"sbml": sys.executable} | others)


if __name__ == "__main__":
    main()
