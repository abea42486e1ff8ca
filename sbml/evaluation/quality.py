"""Quality of samples: their distances to the training images, in features and in pixels.

*Features.* FID and similar metrics compare the statistics of the samples' features with those of
the training images. The latter are computed once and stored under the data's fingerprint.

*Pixels.* Each sample is compared with its nearest training image. If the model has memorised
training images, samples are much nearer to training images than test images are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from sbml import distances
from sbml.data import ImageSet, Options, spread
from sbml.distances import Moments
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.features import EXTRACTORS, Extractor
from sbml.runtime import progress
from sbml.runtime.files import intact_npz, read_npz, write_npz

KEPT = 10_000  # images whose features are stored for the kernel distance, whose cost is quadratic
SHOWN = 8  # samples that are shown with their nearest training images
CHUNK = 500  # images per call of an extractor


class Reference(NamedTuple):
    """Statistics of a data set's features: the moments over all images, and the features
    ``(m, d)`` of at most ``KEPT`` images."""

    moments: Moments
    features: np.ndarray


def extractor(config: Config) -> Extractor:
    """The extractor that ``eval.features`` names."""
    e = config.eval
    made: Extractor = EXTRACTORS[e.features](
        weights=e.inception_weights,
        sha256=e.inception_sha256,
        levels=config.data.levels,
        cache=config.data.cache_dir,
    )
    return made


def features_of(
    extract: Extractor, images: np.ndarray, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features ``(m, d)`` and class probabilities ``(m, classes)`` of ``images``, in chunks of
    m <= ``CHUNK`` images; ``name`` is for the progress bar."""
    with progress.bar(f"features of {name}", "image", len(images)) as bar:
        for start in range(0, len(images), CHUNK):
            yield extract(np.asarray(images[start : start + CHUNK]))
            bar.update(min(CHUNK, len(images) - start))


def reference(experiment: Experiment, extract: Extractor, images: ImageSet) -> Reference:
    """The statistics of ``images``, computed once for each fingerprint and extractor."""
    cache = Options(cache_dir=experiment.config.data.cache_dir or None).cache
    name = f"{extract.identity}-{images.fingerprint['id']}.npz"
    path = epath.Path(cache) / "stats" / name
    stored = intact_npz(path)
    if stored is None:
        ids = spread(len(images), KEPT)
        kept: list[np.ndarray] = []

        def parts() -> Iterator[np.ndarray]:
            """The features chunk by chunk: those of a million images together need 10 GB."""
            start = 0
            for features, _ in features_of(extract, images.images, f"{images.name} {images.split}"):
                chosen = ids[(ids >= start) & (ids < start + len(features))] - start
                kept.append(np.asarray(features[chosen], np.float32))
                start += len(features)
                yield features

        moments = Moments.of_parts(parts())
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"mean": moments.mean, "cov": moments.cov, "count": np.asarray(moments.size)}
        write_npz(path, {**columns, "features": np.concatenate(kept)})
        print(f"statistics of {images.name} {images.split}, n={moments.size}: {path}")
        stored = read_npz(path)
    moments = Moments(stored["mean"], stored["cov"], int(stored["count"]))
    return Reference(moments, stored["features"])


def distances_of_features(
    extract: Extractor, images: np.ndarray, training: Reference
) -> dict[str, float]:
    """The Fréchet and kernel distances of ``images`` to the training images, and the Inception
    score, by their names."""
    columns = zip(*features_of(extract, images, "samples"), strict=True)
    features, probabilities = (np.concatenate(chunks) for chunks in columns)
    n = len(features)
    if n < features.shape[1]:
        logging.warning(
            "%d samples for %d features: distances of so few samples are unreliable; draw more "
            "(sampling.num_images)",
            *(n, features.shape[1]),
        )
    frechet, kernel, score = extract.names
    return {
        f"{frechet} n={n}": distances.frechet(Moments.of(features), training.moments),
        f"{kernel} n={n}": distances.kernel(features, training.features),
        f"{score} n={n}": distances.inception_score(probabilities),
    }


def _nearest(x: np.ndarray, train: ImageSet, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training image nearest to each of ``x (n, h, w, c)``, and its distance ``(n,)``: the root
    mean square difference of pixels that are scaled to [0, 1].

    With ``flip`` the network was trained on mirrored images too, so they are compared as well.
    """
    index, distance = distances.nearest(x, train.images)
    neighbours = train.images[index]
    if flip:
        index, mirrored = distances.nearest(x[:, :, ::-1], train.images)
        nearer = mirrored < distance
        neighbours[nearer] = train.images[index[nearer]][:, :, ::-1]
        distance = np.minimum(distance, mirrored)
    return neighbours, distance / (train.levels - 1)


def memorisation(
    samples: np.ndarray, train: ImageSet, test: ImageSet, flip: bool
) -> tuple[dict[str, float], np.ndarray]:
    """How near ``samples (n, h, w, c)`` are to the training images.

    Returns:
      The median distance to the nearest training image, of the samples and of test images, by name;
      and the first ``SHOWN`` samples followed by their nearest training images.
    """
    neighbours, distance = _nearest(samples, train, flip)
    test_images = test.images[spread(len(test), max(len(samples), 100))]
    _, test_distance = _nearest(test_images, train, flip)
    values = {
        "nearest training image, median root mean square distance of samples": float(
            np.median(distance)
        ),
        "the same of test images": float(np.median(test_distance)),
    }
    return values, np.concatenate([samples[:SHOWN], neighbours[:SHOWN]])
