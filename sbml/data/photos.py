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

from sbml.data._cache import content_key
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
    raise FileNotFoundError(f"{name} is missing: pip install scikit-learn 'scikit-image>=0.22'.")


class Photos(Source):
    """32x32x3 crops, 256 levels; ids read ``photo@top,left/scale``, in the photo's pixels."""

    def load(self, split: str, options: Options) -> ImageSet:
        """The crops of ``split``; no option applies."""
        names, images, ids, scenes = PHOTOS[split], [], [], []
        for name in names:
            with Image.open(photo_path(name)) as opened:
                photo = opened.convert("RGB")
            # What a crop shows: its photo, or both views of one scene.
            scene = Path(name).stem.removesuffix("_left").removesuffix("_right")
            for scale in SCALES:
                side = SIZE * scale
                for top in range(0, photo.height - side + 1, SPACING):
                    for left in range(0, photo.width - side + 1, SPACING):
                        crop = photo.crop((left, top, left + side, top + side))
                        images.append(np.asarray(crop.reduce(scale)))
                        ids.append(f"{name}@{top},{left}/{scale}")
                        scenes.append(scene)
        files = (photo_path(name) for group in PHOTOS.values() for name in group)
        return ImageSet(
            "photos",
            content_key(files, PHOTOS, SIZE, SPACING, SCALES),
            split,
            np.stack(images),
            ids=tuple(ids),
            scenes=tuple(scenes),
            caution=f"overlapping crops of {len(names)} photos: the interval is for more crops of "
            "these photos, not for other photos",
        )
