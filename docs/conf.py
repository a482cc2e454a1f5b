"""Build the site: `make docs` calls Sphinx, which reads this file."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx_gallery.scrapers import figure_rst

from midflight.datasets import cache_folder

sys.path.append(str(Path(__file__).parent))
import tables

project = "midflight"
author = "the midflight authors"
release = version_of("midflight")
version = release
html_title = f"midflight {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinx_llms_txt",
]
exclude_patterns = ["results", "tutorials", "_build"]
suppress_warnings = ["config.cache"]  # the gallery has a function among its options

myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def figure_of(block: object, names: dict[str, Any], conf: dict[str, Any]) -> str:
    """Save the figure that a block of an example ends with, which pyplot does not know."""
    figure = names["example_globals"].get("___")
    if not isinstance(figure, Figure):
        return ""
    path = next(names["image_path_iterator"])
    figure.savefig(path, dpi=110)
    vertical = ", ".join(filter(None, (axes.get_ylabel() for axes in figure.axes)))
    alt = " against ".join(filter(None, (vertical, figure.axes[-1].get_xlabel())))
    return figure_rst([path], conf["src_dir"], alt)


not_run = ["train_gpt"]  # takes minutes
if not (cache_folder(None) / "fashion_mnist.npz").exists():  # the site is built without a network as well
    not_run += ["fashion_cnn", "noisy_labels"]

sphinx_gallery_conf = {
    "examples_dirs": ["tutorials", "../examples"],
    "gallery_dirs": ["learn", "gallery"],
    "filename_pattern": rf"/(?!{'|'.join(not_run)})[^/]*\.py$",
    "within_subsection_order": "FileNameSortKey",
    "reset_argv": lambda conf, script: ["--quick"],
    "download_all_examples": False,
    "remove_config_comments": True,
    "image_scrapers": ("matplotlib", figure_of),
    "ignore_repr_types": r"matplotlib\.figure\.Figure",
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "min_reported_time": 1,
}

html_theme = "furo"
html_static_path = ["_static", "../src/midflight/_reporting/look.css"]  # that of `midflight report`
html_css_files = ["look.css", "site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
maximum_signature_line_length = 100
copybutton_exclude = ".linenos, .gp, .go"
llms_txt_summary = "midflight tunes hyperparameters of a PyTorch model while it trains."


def as_code(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Show the formulas of a docstring, which are indented, as code, and keep |x| as it is."""
    found: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        said = next((text for text in reversed(lines[:number]) if text.strip()), "")
        if line.startswith("    ") and not before.strip() and not said.startswith(" ") and said[-1:] != ":":
            found += ["::", ""]
        found.append(line.replace("|", "\\|") if not line.startswith("    ") else line)
    lines[:] = found


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", tables.write)
    app.connect("autodoc-process-docstring", as_code, priority=400)  # before napoleon
