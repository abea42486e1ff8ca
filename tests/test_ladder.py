"""The small examples of ``docs/ladder.md`` print the numbers that stand below them."""

import re

import numpy as np
import pytest
import test_docs

NAME = test_docs.LADDER
PAGE = (test_docs.ROOT / NAME).read_text()
SHOWN = re.findall(r"```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
NUMBER = r"-?\d+\.\d+"
# A unit of the last of two decimals. The compiler's options of the tests change roundings, which a
# training and NUTS enlarge.
ROUNDING, CHAOTIC = 0.011, 0.05


def kind(title: str) -> tuple[float, list[pytest.MarkDecorator]]:
    """The tolerance of the example under the heading ``title``, and the marks of its test."""
    if "PyTorch" in title or "NumPyro" in title:
        return ROUNDING if "PyTorch" in title else CHAOTIC, [pytest.mark.frameworks]
    trains = "moons" in title or "NNX" in title
    return (CHAOTIC, [pytest.mark.slow]) if trains else (ROUNDING, [])


def examples() -> list:
    titles, blocks = re.findall(r"^## (.+)$", PAGE, re.MULTILINE), test_docs.blocks(PAGE)
    return [
        pytest.param(*block, shown, tolerance, marks=marks, id=title)
        for title, block, shown in zip(titles, blocks, SHOWN, strict=True)
        for tolerance, marks in [kind(title)]
    ]


@pytest.mark.parametrize(("line", "code", "shown", "tolerance"), examples())
def test_an_example_prints_what_the_page_shows(line, code, shown, tolerance, capsys) -> None:
    test_docs.execute(NAME, line, code)
    printed = capsys.readouterr().out
    assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", shown), printed
    found, expected = (np.array(re.findall(NUMBER, text), float) for text in (printed, shown))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=printed)
