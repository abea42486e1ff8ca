"""Image sets by name, and their batches.

    images = load("digits", "train")             # or photos, image_folder, tfds:cifar10 ...
    batches = train_batches(images, 128, seed=0)
    batches[1000]                                # the uint8 batch of step 1000

A new source is a new file here that exports ``SOURCE``; see ``Source``. Files that open with an
underscore are parts.
"""

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

from sbml.data import imagenet32
from sbml.data._image_set import SPLITS, ImageSet, Options, Source
from sbml.data._pipeline import eval_batches, prefetch, spread, train_batches

__all__ = [
    "SOURCES",
    "SPLITS",
    "ImageSet",
    "Options",
    "Source",
    "eval_batches",
    "imagenet32",
    "load",
    "prefetch",
    "spread",
    "train_batches",
]

_DEFAULT = Options()

SOURCES: dict[str, Source] = {
    found.name: import_module(f"{__name__}.{found.name}").SOURCE
    for found in iter_modules(__path__)
    if not found.name.startswith("_")
}


def load(name: str, split: str, options: Options = _DEFAULT) -> ImageSet:
    """The images of ``split``, "train" or "test".

    Args:
      name: a source, or ``source:set`` where the source is a collection, as ``tfds:cifar10``.
      split: "train" or "test".
      options: where to look and how to cut; its ``dataset`` is taken from ``name``.

    Raises:
      ValueError: no such name or split; the message lists those there are.
    """
    key, colon, dataset = name.partition(":")
    source = SOURCES.get(key)
    if source is None or source.collection != bool(dataset) or bool(colon) != bool(dataset):
        choices = (f"{k}:<set>" if s.collection else k for k, s in sorted(SOURCES.items()))
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(choices)}.")
    return source.load(split, replace(options, dataset=dataset))
