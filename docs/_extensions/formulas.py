"""From the formulas of docstrings, which are plain text, to LaTeX.

``latex("alpha' = f alpha")`` is ``\\alpha^{\\prime} = f \\alpha``. A formula has letters, numbers,
brackets, signs, and the names that are listed here. Other text is no formula (:class:`NoFormula`).
The rules of the docstrings are these:

    x_t, x_{i-1}, y_(k+1)   subscripts; ^ makes superscripts; x', x* and x^ are x with ', *, a hat
    a b / c d               the product before " / ", over the one factor after it, times d
    1/2 a, dx/dt, 1/q(v)    without spaces, / divides only the factor before it
    a * b                   the product of the elements
    |x|, p(y | x), p(y|x)   a bar with spaces on both sides, or on none, is that of a condition
"""

import re
from typing import NamedTuple

# They act on what follows. A sum ends at the next sign; it may stand below a slash.
LARGE = {"sum": r"\sum", "prod": r"\prod", "integral": r"\int", "int": r"\int"}
LARGE |= {"E": r"\mathbb{E}", "mean": r"\operatorname{mean}"}
FUNCTIONS = {"grad": r"\nabla", "div": r"\nabla \cdot"}
for known in ("log", "exp", "sin", "cos", "tanh", "det", "max", "min"):
    FUNCTIONS[known] = rf"\{known}"
for known in (
    *("sigmoid", "softplus", "softmax", "logit", "expm1", "log1p"),
    *("tr", "cov", "var", "sd", "erf", "diag", "Cov", "KL"),
):
    FUNCTIONS[known] = rf"\operatorname{{{known}}}"
FUNCTIONS["log2"] = r"\log_{2}"
LETTERS = {"eps": r"\varepsilon"}
for known in (
    *("alpha", "beta", "gamma", "chi", "kappa", "lambda", "mu", "phi", "pi", "rho", "sigma", "tau"),
    *("theta", "eta", "Phi"),
):
    LETTERS[known] = rf"\{known}"
# Quantities whose names are words, and words that separate formulas.
QUANTITIES = {
    *("prior", "diffusion", "divergence", "correction", "reconstruction", "decoder", "excess"),
    *("nats", "bits/dim", "value", "weight", "loss", "SNR", "snr", "ESS", "covariance", "freedom"),
    *("stderr", "std", "noise", "score", "shift", "scale", "path", "found", "before", "pixels"),
}
WORDS = {
    *("for", "every", "where", "in", "from", "to", "has", "is", "limited", "with", "of", "over"),
    *("uniform", "truncated", "and", "held", "constant", "the", "channels", "proportional"),
}
SIGNS = {name: name for name in ("+", "-", "=", "<", ">", ",", ";")}
SIGNS |= {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "~": r"\sim", "->": r"\to"}
SIGNS |= {"<-": r"\leftarrow", "=>": r"\Rightarrow", "-+": r"\mp", "+-": r"\pm"}
CLOSING = {"(": ")", "[": "])", "|": "|"}  # [0, 1) is an interval
TOKEN = re.compile(
    r"(?P<number>\d+(\.\d+)?(e-?\d+)?)(?![.\d]*\w)|(?P<name>bits/dim|[A-Za-z]+[0-9]*p?)"
    r"|``(?P<code>[^`]+)``|(?P<sign>=>|<=|>=|!=|->|<-|-\+|\+-|[-+=<>~,;])|(?P<other>\|\||\.\.+|[\[\](){}|/_^'*.])"
)


class NoFormula(ValueError):
    """A text is no formula, or one that these rules do not cover."""


class Token(NamedTuple):
    """A part of the text; ``gap``: whether there is space before it."""

    kind: str
    text: str
    gap: bool


class Item(NamedTuple):
    """A part of the result: a factor, word, function, large operator or sign."""

    kind: str
    tex: str


class Parser:
    """Reads a formula from left to right. ``inline``: it stands in a sentence."""

    def __init__(self, text: str, *, inline: bool = False) -> None:
        self.tokens, self.inline, position = [], inline, 0
        while position < len(text):
            start = position + len(text[position:]) - len(text[position:].lstrip())
            if not (match := TOKEN.match(text, start)):
                raise NoFormula(text[start:])
            self.tokens.append(Token(str(match.lastgroup), match[0], start > position))
            position = match.end()
        self.tokens += [Token("end", "", True)] * 2

    def take(self) -> Token:
        """The next token, which is then over."""
        return self.tokens.pop(0)

    def touches(self, *texts: str) -> bool:
        """Whether the next token is one of ``texts``, without space before it."""
        return self.tokens[0].text in texts and not self.tokens[0].gap

    def formula(self, closing: str = "") -> str:
        """What stands before a bracket or bar in ``closing``, or before the end."""
        items: list[Item] = []
        while not self.at_end(closing):
            items.append(self.item(items))
        return joined(items)

    def at_end(self, closing: str) -> bool:
        """Whether the next token is the end of what began with a bracket or bar."""
        kind, text, gap = self.tokens[0]
        if kind == "end" and closing:
            raise NoFormula(f"no {closing}")
        if closing == "|":
            return text == "|" and not gap
        return kind == "end" or (text != "" and text in closing)

    def item(self, items: list[Item]) -> Item:
        """The next part; a slash takes what it divides from the end of ``items``."""
        kind, text, gap = self.tokens[0]
        after = self.tokens[1]
        if text == "/":
            return self.fraction(items)
        if (
            text in ("|", "||")
            and gap == after.gap
            and items
            and items[-1].kind in ("factor", "word")
        ):
            self.take()
            return Item("sign", r"\mid" if text == "|" else r"\,\|\,")
        if text == "." and (after.kind == "end" or after.text == "|" or (gap and after.gap)):
            self.take()
            kind = "factor" if after.text == "|" else "sign"
            return Item(kind, "." if after.kind == "end" else r"\cdot")
        if text == "*" and gap and after.gap:
            self.take()
            return Item("sign", r"\odot")
        if kind == "sign" or text.startswith("..") or text in WORDS:
            self.take()
            word = rf"\text{{ {text} }}" if text in WORDS else r"\ldots"
            return Item("sign", SIGNS.get(text, word))
        return self.factor()

    def fraction(self, items: list[Item]) -> Item:
        """What stands before the slash, over what stands after it."""
        tight = not self.take().gap
        above: list[Item] = []
        while items and items[-1].kind in ("factor", "word") and not (tight and above):
            above.insert(0, items.pop())
        if not above or (items and items[-1].kind == "function" and not tight):
            raise NoFormula("it is not clear what a slash divides")
        below = [self.factor()]
        if below[0].kind == "function":
            raise NoFormula("a function below a slash needs brackets")
        while below[0].kind == "large" and self.tokens[0].kind in ("name", "number"):
            below.append(self.factor())
        if self.touches("/"):
            raise NoFormula("it is not clear what a second slash divides")
        numbers = all(item.tex.isdigit() for item in (*above, *below))
        if self.inline and not numbers and not self.continues():
            return Item("factor", f"{joined(above)} / {joined(below)}")
        over, under = naked(joined(above)), naked(joined(below))
        return Item("factor", rf"\{'t' if numbers else ''}frac{{{over}}}{{{under}}}")

    def continues(self) -> bool:
        """Whether the next token is a further factor, or divides what is before it."""
        kind, text, gap = self.tokens[0]
        bar = text == "|" and gap and not self.tokens[1].gap
        return bar or kind in ("name", "number") or text in ("(", "[", "/")

    def factor(self) -> Item:
        """A name, a number or a bracket, with its marks and arguments."""
        kind, text, _ = self.tokens[0]
        if text in CLOSING:
            return Item("factor", self.marks(self.bracket()))
        self.take()
        if kind == "number":
            return Item("factor", self.marks(power_of_ten(text)))
        if kind == "code":
            return Item("word", rf"\text{{{text[2:-2]}}}")
        if kind != "name":
            raise NoFormula(text)
        if text == "sqrt" and self.touches("("):
            return Item("factor", rf"\sqrt{{{naked(self.bracket())}}}")
        called = self.touches("(", "[")
        kind, tex = name(text, called=called)
        if kind == "large" and (self.tokens[0].kind == "sign" or self.touches(")")):
            kind, tex = "word", rf"\text{{{text}}}"  # It has no summand: it is a quantity.
        tex = self.marks(tex)
        if self.touches("(", "[") or (text == "E" and self.tokens[0].text == "["):
            kind, tex = "word" if kind == "word" else "factor", self.marks(tex + self.bracket())
            if tex.startswith(r"\operatorname"):
                kind = "word"
        return Item(kind, tex)

    def bracket(self) -> str:
        """A pair of brackets or bars, and what is in it."""
        left = self.take().text
        inside = self.formula(CLOSING[left])
        right = self.take().text
        if (left, right) == ("[", ")") and "," not in inside:
            raise NoFormula("[ is closed by )")
        if not inside or inside.endswith(","):
            raise NoFormula("a shape")
        stretched = left == "|" or re.search(r"\\(frac|sum|int|sqrt|left)", inside)
        tall = r"\left" if stretched else ""
        return f"{tall}{left} {inside} {tall.replace('left', 'right')}{right}"

    def marks(self, tex: str) -> str:
        """``tex`` with the subscripts, superscripts, primes, stars and hats that follow it."""
        below, above = [], []
        if match := re.fullmatch(r"([A-Za-z])(\d)", tex):
            tex, below = match[1], [match[2]]
        while self.touches("_", "^", "'", "*"):
            mark, after = self.take().text, self.tokens[0]
            ends = after.gap or after.text in (",", ")", "]", "(", "|")
            if mark == "'" and not (below or above):
                tex += mark
            elif mark == "*" and ends:
                above.append("*")
            elif mark == "^" and (after.gap or after.text in (",", ")", "|")):
                tex = rf"\hat{{{tex}}}"
            elif mark in "*'":
                raise NoFormula(mark)
            else:
                (below if mark == "_" else above).append(self.script(mark))
        tex += f"_{{{', '.join(below)}}}" if below else ""
        return tex + (f"^{{{' '.join(above)}}}" if above else "")

    def script(self, mark: str) -> str:
        """What stands after _ or ^."""
        if self.touches("(", "{"):
            inside = self.formula({"(": ")", "{": "}"}[self.take().text])
            self.take()
            return re.sub(r"\\tfrac\{(\d+)\}\{(\d+)\}", r"\1/\2", inside)
        minus = self.take().text if mark == "^" and self.touches("-") else ""
        kind, text, _ = self.take()
        if kind == "number" and self.touches("/") and self.tokens[1].kind == "number":
            raise NoFormula("a fraction as an exponent needs brackets")
        if kind not in ("number", "name"):
            raise NoFormula(text)
        tex = text if kind == "number" or len(text) <= 2 else rf"\text{{{text}}}"
        tex = LETTERS.get(text, tex)
        if mark == "_" and self.touches("'"):
            self.take()
            tex += "'"
        return minus + (self.marks(tex) if mark == "^" and self.touches("_") else tex)


def name(text: str, *, called: bool) -> Item:
    """What a name stands for. N is the normal distribution if ``called``."""
    if text in LARGE:
        return Item("large", LARGE[text])
    if text in FUNCTIONS:
        return Item("function", FUNCTIONS[text])
    if text in QUANTITIES:
        return Item("word", rf"\text{{{text}}}")
    if called and text == "N":
        return Item("factor", r"\mathcal{N}")
    if text in LETTERS or re.fullmatch(r"[A-Za-z]\d?", text):
        return Item("factor", LETTERS.get(text, text))
    if text[0] == "d" and (len(text) == 2 or text[1:] in LETTERS):
        return Item("word", f"d {LETTERS.get(text[1:], text[1:])}")
    raise NoFormula(text)


def power_of_ten(number: str) -> str:
    """A number such as 2e-5 as it is written by hand."""
    factor, _, power = number.partition("e")
    factor = "" if factor == "1" else rf"{factor} \cdot "
    return f"{factor}10^{{{power}}}" if power else number


def joined(items: list[Item]) -> str:
    """The parts in a row, with thin spaces around words and before operators."""
    found = ""
    for before, (kind, tex) in zip([None, *items], items, strict=False):
        product = before is not None and "sign" not in (before.kind, kind)
        thin = product and (kind in ("word", "large") or before.kind == "word")
        thin = thin or (product and tex.startswith((r"\operatorname", r"\nabla")))
        found += (r" \, " if thin else " ") + tex
    return found.strip().replace(r" } \text{ ", " ")  # Words next to each other are one text.


def naked(tex: str) -> str:
    """``tex`` without the brackets around all of it."""
    match = re.fullmatch(r"(?:\\left)?[(\[] (.*) (?:\\right)?[)\]]", tex)
    depth = 0
    for sign in re.findall(r"[()\[\]]|(?<!\\),", match[1]) if match else [")"]:
        depth += {"(": 1, "[": 1, ",": 0}.get(sign, -1)
        if depth < 0 or (depth == 0 and sign == ","):
            return tex
    return match[1] if match else tex


def latex(text: str, *, inline: bool = False) -> str:
    """One line of formulas as LaTeX; a wide gap stays one.

    A quotient in a sentence, ``inline``, keeps its slash if nothing is multiplied with it.

    Raises:
      NoFormula: if ``text`` is no formula.
    """
    parts = re.split(r"(?<![=<>~\s])\s{2,}(?![=<~\s])", text.strip())
    tex = r" \qquad ".join(Parser(part, inline=inline).formula() for part in parts)
    if not re.sub(r"\\text\{[^}]*\}|[\s,.]", "", tex):
        raise NoFormula("words only")
    return tex
