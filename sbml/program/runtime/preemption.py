"""SIGTERM and Ctrl-C as requests to save and stop. SIGTERM stops all processes at the same step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from absl import logging
from jax.experimental import multihost_utils

_Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context in which SIGTERM or Ctrl-C sets a flag; a second Ctrl-C ends the process at once.

    If there are several processes, jax's preemption service receives SIGTERM until the processes
    end. It decides at which step all of them stop, so that no process waits in a collective
    operation for one that has already stopped. Therefore every computation that saves on its way
    must call :meth:`requested`, even outside such a context. The other modes, such as ``latents``
    and ``quality``, run to their end, and the program stops after them. The service does not
    receive Ctrl-C, which then raises KeyboardInterrupt at once.

    Python handles signals in its main thread only, so in another thread nothing is set.
    """

    # Calls of ``requested`` in this process. The service continues to count from mode to mode.
    _asked = 0

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def suspended(self, done: str) -> Iterator[None]:
        """A context with nothing to save, in which a signal ends the process at once. ``done`` is
        as for :meth:`leave_if_requested`, which comes first."""
        self.leave_if_requested(done)
        self.__exit__()
        yield
        self.__enter__()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._received = signal.Signals(signum)
        if signum == signal.SIGINT:
            logging.warning("stopping after the next save; press Ctrl-C again to stop at once")

    def requested(self) -> bool:
        """Whether to stop now; once true, it stays true.

        Every process must call this after every dispatch. The service answers yes only for one
        count: the one after the largest that any process has reached. Therefore it is given the
        number of calls. A dispatch can take several steps, so the number of steps could skip this
        count.
        """
        if jax.process_count() > 1 and not self._received:
            Preemption._asked += 1
            if multihost_utils.reached_preemption_sync_point(Preemption._asked):
                self._received = signal.SIGTERM
        return self._received is not None

    def leave_if_requested(self, done: str) -> None:
        """Raise ``SystemExit`` if it is time to stop, after a warning that says what is ``done``.

        The exit status is 128 plus the signal's number: 143 after SIGTERM, 130 after Ctrl-C.
        """
        if self.requested() and self._received:
            name = self._received.name
            logging.warning("%s: %s; the same command continues from there", name, done)
            raise SystemExit(128 + self._received)
