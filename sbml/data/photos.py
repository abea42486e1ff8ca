"""32x32 RGB crops of the photos inside the scikit-learn and scikit-image wheels.

Windows of 32, 64 and 128 pixels are cut every 32 pixels from each photo and averaged down to 32x32,
the shape of CIFAR-10's images. Whole photos are held out for the test and for validation, so a
network is never trained on a pixel of a test photo. Grey images, drawings, and images of
microscopes and telescopes are not used. Nothing is downloaded.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from sbml.data._cache import Add, content_key, load_or_build
from sbml.data._examples import ImageSet, Options, Source

PHOTOS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/coffee.png",
        "skimage/data/motorcycle_left.png",  # two views of one scene: on the same side
        "skimage/data/motorcycle_right.png",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
    "test": (
        "skimage/data/chelsea.png",
        "sklearn/datasets/images/china.jpg",
    ),
}
SIZE = 32
SPACING = 32
SCALES = (1, 2, 4)


def photo_path(name: str) -> Path:
    """Where the installed package keeps the photo, found without importing the package."""
    package, _, inside = name.partition("/")
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        if (path := Path(folder, inside)).is_file():
            return path
    raise FileNotFoundError(
        f"{name} is not installed: pip install scikit-learn 'scikit-image>=0.22'."
    )


def _build(names: tuple[str, ...], add: Add) -> dict[str, list[str]]:
    ids = []
    for name in names:
        with Image.open(photo_path(name)) as opened:
            photo = opened.convert("RGB")
        for scale in SCALES:
            side = SIZE * scale
            for top in range(0, photo.height - side + 1, SPACING):
                for left in range(0, photo.width - side + 1, SPACING):
                    crop = photo.crop((left, top, left + side, top + side))
                    add(np.asarray(crop.reduce(scale)))
                    ids.append(f"{name}@{top},{left}/{scale}")
    return {"ids": ids}


class Photos(Source):
    """32x32x3 crops, 256 levels; ids read ``photo@top,left/scale``, in the photo's pixels."""

    def load(self, split: str, options: Options) -> ImageSet:
        """The crops of ``split``. Of ``options``, only ``cache_dir`` is used."""
        names = PHOTOS[split]
        files = (photo_path(name) for group in PHOTOS.values() for name in group)
        version = content_key(files, PHOTOS, SIZE, SPACING, SCALES)
        path = options.cache / "photos" / version / f"{split}.npy"
        images, notes = load_or_build(path, lambda add: _build(names, add))
        caution = (
            f"overlapping crops of {len(names)} photos: the interval is for more crops of these "
            "photos, not for other photos"
        )
        ids = tuple(notes["ids"])
        stems = (Path(crop.rpartition("@")[0]).stem for crop in ids)
        # What a crop shows: its photo, or both views of one scene.
        scenes = tuple(stem.removesuffix("_left").removesuffix("_right") for stem in stems)
        return ImageSet("photos", version, split, images, ids=ids, scenes=scenes, caution=caution)
