"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

from inspect import isclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import airflow_provider_heygen
from airflow_provider_heygen import api, exceptions, waiting
from airflow_provider_heygen.emulator import Behaviour, Fault

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

project = "airflow-provider-heygen"
version = release = airflow_provider_heygen.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["tables.css"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
maximum_signature_line_length = 100
nitpicky = True
nitpick_ignore_regex = [
    # Python's, Airflow's and others', which these pages do not describe.
    (r"py:\w+", r"(?!airflow_provider_heygen|HeyGen).*"),
    # In signatures, and nobody's business.
    (r"py:class", r".*\.(T|Call)"),
    (r"py:class", r"airflow_provider_heygen\.emulator\.state\..*"),
]


def find_by_short_name(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Let ``:raises HeyGenError:`` lead to where that is described, whatever module it stands in."""
    name = node.get("reftarget", "")
    for home in (exceptions, api, waiting):
        if node.get("refdomain") == "py" and name.isidentifier() and hasattr(home, name):
            found: nodes.Node | None = env.domains.python_domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], f"{home.__name__}.{name}", node, contnode
            )
            return found
    return None


def hide_signature(_: Sphinx, __: str, ___: str, obj: Any, *____: Any) -> tuple[str, None] | None:
    """Spare the reader a model's signature, which is all validators; its docstring names the fields."""
    return ("", None) if isclass(obj) and issubclass(obj, BaseModel) else None


def describe_fields(_: Sphinx, __: str, ___: str, obj: Any, ____: Any, lines: list[str]) -> None:
    """Describe the emulator's settings by what they say of themselves."""
    if obj in (Behaviour, Fault):
        lines += [
            f":param {name}: {field.description}. Default: ``{field.default!r}``."
            for name, field in obj.model_fields.items()
        ]


def setup(app: Sphinx) -> None:
    """Register them."""
    app.connect("missing-reference", find_by_short_name)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("autodoc-process-docstring", describe_fields)
