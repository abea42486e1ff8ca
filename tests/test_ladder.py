"""The small examples of ``docs/ladder.md`` print the numbers that stand below them."""

import re

import numpy as np
import pytest
import test_docs

NAME = test_docs.LADDER
PAGE = (test_docs.ROOT / NAME).read_text()
SHOWN = re.findall(r"```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
NUMBER = r"-?\d+\.\d+"
# The compiler's options of the tests change roundings, which a training and NUTS enlarge.
TOLERANCE = 0.06


def marks(title: str) -> list[pytest.MarkDecorator]:
    """Those of the example under the heading ``title``: its packages, and its time."""
    if "PyTorch" in title or "NumPyro" in title:
        return [pytest.mark.frameworks]
    return [pytest.mark.slow] if "moons" in title or "NNX" in title else []


def examples() -> list:
    titles, blocks = re.findall(r"^## (.+)$", PAGE, re.MULTILINE), test_docs.blocks(PAGE)
    return [
        pytest.param(*block, shown, marks=marks(title), id=title)
        for title, block, shown in zip(titles, blocks, SHOWN, strict=True)
    ]


@pytest.mark.parametrize(("line", "code", "shown"), examples())
def test_an_example_prints_what_the_page_shows(line: int, code: str, shown: str, capsys) -> None:
    test_docs.execute(NAME, line, code)
    printed = capsys.readouterr().out
    assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", shown), printed
    found, expected = (np.array(re.findall(NUMBER, text), float) for text in (printed, shown))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=printed)
