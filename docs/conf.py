"""
How the documentation is built: ``make docs``, and a test that it builds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.errors import ExtensionError

from whispercache.version import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "whispercache"
author = "the whispercache authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
# Links within a page are made from its headings, as on GitHub.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "whispercache"
# Furo's own underlines names of modules, as if they were links.
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

autodoc_member_order = "bysource"
# Types are in the signatures; a second list of them would repeat that.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Longer ones have a line for each parameter.
maximum_signature_line_length = 80
napoleon_numpy_docstring = False


def without_links_to_the_repository(app: Sphinx, _: str, source: list[str]) -> None:
    """
    Leaves the words of links to files of the repository, which only show beside it.
    """

    def words(link: re.Match[str]) -> str:
        if not (Path(app.srcdir) / link[2]).exists():
            raise ExtensionError(f"no such file: {link[2]}")
        return link[1]

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)\)", words, source[0])


def setup(app: Sphinx) -> None:
    """
    Has Sphinx call the above for each page.
    """
    app.connect("source-read", without_links_to_the_repository)
