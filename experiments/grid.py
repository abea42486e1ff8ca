"""Grids of trainings: the changes of a config, and a file of results to which each is added once.

    config of a file  +  "noise+iid+optim.lr=1e-3"  ->  config of a run  ->  a line of the file

A *recipe* changes fields of a config: it is a name of RECIPES, ``field=value``, or several of these
joined by ``+``. A *line* is a JSON object with the ``id`` of a number, what was computed, the
versions of the packages that computed it, and a CRC32. A line is appended in one piece, or not at
all if the disk is full. Damaged lines and lines of other versions stay in the file and are not
used, which one message says. Several processes can share a file: each result is claimed by a file
lock, which the system releases when its process ends for any reason.
"""

import ast
import contextlib
import functools
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from sbml.core.files import json_line, without_crc32
from sbml.density.estimators import Cell
from sbml.networks import frequencies
from sbml.program.config.config import default, node_of
from sbml.program.config.fields import unknown
from sbml.program.evaluation import cells
from sbml.program.evaluation.cells import Evaluation
from sbml.program.runtime.versions import versions
from sbml.score import PARAMETERIZATIONS

T = TypeVar("T")
Line = dict[str, Any]
PAUSE = 5.0  # seconds before asking again for what another process computes
PACKAGES = ("sbml", "jax", "jaxlib", "flax", "optax", "diffrax")  # Numbers depend on these.


class BusyError(Exception):
    """Another process computes this result, or one that this result needs."""


def draws(times: str, noises: str, bins: int) -> dict[str, Any]:
    """The fields that say how the times and noises of a training step are drawn."""
    return {"training.times": times, "training.noises": noises, "training.proposal_bins": bins}


# name: {field: its value, or a function that computes it from the config before the change}.
RECIPES: dict[str, dict[str, Any]] = {
    "iid": draws("iid", "independent", 0),  # the paper's
    "lattice": draws("lattice", "independent", 0),
    "density": draws("lattice", "independent", 32),
    "antithetic": draws("lattice", "antithetic", 0),
    "ours": draws("lattice", "antithetic", 32),
    **{p: {"score.parameterization": p} for p in PARAMETERIZATIONS},
    "centre": {"data.dequantization": "centre"},
    "fourier": {"model.fourier": lambda c: frequencies(c.data.levels, scale=c.score.data_std)},
    # The network of VDM, in a size that follows the network which it replaces: 3/2 of the channels,
    # rounded down to an even number, and twice as many blocks as there are on the downward path.
    "vdm": {
        "model.name": "vdm",
        "model.width": lambda c: 2 * (3 * c.model.nf // 4),
        "model.depth": lambda c: 2 * len(c.model.ch_mult) * c.model.num_res_blocks,
        "model.dropout": lambda c: c.model.dropout,
        "model.fourier": lambda c: c.model.fourier,
    },
}


def value_of(text: str) -> Any:
    """The number, truth value or tuple that ``text`` is in Python, or else ``text`` itself."""
    with contextlib.suppress(SyntaxError, ValueError):
        return ast.literal_eval(text)
    return text


def with_recipe(config: ConfigDict, recipe: str) -> ConfigDict:
    """A copy of ``config`` with the changes of ``recipe``, one part of it after another.

    Raises:
      ValueError: for an unknown recipe or field.
    """
    config = config.copy_and_resolve_references()
    for part in filter(None, recipe.split("+")):
        path, equals, text = part.partition("=")
        if not equals and part not in RECIPES:
            names = ", ".join(RECIPES)
            raise ValueError(f"unknown recipe {part!r}: give field=value or one of {names}")
        changes = {path: value_of(text)} if equals else RECIPES[part]
        fields = {k: v(config) if callable(v) else v for k, v in changes.items()}
        if network := fields.pop("model.name", None):
            with config.unlocked():
                config.model = default(network).model
        for name, value in fields.items():
            section, field = node_of(config, name)
            if field not in section:
                raise ValueError(unknown(name.rpartition(".")[0], field, list(section)))
            section[field] = value
    return config


def identity(config: ConfigDict) -> str:
    """A hash of all fields of ``config``, 12 hexadecimal digits."""
    return hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:12]


def folder_of(out: pathlib.Path) -> pathlib.Path:
    """The folder beside the file ``out``: its locks and the work directories of its runs."""
    return out.with_suffix("")


@functools.cache
def _say(text: str) -> None:
    """Write ``text`` to the standard error, once in a process."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the packages on which the numbers depend."""
    found = versions()
    return {name: found[name] for name in PACKAGES}


def _file_lock(out: pathlib.Path) -> FileLock:
    folder_of(out).mkdir(parents=True, exist_ok=True)
    return FileLock(folder_of(out) / "file.lock")


def read(out: pathlib.Path) -> dict[str, Line]:
    """The lines of ``out`` by their ``id``, without damaged ones and those of other versions."""
    found, others = {}, 0
    with _file_lock(out):
        lines = out.read_bytes().split(b"\n") if out.exists() else []
    for number, text in enumerate(filter(bytes.strip, lines), 1):
        try:
            line = without_crc32(text)
        except (ValueError, RecursionError) as error:
            _say(f"{out}: line {number} is damaged ({error}): its number is computed again")
            continue
        if line.pop("versions", None) == packages():
            found[line["id"]] = line
        else:
            others += 1
    if others:
        now = ", ".join(f"{name} {version}" for name, version in packages().items())
        _say(f"{out}: {others} lines are of other versions than {now}, and are not used")
    return found


def append(out: pathlib.Path, line: Line) -> None:
    """Add ``line`` to ``out`` in one piece; if that fails, as on a full disk, ``out`` stays as it
    was and the OSError names it."""
    content = json_line({**line, "versions": packages()}).encode()
    with _file_lock(out):
        file = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # A kill has cut off the last line.
                content = b"\n" + content
            try:
                if (written := os.write(file, content)) < len(content):
                    written += os.write(file, content[written:])  # It raises what stopped the first
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, size)
                error.filename = str(out)
                raise
        finally:
            os.close(file)


@contextlib.contextmanager
def claimed(out: pathlib.Path, key: str) -> Iterator[None]:
    """A context in which no other process computes the result ``key`` of ``out``.

    Raises:
      BusyError: another process does.
    """
    folder = folder_of(out) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f"{key}.lock", timeout=0):
            yield
    except Timeout as error:
        raise BusyError(key) from error


def compute_once(out: pathlib.Path, key: str, compute: Callable[[], Line]) -> Line:
    """The line of ``out`` with ``id`` ``key``, which is computed and appended if it is missing.

    Raises:
      BusyError: another process computes it.
    """
    if (stored := read(out).get(key)) is not None:
        return stored
    with claimed(out, key):
        if (stored := read(out).get(key)) is not None:  # It was computed just now.
            return stored
        line = {"id": key, **compute()}
        append(out, line)
    return line


def of_images(evaluation: Evaluation, cell: Cell) -> np.ndarray:
    """bits/dim of every image of ``evaluation`` by ``cell``, ``(n,)``; of a bound, the mean over
    its sweeps."""
    config = evaluation.experiment.config.eval
    with jax.default_matmul_precision(config.precision):
        dequantization = evaluation.dequantization(cell.dequantizer)
        run = cells.run_of(evaluation, cell, dequantization).measurement
        sweeps = range(config.bound.sweeps if cell.kind.is_bound else 1)
        return np.mean([run.total(run.rows(run.ids, sweep)) for sweep in sweeps], axis=0)


def shared(tasks: Sequence[Callable[[], T]], pause: float = PAUSE) -> list[T]:
    """The results of ``tasks``. A task that raises a BusyError is left for later, so that several
    processes with the same tasks share the work."""
    found: dict[int, T] = {}
    while missing := [i for i in range(len(tasks)) if i not in found]:
        before = len(found)
        for i in missing:
            with contextlib.suppress(BusyError):
                found[i] = tasks[i]()
        if len(found) == before:
            time.sleep(pause)
    return [found[i] for i in range(len(tasks))]
