"""Batches are pure functions of (seed, step), whatever the process count."""

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
from pictures import numbered

from sbml import data
from sbml.core import pytrees


def identify(images: data.ImageSet, batch: np.ndarray) -> tuple[list[int], list[bool]]:
    """The image number of each row, and whether it is mirrored; an unknown row is a KeyError."""
    known = {x.tobytes(): (i, False) for i, x in enumerate(images.images)}
    known |= {x[:, ::-1].tobytes(): (i, True) for i, x in enumerate(images.images)}
    ids, flips = zip(*(known[row.tobytes()] for row in batch), strict=True)
    return list(ids), list(flips)


# Training batches


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (12, 5), (7, 7), (9, 1)])
def test_each_epoch_shows_each_image_once(n: int, batch_size: int) -> None:
    images = numbered(n)
    batches = data.train_batches(images, batch_size, seed=3)
    ids = sum((identify(images, batches[step])[0] for step in range(n)), [])  # batch_size epochs
    epochs = np.reshape(ids, (batch_size, n))
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(n), epochs.shape))
    assert batch_size == 1 or len(np.unique(epochs, axis=0)) > 1  # each in its own order


def test_random_access_equals_reading_in_order() -> None:
    images = numbered(10)
    ordered = [data.train_batches(images, 4, seed=0, flip=True)[step] for step in range(12)]
    batches = data.train_batches(images, 4, seed=0, flip=True)
    for step in (11, 0, 7, 7, 3):
        np.testing.assert_array_equal(batches[step], ordered[step])
    other = data.train_batches(images, 4, seed=1, flip=True)
    assert any(not np.array_equal(other[step], ordered[step]) for step in range(3))


ANOTHER = """
import sys
import numpy as np
from sbml import data
images = np.random.default_rng(50).integers(0, 250, (50, 4, 5, 3), dtype=np.uint8)
images = data.ImageSet("numbered", "1", "train", images)
batches = data.train_batches(images, 16, seed=5, flip=True)
sys.stdout.buffer.write(b"".join(batches[step].tobytes() for step in (0, 1, 1000)))
"""


def test_same_bytes_in_another_process() -> None:
    other = subprocess.run([sys.executable, "-c", ANOTHER], stdout=subprocess.PIPE, check=True)
    batches = data.train_batches(numbered(50), 16, seed=5, flip=True)
    assert other.stdout == b"".join(batches[step].tobytes() for step in (0, 1, 1000))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_process_shards_make_up_the_global_batch(processes: int) -> None:
    images = numbered(40)
    whole = data.train_batches(images, 12, seed=1, flip=True)
    parts = [
        data.train_batches(images, 12, seed=1, flip=True, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in range(5):
        assert all(part[step].shape == (12 // processes, 4, 5, 3) for part in parts)
        np.testing.assert_array_equal(np.concatenate([p[step] for p in parts]), whole[step])


def test_flips_mirror_half_of_the_images() -> None:
    images = numbered(512)
    batches = data.train_batches(images, 64, seed=0, flip=True)
    plain = data.train_batches(images, 64, seed=0)
    flips = np.zeros((100, 64))
    for step in range(100):
        ids, flips[step] = identify(images, batches[step])
        assert (ids, [False] * 64) == identify(images, plain[step])
    assert abs(flips.mean() - 0.5) < 3 * 0.5 / math.sqrt(flips.size)
    assert len(np.unique(flips, axis=0)) == 100
    assert abs(flips.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(100)  # at every place of the batch


def test_flipping_leaves_the_set_unchanged() -> None:
    images = numbered(20)
    before = images.images.copy()
    data.train_batches(images, 20, seed=0, flip=True)[0]
    np.testing.assert_array_equal(images.images, before)


@pytest.mark.parametrize(
    ("batch_size", "changes", "message"),
    [
        (21, {}, "batch_size=21 exceeds the 20 images of numbered .*at most 20"),
        (10, {"process_count": 4}, "batch_size=10 cannot be shared by 4.*multiple of 4"),
        (0, {}, "batch_size=0"),
    ],
)
def test_impossible_batches(batch_size: int, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.train_batches(numbered(20), batch_size, seed=0, **changes)


# Evaluation batches


@pytest.mark.parametrize("n", [1, 5, 12, 13, 360])
@pytest.mark.parametrize("size", [1, 4, 12, 128])
def test_every_image_counts_exactly_once(n: int, size: int) -> None:
    ids, sizes = 7 + np.arange(n), []

    def rows(ids: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(ids))
        return {"double": 2 * ids}

    batches = list(pytrees.in_batches(rows, ids, size))
    assert sizes == [size] * math.ceil(n / size)
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in batches]), ids)
    found = np.concatenate([columns["double"] for _, columns in batches])
    np.testing.assert_array_equal(found, 2 * ids)


# Prefetching


def prefetching() -> bool:
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_yields_every_step_in_order(depth: int) -> None:
    assert list(data.prefetch(lambda s: s * s, 3, 10, depth)) == [(s, s * s) for s in range(3, 10)]
    assert list(data.prefetch(lambda s: s, 4, 4, depth)) == []
    assert not prefetching()


def test_prefetch_runs_ahead_by_its_depth_and_no_further() -> None:
    threads, reached = set(), threading.Semaphore(0)
    fetched = []

    def fetch(step: int) -> int:
        threads.add(threading.get_ident())
        fetched.append(step)
        reached.release()
        return step

    batches = data.prefetch(fetch, depth=2)
    assert not fetched
    for step in range(4):
        assert next(batches)[0] == step
        for _ in range(3 if step == 0 else 1):
            assert reached.acquire(timeout=10)  # steps up to step + 2, while the caller is busy
        assert not reached.acquire(timeout=0.02)
        assert fetched == list(range(step + 3))
    batches.close()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_prefetch_raises_at_the_failing_step_and_stops() -> None:
    def fetch(step: int) -> int:
        if step == 3:
            raise OSError("disk gone")
        return step

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for step, _ in data.prefetch(fetch, stop=10, depth=4):
            seen.append(step)
    assert seen == [0, 1, 2]
    assert not prefetching()


def test_prefetch_ends_its_thread_when_left_early() -> None:
    for step, _ in data.prefetch(lambda s: s):
        if step == 5:
            assert prefetching()
            break
    assert not prefetching()
    batches = data.prefetch(lambda s: s)
    next(batches)
    batches.close()
    assert not prefetching()
