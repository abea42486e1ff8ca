"""SIGTERM as a request to save and stop, agreed on by all processes."""

import signal
from types import FrameType, TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM


class Preemption:
    """A context in which SIGTERM sets a flag instead of killing.

    With several processes jax's own preemption service takes the signal for as long as they run,
    and decides at which step all of them stop, so that none waits in a collective for one that has
    left: whatever takes long must ask, outside such a context too.
    """

    _asked = 0  # by this process, whatever it did: the service counts on, from mode to mode

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def requested(self) -> bool:
        """Whether to stop now, and ever after; every process must ask, after every dispatch.

        The service answers yes at one number only, the one after the last that any process has
        reached, so it is told how often was asked: steps, of which a dispatch takes several, would
        pass it by.
        """
        if jax.process_count() > 1 and not self._received:
            Preemption._asked += 1
            self._received = multihost_utils.reached_preemption_sync_point(Preemption._asked)
        return self._received

    def leave_if_requested(self, done: str) -> None:
        """Raise ``SystemExit`` with status 143 if it is time to stop, saying what is ``done``."""
        if self.requested():
            logging.warning("SIGTERM: %s; the same command goes on from there", done)
            raise SystemExit(EXIT_CODE)
