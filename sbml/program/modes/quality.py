"""Compares the samples with the training images: ``--mode=quality``.

*Features.* FID and similar metrics compare the statistics of the samples' features with those of
the training images. The latter are computed once and stored under the data's fingerprint.

*Pixels.* Each sample is compared with its nearest training image. If the model has memorised
training images, samples are much nearer to training images than test images are.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from sbml.core import registry
from sbml.core.door import shown
from sbml.core.files import intact_npz, write_npz
from sbml.core.progress import Bar
from sbml.data import ImageSet, spread
from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config
from sbml.program.evaluation.samples import grid
from sbml.program.features import EXTRACTORS, Extractor
from sbml.program.report.pictures import png
from sbml.program.runtime import refusals
from sbml.program.runtime.trees import tree_crc32
from sbml.program.runtime.workdir import NEIGHBOURS, QUALITY, SAMPLES, Workdir
from sbml.statistics import distances
from sbml.statistics.distances import Moments

KEPT = 10_000  # images whose features are stored for the kernel distance, whose cost is quadratic
SHOWN = 8  # samples that are shown with their nearest training images
CHUNK = 500  # images per call of an extractor


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that there are or will be samples, and that the extractor can be made."""
    if not (workdir.has(SAMPLES) or "sample" in before):
        raise ValueError(f"no {SAMPLES} in {workdir}: draw samples first (--mode=sample,quality)")
    extractor(experiment.config)


def run(experiment: Experiment, workdir: Workdir) -> Workdir:
    """Compare ``samples.npz`` of ``workdir`` with the training images: distances of features (FID
    and similar metrics), and of pixels to the nearest training image.

    Writes ``quality.json`` and ``neighbours.png``.
    """
    config, read = experiment.config, workdir.read(SAMPLES)
    extract, images, step = extractor(config), read["images"], int(read["step"])
    checkpoints = config.training.checkpoints(workdir)
    metadata, newest = checkpoints.metadata(), max(checkpoints.steps(), default=step)
    if newest != step:
        logging.warning(
            f"{workdir / SAMPLES} is of step {step}, but the newest checkpoint is of step "
            f"{newest}: to compare that, draw new samples (--mode=sample,quality)"
        )
    if failed := int(np.sum(read["failed"])):
        logging.warning("%d of %d samples are not finite", failed, len(images))
    if len(images) < 2:
        raise ValueError(
            f"{workdir / SAMPLES} has one image: distances need at least two; draw more "
            "(--mode=sample,quality --config.sampling.num_images=1000)"
        )
    train, test = experiment.images("train"), experiment.images("test")
    warnings = compatibility.other_data(metadata, experiment.provenance(train)) if metadata else []
    for warning in warnings:
        logging.warning(warning)
    flip = (metadata or {}).get("config", {}).get("data", {}).get("flip", config.data.flip)
    values = distances_of_features(extract, images, reference(experiment, extract, train))
    distances_to_training, pictured = memorisation(images, train, test, flip)
    values |= distances_to_training
    picture = png(grid(experiment, pictured, columns=len(pictured) // 2))
    workdir.write_bytes(NEIGHBOURS, picture)
    result = {
        "step": step,
        "values": values,
        "warnings": warnings,
        "data": train.fingerprint,
        "images_crc32": tree_crc32(images),
        "neighbours_crc32": zlib.crc32(picture),
    }
    workdir.write(QUALITY, result)
    print(f"{len(images)} samples of step {step}")
    for name, value in values.items():
        print(f"{name}: {value:.4g}")
    return workdir


def extractor(config: Config) -> Extractor:
    """The extractor that ``eval.quality.features`` names."""
    e = config.eval.quality
    registry.check_path("eval.quality.inception_weights", e.inception_weights)
    made: Extractor = EXTRACTORS[e.features](
        weights=e.inception_weights,
        sha256=e.inception_sha256,
        levels=config.data.levels,
        cache=config.data.options.cache_dir,
    )
    if not isinstance(made, Extractor):
        raise ValueError(
            f"eval.quality.features={e.features} returns {shown(made)}: let it return an "
            "sbml.program.features.Extractor"
        )
    return made


def features_of(
    extract: Extractor, images: np.ndarray, name: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features ``(m, d)`` and class probabilities ``(m, classes)`` of ``images``, in chunks of
    m <= ``CHUNK`` images; ``name`` is for the progress bar."""
    with Bar(f"features of {name}", "image", len(images)) as bar:
        for start in range(0, len(images), CHUNK):
            found = extract(np.asarray(images[start : start + CHUNK]))
            bar.update(min(CHUNK, len(images) - start))
            yield found


def reference(
    experiment: Experiment, extract: Extractor, images: ImageSet
) -> tuple[Moments, np.ndarray]:
    """The moments of the features of ``images``, and the features ``(m, d)`` of at most ``KEPT`` of
    them, computed once for each fingerprint and extractor."""
    cache = experiment.config.data.options.cache
    name = f"{extract.identity}-{images.fingerprint['id']}.npz"
    path, split = epath.Path(cache) / "stats" / name, f"{images.name} {images.split}"
    stored = intact_npz(path)
    if stored is None:
        ids = spread(len(images), KEPT)
        kept: list[np.ndarray] = []

        def parts() -> Iterator[np.ndarray]:
            """The features chunk by chunk: those of a million images together need 10 GB."""
            chunks = features_of(extract, images.images, split)
            for start, (features, _) in zip(range(0, len(images), CHUNK), chunks, strict=True):
                chosen = ids[(ids >= start) & (ids < start + CHUNK)] - start
                kept.append(np.asarray(features[chosen], np.float32))
                yield features

        moments = Moments.of_parts(parts())
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"mean": moments.mean, "cov": moments.cov, "count": np.asarray(moments.size)}
        stored["features"] = np.concatenate(kept)
        write_npz(path, stored)
    count = int(stored["count"])
    print(f"statistics of the features of {split}, n={count}: {refusals.relative(str(path))}")
    return Moments(stored["mean"], stored["cov"], count), stored["features"]


def distances_of_features(
    extract: Extractor, images: np.ndarray, training: tuple[Moments, np.ndarray]
) -> dict[str, float]:
    """The Fréchet and kernel distances of ``images`` to the :func:`reference` of the training
    images, and the Inception score, by their names."""
    columns = zip(*features_of(extract, images, "samples"), strict=True)
    features, probabilities = (np.concatenate(chunks) for chunks in columns)
    n = len(features)
    if n < features.shape[1]:
        logging.warning(
            f"{n} samples for {features.shape[1]} features: distances of so few samples are "
            "unreliable; draw more (sampling.num_images)"
        )
    frechet, kernel, score = extract.names
    return {
        f"{frechet} n={n}": distances.frechet(Moments.of(features), training[0]),
        f"{kernel} n={n}": distances.kernel(features, training[1]),
        f"{score} n={n}": distances.inception_score(probabilities),
    }


def memorisation(
    samples: np.ndarray, train: ImageSet, test: ImageSet, flip: bool
) -> tuple[dict[str, float], np.ndarray]:
    """How near ``samples (n, h, w, c)`` are to the training images.

    The distance of two images is the root mean square difference of their pixels, scaled to [0, 1].
    With ``flip`` the network was trained on mirrored images too, so they are compared as well.

    Returns:
      The median distance to the nearest training image, of the samples and of test images, by name;
      and the first ``SHOWN`` samples followed by their nearest training images.
    """

    def nearest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index, distance = distances.nearest(x, train.images)
        neighbours = train.images[index]
        if flip:
            index, mirrored = distances.nearest(x[:, :, ::-1], train.images)
            nearer = mirrored < distance
            neighbours[nearer] = train.images[index[nearer]][:, :, ::-1]
            distance = np.minimum(distance, mirrored)
        return neighbours, distance / (train.levels - 1)

    neighbours, distance = nearest(samples)
    test_images = test.images[spread(len(test), max(len(samples), 100))]
    _, test_distance = nearest(test_images)
    of_samples, of_test = float(np.median(distance)), float(np.median(test_distance))
    values = {
        "nearest training image, median root mean square distance of samples": of_samples,
        "the same of test images": of_test,
    }
    return values, np.concatenate([samples[:SHOWN], neighbours[:SHOWN]])
