"""Sphinx's settings: pages in MyST Markdown, notebooks by myst-nb, the theme furo.

    sphinx-build -W --keep-going -n -b html docs docs/_build/html   builds; a warning is an error
    sphinx-autobuild docs docs/_build/html --watch sbml             serves; builds again on changes
    ... -D nb_execution_mode=force                                  executes five of the notebooks

The build downloads only the inventories of other projects' documentation. If one of them cannot be
reached, links to that project are plain text. SBML_DOCS_OFFLINE=1 skips the download. Equations are
MathML, which browsers draw themselves, so the pages need no network.
"""

import os
import sys
import urllib.error
import urllib.request
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sbml  # noqa: E402  From the checkout, whose folder stands first in the path.

setup_cfg = ConfigParser()
setup_cfg.read(ROOT / "setup.cfg")
URL = setup_cfg["metadata"]["url"]

# "latest" for the documentation of the branch main, or the name of a release, such as "v0.1.0".
VERSION = os.environ.get("SBML_DOCS_VERSION", "latest")
BRANCH = "main" if VERSION == "latest" else VERSION

project = "sbml"
author = "The sbml authors"
release = version = VERSION
html_title = f"sbml {sbml.__version__ if VERSION == 'latest' else VERSION}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "reference",
    "settings",
]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True
smartquotes_action = "qe"  # The dashes of --mode stay two.

# Pages.
myst_enable_extensions = [
    *("amsmath", "dollarmath", "attrs_inline", "attrs_block", "colon_fence", "deflist")
]
myst_heading_anchors = 3
# [text](repo:configs/digits_vp.py) is a link to a file of the repository.
myst_url_schemes = {
    "http": None,
    "https": None,
    "repo": {"url": f"{URL}/blob/{BRANCH}/{{{{path}}}}", "title": "{{path}}"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Notebooks show their stored outputs, unless they are executed.
nb_execution_mode = "off"
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "notebooks")
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["tutorials/cifar10_tpu.ipynb"]  # needs an accelerator for days

# The reference.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # A method without its own docstring has that of the base class.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Types that need no link: those of other projects, whose inventories may be out of reach, and those
# of files whose names begin with an underscore, which have no page.
nitpick_ignore_regex = [
    (r"py:.*", r"sbml\.(\w+\.)*_\w+\.\w+"),
    (r"py:.*", r"tuple\[~typing\.Annotated\[.*"),
    (r"py:.*", r"sbml\.core\.progress\..*"),
    (r"py:.*", r"annotated_types\..*|FieldInfo|NoneType|Ge|Le|Lt|MinLen|MaxLen|[\d.]+"),
    (
        r"py:.*",
        r"(abc|array_record|collections|dataclasses|diffrax|equinox|flax|functools|grain|jax|jaxlib"
        r"|jaxtyping|ml_collections|np|numpy|optax|os|pathlib|PIL|torch|types|typing)\..*",
    ),
    (
        r"py:.*",
        r"(tuple\[\w+|Any|Callable|None|bool|bytes|dict|float|int|list|object|str|tuple|type)",
    ),
    (r"py:.*", r"(ndarray|np\.\w+|int64|uint8|Array|Float|Integer|Num|Shaped|UInt8|Bool|'.*')"),
]


def reachable(url: str) -> bool:
    """Whether the inventory of the documentation at ``url`` can be fetched."""
    try:
        request = urllib.request.Request(f"{url}objects.inv", method="HEAD")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


OTHERS = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "diffrax": "https://docs.kidger.site/diffrax/",
}
offline = os.environ.get("SBML_DOCS_OFFLINE", "") not in ("", "0")
intersphinx_mapping = {
    name: (url, None) for name, url in OTHERS.items() if not offline and reachable(url)
}
intersphinx_timeout = 10

# furo has its own scripts and colours, and the font of the equations is in _static, so pages load
# nothing from other servers.
html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_baseurl = "https://sbml-jax.github.io/sbml/latest/"  # the address that search engines show
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "versions.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_css_files = ["sbml.css"]
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "source_repository": f"{URL}/",
    "source_branch": BRANCH,
    "source_directory": "docs/",
}
