"""The two ImageNets at 32x32: ``imagenet32:old`` and ``imagenet32:new``, from archives on disk.

    old   van den Oord et al. 2016: 1,281,149 and 49,999 images, {train,valid}_32x32.tar of PNGs.
          They were reduced without anti-aliasing. Papers up to about 2021 use this version, and
          so does the paper that this package implements.
    new   Chrabaszcz et al. 2017: 1,281,167 and 50,000 images, Imagenet32_{train,val}_npz.zip.
          They were reduced with anti-aliasing, so they are smoother. The bits/dim of one method are
          lower, by 0.26 in one comparison. Numbers of the two versions must not be compared.

``tfds:downsampled_imagenet/32x32`` and ``tfds:imagenet_resized/32x32`` are the same two sets.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sbml.core.progress import over
from sbml.core.types import Json
from sbml.data._cache import Add, load_or_build
from sbml.data._examples import ImageSet, Options, Source

ARCHIVES = {
    "old": {"train": "train_32x32.tar", "test": "valid_32x32.tar"},
    "new": {"train": "Imagenet32_train_npz.zip", "test": "Imagenet32_val_npz.zip"},
}
ORIGIN = {
    "old": "which image-net.org no longer offers, so you need a copy of it",
    "new": "which image-net.org gives to those who register",
}
COUNTS = {
    "old": {"train": 1_281_149, "test": 49_999},
    "new": {"train": 1_281_167, "test": 50_000},
}

SAME = {  # The name of a set without a config means its first config.
    "tfds:downsampled_imagenet": "imagenet32:old",
    "tfds:downsampled_imagenet/32x32": "imagenet32:old",
    "tfds:imagenet_resized/32x32": "imagenet32:new",
}


def version(name: str) -> str | None:
    """ "imagenet32:old" or "imagenet32:new", if that is what the data set ``name`` is."""
    pinned = re.sub(r":\d+\.\d+\.\d+$", "", name)  # tfds:<set>:<version>
    name = SAME.get(pinned, name)
    return name if name.startswith("imagenet32:") else None


def check_comparable(*names: str) -> None:
    """Check that the data sets ``names`` do not include both versions of ImageNet 32x32."""
    versions = sorted({found for name in names if (found := version(name))})
    if len(versions) > 1:
        raise ValueError(
            f"{' and '.join(versions)} are different images: their bits/dim differ by about 0.26 "
            "for one method and must not be compared"
        )


class Imagenet32(Source):
    """32x32 RGB, 256 levels, in the archive's order."""

    collection = True
    reads = ("manual_dir",)

    def load(self, split: str, options: Options) -> ImageSet:
        """The images of ``split`` of the version ``options.dataset``; "test" is the validation set.

        ``manual_dir`` holds the archive under its original name, until the set is prepared.
        """
        which = options.dataset
        if which not in ARCHIVES:
            raise ValueError(
                f"data.source=imagenet32:{which} is unknown: choose imagenet32:"
                f"{' or imagenet32:'.join(ARCHIVES)}; their images and their bits/dim differ"
            )
        path = options.cache / "imagenet32" / which / f"{split}.npy"
        images, _ = load_or_build(path, lambda add: _decode(which, split, options, add))
        return ImageSet(f"imagenet32:{which}", which, split, images)


def _decode(which: str, split: str, options: Options, add: Add) -> Json:
    file = ARCHIVES[which][split]
    archive = Path(options.manual_dir or ".").expanduser() / file
    if not options.manual_dir or not archive.is_file():
        raise ValueError(
            f"imagenet32:{which} is read from {file}, {ORIGIN[which]}: put it into a folder DIR "
            "and set --config.data.manual_dir=DIR"
            + (f" ({archive} is not there)" if options.manual_dir else "")
        )
    count, wanted = 0, COUNTS[which][split]
    images = _images(archive)
    for image in over(images, f"Decoding {file}", "image", wanted, compiles=False):
        add(image)
        count += 1
    if count != wanted:
        raise ValueError(f"{archive} holds {count} images instead of {wanted}: copy it again")
    return {}


def _images(archive: Path) -> Iterator[np.ndarray]:
    """The images in an archive: PNGs in the older version, rows of three planes in the newer one.

    A damaged archive can raise errors of many kinds. All become a ValueError that names it.
    """
    try:
        if archive.suffix == ".tar":
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isfile() and (file := tar.extractfile(member)):
                        with Image.open(io.BytesIO(file.read())) as image:
                            yield np.asarray(image.convert("RGB"))
            return
        with zipfile.ZipFile(archive) as files:
            for name in sorted(n for n in files.namelist() if n.endswith(".npz")):
                with np.load(io.BytesIO(files.read(name))) as arrays:
                    rows = arrays["data"]
                yield from rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except PermissionError:
        raise
    except MemoryError as error:
        raise ValueError(f"{archive} is damaged, or this machine has too little memory") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{archive} is damaged ({reason}): copy it again") from error
