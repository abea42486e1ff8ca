"""``config.data``: which images, and how they become numbers in [-1, 1]."""

import dataclasses
from typing import ClassVar

from sbml import data
from sbml.data import ImageSet, Options
from sbml.data.image_folder import CROPS
from sbml.experiment.fields import (
    COUNT,
    Section,
    choice,
    flag,
    integer,
    integers,
    real,
    refusal,
    text,
)

DEQUANTIZATIONS = ("uniform", "centre", "none")


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """The images of a run; they are read by :meth:`images`.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "data"

    # digits, photos, tfds:<set>, imagenet32:old, imagenet32:new, image_folder
    source: str = text("tfds:cifar10")
    # height, width, channels; the loaded set must agree
    shape: tuple[int, ...] = integers(
        (32, 32, 3), least=1, below=2**16, each="height,width,channels"
    )
    levels: int = integer(256, least=2, below=257)  # integers 0 .. levels - 1, held as uint8
    flip: bool = flag(True)  # random horizontal flips in training
    # centre: of the bin, fits truncated_normal; none: k / (levels - 1), as the authors
    dequantization: str = choice("uniform", DEQUANTIZATIONS)
    cache_dir: str = text("")  # prepared arrays; empty: ~/.cache/sbml
    manual_dir: str = text("")  # archives already on disk, for tfds and imagenet32
    path: str = text("")  # folder of image_folder
    crop: str = choice("center", CROPS)  # of image_folder; squash: both sides scaled
    # expected share of held-out images, of image_folder without train/ and test/ subfolders
    test_fraction: float = real(0.1, above=0, below=1)
    # of image_folder: which images are held out, random crops
    split_seed: int = integer(0, below=2**32)
    # training images held out, of crops whole photos: a fraction, or a number of them; 0: none
    validation: float = real(0.0, least=0, below=COUNT)

    def check(self) -> None:
        """A folder's images are square and have 256 levels; a number of images is whole."""
        height, width, channels = self.shape
        if self.source == "image_folder" and (height != width or self.levels != 256):
            raise ValueError(
                f"data.shape={height},{width},{channels} with data.levels={self.levels}: images of "
                "a folder are made square, of 256 levels; set "
                "--config.data.shape=SIZE,SIZE,CHANNELS --config.data.levels=256"
            )

        if self.validation >= 1 and self.validation % 1:
            needs = "a fraction below 1 or a whole number of images"
            raise refusal(self.name_of("validation"), self.validation, needs)

    @property
    def options(self) -> Options:
        """How to find and cut the images."""
        return Options(
            cache_dir=self.cache_dir or None,
            manual_dir=self.manual_dir or None,
            path=self.path or None,
            image_size=self.shape[0],
            channels=self.shape[-1],
            crop=self.crop,
            test_fraction=self.test_fraction,
            seed=self.split_seed,
            validation=self.validation,
        )

    def images(self, split: str) -> ImageSet:
        """The images of ``split``.

        Raises:
          ValueError: if they are not of this shape and these levels.
        """
        images = data.load(self.source, split, self.options)
        if images.shape != self.shape or images.levels != self.levels:
            raise ValueError(
                f"{self.source} has images of shape {images.shape} with {images.levels} levels, "
                f"the config says {self.shape} with {self.levels}; "
                f"set --config.data.shape={','.join(map(str, images.shape))} "
                f"--config.data.levels={images.levels}"
            )
        return images
