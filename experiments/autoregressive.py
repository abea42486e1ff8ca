"""Autoregressive models of the same images, beside the models of ``experiments.claims``.

    log p(k) = sum over pixels i of  log p(k_i | k_1 .. k_(i-1))

in the order of rows, columns and channels. This is exact for integers, so there is neither a
dequantizer nor a bound. There are two models:

    transformer   a causal transformer whose position is the sum of a row, a column and a channel
    forest        no network: for each pixel, randomized trees on the pixels before it, whose
                  probabilities are mixed with those of the neighbouring levels and of the pixel's
                  own histogram, so that no level has the probability 0

    python -m experiments.autoregressive [--data=digits] [--out=runs/claims] [--held_out]

The bits/dim of every test image become lines of the file of ``experiments.claims``, and the table
of differences to the models there is paired over the images. ``--held_out`` evaluates on held-out
training images instead, for the choice of settings. The forest's defaults were chosen so among 84
settings on the digits; the transformer's were not chosen.
"""

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments import grid, table2
from sbml import data
from sbml.core.progress import over
from sbml.core.types import Array, Key
from sbml.data import ImageSet
from sbml.program.config.build import Experiment
from sbml.program.config.config import load
from sbml.program.runtime import cpu, refusals
from sbml.statistics import intervals

CONFIGS = {"digits": "digits_vp", "fashion": "fashion_mnist_vp", "photos": "photos_vp"}
MEASURE = "exact"
HELD_OUT = 0.15
FOREST = {"trees": 100, "leaf": 2, "features": 0.5, "spread": 0.1, "share": 0.02}


class Transformer(nn.Module):
    """The logits ``(n, d, levels)`` of the pixels ``k (n, h, w, c)``, each given those before it.

    Pixel i sees the embeddings of the pixels before it; the first one sees a learned vector.
    """

    levels: int
    width: int = 64
    depth: int = 4
    heads: int = 4
    dropout: float = 0.2

    @nn.compact
    def __call__(self, k: Array, train: bool = False) -> Array:
        n, *shape = k.shape
        before = nn.Embed(self.levels, self.width)(k.reshape(n, -1)[:, :-1])
        first = self.param("first", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (n, 1, self.width)), before], axis=1)
        places = jnp.unravel_index(jnp.arange(math.prod(shape)), shape)
        for size, place in zip(shape, places, strict=True):
            x = x + nn.Embed(size, self.width)(place)
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        for _ in range(self.depth):
            attend = nn.MultiHeadDotProductAttention(self.heads, dropout_rate=self.dropout)
            y = attend(nn.LayerNorm()(x), mask=mask, deterministic=not train)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
            y = nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.Dense(self.levels)(nn.LayerNorm()(x))


def log_p(model: nn.Module, params: Any, k: Array, **options: Any) -> Array:
    """log p(k) in nats of the integers ``k (n, h, w, c)``, ``(n,)``."""
    logits = jax.nn.log_softmax(jnp.asarray(model.apply(params, k, **options)))
    return jnp.sum(jnp.take_along_axis(logits, k.reshape(len(k), -1, 1), axis=-1), axis=(1, 2))


def fit_transformer(model: nn.Module, images: np.ndarray, steps: int, seed: int) -> Any:
    """The averaged parameters after ``steps`` steps of AdamW on batches of 64 images."""
    key = jax.random.key(seed)
    params = model.init(key, jnp.asarray(images[:1], int))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    decay = min(0.995, max(0.0, 1 - 6.5 / steps))

    @jax.jit
    def update(params: Any, state: Any, average: Any, k: Array, key: Key) -> Any:
        def loss(params: Any) -> Array:
            return -jnp.mean(log_p(model, params, k, train=True, rngs={"dropout": key}))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, state, average

    state, average, rng = optimizer.init(params), params, np.random.default_rng(seed)
    for step in over(range(steps), "train", "step", steps):
        chosen = rng.choice(len(images), min(64, len(images)), replace=False)
        k = jnp.asarray(images[chosen], int)
        params, state, average = update(params, state, average, k, jax.random.fold_in(key, step))
    return average


def transformer_bits(
    train: ImageSet, images: np.ndarray, seed: int, steps: int, **sizes: Any
) -> np.ndarray:
    """-log2 p of each of ``images (n, h, w, c)``, per dimension, ``(n,)``."""
    model = Transformer(train.levels, **sizes)
    params = fit_transformer(model, train.images, steps, seed)
    of_batch = jax.jit(lambda k: log_p(model, params, k))
    parts = [of_batch(jnp.asarray(images[i : i + 60], int)) for i in range(0, len(images), 60)]
    return -np.concatenate(parts) / math.prod(train.shape) / math.log(2)


def forest_probabilities(
    past: np.ndarray,
    now: np.ndarray,
    asked: np.ndarray,
    levels: int,
    seed: int,
    *,
    trees: int,
    leaf: int,
    features: float,
    spread: float,
    share: float,
) -> np.ndarray:
    """The probabilities ``(m, levels)`` of one pixel, given the pixels before it, ``asked (m, i)``.

    Args:
      past: the pixels before it in the training images, ``(n, i)``.
      now: the pixel itself there, ``(n,)``.
      trees, leaf: the number of trees, and the smallest number of images in a leaf.
      features: the part of the pixels before it among which a split is chosen.
      spread: the part of a level's probability that goes to its two neighbours.
      share: the weight of the smoothed histogram of the pixel.
    """
    from sklearn.ensemble import ExtraTreesClassifier  # here, because it takes a second

    histogram = (np.bincount(now, minlength=levels) + 0.5) / (len(now) + 0.5 * levels)
    found = np.tile(histogram, (len(asked), 1))
    if past.shape[1] and len(np.unique(now)) > 1:
        forest = ExtraTreesClassifier(
            trees, min_samples_leaf=leaf, max_features=features, random_state=seed
        )
        forest.fit(past, now)
        raw = np.zeros_like(found)
        raw[:, forest.classes_] = forest.predict_proba(asked)
        steps = np.eye(levels, k=1) + np.eye(levels, k=-1)
        steps[[0, -1], [0, -1]] += 1  # What would leave the range stays.
        found = share * histogram + (1 - share) * raw @ (
            (1 - spread) * np.eye(levels) + spread / 2 * steps
        )
    return found


def forest_bits(train: ImageSet, images: np.ndarray, seed: int, **settings: Any) -> np.ndarray:
    """-log2 p of each of ``images (n, h, w, c)``, per dimension, ``(n,)``; ``settings`` are changes
    of FOREST."""
    settings = FOREST | settings
    k, asked = (each.reshape(len(each), -1).astype(int) for each in (train.images, images))
    total = np.zeros(len(images))
    for i in over(range(k.shape[1]), "forest", "pixel", k.shape[1]):
        past, query = k[:, :i], asked[:, :i]
        found = forest_probabilities(past, k[:, i], query, train.levels, seed + i, **settings)
        total -= np.log2(found[np.arange(len(images)), asked[:, i]])
    return total / k.shape[1]


MODELS: dict[str, Callable[..., np.ndarray]] = {
    "transformer": transformer_bits,
    "forest": forest_bits,
}


def line(
    out: pathlib.Path, name: str, source: str, seed: int, images: int, **flags: Any
) -> grid.Line:
    """The line of the file ``out`` with the bits/dim of every image by the model ``name``."""
    split = data.VALIDATION if flags.pop("held_out") else "test"
    manual_dir, steps = flags.pop("manual_dir"), flags.pop("steps")
    settings = {"steps": steps, **flags} if name == "transformer" else FOREST | flags

    def compute() -> grid.Line:
        config = load(CONFIGS[source])
        config.data.update(validation=HELD_OUT if split != "test" else 0.0)
        if manual_dir:
            config.data.manual_dir = manual_dir
        experiment = Experiment(config)
        train, asked = experiment.images("train"), experiment.images(split).images
        # The images of ``eval.max_images`` in an evaluation of the model.
        ids = np.sort(np.random.RandomState(0).permutation(len(asked))[: images or len(asked)])
        start = time.process_time()
        values = MODELS[name](train, asked[ids], seed, **settings)
        about: grid.Line = {"measure": MEASURE, "data": source, "process": "", "network": name}
        about |= {"training": "autoregressive", "seed": seed, "split": split}
        about |= {"optimizer": "", "settings": settings, "steps": settings.get("steps", 0)}
        return {**about, "values": values.tolist(), "cpu": time.process_time() - start}

    chosen = " ".join(f"{field}={value}" for field, value in sorted(settings.items()))
    return grid.compute_once(out, f"{name} {source} {split} {images} {seed} {chosen}", compute)


def table(lines: list[grid.Line], source: str) -> list[list[str]]:
    """A header and rows: each autoregressive model beside each model of the grid, by the lines that
    are there. The difference is paired over the images, after a mean over the seeds."""
    found: dict[tuple[Any, ...], list[list[float]]] = {}
    for each in lines:
        if each["data"] == source and each["split"] == "test" and "values" in each:
            names = ("network", "training", "process", "steps", "measure")
            found.setdefault(tuple(each[name] for name in names), []).append(each["values"])
    rows = [["autoregressive", "bits/dim", "model", "its bits/dim", "model - autoregressive", "n"]]
    ours = {place: v for place, v in found.items() if place[-1] in ("ode", "bound")}
    for place, values in found.items():
        if place[-1] != MEASURE:
            continue
        mean = np.mean(values, axis=0)
        rows.append([place[0], _text(mean), "", "", "", str(len(mean))])
        for other, numbers in ours.items():
            model = np.mean(numbers, axis=0)
            if len(model) == len(mean):
                name = ", ".join(map(str, other))
                gap = _text(model - mean, "+")
                rows.append([place[0], "", name, _text(model), gap, str(len(mean))])
    return rows


def _text(values: np.ndarray, sign: str = "") -> str:
    """The mean of ``values (n,)`` with its 95% interval over the images."""
    found = intervals.mean_interval(values)
    half = f" ± {found.ci95:.3f}" if math.isfinite(found.ci95) else ""
    return f"{found.mean:{sign}.3f}{half}"


def main() -> None:
    """Add the lines that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=tuple(CONFIGS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", default="runs/claims", help="folder of the lines")
    parser.add_argument("--seeds", type=int, default=3)
    # They take as much CPU-time as the 1,650 steps of configs/digits_vp.py.
    parser.add_argument("--steps", type=int, default=850, help="steps of the transformer")
    parser.add_argument("--images", type=int, default=0, help="number of images; 0: all")
    parser.add_argument("--manual_dir", default="", help="folder of Fashion-MNIST's files")
    parser.add_argument("--held_out", action="store_true", help="evaluate on held-out images")
    args = parser.parse_args()
    out = pathlib.Path(args.out).absolute() / "claims.jsonl"
    names = args.models.split(",")
    if unknown := set(names) - set(MODELS):
        sys.exit(f"--models={args.models}: no model {unknown}; give {' or '.join(MODELS)}")
    flags = {name: getattr(args, name) for name in ("images", "manual_dir", "held_out", "steps")}
    try:
        for name in names:
            for seed in range(args.seeds):
                found = line(out, name, args.data, seed, **flags)
                place = f"{name} {args.data} {found['split']} seed {seed}"
                print(f"{place}: {_text(np.array(found['values']))}, {found['cpu']:.0f} CPU-s")
        rows = {f"{args.data}, autoregressive": table(list(grid.read(out).values()), args.data)}
        print(table2.markdown(rows))
    except Exception as error:
        if (said := refusals.line(error)) is None:
            raise
        sys.exit(said)


if __name__ == "__main__":
    cpu.settle()
    main()
