"""Every Python block of the documentation runs by itself, and every link leads somewhere."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbml.likelihood import ode

ROOT = Path(__file__).parents[1]
# The folders of all pages that are written by hand. A new page in one of them is tested too.
FOLDERS = ("", "guides", "explanations", "benchmarks", "api")
PAGES = [page for folder in FOLDERS for page in (ROOT / "docs" / folder).glob("*.md")]
DOCS = ("README.md", *sorted(p.relative_to(ROOT).as_posix() for p in PAGES))
# The pages that are read on GitHub. The pages of docs/ are read on the site.
SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob(".github/*.md")),
)
SITE = "https://sbml-jax.github.io/sbml/latest/"


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, code) of each ```python block; ``line`` is that of its first line of code, from 1."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def execute(name: str, line: int, code: str) -> None:
    """Run ``code`` in a fresh namespace; a traceback points into the file it was taken from."""
    padded = "\n" * (line - 1) + code
    exec(compile(padded, str(ROOT / name), "exec"), {"__name__": "__main__"})


BLOCKS = [(name, *block) for name in DOCS for block in blocks((ROOT / name).read_text())]
NEEDS_A_RUN = "docs/guides/resuming.md"
LADDER = "docs/ladder.md"  # Its examples are run by test_ladder.py.
# Run by test_pytorch.py.
NEEDS_TORCH = [block for block in BLOCKS if "import torch" in block[2] and block[0] != LADDER]
# If another block begins with the code of a block, only the longer one is run.
LONGEST = [
    block
    for block in BLOCKS
    if block[0] not in (NEEDS_A_RUN, LADDER)
    and block not in NEEDS_TORCH
    and not any(o[2] != block[2] and o[2].startswith(block[2]) for o in BLOCKS)
]

OTHERS = re.compile(r"^(from|import) (blackjax|flowjax|numpyro)", re.MULTILINE)
NEEDS_OTHERS = [block for block in LONGEST if OTHERS.search(block[2])]  # by test_bijections.py


@pytest.fixture(scope="module")
def three_steps() -> Iterator[None]:
    """Solve every ODE by three steps of Heun's method, which compile faster. Only whether a block
    runs is tested, not what it prints."""
    integrate = ode._integrate

    def coarse(rates: Any, method: Any, t0: Any, t1: Any, start: Any, solver: Any, *rest: Any):
        solver = dataclasses.replace(solver, fixed_steps=3)
        return integrate(rates, method, t0, t1, start, solver, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ode, "_integrate", coarse)
        for name in ("tsit5", "dopri5"):
            patch.setitem(ode.METHODS, name, ode.METHODS["heun"])
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("three_steps")
@pytest.mark.parametrize(
    ("name", "line", "code"),
    [pytest.param(*b, id=f"{b[0]}:{b[1]}") for b in LONGEST if b not in NEEDS_OTHERS],
)
def test_the_block_runs(name: str, line: int, code: str) -> None:
    try:
        execute(name, line, code)
    except Exception as error:
        error.add_note(f"in the block of {name} that starts on line {line}")
        raise


@pytest.mark.slow
def test_the_block_about_a_run_runs(digits_model, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits_vp").symlink_to(digits_model)
    monkeypatch.chdir(tmp_path)
    [(name, line, code)] = [block for block in BLOCKS if block[0] == NEEDS_A_RUN]
    execute(name, line, code)
    assert "bits/dim by uniform dequantization at t=1e-5, 95% interval" in capsys.readouterr().out


def test_no_block_is_overlooked() -> None:
    for name in DOCS:
        fences = (ROOT / name).read_text().count("```python")
        assert fences == sum(block[0] == name for block in BLOCKS)
    assert {"README.md", "docs/getting_started.md", "docs/guides/sde.md"} <= {b[0] for b in BLOCKS}


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    links = {
        path
        for name in DOCS
        for path in re.findall(r"\]\(repo:([^)]+)\)", (ROOT / name).read_text())
    }
    assert links and all((ROOT / path).exists() for path in links), links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub, and MyST, give to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_somewhere(link: str, folder: Path) -> bool:
    """Whether a link of a page in ``folder`` leads to a file, and to a heading in it.

    A link to a page of the site counts as a link to the file of docs/ from which it is built.
    """
    path, _, anchor = link.partition("#")
    if path.startswith(SITE):
        page = path.removeprefix(SITE).removesuffix(".html") or "index"
        target = ROOT / "docs" / f"{page}.md"
        if page.startswith("reference/"):
            return (ROOT / "sbml" / f"{page.split('/')[1]}.py").exists() and not anchor
    else:
        target = folder / path if path else folder / "README.md"
        if "docs/" in path and target.suffix == ".md":
            return False  # The page has Sphinx roles, which GitHub shows as text.
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target.read_text())


@pytest.mark.parametrize("name", SHOWN)
def test_what_github_renders_has_no_role_and_no_dead_link(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.findall(r"\{[\w:]+\}`|^```\{\w+\}|\]\(repo:", text, re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    own = [link for link in links if link.startswith(SITE) or "://" not in link]
    dead = [link for link in own if not leads_somewhere(link, (ROOT / name).parent)]
    assert own or name != "README.md"
    assert not dead, dead


def test_each_picture_of_the_gallery_leads_to_a_task() -> None:
    """A scaled picture would lead to its file instead, without the class."""
    text = (ROOT / "docs/gallery.md").read_text()
    links = re.findall(r"\[!\[[^\]]*\]\([^)]*\)\{(\.[\w-]+)[^}]*\}\]\(([^)]*)\)", text)
    assert len(links) == text.count("![") > 0
    assert {kind for kind, _ in links} <= {".no-scaled-link", ".only-light", ".only-dark"}
    assert all(leads_somewhere(link, ROOT / "docs") for _, link in links)


def test_a_dead_link_is_found() -> None:
    assert leads_somewhere("LICENSE", ROOT) and not leads_somewhere("LICENCE", ROOT)
    assert leads_somewhere(f"{SITE}explanations/error_bars.html#the-prior", ROOT)
    for dead in ("explanations/error_bars.html#prior", "nowhere.html", "reference/nothing.html"):
        assert not leads_somewhere(f"{SITE}{dead}", ROOT)
    assert not leads_somewhere("docs/fields.md", ROOT)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600


def test_an_error_names_its_line() -> None:
    [(line, code)] = blocks("text\n\n```python\nx = 1\ny = x / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        execute("README.md", line, code)
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rules by which formulas of docstrings are typeset."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    return importlib.import_module("formulas")


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("alpha' = f alpha", r"\alpha' = f \alpha"),
        ("|sigma(t) s(x_t, t) + z|^2", r"\left| \sigma( t ) s( x_{t} , t ) + z \right|^{2}"),
        ("log p(x | y)", r"\log p( x \mid y )"),
        ("grad_x log p_t(x)", r"\nabla_{x} \log p_{t}( x )"),
        ("sum_i w_{i-1} / 2", r"\sum_{i} \frac{w_{i - 1}}{2}"),
        ("a b / c d", r"\frac{a b}{c} d"),
        ("[k, k+1) / L", r"\frac{[ k , k + 1 )}{L}"),
        ("E|z - x^|^2 < 2e-5", r"\mathbb{E} \left| z - \hat{x} \right|^{2} < 2 \cdot 10^{-5}"),
        ("1/2 sqrt(1 - alpha^2)", r"\tfrac{1}{2} \sqrt{1 - \alpha^{2}}"),
    ],
)
def test_a_formula_is_typeset_by_rule(text: str, latex: str, formulas: Any) -> None:
    assert formulas.latex(text) == latex


@pytest.mark.parametrize(
    "text", ["log x / y", "2 / sum_j 1/v_j", "density = Density(score)", "x = [1, 2", "two words"]
)
def test_what_the_rules_do_not_cover_stays_as_it_is(text: str, formulas: Any) -> None:
    with pytest.raises(formulas.NoFormula):
        formulas.latex(text)


@pytest.mark.parametrize(
    "sentence",
    [
        "the SDE $dx = f(t) x dt + g(t) dw$ on $t$ in $[0, 1]$.",
        "The kernel is $p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)$ with",
        "$T$, or the time at which $alpha / sigma$ is small if $alpha(T) = 0$.",
        "a sample $x$ and its $log |det dx/dy|$ (in nats), $(x_0, z)$'s mean",
        "what a $log p_t$ of a path is, from $eps$ to $T$",
        "$-log P(k) <= E[-log p(k + u) + log q(u | pixels)]$ for $t = 1e-5$.",
        "noise ($rho = sigma / alpha$) and $W_i / sum W$, the sum",
        # Words, shapes, code, flags, files and versions stay.
        "a score, a mean and a sum of I, the prior and the noise in nats of log-SNR",
        "images (n, h, w, c), numbers (n,) of a d x d matrix, uint8 (*s)",
        "``alpha = 1`` with --mode=eval -h, k=3, a.npz, image_size, log_det, v0.1 and float32",
        "E. Alpaydin and C. Kaynak, e.g. 4x4 pixels, 16-bit, i.e. NCSN++, appendix G.",
        # So does all of a formula with a part that is not read.
        "x = foo(y) + 2 and alpha * weight, the loss(x, t, z), sigma = ``std``",
        "with C = basis diag(l) basis^T, $p(x)$ but (b - a)^7 / 1,512,000 h^(6)",
    ],
)
def test_formulas_are_found_in_sentences(sentence: str, formulas: Any) -> None:
    """They are those between dollar signs, which docstrings do not have."""
    sentences = importlib.import_module("sentences")
    found = [
        text[span.start : span.end]
        for text in re.split(r"``.*?``", sentence.replace("$", ""))
        for span, _ in sentences.formulas(text)
    ]
    assert found == re.findall(r"\$(.*?)\$", sentence)


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("x_t / sqrt(v)", r"x_{t} / \sqrt{v}"),
        ("1/2 |z - e|^2 / d", r"\tfrac{1}{2} \left| z - e \right|^{2} / d"),
        ("d/dt log p", r"\frac{d}{d t} \log p"),  # A factor follows: the slash would divide it too.
    ],
)
def test_a_quotient_in_a_sentence_keeps_its_slash(text: str, latex: str, formulas: Any) -> None:
    assert formulas.latex(text, inline=True) == latex


def test_tables_of_docstrings_are_indented() -> None:
    """A line with columns that is not indented would become running text."""
    for path in sorted((ROOT / "sbml").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                assert not re.findall(r"^\S.*\S {3,}\S.*", text, re.M), path
