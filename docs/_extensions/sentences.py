"""Finds the formulas in the sentences of docstrings.

A formula is a run of words that ``formulas`` can read, as long as possible. It has a sign of one: a
subscript, an operator, a Greek letter, a function with its argument. A single letter is a formula
too, but for "a", "A" and "I". What may be anything else stays as it is: words, shapes, flags, file
names, and each part of a formula that ``formulas`` does not read as a whole.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from formulas import FUNCTIONS, LARGE, LETTERS, QUANTITIES, WORDS, NoFormula, latex

# Names that are words as well. They count as parts of a formula between operators or brackets only;
# a sum or an integral needs the operator, or a number, before it.
SUMS = {"sum", "prod", "integral", "int"}
AMBIGUOUS = QUANTITIES - {"SNR", "ESS", "snr"} | {"mean", "max", "min", "var", "cov"}
GREEK = "|".join(LETTERS)
FUNCTION = "|".join((set(FUNCTIONS) | set(LARGE) | {"sqrt"}) - {"E"})
# A bullet, or a word.
WORD = re.compile(r"(?:^|(?<=\n)) *- |\S+")
# The words of a sentence, next to which a formula may stand.
PLAIN = re.compile(r"""["'(]*([A-Za-z]{2,}([-'/.][A-Za-z\d]+)*|[aAI]|[\d.,]+%?)[)"'.,;:?!]*""")
# Brackets that are no part of a sentence: (x, f(x)), and what an operator follows.
BRACKET = re.compile(
    r"\((?:(?:[^\s()]|\([^()]*\))+, )+(?:[^\s()]|\([^()]*\))+[)\]][^\s\w]*"
    r"|\([^()]*\)(?:\^\S+|(?= [-+/*=<>] ))"
)
# The end of a sentence or of a part of it, but not "...".
MARK = re.compile(r"[,;:?!]$|[^.]\.$")
# E. Alpaydin and C. Kaynak, but not "at T. So"; appendix D.
INITIAL = re.compile(r"[A-Z]\. [A-Z]")
PARTS = {"appendix", "section", "version"}
INTERVAL = re.compile(r"[\[(][^,]+, [^,]+[\])](\^\w)?")
# What a formula has at least one of.
SIGN = re.compile(
    rf"[_^<>~|]| [-+=/] |\w\*|\b(?:{GREEK})\b|\b(?:\w|{FUNCTION})[(\[]|\b(?:{FUNCTION}) [A-Za-z]\b"
    rf"|\b(?:\d|d[a-z]|d(?:{GREEK}))/d?[A-Za-z]\b|^-?\d+ [b-zB-HJ-Z]$|^-?[b-zB-HJ-Z]$"
)
# What a formula does not have.
OTHER = re.compile(
    "|".join(
        (
            r"[A-Za-z]-[A-Za-z]|--",  # hyphens, flags
            r"\w=|=\w",  # arguments by keyword
            r"\bnats\b|\bbits/",  # units
            r"\d,\d|\^\(\d+\)",  # 1,000; the sixth derivative h^(6)
            r"(?<=[\w)\]])(?<!log)(?<!sum_\w) \d",  # a number after a factor
            r"\w \([^()]*,",  # the shape of an array
            rf"_(?!(?:{GREEK})\b)[A-Za-z]{{4}}|log_[a-z]",  # names of Python
            rf"\b(?!(?:{GREEK})_)[A-Za-z]{{2,}}_[A-Za-z]{{2}}",
            r"^[-+=<>~/*.,;:]+( |$)| [-+=<>~/*.|]+$",  # an operator at an end
        )
    )
)


class Span(NamedTuple):
    """A part of a text."""

    start: int
    end: int


def depth(text: str) -> int:
    """How many brackets of ``text`` are open at its end."""
    return len(re.findall(r"[(\[{]", text)) - len(re.findall(r"[)\]}]", text))


def units(text: str) -> list[Span]:
    """The words of ``text``. What stands in brackets belongs to the name before them."""
    found: list[Span] = []
    position = len(text) - len(text.lstrip())
    while match := BRACKET.match(text, position) or WORD.match(text, position):
        start, end = match.span()
        rest = WORD.finditer(text, end)
        while depth(text[start:end].lstrip("(")) > 0 and (more := next(rest, None)):
            end = more.end()
        if depth(text[start:end].lstrip("(")) > 0:
            end = match.end()
        found.append(Span(start, end))
        position = end + len(text[end:]) - len(text[end:].lstrip(" \n"))
    return found


def bare(text: str, span: Span) -> Span:
    """``span`` without the marks and the brackets of the sentence around it."""
    start, end = span
    surplus = depth(text[start:end])
    while end > start and text[end - 1] in ".,;:?!" or (surplus < 0 and text[end - 1] == ")"):
        surplus += text[end - 1] == ")"
        end -= 1
    while surplus > 0 and text[start] == "(":
        surplus, start = surplus - 1, start + 1
    if re.fullmatch(r"\([^(),]*\)", text[start:end]):
        start, end = start + 1, end - 1
    return Span(start, end - 2 * text[start:end].endswith("'s"))


def is_word(name: re.Match[str]) -> bool:
    """Whether ``name``, a part of a run of words, is one of these and no symbol."""
    before, after = name.string[: name.start()].rstrip(), name.string[name.end() :].lstrip()
    opened = before.endswith(tuple("-+=/<>~|([,;"))
    closed = after.startswith(tuple("-+=/<>~|)],;^"))
    if name[0] in ("a", "A", "I"):
        return not (opened or closed)
    if name[0] in SUMS:
        return not after or not (opened or before[-1:].isdigit())
    return name[0] in WORDS or (name[0] in AMBIGUOUS and not (opened and closed))


def formula(text: str, before: str) -> str:
    """``text``, which stands after the word ``before``, as LaTeX.

    Raises:
      NoFormula: if it is none, or could be something else.
    """
    text = " ".join(text.split())
    names = re.finditer(r"(?<![\w^])[A-Za-z]+(?![\w(\[^])", text)
    has_sign = SIGN.search(text) or (before == "in" and INTERVAL.fullmatch(text))
    if not has_sign or OTHER.search(text) or any(map(is_word, names)):
        raise NoFormula(text)
    return latex(text, inline=True)


def longest(text: str, words: list[Span], before: str) -> tuple[int, Span, str]:
    """The longest formula that begins with the first of ``words``: how many words, where, LaTeX.

    It ends before a comma or another mark, and has no word of a sentence.

    Raises:
      NoFormula: if no formula begins there.
    """
    marks = (n for n, word in enumerate(words, 1) if MARK.search(text[slice(*word)]))
    for count in range(next(marks, len(words)), 0, -1):
        span = bare(text, Span(words[0].start, words[count - 1].end))
        with contextlib.suppress(NoFormula):
            return count, span, formula(text[slice(*span)], before)
    raise NoFormula(text)


def is_whole(before: str, after: str, *, opened: bool, closed: bool) -> bool:
    """Whether a formula between these words is no part of one that is not read as a whole.

    ``opened``, ``closed``: whether brackets or marks of the sentence are between.
    """
    starts = before == "" or before[-1] in ".,;:" + ")" * opened or PLAIN.fullmatch(before)
    return bool(starts and (closed or after in ("", "(") or PLAIN.fullmatch(after)))


def formulas(text: str) -> Iterator[tuple[Span, str]]:
    """The formulas in ``text``, and their LaTeX."""
    before, words = "", units(text)
    while words:
        count = 1
        with contextlib.suppress(NoFormula):
            count, span, tex = longest(text, words, before)
            after = text[slice(*words[count])] if count < len(words) else ""
            opened, closed = span.start > words[0].start, span.end < words[count - 1].end
            initial = INITIAL.match(text, span.start) and before[-1:] in ("", "d", ",")
            label = before.lower() in PARTS or initial
            if is_whole(before, after, opened=opened, closed=closed) and not label:
                yield span, tex
        before, words = text[slice(*words[count - 1])], words[count:]
