"""Sphinx configuration: ``make docs`` builds these pages, and fails on every warning."""

from __future__ import annotations

from milepost import __version__

project = "Milepost"
author = "the Milepost developers"
copyright = "the Milepost developers"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["generate.py"]
suppress_warnings = [
    "misc.highlighting_failure",  # annotated console output in a block of code
]

html_theme = "furo"
html_title = f"Milepost {version}"
html_copy_source = False
