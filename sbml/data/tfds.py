"""Any image set of TensorFlow Datasets: ``tfds:cifar10``, ``tfds:downsampled_imagenet/32x32`` ...

TFDS downloads or finds the archives, checks their hashes and prepares them once, which needs
TensorFlow. Each split is then decoded once into an array, and from there on only the array is read:
neither TFDS nor TensorFlow is needed, and a batch comes 20 to 400 times faster.

https://www.tensorflow.org/datasets
"""

import contextlib
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sbml.core.progress import Bar
from sbml.core.types import Json
from sbml.data._cache import Add, load_or_build
from sbml.data._examples import ImageSet, Options, Source

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

# set, set/config, set:1.2.3 or set/config:1.2.3
_NAME = re.compile(r"\w+(/[\w+-][\w.+-]*)?(:\d+\.\d+\.\d+)?")

# Examples read in one call: single reads took a third of the decoding's time.
_AT_ONCE = 1000


class Tfds(Source):
    """The features ``image``, uint8, 256 levels, and ``label`` of a TFDS set, in TFDS's order."""

    collection = True
    reads = ("manual_dir",)

    def load(self, split: str, options: Options) -> ImageSet:
        """The images of ``split`` of ``options.dataset``.

        "test" is the split of that name or, where there is none, "validation". ``cache_dir`` and
        ``manual_dir`` apply. The latter holds the set's archives under their original names; for
        Fashion-MNIST, Debian's ``/usr/share/datasets/fashion-mnist`` can be used.
        """
        name = options.dataset
        if not _NAME.fullmatch(name):
            raise ValueError(f"Unknown TFDS name {name!r}: write set, set/config or set:1.2.3.")
        path = _home(name, options) / f"{split}.npy"
        images, notes = load_or_build(path, lambda add: _decode(name, split, options, add))
        labels = np.asarray(notes["labels"]) if notes.get("labels") else None
        return ImageSet(f"tfds:{name}", notes["version"], notes["split"], images, labels=labels)


def _home(name: str, options: Options) -> Path:
    return options.cache / "tfds" / name.replace(":", "/")


def _archives(builder: "DatasetBuilder", options: Options) -> Path:
    """The folder in which TFDS finds the archives of ``options.manual_dir``."""
    folder = Path(options.manual_dir or "").expanduser().absolute()
    wanted = {info.filename for info in builder.url_infos.values() if info.filename}
    if wanted and not any((folder / file).exists() for file in wanted):
        raise ValueError(
            f"data.manual_dir={folder} holds no archive of {builder.name}: put "
            f"{' or '.join(sorted(wanted))} there, or leave data.manual_dir out to download."
        )
    if builder.name != "fashion_mnist":
        return folder
    restored = _home(options.dataset, options) / "archives"
    restored.mkdir(parents=True, exist_ok=True)
    for file in wanted:
        if (folder / file).exists():
            (restored / file).write_bytes(_original_gzip(folder / file))
    return restored


def _original_gzip(path: Path) -> bytes:
    """The bytes of a Fashion-MNIST archive as its authors published it.

    Debian drops the file name and the time from the gzip header; TFDS then rejects the file by its
    hash. Both are known, so they are restored here; TFDS still checks the hash of the result.
    """
    raw = path.read_bytes()
    if len(raw) < 18 or raw[:3] != b"\x1f\x8b\x08":
        raise ValueError(f"{path} is no gzip archive, or cut short: copy it again")
    has_name = raw[3] & 8  # RFC 1952: flag FNAME
    if has_name:
        return raw
    made = 1504176606 if path.name.startswith("train") else 1504176627
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", made) + b"\x00\x03"
    return header + path.stem.encode() + b"\x00" + raw[10:]


def _decode(name: str, split: str, options: Options, add: Add) -> Json:
    try:
        import requests
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"tfds:{name} must be prepared first, which needs TensorFlow: pip install '.[tfds]' "
            f"({error}). Afterwards TensorFlow is not needed."
        ) from error
    with contextlib.suppress(RuntimeError):  # TensorFlow is in use already: its user decides
        tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
    home = options.cache / "tensorflow_datasets"
    builder = tfds.builder(name, data_dir=home, file_format="array_record")
    archives = _archives(builder, options) if options.manual_dir else None
    config = tfds.download.DownloadConfig(manual_dir=archives)
    try:
        builder.download_and_prepare(download_config=config)
    except requests.RequestException as error:
        files = sorted(info.filename for info in builder.url_infos.values() if info.filename)
        raise ValueError(
            f"tfds:{name} could not be downloaded ({type(error).__name__}): repeat the command "
            "with a connection, or put the archives into a folder and give "
            f"--config.data.manual_dir=DIR; they are {', '.join(files)}"
        ) from error
    splits = builder.info.splits
    chosen = "validation" if split == "test" and "test" not in splits else split
    if chosen not in splits:
        raise ValueError(f"{builder.name} has no split for {split!r}, only {', '.join(splits)}.")
    if "image" not in builder.info.features:
        features = ", ".join(builder.info.features)
        raise ValueError(f"{builder.name} has no feature 'image', only {features}.")
    feature, labels = dict(builder.info.features.items()).get("label"), []
    source = builder.as_data_source(chosen)
    with Bar(f"Decoding {builder.name} {chosen}", "image", len(source), compiles=False) as bar:
        for start in range(0, len(source), _AT_ONCE):
            batch = source.__getitems__(range(start, min(start + _AT_ONCE, len(source))))
            for example in batch:
                add(example["image"])
                # The test images of some sets have the label -1 in place of a class.
                if isinstance(feature, tfds.features.ClassLabel) and example["label"] >= 0:
                    labels.append(feature.int2str(int(example["label"])))
            bar.update(len(batch))
    labels = labels if len(labels) == len(source) else []
    return {"version": str(builder.info.version), "split": chosen, "labels": labels}
