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
from sbml.data._image_set import SPLITS, VALIDATION, ImageSet, Options, Source
from sbml.data._pipeline import eval_batches, prefetch, spread, train_batches
from sbml.data._validation import part

__all__ = [
    "SOURCES",
    "SPLITS",
    "VALIDATION",
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

NO_VALIDATION = (
    "{} with data.validation=0: no training images are held out; set --config.data.validation to "
    "the fraction or number that the training used"
)

SOURCES: dict[str, Source] = {
    found.name: import_module(f"{__name__}.{found.name}").SOURCE
    for found in iter_modules(__path__)
    if not found.name.startswith("_")
}


def load(name: str, split: str, options: Options = _DEFAULT) -> ImageSet:
    """The images of ``split``.

    Args:
      name: a source, or ``source:set`` where the source is a collection, as ``tfds:cifar10``.
      split: "train", "test" or, with ``options.validation``, "validation": a part of the training
        images that "train" is then without.
      options: where to look and how to cut; its ``dataset`` is taken from ``name``.

    Raises:
      ValueError: no such name or split, where the message lists those there are; no images in the
        validation part, or none beside it.
    """
    key, colon, dataset = name.partition(":")
    source = SOURCES.get(key)
    if source is None or source.collection != bool(dataset) or bool(colon) != bool(dataset):
        choices = (f"{k}:<set>" if s.collection else k for k, s in sorted(SOURCES.items()))
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(choices)}.")
    options = replace(options, dataset=dataset)
    if split == VALIDATION and not options.validation:
        raise ValueError(NO_VALIDATION.format(f"split {split!r} of {name}"))
    if split == "test" or not options.validation:
        return source.load(split, options)
    held = split == VALIDATION
    return part(source.load("train" if held else split, options), options.validation, held)
