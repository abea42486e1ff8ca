"""Progress bars on the standard error, of process 0 only.

In a terminal a bar is one line that is written again and again; in a log file it is a plain line
every 30 seconds:

    ode uniform |#####     | 36 of 72 images, 5.0/s, 7 s left, 1.772 bits/dim
    ode uniform: 36 of 72 images, 5.0/s, 7 s left, 1.772 bits/dim

The first result takes long, because the function is compiled before it. So a bar says "compiling"
until the first result, and its speed and remaining time come from the later results only.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TextIO

import jax
import numpy as np

from sbml.types import T

EVERY = 0.1, 30.0  # seconds between two writings in a terminal, and in a log
WIDTH = 10  # characters of the drawn bar


class Bar:
    """A bar of ``total`` items, of which ``done`` were there before; use it as a context manager.

    Attributes:
      name: what is done, as the result calls it; without a name nothing is shown.
      unit: the singular of what is counted.
      total, times, n: there are ``times`` x ``total`` items, of which ``n`` are done; ``times``
        may change.
      quantity: what the values of :meth:`add` are, such as "bits/dim". The bar shows their mean.
      compiles: whether a function is compiled before the first result.
      leave: whether the finished bar stays in the terminal.
      wait: whether the bar is shown only from :meth:`show` or :meth:`update` on, because all items
        may have been computed and stored earlier.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int,
        done: int = 0,
        *,
        times: int = 1,
        quantity: str = "",
        compiles: bool = True,
        leave: bool = True,
        wait: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.unit, self.total, self.times, self.n = name, unit, total, times, done
        self.quantity, self.compiles, self.leave, self.wait = quantity, compiles, leave, wait
        self._stream, self._clock, self._text = stream or sys.stderr, clock, ""
        self._live = self._stream.isatty() or "ipykernel" in type(self._stream).__module__
        self._hidden = not name or jax.process_index() > 0
        self._sum, self._count = 0.0, 0  # of the values
        self._computed, self._first = 0, 0  # computed here, and of those in the first result
        self._start = self._since = self._written = clock()
        self._shown = ""  # the line that was written last

    def update(self, n: int = 1, text: str | None = None) -> None:
        """Count ``n`` new items, and show ``text``, or the earlier text if it is None."""
        self.n += n
        self._text = self._text if text is None else text
        now = self._clock()
        if not self._computed:
            self._first, self._since = n, now
            self._written = self._written if self._live else now  # A log waits for a speed.
        self._computed += n
        if now - self._written >= EVERY[not self._live]:
            self._write(now)

    def add(self, values: np.ndarray, *, stored: bool = False) -> None:
        """Count items with these ``values (n,)``, and show the mean of all values so far.

        ``stored`` items were computed earlier, so they do not count for the speed.
        """
        self._sum, self._count = self._sum + float(np.sum(values)), self._count + len(values)
        text = f"{self._sum / self._count:.3f} {self.quantity}" if self._count else ""
        if stored:
            self.n, self._text = self.n + len(values), text
        else:
            self.update(len(values), text)

    def show(self) -> None:
        """Show that the first item is being computed; a log says this only of a compilation."""
        if not self._computed and (self._live or self.compiles):
            self._write(self._clock())

    def __enter__(self) -> Self:
        if not self.wait:
            self.show()
        return self

    def __exit__(self, *error: object) -> None:
        self._write(self._clock())
        if self._live and not self._hidden:
            blank = "\r" + " " * len(self._shown) + "\r"
            print("\n" if self.leave or any(error) else blank, end="", file=self._stream)

    def line(self, now: float) -> str:
        """What the bar says at the time ``now``, in words."""
        missing = self.times * self.total - self.n
        times = f"{self.times} x " if self.times > 1 else ""
        parts = [f"{self.n:,} of {times}{self.total:,} {self.unit}s"]
        if not missing and self._computed:
            parts[0] += f" in {duration(now - self._start)}"
        elif missing and self.compiles and not self._computed:
            parts.append("compiling")
        elif missing and self._computed > self._first and now > self._since:
            rate = (self._computed - self._first) / (now - self._since)
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            parts.append(f"{duration(missing / rate)} left")
        return ", ".join([*parts, *filter(None, [self._text])])

    def _write(self, now: float) -> None:
        if self._hidden:
            return
        self._written, line = now, self.line(now)
        text, start, end = f"{self.name}: {line}", "", "\n"
        if self._live:
            drawn = "#" * int(WIDTH * self.n / max(1, self.times * self.total))
            long, columns = f"{self.name} |{drawn:{WIDTH}}| {line}", self._columns()
            text = (long if len(long) < columns else text)[: columns - 1]
            start, end = "\r", " " * (len(self._shown) - len(text))
        if text != self._shown:
            print(f"{start}{text}", end=end, file=self._stream, flush=True)
        self._shown = text

    def _columns(self) -> int:
        """The width of the terminal, and 80 if it does not tell."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


def over(
    items: Iterable[T],
    name: str,
    unit: str,
    total: int,
    *,
    compiles: bool = True,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """``items``, with a :class:`Bar` that counts them."""
    with Bar(name, unit, total, compiles=compiles, stream=stream, clock=clock) as bar:
        for item in items:
            yield item
            bar.update()


def duration(seconds: float) -> str:
    """A time for people: "7 s", "12 min", "5.3 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
