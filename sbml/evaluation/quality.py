"""Quality of samples: their distance to the training images, in features and in pixels.

The features of the training images are computed once; their statistics are stored under the data's
fingerprint and compared with those of the samples (FID and similar metrics). In pixels, each sample
is compared with its nearest training image: if the model has memorised training images, samples are
much nearer to them than test images are.
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

KEPT = 10_000  # images whose features are stored for the kernel distance, whose cost is quadratic
SHOWN = 8  # samples that are shown with their nearest training images
CHUNK = 500  # images per call of an extractor


class Reference(NamedTuple):
    """Statistics of a data set's features: moments of all, and the features of ``KEPT`` images."""

    moments: Moments
    features: np.ndarray


def extractor(config: ConfigDict) -> Extractor:
    """The extractor that ``eval.features`` names.

    Raises:
      ValueError: the extractor is unknown, its weights are missing, or it does not fit this data.
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
    """Features and class probabilities of all ``images``, ``CHUNK`` images at a time."""
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
        chosen = spread(len(images), KEPT)
        some: list[np.ndarray] = []

        def parts() -> Iterator[np.ndarray]:
            """The features chunk by chunk: those of a million images together need 10 GB."""
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
        stored = read_npz(path)
    moments = Moments(stored["mean"], stored["cov"], int(stored["count"]))
    return Reference(moments, stored["features"])


def _nearest(x: np.ndarray, train: ImageSet, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training image nearest to each of ``x``, and their root mean square distance in pixels in
    [0, 1]. With ``flip`` the mirrored training images are compared too."""
    index, distance = distances.nearest(x, train.images)
    neighbours = train.images[index]
    if flip:  # Training showed mirrored images too.
        index, mirrored = distances.nearest(x[:, :, ::-1], train.images)
        nearer = mirrored < distance
        neighbours[nearer] = train.images[index[nearer]][:, :, ::-1]
        distance = np.minimum(distance, mirrored)
    return neighbours, distance / (train.levels - 1)


def memory(
    drawn: np.ndarray, train: ImageSet, test: ImageSet, flip: bool
) -> tuple[dict[str, float], np.ndarray]:
    """Median distances of samples and of test images to their nearest training images, and a stack
    of the first ``SHOWN`` samples followed by their nearest training images."""
    neighbours, distance = _nearest(drawn, train, flip)
    held_out = test.images[spread(len(test), max(len(drawn), 100))]
    _, usual = _nearest(held_out, train, flip)
    rows = np.concatenate([drawn[:SHOWN], neighbours[:SHOWN]])
    values = {
        "nearest training image, median root mean square distance of samples": float(
            np.median(distance)
        ),
        "the same of test images": float(np.median(usual)),
    }
    return values, rows
