"""A Sphinx extension that writes equations as MathML.

Browsers show MathML without a script and without a network. The font is in ``_static``.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SPACE = '<mspace width="0.1667em"></mspace>'
# docutils writes an operator between a function and its argument, as in "log x", but browsers show
# it without a space. TeX leaves a space there, unless a parenthesis follows.
APPLICATION = re.compile(r'<mo>&ApplyFunction;</mo>(?!\s*<mo stretchy="false">\()')
# TeX also leaves a space before a function, as in "d log x", unless an operator stands there.
FACTOR = re.compile(
    r'((?:</m(?:i|n|frac|sub|sup|subsup|row|over|sqrt)>|<mo stretchy="false">\)</mo>)\s*)'
    r"(?=(?:<msub>\s*)?<mi>(?:log|exp|sin|cos|tanh|max|min|det)</mi>)"
)
# Of the two bars of a norm, browsers would stretch the first one only; they leave space at a slash.
TIGHT = re.compile(r'<mo(?: stretchy="false")?>([‖/])</mo>')


def markup(tex: str, *, as_block: bool) -> str:
    """``tex`` as a MathML element.

    Raises:
      ExtensionError: if docutils does not understand the equation; the message names it.
    """
    try:
        element = str(latex2mathml.tex2mathml(tex, as_block=as_block))
    except MathError as error:
        raise ExtensionError(f"the equation {tex!r}: {error}") from error
    element = FACTOR.sub(rf"\1{SPACE}", APPLICATION.sub(SPACE, element))
    return TIGHT.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', element)


def visit_inline(writer: Any, node: nodes.math) -> None:
    """Write an equation within a line."""
    writer.body.append(markup(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.math_block) -> None:
    """Write an equation on a line of its own, with its number and the anchors for references."""
    anchors = "".join(f'<span id="{each}"></span>' for each in node["ids"])
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    equation = markup(node.astext(), as_block=True)
    writer.body.append(f'<div class="math">{anchors}<div>{equation}</div>{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
