"""A folder of the user's own images, scaled to one size.

All image files in the folder and its subfolders are used. If there are subfolders ``train`` and
``test``, they are the splits. Otherwise a hash of the relative path of a file decides its split, so
new files do not change the split of the others. Links in the folder are refused, because one image
could be in both splits; the folder itself may be a link. A warning names the files that cannot be
used, with the reason, and another one counts the files with other suffixes. Names that begin with a
dot are ignored. If each image lies in a subfolder, of ``train`` or ``test``
if there are these, the name of the topmost one is its class.
"""

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE

from sbml.core.progress import over
from sbml.core.scalars import escaped
from sbml.core.types import Json
from sbml.data._cache import Add, content_key, load_or_build
from sbml.data._examples import ImageSet, Options, Source

# The formats that are read, by Pillow's names, and the suffixes of these and of other images.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF")  # MPO: JPEG of some cameras
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif "
    ".avif .heic .heif .jp2 .j2k .jxl .pbm .pgm .pnm .ppm .tga".split()
)
MODES = {1: "L", 3: "RGB"}
_NAMED_AT_MOST = 10

log = logging.getLogger(__name__)


class ImageFolder(Source):
    """image_size x image_size images, grey or RGB, 256 levels; ids are paths within the folder."""

    reads = ("path", "crop", "test_fraction", "seed")

    def load(self, split: str, options: Options) -> ImageSet:
        """The images of ``split``, in the order of their paths.

        The EXIF orientation is applied, CMYK becomes RGB by Pillow's formula, and of a GIF the
        first frame is taken. These files are skipped, logged as a warning, and listed in the set's
        ``skipped``: files that Pillow cannot read, or of a format other than ``FORMATS``, FIFOs and
        devices, and images with several frames, with transparent pixels, or with more than 8 bits a
        channel. The set's ``caution`` says how many images were enlarged, or were converted from
        colour to grey or from grey to RGB.
        """
        if options.channels not in MODES:
            shape = f"data.shape={options.image_size},{options.image_size},{options.channels}"
            raise ValueError(f"{shape}: give 3 channels for RGB, or 1 for grey")
        if options.path is None:
            raise ValueError("image_folder needs a folder: set --config.data.path=DIR")
        root = Path(options.path).expanduser().absolute()
        if not root.is_dir():
            raise ValueError(f"data.path={root} is not a folder: set it to a folder of images")
        names = _members(root, split, options)
        choices = (names, split, options.image_size, options.channels, options.crop, options.seed)
        read = [root / n for n in names if not special(root / n)]
        files = over(read, "Reading files", "file", len(read), compiles=False)
        version = content_key(files, *choices)
        path = options.cache / "image_folder" / version / f"{split}.npy"
        images, notes = load_or_build(path, lambda add: _build(root, names, options, add))
        if skipped := tuple(notes["skipped"]):
            notes_file, more = path.with_suffix(".json"), len(skipped) - _NAMED_AT_MOST
            log.warning(
                "%d of %d %s files not used:\n  %s%s\nThis is stored: to try them again, for "
                "example with another version of Pillow, remove %s",
                len(skipped),
                len(names),
                split,
                "\n  ".join(skipped[:_NAMED_AT_MOST]),
                f"\n  and {more} more, all in {notes_file}" if more > 0 else "",
                path.parent,
            )
        ids = tuple(notes["ids"])
        recoloured = (
            "are in colour and were made grey: the bits/dim are of grey images"
            if options.channels == 1
            else "are grey and were made RGB: their three channels are equal, so bits/dim are "
            "lower than those of colour images"
        )
        cautions = {
            "are smaller than data.shape and were enlarged: interpolated pixels are easy to "
            "predict, so bits/dim are lower than those of images of that size": notes["enlarged"],
            recoloured: notes["recoloured"],
        }
        said = [f"{n} of {len(ids)} {split} images {text}" for text, n in cautions.items() if n]
        if caution := "; ".join(said):
            log.warning(caution)
        return ImageSet(
            "image_folder",
            version,
            split,
            images,
            ids=ids,
            skipped=skipped,
            caution=caution,
            labels=_labels(ids, split),
        )


def _labels(ids: tuple[str, ...], split: str) -> np.ndarray | None:
    """The class ``(n,)`` of each image: the name of its topmost folder within ``train``, ``test``
    or the whole folder. None if an image lies in no such folder."""
    paths = [id.removeprefix(f"{split}/").split("/") for id in ids]
    return np.array([path[0] for path in paths]) if all(len(p) > 1 for p in paths) else None


def printable(name: str) -> str:
    """``name`` with an escape such as \\x1b for each character that does not print.

    The name of a file may contain any bytes, also line ends, control sequences of a terminal, and
    bytes that are not text.
    """
    return escaped(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _files(root: Path) -> Iterator[Path]:
    """Every file under ``root``, except names that begin with a dot; links are refused."""
    seen: dict[tuple[int, int], Path] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in sorted(name for name in (*subfolders, *files) if not name.startswith(".")):
            path = Path(folder, name)
            status = path.lstat()
            first = seen.setdefault((status.st_dev, status.st_ino), path)
            if path.is_symlink() or first != path:
                names = [printable(str(each.relative_to(root))) for each in (path, first)]
                kind = "a link" if first == path else f"a hard link of {names[1]}"
                raise ValueError(
                    f"data.path={root}: {names[0]} is {kind}: put the images themselves there "
                    "(data.path itself may be a link)"
                )
            if name not in subfolders:
                yield path


def _members(root: Path, split: str, options: Options) -> list[str]:
    """Paths relative to ``root`` of the image files of ``split``, sorted."""
    files = sorted(_files(root))
    names = [p.relative_to(root).as_posix() for p in files if p.suffix.lower() in SUFFIXES]
    others = Counter(printable(p.suffix.lower()) or "none" for p in files)
    if unused := {suffix: n for suffix, n in others.items() if suffix not in SUFFIXES}:
        listed = ", ".join(f"{suffix} ({n})" for suffix, n in sorted(unused.items()))
        log.warning(
            "%d files in %s have no suffix of an image and are not used: %s",
            sum(unused.values()),
            printable(str(root)),
            listed,
        )
    folders = sorted(p.name for p in root.iterdir() if p.is_dir())
    own = [f for f in folders if f.lower() in ("train", "test")]
    if wrong := [f for f in own if f != f.lower()]:
        raise ValueError(
            f"data.path={root} has a subfolder {wrong[0]}: call it {wrong[0].lower()} to use its "
            "images as that split, or give it another name to split them at random."
        )
    if len(own) == 1:
        raise ValueError(
            f"data.path={root} has a subfolder {own[0]} only: add the other of train and test, or "
            f"set data.path={root / own[0]} to have its images split."
        )
    if own:
        members = [n for n in names if n.startswith(f"{split}/")]
        if outside := sum(not n.startswith(("train/", "test/")) for n in names):
            where = printable(str(root))
            log.warning("%d images in %s lie outside train and test: not used", outside, where)
    else:
        held = {n: _uniform("split", options.seed, n) < options.test_fraction for n in names}
        members = [n for n in names if held[n] == (split == "test")]
    if not members:
        raise ValueError(
            f"data.path={root} has {len(names)} images, none of them for {split!r}: add some, "
            f"make subfolders train and test, or change data.test_fraction={options.test_fraction}."
        )
    return members


def _uniform(*key: object) -> float:
    """A number in [0, 1) that depends on ``key`` alone, and is the same on every machine."""
    digest = hashlib.sha256(os.fsencode("/".join(map(str, key)))).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _build(root: Path, names: list[str], options: Options, add: Add) -> Json:
    ids, skipped, enlarged, recoloured = [], [], 0, 0
    size = options.image_size, options.image_size
    for name in over(names, "Decoding images", "image", len(names), compiles=False):
        try:
            decoded = _decode(root / name)
            image = decoded.convert(MODES[options.channels])
            if options.crop == "squash":
                image = image.resize(size, Image.Resampling.LANCZOS)
            else:
                random = options.crop == "random"
                x, y = (_uniform(axis, options.seed, name) if random else 0.5 for axis in "xy")
                image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=(x, y))
        except Exception as error:  # Pillow's decoders raise many kinds on broken files
            skipped.append(f"{printable(name)}: {printable(str(error))}")
            continue
        add(np.asarray(image).reshape(image.height, image.width, options.channels))
        ids.append(printable(name))
        enlarged += min(decoded.size) < options.image_size
        recoloured += _is_grey(decoded) == (options.channels == 3)
    if not ids:
        raise ValueError(f"None of {len(names)} images is usable. The first: {skipped[0]}")
    return {"ids": ids, "skipped": skipped, "enlarged": enlarged, "recoloured": recoloured}


def special(path: Path) -> bool:
    """Whether ``path`` is a FIFO, a device or a socket, for which reading could wait for ever."""
    return not stat.S_ISREG(path.stat().st_mode)


def _is_grey(image: Image.Image) -> bool:
    """Whether no pixel has a colour, whatever the file's mode."""
    if image.mode in ("1", "L", "LA"):
        return True
    return not np.ptp(np.asarray(image.convert("RGB")), axis=-1).any()


def check_opened(path: Path, opened: Image.Image, animated: bool = False) -> None:
    """Refuse a format other than ``FORMATS``, several frames, unless of a GIF or MPO that may be
    ``animated``, and more than 8 bits a channel.

    The bits are read from the file: of several channels with 16 bits Pillow keeps only the upper 8,
    and its mode does not show that there were more.
    """
    if opened.format not in FORMATS:
        raise ValueError(f"a file of the format {opened.format}: save it as PNG")
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and not (animated and opened.format in ("GIF", "MPO")):
        raise ValueError(f"it has {frames} frames: save each as an image of its own")
    depth = 8
    if opened.format == "PNG":
        with path.open("rb") as file:
            depth = file.read(25)[24]
    elif opened.format == "TIFF":
        depth = max(opened.tag_v2.get(BITSPERSAMPLE, (1,)))  # type: ignore[attr-defined]
    if depth > 8:
        raise ValueError(f"it has {depth} bits a channel: save the image with 8")


def _decode(path: Path) -> Image.Image:
    """The image, upright."""
    if special(path):
        raise ValueError("a FIFO, device or socket: put the image itself there")
    with Image.open(path) as opened:
        check_opened(path, opened, animated=True)
        image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise ValueError("transparent pixels: flatten the image onto a background")
    return image
