"""Command lines that must be refused: each ends before any work, with one line that says why.

``data/wrong_command_lines.tsv`` has a config, the flags, and words of the message for each, where
" ... " stands for any text.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import runs

from sbml import main
from sbml.program.modes import train

ROWS = [
    line.split("\t")
    for line in (runs.ROOT / "tests/data/wrong_command_lines.tsv").read_text().splitlines()
]
OF_CONFIG = defaultdict(list)
for _config, _flags, _word in ROWS:
    OF_CONFIG[Path(_config).stem].append((_flags, _word))


def message_of(arguments: list[str]) -> str:
    """The message with which the program ends, or "accepted"."""
    with pytest.raises(SystemExit) as ended:
        main.main(main.parse(["main", *arguments]))
    return str(ended.value.code)


def test_the_table_is_whole() -> None:
    assert len(ROWS) == 531 and set(map(len, ROWS)) == {3}


@pytest.mark.parametrize("config", OF_CONFIG)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_command_line_ends_with_one_line_that_names_the_mistake(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.cpu, "settle", lambda: None)
    monkeypatch.setattr(train, "prefetch", lambda *_: pytest.fail("a training began"))
    for given, word in OF_CONFIG[config]:
        arguments = [f"--config={config}", f"--workdir={tmp_path}", *given.split(" ")]
        if "--mode" not in given:  # It says "no metrics" if it begins.
            arguments.append("--mode=report")
        said = message_of(arguments)
        assert re.search(re.escape(word).replace(r"\ \.\.\.\ ", ".*"), said), (given, word, said)
        assert "\n" not in said and "no metrics" not in said, (given, said)
        assert "it has none" not in said, (given, said)  # of a part that could not be chosen
