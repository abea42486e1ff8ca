"""Random weights of Inception-v3, and files of them as PyTorch would write them, without PyTorch.

``data/make_inception.py`` gives PyTorch's networks the same weights, and stores their outputs.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
# By dtype, the name of the storages that hold it.
STORAGES = {np.dtype("<f4"): "FloatStorage", np.dtype("<i8"): "LongStorage"}
# With this seed PyTorch's own outputs in float32 and float64 agree far better than the tests ask
# for. With 1 or 3 they do not: two classes share the probability, and their logits are large.
SEED = 4


def random_weights(shapes: Shapes) -> dict[str, np.ndarray]:
    """Weights that keep the size of the signal through all layers, and statistics that matter."""
    # This generator's numbers are the same in every version of NumPy, unlike default_rng's.
    random = np.random.RandomState(SEED)
    state: dict[str, np.ndarray] = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith(("running_var", "bn.weight")):
            value = random.random_sample(shape) + 0.5
        elif len(shape) == 4:
            value = random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif shape:
            value = random.standard_normal(shape) * 0.05
        else:  # A counter of batches.
            state[name] = np.zeros(shape, np.int64)
            continue
        state[name] = value.astype(np.float32)
    return state


def write_state_dict(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write ``state`` in the zip format of ``torch.save``, each array with its own storage."""
    entries = []
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, value) in enumerate(state.items()):
            value = np.asarray(value, order="C")
            archive.writestr(f"weights/data/{key}", value.tobytes())
            entries.append(text(name) + _tensor(str(key), value))
        # The opcodes are written out, because pickle would import PyTorch to write its names.
        opcodes = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK, *entries]
        archive.writestr("weights/data.pkl", b"".join([*opcodes, pickle.SETITEMS, pickle.STOP]))
        archive.writestr("weights/byteorder", "little")
        archive.writestr("weights/version", "3\n")


def _tensor(key: str, value: np.ndarray) -> bytes:
    stride = tuple(step // value.itemsize for step in value.strides)
    return tensor(key, value.size, value.shape, stride, STORAGES[value.dtype])


def tensor(
    key: str,
    count: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    storage_type: str = "FloatStorage",
) -> bytes:
    """The opcodes of a tensor in storage ``key``, which claims ``count`` numbers."""
    kind = _named("torch", storage_type)
    storage = _tuple(text("storage"), kind, text(key), text("cpu"), _integer(count))
    size, stride = _tuple(*map(_integer, shape)), _tuple(*map(_integer, strides))
    hooks = _named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    options = (storage + pickle.BINPERSID, _integer(0), size, stride, pickle.NEWFALSE, hooks)
    return _named("torch._utils", "_rebuild_tensor_v2") + _tuple(*options) + pickle.REDUCE


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
