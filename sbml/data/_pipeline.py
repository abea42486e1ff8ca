"""Training batches as pure functions of (seed, step), for any number of processes.

The image numbers and flips of a batch are drawn for all processes together, and each process reads
its own rows. So a run resumes from the number of its step alone, and the batches do not depend on
the number of processes.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from sbml.core.types import T
from sbml.data._examples import Examples

if TYPE_CHECKING:
    import grain

Batch = np.ndarray | tuple[np.ndarray, np.ndarray]  # examples, or examples and their numbers


def train_batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    *,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    labels: np.ndarray | None = None,
) -> "grain.MapDataset[Batch]":
    """Shuffled batches without end: ``batches[step]`` is this process's part of a step's batch.

    Their numbers run through a new permutation of the set each epoch; a batch may span two epochs.

    Args:
      examples: the training set.
      batch_size: examples in the batch of all processes together.
      seed: 0 .. 2**32 - 1.
      flip: mirror each image left to right with probability 1/2.
      process_index, process_count: this process's index, and the number of processes that share
        the batch. Their parts (batch_size / process_count, *shape) are the batch if they are
        joined in the order of the processes.
      labels: numbers (n,) of the examples; a batch is then a pair of examples and their numbers.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes: "
            f"use a positive multiple of {process_count}."
        )
    if batch_size > (size := len(examples)):
        raise ValueError(
            f"batch_size={batch_size} exceeds the {size} {examples.unit}s of {examples.name} "
            f"({examples.split}): use at most {size}."
        )

    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)

    def draw(ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        flips = rng.random(batch_size) < 0.5 if flip else np.zeros(batch_size, bool)
        return ids[mine], flips[mine]

    def read(drawn: tuple[np.ndarray, np.ndarray]) -> Batch:
        ids, flips = drawn
        rows = np.asarray(examples.array[ids])
        if flip:
            rows[flips] = rows[flips, :, ::-1]
        return rows if labels is None else (rows, labels[ids])

    import grain  # here, because it takes half a second

    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    return order.batch(batch_size).random_map(draw).map(read)


def spread(size: int, count: int) -> np.ndarray:
    """At most ``count`` of ``size`` indices, evenly spread, because the first ones may be alike."""
    return np.linspace(0, size - 1, min(size, count)).astype(np.int64)


def prefetch(
    fetch: Callable[[int], T], start: int = 0, stop: int | None = None, depth: int = 2
) -> Generator[tuple[int, T], None, None]:
    """(step, fetch(step)) for start <= step < stop, fetched ``depth`` steps ahead in a thread.

    The thread starts with the first step and ends with the last one, with the first error, or when
    the iterator is closed or dropped, as by ``break``. What ``fetch`` raises for a step is raised
    here when that step's turn comes.

    Args:
      fetch: called in one background thread, one step at a time and in order.
      start: first step.
      stop: the step to end before; None: never.
      depth: results that may wait, at least 1.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for step in count(start) if stop is None else range(start, stop):
            waiting.append((step, pool.submit(copy_context().run, fetch, step)))
            if len(waiting) > depth:
                ready, batch = waiting.popleft()
                yield ready, batch.result()
        while waiting:
            ready, batch = waiting.popleft()
            yield ready, batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
