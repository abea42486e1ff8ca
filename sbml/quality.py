"""How good the samples are, beside how likely the test images: modes ``stats`` and ``quality``.

``stats`` passes the training images through the extractor ``eval.features`` and keeps what the
distances need, under the data's fingerprint. ``quality`` holds the samples of a work directory
against it, n in every metric's name, and against the training images themselves: a model that
remembers draws samples much nearer to one of them than test images are.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sbml import distances, sample, summary
from sbml.build import Experiment
from sbml.data import ImageSet, Options, spread
from sbml.distances import Moments
from sbml.features import EXTRACTORS, Extractor
from sbml.from_config import check_choice
from sbml.runtime import progress, report
from sbml.runtime.checkpoint import tree_crc32
from sbml.runtime.files import write_whole
from sbml.runtime.parts import read_npz, write_npz

KEPT = 10_000  # features for the kernel distance, whose cost is quadratic
SHOWN = 8  # samples with their nearest training images
CHUNK = 500


class Reference(NamedTuple):
    """What a data set looks like to an extractor."""

    moments: Moments
    features: np.ndarray


def extractor(config: ConfigDict) -> Extractor:
    """The extractor ``eval.features``.

    Raises:
      ValueError: unknown, without its weights, or not for this data.
    """
    e = config.eval
    kind = EXTRACTORS[check_choice("eval.features", e.features, EXTRACTORS)]
    return kind(
        weights=e.inception_weights,
        sha256=e.inception_sha256,
        levels=config.data.levels,
        cache=config.data.cache_dir,
    )


def _features(
    extract: Extractor, images: np.ndarray, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and probabilities of all ``images``, some at a time."""
    with progress.bar(f"features of {name}", "image", len(images)) as bar:
        for start in range(0, len(images), CHUNK):
            yield extract(np.asarray(images[start : start + CHUNK]))
            bar.update(min(CHUNK, len(images) - start))


def reference(experiment: Experiment, extract: Extractor, images: ImageSet) -> Reference:
    """The statistics of ``images``, computed once for their fingerprint and this extractor."""
    cache = Options(cache_dir=experiment.config.data.cache_dir or None).cache
    name = f"{extract.identity}-{images.fingerprint['id']}.npz"
    path = epath.Path(cache) / "stats" / name
    if not path.exists():
        chosen = spread(len(images), KEPT)
        some: list[np.ndarray] = []

        def parts() -> Iterator[np.ndarray]:
            """All features once, not all at once: of a million images they are 10 GB."""
            start = 0
            for features, _ in _features(extract, images.images, f"{images.name} {images.split}"):
                here = chosen[(chosen >= start) & (chosen < start + len(features))] - start
                some.append(np.asarray(features[here], np.float32))
                start += len(features)
                yield features

        moments = Moments.of_parts(parts())
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"mean": moments.mean, "cov": moments.cov, "count": np.asarray(moments.size)}
        write_npz(path, {**columns, "features": np.concatenate(some)})
        print(f"statistics of {images.name} {images.split}, n={moments.size}: {path}")
    kept = read_npz(path)
    moments = Moments(kept["mean"], kept["cov"], int(kept["count"]))
    return Reference(moments, kept["features"])


def stats(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Compute and keep the statistics of the training images; ``workdir`` is not touched."""
    experiment = Experiment(config)
    reference(experiment, extractor(config), experiment.images("train"))


def _nearest(x: np.ndarray, train: ImageSet, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training image nearest to each of ``x``, mirrored where that is nearer and ``flip``, and
    the root mean square distance, of pixels in [0, 1]."""
    index, distance = distances.nearest(x, train.images)
    found = train.images[index]
    if flip:  # As it was shown in training.
        index, mirrored = distances.nearest(x[:, :, ::-1], train.images)
        nearer = mirrored < distance
        found[nearer] = train.images[index[nearer]][:, :, ::-1]
        distance = np.minimum(distance, mirrored)
    return found, distance / (train.levels - 1)


def _memory(
    drawn: np.ndarray, train: ImageSet, test: ImageSet, flip: bool
) -> tuple[dict[str, float], np.ndarray]:
    """Distances to the nearest training images, and the first samples, those images after them."""
    found, distance = _nearest(drawn, train, flip)
    held_out = test.images[spread(len(test), max(len(drawn), 100))]
    _, usual = _nearest(held_out, train, flip)
    rows = np.concatenate([drawn[:SHOWN], found[:SHOWN]])
    values = {
        "nearest training image, median root mean square distance of samples": float(
            np.median(distance)
        ),
        "the same of test images": float(np.median(usual)),
    }
    return values, rows


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Hold ``samples.npz`` of ``workdir`` against the training images.

    Writes ``quality.json``, ``neighbours.png``, and the report anew where there is an evaluation.

    Raises:
      ValueError: without samples, fewer than two of them, or without the extractor's weights.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    extract = extractor(config)
    if not (workdir / summary.SAMPLES).exists():
        raise ValueError(f"no {summary.SAMPLES} in {workdir}: draw some first (--mode=sample)")
    drawn = read_npz(workdir / summary.SAMPLES)
    if failed := int(np.sum(drawn.get("failed", False))):  # Not in files of earlier versions.
        logging.warning("%d of %d samples are not finite", failed, len(drawn["images"]))
    if len(drawn["images"]) < 2:
        raise ValueError(
            f"{workdir / summary.SAMPLES} has one image: distances need two at least; draw more "
            "(--mode=sample,quality --config.sampling.num_images=1000)"
        )
    train, test = experiment.images("train"), experiment.images("test")
    known = reference(experiment, extract, train)
    looks = zip(*_features(extract, drawn["images"], "samples"), strict=True)
    features, probabilities = (np.concatenate(part) for part in looks)
    n = len(features)
    if n < features.shape[1]:
        logging.warning(
            "%d samples for %d features: a distance of so few says little", n, features.shape[1]
        )
    frechet, kernel, score = extract.names
    values = {
        f"{frechet} n={n}": distances.frechet(Moments.of(features), known.moments),
        f"{kernel} n={n}": distances.kernel(features, known.features),
        f"{score} n={n}": distances.inception_score(probabilities),
    }
    memory, rows = _memory(drawn["images"], train, test, config.data.flip)
    if jax.process_index() > 0:
        return
    values |= memory
    images_crc32 = tree_crc32(drawn["images"])
    result = {"step": int(drawn["step"]), "images_crc32": images_crc32, "values": values}
    write_whole(workdir / summary.QUALITY, json.dumps(report.strict(result), indent=1).encode())
    picture = sample.grid(experiment, rows, columns=len(rows) // 2)
    report.write_png(workdir / summary.NEIGHBOURS, picture)
    summary.write(workdir, experiment.images)
    for name, value in values.items():
        print(f"{name}: {value:.4g}")
