"""A folder of the user's own images, scaled to one size.

All image files in the folder and its subfolders are used, also those that links lead to. If there
are subfolders ``train`` and ``test``, they are the splits. Otherwise a hash of the relative path of
a file decides its split, so new files do not change the split of the others. A warning names the
files that cannot be used, with the reason, and another one counts the files with other suffixes.
Names that begin with a dot are ignored. If each image lies in a subfolder, of ``train`` or ``test``
if there are these, the name of the topmost one is its class.
"""

import hashlib
import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE

from sbml.core.progress import over
from sbml.core.types import Json
from sbml.data._cache import Add, content_key, load_or_build
from sbml.data._examples import ImageSet, Options, Source

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".gif")
    + (".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
MODES = {1: "L", 3: "RGB"}
_NAMED_AT_MOST = 10

log = logging.getLogger(__name__)


class ImageFolder(Source):
    """image_size x image_size images, grey or RGB, 256 levels; ids are paths within the folder."""

    reads = ("path", "crop", "test_fraction", "seed")

    def load(self, split: str, options: Options) -> ImageSet:
        """The images of ``split``, in the order of their paths.

        The EXIF orientation is applied, 16-bit channels keep their upper 8 bits, CMYK becomes RGB
        by Pillow's formula, and of an animation the first frame is taken. These files are skipped,
        logged as a warning, and listed in the set's ``skipped``: files that Pillow cannot read,
        FIFOs and devices, and images with transparent pixels, with 32-bit pixels, or with 16-bit
        pixels that are all below 2^12, such as those of a 12-bit camera. The set's ``caution`` says
        how many images had more than 8 bits, were enlarged, or were converted from colour to grey
        or from grey to RGB.
        """
        if options.channels not in MODES:
            shape = f"data.shape={options.image_size},{options.image_size},{options.channels}"
            raise ValueError(f"{shape}: need 3 channels for RGB, or 1 for grey")
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
        path = options.cache / "image_folder" / version / f"{split}_depths.npy"
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
            "have more than 8 bits a channel: the upper 8 are used, and bits/dim are of "
            "these": notes["deep"],
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
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _inside(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _visible(
    top: Path, closed: list[str], folders: set[str], again: list[str]
) -> Iterator[tuple[Path, str]]:
    """Every file under ``top`` and its real path, except names that begin with a dot.

    Links to folders are followed last. The real path of each folder is added to ``folders``. A
    folder is left out if its real path is in ``folders`` already; folders and files are left out if
    their real path lies in one of ``closed``. If a link led there, it is added to ``again``.
    """
    starts = deque([top])
    while starts:
        for folder, subfolders, files in os.walk(starts.popleft()):
            if (real := os.path.realpath(folder)) in folders or _inside(real, closed):
                again += [folder] if os.path.islink(folder) else []
                subfolders.clear()
                continue
            folders.add(real)
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            starts.extend(p for s in subfolders if (p := Path(folder, s)).is_symlink())
            for file in sorted(f for f in files if not f.startswith(".")):
                path, target = Path(folder, file), os.path.join(real, file)
                if path.is_symlink() and _inside(target := os.path.realpath(path), closed):
                    again.append(str(path))
                else:
                    yield path, target


def _files(root: Path) -> Iterator[Path]:
    """Every file under ``root`` once, through links too.

    An image that really lies in ``train`` or ``test`` belongs there, whatever links lead to it. If
    several paths lead to another image, a path in ``train`` or ``test`` is chosen, or else the path
    without a link. So a new link to a file under ``root`` does not change the name of an image. The
    number of links that are not used is logged.
    """
    own = {top: os.path.realpath(top) for top in (root / "train", root / "test") if top.is_dir()}
    closed = {top: [place for other, place in own.items() if other != top] for top in (*own, root)}
    if inner := [top.name for top, place in own.items() if _inside(place, closed[top])]:
        raise ValueError(
            f"data.path={root}: the folder {inner[0]} lies in the folder of the other split, since "
            f"they are {' and '.join(own.values())}: make them two separate folders"
        )
    chosen: dict[str | tuple[int, int], Path] = {}  # the path of each image
    visited: set[str] = set()
    again: list[str] = []
    for top in (*own, root):
        folders = set(visited) if top == root else set[str]()
        found = _visible(top, closed[top], folders, again)
        for path, real in sorted(found, key=lambda pair: pair[0].is_symlink()):
            if path.suffix.lower() not in SUFFIXES or not os.path.exists(real):
                yield path  # If it is a broken link, opening it gives the reason.
                continue
            # All paths to one file have the same real path or, if they are hard links, inode.
            status = os.stat(real)
            place = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real
            if (first := chosen.setdefault(place, path)) == path:
                yield path
            elif top in own and not first.is_relative_to(top):
                names = (p.relative_to(root).as_posix() for p in (first, path))
                raise ValueError(
                    f"data.path={root}: {' and '.join(map(printable, names))} are one image: "
                    "remove one of the two, so that no image is in both splits"
                )
            elif top in own or not own:
                again.append(str(path))
        visited |= folders
    if again:
        where = printable(str(root))
        log.warning(
            "%d links in %s lead to files that it contains anyway: not used", len(again), where
        )


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
    ids, skipped, enlarged, recoloured, deep = [], [], 0, 0, 0
    size = options.image_size, options.image_size
    for name in over(names, "Decoding images", "image", len(names), compiles=False):
        try:
            decoded, depth = _decode(root / name)
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
        deep += depth > 8
    if not ids:
        raise ValueError(f"None of {len(names)} images is usable. The first: {skipped[0]}")
    counts = {"enlarged": enlarged, "recoloured": recoloured, "deep": deep}
    return {"ids": ids, "skipped": skipped, **counts}


def special(path: Path) -> bool:
    """Whether ``path`` is a FIFO, a device or a socket, for which reading could wait for ever."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # For example a broken link: opening it gives the reason.
        return False


def _is_grey(image: Image.Image) -> bool:
    """Whether no pixel has a colour, whatever the file's mode."""
    if image.mode in ("1", "L", "LA"):
        return True
    return not np.ptp(np.asarray(image.convert("RGB")), axis=-1).any()


def depth_of(path: Path, opened: Image.Image) -> int:
    """The number of bits of a channel in the file. Of several channels with 16 bits, Pillow keeps
    only the upper 8 bits, and its mode does not show that there were more."""
    if opened.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    if opened.format == "JPEG2000":  # The segment SIZ begins the code stream.
        return 1 + (path.read_bytes().partition(b"\xff\x4f\xff\x51")[2][38] & 0x7F)
    if opened.format == "AVIF":  # A flag of the box av1C is set for 10 and for 12 bits.
        return 10 if path.read_bytes().partition(b"av1C")[2][2] & 0x40 else 8
    layout = opened.tile[0][3] if opened.format in ("PPM", "TIFF") else ""  # type: ignore[attr-defined]
    if opened.format == "TIFF":
        depth = max(opened.tag_v2.get(BITSPERSAMPLE, (1,)))  # type: ignore[attr-defined]
        if depth == 16 and opened.mode in ("RGB", "RGBA", "CMYK") and "16" not in str(layout):
            raise ValueError(
                "16-bit planes one after the other, which Pillow reads as 8-bit pixels: save the "
                "image with 8 bits a channel, or with the channels of a pixel together"
            )
        return depth
    if isinstance(layout, tuple):  # a PPM's mode and largest value
        return int(layout[1]).bit_length()
    return 16 if opened.mode.startswith("I") else 8


def _decode(path: Path) -> tuple[Image.Image, int]:
    """The first frame, upright, 8 bits a channel; and how many bits a channel has in the file."""
    if special(path):
        raise ValueError("a FIFO, device or socket: put the image itself there")
    with Image.open(path) as opened:
        scaled = opened.format == "PPM" and opened.mode == "I"  # by Pillow, to 0 ... 65535
        depth = depth_of(path, opened)
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F") and not scaled:
        raise ValueError(f"32-bit pixels (mode {image.mode}): save the image with 8 bits a channel")
    few, most = False, 0
    if image.mode.startswith("I;16") or scaled:  # Pillow would clip at 255
        deep = np.asarray(image).astype(np.uint16)
        most = int(deep.max())
        few = 0 < most < 2**12
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    elif depth == 16:
        colours = np.asarray(image)[..., : 3 if image.mode == "RGBA" else None]
        # Pillow keeps v // 256, or v / 257 rounded. If it keeps 0, then v may be up to 255.
        few, most = bool(colours.max() <= 2**4), 257 * int(colours.max()) + 255
    if few:
        raise ValueError(
            f"16-bit pixels, none above {most}, would be nearly black with 8 bits. If these "
            "are 12 bits of a camera, scale them to 0 ... 65535"
        )
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise ValueError("transparent pixels: flatten the image onto a background")
    return image, depth
