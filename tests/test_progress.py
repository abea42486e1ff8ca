"""What the progress bars say, with a clock that the test sets and a stream that it reads."""

import io

import numpy as np
import pytest

from sbml.progress import Bar, duration, over


class Screen(io.StringIO):
    """A terminal of 80 columns, or a log file."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live, self.now = live, 0.0

    def isatty(self) -> bool:
        return self.live

    def bar(self, *arguments, **options) -> Bar:
        return Bar(*arguments, stream=self, clock=lambda: self.now, **options)

    @property
    def lines(self) -> list[str]:
        """What was written, one entry for each time that a line was begun."""
        return [line.strip() for line in self.getvalue().replace("\r", "\n").split("\n") if line]


def test_the_mean_is_that_of_all_values_and_compiling_is_no_part_of_the_speed() -> None:
    screen = Screen(live=True)
    with screen.bar("ode uniform", "image", 40, quantity="bits/dim") as bar:
        for seconds, values in ((62, [1.0]), (1, [2.0, 4.0]), (1, [5.0]), (36, np.full(36, 3.0))):
            screen.now += seconds
            bar.add(np.asarray(values))
    assert screen.lines == [
        "ode uniform |          | 0 of 40 images, compiling",
        "ode uniform |          | 1 of 40 images, 1.000 bits/dim",
        # Two images in the second after the first result: 37 / 2 s remain.
        "ode uniform |          | 3 of 40 images, 2/s, 18 s left, 2.333 bits/dim",
        "ode uniform |#         | 4 of 40 images, 1.5/s, 24 s left, 3.000 bits/dim",
        "ode uniform |##########| 40 of 40 images in 100 s, 3.000 bits/dim",
    ]


def test_a_log_has_whole_lines_at_the_ends_and_every_half_minute() -> None:
    screen = Screen(live=False)
    with screen.bar("train", "step", 1000) as bar:
        screen.now = 62.0  # The function is compiled.
        for step in range(1000):
            bar.update(1, f"loss {step}")
            bar.show()  # After the first result, this prints nothing.
            screen.now += 0.125
    assert "\r" not in screen.getvalue()
    assert screen.lines == [
        "train: 0 of 1,000 steps, compiling",
        "train: 241 of 1,000 steps, 8/s, 95 s left, loss 240",
        "train: 481 of 1,000 steps, 8/s, 65 s left, loss 480",
        "train: 721 of 1,000 steps, 8/s, 35 s left, loss 720",
        "train: 961 of 1,000 steps, 8/s, 5 s left, loss 960",
        "train: 1,000 of 1,000 steps in 3 min, loss 999",
    ]


def test_items_that_were_stored_count_for_the_mean_and_not_for_the_speed() -> None:
    """Of three sweeps of two images, the first is stored."""
    screen = Screen(live=True)
    with screen.bar("bound", "image", 2, times=3, quantity="nats") as bar:
        bar.add(np.asarray([1.0, 2.0]), stored=True)
        for value in (3.0, 4.0):
            screen.now += 1
            bar.add(np.asarray([value]))
        assert screen.lines[-1].endswith("4 of 3 x 2 images, 1/s, 2 s left, 2.500 nats")
        bar.times = 2
    assert screen.lines[-1].endswith("4 of 2 x 2 images in 2 s, 2.500 nats")

    screen = Screen(live=False)
    for values in ([1.0, 2.0], [1.0]):
        with screen.bar("bound", "image", 2, quantity="nats", wait=True) as bar:
            bar.add(np.asarray(values), stored=True)
            if len(values) < 2:
                bar.show()
                bar.add(np.asarray([4.0]))
    assert screen.lines == [
        "bound: 2 of 2 images, 1.500 nats",
        "bound: 1 of 2 images, compiling, 1.000 nats",
        "bound: 2 of 2 images in 0 s, 2.500 nats",
    ]


@pytest.mark.parametrize("live", [True, False])
def test_reading_compiles_nothing(live: bool) -> None:
    screen = Screen(live)
    options = {"stream": screen, "clock": lambda: screen.now, "compiles": False}
    assert list(over("abc", "Reading files", "file", 3, **options)) == ["a", "b", "c"]
    assert screen.lines[-1].endswith("3 of 3 files in 0 s") and "comp" not in screen.getvalue()


def test_a_bar_without_a_name_is_silent_and_a_removed_one_leaves_an_empty_line() -> None:
    screen = Screen(live=True)
    with screen.bar("", "image", 1) as bar:
        bar.update()
    assert not screen.getvalue()
    with screen.bar("check", "image", 1, leave=False) as bar:
        bar.update()
    assert not screen.getvalue().split("\r")[-2].strip() and "\n" not in screen.getvalue()
    # An error begins on a line of its own.
    with pytest.raises(ZeroDivisionError), screen.bar("check", "image", 1, leave=False):
        1 / 0  # noqa: B018
    assert screen.getvalue().endswith("0 of 1 images, compiling\n")


def test_a_line_never_wraps() -> None:
    screen = Screen(live=True)
    with screen.bar("a name of many words " * 5, "image", 1):
        pass
    assert {len(line) for line in screen.lines} == {79}


def test_durations_have_units_of_readable_size() -> None:
    assert [duration(s) for s in (0.4, 119, 600, 19000)] == ["0 s", "119 s", "10 min", "5.3 h"]
