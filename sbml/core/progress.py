"""Progress bars on the standard error, of process 0 only, drawn by tqdm.

In a terminal and in a notebook a bar is one line that is written again and again; in a log file it
is a plain line every 10 seconds:

    ode uniform:  50%|█████     | 36/72 [01:09<00:07,  5.00 image/s, 1.772 bits/dim]
    ode uniform:  50% 36/72 [01:09<00:07,  5.00 image/s, 1.772 bits/dim]

The first result takes long, because the function is compiled before it. So a bar says "compiling"
until the first result, and its speed and remaining time come from the later results only. tqdm has
neither this nor plain lines for a log.
"""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Self

import jax
import numpy as np
from tqdm import tqdm

from sbml.core.types import T

EVERY = 10  # seconds between lines of a log


class Bar(tqdm):
    """A bar of ``total`` items, of which ``done`` were there before; use it as a context manager.

    Args:
      name: what is done, as the result calls it; without a name nothing is shown.
      unit: the singular of what is counted.
      quantity: what the values of :meth:`add` are, such as "bits/dim". The bar shows their mean.
      compiles: whether a function is compiled before the first result.
      leave: whether the finished bar stays in the terminal.
    """

    n: int
    leave: bool
    delay: float  # infinite until the bar is shown
    monitor_interval = 0  # tqdm's own thread is not needed.

    def __init__(
        self,
        name: str,
        unit: str,
        total: int,
        done: int = 0,
        *,
        quantity: str = "",
        compiles: bool = True,
        leave: bool = True,
    ) -> None:
        self._live = live = sys.stderr.isatty() or "ipykernel" in type(sys.stderr).__module__
        self._ended = threading.Event()
        self._compiles, self._quantity, self._text, self._shown = compiles, quantity, "", ""
        self._sum, self._count = 0.0, 0  # of the values
        self._before, self._since = done, 0.0  # items that do not count for the speed, which begins
        super().__init__(
            desc=name,
            unit=f" {unit}",
            total=total,
            initial=done,
            file=sys.stderr,
            disable=not name or jax.process_index() > 0,
            mininterval=0.1 if live else EVERY,
            miniters=0,
            delay=np.inf,
            leave=live and leave,
            ncols=None if live else 0,
            dynamic_ncols=live,
        )

    def __enter__(self) -> Self:
        self.show()
        return self

    def __exit__(self, *error: Any) -> None:
        self.leave = self.leave or (self._live and any(error))
        super().__exit__(*error)

    def show(self) -> None:
        """Show that the first item is being computed; a log says this only of a compilation."""
        if self.disable or not self.delay or not (self._live or self._compiles):
            return
        self.delay = 0
        self.refresh()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        """Show the seconds that pass, also while one result takes long."""
        while not self._ended.wait(1 if self._live else EVERY):
            self.refresh()

    def update(self, n: int = 1, text: str | None = None) -> None:
        """Count ``n`` new items, and show ``text``, or the earlier text if it is None."""
        if self.disable:
            return
        self._text = self._text if text is None else text
        if not self._since:
            self.delay, self._before, self._since = 0, self.n + n, self._time()
            self.last_print_t = -np.inf if self._live else self._since  # A log waits for a speed.
        super().update(n)

    def add(self, values: np.ndarray, *, stored: bool = False) -> None:
        """Count items with these ``values (n,)``, and show the mean of all values so far.

        ``stored`` items were computed earlier, so they do not count for the speed.
        """
        self._sum, self._count = self._sum + float(np.sum(values)), self._count + len(values)
        self._text = f"{self._sum / self._count:z.3f} {self._quantity}" if self._count else ""
        if stored:
            self.n, self._before = self.n + len(values), self._before + len(values)
        else:
            self.update(len(values))

    def close(self) -> None:
        """End the bar; if it was never shown, nothing is shown."""
        self._ended.set()
        if not (self._live or self.disable or self.delay):
            self.display()
        super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm writes."""
        words = ["compiling" if self._compiles and not self._since else "", self._text]
        seconds = self._time() - self._since if self._since else 0
        rate = (self.n - self._before) / seconds if seconds else 0
        postfix = ", ".join(filter(None, words))
        found = super().format_dict
        if self._live and (found["ncols"] or 0) < 1:  # Some terminals do not tell their size.
            found["ncols"] = None
        return found | {"initial": self.n, "rate": rate or None, "postfix": postfix}

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write a line of the log."""
        if self._live:
            self.nrows = None
            return super().display(msg, pos)
        if msg is None and str(self) != self._shown:
            self._shown = str(self)
            print(self._shown, file=self.fp, flush=True)


def over(
    items: Iterable[T], name: str, unit: str, total: int, *, compiles: bool = True
) -> Iterator[T]:
    """``items``, with a :class:`Bar` that counts them."""
    with Bar(name, unit, total, compiles=compiles) as bar:
        for item in items:
            yield item
            bar.update()
