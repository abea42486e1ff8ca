"""How good the samples are, beside how likely the test images.

The training images pass through an extractor of features once, and what the distances need is kept
under the data's fingerprint. Samples are compared with it, and with the training images themselves:
a model that remembers draws samples much nearer to one of them than test images are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml import distances
from sbml.data import ImageSet, Options, spread
from sbml.distances import Moments
from sbml.experiment.build import Experiment
from sbml.experiment.fields import check_choice
from sbml.features import EXTRACTORS, Extractor
from sbml.runtime import progress
from sbml.runtime.files import intact_npz, read_npz, write_npz

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


def features_of(
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
    kept = intact_npz(path)
    if kept is None:
        chosen = spread(len(images), KEPT)
        some: list[np.ndarray] = []

        def parts() -> Iterator[np.ndarray]:
            """All features once, not all at once: of a million images they are 10 GB."""
            start = 0
            for features, _ in features_of(extract, images.images, f"{images.name} {images.split}"):
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


def memory(
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
