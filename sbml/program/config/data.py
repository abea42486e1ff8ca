"""``config.data``: the images of a run, and how they become numbers in [-1, 1]."""

import math
from typing import Annotated, Any, ClassVar, Literal

from sbml import data
from sbml.core import registry
from sbml.data import CROPS, ImageSet, Options
from sbml.program.config.fields import Chosen, PositiveSize, Seed, among, errors_of, field, refusal

DEQUANTIZATIONS = ("uniform", "centre", "none")
PATHS = ("path", "cache_dir", "manual_dir")
# The fields that only some sources read, with their names in ``Options``.
OWN = {
    **{field: field for field in ("manual_dir", "path", "crop", "test_fraction")},
    "split_seed": "seed",
}


class Data(Chosen):
    """The images of a run, for every mode. A source of another package can have further fields
    here."""

    section: ClassVar[str] = "data"
    choice: ClassVar[str] = "source"

    source: str = field(
        "tfds:cifar10",
        "digits, photos, tfds:SET, imagenet32:old, imagenet32:new, image_folder, table, or your "
        "own as package.module:Name",
    )
    shape: tuple[PositiveSize, PositiveSize, PositiveSize] = field(
        (32, 32, 3), "height,width,channels; they must be those of the loaded images"
    )
    levels: int = field(256, "pixels are integers 0 .. levels - 1 in uint8", ge=2, lt=257)
    flip: bool = field(True, "random horizontal flips in training")
    dequantization: Annotated[str, among(DEQUANTIZATIONS)] = field(
        "uniform",
        "training data for a pixel k of L levels. uniform: 2 (k + u) / L - 1 with u uniform in "
        "[0, 1); centre: the same with u = 1/2, the bin's centre; none: 2 k / (L - 1) - 1, as in "
        "the authors' code",
    )
    cache_dir: str = field("", "folder of prepared arrays; empty: ~/.cache/sbml")
    manual_dir: str = field("", "folder of archives already on disk, for tfds and imagenet32")
    path: str = field("", "folder of image_folder, or file of table")
    crop: Annotated[str, among(CROPS)] = field(
        "center", "for image_folder; squash: both sides are scaled"
    )
    test_fraction: float = field(
        0.1,
        "fraction of test rows for table; for image_folder without subfolders train/ and test/, "
        "expected fraction of test images",
        gt=0,
        lt=1,
    )
    split_seed: Seed = field(0, "seed of the choice of test images or rows, and of random crops")
    validation: float = field(
        0.0,
        "fraction below 1, or number, of the training images that are held out for validation; "
        "crops of one photo are held out together; 0: none",
        ge=0,
        lt=2**31,
    )

    @classmethod
    def kind_of(cls, name: object) -> type[data.Source] | None:
        if not isinstance(name, str):
            return None
        with errors_of("config.data.source"):
            return data.source_of(name)[0]

    def check(self) -> None:
        """Check that an image is not huge, that a folder's images are square with 256 levels, and
        that ``validation`` is a fraction or a whole number."""
        height, width, channels = self.shape
        if math.prod(self.shape) > 2**26:  # No device has the memory for a network.
            raise refusal(self.name_of("shape"), self.shape, "at most 2^26 numbers in one image")
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
    def kind(self) -> Literal["centre", "uniform"]:
        """``centre`` if the training data are bin centres, or else ``uniform``, as in
        ``sbml.integers``."""
        return "centre" if self.dequantization == "centre" else "uniform"

    @property
    def options(self) -> Options:
        """The options for ``data.load``: where the images are, and how they are cut. A
        PermissionError says that only a file of the work directory names one of the paths."""
        for name in PATHS:
            registry.check_path(self.name_of(name), getattr(self, name))
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

    def check_mode(self, mode: str) -> None:
        """Check that the mode called ``mode`` uses the data of this source."""
        modes = data.source_of(self.source)[0].modes
        if modes and mode not in modes and ":" not in mode:
            raise ValueError(
                f"--mode={mode} is for images, and data.source={self.source} has none: use "
                f"--mode={','.join(modes)}"
            )

    def load(self, split: str) -> Any:
        """The examples of ``split``, an ``ImageSet`` or others."""
        reads = data.source_of(self.source)[0].reads
        for name, option in OWN.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and option not in reads:
                readers = [name for name, found in data.SOURCES.items() if option in found.reads]
                raise ValueError(
                    f"data.{name}={value} with data.source={self.source}: it is read for "
                    f"{' and '.join(readers)} only; leave it out, or set another source"
                )
        with errors_of("config.data"):
            return data.load(self.source, split, self.options, **self.own)

    def images(self, split: str) -> ImageSet:
        """The images of ``split``, which have the shape and the levels of the config."""
        images = self.load(split)
        if not isinstance(images, ImageSet):
            raise ValueError(
                f"data.source={self.source} gives {type(images).__name__} instead of an ImageSet: "
                "choose a source of images; for a table use --mode=table"
            )
        if images.shape != self.shape or images.levels != self.levels:
            raise ValueError(
                f"{self.source} has images of shape {images.shape} with {images.levels} levels, "
                f"the config says {self.shape} with {self.levels}; "
                f"set --config.data.shape={','.join(map(str, images.shape))} "
                f"--config.data.levels={images.levels}"
            )
        return images
