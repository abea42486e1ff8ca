"""The examples of a split, and where they came from: images of one size and a finite number of
levels, or rows of a table (``sbml.data.table``). A part of the training examples can be held out,
to choose settings without those of the test."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from sbml.core.door import condition, typed
from sbml.core.types import Json

SPLITS = ("train", "test")
VALIDATION = "validation"  # the training images that are held out, if there are any

CROPS = ("center", "random", "squash")

E = TypeVar("E", bound="Examples")


@typed
@dataclass(frozen=True)
class Options:
    """How to find and cut images. Each source reads the fields it needs and ignores the others.

    Attributes:
      cache_dir: folder of prepared arrays; None: the variable SBML_CACHE, else ``~/.cache/sbml``.
      dataset: the set within a collection, ``cifar10`` of ``tfds:cifar10``; ``load`` fills it in.
      manual_dir: folder of the original archives of a data set (tfds, imagenet32).
      path: folder of images (image_folder).
      image_size: height and width to bring images to, in pixels (image_folder).
      channels: 3 for RGB, 1 for grey (image_folder).
      crop: how an image becomes square (image_folder): "center" and "random" scale the shorter side
        and cut the centre, or a place drawn once from ``seed`` and the file's name; "squash"
        scales both sides.
      test_fraction: expected fraction of held-out images, in (0, 1), where the folder has no
        ``train`` and ``test`` of its own (image_folder).
      seed: decides which images are held out and where random crops fall (image_folder).
      validation: number of training images to hold out for the split "validation", or their
        fraction if it is below 1; 0: none. ``load`` holds them out for every source, because the
        sources have only the splits "train" and "test".
    """

    cache_dir: str | os.PathLike[str] | None = None
    dataset: str = ""
    manual_dir: str | os.PathLike[str] | None = None
    path: str | os.PathLike[str] | None = None
    image_size: Annotated[int, condition("of at least 1", lambda n: n >= 1)] = 32
    channels: int = 3
    crop: Annotated[str, condition(f"of {', '.join(CROPS)}", CROPS.__contains__)] = "center"
    test_fraction: Annotated[float, condition("between 0 and 1", lambda f: 0 < f < 1)] = 0.1
    seed: int = 0
    validation: float = 0.0

    @property
    def cache(self) -> Path:
        """The folder of prepared arrays."""
        chosen = self.cache_dir or os.environ.get("SBML_CACHE") or "~/.cache/sbml"
        return Path(chosen).expanduser().absolute()


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one shape: what a training needs of its data.

    Attributes:
      unit: what an example is called in messages.
      each: the fields that hold something for each example.
      name: as given to ``load``, for instance ``tfds:cifar10``.
      version: that of the source, or a hash of the files from which the images were cut.
      split: the source's name of it (the test split of ImageNet is its "validation"), and which
        part of it this is if some training examples are held out.
      array: all examples ``(n, *shape)``; may be memory-mapped.
      ids: a readable name for each example, or None.
      caution: a warning for readers of a mean over these examples; empty if there is none.
    """

    unit: ClassVar[str] = "example"
    each: ClassVar[tuple[str, ...]] = ("array", "ids")

    name: str
    version: str
    split: str
    array: np.ndarray = field(repr=False)
    ids: tuple[str, ...] | None = field(default=None, repr=False, kw_only=True)
    caution: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example; of an image (height, width, channels)."""
        return self.array.shape[1:]

    @property
    def classes(self) -> tuple[str, ...]:
        """The sorted names of the classes of the examples; () if they have none."""
        return ()

    @property
    def groups(self) -> np.ndarray:
        """The group of each example ``(n,)``; a group is held out as a whole."""
        return np.arange(len(self))

    @cached_property
    def fingerprint(self) -> Json:
        """Plain values that identify the examples: their origin and the hash of every number.

        Keys: name, version, split, count, shape, levels (of images), sha256 (hex, of the array in C
        order) and id, the first 12 hex digits of the hash of all the others.
        """
        digest, rows = hashlib.sha256(), max(1, (1 << 24) // self.array[0].nbytes)
        for start in range(0, len(self), rows):
            digest.update(self.array[start : start + rows].tobytes())
        found: Json = {"name": self.name, "version": self.version, "split": self.split}
        found |= {"count": len(self), "shape": list(self.shape), **self._more()}
        found |= {"sha256": digest.hexdigest()}
        canonical = json.dumps(found, sort_keys=True).encode()
        return {**found, "id": hashlib.sha256(canonical).hexdigest()[:12]}

    def _more(self) -> Json:
        return {}


@dataclass(frozen=True, eq=False)
class ImageSet(Examples):
    """Images with ``levels`` integer values a channel, 0 .. levels - 1.

    Attributes:
      array: the images, uint8 (n, height, width, channels).
      levels: number of values a channel can take, 2 .. 256.
      scenes: the name of what each image shows, or None. Images of one scene, such as crops of one
        photo, are held out together.
      skipped: "file: reason" for each file that should be in the set but could not be read.
      labels: the name of the class of each image, an array of texts ``(n,)``, or None.
    """

    unit: ClassVar[str] = "image"
    each: ClassVar[tuple[str, ...]] = ("array", "ids", "scenes", "labels")

    levels: int = 256
    scenes: tuple[str, ...] | None = field(default=None, repr=False)
    skipped: tuple[str, ...] = field(default=(), repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        images, what = self.images, f"{self.name} ({self.split})"
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"{what} has {images.dtype} images of shape {images.shape}: give uint8 pixels of "
                "shape (n, h, w, c), none of them 0"
            )
        if not 2 <= self.levels <= 256:
            raise ValueError(f"{what}: levels={self.levels} does not fit uint8; use 2 .. 256.")
        if self.levels < 256 and (largest := images.max()) >= self.levels:
            raise ValueError(f"{what} has a pixel {largest}: set levels={largest + 1} or more.")
        for kind, names in (("ids", self.ids), ("scenes", self.scenes), ("labels", self.labels)):
            if names is not None and len(names) != len(images):
                raise ValueError(f"{what} has {len(names)} {kind} for {len(images)} images.")

    @property
    def images(self) -> np.ndarray:
        """The images, uint8 (n, height, width, channels)."""
        return self.array

    @property
    def classes(self) -> tuple[str, ...]:
        """The sorted names of the classes; () without labels."""
        return () if self.labels is None else tuple(np.unique(self.labels).tolist())

    @property
    def groups(self) -> np.ndarray:
        """The scene of each image; without scenes each image is one."""
        return super().groups if self.scenes is None else np.asarray(self.scenes)

    def _more(self) -> Json:
        return {"levels": self.levels}


@dataclass(frozen=True)
class Source(ABC):
    """Where examples come from. A source with fields of its own is a frozen dataclass.

    Attributes:
      collection: whether it holds many sets, named ``source:set``.
      reads: the fields of ``Options`` that it reads, apart from ``cache_dir`` and ``dataset``, the
        size and the channels. A config that sets another one is refused.
      modes: the modes of the program that use it, if it has no images; empty for images.
    """

    collection: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    modes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load(self, split: str, options: Options) -> Examples:
        """The examples of ``split``, "train" or "test"."""


def copies(examples: np.ndarray, train: np.ndarray, what: str) -> str:
    """A caution if some of the ``examples (n, ...)`` are among those that a model was trained on,
    byte for byte; empty if none is."""
    kept = {example.tobytes() for example in examples}
    found = kept.intersection(example.tobytes() for example in train)
    count = sum(example.tobytes() in found for example in examples) if found else 0
    if not count:
        return ""
    return (
        f"{count} of {len(examples)} {what} are also among those of the training, which a model "
        "can remember: for new ones expect a lower likelihood"
    )


def held_out(examples: Examples, size: float) -> np.ndarray:
    """Which of the training ``examples`` are held out for validation, bool ``(n,)``.

    Their groups, such as the scenes of images, are put in a random order that does not depend on
    the seed of a run, and the first ones are held out until they have enough examples.

    Args:
      examples: all training examples.
      size: how many at least, or below 1 their fraction, rounded to a number of examples.
    """
    n, unit = len(examples), examples.unit
    wanted = size if size >= 1 else round(size * n)
    names, group, sizes = np.unique(examples.groups, return_inverse=True, return_counts=True)
    order = np.random.RandomState(0).permutation(len(names))
    count = 1 + np.searchsorted(np.cumsum(sizes[order]), wanted)
    if wanted < 1 or count >= len(names):
        raise ValueError(
            f"data.validation={size:g}: {examples.name} has {n} training {unit}s"
            + (f" of {len(names)} scenes, each held out or not" if len(names) < n else "")
            + "; hold out one at least, and leave one to train on"
        )
    return np.isin(group, order[:count])


def part(examples: E, size: float, held: bool) -> E:
    """The examples that :func:`held_out` chooses, or the rest, in their order: a copy in memory."""
    chosen, groups = np.flatnonzero(held_out(examples, size) == held), examples.groups
    fields: dict[str, Any] = {"split": f"{examples.split}, {'held out' if held else 'the rest'}"}
    for name in examples.each:
        if isinstance(whole := getattr(examples, name), np.ndarray):
            fields[name] = whole[chosen]
        elif whole is not None:
            fields[name] = tuple(whole[i] for i in chosen)
    if (count := len(set(groups))) < len(groups):
        few = f"{len(set(groups[chosen]))} of {count} scenes"
        fields["caution"] = f"{few}; {examples.caution}"
    return replace(examples, **fields)
