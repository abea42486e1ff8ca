"""Image sets and tables by name, and their batches.

    images = load("digits", "train")             # or photos, image_folder, tfds:cifar10 ...
    batches = train_batches(images, 128, seed=0)
    batches[1000]                                # the uint8 batch of step 1000

A source is a class derived from ``Source``. Files whose names begin with an
underscore are private.

May import: core.
"""

from dataclasses import replace
from typing import Any

from sbml.core.registry import Registry, hint, subclass
from sbml.data import imagenet32 as imagenet32
from sbml.data._examples import CROPS as CROPS
from sbml.data._examples import SPLITS as SPLITS
from sbml.data._examples import VALIDATION as VALIDATION
from sbml.data._examples import Examples as Examples
from sbml.data._examples import ImageSet as ImageSet
from sbml.data._examples import Options as Options
from sbml.data._examples import Source as Source
from sbml.data._examples import copies as copies
from sbml.data._examples import part
from sbml.data._pipeline import prefetch as prefetch
from sbml.data._pipeline import spread as spread
from sbml.data._pipeline import train_batches as train_batches

NO_VALIDATION = (
    "{} with data.validation=0: no training images are held out; set --config.data.validation to "
    "the fraction or number that the training used"
)

SOURCES = Registry(
    "image set",
    {
        "digits": "sbml.data.digits:Digits",
        "image_folder": "sbml.data.image_folder:ImageFolder",
        "imagenet32": "sbml.data.imagenet32:Imagenet32",
        "photos": "sbml.data.photos:Photos",
        "table": "sbml.data.table:Table",
        "tfds": "sbml.data.tfds:Tfds",
    },
    subclass(Source),
)


def source_of(name: str) -> tuple[type[Source], str]:
    """The class of the source ``name``, and the name of the set in it if it is a collection."""
    short, colon, dataset = name.partition(":")
    if short not in SOURCES.places and colon:
        return SOURCES[name], ""
    kind = SOURCES[short] if short in SOURCES.places else None
    if kind is None or not kind.collection == bool(dataset) == bool(colon):
        choices = (f"{k}:<set>" if SOURCES[k].collection else k for k in sorted(SOURCES))
        remedy = f"choose one of {', '.join(choices)}"
        raise ValueError(f"unknown data set {name!r}: {hint(name, SOURCES, remedy)}")
    return kind, dataset


def load(name: str, split: str, options: Options = Options(), **own: object) -> Any:
    """The examples of ``split``: an :class:`ImageSet`, or the ``Rows`` of a table.

    Args:
      name: a source, ``source:set`` where the source is a collection, as ``tfds:cifar10``, or
        ``package.module:Name`` for a source of another package.
      split: "train", "test" or, with ``options.validation``, "validation": a part of the training
        examples, which "train" then lacks.
      options: where to look and how to cut; its ``dataset`` is taken from ``name``.
      own: the fields of the source's class.
    """
    if split not in (*SPLITS, VALIDATION):
        raise ValueError(f"unknown split {split!r}: give one of {', '.join(SPLITS)}, {VALIDATION}")
    kind, dataset = source_of(name)
    source, options = kind(**own), replace(options, dataset=dataset)
    if split == VALIDATION and not options.validation:
        raise ValueError(NO_VALIDATION.format(f"split {split!r} of {name}"))
    if split == "test" or not options.validation:
        return source.load(split, options)
    held = split == VALIDATION
    return part(source.load("train" if held else split, options), options.validation, held)
