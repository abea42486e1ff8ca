"""SIGTERM and Ctrl-C as a request to save and stop, agreed on by all processes."""

import signal
from types import FrameType, TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context in which SIGTERM or Ctrl-C sets a flag instead of killing; a second Ctrl-C kills.

    With several processes jax's own preemption service takes the signal for as long as they run,
    and decides at which step all of them stop, so that none waits in a collective for one that has
    left: whatever takes long must ask, outside such a context too.
    """

    _asked = 0  # by this process, whatever it did: the service counts on, from mode to mode

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if jax.process_count() == 1:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._received = signal.Signals(signum)
        if signum == signal.SIGINT:
            logging.warning("stopping as soon as all is saved; Ctrl-C once more stops at once")

    def requested(self) -> bool:
        """Whether to stop now, and ever after; every process must ask, after every dispatch.

        The service answers yes at one number only, the one after the last that any process has
        reached, so it is told how often was asked: steps, of which a dispatch takes several, would
        pass it by.
        """
        if jax.process_count() > 1 and not self._received:
            Preemption._asked += 1
            if multihost_utils.reached_preemption_sync_point(Preemption._asked):
                self._received = signal.SIGTERM
        return self._received is not None

    def leave_if_requested(self, done: str) -> None:
        """Raise ``SystemExit`` if it is time to stop, saying what is ``done``.

        Its status is 128 and the signal's number: 143 after SIGTERM, 130 after Ctrl-C.
        """
        if self.requested() and self._received:
            name = self._received.name
            logging.warning("%s: %s; the same command goes on from there", name, done)
            raise SystemExit(128 + self._received)
