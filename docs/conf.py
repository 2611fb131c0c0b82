"""
How the documentation is built: ``make docs``, and a test that it builds.
"""

from __future__ import annotations

from whispercache.version import __version__

project = "whispercache"
author = "the whispercache authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
# Links within a page are made from its headings, as on GitHub.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "whispercache"
html_static_path: list[str] = []

autodoc_member_order = "bysource"
# Types are in the signatures; a second list of them would repeat that.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
