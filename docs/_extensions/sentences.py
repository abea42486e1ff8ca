"""Finds the formulas in the sentences of docstrings.

A formula is a run of words that ``formulas`` can read, as long as possible. It has a sign of one: a
subscript, an operator, a Greek letter, a function with its argument. A single letter is a formula
too, but for "a", "A" and "I". What may be anything else stays as it is: words, shapes, flags, file
names, and each part of a formula that ``formulas`` does not read as a whole.
"""

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
MARK = re.compile(r"[,;:?!]$|[^.]\.$")
INITIAL = re.compile(r"[A-Z]\. [A-Z]")
INTERVAL = re.compile(r"[\[(][^,]+, [^,]+[\])](\^\w)?")
SIGN = re.compile(
    rf"[_^<>~|]| [-+=/] |\w\*|\b(?:{GREEK})\b|\b(?:\w|{FUNCTION})[(\[]|\b(?:{FUNCTION}) [A-Za-z]\b"
    rf"|\b(?:\d|d[a-z]|d(?:{GREEK}))/d?[A-Za-z]\b|^-?\d+ [b-zB-HJ-Z]$|^-?[b-zB-HJ-Z]$"
)
# What a formula does not have: hyphens, flags, arguments by keyword, units, commas in numbers, a
# derivative of sixth order, a number after a factor, the shape of an array, and names with an
# underscore that are those of Python.
OTHER = re.compile(
    r"[A-Za-z]-[A-Za-z]|--|\w=|=\w|\bnats\b|\bbits/|\d,\d|\^\(\d+\)|(?<=[\w)\]])(?<!log)(?<!sum_\w) \d|\w \([^()]*,"
    rf"|_(?!(?:{GREEK})\b)[A-Za-z]{{4}}|\b(?!(?:{GREEK})_)[A-Za-z]{{2,}}_[A-Za-z]{{2}}|log_[a-z]"
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
    operator = before.endswith(tuple("-+=/<>~|([,;"))
    if name[0] in ("a", "A", "I"):
        return not operator and not after.startswith(tuple("-+=/<>~|)],"))
    if name[0] in SUMS:
        return not after or not (operator or before[-1:].isdigit())
    if name[0] in AMBIGUOUS:
        return not operator or not after.startswith(tuple("-+=/<>~|)],;^"))
    return name[0] in WORDS


def formula(text: str, before: str) -> str:
    """``text``, which stands after the word ``before``, as LaTeX.

    Raises:
      NoFormula: if it is none, or could be something else.
    """
    text = " ".join(text.split())
    if not (SIGN.search(text) or (before == "in" and INTERVAL.fullmatch(text))):
        raise NoFormula(text)
    names = re.finditer(r"(?<![\w^])[A-Za-z]+(?![\w(\[^])", text)
    if OTHER.search(text) or re.search(r"^[-+=<>~/*.,;:]+( |$)| [-+=<>~/*.|]+$", text):
        raise NoFormula(text)
    if any(map(is_word, names)):
        raise NoFormula(text)
    return latex(text)


def runs(text: str, words: list[Span], first: int) -> Iterator[tuple[int, Span]]:
    """The runs of words from the one with number ``first`` on, the longest first, and their ends.

    A run ends at a comma or another mark.
    """
    last = first
    while last < len(words) - 1 and not MARK.search(text[slice(*words[last])]):
        last += 1
    for end in range(last, first - 1, -1):
        yield end, bare(text, Span(words[first].start, words[end].end))


def formulas(text: str) -> Iterator[tuple[Span, str]]:
    """The formulas in ``text``, and their LaTeX."""
    words = units(text)
    shown = [text[slice(*word)] for word in words]
    number = 0
    while number < len(words):
        before = shown[number - 1] if number else ""
        for end, span in runs(text, words, number):
            try:
                tex = formula(text[slice(*span)], before)
            except NoFormula:
                continue
            opened, closed = span.start > words[number].start, span.end < words[end].end
            after = shown[end + 1] if end + 1 < len(words) else ""
            if (
                (before == "" or PLAIN.fullmatch(before) or before[-1] in (".,;:)" if opened else ".,;:"))
                and (closed or after in ("", "(") or PLAIN.fullmatch(after))
                and not (INITIAL.match(text, span.start) and before[-1:] in ("", "d", ","))
            ):
                yield span, tex
            number = end
            break
        number += 1
