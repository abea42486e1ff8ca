"""``config.data``: the images of a run, and how they become numbers in [-1, 1]."""

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
# The fields that only some sources read, with their names in ``Options``.
OWN = {
    **{field: field for field in ("manual_dir", "path", "crop", "test_fraction")},
    "split_seed": "seed",
}


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """The images of a run, which :meth:`images` reads.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "data"

    # digits, photos, tfds:<set>, imagenet32:old, imagenet32:new, image_folder
    source: str = text("tfds:cifar10")
    # height, width and channels; they must be those of the loaded images
    shape: tuple[int, ...] = integers(
        (32, 32, 3), least=1, below=2**16, each="height,width,channels"
    )
    levels: int = integer(256, least=2, below=257)  # pixels are integers 0 .. levels - 1 in uint8
    flip: bool = flag(True)  # random horizontal flips in training
    # Training data for a pixel k of L levels: uniform: 2 (k + u) / L - 1 with u uniform in [0, 1),
    # centre: the same with u = 1/2, the bin's centre; none: 2 k / (L - 1) - 1, as the authors
    dequantization: str = choice("uniform", DEQUANTIZATIONS)
    cache_dir: str = text("")  # folder of prepared arrays; empty: ~/.cache/sbml
    manual_dir: str = text("")  # folder of archives already on disk, for tfds and imagenet32
    path: str = text("")  # folder of image_folder
    crop: str = choice("center", CROPS)  # for image_folder; squash: both sides are scaled
    # expected fraction of test images, for image_folder without subfolders train/ and test/
    test_fraction: float = real(0.1, above=0, below=1)
    # seed of the choice of test images and of random crops, for image_folder
    split_seed: int = integer(0, below=2**32)
    # fraction below 1, or number, of the training images that are held out for validation; of
    # crops, whole photos are held out; 0: none
    validation: float = real(0.0, least=0, below=COUNT)

    def check(self) -> None:
        """Check that a folder's images are square with 256 levels, and that ``validation`` is a
        fraction or a whole number."""
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
    def kind(self) -> str:
        """``centre`` if the training data are bin centres, or else ``uniform``, as in
        ``sbml.integers``."""
        return "centre" if self.dequantization == "centre" else "uniform"

    @property
    def options(self) -> Options:
        """The options for ``data.load``: where the images are, and how they are cut."""
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
          ValueError: the images do not have this shape and these levels, or cannot be loaded; or
            a field is set that only other sources read.
        """
        self._check_source()
        images = data.load(self.source, split, self.options)
        if images.shape != self.shape or images.levels != self.levels:
            raise ValueError(
                f"{self.source} has images of shape {images.shape} with {images.levels} levels, "
                f"the config says {self.shape} with {self.levels}; "
                f"set --config.data.shape={','.join(map(str, images.shape))} "
                f"--config.data.levels={images.levels}"
            )
        return images

    def _check_source(self) -> None:
        """Check that no field is set that the source does not read.

        Raises:
          ValueError: one is, or a folder of images cannot have this number of channels.
        """
        source = self.source.partition(":")[0]
        if source in data.SOURCES:
            for field, option in OWN.items():
                value = getattr(self, field)
                if value == getattr(type(self), field) or option in data.SOURCES[source].reads:
                    continue
                readers = [name for name, found in data.SOURCES.items() if option in found.reads]
                raise ValueError(
                    f"data.{field}={value} with data.source={self.source}: it is read for "
                    f"{' and '.join(readers)} only; leave it out, or set another source"
                )
        if source == "image_folder" and self.shape[-1] not in (1, 3):
            raise refusal("data.shape", self.shape, "3 channels for RGB, or 1 for grey")
