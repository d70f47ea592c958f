"""How the site is made: `sphinx-build -W --keep-going docs OUT`; it needs no network, and neither do the pages."""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

# The docstrings are those of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

project = "latentgnn"
author = "The latentgnn developers"
project_copyright = author
version = release = version_of("latentgnn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
# A page that the navigation names and that is not there yet is left out. A page that is there and that the navigation
# does not name is still a warning.
suppress_warnings = ["toc.not_readable"]

myst_heading_anchors = 4
myst_links_external_new_tab = False

# A block without a language is commands, or what they print.
highlight_language = "none"
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = "latentgnn"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6f91", "color-brand-content": "#1f6f91"},
    "dark_css_variables": {"color-brand-primary": "#6ec1e4", "color-brand-content": "#6ec1e4"},
}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def link_files(app: Any, page: str, source: list[str]) -> None:
    """Markdown outside of the site, such as results, is a download and no page; folders are no links."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*/\)", r"\1", source[0])
    source[0] = re.sub(r"\]\((\.\./[^)#:]+\.md)\)", r"](path:\1)", source[0])


def keep_stars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """The star of a shape such as (B, C, *spatial) begins no emphasis."""
    lines[:] = [re.sub(r"(?<!`)(\([^)`]*)\*spatial", r"\1\\*spatial", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", keep_stars)
