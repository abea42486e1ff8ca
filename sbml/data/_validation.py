"""A part of the training images, held out to choose settings without the test images.

The scenes are put in a random order that does not depend on the seed of a run. The first scenes
form the validation split, until it has enough images. The network is trained on the others. A scene
is a set of images that show the same thing, such as crops of one photo. If a source has no scenes,
each image is a scene.
"""

from dataclasses import replace

import numpy as np

from sbml.data._image_set import ImageSet


def held_out(images: ImageSet, size: float) -> np.ndarray:
    """Which of the training ``images`` are held out, bool ``(n,)``.

    Args:
      images: all training images.
      size: how many at least, or below 1 their fraction, rounded to a number of images.

    Raises:
      ValueError: if none would be held out, or none left to train on.
    """
    n = len(images)
    wanted = size if size >= 1 else round(size * n)
    scenes = np.arange(n) if images.scenes is None else np.asarray(images.scenes)
    names, scene, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    order = np.random.RandomState(0).permutation(len(names))
    count = 1 + np.searchsorted(np.cumsum(sizes[order]), wanted)
    if wanted < 1 or count >= len(names):
        raise ValueError(
            f"data.validation={size:g}: {images.name} has {n} training images"
            + (f" of {len(names)} scenes, each held out or not" if images.scenes else "")
            + "; hold out one at least, and leave one to train on"
        )
    return np.isin(scene, order[:count])


def part(images: ImageSet, size: float, held: bool) -> ImageSet:
    """The held-out part of the training ``images``, or the rest, in their order.

    A copy in memory, where ``images`` may be mapped from a file.

    Raises:
      ValueError: as :func:`held_out`.
    """
    chosen = np.flatnonzero(held_out(images, size) == held)

    def of(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(names[i] for i in chosen)

    scenes, caution = of(images.scenes), images.caution
    if scenes is not None:
        caution = f"{len(set(scenes))} of {len(set(images.scenes or ()))} scenes; {caution}"
    return replace(
        images,
        split=f"{images.split}, {'held out' if held else 'the rest'}",
        images=images.images[chosen],
        ids=of(images.ids),
        scenes=scenes,
        skipped=() if held else images.skipped,
        caution=caution,
    )
