"""How Sphinx builds the site."""

import re
import sys
from pathlib import Path

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import coconv_surgery  # noqa: E402

project = "coconv_surgery"
author = "The coconv_surgery developers"
copyright = "the coconv_surgery developers"
version = release = coconv_surgery.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "coconv_surgery"

myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are stored: `make notebooks`
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

# What docstrings name of ours must be on the site, but for what is not public; other projects' pages are not asked.
nitpicky = True
nitpick_ignore = [("py:class", "coconv_surgery.tracing.sites.Site")]
nitpick_ignore_regex = [("py:.*", r"(?!coconv_surgery\.).*"), ("py:.*", r"coconv_surgery\..*\._\w+")]

LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)\)")


def link_what_lies_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """A file of the repository is carried along; a folder is its README.md, or without one its name alone."""
    page = (HERE / docname).parent

    def carried(link: re.Match[str]) -> str:
        label, target = link[1], Path(link[2])
        if (page / target).resolve().is_relative_to(HERE):
            return link[0]
        if (page / target).is_dir():
            target = target / "README.md"
        return f"[{label}](path:{target.as_posix()})" if (page / target).exists() else label

    source[0] = LINK.sub(carried, source[0])


def shorten(app: Sphinx, env: object, node: pending_xref, contents: object) -> object:
    """Docstrings name a thing by its module; the site has it where it is imported from."""
    name = str(node.get("reftarget", "")).rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in coconv_surgery.__all__:
        return None
    domain = app.env.get_domain("py")
    return domain.resolve_xref(app.env, node["refdoc"], app.builder, "obj", f"coconv_surgery.{name}", node, contents)


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("source-read", link_what_lies_outside)
    app.connect("missing-reference", shorten)
