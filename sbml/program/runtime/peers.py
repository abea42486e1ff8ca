"""The loss of another process of a run: it was killed or crashed, or its host was taken away.

Without it nothing can be computed, and no checkpoint can be completed. On CPUs, Gloo performs the
collective operations. The next one raises an error in the remaining processes, which print one line
and exit. On other devices, and sometimes during a save, they wait until jax finds after about 100
seconds that the process is silent; it then aborts them with a message of its own. Process 0 runs
jax's coordination service: without it, jax aborts the others within a fraction of a second.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # The key-value store is not public.

ANSWER_WITHIN = 5.0  # seconds


class LostProcessError(RuntimeError):
    """Another process of this run is lost, so that this one cannot continue."""


@contextlib.contextmanager
def watched(kept: Callable[[], str]) -> Iterator[None]:
    """A context in which a collective operation that lost another process raises
    :class:`LostProcessError`; ``kept`` says what the same command goes on from."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or "Gloo" not in str(error):
            raise
        silent = ", ".join(map(str, _silent())) or "unknown"
        raise LostProcessError(
            f"process {silent} of the {jax.process_count()} processes is lost. Start the same "
            f"command again in all of them: it goes on from {kept()}"
        ) from error


def _silent() -> list[int]:
    """The processes that have not met the same error after ``ANSWER_WITHIN`` seconds."""
    # Does process 0 still accept connections? jax aborts a process that waits for a lost store.
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return [0]
    client: Any = distributed.global_state.client
    client.key_value_set(f"sbml/lost/{jax.process_index()}", "")
    end, silent = time.monotonic() + ANSWER_WITHIN, []
    for process in range(jax.process_count()):
        try:
            left = max(1, int(1000 * (end - time.monotonic())))
            client.blocking_key_value_get(f"sbml/lost/{process}", left)
        except jax.errors.JaxRuntimeError:
            silent.append(process)
    return silent


def leave(message: str) -> NoReturn:
    """Print ``message`` and end this process with the status 1.

    At the usual end of a program jax would wait for the lost process, and then abort.
    """
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
