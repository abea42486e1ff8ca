"""Reads the files of weights of other programs as plain data; no code in a file is ever run.

    read(path, "PyTorch state dict")     the arrays by name
    read(path, "safetensors file")       the arrays by name
    read(path, "flax msgpack file")      nested dictionaries of arrays

A PyTorch state dict is read without PyTorch. It has two formats; in both, pickled tensors refer to
raw storages: the older format is a sequence of pickles followed by the storages, the newer one a
zip archive. Only the few names that a state dict needs are resolved; any other name is an error.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from flax import serialization

from sbml.core.types import PyTree

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_SAFETENSORS: dict[str, np.dtype] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


def read(path: epath.PathLike, kind: str) -> dict[str, PyTree]:
    """The arrays in the file ``path`` by their names; ``kind`` is the format of the file.

    Raises:
      ValueError: the file is damaged, has another format, or contains other objects than arrays.
    """
    content = epath.Path(path).read_bytes()
    try:
        return _KINDS[kind](content)
    except Exception as error:  # Damaged files and other formats raise errors of many kinds.
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a {kind} ({reason}): check that it is the right file and "
            "was copied whole"
        ) from error


def _msgpack(content: bytes) -> dict[str, PyTree]:
    tree = serialization.msgpack_restore(content)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, no dictionary of arrays")
    return tree


def _safetensors(content: bytes) -> dict[str, np.ndarray]:
    state = {}
    # safetensors.numpy.load does not know bfloat16.
    for name, array in safetensors.deserialize(content):
        if array["dtype"] not in _SAFETENSORS:
            known = ", ".join(_SAFETENSORS)
            raise ValueError(f"{name} is of type {array['dtype']}; known are {known}")
        flat = np.frombuffer(array["data"], _SAFETENSORS[array["dtype"]])
        state[name] = flat.reshape(array["shape"])
    return state


def _pytorch(content: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(content)
    arrays = _zipped(file) if zipfile.is_zipfile(file) else _legacy(file)
    return {str(name): np.array(array) for name, array in arrays.items()}


class _Reader(pickle.Unpickler):
    """An unpickler that resolves only the names of a state dict; ``storages(key, dtype, count)``
    returns the flat array of a storage."""

    def __init__(
        self, file: io.BytesIO, storages: Callable[[str, np.dtype, int], np.ndarray]
    ) -> None:
        super().__init__(file)
        self.file, self.storages = file, storages

    def load(self) -> Any:
        # An index of the memo makes pickle allocate twice as many pointers, however large it is.
        start = self.file.tell()
        operations: Any = pickletools.genops(self.file)
        for opcode, index, position in operations:
            if opcode.name.endswith("PUT") and not 0 <= index <= position:
                raise pickle.UnpicklingError(f"byte {position} claims {index} objects before it")
        self.file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> object:
        known: dict[str, object] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            **{f"torch.{storage}": dtype for storage, dtype in _STORAGES.items()},
        }
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, saved: tuple) -> np.ndarray:
        _, dtype, key, _, count, *_ = saved
        return self.storages(str(key), dtype, int(count))


def _tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    beyond = 0 not in size and last >= storage.size or math.prod(size) > storage.size
    if beyond or min(offset, 0, *size, *stride) < 0:
        raise pickle.UnpicklingError(
            f"its size {tuple(size)} claims a tensor that goes beyond its storage"
        )
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _check_size(what: str, size: int, file: io.BytesIO) -> None:
    """Refuse a part that claims more bytes than the file has, because no part is compressed."""
    most = file.getbuffer().nbytes
    if not 0 <= size <= most:
        raise pickle.UnpicklingError(f"{what} claims {size} bytes, the file has {most}")


def _zipped(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        index = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "")
        if not index:
            raise pickle.UnpicklingError("a zip without data.pkl")
        folder = index.removesuffix("data.pkl")

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            _check_size(f"storage {key}", count * dtype.itemsize, file)
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        for member in archive.infolist():
            _check_size(member.filename, member.file_size, file)
        return _Reader(io.BytesIO(archive.read(index)), storage).load()


def _legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    file.seek(0)

    def none(key: str, dtype: np.dtype, count: int) -> NoReturn:
        raise pickle.UnpicklingError("a header refers to a tensor")

    for _ in range(3):  # The magic number, the protocol and the description of the system.
        _Reader(file, none).load()
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        others = sum(array.nbytes for name, array in storages.items() if name != key)
        _check_size(f"storage {key}", others + count * dtype.itemsize, file)
        return storages.setdefault(key, np.zeros(count, dtype))

    tensors = _Reader(file, storage).load()
    for key in _Reader(file, none).load():
        array = storages[str(key)]
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        if count != array.size:
            raise pickle.UnpicklingError(f"a storage of {count} numbers instead of {array.size}")
        array[:] = np.frombuffer(file.read(array.nbytes), array.dtype)
    return tensors


_KINDS: dict[str, Callable[[bytes], dict[str, PyTree]]] = {
    "PyTorch state dict": _pytorch,
    "safetensors file": _safetensors,
    "flax msgpack file": _msgpack,
}
