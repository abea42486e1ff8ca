"""A Sphinx extension that makes the fields of a config objects, which the search jumps to.

The page of the fields marks the name of each with an anchor: `` `eval.tau`{#eval-tau} ``.
"""

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains import Domain, ObjType

PAGE = "fields"


class Config(Domain):
    """The fields of a config, and the anchors of their definitions."""

    name = "config"
    label = "Config"
    object_types = {"field": ObjType("field")}
    initial_data = {"anchors": {}}

    def process_doc(self, env: Any, docname: str, document: nodes.document) -> None:
        if docname == PAGE:
            names = (node for node in document.findall(nodes.literal) if node["ids"])
            self.data["anchors"] = {node.astext(): node["ids"][0] for node in names}

    def merge_domaindata(self, docnames: set[str], otherdata: dict[str, Any]) -> None:
        if PAGE in docnames:
            self.data["anchors"] = otherdata["anchors"]

    def get_objects(self) -> Iterator[tuple[str, str, str, str, str, int]]:
        for name, anchor in self.data["anchors"].items():
            yield name, name, "field", PAGE, anchor, 0


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_domain(Config)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
