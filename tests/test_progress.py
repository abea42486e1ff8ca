"""What the progress bars say, with a clock that the test sets and a stream that it reads."""

import io
import time
from types import SimpleNamespace

import numpy as np
import pytest

from sbml.core.progress import Bar, over


class Screen(io.StringIO):
    """A terminal of 90 columns, or a log file, as the standard error."""

    live, now = True, 1.0

    def isatty(self) -> bool:
        return self.live

    @property
    def lines(self) -> list[str]:
        """What was written, one entry for each time that a line was begun."""
        return [line.strip() for line in self.getvalue().replace("\r", "\n").split("\n") if line]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr("sbml.core.progress.sys", SimpleNamespace(stderr=screen))
    monkeypatch.setattr("tqdm.std.time", lambda: screen.now)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (90, 24))
    return screen


def test_the_mean_is_that_of_all_values_and_compiling_is_no_part_of_the_speed(
    screen: Screen,
) -> None:
    with Bar("ode", "image", 40, quantity="bits/dim") as bar:
        for seconds, values in ((62, [1.0]), (1, [2.0, 4.0]), (1, [5.0]), (36, np.full(36, 3.0))):
            screen.now += seconds
            bar.add(np.asarray(values))
    drawn = [line.partition("|")[2].partition("|") for line in screen.lines]
    assert [text.strip() for _, _, text in drawn] == [
        "0/40 [00:00<?, ? image/s, compiling]",
        "1/40 [01:02<?, ? image/s, 1.000 bits/dim]",
        # Two images in the second after the first result: 37 / 2 s remain.
        "3/40 [01:03<00:18,  2.00 image/s, 2.333 bits/dim]",
        "4/40 [01:04<00:24,  1.50 image/s, 3.000 bits/dim]",
        *["40/40 [01:40<00:00,  1.03 image/s, 3.000 bits/dim]"] * 2,  # the last one at the end
    ]
    assert len(set(map(len, screen.lines))) == 1 and set(drawn[-1][0]) == {"#"}


def test_a_bar_moves_by_eighths_of_a_character_where_it_can_be_shown(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Screen, "encoding", "utf-8")
    with Bar("ode", "image", 1000) as bar:
        bar.update(3)
        assert screen.lines[-1].partition("|")[2][0] in "▏▎▍▌▋▊▉"


def wait_for(text: str, screen: Screen) -> None:
    """Wait until another thread has written ``text``; fail after ten seconds."""
    deadline = time.monotonic() + 10
    while text not in screen.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_seconds_of_compiling_are_shown(screen: Screen) -> None:
    with Bar("ode", "image", 40):
        screen.now += 12
        wait_for("[00:12<?, ? image/s, compiling]", screen)


def test_the_seconds_of_a_long_result_are_shown(screen: Screen) -> None:
    with Bar("ode", "image", 40) as bar:
        bar.update()
        screen.now += 33
        wait_for("1/40 [00:33<", screen)


def test_a_log_counts_the_seconds_of_a_long_result(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbml.core.progress.EVERY", 0.01)
    screen.live = False
    with Bar("ode", "image", 40):
        screen.now += 33
        wait_for("ode:   0% 0/40 [00:33<?, ? image/s, compiling]\n", screen)


def clock(seconds: int) -> str:
    return f"{seconds // 60:02}:{seconds % 60:02}"


def test_a_log_has_whole_lines_at_the_ends_and_every_ten_seconds(screen: Screen) -> None:
    screen.live = False
    with Bar("train", "step", 1000) as bar:
        screen.now += 62.0  # The function is compiled.
        for step in range(1000):
            bar.update(1, f"loss {step}")
            bar.show()  # After the first result, this prints nothing.
            screen.now += 0.125
    assert "\r" not in screen.getvalue() and screen.getvalue().endswith("]\n")
    assert screen.lines == [
        "train:   0% 0/1000 [00:00<?, ? step/s, compiling]",
        *[
            f"train: {n / 10:3.0f}% {n}/1000 [{clock(62 + n // 8)}<{clock(124 - n // 8)},  "
            f"8.00 step/s, loss {n - 1}]"
            for n in range(81, 1000, 80)
        ],
        "train: 100% 1000/1000 [03:07<00:00,  7.99 step/s, loss 999]",
    ]


def test_items_that_were_stored_count_for_the_mean_and_not_for_the_speed(screen: Screen) -> None:
    """Of three sweeps of two images, the first is stored."""
    with Bar("bound", "image", 6, quantity="nats") as bar:
        bar.add(np.asarray([1.0, 2.0]), stored=True)
        for value in (3.0, 4.0):
            screen.now += 1
            bar.add(np.asarray([value]))
        assert screen.lines[-1].endswith("4/6 [00:02<00:02,  1.00 image/s, 2.500 nats]")
        bar.total = 4
    assert screen.lines[-1].endswith("4/4 [00:02<00:00,  1.00 image/s, 2.500 nats]")


def test_a_bar_whose_items_were_all_stored_is_never_shown(screen: Screen) -> None:
    screen.live = False
    bar = Bar("bound", "image", 2, quantity="nats")
    bar.add(np.asarray([1.0, 2.0]), stored=True)
    bar.close()
    assert not screen.getvalue()
    bar = Bar("bound", "image", 2, quantity="nats")
    bar.add(np.asarray([1.0]), stored=True)
    bar.show()
    bar.add(np.asarray([4.0]))
    bar.close()
    assert screen.lines == [
        "bound:  50% 1/2 [00:00<?, ? image/s, compiling, 1.000 nats]",
        "bound: 100% 2/2 [00:00<?, ? image/s, 2.500 nats]",
    ]


@pytest.mark.parametrize("live", [True, False])
def test_reading_compiles_nothing(screen: Screen, live: bool) -> None:
    screen.live = live
    assert list(over("abc", "Reading files", "file", 3, compiles=False)) == ["a", "b", "c"]
    assert "3/3 [00:00" in screen.lines[-1] and "comp" not in screen.getvalue()


def test_a_bar_without_a_name_is_silent_and_a_removed_one_leaves_an_empty_line(
    screen: Screen,
) -> None:
    with Bar("", "image", 1) as bar:
        bar.update()
        bar.add(np.ones(1))
        bar.show()
    assert not screen.getvalue()
    with Bar("check", "image", 1, leave=False) as bar:
        bar.update()
    assert not screen.getvalue().split("\r")[-2].strip() and "\n" not in screen.getvalue()
    # An error begins on a line of its own.
    with pytest.raises(ZeroDivisionError), Bar("check", "image", 1, leave=False):
        1 / 0  # noqa: B018
    assert screen.getvalue().endswith("compiling]\n")


def test_a_line_never_wraps(screen: Screen) -> None:
    with Bar("a name of many words " * 5, "image", 1):
        pass
    assert {len(line) for line in screen.lines} == {90}
